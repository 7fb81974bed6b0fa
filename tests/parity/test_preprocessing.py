"""Pixels bit for bit as apple/ml-fastvlm makes them: its padding, then CLIPImageProcessor with mean 0 and standard
deviation 1."""

import numpy as np
import pytest
from PIL import Image
from transformers import CLIPImageProcessorPil

from fastvlm_mlx.config import ImageConfig
from fastvlm_mlx.inputs.image import load_image, preprocess
from fastvlm_mlx.network.model import LEVELS

SIZES = {
    "square": (300, 300), "wide": (500, 200), "tall": (200, 500), "odd": (301, 200), "odder": (200, 333),
    "one off": (256, 255),
    "one pixel": (1, 1), "a line": (1, 97), "a row": (97, 1), "the size itself": (256, 256), "as wide": (256, 100),
    "as tall": (100, 256), "large": (1500, 1100), "small": (20, 31),
}  # fmt: skip


def picture(size: tuple[int, int]) -> Image.Image:
    return Image.fromarray(np.random.default_rng(sum(size)).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def apple(image: Image.Image, size: int, pad: bool) -> np.ndarray:
    """The facts of process_images at 592b4ad: a centred black square when padding, then the processor."""
    if pad:
        width, height = image.size
        square = Image.new("RGB", (max(image.size),) * 2, (0, 0, 0))
        square.paste(image, ((square.width - width) // 2, (square.height - height) // 2))
        image = square
    processor = CLIPImageProcessorPil(
        crop_size={"height": size, "width": size},
        size={"shortest_edge": size},
        image_mean=[0.0] * 3,
        image_std=[1.0] * 3,
    )
    return np.asarray(processor.preprocess(image, return_tensors="np")["pixel_values"][0]).transpose(1, 2, 0)


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("side", [256, 192])
def test_padded(size: tuple[int, int], side: int) -> None:
    ours = preprocess(load_image(picture(size)), ImageConfig(side, "pad"))
    assert ours.shape == (side, side, 3) and ours.dtype == np.uint8
    theirs = apple(picture(size), side, pad=True)
    assert theirs.dtype == np.float32
    assert np.array_equal(LEVELS[ours], theirs)


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_cropped(size: tuple[int, int]) -> None:
    ours = preprocess(load_image(picture(size)), ImageConfig(256, "crop"))
    assert np.array_equal(LEVELS[ours], apple(picture(size), 256, pad=False))


def test_levels_are_float32_quotients() -> None:
    assert np.array_equal(LEVELS, np.array([np.float32(level) / np.float32(255) for level in range(256)]))
