"""Products with quantised matrices as they are stored: compiled programs that hold the packed integers.

Every affine form fits: integers of 4 and 8 bits as they lie, those of other widths unpacked to the next of these two.
Activations are never rounded to integers, so sums differ from those of a dequantised matrix by rounding alone.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from . import graphs
from .compiler import Program, library
from .cores import share_out
from .gradients import with_gradient_of
from .packed import Packed, unpack
from .products import DTYPES, MIN_ELEMENTS
from .views import Place, memory_of, place_of


def takes(x: mx.array, matrix: Packed) -> bool:
    """Whether a program is to multiply x with a quantised matrix: it is affine and large, x of DTYPES."""
    return x.dtype in DTYPES and matrix.mode == "affine" and matrix.scales.size * matrix.group_size >= MIN_ELEMENTS


def product(x: mx.array, matrix: Packed, bias: mx.array | None) -> mx.array:
    """x (..., I) with a quantised matrix (O, I), bias (O,) or None -> (..., O), evaluated."""
    if matrix.form is None:
        general = partial(_general, group_size=matrix.group_size, bits=matrix.bits)
        matrix.form = with_gradient_of(general)(_Form(matrix.bits).product)
    y = matrix.form(x.reshape(-1, x.shape[-1]), matrix.weight, matrix.scales, matrix.biases)
    y = y.reshape(*x.shape[:-1], -1)
    return y if bias is None else y + bias


def compile_all(matrices: Sequence[Packed], dtype: mx.Dtype) -> list[Packed]:
    """Make the programs of matrices that rows of this dtype will be multiplied with; returns those that have none."""

    def compiled(matrix: Packed) -> None:
        product(mx.zeros((1, matrix.scales.shape[1] * matrix.group_size), dtype), matrix, None)

    row = mx.zeros((1, 1), dtype)
    share_out(compiled, [matrix for matrix in matrices if takes(row, matrix)])
    return [matrix for matrix in matrices if not takes(row, matrix)]


def _general(
    x: mx.array, weight: mx.array, scales: mx.array, offsets: mx.array, *, group_size: int, bits: int
) -> mx.array:
    packed = mx.stop_gradient(weight)  # integers have none
    return mx.quantized_matmul(x, packed, scales, offsets, group_size=group_size, bits=bits)


class _Form:
    """The program of a quantised matrix, made again where the matrix holds other arrays than it was made from."""

    def __init__(self, bits: int):
        self._bits = bits
        self._places: list[Place] = []
        self._dtype: mx.Dtype | None = None

    def product(self, x: mx.array, *parts: mx.array) -> mx.array:
        """x (R, I) with weight, scales and biases -> (R, O)."""
        places = [place_of(part) for part in parts]
        if self._dtype is None or x.dtype != self._dtype or places != self._places:
            self._program = self._compiled(parts, x.dtype)
            self._places, self._dtype = places, x.dtype
        return self._program([x])

    def _compiled(self, parts: Sequence[mx.array], dtype: mx.Dtype) -> Program:
        ov = library()
        weight, scales, offsets = parts
        x = ov.opset13.parameter([-1, weight.shape[1] * 32 // self._bits], graphs.type_of(dtype))
        integers = tensor_of_integers(weight, self._bits, scales.shape[1])
        matrix = graphs.dequantised(ov.opset13, integers, scales, offsets, graphs.type_of(dtype))
        return Program(ov.Model([graphs.product(ov.opset13, x, matrix)], [x], "quantised product"), dtype, [integers])


def tensor_of_integers(weight: mx.array, bits: int, groups: int) -> Any:
    """Packed integers (O, I * bits / 32) as a tensor (O, groups, I / groups) of 4 or 8 bits."""
    ov = library()
    shape = [weight.shape[0], groups, weight.shape[1] * 32 // bits // groups]
    if bits in (4, 8):
        memory = memory_of(weight).view(np.uint8)
    else:
        values = memory_of(unpack(weight, bits)).astype(np.uint8)
        memory = values if bits > 4 else values[:, ::2] | (values[:, 1::2] << np.uint8(4))
    return ov.Tensor(memory, shape, ov.Type.u4 if bits <= 4 else ov.Type.u8)
