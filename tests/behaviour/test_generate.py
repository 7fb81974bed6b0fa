"""The Python contract: answers, streams, seeds, several pictures, and limits."""

import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from fastvlm_mlx import VLM, load
from fastvlm_mlx.decoding.answer import finish
from fastvlm_mlx.decoding.engine import Engine
from fastvlm_mlx.decoding.generate import stream
from fastvlm_mlx.decoding.request import Options
from fastvlm_mlx.errors import CheckpointError, FastVLMError, HubError, ImageError, OptionError, PromptError
from fastvlm_mlx.inputs.image import Source
from fastvlm_mlx.inputs.pieces import ImageSlot
from fastvlm_mlx.quantize import rounding
from fastvlm_mlx.quantize.recipes import choose, plan

RED, BLUE = (np.full((40, 60, 3), colour, dtype=np.uint8) for colour in ((255, 0, 0), (0, 0, 255)))


def test_an_answer_and_its_figures(small: VLM) -> None:
    answer = small.generate(RED, "What is it?", max_tokens=9)
    assert str(answer) == answer.text == small.tokenizer.decode(answer.token_ids)
    assert answer.finish_reason == "length" and len(answer.token_ids) == 9
    stats = answer.stats
    assert (stats.images, stats.image_tokens, stats.completion_tokens) == (1, 4, 9)
    pieces = small.engine.prepare(RED, "What is it?").pieces
    assert stats.prompt_tokens == 4 + sum(len(piece) for piece in pieces if isinstance(piece, list))
    assert min(stats.vision_seconds, stats.prefill_seconds, stats.decode_tokens_per_second, stats.peak_memory_bytes) > 0


def test_the_stream_adds_up_to_the_answer(small: VLM) -> None:
    whole = small.generate(RED, "What is it?", max_tokens=20)
    chunks = list(small.stream(RED, "What is it?", max_tokens=20))
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert [chunk.answer is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[-1].answer is not None and chunks[-1].answer.token_ids == whole.token_ids


def test_an_answer_stops_at_a_stop_token(small: VLM) -> None:
    """The third token the model gives, declared a stop token, ends the answer and is not shown."""
    tokens = small.generate(RED, "What is it?", max_tokens=8).token_ids
    third = next(i for i in range(2, 8) if tokens[i] not in tokens[:i])
    options = Options(8, stop_tokens=(tokens[third],))
    answer = finish(stream(small.engine, small.engine.prepare(RED, "What is it?"), options))
    assert answer.finish_reason == "stop"
    assert answer.token_ids == tokens[: third + 1]
    assert answer.text == small.tokenizer.decode(tokens[:third])


def test_stop_tokens_come_from_the_files(small: VLM) -> None:
    expected = {small.tokenizer.special("<|im_end|>"), small.tokenizer.special("<|endoftext|>")}
    assert set(small.config.eos_token_ids) == expected


def test_a_seed_repeats_and_another_differs(small: VLM) -> None:
    def draw(seed: int | None, top_p: float = 1.0) -> list[int]:
        return small.generate(RED, max_tokens=16, temperature=1.5, seed=seed, top_p=top_p).token_ids

    assert draw(1) == draw(1) != draw(2)
    assert draw(None) != draw(None)
    assert draw(3, top_p=0.5) == draw(3, top_p=0.5)


def test_a_tiny_nucleus_is_greedy(small: VLM) -> None:
    greedy = small.generate(RED, max_tokens=12).token_ids
    assert small.generate(RED, max_tokens=12, temperature=2.0, top_p=1e-9, seed=5).token_ids == greedy


def test_drawing_leaves_the_global_random_state_alone(small: VLM) -> None:
    mx.random.seed(7)
    expected = mx.random.uniform().item()
    mx.random.seed(7)
    small.generate(RED, max_tokens=4, temperature=1.0)
    assert mx.random.uniform().item() == expected


def test_several_pictures_stand_where_they_were_given(small: VLM) -> None:
    """The prompt's embeddings hold each picture's own features at its own place."""
    request = small.engine.prepare([RED, BLUE, RED], "Compare them.")
    slots = [piece.index for piece in request.pieces if isinstance(piece, ImageSlot)]
    assert slots == [0, 1, 2]
    red, blue = small.encode_image([RED, BLUE])
    assert not np.array_equal(np.array(red), np.array(blue))
    pictures, position = [red, blue, red], 0
    embeddings = small.model.embed(request.pieces, dict(enumerate(pictures)))[0]
    for piece in request.pieces:
        length = len(piece)
        if isinstance(piece, ImageSlot):
            assert np.array_equal(np.array(embeddings[position : position + 4]), np.array(pictures[piece.index]))
        else:
            text = small.model.text.embed_tokens(mx.array(piece))
            assert np.array_equal(np.array(embeddings[position : position + length]), np.array(text))
        position += length
    assert position == request.prompt_tokens == len(embeddings)


def test_no_picture_at_all(small: VLM) -> None:
    answer = small.generate(None, "Hello!", max_tokens=3)
    assert answer.stats.images == answer.stats.image_tokens == 0 and len(answer.token_ids) == 3


def test_every_kind_of_source_gives_the_same(small: VLM, tmp_path: Path) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8))
    path = tmp_path / "a picture.png"
    image.save(path)
    sources: list[Source] = [str(path), path, path.read_bytes(), image, np.asarray(image)]
    embeddings = [np.array(small.encode_image(source)) for source in sources]
    assert all(np.array_equal(embeddings[0], other) for other in embeddings[1:])
    assert embeddings[0].shape == (4, small.config.text.hidden_size)
    assert isinstance(small.encode_image([image]), list)


