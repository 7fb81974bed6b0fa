"""What a network whose weights are in place still needs to answer fast on a CPU: a compiler, programs, and memory."""

from collections.abc import Iterable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..errors import warn
from . import cpu, ops
from .cpu.packed import Packed

LARGE = 100_000_000  # elements of a network's arrays from which on programs are compiled for it
SLOW_BFLOAT16 = "This processor has no instructions for bfloat16; float32 is faster on it."
MISSING = "This will be slow: OpenVINO is not installed, which computes large models on a CPU (pip install openvino)."


def make_ready(model: nn.Module, packed: Iterable[Packed], dtype: mx.Dtype) -> None:
    """Prepare a network that computes in `dtype` for the default device; `packed` are its quantised matrices."""
    if ops.current() != "cpu":
        return
    parameters: dict[str, Any] = dict(tree_flatten(model.parameters()))
    matrices = list(packed)
    if sum(array.size for array in parameters.values()) >= LARGE:
        if cpu.load():
            if dtype == mx.bfloat16 and not cpu.has_bfloat16():
                warn(SLOW_BFLOAT16)
            cpu.prepare_tower(model.vision)
            matrices = cpu.compile_quantised(matrices, dtype)
        else:
            warn(MISSING)
    cpu.keep_dequantised(matrices, cpu.memory_bytes())
    cpu.keep_memory()  # of activations only: what loading frees goes back
