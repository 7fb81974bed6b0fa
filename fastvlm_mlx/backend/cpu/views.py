"""NumPy's view of an array of MLX: the same memory, on the CPU."""

from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]


def memory_of(array: mx.array) -> npt.NDArray[Any]:
    """The memory of an array, evaluated, to read from; not a copy where its rows lie in order."""
    mx.eval(array)
    return np.asarray(array)


def own_memory_of(array: mx.array) -> npt.NDArray[Any]:
    """The memory of an array that nobody else has seen, to write to: what is written there is written into the
    array."""
    memory = memory_of(array)
    assert memory.flags.c_contiguous and memory.flags.writeable  # or parts of it would be copies
    return memory
