"""Names: no local shadows an imported name, and every docstring can be read alone, as `help()` shows it."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = ("fastvlm_mlx", "convert", "benchmarks", "training", "examples")
FILES = sorted(
    path
    for folder in FOLDERS
    for path in (ROOT / folder).rglob("*.py")
    if not path.is_relative_to(ROOT / "fastvlm_mlx" / "convert")  # a link to convert/
)
LEANS_ON_ANOTHER = re.compile(r"(The same|That|For people|From now on|As above|Likewise|Ditto)\b")
Function = ast.FunctionDef | ast.AsyncFunctionDef
Scope = Function | ast.Lambda | ast.ClassDef


def parsed(path: Path) -> ast.Module:
    """A file of the repository as a syntax tree."""
    return ast.parse(path.read_text(encoding="utf-8"))


def within(scope: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a scope, those of functions and classes inside it left out."""
    for child in ast.iter_child_nodes(scope):
        yield child
        if not isinstance(child, Scope):
            yield from within(child)


def imported(scope: ast.AST) -> set[str]:
    """The names that a scope imports itself."""
    statements = [node for node in within(scope) if isinstance(node, (ast.Import, ast.ImportFrom))]
    return {(alias.asname or alias.name).partition(".")[0] for node in statements for alias in node.names}


def bound(scope: Scope) -> Iterator[tuple[str, int]]:
    """(name, line) of what a scope binds otherwise than by an import: parameters, and what is assigned to."""
    if isinstance(scope, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
        given = scope.args
        extra = [each for each in (given.vararg, given.kwarg) if each is not None]
        yield from ((each.arg, each.lineno) for each in (*given.posonlyargs, *given.args, *given.kwonlyargs, *extra))
    if isinstance(scope, ast.ClassDef):  # an attribute is reached through its class
        return
    for node in within(scope):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node.lineno
        elif isinstance(node, (ast.ExceptHandler, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and node.name:
            yield node.name, node.lineno


def shadowing(scope: ast.AST, around: frozenset[str]) -> Iterator[str]:
    """The "line: name" of everything that hides a name imported by its module or by a function around it."""
    names = around | imported(scope)
    for node in within(scope):
        if isinstance(node, Scope):
            inside = names | imported(node)
            yield from (f"{line}: {name}" for name, line in bound(node) if name in inside)
            yield from shadowing(node, names)


def test_shadows_are_found() -> None:
    source = "import re\ndef f(x):\n    import os\n    re = 1\n    def g(os): pass\n    class C:\n        re = 2\n"
    assert list(shadowing(ast.parse(source), frozenset())) == ["4: re", "5: os"]


def test_no_local_shadows_an_imported_name() -> None:
    found = {str(path.relative_to(ROOT)): list(shadowing(parsed(path), frozenset())) for path in FILES}
    assert {path: names for path, names in found.items() if names} == {}


def test_docstrings_can_be_read_alone() -> None:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = [
        ast.get_docstring(node) for path in FILES for node in ast.walk(parsed(path)) if isinstance(node, documented)
    ]
    assert [text for text in texts if text and LEANS_ON_ANOTHER.match(text)] == []
