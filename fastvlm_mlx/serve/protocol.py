"""uvicorn's HTTP/1.1 with deadlines: a client that sends half a request, or reads nothing of its answer, does not keep
its connection.

uvicorn has no clock for either (0.54); deadlines here are absolute, so that a byte now and then does not put them off.
Each request on a connection that is kept alive has its own, from its first byte on.
"""

from __future__ import annotations

import asyncio
import json
from http import HTTPStatus
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from .refusal import Refusal

HEADER_SECONDS = 10.0
BODY_SECONDS = 60.0
WRITE_SECONDS = 60.0  # in which a client has to read some of what was written for it
MAX_CONNECTIONS = 512
KEPT_OPEN = (h11.IDLE, h11.SEND_RESPONSE)  # states in which a whole response can still be written


class GuardedProtocol(H11Protocol):
    """One connection of a client; the class itself goes to uvicorn, which would choose another by name."""

    header_seconds, body_seconds, write_seconds = HEADER_SECONDS, BODY_SECONDS, WRITE_SECONDS
    max_connections = MAX_CONNECTIONS

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.awaits = ""  # of the request that is waited for: "headers", "body" or none
        self._reading: asyncio.TimerHandle | None = None
        self._writing: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        """Begin, or turn the client away where there are too many."""
        super().connection_made(transport)
        if len(self.connections) > self.max_connections:
            self._refuse(Refusal(503, "Too many connections are open; try again in a moment.", code="overloaded"))
        else:
            self._await("headers")

    def data_received(self, data: bytes) -> None:
        """Read on, and set the clock for what is missing still."""
        try:
            super().data_received(data)
        except Exception as error:  # of a malformed request in the middle of something; the others must not notice
            self.logger.warning("A connection's data could not be handled", exc_info=error)
            self.transport.abort()
            return
        state = self.conn.their_state
        self._await("headers" if state is h11.IDLE else "body" if state is h11.SEND_BODY else "")

    def on_response_complete(self) -> None:
        """Answered: what is missing of the body keeps its deadline, and the next request has not begun."""
        super().on_response_complete()
        if self.conn.their_state is h11.IDLE:
            self._await("headers" if self.conn.trailing_data[0] else "")

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clocks."""
        self._await("")
        self.resume_writing()
        super().connection_lost(exc)
        self._unset_keepalive_if_required()

    def pause_writing(self) -> None:
        """The client does not keep up with its answer."""
        super().pause_writing()
        if self._writing is None:
            self._writing = self.loop.call_later(self.write_seconds, self._unread)

    def resume_writing(self) -> None:
        """It does again."""
        super().resume_writing()
        if self._writing is not None:
            self._writing.cancel()
            self._writing = None

    def send_400_response(self, msg: str) -> None:
        """Refuse what is not HTTP."""
        self._refuse(Refusal(400, "This is not a request of HTTP/1.1 that can be understood.", code="bad_http"))

    def _await(self, part: str) -> None:
        """Give the client its time for this part of a request, from now if it is another one than before."""
        if part == self.awaits:
            return
        self.awaits = part
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None
        if part:
            seconds = self.header_seconds if part == "headers" else self.body_seconds
            self._reading = self.loop.call_later(seconds, self._late, part, seconds)

    def _late(self, part: str, seconds: float) -> None:
        self._reading = None
        self._refuse(Refusal(408, f"The request's {part} did not come within {seconds:g} seconds.", code="timeout"))

    def _unread(self) -> None:
        self._writing = None
        self.transport.abort()

    def _refuse(self, refusal: Refusal) -> None:
        """Write a whole response past the application, if none has begun, and close the connection."""
        if self.transport.is_closing():
            return
        if self.conn.our_state in KEPT_OPEN:
            body = json.dumps(refusal.to_dict()).encode()
            fields = {"Content-Type": "application/json", "Content-Length": str(len(body)), "Connection": "close"}
            lines = [
                f"HTTP/1.1 {refusal.status} {HTTPStatus(refusal.status).phrase}",
                *(f"{k}: {v}" for k, v in (fields | refusal.headers).items()),
            ]
            self.transport.write("\r\n".join([*lines, "", ""]).encode() + body)
        self.transport.close()
