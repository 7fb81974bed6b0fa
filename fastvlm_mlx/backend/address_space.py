"""Whether a limit on this process's address space (`ulimit -v`) leaves room to answer.

What MLX and OpenBLAS start in the middle of work, threads and buffers, they cannot do without: where there is no room, OpenBLAS
asks for it for ever, and MLX ends the process. So the room is asked for before.
"""

import mmap
import sys

from ..errors import CheckpointError
from . import blas

MB = 1 << 20
BUFFER = 128 * MB  # that OpenBLAS takes for every thread that multiplies
THREAD = 72 * MB  # a thread's stack, and what the C library puts aside for its memory
MLX_THREADS = 192 * MB  # of the threads that read files and compute, few of which allocate
NORESERVE = 0x4000  # of Linux's mmap: addresses alone are asked for, whatever memory there is behind them
CALLERS = 2  # threads that call OpenBLAS: Python's and MLX's


def check_address_space(name: str, nbytes: int) -> None:
    """Raise CheckpointError where there is a limit that does not leave room for a model of `nbytes` bytes and its work on a CPU."""
    if sys.platform != "linux":
        return
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return
    needed = 2 * nbytes + MLX_THREADS  # what is read is in memory twice for a moment
    if blas.library is not None:
        needed += CALLERS * BUFFER + (blas.threads() - 1) * (BUFFER + THREAD)
    try:
        mmap.mmap(-1, needed, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE).close()
    except (OSError, ValueError, OverflowError) as error:
        raise CheckpointError(
            f"{name} takes about {needed / 1e9:.1f} GB of addresses beside what is in use, and the limit of this process is "
            f"{limit / 1e9:.1f} GB (ulimit -v); raise it, set OPENBLAS_NUM_THREADS to 1, or use a smaller model."
        ) from error
