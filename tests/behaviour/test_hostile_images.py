"""Nothing that a picture can be breaks it: refused in one sentence, cheaply, or used as the person would expect."""

import os
import random
import struct
import zlib
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from fastvlm_mlx.config import ImageConfig
from fastvlm_mlx.errors import FastVLMWarning, ImageError, OptionError
from fastvlm_mlx.inputs.image import load_image, preprocess

from . import pictures
from .forkserver import Result, Run

pytestmark = pytest.mark.slow

Look = Callable[..., Result]

ORIENTATION = 0x0112


@pytest.fixture
def look(run: Run, model: Path, tmp_path: Path) -> Look:
    """Show a file of these bytes to the model by the command line."""

    def show(data: bytes, *options: object, name: str = "photo.jpg") -> Result:
        path = tmp_path / name
        path.write_bytes(data)
        return run("generate", "--model", model, "--image", path, "--max-tokens", 1, *options)

    return show


# ---------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize("tenth", range(10))
@pytest.mark.parametrize("kind", pictures.FORMATS)
def test_cut_off(look: Look, kind: str, tenth: int) -> None:
    data = pictures.sample(kind)
    result = look(data[: len(data) * tenth // 10])
    if result.code == 0:  # so little is missing that the decoder has every pixel
        assert tenth >= 8
        result.answered()
    else:
        result.refused("photo.jpg")


@pytest.mark.parametrize("kind", pictures.FOREIGN)
def test_not_a_picture(look: Look, kind: str) -> None:
    data, says = pictures.FOREIGN[kind]
    look(data).refused("photo.jpg", says)


@pytest.fixture(scope="session")
def bombs() -> dict[str, bytes]:
    return pictures.bombs()


BOMBS = [
    "PNG of 100000 x 100000",
    "PNG of 2 ** 31 - 1",
    "PNG of 20000 x 20000 at one bit",
    "PNG with a zTXt bomb",
    "PNG with an iTXt bomb",
    "PNG with an ICC bomb",
    "PNG with 80 texts of a megabyte",
    "PNG with five million chunks",
    "PNG with a line of 100000",
    "PNG with a column of 100000",
    "BMP of 60000 x 60000",
    "JPEG of 65500 x 65500",
    "GIF of 65535 x 65535",
    "WebP of 16384 x 16384",
    "TIFF of 60000 x 60000",
    "TIFF of 4294967295 x 4294967295",
]


@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs(look: Look, bombs: dict[str, bytes], bomb: str) -> None:
    assert list(bombs) == BOMBS
    look(bombs[bomb]).refused("photo.jpg")


def test_the_bound_on_pixels_is_an_option(look: Look) -> None:
    data = pictures.encoded(Image.new("RGB", (300, 200), "red"), "PNG")
    look(data, "--max-pixels", 59_999).refused("photo.jpg", "300x200", "59,999", "--max-pixels")
    look(data, "--max-pixels", 60_000).answered()


@pytest.mark.parametrize("pillows", [None, 100])
def test_a_raised_bound_is_raised_in_pillow_too(monkeypatch: pytest.MonkeyPatch, pillows: int | None) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pillows)
    data = pictures.encoded(Image.new("L", (40, 30)), "PNG")
    assert load_image(data, max_pixels=1200).size == (40, 30)
    assert pillows == Image.MAX_IMAGE_PIXELS


def broken_links(folder: Path) -> dict[str, tuple[object, str]]:
    os.mkfifo(folder / "pipe.jpg")
    (folder / "folder.jpg").mkdir()
    (folder / "dangling.jpg").symlink_to(folder / "gone.jpg")
    (folder / "loop.jpg").symlink_to(folder / "loop.jpg")
    (folder / "to zero.jpg").symlink_to("/dev/zero")
    (folder / "empty.jpg").touch()
    with (folder / "huge.jpg").open("wb") as file:
        file.truncate(1 << 40)
    (folder / "file").touch()
    return {
        "a pipe": (folder / "pipe.jpg", "pipe"),
        "a folder": (folder / "folder.jpg", "folder"),
        "a dangling link": (folder / "dangling.jpg", "link to a file that does not exist"),
        "a link to itself": (folder / "loop.jpg", "loop.jpg"),
        "a link to a device": (folder / "to zero.jpg", "device"),
        "empty": (folder / "empty.jpg", "is empty"),
        "a terabyte": (folder / "huge.jpg", "more than"),
        "below a file": (folder / "file/photo.jpg", "file/photo.jpg"),
        "/dev/zero": ("/dev/zero", "device"),
        "/dev/stdin": ("/dev/stdin", "/dev/stdin"),
        "/dev/tty": ("/dev/tty", "/dev/tty"),
        "/dev/full": ("/dev/full", "device"),
        "no path": ("", "empty"),
        "no file": (folder / "none.jpg", "no such image"),
        "a hidden newline": (str(folder / "none\n.jpg"), r"none\n.jpg"),
        "an escape": (str(folder / "none\x1b[31m.jpg"), r"none\x1b[31m.jpg"),
        "half a letter": (os.fsencode(folder) + b"/no\xff.jpg", r"no\udcff.jpg"),
        "a NUL": ("photo\0.jpg", r"photo\x00.jpg"),
        "a long name": (str(folder / ("x" * 300)), "xxx"),
        "a very long path": ("/x" * 100_000, "/x/x"),
        "a web address": ("https://example.com/photo.jpg", "address"),
        "another address": ("FTP://example.com/photo.jpg", "address"),
        "a bucket": ("s3://bucket/photo.jpg", "address"),
        "a file address": ("file:///etc/passwd", "no image"),
        "a data address": ("data:image/png;base64,AAAA", "address"),
        "an unexpanded home": ("~nobody-at-all/photo.jpg", "no such image"),
        "a pattern": ("*.jpg", "no such image"),
        "nothing on stdin": ("-", "no such image"),
        "the current folder": (".", "folder"),
        "the root": ("/", "folder"),
    }


PLACES = [
    "a pipe",
    "a folder",
    "a dangling link",
    "a link to itself",
    "a link to a device",
    "empty",
    "a terabyte",
    "below a file",
    "/dev/zero",
    "/dev/stdin",
    "/dev/tty",
    "/dev/full",
    "no path",
    "no file",
    "a hidden newline",
    "an escape",
    "half a letter",
    "a NUL",
    "a long name",
    "a very long path",
    "a web address",
    "another address",
    "a bucket",
    "a file address",
    "a data address",
    "an unexpanded home",
    "a pattern",
    "nothing on stdin",
    "the current folder",
    "the root",
]


@pytest.mark.parametrize("place", PLACES)
def test_not_a_file(run: Run, model: Path, tmp_path: Path, place: str) -> None:
    places = broken_links(tmp_path)
    assert list(places) == PLACES
    path, says = places[place]
    run("generate", "--model", model, "--image", path).refused(says)


def test_one_bad_picture_of_several(run: Run, model: Path, photo: Path, tmp_path: Path) -> None:
    run("generate", "-m", model, "-i", photo, "-i", tmp_path / "none.jpg", "-i", photo).refused("none.jpg")


@pytest.mark.parametrize(("bits", "kind"), [(32, 1), (32, 2), (32, 3)])
def test_numbers_of_unknown_range(look: Look, bits: int, kind: int) -> None:
    look(pictures.tiff(4, 4, bits=bits, kind=kind)).refused("photo.jpg", "8 or 16 bits")


def test_a_tiff_whose_pages_go_in_circles(look: Look) -> None:
    data = pictures.tiff(8, 8)
    directory = struct.unpack("<I", data[4:8])[0]
    look(data[:-4] + struct.pack("<I", directory)).answered()


def test_a_camera_s_jpeg_with_a_preview(look: Look) -> None:
    look(
        pictures.encoded(Image.new("RGB", (40, 30)), "MPO", save_all=True, append_images=[Image.new("RGB", (20, 15))])
    ).answered()


def test_a_file_that_keeps_the_reader_busy(look: Look) -> None:
    """Four million comments, that is, a header to read for a long time."""
    look(b"GIF89a\x08\0\x08\0\0\0\0" + b"\x21\xfe\x01a\0" * 4_000_000).refused("photo.jpg", "too long")


# ------------------------------------------------------------------------------------------- either way, but orderly


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("kind", pictures.FORMATS)
def test_flipped_bits(look: Look, kind: str, seed: int) -> None:
    rng = random.Random(f"{kind} {seed}")
    data = bytearray(pictures.sample(kind))
    for _ in range(1 + seed * 3):
        data[rng.randrange(len(data) if seed % 2 else 200)] ^= 1 << rng.randrange(8)
    result = look(bytes(data))
    if result.code == 0:
        assert result.err.count("\n") <= 1, result
        result.cheap()
    else:
        result.refused("photo.jpg")


# ---------------------------------------------------------------------------------------------------- used


@pytest.mark.parametrize(
    "name", ["two words.png", "new\nline.png", "図と😀.png", "-photo.png", "photo.txt", "photo", "a'b\"c$(d).png"]
)
def test_odd_names(run: Run, model: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(pictures.sample("PNG"))
    run("generate", "--model", model, f"--image={name}", "--max-tokens", 1, cwd=tmp_path).answered()


def test_a_name_that_is_not_unicode(run: Run, model: Path, tmp_path: Path) -> None:
    name = os.fsencode(tmp_path) + b"/\xff\xfe.png"
    try:
        Path(os.fsdecode(name)).write_bytes(pictures.sample("PNG"))
    except OSError:
        pytest.skip("this file system takes Unicode names only")
    run("generate", "--model", model, "--image", name, "--max-tokens", 1).answered()


@pytest.mark.parametrize("kind", [kind for kind in pictures.FORMATS if kind not in ("JPEG", "BMP")])
def test_an_animation_gives_its_first_picture_and_says_so(look: Look, kind: str) -> None:
    data = pictures.animation(kind)
    look(data).answered("only the first")
    with pytest.warns(FastVLMWarning, match="only the first"):
        image = load_image(data)
    red = np.asarray(image)[15, 20].astype(int)
    assert red[0] > 200 and red[2] < 60


def test_a_damaged_second_picture_does_not_matter(look: Look) -> None:
    data = pictures.animation("PNG")
    assert look(data[: data.index(b"fdAT") + 20] + b"\0" * 40).code == 0


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", [kind for kind in pictures.FORMATS if kind not in ("GIF", "BMP")])
def test_orientations(kind: str, orientation: int) -> None:
    """A white corner comes to the top left, whichever way the camera was held."""
    stored = Image.new("RGB", (64, 32), "black")
    corner = {1: (0, 0), 2: (48, 0), 3: (48, 16), 4: (0, 16), 5: (0, 0), 6: (0, 16), 7: (48, 16), 8: (48, 0)}[
        orientation
    ]
    stored.paste("white", (*corner, corner[0] + 16, corner[1] + 16))
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    image = load_image(pictures.encoded(stored, kind, exif=exif))
    assert image.size == ((64, 32) if orientation < 5 else (32, 64))
    assert np.asarray(image)[:12, :12].min() > 180
    assert np.asarray(image)[-12:].max() < 60


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08" + b"\xff" * 60, b"\0" * 9]
)
def test_corrupt_exif_is_ignored(look: Look, exif: bytes) -> None:
    look(pictures.encoded(Image.fromarray(pictures.pixels()), "JPEG", exif=exif)).answered()


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_orientations_that_do_not_exist(orientation: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    data = pictures.encoded(Image.fromarray(pictures.pixels()), "PNG", exif=exif)
    assert np.array_equal(np.asarray(load_image(data)), pictures.pixels())


@pytest.mark.parametrize(
    "profile", [b"", b"\0" * 10, b"acsp" * 50, ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()[:200]]
)
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_corrupt_colour_profiles_are_ignored(look: Look, kind: str, profile: bytes) -> None:
    look(pictures.encoded(Image.fromarray(pictures.pixels()), kind, icc_profile=profile)).answered()


def grey(source: bytes | Image.Image) -> np.ndarray:
    """The levels of a picture that has to be grey."""
    levels = np.asarray(load_image(source))
    assert (levels == levels[..., :1]).all()
    return levels[..., 0]


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_scaled(kind: str) -> None:
    levels = np.array([[0, 128, 129, 257, 1000, 32768, 65407, 65535]], dtype=np.uint16)
    expected = np.rint(levels * (255 / 65535)).astype(np.uint8)
    assert np.array_equal(grey(pictures.encoded(Image.fromarray(levels), kind)), expected)


def test_sixteen_bit_grey_of_either_byte_order() -> None:
    levels = np.array([[0, 30000, 65535]], dtype=">u2")
    image = Image.frombytes("I;16B", (3, 1), levels.tobytes())
    assert grey(image).tolist() == [[0, 117, 255]]


def test_sixteen_bit_colour_is_scaled() -> None:
    data = np.array([[[0x0000, 0x80FF, 0xFFFF]] * 4] * 4, dtype=">u2")
    rows = zlib.compress(b"".join(b"\0" + row.tobytes() for row in data))
    assert np.asarray(load_image(pictures.png(4, 4, depth=16, colour=2, data=rows)))[0, 0].tolist() == [0, 128, 255]


def test_a_transparent_level_of_sixteen_bits() -> None:
    levels = np.array([[1000, 2000]], dtype=">u2")
    data = pictures.png(
        2, 1, pictures.chunk(b"tRNS", struct.pack(">H", 1000)), depth=16, data=zlib.compress(b"\0" + levels.tobytes())
    )
    with pytest.warns(FastVLMWarning, match="16-bit grey levels"):
        assert grey(data).tolist() == [[255, 8]]


def test_alpha_is_composed_on_white() -> None:
    rgba = np.array([[[255, 0, 0, 255], [255, 0, 0, 0], [0, 0, 0, 128]]], dtype=np.uint8)
    expected = [[[255, 0, 0], [255, 255, 255], [127, 127, 127]]]
    assert np.asarray(load_image(pictures.encoded(Image.fromarray(rgba), "PNG"))).tolist() == expected
    grey_alpha = Image.fromarray(np.array([[[0, 255], [0, 0], [0, 128]]], dtype=np.uint8), "LA")
    assert grey(pictures.encoded(grey_alpha, "PNG")).tolist() == [[0, 255, 127]]
    for premultiplied in ("RGBa", "La"):
        image = Image.new("RGBA" if premultiplied == "RGBa" else "LA", (2, 2), 0).convert(premultiplied)
        assert (np.asarray(load_image(image)) == 255).all()


def test_a_palette_with_alpha() -> None:
    image = Image.new("P", (3, 1))
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.putdata([0, 1, 2])
    partly = pictures.encoded(image, "PNG", transparency=bytes([255, 0, 128]))
    assert np.asarray(load_image(partly)).tolist() == [[[255, 0, 0], [255, 255, 255], [127, 127, 255]]]
    one = pictures.encoded(image, "GIF", transparency=1)
    assert np.asarray(load_image(one)).tolist() == [[[255, 0, 0], [255, 255, 255], [0, 0, 255]]]


def test_transparency_of_a_large_picture_is_the_same_in_strips() -> None:
    rgba = np.random.default_rng(0).integers(0, 256, (700, 7000, 4), dtype=np.uint8)
    image = Image.fromarray(rgba)
    whole = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    assert np.array_equal(np.asarray(load_image(image)), np.asarray(whole))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP", "GIF"])
def test_one_bit(kind: str) -> None:
    bits = np.array([[True, False, True, True]])
    assert grey(pictures.encoded(Image.fromarray(bits), kind)).tolist() == [[255, 0, 255, 255]]


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk(kind: str) -> None:
    """Adobe's JPEGs store ink inverted; either way red ink is red."""
    red = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    colour = np.asarray(load_image(pictures.encoded(red, kind)))[8, 8].astype(int)
    assert colour[0] > 220 and colour[1] < 40 and colour[2] < 40


@pytest.mark.parametrize("size", [(1, 1), (1, 20000), (20000, 1), (3, 20000), (20000, 3), (1, 65535), (65535, 1)])
@pytest.mark.parametrize("resolution", [1024])
def test_extreme_shapes(run: Run, model: Path, tmp_path: Path, size: tuple[int, int], resolution: int) -> None:
    path = tmp_path / "photo.png"
    Image.new("RGB", size, "red").save(path)
    # Its pictures are small, so the rest of the work is that of looking at any picture.
    run("generate", "-m", model, "-i", path, "--resolution", 256, "--max-tokens", 1).answered()


@pytest.mark.parametrize("size", [(1, 9), (2, 300), (7, 500), (33, 1333), (150, 2000), (1, 5000)])
@pytest.mark.parametrize("side", [64, 192, 1024])
def test_extreme_shapes_are_bit_exact(size: tuple[int, int], side: int) -> None:
    """As Pillow resizes the whole padded square."""
    for width, height in (size, size[::-1]):
        image = Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8))
        square = Image.new("RGB", (max(size), max(size)))
        square.paste(image, ((max(size) - width) // 2, (max(size) - height) // 2))
        expected = np.asarray(square.resize((side, side), Image.Resampling.BICUBIC))
        assert np.array_equal(preprocess(image, ImageConfig(side, "pad")), expected)


def test_a_slim_picture_that_cannot_be_cropped() -> None:
    with pytest.raises(ImageError, match="too long and narrow"):
        preprocess(Image.new("RGB", (1, 60000)), ImageConfig(1024, "crop"))


@pytest.mark.parametrize("mode", ["L", "RGB", "P", "CMYK", "I;16", "LA", "1"])
def test_black_stays_black(mode: str) -> None:
    image = Image.new(mode, (30, 20), (0, 255) if mode == "LA" else (0, 0, 0, 255) if mode == "CMYK" else 0)
    data = pictures.encoded(image, "TIFF" if mode == "CMYK" else "PNG")
    assert preprocess(load_image(data), ImageConfig(64, "pad")).max() == 0


@pytest.mark.parametrize(
    "source",
    [
        np.zeros((3, 3), np.int64),
        np.zeros((3, 3, 5), np.uint8),
        np.zeros((0, 3, 3), np.uint8),
        7,
        None,
        ["photo.jpg"],
        Image.new("RGB", (0, 5)),
        b"",
    ],
)
def test_sources_that_are_none(source: object) -> None:
    with pytest.raises(ImageError):
        load_image(source)  # type: ignore[arg-type]


@pytest.mark.parametrize("bound", [0, -1, 1 << 31, 1.5, True, "many", None])
def test_bounds_that_are_none(bound: object) -> None:
    with pytest.raises(OptionError, match="max_pixels"):
        load_image(pictures.sample("PNG"), max_pixels=bound)  # type: ignore[arg-type]


@pytest.mark.skipif(find_spec("pillow_heif") is not None, reason="the extra is installed")
def test_heic_without_the_extra(look: Look) -> None:
    look(pictures.FOREIGN["HEIC"][0]).refused("photo.jpg", "the extra 'heic'")


def test_heic_with_the_extra() -> None:
    heif = pytest.importorskip("pillow_heif")
    heif.register_heif_opener()
    image = load_image(pictures.encoded(Image.fromarray(pictures.pixels()), "HEIF", quality=95))
    assert np.abs(np.asarray(image).astype(int) - pictures.pixels()).mean() < 12
