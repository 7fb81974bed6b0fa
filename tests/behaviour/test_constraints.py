"""Answers held to a JSON schema: JSON that keeps to it by an independent validator, or cut at the limit; or refused."""

import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from fastvlm_mlx import VLM, OptionError, load
from fastvlm_mlx.decoding import constraints, schema
from fastvlm_mlx.decoding.answer import Answer
from fastvlm_mlx.decoding.request import Options
from fastvlm_mlx.decoding.sampling import sampler_of

from .forkserver import Run
from .schemas import NAMED, PERSON, Schema, random_schema

pytest.importorskip("llguidance", reason="the extra `schema` is not installed")
jsonschema = pytest.importorskip("jsonschema", reason="the validator is not installed")

HERE = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tiny() -> VLM:
    return load("tiny")


def check(found: Answer, rules: Schema) -> bool:
    """Whether an answer is whole; what is whole keeps to its rules."""
    if found.finish_reason == "length":
        return False
    assert found.finish_reason == "stop"
    jsonschema.validate(json.loads(found.text), rules, jsonschema.Draft202012Validator)
    return True


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMED)
def test_schemas_as_people_write_them(tiny: VLM, name: str) -> None:
    """Greedy, drawn at temperatures up to where every token is as likely as any other, and in a batch."""
    rules = NAMED[name]
    found = [tiny.generate(None, "Who is it?", max_tokens=80, schema=rules)]
    for temperature in (1.0, 5.0, 100.0):
        found += tiny.batch(
            [(None, "Who is it?"), (None, "Where?")], max_tokens=80, temperature=temperature, seed=7, schema=rules
        )
    whole = [check(each, rules) for each in found]
    assert any(whole)


def test_a_batch_gives_what_each_gets_alone(tiny: VLM) -> None:
    questions = [(None, question) for question in ("Who?", "Where is it?", "Why?", "How many are there?")]
    digits = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9}, "maxItems": 30}
    options: dict[str, Any] = {"max_tokens": 60, "temperature": 4.0, "seed": 3, "schema": digits}
    together = tiny.batch(questions, **options)
    assert [answer.token_ids for answer in together] == [
        tiny.generate(*question, **options).token_ids for question in questions
    ]
    assert len({len(answer.token_ids) for answer in together}) > 1  # rows that end while others go on


def write(vlm: VLM, text: str, rng: Random, limit: int = 120) -> str | None:
    """What a model could write under the text of a schema, None where it is longer: any tokens, endings often."""
    tokenizer, stop = vlm.tokenizer, vlm.config.eos_token_ids
    made = constraints.constraints_of(tokenizer).constraint(text, vlm.config.text.vocab_size, stop)
    endings = {tokenizer.encode(sign)[0] for sign in ('"', "}", "]", ",")} | set(stop)
    ids: list[int] = []
    for _ in range(limit):
        allowed = np.flatnonzero(made.allowed()).tolist()
        assert not any(tokenizer.is_special(token) and token not in stop for token in allowed)
        ending = [token for token in allowed if token in endings]
        token = rng.choice(ending if ending and rng.random() < 0.5 else allowed)
        made.accept(token)
        ids += [token] if token not in stop else []
        if made.ended:
            return tokenizer.decode(ids)
    return None


@pytest.mark.slow
def test_any_schema(tiny: VLM) -> None:
    """Random schemas, and whatever their grammar lets through: valid, or unfinished; or the schema is refused."""
    ended: Counter[str] = Counter()
    for seed in range(250):
        rng = Random(seed)
        rules = random_schema(rng)
        try:
            text = schema.read_schema(rules)
        except OptionError as error:
            assert str(error).startswith("`schema` ") and "\n" not in str(error)
            ended["refused"] += 1
            continue
        for _ in range(2):
            written = write(tiny, text, rng)
            ended["whole" if written is not None else "cut"] += 1
            if written is not None:
                jsonschema.validate(json.loads(written), rules, jsonschema.Draft202012Validator)
    assert ended["whole"] > 10 * ended["cut"] and ended["whole"] > 3 * ended["refused"] > 0


@pytest.mark.slow
def test_any_object(tiny: VLM) -> None:
    for given in ("json", True):
        found = [
            tiny.generate(None, "Who?", max_tokens=40, temperature=30.0, seed=seed, schema=given) for seed in range(10)
        ]
        whole = [json.loads(answer.text) for answer in found if answer.finish_reason == "stop"]
        assert whole and all(isinstance(value, dict) for value in whole)


