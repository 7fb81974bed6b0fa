"""The time of each stage on this machine: load, preprocess, vision, prefill, first token, decode; and peak memory.

Enters: a loaded `Engine` and pictures. Leaves: medians over rounds after a warm-up, with the lowest and highest value.
All figures come from the `generate.stream` that answers questions, except that nothing ends an answer early and that no
picture is remembered.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from io import BytesIO

import numpy as np

from ..config import Dtype, check_resolution
from ..decoding.adapters import find_adapter
from ..decoding.answer import Stats, finish
from ..decoding.engine import Engine
from ..decoding.generate import stream
from ..decoding.request import Options
from ..errors import OptionError
from ..inputs.image import Source
from ..inputs.prompt import PROMPT
from .machine import Machine, peak_memory, reset_peak_memory

PHOTO_SIZE = (4032, 3024)  # pixels; what a phone's 12-megapixel camera gives
TIMES = ("preprocess_seconds", "vision_seconds", "prefill_seconds", "ttft_seconds", "decode_tokens_per_second")

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Result:
    """The figures of one model at one resolution: medians over `rounds`; `spread` has the lowest and highest of each.

    `load_seconds` is None for random weights, which are not read. `peak_memory_bytes` is the process's peak during the
    rounds, `mlx_peak_memory_bytes` that of MLX's allocator.
    """

    model: str
    bits: int | None
    dtype: str
    resolution: int
    images: int
    image_tokens: int
    prompt_tokens: int
    completion_tokens: int
    load_seconds: float | None
    preprocess_seconds: float
    vision_seconds: float
    prefill_seconds: float
    ttft_seconds: float
    decode_tokens_per_second: float
    peak_memory_bytes: int
    mlx_peak_memory_bytes: int
    rounds: int
    spread: dict[str, tuple[float, float]]


def measure(
    engine: Engine,
    images: Sequence[Source],
    *,
    resolution: int | None = None,
    prompt: str = PROMPT,
    bits: int | None = None,
    max_tokens: int = 32,
    rounds: int = 5,
    warmup: int = 1,
    progress: Progress | None = None,
) -> Result:
    """Answer one question about `images` `rounds` times, after `warmup` times that do not count.

    `engine` has its weights loaded. `resolution` is the side in pixels that pictures are brought to; `bits` is only
    noted in the result. Raises OptionError, ImageError and PromptError.
    """
    if rounds < 1 or warmup < 0:
        raise OptionError(f"`rounds` is {rounds} and `warmup` {warmup}, expected at least 1 and at least 0.")
    engine = engine.at(engine.config.image.size if resolution is None else resolution)
    options = Options(max_tokens, stop_tokens=())  # nothing ends an answer early
    reset_peak_memory()
    taken: list[Stats] = []
    for number in range(warmup + rounds):
        engine.images.clear()  # every round encodes its pictures again
        stats = _answer(engine, images, prompt, options)
        if number >= warmup:
            taken.append(stats)
        if progress:
            stage = "warm-up" if number < warmup else f"round {number - warmup + 1}"
            progress(f"{engine.name} at {engine.config.image.size}: {stage}")
    figures = {name: sorted(float(getattr(stats, name)) for stats in taken) for name in TIMES}
    return Result(
        model=engine.name,
        bits=bits,
        dtype=str(engine.model.dtype).removeprefix("mlx.core."),
        resolution=engine.config.image.size,
        images=len(images),
        image_tokens=taken[0].image_tokens,
        prompt_tokens=taken[0].prompt_tokens,
        completion_tokens=taken[0].completion_tokens,
        load_seconds=None if engine.config.source.layout == "random" else engine.load_seconds,
        **{name: statistics.median(values) for name, values in figures.items()},
        peak_memory_bytes=peak_memory(),
        mlx_peak_memory_bytes=max(stats.peak_memory_bytes for stats in taken),
        rounds=rounds,
        spread={name: (values[0], values[-1]) for name, values in figures.items()},
    )


def measure_all(
    engines: list[Engine],
    pictures: Sequence[Source],
    *,
    resolutions: Sequence[int] = (),
    prompt: str = PROMPT,
    bits: int | None = None,
    dtype: Dtype | None = None,
    max_tokens: int = 32,
    rounds: int = 5,
    warmup: int = 1,
    progress: Progress | None = None,
    adapter: str | None = None,
) -> list[Result]:
    """Load and `measure` models in turn, one in memory at a time, each at all `resolutions`, by default its own.

    The list `engines`, whose weights are not loaded, is emptied. `bits`, `dtype` and `adapter` are those of
    `fastvlm_mlx.load`.
    """
    for resolution in resolutions:
        check_resolution(resolution)
    results = []
    while engines:
        engine = engines.pop(0)
        changes = find_adapter(adapter, engine.config)
        engine.load_weights(bits=bits, dtype=dtype)
        engine.use(changes)
        for size in resolutions or [engine.config.image.size]:
            result = measure(
                engine, pictures, resolution=size, prompt=prompt, bits=bits, max_tokens=max_tokens, rounds=rounds,
                warmup=warmup, progress=progress,
            )  # fmt: skip
            results.append(result)
    return results


def _answer(engine: Engine, images: Sequence[Source], prompt: str, options: Options) -> Stats:
    return finish(stream(engine, engine.prepare(images, prompt), options)).stats


def made_photo(width: int = PHOTO_SIZE[0], height: int = PHOTO_SIZE[1], *, seed: int = 0) -> bytes:
    """A JPEG of soft colours with grain, about as much work to decode as a photograph.

    The same `seed` gives the same picture.
    """
    from PIL import Image

    rng = np.random.default_rng(seed)
    soft = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    grain = rng.integers(-12, 13, (256, 256, 1), dtype=np.int16)
    rows, columns = -(-height // 256), -(-width // 256)
    pixels = np.asarray(soft).astype(np.int16) + np.tile(grain, (rows, columns, 1))[:height, :width]
    file = BytesIO()
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def to_dict(machine: Machine, results: Sequence[Result]) -> dict[str, object]:
    """Everything measured, as a JSON object."""
    return {"machine": asdict(machine), "results": [asdict(result) for result in results]}


COLUMNS = (
    "model", "bits", "size", "tokens", "load", "preprocess", "vision", "prefill", "first token", "decode", "memory",
    "MLX",
)  # fmt: skip


def table(results: Sequence[Result]) -> str:
    """The results as aligned text, one line each; memory is the process's peak and, beside it, MLX's."""
    rows = [COLUMNS, *(_row(result) for result in results)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    return "\n".join(_line(row, widths) for row in rows)


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    figures = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
    return "  ".join([row[0].ljust(widths[0]), *figures])


def _row(result: Result) -> tuple[str, ...]:
    size = f"{result.resolution}" + (f" x{result.images}" if result.images > 1 else "")
    return (
        result.model,
        str(result.bits or result.dtype),
        size,
        f"{result.prompt_tokens}+{result.completion_tokens}",
        "-" if result.load_seconds is None else seconds(result.load_seconds),
        seconds(result.preprocess_seconds),
        seconds(result.vision_seconds),
        seconds(result.prefill_seconds),
        seconds(result.ttft_seconds),
        f"{result.decode_tokens_per_second:.1f}/s",
        f"{result.peak_memory_bytes / 1e9:.2f} GB",
        f"{result.mlx_peak_memory_bytes / 1e9:.2f} GB",
    )


def seconds(value: float) -> str:
    """A duration with three digits: "8.1 ms", "120 ms", "3.42 s"."""
    if value < 0.1:
        return f"{value * 1e3:.1f} ms"
    return f"{value * 1e3:.0f} ms" if value < 1 else f"{value:.2f} s"
