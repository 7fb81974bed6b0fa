"""What a network whose weights are in place still needs to answer fast on a CPU: memory, and quantised matrices in
float32."""

from collections.abc import Iterable
from typing import Any

import mlx.nn as nn
from mlx.utils import tree_flatten

from ..errors import warn
from . import blas, ops
from .cpu.memory import keep_memory, memory_bytes
from .cpu.packed import Packed, keep_dequantised

LARGE = 100_000_000  # parameters


def make_ready(model: nn.Module, packed: Iterable[Packed]) -> None:
    """Prepare a network for the default device; on a CPU, `packed` are its matrices to be kept in float32 as far as
    they fit."""
    if ops.current() != "cpu":
        return
    parameters: dict[str, Any] = dict(tree_flatten(model.parameters()))
    size = sum(array.size for array in parameters.values())
    if blas.is_slow() and size > LARGE:  # minutes where it could take seconds
        warn(f"This will be slow: {blas.status()}.")
    keep_dequantised(packed, memory_bytes())
    keep_memory()  # of activations only: what loading frees goes back
