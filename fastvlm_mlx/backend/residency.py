"""Memory on Metal: weights that stay resident while something answers, the cache of freed buffers, errors found late.

Enters: the backend, and who answers. Leaves: limits of MLX's that are put back whatever fails. Elsewhere nothing is
done.
"""

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import mlx.core as mx

from .ops import Backend

CACHE_BYTES = 1_000_000_000  # of freed buffers that MLX keeps to be used again; its own limit is all of a Mac's memory


class _Wired:
    """The limit of memory that stays resident, raised while anything is answering or being held, in whichever
    thread."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # taken again where a holder is collected in the middle of a change
        self._users = 0
        self._before = 0

    def begin(self) -> None:
        """One more answer, or holder."""
        with self._lock:
            if self._users == 0:
                self._before = mx.set_wired_limit(int(mx.device_info()["max_recommended_working_set_size"]))
            self._users += 1

    def end(self, *, failed: bool = False) -> None:
        """One less; the limit from before is put back with the last one.

        Raises what the device has stored; where something `failed` before, that is what matters, and this is let go.
        """
        with self._lock:
            self._users -= 1
            if self._users > 0:
                return
            try:
                mx.synchronize()
            except Exception:
                if not failed:
                    raise
            finally:
                mx.set_wired_limit(self._before)


_WIRED = _Wired()


def _on_metal(backend: Backend) -> bool:
    return backend == "metal" and mx.metal.is_available()


@contextmanager
def wired(backend: Backend) -> Iterator[None]:
    """On Metal, keep the weights resident while answering, as mlx-lm does; the limit before is put back."""
    if not _on_metal(backend):
        yield
        return
    _WIRED.begin()
    try:
        yield
    except BaseException:
        _WIRED.end(failed=True)
        raise
    _WIRED.end()


def hold(owner: object, backend: Backend) -> None:
    """On Metal, keep the weights resident for as long as `owner` is there: between the answers of a session as well."""
    if not _on_metal(backend):
        return
    _WIRED.begin()
    weakref.finalize(
        owner, _WIRED.end, failed=True
    ).atexit = False  # raises nothing; what ends the process frees everything


def check_device(backend: Backend) -> None:
    """On Metal, wait for everything that is under way, and raise what has failed meanwhile.

    Reading an array tells of no error once its event is signalled (mlx/array.cpp, is_available): only this, or the next
    operation, does.
    """
    if _on_metal(backend):
        mx.synchronize()


def recover() -> None:
    """After an error of the device: take the one it has stored, which the next answer would meet, and free what can be
    freed."""
    with suppress(Exception):
        mx.synchronize()
    with suppress(Exception):
        mx.clear_cache()


def bound_cache(backend: Backend) -> None:
    """On a GPU, let MLX keep no more than CACHE_BYTES of freed buffers; a lower limit that is set already stays."""
    if backend == "cpu":
        return
    before = mx.set_cache_limit(CACHE_BYTES)
    if before < CACHE_BYTES:
        mx.set_cache_limit(before)


def working_set() -> int | None:
    """Bytes that the system recommends for a GPU's use at most; None where it says nothing of the kind."""
    size = mx.device_info().get("max_recommended_working_set_size")
    return None if size is None else int(size)
