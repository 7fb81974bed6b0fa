"""How the tests are written: each file can be read alone, and tests reach the package through its public names only."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "tests").rglob("*.py"))
OURS = ("fastvlm_mlx", "benchmarks", "training", "convert", "tests")
PROTOCOLS = {  # names that others have given a meaning to
    "_repr_html_", "_repr_markdown_", "_ipython_display_",  # Jupyter
    "_exit", "_replace", "_fields",  # os, named tuples
}  # fmt: skip


CLOCKS = ("time.monotonic", "time.perf_counter", "time.time", "result.seconds", "self.seconds")


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in PROTOCOLS


def imports_of_tests(tree: ast.Module) -> Iterator[str]:
    """The test files that a file imports from, as `import` writes them."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names if node.level)]
        elif isinstance(node, ast.Import):
            names = [part for alias in node.names for part in alias.name.split(".")]
        else:
            continue
        ours = isinstance(node, ast.ImportFrom) and (node.level > 0 or names[0] in OURS)
        yield from (name for name in names if ours and name.startswith("test_"))


def clocks_in_asserts(tree: ast.Module) -> Iterator[str]:
    """What asserts read of a clock."""
    for statement in ast.walk(tree):
        if isinstance(statement, ast.Assert):
            for node in ast.walk(statement):
                if isinstance(node, ast.Attribute) and ast.unparse(node) in CLOCKS:
                    yield ast.unparse(node)


def private_names(tree: ast.Module) -> Iterator[str]:
    """Private names of ours that a file imports, reads through a module or an object, or replaces with monkeypatch."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            ours = node.level > 0 or (node.module or "").split(".")[0] in OURS
            yield from (alias.name for alias in node.names if ours and is_private(alias.name))
        elif isinstance(node, ast.Attribute) and is_private(node.attr):
            if not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")):
                yield node.attr
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "setattr":
            texts = [each.value for each in node.args[:2] if isinstance(each, ast.Constant)]
            yield from (text for text in texts if isinstance(text, str) and is_private(text.split(".")[-1]))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT / "tests")))
def test_a_file_imports_no_test_file_and_no_private_name(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert not list(imports_of_tests(tree)), "what two test files need goes into a module of its own"
    assert not list(private_names(tree)), "test what is public, or make public what a test needs"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT / "tests")))
def test_only_tests_marked_timing_assert_seconds(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert "mark.timing" in text or not list(clocks_in_asserts(ast.parse(text)))


def test_the_list_of_modules_is_complete() -> None:
    """tests/README.md names every module that tests build on."""
    listed = (ROOT / "tests" / "README.md").read_text(encoding="utf-8")
    shared = {path.name for path in FILES if not path.name.startswith(("test_", "__init__"))}
    assert not {name for name in shared if f"{name}`" not in listed}


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("from .test_chat import ask", ["test_chat"]),
        ("from . import test_chat", ["test_chat"]),
        ("from tests.unit.test_rooms import ROOMS", ["test_rooms"]),
        ("from fastvlm_mlx.decoding.generate import _decode", ["_decode"]),
        ("transfer._check(url)", ["_check"]),
        ('monkeypatch.setattr(licence, "_said", False)', ["_said"]),
        ('monkeypatch.setattr("fastvlm_mlx.hub.licence._said", False)', ["fastvlm_mlx.hub.licence._said"]),
        ("assert time.monotonic() - began < 5", ["time.monotonic"]),
        ("from .checkpoint import write", []),
        ("answer._repr_html_()", []),
        ("self._count += 1", []),
    ],
)
def test_what_is_found(line: str, found: list[str]) -> None:
    tree = ast.parse(line)
    assert [*imports_of_tests(tree), *private_names(tree), *clocks_in_asserts(tree)] == found
