"""Where the lines of a chat come from and its answers go: what a terminal and a pipe have in common."""

from collections.abc import Callable, Iterator
from typing import Protocol

from ...decoding.answer import Answer, Chunk


class Front(Protocol):
    """Lines in, answers and notes out. `typing` says whether a person types the lines, `failed` whether anything was wrong."""

    typing: bool
    failed: bool

    def lines(self, status: Callable[[], str]) -> Iterator[str]:
        """The lines, until there are no more; `status` says in a few words how full the context is by now."""

    def show(self, chunks: Iterator[Chunk]) -> Answer:
        """Show an answer as it comes; returns it whole."""

    def full(self, text: str) -> str:
        """A text with everything in it that the line only stood for."""

    def note(self, text: str) -> None:
        """Show what is no answer."""

    def complain(self, text: str) -> None:
        """Show what is wrong with a line."""
