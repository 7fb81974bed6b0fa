"""Features of a picture from both sides: MLX's, and those of a package as the interpreter computes it."""

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from fastvlm_mlx.decoding.loading import open_model
from fastvlm_mlx.export.encoder import Encoder, read_encoder
from fastvlm_mlx.hub.find import find

from .interpreter import Array as Array
from .interpreter import Package


def encoder_of(model: str | Path) -> Encoder:
    """The encoder of a model in float32."""
    opened = open_model(find(model))
    return read_encoder(opened, opened.resolve())


def picture(side: int, seed: int = 0) -> Array:
    """A random image (S, S, 3) uint8, smooth enough to have some structure."""
    coarse = np.random.default_rng(seed).integers(0, 256, (-(-side // 8), -(-side // 8), 3), dtype=np.uint8)
    return coarse.repeat(8, axis=0).repeat(8, axis=1)[:side, :side]


def planes(pixels: Array) -> Array:
    """Pixels (S, S, 3) uint8 as a package takes them: (1, 3, S, S) float32, 0-1."""
    return np.ascontiguousarray((pixels.astype(np.float32) / np.float32(255)).transpose(2, 0, 1)[None])


def of_package(package: Package, pixels: Array, *, exact: bool = False) -> Array:
    """What a package gives for pixels (S, S, 3) uint8."""
    return package.run({"images": planes(pixels)}, exact=exact)["image_features"]


def of_mlx(encoder: Encoder, pixels: Array) -> Array:
    """Features of pixels (S, S, 3) uint8, in the published order of channels."""
    return np.array(encoder.features(mx.array(pixels)[None]))


def difference(found: Array, expected: Array) -> float:
    """max |difference| / max |value|; NaN and infinities count as infinite."""
    assert found.shape == expected.shape
    apart = np.abs(found.astype(np.float64) - expected)
    return float(np.nan_to_num(apart, nan=np.inf).max() / np.abs(expected).max())


def cosine(found: Array, expected: Array) -> float:
    """The worst cosine of a token."""
    a, b = found[0].astype(np.float64), expected[0].astype(np.float64)
    return float(((a * b).sum(axis=-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)).min())


class PackagedTower(nn.Module):
    """A package in the place of a network's tower: pixels (B, S, S, 3) -> features (B, N, C) in our order of
    channels."""

    def __init__(self, package: Package):
        super().__init__()
        self._package = package

    def __call__(self, pixels: mx.array) -> mx.array:
        """Each picture by the interpreter."""
        rows = []
        for row in np.array(pixels, np.float32):
            images = np.ascontiguousarray(row.transpose(2, 0, 1)[None])
            rows.append(self._package.run({"images": images})["image_features"])
        features = np.concatenate(rows)
        B, N, C = features.shape
        return mx.array(features.reshape(B, N, C // 2, 2).swapaxes(2, 3).reshape(B, N, C))
