"""The OpenAPI document of the server, made from the tables that requests are checked by."""

from typing import Any

from ..version import __version__
from .fields import CHAT_FIELDS, RESPONSE_FIELDS, schema_of
from .security import PICTURE_TYPES

ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
COMPLETION = {
    "type": "object",
    "required": ["id", "object", "created", "model", "choices", "usage", "timings"],
    "properties": {
        "id": {"type": "string"},
        "object": {"enum": ["chat.completion"]},
        "created": {"type": "integer"},
        "model": {"type": "string"},
        "choices": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "required": ["index", "message", "logprobs", "finish_reason"],
                "properties": {
                    "index": {"type": "integer"},
                    "message": {
                        "type": "object",
                        "required": ["role", "content"],
                        "properties": {"role": {"enum": ["assistant"]}, "content": {"type": "string"}},
                    },
                    "logprobs": {"type": ["object", "null"]},
                    "finish_reason": {"enum": ["stop", "length"]},
                },
            },
        },
        "usage": {
            "type": "object",
            "required": ["prompt_tokens", "completion_tokens", "total_tokens", "prompt_tokens_details"],
        },
        "timings": {"type": "object"},
    },
}
RESPONSE = {
    "type": "object",
    "required": ["id", "object", "created_at", "status", "model", "output", "usage", "store"],
    "properties": {
        "object": {"enum": ["response"]},
        "status": {"enum": ["completed", "incomplete"]},
        "output": {"type": "array"},
        "store": {"enum": [False]},
    },
}
MODEL = {
    "type": "object",
    "required": ["id", "object", "created", "owned_by"],
    "properties": {
        "id": {"type": "string"},
        "object": {"enum": ["model"]},
        "created": {"type": "integer"},
        "owned_by": {"type": "string"},
    },
}
MODELS = {
    "type": "object",
    "required": ["object", "data"],
    "properties": {"object": {"enum": ["list"]}, "data": {"type": "array", "items": MODEL}},
}
HEALTH = {"type": "object", "required": ["status"], "properties": {"status": {"enum": ["ok", "loading", "stopping"]}}}
TEXT = {"type": "string"}
DOT = (  # a picture of one white pixel
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR42mP4DwABAQEAHLCMmQAAAABJRU5ErkJggg=="
)
EXAMPLE = [
    {
        "role": "user",
        "content": [{"type": "text", "text": "What is it?"}, {"type": "image_url", "image_url": {"url": DOT}}],
    }
]
REFUSED = {
    "400": "Something in the request is wrong.",
    "401": "The API key is missing or wrong.",
    "403": "The request is for another host, or from another web site.",
    "404": "There is no such model.",
    "413": "The body is too large.",
    "415": "The body is of another type.",
    "429": "Too many requests wait.",
    "503": "The model is being loaded, or the server stops.",
}


def document(model: str, *, with_metrics: bool) -> dict[str, Any]:
    """OpenAPI 3.1 of a server that serves a model of this name."""
    paths: dict[str, Any] = {
        "/health": {
            "get": _operation("Whether questions are answered.", {"200": HEALTH, "503": HEALTH}, {}, keyless=True)
        },
        "/v1/models": {"get": _operation("The names of the model.", {"200": MODELS}, {})},
        "/v1/models/{name}": {
            "get": {
                **_operation("One of these.", {"200": MODEL}, {"404": REFUSED["404"]}),
                "parameters": [_parameter("name", "path", TEXT, example=model)],
            }
        },
        "/v1/chat/completions": {
            "post": _asking(
                "Answer a conversation.", schema_of(CHAT_FIELDS, ["messages"]), COMPLETION, {"messages": EXAMPLE}
            )
        },
        "/v1/responses": {
            "post": _asking("Answer, statelessly.", schema_of(RESPONSE_FIELDS, ["input"]), RESPONSE, {"input": EXAMPLE})
        },
        "/v1/live": {"post": _live()},
    }
    if with_metrics:
        found = _operation("Prometheus's text.", {}, {})
        found["responses"]["200"] = {"description": "Metrics.", "content": {"text/plain": {"schema": TEXT}}}
        paths["/metrics"] = {"get": found}
    return {
        "openapi": "3.1.0",
        "info": {"title": "fastvlm-mlx", "version": __version__},
        "paths": paths,
        "components": {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
        "security": [{}, {"key": []}],
    }


def _operation(
    summary: str, answers: dict[str, Any], refused: dict[str, str], *, keyless: bool = False
) -> dict[str, Any]:
    responses: dict[str, Any] = {
        status: {"description": summary, "content": _json(schema)} for status, schema in answers.items()
    }
    common = {} if keyless else {"401": REFUSED["401"]}
    for status, meaning in {**common, "400": REFUSED["400"], "403": REFUSED["403"], **refused}.items():
        responses.setdefault(status, {"description": meaning, "content": _json(ERROR)})
    return {"summary": summary, "responses": dict(sorted(responses.items()))}


def _asking(summary: str, schema: dict[str, Any], answer: dict[str, Any], example: dict[str, Any]) -> dict[str, Any]:
    found = _operation(summary, {"200": answer}, REFUSED)
    found["responses"]["200"]["content"]["text/event-stream"] = {}
    content = {"application/json": {"schema": schema, "example": example}}
    return {**found, "requestBody": {"required": True, "content": content}}


def _live() -> dict[str, Any]:
    found = _operation(
        "Answer about a camera's frame.", {}, {**REFUSED, "409": "A newer frame of the session has come."}
    )
    found["responses"]["200"] = {"description": "Events.", "content": {"text/event-stream": {}}}
    body = {kind: {"schema": {"type": "string", "format": "binary"}} for kind in PICTURE_TYPES}
    parameters = [_parameter(name, "query", TEXT) for name in ("prompt", "system", "session")]
    limit = {"type": "integer", "minimum": 1}
    parameters.append(_parameter("max_tokens", "query", limit))
    return {**found, "parameters": parameters, "requestBody": {"required": True, "content": body}}


def _parameter(name: str, place: str, schema: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"name": name, "in": place, "required": place == "path", "schema": schema, **more}


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}
