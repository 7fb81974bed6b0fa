"""A limit on this process's addresses: a clear end where there is no room, and an answer where there is."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from fastvlm_mlx.backend import address_space

OURS = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="limits of the address space are Linux's"),
]


def test_libraries_that_find_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    error = ImportError("libjpeg.so.62: failed to map segment from shared object")
    monkeypatch.setattr(address_space, "limit", lambda: 1 << 28)
    assert "ulimit -v" in str(address_space.explained(error))
    assert address_space.explained(ImportError("no module")) is None
    monkeypatch.setattr(address_space, "limit", lambda: None)
    assert address_space.explained(error) is None


@pytest.mark.parametrize("megabytes", [100, 250, 400, 600, 800, 1000, 64_000])
def test_a_clear_end(megabytes: int) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fastvlm_mlx", "generate", "-m", "tiny", "-p", "Hi", "--max-tokens", "2"],
        capture_output=True, check=False, cwd=OURS, timeout=60, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (megabytes << 20,) * 2),
    )  # fmt: skip
    assert done.returncode in ((0,) if megabytes == 64_000 else (0, 1) if megabytes == 1000 else (1,)), done
    if done.returncode:
        assert done.stdout == "" and "ulimit -v" in done.stderr and done.stderr.count("\n") == 1, done
