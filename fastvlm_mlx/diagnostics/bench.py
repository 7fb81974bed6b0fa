"""What each stage takes on this machine: load, preprocess, vision, prefill, first token, decode, peak memory.

Enters: a loaded `VLM` and pictures. Leaves: medians over rounds that follow a warm-up, with the spread between them. All
figures come from the same `VLM.answer` that answers questions, except that nothing ends an answer early or is remembered.
"""

import platform
import resource
import statistics
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from io import BytesIO
from pathlib import Path

import mlx.core as mx
import numpy as np

from ..backend import blas, cpu
from ..backend import ops as backend
from ..backend.cpu import cores
from ..decoding.generate import Options, Stats, finish
from ..errors import OptionError
from ..inputs.image import Source
from ..version import __version__
from ..vlm import PROMPT, RESOLUTIONS, VLM

LIBRARIES = ("mlx", "numpy", "pillow", "tokenizers")
PHOTO = (4032, 3024)  # pixels; what a phone's 12-megapixel camera gives
TIMES = ("preprocess_seconds", "vision_seconds", "prefill_seconds", "ttft_seconds", "decode_tokens_per_second")

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Result:
    """One model at one resolution. Times are medians over `rounds`; `spread` has the lowest and highest of each.

    `load_seconds` is None for random weights, which are made and not read. `peak_memory_bytes` is the most the process held
    during the rounds, `mlx_peak_memory_bytes` the most MLX's allocator did.
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


@dataclass(frozen=True)
class Machine:
    """Where figures were taken: a figure without these says little."""

    date: str
    system: str
    cpu: str
    cores: int
    memory_bytes: int
    backend: str
    device: str
    blas: str
    python: str
    libraries: dict[str, str]

    def describe(self) -> str:
        """Two lines for people."""
        libraries = ", ".join(f"{name} {number}" for name, number in self.libraries.items())
        return (
            f"{self.cpu}, {self.cores} cores, {self.memory_bytes / 2**30:.0f} GiB, {self.system}; "
            f"{self.backend} ({self.device}), BLAS: {self.blas}\n{libraries}, Python {self.python}; {self.date}"
        )


def measure(
    vlm: VLM,
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
    """Answer the same question about `images` `rounds` times, after `warmup` times that do not count.

    `vlm` has its weights. `resolution` is the side in pixels that pictures are brought to; `bits` only says how the weights
    were quantised. Raises OptionError, ImageError and PromptError.
    """
    if rounds < 1 or warmup < 0:
        raise OptionError(f"rounds is {rounds} and warmup {warmup}, expected at least 1 and at least 0.")
    config = vlm.config
    size = config.image.size if resolution is None else resolution
    if size not in RESOLUTIONS:
        raise OptionError(f"resolution is {size}, expected a multiple of 64 from {RESOLUTIONS[0]} to {RESOLUTIONS[-1]} pixels.")
    options = Options(max_tokens)
    reset_peak_memory()
    taken: list[Stats] = []
    try:
        vlm.config = replace(config, image=replace(config.image, size=size), eos_token_ids=())  # nothing ends an answer early
        for number in range(warmup + rounds):
            vlm.images.clear()  # every round looks at its pictures anew
            stats = _answer(vlm, images, prompt, options)
            if number >= warmup:
                taken.append(stats)
            if progress:
                progress(f"{vlm.name} at {size}: {'warm-up' if number < warmup else f'round {number - warmup + 1}'}")
    finally:
        vlm.config = config
        vlm.images.clear()
    figures = {name: sorted(float(getattr(stats, name)) for stats in taken) for name in TIMES}
    return Result(
        model=vlm.name,
        bits=bits,
        dtype=str(vlm.model.dtype).removeprefix("mlx.core."),
        resolution=size,
        images=len(images),
        image_tokens=taken[0].image_tokens,
        prompt_tokens=taken[0].prompt_tokens,
        completion_tokens=taken[0].completion_tokens,
        load_seconds=None if config.source.layout == "random" else vlm.load_seconds,
        **{name: statistics.median(values) for name, values in figures.items()},
        peak_memory_bytes=peak_memory(),
        mlx_peak_memory_bytes=max(stats.peak_memory_bytes for stats in taken),
        rounds=rounds,
        spread={name: (values[0], values[-1]) for name, values in figures.items()},
    )


def _answer(vlm: VLM, images: Sequence[Source], prompt: str, options: Options) -> Stats:
    return finish(vlm.answer(vlm.prepare(images, prompt), options)).stats


def made_photo(width: int = PHOTO[0], height: int = PHOTO[1], *, seed: int = 0) -> bytes:
    """A JPEG of soft colours and some grain, the same for the same seed: about as much work to decode as a photograph."""
    from PIL import Image

    rng = np.random.default_rng(seed)
    soft = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    grain = rng.integers(-12, 13, (256, 256, 1), dtype=np.int16)
    rows, columns = -(-height // 256), -(-width // 256)
    pixels = np.asarray(soft).astype(np.int16) + np.tile(grain, (rows, columns, 1))[:height, :width]
    file = BytesIO()
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def machine() -> Machine:
    """This machine and what computes on it."""
    device = mx.device_info()
    return Machine(
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        system=f"{platform.system()} {platform.machine()}",
        cpu=_cpu_name(),
        cores=cores.count(),
        memory_bytes=cpu.memory_bytes(),
        backend=backend.current(),
        device=str(device.get("device_name", device.get("architecture", "unknown"))),
        blas=_blas_name(),
        python=platform.python_version(),
        libraries={"fastvlm-mlx": __version__, **{name: version(name) for name in LIBRARIES}},
    )


def _cpu_name() -> str:
    """The processor's name as the system gives it, but for the marks of its maker."""
    if sys.platform == "darwin":
        import subprocess

        command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2] for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return " ".join(name.replace("(R)", "").replace("(TM)", "").split())


def _blas_name() -> str:
    """`blas.status()`, with version and threads where it is OpenBLAS."""
    status = blas.status()
    if status != "OpenBLAS":
        return status
    import ctypes

    library = ctypes.CDLL(None)  # the symbols of every library already in the process
    try:
        describe, threads = library.openblas_get_config, library.openblas_get_num_threads
    except AttributeError:
        return status
    describe.restype = ctypes.c_char_p
    name = (describe() or b"OpenBLAS").decode(errors="replace").split()
    return f"{' '.join(name[:2])}, {threads()} threads"


def reset_peak_memory() -> None:
    """Start counting the process's peak memory anew, where the system can (Linux); elsewhere it only ever grows."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_memory() -> int:
    """The most memory the process has held, in bytes: since `reset_peak_memory` on Linux, since its start elsewhere."""
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def to_dict(machine: Machine, results: Sequence[Result]) -> dict[str, object]:
    """Everything measured, for JSON."""
    return {"machine": asdict(machine), "results": [asdict(result) for result in results]}


COLUMNS = (
    "model", "bits", "size", "tokens", "load", "preprocess", "vision", "prefill", "first token", "decode", "memory", "MLX",
)  # fmt: skip


def table(results: Sequence[Result]) -> str:
    """One line per result, for people; memory is the process's peak and, beside it, MLX's own."""
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
    """A duration with three figures: "8.1 ms", "120 ms", "3.42 s"."""
    if value < 0.1:
        return f"{value * 1e3:.1f} ms"
    return f"{value * 1e3:.0f} ms" if value < 1 else f"{value:.2f} s"
