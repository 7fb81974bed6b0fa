"""Shared by all tests: a small byte-level tokenizer in the published form, and small checkpoints of Apple's layout."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest

import fastvlm_mlx  # first, so that OpenBLAS is in place before MLX
from fastvlm_mlx import VLM
from fastvlm_mlx.hub import licence

from . import checkpoint, tokenizer

# A cache of the tests' own, inherited by every command they start, in which the notice about Apple's licence has been
# given.
CACHE = tempfile.TemporaryDirectory(prefix="fastvlm-tests-")
os.environ["FASTVLM_CACHE"] = CACHE.name
(Path(CACHE.name) / "notices").mkdir()
(Path(CACHE.name) / "notices" / licence.APPLE).touch()


ASKED_FOR = ("fuzz", "large", "timing")  # markers of tests that run only where `-m` names them


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what takes too long, or needs an idle machine, unless it is asked for."""
    left_out = [name for name in ASKED_FOR if name not in config.option.markexpr]
    deselected = [item for item in items if any(item.get_closest_marker(name) for name in left_out)]
    if deselected:
        config.hook.pytest_deselected(items=deselected)
        items[:] = [item for item in items if item not in set(deselected)]


@pytest.fixture(scope="session")
def tokenizer_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files of a small tokenizer that nobody changes."""
    return tokenizer.write(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def _apple(tmp_path_factory: pytest.TempPathFactory, tokenizer_files: Path) -> Path:
    return checkpoint.write(tmp_path_factory.mktemp("apple") / "checkpoint", tokenizer_files)


@pytest.fixture
def apple(_apple: Path, tmp_path: Path) -> Path:
    """A small random checkpoint in Apple's layout, the test's own to change."""
    return Path(shutil.copytree(_apple, tmp_path / "apple"))


@pytest.fixture(scope="session")
def small(_apple: Path) -> VLM:
    """That checkpoint, loaded in float32, so that tests compare exactly on every backend."""
    return fastvlm_mlx.load(str(_apple), dtype="float32")
