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


class Place:
    """Where an array lies in memory. While this is kept, no other array can come to lie there."""

    def __init__(self, memory: npt.NDArray[Any]):
        self._memory = memory
        self._bounds = memory.ctypes.data, memory.nbytes

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Place) and self._bounds == other._bounds


def place_of(array: mx.array) -> Place:
    """The place of an array, evaluated: another after every change of the array, in place too."""
    return Place(memory_of(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array))  # NumPy has no bfloat16
