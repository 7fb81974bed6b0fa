"""The output of one run: its ledger, its locks, what is done already, and the texts beside pictures.

An unshared run writes one file, and takes into it what shares have left. A share writes a file of its own, reads the
others, and the last to end puts all of them together.
"""

import os
import sys
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from ..errors import ImageError, OutputError
from ..files.digests import sha256
from ..files.paths import find, local
from . import share as shares
from . import sidecar
from .ledger import Ledger, mark, unwritable
from .lines import Line, form_of
from .listing import Item
from .lock import Lock, waited_for
from .share import EVERYTHING, Share

LEDGER = "fastvlm-batch"  # the file's name in the folder, where none is given
ADDING = ("append", "prepend")


@dataclass(frozen=True)
class Target:
    """Where answers go. `path` is the file of JSON lines or the CSV file; with `write` "txt", the record of what was
    written beside the pictures, or below `texts` if that is given. `existing` is what becomes of what is there and
    stale, or is not ours: None replaces what is ours and stale, and keeps what others wrote.
    """

    path: Path
    write: str
    root: Path
    texts: Path | None = None
    existing: str | None = None
    share: Share = EVERYTHING

    @classmethod
    def of(cls, root: Path, write: str, out: str | None, existing: str | None, share: Share) -> "Target":
        """The target for a listing of `root` and the place that `out` names; raises OutputError."""
        texts = None
        ending = ".csv" if write == "csv" else ".jsonl"
        if out is None:
            path = root / f"{LEDGER}{ending}"
        else:
            path = Path(local(out))
            if write == "txt":
                texts, path = path, path / f"{LEDGER}{ending}"
            elif path.is_dir():
                path = path / f"{LEDGER}{ending}"
        if texts is not None and texts.exists() and not texts.is_dir():
            raise OutputError(f"{texts} is a file; with texts, `out` names a folder for them.", path=texts)
        return cls(path, write, root, texts, existing, share)


