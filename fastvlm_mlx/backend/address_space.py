"""Whether a limit on this process's address space (`ulimit -v`) leaves room to answer.

What MLX and OpenBLAS start in the middle of work, threads and buffers, they cannot do without: where there is no room,
OpenBLAS asks for it for ever, and MLX ends the process. So the room is asked for before.
"""

import mmap
import re
import sys

from ..errors import CheckpointError, shown
from . import blas

MB = 1 << 20
BUFFER = 128 * MB  # that OpenBLAS takes for every thread that multiplies
THREAD = 72 * MB  # a thread's stack, and what the C library puts aside for its memory
MLX_THREADS = 192 * MB  # of the threads that read files and compute, few of which allocate
NORESERVE = 0x4000  # of Linux's mmap: addresses alone are asked for, whatever memory there is behind them
NO_ADDRESSES = re.compile(
    r"failed to map segment|cannot allocate memory|cannot apply additional memory|numpy C-extensions failed",
    re.IGNORECASE,
)  # what the system's loader and NumPy say
CALLERS = 2  # threads that call OpenBLAS: Python's and MLX's


def check_address_space(name: str, nbytes: int) -> None:
    """Raise CheckpointError where there is a limit that does not leave room for a model of `nbytes` bytes and its work
    on a CPU."""
    allowed = limit()
    if allowed is None:
        return
    needed = 2 * nbytes + MLX_THREADS  # what is read is in memory twice for a moment
    if blas.library is not None:
        needed += CALLERS * BUFFER + (blas.threads() - 1) * (BUFFER + THREAD)
    try:
        mmap.mmap(-1, needed, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE).close()
    except (OSError, ValueError, OverflowError) as error:
        raise CheckpointError(
            f"{name} takes about {needed / 1e9:.1f} GB of addresses beside what is in use, and the limit of this "
            f"process is {allowed / 1e9:.1f} GB (ulimit -v); raise it, set OPENBLAS_NUM_THREADS to 1, or use a smaller "
            "model."
        ) from error


def explained(error: BaseException) -> str | None:
    """One sentence for a library that found no room to be loaded under a limit; None for any other exception."""
    if not isinstance(error, ImportError) or not NO_ADDRESSES.search(str(error)) or limit() is None:
        return None
    return (
        f"The memory that this process may use (ulimit -v) is too little to load its libraries ({shown(str(error))}); "
        "raise the limit."
    )


def limit() -> int | None:
    """The addresses that this process may have, in bytes; None where nothing limits them."""
    if sys.platform != "linux":
        return None
    import resource

    allowed, _ = resource.getrlimit(resource.RLIMIT_AS)
    return None if allowed == resource.RLIM_INFINITY else allowed
