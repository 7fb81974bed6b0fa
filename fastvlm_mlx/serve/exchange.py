"""One request and its response, from the body to the last byte: what all endpoints that answer questions have in
common.

Whatever happens ends here: a refusal becomes an error object, in the middle of a stream too, and an error of our own a
line of the log. A client that leaves takes everything it has under way with it.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

from starlette.types import Message, Receive, Scope, Send

from .body import ClientLeft, parse
from .events import COMMENT, begin_events, end_events, event, send_event, send_json
from .live import Sessions, live_fields, live_question
from .questions import Question
from .refusal import Refusal, bad_request, refusal_of
from .reply import Reply
from .service import Service

CLIENT_LEFT = 499  # the status of the log for a client that left before there was one, as nginx has it

Done = TypeVar("Done")


class Form(Protocol):
    """The way an endpoint has of asking and answering."""

    def question(self, body: dict[str, Any]) -> Question:
        """What a body asks; raises a Refusal. Called in a thread."""

    def whole(self, identity: str, body: dict[str, Any], reply: Reply) -> dict[str, Any]:
        """The response of a reply that is finished."""

    def events(self, identity: str, body: dict[str, Any], question: Question, reply: Reply) -> AsyncIterator[bytes]:
        """Events as the answers come; b"" where nothing came for a while."""


@dataclass(frozen=True)
class Begun:
    """A question that is being answered, without its messages, and the other fields it came with."""

    parsed: dict[str, Any]
    question: Question
    reply: Reply


class Exchange:
    """A request of an endpoint that answers questions."""

    def __init__(self, service: Service, scope: Scope, receive: Receive, send: Send):
        self.service, self.scope = service, scope
        self.salt: bytes = scope["state"]["salt"]
        self.identity = secrets.token_hex(12)
        self.arrived = time.perf_counter()
        self.status = 0  # of the response, 0 before it has begun
        self._receive, self._send = receive, send
        self._complete = False  # whether the response has gone out
        self._reply: Reply | None = None

    async def run(self, work: Awaitable[None]) -> None:
        """Do the work of this exchange; every way it can end is dealt with."""
        metrics = self.service.metrics
        try:
            await work
        except ClientLeft:
            metrics.disconnects += 1
            self.status = self.status or CLIENT_LEFT
        except asyncio.CancelledError:
            metrics.disconnects += 1
            raise
        except Exception as error:
            refusal = refusal_of(error)
            if refusal.status == 500:
                self.service.journal.failed(f"{self.scope['method']} {self.route}", error)
            await self._refuse(refusal)
        finally:
            metrics.requests[self.route, self.status] += 1
            self.service.journal.write(self._line())

    async def unless_left(self, work: Coroutine[Any, Any, Done]) -> Done:
        """What some work gives, or ClientLeft, and the work ended, where its client leaves before. The body has been
        read by now.
        """
        task, watch = asyncio.ensure_future(work), asyncio.ensure_future(self._left())
        try:
            await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done() and not self._complete:
                raise ClientLeft
            return await task
        finally:
            unfinished = [each for each in (task, watch) if not each.done()]
            for each in unfinished:
                each.cancel()
            await asyncio.gather(*unfinished, return_exceptions=True)

    @property
    def route(self) -> str:
        """The path without what may stand in it: a name that the log and the metrics can hold."""
        return str(self.scope["path"])

    async def answer(self, form: Form) -> None:
        """Read the question of an endpoint's form, and answer it."""
        self.service.check_ready()

        async def begin(body: bytes, held: AsyncExitStack) -> Begun:
            parsed, question = await self.service.in_thread(lambda: _asked(form, body))
            self.service.names.check(parsed.get("model"))
            return await self._prepare(parsed, question, held)

        await self._answer(form, begin)

    async def answer_live(self, form: Form, sessions: Sessions) -> None:
        """Answer about the frame that is the body, when it is its turn in its session."""
        self.service.check_ready()
        fields = live_fields(self.scope)
        self.service.names.check(fields.get("model"))
        key = (self.salt, fields["session"]) if "session" in fields else None

        async def begin(frame: bytes, held: AsyncExitStack) -> Begun:
            if not frame:
                raise bad_request("The body is empty, expected a picture.", "body")
            question = live_question(fields, frame)
            await held.enter_async_context(sessions.turn(key))
            return await self._prepare({"model": fields.get("model")}, question, held)

        await self._answer(form, begin)

    async def _answer(self, form: Form, begin: Callable[[bytes, AsyncExitStack], Coroutine[Any, Any, Begun]]) -> None:
        """Read the body, begin with it, and let go of it before the answer is sent; what is held is held to the end."""
        async with AsyncExitStack() as held:
            async with self.service.bodies.read(self.scope, self._receive) as body:
                begun = await self.unless_left(begin(body, held))
                del body
            await self.unless_left(self._finish(form, begun))

    async def _prepare(self, parsed: dict[str, Any], question: Question, held: AsyncExitStack) -> Begun:
        """The reply to a question, which `held` holds a place for; the pictures as they were sent are let go of."""
        held.enter_context(self.service.admitted(len(question.options)))
        self._reply = await self.service.reply(question, self.salt, self.arrived)
        return Begun(parsed, replace(question, messages=()), self._reply)

    async def _finish(self, form: Form, begun: Begun) -> None:
        async with begun.reply as reply:
            if begun.question.stream:
                await self._stream(form.events(self.identity, begun.parsed, begun.question, reply))
                return
            await reply.finished()
        await send_json(self.send, form.whole(self.identity, begun.parsed, reply), headers=self._headers())

    async def _stream(self, events: AsyncIterator[bytes]) -> None:
        """Send events as they come, and comments where none comes for a while."""
        await begin_events(self.send, self._headers())
        async for data in events:
            await send_event(self.send, data or COMMENT)
        await end_events(self.send)

    async def send(self, message: Message) -> None:
        """Send a part of the response."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
        elif not message.get("more_body", False):
            self._complete = True
        await self._send(message)

    async def _refuse(self, refusal: Refusal) -> None:
        """Say what is wrong: as the response, or as the last event of a stream that has begun, without [DONE]."""
        if not self.status:
            await send_json(self.send, refusal.to_dict(), refusal.status, self._headers() | refusal.headers)
        elif not self._complete:
            await send_event(self.send, event(refusal.to_dict()))
            await end_events(self.send)

    async def _left(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass

    def _headers(self) -> dict[str, str]:
        return {"X-Request-Id": self.identity}

    def _line(self) -> str:
        """What the log says of it: counts and times, and nothing of what was asked."""
        words = [self.scope["method"], self.route, str(self.status)]
        if self._reply is not None:
            words.append(self._reply.describe())
        return " ".join([*words, f"{(time.perf_counter() - self.arrived) * 1e3:.0f} ms"])


def _asked(form: Form, body: bytes) -> tuple[dict[str, Any], Question]:
    """A body's fields but for what is said in it, and the question that it asks."""
    parsed = parse(body)
    question = form.question(parsed)
    return {name: value for name, value in parsed.items() if name not in ("messages", "input")}, question
