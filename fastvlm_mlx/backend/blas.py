"""OpenBLAS for MLX's CPU backend on Linux: importing the package loads it, since it has to come before MLX.

That is the one global effect of the import (loading a model for a CPU has another, `cpu.keep_memory`).

MLX's Linux wheel carries the reference BLAS, at about 3 GFLOP/s on two cores; the same symbols from OpenBLAS, put into
the process first, take their place at about 135. Nothing happens on macOS, where MLX uses Accelerate and Metal, nor
where OpenBLAS is not installed: everything still runs, slowly, and `status` says what to install.
"""

import ctypes
import os
import sys

LIBRARIES = ("libopenblas.so.0", "libopenblas.so")
THREADS = ("OPENBLAS_NUM_THREADS", "GOTO_NUM_THREADS", "OMP_NUM_THREADS")  # any of them says how many OpenBLAS may use
HINT = "install OpenBLAS (Debian, Ubuntu: apt-get install libopenblas0-pthread; Fedora: dnf install openblas)"

library: ctypes.CDLL | None = None  # OpenBLAS, where it was loaded
_state = "not used"
_waits = False  # with one thread, for `start_threads`
_spared = False  # whether NumPy is to start no threads either


def preload() -> None:
    """Load OpenBLAS so that MLX finds it; does nothing elsewhere than on Linux, or once MLX is already in the
    process."""
    global library, _state, _waits
    if sys.platform != "linux" or _state != "not used":
        return
    if "mlx.core" in sys.modules and "openblas" not in os.environ.get("LD_PRELOAD", ""):
        _state = "too late"
        return
    chosen = _is_chosen()
    if not chosen:
        os.environ[THREADS[0]] = "1"
    try:
        for name in LIBRARIES:
            try:
                library = ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
            except OSError:
                continue
            _state = "loaded"
            _waits = not chosen
            return
    finally:
        if not chosen:
            del os.environ[THREADS[0]]
    _state = "missing"


def spare_numpy() -> None:
    """In a process that is all ours: have NumPy's own OpenBLAS, which only very slim pictures are resized with, start
    without threads; `start_threads` takes the setting back."""
    global _spared
    if not _is_chosen() and "numpy" not in sys.modules:
        os.environ[THREADS[0]] = "1"
        _spared = True


def start_threads() -> None:
    """Let OpenBLAS use every core, unless the environment says how many; called once the imports are over.

    Its threads look for work without pause when they are new, and would slow down whatever is imported next by half.
    """
    global _waits, _spared
    if _spared:
        os.environ.pop(THREADS[0], None)
    if _waits and library is not None:
        library.openblas_set_num_threads(library.openblas_get_num_procs())
    _waits = _spared = False


def threads() -> int:
    """How many threads OpenBLAS uses; 1 where it was not loaded."""
    return int(library.openblas_get_num_threads()) if library is not None else 1


def _is_chosen() -> bool:
    return any(name in os.environ for name in THREADS)


def is_slow() -> bool:
    """Whether matrix products run on the reference BLAS."""
    return _state in ("missing", "too late")


def status() -> str:
    """One line for people: what computes matrix products on the CPU, and what to do where that is slow."""
    return {
        "loaded": "OpenBLAS",
        "not used": "the platform's own",
        "missing": f"reference BLAS, about 45 times slower: {HINT}",
        "too late": "reference BLAS, about 45 times slower: import fastvlm_mlx before mlx",
    }[_state]
