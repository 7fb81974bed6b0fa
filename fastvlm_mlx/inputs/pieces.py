"""What a prompt is made of: runs of token ids, and slots for pictures between them."""

from collections.abc import Iterable
from dataclasses import dataclass

from ..config import is_whole


@dataclass(frozen=True)
class ImageSlot:
    """The place of one picture: `index` counts from 0 in the order the pictures were given, `length` is its positions."""

    index: int
    length: int

    def __len__(self) -> int:
        return self.length


Piece = list[int] | ImageSlot


def outside(ids: Iterable[object], vocabulary: int) -> list[object]:
    """Those of `ids` that are no token ids from 0 to `vocabulary` - 1, the rows of an embedding, beyond which nothing is read."""
    return [token for token in ids if not is_whole(token) or not 0 <= token < vocabulary]
