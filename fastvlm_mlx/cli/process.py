"""Interrupts (Ctrl-C) as KeyboardInterrupt, and whether there was one.

What an interrupt becomes on its way is not always known: a compiled module that is being imported makes it an ImportError. So
whoever meets an exception asks here.
"""

import signal
from types import FrameType

_seen = False


def watch() -> None:
    """From now on."""
    signal.signal(signal.SIGINT, _interrupt)


def take() -> bool:
    """Whether there was an interrupt; from now on it counts as dealt with."""
    global _seen
    seen, _seen = _seen, False
    return seen


def _interrupt(number: int, frame: FrameType | None) -> None:
    global _seen
    _seen = True
    raise KeyboardInterrupt