class Output:
    """An open output, this process's alone; a context manager.

    `done`, `kept` and `failed_before` count items that need nothing, those that are stale or not ours and are kept,
    and those that failed before and are asked again.
    """

    def __init__(self, target: Target, recipe: str, fields: list[str]):
        self.target, self._recipe, self._fields = target, recipe, fields
        self.done = self.kept = self.failed_before = 0
        self._held = ExitStack()
        self._lock = Lock(target.share.file(target.path))
        self._texts: dict[Path, str] = {}  # whose text a file is
        self.ledger: Ledger

    def __enter__(self) -> Self:
        """Take the lock, and read what there is; raises OutputError."""
        target, own = self.target, self.target.share.file(self.target.path)
        try:
            own.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unwritable(own, error) from error
        with waited_for(target.path):
            if not self._lock.take():
                raise _busy(own)
            self._held.callback(self._lock.release)
            try:
                self._open(own)
            except BaseException:
                self._held.close()
                raise
        return self

    def _open(self, own: Path) -> None:
        target = self.target
        there = {share: path for share, path in shares.files(target.path).items() if path != own}
        for share, path in there.items():
            if (target.share.count == 1 or share.count != target.share.count) and Lock(path).taken:
                raise _busy(path, f", of the share {share}")
        others = [path for path in there.values() if path.exists()]
        if target.share.count > 1:
            if Lock(target.path).taken:
                raise _busy(target.path)
            self.ledger = self._ledger(own, [target.path, *others])
        else:
            self.ledger = self._ledger(own, others)
            if others:
                self.ledger.rewrite()
                _remove(others)
                self.ledger = self._ledger(own, [])
        self.ledger.open()
        self._held.callback(self.ledger.close)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._held.close()

    @property
    def settled(self) -> int:
        """How many items needed nothing."""
        return self.done + self.kept

    # ---- before an item ----------------------------------------------------------------------------------------------

    def wants(self, item: Item) -> bool:
        """Whether an item is in the share and is still to be answered; raises ImageError as `text_file` does."""
        if self.target.write == "txt":
            self._texts.setdefault(self._text_place(item), item.name)  # of other shares as well
        if not self.target.share.holds(item.name):
            return False
        path = self.text_file(item) if self.target.write == "txt" else None
        known, existing = self.ledger.known.get(item.name), self.target.existing
        current = known is not None and known.marks == self._marks(item) and not self._changed(item)
        if path is None:
            if known is None:
                return True
            if known.failed:
                self.failed_before += 1
                return True
            return self._count(ask=not current and existing != "skip", current=current)
        found = sidecar.mark_of(sidecar.read(path))
        if not found:
            self.failed_before += known is not None and known.failed
            return True
        ours = known is not None and not known.failed and known.after == found
        if current and known is not None and not known.failed:
            if ours:
                return self._count(ask=False, current=True)
            if found != known.before:  # edited since
                return self._count(ask=existing == "overwrite", current=True)
        return self._count(ask=existing in ("overwrite", *ADDING) or (existing is None and ours), current=False)

    def _count(self, *, ask: bool, current: bool) -> bool:
        self.done += not ask and current
        self.kept += not ask and not current
        return ask

    def _marks(self, item: Item) -> list[int]:
        return [mark(prompt, self._recipe) for prompt in item.prompts]

    def _changed(self, item: Item) -> bool:
        """Whether an item's pictures are others than those that were answered about."""
        known = self.ledger.known[item.name]
        try:
            return known.modified != modified(item) and known.picture != mark(digest(item))
        except OSError:
            return True

    # ---- an item's answers -------------------------------------------------------------------------------------------

    def text_file(self, item: Item) -> Path:
        """Where the text about an item goes; raises ImageError where another item's text goes there."""
        path = self._text_place(item)
        if (owner := self._texts.get(path, item.name)) != item.name:
            raise ImageError(f"Its text would be {path}, which is that of {owner}; rename one of the pictures.")
        return path

    def _text_place(self, item: Item) -> Path:
        return sidecar.beside(item.images[0], self.target.root, self.target.texts)

    def write(self, item: Item, lines: list[Line]) -> None:
        """Write an item's answers, or the one line with its error; raises OutputError where they cannot be written."""
        if any("error" in line for line in lines):
            known = self.ledger.known.get(item.name)
            said = known is not None and known.failed and self.ledger.about(item.name)[0].get("error")
            if said != lines[0]["error"]:
                self.ledger.append(lines)
            return
        if self.target.write == "txt":
            path = self.text_file(item)
            before = sidecar.read(path)
            text = self._added(before, "\n".join(line["text"] for line in lines))
            marks = {"before": sidecar.mark_of(before), "after": sidecar.mark_of(sidecar.written(text))}
            self.ledger.append([{**lines[0], **marks}, *lines[1:]])
            sidecar.write(path, text)
            return
        known = self.ledger.known.get(item.name)
        if self.target.existing in ADDING and known is not None and not known.failed:
            old = [line.get("text", "") for line in self.ledger.about(item.name)]
            if len(old) == len(lines):
                lines = [{**new, "text": self._added(text, new["text"])} for text, new in zip(old, lines, strict=True)]
        self.ledger.append(lines)

    def _added(self, old: str | None, new: str) -> str:
        if old is None or self.target.existing not in ADDING:
            return new
        return sidecar.joined(old, new) if self.target.existing == "append" else sidecar.joined(new, old)

    # ---- the end -----------------------------------------------------------------------------------------------------

    def finish(self, names: Callable[[], Iterable[str]]) -> list[Share] | None:
        """Put the output in order: `names` gives those of all items, in order.

        Returns None where the output is complete; otherwise the shares that are not: those that have items without an
        answer, or none of them where others are still at work.
        """
        target = self.target
        if target.share.count == 1:
            if self.ledger.superseded or not self.ledger.in_order(names()):
                self.ledger.rewrite(names())
            self.ledger.close()
            return None
        self._held.close()  # the ledger, and the lock
        with waited_for(target.path):
            there = shares.files(target.path)
            if any(Lock(path).taken for path in there.values()) or Lock(target.path).taken:
                return []
            files = [path for path in there.values() if path.exists()]
            whole = self._ledger(target.path, files)
            every = [Share(index, target.share.count) for index in range(1, target.share.count + 1)]
            missing = [name for name in names() if name not in whole.known]
            if missing:
                return [share for share in every if any(share.holds(name) for name in missing)]
            whole.rewrite(names())
            _remove(files)
        self.ledger = self._ledger(target.path, [])
        return None

    def _ledger(self, path: Path, others: list[Path]) -> Ledger:
        return Ledger(path, others, self.target.write, self._fields)


class Printed:
    """Lines printed on stdout, one by one; nothing is known of earlier runs."""

    def __init__(self, write: str, fields: list[str], share: Share):
        self._form, self._share = form_of("stdout", write, fields, b""), share
        self.settled = 0
        self._print(self._form.header)

    def wants(self, item: Item) -> bool:
        """Whether an item is in the share."""
        return self._share.holds(item.name)

    def write(self, item: Item, lines: list[Line]) -> None:
        """Print an item's lines; raises OutputError."""
        self._print(b"".join(map(self._form.encode, lines)))

    def _print(self, data: bytes) -> None:
        try:
            sys.stdout.write(data.decode())
            sys.stdout.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise unwritable(Path("stdout"), error) from error


def digest(item: Item) -> str | list[str]:
    """SHA-256 of an item's picture file, a list of them where there are several; raises OSError."""
    found = [sha256(Path(find(image))) for image in item.images]
    return found[0] if len(found) == 1 else found


def modified(item: Item) -> int:
    """When an item's pictures were changed last, in nanoseconds; raises OSError."""
    return max(os.stat(image).st_mtime_ns for image in item.images)  # noqa: PTH116  (a million of them)


def _busy(path: Path, whose: str = "") -> OutputError:
    return OutputError(
        f"{path} is being written by another run{whose}; wait for it to end, or choose another `out`.", path=path
    )


def _remove(files: Iterable[Path]) -> None:
    for path in files:
        path.unlink(missing_ok=True)
