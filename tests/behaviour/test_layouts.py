"""The command line with folders of other layouts: recognised, said, converted, and back."""

from pathlib import Path

import pytest

from .. import layouts
from .forkserver import Run


def ask(run: Run, folder: Path, photo: Path) -> bytes:
    result = run("generate", "-m", folder, "-i", photo, "-p", "What is it?", "--max-tokens", 6, "--dtype", "float32")
    result.answered()
    return result.out


def test_the_layout_is_said_and_the_answer_is_the_same(run: Run, apple: Path, photo: Path, tmp_path: Path) -> None:
    theirs = layouts.mlx_vlm(apple, tmp_path / "theirs")
    done = run("convert", theirs, "-o", tmp_path / "ours", "--dtype", "float32")
    assert (done.code, done.out) == (0, b"") and done.err.startswith("Layout: mlx-vlm\n")
    assert ask(run, theirs, photo) == ask(run, tmp_path / "ours", photo) == ask(run, apple, photo)


def test_to_transformers_and_back(run: Run, apple: Path, photo: Path, tmp_path: Path) -> None:
    done = run("convert", apple, "-o", tmp_path / "theirs", "--dtype", "float32", "--to", "transformers")
    assert (done.code, done.out) == (0, b"") and done.err.startswith("Layout: llava\n")
    assert ask(run, tmp_path / "theirs", photo) == ask(run, apple, photo)


def test_an_export_for_apples_app(run: Run, apple: Path, photo: Path, tmp_path: Path) -> None:
    export = layouts.apple_mlx(apple, tmp_path / "export")
    run("generate", "-m", export, "-p", "Hi").refused("Core ML package", "--vision-from")
    run("convert", export, "-o", tmp_path / "ours").refused("Core ML package", "--vision-from")
    done = run("convert", export, "-o", tmp_path / "ours", "--dtype", "float32", "--vision-from", apple)
    assert done.code == 0 and done.err.startswith("Layout: apple-mlx\n")
    assert ask(run, tmp_path / "ours", photo) == ask(run, apple, photo)


def test_what_had_to_be_unpacked_is_said(run: Run, apple: Path, tmp_path: Path) -> None:
    done = run("convert", layouts.mlx_vlm(apple, tmp_path / "theirs", layouts.alike()), "-o", tmp_path / "ours")
    assert done.code == 0 and "are dequantised: 'mm_projector.0.weight'." in done.err
    run("generate", "-m", tmp_path / "ours", "-p", "Hi", "--max-tokens", 2).answered()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--to", "tflite"), "expected one of 'mlx', 'transformers'"),
        (("--layout", "onnx"), "expected one of 'llava-training'"),
        (("--layout", "transformers"), "not the 'transformers' layout"),
        (("--fit", "stretch"), "expected 'pad' or 'crop'"),
        (("--vision-from", "."), "its own image encoder"),
        (("--vision-from", "/nowhere"), "no such folder"),
    ],
)
def test_options_in_error(run: Run, apple: Path, tmp_path: Path, options: tuple[str, ...], says: str) -> None:
    run("convert", apple, "-o", tmp_path / "ours", *options, cwd=apple).refused(says)
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    "option", [("--to", "tflite"), ("--layout", "onnx"), ("--fit", "stretch"), ("--dtype", "float8")]
)
def test_options_are_checked_before_anything_is_fetched(run: Run, tmp_path: Path, option: tuple[str, str]) -> None:
    run("convert", "someone/nothing", "-o", tmp_path / "ours", *option).refused(option[1])
