"""GELU and SwiGLU by NumPy's exponential, and an MLP that applies GELU while its input is still in the processor's
cache."""

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .cores import pieces, share_out
from .gradients import with_gradient_of
from .views import Array, memory_of, own_memory_of

# GELU(x) = x * Phi(x), and Phi(x) = 1 / (1 + exp(x * P(x^2))) where P falls for good. Coefficients, the highest power
# first, by iteratively reweighted least squares on GELU's own error: at most 7e-8 before rounding to float32.
LOGIT = np.array(
    [-3.6279945e-09, 2.6757265e-07, -7.9482429e-06, 1.10547518e-04, 6.6050890e-05, -7.26682948e-02, -1.595768538],
    np.float32,
)
# Elements between the two layers of an MLP at a time: they stay in the processor's cache, and BLAS has its fill.
HIDDEN = 1 << 21
MIN_ROWS = 256  # but at least so many rows, below which products slow down
LITTLE = 1 << 14  # elements for whose SwiGLU MLX, which does not have to wait for them, is as fast


@with_gradient_of(nn.gelu)
def gelu(x: mx.array) -> mx.array:
    """Exact GELU (the one with erf) of a float32 array of one axis or more; within 2e-7 * max(1, |x|)."""
    return _apply(_gelu, x)


@with_gradient_of(lambda gate, up: gate * mx.sigmoid(gate) * up)
def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """silu(gate) * up, float32 arrays of one shape."""
    return _apply(_swiglu, gate, up)


def feed_forward(x: mx.array, fc1: nn.Module, fc2: nn.Module) -> mx.array:
    """fc2(gelu(fc1(x))) for x (R, I), some rows at a time; each is finished before the next, which then can have its
    memory."""
    plain = _is_plain(fc1) and _is_plain(fc2)
    weights = [fc1["weight"], fc1["bias"], fc2["weight"], fc2["bias"]] if plain else []
    step = max(MIN_ROWS, HIDDEN // (len(weights[0]) if plain else 4 * x.shape[-1]))
    parts = []
    for start in range(0, len(x), step):
        rows = x[start : start + step]
        parts.append(_feed_forward(rows, *weights) if plain else fc2(gelu(fc1(rows))))
        mx.eval(parts[-1])
    return mx.concatenate(parts) if len(parts) > 1 else parts[0]


def _is_plain(layer: nn.Module) -> bool:
    """Whether a layer is x @ weight.T + bias and nothing else: a class derived from it, such as an adapter's, does
    more."""
    return getattr(type(layer), "is_plain", False) is True and layer.keys() == {"weight", "bias"}


@with_gradient_of(lambda x, w1, b1, w2, b2: nn.gelu(x @ w1.T + b1) @ w2.T + b2)
def _feed_forward(x: mx.array, w1: mx.array, b1: mx.array, w2: mx.array, b2: mx.array) -> mx.array:
    hidden = mx.addmm(b1, x, w1.T)
    share_out(lambda piece: _gelu(piece, out=piece), _cut(own_memory_of(hidden)))  # in place: nobody else has seen it
    return mx.addmm(b2, hidden, w2.T)


def _apply(function: Callable[..., None], *arguments: mx.array) -> mx.array:
    """A function applied element by element to float32 arrays of one shape."""
    y = mx.zeros(arguments[0].shape, mx.float32)
    parts = zip(*(_cut(memory_of(argument)) for argument in arguments), _cut(own_memory_of(y)), strict=True)
    share_out(lambda part: function(*part[:-1], out=part[-1]), parts)
    return y


def _cut(values: Array) -> list[Array]:
    """Some of its rows at a time."""
    if not values.size:
        return []
    rows = values.reshape(-1, values.shape[-1]) if values.ndim > 1 else values
    return [rows[some] for some in pieces(len(rows), rows.size // len(rows))]


def _gelu(x: Array, out: Array) -> None:
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows is on its way to 0 or x
        square = x * x
        logit = square * LOGIT[0]
        for coefficient in LOGIT[1:-1]:
            logit += coefficient
            logit *= square
        logit += LOGIT[-1]
        logit *= x
        _logistic(x, logit, out)


def _swiglu(gate: Array, up: Array, out: Array) -> None:
    with np.errstate(over="ignore", invalid="ignore"):
        _logistic(gate, -gate, out)
    out *= up


def _logistic(x: Array, logit: Array, out: Array) -> None:
    """x / (1 + exp(logit)); `logit` is used up."""
    np.exp(logit, out=logit)
    logit += 1
    np.divide(x, logit, out=out)
