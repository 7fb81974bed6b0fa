"""Image embeddings, kept by what a picture shows and never by where it lies, up to a bounded number of bytes."""

import threading
from collections import OrderedDict
from collections.abc import Iterable
from hashlib import blake2b

import mlx.core as mx

from ..inputs.image import Pixels

CAPACITY = 256_000_000  # bytes: about 280 pictures of the 0.5B model, 70 of the 7B, in bfloat16 half as much each


def digest(pixels: Pixels) -> bytes:
    """16 bytes that identify a picture by its size and every value of its prepared pixels (S, S, 3), uint8."""
    return blake2b(pixels.tobytes(), digest_size=16, person=repr(pixels.shape).encode()[:16]).digest()


def salted(key: bytes, salt: bytes) -> bytes:
    """A digest under which nobody finds a picture without knowing the salt; with no salt, the digest unchanged."""
    return blake2b(key, digest_size=16, key=blake2b(salt, digest_size=32).digest()).digest() if salt else key


class ImageCache:
    """Embeddings (N, D) of pictures by digest, up to `capacity` bytes; the ones unused for longest are dropped first.

    Several threads may use it at once.
    """

    def __init__(self, capacity: int = CAPACITY):
        self.capacity = capacity
        self.nbytes = 0  # memory held, in bytes
        self._embeddings: OrderedDict[bytes, mx.array] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: bytes) -> mx.array | None:
        """The embeddings of a picture seen before, or None."""
        with self._lock:
            found = self._embeddings.get(key)
            if found is not None:
                self._embeddings.move_to_end(key)
            return found

    def put(self, key: bytes, embeddings: mx.array) -> None:
        """Keep a picture's embeddings, unless they alone exceed the capacity."""
        if embeddings.nbytes > self.capacity:
            return
        with self._lock:
            before = self._embeddings.pop(key, None)
            self._embeddings[key] = embeddings
            self.nbytes += embeddings.nbytes - (before.nbytes if before is not None else 0)
            while self.nbytes > self.capacity:
                self.nbytes -= self._embeddings.popitem(last=False)[1].nbytes

    def drop(self, keys: Iterable[bytes]) -> None:
        """Forget the pictures of these digests; those that are not held are ignored."""
        with self._lock:
            for key in keys:
                before = self._embeddings.pop(key, None)
                self.nbytes -= before.nbytes if before is not None else 0

    def clear(self) -> None:
        """Forget every picture."""
        with self._lock:
            self._embeddings.clear()
            self.nbytes = 0

    def __len__(self) -> int:
        """The number of pictures held."""
        return len(self._embeddings)

    def __repr__(self) -> str:
        return f"ImageCache({len(self)} pictures, {self.nbytes / 1e6:.1f} of {self.capacity / 1e6:.0f} MB)"
