"""The operations whose best form depends on where they are computed: on MLX's default device when they are called.

Model code calls these and reads the same everywhere; weights and folders are the same too. What a network was built or
loaded under makes no difference: like MLX's own operations, these follow `mx.set_default_device` and `mx.stream`.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import mlx.core as mx
import mlx.nn as nn

from . import cpu
from .cpu.packed import Packed

Backend = Literal["cpu", "metal", "cuda"]

FUSED_HEAD_DIM = 64  # the narrowest head Metal's fused attention takes (mlx 0.32, scaled_dot_product_attention.cpp)


class _Forms(threading.local):
    """What this thread has chosen: general forms on a CPU, and the forms of another backend than its device's."""

    general = False
    backend: Backend | None = None


_forms = _Forms()
_CPU = mx.DeviceType.cpu
_GPU: Backend = "metal" if mx.metal.is_available() else "cuda"


@contextmanager
def general_forms() -> Iterator[None]:
    """Within the block, in this thread, compute on a CPU as on a GPU: by MLX's own operations alone.

    For training steps that are compiled (`mx.compile`) or vectorised (`mx.vmap`): the CPU's own forms evaluate their
    arguments, which neither allows. A step is built when it is first called with arguments of new shapes, so every call
    belongs into the block. Gradients are right with and without it.
    """
    before, _forms.general = _forms.general, True
    try:
        yield
    finally:
        _forms.general = before


@contextmanager
def forms_of(backend: Backend) -> Iterator[None]:
    """Within the block, in this thread, compute by the forms of this backend, whatever the default device is.

    A machine without a GPU builds, checks and runs a GPU's graph with it. Raises nothing: the general forms run on
    every device.
    """
    before, _forms.backend = _forms.backend, backend
    try:
        yield
    finally:
        _forms.backend = before


def current() -> Backend:
    """The backend whose forms this thread computes by: that of MLX's default device, unless within `forms_of`."""
    if _forms.backend is not None:
        return _forms.backend
    return "cpu" if mx.default_device().type is _CPU else _GPU


def _on_cpu() -> bool:
    """Whether to use the CPU's own form."""
    return current() == "cpu" and not _forms.general


def _compiled() -> bool:
    """Whether to use a compiled program: on a CPU, once a large model has been loaded."""
    return _on_cpu() and cpu.loaded()


def totals(arrays: Sequence[mx.array]) -> list[float]:
    """The sum of each array's elements, which may overflow its dtype."""
    if current() == "cpu":
        return [cpu.total(array) for array in arrays]
    sums = [array.sum() for array in arrays]
    mx.eval(sums)
    return [float(each.item()) for each in sums]  # type: ignore[arg-type]


def features(tower: nn.Module, pixels: mx.array) -> mx.array:
    """tower(pixels): (B, H, W, 3) -> (B, N, C); for a large model on a CPU as one compiled graph."""
    if _compiled() and cpu.takes_tower(tower, pixels):
        return cpu.features(tower, pixels)
    found: mx.array = tower(pixels)
    return found


def gelu(x: mx.array) -> mx.array:
    """GELU with erf, element by element."""
    if _on_cpu() and x.dtype == mx.float32:
        return cpu.gelu(x)
    return nn.gelu(x)


def feed_forward(x: mx.array, fc1: nn.Module, fc2: nn.Module) -> mx.array:
    """fc2(gelu(fc1(x))): x (..., I) -> (..., O)."""
    rows = x.reshape(-1, x.shape[-1])  # once, or each product would flatten its argument and shape it back
    y: mx.array = fc2(gelu(fc1(rows)))
    return y.reshape(*x.shape[:-1], -1)


