"""What was written and what is known of it, beside every export: once for programs (JSON), once for people
(Markdown)."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import OutputError
from ..files import regular
from ..files.jsonfile import read_table
from ..storage.place import Own
from ..version import __version__

WRITER = "fastvlm-mlx"
NAME = "report"  # and .json, .md: in a folder


@dataclass(frozen=True)
class Section:
    """A heading, a sentence or more, and a table of what was found by name."""

    title: str
    text: str
    rows: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True)
class Report:
    """What was written for a `target` from `model`; `facts` are what programs read, `sections` what people do."""

    target: str
    model: str
    written: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    sections: Sequence[Section] = ()

    def to_json(self) -> str:
        """One object: written_by, version, target, model, and the facts."""
        head = {"written_by": WRITER, "version": __version__, "target": self.target, "model": self.model}
        return json.dumps(head | dict(self.facts), indent=2, ensure_ascii=False) + "\n"

    def to_markdown(self) -> str:
        """A page: what was written, then a heading and a table for each section."""
        parts = [f"# {self.written}\n\nWritten from {self.model} by {WRITER} {__version__}: target `{self.target}`.\n"]
        for section in self.sections:
            rows = "".join(f"| {name} | {found} |\n" for name, found in section.rows)
            table = f"\n| | |\n|---|---|\n{rows}" if rows else ""
            parts.append(f"\n## {section.title}\n\n{section.text}\n{table}")
        return "".join(parts)

    def write(self, stem: Path) -> None:
        """Write STEM.json and STEM.md, each whole or not at all; raises OutputError."""
        for suffix, text in ((".json", self.to_json()), (".md", self.to_markdown())):
            path = stem.with_name(stem.name + suffix)
            try:
                regular.write(path, text)
            except OSError as error:
                raise OutputError(
                    f"{path} cannot be written ({error.strerror}); the rest of the export stands."
                ) from error


def is_reported(folder: Path) -> bool:
    """Whether a folder is one of our exports: whether our report lies in it."""
    path = folder / f"{NAME}.json"
    return path.is_file() and read_table(path).get("written_by") == WRITER


EXPORT = Own("a folder that was exported", is_reported)
