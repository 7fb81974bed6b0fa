"""From a prepared request to an answer: one prefill, then one token at a time, each computed while the last is read."""

import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import repeat

import mlx.core as mx

from ..backend.ops import Backend
from ..errors import CheckpointError, OptionError, PromptError, shown
from ..inputs.image import Pixels
from ..inputs.prompt import ImageSlot, Piece
from ..inputs.tokenizer import Tokenizer
from ..network.kv_cache import KVCache
from ..network.model import PREFILL_CHUNK, FastVLM
from . import notebook
from .image_cache import ImageCache, digest
from .prefix import Position, Prefix, positions
from .sampling import choose

MAX_TEMPERATURE = 100.0
LEAST_TEMPERATURE, LEAST_TOP_P = 1e-6, 1e-30  # below, they would be zero, or logits infinite, in float32


@dataclass(frozen=True)
class Options:
    """How an answer is drawn. Temperature 0 is greedy; with a seed, the same draw every time."""

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not _whole(self.max_tokens) or self.max_tokens < 1:
            raise OptionError(f"max_tokens is {shown(self.max_tokens)}, expected a whole number of at least 1.")
        if not _number(self.temperature) or not (self.temperature == 0 or LEAST_TEMPERATURE <= self.temperature <= MAX_TEMPERATURE):
            raise OptionError(
                f"temperature is {shown(self.temperature)}, expected 0 (greedy) or a number from {LEAST_TEMPERATURE:g} "
                f"to {MAX_TEMPERATURE:g}."
            )
        if not _number(self.top_p) or not LEAST_TOP_P <= self.top_p <= 1:
            raise OptionError(f"top_p is {shown(self.top_p)}, expected a number above 0 and up to 1 (everything).")
        if self.seed is not None and (not _whole(self.seed) or not 0 <= self.seed < 1 << 64):
            raise OptionError(f"seed is {shown(self.seed)}, expected a whole number from 0 to 2**64 - 1.")

    def keys(self) -> Iterator[mx.array | None]:
        """A random key for every token, or None where the likeliest is taken."""
        if self.temperature == 0:
            yield from repeat(None)
        key = mx.random.key(self.seed if self.seed is not None else time.time_ns())
        while True:
            key, drawn = mx.random.split(key)
            yield drawn


@dataclass(frozen=True)
class Request:
    """A question made ready: pixels of each image, the prompt in pieces, how long that took, and digests already known."""

    pixels: list[Pixels]
    pieces: list[Piece]
    preprocess_seconds: float
    digests: Sequence[bytes] | None = None

    @property
    def image_tokens(self) -> int:
        """Positions taken by images."""
        return sum(len(piece) for piece in self.pieces if isinstance(piece, ImageSlot))

    @property
    def prompt_tokens(self) -> int:
        """Positions taken by everything."""
        return sum(map(len, self.pieces))


@dataclass(frozen=True)
class Stats:
    """What an answer took. Seconds are wall time; `ttft_seconds` runs from the question to the first token."""

    images: int
    image_tokens: int
    prompt_tokens: int
    reused_tokens: int
    completion_tokens: int
    preprocess_seconds: float
    vision_seconds: float
    prefill_seconds: float
    ttft_seconds: float
    decode_tokens_per_second: float
    peak_memory_bytes: int

    def describe(self, *, load_seconds: float | None = None) -> str:
        """The figures in two lines for people."""
        load = f"load {load_seconds:.2f} s, " if load_seconds is not None else ""
        return (
            f"{load}preprocess {self.preprocess_seconds * 1e3:.0f} ms, "
            f"vision {self.vision_seconds * 1e3:.0f} ms ({self.image_tokens} tokens), "
            f"prefill {self.prefill_seconds * 1e3:.0f} ms ({self.prompt_tokens} tokens)\n"
            f"first token after {self.ttft_seconds:.2f} s, then {self.decode_tokens_per_second:.1f} tokens/s"
            f" ({self.completion_tokens} tokens), peak memory {self.peak_memory_bytes / 1e9:.2f} GB"
        )


