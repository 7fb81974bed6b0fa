"""stdin, stdout and stderr made usable, however the process was started: closed, full, or in an encoding short of letters."""

import io
import os
import sys
import warnings

from ..errors import FastVLMWarning, OutputError


def make_usable() -> None:
    """Open what was closed, let no character fail, and turn the package's warnings into one line each."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # or the next file opened would take its place and receive what is printed
            os.open(os.devnull, os.O_RDWR)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: PTH123, SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace" if stream is sys.stderr else "replace")
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", FastVLMWarning)
        warnings.showwarning = _show


def flush() -> None:
    """Write out what stdout still holds, so that a full disk is noticed; raises OutputError."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        raise OutputError(f"The answer cannot be written ({error.strerror}); check where stdout leads.") from error


def _show(message: Warning | str, *_: object, **__: object) -> None:
    from . import say

    say(f"Note: {message}")
