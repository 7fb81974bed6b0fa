"""The key-value cache of one decoder layer: what attention has already seen, kept so that it is computed once.

`KVCache` holds one conversation. `BatchCache` holds several rows that go on together, a token each at a time. What
attention asks of either: `offset`, the position of the next token; `update`; and then `mask`.
"""

from collections.abc import Sequence

import mlx.core as mx

CACHE_GROWTH = 256  # positions added each time the buffer is full


class KVCache:
    """Keys and values (B, kv_heads, length, head_dim) of the positions so far; their buffer grows by CACHE_GROWTH."""

    def __init__(self) -> None:
        self.length = 0
        self._keys: mx.array | None = None
        self._values: mx.array | None = None

    @property
    def offset(self) -> int:
        """The position of the next token."""
        return self.length

    def update(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append new positions (B, kv_heads, L, head_dim); returns keys and values of all positions so far."""
        start, end = self.length, self.length + keys.shape[2]
        self._keys = _append(self._keys, keys, start)
        self._values = _append(self._values, values, start)
        self.length = end
        return self._keys[:, :, :end], self._values[:, :, :end]

    def mask(self, tokens: int, heads: int = 1) -> str | None:
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

    @property
    def state(self) -> list[mx.array]:
        """The buffers, to be evaluated."""
        return [buffer for buffer in (self._keys, self._values) if buffer is not None]

    @property
    def nbytes(self) -> int:
        """Memory held, in bytes."""
        return sum(buffer.nbytes for buffer in self.state)


class Padding:
    """What rows of different lengths begin with so that they end together: a number of positions each, which no query
    sees.

    One for the caches of all layers, so that what follows from it is made once per step: the positions of the next
    tokens, and the mask, which is None where no row is padded.
    """

    def __init__(self, counts: Sequence[int]):
        self._counts = list(counts)
        self._array = mx.array(self._counts) if any(self._counts) else None
        self._offset: tuple[int, int | mx.array] | None = None  # for a length, as is the mask
        self._mask: tuple[tuple[int, int], mx.array | None] | None = None
        self._kept: tuple[mx.array, Padding] | None = None

    def offset(self, length: int) -> int | mx.array:
        """The position of each row's next token (B,), or one for all rows, after `length` positions with padding."""
        if self._offset is None or self._offset[0] != length:
            self._offset = (length, length if self._array is None else length - self._array)
        return self._offset[1]

    def mask(self, length: int, heads: int = 1) -> mx.array | None:
        """What each row's last position may see: (B, heads, 1, length), true for its own; None where that is all.

        It lies there in full, or Metal's attention would lay it out in every layer.
        """
        if self._mask is None or self._mask[0] != (length, heads):
            mask = None
            if self._array is not None:
                padding = mx.array([[count] * heads for count in self._counts])
                mask = mx.arange(length) >= padding[:, :, None, None]
            self._mask = ((length, heads), mask)
        return self._mask[1]

    def keep(self, rows: mx.array) -> "Padding":
        """The mask of these rows alone, given by their indices; one for all caches that ask with the same array."""
        if self._kept is None or self._kept[0] is not rows:
            indices: list[int] = rows.tolist()  # type: ignore[assignment]  # one axis of whole numbers
            self._kept = (rows, Padding([self._counts[index] for index in indices]))
        return self._kept[1]


class BatchCache:
    """Keys and values (B, kv_heads, length, head_dim) of B rows that end together: shorter ones begin with padding.

    A row's own positions count from 0 after its padding.
    """

    def __init__(self, rows: Sequence[tuple[mx.array, mx.array]], padding: Padding | None = None):
        """Of the keys and values (1, kv_heads, L, head_dim) that each row holds, of any lengths L.

        `padding` is that of the other layers' caches, whose rows have the same lengths.
        """
        lengths = [keys.shape[2] for keys, _ in rows]
        self.length = max(lengths)
        self.padding = padding or Padding([self.length - length for length in lengths])
        self._keys, self._values = (
            mx.concatenate([_padded(row, self.length) for row in side]) for side in zip(*rows, strict=True)
        )

    @property
    def offset(self) -> int | mx.array:
        """The position of each row's next token (B,), or one for all."""
        return self.padding.offset(self.length)

    def update(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append a position (B, kv_heads, 1, head_dim) to every row; returns the keys and values of all, padded."""
        start, self.length = self.length, self.length + 1
        self._keys = _append(self._keys, keys, start)
        self._values = _append(self._values, values, start)
        return self._keys[:, :, : self.length], self._values[:, :, : self.length]

    def mask(self, tokens: int, heads: int = 1) -> mx.array | None:
        """What each row's last position may see, (B, heads, 1, length): its own; None where no row is padded."""
        return self.padding.mask(self.length, heads)

    @property
    def state(self) -> list[mx.array]:
        """The buffers, to be evaluated."""
        return [self._keys, self._values]

    def keep(self, rows: mx.array) -> None:
        """Go on with only these rows, given by their indices."""
        self.padding = self.padding.keep(rows)
        self._keys, self._values = self._keys[rows], self._values[rows]


def buffered(positions: int) -> int:
    """Positions that a buffer holding so many has room for."""
    return -(-positions // CACHE_GROWTH) * CACHE_GROWTH


def _padded(row: mx.array, length: int) -> mx.array:
    return mx.pad(row, [(0, 0), (0, 0), (length - row.shape[2], 0), (0, 0)])


def _append(buffer: mx.array | None, new: mx.array, start: int) -> mx.array:
    end = start + new.shape[2]
    if buffer is None or buffer.shape[2] < end:
        B, heads, _, head_dim = new.shape
        room = mx.zeros((B, heads, buffered(end) - start, head_dim), new.dtype)
        buffer = room if buffer is None else mx.concatenate([buffer[:, :, :start], room], axis=2)
    buffer[:, :, start:end] = new
    return buffer
