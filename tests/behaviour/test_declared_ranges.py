"""Pictures that Pillow misreads are read by the range their file declares, or refused by name; what is damaged beside
its pixels is used, with a warning.
"""

import io
import struct
import warnings
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastvlm_mlx.errors import FastVLMError, FastVLMWarning, ImageError
from fastvlm_mlx.inputs.image import load_image

from . import pictures
from .samples import tiff

RNG = np.random.default_rng(0)
HEIGHT, WIDTH = 21, 37


def levels(samples: int, bits: int) -> np.ndarray:
    """Every level of the range is as likely, and both ends are there."""
    drawn = RNG.integers(0, 1 << bits, (HEIGHT, WIDTH, samples))
    drawn[0, 0], drawn[0, 1] = 0, (1 << bits) - 1
    return drawn


def eighths(drawn: np.ndarray, bits: int) -> np.ndarray:
    """The nearest of 256 levels."""
    return np.floor(drawn * (255 / ((1 << bits) - 1)) + 0.5).astype(np.uint8)


def read(data: bytes) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("error", FastVLMWarning)
        return np.asarray(load_image(data))


def dark(data: bytes) -> np.ndarray:
    """A picture that may be meant brighter, which is said."""
    with pytest.warns(FastVLMWarning, match="of 65,535, and is dark"):
        return np.asarray(load_image(data))


STORED: list[dict[str, Any]] = [
    {}, {"rows": 4}, {"tile": 16}, {"deflate": True, "rows": 5}, {"deflate": True, "tile": 16}, {"reverse": True},
    {"deflate": True, "reverse": True},
]  # fmt: skip


@pytest.mark.parametrize("stored", STORED, ids=str)
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("photometric", [0, 1])
@pytest.mark.parametrize("bits", [3, 10, 12, 14, 16])
def test_grey(bits: int, photometric: int, order: str, stored: dict[str, Any]) -> None:
    drawn = levels(1, bits)
    expected = eighths(drawn, bits)[..., 0]
    expected = 255 - expected if photometric == 0 else expected
    assert np.array_equal(
        read(tiff(drawn, photometric=photometric, bits=bits, order=order, **stored))[..., 1], expected
    )


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("photometric", [0, 1])
def test_differences_of_sixteen_bit_grey(photometric: int, order: str) -> None:
    drawn = levels(1, 16)
    data = tiff(drawn, photometric=photometric, bits=16, order=order, deflate=True, predictor=2, rows=4)
    expected = eighths(drawn, 16)[..., 0]
    assert np.array_equal(read(data)[..., 0], 255 - expected if photometric == 0 else expected)


@pytest.mark.parametrize("stored", [{}, {"rows": 4}, {"tile": 16}, {"deflate": True}], ids=str)
@pytest.mark.parametrize("order", ["<", ">"])
def test_planes_of_sixteen_bit_colour(order: str, stored: dict[str, Any]) -> None:
    drawn = levels(3, 16)
    found = read(tiff(drawn, photometric=2, bits=16, order=order, planar=True, **stored))
    assert np.abs(found.astype(int) - eighths(drawn, 16)).max() <= bool(
        stored.get("deflate")
    )  # which Pillow cuts to 8 bits


@pytest.mark.parametrize("planar", [False, True])
@pytest.mark.parametrize("bits", [10, 12])
def test_packed_colour(bits: int, planar: bool) -> None:
    drawn = levels(3, bits)
    assert np.array_equal(read(tiff(drawn, photometric=2, bits=bits, planar=planar)), eighths(drawn, bits))


@pytest.mark.parametrize("predictor", [1, 3])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("bits", [16, 32, 64])
def test_colour_in_floating_point(bits: int, order: str, predictor: int) -> None:
    drawn = levels(3, 8)
    data = tiff(
        drawn / 255, photometric=2, bits=bits, kind=3, order=order, deflate=predictor == 3, predictor=predictor, rows=6
    )
    assert np.array_equal(read(data), drawn)


def test_a_dark_picture_in_floating_point_stays_dark() -> None:
    assert read(tiff(levels(3, 8) / 255 / 50, photometric=2, bits=32, kind=3)).max() == 5


def on_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha / 255
    return colour * share + 255 * (1 - share)


