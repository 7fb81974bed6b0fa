"""All checks of whether answers are right on this machine, as one report with one verdict.

Enters: this machine, the built-in model and random weights. Leaves: a `Report`, as text, or as an object without paths
and names of users.
"""

import getpass
import os
import platform
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from .checks import desk, install, memory, operations, parity, recovery, speed, start, threads
from .checks import machine as machines
from .checks.finding import Finding
from .checks.setting import Setting, here
from .machine import Machine, machine

Check = Callable[[Setting], Iterator[Finding]]
Progress = Callable[[str], None]

CHECKS: Mapping[str, Check] = {
    "machine": machines.check, "install": install.check, "parity": parity.check, "operations": operations.check,
    "threads": threads.check, "memory": memory.check, "recovery": recovery.check, "speed": speed.check, "start":
    start.check, "desk": desk.check,
}  # fmt: skip
FORMAT_VERSION = 1  # of the JSON object; increased when a key changes its meaning
MAX_FOUND_CHARS = 300  # characters of a finding's text from outside
EXACT = "MLX_ENABLE_TF32"  # 0 makes products of float32 exact on chips that would round their factors to 10 bits
# A path in quotes, which may hold blanks, or one that ends at a blank; "GB/s" and "1/45" are none.
PATH = re.compile(
    r"""(?<=['"])(?:~|/|[A-Za-z]:\\)[^'"\n]*|(?<![\w.)])(?:~[\w-]*|[A-Za-z]:(?=\\))?[/\\]+[^\s'"(),;]+|~(?![\w/])"""
)
OURS = {"check", "status", "unit"}  # keys of a finding whose values are fixed words, not texts from outside


@dataclass(frozen=True)
class Report:
    """The findings of all checks, the machine, and the seconds they took."""

    findings: Sequence[Finding]
    machine: Machine
    quick: bool
    seconds: float

    @property
    def wrong(self) -> list[Finding]:
        """The findings that are wrong."""
        return [finding for finding in self.findings if finding.status == "wrong"]

    @property
    def right(self) -> bool:
        """Whether no finding is wrong."""
        return not self.wrong

    @property
    def verdict(self) -> str:
        """The report as one sentence."""
        counts = Counter(finding.status for finding in self.findings)
        took = f"{self.seconds:.0f} s{', quick' if self.quick else ''}, {self.machine.backend}"
        if self.right:
            notes = f", {_number(counts['note'], 'note')} to read" if counts["note"] else ""
            return f"Nothing is wrong: {_number(counts['right'], 'check')} right{notes} ({took})."
        first = self.wrong[0]
        wrong = f"{counts['wrong']} of {_number(counts['wrong'] + counts['right'], 'check')} failed"
        expected = f", expected {_line(first.expected)}" if first.expected else ""
        return (
            f"Something is wrong: {wrong}; first {first.check}, {first.what}: {_line(first.found)}{expected} ({took})."
        )

    def table(self) -> str:
        """The report as aligned text, one line per finding."""
        rows = [("", "check", "what", "found", "expected")]
        rows += [(f.status, f.check, f.what, _line(f.found), _line(f.expected)) for f in self.findings]
        widths = [min(COLUMN_CHARS[i], max(len(row[i]) for row in rows)) for i in range(len(COLUMN_CHARS))]
        lines = (
            "  ".join(cell.ljust(width) for cell, width in zip(row, (*widths, 0), strict=True)).rstrip() for row in rows
        )
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """The report as a JSON object, without paths and without names of users or machines."""
        counts = Counter(finding.status for finding in self.findings)
        told: dict[str, Any] = private(
            {
                "format": FORMAT_VERSION, "right": self.right, "verdict": self.verdict, "quick": self.quick,
                "seconds": self.seconds,
                "counts": {status: counts[status] for status in ("right", "wrong", "note", "measured")},
                "machine": asdict(self.machine), "findings": [finding.to_dict() for finding in self.findings],
            },
            own_names(),
        )  # fmt: skip
        return told


COLUMN_CHARS = (8, 10, 52, 72)  # characters of a table's columns at most, but for the last


def examine(*, quick: bool = False, progress: Progress | None = None, checks: Mapping[str, Check] = CHECKS) -> Report:
    """Run every check; a `quick` run leaves out what takes long. `progress` is told what is being checked.

    From then on this process computes products of float32 exactly (TF32 is off), unless MLX has computed something
    before.
    """
    started = time.perf_counter()
    found: list[Finding] = []
    with _exactly():
        for name, check in checks.items():
            say = partial(_tell, progress, name)
            say("")
            found += examined(name, check, here(quick=quick, say=say))
        taken = time.perf_counter() - started
        return Report(found, machine(), quick, taken)


def examined(name: str, check: Check, setting: Setting) -> list[Finding]:
    """The findings of one check; an exception ends it, and is its last finding."""
    found: list[Finding] = []
    try:
        for finding in check(setting):
            found.append(replace(finding, check=name))
    except Exception as error:
        message = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        found.append(Finding(f"{name} to its end", "wrong", message, "no error", check=name))
    return found


def _tell(progress: Progress | None, name: str, what: str) -> None:
    if progress is not None:
        progress(f"{name}: {what}" if what else name)


@contextmanager
def _exactly() -> Iterator[None]:
    before = os.environ.get(EXACT)
    os.environ[EXACT] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ[EXACT]
        else:
            os.environ[EXACT] = before


def own_names() -> list[str]:
    """Names that identify the machine: the user's, the home folder's, the machine's."""
    names = {Path.home().name, platform.node(), platform.node().partition(".")[0]}
    with suppress(OSError, KeyError):  # a user without a name
        names.add(getpass.getuser())
    return sorted((name for name in names if len(name) > 1), key=len, reverse=True)


def private(value: Any, names: Sequence[str]) -> Any:
    """A JSON value with every path, and each of `names` as a whole word, replaced in its texts."""
    if isinstance(value, str):
        home = str(Path.home())  # which may hold blanks
        value = PATH.sub("<path>", value.replace(home, "<path>") if len(home) > 1 else value)
        for name in names:
            value = re.sub(rf"(?<![\w-]){re.escape(name)}(?![\w-])", "<name>", value)
        return value
    if isinstance(value, dict):
        return {key: each if key in OURS else private(each, names) for key, each in value.items()}
    return [private(each, names) for each in value] if isinstance(value, (list, tuple)) else value


def _line(text: str) -> str:
    """A text from outside, shortened and without control characters, as part of a line."""
    line = " ".join(text.split())
    line = "".join(c if c.isprintable() else "?" for c in line)
    return line if len(line) <= MAX_FOUND_CHARS else f"{line[:MAX_FOUND_CHARS]}..."


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")
