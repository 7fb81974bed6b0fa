"""What people pass from Python: every form of a picture, NumPy's numbers, and what is none of these."""

import io
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

import fastvlm_mlx
from fastvlm_mlx import VLM
from fastvlm_mlx.decoding.request import Options
from fastvlm_mlx.errors import FastVLMError, HubError, ImageError, OptionError
from fastvlm_mlx.inputs.image import load_image

from . import pictures

PIXELS = pictures.pixels()
GREY = np.ascontiguousarray(PIXELS[..., 0])
FILE = pictures.encoded(Image.fromarray(PIXELS), "PNG")


class Foreign:
    """An array of another library."""

    def __init__(self, fails: Exception | None = None):
        self.fails = fails

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        if self.fails is not None:
            raise self.fails
        return PIXELS


def read_before(file: Any) -> Any:
    """A file at its end, as it is where it has just been written."""
    file.read()
    return file


def stored() -> Any:
    file = tempfile.TemporaryFile()  # noqa: SIM115  (whoever gets it reads it)
    file.write(FILE)
    return file


RGB: dict[str, Callable[[], Any]] = {
    "bytes": lambda: FILE,
    "bytearray": lambda: bytearray(FILE),
    "memoryview": lambda: memoryview(FILE),
    "BytesIO": lambda: io.BytesIO(FILE),
    "BytesIO at its end": lambda: read_before(io.BytesIO(FILE)),
    "an open file": stored,
    "a dict with bytes": lambda: {"bytes": FILE, "path": None},
    "a dict with both": lambda: {"bytes": FILE, "path": "photo.png"},
    "uint8": lambda: PIXELS,
    "uint8, not in one piece": lambda: np.repeat(PIXELS, 2, axis=0)[::2],
    "RGBA": lambda: np.dstack([PIXELS, np.full_like(GREY, 255)]),
    "uint16": lambda: PIXELS.astype(np.uint16) * 257,
    "big-endian uint16": lambda: (PIXELS.astype(np.uint16) * 257).astype(">u2"),
    "float16": lambda: (PIXELS / 255).astype(np.float16),
    "float32": lambda: (PIXELS / 255).astype(np.float32),
    "float64": lambda: PIXELS / 255,
    "MLX uint8": lambda: mx.array(PIXELS),
    "MLX float32": lambda: mx.array(PIXELS).astype(mx.float32) / 255,
    "another library's": Foreign,
}


@pytest.mark.parametrize("kind", RGB)
def test_every_form_of_a_picture(kind: str) -> None:
    picture = RGB[kind]()
    assert np.array_equal(np.asarray(load_image(picture)), PIXELS)
    if isinstance(picture, io.IOBase):
        picture.close()


@pytest.mark.parametrize(
    "encode", [lambda a: a, lambda a: a[..., None], lambda a: np.stack([a, np.full_like(a, 255)], -1)]
)
def test_grey(encode: Callable[[np.ndarray], np.ndarray]) -> None:
    assert np.array_equal(np.asarray(load_image(encode(GREY))), np.repeat(GREY[..., None], 3, -1))


def test_mlx_s_bfloat16_is_near() -> None:
    picture: Any = (mx.array(PIXELS) / 255).astype(mx.bfloat16)
    found = np.asarray(load_image(picture)).astype(int)
    assert np.abs(found - PIXELS).max() <= 1


def test_black_and_white() -> None:
    assert np.array_equal(np.asarray(load_image(GREY > 100))[..., 0], np.where(GREY > 100, 255, 0))


@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_a_dark_array_stays_dark(dtype: type) -> None:
    """The range follows from the dtype, never from the greatest value."""
    full = 65535 if dtype is np.uint16 else 1.0
    assert np.asarray(load_image((PIXELS / 255 * full / 60).astype(dtype))).max() == 4


def test_a_path_of_every_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a\u202fb.png").write_bytes(FILE)
    for path in (
        "~/a b.png",
        f"file://{tmp_path}/a%20b.png",
        tmp_path / "a\u00a0b.png",
        {"bytes": None, "path": "~/a b.png"},
    ):
        assert np.array_equal(np.asarray(load_image(path)), PIXELS)


