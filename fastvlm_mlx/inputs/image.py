"""A picture -> the tower's input: (S, S, 3) RGB uint8, exactly as Apple's preprocessing makes it.

From 8-bit RGB on it is bit for bit apple/ml-fastvlm's process_images at 592b4ad: black bars to a square (or, for
"crop", the shorter edge to S and a centred cut), Pillow's bicubic. The steps before that are ours: EXIF orientation is
applied, 16-bit grey scaled, transparency composed on white (on black where a drawing is white itself). Memory is in
proportion to the picture and to S, however long and narrow the picture is.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from os import PathLike, fsdecode
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image

from ..config import ImageConfig
from ..errors import ImageError, about, shown, warn
from ..files import paths
from . import array, imagefile, tiff
from .imagefile import MAX_PIXELS

STRIP_PIXELS = 1 << 22  # pixels converted or resized at a time
SLIM_RATIO = 4  # ratio of the sides above which a padded picture is mostly black

MAX_INVISIBLE_ALPHA = 3  # greatest alpha that counts as invisible
FAINT_SHARE = 0.9  # of a drawing's pixels, above which it is white on white
FAINT_LEVELS = 32  # levels (of 255) by which a pixel has to differ from its ground to be visible

Source = (
    str | PathLike[str] | bytes | bytearray | memoryview | BinaryIO | Image.Image | npt.NDArray[Any] | Mapping[str, Any]
)
Pixels = npt.NDArray[np.uint8]
Images = Source | Sequence[Source] | None

EXIF_TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # the transpose that undoes each EXIF orientation


def as_list(images: Images) -> list[Source]:
    """One picture, several or None as a list of pictures."""
    if images is None:
        return []
    return list(images) if isinstance(images, (list, tuple)) else [images]  # type: ignore[list-item]


def load_image(source: Source, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Load a picture as an upright 8-bit RGB image; raises ImageError.

    `source` is a path (~ and file:// are resolved), a file's bytes, an open file, a PIL image, an array (see
    `inputs.array`), or a dict with "bytes" or "path" as the library datasets has them. A file of more than `max_pixels`
    pixels is refused before it is decoded. Of an animation or a document with several pages the first picture is taken,
    with a FastVLMWarning.
    """
    imagefile.check_max_pixels(max_pixels)
    if isinstance(source, Mapping):
        source = _of_dict(source)
    if isinstance(source, Image.Image):
        imagefile.check_size("The image", source.size, None)
        return _upright_rgb(source, "The image")
    if isinstance(source, (str, PathLike)):
        path = fsdecode(source)
        name = shown(path)
        with about(paths.local(path)):
            return _upright_rgb(imagefile.decode(imagefile.read(path), name, max_pixels), name)
    if isinstance(source, (bytes, bytearray, memoryview)) or hasattr(source, "read"):
        data = imagefile.read_open(source) if hasattr(source, "read") else bytes(source)
        return _upright_rgb(imagefile.decode(data, "The image", max_pixels), "The image")
    if array.is_array(source):
        return _upright_rgb(array.image_of(source), "The image array")
    raise ImageError(
        f"The image is a {type(source).__name__}, expected a path, bytes, an open file, a PIL image or an array; give "
        "one of these."
    )


def _of_dict(source: Mapping[str, Any]) -> Source:
    """The picture in a row of the library datasets: its bytes, else its path; raises ImageError."""
    found: Source | None = source.get("bytes")
    if found is None or (isinstance(found, bytes) and not found):
        found = source.get("path")
    if (
        isinstance(found, np.ndarray) and found.dtype == np.uint8 and found.ndim == 1
    ):  # pyarrow's form of a file's bytes
        found = found.tobytes()
    if not isinstance(found, (str, PathLike, bytes, bytearray, memoryview)):
        raise ImageError(
            f"The image is a dict of {shown(list(source))}, expected 'bytes' or 'path' of a picture in it."
        )
    return found


def preprocess(image: Image.Image, config: ImageConfig) -> Pixels:
    """An upright RGB image as pixels (S, S, 3), RGB uint8."""
    if config.fit == "pad":
        return _pad_and_resize(image, config.size)
    return _resize_and_crop(image, config.size)


