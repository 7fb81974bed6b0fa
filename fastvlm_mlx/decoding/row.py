"""One of several answers that are under way together: from a request to its place in the steps of all, and to its end.

A row begins piece by piece, so that the others go on in between: each of its pictures, and each chunk of its prompt, by
itself.
"""

import time
from collections.abc import Callable, Iterator, Sequence

import mlx.core as mx

from ..network.kv_cache import KVCache
from .answer import Chunk
from .draft import Draft
from .engine import Engine
from .image_cache import digest, salted
from .pictures import Encoding
from .prefix import Position, positions
from .prefix_pool import Entry, PrefixPool
from .request import Options, Request
from .sampling import sampler_of

Emit = Callable[[Chunk | Exception], None]


class Row:
    """A question and what has been computed for it. `emit` is given each chunk, the last with the answer, or what went
    wrong.
    """

    def __init__(self, engine: Engine, request: Request, options: Options, emit: Emit, *, salt: bytes = b""):
        self.request, self.options, self.emit, self.salt = request, options, emit, salt
        self.cancelled = False
        self.sampler = sampler_of(engine, request, options)
        self.draft = Draft(engine, request, options, self.sampler)
        self.digests = [salted(key, salt) for key in request.digests or [digest(pixels) for pixels in request.pixels]]
        self.known: list[Position] = positions(request.pieces, self.digests)
        self.entry: Entry | None = None

    @property
    def cache(self) -> Sequence[KVCache]:
        """The caches of all layers, this row's own."""
        assert self.entry is not None
        return self.entry.prefix.layers

    def begin(
        self, engine: Engine, pool: PrefixPool, chunk: Callable[[], int], fixed: int | None = None
    ) -> Iterator[mx.array | None]:
        """Encode a picture, or prefill as many positions as `chunk` says, each time this is advanced; evaluated.

        Gives None, and with the last chunk the first token (1,). With `fixed`, chunks begin at multiples of that many
        positions, whatever is there already.
        """
        model = engine.model
        self.entry = pool.take(model, self.known, self.salt, fixed or 1)
        prefix = self.entry.prefix
        kept = self.draft.kept = len(prefix.held)
        pictures = Encoding(engine, self.request, self.digests, kept)
        started = time.perf_counter()
        for _ in pictures.begin():
            pictures.wait()
            mx.clear_cache()  # what the tower took is larger than what decoding needs
            self.draft.vision_seconds += time.perf_counter() - started
            yield None
            started = time.perf_counter()
        rest = model.embed(self.request.pieces, pictures.images, kept)
        while rest.shape[1] > (width := fixed or chunk()):
            model.text(rest[:, :width], prefix.layers)
            mx.eval([layer.state for layer in prefix.layers])
            mx.clear_cache()
            rest = rest[:, width:]
            prefix.commit(self.known)
            self.draft.prefill_seconds += time.perf_counter() - started
            yield None
            started = time.perf_counter()
        first = self.sampler(model.prefill(rest, prefix.layers))
        self.draft.take_thumbnails()
        mx.eval(first, *self.sampler.kept)
        mx.clear_cache()
        prefix.commit(self.known)
        self.draft.prefill_seconds += time.perf_counter() - started
        yield first

    def take(self, token: int) -> None:
        """Take down the token that was drawn, and hand out the text it completes."""
        self.sampler.accept(token)
        chunk = self.draft.add(token)
        self.known.append(token)
        if chunk is not None:
            self.emit(chunk)
