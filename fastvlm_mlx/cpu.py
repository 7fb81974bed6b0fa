"""Two operations of the tower for MLX's CPU backend, where the general ones are slow; Metal and CUDA never come here.

MLX on a CPU runs a grouped convolution as a plain loop, and the error function without SIMD. Here the convolution is a
banded matrix product, so that BLAS does the work, and GELU a rational function of products and one division.
"""

from collections.abc import Callable
from functools import cache
from shutil import which

import mlx.core as mx

TILE = 16  # outputs of a row computed by one product: the band is TILE wide, its waste and the copied input balance there


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
    windows = mx.as_strided(
        planes,
        (C, B, out_h, tiles, k, span),
        (B * height * width, height * width, stride * width, tile * stride, width, 1),
    ).reshape(C, B * out_h * tiles, k * span)

    # Row t of the band is the kernel's row moved right by t * stride. Repeating the row with period span + stride and
    # reading it in lines of span elements does just that.
    row = mx.pad(weight[..., 0], [(0, 0), (0, 0), (0, span + stride - k)])
    lines = mx.broadcast_to(row[:, :, None], (C, k, tile, span + stride)).reshape(C, k, -1)
    band = lines[..., : tile * span].reshape(C, k, tile, span).transpose(0, 2, 1, 3).reshape(C, tile, k * span)

    y = windows @ band.swapaxes(1, 2)
    return y.reshape(C, B, out_h, tiles * tile)[..., :out_w].transpose(1, 2, 3, 0)


# GELU(x) = x * Phi(x), and Phi(x) - 1/2 = c * P(c^2) / Q(c^2) with c = x limited to +-LIMIT, where Phi has reached 0 or 1.
# Coefficients by iteratively reweighted least squares on GELU's own error: at most 3e-8 before rounding to float32.
LIMIT = 5.6
NUMERATOR = (2.1710815e-08, 6.589995385e-06, 1.9012208258e-04, 4.80522344659e-03, 3.584428150898e-02, 3.9894190203663e-01)
DENOMINATOR = (1.185115825e-06, 8.0998315062e-05, 2.00317387732e-03, 2.98022452759e-02, 2.565110429746e-01, 1.0)
COMPILE_FROM = 1 << 20  # elements; below, compiling (a second or so, once per machine) costs more than it gives


def gelu(x: mx.array) -> mx.array:
    """Exact GELU (the one with erf) of a float32 array of any shape; within 2e-7 * max(1, |x|)."""
    return _compiled_gelu()(x) if x.size >= COMPILE_FROM else _gelu(x)


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
    """One fused loop where MLX finds a C++ compiler to build it with, the plain operations elsewhere."""
    return mx.compile(_gelu, shapeless=True) if which("g++") else _gelu
