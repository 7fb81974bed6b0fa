"""The product of one row, or a few, with a matrix, by OpenBLAS's own routine for that."""

import ctypes
from collections.abc import Callable

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from .. import blas
from .gradients import with_gradient_of
from .views import Array, memory_of


def row_product(x: mx.array, weight: mx.array, bias: mx.array | None) -> mx.array | None:
    """x (..., I) of one row or FEW_ROWS with weight (O, I), bias (O,), float32 -> (..., O), evaluated.

    None without OpenBLAS, for a small weight, and where the weight's rows do not lie in order.

    A product of matrices first copies the whole weight into panels, which for one row is three times the work.
    """
    arrays = [x, weight] if bias is None else [x, weight, bias]
    if blas.library is None or weight.size < LEAST or any(array.dtype != mx.float32 for array in arrays):
        return None
    mx.eval(weight)
    if not np.asarray(weight).flags.c_contiguous:
        return None
    return _product(x, weight) if bias is None else _product_and_bias(x, weight, bias)


@with_gradient_of(lambda x, weight: x @ weight.T)
def _product(x: mx.array, weight: mx.array) -> mx.array:
    return _sum(x, weight, lambda rows, outputs: np.zeros((rows, outputs), np.float32))


@with_gradient_of(lambda x, weight, bias: x @ weight.T + bias)
def _product_and_bias(x: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
    return _sum(x, weight, lambda rows, _: np.tile(memory_of(bias), (rows, 1)))


def _sum(x: mx.array, weight: mx.array, start: Callable[[int, int], Array]) -> mx.array:
    """x @ weight.T, added to what `start` makes for so many rows and outputs."""
    rows, matrix = np.ascontiguousarray(memory_of(x)).reshape(-1, x.shape[-1]), memory_of(weight)
    y = start(len(rows), len(matrix))
    stripe = len(matrix) if len(rows) == 1 else max(1, STRIPE // matrix.shape[1])
    for first in range(0, len(matrix), stripe):
        part = matrix[first : first + stripe]
        for row, out in zip(rows, y[:, first:], strict=True):
            blas.library.cblas_sgemv(  # type: ignore[union-attr]  # there, or nobody would be here
                ROW_MAJOR, NOT_TRANSPOSED, *map(ctypes.c_int, part.shape), ctypes.c_float(1), _address(part),
                ctypes.c_int(len(row)), _address(row), 1, ctypes.c_float(1), _address(out), 1,
            )  # fmt: skip
    return mx.array(y).reshape(*x.shape[:-1], -1)


LEAST = 1 << 18  # weights; fewer are copied in less time than it takes to wait for the row
FEW_ROWS = 4  # from five on, the product of matrices is faster
STRIPE = 1 << 19  # weights at a time, so that the next row finds them in the processor's cache
ROW_MAJOR, NOT_TRANSPOSED = 101, 111  # cblas.h


def _address(array: npt.NDArray[np.float32]) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)
