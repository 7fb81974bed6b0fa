"""An array of NumPy, MLX or another library -> an 8-bit PIL image.

Enters: (H, W), (H, W, 1) grey, (H, W, 2) grey and alpha, (H, W, 3) RGB or (H, W, 4) RGBA. The range of its levels
follows from the dtype alone, never from the values: uint8 0-255, uint16 0-65535, bool black and white, floating point
0-1. Leaves: an 8-bit PIL image.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from ..errors import ImageError
from .imagefile import check_size

BAND_ELEMENTS = 1 << 22  # elements converted at a time
EXPECTED = (
    "expected (height, width), or (height, width, channels) with 1 to 4 channels, as uint8, uint16 or floating point "
    "from 0 to 1"
)


def is_array(source: object) -> bool:
    """Whether an object is an array, or gives NumPy one."""
    return isinstance(source, np.ndarray) or hasattr(type(source), "__array__") or _of_mlx(source)


def image_of(source: Any) -> Image.Image:
    """An array as an 8-bit image of mode "L", "LA", "RGB" or "RGBA"; raises ImageError."""
    values = _as_numpy(source)
    described = f"The image array is {values.shape} {values.dtype}"
    if values.ndim not in (2, 3) or 0 in values.shape or (values.ndim == 3 and values.shape[2] > 4):
        advice = (
            "; move the channels to the end: `.transpose(1, 2, 0)`" if values.ndim == 3 and values.shape[0] <= 4 else ""
        )
        advice = advice or ("; give several pictures as a list" if values.ndim == 4 else "")
        raise ImageError(f"{described}, {EXPECTED}{advice}.")
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[..., 0]
    check_size("The image array", (values.shape[1], values.shape[0]), None)
    if values.dtype != np.uint8:
        out = np.empty(values.shape, np.uint8)
        rows = max(1, BAND_ELEMENTS // values[0].size)
        for top in range(0, len(values), rows):
            out[top : top + rows] = _levels(values[top : top + rows], described)
        values = out
    planes = [np.ascontiguousarray(values[..., channel]) for channel in range(2)] if values.shape[2:] == (2,) else []
    if planes:
        return Image.merge("LA", [Image.fromarray(plane) for plane in planes])
    return Image.fromarray(np.ascontiguousarray(values))


def _levels(values: npt.NDArray[Any], described: str) -> npt.NDArray[np.uint8]:
    """The values as levels 0-255, rounded; raises ImageError for a dtype or a value outside the range."""
    if values.dtype == np.bool_:
        return values.astype(np.uint8) * np.uint8(255)
    if values.dtype.kind == "u" and values.dtype.itemsize == 2:  # of either byte order
        return ((values.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
    if not np.issubdtype(values.dtype, np.floating):
        raise ImageError(f"{described}, {EXPECTED}; if its levels are 0 to 255, use `.astype('uint8')`.")
    if not np.isfinite(values).all():
        raise ImageError(f"{described} and holds values that are not finite numbers; replace them.")
    if not (values.min() >= 0 and values.max() <= 1):
        raise ImageError(f"{described} and reaches beyond 0 to 1; divide by its greatest possible level, or clip it.")
    return np.rint(values.astype(np.float64) * 255).astype(np.uint8)


def _as_numpy(source: Any) -> npt.NDArray[Any]:
    try:
        if _of_mlx(source):
            import mlx.core as mx

            # NumPy has no bfloat16.
            return np.array(source.astype(mx.float32) if source.dtype == mx.bfloat16 else source)
        return np.asarray(source)
    except Exception as error:  # of whatever library
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ImageError(
            f"The image is a {type(source).__name__} that gives no array ({reason}); give a NumPy array."
        ) from error


def _of_mlx(source: object) -> bool:
    return type(source).__module__ == "mlx.core" and type(source).__name__ == "array"
