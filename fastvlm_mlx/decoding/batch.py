"""Several questions answered together: their prompts one after another, then one token of every answer in each step.

A step reads all weights, for one row or for many, so rows that go on together cost little more than one. What prompts share
at their beginning (the system prompt, a picture asked about more than once) is computed once. Every answer is the one its
question gets when it is asked alone, up to the rounding of sums.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, overload

import mlx.core as mx

from .. import progress
from ..backend.failures import explaining
from ..backend.residency import check_device, wired
from ..errors import DeviceError, FastVLMError
from ..network.kv_cache import BatchCache
from .answer import Answer, Answers, Stats
from .engine import Engine
from .image_cache import digest
from .logprobs import Logprobs
from .notebook import thumbnails
from .pictures import Encoding, forgetting
from .prefix import Prefix, positions
from .request import Options, Request
from .sampling import Sampler, sampler_of
from .text import AnswerText

MAX_BATCH_ROWS = 16  # answers under way at a time; bounds the memory of their caches

Held = list[tuple[mx.array, mx.array]]  # keys and values of each layer


@dataclass
class Row:
    """An answer under way: which question it belongs to, the tokens so far, and what its figures are made of."""

    index: int
    request: Request
    limit: int
    sampler: Sampler
    text: AnswerText
    kept: int
    vision_seconds: float
    prefill_seconds: float
    ttft_seconds: float
    first: mx.array
    held: Held = field(repr=False)
    tokens: list[int] = field(default_factory=list)


def answer_in_order(engine: Engine, requests: Sequence[Request], options: Options) -> Answers[Answer]:
    """The answers to requests in the order of these, with a progress bar where it takes long."""
    with progress.bar("Answering", len(requests)) as track:
        answers = dict(track(answer_all(engine, requests, options)))
    return Answers(answers[index] for index in range(len(requests)))


def answer_or_return(
    engine: Engine, requests: Sequence[Request | FastVLMError], options: Options
) -> Answers[Answer | FastVLMError]:
    """`answer_in_order` for requests that could not all be prepared: an error stands in the place of its answer.

    So does one that a picture or a question raises later, but for those of the device (DeviceError), which are raised.
    """
    found: list[Answer | FastVLMError] = list(requests)  # type: ignore[arg-type]  # each request is replaced
    asked = [(index, request) for index, request in enumerate(requests) if isinstance(request, Request)]
    with progress.bar("Answering", len(asked)) as track:
        for place, answer in track(answer_all(engine, [request for _, request in asked], options, go_on=True)):
            found[asked[place][0]] = answer
    return Answers(found)


@overload
def answer_all(
    engine: Engine, requests: Sequence[Request], options: Options, *, go_on: Literal[False] = ...
) -> Iterator[tuple[int, Answer]]: ...


@overload
def answer_all(
    engine: Engine, requests: Sequence[Request], options: Options, *, go_on: bool
) -> Iterator[tuple[int, Answer | FastVLMError]]: ...


def answer_all(
    engine: Engine, requests: Sequence[Request], options: Options, *, go_on: bool = False
) -> Iterator[tuple[int, Answer | FastVLMError]]:
    """Answer requests MAX_BATCH_ROWS at a time; each answer comes with its request's index, as soon as it is finished.

    To `go_on` is to give an error of this package, but for a DeviceError, in place of the answer instead of raising it. Where
    MLX fails, none of the pictures is left in the cache, and what it means is raised.
    """
    pictures = {id(pixels): pixels for request in requests for pixels in request.pixels}
    known = {key: digest(pixels) for key, pixels in pictures.items()}
    digests = [[known[id(pixels)] for pixels in request.pixels] for request in requests]
    order = sorted(
        range(len(requests)), key=digests.__getitem__
    )  # the same pictures after each other, to share a beginning
    prefix = Prefix()
    started = time.perf_counter()
    backend = engine.model.backend
    with explaining(), wired(backend), forgetting(engine.images, list(known.values())):
        for start in range(0, len(order), MAX_BATCH_ROWS):
            mx.reset_peak_memory()
            rows = []
            for i in order[start : start + MAX_BATCH_ROWS]:
                try:
                    rows.append(_begin(engine, i, requests[i], digests[i], options, prefix, started))
                except FastVLMError as error:
                    if not go_on or isinstance(error, DeviceError):
                        raise
                    yield i, error
            mx.clear_cache()  # what towers and prefills took is larger than what the steps need
            if rows:
                yield from _go_on(engine, rows, options)
                check_device(backend)
        mx.clear_cache()


def _begin(
    engine: Engine,
    index: int,
    request: Request,
    digests: Sequence[bytes],
    options: Options,
    prefix: Prefix,
    started: float,
) -> Row:
    """One question up to its first token, computed as when it is asked alone."""
    begun = time.perf_counter()
    known = positions(request.pieces, digests)
    with prefix.answering(engine.model, known) as (kept, _):
        pictures = Encoding(engine, request, digests, kept)
        pictures.wait()
        seen = time.perf_counter()
        logits = engine.model.prefill(engine.model.embed(request.pieces, pictures.shown, kept), prefix.layers)
        sampler = sampler_of(engine, request, options)
        first = sampler(logits)
        held = [layer.held for layer in prefix.layers]
        mx.eval(first, held)
    ended = time.perf_counter()
    limit = min(options.max_tokens, engine.context - request.prompt_tokens)
    text = AnswerText(engine.tokenizer, options.stop)
    return Row(index, request, limit, sampler, text, kept, seen - begun, ended - seen, ended - started, first, held)


def batch_caches(rows: Sequence[Held]) -> list[BatchCache]:
    """The caches of all layers for rows that go on together, with one padding, from what each row holds in every layer."""
    caches: list[BatchCache] = []
    for layer in zip(*rows, strict=True):
        caches.append(BatchCache(layer, caches[0].padding if caches else None))
    return caches


def _go_on(engine: Engine, rows: list[Row], options: Options) -> Iterator[tuple[int, Answer]]:
    """The rest of all answers, a token each at a time; a row that ends leaves the batch."""
    caches = batch_caches([row.held for row in rows])
    for row in rows:
        row.held.clear()
    tokens = mx.concatenate([row.first for row in rows])
    stop = engine.stop_tokens(options)
    decoding = time.perf_counter()
    while rows:
        following, waits = tokens, any(row.sampler.waits for row in rows)
        if waits:
            _accept(rows, tokens)
        if any(len(row.tokens) + 1 < row.limit and not row.sampler.ended for row in rows):
            following = _choose(engine.model.step(tokens, caches), rows, tokens)
            mx.async_eval(following)  # under way while the tokens before it are read
        if not waits:
            _accept(rows, tokens)
        going = []
        ids: list[int] = tokens.tolist()  # type: ignore[assignment]  # token ids are whole numbers
        for place, (row, token) in enumerate(zip(rows, ids, strict=True)):
            row.tokens.append(token)
            if token not in stop:
                row.text.add(token)
            stopped = token in stop or row.text.ended or row.sampler.ended
            if stopped or len(row.tokens) == row.limit:
                yield row.index, _finished(row, options, stopped, time.perf_counter() - decoding)
            else:
                going.append(place)
        if going and len(going) < len(rows):
            staying = mx.array(going)  # one for all, so that they share a padding again
            following = following[staying]
            for cache in caches:
                cache.keep(staying)
        rows, tokens = [rows[place] for place in going], following


def _accept(rows: Sequence[Row], tokens: mx.array) -> None:
    """Tell every row's sampler the token that was drawn for it."""
    ids: list[int] = tokens.tolist()  # type: ignore[assignment]  # token ids are whole numbers
    for row, token in zip(rows, ids, strict=True):
        row.sampler.accept(token)


