"""What MLX and the system say when they fail, as sentences with what to do; and room to answer under a limit."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from fastvlm_mlx.backend import failure
from fastvlm_mlx.backend.failure import MEMORY, explained

OURS = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("std::bad_alloc"),
        RuntimeError("[metal::malloc] Attempting to allocate 9 bytes which is greater than the maximum allowed buffer size of 8"),
        RuntimeError(
            "[METAL] Command buffer execution failed: Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)"
        ),
        RuntimeError("[malloc] Unable to allocate 1099511627776 bytes."),
        ValueError("[malloc_or_wait] Unable to allocate 5 bytes."),
        RuntimeError("CUDA error: out of memory"),
    ],
)
def test_memory(error: BaseException) -> None:
    assert explained(error) == MEMORY


def test_other_errors_of_mlx() -> None:
    gpu = explained(RuntimeError("[METAL] Command buffer execution failed: Caused GPU Timeout Error (00000002)"))
    assert gpu is not None and "GPU Timeout" in gpu and "memory" in gpu and "try again" in gpu
    shapes = explained(ValueError("[matmul] Last dimension of first input with shape (2,3) must match"))
    assert shapes is not None and shapes.startswith("MLX failed ([matmul] Last") and "newest mlx" in shapes
    stream = explained(RuntimeError("There is no Stream(gpu, 1) in current thread."))
    assert stream is not None and stream.startswith("MLX failed")


@pytest.mark.parametrize("error", [ValueError("[1, 2] is odd"), RuntimeError("nothing"), KeyError("[METAL]"), TypeError("[a] b")])
def test_errors_of_our_own(error: BaseException) -> None:
    assert explained(error) is None


def test_libraries_that_find_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    error = ImportError("libjpeg.so.62: failed to map segment from shared object")
    monkeypatch.setattr(failure, "_is_limited", lambda: True)
    assert "ulimit -v" in str(explained(error)) and explained(ImportError("no module")) is None
    monkeypatch.setattr(failure, "_is_limited", lambda: False)
    assert explained(error) is None


@pytest.mark.skipif(sys.platform != "linux", reason="limits of the address space are Linux's")
@pytest.mark.parametrize("megabytes", [100, 250, 400, 600, 800, 1000, 64_000])
def test_a_clear_end_under_a_memory_limit(megabytes: int) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fastvlm_mlx", "generate", "-m", "tiny", "-p", "Hi", "--max-tokens", "2"],
        capture_output=True, check=False, cwd=OURS, timeout=60, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (megabytes << 20,) * 2),
    )  # fmt: skip
    assert done.returncode in ((0,) if megabytes == 64_000 else (0, 1) if megabytes == 1000 else (1,)), done
    if done.returncode:
        assert done.stdout == "" and "ulimit -v" in done.stderr and done.stderr.count("\n") == 1, done
