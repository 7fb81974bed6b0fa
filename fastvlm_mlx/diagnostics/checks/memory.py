"""The memory that answers take: with several pictures, after many questions, and compared with the estimate."""

import gc
from collections.abc import Iterator

import mlx.core as mx
import numpy as np

from ...decoding.answer import Stats, finish
from ...decoding.engine import Engine
from ...decoding.generate import stream
from ...decoding.request import Options
from ...network import memory
from ..machine import in_bytes
from .finding import Finding, at_most, holds
from .setting import Setting

PICTURES = 4
IMAGE_SIDE = 256  # pixels
QUESTIONS = 50
WARM_UP_QUESTIONS = 5  # questions after which nothing more is allocated once and for all
MIN_PEAK_RATIO, MAX_PEAK_RATIO = 0.9, 1.25  # range of estimate / measured peak on CPUs (`memory`)


def check(setting: Setting) -> Iterator[Finding]:
    """Findings about several pictures, many questions, and the estimate."""
    setting.say(f"{PICTURES} pictures")
    yield pictures_together(
        setting.subject.engine(setting.model if not setting.quick else "small").at(IMAGE_SIDE), setting
    )
    setting.say(f"{QUESTIONS} questions")
    engine = setting.local.engine(dtype=None)
    with setting.local.here():
        yield left_behind(engine)
        yield estimated(engine, setting)


def ask(engine: Engine, pictures: int, seed: int = 0) -> Stats:
    """The statistics of an answer about `pictures` new pictures."""
    rng = np.random.default_rng(seed)
    side = engine.config.image.size
    shown = [rng.integers(0, 256, (side, side, 3), dtype=np.uint8) for _ in range(pictures)]
    engine.images.clear()
    return finish(stream(engine, engine.prepare(shown, "What is this?"), Options(2, stop_tokens=()))).stats


def peak(engine: Engine, pictures: int) -> int:
    """The peak memory of an answer about `pictures` new pictures, in bytes above what was in use before."""
    engine.images.clear()
    gc.collect()
    mx.clear_cache()
    held = mx.get_active_memory()
    return ask(engine, pictures).peak_memory_bytes - held


def pictures_together(engine: Engine, setting: Setting) -> Finding:
    """The peak of several pictures in one question, against the highest peak of one alone.

    MLX runs ahead of what is waited for, by amounts that vary from run to run.
    """
    with setting.subject.here():
        ask(engine, 1)
        one = max(peak(engine, 1) for _ in range(PICTURES))
        several = peak(engine, PICTURES)
    of_one, of_several = (
        memory.estimate(
            engine.config, backend="metal", dtype="float32", context=count * engine.image_tokens + 64, images=count
        )
        for count in (1, PICTURES)
    )
    embeddings = (PICTURES - 1) * engine.image_tokens * engine.config.text.hidden_size * 4
    more = embeddings + max(0, of_several.total - of_one.total)
    limit = MAX_PEAK_RATIO * (one + more)
    expects = (
        f"at most {in_bytes(round(limit))}: one picture's highest peak, the others' embeddings, a longer prompt, and a "
        "quarter"
    )
    shown = f"{in_bytes(several)}, one alone {in_bytes(one)}"
    return at_most(
        f"{PICTURES} pictures at {IMAGE_SIDE} together",
        several,
        limit,
        found=shown,
        expected=expects,
        unit="bytes",
        one=float(one),
    )


def left_behind(engine: Engine) -> Finding:
    """The memory in use after many questions, against that after a few; the limit is one answer's cache."""
    picture = np.full((96, 128, 3), (40, 160, 60), np.uint8)
    request = engine.prepare(picture, "What is this?")
    held = []
    for number in range(1, QUESTIONS + 1):
        stats = finish(stream(engine, request, Options(2, stop_tokens=()))).stats
        if number in (WARM_UP_QUESTIONS, QUESTIONS):
            gc.collect()
            mx.clear_cache()
            held.append(mx.get_active_memory())
    context = stats.prompt_tokens + stats.completion_tokens
    limit = memory.estimate(engine.config, context=context, dtype="float16").cache
    growth = max(0, held[1] - held[0])
    expects = f"at most {in_bytes(limit)}, the keys and values of a single answer in 16 bits"
    shown = f"{in_bytes(growth)} more than after {WARM_UP_QUESTIONS}, {in_bytes(held[1])} in all"
    return at_most(f"left behind by {QUESTIONS} questions", growth, limit, found=shown, expected=expects, unit="bytes")


def estimated(engine: Engine, setting: Setting) -> Finding:
    """The memory that `info` estimates, as a share of the peak that MLX measured."""
    dtype = str(engine.model.dtype).removeprefix("mlx.core.")
    gc.collect()
    mx.clear_cache()
    engine.images.clear()
    own = sum(array.nbytes for array in engine.model.flat_parameters().values())
    others = mx.get_active_memory() - own
    stats = ask(engine, 1)
    context = stats.prompt_tokens + stats.completion_tokens
    expected = memory.estimate(engine.config, backend=setting.local.backend, dtype=dtype, context=context).total  # type: ignore[arg-type]
    measured = stats.peak_memory_bytes - others
    share = expected / measured
    shown = f"{in_bytes(expected)}, {share:.2f} of the {in_bytes(measured)} measured"
    title = f"estimate of {engine.name} at {engine.config.image.size}"
    if setting.on_gpu:
        return Finding(title, "measured", shown, "no limit is known for a GPU yet", share, None, "of the peak")
    finding = holds(
        title,
        MIN_PEAK_RATIO <= share <= MAX_PEAK_RATIO,
        shown,
        f"{MIN_PEAK_RATIO} to {MAX_PEAK_RATIO}, what was seen on CPUs",
    )
    return Finding(title, finding.status, shown, finding.expected, share, MAX_PEAK_RATIO, "of the peak")
