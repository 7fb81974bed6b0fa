"""Lists and batches: every answer is the one its question gets alone, and nothing shared is computed twice."""

import gc
import random
import weakref
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from fastvlm_mlx import VLM, Answer
from fastvlm_mlx.backend.ops import general_forms
from fastvlm_mlx.decoding import batch
from fastvlm_mlx.decoding.engine import Engine
from fastvlm_mlx.decoding.loading import open_model
from fastvlm_mlx.decoding.request import Options
from fastvlm_mlx.errors import CheckpointError, ImageError, OptionError, PromptError
from fastvlm_mlx.hub.find import find
from fastvlm_mlx.network.kv_cache import KVCache, RaggedCache, ragged

from .. import checkpoint

PICTURES = [np.random.default_rng(seed).integers(0, 256, (40, 60, 3), dtype=np.uint8) for seed in range(4)]
WORDS = [
    "what",
    "is",
    "the",
    "colour",
    "of",
    "this",
    "thing",
    "图里有什么",
    "and",
    "how",
    "many",
    "are",
    "there",
    "left?",
]
MODELS: list[dict[str, Any]] = [
    {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2},
    {"hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 3, "num_key_value_heads": 1, "tied": False},
    {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2},
]


@pytest.fixture(scope="module", params=range(len(MODELS)))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tokenizer_files: Path) -> VLM:
    """A random model that stops at any of forty tokens, so that answers end early and at different lengths."""
    folder = checkpoint.write(tmp_path_factory.mktemp("batch") / "model", tokenizer_files, **MODELS[request.param])
    opened = open_model(find(folder))
    stops = tuple(random.Random(request.param).sample(range(opened.config.text.vocab_size), 40))
    config = replace(opened.resolve(), eos_token_ids=stops)
    engine = Engine(replace(opened, config=config, resolve=lambda: config))
    engine.load_weights(dtype="float32")
    return VLM(engine)


def random_questions(rng: random.Random) -> list[tuple[Any, str]]:
    """Of any length, about no, one or two pictures."""
    lengths = [rng.choice([1, 2, 5, 12, 40]) for _ in range(rng.randint(1, 9))]
    return [
        (rng.sample(PICTURES, rng.choice([0, 1, 1, 1, 2])), " ".join(rng.choices(WORDS, k=length)))
        for length in lengths
    ]


