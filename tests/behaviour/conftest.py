"""Shared by the tests of hostile input: the command line in forked children, and inputs in order to change."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastvlm_mlx.convert import convert
from fastvlm_mlx.decoding.engine import Engine

from ..layouts import WRITERS
from .forkserver import ForkServer, Run


@pytest.fixture(scope="session")
def run() -> Iterator[Run]:
    """`run(*arguments, stdin=b"", env={}, cwd=folder)` is `fastvlm-mlx ARGUMENTS`."""
    server = ForkServer()
    yield server.run
    server.stop()


@pytest.fixture(scope="session")
def model(_apple: Path) -> Path:
    """A small model nobody changes."""
    return _apple


@pytest.fixture(scope="session")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture in order."""
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (80, 60, 3), dtype=np.uint8)).save(path)
    return path


@pytest.fixture(scope="session")
def _ours(_apple: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ours") / "model"
    convert(_apple, out)
    return out


@pytest.fixture
def ours(_ours: Path, tmp_path: Path) -> Path:
    """A converted folder, the test's own to change."""
    return Path(shutil.copytree(_ours, tmp_path / "ours"))


@pytest.fixture(scope="session")
def _folders(_apple: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of each layout; without an index, so that it does not notice the tests' own changes to the weights."""
    root = tmp_path_factory.mktemp("layouts")
    folders = {name: write(_apple, root / name.replace(" ", "-")) for name, write in WRITERS.items()}
    for folder in folders.values():
        (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    return folders


@pytest.fixture(scope="session")
def tiny() -> Engine:
    """The built-in model, for servers in this process."""
    engine = Engine.open("tiny")
    engine.load_weights()
    return engine


@pytest.fixture(scope="session")
def served(tiny: Engine) -> Iterator[Any]:
    """A server of the built-in model, for tests that leave it as it was."""
    pytest.importorskip("uvicorn", reason="the extra serve is not installed")
    from tests.serving import server

    with server(tiny, metrics=True) as found:
        yield found
