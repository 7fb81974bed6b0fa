"""An image file, or its bytes -> the first picture in it, decoded by Pillow, within bounds of size, pixels and time.

Pillow gets to see only the formats named here. What else people have lying about is told apart by its first bytes and
refused by name, with what to do about it.
"""

import re
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from ..errors import FastVLMWarning, ImageError, OptionError, shown
from ..files import regular as files

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
NAMED = "JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF"
MAX_PIXELS = 1 << 26  # 8192 x 8192: what it takes, decoded twice over, stays below a gigabyte
MAX_SIDE = 65_535  # what a JPEG can hold
MAX_FILE = 1 << 28  # bytes: MAX_PIXELS at 32 bits, uncompressed
OPEN_SECONDS = 2.0  # to read a header; a whole one takes milliseconds
DECODE_SECONDS = 20.0

ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|data:")
HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
AVIF_BRANDS = {b"avif", b"avis"}

# First bytes, what they are, and what to do about it.
FOREIGN = (
    (rb"8BPS", "a Photoshop document", "export it as PNG or JPEG"),
    (rb"%!PS|\xc5\xd0\xd3\xc6", "an EPS or PostScript document", "export it as PNG"),
    (rb"SIMPLE  =", "a FITS file", "export it as PNG with a brightness scale of your choice"),
    (rb"\s{0,1000}%PDF-", "a PDF document", "export the page as PNG"),
    (rb"\xff\x0a|\x00\x00\x00\x0cJXL ", "a JPEG XL picture", "save it as JPEG or PNG"),
    (rb"\x00\x00\x00\x0cjP  |\xff\x4f\xff\x51", "a JPEG 2000 picture", "save it as JPEG or PNG"),
    (rb"\x00\x00\x01\x00", "an icon", "save it as PNG"),
    (rb"#\?RADIANCE|v/1\x01", "a high-dynamic-range picture", "export it as JPEG or PNG"),
    (rb"....ftyp|\x1a\x45\xdf\xa3|RIFF....AVI ", "a video", "save one frame of it as PNG"),
    (rb"PK\x03\x04|\x1f\x8b|7z\xbc\xaf|Rar!", "an archive or compressed file", "unpack it first"),
    (rb"(?:\xef\xbb\xbf)?\s*(?:<!--.*?-->\s*)*<(?:!doctype html|html)", "a web page", "save the picture itself"),
    (rb"(?:\xef\xbb\xbf)?\s*<(?:svg|\?xml|!doctype|!--)", "an SVG or XML drawing", "export it as PNG"),
)  # fmt: skip


def check_max_pixels(max_pixels: int) -> None:
    """Raise OptionError unless it is a bound Pillow can hold to."""
    if isinstance(max_pixels, bool) or not isinstance(max_pixels, int) or not 1 <= max_pixels < 1 << 31:
        raise OptionError(f"`max_pixels` is {shown(max_pixels)}, expected a whole number from 1 to 2147483647.")


def check_size(name: str, size: tuple[int, int], max_pixels: int | None) -> None:
    """Raise ImageError for a picture without pixels, with too many, or with too long a side."""
    width, height = size
    if width < 1 or height < 1:
        raise ImageError(f"{name} is {width}x{height} pixels; expected at least one.")
    if max_pixels is not None and width * height > max_pixels:
        raise ImageError(
            f"{name} is {width}x{height} pixels, {width * height:,} in all and more than the {max_pixels:,} allowed; "
            "make it smaller, or allow more with `max_pixels`."
        )
    if max(width, height) > MAX_SIDE:
        raise ImageError(f"{name} is {width}x{height} pixels, expected sides of at most {MAX_SIDE:,}; cut or shrink it.")


