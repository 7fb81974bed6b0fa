"""The key-value cache of one decoder layer: what attention has already seen, kept so that it is computed once."""

import mlx.core as mx

STEP = 256  # positions added each time the buffer is full


class KVCache:
    """Keys and values (B, kv_heads, length, head_dim) of the positions so far, in a buffer that grows by STEP."""

    def __init__(self) -> None:
        self.length = 0
        self._keys: mx.array | None = None
        self._values: mx.array | None = None

    def update(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append new positions (B, kv_heads, L, head_dim); returns keys and values of all positions so far."""
        start, end = self.length, self.length + keys.shape[2]
        self._keys = _append(self._keys, keys, start)
        self._values = _append(self._values, values, start)
        self.length = end
        return self._keys[:, :, :end], self._values[:, :, :end]

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


def _append(buffer: mx.array | None, new: mx.array, start: int) -> mx.array:
    end = start + new.shape[2]
    if buffer is None or buffer.shape[2] < end:
        B, heads, _, head_dim = new.shape
        room = mx.zeros((B, heads, -(-end // STEP) * STEP - start, head_dim), new.dtype)
        buffer = room if buffer is None else mx.concatenate([buffer[:, :, :start], room], axis=2)
    buffer[:, :, start:end] = new
    return buffer
