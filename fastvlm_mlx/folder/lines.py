"""Lines of an output as bytes and back: JSON lines, or rows of a CSV file whose texts may hold line ends.

A line is a dict of what `job` writes. What a killed run left at the end of a file without its end is told apart.
"""

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, Protocol

from ..errors import OutputError, shown

FIRST = ("image", "digest", "prompt", "text")  # columns of a CSV file before those of a schema
LAST = (
    "finish_reason",
    "model",
    "adapter",
    "seconds",
    "error",
    "name",
    "question",
    "recipe",
    "modified",
    "again",
    "doubt",
)
NUMBERS = {"seconds": float, "question": int, "modified": int}
LISTS = ("image", "digest", "again", "doubt")  # columns with a list in JSON where there are several

Line = dict[str, Any]


def name_of(line: Line) -> str:
    """The name of the item that a line is about; a line without one is named by its picture."""
    return str(line.get("name", line["image"]))


class Form(Protocol):
    """How lines are written: `header` begins a file, `whole` are the complete lines of one that is read."""

    header: bytes

    def encode(self, line: Line) -> bytes:
        """A line as bytes, its end included."""

    def decode(self, data: bytes) -> Line:
        """The line that these bytes are; raises ValueError where they are none of ours."""

    def whole(self, data: Iterator[bytes]) -> Iterator[bytes]:
        """The complete lines in physical lines that are read from a file, the header among them."""


class JSONLines:
    """One JSON object a line."""

    header = b""

    def encode(self, line: Line) -> bytes:
        """A JSON object and a line end."""
        text = json.dumps(line, ensure_ascii=False, allow_nan=False)
        return text.encode(errors="backslashreplace") + b"\n"

    def decode(self, data: bytes) -> Line:
        """A JSON object with an image in it."""
        line = json.loads(data)
        if not isinstance(line, dict) or "image" not in line:
            raise ValueError("no JSON object with an 'image'")
        return line

    def whole(self, data: Iterator[bytes]) -> Iterator[bytes]:
        """Every line that has an end."""
        return (line for line in data if line.endswith(b"\n"))


class Table:
    """A CSV file: the contract's columns, those of a schema (`fields`), and what resuming needs."""

    def __init__(self, fields: Sequence[str] = ()):
        self.fields = tuple(name for name in fields if name not in (*FIRST, *LAST))
        self.columns = (*FIRST, *self.fields, *LAST)
        self.header = self._row(self.columns)

    @classmethod
    def of(cls, header: bytes) -> "Table":
        """The form of a file that begins so; raises ValueError where it is none of ours."""
        columns = next(csv.reader(io.StringIO(header.decode("utf-8-sig"), newline="")), [])
        if not {*FIRST, *LAST} <= set(columns):
            raise ValueError("other columns than this command writes")
        return cls([name for name in columns if name not in (*FIRST, *LAST)])

    def encode(self, line: Line) -> bytes:
        """A row, its end included; a record's fields stand in their own columns, nested ones as JSON."""
        cells = {**(line.get("record") or {}), **{name: line.get(name) for name in (*FIRST, *LAST)}}
        return self._row([_cell(cells.get(name)) for name in self.columns])

    def decode(self, data: bytes) -> Line:
        """A row as a dict; empty cells are left out, but for the text of an answer."""
        rows = list(csv.reader(io.StringIO(data.decode(), newline="")))
        if len(rows) != 1 or len(rows[0]) != len(self.columns):
            raise ValueError(f"{len(rows[0]) if rows else 0} cells, expected {len(self.columns)}")
        cells = dict(zip(self.columns, rows[0], strict=True))
        line: Line = {
            name: NUMBERS.get(name, str)(cells[name]) for name in (*FIRST, *LAST) if cells[name] or name == "text"
        }
        for name in LISTS:
            if line.get(name, "").startswith('["'):
                with suppress(ValueError):  # the name of a picture may begin so
                    line[name] = json.loads(line[name])
        if "error" in line:
            del line["text"]
        else:
            line["adapter"] = line.get("adapter")
        own = {name: cells[name] for name in self.fields}
        return {**line, "record": own} if any(own.values()) else line

    def whole(self, data: Iterator[bytes]) -> Iterator[bytes]:
        """Rows whose quotes are closed and that have an end."""
        row = b""
        for part in data:
            row += part
            if row.endswith(b"\n") and row.count(b'"') % 2 == 0:
                yield row
                row = b""

    def _row(self, cells: Sequence[str]) -> bytes:
        file = io.StringIO(newline="")
        csv.writer(file, lineterminator="\n").writerow(cells)
        return file.getvalue().encode(errors="backslashreplace")


def _cell(value: object) -> str:
    """What stands in a cell: nothing for None, JSON for what is no text or number."""
    if value is None:
        return ""
    return (
        str(value)
        if isinstance(value, (str, int, float)) and not isinstance(value, bool)
        else json.dumps(value, ensure_ascii=False)
    )


def fields_of(schema: str | None) -> list[str]:
    """The columns that records of a schema (its JSON text) have: the properties of its object."""
    properties = json.loads(schema).get("properties", {}) if schema is not None else {}
    return list(properties) if isinstance(properties, Mapping) else []


def form_of(path: object, write: str, fields: Sequence[str], first: bytes) -> Form:
    """The form of an output whose first physical line is `first`, b"" for a new one; raises OutputError where it is
    the file of something else.
    """
    if write != "csv":
        return JSONLines()
    if not first.endswith(b"\n"):
        return Table(fields)
    try:
        return Table.of(first)
    except (ValueError, csv.Error) as error:
        raise OutputError(
            f"{path} exists and is not a file of this command ({shown(str(error))}); choose another `out`."
        ) from error
