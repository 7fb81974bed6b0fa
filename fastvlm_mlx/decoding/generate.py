"""From a prepared request to an answer: one prefill, then one token at a time, each computed while the last is read."""

import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import mlx.core as mx

from ..backend.ops import Backend
from ..errors import CheckpointError
from ..inputs.pieces import ImageSlot
from ..network.kv_cache import KVCache
from ..network.model import PREFILL_CHUNK, FastVLM
from . import notebook
from .answer import Answer, Chunk, Stats
from .engine import Engine
from .image_cache import ImageCache, digest
from .prefix import Position, Prefix, positions
from .request import Options, Request
from .sampling import choose

OVERFLOW = "The image encoder's numbers overflow; load the model with `dtype='bfloat16'` or `dtype='float32'`."


def stream(
    engine: Engine, request: Request, options: Options, prefix: Prefix | None = None, state: int | None = None
) -> Generator[Chunk, None, None]:
    """Answer a request chunk by chunk, up to `options.max_tokens` tokens or the end of the context.

    What the engine's `images` and `prefix` hold already is not computed again; they are left holding what was. `prefix`
    stays true to its caches also where the stream is closed early, or left standing while another one goes on: then it raises
    PromptError when it is read on. `state` is the one that the prefix's claim gave, where the answer has begun there already.
    """
    prefix = prefix or Prefix()
    digests = request.digests or [digest(pixels) for pixels in request.pixels]
    known = positions(request.pieces, digests)
    mx.reset_peak_memory()
    with wired(engine.model.backend), prefix.answering(engine.model, known, state) as (kept, begun):
        last = yield from _stream(engine, request, options, prefix.layers, digests, known, kept, partial(prefix.claim.check, begun))
    yield last


def _stream(
    engine: Engine,
    request: Request,
    options: Options,
    cache: Sequence[KVCache],
    digests: Sequence[bytes],
    known: list[Position],
    kept: int,
    check: Callable[[], None],
) -> Generator[Chunk, None, Chunk]:
    """The chunks, the last one returned; appends each token to `known` as it comes. The first `kept` positions are in the cache
    already. `check` raises what ends the answer where another one has begun meanwhile.
    """
    model, images = engine.model, engine.images
    stop = engine.stop_tokens(options)
    started = time.perf_counter()
    shown = encode(model, request, digests, images, kept)
    # A value per picture to wait for (mx.eval would wait for the prefill as well), which also tells of an overflow.
    sound = [mx.isfinite(embeddings).all() for embeddings in shown.values()]
    mx.async_eval(list(shown.values()), sound)
    # A GPU gets the prefill queued behind the pictures; a CPU gains nothing from a queue, and chunks wait in between anyway.
    queue = model.backend != "cpu" and request.prompt_tokens - kept <= PREFILL_CHUNK
    if not queue:
        seen = wait(sound, images)
    logits = model.prefill(model.embed(request.pieces, shown, kept), cache)
    ids = _decode(model, cache, logits, options, min(options.max_tokens, engine.context - request.prompt_tokens))
    thumbnails = notebook.thumbnails(request.pixels)  # while a GPU is at the first token

    decoder = engine.tokenizer.decoder()
    tokens: list[int] = []
    text, reason = "", "length"
    if queue:
        seen = wait(sound, images)
        mx.clear_cache()  # what the tower took is larger than what decoding needs
    answered = seen
    for token in ids:
        if not tokens:
            answered = time.perf_counter()
        tokens.append(token)
        known.append(token)
        if token in stop:
            reason = "stop"
            break
        piece = decoder.add(token)
        text += piece
        if piece:
            yield Chunk(piece)
            check()
    ended = time.perf_counter()
    rest = decoder.finish()
    stats = Stats(
        images=len(request.pixels),
        image_tokens=request.image_tokens,
        prompt_tokens=request.prompt_tokens,
        reused_tokens=kept,
        completion_tokens=len(tokens),
        preprocess_seconds=request.preprocess_seconds,
        vision_seconds=seen - started if request.pixels else 0.0,
        prefill_seconds=answered - (seen if request.pixels else started),
        ttft_seconds=answered - started + request.preprocess_seconds,
        decode_tokens_per_second=(len(tokens) - 1) / max(ended - answered, 1e-9),
        peak_memory_bytes=mx.get_peak_memory(),
    )
    return Chunk(rest, Answer(text + rest, tokens, reason, stats, thumbnails))


def wait(sound: Sequence[mx.array], images: ImageCache) -> float:
    """Wait for the pictures' embeddings, and say when they were there; raises CheckpointError where they overflowed."""
    if not all(flag.item() for flag in sound):
        images.clear()
        raise CheckpointError(OVERFLOW)
    return time.perf_counter()


def encode(model: FastVLM, request: Request, digests: Sequence[bytes], images: ImageCache, kept: int) -> dict[int, mx.array]:
    """Embeddings (N, D) of the images that do not lie in the first `kept` positions whole, by index, unevaluated."""
    shown: dict[int, mx.array] = {}
    for piece in request.pieces:
        if isinstance(piece, ImageSlot) and kept < len(piece):
            pixels, key = request.pixels[piece.index], digests[piece.index]
            found = images.get(key)
            if found is None:
                found = model.encode(mx.array(pixels[None]))[0]
                images.put(key, found)
            shown[piece.index] = found
        kept = max(0, kept - len(piece))
    return shown


def _decode(model: FastVLM, cache: Sequence[KVCache], logits: mx.array, options: Options, limit: int) -> Iterator[int]:
    """The token that `logits` give and up to `limit` in all; the first is under way when this returns."""
    keys = options.keys()
    token = choose(logits, options.temperature, options.top_p, next(keys))
    mx.async_eval(token)
    return _tokens(model, cache, token, keys, options, limit)


def _tokens(
    model: FastVLM, cache: Sequence[KVCache], token: mx.array, keys: Iterator[mx.array | None], options: Options, limit: int
) -> Iterator[int]:
    """Token ids, the next one under way before the last is handed out."""
    for count in range(1, limit + 1):
        following = token
        if count < limit:
            following = choose(model.step(token, cache), options.temperature, options.top_p, next(keys))
            mx.async_eval(following)
        yield int(token.item())  # type: ignore[arg-type]  # token ids are whole numbers
        token = following


class _Wired:
    """The limit of memory that stays resident on Metal, raised while anything is answering, in whichever thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._answering = 0
        self._before = 0

    def begin(self) -> None:
        """One more answer is under way."""
        with self._lock:
            if self._answering == 0:
                self._before = mx.set_wired_limit(int(mx.device_info()["max_recommended_working_set_size"]))
            self._answering += 1

    def end(self) -> None:
        """One answer less; the limit from before is put back with the last one."""
        with self._lock:
            self._answering -= 1
            if self._answering == 0:
                try:
                    mx.synchronize()
                finally:
                    mx.set_wired_limit(self._before)


_WIRED = _Wired()


@contextmanager
def wired(backend: Backend) -> Iterator[None]:
    """On Metal, keep the weights resident while answering, as mlx-lm does; the limit before is put back."""
    if backend != "metal" or not mx.metal.is_available():
        yield
        return
    _WIRED.begin()
    try:
        yield
    finally:
        _WIRED.end()
