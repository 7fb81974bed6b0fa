"""Shared by the tests of hostile input: the command line in forked children, and inputs in order to change."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from .forkserver import ForkServer, Result

Run = Callable[..., Result]


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