def test_the_system_prompt_changes_the_prompt(small: VLM) -> None:
    plain, other, none = (
        small.engine.prepare(None, "Hi", system=system).pieces for system in (None, "You are a pirate.", "")
    )
    assert len({str(pieces) for pieces in (plain, other, none)}) == 3
    assert plain == small.engine.prepare(None, "Hi", system="You are a helpful assistant.").pieces


def test_resolution(apple: Path) -> None:
    vlm = load(str(apple), resolution=320)
    assert vlm.encode_image(RED).shape[0] == 25  # type: ignore[union-attr]
    for bad in (0, 63, 100, -64, 4160, 1 << 40):
        with pytest.raises(OptionError, match="multiple of 64"):
            load(str(apple), resolution=bad)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_bits(apple: Path, small: VLM, bits: int) -> None:
    vlm = load(str(apple), bits=bits, group_size=32, dtype="float32")
    assert vlm.model.text.layers[0].mlp.down_proj.bits == bits
    assert vlm.model.text.embed_tokens.bits == 8
    assert len(vlm.generate(RED, max_tokens=4).token_ids) == 4
    rounded = load(str(apple), dtype="float32").model  # the same rounding, kept in float32
    for path, settings in plan(rounded, choose(bits=bits, group_size=32))[0].items():
        weight = rounded.flat_parameters()[f"{path}.weight"]
        rounded.load_weights([(f"{path}.weight", rounding.rounded(weight, settings, mx.bfloat16))], strict=False)
    ids = [list(range(40, 70))]
    ours, same, exact = (
        np.array(m.prefill(m.embed(ids, {}), m.text.make_cache())).ravel() for m in (vlm.model, rounded, small.model)
    )
    assert np.abs(ours - same).max() < 1e-4 * np.abs(same).max()
    assert np.abs(ours - exact).max() > 1e-3 * np.abs(exact).max()
    with pytest.raises(OptionError, match="`bits` is 7"):
        load(str(apple), bits=7)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_dtype(apple: Path, dtype: str) -> None:
    vlm = load(str(apple), dtype=dtype)  # type: ignore[arg-type]
    assert vlm.model.dtype == getattr(mx, dtype)
    with pytest.raises(OptionError, match="int8"):
        load(str(apple), dtype="int8")  # type: ignore[arg-type]


