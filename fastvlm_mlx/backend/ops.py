"""Which of MLX's backends computes, and the operations whose best form depends on it.

Model code calls these and reads the same everywhere; weights and folders are the same too.
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
    """Which forms this thread uses on a CPU."""

    general = False


_forms = _Forms()


@contextmanager
def general_forms() -> Iterator[None]:
    """Within the block, in this thread, compute on a CPU as on a GPU: by MLX's own operations alone.

    For training steps that are compiled (`mx.compile`) or vectorised (`mx.vmap`): the CPU's own forms evaluate their arguments,
    which neither allows. A step is built when it is first called with arguments of new shapes, so every call belongs into the
    block. Gradients are right with and without it.
    """
    before, _forms.general = _forms.general, True
    try:
        yield
    finally:
        _forms.general = before


def _on_cpu(backend: Backend) -> bool:
    """Whether to use the CPU's own form."""
    return backend == "cpu" and not _forms.general


def current() -> Backend:
    """The backend of MLX's default device."""
    if mx.default_device().type == mx.DeviceType.cpu:
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


def totals(arrays: Sequence[mx.array], backend: Backend) -> list[float]:
    """The sum of each array's values, which may overflow its type."""
    if backend == "cpu":
        return [cpu.total(array) for array in arrays]
    sums = [array.sum() for array in arrays]
    mx.eval(sums)
    return [float(each.item()) for each in sums]  # type: ignore[arg-type]


def gelu(x: mx.array, backend: Backend) -> mx.array:
    """GELU with erf, element by element."""
    if _on_cpu(backend) and x.dtype == mx.float32:
        return cpu.gelu(x)
    return nn.gelu(x)


def feed_forward(x: mx.array, fc1: nn.Module, fc2: nn.Module, backend: Backend) -> mx.array:
    """fc2(gelu(fc1(x))): x (..., I) -> (..., O)."""
    rows = x.reshape(-1, x.shape[-1])  # once, or each product would flatten its argument and shape it back
    on_cpu = _on_cpu(backend) and x.dtype == mx.float32
    y = cpu.feed_forward(rows, fc1, fc2) if on_cpu else fc2(gelu(fc1(rows), backend))
    return y.reshape(*x.shape[:-1], -1)


def swiglu(gate: mx.array, up: mx.array, backend: Backend) -> mx.array:
    """silu(gate) * up, element by element: one fused kernel on a GPU."""
    if not _on_cpu(backend):
        return _fused_swiglu(gate, up) if backend != "cpu" else _swiglu(gate, up)
    return cpu.swiglu(gate, up) if gate.dtype == mx.float32 and gate.size >= cpu.LITTLE else _swiglu(gate, up)


def _swiglu(gate: mx.array, up: mx.array) -> mx.array:
    return gate * mx.sigmoid(gate) * up


_fused_swiglu = mx.compile(_swiglu, shapeless=True)


def linear(x: mx.array, weight: mx.array, bias: mx.array | None, backend: Backend) -> mx.array:
    """x (..., I), weight (O, I), bias (O,) or None -> (..., O)."""
    if _on_cpu(backend) and x.size <= cpu.FEW_ROWS * x.shape[-1]:
        y = cpu.row_product(x, weight, bias)
        if y is not None:
            return y
    return mx.addmm(bias, x, weight.T) if bias is not None else x @ weight.T


def quantized_linear(x: mx.array, matrix: Packed, bias: mx.array | None, backend: Backend) -> mx.array:
    """x (..., I) with a quantised matrix (O, I), bias (O,) -> (..., O)."""
    if _on_cpu(backend) and (matrix.keeps_wide or x.size > x.shape[-1]):
        return linear(x, cpu.dequantised(matrix), bias, backend)
    y = mx.quantized_matmul(
        x, matrix.weight, matrix.scales, getattr(matrix, "biases", None),
        group_size=matrix.group_size, bits=matrix.bits, mode=matrix.mode,
    )  # fmt: skip
    return y if bias is None else y + bias


def depthwise(x: mx.array, weight: mx.array, stride: int, backend: Backend) -> mx.array:
    """Centred depthwise convolution: x (B, H, W, C), weight (C, k, k, 1), k odd -> (B, ceil(H/stride), ceil(W/stride), C)."""
    if _on_cpu(backend):
        return cpu.depthwise(x, weight, stride)
    reach = weight.shape[1] // 2
    if (
        backend == "cpu"
    ):  # where MLX's kernel writes outside maps that are smaller than its reach, unless they are padded before
        x, reach = mx.pad(x, [(0, 0), (reach, reach), (reach, reach), (0, 0)]), 0
    return mx.conv2d(x, weight, stride=stride, padding=reach, groups=x.shape[-1])


def attention(qkv: mx.array, backend: Backend) -> mx.array:
    """Full softmax attention: qkv (B, 3 * heads, L, head_dim) -> (B, heads, L, head_dim), scale head_dim ** -0.5.

    On Metal a narrow head is filled up with zeros to the width of the fused kernel: zeros add nothing to a score, and the
    columns they produce are cut off again, so the result is the same.
    """
    head_dim = qkv.shape[-1]
    narrow = backend == "metal" and head_dim < FUSED_HEAD_DIM
    if narrow:
        qkv = mx.pad(qkv, [(0, 0)] * 3 + [(0, FUSED_HEAD_DIM - head_dim)])
    q, k, v = mx.split(qkv, 3, axis=1)
    if _on_cpu(backend) and qkv.dtype == mx.float32:
        return cpu.attention(q, k, v, head_dim**-0.5)
    y = mx.fast.scaled_dot_product_attention(q, k, v, scale=head_dim**-0.5)
    return y[..., :head_dim] if narrow else y


def causal_attention(
    queries: mx.array, keys: mx.array, values: mx.array, mask: str | mx.array | None, backend: Backend
) -> mx.array:
    """Attention of a decoder: queries (B, heads, L, head_dim), keys and values (B, kv_heads, K, head_dim) -> as the queries.

    `mask` is "causal" (the queries are the last of the positions), None (they see all) or an array, true where they see.
    """
    scale = queries.shape[-1] ** -0.5
    if _on_cpu(backend) and mask == "causal" and queries.dtype == mx.float32:
        return cpu.attention(queries, keys, values, scale, causal=True)
    return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask)
