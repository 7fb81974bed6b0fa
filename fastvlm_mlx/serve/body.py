"""The body of a request: its bytes within bounds, and the JSON object they are.

Bounds hold for lengths that are declared and for chunks alike, for one body and for all that are under way together.
"""

import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

from starlette.types import Receive, Scope

from ..errors import shown
from .refusal import Refusal, bad_request

MAX_BODY = 64 << 20  # bytes
MAX_BODIES = 512 << 20  # bytes of all bodies that are held at a time


class ClientLeft(Exception):
    """The client has closed its connection, so there is nobody to answer."""


class Bodies:
    """The bodies held at a time, counted in bytes, so that many large ones together do not fill the memory."""

    def __init__(self, max_body: int = MAX_BODY, max_bodies: int = MAX_BODIES):
        self.max_body, self.max_bodies = max_body, max_bodies
        self.held = 0  # bytes

    @asynccontextmanager
    async def read(self, scope: Scope, receive: Receive) -> AsyncIterator[bytes]:
        """The bytes of a request's body, counted as held within the block.

        Raises a Refusal for one that is too large (413), or that finds too many others (429), and ClientLeft.
        """
        with self._counted() as count:
            declared = _declared_length(scope)
            if declared is not None and declared > self.max_body:
                raise self._too_large()
            parts: list[bytes] = []
            size = 0
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientLeft
                part = message.get("body", b"")
                size += len(part)
                if size > self.max_body:
                    raise self._too_large()
                count(len(part))
                if part:
                    parts.append(part)
                if not message.get("more_body", False):
                    break
            body = parts[0] if len(parts) == 1 else b"".join(parts)
            del parts
            yield body

    @contextmanager
    def _counted(self) -> Iterator[Any]:
        mine = 0

        def count(size: int) -> None:
            nonlocal mine
            if self.held + size > self.max_bodies:
                raise Refusal(429, "Too many large requests are under way; try again in a moment.", code="overloaded")
            self.held += size
            mine += size

        try:
            yield count
        finally:
            self.held -= mine

    def _too_large(self) -> Refusal:
        return Refusal(
            413,
            f"The request's body is larger than {self.max_body >> 20} MiB; send fewer or smaller pictures.",
            code="request_too_large",
        )


def _declared_length(scope: Scope) -> int | None:
    """The Content-Length; None where there is none, or none that is a number (the HTTP parser refuses those)."""
    for name, value in scope["headers"]:
        if name == b"content-length":
            return int(value) if value.isdigit() else None
    return None


def parse(body: bytes) -> dict[str, Any]:
    """The JSON object that a body is; raises a Refusal (400) for anything else, NaN and Infinity included."""
    try:
        found = json.loads(body.decode("utf-8-sig"), parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise bad_request(f"The body is not UTF-8 (byte {error.start}); send JSON in UTF-8.") from error
    except RecursionError as error:
        raise bad_request("The body's JSON is nested too deeply.") from error
    except ValueError as error:  # JSONDecodeError, and whole numbers of thousands of digits
        raise bad_request(f"The body is not JSON ({str(error)[:100]}); send an object.") from error
    if not isinstance(found, dict):
        raise bad_request(f"The body is JSON of type {_kind(found)}, expected an object.")
    return found


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number of JSON")


def _kind(value: object) -> str:
    if value is None:
        return "null"
    kinds = {dict: "object", list: "array", str: "string", bool: "boolean", int: "number", float: "number"}
    return kinds.get(type(value), shown(type(value).__name__))
