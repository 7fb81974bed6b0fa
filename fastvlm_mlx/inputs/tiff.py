"""A TIFF whose samples Pillow misreads, or cannot read -> an 8-bit image, its samples scaled over the declared range.

Accepted: grey, RGB and CMYK, with or without alpha, 1 to 16 bits a sample, chunky or planar, white being the greatest
or the least level; and RGB of floating-point samples from 0 to 1. Samples without a declared range (signed, 32-bit,
grey in floating point) are refused, never guessed from the levels themselves, so that a dark picture stays dark.
Compressed strips are unpacked by Pillow, as the strips of a picture of bytes.

Source: TIFF revision 6.0 (Adobe, 1992) and its supplements for predictors (2 and 3).
"""

import struct
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from io import BytesIO
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image

from ..errors import ImageError

SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")

WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, CMYK = 0, 1, 2, 5  # photometric interpretations
COLOURS = {WHITE_IS_ZERO: 1, BLACK_IS_ZERO: 1, RGB: 3, CMYK: 4}  # samples per pixel of each
SENSOR_PHOTOMETRICS = (32803, 34892)  # photometric interpretations of raw sensor data
DNG_VERSION, RAW_STANDARD, SUB_IMAGES = 50706, 37398, 330  # tags; the second is TIFF/EP's (ISO 12234-2)
MAX_SUB_IMAGES = 16
UNSIGNED, SIGNED, FLOAT, UNDEFINED = 1, 2, 3, 4  # sample formats; readers treat the last as the first
SAMPLE_FORMATS = {UNSIGNED: "unsigned", SIGNED: "signed", FLOAT: "floating-point"}
ASSOCIATED, UNASSOCIATED = 1, 2  # alpha, among the extra samples
DECLARED_BITS = {1023: 10, 4095: 12, 16383: 14}  # greatest level of cameras' 16-bit files -> its bits
# Compressions that unpack to the samples' bytes: LZW, deflate (two numbers), PackBits, LZMA and Zstandard.
PACKED = (5, 8, 32946, 32773, 34925, 50000)
MAX_SAMPLES = 64
BAND_BYTES = 1 << 22  # bytes unpacked at a time
MAX_PIECE_BYTES = 1 << 28  # bytes of one strip or tile, unpacked

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Layout:
    """How the samples of a TIFF's first image are stored, as its tags say.

    `maximum` is the greatest level, None where it is not declared.
    """

    order: str  # "<" or ">"
    width: int
    height: int
    photometric: int
    bits: tuple[int, ...]
    sample_format: int
    samples: int
    extra: tuple[int, ...]
    planar: bool
    compression: int
    predictor: int
    reversed_bits: bool
    maximum: int | None
    orientation: int
    tiled: bool
    piece: tuple[int, int]  # width and height of a strip or tile
    offsets: tuple[int, ...]
    counts: tuple[int, ...]
    preview: str | None  # what the image is a preview of, if it is one, or the kind of file
    more: bool  # whether other images follow

    @classmethod
    def of(cls, tags: Any, prefix: bytes) -> "Layout":
        """Read a layout from a directory as Pillow parses it.

        Raises ValueError where a needed tag is missing or out of range.
        """

        def values(tag: int, default: tuple[int, ...] | None = None) -> tuple[int, ...]:
            value = tags.get(tag, default)
            found = value if isinstance(value, tuple) else (value,)
            if not found or not all(isinstance(each, int) and each >= 0 for each in found):
                raise ValueError(f"tag {tag}")
            return found

        def number(tag: int, default: int | None = None) -> int:
            return values(tag, None if default is None else (default,))[0]

        width, height = number(256), number(257)
        samples = number(277, 1)
        bits = values(258, (1,))
        if not 1 <= samples <= MAX_SAMPLES or width < 1 or height < 1:
            raise ValueError("size")
        sample_formats = {UNSIGNED if sample == UNDEFINED else sample for sample in values(339, (UNSIGNED,))[:samples]}
        greatest = set(values(281, (0,))) if tags.get(281) is not None else {0}
        tiled = 324 in tags
        piece = (number(322), number(323)) if tiled else (width, min(number(278, height), height))
        if 0 in piece:
            raise ValueError("pieces")
        photometric = number(262, 0)
        reduced = bool(number(254, 0) & 1) or number(255, 0) == 2
        more = bool(getattr(tags, "next", 0))
        preview = None
        if DNG_VERSION in tags or RAW_STANDARD in tags or photometric in SENSOR_PHOTOMETRICS:
            preview = "a camera's raw picture"
        elif reduced and (SUB_IMAGES in tags or more):
            preview = "a camera's raw picture or the like, whose first image is a small preview"
        return cls(
            order="<" if prefix[:2] == b"II" else ">",
            width=width,
            height=height,
            photometric=photometric,
            bits=bits * samples if len(bits) == 1 else bits[:samples],
            sample_format=sample_formats.pop() if len(sample_formats) == 1 else 0,
            samples=samples,
            extra=values(338, (0,)) if tags.get(338) else (),
            planar=number(284, 1) == 2 and samples > 1,
            compression=number(259, 1),
            predictor=number(317, 1),
            reversed_bits=number(266, 1) == 2,
            maximum=max(greatest) if len(greatest) == 1 else None,
            orientation=number(274, 1),
            tiled=tiled,
            piece=piece,
            offsets=values(324 if tiled else 273, ()) if tags.get(324 if tiled else 273) else (),
            counts=values(325 if tiled else 279, ()) if tags.get(325 if tiled else 279) else (),
            preview=preview,
            more=more,
        )

    @property
    def declared_bits(self) -> int | None:
        """Bits of what was put into 16, where the greatest level says so; None where 16 are 16."""
        return (
            DECLARED_BITS.get(self.maximum or 0) if set(self.bits) == {16} and self.sample_format == UNSIGNED else None
        )

    @property
    def suits_pillow(self) -> bool:
        """Whether Pillow, if it opens the file at all, reads every sample correctly."""
        if self.sample_format != UNSIGNED or self.declared_bits is not None:
            return False
        if max(self.bits) <= 8:
            return True
        if set(self.bits) != {16} or (self.planar and self.compression == 1):
            return False
        extra = self.samples - COLOURS.get(self.photometric, self.samples)
        return (self.photometric, extra) in ((BLACK_IS_ZERO, 0), (RGB, 0), (RGB, 1), (CMYK, 0))


