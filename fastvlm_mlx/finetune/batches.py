"""Samples -> batches of arrays, in an order that the seed and the step alone decide, so that a run can be taken up
anywhere.

A batch has prefixes (G, P), each the beginning that some sequences share (system prompt and pictures), and sequences
(R, L) that go on after the prefix of their `group`. Where nothing is shared P is 0, and a sequence is all of its row.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import numpy.typing as npt

from .samples import IMAGE, Sample

Ids = npt.NDArray[np.int32]
LENGTH_MULTIPLE = 8  # sequences are filled up to one, so that shapes repeat
MAX_SHARED = 16  # questions of one picture in a sequence


@dataclass(frozen=True)
class Batch:
    """Arrays of one forward pass: ids, where each position of a picture is found (-1 elsewhere), and what is learned.

    `rows`, `places`, `targets` (T,) are the sequence, the position that predicts, and the token to be learned;
    `sample_of` (T,) is the sample it belongs to, by its index in `samples`. `pictures` are the indices of the pictures
    that the positions count through.
    """

    prefix: Ids
    prefix_images: Ids
    ids: Ids
    images: Ids
    group: Ids
    rows: Ids
    places: Ids
    targets: Ids
    sample_of: Ids
    pictures: tuple[int, ...]
    samples: tuple[Sample, ...]

    @property
    def tokens(self) -> int:
        """Tokens to be learned."""
        return len(self.targets)

    @property
    def positions(self) -> int:
        """Positions that the decoder computes, filled ones counted."""
        return self.prefix.size + self.ids.size


def order(count: int, seed: int, stream: int, start: int, length: int) -> list[int]:
    """`length` indices below `count` from place `start` of an endless stream: one shuffled round after another."""
    found: list[int] = []
    while len(found) < length:
        round_number, place = divmod(start + len(found), count)
        shuffled = np.random.default_rng([seed, stream, round_number]).permutation(count)
        found += shuffled[place : place + length - len(found)].tolist()
    return found


def sequences(samples: Sequence[Sample], share: bool) -> list[tuple[Sample, ...]]:
    """What a step draws from: each row alone, or the rows of the same pictures and beginning together."""
    if not share:
        return [(sample,) for sample in samples]
    together: dict[tuple[object, ...], list[Sample]] = {}
    for sample in samples:
        together.setdefault((sample.pictures, _prefix(sample).tobytes()), []).append(sample)
    return [
        tuple(some[start : start + MAX_SHARED])
        for some in together.values()
        for start in range(0, len(some), MAX_SHARED)
    ]


def batches_of(drawn: Sequence[tuple[Sample, ...]]) -> Iterator[Batch]:
    """The drawn sequences as batches: those that share beginnings of one length together, all others in one."""
    shared = [each for each in drawn if len(each) > 1 and len(_prefix(each[0]))]
    alone = [sample for each in drawn if len(each) == 1 or not len(_prefix(each[0])) for sample in each]
    if alone:
        yield _batch([(sample, 0, 0) for sample in alone], [], 0)
    shared.sort(key=lambda each: len(_prefix(each[0])))
    for length, some in groupby(shared, lambda each: len(_prefix(each[0]))):
        groups = list(some)
        yield _batch(
            [(s, n, length) for n, each in enumerate(groups) for s in each], [each[0] for each in groups], length
        )


def _prefix(sample: Sample) -> Ids:
    """What comes before the first token to be learned, up to the last picture; nothing where a picture comes later than
    that.
    """
    shown = np.flatnonzero(sample.ids == IMAGE)
    end = int(shown[-1]) + 1 if len(shown) else 0
    return sample.ids[:end] if end < int(sample.places[0]) else sample.ids[:0]


def _batch(members: Sequence[tuple[Sample, int, int]], firsts: Sequence[Sample], start: int) -> Batch:
    """A batch of (sample, group, positions that are its group's prefix)."""
    numbers: dict[int, int] = {}
    for sample in (*firsts, *(sample for sample, _, _ in members)):
        for picture in sample.pictures:
            numbers.setdefault(picture, len(numbers))
    longest = max(len(sample) for sample, _, _ in members) - start
    longest += -longest % LENGTH_MULTIPLE
    ids = np.zeros((len(members), longest), np.int32)
    images = np.full((len(members), longest), IMAGE, np.int32)
    prefix = np.zeros((len(firsts), start), np.int32)
    prefix_images = np.full((len(firsts), start), IMAGE, np.int32)
    for row, sample in enumerate(firsts):
        prefix[row], prefix_images[row] = _spread(sample, numbers, 0, start)
    for row, (sample, _, _) in enumerate(members):
        length = len(sample) - start
        ids[row, :length], images[row, :length] = _spread(sample, numbers, start, len(sample))
    rows = [row for row, (sample, _, _) in enumerate(members) for _ in sample.places]
    return Batch(
        prefix, prefix_images, ids, images,
        group=np.array([group for _, group, _ in members], np.int32),
        rows=np.array(rows, np.int32),
        places=np.concatenate([sample.places - start - 1 for sample, _, _ in members]).astype(np.int32),
        targets=np.concatenate([sample.targets for sample, _, _ in members]).astype(np.int32),
        sample_of=np.array(rows, np.int32),
        pictures=tuple(numbers),
        samples=tuple(sample for sample, _, _ in members),
    )  # fmt: skip


def _spread(sample: Sample, numbers: dict[int, int], start: int, end: int) -> tuple[Ids, Ids]:
    """Token ids with 0 for pictures, and for each position of a picture its place among the positions of the batch's
    pictures.
    """
    ids = sample.ids
    shown = ids == IMAGE
    found = np.full(len(ids), IMAGE, np.int32)
    count = int(shown.sum())
    if count:
        each = count // len(sample.pictures)
        starts = np.array([numbers[picture] * each for picture in sample.pictures], np.int32)
        found[shown] = (starts[:, None] + np.arange(each, dtype=np.int32)).reshape(-1)
    return np.where(shown, 0, ids)[start:end].astype(np.int32), found[start:end]
