"""Markdown shown as it arrives: finished blocks are printed once, the block being written is redrawn."""

import time
from types import TracebackType

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.markdown import Markdown
from rich.segment import Segment

FENCES = ("```", "~~~")
REFRESH_SECONDS = 0.05


class MarkdownWriter:
    """A context manager that writes Markdown to a console; at its end everything added has been printed."""

    def __init__(self, console: Console):
        self._console = console
        self._text = ""  # of the block being written
        self._begun = False  # whether there is one above it
        self._live = Live(console=console, transient=True, auto_refresh=False)
        self._drawn = 0.0  # when, on the monotonic clock

    def __enter__(self) -> "MarkdownWriter":
        self._live.start()
        return self

    def add(self, text: str) -> None:
        """Add text to the end."""
        self._text += text
        while end := block_end(self._text):
            self._print(self._text[:end])
            self._text = self._text[end:]
        if (now := time.monotonic()) - self._drawn > REFRESH_SECONDS:
            self._drawn = now
            self._live.update(_Tail(self._text), refresh=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.update("")
        self._live.stop()
        if self._text.strip():
            self._print(self._text)

    def _print(self, block: str) -> None:
        if self._begun:
            self._console.print()
        self._begun = True
        self._console.print(Markdown(block, hyperlinks=False))


class _Tail:
    """The last lines of a Markdown text, as many as fit on the screen."""

    def __init__(self, text: str):
        self._markdown = Markdown(text, hyperlinks=False)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = console.render_lines(self._markdown, options, pad=False)
        for line in lines[-max(1, console.height - 1) :]:
            yield from line
            yield Segment.line()


def block_end(text: str) -> int:
    """Index at which the first finished block of a Markdown text ends; 0 while there is none.

    A block ends at a blank line outside fenced code, if the line after it is neither indented nor can be a list's next
    item.
    """
    fence, place, begun, blank = "", 0, False, False
    for line in text.splitlines(keepends=True):
        bare = line.strip()
        if blank and bare and not fence and not line[0].isspace() and line[0] not in "-*+0123456789":
            return place
        if bare.startswith(FENCES):
            fence = fence if fence and not bare.startswith(fence) else "" if fence else bare[:3]
        begun = begun or bool(bare)
        blank = begun and not bare
        place += len(line)
    return 0
