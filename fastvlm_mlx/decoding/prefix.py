"""What the caches of a conversation hold, position by position, so that what is already there is not computed again.

A position is a token id, or one of an image's embeddings, known by the image's content. Positions are compared as they are:
whatever changed (an earlier turn, the system prompt, a picture), everything up to the first difference is kept, and only that.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from ..inputs.prompt import ImageSlot, Piece
from ..network.kv_cache import KVCache

Position = int | tuple[bytes, int]  # a token id, or (digest of an image, index of the embedding)


def positions(pieces: Sequence[Piece], digests: Sequence[bytes]) -> list[Position]:
    """The positions of a prompt whose images have these digests."""
    every: list[Position] = []
    for piece in pieces:
        if isinstance(piece, ImageSlot):
            every += [(digests[piece.index], index) for index in range(len(piece))]
        else:
            every += piece
    return every


class Prefix:
    """The caches of all layers, and the positions they hold."""

    def __init__(self, layers: list[KVCache]):
        self.layers = layers
        self.held: list[Position] = []
        self.turn = 0  # counts the answers begun, so that one left unfinished can tell that another has taken over

    @contextmanager
    def answering(self, known: list[Position]) -> Iterator[int]:
        """Keep what is shared with `known`; it may grow meanwhile, and is what the caches hold when the block ends.

        Gives the number of positions kept. Where another answer has begun in the meantime, the end changes nothing.
        """
        kept = self.keep(known)
        turn = self.turn
        try:
            yield kept
        finally:
            if self.turn == turn:
                self.settle(known)

    def keep(self, wanted: Sequence[Position]) -> int:
        """Forget all but the beginning shared with `wanted`, and at least its last position, whose logits are still needed.

        Returns how many positions are left: the prefill starts there.
        """
        self.turn += 1
        shared = 0
        for ours, theirs in zip(self.held, wanted[:-1], strict=False):
            if ours != theirs:
                break
            shared += 1
        self.settle(self.held[:shared])
        return shared

    def settle(self, known: Sequence[Position]) -> None:
        """Say what the caches hold, after something was computed: `known` positions, as far as every layer has come.

        An answer may be broken off at any moment; what some layer lacks, or nobody can name, is forgotten.
        """
        length = min([len(known), *(layer.length for layer in self.layers)])
        self.held = list(known[:length])
        for layer in self.layers:
            layer.trim(length)

    @property
    def nbytes(self) -> int:
        """Memory of the caches, in bytes."""
        return sum(layer.nbytes for layer in self.layers)
