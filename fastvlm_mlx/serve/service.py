"""What all endpoints share: the engine and its scheduler, what is kept of pictures and answers, and how much may be
under way.

A question becomes a request in one of a few threads (`PREPARING_THREADS`), and its answers come back as a `Reply`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from ..decoding.engine import Engine
from ..decoding.request import Request
from ..decoding.scheduler import Scheduler
from ..errors import PromptError
from ..inputs.prompt import Message, check_text
from .body import Bodies
from .fetching import Fetcher
from .journal import Journal
from .messages import PictureLink
from .metrics import Metrics
from .names import ModelNames
from .pictures import PreparedPictures, data_of, is_web_address
from .questions import Question
from .refusal import Refusal, bad_request
from .reply import Reply

PREPARING_THREADS = 2  # that decode pictures and tokenise
MAX_WAITING = 64  # answers that wait for a row; a request that finds more is refused

Made = TypeVar("Made")


@dataclass(frozen=True)
class Limits:
    """What a server does at a time, in rows of a batch and answers that wait for one."""

    max_rows: int
    max_waiting: int


class Service:
    """The server's inside. It answers once `begin` has given it a scheduler, and no more after `stop`."""

    def __init__(
        self,
        engine: Engine,
        names: ModelNames,
        limits: Limits,
        journal: Journal,
        *,
        max_pixels: int,
        fetcher: Fetcher | None = None,
    ):
        self.engine, self.names, self.limits, self.journal = engine, names, limits, journal
        self.bodies = Bodies()
        self.metrics = Metrics()
        self.pictures = PreparedPictures(engine, max_pixels=max_pixels)
        self.stopping = False
        self._fetcher = fetcher
        self.scheduler: Scheduler | None = None
        self._pool = ThreadPoolExecutor(PREPARING_THREADS, thread_name_prefix="fastvlm-prepare")
        self.open_answers = 0  # answers under way, those that wait for a row among them
        self.replies: set[Reply] = set()
        self._add_gauges()

    @property
    def ready(self) -> bool:
        """Whether questions can be answered."""
        return self.scheduler is not None and not self.stopping

    def begin(self, scheduler: Scheduler) -> None:
        """Answer from now on."""
        self.scheduler = scheduler

    def stop(self) -> None:
        """Answer no more: every answer under way ends here, with an error that says why."""
        self.stopping = True
        for reply in list(self.replies):
            reply.end(Refusal(503, "The server is stopping.", code="stopping"))

    def close(self) -> None:
        """Let go of the threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def check_ready(self) -> None:
        """Raise a Refusal (503) where the model is not loaded yet, or the server is about to stop."""
        if self.stopping:
            raise Refusal(503, "The server is stopping.", code="stopping")
        if self.scheduler is None:
            raise Refusal(503, "The model is being loaded; try again in a moment.", code="loading")

    @contextmanager
    def admitted(self, answers: int) -> Iterator[None]:
        """For as long as so many answers are under way; raises a Refusal (429) where too many are already."""
        if self.open_answers + answers > self.limits.max_rows + self.limits.max_waiting:
            raise Refusal(429, "Too many requests are waiting; try again in a moment.", code="overloaded")
        self.open_answers += answers
        try:
            yield
        finally:
            self.open_answers -= answers

    async def in_thread(self, make: Callable[[], Made]) -> Made:
        """What a function gives, called in a thread for preparations."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, make)

    async def reply(self, question: Question, salt: bytes, arrived: float) -> Reply:
        """The answers to a question, not begun yet; raises a Refusal. `arrived` is when it came, on
        `time.perf_counter`'s clock.
        """
        self.check_ready()
        links = [link for said in question.messages for link in said.pictures]
        fetched = await self._fetch(links)
        scheduler = self.scheduler
        assert scheduler is not None  # as it is ready
        request = await self.in_thread(lambda: self._prepare(scheduler, question, fetched, salt))
        self.check_ready()
        self.metrics.pictures += len(links)
        return Reply(scheduler, request, question.options, salt, arrived, self)

    async def _fetch(self, links: Sequence[PictureLink]) -> dict[str, bytes]:
        """What lies at the addresses of the web among links, where that was allowed."""
        found: dict[str, bytes] = {}
        for link in links:
            if is_web_address(link.address) and link.address not in found:
                if self._fetcher is None:
                    raise bad_request(
                        f"`{link.param}` is an address of the web, and this server fetches none; send the picture "
                        "itself, as 'data:image/jpeg;base64,...', or start it with 'fastvlm-mlx serve "
                        "--allow-url-images'.",
                        link.param,
                    )
                found[link.address] = await self._fetcher.fetch(link.address, link.param)
        return found

    def _prepare(self, scheduler: Scheduler, question: Question, fetched: dict[str, bytes], salt: bytes) -> Request:
        """A question as the scheduler takes it; raises a Refusal."""
        started = time.perf_counter()
        messages, pixels, digests = [], [], []
        try:
            for said in question.messages:
                for link in said.pictures:
                    data = link.data or fetched.get(link.address) or data_of(link.address, link.param)
                    prepared, digest = self.pictures.prepare(data, salt, link.param)
                    pixels.append(prepared)
                    digests.append(digest)
                ids: tuple[int, ...] | None = None
                if said.role == "assistant":
                    check_text("answer", said.text)
                    ids = scheduler.ids_of(said.text, salt=salt)
                messages.append(Message(said.role, said.text, len(said.pictures), ids))
            pieces = self.engine.render_messages(messages)
        except PromptError as error:
            full = "has room for" in str(error)
            raise bad_request(str(error), "messages", "context_length_exceeded" if full else None) from error
        schema = question.options[0].schema
        if isinstance(schema, str):
            _check_schema(self.engine, schema)
        return Request(pixels, pieces, time.perf_counter() - started, digests)

    def opened(self, reply: Reply) -> None:
        """A reply has begun."""
        self.replies.add(reply)

    def closed(self, reply: Reply) -> None:
        """It has ended, however it did."""
        self.replies.discard(reply)

    def _add_gauges(self) -> None:
        gauges = self.metrics.gauges
        load = lambda name: lambda: getattr(self.scheduler.load, name) if self.scheduler is not None else 0  # noqa: E731
        gauges["answers_open"] = ("Answers under way or waiting.", lambda: self.open_answers)
        gauges["queue"] = ("Answers that wait for a row of the batch.", load("queued"))
        gauges["rows"] = ("Rows of the batch that are taken.", load("rows"))
        gauges["rows_max"] = ("Rows of the batch.", lambda: self.limits.max_rows)
        gauges["prefix_pool_bytes"] = (
            "Bytes of keys and values kept for prompts that begin alike.",
            load("pool_bytes"),
        )
        gauges["embeddings_bytes"] = ("Bytes of picture embeddings kept.", load("image_bytes"))
        gauges["embeddings"] = ("Pictures whose embeddings are kept.", lambda: len(self.engine.images))
        gauges["pixels_bytes"] = ("Bytes of prepared pictures kept.", lambda: self.pictures.nbytes)
        gauges["bodies_bytes"] = ("Bytes of request bodies held.", lambda: self.bodies.held)
        gauges["log_lines_lost"] = ("Lines of the log that could not be written.", lambda: self.journal.lost)
        counters = self.metrics.counters
        counters["decoded_tokens"] = ("Tokens drawn, also for answers that nobody waited for.", load("tokens"))
        counters["prefix_pool_hits"] = ("Prompts that began like an earlier one.", load("pool_hits"))
        counters["prefix_pool_misses"] = ("Prompts that did not.", load("pool_misses"))


def _check_schema(engine: Engine, schema: str) -> None:
    """Raise OptionError for a schema that answers cannot be held to; building what it takes here keeps that from the
    others.
    """
    from ..decoding.constraints import constraints_of  # imports an extra

    config = engine.config
    constraints_of(engine.tokenizer).constraint(schema, config.text.vocab_size, config.eos_token_ids)
