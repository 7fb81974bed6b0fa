"""The pictures of a request as the decoder reads them: encoded one by one, checked, and kept where they are finite.

Enters: pixels (S, S, 3), uint8. Leaves: embeddings (N, D), finite, in the engine's image cache as well.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import mlx.core as mx

from ..backend import failures, residency
from ..backend.failures import explaining
from ..errors import CheckpointError, warn
from ..inputs.image import Pixels, Source
from ..inputs.pieces import ImageSlot
from ..network.model import FastVLM
from .engine import Engine
from .image_cache import ImageCache
from .loading import tower_in
from .request import Request

OVERFLOW = "The image encoder's numbers overflow; load the model with `dtype='bfloat16'` or `dtype='float32'`."
AGAIN = (
    "The image encoder's numbers overflow in float16, so the picture was encoded again in float32; "
    "`dtype='bfloat16'` has room for them."
)


class Encoding:
    """The pictures of one request on their way through the tower.

    `images` are their embeddings (N, D) by index; they may not be computed yet until `wait` returns.
    """

    def __init__(self, engine: Engine, request: Request, digests: Sequence[bytes], kept: int = 0):
        """Pictures that lie whole in the first `kept` positions are not needed; nothing is encoded before `begin`."""
        self.images: dict[int, mx.array] = {}
        self._engine = engine
        self._pixels: dict[bytes, Pixels] = {}  # of those that are encoded now, by digest
        self._new: dict[bytes, mx.array] = {}
        self._finite: dict[bytes, mx.array] = {}
        self._digests = digests
        self._wanted: list[tuple[int, Pixels]] = []
        for piece in request.pieces:
            if isinstance(piece, ImageSlot) and kept < len(piece):
                self._wanted.append((piece.index, request.pixels[piece.index]))
            kept = max(0, kept - len(piece))

    def begin(self) -> Iterator[int]:
        """Look up each picture, or begin to encode it; gives the index of each one that is being encoded now."""
        for index, pixels in self._wanted:
            key = self._digests[index]
            found = self._new.get(key)
            if found is None:
                found = self._engine.images.get(key)
            new = found is None
            if found is None:
                found = self._engine.model.encode(mx.array(pixels[None]))[0]
                # Also tells when it is done: mx.eval would wait for the prefill as well.
                finite = mx.isfinite(found).all()
                # Before the next one: evaluated together, all towers would be in memory together.
                mx.async_eval(found, finite)
                self._new[key], self._finite[key], self._pixels[key] = found, finite, pixels
            self.images[index] = found
            if new:
                yield index

    def begin_all(self) -> None:
        """Look up every picture, or begin to encode it."""
        for _ in self.begin():
            pass

    def wait(self) -> bool:
        """Wait for what is being encoded, and put it into the engine's image cache.

        Returns whether any in `images` was replaced, because its numbers had overflowed float16. Raises CheckpointError
        where numbers overflow otherwise. No other thread finds a picture in the cache before this: it could not wait.
        """
        overflowed = [key for key, finite in self._finite.items() if not finite.item()]
        self._finite = {}
        if overflowed:
            again = encode_again(self._engine, [self._pixels[key] for key in overflowed])
            self._new |= dict(zip(overflowed, again, strict=True))
            self.images |= {
                index: self._new[key] for index in self.images if (key := self._digests[index]) in overflowed
            }
        for key, embeddings in self._new.items():
            self._engine.images.put(key, embeddings)
        return bool(overflowed)


def encode_all(engine: Engine, sources: Iterable[Source]) -> list[mx.array]:
    """Embeddings (N, D) of pictures, float32, encoded one by one without the image cache.

    Raises ImageError, and CheckpointError where numbers overflow.
    """
    found = []
    with explaining():
        for source in sources:
            pixels = engine.pixels(source)
            embeddings = engine.model.encode(mx.array(pixels[None]))[0]
            if not mx.isfinite(embeddings).all().item():
                embeddings = encode_again(engine, [pixels])[0]
            found.append(embeddings.astype(mx.float32))
            mx.eval(found[-1])
        residency.check_device(engine.model.backend)
        mx.clear_cache()
    return found


def encode_again(engine: Engine, pictures: Sequence[Pixels]) -> list[mx.array]:
    """Embeddings (N, D) of pictures that overflowed float16, computed in float32 and cast, with a FastVLMWarning.

    Raises CheckpointError where that does not help.
    """
    model = engine.model
    if model.dtype != mx.float16:
        raise CheckpointError(OVERFLOW)
    wide: FastVLM = tower_in(mx.float32, model, engine.config)
    found = []
    for pixels in pictures:
        embeddings = wide.encode(mx.array(pixels[None]))[0].astype(model.dtype)
        if not mx.isfinite(embeddings).all().item():
            raise CheckpointError(OVERFLOW)
        found.append(embeddings)
    warn(AGAIN)
    return found


@contextmanager
def forgetting(images: ImageCache, digests: Sequence[bytes]) -> Iterator[None]:
    """A context manager for an answer about pictures: none of them stays in the cache where MLX fails in the block."""
    try:
        yield
    except BaseException as error:
        if failures.spoils(error):
            images.drop(digests)
            residency.recover()
        raise
