"""An image file, or its bytes -> the first picture in it, decoded by Pillow within bounds of bytes, pixels and time.

Pillow may only try the formats named here. Other files that people have are recognised by their first bytes and refused
by name, with what to do about it.
"""

import os
import re
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError

from ..config import is_whole
from ..errors import ImageError, OptionError, listed, shown, warn
from ..files import paths
from ..files import regular as files
from . import damage, tiff

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
FORMAT_NAMES = "JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF"
PNG_DEPTH_OFFSET = 24  # byte of a PNG that has the bits per sample
MAX_PIXELS = 1 << 26  # 8192 x 8192; decoded, and copied once, they take less than a gigabyte
MAX_SIDE = 65_535  # pixels; a JPEG's limit
MAX_FILE_BYTES = 1 << 28  # bytes: MAX_PIXELS at 32 bits, uncompressed
OPEN_SECONDS = 2.0  # seconds to read a header; an undamaged one takes milliseconds
DECODE_SECONDS = 20.0  # seconds to decode a picture

Found = TypeVar("Found")

ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|data:", re.IGNORECASE)
HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
AVIF_BRANDS = {b"avif", b"avis"}

# What files of the formats that are read begin with.
SIGNATURES = (
    (rb"\xff\xd8\xff", "JPEG"),
    (rb"\x89PNG\r\n\x1a\n", "PNG"),
    (rb"RIFF....WEBP", "WEBP"),
    (rb"GIF8[79]a", "GIF"),
    (rb"BM.{12}[\x0c\x10\x28\x34\x38\x40\x6c\x7c]\0\0\0", "BMP"),
    (rb"II\*\0|MM\0\*|II\+\0|MM\0\+", "TIFF"),
    (rb"....ftypavi[fs]", "AVIF"),
)

