"""A folder, a pattern, a list or stdin -> what is asked about: pictures in rows, each with its questions.

A list is a text file with a picture's path in each line, or several paths of one row with tabs between them; or JSON
lines with "image" (a path, or a list of them), and perhaps "prompt"; or CSV with the same columns ("image", "image_2",
..., "prompt"). Paths are relative to the list's own folder, those of stdin to the current one.
"""

import csv
import glob
import io
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ImageError, OptionError, PromptError, shown
from ..files import paths, regular
from ..inputs.folder import is_picture

STDIN = "-"
MAX_LIST_BYTES = 1 << 30  # of a list that is a file
MAX_PROMPTS_BYTES = 1 << 20  # of a file with questions
IMAGE_KEYS = ("image", "images", "file_name", "path")
PROMPT_KEYS = ("prompt", "question")


@dataclass(frozen=True, slots=True)
class Item:
    """Pictures that are shown together, and what is asked about them.

    `name` tells it from the others of its listing, wherever the folder lies: the path from the listing's root.
    `images` are paths that can be opened.
    """

    name: str
    images: tuple[str, ...]
    prompts: tuple[str, ...]


@dataclass(frozen=True)
class Listing:
    """What is to be done: `items` in order, as often as they are iterated over, from the folder `root`; `count` of
    them, None where that shows at the end only.
    """

    root: Path
    items: Iterable[Item]
    count: int | None


def find(source: str, prompts: Sequence[str], *, recursive: bool = False) -> Listing:
    """What `source` stands for, each item asked all of `prompts` unless a list has a question of its own for it.

    Raises ImageError where there are no pictures, OptionError where there is nothing of this name, and PromptError for
    a list that cannot be understood.
    """
    asked = tuple(prompts)
    if source == STDIN:
        return Listing(Path(), _Remembered(_numbered(_rows(_stdin(), Path(), "stdin"), asked)), None)
    path = paths.find(source)
    if os.path.isdir(path):  # noqa: PTH112  (false, too, for impossible names)
        names = list(_walk(path, recursive))
        if not names:
            below = "" if recursive else ", not counting the folders in it (`recursive=True`)"
            raise ImageError(f"{shown(source)} has no pictures in it{below}; name a folder of pictures.", path=path)
        return _of_names(Path(path), names, asked)
    if not os.path.lexists(path) and glob.has_magic(path):
        return _of_pattern(path, source, asked)
    if is_picture(Path(path).name):
        return _of_names(Path(path).parent, [Path(path).name], asked)
    return _of_list(Path(path), source, asked)


class _Named:
    """Items of one picture each, made of their names whenever they are needed."""

    def __init__(self, root: Path, names: Sequence[str], prompts: tuple[str, ...]):
        self._at = "" if root == Path() else os.path.join(root, "")  # noqa: PTH118
        self._names, self._prompts = names, prompts

    def __iter__(self) -> Iterator[Item]:
        for name in self._names:
            yield Item(name.replace(os.sep, "/"), (self._at + name,), self._prompts)


class _Remembered:
    """Items that come once, kept for whoever iterates again."""

    def __init__(self, items: Iterator[Item]):
        self._items, self._kept = items, list[Item]()

    def __iter__(self) -> Iterator[Item]:
        yield from self._kept
        for item in self._items:
            self._kept.append(item)
            yield item


def read_prompts(path: str) -> list[str]:
    """The questions in a text file, one a line; raises PromptError."""
    try:
        text = regular.read_text(Path(paths.find(path)), MAX_PROMPTS_BYTES)
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(f"`prompts` is {shown(path)}, which cannot be read ({_reason(error)}); check it.") from error
    found = [line.strip() for line in text.splitlines() if line.strip()]
    if not found:
        raise PromptError(f"`prompts` is {shown(path)}, which holds no question; write one a line.")
    return found


def _walk(folder: str, recursive: bool) -> Iterator[str]:
    """The pictures below a folder, as paths from there, in the order of their names."""
    for where, folders, files in os.walk(folder, onerror=_unreadable):
        folders[:] = sorted(name for name in folders if not name.startswith(".")) if recursive else []
        below = os.path.relpath(where, folder)
        for name in sorted(files):
            if is_picture(name):
                yield name if below == os.curdir else os.path.join(below, name)  # noqa: PTH118  (a million of them)


def _unreadable(error: OSError) -> None:
    raise ImageError(
        f"{shown(str(error.filename))}: the folder cannot be read ({error.strerror}); check its permissions.",
        path=error.filename,
    ) from error


