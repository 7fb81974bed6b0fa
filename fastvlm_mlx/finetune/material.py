"""Everything a run learns from and is measured on, at one resolution: samples, their pictures, and what the tower made
of them.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import mlx.core as mx
import numpy as np

from ..decoding.engine import Engine
from ..decoding.image_cache import digest
from ..inputs.image import Pixels
from .batches import Batch, batches_of, sequences
from .features import Features
from .learner import Part
from .options import NONE, TuneOptions
from .rows import Row
from .samples import Pictures, Sample, open_pictures, samples_of

HELD_OUT_SHARE, OLD_HELD_OUT_SHARE = 0.1, 0.2  # of the pictures of new rows, and of replayed ones
MAX_HELD_OUT_ROWS = 200  # of each
LEAST_PICTURES = 5  # below, none are held out
Progress = Callable[[str, int, int], None]  # what is being done, how many of it, of how many


@dataclass(frozen=True)
class Rows:
    """The rows of a run: to learn from, held out of them, replayed, and held out of those."""

    new: list[Row]
    held_out: list[Row]
    old: list[Row]
    old_held_out: list[Row]

    def all(self) -> list[list[Row]]:
        """In the order of the fields."""
        return [self.new, self.held_out, self.old, self.old_held_out]


def divided(new: Sequence[Row], held_out: Sequence[Row] | None, old: Sequence[Row], seed: int) -> Rows:
    """Rows with some held out by their pictures, unless those are given."""
    kept, apart = (list(new), list(held_out)) if held_out is not None else _split(new, HELD_OUT_SHARE, seed)
    old_kept, old_apart = _split(old, OLD_HELD_OUT_SHARE, seed + 1)
    return Rows(kept, apart, old_kept, old_apart)


def _split(rows: Sequence[Row], share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Rows to learn from, and those of a share of the pictures (of the rows, where there are no pictures)."""
    keys = [repr(row.images) if row.images else f"row {number}" for number, row in enumerate(rows)]
    pictures = list(dict.fromkeys(keys))
    if len(pictures) < LEAST_PICTURES:
        return list(rows), []
    shuffled = [pictures[i] for i in np.random.default_rng([seed, 2]).permutation(len(pictures))]
    chosen = set(shuffled[: max(1, round(share * len(pictures)))])
    apart = [row for row, key in zip(rows, keys, strict=True) if key in chosen][:MAX_HELD_OUT_ROWS]
    return [row for row, key in zip(rows, keys, strict=True) if key not in chosen], apart


@dataclass(frozen=True)
class Material:
    """Samples at one resolution, as `Rows` has them: sequences to draw from, and batches to be measured on."""

    engine: Engine
    new: list[tuple[Sample, ...]]
    old: list[tuple[Sample, ...]]
    held_out: list[Batch]
    old_held_out: list[Batch]
    pictures: Pictures
    features: Features
    tower_learns: bool

    def part(self, batch: Batch) -> Part:
        """A batch with what the learner needs of its pictures."""
        sources = [self.pictures.sources[index] for index in batch.pictures]
        if self.tower_learns:
            return batch, [mx.array(self.engine.pixels(source)) for source in sources]
        return batch, self.features.of([self.pictures.digests[index] for index in batch.pictures], sources)

    def parts(self, drawn: Sequence[tuple[Sample, ...]]) -> list[Part]:
        """Drawn sequences as batches with their pictures."""
        return [self.part(batch) for batch in batches_of(drawn)]


def samples_at(engine: Engine, rows: Rows) -> tuple[list[list[Sample]], int]:
    """The samples of all rows, in the order of `Rows.all`, and how many pictures they show; raises PromptError."""
    numbers: dict[object, int] = {}
    return [samples_of(engine, some, numbers) for some in rows.all()], len(numbers)


def prepare(engine: Engine, rows: Rows, options: TuneOptions, progress: Progress) -> Material:
    """Render all rows and encode all pictures; raises PromptError and ImageError that name what cannot be used."""
    every, count = samples_at(engine, rows)
    tower_learns = "tower" in (options.train or ())
    features = Features(engine, NONE if tower_learns else options.cache)

    def seen(index: int, pixels: Pixels) -> None:
        if not tower_learns:
            features.keep(digest(pixels), pixels)
        progress("Looking at pictures" if tower_learns else "Encoding pictures", index + 1, count)

    pictures = open_pictures(engine, [sample for some in every for sample in some], seen)
    new, held_out, old, old_held_out = every
    return Material(
        engine, sequences(new, options.share), sequences(old, options.share), _measured(held_out, options),
        _measured(old_held_out, options), pictures, features, tower_learns,
    )  # fmt: skip


def _measured(samples: list[Sample], options: TuneOptions) -> list[Batch]:
    ordered = sorted(samples, key=len)
    groups = (ordered[start : start + options.batch] for start in range(0, len(ordered), options.batch))
    return [batch for some in groups for batch in batches_of([(sample,) for sample in some])]


def fingerprint(materials: Iterable[Material]) -> str:
    """What identifies the data of a run: every token, every place to be learned, every picture, at every resolution."""
    found = blake2b(digest_size=16)
    for material in materials:
        for sample in (sample for some in (*material.new, *material.old) for sample in some):
            found.update(sample.ids.tobytes() + sample.places.tobytes())
            for picture in sample.pictures:
                found.update(material.pictures.digests[picture])
    return found.hexdigest()