@dataclass(frozen=True)
class Answer:
    """A finished answer; `str(answer)` is its text. `finish_reason` is "stop" or "length".

    `thumbnails` are small JPEGs of the pictures, made in notebooks only, where an answer shows itself.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    stats: Stats
    thumbnails: tuple[bytes, ...] = field(default=(), repr=False, compare=False)

    def __str__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        return notebook.html(self.text, self.thumbnails, self._details)

    def _repr_markdown_(self) -> str:
        return notebook.markdown(self.text, self._details)

    @property
    def _details(self) -> str:
        return f"{self.stats.completion_tokens} tokens, the first after {self.stats.ttft_seconds:.2f} s\n{self.stats.describe()}"

    def to_json(self, **extra: object) -> str:
        """One JSON object of the text, `extra` and every figure."""
        figures = asdict(self.stats)
        del figures["reused_tokens"]  # 0 for a question asked alone
        return json.dumps({"text": self.text, **extra, "finish_reason": self.finish_reason, **figures}, ensure_ascii=False)


@dataclass(frozen=True)
class Chunk:
    """The next piece of a streamed answer: whole characters. The last one, perhaps empty, carries the finished answer."""

    text: str
    answer: Answer | None = None


def finish(chunks: Iterator[Chunk]) -> Answer:
    """Read a stream to its end and return the answer its last chunk carries."""
    *_, last = chunks
    if last.answer is None:
        raise AssertionError("a stream ends with the answer")
    return last.answer


@dataclass(frozen=True)
class Engine:
    """What answers: a model, its tokenizer, the pictures it has seen, its stop tokens and its context in positions."""

    model: FastVLM
    tokenizer: Tokenizer
    images: ImageCache
    stop: tuple[int, ...]
    context: int


def stream(engine: Engine, request: Request, options: Options, prefix: Prefix | None = None) -> Iterator[Chunk]:
    """Answer a request chunk by chunk, up to `options.max_tokens` tokens or the end of the context.

    What the engine's `images` and `prefix` hold already is not computed again; they are left holding what was. `prefix`
    stays true to its caches also where the stream is closed early, or left standing while another one goes on.
    """
    prefix = prefix or Prefix(engine.model.text.make_cache())
    digests = request.digests or [digest(pixels) for pixels in request.pixels]
    known = positions(request.pieces, digests)
    mx.reset_peak_memory()
    with wired(engine.model.backend), prefix.answering(known) as kept:
        turn = prefix.turn
        for chunk in _stream(engine, request, options, prefix.layers, digests, known, kept):
            yield chunk
            if prefix.turn != turn:
                raise PromptError("Another question was asked in this conversation before the answer was read; ask again.")


def _stream(
    engine: Engine,
    request: Request,
    options: Options,
    cache: Sequence[KVCache],
    digests: Sequence[bytes],
    known: list[Position],
    kept: int,
) -> Iterator[Chunk]:
    """The chunks; appends each token to `known` as it comes. The first `kept` positions are in the cache already."""
    model, images = engine.model, engine.images
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
        if token in engine.stop:
            reason = "stop"
            break
        piece = decoder.add(token)
        text += piece
        if piece:
            yield Chunk(piece)
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
    yield Chunk(rest, Answer(text + rest, tokens, reason, stats, thumbnails))


def wait(sound: Sequence[mx.array], images: ImageCache) -> float:
    """Wait for the pictures' embeddings, and say when they were there; raises CheckpointError where they overflowed."""
    if not all(flag.item() for flag in sound):
        images.clear()
        raise CheckpointError("The image encoder's numbers overflow; load the model with --dtype bfloat16 or float32.")
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


_answering = 0  # answers under way, so that the limit is put back when the last one ends
_limit_before = 0


@contextmanager
def wired(backend: Backend) -> Iterator[None]:
    """On Metal, keep the weights resident while answering, as mlx-lm does; the limit before is put back."""
    global _answering, _limit_before
    if backend != "metal" or not mx.metal.is_available():
        yield
        return
    if _answering == 0:
        _limit_before = mx.set_wired_limit(int(mx.device_info()["max_recommended_working_set_size"]))
    _answering += 1
    try:
        yield
    finally:
        _answering -= 1
        if _answering == 0:
            mx.synchronize()
            mx.set_wired_limit(_limit_before)


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < math.inf
