"""Names of files as people have them: another kind of space, another Unicode form, ~, file://, companions, folders,
patterns."""

import unicodedata
from pathlib import Path

import pytest

from fastvlm_mlx.errors import ImageError
from fastvlm_mlx.files import paths, regular
from fastvlm_mlx.inputs import folder

COMPOSED = "Übung \u00e9t\u00e9"


@pytest.mark.parametrize(
    ("stored", "asked"),
    [
        ("at 3.45\u202fPM.png", "at 3.45 PM.png"),
        ("at 3.45\u00a0PM.png", "at 3.45 PM.png"),
        ("at 3.45 PM.png", "at 3.45\u00a0PM.png"),
        ("a\u3000b.png", "a\u202fb.png"),
        (unicodedata.normalize("NFD", COMPOSED), COMPOSED),
        (COMPOSED, unicodedata.normalize("NFD", COMPOSED)),
    ],
)
def test_a_missing_name_is_found_in_the_disk_s_spelling(tmp_path: Path, stored: str, asked: str) -> None:
    for place in (tmp_path, tmp_path / stored):
        place.mkdir(exist_ok=True)
    (tmp_path / stored / stored).touch()
    assert paths.find(tmp_path / asked / asked) == str(tmp_path / stored / stored)
    assert paths.find(tmp_path / stored / asked) == str(tmp_path / stored / stored)


def test_a_relative_path_stays_relative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a\u202fb.png").touch()
    assert paths.find("a b.png") == "a\u202fb.png"
    assert paths.find("./a b.png") == "./a\u202fb.png"


def test_only_the_kind_of_space_and_the_form_may_differ(tmp_path: Path) -> None:
    for name in ("ab.png", "A b.png", "a  b.png", "a_b.png", "\ufb01.png"):
        (tmp_path / name).touch()
    for missing in ("a b.png", "fi.png", "none/a.png", ""):
        assert paths.find(f"{tmp_path}/{missing}") == f"{tmp_path}/{missing}"


def test_of_several_that_are_alike_none_is_chosen(tmp_path: Path) -> None:
    (tmp_path / "a\u202fb.png").touch()
    (tmp_path / "a\u00a0b.png").touch()
    assert paths.find(tmp_path / "a b.png") == str(tmp_path / "a b.png")
    assert paths.find(tmp_path / "a\u00a0b.png") == str(tmp_path / "a\u00a0b.png")


@pytest.mark.parametrize(
    ("given", "path"),
    [
        ("~/a.png", "/home/me/a.png"),
        ("file:///tmp/a%20b%C3%A9.png", "/tmp/a bé.png"),
        ("file://localhost/tmp/a.png", "/tmp/a.png"),
        ("FILE:/tmp/a.png", "/tmp/a.png"),
        ("file:///tmp/%FF.png", "/tmp/\udcff.png"),
        ("file://server/share/a.png", "file://server/share/a.png"),
        ("https://example.org/a.png", "https://example.org/a.png"),
        ("~nobody-at-all/a.png", "~nobody-at-all/a.png"),
        ("a%20b.png", "a%20b.png"),
    ],
)
def test_home_and_file_addresses(monkeypatch: pytest.MonkeyPatch, given: str, path: str) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert paths.local(given) == path


@pytest.mark.parametrize("path", ["\0", "a\0b.png", "x" * 10_000, "/x" * 100_000, "file:///%00"])
def test_impossible_paths_stay(path: str) -> None:
    assert paths.find(path) == paths.local(path)


def test_pictures_of_a_folder_and_a_pattern(tmp_path: Path) -> None:
    for name in ("b.PNG", "a.jpg", "._a.jpg", ".hidden.png", "notes.txt", "c.heic", "[x].png"):
        (tmp_path / name).touch()
    (tmp_path / "d.png").mkdir()
    every = [str(tmp_path / name) for name in ("[x].png", "a.jpg", "b.PNG", "c.heic")]
    assert folder.pictures(str(tmp_path)) == every
    assert folder.pictures(f"file://{tmp_path}/") == [f"{tmp_path}/{Path(path).name}" for path in every]
    assert folder.pictures(f"{tmp_path}/?.jpg") == [str(tmp_path / "a.jpg")]
    assert folder.pictures(f"{tmp_path}/[x].png") == [f"{tmp_path}/[x].png"]  # a file of that name
    assert folder.pictures(f"{tmp_path}/*.gif") == [f"{tmp_path}/*.gif"]  # refused when it is opened
    with pytest.raises(ImageError, match="is a folder, and there are no pictures"):
        folder.pictures(str(tmp_path / "d.png"))


def test_a_text_that_cannot_take_its_place_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError, match="taken"):
        regular.write(tmp_path / "taken", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]
