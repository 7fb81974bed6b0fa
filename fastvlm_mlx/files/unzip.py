"""A model's ZIP archive -> its files in one flat folder; nothing else is ever written.

Everything an archive's directory can misstate is checked before the first byte is unpacked: names that lead out of the
folder, links, encryption, names that a file system treats as equal, sizes out of proportion to the archive. Folders
above the files are dropped.
"""

import errno
import hashlib
import io
import stat
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from unicodedata import normalize

from ..errors import CheckpointError, FastVLMError, about_its_path, listed, shown
from .paths import is_companion

MAX_FILES = 1000
MAX_DEPTH = 4
MAX_NAME_BYTES = 200  # bytes in UTF-8; file systems take 255
MAX_RATIO = 10  # bytes unpacked per byte packed, for all files together
SLACK_BYTES = 100_000_000  # allowed on top of that
MAX_READ_BYTES = 1 << 20  # bytes read at once; a directory of MAX_FILES takes less, and a larger one is not read
CHUNK_BYTES = 1 << 20
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
JUNK = ("__MACOSX", ".DS_Store", "Thumbs.db")  # what desktop systems leave in archives, and "._" before a name

Progress = Callable[[int, int], None]  # bytes unpacked, bytes in all


@dataclass(frozen=True)
class Contents:
    """What an archive holds, checked: its entries by the name their files get, and their size in bytes, unpacked."""

    path: Path
    files: dict[str, zipfile.ZipInfo]
    nbytes: int


@about_its_path
def read_contents(path: Path) -> Contents:
    """Check an archive's directory.

    Raises CheckpointError for anything but one folder of plain files with a config.json.
    """
    with _opened(path) as archive:
        entries = archive.infolist()
    if len(entries) > MAX_FILES:
        raise CheckpointError(f"{path}: it holds {len(entries)} files, a model has a few; fetch it again.")
    kept = [entry for entry in entries if not _is_junk(entry)]
    for entry in kept:
        _check_entry(path, entry)
    files = _named(path, [entry for entry in kept if not entry.is_dir()])
    nbytes, packed, size = sum(e.file_size for e in kept), sum(e.compress_size for e in kept), path.stat().st_size
    if packed > size:
        raise CheckpointError(
            f"{path}: its files overlap or take more than the archive itself, so it is forged; fetch it again."
        )
    if nbytes > MAX_RATIO * size + SLACK_BYTES:
        raise CheckpointError(
            f"{path}: it would unpack from {size:,} bytes to {nbytes:,}, which no weights do; fetch it again."
        )
    return Contents(path, files, sum(entry.file_size for entry in files.values()))


def unpack(contents: Contents, folder: Path, progress: Progress | None = None) -> dict[str, str]:
    """Write an archive's files into an empty folder; returns the SHA-256 of each by name.

    `progress` is called with the bytes unpacked and the bytes in all. Raises CheckpointError where a file's size or
    checksum disagrees with the directory, and OSError.
    """
    done, sums = 0, dict[str, str]()
    with _opened(contents.path) as archive:
        for name, entry in contents.files.items():
            left, digest = entry.file_size, hashlib.sha256()
            with archive.open(entry) as source, (folder / name).open("xb") as target:
                while data := source.read(CHUNK_BYTES):
                    left -= len(data)
                    done += len(data)
                    target.write(data)
                    digest.update(data)
                    if progress:
                        progress(done, contents.nbytes)
            if left:
                raise CheckpointError(
                    f"{contents.path}: {shown(name)} does not have the size that its entry states; fetch it again.",
                    path=contents.path,
                )
            sums[name] = digest.hexdigest()
    return sums