def test_a_transcript_keeps_the_path_that_was_found(small: VLM, tmp_path: Path) -> None:
    (tmp_path / "a\u202fb.png").write_bytes(FILE)
    chat = small.chat()
    chat.ask("Why?", f"file://{tmp_path}/a%20b.png", max_tokens=1)
    assert chat.messages[0]["images"] == [str(tmp_path / "a\u202fb.png")]


def closed() -> Image.Image:
    image = Image.open(io.BytesIO(FILE))
    image.close()
    return image


def closed_file() -> Any:
    file = io.BytesIO(FILE)
    file.close()
    return file


WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "channels first": (lambda: PIXELS.transpose(2, 0, 1), "move the channels to the end"),
    "several in an array": (lambda: PIXELS[None], "several pictures as a list"),
    "int64": (lambda: PIXELS.astype(np.int64), "astype"),
    "floats to 255": (lambda: PIXELS.astype(np.float32), "beyond 0 to 1"),
    "floats below 0": (lambda: PIXELS / 255 - 0.5, "beyond 0 to 1"),
    "no numbers": (lambda: PIXELS * np.nan, "not finite"),
    "words": (lambda: np.array([["a"]]), "expected"),
    "objects": (lambda: np.array([[None]]), "expected"),
    "empty": (lambda: np.zeros((0, 5), np.uint8), "expected"),
    "one number": (lambda: np.float64(3), "expected"),
    "an array that fails": (lambda: Foreign(TypeError("can't convert cuda:0 device type tensor")), "cuda:0"),
    "a closed PIL image": (closed, "closed or damaged"),
    "a closed file": (closed_file, "mode 'rb'"),
    "a text file": (lambda: io.StringIO("hello"), "mode 'rb'"),
    "an empty file": (io.BytesIO, "is empty"),
    "a generator": (lambda: (each for each in [FILE]), "generator"),
    "nothing": (lambda: float("nan"), "float"),
    "a dict without": (lambda: {"image": FILE}, "'bytes' or 'path'"),
    "a dict of None": (lambda: {"bytes": None, "path": None}, "'bytes' or 'path'"),
    "a class": (lambda: Image.Image, "expected a path"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_no_picture(kind: str) -> None:
    make, says = WRONG[kind]
    with pytest.raises(ImageError, match=says):
        load_image(make())


def test_numpy_s_numbers_are_numbers(small: VLM) -> None:
    options = Options(np.int64(3), np.float32(0.5), np.float64(0.9), np.uint64(1 << 63), (np.int32(5),))  # type: ignore[arg-type]
    assert options == Options(3, 0.5, 0.9, 1 << 63, (5,))
    assert {type(value) for value in (options.max_tokens, options.seed, *(options.stop_tokens or ()))} == {int}
    assert {type(options.temperature), type(options.top_p)} == {float}
    numbers: dict[str, Any] = {"max_tokens": np.int32(2), "seed": np.int64(3), "temperature": np.float64(1)}
    answer = small.generate(None, "Why?", **numbers)
    assert answer.token_ids == small.generate(None, "Why?", max_tokens=2, seed=3, temperature=1).token_ids
    side: Any = np.int64(128)
    assert small.engine.at(side).config == small.engine.at(128).config


@pytest.mark.parametrize(
    "options",
    [
        {"max_tokens": np.float64(3)},
        {"max_tokens": np.bool_(True)},
        {"temperature": np.float32("nan")},
        {"temperature": "0.5"},
        {"top_p": np.array([0.5])},
        {"seed": np.int64(-1)},
        {"stop_tokens": (np.float32(1),)},
    ],
)
def test_numbers_that_are_none(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        Options(**options)


@pytest.mark.parametrize("model", [None, 7, b"tiny", ["tiny"], float("nan")])
def test_models_that_are_none(model: Any) -> None:
    with pytest.raises(HubError, match="`model` is"):
        fastvlm_mlx.load(model)


def test_options_of_load_that_are_none() -> None:
    for options in (
        {"tokenizer": 7},
        {"bits": 4.0},
        {"bits": "4"},
        {"resolution": "64"},
        {"resolution": 64.0},
        {"dtype": 16},
    ):
        with pytest.raises(FastVLMError):
            fastvlm_mlx.load("tiny", **options)
