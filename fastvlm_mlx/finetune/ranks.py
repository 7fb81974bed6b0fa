"""Processes that learn together, started by `mlx.launch`: what is added up over all, and what the first says."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np

from .watchdog import Watchdog

LAUNCHED = "MLX_RANK"  # the variable that mlx.launch sets for each process


@dataclass(frozen=True)
class Ranks:
    """This process among all: its number, how many there are, their group, and who watches over them (None for one)."""

    rank: int = 0
    size: int = 1
    group: Any = None
    watchdog: Watchdog | None = None

    def total(self, array: mx.array) -> mx.array:
        """An array added up over all processes, evaluated; waits for all of them."""
        if self.group is None:
            return array
        mx.eval(array)  # what is computed here is not waiting for others
        if self.watchdog is not None:
            self.watchdog.say("waiting")
        found: mx.array = mx.distributed.all_sum(array, group=self.group, stream=mx.cpu)
        try:
            mx.eval(found)
        except RuntimeError:  # as MLX says it, which knows less of the others than the watchdog
            if self.watchdog is not None:
                self.watchdog.lost()
            raise
        if self.watchdog is not None:
            self.watchdog.say("computing")
        return found

    def alive(self) -> None:
        """Say that this process is getting on with what it does."""
        if self.watchdog is not None:
            self.watchdog.say("computing")

    def told(self, data: bytes) -> bytes:
        """What the first process says, at all of them."""
        if self.group is None:
            return data
        own = np.frombuffer(data if self.rank == 0 else b"", np.uint8).astype(np.int32)
        length = int(np.array(self.total(mx.array([len(own)], dtype=mx.int32)))[0])
        found = self.total(mx.array(np.resize(own, length) if len(own) else np.zeros(length, np.int32)))
        return np.array(found).astype(np.uint8).tobytes()

    def shared(self, tensors: Mapping[str, mx.array]) -> dict[str, mx.array]:
        """The first process's arrays at all of them, which have arrays of the same names and shapes."""
        if self.group is None:
            return dict(tensors)
        return {name: self.total(array if self.rank == 0 else mx.zeros_like(array)) for name, array in tensors.items()}


@cache
def join() -> Ranks:
    """The processes that this one was started with, watched over from now on."""
    if LAUNCHED not in os.environ:
        return Ranks()
    group = mx.distributed.init()
    if group.size() < 2:
        return Ranks()
    ranks = Ranks(group.rank(), group.size(), group)
    return Ranks(ranks.rank, ranks.size, group, Watchdog.start(ranks.rank, ranks.size, ranks.total))
