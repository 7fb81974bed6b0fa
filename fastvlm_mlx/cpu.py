"""Four operations for MLX's CPU backend, where the general ones are slow; Metal and CUDA never come here.

MLX on a CPU runs a grouped convolution as a plain loop, the error function without SIMD, the product of one row with a
matrix as a product of matrices, and a product with a quantised matrix as a plain loop. Here the convolution is a banded matrix
product, so that BLAS does the work, GELU a rational function of products and one division, one row with a matrix OpenBLAS's own
routine for that, and a quantised matrix is turned back into float32 first.
"""

import ctypes
import os
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cache
from shutil import which
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from . import blas

if TYPE_CHECKING:
    from .backend import Packed

WINDOWS = 1 << 23  # elements of input windows laid out at a time: ten times the input they are taken from
TILE = 16  # outputs of a row computed by one product: the band is TILE wide, its waste and the copied input balance there


def keep_memory() -> None:
    """Have the C library of Linux (glibc) keep what is freed: activations are as large as what it returns to the system at
    once, and getting it back costs a fault per page, a tenth to a third of a tower's time."""
    if sys.platform != "linux":
        return
    with suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(MMAP_THRESHOLD, 1 << 30)
        mallopt(TRIM_THRESHOLD, (1 << 31) - 1)


TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # malloc.h


