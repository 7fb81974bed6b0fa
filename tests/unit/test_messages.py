"""Messages of the library name Python's arguments; the command line puts its flags in their place."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import fastvlm_mlx
from fastvlm_mlx.cli import messages
from fastvlm_mlx.cli.app import COMMANDS, flags
from fastvlm_mlx.decoding.request import Options
from fastvlm_mlx.errors import FastVLMError, OptionError

PACKAGE = Path(fastvlm_mlx.__file__).parent
FLAG = re.compile(r"(?:^|[\s(])--[a-z]")


def texts(path: Path) -> Iterator[str]:
    """Every text of a file that is no docstring."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and node.body and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value


def test_the_library_speaks_of_no_flags() -> None:
    """But for whole commands that it tells people to run."""
    library = [path for path in PACKAGE.rglob("*.py") if "cli" not in path.relative_to(PACKAGE).parts]
    library += (PACKAGE / "convert").glob("*.py")
    assert len(library) > 90
    said = [(path.name, text) for path in library for text in texts(path) if FLAG.search(text) and "fastvlm-mlx " not in text]
    assert said == []


@pytest.mark.parametrize(
    ("command", "message", "expected"),
    [
        ("generate", "`max_tokens` is 0, expected 1.", "--max-tokens is 0, expected 1."),
        ("generate", "choose `dtype='bfloat16'` or `dtype='float32'`.", "choose --dtype bfloat16 or --dtype float32."),
        ("convert", "give another `out`, or `force=True` to replace it", "give another --out, or --force to replace it"),
        ("convert", "with `to='transformers'`, as `tokenizer`", "with --to transformers, as --tokenizer-path"),
        ("quantize", "`group_size` and `pictures`", "--group-size and --pictures"),
        ("quantize", "try `model='tiny'`; check `model`", "try tiny; check MODEL"),
        ("bench", "a folder of `pictures`, `size` is 3", "a folder of --pictures, --random is 3"),
        ("info", "with `bits=4` about 3 GB, `vision_from`", "with --bits 4 about 3 GB, --vision-from"),  # which it does not have
        ("download", "which takes `agree`; `sha256`", "which takes --yes; --sha256"),
        ("download", "check `model`, or try `model='tiny'`", "check NAME, or try tiny"),
        ("convert", "check `model`", "check FOLDER"),
        ("chat", "`stop_tokens` is 3; `stop_tokens=()`", "`stop_tokens` is 3; `stop_tokens=()`"),  # which no command has
        (
            "chat",
            "the files 'a`bits`c', /x/`model` and `seed`/y, (`bits`)",
            "the files 'a`bits`c', /x/`model` and `seed`/y, (--bits)",
        ),
    ],
)
def test_arguments_as_flags(command: str, message: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "_flags", lambda: flags(command))
    assert messages.with_flags(message) == expected


def test_a_message_is_said_also_where_flags_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> dict[str, str]:
        raise MemoryError

    monkeypatch.setattr(messages, "_flags", fails)
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