def layout_of(data: bytes) -> Layout | None:
    """The layout of a TIFF's first image, None where its tags cannot be read."""
    file = BytesIO(data)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _layout(file, data)
    except Exception:  # Pillow's readers raise almost anything on damaged data
        return None


def _layout(file: BytesIO, data: bytes) -> Layout:
    from PIL.TiffImagePlugin import ImageFileDirectory_v2

    header = file.read(16 if data[2:3] == b"+" or data[3:4] == b"+" else 8)
    tags = ImageFileDirectory_v2(header)
    file.seek(tags.next)
    tags.load(file)
    layout = Layout.of(tags, header)
    if layout.preview is None and _is_preview(layout, tags, header, file):
        return replace(layout, preview="a camera's raw picture or the like, whose first image is a small preview")
    return layout


def _is_preview(first: Layout, tags: Any, header: bytes, file: BytesIO) -> bool:
    """Whether the first image is a preview.

    It is where another image that its directory leads to was a sensor's, or is a larger one that is not itself reduced.
    """
    from PIL.TiffImagePlugin import ImageFileDirectory_v2

    inner = tags.get(SUB_IMAGES, ())
    inner = inner if isinstance(inner, tuple) else (inner,)
    for place in (*inner[:MAX_SUB_IMAGES], tags.next):
        if not isinstance(place, int) or not place:
            continue
        other = ImageFileDirectory_v2(header)
        try:
            file.seek(place)
            other.load(file)
            if other.get(262) in SENSOR_PHOTOMETRICS:
                return True
            larger = other.get(256, 0) * other.get(257, 0) > first.width * first.height
        except Exception:  # a damaged directory
            continue
        if place in inner and larger and not other.get(254, 0) & 1:
            return True
    return False


