"""What a prompt is made of: runs of token ids, and slots for pictures between them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ImageSlot:
    """The place of one picture: `index` counts from 0 in the order the pictures were given, `length` is its positions."""

    index: int
    length: int

    def __len__(self) -> int:
        return self.length


Piece = list[int] | ImageSlot