def test_a_schema_in_every_form(tiny: VLM, tmp_path: Path) -> None:
    class Person:
        @staticmethod
        def model_json_schema() -> Schema:
            return PERSON

    path = tmp_path / "person.json"
    path.write_text("\ufeff" + json.dumps(PERSON, indent=2), encoding="utf-8")
    expected = Options(schema=PERSON)
    for given in (json.dumps(PERSON), path, str(path), Person, expected.schema, {**PERSON, "type": "object"}):
        assert Options(schema=given) == expected
    numbers = {"type": "integer", "minimum": np.int64(3), "maximum": np.float32(5)}
    assert json.loads(str(Options(schema=numbers).schema)) == {"type": "integer", "minimum": 3, "maximum": 5.0}
    assert replace(expected, max_tokens=3).schema == expected.schema


REFUSED: list[tuple[Any, str]] = [
    ({"type": "person"}, "Invalid type: person"),
    ({"$ref": "https://example.com/person.json"}, "refers to another document"),
    ({"$ref": "file:///etc/hosts"}, "refers to another document"),
    ({"$ref": "person.json"}, "refers to another document"),
    ({"$ref": "#/$defs/nobody"}, "does not exist"),
    ({"$ref": "#"}, "nothing fulfils it"),
    ({"not": {"type": "string"}}, "not"),
    ({"type": "array", "uniqueItems": True}, "uniqueItems"),
    ({"type": "string", "pattern": "(?=a)b"}, "look-ahead"),
    ({"type": "string", "pattern": "["}, "unclosed"),
    ({"type": "string", "format": "zip code"}, "Unknown format"),
    ({"type": "string", "minLength": 5, "maxLength": 2}, "minLength"),
    ({"enum": []}, "Unsatisfiable"),
    ({"not": {}, "x-guidance": {"lenient": True}}, "not"),
    ({"oneOf": [{"type": "number"}, {"type": "integer"}], "x-guidance": {"coerce_one_of": True}}, "oneOf"),
    ({"type": "object", "minProperties": 3}, "could come twice"),
    ({"type": "number", "exclusiveMinimum": 0, "maximum": 0.5}, '"minimum" in place of "exclusiveMinimum"'),
    ({"items": {"type": "number", "exclusiveMaximum": -3, "minimum": -3.5}}, '"maximum" in place of'),
    ({"const": float("nan")}, "no form for"),
    ({"const": float("inf")}, "no form for"),
    ({"const": {1, 2}}, "no form for"),
    ({"const": "\ud800"}, "cannot be kept to"),
    ('{"type": ', "not valid JSON"),
    ('{"const": NaN}', "not valid JSON"),
    ("[" * 100_000, "neither a JSON text nor a file"),
    ('{"a": ' * 100_000, "nested too deeply"),
    ('{"title": "' + "x" * 1_000_001 + '"}', "more than 1,000,000"),
    ("person.json", "neither a JSON text nor a file"),
    (Path("/"), "it is a folder"),
    ("a\0b", "neither a JSON text nor a file"),
    (False, "expected a JSON schema"),
    (5, "expected a JSON schema"),
    ([PERSON], "expected a JSON schema"),
    (np.zeros(3), "expected a JSON schema"),
]


@pytest.mark.parametrize(("given", "says"), REFUSED, ids=lambda each: str(each)[:40])
def test_schemas_that_are_refused(given: Any, says: str) -> None:
    with pytest.raises(OptionError, match=r"^`schema` ") as raised:
        Options(schema=given)
    assert says in str(raised.value) and "\n" not in str(raised.value) and len(str(raised.value)) < 700
    assert raised.value.option == "schema"


