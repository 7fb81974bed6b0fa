"""Softmax attention on a CPU: BLAS for the products, NumPy for the exponentials, and never more than some of the
scores."""

from functools import cache, partial

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from .cores import pieces, share_out
from .gradients import Form, with_gradient_of
from .views import Array, own_memory_of

SCORES = 1 << 22  # at a time


def attention(queries: mx.array, keys: mx.array, values: mx.array, scale: float, *, causal: bool = False) -> mx.array:
    """softmax(queries @ keys.T * scale) @ values, float32.

    queries (B, heads, L, head_dim), keys and values (B, kv_heads, K, head_dim), heads a multiple of kv_heads ->
    (B, heads, L, head_dim). With `causal` the queries are the last L of K positions and see none after their own.
    """
    return _form(scale, causal)(queries, keys, values)


@cache
def _form(scale: float, causal: bool) -> Form:
    """Attention of arrays alone."""
    general = partial(mx.fast.scaled_dot_product_attention, scale=scale, mask="causal" if causal else None)
    return with_gradient_of(general)(partial(_attention, scale=scale, causal=causal))


def _attention(queries: mx.array, keys: mx.array, values: mx.array, *, scale: float, causal: bool) -> mx.array:
    B, _, L, head_dim = queries.shape
    kv_heads, K = keys.shape[1:3]
    queries = (queries * scale).reshape(B * kv_heads, -1, head_dim)  # heads that share their keys, one after another
    keys = keys.reshape(-1, K, head_dim).swapaxes(1, 2)
    values = values.reshape(-1, K, head_dim)
    rows = queries.shape[1]
    step = max(1, min(rows, SCORES // K))
    heads = max(1, SCORES // (rows * K))
    parts = []
    for head in range(0, len(queries), heads):
        some = slice(head, head + heads)
        strips = []
        for row in range(0, rows, step):
            last = (K - L + np.arange(row, min(row + step, rows)) % L) if causal else None
            strips.append(_strip(queries[some, row : row + step], keys[some], values[some], last))
        parts.append(mx.concatenate(strips, axis=1))
    return mx.concatenate(parts).reshape(B, -1, L, head_dim)


def _strip(queries: mx.array, keys: mx.array, values: mx.array, last: npt.NDArray[np.int_] | None) -> mx.array:
    """Queries (heads, R, head_dim) that each see keys (heads, head_dim, K) up to their `last` (R,) or all;
    evaluated."""
    scores = queries @ keys
    weights = own_memory_of(scores)
    K = weights.shape[-1]
    if last is not None:
        np.copyto(weights, -np.inf, where=np.arange(K) > last[:, None])
    sums = _exponentials(weights.reshape(-1, K)).reshape(*weights.shape[:2], 1)
    y = scores @ values / mx.array(sums)
    mx.eval(y)  # so that the next strip can have the memory
    return y


def _exponentials(scores: Array) -> Array:
    """Turn rows of scores (R, K) into exp(score - the row's largest), in place; returns their sums (R,)."""
    sums = np.empty(len(scores), np.float32)
    share_out(partial(_some_exponentials, scores, sums), pieces(*scores.shape))
    return sums


def _some_exponentials(scores: Array, sums: Array, rows: slice) -> None:
    part = scores[rows]
    with np.errstate(invalid="ignore"):  # what is not finite goes on as NaN
        part -= part.max(axis=-1, keepdims=True)
    np.exp(part, out=part)
    np.sum(part, axis=-1, out=sums[rows])
