"""The machine's memory, and how the C library hands it out."""

import ctypes
import os
import sys
from contextlib import suppress


def memory_bytes() -> int:
    """The machine's memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def keep_memory() -> None:
    """Have the C library of Linux (glibc) keep what is freed: activations are as large as what it returns to the system
    at once, and getting it back costs a fault per page, a tenth to a third of a tower's time."""
    if sys.platform != "linux":
        return
    with suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(MMAP_THRESHOLD, 1 << 30)
        mallopt(TRIM_THRESHOLD, (1 << 31) - 1)


def give_back_memory() -> None:
    """Have the C library of Linux (glibc) return what is free now: compiling has freed as much as it has made."""
    if sys.platform != "linux":
        return
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # malloc.h
