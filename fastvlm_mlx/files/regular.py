"""Reading regular files only, and never more than a given number of bytes.

The files are ones that a person or a downloaded folder names; a pipe, a socket or a device could block or never end.
Small files of our own are written atomically.
"""

import errno
import os
from pathlib import Path
from stat import S_ISDIR, S_ISREG


def read(path: Path, limit: int) -> bytes:
    """Read a regular file of at most `limit` bytes.

    Raises OSError, with a `strerror` fit for a message, for a larger file, a folder, a pipe, a socket or a device.
    """
    _check(path.stat(), limit, path)
    # O_NONBLOCK, in case a pipe has taken the file's place since the check.
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        size = _check(os.fstat(file.fileno()), limit, path)
        return file.read(size)


def read_text(path: Path, limit: int) -> str:
    """Read a regular file of at most `limit` bytes as UTF-8; raises OSError as `read` does, and UnicodeDecodeError."""
    return decoded(read(path, limit))


def decoded(data: bytes) -> str:
    """Decode UTF-8, dropping the byte order mark that Windows puts at the beginning; raises UnicodeDecodeError."""
    return data.decode("utf-8-sig")


def write(path: Path, text: str) -> None:
    """Write a small text file in UTF-8 atomically, replacing one that is there; raises OSError, with nothing left."""
    new = path.with_name(path.name + ".new")
    try:
        new.write_text(text, encoding="utf-8")
        new.replace(path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise


def size_of(path: Path) -> int:
    """Size in bytes of a regular file; raises OSError for anything else."""
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
