"""Requests of the server -> questions: fields, messages, pictures, options, and what is refused by which name."""

import base64
import json
from typing import Any

import pytest

pytest.importorskip("starlette", reason="the extra serve is not installed")

from fastvlm_mlx.decoding.request import LEAST_TOP_P
from fastvlm_mlx.inputs.prompt import SYSTEM
from fastvlm_mlx.serve import shapes
from fastvlm_mlx.serve.body import parse
from fastvlm_mlx.serve.fields import CHAT_FIELDS, MAX_ANSWER_TOKENS, MAX_PICTURES, RESPONSE_FIELDS, table
from fastvlm_mlx.serve.pictures import data_of
from fastvlm_mlx.serve.questions import chat_question, response_question
from fastvlm_mlx.serve.refusal import Refusal

HELLO = [{"role": "user", "content": "Hello"}]


def picture(name: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": name, "detail": "high"}}


def refused(body: Any, question: Any = chat_question) -> Refusal:
    with pytest.raises(Refusal) as found:
        question(body)
    assert found.value.status == 400
    return found.value


def test_messages_in_order_with_their_own_pictures() -> None:
    """As simonw/llm writes them: text before the picture, and a system message in the middle."""
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "What is it?"}, picture("a"), picture("b")]},
        {"role": "assistant", "content": "A cat."},
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [picture("c"), {"type": "text", "text": "And"}, {"type": "text", "text": "this?"}]},
    ]
    said = chat_question({"messages": messages}).messages
    assert [each.role for each in said] == ["system", "user", "assistant", "system", "user"]
    assert [[link.address for link in each.pictures] for each in said] == [[], ["a", "b"], [], [], ["c"]]
    assert [each.text for each in said] == [SYSTEM, "What is it?", "A cat.", "Be brief.", "And\nthis?"]
    assert said[4].pictures[0].param == "messages[3].content[0].image_url.url"


def test_a_picture_may_be_written_in_three_ways() -> None:
    parts = [
        {"type": "image_url", "image_url": "a"},
        picture("b"),
        {"type": "input_image", "image_url": "c", "detail": "low"},
    ]
    (_, said) = chat_question({"messages": [{"role": "user", "content": parts}]}).messages
    assert [link.address for link in said.pictures] == ["a", "b", "c"]


def test_developer_is_system_and_nothing_is_an_assistants_text() -> None:
    messages = [{"role": "developer", "content": "Be brief."}, {"role": "assistant", "content": None}, *HELLO]
    said = chat_question({"messages": messages}).messages
    assert [(each.role, each.text) for each in said] == [
        ("system", "Be brief."),
        ("assistant", ""),
        ("user", "Hello"),
    ]


@pytest.mark.parametrize(
    ("fields", "options"),
    [
        ({}, {"max_tokens": MAX_ANSWER_TOKENS, "temperature": 0.0, "top_p": 1.0, "top_k": 0, "stop": ()}),
        ({"max_tokens": 7}, {"max_tokens": 7}),
        ({"max_tokens": 7, "max_completion_tokens": 9}, {"max_tokens": 9}),
        ({"max_tokens": 7, "max_completion_tokens": -1}, {"max_tokens": MAX_ANSWER_TOKENS}),
        ({"max_tokens": -1}, {"max_tokens": MAX_ANSWER_TOKENS}),
        ({"max_tokens": 10**9}, {"max_tokens": MAX_ANSWER_TOKENS}),
        ({"max_tokens": 12.0, "max_completion_tokens": None}, {"max_tokens": 12}),
        ({"temperature": 1, "top_p": 0.5, "min_p": 0.1}, {"temperature": 1.0, "top_p": 0.5, "min_p": 0.1}),
        ({"top_p": 0}, {"top_p": LEAST_TOP_P}),
        ({"top_k": -1}, {"top_k": 0}),
        ({"repetition_penalty": 1.5}, {"repetition_penalty": 1.5}),
        ({"seed": -1}, {"seed": (1 << 64) - 1}),
        ({"seed": (1 << 64) - 1}, {"seed": (1 << 64) - 1}),
        ({"stop": "END"}, {"stop": ("END",)}),
        ({"stop": ["a", "b", "c", "d"]}, {"stop": ("a", "b", "c", "d")}),
        ({"logprobs": True}, {"logprobs": 0}),
        ({"logprobs": True, "top_logprobs": 20}, {"logprobs": 20}),
        ({"logprobs": False}, {"logprobs": None}),
    ],
)
def test_options(fields: dict[str, Any], options: dict[str, Any]) -> None:
    (found,) = chat_question({"messages": HELLO, **fields}).options
    assert {name: getattr(found, name) for name in options} == options