def _choose(logits: mx.array, rows: Sequence[Row], tokens: mx.array) -> mx.array:
    """The next token of every row (B,), each drawn by its own sampler from its own logits, as if it were alone.

    For a row that has ended it is the last one again.
    """
    if all(row.sampler.greedy for row in rows):
        return mx.argmax(logits, axis=-1)
    drawn = [tokens[i : i + 1] if row.sampler.ended else row.sampler(logits[i : i + 1]) for i, row in enumerate(rows)]
    return mx.concatenate(drawn)


def _finished(row: Row, options: Options, stopped: bool, decode_seconds: float) -> Answer:
    row.text.finish()
    stats = Stats(
        images=len(row.request.pixels),
        image_tokens=row.request.image_tokens,
        prompt_tokens=row.request.prompt_tokens,
        reused_tokens=row.kept,
        completion_tokens=len(row.tokens),
        preprocess_seconds=row.request.preprocess_seconds,
        vision_seconds=row.vision_seconds if row.request.pixels else 0.0,
        prefill_seconds=row.prefill_seconds,
        ttft_seconds=row.ttft_seconds + row.request.preprocess_seconds,
        decode_tokens_per_second=(len(row.tokens) - 1) / max(decode_seconds, 1e-9),
        peak_memory_bytes=mx.get_peak_memory(),
    )
    logprobs = Logprobs(row.sampler.logprobs) if options.logprobs is not None else None
    reason = "stop" if stopped or row.text.ended else "length"
    return Answer(row.text.text, row.tokens, reason, stats, thumbnails(row.request.pixels), logprobs=logprobs)
