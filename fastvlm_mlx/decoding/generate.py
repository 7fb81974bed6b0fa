"""From a prepared request to its answer, alone: pictures, one prefill, then token ids and the text they spell."""

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial

import mlx.core as mx

from ..backend.failures import explaining
from ..backend.residency import check_device, wired
from ..network.kv_cache import KVCache
from ..network.model import PREFILL_CHUNK
from .answer import Chunk
from .draft import Draft
from .engine import Engine
from .image_cache import digest
from .pictures import Encoding, forgetting
from .prefix import Position, Prefix, positions
from .request import Options, Request
from .sampling import Sampler, sampler_of
from .token_ids import token_ids


def stream(
    engine: Engine, request: Request, options: Options, prefix: Prefix | None = None, state: int | None = None
) -> Generator[Chunk, None, None]:
    """Answer a request chunk by chunk, up to `options.max_tokens` tokens or the end of the context.

    What the engine's `images` and `prefix` hold already is not computed again; they are left holding what was. `prefix`
    stays true to its caches also where the stream is closed early, or left standing while another one goes on: then it
    raises PromptError when it is read on. `state` is the one that the prefix's claim gave, where the answer has begun
    there already. Where MLX fails, neither the request's pictures nor any position is left, and what it means is raised
    (`failures`).
    """
    model = engine.model
    if prefix is None:
        prefix = Prefix()
    else:  # a conversation, of which this is one answer
        prefix.hold(model.backend)
    digests = request.digests or [digest(pixels) for pixels in request.pixels]
    known = positions(request.pieces, digests)
    mx.reset_peak_memory()
    with (
        explaining(),
        wired(model.backend),
        forgetting(engine.images, digests),
        prefix.answering(model, known, state) as (kept, begun),
    ):
        sampler = sampler_of(engine, request, options)
        draft = Draft(engine, request, options, sampler, kept=kept)
        ids = _ids(engine, request, sampler, prefix.layers, digests, draft)
        yield from _pieces(ids, draft, known, partial(prefix.claim.check, begun))
        check_device(model.backend)
        last = draft.finish()
    yield last


def _ids(
    engine: Engine,
    request: Request,
    sampler: Sampler,
    cache: Sequence[KVCache],
    digests: Sequence[bytes],
    draft: Draft,
) -> Iterator[int]:
    """The answer's token ids; the first `draft.kept` positions of the request are in the cache already."""
    model, kept = engine.model, draft.kept
    pictures = Encoding(engine, request, digests, kept)
    pictures.begin_all()

    def prefill() -> Iterator[int]:
        logits = model.prefill(model.embed(request.pieces, pictures.images, kept), cache)
        return token_ids(model, cache, logits, sampler, draft.limit)

    # A GPU gets the prefill queued behind the pictures; a CPU gains nothing from that, and chunks wait anyway.
    queue = model.backend != "cpu" and request.prompt_tokens - kept <= PREFILL_CHUNK
    if not queue:
        pictures.wait()
        seen = time.perf_counter()
    usable = not queue
    try:
        ids = prefill()
        draft.take_thumbnails()  # while a GPU is at the first token
        if queue:
            usable = not pictures.wait()
            seen = time.perf_counter()
            mx.clear_cache()  # what the tower took is larger than what decoding needs
    finally:
        if not usable:  # what is queued came from elements that had overflowed, or nobody has looked at them
            for layer in cache:
                layer.trim(kept)
    if not usable:
        sampler.begin_again()
        ids = prefill()
    draft.vision_seconds = seen - draft.started if request.pixels else 0.0
    for token in ids:
        if not draft.tokens:
            draft.prefill_seconds = time.perf_counter() - draft.started - draft.vision_seconds
        yield token


def _pieces(ids: Iterator[int], draft: Draft, known: list[Position], check: Callable[[], None]) -> Iterator[Chunk]:
    """The pieces of text that the ids complete, up to the answer's end; appends each token to `known` as it comes.

    `check` raises what ends the answer where another one has begun meanwhile.
    """
    for token in ids:
        chunk = draft.add(token)
        known.append(token)
        if chunk is not None:
            yield chunk
            check()
        if draft.reason is not None:
            return
