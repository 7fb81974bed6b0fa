"""What a typed line means: commands, questions, and the paths of pictures as terminals write them when files are
dragged in."""

from pathlib import Path

import pytest
from PIL import Image

from fastvlm_mlx.cli.conversation.typed import COMMANDS, parse
from fastvlm_mlx.errors import PromptError

NAMES = ["a.png", "b.JPG", "My Photo (1).jpg", "it's.png", "日 本.webp", "noend", "notes.txt"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    for name in NAMES:
        (tmp_path / name).touch()
    Image.new("RGB", (8, 8)).save(tmp_path / "IMG 1", "PNG")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return str(tmp_path)


@pytest.mark.parametrize(
    ("line", "text", "pictures"),
    [
        # dragged in, as different terminals write it
        ("{}/a.png", "", ["{}/a.png"]),
        ("{}/My\\ Photo\\ \\(1\\).jpg ", "", ["{}/My Photo (1).jpg"]),
        ("'{}/My Photo (1).jpg'", "", ["{}/My Photo (1).jpg"]),
        ('"{}/My Photo (1).jpg"', "", ["{}/My Photo (1).jpg"]),
        ("{}/My Photo (1).jpg", "", ["{}/My Photo (1).jpg"]),
        ("file://{}/My%20Photo%20(1).jpg", "", ["{}/My Photo (1).jpg"]),
        ("file://localhost{}/a.png", "", ["{}/a.png"]),
        ("'{}/it'\\''s.png'", "", ["{}/it's.png"]),
        ("{}/it\\'s.png", "", ["{}/it's.png"]),
        ("{}/it's.png", "", ["{}/it's.png"]),
        ("{}/日\\ 本.webp 这是什么？", "这是什么？", ["{}/日 本.webp"]),
        ("~/a.png", "", ["{}/a.png"]),
        ("./a.png ../nowhere.png", "", ["./a.png", "../nowhere.png"]),
        ("{}/a.png\n{}/b.JPG\n", "", ["{}/a.png", "{}/b.JPG"]),
        # by what the file begins with, where its name does not say
        ("{}/IMG\\ 1", "", ["{}/IMG 1"]),
        ("'{}/IMG 1' What is it?", "What is it?", ["{}/IMG 1"]),
        ("{}/noend", "{}/noend", []),
        # with a question
        ("{}/a.png What is it?", "What is it?", ["{}/a.png"]),
        ("What is it? {}/a.png ", "What is it?", ["{}/a.png"]),
        ("{}/a.png {}/b.JPG what's different?", "what's different?", ["{}/a.png", "{}/b.JPG"]),
        ("{}/My Photo (1).jpg what's this?", "what's this?", ["{}/My Photo (1).jpg"]),
        ("What's in {}/a.png?", "What's in a.png?", ["{}/a.png"]),
        ("Compare a.png with b.JPG.", "Compare a.png with b.JPG.", ["a.png", "b.JPG"]),
        ("/nowhere/a.png what is it?", "what is it?", ["/nowhere/a.png"]),  # refused when it is opened
        # no pictures
        ("Is c.png there, or {}/notes.txt?", "Is c.png there, or {}/notes.txt?", []),
        ("/etc/hosts what is it", "/etc/hosts what is it", []),
        ("it's 'almost a quote", "it's 'almost a quote", []),
        ("1/2 and/or a\\b", "1/2 and/or a\\b", []),
        ("see https://example.org/a.png", "see https://example.org/a.png", []),
        ("", "", []),
    ],
)
def test_questions(here: str, line: str, text: str, pictures: list[str]) -> None:
    said = parse(line.replace("{}", here))
    assert said.command is None
    assert (said.text, said.pictures) == (
        text.replace("{}", here),
        tuple(path.replace("{}", here) for path in pictures),
    )


@pytest.mark.parametrize(
    ("line", "command", "text", "pictures"),
    [
        ("/image a.png", "image", "", ["a.png"]),
        ("/image My Photo (1).jpg", "image", "", ["My Photo (1).jpg"]),
        ("/image 'My Photo (1).jpg' b.JPG", "image", "", ["My Photo (1).jpg", "b.JPG"]),
        ("/image a.png missing.png", "image", "", ["a.png", "missing.png"]),
        ("/image noend", "image", "", ["noend"]),
        ("/image missing", "image", "", ["missing"]),
        ("/image a.png What is it?", "image", "What is it?", ["a.png"]),
        ("  /IMAGE  ", "image", "", []),
        ("/system  Be  brief. ", "system", "Be  brief.", []),
        ("/exit", "quit", "", []),
        ("/?", "help", "", []),
    ],
)
def test_commands(here: str, line: str, command: str, text: str, pictures: list[str]) -> None:
    said = parse(line)
    assert (said.command, said.text, said.pictures) == (command, text, tuple(pictures))


def test_every_command_is_known() -> None:
    assert [parse(f"/{name}").command for name in COMMANDS] == list(COMMANDS)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("/undoo", "did you mean /undo"),
        ("/", "'/'"),
        ("/frob nicate", "/help lists them"),
        ("/undo 3", "takes nothing"),
    ],
)
def test_unknown_commands(line: str, says: str) -> None:
    with pytest.raises(PromptError, match=says):
        parse(line)


@pytest.mark.slow
@pytest.mark.parametrize("unit", ["it's a word. ", "/a/b ", "~/q w.png ", '"a ', "a'", "/"])
def test_long_lines_are_text(here: str, unit: str) -> None:
    """A line of a million characters is not searched at all, and the longest that is, not for long."""
    assert parse("x " + unit * 100_000).pictures == ()
    parse("x " + (unit * 20_000)[:19_000])
