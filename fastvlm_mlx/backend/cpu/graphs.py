"""The parts of a network as OpenVINO has them: functions of an operation set `op` and of nodes, to a node.

Rows (R, I) are positions or pixels; weights are (O, I), constants or inputs.
"""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np

from .compiler import library

Graph = Callable[..., Any]


def type_of(dtype: mx.Dtype) -> Any:
    """The library's name of a dtype to compute in."""
    ov = library()
    return ov.Type.bf16 if dtype == mx.bfloat16 else ov.Type.f32


def product(op: Any, x: Any, weight: Any, bias: Any = None) -> Any:
    """x @ weight.T + bias: (R, I), bias (O,) or None -> (R, O)."""
    y = op.matmul(x, weight, False, True)
    return y if bias is None else op.add(y, bias)


def swiglu(op: Any, x: Any) -> Any:
    """silu(gate) * up, [gate, up] = x: (R, 2 * I) -> (R, I)."""
    gate, up = op.split(x, 1, 2).outputs()
    return op.multiply(op.multiply(gate, op.sigmoid(gate)), up)


def attention(op: Any, q: Any, k: Any, v: Any, mask: Any, scale: float) -> Any:
    """softmax(q @ k.T * scale + mask) @ v: q (B, heads, L, head_dim), k and v (B, heads, K, head_dim); mask or None."""
    zero, scaled = (op.convert_like(op.constant(np.float32(value)), q) for value in (0, scale))
    return op.scaled_dot_product_attention(q, k, v, zero if mask is None else mask, scaled)


def dequantised(op: Any, integers: Any, scales: mx.array, offsets: mx.array, of: Any) -> Any:
    """An affine matrix (O, I) as scales * integers + offsets (O, groups), integers a tensor (O, groups, group_size).

    Compiled into a product it stays as it is stored: it is turned into floats of type `of` while it is multiplied.
    """
    scale, offset = (np.array(array.astype(mx.float32))[..., None] for array in (scales, offsets))
    zero, scaled = (op.convert(op.constant(values), of) for values in (-offset / scale, scale))
    matrix = op.multiply(op.subtract(op.convert(op.constant(integers, shared_memory=True), of), zero), scaled)
    rows, groups, group_size = integers.shape
    return op.reshape(matrix, op.constant([rows, groups * group_size]), False)
