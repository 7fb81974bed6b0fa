"""The pictures that ranges are measured on: those of a folder, or built-in drawings and noise."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..config import ImageConfig
from ..errors import warn
from ..hub.find import find
from ..hub.names import BUILT_IN
from ..inputs import folder
from ..inputs.image import Pixels, load_image, preprocess
from ..storage.open import OpenModel

MAX_PICTURES = 16  # of a folder, evenly from all
DRAWINGS = 8  # of the built-in model's own; for others one will do, beside noise
UNLIKE = (
    "The range of float16 is measured on a drawing and on noise, not on pictures like yours; name a folder of them "
    "(`pictures`)."
)


def measured_on(opened: OpenModel, image: ImageConfig, pictures: Path | None) -> tuple[Sequence[Pixels], str]:
    """Prepared pictures (S, S, 3), and what they are; raises ImageError.

    Of a folder, up to MAX_PICTURES. Without one, drawings that the built-in model is calibrated on, and noise, which
    drives activations farther than pictures do; for another model a FastVLMWarning says so.
    """
    if pictures is not None:
        paths = folder.in_folder(str(pictures))
        paths = paths[:: -(-len(paths) // MAX_PICTURES)]
        return [preprocess(load_image(path), image) for path in paths], f"{len(paths)} of the folder {pictures.name}"
    paths = _drawings()
    if opened.built_in:
        paths = paths[:: -(-len(paths) // DRAWINGS)]
    else:
        paths = paths[:1]
        warn(UNLIKE)
    noise = np.random.default_rng(0).integers(0, 256, (image.size, image.size, 3), dtype=np.uint8)
    return [*(preprocess(load_image(path), image) for path in paths), noise], "built-in drawings, and noise"


def first_drawing(image: ImageConfig) -> Pixels:
    """The first of the drawings that the built-in model is calibrated on, prepared (S, S, 3)."""
    return preprocess(load_image(_drawings()[0]), image)


def _drawings() -> list[str]:
    return folder.in_folder(str(find(BUILT_IN).folder / "calibration"))
