"""The place where a folder is to be written: checked beforehand, and taken only once the folder is complete."""

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from ..errors import OutputError
from ..files import paths
from .open import is_ours

PARTIAL, REPLACED = ".fastvlm-partial", ".fastvlm-replaced"


def target_of(out: str | os.PathLike[str]) -> Path:
    """The path of a folder to be written, ~ and file:// resolved; raises OutputError where it is empty."""
    target = Path(paths.local(out))
    if target == Path():
        raise OutputError("The path of the output is empty; give the name of a new folder as `out`.")
    return target


class Own(NamedTuple):
    """What may be replaced with `force`: how it is called, and whether a folder is one."""

    name: str
    holds: Callable[[Path], bool]


MODEL = Own("a model folder of ours", is_ours)


def check_target(
    out: Path, nbytes: int, force: bool, *, advice: str = "choose another `out`", own: Own = MODEL
) -> None:
    """Raise OutputError unless a folder of about `nbytes` bytes can be written at `out`.

    An existing folder is refused, but for one of `own` with `force`. Unfinished folders that killed runs left beside
    `out` are removed. `advice` is what the message tells people to do.
    """
    try:
        out = Path(os.path.realpath(out))
        _clear_leftovers(out)
        _check_free(out, force, own)
        out.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(out.parent).free
    except (OSError, ValueError) as error:
        raise OutputError(f"{out} cannot be written ({_reason(error)}); {advice}.", path=out) from error
    if free < nbytes:
        raise OutputError(
            f"{out.parent} has {free / 1e9:.1f} GB free, the result takes {nbytes / 1e9:.1f} GB; make room.",
            path=out.parent,
        )


@contextmanager
def new_folder(
    out: Path, nbytes: int, force: bool, *, advice: str = "choose another `out`", own: Own = MODEL
) -> Iterator[Path]:
    """A context manager that gives an empty folder beside `out`, which is renamed to `out` when the block ends.

    Where the block raises, the folder is removed and `out` stays as it was. Runs at the same time are told apart by
    locks. See `check_target` for the arguments. Raises OutputError.
    """
    check_target(out, nbytes, force, advice=advice, own=own)
    out = Path(os.path.realpath(out))
    partial = out.parent / f".{out.name}{PARTIAL}"
    lock = -1
    try:
        partial.mkdir(exist_ok=True)
        lock = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        if not _lock(lock):
            os.close(lock)
            lock = -1
            raise OutputError(f"{out} is being written by another process; wait for it to end.", path=out)
        for leftover in partial.iterdir():
            leftover.unlink()
        yield partial
        _check_free(out, force, own)  # again: a folder that appeared meanwhile is not ours to remove
        _take_place(partial, out)
    except OSError as error:
        raise OutputError(
            f"{out} cannot be written ({_reason(error)}), and nothing is left of it; {advice}.",
            path=out,
        ) from error
    finally:
        if lock >= 0:
            shutil.rmtree(partial, ignore_errors=True)
            os.close(lock)
        else:  # interrupted before it was locked, or another run's
            _remove_unless_locked(partial)


def _check_free(out: Path, force: bool, own: Own) -> None:
    """Raise OutputError unless `out` is free, or `force` allows to replace it: an empty folder, or one of `own`."""
    if not out.exists():
        return
    if not force:
        raise OutputError(f"{out} exists already; give another `out`, or `force=True` to replace it.", path=out)
    if not out.is_dir() or (any(out.iterdir()) and not own.holds(out)):
        raise OutputError(
            f"{out} is not {own.name}, so it is not replaced even with `force=True`; give another `out`.",
            path=out,
        )


def _clear_leftovers(out: Path) -> None:
    """Undo a rename that a killed run left half done, and remove unfinished folders beside `out` not in use."""
    for old in out.parent.glob(f".*{REPLACED}"):
        home = old.with_name(old.name[1:].removesuffix(REPLACED))
        if not home.exists() and not old.is_symlink():
            old.rename(home)
    for leftover in (*out.parent.glob(f".*{PARTIAL}"), *out.parent.glob(f".*{REPLACED}")):
        _remove_unless_locked(leftover)


def _remove_unless_locked(folder: Path) -> None:
    """Remove an unfinished folder, unless another run holds its lock."""
    if folder.is_symlink() or not folder.is_dir():
        return
    lock = os.open(folder, os.O_RDONLY)
    try:
        if _lock(lock):
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(lock)


def _lock(folder: int) -> bool:
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def _take_place(partial: Path, out: Path) -> None:
    old = out.parent / f".{out.name}{REPLACED}"
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    partial.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)