@pytest.mark.parametrize("seed", range(8))
def test_a_batch_answers_as_one_by_one(model: VLM, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(seed)
    monkeypatch.setattr(batch, "MAX_BATCH_ROWS", rng.choice([2, 3, 16]))
    monkeypatch.setattr(batch, "MAX_PREPARED", rng.choice([1, 2, 32]))
    questions = random_questions(rng)
    options: dict[str, Any] = {"max_tokens": rng.choice([1, 2, 9, 30])}
    if seed % 2:
        options |= {
            "temperature": rng.choice([0.5, 1.0, 2.0]),
            "top_p": rng.choice([0.5, 1.0]),
            "seed": rng.randrange(1 << 64),
        }
    alone = [model.generate(image, prompt, **options) for image, prompt in questions]
    together = model.batch(questions, **options)
    assert [answer.token_ids for answer in together] == [answer.token_ids for answer in alone]
    assert [(answer.text, answer.finish_reason) for answer in together] == [
        (answer.text, answer.finish_reason) for answer in alone
    ]
    for one, other in zip(together, alone, strict=True):
        figures = ("images", "image_tokens", "prompt_tokens", "completion_tokens")
        assert all(getattr(one.stats, name) == getattr(other.stats, name) for name in figures)


def test_rows_of_any_length_attend_as_alone() -> None:
    """Steps of rows that join and leave, through attention, against each row's own; and wider than there are rows."""
    from fastvlm_mlx.diagnostics.random_model import open_random

    engine = Engine(open_random("small", layers=1))
    engine.load_weights()
    attend = engine.model.text.layers[0].self_attn
    draw = np.random.default_rng(0)
    own, together, last = [], [], []
    for length in (1, 7, 300, 255):
        cache = KVCache()
        attend(mx.array(draw.normal(size=(1, length, 128)).astype(np.float32)), cache)
        own.append(cache)
        together.append(cache.fork(length))
        last.append(mx.array(draw.normal(size=(1, 1, 128)).astype(np.float32)))
    for staying, width in (([0, 1, 2, 3], 4), ([3, 1], 2), ([3, 1], 5), ([3], 1)):
        (layer,) = ragged([[together[i]] for i in staying], width)
        assert isinstance(layer, RaggedCache) == (width > 1)
        unused = [mx.zeros((1, 1, 128))] * (width - len(staying))
        ours = np.array(attend(mx.concatenate([last[i] for i in staying] + unused), layer))[: len(staying)]
        expected = np.concatenate([np.array(attend(last[i], own[i])) for i in staying])
        assert np.abs(ours - expected).max() < 1e-5 * np.abs(expected).max()
    assert [cache.length for cache in together] == [cache.length for cache in own] == [2, 10, 301, 259]


def test_a_fork_and_what_it_was_forked_from_go_on_apart() -> None:
    draw = np.random.default_rng(0)

    def some(length: int) -> mx.array:
        return mx.array(draw.normal(size=(1, 2, length, 4)).astype(np.float32))

    first, then, ours, theirs = some(300), some(20), some(3), some(3)
    cache = KVCache()
    cache.update(first, first)
    cache.update(then, then)
    fork = cache.fork(300)
    short = cache.fork(5)
    assert (fork.length, short.length, cache.fork(999).length, KVCache().fork(3).length) == (300, 5, 320, 0)
    assert short.nbytes < fork.nbytes == cache.nbytes
    fork.update(theirs, theirs)
    cache.update(ours, ours)
    short.update(theirs, theirs)
    assert mx.array_equal(cache.held[0], mx.concatenate([first, then, ours], axis=2))
    assert mx.array_equal(fork.held[1], mx.concatenate([first, theirs], axis=2))
    assert mx.array_equal(short.held[0], mx.concatenate([first[:, :, :5], theirs], axis=2))


def test_a_step_makes_the_positions_once_for_all_layers_and_no_mask(small: VLM) -> None:
    def held(length: int) -> list[KVCache]:
        caches = small.model.text.make_cache()
        for cache in caches:
            cache.update(*(mx.zeros((1, attention.kv_heads, length, attention.head_dim)),) * 2)
        return caches

    attention = small.model.text.layers[0].self_attn
    assert len(small.model.text.layers) > 1
    rows = [held(length) for length in (9, 3, 5)]
    caches = ragged(rows)
    assert all(cache.offset is caches[0].offset for cache in caches)
    assert caches[0].offset.tolist() == [9, 3, 5]  # type: ignore[union-attr]
    found: list[dict[str, Any]] = []
    with general_forms():
        mx.export_function(found.append, lambda token: small.model.step(token, caches), mx.zeros((3,), mx.uint32))
    made = Counter(entry["name"] for entry in found if entry["type"] == "primitive")
    assert made["GreaterEqual"] == 0 and made["ScaledDotProductAttention"] in (0, 3 * len(rows[0]))


def test_a_picture_is_encoded_once_and_the_shared_beginning_prefilled_once(
    small: VLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "picture.png"
    Image.fromarray(PICTURES[0]).save(path)
    small.images.clear()
    decoded, encoded, prefilled = [], [], []
    pixels, encode, prefill = small.engine.pixels, small.model.encode, small.model.prefill
    monkeypatch.setattr(small.engine, "pixels", lambda source, **how: decoded.append(1) or pixels(source, **how))
    monkeypatch.setattr(small.model, "encode", lambda x: encoded.append(len(x)) or encode(x))
    monkeypatch.setattr(small.model, "prefill", lambda x, cache: prefilled.append(x.shape[1]) or prefill(x, cache))
    prompts = ["What is it?", "And where?", "Why is that so, and since when?"]
    answers = small.generate(str(path), prompts, max_tokens=4)
    assert (decoded, encoded) == ([1], [1])
    lengths = [answer.stats.prompt_tokens for answer in answers]
    system = len(small.tokenizer.encode("system\nYou are a helpful assistant.")) + len(small.tokenizer.encode("\n")) + 2
    shared = system + 1 + len(small.tokenizer.encode("user\n")) + small.engine.image_tokens
    assert prefilled[0] == lengths[0]
    assert all(own <= length - shared for own, length in zip(prefilled[1:], lengths[1:], strict=True))
    assert [answer.stats.reused_tokens for answer in answers] == [
        length - own for own, length in zip(prefilled, lengths, strict=True)
    ]

    prefilled.clear()
    small.images.clear()
    encoded.clear()
    mixed = [(PICTURES[1], prompts[0]), (PICTURES[2], prompts[0]), (PICTURES[1], prompts[1]), (PICTURES[2], prompts[1])]
    lengths = [answer.stats.prompt_tokens for answer in small.batch(mixed, max_tokens=2)]
    assert encoded == [1, 1]
    assert prefilled[0] == lengths[0] and prefilled[1] > lengths[1] - shared  # each picture with its first question,
    assert all(own <= lengths[2] - shared for own in prefilled[2:])  # and then what is new


def test_pictures_that_are_made_one_by_one_are_not_mixed_up(small: VLM) -> None:
    """Each is gone when the next but one is made, and its place in memory taken; or one is painted over."""
    expected = [small.engine.pixels(Image.new("RGB", (60, 40), (level, level, level))) for level in range(60)]
    canvas = np.zeros((40, 60, 3), np.uint8)

    def painted(level: int) -> np.ndarray:
        canvas[:] = level
        return canvas

    for make in (lambda level: Image.new("RGB", (60, 40), (level, level, level)), painted):
        requests = small.engine.prepare_all((make(level), "What is it?") for level in range(60))
        assert all((request.pixels[0] == pixels).all() for request, pixels in zip(requests, expected, strict=True))


def test_steps_are_shared_and_rows_that_end_leave(small: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    questions = [(PICTURES[i], word) for i, word in enumerate(WORDS[:4])]
    alone = [small.generate(*question, max_tokens=12).token_ids for question in questions]
    stops = {ids[place] for ids, place in zip(alone, (2, 5, 8), strict=False)}
    options = Options(12, stop_tokens=tuple(stops))
    rows: list[int] = []
    step = small.model.step
    monkeypatch.setattr(small.model, "step", lambda token, cache: rows.append(len(token)) or step(token, cache))
    answers = batch.answer_in_order(small.engine, small.engine.prepare_all(questions), options)
    lengths = [len(answer.token_ids) for answer in answers]
    assert min(lengths) < max(lengths) and len(rows) <= max(lengths)
    assert rows == sorted(rows, reverse=True) and rows[0] == 4
    assert sum(rows) <= sum(lengths) + len(questions)  # a row takes part in no more than one step after its end


def test_several_answers_with_one_seed_and_without(small: VLM) -> None:
    same = small.generate(PICTURES[0], ["What is it?"] * 3, max_tokens=10, temperature=1.5, seed=4)
    assert len({tuple(answer.token_ids) for answer in same}) == 1
    drawn = small.generate(PICTURES[0], ["What is it?"] * 3, max_tokens=10, temperature=1.5)
    assert len({tuple(answer.token_ids) for answer in drawn}) == 3


def test_an_answer_in_a_batch_ends_where_the_context_does(small: VLM) -> None:
    limit = small.config.text.max_position_embeddings
    long = "0" * (limit - 5 - small.engine.prepare(None, "").prompt_tokens)
    lengths = [len(answer.token_ids) for answer in small.batch([(None, long), (None, "Hi")], max_tokens=9)]
    assert lengths == [5, 9]


def test_nothing_is_computed_where_something_is_wrong(small: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    assert small.batch([]) == small.generate(PICTURES[0], []) == []
    monkeypatch.setattr(small.model, "encode", lambda pixels: pytest.fail("encoded"))
    small.images.clear()
    with pytest.raises(ImageError, match="no such image"):
        small.batch([(PICTURES[0], "What is it?"), ("no-such-picture.png", "And this?")])
    with pytest.raises(PromptError, match=r"Question 2 is 'And\?', expected a pair"):
        small.batch([(PICTURES[0], "What is it?"), "And?"])  # type: ignore[list-item]
    with pytest.raises(PromptError, match="expected text"):
        small.generate(PICTURES[0], ["What is it?", 7])  # type: ignore[list-item]
    with pytest.raises(OptionError, match="max_tokens"):
        small.batch([(PICTURES[0], "What is it?")], max_tokens=0)


def test_of_a_long_list_all_but_the_pictures_is_checked_first(small: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small.model, "encode", lambda pixels: pytest.fail("encoded"))
    small.images.clear()
    many: list[Any] = [(PICTURES[0], "What is it?")] * (batch.MAX_PREPARED + 5)
    wrong: Any
    for wrong, error, said in (
        (("no-such-picture.png", "And this?"), ImageError, "no such image"),
        ("And?", PromptError, f"Question {len(many) + 1} is 'And\\?'"),
        ((None, 7), PromptError, "expected text"),
    ):
        with pytest.raises(error, match=said):
            small.batch([*many, wrong])


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_questions(small: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures are decoded as they are needed, also from a generator, whose end nobody knows; answers are in order."""
    monkeypatch.setattr(batch, "MAX_PREPARED", 4)
    monkeypatch.setattr(batch, "MAX_BATCH_ROWS", 3)
    prepare = small.engine.pixels
    alive: list[weakref.ref[Any]] = []
    most = 0

    def pixels(source: Any, **how: Any) -> Any:
        nonlocal most
        found = prepare(source, **how)
        alive.append(weakref.ref(found))
        most = max(most, sum(each() is not None for each in alive))
        return found

    monkeypatch.setattr(small.engine, "pixels", pixels)
    levels = [7 * number % 256 for number in range(60)]
    pictures = (Image.new("RGB", (60, 40), (level, 0, 255 - level)) for level in levels)
    answers = small.batch(((picture, "What is it?") for picture in pictures), max_tokens=3)
    assert len(answers) == 60 and len(alive) == 60 and most <= 4 + 3 + 1
    for number in (0, 31, 59):
        picture = Image.new("RGB", (60, 40), (levels[number], 0, 255 - levels[number]))
        assert answers[number].token_ids == small.generate(picture, "What is it?", max_tokens=3).token_ids


def test_rows_that_end_are_filled_again(small: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "MAX_BATCH_ROWS", 4)
    widths: list[int] = []
    step = small.model.step
    monkeypatch.setattr(small.model, "step", lambda x, caches: [widths.append(len(x)), step(x, caches)][1])
    rng = random.Random(0)
    stops = tuple(rng.sample(range(small.config.text.vocab_size), 60))
    asked = small.engine.prepare_each((None, " ".join(rng.choices(WORDS, k=5))) for _ in range(40))
    answers = dict(batch.answer_all(small.engine, asked, Options(12, 1.5, seed=1, stop_tokens=stops)))
    lengths = [len(answer.token_ids) for answer in answers.values() if isinstance(answer, Answer)]
    assert len(lengths) == 40 and min(lengths) < max(lengths)
    assert set(widths[:-12]) == {4} and sum(widths) == sum(lengths) - 40


@pytest.mark.slow
def test_a_batch_that_is_interrupted_or_left_keeps_nothing(small: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    questions = [(picture, "What is it?") for picture in PICTURES]
    expected = [answer.token_ids for answer in small.batch(questions, max_tokens=6)]
    step, steps = small.model.step, iter(range(3))

    def interrupted(tokens: mx.array, caches: Any) -> mx.array:
        if next(steps, None) is None:
            raise KeyboardInterrupt
        return step(tokens, caches)

    def caches() -> int:
        gc.collect()
        return sum(type(each) is KVCache for each in gc.get_objects())

    before = caches()
    with monkeypatch.context() as patch:
        patch.setattr(small.model, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            small.batch(questions, max_tokens=6)
    assert caches() == before
    asked = batch.answer_all(small.engine, small.engine.prepare_each(questions), Options(6))
    next(asked)
    asked.close()
    del asked
    assert caches() == before
    assert [answer.token_ids for answer in small.batch(questions, max_tokens=6)] == expected


@pytest.mark.slow
def test_a_batch_goes_on_after_a_bad_question_when_asked(
    small: VLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 not a picture")
    questions: list[Any] = [
        (PICTURES[0], "What is it?"), (tmp_path / "broken.jpg", "And this?"), ("no-such-picture.png", "What?"), "And?",
        (None, "word " * 40_000), (PICTURES[1], "What is it?"),
    ]  # fmt: skip
    good = [0, 5]
    answers = small.batch(questions, max_tokens=5, on_error="return")
    assert [type(answer) for answer in answers] == [Answer, ImageError, ImageError, PromptError, PromptError, Answer]
    for index in good:
        answer = answers[index]
        assert (
            isinstance(answer, Answer) and answer.token_ids == small.generate(*questions[index], max_tokens=5).token_ids
        )
    assert "Question 4 is 'And?'" in str(answers[3])
    shown = str(answers)
    assert shown.count("ImageError: ") == 2 and shown.count("PromptError: ") == 2
    assert answers._repr_html_().count("<div class") == len(questions) and "PromptError" in answers._repr_markdown_()

    with pytest.raises(ImageError):
        small.batch(questions, max_tokens=5)
    with pytest.raises(OptionError, match="`on_error` is 'ignore', expected 'raise' or 'return'"):
        small.batch(questions, on_error="ignore")  # type: ignore[call-overload]
    assert small.batch([], on_error="return") == []
    assert [type(answer) for answer in small.batch(questions[1:3], on_error="return")] == [ImageError, ImageError]

    encode = small.model.encode
    small.images.clear()

    def overflow(pixels: mx.array) -> mx.array:
        return encode(pixels) * (mx.inf if mx.array_equal(pixels[0], mx.array(small.engine.pixels(PICTURES[2]))) else 1)

    monkeypatch.setattr(small.model, "encode", overflow)
    later = small.batch([(PICTURES[i], "What is it?") for i in (0, 2, 1)], max_tokens=5, on_error="return")
    assert [type(answer) for answer in later] == [Answer, CheckpointError, Answer]
    for again, first in ((later[0], answers[0]), (later[2], answers[5])):
        assert isinstance(again, Answer) and isinstance(first, Answer) and again.token_ids == first.token_ids
    small.images.clear()


def test_the_benchmark_compares_equal_answers(small: VLM) -> None:
    from benchmarks import batch as benchmark

    pairs = benchmark.measure(small.engine, benchmark.questions(3), tokens=4, rounds=2)
    assert len(pairs) == 2 and all(pair.equal and pair.decode > 0 and pair.whole > 0 for pair in pairs)
    assert len({len(prompt) for _, prompt in benchmark.questions(4)}) == 4
