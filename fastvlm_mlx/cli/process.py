"""Signals and standard streams of the process: interrupts are noticed, and stdin, stdout and stderr take any text.

An interrupt (Ctrl-C) does not always arrive as a KeyboardInterrupt: a compiled module that is being imported turns it
into an ImportError. Whoever catches an exception asks `take` whether it was an interrupt.
"""

import io
import os
import signal
import sys
import warnings
from threading import Timer
from types import FrameType

from ..errors import FastVLMWarning, OutputError
from .messages import say

# Python's own code of an import; compiled modules that call it print its exceptions.
IMPORTING = "<frozen importlib"
RETRY_SECONDS = 0.01  # seconds by which an interrupt during an import is postponed

_seen = False


def watch() -> None:
    """Remember every interrupt until `take` is called, and raise KeyboardInterrupt for it."""
    signal.signal(signal.SIGINT, _interrupt)


def take() -> bool:
    """Whether there was an interrupt since the last call."""
    global _seen
    seen, _seen = _seen, False
    return seen


def _interrupt(number: int, frame: FrameType | None) -> None:
    global _seen
    _seen = True
    if _mlx_begins() or (frame is not None and frame.f_code.co_filename.startswith(IMPORTING)):
        Timer(RETRY_SECONDS, os.kill, (os.getpid(), signal.SIGINT)).start()
    else:
        raise KeyboardInterrupt


def _mlx_begins() -> bool:
    """Whether MLX is being imported right now.

    An exception would then make it print a report of its own and end the process.
    """
    spec = getattr(sys.modules.get("mlx.core"), "__spec__", None)
    return bool(getattr(spec, "_initializing", False))


def open_streams() -> None:
    """Open standard streams that are closed, let no character fail, and print this package's warnings as lines."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # or the next file to be opened would get its number, and what is printed
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
    say(f"Note: {message}")
