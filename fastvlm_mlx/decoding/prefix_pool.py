"""Caches of answers that are over, kept for questions that begin alike, up to a bounded number of bytes.

Enters: the positions of a prompt. Leaves: a `Prefix` that holds as many of them as any answer, over or under way, has computed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ..network.model import FastVLM
from .prefix import Position, Prefix, shared

POOL_BYTES = 512_000_000  # 20,000 positions of the 0.5B model in float32, 9,000 of the 7B in bfloat16


@dataclass(eq=False)
class Entry:
    """A prefix, and to whom it may be given: `salt` tells users apart who must not learn of each other's questions."""

    prefix: Prefix
    salt: bytes
    in_use: bool = True


class PrefixPool:
    """Prefixes by what they hold; of those not in use, the one unused for longest goes first when `capacity` is exceeded.

    Positions are compared one by one, so nobody is given what belongs to another prompt. Used by one thread.
    """

    def __init__(self, capacity: int = POOL_BYTES):
        """`capacity` is in bytes; 0 keeps nothing once its answer is over."""
        self.capacity = capacity
        self.hits = self.misses = 0  # questions that found a part of their prompt, and those that found nothing
        self._entries: list[Entry] = []  # the one used last stands last

    @property
    def nbytes(self) -> int:
        """Memory of the prefixes that are not in use, in bytes."""
        return sum(entry.prefix.nbytes for entry in list(self._entries) if not entry.in_use)

    def __len__(self) -> int:
        """Prefixes that are not in use."""
        return sum(not entry.in_use for entry in self._entries)

    def take(self, model: FastVLM, wanted: Sequence[Position], salt: bytes = b"", multiple: int = 1) -> Entry:
        """A prefix to go on from: it holds the longest beginning of `wanted` that any entry of this salt has, and is in use.

        At least the last position is left out, whose logits are needed; and as many as make the rest a `multiple`. An entry that
        is continued as it is, is given itself; one that is in use, or holds something else behind, is forked.
        """
        found, kept = None, 0
        for entry in reversed(self._entries):
            if entry.salt == salt:
                length = shared(entry.prefix.held, wanted[:-1]) // multiple * multiple
                if length > kept:
                    found, kept = entry, length
        if found is None:
            self.misses += 1
            entry = Entry(Prefix(), salt)
            entry.prefix.keep(model, wanted)
        else:
            self.hits += 1
            self._entries.remove(found)
            if found.in_use or kept < len(found.prefix.held):
                self._entries.append(found)
                entry = Entry(found.prefix.fork(kept), salt)
            else:
                entry = found
        entry.in_use = True
        self._entries.append(entry)
        return entry

    def give_back(self, entry: Entry, known: Sequence[Position]) -> None:
        """Keep a prefix whose answer is over: what it holds of `known`, in place of whatever holds no more than that."""
        self._entries.remove(entry)
        entry.prefix.commit(known)
        held = entry.prefix.held
        if not held or entry.prefix.nbytes > self.capacity:
            return
        idle = [other for other in self._entries if not other.in_use and other.salt == entry.salt]
        for other in idle:
            if shared(other.prefix.held, held) == len(held):
                self._entries.remove(other)
                self._entries.append(other)
                return
        for other in idle:
            if shared(other.prefix.held, held) == len(other.prefix.held):
                self._entries.remove(other)
        entry.in_use = False
        self._entries.append(entry)
        excess = self.nbytes - self.capacity
        for other in [other for other in self._entries if not other.in_use]:
            if excess <= 0:
                break
            excess -= other.prefix.nbytes
            self._entries.remove(other)

    def drop(self, entry: Entry) -> None:
        """Keep nothing of a prefix whose computation failed."""
        if entry in self._entries:
            self._entries.remove(entry)

    def clear(self) -> None:
        """Forget every prefix that is not in use."""
        self._entries = [entry for entry in self._entries if entry.in_use]
