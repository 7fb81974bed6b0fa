"""Files that a person or a downloaded folder names: only regular ones are opened, and never more is read than allowed.

A pipe, a socket or a device would block or never end; `/dev/zero` is not even opened. Small ones of our own are written
whole.
"""

import errno
import os
from pathlib import Path
from stat import S_ISDIR, S_ISREG


def read(path: Path, limit: int) -> bytes:
    """The content of a regular file of at most `limit` bytes; anything else raises OSError with a `strerror` for people."""
    _check(path.stat(), limit, path)
    # Not blocking, in case a pipe has taken the file's place since.
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        size = _check(os.fstat(file.fileno()), limit, path)
        return file.read(size)


def read_text(path: Path, limit: int) -> str:
    """The text of a regular file of at most `limit` bytes; raises OSError as `read` does, UnicodeDecodeError as `decoded` does."""
    return decoded(read(path, limit))


def decoded(data: bytes) -> str:
    """Text from UTF-8, without the byte order mark that Windows puts before it; raises UnicodeDecodeError for anything else."""
    return data.decode("utf-8-sig")


def write(path: Path, text: str) -> None:
    """Write a small file in UTF-8, in the place of one that may be there: all of it or nothing; raises OSError."""
    new = path.with_name(path.name + ".new")
    new.write_text(text, encoding="utf-8")
    new.replace(path)


def size_of(path: Path) -> int:
    """Bytes in a regular file; anything else raises OSError."""
    status = path.stat()
    return _check(status, status.st_size, path)


def _check(status: os.stat_result, limit: int, path: Path) -> int:
    if S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, "it is a folder", str(path))
    if not S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "it is a pipe, a socket or a device", str(path))
    if status.st_size > limit:
        raise OSError(errno.EFBIG, f"it holds {status.st_size:,} bytes, more than the {limit:,} allowed", str(path))
    return status.st_size
