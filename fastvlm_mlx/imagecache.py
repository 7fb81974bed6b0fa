"""Image embeddings, kept by what a picture shows and never by where it lies, up to a bounded number of bytes."""

from collections import OrderedDict
from hashlib import blake2b

import mlx.core as mx

from .image import Pixels

CAPACITY = 256_000_000  # bytes: about 280 pictures of the 0.5B model, 70 of the 7B, in bfloat16 half as much each


def digest(pixels: Pixels) -> bytes:
    """What identifies a picture: its size and every value of its prepared pixels (S, S, 3)."""
    return blake2b(pixels.tobytes(), digest_size=16, person=repr(pixels.shape).encode()[:16]).digest()


class ImageCache:
    """Embeddings (N, D) by digest; the one unused for longest goes first when `capacity` bytes are exceeded."""

    def __init__(self, capacity: int = CAPACITY):
        self.capacity = capacity
        self._embeddings: OrderedDict[bytes, mx.array] = OrderedDict()

    def get(self, key: bytes) -> mx.array | None:
        """The embeddings of a picture seen before, or None."""
        found = self._embeddings.get(key)
        if found is not None:
            self._embeddings.move_to_end(key)
        return found

    def put(self, key: bytes, embeddings: mx.array) -> None:
        """Keep a picture's embeddings, if they fit at all."""
        if embeddings.nbytes > self.capacity:
            return
        self._embeddings[key] = embeddings
        self._embeddings.move_to_end(key)
        while self.nbytes > self.capacity:
            self._embeddings.popitem(last=False)

    def clear(self) -> None:
        """Forget every picture."""
        self._embeddings.clear()

    def __len__(self) -> int:
        """Pictures held."""
        return len(self._embeddings)

    @property
    def nbytes(self) -> int:
        """Memory held, in bytes."""
        return sum(embeddings.nbytes for embeddings in self._embeddings.values())
