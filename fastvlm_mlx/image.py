"""A picture -> the tower's input: (S, S, 3) RGB uint8, exactly as Apple's preprocessing makes it.

From 8-bit RGB on it is bit for bit apple/ml-fastvlm's process_images at 592b4ad: black bars to a square (or, for "crop",
the shorter edge to S and a centred cut), Pillow's bicubic. Before that, ours: EXIF orientation applied, 16-bit grey scaled,
transparency on white.
"""

import warnings
from io import BytesIO
from os import PathLike, fspath
from pathlib import Path
from stat import S_ISREG

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from .config import ImageConfig
from .errors import ImageError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "MPO")  # MPO: JPEGs of cameras that hold a preview too
MAX_PIXELS = 200_000_000
MAX_FILE = 500_000_000  # bytes
STRIP = 256  # rows resized at a time

Source = str | PathLike[str] | bytes | Image.Image | npt.NDArray[np.uint8]
Pixels = npt.NDArray[np.uint8]


def load_image(source: Source, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """An upright 8-bit RGB image from a path, bytes, a PIL image or an (H, W, 3) uint8 array; raises ImageError."""
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3 or 0 in source.shape:
            raise ImageError(f"The image array is {source.shape} {source.dtype}, expected (height, width, 3) uint8.")
        return Image.fromarray(np.ascontiguousarray(source))
    if isinstance(source, Image.Image):
        return _to_rgb(_upright(source))
    if isinstance(source, bytes):
        return _decode(source, "the image", max_pixels)
    if isinstance(source, (str, PathLike)):
        return _decode(_read(fspath(source)), repr(fspath(source)), max_pixels)
    raise ImageError(f"The image is a {type(source).__name__}, expected a path, bytes, a PIL image or a uint8 array.")


def preprocess(image: Image.Image, config: ImageConfig) -> Pixels:
    """(S, S, 3) RGB uint8 of an upright RGB image."""
    if config.fit == "pad":
        return _pad_and_resize(image, config.size)
    return _resize_and_crop(image, config.size)


def _read(path: str) -> bytes:
    if path.startswith(("http://", "https://", "file://", "data:")):
        raise ImageError(f"{path!r} is an address; save the picture and give the path of the file.")
    try:
        status = Path(path).stat()
        if not S_ISREG(status.st_mode):
            kind = "a folder" if Path(path).is_dir() else "not a regular file"
            raise ImageError(f"{path!r} is {kind}; expected an image file.")
        if status.st_size > MAX_FILE:
            raise ImageError(f"{path!r} holds {status.st_size} bytes, more than the {MAX_FILE} an image may have.")
        return Path(path).read_bytes()
    except FileNotFoundError as error:
        raise ImageError(f"{path!r}: no such image; check the path.") from error
    except (OSError, ValueError) as error:
        raise ImageError(f"{path!r} cannot be read ({error}); check the path and its permissions.") from error


def _decode(data: bytes, name: str, max_pixels: int) -> Image.Image:
    if not data:
        raise ImageError(f"{name} is empty; expected an image file.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own warning of large images: the bound below is ours
            with Image.open(BytesIO(data), formats=FORMATS) as image:
                width, height = image.size
                if width * height > max_pixels:
                    raise ImageError(f"{name} is {width}x{height} pixels, more than the {max_pixels} allowed; make it smaller.")
                image.load()
                return _to_rgb(_upright(image))
    except UnidentifiedImageError as error:
        raise ImageError(f"{name} is not an image of a known kind; expected one of {', '.join(FORMATS[:-1])}.") from error
    except ImageError:
        raise
    except Exception as error:  # Pillow's decoders raise almost anything on damaged data
        raise ImageError(f"{name} is damaged ({error}); save or fetch it again.") from error


def _upright(image: Image.Image) -> Image.Image:
    """Turned and mirrored as its EXIF orientation says; unreadable EXIF is ignored."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB: 16-bit grey scaled down, transparency composed on white."""
    if image.mode.startswith("I") or image.mode == "F":
        grey = np.asarray(image).astype(np.float32)
        top = 255.0 if image.mode == "F" else 65535.0
        grey = np.clip(np.nan_to_num(grey) * np.float32(255 / top), 0, 255)
        return Image.fromarray(np.rint(grey).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _pad_and_resize(image: Image.Image, size: int) -> Pixels:
    """Black bars to a centred square, then bicubic to size x size, without ever holding the square.

    Pillow resizes along rows first and rounds to 8 bits in between, so doing the rows in strips, each padded as it comes,
    and the columns afterwards gives the very same bits.
    """
    width, height = image.size
    side = max(width, height)
    left, top = (side - width) // 2, (side - height) // 2
    rows = Image.new("RGB", (size, side))
    for start in range(0, height, STRIP):
        end = min(height, start + STRIP)
        strip = Image.new("RGB", (side, end - start))
        strip.paste(image.crop((0, start, width, end)), (left, 0))
        rows.paste(strip.resize((size, end - start), Image.Resampling.BICUBIC), (0, top + start))
    return np.asarray(rows.resize((size, size), Image.Resampling.BICUBIC))


def _resize_and_crop(image: Image.Image, size: int) -> Pixels:
    """The shorter edge to `size`, bicubic, the longer one in proportion and rounded down; then the centred square."""
    width, height = image.size
    short, long = min(width, height), max(width, height)
    scaled = int(size * long / short)
    shape = (size, scaled) if width <= height else (scaled, size)
    if shape[0] * shape[1] > MAX_PIXELS:
        raise ImageError(f"The image is {width}x{height}, too long and narrow to be cropped; cut it to a squarer shape first.")
    resized = image.resize(shape, Image.Resampling.BICUBIC)
    left, top = (shape[0] - size) // 2, (shape[1] - size) // 2
    return np.asarray(resized.crop((left, top, left + size, top + size)))


