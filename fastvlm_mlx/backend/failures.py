"""What MLX raises where a device fails, told apart by its message and said in one sentence.

MLX has one class for all of it, RuntimeError. Its messages begin with where they come from: "[metal::malloc] Attempting
to allocate ...", "[malloc] Unable to allocate ..." (mlx/backend/*/allocator.cpp), "[METAL] Command buffer execution
failed: Insufficient Memory ..." (mlx/backend/metal/device.cpp), "cudaMalloc(...) failed: out of memory"
(mlx/backend/cuda/utils.cpp). Nothing here imports MLX.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import DeviceError, FastVLMError, OutOfMemoryError, shown

NOT_ENOUGH_MEMORY = "There is not enough memory; use a smaller model, `bits=4` or a lower `resolution`."
OUT_OF_MEMORY = re.compile(
    r"malloc\]|out ?of ?memory|insufficient memory|(unable to|cannot) allocate|bad_alloc", re.IGNORECASE
)
MLX = re.compile(r"\[[\w:. ]+\] |There is no Stream\(")
DEVICE = re.compile(r"^\[(metal|cuda|gpu|event|fence|residency)\b|^cu\w*\(.* failed: ", re.IGNORECASE)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception, MLX's or another's, says that the memory ran out."""
    if isinstance(error, MemoryError):
        return True
    return type(error) is RuntimeError and OUT_OF_MEMORY.search(str(error)) is not None


def explained(error: BaseException) -> FastVLMError | None:
    """The error of this package that says what an exception of MLX's means; None for one of this package, and for a
    fault in a program, which is left as it is."""
    if isinstance(error, FastVLMError):
        return None
    if is_out_of_memory(error):
        return OutOfMemoryError(NOT_ENOUGH_MEMORY)
    if type(error) is RuntimeError and DEVICE.match(str(error)):
        return DeviceError(
            f"The device that computes failed ({shown(str(error))}); close other programs and try again."
        )
    return None


def of_mlx(error: BaseException) -> str | None:
    """One sentence for any other exception of MLX's that ends a command; None for one that is not MLX's."""
    message = str(error)
    if not isinstance(error, (RuntimeError, ValueError)) or not MLX.match(message):
        return None
    return (
        f"MLX failed ({shown(message)}); try `dtype='float32'`, another model, or the newest mlx (pip install -U mlx)."
    )


def spoils(error: BaseException) -> bool:
    """Whether what was being computed when it was raised may lie unfinished in memory, and must not be used again.

    True of all that comes out of MLX; false of an interrupt, of a reader who leaves, and of what this package refuses.
    """
    refused = isinstance(error, FastVLMError) and not isinstance(error, DeviceError)
    return isinstance(error, Exception) and not refused


@contextmanager
def explaining() -> Iterator[None]:
    """Within the block, raise what an exception of MLX's means (`explained`) in its place."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        meant = explained(error)
        if meant is None:
            raise
        raise meant from error
