"""Single operations on both sides, in every shape that selects another kernel on a GPU, in float32 and 16 bits.

Inputs are normally distributed and rounded to the dtype before either side gets them; the reference computes in
float32. Operations without a form of the CPU's own are compared with their definition.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from ...backend import ops
from ...config import Dtype, QuantConfig
from ...decoding.sampling import choose
from ...quantize.layers import QuantizedLinear
from ...quantize.recipes import BITS, DEFAULT_GROUP, MODES
from ...quantize.rounding import quantized
from .finding import Finding, at_least, at_most
from .parity import MIN_COSINE, as_numpy, cosine, distance
from .setting import Setting, Side

Figures = npt.NDArray[np.float32]
Form = Callable[..., mx.array]

EXPONENTIAL = 64  # terms whose sum is off as a fast exponential is: 5 + |2x| units in the last place up to |x| = 5
SIGMAS = 8  # a sum of n terms is off by about sqrt(n) / 2 units in the last place: a multiple this large is no accident
EPSILON = 2.0**-24  # half a unit in the last place of float32, relative to the value
MAP_SIDES = (18, 17)  # pixels of a map: an even and an odd side
TOP_P = 0.9
QUANTISED = "quantised product"


@dataclass(frozen=True)
class Case:
    """An operation in one shape: `form` is called with `inputs`, and sums up to `terms` products per value."""

    name: str
    form: Form
    inputs: Sequence[Figures]
    terms: int

    def run(self, side: Side, dtype: Dtype, compute: Dtype) -> Figures:
        """The operation's values on a side, from inputs rounded to `dtype`, computed in `compute`."""
        with side.here():
            given = [mx.array(each).astype(getattr(mx, dtype)).astype(getattr(mx, compute)) for each in self.inputs]
            return as_numpy(self.form(*given))


def rounding(terms: int) -> float:
    """The error allowed for a float32 sum of `terms` terms, relative to the largest value."""
    return SIGMAS * float(np.sqrt(terms)) * EPSILON


def check(setting: Setting) -> Iterator[Finding]:
    """Findings for every family of operations in every dtype, then for those that are compared with a definition."""
    for family, cases in families(setting.quick, setting.on_gpu).items():
        setting.say(family)
        # MLX's loop for a quantised product on a CPU adds up in 16 bits where it is given them; no GPU does, and no
        # answer takes it
        alone = setting.quick or (family == QUANTISED and not setting.on_gpu)
        for dtype in ("float32",) if alone else setting.dtypes:
            yield compare(setting, family, cases, dtype)
    setting.say("rope, top-p, packing")
    with setting.subject.here():
        yield rope()
        yield top_p(151_936 if setting.on_gpu else 8192)  # sorted by one core on a CPU
        yield packing(quick=setting.quick)


def compare(setting: Setting, family: str, cases: Sequence[Case], dtype: Dtype) -> Finding:
    """The cases of a family on both sides; the worst of them decides."""
    title = f"{family}, {dtype}: {len(cases)} forms"
    pairs = []
    for case in cases:
        try:
            found = case.run(setting.subject, dtype, dtype)
        except Exception as error:  # the other families are checked all the same
            return Finding(title, "wrong", f"{type(error).__name__}: {error} at {case.name}", "no error")
        pairs.append((case, found, case.run(setting.reference, dtype, "float32")))
    if dtype == "float32":
        shares = {case.name: distance(found, expected) / rounding(case.terms) for case, found, expected in pairs}
        worst = max(cases, key=lambda case: shares[case.name])
        value, limit = shares[worst.name] * rounding(worst.terms), rounding(worst.terms)
        wrong = sum(not share <= 1 for share in shares.values())
        expects = f"at most {limit:.1e} of the largest value: {SIGMAS} * sqrt({worst.terms} terms) * 2**-24"
        shown = f"{value:.1e} at {worst.name}" + (f"; {wrong} wrong" if wrong else "")
        return at_most(
            title, value, limit, found=shown, expected=expects, unit="of the largest value", **wrong_ones(shares, 1.0)
        )
    cosines = {case.name: cosine(found, expected) for case, found, expected in pairs}
    worst = min(cases, key=lambda case: cosines[case.name])
    shown = f"cosine {cosines[worst.name]:.6f} at {worst.name}"
    return at_least(
        title, cosines[worst.name], MIN_COSINE, found=shown, expected=f"cosine at least {MIN_COSINE}", unit="cosine",
        **{name: value for name, value in cosines.items() if not value >= MIN_COSINE},
    )  # fmt: skip


