"""Answers that have been finished, by the keys of their questions: what `Rows` hands out, kept until it is taken."""

from typing import Generic, TypeVar

from .answer import Answer, Chunk
from .row import Emit

Key = TypeVar("Key")


class Finished(Generic[Key]):
    """Answers, and what went wrong in the place of one, that have come since somebody looked."""

    def __init__(self) -> None:
        self._found: list[tuple[Key, Answer | Exception]] = []

    def of(self, key: Key) -> Emit:
        """What a row is to hand its chunks to: the answer, or the error, is kept with this key."""

        def emit(chunk: Chunk | Exception) -> None:
            if isinstance(chunk, Exception):
                self.add(key, chunk)
            elif chunk.answer is not None:
                self.add(key, chunk.answer)

        return emit

    def add(self, key: Key, answer: Answer | Exception) -> None:
        """Keep one more."""
        self._found.append((key, answer))

    def take(self) -> list[tuple[Key, Answer | Exception]]:
        """All of them, in the order in which they came; they are forgotten here."""
        found, self._found = self._found, []
        return found
