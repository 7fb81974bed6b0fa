"""What a server has computed once is not computed again, and `cached_tokens` says exactly how much that is."""

from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("uvicorn", reason="the extra serve is not installed")

from fastvlm_mlx.decoding.engine import Engine
from tests.serving import SHAPES, SIGN, Server, asked, events_of, server, text_of

QUESTION = "How many shapes are there?"


@pytest.fixture
def fresh(tiny: Engine) -> Iterator[Server]:
    """A server that has seen nothing."""
    tiny.images.clear()
    with server(tiny) as found:
        yield found


def cached(answer: dict[str, Any]) -> int:
    return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])


def test_a_picture_seen_before_is_not_encoded_again(fresh: Server, tiny: Engine) -> None:
    first = fresh.answer(asked(QUESTION, SHAPES))
    assert first["timings"]["vision_ms"] > 0 and len(tiny.images) == 1
    system = {"role": "system", "content": "Answer in one word."}  # so that not even the beginning is the same
    for body in (asked("Describe the image.", SHAPES), {"messages": [system, *asked(QUESTION, SHAPES)["messages"]]}):
        again = fresh.answer(body)
        assert again["timings"]["vision_ms"] < first["timings"]["vision_ms"] and len(tiny.images) == 1
    fresh.answer(asked(QUESTION, SIGN))
    assert len(tiny.images) == 2


def test_the_same_question_costs_its_last_position(fresh: Server) -> None:
    first, second = fresh.answer(asked(QUESTION, SHAPES)), fresh.answer(asked(QUESTION, SHAPES))
    assert (cached(first), cached(second)) == (0, first["usage"]["prompt_tokens"] - 1)
    assert first["choices"] == second["choices"]


def test_another_question_about_a_picture_costs_its_own_words(fresh: Server, tiny: Engine) -> None:
    fresh.answer(asked(QUESTION, SHAPES))
    other = fresh.answer(asked("What colour is the circle?", SHAPES))
    words = tiny.tokenizer.encode("\nWhat colour is the circle?")
    ends = len(tiny.tokenizer.encode("\n")) * 2 + 2 + len(tiny.tokenizer.encode("assistant"))
    new = other["usage"]["prompt_tokens"] - cached(other)
    assert len(words) <= new <= len(words) + ends


@pytest.mark.parametrize("options", [{}, {"temperature": 2.5, "seed": 11}], ids=["greedy", "drawn"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_conversation_sent_back_costs_its_new_turn(fresh: Server, options: dict[str, Any], stream: bool) -> None:
    """Every position but that of the last token, which was drawn and never read, is found; for four turns."""
    messages = asked("Describe the image.", SHAPES)["messages"]
    known = 0
    for text in ("What colour is the circle?", QUESTION, "Why?", ""):
        body = {"messages": messages, "max_tokens": 20, **options}
        if stream:
            events = events_of(fresh.ask({**body, "stream": True, "stream_options": {"include_usage": True}}).text)
            answer, said = events[-2], {"role": "assistant", "content": text_of(events)}
        else:
            answer = fresh.answer(body)
            said = answer["choices"][0]["message"]
        assert cached(answer) == known
        known = answer["usage"]["prompt_tokens"] + answer["usage"]["completion_tokens"] - 1
        messages = [*messages, said, *asked(text)["messages"]]


def test_an_answer_that_was_changed_is_read_as_it_is(fresh: Server) -> None:
    """From the first difference on nothing is reused, and the answer is that of a server which has seen nothing."""
    messages = asked("Describe the image.", SHAPES)["messages"]
    said = fresh.answer({"messages": messages})["choices"][0]["message"]
    changed = {**said, "content": said["content"].replace("circle", "square")}
    follow_up = asked("What colour is the square?")["messages"]
    whole = fresh.answer({"messages": [*messages, said, *follow_up]})
    other = fresh.answer({"messages": [*messages, changed, *follow_up]})
    assert 0 < cached(other) < cached(whole)
    with server(fresh.serving.service.engine) as another:
        assert another.answer({"messages": [*messages, changed, *follow_up]})["choices"] == other["choices"]


def test_a_stop_text_is_not_in_what_is_sent_back(fresh: Server, tiny: Engine) -> None:
    """The tokens of a stop text were generated, but nobody has read them: the answer is the text without it."""
    messages = asked("Describe the image.", SHAPES)["messages"]
    answer = fresh.answer({"messages": messages, "stop": [" circle"]})
    said = answer["choices"][0]["message"]
    follow_up = fresh.answer({"messages": [*messages, said, *asked("Why?")["messages"]]})
    with_stop = len(tiny.tokenizer.encode(said["content"]))
    expected = answer["usage"]["prompt_tokens"] + with_stop
    assert follow_up["usage"]["prompt_tokens"] - expected < 30 and cached(follow_up) <= expected
    with server(tiny) as another:
        assert (
            another.answer({"messages": [*messages, said, *asked("Why?")["messages"]]})["choices"]
            == follow_up["choices"]
        )


def test_several_answers_share_their_prompt(fresh: Server) -> None:
    """The picture is encoded and the prompt read once for all of them."""
    found = fresh.answer(asked("Describe the image.", SHAPES, n=4, temperature=1.5, seed=1))
    assert len(found["choices"]) == 4
    load = fresh.serving.service.scheduler.load  # type: ignore[union-attr]
    assert (load.pool_misses, load.pool_hits) == (1, 3)