def _check_entry(path: Path, entry: zipfile.ZipInfo) -> None:
    name = entry.orig_filename
    parts = PurePosixPath(name.rstrip("/")).parts
    odd = (
        not name.isprintable()
        or "\\" in name
        or ":" in name
        or name.startswith("/")
        or ".." in name.split("/")
        or not parts
    )
    if odd or any(len(part.encode("utf-8", "replace")) > MAX_NAME_BYTES for part in parts):
        raise CheckpointError(f"{path}: {shown(name)} is no name of a file below the archive's folder; fetch it again.")
    if len(parts) > MAX_DEPTH:
        raise CheckpointError(
            f"{path}: {shown(name)} lies {len(parts)} folders deep, expected a folder of files; fetch it again."
        )
    file_type = stat.S_IFMT(entry.external_attr >> 16)
    if file_type not in (0, stat.S_IFREG, stat.S_IFDIR) or (file_type == stat.S_IFDIR and entry.file_size):
        raise CheckpointError(f"{path}: {shown(name)} is a link or a device, expected files only; fetch it again.")
    if entry.flag_bits & 1:
        raise CheckpointError(
            f"{path}: {shown(name)} is encrypted; expected an archive without a password; fetch it again."
        )
    if entry.compress_type not in METHODS:
        raise CheckpointError(f"{path}: {shown(name)} is packed in a way Apple's archives are not; fetch it again.")


def _named(path: Path, entries: list[zipfile.ZipInfo]) -> dict[str, zipfile.ZipInfo]:
    """Entries by file name, of the folder that holds config.json; files in folders below or beside it are left out."""
    paths = [PurePosixPath(entry.orig_filename) for entry in entries]
    homes = {member.parent for member in paths if member.name == "config.json"}
    if not homes:
        raise CheckpointError(f"{path}: no config.json in it, so it is not a model; check the name, or fetch it again.")
    home, *others = sorted(homes, key=lambda folder: len(folder.parts))
    if others and len(others[0].parts) == len(home.parts):
        raise CheckpointError(
            f"{path}: there is more than one model in it, {listed(sorted(map(str, homes)))}; unpack it yourself."
        )
    files = {member.name: entry for member, entry in zip(paths, entries, strict=True) if member.parent == home}
    same: dict[str, list[str]] = {}
    for member in paths:
        same.setdefault(normalize("NFC", str(member)).casefold(), []).append(str(member))
    twice = [names[0] for names in same.values() if len(names) > 1]
    if twice:
        raise CheckpointError(f"{path}: {listed(twice)} are in it twice (capitals do not count); fetch it again.")
    inner = {str(parent) for member in paths for parent in member.parents}
    both = [str(member) for member in paths if str(member) in inner]
    if both:
        raise CheckpointError(f"{path}: {listed(both)} are files and folders at once; fetch it again.")
    return files


def _is_junk(entry: zipfile.ZipInfo) -> bool:
    parts = entry.orig_filename.split("/")
    return parts[0] in JUNK or parts[-1] in JUNK or is_companion(parts[-1])


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    """The open archive; whatever zipfile raises for a damaged one is raised as a CheckpointError."""
    try:
        with Bounded(path) as file, zipfile.ZipFile(file) as archive:
            yield archive
    except (FastVLMError, MemoryError):
        raise
    except Exception as error:  # of several classes, from zipfile, zlib and struct
        if isinstance(error, OSError) and error.errno not in (
            None,
            errno.EINVAL,
        ):  # an error of the disk, not of the archive
            raise
        reason = str(error)[:100] or type(error).__name__
        raise CheckpointError(f"{path}: damaged, or no ZIP archive ({shown(reason)}); fetch it again.") from error


class Bounded(io.FileIO):
    """A file for zipfile that never reads more than MAX_READ_BYTES at once.

    zipfile reads an archive's directory at once, of whatever size the archive states.
    """

    def read(self, size: int | None = -1, /) -> bytes:
        """Up to `size` bytes."""
        if size is not None and size > MAX_READ_BYTES:
            raise zipfile.BadZipFile(f"a directory of {size:,} bytes")
        return super().read(MAX_READ_BYTES if size is None or size < 0 else size) or b""
