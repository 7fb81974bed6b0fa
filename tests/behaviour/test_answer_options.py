"""The options of an answer in every way of asking: alone, streamed, in a batch, in a conversation, by the command."""

import json
import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from fastvlm_mlx import VLM, Answer, load
from fastvlm_mlx.decoding.logprobs import Logprobs
from fastvlm_mlx.decoding.stream import Stream

from .forkserver import Run

IMAGE = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
DRAWING: list[dict[str, Any]] = [
    {"temperature": 1.5, "seed": 3, "top_k": 7},
    {"temperature": 1.5, "seed": 3, "top_k": 7, "top_p": 0.8, "min_p": 0.05},
    {"repetition_penalty": 1.3},
    {"temperature": 1.0, "seed": 5, "repetition_penalty": 1.3, "logprobs": 2},
    {"logprobs": 0},
]


def told(stream: Stream) -> tuple[list[Any], Answer]:
    """What a stream's chunks say of their tokens, and its answer."""
    chunks = list(stream)
    assert "".join(chunk.text for chunk in chunks) == chunks[-1].answer.text  # type: ignore[union-attr]
    return [token for chunk in chunks for token in chunk.logprobs], chunks[-1].answer  # type: ignore[return-value]


@pytest.mark.parametrize("options", DRAWING, ids=str)
def test_every_way_of_asking_gives_the_same(small: VLM, options: dict[str, Any]) -> None:
    alone = small.generate(IMAGE, "What is it?", max_tokens=20, **options)
    tokens, streamed = told(small.stream(IMAGE, "What is it?", max_tokens=20, **options))
    asked = small.chat().ask("What is it?", IMAGE, max_tokens=20, **options)
    [batched, other] = small.batch([(IMAGE, "What is it?"), (None, "Why is that so?")], max_tokens=20, **options)
    for answer in (streamed, asked, batched):
        assert (answer.text, answer.token_ids, answer.finish_reason) == (
            alone.text, alone.token_ids, alone.finish_reason,
        )  # fmt: skip
    assert other.token_ids == small.generate(None, "Why is that so?", max_tokens=20, **options).token_ids
    if "logprobs" not in options:
        assert alone.logprobs is None and tokens == [] and "logprobs" not in json.loads(alone.to_json())
        return
    assert alone.logprobs is not None
    for found in (alone.logprobs, tokens, streamed.logprobs, asked.logprobs, batched.logprobs):
        assert found is not None
        assert [token.id for token in found] == alone.token_ids
        assert [token.logprob for token in found] == pytest.approx(
            [token.logprob for token in alone.logprobs], abs=1e-4
        )


def test_plain_answers_are_those_without_the_options(small: VLM) -> None:
    plain = small.generate(IMAGE, "What is it?", max_tokens=20)
    assert small.generate(IMAGE, "What is it?", max_tokens=20, logprobs=5).token_ids == plain.token_ids
    assert small.generate(IMAGE, "What is it?", max_tokens=20, stop="not in it").token_ids == plain.token_ids
    one = small.generate(IMAGE, "What is it?", max_tokens=20, temperature=2.0, top_k=1)
    assert one.token_ids == plain.token_ids
    drawn = small.generate(IMAGE, "What is it?", max_tokens=20, temperature=1.0, seed=4)
    neutral: list[dict[str, Any]] = [
        {"top_k": 0},
        {"min_p": 0},
        {"repetition_penalty": 1},
        {"top_k": 10**9},
        {"stop": []},
        {"logprobs": 3},
    ]
    for off in neutral:
        again = small.generate(IMAGE, "What is it?", max_tokens=20, temperature=1.0, seed=4, **off)
        assert again.token_ids == drawn.token_ids


def test_nothing_comes_twice_under_a_high_penalty(small: VLM) -> None:
    ids = small.generate(None, "Why?", max_tokens=40, repetition_penalty=100.0).token_ids
    assert len(set(ids)) == len(ids) > 20
    plain = small.generate(None, "Why?", max_tokens=40).token_ids
    assert len(set(plain)) < len(plain)


def test_log_probabilities_are_those_of_the_network(small: VLM) -> None:
    answer = small.generate(None, "Why?", max_tokens=8, logprobs=20)
    assert answer.logprobs is not None
    pieces = small.engine.prepare(None, "Why?").pieces
    cache = small.model.text.make_cache()
    logits = small.model.prefill(small.model.embed(pieces, {}), cache)
    for token in answer.logprobs:
        expected = np.array((logits - mx.logsumexp(logits, axis=-1, keepdims=True))[0])
        assert token.logprob == pytest.approx(float(expected[token.id]), abs=1e-4)
        assert [other.logprob for other in token.top_logprobs] == pytest.approx(np.sort(expected)[:-21:-1], abs=1e-4)
        assert token.top_logprobs[0].id == token.id and 0 < token.probability <= 1
        logits = small.model.step(mx.array([token.id]), cache)


def test_the_probabilities_of_choices() -> None:
    """As an example shows it: one token, and those that could have come."""
    tiny = load("tiny")
    answer = tiny.generate("examples/shapes.png", "How many circles are there?", max_tokens=1, logprobs=5)
    assert answer.logprobs is not None
    [first] = answer.logprobs
    assert first.token == first.top_logprobs[0].token and sum(each.probability for each in first.top_logprobs) <= 1.0001