def row_product(x: mx.array, weight: mx.array, bias: mx.array | None) -> mx.array | None:
    """x (..., I) of one row or FEW_ROWS, weight (O, I), bias (O,), float32 -> (..., O), evaluated; None without OpenBLAS.

    A product of matrices first copies the whole weight into panels, which for one row is three times the work.
    """
    if blas.library is None or not x.dtype == weight.dtype == mx.float32:
        return None
    mx.eval(x, weight)
    rows, matrix = np.ascontiguousarray(x).reshape(-1, x.shape[-1]), np.asarray(weight)
    if not matrix.flags.c_contiguous:
        return None
    y = np.zeros((len(rows), len(matrix)), np.float32) if bias is None else np.tile(np.asarray(bias), (len(rows), 1))
    stripe = len(matrix) if len(rows) == 1 else max(1, STRIPE // matrix.shape[1])
    for start in range(0, len(matrix), stripe):
        part = matrix[start : start + stripe]
        for row, out in zip(rows, y[:, start:], strict=True):
            blas.library.cblas_sgemv(
                ROW_MAJOR, NOT_TRANSPOSED, *map(ctypes.c_int, part.shape), ctypes.c_float(1), _address(part),
                ctypes.c_int(len(row)), _address(row), 1, ctypes.c_float(1), _address(out), 1,
            )  # fmt: skip
    return mx.array(y).reshape(*x.shape[:-1], -1)


FEW_ROWS = 4  # from five on, the product of matrices is faster
STRIPE = 1 << 19  # weights at a time, so that the next row finds them in the processor's cache
ROW_MAJOR, NOT_TRANSPOSED = 101, 111  # cblas.h


def _address(array: npt.NDArray[np.float32]) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


WIDE_SHARE = 4  # of the machine's memory, a quarter may hold float32 copies of quantised matrices


def keep_wide(matrices: Iterable["Packed"], memory: int) -> None:
    """Decide which quantised matrices are kept in float32 once they were turned back: the first that fit in a share of `memory`.

    A kept matrix answers as fast as one that was never quantised; the others are turned back for every prompt, and MLX's own
    product, ten times as slow, takes single tokens. `memory` is the machine's, in bytes.
    """
    room = memory // WIDE_SHARE
    for matrix in matrices:
        size = matrix.scales.size * matrix.group_size * 4
        matrix.keeps_wide = size <= room
        room -= size if matrix.keeps_wide else 0


def memory_bytes() -> int:
    """The machine's memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def widened(matrix: "Packed") -> mx.array:
    """A quantised matrix in float32 (O, I)."""
    if matrix._wide is not None:
        return matrix._wide
    if matrix.mode == "affine" and matrix.bits in ODD_BITS:
        groups = unpack(matrix.weight, matrix.bits).reshape(*matrix.scales.shape, -1)
        wide = (groups * matrix.scales[..., None] + matrix.biases[..., None]).reshape(len(groups), -1)
    else:
        offsets = matrix.biases if matrix.mode == "affine" else None
        wide = mx.dequantize(matrix.weight, matrix.scales, offsets, matrix.group_size, matrix.bits, matrix.mode)
        wide = wide.astype(mx.float32)
    if matrix.keeps_wide:
        matrix._wide = wide
    return wide


ODD_BITS = (3, 5, 6)  # integers that cross the borders of words: MLX takes them apart one by one


def unpack(words: mx.array, bits: int) -> mx.array:
    """Packed integers (O, I * bits / 32), uint32 -> the integers (O, I), float32."""
    rows = len(words)
    mx.eval(words)
    lanes = np.asarray(words).reshape(rows, -1, bits)
    values = np.empty((*lanes.shape[:2], 32), np.float32)
    for lane in range(32):
        word, shift = divmod(lane * bits, 32)
        value = lanes[..., word] >> np.uint32(shift)
        if shift + bits > 32:
            value = value | (lanes[..., word + 1] << np.uint32(32 - shift))
        values[..., lane] = value & np.uint32(2**bits - 1)
    return mx.array(values.reshape(rows, -1))


def depthwise(x: mx.array, weight: mx.array, stride: int) -> mx.array:
    """Depthwise convolution with a centred odd kernel: x (B, H, W, C), weight (C, k, k, 1) -> (B, ceil(H/s), ceil(W/s), C).

    A row of `tile` outputs depends on `span` inputs in each of k rows, through a band matrix that holds the kernel's row
    shifted by `stride` from one output to the next. Per channel that is one (rows, k * span) @ (k * span, tile) product.
    Unlike MLX's own loop it is also safe for maps smaller than the kernel.
    """
    B, H, W, C = x.shape
    k = weight.shape[1]
    p = k // 2
    out_h, out_w = -(-H // stride), -(-W // stride)
    tile = min(TILE, out_w)
    tiles = -(-out_w // tile)
    span = (tile - 1) * stride + k

    height = H + 2 * p
    width = (tiles * tile - 1) * stride + k
    padding = [(0, 0), (0, 0), (p, p), (p, max(0, width - W - p))]
    planes = mx.contiguous(mx.pad(x.transpose(3, 0, 1, 2), padding))
    width = planes.shape[3]
    strides = (B * height * width, height * width, stride * width, tile * stride, width, 1)

    # Row t of the band is the kernel's row moved right by t * stride. Repeating the row with period span + stride and
    # reading it in lines of span elements does just that.
    row = mx.pad(weight[..., 0], [(0, 0), (0, 0), (0, span + stride - k)])
    lines = mx.broadcast_to(row[:, :, None], (C, k, tile, span + stride)).reshape(C, k, -1)
    band = lines[..., : tile * span].reshape(C, k, tile, span).transpose(0, 2, 1, 3).reshape(C, tile, k * span)

    outputs = []
    step = max(1, WINDOWS // (B * out_h * tiles * k * span))
    for first in range(0, C, step):
        channels = min(step, C - first)
        windows = mx.as_strided(planes, (channels, B, out_h, tiles, k, span), strides, first * strides[0])
        windows = windows.reshape(channels, B * out_h * tiles, k * span)
        outputs.append(windows @ band[first : first + channels].swapaxes(1, 2))
    y = mx.concatenate(outputs) if len(outputs) > 1 else outputs[0]
    return y.reshape(C, B, out_h, tiles * tile)[..., :out_w].transpose(1, 2, 3, 0)


# GELU(x) = x * Phi(x), and Phi(x) - 1/2 = c * P(c^2) / Q(c^2) with c = x limited to +-LIMIT, where Phi has reached 0 or 1.
# Coefficients by iteratively reweighted least squares on GELU's own error: at most 3e-8 before rounding to float32.
LIMIT = 5.6
NUMERATOR = (2.1710815e-08, 6.589995385e-06, 1.9012208258e-04, 4.80522344659e-03, 3.584428150898e-02, 3.9894190203663e-01)
DENOMINATOR = (1.185115825e-06, 8.0998315062e-05, 2.00317387732e-03, 2.98022452759e-02, 2.565110429746e-01, 1.0)
PIECE = 1 << 18  # elements at a time: MLX fuses at most eleven steps, and what lies between stays in the processor's cache
COMPILE_FROM = 1 << 20  # elements; below, compiling (a second or so, once per machine) costs more than it gives


def gelu(x: mx.array) -> mx.array:
    """Exact GELU (the one with erf) of a float32 array of any shape; within 2e-7 * max(1, |x|)."""
    if x.size < COMPILE_FROM:
        return _gelu(x)
    flat, compiled = x.reshape(-1), _compiled_gelu()
    return mx.concatenate([compiled(flat[i : i + PIECE]) for i in range(0, x.size, PIECE)]).reshape(x.shape)


def _gelu(x: mx.array) -> mx.array:
    c = mx.clip(x, -LIMIT, LIMIT)
    square = c * c
    return x * (0.5 + c * _polynomial(NUMERATOR, square) / _polynomial(DENOMINATOR, square))


def _polynomial(coefficients: tuple[float, ...], x: mx.array) -> mx.array:
    value = coefficients[0] * x + coefficients[1]
    for coefficient in coefficients[2:]:
        value = value * x + coefficient
    return value


@cache
def _compiled_gelu() -> Callable[[mx.array], mx.array]:
    """One fused loop where MLX can build it (it runs g++ and needs a temporary folder), the plain operations elsewhere."""
    if which("g++") is None:
        return _gelu
    compiled = mx.compile(_gelu, shapeless=True)
    try:
        mx.eval(compiled(mx.zeros((2,))))
    except RuntimeError:
        return _gelu
    return compiled
