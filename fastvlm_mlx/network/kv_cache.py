"""The key-value cache of one decoder layer: what attention has already seen, kept so that it is computed once.

`KVCache` holds one conversation. `BatchCache` holds several rows that go on together, a token each at a time. What attention
asks of either: `offset`, the position of the next token; `update`; and then `mask`.
"""

from collections.abc import Sequence

import mlx.core as mx

STEP = 256  # positions added each time the buffer is full


class KVCache:
    """Keys and values (B, kv_heads, length, head_dim) of the positions so far, in a buffer that grows by STEP."""

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

    @property
    def state(self) -> list[mx.array]:
        """The buffers, to be evaluated."""
        return [buffer for buffer in (self._keys, self._values) if buffer is not None]

    @property
    def nbytes(self) -> int:
        """Memory held, in bytes."""
        return sum(buffer.nbytes for buffer in self.state)


class BatchCache:
    """Keys and values (B, kv_heads, length, head_dim) of B rows that end together: shorter ones begin with padding.

    A row's own positions count from 0 after its padding, which no query sees.
    """

    def __init__(self, rows: Sequence[tuple[mx.array, mx.array]]):
        """Of the keys and values (1, kv_heads, L, head_dim) that each row holds, of any lengths L."""
        lengths = [keys.shape[2] for keys, _ in rows]
        self.length = max(lengths)
        self._padding = mx.array([self.length - length for length in lengths])
        self._keys, self._values = (mx.concatenate([_padded(row, self.length) for row in side]) for side in zip(*rows, strict=True))

    @property
    def offset(self) -> mx.array:
        """The position of each row's next token (B,)."""
        return self.length - self._padding

    def update(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append a position (B, kv_heads, 1, head_dim) to every row; returns keys and values of all, padding included."""
        start, self.length = self.length, self.length + 1
        self._keys = _append(self._keys, keys, start)
        self._values = _append(self._values, values, start)
        return self._keys[:, :, : self.length], self._values[:, :, : self.length]

    def mask(self, tokens: int) -> mx.array:
        """What each row's last position may see, (B, 1, 1, length): its own positions."""
        return (mx.arange(self.length) >= self._padding[:, None])[:, None, None]

    def keep(self, rows: mx.array) -> None:
        """Go on with only these rows, given by their indices."""
        self._padding, self._keys, self._values = self._padding[rows], self._keys[rows], self._values[rows]


def _padded(row: mx.array, length: int) -> mx.array:
    return mx.pad(row, [(0, 0), (0, 0), (length - row.shape[2], 0), (0, 0)])


def _append(buffer: mx.array | None, new: mx.array, start: int) -> mx.array:
    end = start + new.shape[2]
    if buffer is None or buffer.shape[2] < end:
        B, heads, _, head_dim = new.shape
        room = mx.zeros((B, heads, -(-end // STEP) * STEP - start, head_dim), new.dtype)
        buffer = room if buffer is None else mx.concatenate([buffer[:, :, :start], room], axis=2)
    buffer[:, :, start:end] = new
    return buffer