def _of_names(root: Path, names: Sequence[str], prompts: tuple[str, ...]) -> Listing:
    return Listing(root, _Named(root, names, prompts), len(names))


def _of_pattern(path: str, source: str, prompts: tuple[str, ...]) -> Listing:
    fixed = []
    for part in Path(path).parts[:-1]:
        if glob.has_magic(part):
            break
        fixed.append(part)
    root = Path(*fixed)
    found = sorted(glob.glob(path, recursive=True))  # noqa: PTH207  (as the shell would write them)
    names = [os.path.relpath(each, root) for each in found if is_picture(Path(each).name) and Path(each).is_file()]
    if not names:
        raise ImageError(f"{shown(source)} matches no pictures; check the pattern.")
    return _of_names(root, names, prompts)


def _of_list(path: Path, source: str, prompts: tuple[str, ...]) -> Listing:
    try:
        text = regular.read_text(path, MAX_LIST_BYTES)
    except FileNotFoundError as error:
        raise OptionError(
            f"There is no {shown(source)}; name a folder of pictures, a pattern such as 'photos/*.jpg', a list, or '-'."
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(
            f"The list {shown(source)} cannot be read ({_reason(error)}); check it.", path=path
        ) from error
    rows = _csv_rows(text, path) if path.suffix.lower() == ".csv" else _rows(text.splitlines(), path.parent, source)
    items = list(_numbered(rows, prompts))
    if not items:
        raise PromptError(f"The list {shown(source)} is empty; write a picture's path in each line.", path=path)
    return Listing(path.parent, items, len(items))


Row = tuple[str | None, tuple[str, ...], tuple[str, ...], str | None]  # id, names, paths, prompt


def _numbered(rows: Iterable[Row], prompts: tuple[str, ...]) -> Iterator[Item]:
    """Items with names of their own: where pictures come again, perhaps with another question, they are counted."""
    seen: Counter[str] = Counter()
    for given, names, files, prompt in rows:
        name = given or "; ".join(names)
        seen[name] += 1
        numbered = name if seen[name] == 1 else f"{name} #{seen[name]}"
        yield Item(numbered, files, prompts if prompt is None else (prompt,))


def _rows(lines: Iterable[str], folder: Path, source: str) -> Iterator[Row]:
    for number, line in enumerate(lines, start=1):
        text = line.rstrip("\r\n")
        if text.lstrip().startswith("{"):
            try:
                row = json.loads(text)
            except ValueError as error:
                raise PromptError(f"Line {number} of {shown(source)} is not valid JSON ({error}); check it.") from error
            images = next((row[key] for key in IMAGE_KEYS if key in row), None)
            yield _row(row, images if isinstance(images, list) else [images], folder, f"Line {number} of {source}")
        elif text.strip():
            yield _row({}, [part for part in text.split("\t") if part], folder, f"Line {number} of {source}")


def _csv_rows(text: str, path: Path) -> Iterator[Row]:
    reader = csv.DictReader(io.StringIO(text, newline=""))
    columns = [name for name in reader.fieldnames or () if name and name.startswith(IMAGE_KEYS)]
    if not columns:
        raise PromptError(f"{path}: its first line has no column 'image'; expected a header with one.", path=path)
    for row in reader:
        images = [row[name] for name in columns if row[name]]
        yield _row(row, images, path.parent, f"Line {reader.line_num} of {path}")


def _row(row: Mapping[str, Any], images: Sequence[object], folder: Path, where: str) -> Row:
    prompt = next((row[key] for key in PROMPT_KEYS if row.get(key)), None)
    if not images or not all(isinstance(each, str) and each for each in images) or not isinstance(prompt, str | None):
        raise PromptError(f"{where} is {shown(dict(row) or images)}, expected 'image', a path or a list of them.")
    names = tuple(str(each) for each in images)
    own = row.get("id")
    return None if own is None else str(own), names, tuple(_located(each, folder) for each in names), prompt


def _located(name: str, folder: Path) -> str:
    path = paths.local(name)
    return path if folder == Path() else os.path.join(folder, path)  # noqa: PTH118  (an absolute one stays as it is)


def _stdin() -> Iterator[str]:
    if sys.stdin is None:
        return
    try:
        yield from sys.stdin
    except UnicodeDecodeError as error:
        raise PromptError(f"The list on stdin is not UTF-8 (byte {error.start}); convert it first.") from error


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or "it is not UTF-8"