def test_a_schema_that_becomes_too_large(tiny: VLM) -> None:
    endless = {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"], "additionalProperties": False}
    with pytest.raises(OptionError, match=r"`schema` cannot be kept to: .*Too many items"):
        tiny.generate(None, "Who?", schema=endless)
    assert tiny.generate(None, "Who?", max_tokens=3).token_ids


def test_a_stop_string_would_cut_the_json() -> None:
    with pytest.raises(OptionError, match="`stop` and `schema` were given together"):
        Options(schema="json", stop="}")


def test_without_llguidance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    schema.library.cache_clear()
    schema.grammar.cache_clear()
    try:
        with pytest.raises(OptionError, match=r"pip install 'fastvlm-mlx\[schema\]'"):
            Options(schema={"type": "null"})
    finally:
        schema.library.cache_clear()


@pytest.mark.parametrize("stops", [(), (10**9,), "a letter"])
def test_other_tokens_that_end_an_answer(tiny: VLM, stops: Any) -> None:
    """With none, an answer ends where its JSON does; one that is text ends it only where the JSON is complete."""
    letter = tiny.tokenizer.encode("Z")[0]
    options = Options(60, 2.0, seed=1, schema=PERSON, stop_tokens=(letter,) if stops == "a letter" else stops)
    answers = _answers(tiny, [options])
    check(answers[0], PERSON)
    assert answers[0].text.startswith('{"name": "') and letter not in answers[0].token_ids


def test_an_answer_ends_with_its_json(tiny: VLM) -> None:
    answer = tiny.generate(None, "Who?", schema={"enum": ["yes", "no"]})
    assert answer.text in ('"yes"', '"no"') and answer.finish_reason == "stop"
    whole = tiny.generate(
        None, "Who?", schema={"type": "integer", "minimum": 1, "maximum": 30}, temperature=9.0, seed=2
    )
    assert 1 <= json.loads(whole.text) <= 30
    exact = tiny.generate(None, "Who?", max_tokens=len(answer.token_ids), schema={"enum": ["yes", "no"]})
    assert exact.finish_reason == "stop"


@pytest.mark.slow
def test_other_options_beside_a_schema(tiny: VLM) -> None:
    for options in ({"repetition_penalty": 3.0}, {"top_k": 2}, {"top_p": 0.1}, {"min_p": 0.9}, {"logprobs": 2}):
        drawing: dict[str, Any] = {"max_tokens": 90, "temperature": 2.0, "seed": 4, "schema": PERSON}
        answer = tiny.generate(None, "Who?", **drawing, **options)
        check(answer, PERSON)
        if answer.logprobs is not None:  # the model's own, not those of what the schema leaves
            assert [token.id for token in answer.logprobs] == answer.token_ids
            assert any(token.id not in [other.id for other in token.top_logprobs] for token in answer.logprobs)


def test_a_conversation_goes_on_behind_json(tiny: VLM, tmp_path: Path) -> None:
    chat = tiny.chat()
    first = chat.ask("Who is it?", schema=PERSON, max_tokens=60)
    assert list(chat.exchanges[0].answer_ids) == [
        token for token in first.token_ids if token not in tiny.config.eos_token_ids
    ]
    again = tiny.chat()
    chat.save(tmp_path / "chat.json")
    again.load(tmp_path / "chat.json")
    second = chat.ask("And where?", max_tokens=10)
    assert second.stats.reused_tokens >= first.stats.prompt_tokens + len(first.token_ids) - 1
    assert again.ask("And where?", max_tokens=10).token_ids == second.token_ids


def test_a_schema_is_built_once(tiny: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[object] = []
    new = schema.new_matcher
    monkeypatch.setattr(constraints, "new_matcher", lambda *args: built.append(args) or new(*args))
    rules = {"enum": ["built", "once"]}
    assert constraints.constraints_of(tiny.tokenizer) is constraints.constraints_of(tiny.tokenizer)
    for _ in range(3):
        tiny.generate(None, "Which?", schema=rules)
    assert len(built) == 1


def test_a_model_with_fewer_logits_than_tokens(tiny: VLM) -> None:
    made = constraints.constraints_of(tiny.tokenizer).constraint('{"type": "string"}', 300, tiny.config.eos_token_ids)
    assert made.allowed().shape == (300,)


def test_what_a_model_has_no_token_for(tiny: VLM) -> None:
    made = constraints.constraints_of(tiny.tokenizer).constraint('{"type": "string"}', 1, ())
    with pytest.raises(OptionError, match="no token for what comes next"):
        made.allowed()


def _answers(vlm: VLM, options: list[Options]) -> list[Answer]:
    from fastvlm_mlx.decoding.batch import answer_in_order

    request = vlm.engine.prepare(None, "Who?")
    return [answer_in_order(vlm.engine, [request], each)[0] for each in options]


def test_a_sampler_waits_for_its_token(tiny: VLM) -> None:
    sampler = sampler_of(tiny.engine, tiny.engine.prepare(None, "Who?"), Options(schema={"const": 5}))
    assert sampler.waits and not sampler.ended and not sampler.greedy


def test_the_command(run: Run, model: Path, tmp_path: Path) -> None:
    path = tmp_path / "choice.json"
    path.write_text('{"enum": ["yes", "no"]}')
    done = run("generate", "-m", "tiny", "-p", "Is it red?", "--schema", path)
    assert done.code == 0 and json.loads(done.out) in ("yes", "no") and done.err == ""
    run("generate", "-m", model, "-p", "Is it?", "--schema", tmp_path / "none.json").refused("--schema", "none.json")
    path.write_text('{"type": "person"}')
    run("generate", "-m", model, "-p", "Is it?", "--schema", path).refused("--schema", "Invalid type: person")
