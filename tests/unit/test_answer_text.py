"""An answer's text up to its stop strings: the same in any tokens, and nothing handed out that is taken back."""

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvlm_mlx import VLM, load
from fastvlm_mlx.decoding.text import AnswerText
from fastvlm_mlx.inputs.tokenizer import Tokenizer

ALPHABET = "abé😀\n"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load("tiny").tokenizer


def by_characters(text: str, stop: Sequence[str]) -> str:
    """A text up to the stop string that is complete first, the longest of those: found character by character."""
    for end in range(len(text) + 1):
        found = [each for each in stop if text[:end].endswith(each)]
        if found:
            return text[: end - max(map(len, found))]
    return text


def cut(tokenizer: Tokenizer, text: str, borders: set[int]) -> list[int]:
    """Token ids of a text that is cut into bytes, and merged between these borders only."""
    data, ids = text.encode(), []
    alone = {tokenizer.bytes_of(token): token for token in range(len(tokenizer)) if tokenizer.bytes_of(token)}
    start = 0
    for end in [*sorted(border for border in borders if border < len(data)), len(data)]:
        while start < end:
            size = next(n for n in range(end - start, 0, -1) if data[start : start + n] in alone)
            ids.append(alone[data[start : start + size]])
            start += size
    return ids


@pytest.mark.slow
@given(
    st.text(ALPHABET, max_size=12),
    st.lists(st.text(ALPHABET, min_size=1, max_size=4), max_size=4),
    st.sets(st.integers(0, 40)),
)
@settings(max_examples=300, deadline=None)
def test_any_text_in_any_tokens(tokenizer: Tokenizer, text: str, stop: list[str], borders: set[int]) -> None:
    ids = cut(tokenizer, text, borders)
    assert tokenizer.decode(ids) == text
    answer, handed_out = AnswerText(tokenizer, stop), ""
    expected = by_characters(text, stop)
    for token in ids:
        handed_out += answer.add(token)
        assert expected.startswith(handed_out)  # nothing that a stop string takes back
    handed_out += answer.finish()
    assert handed_out == answer.text == expected
    assert answer.ended == any(each in text for each in stop)


def test_what_cannot_be_a_beginning_is_not_held_back(tokenizer: Tokenizer) -> None:
    text = AnswerText(tokenizer, ["stop", "xyz"])
    assert [text.add(token) for token in cut(tokenizer, "a st-sto", set(range(9)))] == [
        "a", " ", "", "", "st-", "", "", "",
    ]  # fmt: skip
    assert text.finish() == "sto" and not text.ended


def test_after_the_end_there_is_nothing(tokenizer: Tokenizer) -> None:
    text = AnswerText(tokenizer, ["b"])
    assert [text.add(token) for token in cut(tokenizer, "abc", {1, 2})] == ["a", "", ""]
    assert text.ended and text.finish() == "" and text.text == "a"


def test_an_unfinished_character(tokenizer: Tokenizer) -> None:
    half = cut(tokenizer, "é", {1})[:1]
    for stop, expected, ended in (([], "\ufffd", False), (["\ufffd"], "", True), (["é"], "\ufffd", False)):
        text = AnswerText(tokenizer, stop)
        assert text.add(half[0]) == "" and text.finish() == expected and text.ended == ended


def test_many_answers_of_a_model(small: VLM) -> None:
    """Streamed, in a batch and alone end at the same place, whatever the stop string."""
    whole = small.generate(None, "Why?", max_tokens=30, temperature=1.0, seed=3)
    for start in range(0, len(whole.text) - 3, 5):
        stop = whole.text[start : start + 3]
        alone = small.generate(None, "Why?", max_tokens=30, temperature=1.0, seed=3, stop=stop)
        assert alone.text == by_characters(whole.text, [stop]) and alone.finish_reason == "stop"
        assert whole.token_ids[: len(alone.token_ids)] == alone.token_ids
        [batched] = small.batch([(None, "Why?")], max_tokens=30, temperature=1.0, seed=3, stop=[stop])
        assert (batched.text, batched.token_ids, batched.finish_reason) == (alone.text, alone.token_ids, "stop")
        chunks = list(small.stream(None, "Why?", max_tokens=30, temperature=1.0, seed=3, stop=stop))
        assert "".join(chunk.text for chunk in chunks) == alone.text
