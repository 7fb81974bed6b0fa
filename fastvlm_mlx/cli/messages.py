"""What the command line says beside the answer: one line on stderr, in which the library's arguments stand as flags.

Messages of the library name arguments as Python does, in backquotes (`errors`): "`max_tokens` is 0" becomes "--max-tokens is 0",
"`dtype='bfloat16'`" becomes "--dtype bfloat16", and "`force=True`" becomes "--force". An argument that no flag stands for stays
as it is.
"""

import re
import sys
from collections.abc import Callable, Mapping

LONGEST = 1000  # characters of a message
ARGUMENT = re.compile(r"(?<![^\s(])`([A-Za-z_]\w*)(?:=([^`]*))?`(?![\w/])")  # a word of its own: not within a path

_flags: Callable[[], Mapping[str, str]] = dict


def use_flags(flags: Callable[[], Mapping[str, str]]) -> None:
    """Put these flags in the place of arguments, by name, from the next message on; asked for when there is one."""
    global _flags
    _flags = flags


def say(message: str) -> None:
    """One line on stderr, whatever the message holds: no line ends, no control characters, no thousands of characters."""
    print(f"fastvlm-mlx: {one_line(with_flags(message))}", file=sys.stderr, flush=True)


def one_line(text: str) -> str:
    """A text that may come from outside as one line for a terminal."""
    line = " ".join(text.split())
    line = "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in line)
    return line if len(line) <= LONGEST else f"{line[: LONGEST * 3 // 4]} ... {line[-LONGEST // 4 :]}"


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
