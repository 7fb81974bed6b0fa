"""How large an encoder's activations become on pictures, and the powers of two that keep them inside float16.

float16 ends at 65504. In FastViTHD the residual stream of a stage grows from block to block and leaves it first.
Whatever reads the stream is linear (a filter or a norm), so the stream can be stored divided by a power of two: what
writes to it is divided, what reads it is multiplied, and both are exact. Everything else lies between two nonlinear
functions and has to fit as it is.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..config import ATTENTION_STAGES, HEAD_DIM, STRIDE, VisionConfig
from ..errors import CheckpointError
from ..inputs.image import Pixels
from ..network.vision import Depthwise, DepthwiseGroups
from ..quantize.layers import put_layer
from .encoder import Encoder

FLOAT16_MAX = 65504.0
STREAM_HEADROOM = (
    4  # times the largest value measured: pictures nobody has measured may be larger, and dividing is free
)
HEADROOM = 2  # where nothing can be divided
LARGEST_FACTOR = 256.0  # that a norm's input is multiplied by
WRITERS = (".fc2", ".proj", ".position", ".token_mixer")  # layers that write to the residual stream

Hook = Callable[[str, mx.array], mx.array]  # a layer's path and what goes into it, or comes out -> the same, or another


@dataclass
class Ranges:
    """What was measured, by a layer's path: largest magnitudes of what goes `into` it and comes `out`.

    `squares` are the largest sums over channels of the squares that go into a norm, `sums` the largest sums over the
    picture of what is averaged, `scores` the largest scores of an attention. `pictures` is how many were measured.
    """

    into: dict[str, float] = field(default_factory=dict)
    out: dict[str, float] = field(default_factory=dict)
    squares: dict[str, float] = field(default_factory=dict)
    sums: dict[str, float] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)
    pictures: int = 0

    def streams(self, config: VisionConfig) -> list[float]:
        """The largest magnitude of each stage's residual stream."""
        return [max(self.into[path] for path in readers(config, stage)) for stage in range(len(config.depths))]

    @property
    def largest(self) -> tuple[str, float]:
        """The layer whose results are largest, and their magnitude."""
        return max(self.out.items(), key=lambda found: found[1])


@dataclass(frozen=True)
class Scales:
    """Powers of two: `streams` divide the residual stream of each stage, `norms` (by path) and `mean` multiply what is
    squared and what is averaged."""

    streams: tuple[float, ...]
    norms: dict[str, float]
    mean: float = 1.0


def readers(config: VisionConfig, stage: int) -> list[str]:
    """The paths of the layers that read a stage's residual stream."""
    home = f"vision.stages.{stage}.blocks"
    depth = config.depths[stage]
    mixers = [f"{home}.{i}.{'norm' if stage in ATTENTION_STAGES else 'token_mixer'}" for i in range(depth)]
    if stage not in ATTENTION_STAGES:
        mixers = mixers[1:]  # the first one writes it
    following = (
        f"vision.stages.{stage + 1}.downsample.groups" if stage + 1 < len(config.depths) else "vision.conv_exp.groups"
    )
    return [*mixers, *(f"{home}.{i}.convffn.conv" for i in range(depth)), following]


def unscaled(config: VisionConfig) -> Scales:
    """Scales of one: for float32, which none of this concerns."""
    return Scales((1.0,) * len(config.depths), {})