def test_without_a_seed_every_request_draws_another() -> None:
    assert len({chat_question({"messages": HELLO}).options[0].seed for _ in range(10)}) == 10


def test_each_choice_has_a_seed_of_its_own() -> None:
    found = chat_question({"messages": HELLO, "n": 3, "seed": (1 << 64) - 2}).options
    assert [each.seed for each in found] == [(1 << 64) - 2, (1 << 64) - 1, 0]


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "auto"},
        {"tools": [], "tool_choice": "none", "parallel_tool_calls": True, "functions": [], "function_call": "auto"},
        {"presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "modalities": ["text"], "audio": None},
        {"user": "me", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "reasoning_effort": "low"},
        {"session_id": "x", "keep_alive": "5m", "options": {"num_ctx": 4096}},
        {"stream_options": None, "response_format": None, "stop": None, "n": None, "temperature": None, "seed": None},
        {"response_format": {"type": "text"}},
    ],
)
def test_what_changes_nothing_is_accepted(fields: dict[str, Any]) -> None:
    assert chat_question({"messages": HELLO, **fields}).options[0].schema is None


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": ["Hello"]}, "messages[0]"),
        ({"messages": [{"content": "Hello"}]}, "messages[0].role"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 1}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "messages[0].content[0].text"),
        ({"messages": [{"role": "assistant", "content": [picture("a")]}]}, "messages[0].content[0]"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "7"}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": 1e-9}, "temperature"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": 1.5}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"seed": 1 << 64}, "seed"),
        ({"seed": -(1 << 63) - 1}, "seed"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"n": 0}, "n"),
        ({"n": 9}, "n"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"logprobs": 5}, "logprobs"),
        ({"top_logprobs": 5}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
        ({"response_format": "json"}, "response_format"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
        ({"function_call": {"name": "f"}}, "function_call"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"frequency_penalty": -1}, "frequency_penalty"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"audio": {"voice": "x"}}, "audio"),
    ],
)
def test_what_is_refused_names_its_field(fields: dict[str, Any], param: str) -> None:
    found = refused({"messages": HELLO, **fields})
    assert found.param == param
    assert str(found).count("\n") == 0 and str(found).endswith(".")


def test_no_more_pictures_than_allowed() -> None:
    content = [picture("a")] * MAX_PICTURES
    assert chat_question({"messages": [{"role": "user", "content": content}]})
    assert "17 pictures" in str(refused({"messages": [{"role": "user", "content": [*content, picture("b")]}]}))


def test_no_more_text_than_allowed() -> None:
    assert "characters" in str(refused({"messages": [{"role": "user", "content": "x" * 600_000}] * 2}))


def test_a_schema_is_never_a_path() -> None:
    pytest.importorskip("llguidance", reason="the extra schema is not installed")
    named = {"type": "json_schema", "json_schema": {"name": "x", "schema": "/etc/passwd"}}
    assert refused({"messages": HELLO, "response_format": named}).param == "response_format.json_schema.schema"
    named["json_schema"] = {"name": "x", "schema": {"type": "object"}}
    (found,) = chat_question({"messages": HELLO, "response_format": named}).options
    assert json.loads(str(found.schema)) == {"type": "object"}
    (found,) = chat_question({"messages": HELLO, "response_format": {"type": "json_object"}}).options
    assert json.loads(str(found.schema)) == {"type": "object"}
    assert refused({"messages": HELLO, "response_format": named, "stop": "x"}).param == "stop"


