"""What lets a short command begin and end sooner; nothing else here may count on it.

GAINS
"""

import atexit
import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

from ..backend import blas


def spare_threads() -> None:
    """Have NumPy's own OpenBLAS, which only very slim pictures are resized with, start without threads."""
    blas.spare_numpy()


@contextmanager
def without_collector() -> Iterator[None]:
    """For imports: what they make stays, and Python's garbage collector would look through it sixty times for nothing."""
    gc.disable()
    try:
        yield
        gc.freeze()  # and it need not be looked through later
    finally:
        gc.enable()


def leave(code: int) -> NoReturn:
    """End the process, but not piece by piece: freeing every module and array takes time."""
    with suppress(Exception):
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    os._exit(code)
