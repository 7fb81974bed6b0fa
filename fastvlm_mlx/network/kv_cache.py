"""The key-value cache of one decoder layer: what attention has already seen, kept so that it is computed once.

`KVCache` holds one sequence. `RaggedCache` is how several of them go on together, a token each at a time.
"""

from collections.abc import Sequence

import mlx.core as mx

CACHE_GROWTH = 256  # positions added each time the buffer is full


class KVCache:
    """Keys and values (B, kv_heads, length, head_dim) of the positions so far; their buffer grows by CACHE_GROWTH."""

    def __init__(self) -> None:
        self.length = 0
        self._view = False
        self._keys: mx.array | None = None
        self._values: mx.array | None = None

    @property
    def offset(self) -> int:
        """The position of the next token."""
        return self.length

    def update(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append new positions (B, kv_heads, L, head_dim); returns keys and values of all positions so far."""
        start, end = self.length, self.length + keys.shape[2]
        self._view = False
        self._keys = _append(self._keys, keys, start)
        self._values = _append(self._values, values, start)
        self.length = end
        return self._keys[:, :, :end], self._values[:, :, :end]

    def mask(self, tokens: int) -> str | None:
        """What the `tokens` last positions may see: themselves and everything before."""
        return "causal" if tokens > 1 else None

    @property
    def held(self) -> tuple[mx.array, mx.array]:
        """Keys and values of all positions so far; raises ValueError where there are none."""
        if self._keys is None or self._values is None:
            raise ValueError("the cache is empty")
        return self._keys[:, :, : self.length], self._values[:, :, : self.length]

    def trim(self, length: int) -> None:
        """Forget every position from `length` on."""
        self.length = min(self.length, length)

    def fork(self, length: int) -> "KVCache":
        """Another cache that holds the first `length` positions. Both may go on: the buffer is copied at the first
        write.
        """
        other = KVCache()
        other.length = min(self.length, length)
        if other.length > 0:
            room = buffered(other.length)
            other._keys, other._values = (buffer[:, :, :room] for buffer in self.state)
            other._view = True
        return other

    @property
    def is_view(self) -> bool:
        """Whether it is a fork that was not written to yet: its buffers are those it was forked from, however long."""
        return self._view

    @property
    def state(self) -> list[mx.array]:
        """The buffers, to be evaluated."""
        return [buffer for buffer in (self._keys, self._values) if buffer is not None]

    @property
    def nbytes(self) -> int:
        """Memory held, in bytes."""
        return sum(buffer.nbytes for buffer in self.state)


class RaggedCache:
    """One layer's caches of B rows of any lengths that go on together, a token each; every row attends to its own
    alone.

    Nothing is padded, masked or copied: a row joins by its `KVCache` being among `rows`, and leaves by not being there.
    """

    def __init__(self, rows: Sequence[KVCache], offset: mx.array):
        """`offset` is the position of each row's next token (B,), the same array for every layer.

        B may exceed the number of caches: what is computed for the rows after the last cache is given to nobody.
        """
        self.rows = list(rows)
        self.offset = offset


def ragged(rows: Sequence[Sequence[KVCache]], width: int | None = None) -> Sequence[KVCache] | list[RaggedCache]:
    """The caches of all layers for one step of several rows, given the caches (one per layer) of each row.

    The products of the step are `width` rows wide, by default as many as there are; one row alone keeps the caches it
    has.
    """
    width = len(rows) if width is None else width
    if width == 1:
        return rows[0]
    offset = mx.array([row[0].offset for row in rows] + [0] * (width - len(rows)))
    return [RaggedCache(layer, offset) for layer in zip(*rows, strict=True)]


def buffered(positions: int) -> int:
    """Positions that a buffer holding so many has room for."""
    return -(-positions // CACHE_GROWTH) * CACHE_GROWTH


def _append(buffer: mx.array | None, new: mx.array, start: int) -> mx.array:
    end = start + new.shape[2]
    if buffer is None or buffer.shape[2] < end:
        B, heads, _, head_dim = new.shape
        room = mx.zeros((B, heads, buffered(end) - start, head_dim), new.dtype)
        buffer = room if buffer is None else mx.concatenate([buffer[:, :, :start], room], axis=2)
    buffer[:, :, start:end] = new
    return buffer
