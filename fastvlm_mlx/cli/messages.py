"""What the command line says beside the answer: one line on stderr, in which the library's arguments stand as flags.

Messages of the library name arguments as Python does, in backquotes (`errors`): "`max_tokens` is 0" becomes
"--max-tokens is 0", "`dtype='bfloat16'`" becomes "--dtype bfloat16", and "`force=True`" becomes "--force". An argument
that no flag stands for stays as it is.
"""

import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from .. import progress

MAX_MESSAGE_CHARS = 1000  # characters of a message
BAR_STEPS = 1000  # steps of a bar
ERASE = "\r\x1b[K"  # back to the line's beginning, and nothing after it
BLANKS = frozenset(
    "\n\t\u00a0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000"
)
ARGUMENT = re.compile(r"(?<![^\s(])`([A-Za-z_]\w*)(?:=([^`]*))?`(?![\w/])")  # a word of its own: not within a path

_flags: Callable[[], Mapping[str, str]] = dict


def use_flags(flags: Callable[[], Mapping[str, str]]) -> None:
    """Put these flags in the place of arguments, by name, from the next message on; asked for when there is one."""
    global _flags
    _flags = flags


def say(message: str) -> None:
    """One line on stderr, whatever the message holds: no line ends, no control characters, no thousands of characters."""
    note(f"fastvlm-mlx: {one_line(with_flags(message))}")


def note(line: str) -> None:
    """A line on stderr, on a line of its own whatever bar is being drawn there."""
    progress.make_way()
    print(line, file=sys.stderr, flush=True)


@contextmanager
def bar(label: str) -> Iterator[Any]:
    """A progress bar (typer's) of BAR_STEPS steps on a terminal's stderr, which makes way for notes."""
    import typer

    seen = sys.stderr.isatty()
    with typer.progressbar(length=BAR_STEPS, label=label, file=sys.stderr, hidden=not seen) as drawn:
        progress.stands((lambda: print(ERASE, end="", file=sys.stderr)) if seen else None)
        try:
            yield drawn
        finally:
            progress.stands(None)


def one_line(text: str) -> str:
    """A text that may come from outside as one line for a terminal."""
    line = " ".join(text.split())
    line = "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in line)
    return (
        line
        if len(line) <= MAX_MESSAGE_CHARS
        else f"{line[: MAX_MESSAGE_CHARS * 3 // 4]} ... {line[-MAX_MESSAGE_CHARS // 4 :]}"
    )


def printable(text: str) -> str:
    """Text without the characters that would steer a terminal; what a model or a file says is never a command to it."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in BLANKS else "\ufffd" for c in text)


def for_stdout(text: str) -> str:
    """What a model says as stdout takes it: made printable on a terminal, as it is into a file or a pipe."""
    return printable(text) if sys.stdout is not None and sys.stdout.isatty() else text


def with_flags(message: str) -> str:
    """A message of the library as the command that is running says it."""
    return ARGUMENT.sub(_as_flag, message) if "`" in message else message


def _as_flag(argument: re.Match[str]) -> str:
    name, value = argument.groups()
    try:
        flag = _flags().get(name)
    except Exception:  # a message is said all the same, in the middle of anything
        flag = None
    if flag is None:
        return argument[0]
    if value is None or value == "True":
        return flag
    words = value.strip("'")
    return words if flag.isupper() else f"{flag} {words}"  # a positional argument is its value
