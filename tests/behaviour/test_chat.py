"""Conversations: the answer with reuse is the answer from scratch, and a follow-up computes its own tokens only."""

import json
import random
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from fastvlm_mlx import VLM, FastVLMError
from fastvlm_mlx.chat import Chat
from fastvlm_mlx.errors import CheckpointError, ImageError, OutputError, PromptError
from fastvlm_mlx.generate import Options, Request
from fastvlm_mlx.imagecache import ImageCache
from fastvlm_mlx.prompt import Turn

PICTURES = [np.random.default_rng(seed).integers(0, 256, (40, 60, 3), dtype=np.uint8) for seed in range(4)]
WORDS = ["What is it?", "And now?", "图里有什么？", "Describe\nthe image.", "Which colour?", ""]


def from_scratch(vlm: VLM, chat: Chat, prompt: str, pictures: list[np.ndarray], max_tokens: int) -> list[int]:
    """The ids of the next answer with nothing reused, from the conversation as it stands."""
    turns = [exchange.turn for exchange in chat._exchanges]
    shown = [picture.pixels for exchange in chat._exchanges for picture in exchange.pictures]
    pieces = vlm.render([*turns, Turn(prompt, len(pictures))], chat.system)
    request = Request([*shown, *(vlm.pixels(picture) for picture in pictures)], pieces, 0.0)
    vlm.images.clear()
    return next(chunk.answer for chunk in vlm.answer(request, Options(max_tokens)) if chunk.answer is not None).token_ids


@pytest.mark.parametrize("seed", range(12))
def test_random_conversations(small: VLM, seed: int) -> None:
    """Text, one or several images, an image added later, turns undone, the system prompt changed, answers cut short."""
    rng = random.Random(seed)
    chat = small.chat(system=rng.choice([None, "Be brief."]))
    for _ in range(8):
        action = rng.random()
        if action < 0.15 and chat.messages:
            chat.system = rng.choice([None, "Be brief.", "You are a pirate."])
        elif action < 0.3 and chat._exchanges:
            for _ in range(rng.randint(1, len(chat._exchanges))):
                chat.undo()
        elif action < 0.4:
            for chunk in chat.stream(rng.choice(WORDS), rng.choice(PICTURES), max_tokens=9):
                if chunk.text and rng.random() < 0.5:
                    break
        prompt, length = rng.choice(WORDS), rng.randint(1, 12)
        pictures = rng.sample(PICTURES, rng.choice([0, 0, 1, 1, 2]))
        expected = from_scratch(small, chat, prompt, pictures, length)
        assert chat.ask(prompt, pictures, max_tokens=length).token_ids == expected


def test_a_stream_left_standing_does_not_disturb_what_comes_after(small: VLM) -> None:
    """As in a notebook, where an interrupted loop keeps its stream until much later."""
    chat = small.chat()
    chat.ask("What is it?", PICTURES[0], max_tokens=4)
    left = chat.stream("And now?", max_tokens=30)
    while not next(left).text:
        pass
    expected = from_scratch(small, chat, "Which colour?", [], 6)
    assert chat.ask("Which colour?", max_tokens=6).token_ids == expected
    with pytest.raises(PromptError, match="Another question"):
        list(left)
    left.close()  # type: ignore[attr-defined]
    chat.undo()
    expected = from_scratch(small, chat, "And now?", PICTURES[1:2], 6)
    assert chat.ask("And now?", PICTURES[1], max_tokens=6).token_ids == expected
    assert len(chat.messages) == 4


