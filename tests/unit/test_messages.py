"""Messages of the library name Python's arguments; the command line puts its flags in their place."""

import ast
import re
from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path

import pytest

import fastvlm_mlx
from fastvlm_mlx import progress
from fastvlm_mlx.cli import messages
from fastvlm_mlx.cli.app import COMMANDS, flags
from fastvlm_mlx.cli.generate import note_of_a_cut
from fastvlm_mlx.decoding.request import Options
from fastvlm_mlx.errors import FastVLMError, OptionError, counted

PACKAGE = Path(fastvlm_mlx.__file__).parent
UseFlags = Callable[[Callable[[], dict[str, str]]], None]
FLAG = re.compile(r"(?:^|[\s(])--[a-z]")


@pytest.fixture
def use_flags() -> Iterator[UseFlags]:
    """Say what a message's arguments are called on the command line, for one test."""
    yield messages.use_flags
    messages.use_flags(dict)


def texts(path: Path) -> Iterator[str]:
    """Every text of a file that is no docstring."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value


def test_the_library_speaks_of_no_flags() -> None:
    """But for whole commands that it tells people to run."""
    library = [path for path in PACKAGE.rglob("*.py") if "cli" not in path.relative_to(PACKAGE).parts]
    library += (PACKAGE / "convert").glob("*.py")
    assert len(library) > 90
    said = [
        (path.name, text)
        for path in library
        for text in texts(path)
        if FLAG.search(text) and "fastvlm-mlx " not in text
    ]
    assert said == []


@pytest.mark.parametrize(
    ("command", "message", "expected"),
    [
        ("generate", "`max_tokens` is 0, expected 1.", "--max-tokens is 0, expected 1."),
        ("generate", "choose `dtype='bfloat16'` or `dtype='float32'`.", "choose --dtype bfloat16 or --dtype float32."),
        (
            "convert",
            "give another `out`, or `force=True` to replace it",
            "give another --out, or --force to replace it",
        ),
        ("convert", "with `to='transformers'`, as `tokenizer`", "with --to transformers, as --tokenizer-path"),
        ("quantize", "`group_size` and `pictures`", "--group-size and --pictures"),
        ("quantize", "try `model='tiny'`; check `model`", "try tiny; check MODEL"),
        ("bench", "a folder of `pictures`, `size` is 3", "a folder of --pictures, --random is 3"),
        (
            "info",
            "with `bits=4` about 3 GB, `vision_from`",
            "with --bits 4 about 3 GB, --vision-from",
        ),  # which it does not have
        ("download", "which takes `agree`; `sha256`", "which takes --yes; --sha256"),
        ("download", "check `model`, or try `model='tiny'`", "check NAME, or try tiny"),
        ("convert", "check `model`", "check FOLDER"),
        (
            "chat",
            "`stop_tokens` is 3; `stop_tokens=()`",
            "`stop_tokens` is 3; `stop_tokens=()`",
        ),  # which no command has
        (
            "chat",
            "the files 'a`bits`c', /x/`model` and `seed`/y, (`bits`)",
            "the files 'a`bits`c', /x/`model` and `seed`/y, (--bits)",
        ),
    ],
)
def test_arguments_as_flags(command: str, message: str, expected: str, use_flags: UseFlags) -> None:
    use_flags(lambda: flags(command))
    assert messages.with_flags(message) == expected


def test_a_message_is_said_also_where_flags_cannot_be_had(use_flags: UseFlags) -> None:
    def fails() -> dict[str, str]:
        raise MemoryError

    use_flags(fails)
    assert messages.with_flags("`bits` is 7") == "`bits` is 7"


def test_every_command_has_its_flags() -> None:
    for command in COMMANDS:
        assert all(flag.startswith("--") or flag.isupper() for flag in flags(command).values())


def test_an_error_knows_its_argument() -> None:
    with pytest.raises(OptionError) as refused:
        Options(max_tokens=0)
    assert refused.value.option == "max_tokens" and str(refused.value).startswith("`max_tokens` is 0")
    assert FastVLMError("choose `dtype='float32'`, not `bits`").option == "dtype"
    assert FastVLMError("nothing of the kind").option is None
    assert FastVLMError("a file called '` `'").option is None


@pytest.mark.parametrize("name", fastvlm_mlx.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(fastvlm_mlx, name) is not None
    assert name in dir(fastvlm_mlx)


def test_singular_and_plural() -> None:
    assert [counted(count, "image") for count in (0, 1, 2, 5000)] == ["0 images", "1 image", "2 images", "5000 images"]
    assert [counted(count, "entry", "entries") for count in (1, 2)] == ["1 entry", "2 entries"]


def test_what_is_said_of_an_answer_that_was_cut() -> None:
    assert (
        note_of_a_cut(1, 1) == "Note: the answer was cut at its limit of 1 token; a larger `max_tokens` lets it go on."
    )
    assert note_of_a_cut(207, 1024) == "Note: the answer was cut after 207 tokens, where the model's context is full."


HOSTILE = "a\x1b[2J\x9b31m\u202e\x07 b\u00a0c\u3000\u202fd\n\t\u00e9\u5feb"


def test_what_a_model_says_never_steers_a_terminal() -> None:
    assert messages.printable(HOSTILE) == "a\ufffd[2J\ufffd31m\ufffd\ufffd b\u00a0c\u3000\u202fd\n\t\u00e9\u5feb"


@pytest.mark.parametrize("terminal", [True, False])
def test_raw_into_pipes(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Out:
        def isatty(self) -> bool:
            return terminal

    monkeypatch.setattr("sys.stdout", Out())
    assert messages.for_stdout(HOSTILE) == (messages.printable(HOSTILE) if terminal else HOSTILE)


class Terminal(StringIO):
    def isatty(self) -> bool:
        return True


def lines_shown(written: str) -> list[str]:
    """The lines of a terminal, each as it is after carriage returns and erasures."""
    shown = []
    for line in re.sub(r"\x1b\[\?25[lh]", "", written).split("\n"):
        cells: list[str] = []
        place = 0
        for token in re.findall(r"\r|\x1b\[K|.", line):
            if token == "\r":
                place = 0
            elif token == "\x1b[K":
                del cells[place:]
            else:
                cells[place : place + 1] = [token]
                place += 1
        shown.append("".join(cells).rstrip())
    return shown


def test_notes_stand_on_lines_of_their_own_beside_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    err = Terminal()
    monkeypatch.setattr("sys.stderr", err)
    with messages.bar("Converting") as drawn:
        messages.note("Layout: llava")
        drawn.update(500)
        messages.say("Note: one.")
        drawn.update(500)
    messages.say("Note: two.")
    shown = lines_shown(err.getvalue())
    assert shown[:2] == ["Layout: llava", "fastvlm-mlx: Note: one."] and shown[3:] == ["fastvlm-mlx: Note: two.", ""]
    assert shown[2].startswith("Converting") and "100%" in shown[2]


def test_notes_beside_the_bar_of_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    err = Terminal()
    monkeypatch.setattr("sys.stderr", err)
    monkeypatch.setattr(progress, "DELAY_SECONDS", 0)
    monkeypatch.setattr(progress, "REDRAW_SECONDS", 0)
    with progress.bar("Loading", 3) as track:
        for item in track(range(3)):
            if item:
                messages.say(f"Note: {item}.")
    messages.say("Note: 3.")
    assert [line for line in lines_shown(err.getvalue()) if line] == [f"fastvlm-mlx: Note: {i}." for i in (1, 2, 3)]
    assert err.getvalue().count("Loading [") == 3
