"""The parts of a prompt: runs of token ids, and slots for pictures between them."""

from collections.abc import Iterable
from dataclasses import dataclass

from ..config import is_whole


@dataclass(frozen=True)
class ImageSlot:
    """The place of one picture in a prompt.

    `index` counts pictures from 0 in the order they were given, `length` is the number of image tokens.
    """

    index: int
    length: int

    def __len__(self) -> int:
        return self.length


Piece = list[int] | ImageSlot


def outside(ids: Iterable[object], vocabulary: int) -> list[object]:
    """The elements of `ids` that are not token ids from 0 to `vocabulary` - 1, the rows of the embedding."""
    return [token for token in ids if not is_whole(token) or not 0 <= token < vocabulary]
