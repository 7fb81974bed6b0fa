"""Shared by the tests of exports."""

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """PyTorch on one thread: for networks as small as `tiny`, threads wait for each other longer than they compute."""
    torch = pytest.importorskip("torch", reason="interpreters compute by PyTorch")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
