"""Every import of a package, read from its syntax trees: those inside functions, those of names loaded on demand, and
those for type checkers only.

A room is a folder of the package, or a module beside the folders. The end of a room's `__init__` says which rooms it
may import; a module beside the folders is given its own line by whoever checks.
"""

import ast
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

MAY_IMPORT = "May import: "


@dataclass(frozen=True, order=True)
class Edge:
    """Module `source` imports module `target`, both dotted from inside the package ("" is the package itself).

    `kind` is "plain", "lazy" (inside a function), "table" (a name that `import_module` is given) or "typing".
    """

    source: str
    target: str
    line: int
    kind: str

    def __str__(self) -> str:
        return f"{self.source or '__init__'}:{self.line} -> {self.target or '__init__'} ({self.kind})"


def modules(package: Path) -> dict[str, Path]:
    """Every module of a package by its dotted name; the package's own `__init__` is ""."""
    found = {}
    for path in sorted(_walk(package)):
        parts = path.relative_to(package).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def _walk(folder: Path) -> Iterator[Path]:
    """The *.py of a folder and of those below it, links among them."""
    for path in folder.iterdir():
        if path.is_dir():
            yield from _walk(path)
        elif path.suffix == ".py":
            yield path


def edges(package: Path) -> list[Edge]:
    """Every import of one module of the package by another."""
    every = modules(package)
    found: set[Edge] = set()
    for name, path in every.items():
        found |= set(_Reader(package.name, name, path.name == "__init__.py", every).read(path))
    return sorted(edge for edge in found if edge.source != edge.target)


class _Reader(ast.NodeVisitor):
    """Collects the edges of one module."""

    def __init__(self, package: str, name: str, is_package: bool, every: Iterable[str]):
        self._package, self._name, self._every = package, name, set(every)
        self._home = name.split(".") if is_package else name.split(".")[:-1]
        self._home = [part for part in self._home if part]
        self._edges: list[Edge] = []
        self._within: list[str] = ["plain"]
        self._strings: list[tuple[str, int]] = []
        self._on_demand = False

    def read(self, path: Path) -> list[Edge]:
        self.visit(ast.parse(path.read_text(encoding="utf-8")))
        if self._on_demand:
            for text, line in self._strings:
                target = text.removeprefix(f"{self._package}.")
                inside = ".".join([*self._home, target])
                if target and (target in self._every or inside in self._every):
                    self._edges.append(Edge(self._name, inside if inside in self._every else target, line, "table"))
        return self._edges

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self._visit_within("lazy", node)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
        self._visit_within("lazy", node)

    def visit_If(self, node: ast.If) -> None:
        if ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for child in node.body:
                self._visit_within("typing", child)
            for child in node.orelse:
                self.visit(child)
        else:
            self.generic_visit(node)

    def _visit_within(self, kind: str, node: ast.AST) -> None:
        self._within.append(kind if self._within[-1] != "typing" else "typing")
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            self.generic_visit(node)
        else:
            self.visit(node)
        self._within.pop()

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            if alias.name == self._package or alias.name.startswith(f"{self._package}."):
                self._add(alias.name[len(self._package) + 1 :], node.lineno)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if node.level:
            base = self._home[: len(self._home) - (node.level - 1)]
            module = ".".join([*base, *(node.module.split(".") if node.module else [])])
        elif node.module == self._package or (node.module or "").startswith(f"{self._package}."):
            module = (node.module or "")[len(self._package) + 1 :]
        else:
            return
        for alias in node.names:
            inside = f"{module}.{alias.name}" if module else alias.name
            self._add(inside if inside in self._every else module, node.lineno)

    def visit_Call(self, node: ast.Call) -> None:
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        self._on_demand |= called == "import_module"
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, str):
            self._strings.append((node.value, node.lineno))

    def _add(self, target: str, line: int) -> None:
        self._edges.append(Edge(self._name, target, line, self._within[-1]))


def room(module: str) -> str:
    """The room a module is in: its folder, or itself where it lies beside the folders."""
    return module.split(".")[0]


def allowed(package: Path, beside: Mapping[str, Iterable[str]]) -> dict[str, set[str]]:
    """What each room may import: by the end of its `__init__`, or by `beside` for modules beside the folders."""
    found = {name: set(rooms) for name, rooms in beside.items()}
    for name, path in modules(package).items():
        if path.name == "__init__.py" and name and "." not in name:
            text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            _, said, rooms = text.partition(MAY_IMPORT)
            if not said:
                raise AssertionError(
                    f"{name}/__init__ says {text!r}, expected at its end '{MAY_IMPORT}' and the rooms below it"
                )
            found[name] = {each.strip() for each in rooms.rstrip(".").split(",")} - {"nothing"}
    return found


def forbidden(found: Iterable[Edge], may: Mapping[str, set[str]]) -> list[str]:
    """The imports that leave a room for one it may not import, and rooms nobody has said anything of."""
    wrong = []
    for edge in found:
        source, target = room(edge.source), room(edge.target)
        if source not in may or target not in may:
            wrong.append(f"{edge}: {source if source not in may else target} is no room")
        elif source != target and target not in may[source]:
            wrong.append(f"{edge}: {source} may not import {target}")
    return wrong


def circles(arrows: Iterable[tuple[str, str]]) -> list[list[str]]:
    """The groups of two or more names that lead to each other (Tarjan's strongly connected components)."""
    following: dict[str, list[str]] = {}
    for source, target in arrows:
        following.setdefault(source, []).append(target)
        following.setdefault(target, [])
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    groups: list[list[str]] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in following[name]:
            if other not in index:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], index[other])
        if low[name] == index[name]:
            group = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(group) > 1:
                groups.append(sorted(group))

    for name in list(following):
        if name not in index:
            visit(name)
    return sorted(groups)
