"""The house: every import points down, none goes in a circle, and each room says what it may import."""

from pathlib import Path

import pytest

import fastvlm_mlx
from tests import imports
from tests.imports import Edge

PACKAGE = Path(fastvlm_mlx.__file__).parent

# The modules beside the rooms, and what they may import.
BESIDE = {
    "version": (),
    "errors": (),
    "progress": (),
    "config": ("errors",),
    "vlm": ("errors", "config", "quantize", "inputs", "network", "storage", "decoding", "chat"),
    "": ("version", "errors", "backend", "storage", "decoding", "export", "finetune", "vlm"),
    "__main__": ("cli",),
}


@pytest.fixture(scope="module")
def edges() -> list[Edge]:
    return imports.edges(PACKAGE)


def run_time(edges: list[Edge]) -> list[Edge]:
    return [edge for edge in edges if edge.kind != "typing"]


@pytest.mark.slow
def test_every_import_is_one_its_room_may_make(edges: list[Edge]) -> None:
    assert imports.forbidden(run_time(edges), imports.allowed(PACKAGE, BESIDE)) == []


def test_what_rooms_may_import_lies_below_them() -> None:
    may = imports.allowed(PACKAGE, BESIDE)
    assert imports.circles((room, below) for room, rooms in may.items() for below in rooms) == []
    assert not {below for rooms in may.values() for below in rooms} - may.keys()


def test_rooms_ask_for_no_more_than_they_use(edges: list[Edge]) -> None:
    used = {(imports.room(edge.source), imports.room(edge.target)) for edge in edges}
    may = imports.allowed(PACKAGE, BESIDE)
    assert {(room, below) for room, rooms in may.items() for below in rooms} <= used


def test_no_module_leads_back_to_itself(edges: list[Edge]) -> None:
    assert imports.circles((edge.source, edge.target) for edge in run_time(edges)) == []


def test_types_are_imported_from_below_as_well(edges: list[Edge]) -> None:
    """Reported apart: what only a type checker reads."""
    typing = [edge for edge in edges if edge.kind == "typing"]
    assert imports.forbidden(typing, imports.allowed(PACKAGE, BESIDE)) == []


def test_all_of_the_package_is_read(edges: list[Edge]) -> None:
    """Inside functions and `if TYPE_CHECKING`, through tables of names, and `convert`, which is a link, once."""
    assert {edge.kind for edge in edges} == {"plain", "lazy", "table", "typing"}
    assert Edge("", "vlm", 0, "table") in [Edge(e.source, e.target, 0, e.kind) for e in edges]
    assert {"cli.generate", "cli.bench"} <= {edge.target for edge in edges if edge.source == "cli.app"}
    assert "convert.pipeline" in imports.modules(PACKAGE)
    assert sum(path.name == "pipeline.py" for path in imports.modules(PACKAGE).values()) == 2  # and calibrate's


def test_commands_do_not_import_each_other(edges: list[Edge]) -> None:
    commands = {edge.target for edge in edges if edge.source == "cli.app" and edge.kind == "table"}
    assert len(commands) >= 7
    assert [str(edge) for edge in edges if edge.source in commands and edge.target in commands] == []


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """A package of two rooms, in which `upper` imports `lower`."""
    files = {
        "__init__.py": "",
        "lower/__init__.py": '"""Lower.\n\nMay import: nothing.\n"""\n',
        "lower/stone.py": "import json\n",
        "upper/__init__.py": '"""Upper.\n\nMay import: lower.\n"""\n',
        "upper/beam.py": "from ..lower import stone\n",
    }
    for name, text in files.items():
        (tmp_path / "house" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "house" / name).write_text(text)
    return tmp_path / "house"


UP = {
    "plain": "from ..upper import beam\n",
    "lazy": "def build():\n    from ..upper.beam import stone\n",
    "method": "class Stone:\n    async def build(self):\n        if self:\n            import house.upper.beam\n",
    "else": "from typing import TYPE_CHECKING\nif not TYPE_CHECKING:\n    from ..upper import beam\n",
    "table": "from importlib import import_module\nHOMES = {'Beam': 'upper.beam'}\n"
    "import_module('house.' + HOMES['Beam'])\n",
    "typing": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..upper import beam\n",
}


@pytest.mark.parametrize("name", UP)
def test_an_arrow_that_points_up_is_found(house: Path, name: str) -> None:
    may = imports.allowed(house, {"": ()})
    assert imports.forbidden(imports.edges(house), may) == []
    (house / "lower" / "stone.py").write_text(UP[name])
    found = imports.edges(house)
    (wrong,) = imports.forbidden(found, may)
    assert "lower may not import upper" in wrong and "lower.stone" in wrong
    assert {edge.kind for edge in found} == {"plain", {"method": "lazy", "else": "plain"}.get(name, name)}
    circle = imports.circles((edge.source, edge.target) for edge in run_time(found))
    assert circle == ([] if name == "typing" else [["lower.stone", "upper.beam"]])


def test_a_room_that_does_not_say_what_it_may_import(house: Path) -> None:
    (house / "lower" / "__init__.py").write_text('"""Lower."""\n')
    with pytest.raises(AssertionError, match="lower/__init__"):
        imports.allowed(house, {})


def test_a_module_beside_the_rooms_has_to_be_known(house: Path) -> None:
    (house / "loft.py").write_text("from .lower import stone\n")
    assert imports.forbidden(imports.edges(house), imports.allowed(house, {"": ()})) == [
        "loft:1 -> lower.stone (plain): loft is no room"
    ]
