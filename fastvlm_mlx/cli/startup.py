"""Measures that let a short command begin and end sooner; everything works without them.

What an answer of `tiny` takes without each, relative to with it (CPU time, and elapsed time; medians of 30 pairs on two
cores of an AMD EPYC):

    spare_threads       1.15  0.99   NumPy's idle threads look for work; it matters where no core is free for them
    without_collector   1.02  1.03
    leave               1.03  1.04
    OpenBLAS's threads begin after the imports (`backend.blas`): 1.02  0.99
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
    """Have NumPy's own OpenBLAS start without threads; only very narrow pictures are resized with it."""
    blas.spare_numpy()


@contextmanager
def without_collector() -> Iterator[None]:
    """A context manager for imports with Python's garbage collector off, which would find nothing to free."""
    gc.disable()
    try:
        yield
        gc.freeze()  # what was imported is never searched for garbage
    finally:
        gc.enable()


def leave(code: int) -> NoReturn:
    """End the process at once; freeing every module and array first is what takes time."""
    with suppress(Exception):
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    os._exit(code)
