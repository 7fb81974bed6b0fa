"""What lets a short command begin and end sooner; nothing else may count on it.

An answer of `tiny` without each of these took, of what it takes with it (CPU seconds, and seconds on the clock; medians
of 30 pairs on two cores of an AMD EPYC):

    spare_threads       1.15  0.99   NumPy's threads look for work while they have none; it shows where no core is free
    for them without_collector   1.02  1.03 leave               1.03  1.04 OpenBLAS's threads begin after the imports
    (`backend.blas`): 1.02  0.99
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
    """Import without Python's garbage collector, which would look sixty times through what imports make and find nothing."""
    gc.disable()
    try:
        yield
        gc.freeze()  # and it need not be looked through later
    finally:
        gc.enable()


def leave(code: int) -> NoReturn:
    """End the process at once; freeing every module and array first, one by one, is what takes time."""
    with suppress(Exception):
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    os._exit(code)
