"""A weight matrix (O, I) -> packed integers with scales of 16 bits, in MLX's format.

An affine group holds w = scale * q + offset, q from 0 to 2 ** bits - 1. Scale and offset are rounded to the type they
are stored in first and the integers chosen for those, so that storing them costs nothing.
"""

from collections.abc import Sequence

import mlx.core as mx

from ..config import QuantConfig

SMALLEST = 1e-7  # a scale; MLX's own
PIECE = 1 << 22  # weights at a time


def scale_type(stored: str) -> mx.Dtype:
    """The type of scales in a folder whose weights are of type `stored`: the same where it has 16 bits."""
    return mx.float16 if stored == "float16" else mx.bfloat16


def quantized(name: str, weight: mx.array, settings: QuantConfig, scales: mx.Dtype) -> list[tuple[str, mx.array]]:
    """A weight "PATH.weight" (O, I) as its quantised layer's tensors: packed weight, scales, and offsets if the mode
    has them."""
    path = name.removesuffix("weight")
    if settings.mode != "affine":
        parts: Sequence[mx.array] = mx.quantize(weight, settings.group_size, settings.bits, settings.mode)
    else:
        step = max(1, PIECE // weight.shape[1])
        pieces = [_affine(weight[row : row + step], settings, scales) for row in range(0, len(weight), step)]
        parts = [mx.concatenate(list(part)) for part in zip(*pieces, strict=True)]
    return [(path + part, tensor) for part, tensor in zip(("weight", "scales", "biases"), parts, strict=False)]


def rounded(weight: mx.array, settings: QuantConfig, scales: mx.Dtype) -> mx.array:
    """The weight (O, I) as its quantised form gives it back, float32."""
    return dequantized([tensor for _, tensor in quantized("weight", weight, settings, scales)], settings)


def dequantized(parts: list[mx.array], settings: QuantConfig) -> mx.array:
    """Packed weight, scales (and offsets) -> the matrix (O, I), float32."""
    weight, scales, *rest = parts
    if settings.mode != "affine":
        return mx.dequantize(weight, scales, None, settings.group_size, settings.bits, settings.mode).astype(mx.float32)
    offsets = rest[0].astype(mx.float32)
    return mx.dequantize(weight, scales.astype(mx.float32), offsets, settings.group_size, settings.bits, settings.mode)


def _affine(weight: mx.array, settings: QuantConfig, stored: mx.Dtype) -> tuple[mx.array, ...]:
    rows, width = weight.shape
    groups = weight.astype(mx.float32).reshape(rows, -1, settings.group_size)
    levels = float(2**settings.bits - 1)
    scale, offset = _range(groups.min(axis=-1, keepdims=True), groups.max(axis=-1, keepdims=True), levels, stored)
    q = mx.clip(mx.round((groups - offset) / scale), 0, levels)
    packed = pack(q.reshape(rows, width).astype(mx.uint32), settings.bits)
    return packed, scale.squeeze(-1).astype(stored), offset.squeeze(-1).astype(stored)


def _range(low: mx.array, high: mx.array, levels: float, stored: mx.Dtype) -> tuple[mx.array, mx.array]:
    """Scale and offset of groups that span low..high, as they will be stored, float32.

    As in MLX, the end farther from zero is met exactly and the scale is chosen so that zero is too; a scale may be
    negative.
    """
    from_low = mx.abs(low) > mx.abs(high)
    scale = mx.maximum((high - low) / levels, SMALLEST)
    scale = mx.where(from_low, scale, -scale)
    edge = mx.where(from_low, low, high)
    steps = mx.round(edge / scale)
    scale = mx.where(steps == 0, scale, edge / mx.where(steps == 0, 1, steps))
    offset = mx.where(steps == 0, 0, edge)
    return scale.astype(stored).astype(mx.float32), offset.astype(stored).astype(mx.float32)


def pack(q: mx.array, bits: int) -> mx.array:
    """Integers (O, I) of `bits` bits, one after the other from the lowest bit of the first word on: (O, I * bits / 32)
    uint32."""
    if 32 % bits == 0:  # no integer lies in two words: a shift and a sum, instead of a kernel for each of 32 lanes
        return (q.reshape(len(q), -1, 32 // bits) << mx.arange(0, 32, bits, dtype=mx.uint32)).sum(axis=-1)
    lanes = q.reshape(len(q), -1, 32)
    words = [mx.zeros(lanes.shape[:2], mx.uint32)] * bits
    for lane in range(32):
        word, shift = divmod(lane * bits, 32)
        words[word] = words[word] | (lanes[..., lane] << shift)
        if shift + bits > 32:
            words[word + 1] = words[word + 1] | (lanes[..., lane] >> (32 - shift))
    return mx.stack(words, axis=-1).reshape(len(q), -1)
