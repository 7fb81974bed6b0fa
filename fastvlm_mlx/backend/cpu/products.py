"""Products, SwiGLU and attention as compiled programs whose weights are inputs: one program for the layers of all
models.

Weights are read where MLX has them: no copy is made, and a changed one counts at once. Each form has the gradient of
MLX's own operations.
"""

from functools import cache, partial
from typing import Any

import mlx.core as mx

from . import graphs
from .compiler import Program, library
from .gradients import Form, with_gradient_of
from .graphs import Graph

MIN_ELEMENTS = 1 << 18  # of a matrix; products with fewer are over before a program has been called
MIN_ACTIVATIONS = 1 << 16  # elements for whose SwiGLU MLX, which does not have to wait for them, is as fast
DTYPES = (mx.float32, mx.bfloat16)


def takes_product(x: mx.array, weight: mx.array, bias: mx.array | None) -> bool:
    """Whether a program is to multiply x with this matrix: it is large, and everything has one dtype of DTYPES."""
    same = weight.dtype == x.dtype and (bias is None or bias.dtype == x.dtype)
    return x.dtype in DTYPES and same and weight.size >= MIN_ELEMENTS


def product(x: mx.array, weight: mx.array, bias: mx.array | None) -> mx.array:
    """x (..., I) with weight (O, I), bias (O,) or None -> (..., O), evaluated."""
    rows = x.reshape(-1, x.shape[-1])
    y = _product(rows, weight) if bias is None else _product_and_bias(rows, weight, bias)
    return y.reshape(*x.shape[:-1], -1)


@with_gradient_of(lambda x, weight: x @ weight.T)
def _product(x: mx.array, weight: mx.array) -> mx.array:
    return _program(graphs.product, (2, 2), x.dtype)([x, weight])


@with_gradient_of(lambda x, weight, bias: x @ weight.T + bias)
def _product_and_bias(x: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
    return _program(graphs.product, (2, 2, 1), x.dtype)([x, weight, bias])


def takes_swiglu(x: mx.array) -> bool:
    """Whether a program is to compute the SwiGLU of x."""
    return x.dtype in DTYPES and x.size >= MIN_ACTIVATIONS


def swiglu(x: mx.array) -> mx.array:
    """silu(gate) * up, [gate, up] = x: (..., 2 * I) -> (..., I), evaluated."""
    return _swiglu(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)


def _gated(x: mx.array) -> mx.array:
    gate, up = mx.split(x, 2, axis=-1)
    return gate * mx.sigmoid(gate) * up


@with_gradient_of(_gated)
def _swiglu(x: mx.array) -> mx.array:
    return _program(graphs.swiglu, (2,), x.dtype)([x])


def takes_attention(queries: mx.array, keys: mx.array) -> bool:
    """Whether a program is to attend with these queries to these keys, of which there must be two."""
    return queries.dtype in DTYPES and queries.size >= MIN_ACTIVATIONS and keys.shape[2] > 1


def attention(queries: mx.array, keys: mx.array, values: mx.array, scale: float, *, causal: bool = False) -> mx.array:
    """softmax(queries @ keys.T * scale) @ values, evaluated.

    queries (B, heads, L, head_dim), keys and values (B, kv_heads, K, head_dim), heads a multiple of kv_heads ->
    (B, heads, L, head_dim). With `causal` the queries are the last L of K positions and see none after their own.
    """
    return _attention_form(scale, causal)(queries, keys, values)


@cache
def _attention_form(scale: float, causal: bool) -> Form:
    general = partial(mx.fast.scaled_dot_product_attention, scale=scale, mask="causal" if causal else None)
    return with_gradient_of(general)(partial(_attention, scale=scale, causal=causal))


def _attention(queries: mx.array, keys: mx.array, values: mx.array, *, scale: float, causal: bool) -> mx.array:
    shared = queries.shape[1] // keys.shape[1]
    if shared > 1:  # the program has keys and values for every head
        keys, values = mx.repeat(keys, shared, axis=1), mx.repeat(values, shared, axis=1)
    if not causal:
        return _program(_full_attention, (4, 4, 4), queries.dtype, scale)([queries, keys, values])
    L, K = queries.shape[2], keys.shape[2]
    seen = mx.arange(K) <= mx.arange(K - L, K)[:, None]
    mask = mx.where(seen, 0.0, -mx.inf).astype(queries.dtype)[None, None]
    return _program(graphs.attention, (4, 4, 4, 4), queries.dtype, scale)([queries, keys, values, mask])


def _full_attention(op: Any, q: Any, k: Any, v: Any, scale: float) -> Any:
    return graphs.attention(op, q, k, v, None, scale)


@cache
def _program(graph: Graph, axes: tuple[int, ...], dtype: mx.Dtype, *settings: float) -> Program:
    """The program of a graph whose inputs have so many axes, each of any length, and this dtype."""
    ov = library()
    inputs = [ov.opset13.parameter([-1] * count, graphs.type_of(dtype)) for count in axes]
    return Program(ov.Model([graph(ov.opset13, *inputs, *settings)], inputs, graph.__name__), dtype)
