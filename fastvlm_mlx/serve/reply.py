"""The answers to one request on their way: rows of the scheduler, whose chunks come from its thread into a queue of
this loop.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Protocol, Self

from ..decoding.answer import Answer, Chunk
from ..decoding.request import Options, Request
from ..decoding.scheduler import Pending, Scheduler
from ..errors import FastVLMError, counted
from .metrics import Metrics
from .refusal import Refusal, refusal_of

QUIET_SECONDS = 10.0  # after which a client is told that its answer is still to come

Piece = tuple[int, Chunk]  # which answer, and what came of it


class Desk(Protocol):
    """Where replies are registered for as long as they are under way."""

    metrics: Metrics

    def opened(self, reply: Reply) -> None:
        """A reply has begun."""

    def closed(self, reply: Reply) -> None:
        """It has ended, however it did."""


class Reply:
    """One answer for each of `options` to a request; an asynchronous context manager, at whose end nothing is left
    under way.

    `arrived` is when the request came, on the clock of `time.perf_counter`; `answers` fills as they are finished.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        request: Request,
        options: Sequence[Options],
        salt: bytes,
        arrived: float,
        desk: Desk,
    ):
        self.request = request
        self.answers: list[Answer | None] = [None] * len(options)
        self.first_token_seconds: float | None = None
        self._scheduler, self._options, self._salt, self._arrived, self._desk = scheduler, options, salt, arrived, desk
        self._pending: list[Pending] = []
        self._came: deque[tuple[int, Chunk | FastVLMError]] = deque()
        self._something = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._last = [0.0] * len(options)  # when something came of each answer

    async def __aenter__(self) -> Self:
        self._desk.opened(self)
        try:
            for number, options in enumerate(self._options):
                listener = self._listener(number)
                self._pending.append(self._scheduler.submit(self.request, options, salt=self._salt, listener=listener))
        except BaseException:
            self._let_go()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._let_go()

    def end(self, refusal: Refusal) -> None:
        """Break the answers off; whoever reads them gets the refusal."""
        self._came.clear()
        self._came.append((0, refusal))
        self._something.set()

    async def pieces(self, quiet_seconds: float = QUIET_SECONDS) -> AsyncIterator[list[Piece]]:
        """What comes of the answers, all that has come at a time; nothing (an empty list) after a while of quiet.

        Ends with the last answer; raises a Refusal where one failed.
        """
        while None in self.answers:
            if not self._came:
                self._something.clear()
                try:
                    async with asyncio.timeout(quiet_seconds):
                        await self._something.wait()
                except TimeoutError:
                    yield []
                    continue
            found: list[Piece] = []
            while self._came:
                number, piece = self._came.popleft()
                if isinstance(piece, FastVLMError):
                    if found:
                        yield found
                    raise refusal_of(piece) from piece
                self._count(number, piece)
                found.append((number, piece))
            yield found

    async def finished(self) -> None:
        """Wait for all answers; raises a Refusal where one failed."""
        async for _ in self.pieces():
            pass

    @property
    def given(self) -> list[Answer]:
        """The answers that are finished, in order."""
        return [answer for answer in self.answers if answer is not None]

    def _listener(self, number: int) -> Callable[[Chunk | FastVLMError], None]:
        """What the engine's thread calls with what comes of one answer."""

        def listen(piece: Chunk | FastVLMError) -> None:
            with suppress(RuntimeError):  # the loop is closed: the server has ended meanwhile
                self._loop.call_soon_threadsafe(self._take, number, piece)

        return listen

    def _take(self, number: int, piece: Chunk | FastVLMError) -> None:
        self._came.append((number, piece))
        self._something.set()

    def _count(self, number: int, chunk: Chunk) -> None:
        metrics, now = self._desk.metrics, time.perf_counter()
        if self.first_token_seconds is None:
            self.first_token_seconds = now - self._arrived
            metrics.first_token.add(self.first_token_seconds)
        elif self._last[number]:
            metrics.between_tokens.add(now - self._last[number])
        self._last[number] = now
        if chunk.answer is not None:
            self.answers[number] = chunk.answer
            stats = chunk.answer.stats
            metrics.tokens["completion"] += stats.completion_tokens
            metrics.decode_rate = stats.decode_tokens_per_second
            if number == 0:
                metrics.tokens["prompt"] += stats.prompt_tokens
                metrics.tokens["cached"] += stats.reused_tokens

    def _let_go(self) -> None:
        for pending, answer in zip(self._pending, self.answers, strict=False):
            if answer is None:
                pending.cancel()
        self._desk.closed(self)

    def describe(self) -> str:
        """Its counts in a few words, and how soon its first token came."""
        stats = [answer.stats for answer in self.given]
        words = [f"{counted(len(self.request.pixels), 'picture')},", counted(self.request.prompt_tokens, "token")]
        if stats:
            words.append(f"({stats[0].reused_tokens} known) + {sum(each.completion_tokens for each in stats)}")
        if self.first_token_seconds is not None:
            words.append(f"first after {self.first_token_seconds * 1e3:.0f} ms")
        return " ".join(words) + ","
