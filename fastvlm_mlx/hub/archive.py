"""Apple's checkpoints as archives, named by their files: downloaded, checked, and unpacked into our cache.

The addresses are those of get_models.sh in apple/ml-fastvlm. Apple publishes no digests: one that the user gives is
checked, and the digest of what was downloaded is stored, so that an archive that changes later is noticed.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import CheckpointError, FastVLMError, HubError, OptionError
from ..files import digests, unzip
from . import caches, transfer
from .consent import Agree, ask
from .names import ARCHIVE

ARCHIVES_URL = "https://ml-site.cdn-apple.com/datasets/fastvlm"
OFFLINE_VALUES = ("1", "ON", "YES", "TRUE")
UNPACKED = re.compile(r"# (\S+), SHA-256 ([0-9a-f]{64})")


def folder_of(name: str) -> Path:
    """The folder of our cache that an archive is unpacked into; raises OptionError for the name of another archive."""
    found = ARCHIVE.fullmatch(name)
    if found is None:
        raise OptionError(
            f"{name!r} is none of Apple's archives; expected llava-fastvithd_{{0.5b,1.5b,7b}}_stage{{2,3}}."
        )
    return caches.root() / "models" / found[1]


def find(name: str, agree: Agree | None = None, *, cached_only: bool = False, sha256: str | None = None) -> Path:
    """The folder of an archive's model; the archive is downloaded and unpacked unless it is in our cache.

    `agree` is asked before a download (see `hub.find`), `cached_only` forbids one, and `sha256` is the digest the
    archive has to have. Raises HubError where it cannot be downloaded, CheckpointError where its content is wrong, and
    OutputError where it cannot be stored. What an interrupted download has received is kept.
    """
    digest, folder = digests.check_digest(sha256), folder_of(name)
    if (folder / "config.json").is_file():
        _check_came_from(folder, digest)
        return folder
    if folder.exists():
        raise HubError(f"{folder} is there but holds no model; remove it and fetch the archive again.", path=folder)
    if cached_only:
        raise HubError(
            f"{name!r}: no such folder, and not in our cache; download it first: fastvlm-mlx download {folder.name}"
        )
    archive = caches.root() / "archives" / f"{folder.name}.zip"
    url = f"{(os.environ.get('FASTVLM_ARCHIVES') or ARCHIVES_URL).rstrip('/')}/{archive.name}"
    try:
        if not archive.exists():
            if os.environ.get("HF_HUB_OFFLINE", "").upper() in OFFLINE_VALUES:
                raise HubError(
                    f"{name!r}: no such folder, not in our cache, and HF_HUB_OFFLINE is set; unset it to fetch it."
                )
            size = transfer.size_of(url)
            takes = f"takes {size / 1e9:.1f} GB" if size is not None else "takes some gigabytes"
            ask(f"{archive.name} {takes} to download, and as much again unpacked.", folder.name, agree)
            with _bar(archive.name) as progress:
                transfer.fetch(url, archive, progress)
        found = _check_digest(archive, digest)
        _unpack(archive, folder, found)
        digests.write_sums(archive.parent / digests.SUMS, _remembered(archive) | {archive.name: found})
        archive.unlink(missing_ok=True)
    except FastVLMError:
        raise
    except OSError as error:
        raise HubError(
            f"{name!r} cannot be stored in the cache ({error.strerror or error}); make {caches.root()} writable, or "
            "set FASTVLM_CACHE to a folder that is."
        ) from error
    return folder


def _check_digest(archive: Path, given: str | None) -> str:
    """The SHA-256 of an archive.

    Raises CheckpointError, and removes the archive, where it is not the one given or else the one of an earlier
    download.
    """
    found, expected = digests.sha256(archive), given or _remembered(archive).get(archive.name)
    if expected is not None and found != expected:
        archive.unlink()
        origin = "given" if given else "of an earlier download; to take the new one, pass it as `sha256`"
        raise CheckpointError(
            f"{archive.name} has the SHA-256 {found}, expected {expected}, the one {origin}. It was removed; check "
            "the digest, and fetch it again.",
            path=archive,
        )
    return found


def _remembered(archive: Path) -> dict[str, str]:
    """Digests of the archives that were unpacked before, by file name."""
    memory = archive.parent / digests.SUMS
    return digests.read_sums(memory) if memory.exists() else {}


def _check_came_from(folder: Path, digest: str | None) -> None:
    """Raise CheckpointError where a model in the cache came from an archive with another SHA-256 than `digest`."""
    if digest is None:
        return
    sums = folder / digests.SUMS
    came = UNPACKED.match(sums.read_text(encoding="utf-8", errors="replace")) if sums.is_file() else None
    if came is None or came[2] != digest:
        found = came[2] if came else "one that was not kept"
        raise CheckpointError(
            f"{folder} came from an archive with the SHA-256 {found}, expected {digest}; remove it and fetch it again.",
            path=folder,
        )


def _unpack(archive: Path, folder: Path, digest: str) -> None:
    """Unpack an archive into the model's folder with a SHA256SUMS, atomically; a damaged archive is removed."""
    from ..storage.place import new_folder  # not needed for a model that is in the cache

    try:
        contents = unzip.read_contents(archive)
        with new_folder(folder, contents.nbytes, force=False, advice="set FASTVLM_CACHE to another folder") as partial:
            with _bar(f"{folder.name}, unpacking") as progress:
                sums = unzip.unpack(contents, partial, progress)
            sums.pop(digests.SUMS, None)  # the archive's own SHA256SUMS is replaced
            digests.write_sums(partial / digests.SUMS, sums, f"{archive.name}, SHA-256 {digest}")
    except CheckpointError:
        archive.unlink(missing_ok=True)  # fetched again the next time
        raise


@contextmanager
def _bar(name: str) -> Iterator[transfer.Progress]:
    """A progress bar on stderr, as the Hub's downloads have one."""
    from huggingface_hub.utils.tqdm import tqdm

    with tqdm(desc=name, unit="B", unit_scale=True, unit_divisor=1000, disable=None) as bar:

        def show(done: int, total: int | None) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show