def test_a_prompt_longer_than_the_context_is_refused_not_cut(small: VLM) -> None:
    limit = small.config.text.max_position_embeddings
    with pytest.raises(PromptError, match=f"room for {limit}"):
        small.generate(RED, "word " * 2 * limit)
    with pytest.raises(PromptError, match="300 images"):
        small.generate([RED] * 300, "Compare.")


def test_an_answer_ends_where_the_context_does(small: VLM) -> None:
    limit = small.config.text.max_position_embeddings
    room = 5
    words = limit - room - small.engine.prepare(None, "").prompt_tokens
    prompt = "0" * words  # one token each
    assert small.engine.prepare(None, prompt).prompt_tokens == limit - room
    answer = small.generate(None, prompt, max_tokens=50)
    assert len(answer.token_ids) == room and answer.finish_reason == "length"


@pytest.mark.parametrize(
    "options",
    [
        {"max_tokens": 0}, {"max_tokens": -1}, {"max_tokens": 1.5}, {"max_tokens": True}, {"temperature": -0.1},
        {"temperature": float("nan")}, {"temperature": float("inf")}, {"top_p": 0}, {"top_p": 1.1},
        {"top_p": float("nan")},
        {"seed": -1}, {"seed": 1 << 64}, {"seed": 0.5},
    ],
)  # fmt: skip
def test_options_outside_their_range(options: dict[str, float]) -> None:
    with pytest.raises(OptionError, match=next(iter(options))):
        Options(**options)  # type: ignore[arg-type]


def test_paths_and_no_image(apple: Path, small: VLM) -> None:
    assert Engine.open(apple).name == str(apple)
    with pytest.raises(HubError, match="no such folder"):
        load(Path("/no/where"))
    with pytest.raises(ImageError, match="no image"):
        small.encode_image(None)  # type: ignore[arg-type]


def test_the_commonest_mistakes(apple: Path, tmp_path: Path, small: VLM) -> None:
    with pytest.raises(HubError, match="no such folder, and not a Hub name"):
        load(str(tmp_path / "nowhere"))
    with pytest.raises(HubError, match="is a file"):
        load(str(apple / "config.json"))
    with pytest.raises(ImageError, match="no such image"):
        small.generate(str(tmp_path / "photo.jpg"))
    config = json.loads((apple / "config.json").read_text())
    (apple / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    with pytest.raises(CheckpointError, match="'llama'"):
        load(str(apple))


@pytest.mark.parametrize("stop_tokens", [5, "5", (1.5,), (-1,)])
def test_stop_tokens_that_are_none(stop_tokens: object) -> None:
    with pytest.raises(OptionError, match="list or tuple of token ids"):
        Options(stop_tokens=stop_tokens)  # type: ignore[arg-type]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_every_token_may_be_read_in_another_thread(small: VLM, temperature: float) -> None:
    alone = small.generate(RED, "What is it?", max_tokens=6, temperature=temperature, seed=1)
    chunks = small.stream(RED, "What is it?", max_tokens=6, temperature=temperature, seed=1)
    text = ""
    while True:
        with ThreadPoolExecutor(1) as pool:
            chunk = pool.submit(next, chunks, None).result()
        if chunk is None:
            break
        text += chunk.text
    assert text == alone.text


def test_a_model_is_not_pickled(small: VLM) -> None:
    with pytest.raises(FastVLMError, match="load it"):
        pickle.dumps(small)


@pytest.mark.parametrize("image", [RED, None], ids=["a picture", "no picture"])
def test_the_first_answer_may_come_from_another_thread(apple: Path, image: np.ndarray | None) -> None:
    """As in a server: nothing that loading left to be computed belongs to the thread that loaded."""
    vlm, another = load(str(apple)), load(str(apple))
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(vlm.generate, image, "What is it?", max_tokens=4).result()
    assert answer.text == another.generate(image, "What is it?", max_tokens=4).text
