"""Weights as a Core ML package stores them: float32, float16, 8-bit integers with a scale per output channel, or a
palette.

Core ML turns the small forms back into float16 when the model is loaded or as it computes; activations stay float16.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .encoder import Weights

LEVELS_8 = 127  # of an 8-bit integer, on either side of zero
ROUNDS = 40  # of k-means; it has settled by then
BINS = 512  # of the histogram that it begins with


class Integers(NamedTuple):
    """A weight (O, ...) as q * scale: q int8, scale (O,) float16."""

    q: npt.NDArray[np.int8]
    scale: npt.NDArray[np.float16]

    def values(self) -> Weights:
        """What they stand for, float32."""
        scale = self.scale.astype(np.float32).reshape(-1, *[1] * (self.q.ndim - 1))
        return self.q.astype(np.float32) * scale


class Palette(NamedTuple):
    """A weight as places in a table: indices of its shape, uint8, and 2 ** bits values, float16."""

    indices: npt.NDArray[np.uint8]
    table: npt.NDArray[np.float16]

    @property
    def bits(self) -> int:
        """Bits of an index."""
        return len(self.table).bit_length() - 1

    def values(self) -> Weights:
        """What they stand for, float32."""
        return self.table.astype(np.float32)[self.indices]

    def packed(self) -> npt.NDArray[np.uint8]:
        """The indices, one after the other from the lowest bit of the first byte on."""
        places = self.indices.reshape(-1, 1) >> np.arange(self.bits, dtype=np.uint8) & 1
        return np.packbits(places.reshape(-1), bitorder="little")


def integers(weight: Weights) -> Integers:
    """Round a weight (O, ...) to 8 bits, each output channel with the scale that its largest value needs."""
    largest = np.abs(weight).reshape(len(weight), -1).max(axis=1)
    scale = (largest / LEVELS_8).astype(np.float16)
    wide = scale.astype(np.float32).reshape(-1, *[1] * (weight.ndim - 1))
    steps = np.divide(weight, wide, out=np.zeros_like(weight), where=wide != 0)
    return Integers(np.clip(np.rint(steps), -LEVELS_8, LEVELS_8).astype(np.int8), scale)


def palette(weight: Weights, bits: int) -> Palette:
    """Replace a weight's elements by the 2 ** bits values nearest to them all.

    That is k-means in one dimension, of float16's values, each as often as it comes.
    """
    found, places, counts = np.unique(weight.astype(np.float16), return_inverse=True, return_counts=True)
    values, mass = found.astype(np.float64), counts.astype(np.float64)
    density, edges = np.histogram(values, BINS, weights=mass)
    share = np.concatenate(
        [[0], np.cumsum(np.cbrt(density))]
    )  # for the least squared error, centres lie as the cube root
    centres = np.interp((np.arange(2**bits) + 0.5) / 2**bits, share / share[-1], edges)
    total, weighted = (np.concatenate([[0], np.cumsum(each)]) for each in (mass, mass * values))
    for _ in range(ROUNDS):
        ends = np.append(np.searchsorted(values, (centres[1:] + centres[:-1]) / 2), len(values))
        starts = np.insert(ends[:-1], 0, 0)
        held = total[ends] - total[starts]
        used = held > 0
        centres[used] = (weighted[ends] - weighted[starts])[used] / held[used]
        centres.sort()
    table = centres.astype(np.float16)
    wide = table.astype(np.float64)
    nearest = np.searchsorted((wide[1:] + wide[:-1]) / 2, values).astype(np.uint8)
    return Palette(nearest[places].reshape(weight.shape), table)


def stored(weight: Weights, bits: int | None) -> Integers | Palette | npt.NDArray[np.float16]:
    """A weight in the form that `bits` asks for: 8, 6 or 4, or None for float16.

    Only matrices (O, I, 1, 1) are stored small: filters are few, and rounding them costs most.
    """
    if bits is None or weight.shape[2:] != (1, 1):
        return weight.astype(np.float16)
    return integers(weight) if bits == 8 else palette(weight, bits)


def values_of(form: Any) -> Weights:
    """What a stored weight stands for, float32."""
    return form.values() if isinstance(form, (Integers, Palette)) else np.asarray(form, np.float32)