def swiglu(x: mx.array) -> mx.array:
    """silu(gate) * up of the halves [gate, up] = x: (..., 2 * I) -> (..., I); one fused kernel on a GPU."""
    if _compiled() and cpu.takes_swiglu(x):
        return cpu.swiglu(x)
    if x.size == x.shape[-1] and x.ndim > 1:  # one row: halves with its stride would be copied for a quantised product
        gate, up = mx.split(x.reshape(2, *x.shape[1:-1], -1), 2)
    else:
        gate, up = mx.split(x, 2, axis=-1)
    return _swiglu(gate, up) if current() == "cpu" else _fused_swiglu(gate, up)


def _swiglu(gate: mx.array, up: mx.array) -> mx.array:
    return gate * mx.sigmoid(gate) * up


_fused_swiglu = mx.compile(_swiglu, shapeless=True)


def linear(x: mx.array, weight: mx.array, bias: mx.array | None = None) -> mx.array:
    """x (..., I), weight (O, I), bias (O,) or None -> (..., O)."""
    if _compiled() and cpu.takes_product(x, weight, bias):
        return cpu.product(x, weight, bias)
    return mx.addmm(bias, x, weight.T) if bias is not None else x @ weight.T


def quantized_linear(x: mx.array, matrix: Packed, bias: mx.array | None = None) -> mx.array:
    """x (..., I) with a quantised matrix (O, I), bias (O,) -> (..., O)."""
    if _compiled() and cpu.takes_quantised(x, matrix):
        return cpu.quantised_product(x, matrix, bias)
    if _on_cpu() and (matrix.keeps_dequantised or x.size > x.shape[-1]):
        return linear(x, cpu.dequantised(matrix), bias)
    y = mx.quantized_matmul(
        x, matrix.weight, matrix.scales, getattr(matrix, "biases", None),
        group_size=matrix.group_size, bits=matrix.bits, mode=matrix.mode,
    )  # fmt: skip
    return y if bias is None else y + bias


def depthwise(x: mx.array, weight: mx.array, stride: int) -> mx.array:
    """Centred depthwise convolution, k odd: x (B, H, W, C), weight (C, k, k, 1) -> (B, ceil(H/s), ceil(W/s), C)."""
    if _on_cpu():
        return cpu.depthwise(x, weight, stride)
    reach = weight.shape[1] // 2
    if current() == "cpu":  # whose kernel writes outside maps smaller than its reach, unless they are padded before
        x, reach = mx.pad(x, [(0, 0), (reach, reach), (reach, reach), (0, 0)]), 0
    return mx.conv2d(x, weight, stride=stride, padding=reach, groups=x.shape[-1])


def attention(qkv: mx.array) -> mx.array:
    """Full softmax attention: qkv (B, 3 * heads, L, head_dim) -> (B, heads, L, head_dim), scale head_dim ** -0.5.

    On Metal a narrow head is filled up with zeros to the width of the fused kernel: zeros add nothing to a score, and
    the columns they produce are cut off again, so the result is the same.
    """
    head_dim = qkv.shape[-1]
    narrow = current() == "metal" and head_dim < FUSED_HEAD_DIM
    if narrow:
        qkv = mx.pad(qkv, [(0, 0)] * 3 + [(0, FUSED_HEAD_DIM - head_dim)])
    q, k, v = mx.split(qkv, 3, axis=1)
    if _compiled() and cpu.takes_attention(q, k):
        return cpu.attention(q, k, v, head_dim**-0.5)
    y = mx.fast.scaled_dot_product_attention(q, k, v, scale=head_dim**-0.5)
    return y[..., :head_dim] if narrow else y


def causal_attention(queries: mx.array, keys: mx.array, values: mx.array, mask: str | mx.array | None) -> mx.array:
    """Attention of a decoder, with scale head_dim ** -0.5.

    queries (B, heads, L, head_dim), keys and values (B, kv_heads, K, head_dim) -> (B, heads, L, head_dim). `mask` is
    "causal" (the queries are the last L of K positions), None (they see all) or an array, true where they see.
    """
    scale = queries.shape[-1] ** -0.5
    if mask == "causal" and _compiled() and cpu.takes_attention(queries, keys):
        return cpu.attention(queries, keys, values, scale, causal=True)
    return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask)
