"""What rounding costs: the features of an encoder, and those it gives with its weights as stored and its activations in
float16.

Computed by MLX, so it says what to expect of a program and not what one gave.
"""

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from . import ranges
from .encoder import Encoder
from .options import PackageOptions
from .stored import stored, values_of


@dataclass(frozen=True)
class Comparison:
    """Features against those of MLX in float32: the largest difference over the largest value, and the worst cosine of
    a token."""

    difference: float
    cosine: float
    how: str


def between(found: mx.array, expected: mx.array, how: str) -> Comparison:
    """Compare features (1, N, C) with those expected."""
    a, b = np.array(found, np.float64)[0], np.array(expected, np.float64)[0]
    cosines = (a * b).sum(axis=-1) / np.maximum(np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1), 1e-30)
    return Comparison(float(np.abs(a - b).max() / np.abs(b).max()), float(cosines.min()), how)


def compare(encoder: Encoder, pixels: mx.array, options: PackageOptions) -> Comparison:
    """Round the encoder's weights as a float16 package stores them, for good, and say what that changes.

    Pixels are (1, S, S, 3) uint8.
    """
    run = encoder.embeddings if options.with_projector else encoder.features
    expected = run(pixels)
    mx.eval(expected)
    encoder.load_weights([(path, _rounded(array, options)) for path, array in encoder.flat_parameters().items()])

    def half(_: str, x: mx.array) -> mx.array:
        divisor = ranges.divisor(float(mx.abs(x).max().item()))  # type: ignore[arg-type]  # of one element
        return (x / divisor).astype(mx.float16).astype(mx.float32) * divisor

    with ranges.hooked(encoder, half, half):
        found = run(pixels)
    return between(found, expected, "computed by MLX, weights as stored, each layer's input and output in float16")


def _rounded(array: mx.array, options: PackageOptions) -> mx.array:
    """A weight of ours as its stored form gives it back, evaluated, float16's range left out of it."""
    weight = np.array(array, np.float32)
    if weight.ndim == 2:
        weight = weight[:, :, None, None]  # a matrix, as a 1x1 convolution
    divisor = np.float32(ranges.divisor(float(np.abs(weight).max())))
    rounded = mx.array(values_of(stored(weight / divisor, options.tower_bits)) * divisor).reshape(array.shape)
    mx.eval(rounded)
    return rounded
