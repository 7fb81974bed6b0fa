"""`fastvlm-mlx generate` with files as people have them: names, folders, patterns, stdin; and the companions macOS
makes."""

import shutil
from pathlib import Path

import pytest
from PIL import Image

import fastvlm_mlx
from fastvlm_mlx import VLM
from fastvlm_mlx.calibrate.examples import read_questions
from fastvlm_mlx.convert import pickles
from fastvlm_mlx.files import digests, shards

from .forkserver import Run

ASKED = ("--dtype", "float32", "--max-tokens", 8, "-p", "Why?")
COMPANION = b"\0\5\x16\7\0\2\0\0Mac OS X        " + bytes(4056)


@pytest.fixture
def photos(photo: Path, tmp_path: Path) -> Path:
    """Two pictures, a companion, and a text."""
    folder = tmp_path / "my photos"
    folder.mkdir()
    shutil.copy(photo, folder / "b.png")
    Image.new("RGB", (40, 30), "red").save(folder / "a\u202f1.png")
    (folder / "._b.png").write_bytes(COMPANION)
    (folder / "notes.txt").write_text("mine")
    return folder


@pytest.mark.parametrize(
    "images",
    [
        ["-i", "a\u202f1.png", "-i", "b.png"],
        ["-i", "a 1.png", "b.png"],
        ["--image", "a\u00a01.png", "b.png", "--seed", "1"],
        ["--image-file=a 1.png", "b.png"],
        ["-ia 1.png", "b.png"],
        ["-i", "."],
        ["-i", "*.png"],
        ["-i", "a*", "b.png"],
        ["-i", "file://{}/a%201.png", "~/my photos/b.png"],
    ],
    ids=" ".join,
)
def test_several_pictures(run: Run, small: VLM, model: Path, photos: Path, images: list[str]) -> None:
    expected = small.generate([photos / "a\u202f1.png", photos / "b.png"], "Why?", max_tokens=8).text
    words = [word.replace("{}", str(photos)) for word in images]
    done = run("generate", "-m", model, *words, *ASKED, cwd=photos, env={"HOME": str(photos.parent)})
    cut = "fastvlm-mlx: Note: the answer was cut at its limit of 8 tokens; a larger --max-tokens lets it go on.\n"
    assert (done.code, done.err, done.out.decode()) == (0, cut, expected + "\n")


def test_a_picture_on_stdin(run: Run, small: VLM, model: Path, photo: Path) -> None:
    done = run("generate", "-m", model, "-i", photo, "-", *ASKED, stdin=photo.read_bytes())
    assert done.out.decode() == small.generate([photo, photo], "Why?", max_tokens=8).text + "\n"


def test_stdin_holds_one_thing(run: Run, model: Path, photo: Path) -> None:
    run("generate", "-m", model, "-i", "-", "-p", "-", stdin=photo.read_bytes()).refused("--image -", "stdin")
    run("generate", "-m", model, "-i", "-", "-", stdin=photo.read_bytes()).refused("--image -", "stdin")
    run("generate", "-m", model, "-i", "-", stdin=b"hello").refused("no image")


def test_words_after_another_option_are_no_pictures(run: Run, model: Path, photo: Path) -> None:
    assert run("generate", "-m", model, "-i", photo, "-p", "Why?", photo).code == 2


def test_every_path_may_begin_at_home(run: Run, model: Path, photos: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "a model")
    env = {"HOME": str(tmp_path)}
    for name in ("~/a model", f"file://{tmp_path}/a%20model", "~/a\u00a0model"):
        options = (f"--model={name}", f"--tokenizer-path={name}", "-i", "~/my photos/b.png", *ASKED)
        assert run("generate", *options, env=env).code == 0
    run("convert", "~/a model", "--out=~/converted", env=env)
    run("convert", f"file://{tmp_path}/a%20model", f"--out=file://{tmp_path}/converted%202", env=env)
    assert (tmp_path / "converted" / "config.json").exists() and (tmp_path / "converted 2" / "config.json").exists()
    assert len(read_questions(Path(f"file://{photos}"))) == 2


def test_companions_that_macos_makes_are_no_files_of_a_model(apple: Path, photos: Path) -> None:
    """On exFAT and network drives every file has one, which holds its attributes."""
    before = shards.read_headers(apple)
    names = [path.name for path in apple.iterdir()]
    digests.write_sums(apple / digests.SUMS, {name: digests.sha256(apple / name) for name in names})
    for name in (*names, "pytorch_model.bin"):
        (apple / f"._{name}").write_bytes(COMPANION)
    assert shards.read_headers(apple) == before
    assert pickles.read_headers(apple) == {}
    assert digests.verify(apple).unknown == []
    fastvlm_mlx.load(str(apple))
    assert [Path(str(question.image)).name for question in read_questions(photos)] == ["a\u202f1.png", "b.png"]
