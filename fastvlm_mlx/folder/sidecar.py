"""The text file beside a picture, as trainers read it: written whole under another name, then renamed."""

import os
from pathlib import Path

from .ledger import mark, unwritable

MAX_SIDECAR_BYTES = 1 << 24  # of a text that is added to
PUNCTUATION = ",.;:!?"


def beside(image: str, root: Path, out: Path | None) -> Path:
    """Where the text about a picture goes: beside it, or at the same place below `out` as the picture is below
    `root`.
    """
    path = Path(image)
    if out is None:
        return path.with_suffix(".txt")
    try:
        below = path.relative_to(root)
    except ValueError:
        below = Path(path.name)  # a list's picture that lies elsewhere
    return out / below.with_suffix(".txt")


def read(path: Path) -> str | None:
    """The text of a file, None where there is none or nothing in it, as a killed program of another kind leaves it."""
    try:
        with path.open("rb") as file:
            text = file.read(MAX_SIDECAR_BYTES).decode(errors="surrogateescape")
    except OSError:
        return None
    return text if text.strip() else None


def write(path: Path, text: str) -> None:
    """Write a text and a line end, atomically; raises OutputError."""
    new = path.with_name(f".{path.name}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with new.open("wb") as file:
            file.write(written(text).encode(errors="surrogateescape"))
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    except OSError as error:
        new.unlink(missing_ok=True)
        raise unwritable(path, error) from error


def written(text: str) -> str:
    """A text as it stands in a file."""
    return text if text.endswith("\n") else text + "\n"


def mark_of(text: str | None) -> int:
    """The mark of a file with this text, 0 for none."""
    return 0 if text is None else mark("sidecar", text)


def joined(old: str, new: str) -> str:
    """Two texts one behind the other, with a blank in between where neither has one nor a comma follows."""
    old = old.rstrip("\n")
    apart = "" if not old or not new or old[-1].isspace() or new[0].isspace() or new[0] in PUNCTUATION else " "
    return old + apart + new