def test_responses() -> None:
    parts = [{"type": "input_text", "text": "What is it?"}, {"type": "input_image", "image_url": "a", "detail": "auto"}]
    earlier = {"type": "message", "role": "assistant", "id": "msg_1", "content": [{"type": "output_text", "text": "A"}]}
    found = response_question(
        {"input": [{"role": "user", "content": parts}, earlier], "instructions": "Be brief.", "max_output_tokens": 5}
    )
    assert [(each.role, each.text) for each in found.messages] == [
        ("system", "Be brief."),
        ("user", "What is it?"),
        ("assistant", "A"),
    ]
    assert found.options[0].max_tokens == 5
    assert [each.text for each in response_question({"input": "Hello"}).messages] == [SYSTEM, "Hello"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": []}, "input"),
        ({"input": None}, "input"),
        ({"input": [{"type": "function_call_output", "role": "user", "content": ""}]}, "input[0].type"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "c"}, "conversation"),
        ({"background": True}, "background"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format.schema"),
    ],
)
def test_responses_refused(fields: dict[str, Any], param: str) -> None:
    assert refused({"input": "Hello", **fields}, response_question).param == param


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b"{}\xff",
        "{}".encode("utf-16"),
        b'{"a": NaN}',
        b'{"a": -Infinity}',
        b'{"a": 1' + b"0" * 5000 + b"}",
        b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b"{'a': 1}",
        b"messages=Hello",
    ],
)
def test_what_is_no_json_object(body: bytes) -> None:
    with pytest.raises(Refusal) as found:
        parse(body)
    assert found.value.status == 400


def test_json_with_a_byte_order_mark() -> None:
    assert parse('\ufeff{"a": "é"}'.encode()) == {"a": "é"}


def test_data_addresses() -> None:
    data = bytes(range(256))
    text = base64.b64encode(data).decode()
    for head in (
        "data:image/png;base64,",
        "DATA:IMAGE/PNG;BASE64,",
        "data:;base64,",
        "data:image/jpeg;charset=x;base64,",
        "data:application/octet-stream;base64,",
    ):
        assert data_of(head + text, "p") == data


@pytest.mark.parametrize(
    "address",
    [
        "/etc/passwd",
        "file:///etc/passwd",
        "FILE:/etc/passwd",
        "~/.ssh/id_rsa",
        "../../secret.png",
        "\\\\host\\share\\a.png",
        "",
        "ftp://example.com/a.png",
        "javascript:alert(1)",
        "data:image/png,abc",
        "data:image/png;base64",
        "data:text/html;base64,AAAA",
        "data:image/svg+xml;utf8,<svg/>",
        " data:image/png;base64,AAAA",
        "data:image/png;base64,AAA",
        "data:image/png;base64,AA AA",
        "data:image/png;base64,AAAA\n",
        "data:image/png;base64,AA-_",
        "data:image/png;base64,AAAA====",
        "data:image/png;base64,AAé=",
        "data:image/png;base64,%41%41%41%41",
        "data:" + "a" * 10_000_000,
    ],
)
def test_other_addresses_are_refused(address: str) -> None:
    with pytest.raises(Refusal) as found:
        data_of(address, "p")
    assert (found.value.status, found.value.param) == (400, "p")
    assert len(str(found.value)) < 500


def test_paths_are_refused_alike_whether_they_exist_or_not() -> None:
    """What is said must not tell which files there are."""
    said = set()
    for path in ("/etc/passwd", "/etc/nothing"):
        with pytest.raises(Refusal) as found:
            data_of(path, "p")
        said.add(str(found.value).replace(path, "PATH"))
    assert len(said) == 1


@pytest.mark.parametrize(
    ("value", "schema", "right"),
    [
        (1.0, {"type": "integer"}, True),
        (True, {"type": "integer"}, False),
        (False, {"enum": [0]}, False),
        (0.0, {"enum": [0, None]}, True),
        (None, {"type": ["string", "null"]}, True),
        ("ab", {"type": "string", "maxLength": 1}, False),
        ([1], {"type": "array", "items": {"type": "string"}}, False),
        ({"a": 1}, {"type": "object", "properties": {"a": {"type": "string"}}}, False),
        ({}, {"type": "object", "required": ["a"]}, False),
        (5, {"anyOf": [{"type": "integer", "minimum": 6}, {"type": "integer", "enum": [5]}]}, True),
        (float("1e400"), {"type": "integer"}, False),
    ],
)
def test_shapes(value: Any, schema: dict[str, Any], right: bool) -> None:
    if right:
        shapes.check(value, schema, "x")
    else:
        with pytest.raises(Refusal):
            shapes.check(value, schema, "x")


def test_every_field_is_named_once_and_described() -> None:
    for fields in (CHAT_FIELDS, RESPONSE_FIELDS):
        names = [field.name for field in fields]
        assert len(names) == len(set(names))
        assert table(fields).count("\n") == len(names) + 2
        assert all(field.meaning.endswith((".", ").")) for field in fields)