def check_opened(image: Image.Image, name: str) -> None:
    """Raise ImageError for a PIL image that Pillow has opened from a TIFF whose samples it misreads."""
    tags = getattr(image, "tag_v2", None)
    if tags is None:
        return
    try:
        layout = Layout.of(tags, tags.prefix)
    except Exception:  # a damaged tag
        return
    if layout.preview is not None:
        raise ImageError(f"{name} is {layout.preview}, which is not read; export it as JPEG or PNG.")
    if not layout.suits_pillow:
        raise ImageError(
            f"{name} is a TIFF of {_described(layout)}, which Pillow misreads; give the file's path instead."
        )


def decode(layout: Layout, data: bytes, name: str, seconds: float) -> Image.Image:
    """The first image in 8 bits, mode "L", "LA", "RGB", "RGBA" or "CMYK", with its orientation in EXIF.

    Raises ImageError. The caller has checked the size. Decoding is given up after `seconds`.
    """
    _check(layout, name)
    colours = COLOURS[layout.photometric]
    alpha = _alpha(layout)
    wanted = [*range(colours), *([alpha] if alpha is not None else [])]
    out = np.zeros((layout.height, layout.width, len(wanted)), np.uint8)
    end = time.monotonic() + seconds
    for plane, x, y, width, rows in _bands(layout, data, name):
        if time.monotonic() > end:
            raise ImageError(f"{name} takes too long to decode; save it again as PNG or JPEG.")
        levels = _levels(layout, rows, width, name)[: layout.height - y, : layout.width - x]
        bottom, right = y + levels.shape[0], x + levels.shape[1]
        if not layout.planar:
            out[y:bottom, x:right] = levels[..., wanted]
        elif plane in wanted:
            out[y:bottom, x:right, wanted.index(plane)] = levels[..., 0]
    if alpha is not None and layout.extra[alpha - colours : alpha - colours + 1] == (ASSOCIATED,):
        _divide(out)
    if layout.photometric == WHITE_IS_ZERO:
        out[..., 0] = 255 - out[..., 0]
    image = _image(out, colours)
    image.getexif()[ExifTags.Base.Orientation] = layout.orientation
    return image


def _check(layout: Layout, name: str) -> None:
    """Raise ImageError, naming the cause, for a layout that is not read."""
    bits = set(layout.bits)
    unpackable = layout.compression == 1 or layout.compression in PACKED
    floats = layout.sample_format == FLOAT and layout.photometric == RGB and bits <= {16, 32, 64}
    wholes = layout.sample_format == UNSIGNED and max(bits) <= 16
    if len(bits) > 1 or min(bits) < 1 or len(layout.bits) < layout.samples or not (floats or wholes):
        raise ImageError(
            f"{name} is a TIFF of {_described(layout)}, and no tag says which of them are black and white; save it "
            "with 8 or 16 bits (unsigned) for each sample."
        )
    if layout.photometric not in COLOURS or layout.samples < COLOURS[layout.photometric]:
        raise ImageError(
            f"{name} is a TIFF whose colours (photometric interpretation {layout.photometric}, {_described(layout)}) "
            "are not read; save it as 8-bit RGB."
        )
    if not unpackable:
        raise ImageError(
            f"{name} is a TIFF of {_described(layout)} in a compression (number {layout.compression}) that is not "
            "read at that depth; save it uncompressed, or as PNG."
        )
    predictors = {1, 3} if floats else {1, 2} if bits <= {8, 16} else {1}
    if layout.predictor not in predictors:
        raise ImageError(
            f"{name} is a TIFF of {_described(layout)} with a predictor (number {layout.predictor}) that is not read; "
            "save it uncompressed, or as PNG."
        )


