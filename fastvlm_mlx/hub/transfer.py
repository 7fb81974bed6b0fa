"""Download of one large file over HTTP, which continues after an interruption, in the same run or in a later one.

Received bytes are kept in NAME.part, and what the server said of the file in NAME.part.json. A later request asks for
the remaining bytes of that version of the file (Range, If-Range), and gets all of it if it has changed. Every address
has to be https, but for servers on this machine.
"""

import fcntl
import http.client
import json
import os
import shutil
import ssl
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any
from urllib.error import HTTPError, URLError
from urllib.parse import urljoin, urlsplit
from urllib.request import (
    HTTPDefaultErrorHandler,
    HTTPErrorProcessor,
    HTTPHandler,
    HTTPSHandler,
    OpenerDirector,
    ProxyHandler,
    Request,
)

from ..errors import HubError, shown
from ..files import regular as files
from ..version import __version__

TIMEOUT_SECONDS = 30.0  # seconds without a byte
WAIT_SECONDS = (1.0, 2.0, 4.0, 8.0)  # seconds before each further attempt that follows one without progress
MIN_PROGRESS_BYTES = 1 << 16  # bytes of an attempt that count as progress
MAX_REDIRECTS = 5
MAX_DOWNLOAD_BYTES = 40_000_000_000  # bytes; the largest archive, 7B in bfloat16, takes about 15 GB
CHUNK_BYTES = 1 << 20
LOOPBACK = ("127.0.0.1", "::1", "localhost")

Progress = Callable[[int, int | None], None]  # bytes received; bytes in all, None where the server does not say


@dataclass(frozen=True)
class Origin:
    """What a partial file is the beginning of: address, version, and size in bytes where the server says it.

    `tag` is the server's strong ETag, or else the time of the last change.
    """

    url: str
    tag: str
    size: int | None


class Interrupted(Exception):
    """A connection could not be made or ended early; trying again may help."""


def size_of(url: str) -> int | None:
    """Size of a file in bytes, None where the server does not say; raises HubError where the file cannot be reached."""
    try:
        with _request(url, "HEAD", {}) as response:
            return _length(response.headers.get("Content-Length"))
    except Interrupted as error:
        raise HubError(f"{url} cannot be reached ({error}); check the connection and try again.") from error


def fetch(url: str, path: Path, progress: Progress | None = None) -> None:
    """Download a file to `path`, continuing where an earlier run stopped.

    `progress` is called with the bytes received and the bytes in all. Raises HubError where the file cannot be read or
    the connection keeps breaking; received bytes are kept then.
    """
    part = path.with_name(path.name + ".part")
    with _only_one(part) as file:
        failures, furthest = 0, 0
        while (reason := _go_on(url, file, part, progress)) is not None:
            have = os.fstat(file.fileno()).st_size
            if have >= furthest + MIN_PROGRESS_BYTES:
                failures, furthest = 0, have
            elif failures == len(WAIT_SECONDS):
                raise HubError(
                    f"The download of {url} keeps being interrupted ({reason}); {have:,} bytes of it are kept. Check "
                    "the connection and try again; it continues from there."
                )
            else:
                time.sleep(WAIT_SECONDS[failures])
                failures += 1
        part.rename(path)
        _notes(part).unlink(missing_ok=True)


