"""What has been done, on the disk: lines that are only ever appended, synced, and read again by the next start.

The last lines about an item count. A file is put in order (`rewrite`) under another name and renamed, so that it is
whole at any moment. In memory an item takes about 450 bytes.
"""

import errno
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from ..errors import OutputError
from .lines import Form, Line, Table, form_of, name_of


@dataclass(slots=True)
class Known:
    """What a file says of one item: where its lines are, and how they came about (`mark`s, small numbers that stand for
    texts).

    `marks` is one for each answer: of its question and recipe. `picture` is one of the pictures' content, and
    `modified` when these were changed last, in nanoseconds. `before` and `after` are marks of a text file beside the
    picture, as it was found and as it was written. `failed` says that there is an error in the place of answers.
    """

    file: int
    places: list[int]
    marks: list[int]
    picture: int
    modified: int
    before: int
    after: int
    failed: bool


def mark(*parts: object) -> int:
    """A number of 8 bytes that stands for these texts, 0 for None alone."""
    if parts == (None,):
        return 0
    return int.from_bytes(blake2b(repr(parts).encode(errors="surrogateescape"), digest_size=8).digest())


class Ledger:
    """The lines of one output: a file of its own (`path`) to append to, and others that are read only.

    `known` has an item's name for each that the files know. `superseded` counts lines in `path` that later ones have
    taken the place of.
    """

    def __init__(self, path: Path, others: Sequence[Path], write: str, fields: Sequence[str]):
        """Raises OutputError where a file is there that this command has not written, or one cannot be read."""
        self.path, self.known, self.superseded = path, dict[str, Known](), 0
        self._files = [*others, path]
        self._fields, self._write = fields, write
        self._forms: list[Form] = []
        self._ends: list[int] = []
        for number, file in enumerate(self._files):
            self._read(number, file)
        self._descriptor = -1

    def open(self) -> None:
        """Make `path` ready to be appended to: without what a killed run left unfinished at its end."""
        with _explained(self):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
            os.ftruncate(self._descriptor, self._ends[-1])
            _renamed_later(self.path).unlink(missing_ok=True)  # of a run that was killed while it put it in order
        form = self._forms[-1]
        if isinstance(form, Table) and not set(self._fields) <= set(form.columns):
            self._replace(self._lines_of(len(self._files) - 1, form), Table(self._columns))
        elif self._ends[-1] == 0 and form.header:
            self._append(form.header)

    def append(self, lines: Sequence[Line]) -> None:
        """Write an item's lines behind all others, and wait until they are on the disk.

        Raises OutputError where they cannot be written; the file then ends with the line before.
        """
        form, place, places = self._forms[-1], self._ends[-1], []
        encoded = [form.encode(line) for line in lines]
        for data in encoded:
            places.append(place)
            place += len(data)
        self._append(b"".join(encoded))
        for line, at in zip(lines, places, strict=True):
            self._learn(len(self._files) - 1, at, line)

    def lines(self, names: Iterable[str] | None = None) -> Iterator[Line]:
        """The lines that count: of these names where they are known, then of all others, in the order they came."""
        first = list(dict.fromkeys(name for name in names or () if name in self.known))
        listed = set(first)
        yield from self._at((*first, *(name for name in self.known if name not in listed)))

    def about(self, name: str) -> list[Line]:
        """The lines that count of one item that is known."""
        return list(self._at([name]))

    def _at(self, names: Iterable[str]) -> Iterator[Line]:
        opened = [path.open("rb") if path.exists() else None for path in self._files]
        try:
            for name in names:
                known = self.known[name]
                file, form = opened[known.file], self._forms[known.file]
                for place in known.places:
                    assert file is not None
                    file.seek(place)
                    yield form.decode(next(form.whole(iter(file.readline, b""))))
        finally:
            for file in opened:
                if file is not None:
                    file.close()

    def in_order(self, names: Iterable[str]) -> bool:
        """Whether the lines of these names, where they are known, come one behind the other."""
        places = [self.known[name].places[0] for name in names if name in self.known]
        return places == sorted(places)

    def rewrite(self, names: Iterable[str] | None = None) -> None:
        """Put a file of all lines that count in the place of `path`; see `lines`."""
        form: Form = Table(self._columns) if self._write == "csv" else self._forms[-1]
        self._replace(self.lines(names), form)

    @property
    def _columns(self) -> list[str]:
        """The columns of records: those that are wanted, and those that the files have."""
        theirs = (name for form in self._forms if isinstance(form, Table) for name in form.fields)
        return list(dict.fromkeys((*theirs, *self._fields)))

    def close(self) -> None:
        """Close the file; an empty one is removed."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
            if self._ends[-1] == 0:
                self.path.unlink(missing_ok=True)

    def _read(self, number: int, path: Path) -> None:
        try:
            with path.open("rb") as file:
                form = form_of(path, self._write, self._fields, file.readline(1 << 20))
                file.seek(0)
                place = 0
                for row, data in enumerate(form.whole(file)):
                    if row or not form.header:
                        self._learn(number, place, _decoded(form, data, path))
                    place += len(data)
        except FileNotFoundError:
            form, place = form_of(path, self._write, self._fields, b""), 0
        except OSError as error:
            raise OutputError(f"{path} cannot be read ({error.strerror}); choose another `out`.", path=path) from error
        self._forms.append(form)
        self._ends.append(place)

    def _learn(self, number: int, place: int, line: Line) -> None:
        name = name_of(line)
        question = line.get("question", 0)
        known = self.known.get(name)
        if question and known is not None and len(known.places) == question and known.file == number:
            known.places.append(place)
            known.marks.append(mark(line.get("prompt"), line.get("recipe")))
            return
        if known is not None:
            self.superseded += len(known.places)
        self.known[name] = Known(
            file=number,
            places=[place],
            marks=[mark(line.get("prompt"), line.get("recipe"))],
            picture=mark(line.get("digest")),
            modified=line.get("modified", 0),
            before=line.get("before", 0),
            after=line.get("after", 0),
            failed="error" in line,
        )

    def _lines_of(self, number: int, form: Form) -> Iterator[Line]:
        with self._files[number].open("rb") as file:
            for row, data in enumerate(form.whole(file)):
                if row or not form.header:
                    yield form.decode(data)

    def _append(self, data: bytes) -> None:
        with _explained(self):
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
            os.fsync(self._descriptor)
        self._ends[-1] += len(data)

    def shorten(self) -> None:
        """Cut what was written in part."""
        if self._descriptor >= 0:
            with suppress(OSError):
                os.ftruncate(self._descriptor, self._ends[-1])

    def _replace(self, lines: Iterable[Line], form: Form) -> None:
        new = _renamed_later(self.path)
        try:
            with _explained(self), new.open("wb") as file:
                file.write(form.header)
                for line in lines:
                    file.write(form.encode(line))
                file.flush()
                os.fsync(file.fileno())
                new.replace(self.path)
        except BaseException:
            new.unlink(missing_ok=True)
            raise
        if self._descriptor < 0:
            return
        os.close(self._descriptor)
        self.known, self.superseded = {}, 0
        for each in (self._forms, self._ends):
            each.clear()
        self._files = [self.path]
        self._read(0, self.path)
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)


class _explained:
    """A context manager in which a failure to write is an OutputError, and the ledger ends with its last whole line."""

    def __init__(self, ledger: Ledger):
        self._ledger = ledger

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, OSError):
            self._ledger.shorten()
            raise unwritable(self._ledger.path, error) from error


def _renamed_later(path: Path) -> Path:
    return path.with_name(f".{path.name}.new")


def unwritable(path: Path, error: OSError) -> OutputError:
    """The sentence about a file that cannot be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return OutputError(
            f"{path} cannot be written any further ({error.strerror}), and is sound as far as it goes; make room and "
            "give the same command again, which goes on there.",
            path=path,
        )
    return OutputError(f"{path} cannot be written ({error.strerror}); check its permissions, or `out`.", path=path)


def _decoded(form: Form, data: bytes, path: Path) -> Line:
    try:
        return form.decode(data)
    except (ValueError, RecursionError) as error:
        raise OutputError(
            f"{path} exists and holds a line that this command has not written ({error}); choose another `out`.",
            path=path,
        ) from error