def read(path: str) -> bytes:
    """The bytes of an image file; raises ImageError."""
    name = shown(path)
    if not path:
        raise ImageError("The path of the image is empty; give the path of a picture.")
    if ADDRESS.match(path):
        raise ImageError(f"{name} is an address, and nothing is fetched from the network; save the picture and give its path.")
    try:
        return files.read(Path(path), MAX_FILE)
    except FileNotFoundError as error:
        if Path(path).is_symlink():
            raise ImageError(f"{name} is a link to a file that does not exist; give the path of the picture itself.") from error
        raise ImageError(f"{name}: no such image; check the path.") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ImageError(f"{name} cannot be read ({reason}); give the path of an image file you may read.") from error


def decode(data: bytes, name: str, max_pixels: int) -> Image.Image:
    """The first picture of a file, its pixels in memory; raises ImageError, warns (FastVLMWarning) where more pictures follow."""
    if not data:
        raise ImageError(f"{name} is empty; expected an image file.")
    formats = _formats(data, name)
    try:
        with warnings.catch_warnings(), _pillow_allows(max_pixels):
            warnings.simplefilter("ignore")
            file = _Timed(data, name)
            with Image.open(file, formats=formats) as image:
                check_size(name, image.size, max_pixels)
                more = _more(image)
                file.allow(DECODE_SECONDS)
                image.load()
                check_size(name, image.size, max_pixels)  # a frame may reach beyond what the header said
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError(f"{name} is no image, or too damaged to tell of which kind; expected {NAMED}.") from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name} has more pixels than allowed ({error}); make it smaller.") from error
    except MemoryError as error:
        raise ImageError(f"{name} does not fit into memory; make it smaller.") from error
    except Exception as error:  # Pillow's decoders raise almost anything on damaged data
        reason = str(error).strip() or type(error).__name__
        raise ImageError(f"{name} is damaged ({reason[:200]}); save or fetch it again.") from error
    if more:
        warnings.warn(f"{name} holds several pictures (frames or pages); only the first is used.", FastVLMWarning, stacklevel=4)
    return image


def _more(image: Image.Image) -> bool:
    """Whether other frames or pages follow; a camera's MPO (a JPEG to begin with) holds the same picture again."""
    if image.format == "MPO":
        return False
    try:
        return bool(getattr(image, "is_animated", False))
    except ImageError:
        raise
    except Exception:  # a damaged second frame does not matter
        return False


class _Timed(BytesIO):
    """A file in memory that stops being read after a while: Pillow's loops over a hostile file's parts all read from it."""

    def __init__(self, data: bytes, name: str):
        super().__init__(data)
        self._name = name
        self.allow(OPEN_SECONDS)

    def allow(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def read(self, size: int | None = -1, /) -> bytes:
        if time.monotonic() > self._end:
            raise ImageError(f"{self._name} takes too long to decode, so it is damaged or hostile; save it again as PNG or JPEG.")
        return super().read(size)


def _formats(data: bytes, name: str) -> tuple[str, ...]:
    """The formats Pillow may try; raises ImageError for kinds that are known and not read."""
    brands = _brands(data)
    if brands & HEIF_BRANDS and not brands & AVIF_BRANDS:
        return (*FORMATS, _heif(name))
    if brands & AVIF_BRANDS:
        return FORMATS
    for start, kind, advice in FOREIGN:
        if re.match(start, data[:4096], re.DOTALL | re.IGNORECASE):
            raise ImageError(f"{name} is {kind}, which is not read; {advice}.")
    return FORMATS


def _brands(data: bytes) -> set[bytes]:
    """The brands an ISO media file (HEIC, AVIF, MP4) declares; none for other files."""
    if data[4:8] != b"ftyp":
        return set()
    box = data[8 : min(int.from_bytes(data[:4], "big"), 256)]
    return {box[i : i + 4] for i in range(0, len(box), 4) if i != 4}  # the second word is a version


def _heif(name: str) -> str:
    """Make Pillow read HEIC by the package of the extra `heic`; returns the format's name."""
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
    """Pillow's own bound, twice MAX_IMAGE_PIXELS, out of the way while ours is higher."""
    before = Image.MAX_IMAGE_PIXELS
    if before is None or 2 * before >= max_pixels:
        yield
        return
    Image.MAX_IMAGE_PIXELS = max_pixels
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before
