"""Responses as they go out: a JSON object, or server-sent events one by one."""

import json
from collections.abc import Mapping
from typing import Any

from starlette.types import Send

DONE = b"data: [DONE]\n\n"
COMMENT = b": waiting\n\n"  # keeps a connection alive where there is nothing to say yet
ALWAYS = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-cache"}  # with every response
EVENT_STREAM = "text/event-stream; charset=utf-8"


def to_json(content: object) -> bytes:
    """JSON in UTF-8 without spaces."""
    return json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def event(content: object, name: str | None = None) -> bytes:
    """One server-sent event, with a name or without."""
    return (f"event: {name}\n".encode() if name else b"") + b"data: " + to_json(content) + b"\n\n"


async def send_json(send: Send, content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
    """A whole response of a JSON object."""
    await send_bytes(send, to_json(content), "application/json", status, headers)


async def send_bytes(
    send: Send, body: bytes, kind: str, status: int = 200, headers: Mapping[str, str] | None = None
) -> None:
    """A whole response of bytes of this Content-Type."""
    fields = {"Content-Type": kind, "Content-Length": str(len(body)), **ALWAYS, **(headers or {})}
    await send({"type": "http.response.start", "status": status, "headers": _raw(fields)})
    await send({"type": "http.response.body", "body": body})


async def begin_events(send: Send, headers: Mapping[str, str] | None = None) -> None:
    """The beginning of a response of server-sent events; what follows are bodies with `more_body`."""
    fields = {"Content-Type": EVENT_STREAM, **ALWAYS, "X-Accel-Buffering": "no", **(headers or {})}
    await send({"type": "http.response.start", "status": 200, "headers": _raw(fields)})


async def send_event(send: Send, data: bytes) -> None:
    """One event, or several together."""
    await send({"type": "http.response.body", "body": data, "more_body": True})


async def end_events(send: Send) -> None:
    """The end of the response."""
    await send({"type": "http.response.body", "body": b""})


def _raw(headers: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
