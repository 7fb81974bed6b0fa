"""A lock on a file to be written, held by one process at a time and given up with it, however it ends.

The lock is on a file beside it (".captions.jsonl.lock"), removed when it is given up. It is the system's `flock`: on
a network folder it holds between machines where the server passes locks on (NFS 4, and most of NFS 3), and where it
does not, `held` says so.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import OutputError, warn


class Lock:
    """The lock of one file. `take` and `release` in turn; `take` gives False where another process holds it."""

    def __init__(self, file: Path, suffix: str = ".lock"):
        self._path = file.with_name(f".{file.name}{suffix}")
        self._descriptor = -1

    def take(self, *, wait: bool = False) -> bool:
        """Take the lock; with `wait`, as soon as it is free. Raises OutputError where the folder cannot be written."""
        while True:
            try:
                descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            except OSError as error:
                raise OutputError(
                    f"{self._path.parent} cannot be written to ({error.strerror}); choose another `out`.",
                    path=self._path.parent,
                ) from error
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                os.close(descriptor)
                return False
            except OSError as error:
                warn(
                    f"{self._path.parent} is on a file system without locks ({error.strerror}); see to it that no two "
                    "runs of the same share write there."
                )
            except BaseException:
                os.close(descriptor)
                raise
            if _is_still(self._path, descriptor):
                self._descriptor = descriptor
                return True
            os.close(descriptor)  # whoever held it has removed the file

    def release(self) -> None:
        """Give the lock up; nothing where it is not held."""
        if self._descriptor >= 0:
            self._path.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = -1

    @property
    def taken(self) -> bool:
        """Whether another process holds it now."""
        if not self._path.exists():
            return False
        if self.take():
            self.release()
            return False
        return True


@contextmanager
def waited_for(file: Path) -> Iterator[None]:
    """A context manager that holds a file's lock for the short time that outputs are opened or put together."""
    lock = Lock(file, ".merge.lock")
    lock.take(wait=True)
    try:
        yield
    finally:
        lock.release()


def _is_still(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