@pytest.mark.parametrize("planar", [False, True])
@pytest.mark.parametrize(
    ("photometric", "colours", "bits"), [(1, 1, 16), (0, 1, 16), (2, 3, 16), (5, 4, 16), (5, 4, 8), (1, 1, 12)]
)
@pytest.mark.parametrize("extra", [1, 2])
def test_alpha(extra: int, photometric: int, colours: int, bits: int, planar: bool) -> None:
    drawn = levels(colours + 1, bits)
    most = (1 << bits) - 1
    plain = drawn[..., :-1] * 1.0
    if extra == 1:  # levels multiplied by alpha
        drawn[..., -1] = np.maximum(drawn[..., -1], most // 4)
        drawn[..., :-1] = np.rint(plain * drawn[..., -1:] / most)
    colour, alpha = plain / most * 255, drawn[..., -1:] / most * 255
    if photometric == 0:
        colour = 255 - colour
    if photometric == 5:
        ink = Image.fromarray(np.rint(colour).astype(np.uint8), "CMYK")
        colour = np.asarray(ink.convert("RGB")).astype(float)
    found = read(tiff(drawn, photometric=photometric, bits=bits, planar=planar, t338=(3, [extra])))
    assert np.abs(found - on_white(colour, alpha)).max() <= (
        5 if extra == 1 else 2
    )  # rounded to 8 bits before alpha is undone


def test_bits_that_the_greatest_level_declares() -> None:
    drawn = levels(1, 12)
    assert np.array_equal(
        read(tiff(drawn, photometric=1, bits=16, t281=(3, [4095])))[..., 0], eighths(drawn, 12)[..., 0]
    )
    assert dark(tiff(drawn, photometric=1, bits=16))[..., 0].max() == 16  # nothing declared: a dark picture
    assert (
        dark(tiff(drawn, photometric=1, bits=16, t281=(3, [3000])))[..., 0].max() == 16
    )  # what it holds, not what it may hold


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (tiff(levels(1, 15), photometric=1, bits=16, kind=2), "signed 16-bit grey"),
        (tiff(levels(1, 7), photometric=1, bits=8, kind=2), "signed 8-bit grey"),
        (tiff(levels(3, 15), photometric=2, bits=16, kind=2), "signed 16-bit RGB"),
        (tiff(levels(3, 8), photometric=2, bits=32), "unsigned 32-bit RGB"),
        (tiff(levels(1, 8) / 255, photometric=1, bits=32, kind=3), "floating-point 32-bit grey"),
        (tiff(levels(3, 8) * 1.0, photometric=2, bits=32, kind=3), "beyond 0 to 1"),
        (tiff(levels(3, 8) / 255 - 0.1, photometric=2, bits=32, kind=3), "beyond 0 to 1"),
        (tiff(levels(3, 8) * np.nan, photometric=2, bits=32, kind=3), "beyond 0 to 1"),
        (tiff(levels(3, 16), photometric=8, bits=16), "colours"),
        (tiff(levels(1, 12), photometric=1, bits=12)[:-400], "TIFF"),
        (tiff(levels(1, 16), photometric=32803, bits=16), "a camera's raw picture"),
        (tiff(levels(3, 8), photometric=2, bits=8, t50706=(1, [1, 4, 0, 0])), "a camera's raw picture"),
        (tiff(levels(3, 8), photometric=2, bits=8, t254=(4, [1]), t330=(4, [8])), "small preview"),
        (b"II*\0\x10\0\0\0CR\x02\0" + bytes(99), "a camera's raw picture"),
        (b"\0\0\0\x18ftypcrx \0\0\0\1crx isom" + bytes(99), "a camera's raw picture"),
        (b"FUJIFILMCCD-RAW 0201" + bytes(99), "a camera's raw picture"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refused_by_name(data: bytes, says: str) -> None:
    with pytest.raises(ImageError, match=says) as raised:
        load_image(data)
    assert "no image" not in str(raised.value) and ("save" in str(raised.value) or "export" in str(raised.value))


@pytest.mark.parametrize("inside", [True, False], ids=["in the first directory", "after it"])
@pytest.mark.parametrize(
    "entries", [{262: 32803}, {262: 34892}, {256: 4000, 257: 3000, 262: 2}], ids=["sensor", "linear", "larger"]
)
def test_a_picture_before_the_raw_one(inside: bool, entries: dict[int, int]) -> None:
    """As cameras write them, without saying that the first image is a preview."""
    if not inside and 32803 not in entries.values() and 34892 not in entries.values():
        return  # a larger page of a document is no raw picture

    def make(place: int) -> bytes:
        more: dict[str, Any] = {"t330": (4, [place])} if inside else {}
        return tiff(levels(3, 8), photometric=2, bits=8, **more)

    place = len(make(0)) + len(make(0)) % 2
    data = make(place).ljust(place, b"\0")
    if not inside:
        start = struct.unpack_from("<I", data, 4)[0]
        following = start + 2 + 12 * struct.unpack_from("<H", data, start)[0]
        data = data[:following] + struct.pack("<I", place) + data[following + 4 :]
    directory = struct.pack("<H", len(entries))
    directory += b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(entries.items())) + bytes(4)
    with pytest.raises(ImageError, match="raw picture or the like"):
        load_image(data + directory)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_few_levels_in_16_bits_are_said(kind: str) -> None:
    """Nothing says whether 12 bits were meant."""
    drawn = pictures.pixels()[..., 0].astype(np.uint16) << 4
    with pytest.warns(FastVLMWarning, match=f"none above {drawn.max():,} of 65,535"):
        load_image(pictures.encoded(Image.fromarray(drawn), kind))
    read(pictures.encoded(Image.fromarray(drawn << 4), kind))
    read(pictures.encoded(Image.fromarray(drawn * 0), kind))


def test_a_small_picture_that_is_all_there_is() -> None:
    drawn = levels(3, 8)
    assert np.array_equal(read(tiff(drawn, photometric=2, bits=8, t254=(4, [1]))), drawn)


def test_an_orientation_is_kept_where_pillow_does_not_decode() -> None:
    drawn = levels(1, 12)
    expected = np.rot90(eighths(drawn, 12)[..., 0], -1)
    assert np.array_equal(read(tiff(drawn, photometric=1, bits=12, t274=(3, [6])))[..., 0], expected)


def test_an_image_opened_by_pillow_is_not_misread_either(tmp_path: Path) -> None:
    path = tmp_path / "grey.tif"
    path.write_bytes(tiff(levels(1, 12), photometric=1, bits=12))
    with (
        Image.open(path) as image,
        pytest.raises(ImageError, match="12-bit grey levels, which Pillow misreads; give the file's path"),
    ):
        load_image(image)


def test_a_bomb_of_twelve_bits(tmp_path: Path) -> None:
    data = tiff(np.zeros((1, 1, 1), int), photometric=1, bits=12, t256=(4, [60_000]), t257=(4, [60_000]))
    with pytest.raises(ImageError, match="3,600,000,000 in all"):
        load_image(data)


# ---------------------------------------------------------------------------------------------------- PNG


def grey_png(drawn: np.ndarray, *extra: bytes) -> bytes:
    rows = zlib.compress(b"".join(b"\0" + row.astype(">u2").tobytes() for row in drawn[..., 0]))
    return pictures.png(WIDTH, HEIGHT, *extra, depth=16, colour=0, data=rows)


@pytest.mark.parametrize("bits", [10, 12, 14])
def test_significant_bits(bits: int) -> None:
    """Levels at full range, as specified, whichever way they were filled; or at the wrong end, as some write them."""
    drawn, declared = levels(1, bits), pictures.chunk(b"sBIT", bytes([bits]))
    full = eighths(drawn, bits)[..., 0]
    assert (
        np.abs(read(grey_png(drawn << (16 - bits), declared))[..., 0].astype(int) - full).max() <= 1
    )  # filled with zeros
    scaled = np.rint(drawn * (65535 / ((1 << bits) - 1))).astype(int)
    assert np.array_equal(read(grey_png(scaled, declared))[..., 0], full)
    assert np.array_equal(read(grey_png(drawn, declared))[..., 0], full)
    assert np.array_equal(dark(grey_png(drawn))[..., 0], eighths(drawn, 16)[..., 0])  # nothing declared: a dark picture
    darker = scaled >> 8 << (16 - bits)
    assert np.array_equal(read(grey_png(darker, declared))[..., 0], eighths(darker, 16)[..., 0])


def test_grey_and_alpha_of_sixteen_bits() -> None:
    drawn = levels(2, 16)
    rows = zlib.compress(b"".join(b"\0" + row.astype(">u2").tobytes() for row in drawn))
    found = read(pictures.png(WIDTH, HEIGHT, depth=16, colour=4, data=rows))[..., 0]
    assert np.abs(found - on_white(drawn[..., 0] / 257, drawn[..., 1] / 257)).max() <= 2


def test_a_transparent_colour_of_sixteen_bits() -> None:
    colours = np.array([[[0x1234, 0, 0], [0x5678, 0, 0]]])
    rows = zlib.compress(b"\0" + colours.astype(">u2").tobytes())
    data = pictures.png(2, 1, pictures.chunk(b"tRNS", struct.pack(">3H", 0x1234, 0, 0)), depth=16, colour=2, data=rows)
    assert read(data).tolist() == [[[255, 255, 255], [0x56, 0, 0]]]


def damaged(kind: bytes, content: bytes) -> bytes:
    """A chunk with a byte of its checksum changed."""
    made = pictures.chunk(kind, content)
    return made[:-1] + bytes([made[-1] ^ 1])


@pytest.mark.parametrize(
    ("kind", "content"), [(b"tEXt", b"Comment\0hello"), (b"iTXt", b"k\0\0\0\0\0v"), (b"tIME", bytes(7))]
)
def test_a_damaged_chunk_beside_the_pixels(kind: bytes, content: bytes) -> None:
    drawn = levels(1, 16)
    with pytest.warns(FastVLMWarning, match=kind.decode()):
        found = np.asarray(load_image(grey_png(drawn, damaged(kind, content))))
    assert np.array_equal(found[..., 0], eighths(drawn, 16)[..., 0])


@pytest.mark.parametrize("kind", [b"tRNS", b"PLTE"])
def test_a_damaged_chunk_that_shows(kind: bytes) -> None:
    with pytest.raises(ImageError, match="PNG picture that is damaged"):
        load_image(grey_png(levels(1, 16), damaged(kind, b"\0\0\0")))


# ---------------------------------------------------------------------------------------------------- JPEG


def jpeg(**options: Any) -> bytes:
    return pictures.encoded(Image.fromarray(pictures.pixels(200, 150)), "JPEG", quality=95, **options)


@pytest.mark.parametrize("tail", [b"", b"\xff"], ids=["nothing", "half of it"])
@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_without_its_end_marker(progressive: bool, tail: bytes) -> None:
    data = jpeg(progressive=progressive)
    with pytest.warns(FastVLMWarning, match="lacks its end marker"):
        found = np.asarray(load_image(data[:-2] + tail))
    assert np.array_equal(found, read(data))


@pytest.mark.parametrize("missing", [40, 400, 4000])
@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_without_its_end(progressive: bool, missing: int) -> None:
    with pytest.raises(ImageError, match="truncated"):
        load_image(jpeg(progressive=progressive)[: -2 - missing])


def test_a_jpeg_of_twelve_bits_is_an_image() -> None:
    data = bytearray(jpeg())
    data[data.index(b"\xff\xc0") + 4] = 12
    with pytest.raises(ImageError, match=r"a JPEG picture that is damaged, or of a form that is not read .*12-bit"):
        load_image(bytes(data))


KINDS = {
    b"P6\n1 1\n255\n": "PNM",
    b"qoif": "QOI",
    b"DDS ": "texture",
    bytes(128) + b"DICM": "DICOM",
    b"II\xbc\x01": "JPEG XR",
}


@pytest.mark.parametrize("start", KINDS)
def test_pictures_of_other_kinds_are_named(start: bytes) -> None:
    with pytest.raises(ImageError, match=KINDS[start]):
        load_image(start + bytes(100))


# ---------------------------------------------------------------------------------------------------- transparency


def png(pixels: np.ndarray) -> bytes:
    return pictures.encoded(Image.fromarray(pixels), "PNG")


@pytest.mark.parametrize("encode", [png, lambda pixels: pixels, Image.fromarray], ids=["PNG", "array", "PIL"])
def test_alpha_that_is_zero_everywhere_was_never_meant(encode: Callable[[np.ndarray], Any]) -> None:
    colours = pictures.pixels()
    clear = np.dstack([colours, np.zeros_like(colours[..., :1])])
    with pytest.warns(FastVLMWarning, match="transparent everywhere"):
        assert np.array_equal(np.asarray(load_image(encode(clear))), colours)
    clear[3, 5, 3] = 3  # which nobody sees
    with pytest.warns(FastVLMWarning, match="transparent everywhere"):
        assert np.array_equal(np.asarray(load_image(encode(clear))), colours)
    clear[3, 5, 3] = 4
    found = np.asarray(load_image(encode(clear)))
    assert found.min() > 250


@pytest.mark.parametrize(
    ("name", "content"), [(b"pHYs", b"\0\1"), (b"gAMA", b"\0"), (b"zTXt", b"a\0\1x"), (b"cHRM", b"\0")]
)
def test_a_sound_chunk_of_broken_content(name: bytes, content: bytes) -> None:
    colours = pictures.pixels()
    whole = png(colours)
    chunk = struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
    with pytest.warns(FastVLMWarning, match="its pixels are whole"):
        assert np.array_equal(np.asarray(load_image(whole[:33] + chunk + whole[33:])), colours)


def test_a_white_drawing_with_a_speck_is_put_on_black() -> None:
    drawn = np.zeros((40, 40, 4), np.uint8)
    drawn[10:14, 5:35] = drawn[25:27, 5:35] = 255
    drawn[11, 7] = (128, 128, 128, 255)
    with pytest.warns(FastVLMWarning, match="white on transparency"):
        found = np.asarray(load_image(png(drawn)))
    assert [found[0, 0, 0], found[12, 20, 0], found[11, 7, 0]] == [0, 255, 128]
    drawn[~drawn[..., 3].astype(bool)] = 255  # on a white ground of its own, but for a corner
    drawn[0, 0] = 0
    assert read(png(drawn))[20, 20].tolist() == [255, 255, 255]


def test_nothing_but_transparency_is_white() -> None:
    assert (read(png(np.zeros((4, 5, 4), np.uint8))) == 255).all()


def test_a_bitmap_whose_fourth_byte_is_unused() -> None:
    colours = pictures.pixels(8, 6)
    body = np.dstack([colours[..., ::-1], np.zeros_like(colours[..., :1])])[::-1].tobytes()
    header = struct.pack(
        "<IiiHHIIiiII4I", 108, 8, 6, 1, 32, 3, len(body), 2835, 2835, 0, 0, 0xFF0000, 0xFF00, 0xFF, 0xFF000000
    )
    header += b"BGRs" + bytes(48)
    data = b"BM" + struct.pack("<IHHI", 14 + len(header) + len(body), 0, 0, 14 + len(header)) + header + body
    with pytest.warns(FastVLMWarning, match="transparent everywhere"):
        assert np.array_equal(np.asarray(load_image(data)), colours)


def drawing(colour: int, mode: str = "RGBA") -> Image.Image:
    """A disc of one colour, smooth at its edge, on transparency."""
    y, x = np.mgrid[-20:20, -20:20]
    alpha = np.clip((15 - np.hypot(x, y)) * 255, 0, 255).astype(np.uint8)
    return Image.merge("RGBA", [*[Image.new("L", (40, 40), colour)] * 3, Image.fromarray(alpha)]).convert(mode)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
@pytest.mark.parametrize("colour", [255, 240])
def test_a_white_drawing_is_shown_on_black(colour: int, mode: str) -> None:
    image = drawing(colour, mode)
    with pytest.warns(FastVLMWarning, match="composed on black"):
        found = np.asarray(load_image(image))
    assert found[0, 0].max() == 0 and found[20, 20].min() == colour


@pytest.mark.parametrize("colour", [0, 128, 200])
def test_any_other_drawing_is_shown_on_white(colour: int) -> None:
    file = io.BytesIO()
    drawing(colour).save(file, "PNG")
    found = read(file.getvalue())
    assert found[0, 0].min() == 255 and found[20, 20].max() == colour


def test_a_white_page_that_is_opaque_stays_as_it_is() -> None:
    assert (read(png(np.full((5, 5, 4), 255, np.uint8))) == 255).all()


def test_a_file_of_every_kind_that_is_cut_or_changed_raises_nothing_else() -> None:
    rng = np.random.default_rng(5)
    for stored in STORED:
        sound = tiff(levels(2, 12), photometric=1, bits=12, t338=(3, [2]), **stored)
        for _ in range(60):
            data = bytearray(sound)
            for place in rng.integers(0, len(data), 3):
                data[place] ^= 1 << int(rng.integers(8))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                for each in (bytes(data), sound[: int(rng.integers(len(sound)))]):
                    with suppress(FastVLMError):
                        load_image(each, max_pixels=1 << 20)
