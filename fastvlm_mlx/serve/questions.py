"""A request's fields -> what is to be done: the messages, how each answer is drawn, and what is sent back."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..decoding.request import LEAST_TOP_P, Options
from ..errors import OptionError
from .fields import CHAT_FIELDS, MAX_ANSWER_TOKENS, RESPONSE_FIELDS, check_fields
from .messages import Said, chat_messages, response_messages
from .refusal import bad_request
from .shapes import whole

SEEDS = 1 << 64
ANY_OBJECT = True  # the schema of `json_object`


@dataclass(frozen=True)
class Question:
    """What is asked: messages, the options of each answer (`n` of them), and whether these go out as events, with usage
    at the end.
    """

    messages: Sequence[Said]
    options: Sequence[Options]
    stream: bool = False
    include_usage: bool = False


def chat_question(body: Mapping[str, Any]) -> Question:
    """The question of a chat completion's body; raises a Refusal that names the field."""
    if "messages" not in body:
        raise bad_request("`messages` is missing.", "messages")
    check_fields(body, CHAT_FIELDS)
    top, logprobs = whole(body.get("top_logprobs")), body.get("logprobs") or False
    if top is not None and not logprobs:
        raise bad_request("`top_logprobs` is given without `logprobs`; set that to true.", "top_logprobs")
    limit = body.get("max_completion_tokens")
    options = _options(
        body,
        limit if limit is not None else body.get("max_tokens"),
        stop=body.get("stop"),
        logprobs=(top or 0) if logprobs else None,
        schema=_schema(body.get("response_format") or {}, "response_format", "json_schema"),
    )
    count = whole(body.get("n")) or 1
    shown = body.get("stream_options") or {}
    return Question(
        chat_messages(body["messages"]),
        [options, *(replace(options, seed=((options.seed or 0) + number) % SEEDS) for number in range(1, count))],
        bool(body.get("stream")),
        bool(shown.get("include_usage")),
    )


def response_question(body: Mapping[str, Any]) -> Question:
    """The question of a response's body; raises a Refusal that names the field."""
    if "input" not in body:
        raise bad_request("`input` is missing.", "input")
    check_fields(body, RESPONSE_FIELDS)
    form = (body.get("text") or {}).get("format") or {}
    options = _options(body, body.get("max_output_tokens"), schema=_schema(form, "text.format", None))
    said = response_messages(body["input"], body.get("instructions"))
    return Question(said, [options], bool(body.get("stream")), True)


def _options(body: Mapping[str, Any], limit: Any, **more: Any) -> Options:
    """The options of the first answer; raises a Refusal."""
    limit = whole(limit)
    number = {name: body.get(name) for name in ("temperature", "top_p", "min_p", "repetition_penalty")}
    drawn: dict[str, Any] = {name: float(value) for name, value in number.items() if value is not None}
    if drawn.get("top_p") == 0:  # the likeliest alone, as elsewhere
        drawn["top_p"] = LEAST_TOP_P
    seed = whole(body.get("seed"))
    try:
        return Options(
            max_tokens=MAX_ANSWER_TOKENS if limit in (None, -1) else min(limit, MAX_ANSWER_TOKENS),
            seed=secrets.randbits(64) if seed is None else seed % SEEDS,
            top_k=max(0, whole(body.get("top_k")) or 0),
            **drawn,
            **more,
        )
    except OptionError as error:
        param = "response_format" if error.option == "schema" else error.option
        raise bad_request(str(error).replace("`schema`", f"`{param}`"), param) from error


def _schema(form: Mapping[str, Any], param: str, inner: str | None) -> Mapping[str, Any] | bool | None:
    """The JSON schema that an answer has to keep to, None for plain text."""
    kind = form.get("type")
    if kind == "json_object":
        return ANY_OBJECT
    if kind != "json_schema":
        return None
    found = (form.get(inner) or {}).get("schema") if inner else form.get("schema")
    if not isinstance(found, dict):
        where = f"{param}.{inner}.schema" if inner else f"{param}.schema"
        raise bad_request(f"`{where}` is missing, expected a JSON schema, an object.", where)
    return found