def test_how_log_probabilities_look(small: VLM) -> None:
    answer = small.generate(None, "Why?", max_tokens=4, logprobs=2)
    found = answer.logprobs
    assert isinstance(found, Logprobs) and found is not None
    data = json.loads(answer.to_json())["logprobs"]
    assert [token["id"] for token in data] == answer.token_ids
    for token in data:
        assert token.keys() == {"token", "id", "logprob", "bytes", "top_logprobs"} and len(token["top_logprobs"]) == 2
        assert token["bytes"] is None or bytes(token["bytes"]).decode(errors="replace") == token["token"]
        assert math.isfinite(token["logprob"]) and token["top_logprobs"][0].keys() == {
            "token",
            "id",
            "logprob",
            "bytes",
        }
    assert str(found).count("\n") == 3 and "%" in str(found)
    assert repr(found[0]).startswith("TokenLogprob(") and repr(found[0].top_logprobs[0]).startswith("Candidate(")
    html = answer._repr_html_()
    assert html.count("<tr>") == 5 and found._repr_html_() in html
    assert "<table" not in small.generate(None, "Why?", max_tokens=4)._repr_html_()


def test_a_special_token_has_its_name(small: VLM) -> None:
    end = small.tokenizer.special("<|im_end|>")
    from fastvlm_mlx.decoding.logprobs import token_logprob

    found = token_logprob(small.tokenizer, end, -1.0, [(end, -1.0)])
    assert (found.token, found.bytes) == ("<|im_end|>", b"") and found.to_json()["bytes"] is None
    assert "&lt;|im_end|&gt;" in Logprobs([found])._repr_html_()


def test_a_conversation_behind_stop_strings(small: VLM, tmp_path: Path) -> None:
    """The ids are those that were generated, the stop string's too: nothing of them is computed again."""
    whole = small.chat().ask("What is it?", IMAGE, max_tokens=20)
    stop = whole.text[5:8]
    chat = small.chat()
    first = chat.ask("What is it?", IMAGE, max_tokens=20, stop=stop)
    assert first.finish_reason == "stop" and first.text == whole.text[: whole.text.index(stop)]
    assert list(chat.exchanges[0].answer_ids) == first.token_ids == whole.token_ids[: len(first.token_ids)]
    chat.save(tmp_path / "chat.json")
    second = chat.ask("And now?", max_tokens=6)
    assert second.stats.reused_tokens >= first.stats.prompt_tokens + len(first.token_ids) - 1
    again = small.chat().load(tmp_path / "chat.json")
    assert again.exchanges[0].answer == first.text and again.exchanges[0].answer_ids == chat.exchanges[0].answer_ids
    assert again.ask("And now?", max_tokens=6).token_ids == second.token_ids
    text = (tmp_path / "chat.json").read_text()
    (tmp_path / "chat.json").write_text(text.replace('"after_answer": ', '"after": '))
    with pytest.raises(Exception, match="do not spell it"):
        small.chat().load(tmp_path / "chat.json")


def test_an_answer_with_options_may_be_read_on_in_another_thread(small: VLM) -> None:
    import threading

    options: dict[str, Any] = {"temperature": 1.0, "seed": 1, "repetition_penalty": 1.2, "logprobs": 2, "top_k": 50}
    expected = small.generate(None, "Why?", max_tokens=10, **options)
    stream, found = small.stream(None, "Why?", max_tokens=10, **options), []
    found.append(next(stream))
    thread = threading.Thread(target=lambda: found.extend(stream))
    thread.start()
    thread.join()
    assert found[-1].answer.token_ids == expected.token_ids  # type: ignore[union-attr]


def test_the_command(run: Run, model: Path, small: VLM) -> None:
    def ask(*options: object) -> Any:
        return run("generate", "-m", model, "--dtype", "float32", "-p", "Why?", "--max-tokens", 12, *options)

    plain = small.generate(None, "Why?", max_tokens=12)
    stop = plain.text[3:5]
    done = ask("--stop", stop, "--stop", "never in it")
    assert done.out.decode() == plain.text[: plain.text.index(stop)] + "\n" and done.err == ""
    drawn = small.generate(
        None, "Why?", max_tokens=12, temperature=1.0, seed=2, top_k=9, min_p=0.01, repetition_penalty=1.2
    )
    done = ask(
        "--temperature", 1, "--seed", 2, "--top-k", 9, "--min-p", 0.01, "--repetition-penalty", 1.2, "--json",
        "--logprobs", 3,
    )  # fmt: skip
    data = json.loads(done.out)
    assert data["text"] == drawn.text and [token["id"] for token in data["logprobs"]] == drawn.token_ids
    table = ask("--logprobs", 1)
    assert table.out.decode() == plain.text + "\n" and table.err.count("%") == 2 * 12
    for option, value in (
        ("--top-k", -1),
        ("--min-p", 2),
        ("--repetition-penalty", 0),
        ("--logprobs", 21),
        ("--stop", ""),
    ):
        ask(f"{option}={value}").refused(option)
    ask(*(word for sign in "abcde" for word in ("--stop", sign))).refused("--stop", "5 strings")


def test_stop_strings_of_a_piped_conversation(run: Run, model: Path, small: VLM) -> None:
    plain = small.chat().ask("Why?", max_tokens=12)
    stop = plain.text[3:5]
    done = run(
        "chat", "-m", model, "--dtype", "float32", "--max-tokens", 12, "--stop", stop, "--top-k", 5, stdin=b"Why?\n"
    )
    assert done.out.decode().strip("\n") == plain.text[: plain.text.index(stop)].strip("\n")