def wrong_ones(shares: dict[str, float], limit: float) -> dict[str, Any]:
    """The entries above the limit, by name."""
    return {name: share for name, share in shares.items() if not share <= limit}


def families(quick: bool, on_gpu: bool) -> dict[str, list[Case]]:
    """Cases by family: every operation in its shapes; fewer where `quick`, larger ones `on_gpu`."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> Figures:
        return rng.standard_normal(shape, np.float32)

    keys = (1, 9, 281) if quick else (1, 5, 8, 9, 281, 1030)
    found: dict[str, list[Case]] = {"depthwise": [], "attention of the tower": [], "attention of the decoder": []}
    for kernel in (3, 7):
        for stride in (1, 2):
            for channels in (16, 96) if quick else (16, 24, 96, 1536):
                inputs = (normal(1, *MAP_SIDES, channels), normal(channels, kernel, kernel, 1))
                name = f"{kernel}x{kernel}, stride {stride}, {channels} channels"
                found["depthwise"].append(Case(name, partial(_depthwise, stride), inputs, kernel * kernel))
    for length in keys:
        qkv = normal(1, 3 * 4, length, 32)
        found["attention of the tower"].append(
            Case(f"{length} keys of 32", ops.attention, (qkv,), length + 32 + EXPONENTIAL)
        )
        for width, heads, shared in ((64, 14, 2), (128, 12, 2)):
            for mask, rows in (("causal", min(length, 33)), ("none", 1), ("boolean", 1)):
                q, k, v = (
                    normal(2, heads, rows, width),
                    normal(2, shared, length, width),
                    normal(2, shared, length, width),
                )
                case = Case(
                    f"{length} keys of {width}, mask {mask}",
                    partial(_causal, mask),
                    (q, k, v),
                    length + width + EXPONENTIAL,
                )
                found["attention of the decoder"].append(case)
    counts = (1, 13) if quick else (1, 6, 13, 33, 281)
    widths = (896,) if quick else (896, 4864, 3584)
    out = 512 if on_gpu else 32
    x = {width: normal(max(counts), width) for width in widths}
    w = {width: normal(out, width) for width in widths}
    found["product"] = [
        Case(f"{count} rows, width {width}", ops.linear, (x[width][:count], w[width], normal(out)), width)
        for count in counts
        for width in widths
    ]
    found[QUANTISED] = [
        Case(f"{count} rows, width {width}, {name}", partial(_quantised, matrix), (x[width][:count],), width)
        for width in widths
        for name, matrix in matrices(w[width]).items()
        for count in counts
    ]
    hidden = normal(33, 4864)
    found["activations"] = [
        Case("GELU", ops.gelu, (hidden,), EXPONENTIAL),
        Case("SwiGLU", ops.swiglu, (normal(33, 2 * 4864),), EXPONENTIAL),
    ]
    return found


def _depthwise(stride: int, x: mx.array, weight: mx.array) -> mx.array:
    return ops.depthwise(x, weight, stride)


def _causal(mask: str, q: mx.array, k: mx.array, v: mx.array) -> mx.array:
    length = k.shape[2]
    shown: str | mx.array | None = "causal" if mask == "causal" else None
    if mask == "boolean":  # as in a batch whose second row begins with padding
        shown = (mx.arange(length) >= mx.array([0, length // 2])[:, None])[:, None, None]
        if ops.current() == "cpu":  # the definition: what is not seen is left out
            halves = [(0, 0), (1, length // 2)]
            return mx.concatenate(
                [_causal("none", q[i : i + 1], k[i : i + 1, :, s:], v[i : i + 1, :, s:]) for i, s in halves]
            )
    return ops.causal_attention(q, k, v, shown)


def _quantised(matrix: QuantizedLinear, x: mx.array) -> mx.array:
    if ops.current() == "cpu":  # the definition: dequantised, then multiplied
        offsets = getattr(matrix, "biases", None)
        dequantised = mx.dequantize(matrix.weight, matrix.scales, offsets, matrix.group_size, matrix.bits, matrix.mode)
        return x @ dequantised.astype(mx.float32).T
    if matrix.mode == "affine":
        matrix = cast(QuantizedLinear, _Typed(matrix, x.dtype))
    return ops.quantized_linear(x, matrix)


class _Typed:
    """A quantised matrix with its scales in the dtype that is computed in, as a network has them."""

    def __init__(self, matrix: QuantizedLinear, dtype: mx.Dtype):
        self.weight, self.bits, self.group_size, self.mode = matrix.weight, matrix.bits, matrix.group_size, matrix.mode
        self.scales, self.biases = matrix.scales.astype(dtype), matrix.biases.astype(dtype)
        self.keeps_dequantised, self._dequantised = False, None


def settings_of_every_kind() -> dict[str, QuantConfig]:
    """Every form of quantisation that a folder may have, by name."""
    found = {f"{bits} bits": QuantConfig(bits, DEFAULT_GROUP) for bits in BITS}
    return found | {name: settings for name, settings in MODES.items() if name != "affine"}


def matrices(weight: Figures) -> dict[str, QuantizedLinear]:
    """A matrix (O, I) quantised in every form, by name; its scales are exact in bfloat16."""
    found = {}
    for name, settings in settings_of_every_kind().items():
        rows, width = weight.shape
        layer = QuantizedLinear(rows, width, settings, bias=False)
        for path, tensor in quantized("weight", mx.array(weight), settings, mx.bfloat16):
            layer[path] = tensor.astype(mx.float32) if tensor.dtype == mx.bfloat16 else tensor
        mx.eval(layer.parameters())
        found[name] = layer
    return found


def rope() -> Finding:
    """Rotary positions against their definition in float64: from the start, far on, and with another offset per row."""
    rng = np.random.default_rng(1)
    farthest, details = 30_000, {}
    for width in (64, 128):
        x = rng.standard_normal((2, 3, 9, width), np.float32)
        for name, offsets in (("0", [0, 0]), (f"{farthest}", [farthest, farthest]), ("rows", [5, 1000])):
            given: int | mx.array = mx.array(offsets) if name == "rows" else offsets[0]
            y = mx.fast.rope(mx.array(x), width, traditional=False, base=1e6, scale=1.0, offset=given)
            details[f"{width} wide, from {name}"] = distance(as_numpy(y), turned(x, offsets))
    worst = max(details, key=lambda name: details[name])
    limit = (farthest + 8) * 2 * EPSILON + rounding(2)
    angle = farthest + 8
    expects = f"at most {limit:.1e} of the largest value: an angle of {angle} radians in float32, {angle} * 2**-23"
    shown = f"{details[worst]:.1e} at {worst}"
    return at_most(
        "rotary positions", details[worst], limit, found=shown, expected=expects, unit="of the largest value", **details
    )


def turned(x: Figures, offsets: Sequence[int]) -> Figures:
    """x (B, heads, L, width) rotated by its positions, which begin at each row's offset.

    Qwen2's rotary embedding with theta 1e6, in float64.
    """
    half = x.shape[-1] // 2
    frequencies = 1e6 ** (-np.arange(half) / half)
    angles = (np.array(offsets)[:, None] + np.arange(x.shape[2]))[..., None] * frequencies
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    first, second = x[..., :half].astype(np.float64), x[..., half:].astype(np.float64)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(np.float32)


def top_p(vocabulary: int) -> Finding:
    """Tokens drawn by top-p from `vocabulary` logits: none outside the nucleus, each as often as it should be."""
    rng = np.random.default_rng(2)
    logits = rng.standard_normal(vocabulary, np.float32)
    likeliest = rng.choice(logits.size, 8, replace=False)
    logits[likeliest] = 16 + np.arange(8, dtype=np.float32) / 4
    chances = np.exp(logits.astype(np.float64) - float(logits.max()))
    chances /= chances.sum()
    order = np.argsort(-chances)
    count = int(np.searchsorted(np.cumsum(chances[order]), TOP_P)) + 1
    nucleus, draws, rows = order[:count], 512, 32
    many, drawn = mx.broadcast_to(mx.array(logits), (rows, logits.size)), []
    for seed in range(draws // rows):
        drawn += cast(list[int], choose(many, 1.0, TOP_P, mx.random.key(seed)).tolist())
    outside = sum(token not in nucleus for token in drawn)
    expected = draws * chances[nucleus] / chances[nucleus].sum()
    found = np.array([drawn.count(int(token)) for token in nucleus])
    surprise = float(((found - expected) ** 2 / expected).sum())
    # Chi squared: its mean and so many standard deviations.
    limit = (count - 1) + SIGMAS * float(np.sqrt(2 * (count - 1)))
    shown = f"{outside} of {draws} outside the nucleus of {count}, chi squared {surprise:.1f}"
    expects = f"0 outside; chi squared at most {limit:.1f}, {SIGMAS} standard deviations above its mean"
    value = float("inf") if outside else surprise
    return at_most("top-p", value, limit, found=shown, expected=expects, outside=float(outside), chi_squared=surprise)


def packing(*, quick: bool) -> Finding:
    """Weights quantised, packed and unpacked, bit by bit and by MLX; each within rounding of the original."""
    weight = np.random.default_rng(3).standard_normal((16, 896), np.float32)
    details: dict[str, float] = {}
    limits: dict[str, float] = {}
    for bits in (4, 3) if quick else BITS:
        settings = QuantConfig(bits, DEFAULT_GROUP)
        packed, scales, offsets = (tensor for _, tensor in quantized("weight", mx.array(weight), settings, mx.float16))
        steps = np.abs(as_numpy(scales))[..., None]
        integers = unpacked(np.array(packed), bits).reshape(16, -1, DEFAULT_GROUP)
        ours = integers * as_numpy(scales)[..., None] + as_numpy(offsets)[..., None]
        dequantised = mx.dequantize(packed, scales.astype(mx.float32), offsets.astype(mx.float32), DEFAULT_GROUP, bits)
        details[f"{bits} bits"] = float((np.abs(ours - weight.reshape(ours.shape)) / steps).max())
        details[f"{bits} bits by MLX"] = float((np.abs(as_numpy(dequantised).reshape(ours.shape) - ours) / steps).max())
        limits[f"{bits} bits"] = 1 + 2 * (2**bits - 1) * 2.0**-11
        limits[f"{bits} bits by MLX"] = 2**bits * 2.0**-22
    worst = max(details, key=lambda name: details[name] / limits[name])
    expects = (
        f"at most {limits[worst]:.3f} steps: one at the end that is cut so that zero is exact, and scale and offset in "
        "float16"
    )
    shown = f"{details[worst]:.3f} steps at {worst}"
    return at_most("packing", details[worst], limits[worst], found=shown, expected=expects, unit="steps", **details)


def unpacked(packed: npt.NDArray[np.uint32], bits: int) -> npt.NDArray[np.int64]:
    """uint32 words (O, I * bits / 32) -> the integers (O, I) in them, the lowest bit first."""
    every = (packed[..., None] >> np.arange(32, dtype=np.uint32)) & np.uint32(1)
    groups = every.reshape(len(packed), -1, bits).astype(np.int64)
    return np.asarray((groups << np.arange(bits)).sum(axis=-1))
