"""Errors carry what they are about, and warnings point at the line of the person who called."""

import pickle
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

import fastvlm_mlx
from fastvlm_mlx import FastVLMError
from fastvlm_mlx.convert.pipeline import convert
from fastvlm_mlx.errors import CheckpointError, ImageError, about
from fastvlm_mlx.inputs.image import load_image

TINY = Path(fastvlm_mlx.__file__).parent / "tiny"


def copy_of_tiny(folder: Path) -> Path:
    """The built-in model's files, to be damaged."""
    shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("calibration"))
    return folder


def test_a_path_is_kept_where_the_error_is_raised(tmp_path: Path) -> None:
    with pytest.raises(ImageError) as raised, about(tmp_path), about(None):
        raise ImageError("It is no picture.", path=tmp_path / "photo.jpg")
    assert raised.value.path == tmp_path / "photo.jpg"
    with pytest.raises(ImageError) as raised, about(str(tmp_path)):
        raise ImageError("It is no picture.")
    assert raised.value.path == tmp_path and str(raised.value) == "It is no picture."
    assert FastVLMError("Nothing on this disk.").path is None


def test_errors_can_be_sent_to_another_process(tmp_path: Path) -> None:
    error = pickle.loads(pickle.dumps(ImageError("`max_pixels` is 0.", path=tmp_path)))
    assert (type(error), str(error), error.path, error.option) == (
        ImageError,
        "`max_pixels` is 0.",
        tmp_path,
        "max_pixels",
    )


@pytest.mark.parametrize("name", ["missing.jpg", "folder", "broken.png", "empty.png"])
def test_pictures(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    (tmp_path / "empty.png").write_bytes(b"")
    with pytest.raises(ImageError) as raised:
        load_image(f"file://{tmp_path / name}")
    assert raised.value.path == tmp_path / name
    with pytest.raises(ImageError) as raised:
        load_image(b"not a picture")
    assert raised.value.path is None


@pytest.mark.parametrize(
    ("damage", "path"),
    [
        (lambda folder: (folder / "config.json").write_text("{}"), ""),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), ""),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 100), "model.safetensors"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "tokenizer.json"),
        (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b""), ""),
    ],
)
def test_folders(tmp_path: Path, damage: Callable[[Path], object], path: str) -> None:
    folder = copy_of_tiny(tmp_path / "model")
    damage(folder)
    with pytest.raises(CheckpointError) as raised:
        fastvlm_mlx.load(folder)
    assert raised.value.path == (folder / path if path else folder)


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    folder = copy_of_tiny(tmp_path / "model")
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05').replace(
        '"num_hidden_layers": ', '"num_hidden_layers": 1'
    ))  # fmt: skip
    with pytest.raises(CheckpointError) as raised:
        fastvlm_mlx.load(folder)
    assert raised.value.path == folder


def test_converting(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as raised:
        convert(TINY, tmp_path / "out")
    assert raised.value.path == TINY
    (tmp_path / "theirs").mkdir()
    with pytest.raises(CheckpointError) as raised:
        convert(tmp_path / "theirs", tmp_path / "out")
    assert raised.value.path == tmp_path / "theirs"


def test_warnings_point_at_the_line_that_called(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("red", "green")]
    frames[0].save(tmp_path / "two.gif", save_all=True, append_images=frames[1:])
    vlm = fastvlm_mlx.load("tiny")
    for ask in (lambda: load_image(tmp_path / "two.gif"), lambda: vlm.generate(tmp_path / "two.gif", max_tokens=1)):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            ask()
        assert [(warning.category, warning.filename) for warning in told] == [(fastvlm_mlx.FastVLMWarning, __file__)]
