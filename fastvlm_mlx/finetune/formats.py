"""Data as people have it -> rows: JSON lines, one JSON list, a folder with a metadata.jsonl, pictures with a text
beside each.

Everything that is wrong with rows is found here, before anything heavy is begun; pictures are opened by `samples`.
"""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ..errors import PromptError, counted, shown
from ..files import paths
from ..files import regular as files
from ..inputs.folder import is_picture
from ..inputs.image import Source
from ..inputs.prompt import PROMPT
from .rows import Row, row_of

LISTINGS = ("metadata.jsonl", "questions.jsonl")  # what a folder's rows are read from, if it is there
MAX_DATA_BYTES = 4_000_000_000  # of one file; LLaVA's 665,000 conversations take a quarter of that
MAX_CAPTION_BYTES = 1_000_000  # of a text beside a picture
LISTED_FAULTS = 5  # broken rows named in one message

Data = str | os.PathLike[str] | Iterable[Row | dict[str, Any]]


def read_rows(data: Data, *, images: str | os.PathLike[str] | None = None, prompt: str = PROMPT) -> list[Row]:
    """The rows of a file, a folder or an iterable of tables.

    `images` is the folder that pictures are named in, by default the data's own. `prompt` asks for the text of a
    picture that has nothing but a text. Raises PromptError that names every broken row, up to five.
    """
    named = Path(paths.find(images)) if images is not None else None
    if not isinstance(data, (str, os.PathLike)):
        if not isinstance(data, Iterable) or isinstance(data, (bytes, dict)):
            raise PromptError(f"The data is {shown(data)}, expected the path of a file or a folder, or a list of rows.")
        return _checked(((f"row {n}", table) for n, table in enumerate(data, start=1)), named or Path(), prompt)
    path = Path(paths.find(data))
    if path.is_dir():
        listing = next((path / name for name in LISTINGS if (path / name).is_file()), None)
        if listing is None:
            return _checked(_captioned(path), path, prompt)
        path = listing
    elif not os.path.lexists(path):
        raise PromptError(f"{shown(os.fspath(data))}: no such file or folder of training data; check the path.")
    return _checked(_tables(path), named or path.parent, prompt)


def _checked(tables: Iterable[tuple[str, Any]], home: Path, prompt: str) -> list[Row]:
    """The rows of tables, each with where it was read; pictures are named from `home`."""

    def place(name: str) -> Source:
        return Path(paths.find(home / paths.local(name)))

    rows: list[Row] = []
    faults: list[str] = []
    for origin, table in tables:
        try:
            rows.append(row_of(table, origin, place, prompt))
        except PromptError as error:
            faults.append(str(error))
    raise_faults(faults, PromptError)
    if not rows:
        raise PromptError(
            "There are no rows in the training data; expected one conversation a line, or pictures with texts."
        )
    return rows


def raise_faults(faults: list[str], kind: type[Exception]) -> None:
    """Raise one error that names the faults, up to LISTED_FAULTS of them; none where there are none."""
    if len(faults) == 1:
        raise kind(faults[0])
    if faults:
        rest = len(faults) - LISTED_FAULTS
        more = f" And {counted(rest, 'other row')}." if rest > 0 else ""
        raise kind(f"{len(faults)} rows cannot be used. {' '.join(faults[:LISTED_FAULTS])}{more}")


def _tables(path: Path) -> Iterator[tuple[str, Any]]:
    """What a file of JSON lines, or of one list, holds, each with its place."""
    try:
        text = files.read_text(path, MAX_DATA_BYTES)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise PromptError(f"{path}: cannot be read ({reason}); check the file.") from error
    if text.lstrip()[:1] == "[":
        every = _parsed(text, str(path))
        yield from ((f"{path.name}, row {number}", table) for number, table in enumerate(every, start=1))
        return
    for number, line in enumerate(text.split("\n"), start=1):  # str.splitlines would cut at U+2028, which JSON may hold
        if line.strip():
            origin = f"{path.name}, line {number}"
            yield origin, _parsed(line, origin)


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PromptError(
            f"{where}: not valid JSON ({str(error)[:200]}); expected one table a line, or one list."
        ) from error


def _captioned(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The pictures of a folder that have a text of the same name beside them."""
    pictures = sorted(path for path in folder.iterdir() if is_picture(path.name))
    captions = [(picture, picture.with_suffix(".txt")) for picture in pictures]
    if not any(caption.is_file() for _, caption in captions):
        raise PromptError(
            f"{folder}: there are no texts in it to learn from; expected pictures with a .txt beside each, or a "
            f"{LISTINGS[0]}."
        )
    for picture, caption in captions:
        try:
            text = files.read_text(caption, MAX_CAPTION_BYTES).strip() if caption.is_file() else ""
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8"
            raise PromptError(f"{caption}: cannot be read ({reason}); check the file.") from error
        origin = picture.name if text else f"{picture.name} (which has no {caption.name} beside it, or an empty one)"
        yield origin, {"image": picture.name, "text": text}