@contextmanager
def _only_one(part: Path) -> Iterator[IO[bytes]]:
    """A context manager with the partial file, open and locked; raises HubError while another process has it."""
    part.parent.mkdir(parents=True, exist_ok=True)
    with os.fdopen(os.open(part, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644), "r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise HubError(f"{part.stem} is being downloaded by another process; wait for it and try again.") from error
        except OSError:  # a file system without locks
            pass
        # It may have been renamed before it was locked.
        if not part.exists() or not os.path.samestat(os.fstat(file.fileno()), part.stat()):
            raise HubError(f"{part.stem} was downloaded by another process just now; try again.")
        yield file


def _go_on(url: str, file: IO[bytes], part: Path, progress: Progress | None) -> str | None:
    """Make one request for the missing bytes; returns why some are still missing, or None when all are there."""
    origin = _read_notes(part)
    have = os.fstat(file.fileno()).st_size if origin is not None and origin.url == url else 0
    if origin is not None and have and have == origin.size:
        return None
    asked = {"Range": f"bytes={have}-", "If-Range": origin.tag} if origin is not None and have else {}
    try:
        with _request(url, "GET", asked) as response:
            start, size = _answered(response, url, have if asked else 0)
            if start and origin is not None and size != origin.size:  # a part of another file
                _forget(file, part)
                return "the file has changed"
            _check_room(url, part, start, size)
            file.seek(start)
            file.truncate()
            _write_notes(part, Origin(url, _tag(response), size))
            _receive(response, file, start, size, progress)
    except _Unsatisfiable:
        _forget(file, part)
        return "the file is shorter now"
    except Interrupted as error:
        return str(error)
    return None


def _receive(response: Any, file: IO[bytes], start: int, size: int | None, progress: Progress | None) -> None:
    """Write the response's bytes after the first `start` ones, up to `size`.

    Raises Interrupted where some are missing.
    """
    have, limit = start, MAX_DOWNLOAD_BYTES if size is None else size
    while have < limit:
        try:
            data = response.read1(min(CHUNK_BYTES, limit - have))
        except (OSError, http.client.HTTPException) as error:
            file.flush()  # received bytes are kept
            raise Interrupted(_reason(error)) from error
        if not data:
            break
        file.write(data)
        have += len(data)
        if progress:
            progress(have, size)
    file.flush()
    if size is None and have == MAX_DOWNLOAD_BYTES:
        raise HubError(
            f"The server sends more than {MAX_DOWNLOAD_BYTES:,} bytes without end, which is no model; check the "
            "address."
        )
    if have < size if size is not None else have == start:  # without a size, an empty body may be a broken response
        raise Interrupted("the connection was closed")


class _Unsatisfiable(Exception):
    """The server has no bytes after those that are kept."""


def _answered(response: Any, url: str, have: int) -> tuple[int, int | None]:
    """The (first byte, size of the whole file) that a response to a request for the bytes from `have` on contains."""
    encoding = response.headers.get("Content-Encoding", "identity")
    if encoding != "identity":
        raise HubError(
            f"{url} comes encoded as {shown(encoding)}, expected it as it is; check the address or the proxy."
        )
    if response.status == 200:
        return 0, _length(response.headers.get("Content-Length"))
    span = response.headers.get("Content-Range", "")
    unit, _, rest = span.partition(" ")
    place, _, whole = rest.partition("/")
    first, _, last = place.partition("-")
    size = _length(whole)
    if (
        response.status == 206
        and unit == "bytes"
        and size is not None
        and first == str(have)
        and last == str(size - 1)
        and have
    ):
        return have, size
    raise HubError(
        f"{url} was answered with status {response.status} and range {shown(span)}, expected the bytes from {have} on; "
        "try again later."
    )


def _length(text: str | None) -> int | None:
    return int(text) if text is not None and text.isascii() and text.isdigit() and len(text) < 19 else None


def _tag(response: Any) -> str:
    """The server's strong ETag, else the time of the last change, else "", without which nothing can be continued."""
    tag = response.headers.get("ETag", "")
    if tag and not tag.startswith("W/"):
        return str(tag)
    return str(response.headers.get("Last-Modified", ""))


def _check_room(url: str, part: Path, start: int, size: int | None) -> None:
    if size is None:
        return
    if size > MAX_DOWNLOAD_BYTES:
        raise HubError(f"{url} has {size:,} bytes, more than any FastVLM; check the address.")
    free = shutil.disk_usage(part.parent).free
    if size - start > free:
        raise HubError(
            f"{part.parent} has {free / 1e9:.1f} GB free, the rest of {part.stem} takes {(size - start) / 1e9:.1f} "
            "GB; make room, or set FASTVLM_CACHE to a folder with more."
        )


def _request(url: str, method: str, headers: dict[str, str]) -> Any:
    """The open response, of status 2xx, after following safe redirects.

    Raises HubError, Interrupted or _Unsatisfiable.
    """
    headers = {"User-Agent": f"fastvlm-mlx/{__version__}", "Accept-Encoding": "identity", **headers}
    first = url
    for _ in range(MAX_REDIRECTS + 1):
        check_address(url, first)
        try:
            return _opener().open(Request(url, method=method, headers=headers), timeout=TIMEOUT_SECONDS)
        except HTTPError as error:
            location = error.headers.get("Location")
            error.close()
            if error.code in (301, 302, 303, 307, 308) and location:
                url = _joined(url, location)
                continue
            if error.code == 416 and "Range" in headers:
                raise _Unsatisfiable from error
            if error.code in (408, 429) or error.code >= 500:
                raise Interrupted(f"HTTP {error.code}") from error
            raise HubError(f"{first} cannot be downloaded (HTTP {error.code}); check the name.") from error
        except (URLError, OSError, http.client.HTTPException, ValueError) as error:
            raise Interrupted(_reason(error)) from error
    raise HubError(f"{first} leads from one address to the next without end; check it.")


@cache
def _opener() -> OpenerDirector:
    """Opens http and https, through the proxy that the environment names; follows no redirects by itself."""
    opener = OpenerDirector()
    for handler in (
        ProxyHandler(),
        HTTPHandler(),
        HTTPSHandler(context=_tls()),
        HTTPDefaultErrorHandler(),
        HTTPErrorProcessor(),
    ):
        opener.add_handler(handler)
    return opener


def _joined(url: str, location: str) -> str:
    try:
        return urljoin(url, location)
    except ValueError:
        return location  # not an address; `_check_address` will refuse it


def check_address(url: str, first: str) -> None:
    """Raise HubError unless an address is https, or is on this machine as the first address was."""
    try:
        parts = urlsplit(url)
        local = all(urlsplit(each).hostname in LOOPBACK for each in (url, first))
        safe = parts.scheme == "https" or (parts.scheme == "http" and local)
        safe = safe and bool(parts.hostname) and parts.username is None and url.isprintable() and " " not in url
    except ValueError:
        safe = False
    if not safe:
        way = f"{shown(first)} leads to {shown(url)}" if url != first else shown(url)
        raise HubError(f"{way}, which is not a plain https address, so it is not followed; check where it is from.")


def _tls() -> ssl.SSLContext:
    """Certificates are checked with the system's store; on macOS by the system, as Python may come without any."""
    if sys.platform == "darwin":
        try:
            import truststore

            return truststore.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        except ImportError:
            pass
    return ssl.create_default_context()


def _reason(error: Exception) -> str:
    inner = getattr(error, "reason", error)
    return str(getattr(inner, "strerror", None) or inner)[:200] or type(error).__name__


def _notes(part: Path) -> Path:
    return part.with_name(part.name + ".json")


def _read_notes(part: Path) -> Origin | None:
    """What is known of the file that `part` begins; None where it is not enough to continue."""
    try:
        origin = Origin(**json.loads(files.read(_notes(part), 10_000)))
        right = isinstance(origin.url, str) and isinstance(origin.tag, str) and isinstance(origin.size, int)
        return origin if right and origin.tag.isprintable() and origin.tag else None
    except (OSError, ValueError, TypeError):
        return None


def _write_notes(part: Path, origin: Origin) -> None:
    files.write(_notes(part), json.dumps(asdict(origin)))


def _forget(file: IO[bytes], part: Path) -> None:
    file.seek(0)
    file.truncate()
    _notes(part).unlink(missing_ok=True)
