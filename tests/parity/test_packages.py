"""Core ML packages against PyTorch's original (timm's FastViTHD) and against MLX, computed again from the files alone.

Differences are relative to the largest feature. In float32, sums in another order through up to 46 blocks differ by a
few 1e-6; 1e-5 is what the project promises, and what tells the exact GELU from its approximations.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from fastvlm_mlx import convert_to_coreml

from ..export import features
from ..export.interpreter import Package
from . import original, stages

pytest.importorskip("fastvlm_mlx.export.coremltools").load()
pytestmark = pytest.mark.filterwarnings("ignore:The range of float16")


def written(sizes: dict[str, tuple[int, ...]], tokenizer: Path, folder: Path, side: int) -> tuple[Path, features.Array]:
    """A checkpoint of random weights, and the features that timm's tower gives for a picture, (1, N, C)."""
    model = original.build(sizes)
    checkpoint = original.save_apple(model, folder / "apple", tokenizer, image_size=side)
    found = stages.features_of(model, features.picture(side)[None])
    return checkpoint, np.ascontiguousarray(found.numpy())


@pytest.mark.parametrize("sizes", ["SMALL", "ODD", pytest.param("FULL", marks=[pytest.mark.slow, pytest.mark.large])])
def test_against_timm_and_mlx(sizes: str, tokenizer_files: Path, tmp_path: Path) -> None:
    side = 1024 if sizes == "FULL" else 256
    checkpoint, theirs = written(getattr(original, sizes), tokenizer_files, tmp_path, side)
    pixels = features.picture(side)
    ours = features.of_mlx(features.encoder_of(checkpoint), pixels)
    with torch.no_grad():
        exact = Package(convert_to_coreml(checkpoint, tmp_path / "float32.mlpackage", precision="float32"))
        found = features.of_package(exact, pixels)
        assert features.difference(found, theirs) < 1e-5 and features.difference(found, ours) < 1e-5
        half = Package(convert_to_coreml(checkpoint, tmp_path / "float16.mlpackage"))
        found = features.of_package(half, pixels)
        assert features.difference(found, ours) < 5e-3 and features.cosine(found, ours) > 0.9999
        assert features.difference(features.of_package(half, pixels, exact=True), ours) < 1e-3
        small = Package(convert_to_coreml(checkpoint, tmp_path / "int8.mlpackage", tower_bits=8))
        assert features.difference(features.of_package(small, pixels), ours) < 5e-2
