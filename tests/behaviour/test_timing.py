"""What has to be quick by the clock, and so is tried on an idle machine only: python -m pytest -m timing."""

from pathlib import Path

import pytest

from . import pictures
from .changes import pipe, text
from .forkserver import Run

pytestmark = pytest.mark.timing

SOON = 1.0  # seconds from a command, everything imported, to its end


@pytest.mark.parametrize("case", pictures.bombs())
def test_a_bomb_is_refused_soon(run: Run, model: Path, tmp_path: Path, case: str) -> None:
    (tmp_path / "bomb").write_bytes(pictures.bombs()[case])
    result = run("generate", "-m", model, "--image", tmp_path / "bomb", "--max-tokens", 1)
    assert result.seconds < 5 * SOON


def test_a_folder_that_would_block_is_refused_soon(run: Run, apple: Path) -> None:
    for change in (text("config.json", "[" * 100_000), pipe("config.json")):
        change(apple)
        result = run("generate", "-m", apple, "-p", "Hi", "--max-tokens", 1)
        result.refused("config.json")
        assert result.seconds < SOON


def test_help_comes_soon(run: Run) -> None:
    result = run("generate", "--help")
    assert result.code == 0 and result.seconds < SOON
