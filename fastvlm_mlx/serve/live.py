"""`POST /v1/live`: a camera's frame as the body, the question beside it, the answer as chat completion chunks.

Of a session, which a client names, at most one frame is answered and one waits: a newer one takes the place of the one
that waits, whose request gets 409 `superseded`. So the answer that comes is about what is to be seen now.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import parse_qsl, unquote

from starlette.types import Scope

from ..inputs.prompt import PROMPT
from .messages import PictureLink
from .questions import Question, chat_question
from .refusal import Refusal, bad_request

MAX_FIELDS = 20  # of a query
MAX_SESSION_CHARS = 100
TEXTS = ("prompt", "system", "model", "session")
NUMBERS = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")
PROMPT_HEADER = b"x-prompt"  # percent-encoded, in place of `prompt` in the query


def live_fields(scope: Scope) -> dict[str, Any]:
    """What is asked beside the frame, from the query and from the header X-Prompt; raises a Refusal."""
    found: dict[str, Any] = {}
    try:
        pairs = parse_qsl(scope["query_string"].decode("ascii"), max_num_fields=MAX_FIELDS, errors="strict")
        for name, value in scope["headers"]:
            if name == PROMPT_HEADER:
                found["prompt"] = unquote(value.decode("ascii"), errors="strict")
    except ValueError as error:
        raise bad_request(
            f"The query cannot be read: percent-encoded UTF-8 and up to {MAX_FIELDS} fields are."
        ) from error
    for name, value in pairs:
        if name in TEXTS:
            found[name] = value
        elif name in NUMBERS:
            found[name] = _number(name, value)
    if len(found.get("session", "")) > MAX_SESSION_CHARS:
        raise bad_request(f"`session` is longer than {MAX_SESSION_CHARS} characters; choose a shorter name.", "session")
    return found


def live_question(fields: Mapping[str, Any], frame: bytes) -> Question:
    """The question about a frame; raises a Refusal."""
    messages = [{"role": "system", "content": fields["system"]}] if "system" in fields else []
    messages.append({"role": "user", "content": fields.get("prompt", PROMPT)})
    options = {name: fields[name] for name in NUMBERS if name in fields}
    body = {"messages": messages, "stream": True, "stream_options": {"include_usage": True}, **options}
    question = chat_question(body)
    *before, asked = question.messages
    return replace(question, messages=[*before, replace(asked, pictures=(PictureLink("", "body", frame),))])


def _number(name: str, value: str) -> float | int:
    try:
        return int(value)
    except ValueError:
        pass
    try:
        return float(value)
    except ValueError as error:
        raise bad_request(f"`{name}` in the query is no number.", name) from error


@dataclass
class _Session:
    waiting: asyncio.Future[None] | None = None


class Sessions:
    """Whose turn it is: of each session one frame is answered and one waits. `superseded` counts those that a newer one
    replaced.
    """

    def __init__(self) -> None:
        self.superseded = 0
        self._open: dict[tuple[bytes, str], _Session] = {}

    def __len__(self) -> int:
        """Sessions with a frame under way."""
        return len(self._open)

    @asynccontextmanager
    async def turn(self, key: tuple[bytes, str] | None) -> AsyncIterator[None]:
        """Wait until a frame of the session `key` has its turn, and have it within the block; without a key that is
        always.

        Raises a Refusal (409) where a newer frame has come meanwhile.
        """
        if key is None:
            yield
            return
        session = self._open.get(key)
        if session is None:
            self._open[key] = _Session()
        else:
            await self._wait(key, session)
        try:
            yield
        finally:
            self._pass_on(key)

    async def _wait(self, key: tuple[bytes, str], session: _Session) -> None:
        if session.waiting is not None and not session.waiting.done():
            self.superseded += 1
            session.waiting.set_exception(
                Refusal(409, "A newer frame of the same session has come; nothing is lost by that.", code="superseded")
            )
        mine = session.waiting = asyncio.get_running_loop().create_future()
        try:
            await mine
        except asyncio.CancelledError:
            if session.waiting is mine:
                session.waiting = None
            elif mine.done() and not mine.cancelled() and mine.exception() is None:
                self._pass_on(key)  # its turn had come in the same moment
            raise

    def _pass_on(self, key: tuple[bytes, str]) -> None:
        session = self._open[key]
        following, session.waiting = session.waiting, None
        if following is not None and not following.done():
            following.set_result(None)
        else:
            del self._open[key]
