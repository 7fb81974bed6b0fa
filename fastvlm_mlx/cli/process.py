"""The process made usable, however it was started: interrupts that are noticed, and stdin, stdout and stderr that take any text.

What an interrupt (Ctrl-C) becomes on its way is not always known: a compiled module that is being imported makes it an
ImportError. So whoever meets an exception asks here whether there was one.
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

IMPORTING = (
    "<frozen importlib"  # Python's own code of an import, which compiled modules call and print the exceptions of
)
RETRY_SECONDS = 0.01  # seconds; what an interrupt that comes too early is put off by

_seen = False


def watch() -> None:
    """Make every interrupt a KeyboardInterrupt that is remembered until it is taken."""
    signal.signal(signal.SIGINT, _interrupt)


def take() -> bool:
    """Whether there was an interrupt since the last call; it counts as dealt with then."""
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
    """Whether MLX is just being imported, which ends the process with a page of its own where an exception gets in the way."""
    spec = getattr(sys.modules.get("mlx.core"), "__spec__", None)
    return bool(getattr(spec, "_initializing", False))


def open_streams() -> None:
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
    say(f"Note: {message}")