def test_a_follow_up_costs_its_own_tokens_only(small: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = small.chat()
    first = chat.ask("What is it?", PICTURES[0], max_tokens=10)
    assert first.stats.reused_tokens == 0
    encoded, prefilled = [], []
    encode, prefill = small.model.encode, small.model.prefill
    monkeypatch.setattr(small.model, "encode", lambda pixels: encoded.append(1) or encode(pixels))
    monkeypatch.setattr(small.model, "prefill", lambda x, cache: prefilled.append(x.shape[1]) or prefill(x, cache))
    second = chat.ask("And now?", max_tokens=10)
    # cut short after ten tokens, so the tenth was never fed back: it, the end of its turn, and the question
    own = len(small.tokenizer.encode("\n")) + len(small.tokenizer.encode("user\nAnd now?")) + len(small.tokenizer.encode("\n"))
    own += 1 + 1 + 1 + 1 + 1 + len(small.tokenizer.encode("assistant\n"))
    assert prefilled == [own] and encoded == []
    assert second.stats.reused_tokens == second.stats.prompt_tokens - own


def test_the_answers_ids_are_kept_as_they_were_generated(small: VLM) -> None:
    chat = small.chat()
    answer = chat.ask("What is it?", PICTURES[0], max_tokens=15)
    pieces = small.render([chat._exchanges[0].turn])
    last = pieces[-1]
    assert isinstance(last, list)
    end = [small.tokenizer.special("<|im_end|>"), *small.tokenizer.encode("\n")]
    assert last[-15 - len(end) :] == [*answer.token_ids, *end]


def test_pictures_are_known_by_content(small: VLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "picture.png"
    Image.fromarray(PICTURES[0]).save(path)
    small.images.clear()
    small.generate(str(path), max_tokens=1)
    encoded: list[int] = []
    encode = small.model.encode
    monkeypatch.setattr(small.model, "encode", lambda pixels: encoded.append(1) or encode(pixels))
    small.generate(PICTURES[0], "Another question?", max_tokens=1)
    assert encoded == [] and len(small.images) == 1
    Image.fromarray(PICTURES[1]).save(path)  # another picture under the same path
    small.generate(str(path), max_tokens=1)
    assert encoded == [1] and len(small.images) == 2


def test_the_image_cache_is_bounded() -> None:
    cache = ImageCache(capacity=1000)
    for i in range(10):
        cache.put(bytes([i]), mx.zeros((100,), dtype=mx.float32))
    assert len(cache) == 2 and cache.nbytes == 800
    assert cache.get(bytes([9])) is not None and cache.get(bytes([0])) is None
    assert cache.get(bytes([8])) is not None
    cache.put(b"new", mx.zeros((100,), dtype=mx.float32))
    assert cache.get(bytes([8])) is not None and cache.get(bytes([9])) is None  # the one unused for longest went
    cache.put(b"huge", mx.zeros((1000,), dtype=mx.float32))
    assert cache.get(b"huge") is None


def test_messages_and_undo(small: VLM, tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    Image.fromarray(PICTURES[0]).save(path)
    chat = small.chat(system="Be brief.")
    answer = chat.ask("What is it?", str(path), max_tokens=4)
    chat.ask("And now?", PICTURES[1], max_tokens=4)
    assert [message["role"] for message in chat.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert chat.messages[1] == {"role": "user", "content": "What is it?", "images": [str(path)]}
    assert chat.messages[2]["content"] == answer.text and chat.messages[3]["images"] == [None]
    assert chat.undo().prompt == "And now?"
    assert len(chat.messages) == 3
    chat.clear()
    with pytest.raises(PromptError, match="nothing to undo"):
        chat.undo()


def test_saved_and_reopened(small: VLM, tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    Image.fromarray(PICTURES[0]).save(path)
    chat = small.chat(system="Be brief.")
    chat.ask("What is it?", [str(path), PICTURES[1]], max_tokens=6)
    chat.ask("And now?", max_tokens=6)
    chat.save(tmp_path / "chat.json")
    again = small.chat()
    again.load(tmp_path / "chat.json")
    assert again.messages == chat.messages
    assert again.ask("Why?", max_tokens=8).token_ids == chat.ask("Why?", max_tokens=8).token_ids
    assert sorted(p.name for p in tmp_path.iterdir()) == ["chat.json", "picture.png"]


def test_what_is_wrong_with_a_transcript_is_said_and_changes_nothing(small: VLM, tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    Image.fromarray(PICTURES[0]).save(path)
    chat = small.chat()
    chat.ask("What is it?", str(path), max_tokens=3)
    chat.save(tmp_path / "chat.json")
    before, good = chat.messages, json.loads((tmp_path / "chat.json").read_text())

    def broken(text: str, says: str, error: type[FastVLMError] = CheckpointError) -> None:
        (tmp_path / "chat.json").write_text(text)
        with pytest.raises(error, match=says):
            chat.load(tmp_path / "chat.json")
        assert chat.messages == before

    broken("", "not a transcript")
    broken("[]", "damaged|not a transcript")
    broken("{}", "damaged|not a transcript")
    broken(json.dumps(good | {"version": 99}), "not a transcript of this version")
    broken(json.dumps(good | {"resolution": 256}), "resolution=256")
    broken(json.dumps(good | {"system": 7}), "damaged|not a transcript")
    broken(json.dumps(good | {"exchanges": [{}]}), "damaged|not a transcript")
    broken(json.dumps(good | {"exchanges": [good["exchanges"][0] | {"answer_ids": [1 << 40]}]}), "another model")
    Image.fromarray(PICTURES[1]).save(path)
    broken(json.dumps(good), "no longer the picture")
    path.unlink()
    broken(json.dumps(good), "no such image", ImageError)
    with pytest.raises(CheckpointError, match="no such transcript"):
        chat.load(tmp_path / "nowhere.json")
    with pytest.raises(OutputError, match="cannot be written"):
        chat.save(tmp_path / "no" / "such" / "folder.json")


def test_too_long_a_question_leaves_the_conversation_as_it_was(small: VLM) -> None:
    chat = small.chat()
    chat.ask("What is it?", PICTURES[0], max_tokens=3)
    before = chat.messages
    with pytest.raises(PromptError, match="has room for"):
        chat.ask("word " * 40_000)
    with pytest.raises(ImageError):
        chat.ask("And this?", "no-such-picture.png")
    assert chat.messages == before
    expected = from_scratch(small, chat, "And now?", [], 5)
    assert chat.ask("And now?", max_tokens=5).token_ids == expected
