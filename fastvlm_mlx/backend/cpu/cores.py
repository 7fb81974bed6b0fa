"""Every core: MLX's CPU backend runs all but matrix products on one thread, so work is cut into pieces for several.

`streams` are for MLX's own operations, each stream a thread; `share_out` is for NumPy's, which let go of Python's lock
while they compute.
"""

import os
import threading
from collections.abc import Callable, Iterable
from functools import cache
from typing import TYPE_CHECKING, TypeVar

import mlx.core as mx

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

Piece = TypeVar("Piece")
Result = TypeVar("Result")

MAX_STREAMS = 4
FEW = 4  # pieces; fewer are done before the threads have started
PIECE = 1 << 17  # elements at a time: enough to make up for handing them over, few enough for the processor's cache


@cache
def count() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def streams() -> list[mx.Stream]:
    """One stream of MLX's CPU backend per core, at most MAX_STREAMS, the default one first.

    They belong to the Python thread that asks, and MLX keeps them when it has ended.
    """
    if not hasattr(_thread, "streams"):
        more = min(count(), MAX_STREAMS) - 1
        _thread.streams = [mx.default_stream(mx.cpu), *(mx.new_stream(mx.cpu) for _ in range(more))]
    found: list[mx.Stream] = _thread.streams
    return found


_thread = threading.local()


def share_out(function: Callable[[Piece], None], pieces: Iterable[Piece]) -> None:
    """Call `function` for every piece, on all cores where there are some and FEW pieces or more; raises what it
    raises."""
    waiting = list(pieces)
    if len(waiting) < FEW or count() == 1:
        for piece in waiting:
            function(piece)
    else:
        list(pool().map(function, waiting))


def in_background(function: "Callable[[], Result]") -> "Future[Result]":
    """Begin to call a function in another thread."""
    return pool().submit(function)


@cache
def pool() -> "ThreadPoolExecutor":
    """The threads that share out work, as many as there are cores; started when first asked for."""
    from concurrent.futures import ThreadPoolExecutor

    return ThreadPoolExecutor(count(), "fastvlm-mlx-core")


def pieces(rows: int, width: int) -> list[slice]:
    """Rows of `width` elements each, cut into some PIECE elements at a time."""
    step = max(1, PIECE // width)
    return [slice(start, start + step) for start in range(0, rows, step)]
