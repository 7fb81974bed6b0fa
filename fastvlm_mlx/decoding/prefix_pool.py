"""Caches of answers that are over, kept for questions that begin alike, up to a bounded number of bytes.

Enters: the positions of a prompt. Leaves: a `Prefix` that holds as many of them as any answer, over or under way, has
computed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ..network.model import FastVLM
from .prefix import Position, Prefix, shared

POOL_BYTES = 512_000_000  # 20,000 positions of the 0.5B model in float32, 9,000 of the 7B in bfloat16


@dataclass(eq=False)
class Entry:
    """A prefix, and to whom it may be given: `salt` tells users apart who must not learn of each other's questions.

    `nbytes` is the memory it takes while it is not in use.
    """

    prefix: Prefix
    salt: bytes
    in_use: bool = True
    nbytes: int = 0


class PrefixPool:
    """Prefixes by what they hold; of those not in use, the one unused for longest goes first when there are too many.

    Positions are compared one by one, so nobody is given what belongs to another prompt. Used by one thread; the counts
    may be read by others.
    """

    def __init__(self, capacity: int = POOL_BYTES):
        """`capacity` is how many bytes the prefixes that are not in use may take; 0 keeps none."""
        self.capacity = capacity
        self.nbytes = 0  # of the prefixes that are not in use
        self.hits = self.misses = 0  # questions that found a part of their prompt, and those that found nothing
        self._entries: list[Entry] = []  # the one used last stands last
        self._model: FastVLM | None = None

    def __len__(self) -> int:
        """Prefixes that are not in use."""
        return sum(not entry.in_use for entry in self._entries)

    def take(self, model: FastVLM, wanted: Sequence[Position], salt: bytes = b"", multiple: int = 1) -> Entry:
        """A prefix to go on from, in use from now on: the longest beginning of `wanted` that any of this salt holds.

        The last position is left out at least, whose logits are needed, and as many as make the rest a `multiple`. A
        prefix that is continued where it ends is given itself; one that is in use, or holds something else behind, is
        forked.
        """
        if model is not self._model:  # other weights have computed what is here
            self.clear()
            self._model = model
        found, kept, before = None, 0, wanted[:-1]
        for entry in reversed(self._entries):
            if entry.salt == salt and entry.prefix.computed_by(model):
                length = shared(entry.prefix.held, before) // multiple * multiple
                if length > kept:
                    found, kept = entry, length
        if found is None:
            self.misses += 1
            entry = Entry(Prefix(), salt)
            entry.prefix.keep(model, wanted)
        else:
            self.hits += 1
            self._remove(found)
            if found.in_use or kept < len(found.prefix.held):
                self._add(found)
                entry = Entry(found.prefix.fork(kept), salt)
            else:
                entry = found
        entry.in_use, entry.nbytes = True, 0
        self._add(entry)
        return entry

    def give_back(self, entry: Entry, known: Sequence[Position]) -> None:
        """Keep a prefix that is no longer in use, or what it holds of `known`, in place of those that hold no more.

        A fork that was never written to is not kept: it holds nothing new, and the whole memory of another's buffers.
        """
        self._remove(entry)
        if entry.prefix.is_view:
            return
        entry.prefix.commit(known)
        held = entry.prefix.held
        idle = [other for other in self._entries if not other.in_use and other.salt == entry.salt]
        alike = [(other, shared(other.prefix.held, held)) for other in idle]
        longer = next((other for other, length in alike if length == len(held)), None)
        if longer is not None:
            self._remove(longer)
            self._add(longer)
            return
        for other, length in alike:
            if length == len(other.prefix.held):
                self._remove(other)
        entry.in_use, entry.nbytes = False, entry.prefix.nbytes
        self._add(entry)
        while self.nbytes > self.capacity:
            self._remove(next(other for other in self._entries if not other.in_use))

    def drop(self, entry: Entry) -> None:
        """Keep nothing of a prefix whose computation failed."""
        self._remove(entry)

    def clear(self, *, in_use: bool = False) -> None:
        """Forget every prefix that is not in use, or the others too, which must not be given back then."""
        self._entries = [] if in_use else [entry for entry in self._entries if entry.in_use]
        self.nbytes = 0

    def _add(self, entry: Entry) -> None:
        self._entries.append(entry)
        self.nbytes += entry.nbytes

    def _remove(self, entry: Entry) -> None:
        self._entries.remove(entry)
        self.nbytes -= entry.nbytes
