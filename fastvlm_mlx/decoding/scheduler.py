"""Questions from anywhere, answered together in one thread: each joins and leaves the others between two steps.

Enters: prepared requests, from any thread. Leaves: chunks, to iterators and listeners; `Rows` says what a turn does.
"""

import atexit
import queue
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from ..backend.residency import wired
from ..config import is_whole
from ..errors import CancelledError, FastVLMError, OptionError, shown
from .answer import Answer, Chunk
from .engine import Engine
from .logprobs import Logprobs
from .prefix_pool import POOL_BYTES
from .recent_answers import RecentAnswers
from .request import Options, Request
from .row import Emit, Row
from .rows import MAX_BATCH_ROWS, Rows

MAX_UNREAD_CHUNKS = 64  # of an answer, for whoever iterates over it; when there are more, they become one

Listener = Callable[[Chunk | FastVLMError], None]


@dataclass(frozen=True)
class Load:
    """What a scheduler is at, and what it has done since it was made.

    `queued` questions wait; `rows` are beginning or being answered. `tokens` have been drawn and `answers` finished in
    all. `pool_bytes` are held for questions that begin like earlier ones, `pool_hits` have found such a beginning and
    `pool_misses` none. `image_bytes` are held of pictures seen before.
    """

    queued: int
    rows: int
    tokens: int
    answers: int
    pool_bytes: int
    pool_hits: int
    pool_misses: int
    image_bytes: int


class Pending:
    """An answer under way: iterate over its chunks, once, or wait for its `result`, in any thread but the engine's.

    Chunks that nobody reads become one when there are MAX_UNREAD_CHUNKS of them.
    """

    def __init__(self, listener: Listener | None = None):
        self._listener = listener
        self._changed = threading.Condition()  # of what follows
        self._unread: deque[Chunk] = deque()
        self._last: Answer | FastVLMError | None = None
        self._row: weakref.ref[Row] | None = None

    def cancel(self) -> None:
        """Break the answer off: its row is free within two steps, and whoever waits gets a CancelledError. Later it
        does nothing.
        """
        row = self._row() if self._row is not None else None
        if row is not None:
            row.cancelled = True

    @property
    def done(self) -> bool:
        """Whether the answer is there, or what went wrong."""
        return self._last is not None

    def __iter__(self) -> Iterator[Chunk]:
        """The chunks as they come, the last with the answer; raises what went wrong.

        Each is given once: iterating again goes on with what was not read, and at the end gives nothing, or raises what
        went wrong again.
        """
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._unread or self.done)
                chunk = self._unread.popleft() if self._unread else None
            if chunk is None:
                break
            yield chunk
        if isinstance(self._last, FastVLMError):
            raise self._last

    def result(self, timeout: float | None = None) -> Answer:
        """Wait for the answer, at most `timeout` seconds; raises TimeoutError, or the FastVLMError that ended it."""
        with self._changed:
            self._changed.wait_for(lambda: self.done, timeout)
        if self._last is None:
            raise TimeoutError(f"There was no answer within {timeout} s.")
        if isinstance(self._last, FastVLMError):
            raise self._last
        return self._last

    def _hand_out(self, found: Chunk | Exception) -> None:
        """Give a chunk, or the error, to whoever waits; called by the engine's thread."""
        if isinstance(found, Chunk):
            chunk: Chunk | FastVLMError = found
        elif isinstance(found, FastVLMError):
            chunk = found
        else:
            chunk = FastVLMError(
                f"The answer failed ({type(found).__name__}: {shown(str(found))}); report this with the question."
            )
            chunk.__cause__ = found
        last = chunk.answer if isinstance(chunk, Chunk) else chunk
        with self._changed:
            if isinstance(chunk, Chunk):
                self._keep(chunk)
            self._last = last
            self._changed.notify_all()
        if self._listener is not None:
            listener, self._listener = self._listener, None  # which is not called again where it fails
            try:
                listener(chunk)
            except Exception as error:
                if last is None:
                    raise  # and its answer ends here
                # There is no answer left to end, and those of others must not: it is told as any thread's fault is.
                threading.excepthook(
                    threading.ExceptHookArgs((type(error), error, error.__traceback__, threading.current_thread()))
                )
            self._listener = listener if last is None else None

    def _keep(self, chunk: Chunk) -> None:
        """Hold a chunk for whoever iterates."""
        self._unread.append(chunk)
        if len(self._unread) >= MAX_UNREAD_CHUNKS:
            text = "".join(each.text for each in self._unread)
            logprobs = Logprobs(token for each in self._unread for token in each.logprobs)
            self._unread.clear()
            self._unread.append(Chunk(text, chunk.answer, logprobs))


