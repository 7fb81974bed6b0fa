"""Answers under way together: in each turn one picture or one chunk of a prompt, and one token of every row.

A step reads all weights, for one row or for many, so rows that go on together cost little more than one. Products are
computed for all rows at once and attention for each on its own cache, so rows join and leave between any two steps, and
nothing is padded or copied. Whoever has a loop of their own calls `turn` (`batch`); `Scheduler` does it in a thread.
"""

import traceback
from collections import deque
from collections.abc import Iterator, Sequence

import mlx.core as mx

from ..backend import failures, residency
from ..errors import CancelledError, DeviceError, FastVLMError
from ..network.kv_cache import KVCache, ragged
from ..network.model import PREFILL_CHUNK
from .answer import Chunk
from .engine import Engine
from .prefix_pool import POOL_BYTES, PrefixPool
from .row import Row

SHARED_PREFILL_CHUNK = 512  # positions of a prompt between two steps of the rows that are being answered
MAX_BATCH_ROWS = 16  # answers under way at a time; bounds the memory of their caches


class Rows:
    """Rows that wait, one that is beginning, and those that are being answered.

    `exact` computes every step as wide as `max_rows`, and every chunk from a multiple of SHARED_PREFILL_CHUNK positions
    on, so that the kernels that compute a row are the same whoever else is there. `fill` takes newcomers, whole, until
    no more have room before each step: the most answers per second, where nobody waits for the next token.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        max_rows: int = MAX_BATCH_ROWS,
        pool_bytes: int = POOL_BYTES,
        exact: bool = False,
        fill: bool = False,
    ):
        self.engine, self.max_rows, self.exact, self.fill = engine, max_rows, exact, fill
        self.pool = PrefixPool(pool_bytes)
        self.waiting: deque[Row] = deque()
        self.beginning: Row | None = None
        self.decoding: list[Row] = []
        self.tokens_decoded = 0
        self._pieces: Iterator[mx.array | None] = iter(())  # of the beginning of the row that is beginning
        self._tokens = mx.array([], mx.uint32)  # the last of every row that is being answered (B,)
        self._unread = False  # whether nobody has looked at them yet
        self._ahead = engine.model.backend != "cpu"  # a CPU has no queue to be kept full

    @property
    def under_way(self) -> int:
        """Rows that are beginning or being answered."""
        return len(self.decoding) + (self.beginning is not None)

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.waiting) or self.under_way > 0

    def add(self, row: Row) -> None:
        """Let a row wait for its turn."""
        self.waiting.append(row)

    def turn(self) -> None:
        """Drop the rows that were cancelled, take a newcomer one piece further, and go one step with those being
        answered.

        What goes wrong with one row is given to that row; where the device fails in a step, to all that took part in
        it.
        """
        self._drop_cancelled()
        if not self._ahead:
            self._read()  # where rows that end make room
        if self._newcomer:
            self._read()  # what fails next is the newcomer's own, and no token waits for its piece
            self._begin()
            while self.fill and self._newcomer:
                self._begin()
        self._step()

    def close(self, error: Exception) -> None:
        """End everything that waits or is under way with an error that says why, and forget what was kept."""
        every = [*self.waiting, *([self.beginning] if self.beginning else []), *self.decoding]
        self.waiting.clear()
        self.beginning, self._pieces = None, iter(())
        self.decoding, self._tokens, self._unread = [], mx.array([], mx.uint32), False
        self.pool.clear(in_use=True)
        for row in every:
            row.entry = None
            row.emit(error)

    @property
    def _newcomer(self) -> bool:
        return self.beginning is not None or (bool(self.waiting) and len(self.decoding) < self.max_rows)

    def _begin(self) -> None:
        """One picture, or one chunk of a prompt; with the last, the row joins the others."""
        row = self.beginning
        if row is None:
            if self.under_way == 0:
                mx.reset_peak_memory()
            row = self.beginning = self.waiting.popleft()
            fixed = SHARED_PREFILL_CHUNK if self.exact else None
            self._pieces = row.begin(self.engine, self.pool, self._chunk, fixed)
        try:
            first = next(self._pieces)
        except Exception as error:
            self._fail(row, error)
            return
        if first is not None:
            self.beginning, self._pieces = None, iter(())
            self.decoding.append(row)
            self._tokens = mx.concatenate([self._tokens, first])
            self._take([row], first)

    def _chunk(self) -> int:
        """Positions of a prompt to be prefilled at once: few while others wait for their next token."""
        return SHARED_PREFILL_CHUNK if self.decoding and not self.fill else PREFILL_CHUNK

    def _step(self) -> None:
        """The next token of every row, under way when this returns; the tokens before are handed out meanwhile."""
        if any(row.draft.room <= self._unread for row in self.decoding):
            self._read()
        rows = list(self.decoding)
        if not rows:
            return
        try:
            logits = self._logits([row.cache for row in rows], self._tokens)
        except Exception as error:
            rows, logits = self._one_by_one(error)
        try:
            drawn = self._draw(rows, logits)
            mx.async_eval(drawn, *(array for row in rows for array in row.sampler.kept))
        except Exception as error:
            self._fail_all(error)
            return
        self._read()
        self._tokens = self._of_those_left(rows, drawn)
        self._unread = bool(self.decoding)

    def _logits(self, caches: Sequence[Sequence[KVCache]], tokens: mx.array) -> mx.array:
        """Logits (B, V) after one more token (B,) of each row."""
        rows, width = len(caches), self.max_rows if self.exact else len(caches)
        if width > rows:
            tokens = mx.concatenate([tokens, mx.zeros((width - rows,), tokens.dtype)])
        return self.engine.model.step(tokens, ragged(caches, width))[:rows]

    def _one_by_one(self, error: Exception) -> tuple[list[Row], mx.array]:
        """After a step has failed, one for each row: those it fails for again are the ones to blame. Gives the rows
        left, and their logits.
        """
        if isinstance(failures.explained(error), DeviceError):
            self._fail_all(error)
        self._read()
        tokens, left, logits = self._tokens, [], [mx.zeros((0, self.engine.config.text.vocab_size))]
        for place, row in enumerate(list(self.decoding)):
            try:
                for layer in row.cache:
                    layer.trim(len(row.known) - 1)
                logits.append(self._logits([row.cache], tokens[place : place + 1]))
                left.append(row)
            except Exception as its_own:
                self._fail(row, its_own)
        return left, mx.concatenate(logits)

    def _draw(self, rows: Sequence[Row], logits: mx.array) -> mx.array:
        """The next token of every row (B,), each drawn from its own logits as if it were alone.

        Those that have to be told the tokens before come last, when the others are under way; some may leave with that.
        """
        if all(row.sampler.greedy for row in rows):
            return mx.argmax(logits, axis=-1)
        late = [row for row in rows if row.sampler.waits]
        drawn = {row: self._draw_one(row, logits[i : i + 1]) for i, row in enumerate(rows) if row not in late}
        if late:
            mx.async_eval(logits, *drawn.values())
            self._read()
            for i, row in enumerate(rows):
                if row in late:
                    gone = row not in self.decoding
                    drawn[row] = mx.zeros((1,), mx.uint32) if gone else self._draw_one(row, logits[i : i + 1])
        return mx.concatenate([drawn[row] for row in rows])

    def _draw_one(self, row: Row, logits: mx.array) -> mx.array:
        try:
            return row.sampler(logits)
        except Exception as error:
            self._fail(row, error)
            return mx.zeros((1,), mx.uint32)  # of a row that is gone

    def _read(self) -> None:
        """Wait for the tokens that are under way, and hand them out."""
        if self._unread:
            self._unread = False
            self._take(list(self.decoding), self._tokens)

    def _take(self, rows: Sequence[Row], tokens: mx.array) -> None:
        """Give these rows their tokens; those whose answers end with them leave."""
        try:
            ids: list[int] = tokens.tolist()  # type: ignore[assignment]  # token ids are whole numbers
        except Exception as error:
            self._fail_all(error)
            return
        self.tokens_decoded += len(ids)
        for row, token in zip(rows, ids, strict=True):
            try:
                row.take(token)
                if row.draft.reason is not None:
                    residency.check_device(self.engine.model.backend)
                    self._end(row, row.draft.finish())
            except Exception as error:
                if isinstance(failures.explained(error), DeviceError):
                    self._fail_all(error)
                    return
                self._fail(row, error)

    def _of_those_left(self, rows: Sequence[Row], array: mx.array) -> mx.array:
        """Of an array with an item for each of these rows, the items of those that are still being answered."""
        left = [place for place, row in enumerate(rows) if row in self.decoding]
        return array if len(left) == len(rows) else array[mx.array(left, mx.uint32)]

    # ---- leaving -----------------------------------------------------------------------------------------------------

    def _drop_cancelled(self) -> None:
        for row in [*self.waiting, *([self.beginning] if self.beginning else []), *self.decoding]:
            if row.cancelled:
                self._end(row, CancelledError("The answer was cancelled before it was finished."))

    def _fail_all(self, error: Exception) -> None:
        """End every row that takes part in the steps."""
        self._unread = False
        for row in list(self.decoding):
            self._fail(row, error)

    def _fail(self, row: Row, error: Exception) -> None:
        """End a row with what went wrong; what was being computed for it when MLX failed is dropped, its pictures with
        it.
        """
        meant = failures.explained(error)
        _let_go(error)
        if failures.spoils(error):
            self.engine.images.drop(row.digests)
            if row.entry is not None:
                self.pool.drop(row.entry)
                row.entry = None
            residency.recover()
        if isinstance(meant, DeviceError):
            self.pool.clear()
        if meant is not None:
            meant.__cause__ = error
        self._end(row, meant or error)

    def _end(self, row: Row, last: Chunk | Exception) -> None:
        """A row leaves, wherever it was; what its cache holds goes back to the pool."""
        if row is self.beginning:
            self.beginning, self._pieces = None, iter(())
        elif row in self.decoding:
            rows = list(self.decoding)
            self.decoding.remove(row)
            self._tokens = self._of_those_left(rows, self._tokens)
        elif row in self.waiting:
            self.waiting.remove(row)
        if row.entry is not None:
            self.pool.give_back(row.entry, row.known)
            row.entry = None
        row.emit(last)


def _let_go(error: BaseException) -> None:
    """Say in a note which lines an exception came through: as frames they would hold rows and arrays for as long as
    whoever is told of it keeps it.
    """
    if error.__traceback__ is not None and not isinstance(error, FastVLMError):
        error.add_note("".join(traceback.format_tb(error.__traceback__)).rstrip())
    each: BaseException | None = error
    while each is not None:
        each.__traceback__ = None
        each = each.__cause__ or each.__context__
