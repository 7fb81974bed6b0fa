"""The interface of a chat's front: where its lines come from and its answers go, in a terminal or a pipe."""

from collections.abc import Callable, Iterator
from typing import Protocol

from ...decoding.answer import Answer, Chunk


class Front(Protocol):
    """Gives lines, takes answers and notes.

    `typing` says whether a person types the lines, `failed` whether a line could not be used.
    """

    typing: bool
    failed: bool

    def lines(self, status: Callable[[], str]) -> Iterator[str]:
        """Yield lines until there are no more; `status()` says how full the context is."""

    def show(self, chunks: Iterator[Chunk]) -> Answer:
        """Show an answer as it arrives, and return it whole."""

    def full(self, text: str) -> str:
        """A line's text with everything in it that was abbreviated on the screen."""

    def note(self, text: str) -> None:
        """Show something that is not an answer."""

    def complain(self, text: str) -> None:
        """Show what is wrong with a line."""