class Scheduler:
    """One thread that answers whatever is submitted, up to `max_rows` at a time and in the order it came.

    As a context manager, or until `close`. Every answer is the one that `generate` gives to its request alone, with its
    own options; on a GPU up to the rounding of sums, which depends on how many are under way unless `exact`.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        max_rows: int = MAX_BATCH_ROWS,
        pool_bytes: int | None = None,
        exact: bool = False,
    ):
        """`engine` has its weights loaded. `pool_bytes` bounds what is kept of answers that are over, by default
        POOL_BYTES.

        Raises CheckpointError without weights, OptionError for fewer than one row or a negative number of bytes.
        """
        if not is_whole(max_rows) or max_rows < 1:
            raise OptionError(f"`max_rows` is {shown(max_rows)}, expected a whole number of at least 1.")
        if pool_bytes is not None and not (is_whole(pool_bytes) and pool_bytes >= 0):
            raise OptionError(f"`pool_bytes` is {shown(pool_bytes)}, expected a whole number of bytes, 0 for none.")
        self.engine = engine
        self._rows = Rows(
            engine, max_rows=max_rows, pool_bytes=POOL_BYTES if pool_bytes is None else pool_bytes, exact=exact
        )
        self._recent = RecentAnswers()
        self._answers = 0
        self._incoming: queue.SimpleQueue[Row | None] = queue.SimpleQueue()  # None: something else has changed
        self._lock = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="fastvlm-scheduler", daemon=True)
        self._thread.start()
        atexit.register(self.close)  # MLX must not be computing when the process ends

    def submit(
        self, request: Request, options: Options, *, salt: bytes = b"", listener: Listener | None = None
    ) -> Pending:
        """Let a prepared request wait for its turn.

        `listener` is called in the engine's thread with each chunk, the last of which has the answer, or with the
        error; it must not block. Where it fails, its answer ends; with the last chunk or the error, only
        `threading.excepthook` is told. Nothing computed for one `salt` is used for another. Raises PromptError for a
        request without positions, or with as many as the model has room for; FastVLMError once the scheduler is closed.
        """
        self.engine.check(request)
        pending = Pending(listener)
        emit = self._emit(pending, salt, self.engine.stop_tokens(options))
        row = Row(self.engine, request, options, emit, salt=salt)
        pending._row = weakref.ref(row)
        with self._lock:
            if self._closed:
                raise FastVLMError("The scheduler is closed, so nothing more is answered.")
            self._incoming.put(row)
        return pending

    def ids_of(self, text: str, *, salt: bytes = b"") -> tuple[int, ...]:
        """The token ids of an assistant's message: those that were generated, where it is a recent answer of this salt.

        Otherwise those that the tokenizer makes of it. With them a conversation that is sent back goes on where it was.
        """
        found = self._recent.find(text, salt)
        return tuple(self.engine.tokenizer.encode(text)) if found is None else found

    @property
    def load(self) -> Load:
        """What the scheduler is at just now."""
        rows = self._rows
        return Load(
            queued=self._incoming.qsize() + len(rows.waiting),
            rows=rows.under_way,
            tokens=rows.tokens_decoded,
            answers=self._answers,
            pool_bytes=rows.pool.nbytes,
            pool_hits=rows.pool.hits,
            pool_misses=rows.pool.misses,
            image_bytes=self.engine.images.nbytes,
        )

    def close(self) -> None:
        """End every answer that waits or is under way with a CancelledError, free what was kept, end the thread."""
        with self._lock:
            self._closed = True
            self._incoming.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join()
        atexit.unregister(self.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _emit(self, pending: Pending, salt: bytes, stop: Sequence[int]) -> Emit:
        def emit(found: Chunk | Exception) -> None:
            answer = found.answer if isinstance(found, Chunk) else None
            if answer is not None:
                self._answers += 1
                ids = answer.token_ids[:-1] if answer.token_ids[-1] in stop else answer.token_ids
                if self.engine.tokenizer.decode(ids) == answer.text:  # not where a stop string was cut off
                    self._recent.keep(answer.text, ids, salt)
            pending._hand_out(found)

        return emit

    def _run(self) -> None:
        reason: Exception = CancelledError("The scheduler was closed before this answer was finished.")
        try:
            with wired(self.engine.model.backend):
                while not self._closed:
                    self._receive()
                    if self._rows.busy:
                        self._rows.turn()
        except Exception as error:  # a fault of our own: nobody shall wait for ever
            reason = error
            raise
        finally:
            with self._lock:
                self._closed = True
            while not self._incoming.empty():
                if (row := self._incoming.get()) is not None:
                    self._rows.add(row)
            self._rows.close(reason)

    def _receive(self) -> None:
        """Take what has come in, and wait for it where there is nothing to do."""
        while not self._incoming.empty() or not self._rows.busy:
            row = self._incoming.get()
            if row is None:
                return
            self._rows.add(row)
