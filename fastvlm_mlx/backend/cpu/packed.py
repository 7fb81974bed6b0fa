"""Quantised matrices, turned back into float32 before they are multiplied: MLX's own product is a plain loop."""

from collections.abc import Iterable
from typing import Protocol

import mlx.core as mx
import numpy as np

from .gradients import Form
from .views import memory_of

DEQUANTISED_SHARE = 4  # of the machine's memory, a quarter may hold float32 copies of quantised matrices


class Packed(Protocol):
    """A quantised matrix (O, I): packed integers and what turns them back into weights."""

    weight: mx.array
    scales: mx.array
    biases: mx.array
    bits: int
    group_size: int
    mode: str
    keeps_dequantised: bool
    _dequantised: mx.array | None
    form: Form | None  # what multiplies with it, once it has been multiplied with


def keep_dequantised(matrices: Iterable[Packed], memory: int) -> None:
    """Decide which quantised matrices are kept in float32 once they were turned back: the first that fit in a share of
    `memory`.

    A kept matrix answers as fast as one that was never quantised; the others are turned back for every prompt, and
    MLX's own product, ten times as slow, takes single tokens. `memory` is the machine's, in bytes.
    """
    room = memory // DEQUANTISED_SHARE
    for matrix in matrices:
        size = matrix.scales.size * matrix.group_size * 4
        matrix.keeps_dequantised = size <= room
        room -= size if matrix.keeps_dequantised else 0


def dequantised(matrix: Packed) -> mx.array:
    """A quantised matrix in float32 (O, I)."""
    if matrix._dequantised is not None:
        return matrix._dequantised
    if matrix.mode == "affine" and matrix.bits in ODD_BITS:
        groups = unpack(matrix.weight, matrix.bits).reshape(*matrix.scales.shape, -1)
        values = (groups * matrix.scales[..., None] + matrix.biases[..., None]).reshape(len(groups), -1)
    else:
        offsets = matrix.biases if matrix.mode == "affine" else None
        values = mx.dequantize(matrix.weight, matrix.scales, offsets, matrix.group_size, matrix.bits, matrix.mode)
        values = values.astype(mx.float32)
    if matrix.keeps_dequantised:
        matrix._dequantised = values
    return values


ODD_BITS = (3, 5, 6)  # integers that cross the borders of words: MLX takes them apart one by one


def unpack(words: mx.array, bits: int) -> mx.array:
    """Packed integers (O, I * bits / 32), uint32 -> the integers (O, I), float32."""
    rows = len(words)
    lanes = memory_of(words).reshape(rows, -1, bits)
    values = np.empty((*lanes.shape[:2], 32), np.float32)
    for lane in range(32):
        word, shift = divmod(lane * bits, 32)
        value = lanes[..., word] >> np.uint32(shift)
        if shift + bits > 32:
            value = value | (lanes[..., word + 1] << np.uint32(32 - shift))
        values[..., lane] = value & np.uint32(2**bits - 1)
    return mx.array(values.reshape(rows, -1))