def _upright_rgb(image: Image.Image, name: str) -> Image.Image:
    """An image turned and mirrored as its EXIF orientation says, in 8-bit RGB; EXIF that cannot be read is ignored."""
    tiff.check_opened(image, name)
    try:
        image.load()
    except OSError as error:  # a PIL image opened by the caller, and damaged
        raise ImageError(f"{name} is damaged ({error}); save or fetch it again.") from error
    except Exception as error:
        raise ImageError(f"{name} has no pixels to read, being closed or damaged ({error}); open it again.") from error
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:
        orientation = None
    try:
        rgb = _to_rgb(image, name)
        turn = EXIF_TRANSPOSES.get(orientation) if isinstance(orientation, int) else None
        if turn is None:
            return rgb
        upright = rgb.transpose(turn)
        upright.info = {}  # it includes the orientation, which has been applied
        return upright
    except (ValueError, MemoryError) as error:
        raise ImageError(f"{name} cannot be made RGB ({error or 'out of memory'}); save it as PNG or JPEG.") from error


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    """An image in 8-bit RGB: 16-bit grey is scaled down, transparency composed on a ground."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in ("I", "F"):
        raise ImageError(f"{name} has 32 bits for each grey level, of unknown range; save it with 8 or 16 bits.")
    if image.mode.startswith("I;16"):
        if not isinstance(image.info.get("transparency"), int):
            return _strip_by_strip(image, lambda strip: _grey_of_16_bits(strip).convert("RGB"))
        return _on_a_ground(image, _grey_of_16_bits, name)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        return _on_a_ground(image, lambda strip: strip.convert("LA") if strip.mode == "La" else strip, name)
    return image.convert("RGB")


def _strip_by_strip(image: Image.Image, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """An RGB image converted in strips of rows, so that the intermediate forms take little memory."""
    out = Image.new("RGB", image.size)
    rows = max(1, STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(image.height, top + rows)))
        out.paste(convert(strip), (0, top))
    return out


def _on_a_ground(image: Image.Image, convert: Callable[[Image.Image], Image.Image], name: str) -> Image.Image:
    """An image with transparency composed on white; `convert` turns a strip into something that can become RGBA.

    It is composed on black where a drawing hardly differs from white. Where every pixel is transparent although there
    are colours, the transparency is left out. Both come with a FastVLMWarning.
    """
    colours, alphas, darkest, drawn, faint = [(255, 0)] * 3, (255, 0), 255, 0, 0

    def on_white(strip: Image.Image) -> Image.Image:
        nonlocal colours, alphas, darkest, drawn, faint
        rgba = convert(strip).convert("RGBA")
        *bands, alpha = rgba.getextrema()
        colours = [_union(*pair) for pair in zip(colours, bands, strict=True)]  # type: ignore[arg-type]
        alphas = _union(alphas, alpha)  # type: ignore[arg-type]
        composed = _composed(rgba, "white")
        darkest = min(darkest, *(low for low, _ in composed.getextrema()))  # type: ignore[misc]
        visible = np.asarray(rgba.getchannel("A")) > FAINT_LEVELS
        drawn += int(np.count_nonzero(visible))
        faint += int(np.count_nonzero(visible & (np.asarray(composed).min(axis=-1) >= 255 - FAINT_LEVELS)))
        return composed

    white = _strip_by_strip(image, on_white)
    if alphas[1] <= MAX_INVISIBLE_ALPHA:
        if all(low == high for low, high in colours):
            return white
        warn(f"{name} is transparent everywhere, and there are colours all the same; its transparency is left out.")
        return _strip_by_strip(image, lambda strip: convert(strip).convert("RGBA").convert("RGB"))
    lines = drawn < image.width * image.height / 2  # a drawing, not objects on a white ground of their own
    if (
        alphas[0] < 255
        and alphas[1] > FAINT_LEVELS
        and (darkest >= 255 - FAINT_LEVELS or (lines and faint >= FAINT_SHARE * drawn))
    ):
        warn(f"{name} is white on transparency; it is composed on black.")
        return _strip_by_strip(image, lambda strip: _composed(convert(strip).convert("RGBA"), "black"))
    return white


def _composed(rgba: Image.Image, ground: str) -> Image.Image:
    return Image.alpha_composite(Image.new("RGBA", rgba.size, ground), rgba).convert("RGB")


def _union(one: tuple[int, int], other: tuple[int, int]) -> tuple[int, int]:
    """The smallest range (low, high) that holds two ranges."""
    return min(one[0], other[0]), max(one[1], other[1])


def _grey_of_16_bits(strip: Image.Image) -> Image.Image:
    """Levels 0-65535 scaled to 0-255 and rounded; with alpha where one level is declared transparent."""
    levels = np.asarray(strip).astype(np.uint32)
    grey = Image.fromarray(((levels * 255 + 32767) // 65535).astype(np.uint8))
    transparent = strip.info.get("transparency")
    if not isinstance(transparent, int):
        return grey
    return Image.merge("LA", [grey, Image.fromarray(np.where(levels == transparent, 0, 255).astype(np.uint8))])


def _pad_and_resize(image: Image.Image, size: int) -> Pixels:
    """Black bars to a centred square, then bicubic to (size, size, 3); the square itself is never in memory.

    Pillow resizes along rows first and rounds to 8 bits in between, so resizing padded strips of rows, and then of
    columns, gives the same bits.
    """
    width, height = image.size
    side = max(width, height)
    out = np.zeros((size, size, 3), np.uint8)
    if height > SLIM_RATIO * width:
        first, columns = _without_bars(np.asarray(image), side, size)
        out[:, first : first + columns.shape[1]] = _padded_columns(columns, side, size)
    elif width > SLIM_RATIO * height:
        first, rows = _without_bars(_padded_rows(image, side, size).swapaxes(0, 1), side, size)
        out[first : first + rows.shape[1]] = rows.swapaxes(0, 1)
    else:
        out[:] = _padded_columns(_padded_rows(image, side, size), side, size)
    return out


def _padded_rows(image: Image.Image, side: int, size: int) -> Pixels:
    """(height, size, 3): every row with black bars to `side` pixels, then resized to `size`."""
    width, height = image.size
    rows = np.empty((height, size, 3), np.uint8)
    step = max(1, STRIP_PIXELS // side)
    for start in range(0, height, step):
        end = min(height, start + step)
        strip = Image.new("RGB", (side, end - start))
        strip.paste(image.crop((0, start, width, end)), ((side - width) // 2, 0))
        rows[start:end] = np.asarray(strip.resize((size, end - start), Image.Resampling.BICUBIC))
    return rows


def _padded_columns(rows: Pixels, side: int, size: int) -> Pixels:
    """(size, W, 3): every column of rows (H, W, 3) with black bars to `side` pixels, then resized to `size`."""
    height, width, _ = rows.shape
    top = (side - height) // 2
    columns = np.empty((size, width, 3), np.uint8)
    step = max(1, STRIP_PIXELS // side)
    for start in range(0, width, step):
        end = min(width, start + step)
        strip = np.zeros((side, end - start, 3), np.uint8)
        strip[top : top + height] = rows[:, start:end]
        columns[:, start:end] = np.asarray(Image.fromarray(strip).resize((end - start, size), Image.Resampling.BICUBIC))
    return columns


# Pillow's bicubic, src/libImaging/Resample.c: a = -1/2, two source pixels to either side times the scale where it
# shrinks, weights rounded to 22 bits after the point.
BICUBIC_SUPPORT, BICUBIC_A, PRECISION_BITS = 2.0, -0.5, 22


def _without_bars(pixels: Pixels, side: int, size: int) -> tuple[int, Pixels]:
    """Pixels (M, N, 3) with black bars along the second axis to `side`, resized along it to `size`.

    Gives what Pillow gives, in time that depends on the picture instead of the square: weights that would fall on the
    bars are left out. Returns the first position that the picture reaches, and (M, positions, 3) from there on; the
    rest is black.
    """
    length = pixels.shape[1]
    before = (side - length) // 2
    scale = side / size
    stretch = max(scale, 1.0)
    reach = BICUBIC_SUPPORT * stretch
    first = max(0, math.floor((before - reach) / scale) - 1)
    last = min(size, math.ceil((before + length + reach) / scale) + 1)
    kernels = []
    for place in range(first, last):
        centre = (place + 0.5) * scale
        start, end = max(0, int(centre - reach + 0.5)), min(side, int(centre + reach + 0.5))
        weights = _bicubic((np.arange(start, end) - centre + 0.5) * (1.0 / stretch))
        weights /= np.cumsum(weights)[-1]  # summed one by one, as Pillow does
        fixed = np.trunc(np.where(weights < 0, -0.5, 0.5) + weights * (1 << PRECISION_BITS))
        low = min(max(start, before), before + length)
        high = max(low, min(end, before + length))
        kernels.append((low - before, high - before, fixed[low - start : high - start]))
    out = np.empty((pixels.shape[0], last - first, 3), np.uint8)
    step = max(1, STRIP_PIXELS // (8 * length))
    for top in range(0, pixels.shape[0], step):
        planes = np.ascontiguousarray(np.moveaxis(pixels[top : top + step], 2, 0), dtype=np.float64)
        for place, (low, high, kernel) in enumerate(kernels):
            # Products and sums of whole numbers below 2**53 are exact in float64.
            sums = planes[:, :, low:high] @ kernel + (1 << (PRECISION_BITS - 1))
            out[top : top + step, place] = np.clip(np.floor(sums / (1 << PRECISION_BITS)), 0, 255).T
    return first, out


def _bicubic(x: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.floating[Any]]:
    x = np.abs(x)
    near = ((BICUBIC_A + 2.0) * x - (BICUBIC_A + 3.0)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * BICUBIC_A
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))


def _resize_and_crop(image: Image.Image, size: int) -> Pixels:
    """The shorter edge to `size`, bicubic, the longer one in proportion and rounded down; then the centred square."""
    width, height = image.size
    short, long = min(width, height), max(width, height)
    scaled = int(size * long / short)
    shape = (size, scaled) if width <= height else (scaled, size)
    if shape[0] * shape[1] > MAX_PIXELS:
        raise ImageError(
            f"The image is {width}x{height}, too long and narrow to be cropped; cut it to a squarer shape first."
        )
    resized = image.resize(shape, Image.Resampling.BICUBIC)
    left, top = (shape[0] - size) // 2, (shape[1] - size) // 2
    return np.asarray(resized.crop((left, top, left + size, top + size)))
