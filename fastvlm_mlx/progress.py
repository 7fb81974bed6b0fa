"""A progress bar for work that takes longer than DELAY_SECONDS: on stderr in a terminal, below the cell in a notebook.

Elsewhere (in a pipe, in a log) nothing is drawn.
"""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

DELAY_SECONDS = 0.5  # seconds of work before a bar appears
REDRAW_SECONDS = 0.1  # seconds between two drawings
BAR_CHARS = 30  # characters of a bar

Item = TypeVar("Item")

_erase: Callable[[], None] | None = None  # erases the bar that is on the terminal's line now


class Track(Protocol):
    """A function that yields items unchanged and advances a bar by one step for each."""

    def __call__(self, items: Iterable[Item], /) -> Iterator[Item]:
        """Yield `items` unchanged, advancing the bar."""


def stands(erase: Callable[[], None] | None) -> None:
    """Remember how the bar that is drawn on the terminal can be erased; None where no bar is drawn any more."""
    global _erase
    _erase = erase


def make_way() -> None:
    """Erase the bar on the terminal, if there is one, so that a line can be printed.

    The bar's next step draws it again below that line.
    """
    if _erase is not None:
        _erase()


@contextmanager
def bar(label: str, total: int | None, note: Callable[[], str] = str) -> Iterator[Track]:
    """A context manager that gives a function to pass `total` items through, or as many as come where it is None.

    What `note` returns stands behind the bar. The bar is removed when the block ends.
    """
    if in_notebook():
        draw: Callable[[int], None] = _Notebook(label, total, note).draw
    elif sys.stderr is not None and sys.stderr.isatty():
        draw = _Terminal(label, total, note).draw
    else:
        yield lambda items: iter(items)
        return
    drawn, due = False, time.monotonic() + DELAY_SECONDS

    def track(items: Iterable[Item]) -> Iterator[Item]:
        nonlocal drawn, due
        for done, item in enumerate(items, start=1):
            yield item
            if time.monotonic() >= due:
                draw(done)
                drawn, due = True, time.monotonic() + REDRAW_SECONDS

    try:
        yield track
    finally:
        if drawn:
            draw(-1)


class _Terminal:
    def __init__(self, label: str, total: int | None, note: Callable[[], str]):
        self.label, self.total, self.note, self.width = label, total, note, 0

    def draw(self, done: int) -> None:
        """Draw the bar with `done` steps done over the one before; -1 erases it."""
        line = f"{self.label} {done}"
        if self.total is not None:
            filled = BAR_CHARS * done // max(self.total, 1)
            line = f"{self.label} [{'#' * filled}{'-' * (BAR_CHARS - filled)}] {done}/{self.total}"
        line = f"{line} {self.note()}".rstrip() if done >= 0 else ""
        print(f"\r{' ' * self.width}\r{line}", end="", file=sys.stderr, flush=True)
        self.width = len(line)
        stands((lambda: self.draw(-1)) if done >= 0 else None)


class _Notebook:
    def __init__(self, label: str, total: int | None, note: Callable[[], str]):
        self.label, self.total, self.note = label, total, note
        self.handle: Any = None

    def draw(self, done: int) -> None:
        """Draw the bar with `done` steps done, in one display that is updated; -1 empties it."""
        from html import escape

        from IPython.display import display

        element = f"{escape(self.label)} {done}"
        if self.total is not None:
            element = f'<progress max="{self.total}" value="{done}"></progress> {element}/{self.total}'
        element = f"{element} {escape(self.note())}".rstrip() if done >= 0 else ""
        bundle = {"text/html": element, "text/plain": ""}
        if self.handle is None:
            self.handle = display(bundle, raw=True, display_id=True)
        else:
            self.handle.update(bundle, raw=True)


def in_notebook() -> bool:
    """Whether this runs in IPython with a kernel (a notebook), and not in IPython's terminal."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return hasattr(shell, "kernel")