def measure(
    encoder: Encoder,
    config: VisionConfig,
    pictures: Sequence[Pixels],
    progress: Callable[[int, int], None] | None = None,
) -> Ranges:
    """Run the encoder over prepared pictures (S, S, 3), uint8, and note how large its activations become."""
    ranges = Ranges()

    def into(path: str, x: mx.array) -> mx.array:
        _raise(ranges.into, path, x)
        if path.endswith(".norm"):
            _raise(ranges.squares, path, (x * x).sum(axis=-1))
        if path.endswith("conv_exp.reduce"):
            _raise(ranges.sums, path, x * positions)
        return x

    def out(path: str, y: mx.array) -> mx.array:
        _raise(ranges.out, path, y)
        if path.endswith(".qkv"):
            _raise(ranges.scores, path, _scores(y))
        return y

    with hooked(encoder, into, out):
        for done, pixels in enumerate(pictures, start=1):
            positions = math.prod(-(-side // STRIDE) for side in pixels.shape[:2])
            mx.eval(encoder.embeddings(mx.array(pixels)[None]))
            ranges.pictures += 1
            if progress:
                progress(done, len(pictures))
    return ranges


def choose(ranges: Ranges, config: VisionConfig, *, with_projector: bool) -> Scales:
    """The scales that bring everything measured inside float16 with room to spare; raises CheckpointError where none
    can."""
    streams = tuple(divisor(largest * STREAM_HEADROOM) for largest in ranges.streams(config))
    for path, largest in {**ranges.out, **{f"{path} scores": each for path, each in ranges.scores.items()}}.items():
        if path.startswith("projector") and not with_projector:
            continue
        if path.startswith("vision.stages.") and path.endswith(WRITERS):
            largest /= streams[int(path.split(".")[2])]
        if largest * HEADROOM > FLOAT16_MAX or not math.isfinite(largest):
            raise CheckpointError(
                f"`precision='float16'` cannot hold this model: {path} reaches {largest:,.0f} on the pictures it was "
                f"measured with, float16 ends at {FLOAT16_MAX:,.0f}, and no scale can be absorbed there; write "
                "`precision='float32'`."
            )
    norms = {
        path: min(LARGEST_FACTOR, _below(FLOAT16_MAX / STREAM_HEADROOM, squares))
        for path, squares in ranges.squares.items()
    }
    mean = min(1.0, _below((FLOAT16_MAX / STREAM_HEADROOM) ** 2, max(ranges.sums.values(), default=1.0) ** 2))
    return Scales(streams, norms, mean)


@contextmanager
def hooked(encoder: Encoder, into: Hook, out: Hook) -> Iterator[None]:
    """Within the block, each layer of the encoder gets what `into` makes of its input, and gives what `out` makes of
    its output."""
    layers = {path: layer for path, layer in encoder.named_modules() if _is_layer(path, layer)}
    for path, layer in layers.items():
        put_layer(encoder, path, _Hooked(path, layer, into, out))
    try:
        yield
    finally:
        for path in layers:
            put_layer(encoder, path, layers[path])


class _Hooked(nn.Module):
    """A layer between two functions."""

    def __init__(self, path: str, layer: nn.Module, into: Hook, out: Hook):
        super().__init__()
        self.layer = layer
        self._path, self._into, self._out = path, into, out

    def __call__(self, x: mx.array) -> mx.array:
        return self._out(self._path, self.layer(self._into(self._path, x)))


def _is_layer(path: str, layer: Any) -> bool:
    """Whether a module computes with weights of its own and is not part of another that does."""
    kinds = (nn.Linear, nn.Conv2d, nn.LayerNorm, Depthwise, DepthwiseGroups)
    return isinstance(layer, kinds) and ".groups.filters." not in path


def _raise(found: dict[str, float], path: str, x: mx.array) -> None:
    largest = float(mx.abs(x).max().item())  # type: ignore[arg-type]  # of one element
    found[path] = largest if math.isnan(largest) else max(found.get(path, 0.0), largest)


def _scores(qkv: mx.array) -> mx.array:
    """The largest scores of an attention, (heads,), of the stacked projections (B, H, W, 3C); head by head, to spare
    memory."""
    rows = qkv.reshape(-1, 3, qkv.shape[-1] // 3 // HEAD_DIM, HEAD_DIM)
    found = []
    for head in range(rows.shape[2]):
        found.append(mx.abs(rows[:, 0, head] @ rows[:, 1, head].T).max() * HEAD_DIM**-0.5)
        mx.eval(found[-1])
    return mx.stack(found)


def divisor(largest: float) -> float:
    """The smallest power of two, at least 1, that brings a magnitude inside float16."""
    return 2.0 ** max(0, math.ceil(math.log2(max(largest, 1e-30) / FLOAT16_MAX)))


def _below(bound: float, squares: float) -> float:
    """The largest power of two whose square times `squares` stays below a bound."""
    return 2.0 ** math.floor(math.log2(bound / max(squares, 1e-30)) / 2)
