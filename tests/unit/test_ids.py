"""Token ids are checked where they enter: an embedding is never read beyond its rows."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fastvlm_mlx import VLM
from fastvlm_mlx.calibrate.chain import Chain
from fastvlm_mlx.calibrate.examples import Question, answered
from fastvlm_mlx.chat.transcript import Exchange, LeftOut, Transcript
from fastvlm_mlx.errors import CheckpointError, PromptError, TokenizerError
from fastvlm_mlx.inputs.pieces import outside

IMAGE = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
FOREIGN = [1_000_000, 512, -1, 1 << 40]


def test_outside() -> None:
    assert outside([0, 5, 9], 10) == []
    assert outside([10, -1, 3, True, 2.0, "4", None], 10) == [10, -1, True, 2.0, "4", None]


@pytest.mark.parametrize("token", FOREIGN)
def test_the_attention_of_another_models_answer(small: VLM, token: int) -> None:
    assert small.config.text.vocab_size == 512
    answer = small.generate(IMAGE, "What is it?", max_tokens=3)
    with pytest.raises(PromptError, match=f"'{token}'.*from 0 to 511.*another model"):
        small.attention_map(IMAGE, "What is it?", replace(answer, token_ids=[*answer.token_ids, token]))
    small.attention_map(IMAGE, "What is it?", replace(answer, token_ids=[0, 511]))


def test_the_attention_of_an_answer_that_does_not_fit(small: VLM) -> None:
    answer = small.generate(IMAGE, "What is it?", max_tokens=3)
    with pytest.raises(PromptError, match="no tokens"):
        small.attention_map(IMAGE, "What is it?", replace(answer, token_ids=[]))
    with pytest.raises(PromptError, match="room for 1024"):
        small.attention_map(IMAGE, "What is it?", replace(answer, token_ids=[1] * 1024))


@pytest.mark.parametrize("token", FOREIGN)
def test_a_conversation_of_another_model(small: VLM, token: int) -> None:
    chat = small.chat()
    chat.take_up(Transcript(None, [Exchange("Hi", (), "Hello", (5, token))], LeftOut()))
    with pytest.raises(PromptError, match=r"earlier answer.*another model"):
        chat.ask("And?", max_tokens=2)


def test_a_saved_conversation(small: VLM, tmp_path: Path) -> None:
    chat = small.chat()
    chat.ask("Hi", max_tokens=2)
    path = tmp_path / "chat.json"
    chat.save(path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert Transcript.open(path, small.engine).exchanges[0].prompt == "Hi"
    path.write_text(path.read_text(encoding="utf-8-sig").replace('"answer_ids": [', '"answer_ids": [512,'))
    with pytest.raises(CheckpointError, match="another model"):
        Transcript.open(path, small.engine)


@pytest.mark.parametrize("token", FOREIGN)
def test_examples_of_another_model(small: VLM, token: int) -> None:
    examples = answered(small.engine, [Question(IMAGE, "What is it?")])
    Chain(small.model, examples)
    (item,) = examples.items
    with pytest.raises(PromptError, match="made for another model"):
        Chain(small.model, replace(examples, items=[replace(item, ids=(*item.ids, token))]))
    with pytest.raises(PromptError, match="made for another model"):
        Chain(small.model, replace(examples, items=[replace(item, pieces=[[token], *item.pieces])]))


def test_a_token_that_only_a_text_brings(small: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small.engine.tokenizer, "encode", lambda text: [9999] if "H" in text else [5])
    small.engine.prepare(None, "x", system="y")
    with pytest.raises(TokenizerError, match="9999"):
        small.engine.prepare(None, "H", system="y")


class Panic(BaseException):
    """As the exceptions that Rust's panics become."""


class Broken:
    """A tokenizer whose every use fails."""

    def __init__(self, error: BaseException):
        self.error = error

    def encode(self, text: str, add_special_tokens: bool) -> None:
        raise self.error


@pytest.mark.parametrize("error", [Panic("index out of bounds"), Exception("no unk token"), ValueError("x")])
def test_a_tokenizer_that_panics(small: VLM, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    monkeypatch.setattr(small.engine.tokenizer, "bpe", Broken(error))
    with pytest.raises(TokenizerError, match=f"fails at a text \\({error}\\); fetch"):
        small.engine.tokenizer.encode("Hi")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError(), SystemExit(3)])
def test_what_is_no_fault_of_a_tokenizer(small: VLM, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    monkeypatch.setattr(small.engine.tokenizer, "bpe", Broken(error))
    with pytest.raises(type(error)):
        small.engine.tokenizer.encode("Hi")
