"""Digests of a model folder's files: written to and read from SHA256SUMS, or taken from the Hub's cache.

`sha256sum -c` and `shasum -a 256 -c` read the same file.
"""

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import CheckpointError, OptionError, about_its_path, listed, shown
from . import regular as files
from .paths import is_companion

SUMS = "SHA256SUMS"
SHA256 = re.compile(r"[0-9a-f]{64}")
GIT_SHA1 = re.compile(r"[0-9a-f]{40}")
SUMS_LINE = re.compile(r"([0-9a-fA-F]{64}) [ *](.+)")
MAX_SUMS_BYTES = 1_000_000  # bytes of a SHA256SUMS

Progress = Callable[[int, int], None]  # bytes read, bytes in all


@dataclass(frozen=True)
class Verified:
    """The result of `verify`.

    `against` says where the digests came from, `files` how many files agree with theirs, and `unknown` lists the files
    of the folder for which there is no digest.
    """

    against: str
    files: int
    unknown: list[str]


def check_digest(digest: str | None) -> str | None:
    """Return a SHA-256 in lower case, or None for None; raises OptionError unless it is 64 hexadecimal digits."""
    if digest is not None and not SHA256.fullmatch(digest.lower()):
        raise OptionError(f"the SHA-256 is {shown(digest)}, expected its 64 hexadecimal digits; check `sha256`.")
    return digest.lower() if digest is not None else None


def sha256(path: Path) -> str:
    """SHA-256 of a file's content, as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_sums(path: Path, sums: Mapping[str, str], comment: str = "") -> None:
    """Write a SHA256SUMS file: an optional comment line, then one line per file name of `sums` with its digest."""
    lines = [f"# {comment}"] if comment else []
    lines += [f"{digest}  {name}" for name, digest in sorted(sums.items())]
    files.write(path, "\n".join(lines) + "\n")


@about_its_path
def read_sums(path: Path) -> dict[str, str]:
    """Read a SHA256SUMS file: file name -> digest; raises CheckpointError where it cannot be read or is malformed."""
    try:
        text = files.read_text(path, MAX_SUMS_BYTES)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise CheckpointError(f"{path}: cannot be read ({reason}); check the file.") from error
    sums: dict[str, str] = {}
    for line in text.splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        found = SUMS_LINE.fullmatch(line)
        if found is None or found[2] in sums:
            raise CheckpointError(
                f"{path}: {shown(line[:80])} is no new line of a digest and a name; fetch the file again."
            )
        sums[found[2]] = found[1].lower()
    return sums


@about_its_path
def verify(folder: Path, progress: Progress | None = None) -> Verified:
    """Compare every file of a model folder with its SHA-256.

    The digests come from SHA256SUMS in the folder, else from SHA256SUMS beside it, else from the Hub's cache, which
    names files by their digests. `progress` is called after each file with the bytes read and the bytes in all. Raises
    CheckpointError where a file differs or is missing, or where there are no digests.
    """
    present = sorted(
        path.name for path in folder.iterdir() if path.is_file() and path.name != SUMS and not is_companion(path.name)
    )
    beside = folder.resolve().parent / SUMS
    if (folder / SUMS).exists():
        against, sums = SUMS, read_sums(folder / SUMS)
    elif beside.exists():
        start = f"{folder.resolve().name}/"
        against = str(beside)
        sums = {
            name.removeprefix(start): digest for name, digest in read_sums(beside).items() if name.startswith(start)
        }
    else:
        against, sums = "the Hub's digests", _hub_digests(folder)
    if not sums:
        raise CheckpointError(
            f"{folder}: there are no digests to verify it by; expected {SUMS} in it or beside it, or a folder of the "
            "Hub's cache (one that was converted has none); fetch it with 'fastvlm-mlx download'."
        )
    outside = [name for name in sums if Path(name).name != name]
    if outside:
        raise CheckpointError(f"{folder}: {SUMS} lists {listed(outside)}, which lie elsewhere; remove those lines.")
    missing = sorted(sums.keys() - set(present))
    if missing:
        raise CheckpointError(f"{folder}: {listed(missing)} are missing; remove the folder and fetch the model again.")
    wrong = [name for name in _each(folder, sorted(sums), progress) if not _matches(folder / name, sums[name])]
    if wrong:
        raise CheckpointError(
            f"{folder}: {listed(wrong)} differ from {against}, so they are damaged or were changed; remove the folder "
            "and fetch the model again."
        )
    return Verified(against, len(sums), sorted(set(present) - sums.keys()))


def _each(folder: Path, names: list[str], progress: Progress | None) -> Iterable[str]:
    """Yield the file names, and report after each how many bytes have been read."""
    sizes = [(folder / name).stat().st_size for name in names]
    done = 0
    for name, size in zip(names, sizes, strict=True):
        yield name
        done += size
        if progress:
            progress(done, sum(sizes))


def _matches(path: Path, digest: str) -> bool:
    """Whether a file's content has this digest: SHA-256 for 64 digits, git's SHA-1 of a blob for 40."""
    if len(digest) == 64:
        return sha256(path) == digest
    git = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with path.open("rb") as file:
        while data := file.read(1 << 20):
            git.update(data)
    return git.hexdigest() == digest


def _hub_digests(folder: Path) -> dict[str, str]:
    """File name -> digest for links into the Hub's cache, where files are named after their digests.

    These are SHA-256, or git's SHA-1 for small files. A link whose target is missing is listed as well.
    """
    digests: dict[str, str] = {}
    for path in folder.iterdir():
        target = Path(os.path.realpath(path))
        if (
            path.is_symlink()
            and target.parent.name == "blobs"
            and (SHA256.fullmatch(target.name) or GIT_SHA1.fullmatch(target.name))
        ):
            digests[path.name] = target.name
    return digests