def _described(layout: Layout) -> str:
    """The samples as a phrase: "signed 16-bit grey levels"."""
    colours = {WHITE_IS_ZERO: "grey levels", BLACK_IS_ZERO: "grey levels", RGB: "RGB samples", CMYK: "CMYK samples"}
    bits = "/".join(str(bits) for bits in dict.fromkeys(layout.bits[:MAX_SAMPLES]))
    arranged = " in planes" if layout.planar else ""
    samples = colours.get(layout.photometric, "samples")
    return f"{SAMPLE_FORMATS.get(layout.sample_format, 'other')} {bits}-bit {samples}{arranged}"


def _alpha(layout: Layout) -> int | None:
    """The index of the sample that is alpha, None where there is none."""
    colours = COLOURS[layout.photometric]
    for number, extra in enumerate(layout.extra[: layout.samples - colours]):
        if extra in (ASSOCIATED, UNASSOCIATED):
            return colours + number
    # A fourth sample of RGB that is not described is alpha, as for Pillow.
    return colours if layout.photometric == RGB and layout.samples == colours + 1 and not layout.extra else None


def _bands(layout: Layout, data: bytes, name: str) -> Iterator[tuple[int, int, int, int, Bytes]]:
    """(plane, x, y, width in pixels, rows of bytes) for every strip or tile, or part of one, in file order."""
    width, height = layout.piece
    across, down = -(-layout.width // width), -(-layout.height // height)
    planes = layout.samples if layout.planar else 1
    samples = 1 if layout.planar else layout.samples
    stride = -(-width * samples * layout.bits[0] // 8)
    if len(layout.offsets) < across * down * planes or stride * height > MAX_PIECE_BYTES:
        raise ImageError(f"{name} is damaged (its strips or tiles do not cover it); save or fetch it again.")
    counts = layout.counts if len(layout.counts) >= across * down * planes else None
    for plane in range(planes):
        for row in range(down):
            for column in range(across):
                number = (plane * down + row) * across + column
                rows = height if layout.tiled else min(height, layout.height - row * height)
                start = layout.offsets[number]
                size = counts[number] if counts is not None else len(data) if layout.compression != 1 else rows * stride
                stored = data[start : start + size]
                unpacked = _unpacked(layout, stored, stride, rows, name)
                step = max(1, BAND_BYTES // stride)
                for top in range(0, rows, step):
                    yield plane, column * width, row * height + top, width, unpacked[top : top + step]


def _unpacked(layout: Layout, stored: bytes, stride: int, rows: int, name: str) -> Bytes:
    """The bytes (rows, stride) of a strip or tile."""
    if layout.compression == 1:
        if len(stored) < rows * stride:
            raise ImageError(f"{name} is damaged (it is cut off); save or fetch it again.")
        if layout.reversed_bits:
            stored = stored.translate(REVERSED)
        return np.frombuffer(stored, np.uint8, rows * stride).reshape(rows, stride)
    try:
        with Image.open(BytesIO(_as_bytes_of_grey(layout, stored, stride, rows)), formats=("TIFF",)) as image:
            return np.asarray(image)
    except Exception as error:  # libtiff's and Pillow's, of many kinds
        reason = str(error).strip() or type(error).__name__
        raise ImageError(f"{name} is damaged ({reason[:200]}); save or fetch it again.") from error


REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def _as_bytes_of_grey(layout: Layout, stored: bytes, stride: int, rows: int) -> bytes:
    """A compressed strip as a TIFF of its own, whose grey levels are the bytes that the strip unpacks to."""
    tags = [
        (256, 4, stride), (257, 4, rows), (258, 3, 8), (259, 3, layout.compression), (262, 3, 1),
        (266, 3, 2 if layout.reversed_bits else 1), (273, 4, 8), (277, 3, 1), (278, 4, rows), (279, 4, len(stored)),
    ]  # fmt: skip
    padded = stored + b"\0" * (len(stored) % 2)
    directory = struct.pack("<H", len(tags)) + b"".join(
        struct.pack("<HHII", tag, field_type, 1, value) for tag, field_type, value in tags
    )
    return b"II*\0" + struct.pack("<I", 8 + len(padded)) + padded + directory + struct.pack("<I", 0)


def _levels(layout: Layout, rows: Bytes, width: int, name: str) -> Bytes:
    """Levels 0-255 (rows, width, samples) from bytes (rows, stride)."""
    samples, bits = 1 if layout.planar else layout.samples, layout.bits[0]
    count = width * samples
    if layout.sample_format == FLOAT:
        values = _floats(layout, rows, count, samples, bits // 8)
        if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
            raise ImageError(
                f"{name} is a TIFF of {_described(layout)} that reach beyond 0 to 1, so which of them are black and "
                "white is not known; save it with 8 or 16 bits for each sample."
            )
        return np.rint(values * 255).astype(np.uint8).reshape(len(rows), width, samples)
    if bits == 8:
        levels: npt.NDArray[Any] = rows[:, :count]
    elif bits == 16:
        levels = rows.view(f"{layout.order}u2").astype(np.uint16)
    else:
        levels = _unpack_bits(rows, count, bits)
    levels = levels.reshape(len(rows), width, samples)
    if layout.predictor == 2:
        levels = np.cumsum(levels, axis=1, dtype=levels.dtype)
    scaled: Bytes = _scale(layout.declared_bits or bits)[levels]
    return scaled


def _floats(layout: Layout, rows: Bytes, count: int, samples: int, size: int) -> npt.NDArray[np.float64]:
    """Samples (rows, count) in float64; with predictor 3, bytes of equal weight are stored together, as differences."""
    if layout.predictor != 3:
        return rows.view(f"{layout.order}f{size}").astype(np.float64)
    sums = np.cumsum(rows.reshape(len(rows), -1, samples), axis=1, dtype=np.uint8).reshape(len(rows), size, count)
    return np.ascontiguousarray(sums.swapaxes(1, 2)).view(f">f{size}").reshape(len(rows), count).astype(np.float64)


def _unpack_bits(rows: Bytes, count: int, bits: int) -> npt.NDArray[np.uint16]:
    """Samples (rows, count) of `bits` bits each, stored without gaps in each row, the most significant bit first."""
    every = np.unpackbits(rows, axis=1)[:, : count * bits].reshape(len(rows), count, bits)
    levels = np.zeros(every.shape[:2], np.uint16)
    for place in range(bits):
        levels = (levels << 1) | every[..., place]
    return levels


def _scale(bits: int) -> Bytes:
    """A table of 8-bit levels, rounded, for levels 0-65535; those beyond the greatest of `bits` bits are white."""
    greatest = (1 << bits) - 1
    levels = np.minimum(np.arange(1 << 16, dtype=np.uint32), greatest)
    return ((levels * 255 + greatest // 2) // greatest).astype(np.uint8)


def _divide(out: Bytes) -> None:
    """Undo, in place, a multiplication of colours (all samples but the last) by alpha (the last)."""
    step = max(1, BAND_BYTES // (out.shape[1] * out.shape[2]))
    for top in range(0, len(out), step):
        rows = out[top : top + step].astype(np.uint32)
        alpha = np.maximum(rows[..., -1:], 1)
        out[top : top + step, :, :-1] = np.minimum((rows[..., :-1] * 255 + alpha // 2) // alpha, 255)


def _image(out: Bytes, colours: int) -> Image.Image:
    """Samples (H, W, colours), or one more for alpha, as an image."""
    planes = [Image.fromarray(np.ascontiguousarray(out[..., number])) for number in range(out.shape[2])]
    if colours == 1:
        return planes[0] if len(planes) == 1 else Image.merge("LA", planes)
    image = Image.merge({3: "RGB", 4: "CMYK"}[colours], planes[:colours])
    if len(planes) > colours:
        image = image.convert("RGB")
        image.putalpha(planes[-1])
    return image