# First bytes, what they are, and what to do about it.
PICTURE, DRAWING = "save it as PNG or JPEG", "export it as PNG"
FOREIGN = (
    (rb"II\*\0....CR|IIR[OS]|MMOR|IIU\0|FUJIFILMCCD-RAW|FOVb|\0MRM|....ftypcrx ", "a camera's raw picture", DRAWING),
    (rb"IIII|MMMM|II\x1a\0\0\0HEAPCCDR", "a camera's raw picture", DRAWING),
    (rb"version https://git-lfs", "a pointer of Git LFS, not the file itself", "fetch it by 'git lfs pull'"),
    (rb"8BPS", "a Photoshop document", "export it as PNG or JPEG"),
    (rb"%!PS|\xc5\xd0\xd3\xc6", "an EPS or PostScript document", DRAWING),
    (rb"SIMPLE  =", "a FITS file", "export it as PNG with a brightness scale of your choice"),
    (rb".{128}DICM", "a DICOM file", DRAWING),
    (rb"\s{0,1000}%PDF-", "a PDF document", "export the page as PNG"),
    (rb"\xff\x0a|\x00\x00\x00\x0cJXL ", "a JPEG XL picture", PICTURE),
    (rb"\x00\x00\x00\x0cjP  |\xff\x4f\xff\x51", "a JPEG 2000 picture", PICTURE),
    (rb"II\xbc", "a JPEG XR picture", PICTURE),
    (rb"\x00\x00[\x01\x02]\x00|icns", "an icon", "save it as PNG"),
    (rb"#\?RADIANCE|v/1\x01", "a high-dynamic-range picture", "export it as JPEG or PNG"),
    (rb"P[1-7f][\s#]", "a PNM picture", PICTURE),
    (rb"\x0a[\x00-\x05]\x01[\x01\x02\x04\x08]|\xb1\x68\xde\x3a", "a PCX picture", PICTURE),
    (rb"DDS |BLP[12]|FTEX", "a texture", PICTURE),
    (rb"qoif", "a QOI picture", PICTURE),
    (rb"\x01\xda[\x00\x01]|\x59\xa6\x6a\x95|DanM|LinS|\x80\xe8\0\0|Image type:", "a picture of an old format", PICTURE),
    (rb"/\* XPM|#define\s+\S+\s+\d", "an X11 bitmap", PICTURE),
    (rb".[\0\1][\1\2\3\x09-\x0b].{13}[\x08\x0f\x10\x18\x20][\0-\x3f]", "a Targa picture, or data", PICTURE),
    (rb"\xd7\xcd\xc6\x9a|\x01\0\0\0.{36} EMF", "a Windows metafile", DRAWING),
    (rb"....ftyp|....[\x11\x12]\xaf|\x1a\x45\xdf\xa3|RIFF....AVI ", "a video", "save one frame of it as PNG"),
    (rb"PK\x03\x04|\x1f\x8b|7z\xbc\xaf|Rar!", "an archive or compressed file", "unpack it first"),
    (rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an office document or the like", "export the picture in it as PNG"),
    (rb"(?:\xef\xbb\xbf)?\s*(?:<!--.*?-->\s*)*<(?:!doctype html|html)", "a web page", "save the picture itself"),
    (rb"(?:\xef\xbb\xbf)?\s*<(?:svg|\?xml|!doctype|!--)", "an SVG or XML drawing", DRAWING),
)  # fmt: skip


def check_max_pixels(max_pixels: int) -> None:
    """Raise OptionError unless `max_pixels` is a whole number from 1 to 2**31 - 1."""
    if not is_whole(max_pixels) or not 1 <= max_pixels < 1 << 31:
        raise OptionError(f"`max_pixels` is {shown(max_pixels)}, expected a whole number from 1 to 2147483647.")


def check_size(name: str, size: tuple[int, int], max_pixels: int | None) -> None:
    """Raise ImageError for a picture without pixels, with more than `max_pixels`, or with a side over MAX_SIDE."""
    width, height = size
    if width < 1 or height < 1:
        raise ImageError(f"{name} is {width}x{height} pixels; expected at least one.")
    if max_pixels is not None and width * height > max_pixels:
        raise ImageError(
            f"{name} is {width}x{height} pixels, {width * height:,} in all and more than the {max_pixels:,} allowed; "
            "make it smaller, or allow more with `max_pixels`."
        )
    if max(width, height) > MAX_SIDE:
        raise ImageError(
            f"{name} is {width}x{height} pixels, expected sides of at most {MAX_SIDE:,}; cut or shrink it."
        )


def read(path: str) -> bytes:
    """The bytes of an image file, its path as people have it (`files.paths`); raises ImageError."""
    return _found(path, partial(files.read, limit=MAX_FILE_BYTES))


def check_path(path: str) -> None:
    """Raise ImageError where there is no file to be read at a path, as far as that is seen without opening it."""
    _found(path, files.size_of)


def _found(path: str, use: Callable[[Path], Found]) -> Found:
    name = shown(path)
    if not path:
        raise ImageError("The path of the image is empty; give the path of a picture.")
    found = paths.find(path)
    if ADDRESS.match(found):
        raise ImageError(
            f"{name} is an address, and nothing is fetched from the network; save the picture and give its path."
        )
    try:
        return use(Path(found))
    except FileNotFoundError as error:
        if Path(found).is_symlink():
            raise ImageError(
                f"{name} is a link to a file that does not exist; give the path of the picture itself."
            ) from error
        raise ImageError(f"{name}: no such image; check the path.") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ImageError(f"{name} cannot be read ({reason}); give the path of an image file you may read.") from error


def is_picture(path: str) -> bool:
    """Whether a file begins as a picture of a format that is read, whatever its name; False where it cannot be read."""
    try:
        if not os.path.isfile(path):  # noqa: PTH113  (false, too, for impossible names)
            return False
        with Path(path).open("rb") as file:
            start = file.read(64)
    except OSError:
        return False
    known = any(re.match(signature, start, re.DOTALL) for signature, _ in SIGNATURES)
    return known or bool(_brands(start) & (HEIF_BRANDS | AVIF_BRANDS))


def read_open(file: Any) -> bytes:
    """The bytes of an open file, from its beginning where it can seek; raises ImageError."""
    try:
        if hasattr(file, "seek") and getattr(file, "seekable", lambda: True)():
            file.seek(0)  # as Pillow does: a file that was just written, or read before, is at its end
        data = file.read(MAX_FILE_BYTES + 1)
    except Exception as error:  # closed, not for reading, text of another encoding, or another library's
        raise ImageError(f"The image's file cannot be read ({str(error)[:200]}); open it with mode 'rb'.") from error
    if not isinstance(data, (bytes, bytearray, memoryview)):
        raise ImageError(f"The image's file gives {type(data).__name__} instead of bytes; open it with mode 'rb'.")
    if len(data) > MAX_FILE_BYTES:
        raise ImageError(
            f"The image's file holds more than the {MAX_FILE_BYTES:,} bytes allowed; make the picture smaller."
        )
    return bytes(data)


def decode(data: bytes, name: str, max_pixels: int) -> Image.Image:
    """The first picture of a file's bytes, with its pixels in memory; raises ImageError.

    `name` is the file in messages. Warns (FastVLMWarning) where more pictures follow, or where the file is damaged
    outside its pixels.
    """
    if not data:
        raise ImageError(f"{name} is empty; expected an image file.")
    formats = _formats(data, name)
    layout = tiff.layout_of(data) if data.startswith(tiff.SIGNATURES) else None
    if layout is not None and layout.preview is not None:
        raise ImageError(f"{name} is {layout.preview}, which is not read; export it as JPEG or PNG.")
    if layout is not None and not layout.suits_pillow:
        return _by_layout(layout, data, name, max_pixels)
    try:
        with warnings.catch_warnings(), _pillow_allows(max_pixels):
            warnings.simplefilter("ignore")
            image, more = _opened(data, name, formats, max_pixels)
    except ImageError:
        raise
    except Exception as error:
        if isinstance(error, UnidentifiedImageError) and layout is not None:
            return _by_layout(layout, data, name, max_pixels)
        mended = _mended(data, name, formats, max_pixels, error)
        if mended is None:
            raise _said(error, data, name) from error
        image, more, note = mended
        warn(f"{name} {note}")
    if more:
        warn(SEVERAL_PICTURES.format(name))
    if image.mode.startswith("I;16"):
        image = damage.unaligned(image, data) if image.format == "PNG" else image
        if not damage.declares_bits(data):
            _note_of_few_levels(image, name)
        return image
    if (
        image.format == "PNG"
        and image.mode == "RGB"
        and data[PNG_DEPTH_OFFSET] == 16
        and isinstance(key := image.info.get("transparency"), tuple)
    ):
        image.info["transparency"] = tuple(level >> 8 for level in key)  # Pillow has reduced the levels to 8 bits
    return image


def _note_of_few_levels(image: Image.Image, name: str) -> None:
    """Warn of a 16-bit grey picture whose levels fit into 14 bits.

    It is dark, or its file does not say how many bits it uses.
    """
    greatest = int(np.asarray(image).max())
    if 0 < greatest < 1 << 14:
        warn(
            f"{name} has 16-bit grey levels, none above {greatest:,} of 65,535, and is dark; if fewer bits are meant, "
            "save it with levels up to 65,535."
        )


BOMB = re.compile(
    r"too (large|much)", re.IGNORECASE
)  # in Pillow's errors about texts and profiles that unpack to too much
SEVERAL_PICTURES = "{} holds several pictures (frames or pages); only the first is used."


def _opened(data: bytes, name: str, formats: tuple[str, ...], max_pixels: int) -> tuple[Image.Image, bool]:
    """The first picture, decoded, and whether more follow; raises ImageError, and whatever Pillow raises."""
    file = _Timed(data, name)
    with Image.open(file, formats=formats) as image:
        check_size(name, image.size, max_pixels)
        more = _more(image)
        file.allow(DECODE_SECONDS)
        image.load()
        check_size(name, image.size, max_pixels)  # a frame may reach beyond what the header said
        return image, more


def _by_layout(layout: tiff.Layout, data: bytes, name: str, max_pixels: int) -> Image.Image:
    """The first picture of a TIFF that Pillow would misread."""
    check_size(name, (layout.width, layout.height), max_pixels)
    try:
        with warnings.catch_warnings(), _pillow_allows(tiff.MAX_PIECE_BYTES):
            warnings.simplefilter("ignore")
            image = tiff.decode(layout, data, name, DECODE_SECONDS)
    except MemoryError as error:
        raise _said(error, data, name) from error
    if layout.more:
        warn(SEVERAL_PICTURES.format(name))
    return image


def _mended(
    data: bytes, name: str, formats: tuple[str, ...], max_pixels: int, error: Exception
) -> tuple[Image.Image, bool, str] | None:
    """A picture whose file is damaged outside its pixels only, whether more follow, and a note of the damage; else
    None.
    """
    try:
        with warnings.catch_warnings(), _pillow_allows(max_pixels):
            warnings.simplefilter("ignore")
            if (endings := damage.with_end_markers(data)) and isinstance(error, OSError) and "truncated" in str(error):
                image, more = _opened(endings[0], name, formats, max_pixels)
                other, _ = _opened(endings[1], name, formats, max_pixels)
                whole = image.mode == other.mode and image.tobytes() == other.tobytes()
                return (
                    (image, more, "lacks its end marker; every pixel of it is there, and it is used.")
                    if whole
                    else None
                )
            if (mended := damage.without_damaged_chunks(data)) is not None:
                sound, removed = mended
                image, more = _opened(sound, name, formats, max_pixels)
                return (
                    image,
                    more,
                    f"is damaged beside its pixels ({listed(removed)}); these are whole, and it is used.",
                )
            if not BOMB.search(str(error)) and (alone := damage.without_extras(data)) is not None:
                image, more = _opened(alone, name, formats, max_pixels)
                return image, more, "holds texts or settings that cannot be read; its pixels are whole, and it is used."
    except Exception:  # the damage is larger; the first error is reported
        return None
    return None


def _said(error: Exception, data: bytes, name: str) -> ImageError:
    """An exception of Pillow's as an ImageError."""
    format_name = next(
        (format_name for start, format_name in SIGNATURES if re.match(start, data[:64], re.DOTALL)), None
    )
    reason = str(error).strip() or type(error).__name__
    if isinstance(error, UnidentifiedImageError):
        if format_name is None:
            return ImageError(f"{name} is no image, or too damaged to tell of which kind; expected {FORMAT_NAMES}.")
        reason = _why_not_opened(data, name, format_name)
    elif isinstance(error, Image.DecompressionBombError):
        return ImageError(f"{name} has more pixels than allowed ({reason}); make it smaller.")
    elif isinstance(error, MemoryError):
        return ImageError(f"{name} does not fit into memory; make it smaller.")
    else:
        return ImageError(f"{name} is damaged ({reason[:200]}); save or fetch it again.")
    return ImageError(
        f"{name} is a {format_name} picture that is damaged, or of a form that is not read ({reason[:200]}); save it "
        "again as an 8-bit JPEG or PNG."
    )


def _why_not_opened(data: bytes, name: str, format_name: str) -> str:
    """The reason that Pillow's reader of one format gives, which `Image.open` does not pass on."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            Image.OPEN[format_name][0](_Timed(data, name), "")
    except Exception as error:
        return str(error).strip() or type(error).__name__
    return "its header is damaged"


def _more(image: Image.Image) -> bool:
    """Whether other frames or pages follow.

    A camera's MPO is a JPEG followed by the same picture again, and does not count.
    """
    if image.format == "MPO":
        return False
    try:
        return bool(getattr(image, "is_animated", False))
    except ImageError:
        raise
    except Exception:  # a damaged second frame does not matter
        return False


class _Timed(BytesIO):
    """A file in memory that raises ImageError when it is read after its time is up.

    All of Pillow's loops over the parts of a hostile file read from it.
    """

    def __init__(self, data: bytes, name: str):
        super().__init__(data)
        self._name = name
        self.allow(OPEN_SECONDS)

    def allow(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def read(self, size: int | None = -1, /) -> bytes:
        """The bytes of an image file, whose path may be written as `files.paths` allows; raises ImageError."""
        if time.monotonic() > self._end:
            raise ImageError(
                f"{self._name} takes too long to decode, so it is damaged or hostile; save it again as PNG or JPEG."
            )
        return super().read(size)


def _formats(data: bytes, name: str) -> tuple[str, ...]:
    """The formats that Pillow may try; raises ImageError for a known kind of file that is not read."""
    brands = _brands(data)
    if brands & HEIF_BRANDS and not brands & AVIF_BRANDS:
        return (*FORMATS, _heif(name))
    if brands & AVIF_BRANDS:
        return FORMATS
    for start, description, advice in FOREIGN:
        if re.match(start, data[:4096], re.DOTALL | re.IGNORECASE):
            raise ImageError(f"{name} is {description}, which is not read; {advice}.")
    return FORMATS


def _brands(data: bytes) -> set[bytes]:
    """The brands that an ISO media file (HEIC, AVIF, MP4) declares; empty for other files."""
    if data[4:8] != b"ftyp":
        return set()
    box = data[8 : min(int.from_bytes(data[:4], "big"), 256)]
    return {box[i : i + 4] for i in range(0, len(box), 4) if i != 4}  # the second word is a version


def _heif(name: str) -> str:
    """Register pillow-heif with Pillow, and return the name of the format; raises ImageError where it is not installed.

    It is installed along on macOS, and elsewhere with the extra `heic`.
    """
    try:
        import pillow_heif  # type: ignore[import-not-found, unused-ignore]
    except ImportError as error:
        raise ImageError(
            f"{name} is a HEIC picture, which takes the extra 'heic': pip install pillow-heif, or save it as JPEG."
        ) from error
    pillow_heif.register_heif_opener(thumbnails=False)
    return "HEIF"


@contextmanager
def _pillow_allows(max_pixels: int) -> Iterator[None]:
    """A context manager that raises Pillow's own limit of pixels, twice MAX_IMAGE_PIXELS, to at least `max_pixels`."""
    before = Image.MAX_IMAGE_PIXELS
    if before is None or 2 * before >= max_pixels:
        yield
        return
    Image.MAX_IMAGE_PIXELS = max_pixels
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before
