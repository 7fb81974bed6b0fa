"""Every field of a request: what it may hold, and what becomes of it.

From this table requests are checked, the OpenAPI document is made, and docs/serve.md has its table. Fields that are not
named here are ignored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..decoding.logprobs import MAX_LOGPROBS
from ..decoding.request import LEAST_TEMPERATURE, MAX_STOPS, MAX_TEMPERATURE
from .shapes import Schema, check

MAX_MESSAGES = 1000
MAX_PICTURES = 16  # of a request
MAX_CHOICES = 8  # answers to one request
MAX_ANSWER_TOKENS = 4096  # of an answer, whatever a request says: the server's cap

Treatment = Literal["used", "ignored", "refused"]


@dataclass(frozen=True)
class Field:
    """A field: its JSON schema, whether it is used, ignored, or refused unless it holds what changes nothing; and what
    it means.
    """

    name: str
    treatment: Treatment
    schema: Schema
    meaning: str


def optional(*types: str, **more: Any) -> dict[str, Any]:
    """The schema of a field that may be left out, or be null."""
    return {"type": [*types, "null"], **more}


TEXT_PART = {
    "type": "object",
    "required": ["type", "text"],
    "properties": {"type": {"enum": ["text", "input_text", "output_text"]}, "text": {"type": "string"}},
}
ADDRESS = {"type": "string", "minLength": 1}
PICTURE_PART = {
    "type": "object",
    "required": ["type", "image_url"],
    "properties": {
        "type": {"enum": ["image_url", "input_image"]},
        "image_url": {
            "anyOf": [ADDRESS, {"type": "object", "required": ["url"], "properties": {"url": ADDRESS, "detail": {}}}]
        },
        "detail": {},
    },
}
PARTS = {"type": "array", "items": {"anyOf": [TEXT_PART, PICTURE_PART]}}
CONTENT = {"anyOf": [{"type": ["string", "null"]}, PARTS]}
MESSAGE = {
    "type": "object",
    "required": ["role"],
    "properties": {"role": {"enum": ["system", "developer", "user", "assistant"]}, "content": CONTENT},
}
TOKEN_LIMIT = {
    "anyOf": [{"type": "integer", "minimum": 1}, {"type": "integer", "enum": [-1]}, {"type": "null"}],
}
CHOICE_OF_TOOL = {"type": ["string", "null"], "enum": ["auto", "none", None]}
NOTHING = {"type": ["object", "array", "string", "number", "boolean", "null"]}

MODEL = Field("model", "used", optional("string"), "The served model's name or an alias; left out, it is that model.")
DRAWING = (
    Field(
        "temperature",
        "used",
        optional("number", minimum=0, maximum=MAX_TEMPERATURE),
        f"0, the default, always takes the likeliest token; above, from {LEAST_TEMPERATURE:g} on, tokens are drawn.",
    ),
    Field(
        "top_p",
        "used",
        optional("number", minimum=0, maximum=1),
        "When drawing: from the likeliest tokens that add up to this. Default 1.",
    ),
    Field(
        "top_k",
        "used",
        optional("integer", minimum=-1),
        "When drawing: from this many of the likeliest tokens; 0 and -1 for all. Default 0.",
    ),
    Field(
        "min_p",
        "used",
        optional("number", minimum=0, maximum=1),
        "When drawing: from tokens at least this share as likely as the likeliest. Default 0.",
    ),
    Field(
        "repetition_penalty",
        "used",
        optional("number", minimum=0.01, maximum=100),
        "Above 1, tokens that came before are less likely. Default 1.",
    ),
    Field(
        "seed",
        "used",
        optional("integer", minimum=-(1 << 63), maximum=(1 << 64) - 1),
        "When drawing: the same seed draws the same answer, modulo 2**64. Left out, each request has another.",
    ),
)
STREAM = Field("stream", "used", optional("boolean"), "Server-sent events instead of one object.")
TOOLS = (
    Field("tools", "ignored", optional("array"), "Accepted; the model calls none."),
    Field(
        "tool_choice",
        "refused",
        CHOICE_OF_TOOL,
        '"auto" and "none" are accepted; a tool that has to be called is refused.',
    ),
    Field("parallel_tool_calls", "ignored", optional("boolean"), "There are no calls."),
)
FOR_OTHERS = ("user", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention")

CHAT_FIELDS = (
    MODEL,
    Field(
        "messages",
        "used",
        {"type": "array", "minItems": 1, "maxItems": MAX_MESSAGES, "items": MESSAGE},
        "Roles system, developer (the same), user, assistant, in any order. Content is a text, or parts `text`, "
        "`image_url`, "
        f"`input_image`; pictures as `data:` addresses, up to {MAX_PICTURES}, of users only. `detail` is ignored.",
    ),
    Field("max_completion_tokens", "used", TOKEN_LIMIT, "Longest answer, in tokens; it goes before `max_tokens`."),
    Field(
        "max_tokens",
        "used",
        TOKEN_LIMIT,
        f"Longest answer, in tokens; left out or -1, and at most, {MAX_ANSWER_TOKENS}.",
    ),
    *DRAWING,
    Field(
        "stop",
        "used",
        {
            "anyOf": [
                {"type": ["string", "null"]},
                {"type": "array", "maxItems": MAX_STOPS, "items": {"type": "string"}},
            ]
        },
        f"Up to {MAX_STOPS} texts, before the first of which the answer ends.",
    ),
    Field(
        "n",
        "used",
        optional("integer", minimum=1, maximum=MAX_CHOICES),
        "Answers; each is drawn with the seed's successor.",
    ),
    STREAM,
    Field(
        "stream_options",
        "used",
        optional("object", properties={"include_usage": optional("boolean")}),
        "`include_usage` adds an event with `usage` and no choices.",
    ),
    Field("logprobs", "used", optional("boolean"), "The log-probability of each token."),
    Field(
        "top_logprobs",
        "used",
        optional("integer", minimum=0, maximum=MAX_LOGPROBS),
        "With `logprobs`: so many of the likeliest tokens beside each.",
    ),
    Field(
        "response_format",
        "used",
        {
            "anyOf": [
                {"type": "null"},
                {
                    "type": "object",
                    "required": ["type"],
                    "properties": {
                        "type": {"enum": ["text", "json_object", "json_schema"]},
                        "json_schema": {
                            "type": "object",
                            "properties": {"schema": {"type": "object"}},
                        },
                    },
                },
            ]
        },
        "`text`, `json_object`, or `json_schema`, which the answer keeps to token by token (extra `schema`).",
    ),
    *TOOLS,
    Field("functions", "ignored", optional("array"), "The older form of `tools`."),
    Field("function_call", "refused", CHOICE_OF_TOOL, "The older form of `tool_choice`."),
    Field("presence_penalty", "refused", {"enum": [0, None]}, "Refused unless 0; there is `repetition_penalty`."),
    Field("frequency_penalty", "refused", {"enum": [0, None]}, "Refused unless 0; there is `repetition_penalty`."),
    Field("logit_bias", "refused", {"enum": [{}, None]}, "Refused unless empty."),
    Field("modalities", "refused", {"enum": [["text"], None]}, 'Refused unless ["text"].'),
    Field("audio", "refused", {"enum": [None]}, "There is no sound."),
    Field("web_search_options", "refused", {"enum": [None]}, "Nothing is searched."),
    Field("store", "ignored", NOTHING, "Nothing is stored."),
    Field("reasoning_effort", "ignored", NOTHING, "The model does not think aloud."),
    Field("verbosity", "ignored", NOTHING, "Ask for short answers in words, or by `max_tokens`."),
    Field("prediction", "ignored", NOTHING, "It would only make an answer faster."),
    *(Field(name, "ignored", NOTHING, "It is for OpenAI's own service.") for name in FOR_OTHERS),
)

RESPONSE_ITEM = {
    "type": "object",
    "required": ["role", "content"],
    "properties": {"type": {"enum": ["message"]}, **MESSAGE["properties"]},  # type: ignore[dict-item]  # a dict
}
RESPONSE_FIELDS = (
    MODEL,
    Field(
        "input",
        "used",
        {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "minItems": 1, "maxItems": MAX_MESSAGES, "items": RESPONSE_ITEM},
            ]
        },
        "A text, or messages of parts `input_text`, `input_image` and, of the assistant, `output_text`.",
    ),
    Field("instructions", "used", optional("string"), "A system message before the others."),
    Field("max_output_tokens", "used", TOKEN_LIMIT, f"Longest answer, in tokens; at most {MAX_ANSWER_TOKENS}."),
    *DRAWING,
    STREAM,
    Field(
        "text",
        "used",
        optional(
            "object",
            properties={
                "format": {
                    "type": ["object", "null"],
                    "required": ["type"],
                    "properties": {
                        "type": {"enum": ["text", "json_object", "json_schema"]},
                        "schema": {"type": "object"},
                    },
                }
            },
        ),
        "`format`: `text`, `json_object` or `json_schema`, as `response_format` in chat completions.",
    ),
    *TOOLS,
    Field("previous_response_id", "refused", {"enum": [None]}, "The server keeps no conversations; send it whole."),
    Field("conversation", "refused", {"enum": [None]}, "The server keeps no conversations; send it whole."),
    Field("prompt", "refused", {"enum": [None]}, "There are no stored prompts."),
    Field("background", "refused", {"enum": [False, None]}, "Refused unless false."),
    Field("store", "ignored", optional("boolean"), "Nothing is stored; the answer says false."),
    Field("top_logprobs", "refused", {"enum": [0, None]}, "Refused unless 0; chat completions have log-probabilities."),
    *(
        Field(name, "ignored", NOTHING, "It changes nothing here.")
        for name in ("include", "reasoning", "truncation", "stream_options", "max_tool_calls", *FOR_OTHERS)
    ),
)


def check_fields(body: Mapping[str, Any], fields: Sequence[Field]) -> None:
    """Raise a Refusal (400) that names the first field of a request that holds what it may not."""
    for field in fields:
        if field.name in body:
            check(body[field.name], field.schema, field.name)


def schema_of(fields: Sequence[Field], required: Sequence[str]) -> dict[str, Any]:
    """The JSON schema of a request of these fields."""
    return {
        "type": "object",
        "required": list(required),
        "properties": {field.name: {**field.schema, "description": field.meaning} for field in fields},
    }


def table(fields: Sequence[Field]) -> str:
    """Markdown rows of the fields, for the documentation."""
    rows = ["| field | | meaning |", "|---|---|---|"]
    return "\n".join([*rows, *(f"| `{f.name}` | {f.treatment} | {f.meaning} |" for f in fields)]) + "\n"
