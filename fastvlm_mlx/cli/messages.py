"""Messages on stderr: one line each, in which the library's arguments appear as flags.

The library's messages name arguments as Python does, in backquotes (see `errors`): "`max_tokens` is 0" becomes
"--max-tokens is 0", "`dtype='bfloat16'`" becomes "--dtype bfloat16", and "`force=True`" becomes "--force". An argument
without a flag stays as it is.
"""

import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from .. import progress

MAX_MESSAGE_CHARS = 1000  # characters of a message
BAR_STEPS = 1000  # steps of a bar
ERASE = "\r\x1b[K"  # to the beginning of the line, then erase to its end
BLANKS = frozenset(
    "\n\t\u00a0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000"
)
ARGUMENT = re.compile(r"(?<![^\s(])`([A-Za-z_]\w*)(?:=([^`]*))?`(?![\w/])")  # a separate word, not a part of a path

_flags: Callable[[], Mapping[str, str]] = dict


def use_flags(flags: Callable[[], Mapping[str, str]]) -> None:
    """Set the function that gives argument -> flag; it is called when there is a message."""
    global _flags
    _flags = flags


def say(message: str) -> None:
    """Print a message on stderr as one line of at most MAX_MESSAGE_CHARS characters, without control characters."""
    note(f"fastvlm-mlx: {one_line(with_flags(message))}")


def note(line: str) -> None:
    """Print a line on stderr, after erasing a progress bar that is drawn there."""
    progress.make_way()
    print(line, file=sys.stderr, flush=True)


@contextmanager
def bar(label: str) -> Iterator[Any]:
    """A context manager with typer's progress bar of BAR_STEPS steps on stderr, which is erased for notes."""
    import typer

    seen = sys.stderr.isatty()
    with typer.progressbar(length=BAR_STEPS, label=label, file=sys.stderr, hidden=not seen) as drawn:
        progress.stands((lambda: print(ERASE, end="", file=sys.stderr)) if seen else None)
        try:
            yield drawn
        finally:
            progress.stands(None)


def one_line(text: str) -> str:
    """A text from outside as one line that a terminal can show."""
    line = " ".join(text.split())
    line = "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in line)
    if len(line) <= MAX_MESSAGE_CHARS:
        return line
    return f"{line[: MAX_MESSAGE_CHARS * 3 // 4]} ... {line[-MAX_MESSAGE_CHARS // 4 :]}"


def printable(text: str) -> str:
    """Text in which every character that could steer a terminal is replaced by U+FFFD."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in BLANKS else "\ufffd" for c in text)


def for_stdout(text: str) -> str:
    """A model's text for stdout: `printable` on a terminal, unchanged in a file or a pipe."""
    return printable(text) if sys.stdout is not None and sys.stdout.isatty() else text


def with_flags(message: str) -> str:
    """A message of the library with its arguments replaced by the flags of the command that is running."""
    return ARGUMENT.sub(_as_flag, message) if "`" in message else message


def _as_flag(argument: re.Match[str]) -> str:
    name, value = argument.groups()
    try:
        flag = _flags().get(name)
    except Exception:  # a message has to be printed whatever is going on
        flag = None
    if flag is None:
        return argument[0]
    if value is None or value == "True":
        return flag
    words = value.strip("'")
    return words if flag.isupper() else f"{flag} {words}"  # a positional argument is its value
