"""One of n shares of a listing: which items are its own, by their names alone, and which file its answers go to."""

import glob
import os
import re
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from ..errors import OptionError, shown

WRITTEN = re.compile(r"(\d{1,6})/(\d{1,6})")
LAUNCHED = ("MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")  # one of them is set in what `mlx.launch` starts


@dataclass(frozen=True)
class Share:
    """Share `index` of `count`, from 1 on. The only share of one is everything."""

    index: int = 1
    count: int = 1

    def holds(self, name: str) -> bool:
        """Whether an item of this name is in the share. It stays there when files are added or removed."""
        if self.count == 1:
            return True
        return int.from_bytes(blake2b(name.encode(errors="surrogateescape"), digest_size=8).digest()) % self.count == (
            self.index - 1
        )

    def file(self, out: Path) -> Path:
        """Where this share's lines go, for an output `out`: out.2-of-3.jsonl beside it."""
        return out if self.count == 1 else out.with_name(f"{out.stem}.{self.index}-of-{self.count}{out.suffix}")

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


EVERYTHING = Share()


def parse(text: str | None) -> Share:
    """A share written as "2/3"; None is everything. Raises OptionError."""
    if text is None:
        return EVERYTHING
    found = WRITTEN.fullmatch(text)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise OptionError(f"`shard` is {shown(text)}, expected i/n with i from 1 to n: '1/3', '2/3' and '3/3'.")
    return Share(int(found[1]), int(found[2]))


def files(out: Path) -> dict[Share, Path]:
    """The shares of an output that have files, or locks of files, beside it."""
    pattern = re.compile(rf"\.?{re.escape(out.stem)}\.(\d+)-of-(\d+){re.escape(out.suffix)}(\.lock)?")
    found = {}
    for path in out.parent.glob(f"*{glob.escape(out.stem)}.*-of-*"):
        if match := pattern.fullmatch(path.name):
            share = Share(int(match[1]), int(match[2]))
            found[share] = share.file(out)
    return dict(sorted(found.items(), key=lambda each: (each[0].count, each[0].index)))


def launched() -> Share | None:
    """The share of a process that `mlx.launch` has started: its rank, of as many as there are; None for any other."""
    if not any(name in os.environ for name in LAUNCHED):
        return None
    import mlx.core as mx

    group = mx.distributed.init()
    return Share(group.rank() + 1, group.size()) if group.size() > 1 else None
