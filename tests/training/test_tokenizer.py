"""The tokenizer: Qwen2's form, words whole, printed text by characters."""

from __future__ import annotations

from pathlib import Path

import pytest

from training import tokenizer as bpe
from training.data import BEFORE_IMAGE, after_image
from training.questions import corpus
from training.world import WORDS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    bpe.save(path, *bpe.build(corpus()))
    return path


def test_round_trip(folder: Path) -> None:
    tokenizer = bpe.load(folder)
    for text in (*corpus(), "Grüße, 世界! \t\n  x", BEFORE_IMAGE):
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_words_of_questions_are_single_tokens(folder: Path) -> None:
    tokens = bpe.load(folder).encode(after_image("What color is the triangle?")).tokens
    assert tokens == [
        "Ċ",
        "What",
        "Ġcolor",
        "Ġis",
        "Ġthe",
        "Ġtriangle",
        "?",
        "<|im_end|>",
        "Ċ",
        "<|im_start|>",
        "assistant",
        "Ċ",
    ]


def test_printed_text_is_spelled(folder: Path) -> None:
    tokenizer = bpe.load(folder)
    for printed in (*WORDS, *(word.lower() for word in WORDS), "AB12", "2026"):
        if "ss" not in printed:
            tokens = tokenizer.encode(f'The text says "{printed}".').tokens
            assert tokens[3:] == ['Ġ"', *printed, '"', "."], printed


def test_same_ids_as_transformers(folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.Qwen2Tokenizer.from_pretrained(folder)
    ours = bpe.load(folder)
    for text in (*corpus(), BEFORE_IMAGE, 'The text says "QX7".<|im_end|>'):
        assert theirs(text)["input_ids"] == ours.encode(text).ids
