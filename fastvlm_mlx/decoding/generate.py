"""From a prepared request to an answer: one prefill, then one token at a time, each computed while the last is read."""

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial

import mlx.core as mx

from ..backend.failures import explaining
from ..backend.residency import check_device, wired
from ..network.kv_cache import KVCache
from ..network.model import PREFILL_CHUNK, FastVLM
from . import notebook
from .answer import Answer, Chunk, Stats
from .engine import Engine
from .image_cache import digest
from .logprobs import Logprobs
from .pictures import Encoding, forgetting
from .prefix import Position, Prefix, positions
from .request import Options, Request
from .sampling import Sampler, sampler_of
from .text import AnswerText


def stream(
    engine: Engine, request: Request, options: Options, prefix: Prefix | None = None, state: int | None = None
) -> Generator[Chunk, None, None]:
    """Answer a request chunk by chunk, up to `options.max_tokens` tokens or the end of the context.

    What the engine's `images` and `prefix` hold already is not computed again; they are left holding what was. `prefix`
    stays true to its caches also where the stream is closed early, or left standing while another one goes on: then it raises
    PromptError when it is read on. `state` is the one that the prefix's claim gave, where the answer has begun there already.
    Where MLX fails, neither the request's pictures nor any position is left, and what it means is raised (`failures`).
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
        last = yield from _stream(
            engine, request, options, prefix.layers, digests, known, kept, partial(prefix.claim.check, begun)
        )
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
    model = engine.model
    stop = engine.stop_tokens(options)
    limit = min(options.max_tokens, engine.context - request.prompt_tokens)
    started = time.perf_counter()
    pictures = Encoding(engine, request, digests, kept)

    def prefill() -> tuple[Sampler, Iterator[int]]:
        sampler = sampler_of(engine, request, options)
        logits = model.prefill(model.embed(request.pieces, pictures.shown, kept), cache)
        return sampler, _decode(model, cache, logits, sampler, limit)

    # A GPU gets the prefill queued behind the pictures; a CPU gains nothing from a queue, and chunks wait in between anyway.
    queue = model.backend != "cpu" and request.prompt_tokens - kept <= PREFILL_CHUNK
    if not queue:
        pictures.wait()
        seen = time.perf_counter()
    usable = not queue
    try:
        sampler, ids = prefill()
        thumbnails = notebook.thumbnails(request.pixels)  # while a GPU is at the first token
        if queue:
            usable = not pictures.wait()
            seen = time.perf_counter()
            mx.clear_cache()  # what the tower took is larger than what decoding needs
    finally:
        if not usable:  # what is queued came from elements that had overflowed, or nobody has looked at them
            for layer in cache:
                layer.trim(kept)
    if not usable:
        sampler, ids = prefill()

    text = AnswerText(engine.tokenizer, options.stop)
    tokens: list[int] = []
    reason, told = "length", 0  # of how many tokens a chunk has told the log-probabilities
    answered = seen
    for token in ids:
        if not tokens:
            answered = time.perf_counter()
        tokens.append(token)
        known.append(token)
        piece = text.add(token) if token not in stop else ""
        if piece:
            yield Chunk(piece, logprobs=Logprobs(sampler.logprobs[told:]))
            told = len(sampler.logprobs)
            check()
        if token in stop or text.ended or sampler.ended:
            reason = "stop"
            break
    ended = time.perf_counter()
    check_device(model.backend)
    rest = text.finish()
    if text.ended:
        reason = "stop"
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
    logprobs = Logprobs(sampler.logprobs) if options.logprobs is not None else None
    answer = Answer(text.text, tokens, reason, stats, thumbnails, logprobs=logprobs)
    return Chunk(rest, answer, Logprobs(sampler.logprobs[told:]))


def _decode(model: FastVLM, cache: Sequence[KVCache], logits: mx.array, sampler: Sampler, limit: int) -> Iterator[int]:
    """The token that `logits` give and up to `limit` in all; the first is under way when this returns."""
    token = sampler(logits)
    mx.async_eval(token)
    return _tokens(model, cache, token, sampler, limit)


def _tokens(model: FastVLM, cache: Sequence[KVCache], token: mx.array, sampler: Sampler, limit: int) -> Iterator[int]:
    """Token ids, the next one under way before the last is handed out: before it is read, unless the sampler waits."""
    for count in range(1, limit + 1):
        following = token
        if sampler.waits:
            sampler.accept(int(token.item()))  # type: ignore[arg-type]  # token ids are whole numbers
        if count < limit and not sampler.ended:
            following = sampler(model.step(token, cache))
            mx.async_eval(following)
        drawn = int(token.item())  # type: ignore[arg-type]
        if not sampler.waits:
            sampler.accept(drawn)
        yield drawn
        token = following
