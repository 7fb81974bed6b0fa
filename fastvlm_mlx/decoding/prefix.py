"""What the caches of a conversation hold, position by position, so that what is already there is not computed again.

A position is a token id, or one of an image's embeddings, known by the image's content. Positions are compared as they
are: whatever changed (an earlier turn, the system prompt, a picture), everything up to the first difference is kept,
and only that.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from ..backend import failures
from ..backend.ops import Backend
from ..backend.residency import hold
from ..inputs.pieces import ImageSlot, Piece
from ..network.kv_cache import KVCache
from ..network.model import FastVLM
from .claim import Claim

STRIDE = 64  # positions compared at a time

Position = int | tuple[bytes, int]  # a token id, or (digest of an image, index of the embedding)


def positions(pieces: Sequence[Piece], digests: Sequence[bytes]) -> list[Position]:
    """Every position of a prompt in pieces, whose image slots hold the pictures of these digests."""
    every: list[Position] = []
    for piece in pieces:
        if isinstance(piece, ImageSlot):
            every += [(digests[piece.index], index) for index in range(len(piece))]
        else:
            every += piece
    return every


def shared(ours: Sequence[Position], theirs: Sequence[Position]) -> int:
    """The length of the beginning that two sequences of positions share."""
    length = min(len(ours), len(theirs))
    start = 0
    while start < length and ours[start : start + STRIDE] == theirs[start : start + STRIDE]:
        start += STRIDE
    while start < length and ours[start] == theirs[start]:
        start += 1
    return min(start, length)


class Prefix:
    """The caches of all layers of a network, the positions they hold, and who may work on them (`claim`)."""

    def __init__(self, claim: Claim | None = None):
        self.claim = claim or Claim()
        self.held: list[Position] = []
        self.layers: list[KVCache] = []
        self._model: FastVLM | None = None  # whose positions they are
        self._held = False

    def hold(self, backend: Backend) -> None:
        """On Metal, keep the weights resident in memory for as long as this object exists."""
        if not self._held:
            hold(self, backend)
            self._held = True

    @contextmanager
    def answering(self, model: FastVLM, known: list[Position], state: int | None = None) -> Iterator[tuple[int, int]]:
        """A context manager for one answer, from what is shared with `known`, which grows by the tokens of the answer.

        Gives the number of positions kept, and the state of the claim to hold on to. Where another answer has begun in
        the meantime, the end changes nothing. Where MLX fails, everything is forgotten: the buffers it was writing to
        are those of all positions. `state` is the one to hold on to where the answer has begun already. Raises
        BusyError while another thread is answering.
        """
        begun = self.claim.begin() if state is None else state
        spoilt = False
        try:
            kept = self.keep(model, known)
            try:
                yield kept, begun
            except BaseException as error:
                spoilt = failures.spoils(error)
                raise
            finally:
                with self.claim.ending(begun) as latest:
                    if latest and spoilt:
                        self.forget()
                    elif latest:
                        self.commit(known)
        finally:
            if state is None:
                self.claim.end(begun)

    def keep(self, model: FastVLM, wanted: Sequence[Position]) -> int:
        """Trim the caches to the beginning shared with `wanted`, less its last position, whose logits are needed.

        Everything is forgotten where another network computed it. Returns how many positions are left: the prefill
        starts there.
        """
        if self._model is not model:
            self.forget()
            self.layers, self._model = model.text.make_cache(), model
        kept = shared(self.held, wanted[:-1])
        self.commit(self.held[:kept])
        return kept

    def computed_by(self, model: FastVLM) -> bool:
        """Whether what the caches hold was computed by this network."""
        return self._model is model

    def fork(self, length: int) -> "Prefix":
        """Another prefix that holds the first `length` positions; buffers are copied when either is written to."""
        other = Prefix()
        other.held, other._model = self.held[:length], self._model
        other.layers = [layer.fork(length) for layer in self.layers]
        return other

    def commit(self, known: Sequence[Position]) -> None:
        """Record that the caches hold the `known` positions, as far as every layer has come.

        An answer may be broken off at any moment: positions that some layer lacks, or that are not known, are
        forgotten.
        """
        length = min([len(known), *(layer.length for layer in self.layers)])
        self.held = list(known[:length])
        for layer in self.layers:
            layer.trim(length)

    def forget(self) -> None:
        """Forget every position and free the buffers."""
        self.held, self.layers, self._model = [], [], None

    @property
    def is_view(self) -> bool:
        """Whether a layer's buffers are still those of the prefix that this one was forked from."""
        return any(layer.is_view for layer in self.layers)

    @property
    def nbytes(self) -> int:
        """Memory of the caches, in bytes."""
        return sum(layer.nbytes for layer in self.layers)
