"""The sum of an array, which MLX adds up one value at a time on one core, and NumPy many at a time."""

import mlx.core as mx
import numpy as np

from .views import memory_of


def total(array: mx.array) -> float:
    """The sum of all elements of a floating-point array, which may overflow its dtype."""
    if array.dtype == mx.bfloat16:  # which NumPy does not have
        return float(array.sum().item())  # type: ignore[arg-type]
    with np.errstate(over="ignore", invalid="ignore"):
        return float(memory_of(array).sum())
