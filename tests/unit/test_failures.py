"""What MLX raises where a device fails: recognised by its message, and said in one sentence."""

import pytest

from fastvlm_mlx.backend import failures
from fastvlm_mlx.errors import DeviceError, FastVLMError, OutOfMemoryError

OUT_OF_MEMORY = [
    "[metal::malloc] Attempting to allocate 99999 bytes which is greater than the maximum allowed buffer size of "
    "9999 bytes.",
    "[metal::malloc] Resource limit (499000) exceeded.",
    "[malloc] Unable to allocate 99999 bytes.",
    "[METAL] Command buffer execution failed: "
    "Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory).",
    "cudaMallocAsync(&data, size, stream) failed: out of memory",
    "std::bad_alloc",
]
FAILED = [
    "[METAL] Command buffer execution failed: "
    "Caused GPU Timeout Error (00000002:kIOGPUCommandBufferCallbackErrorTimeout).",
    "[metal::Device] Unable to construct residency set.",
    "[Event::stream] Cannot access stream on invalid event.",
    "cudaGraphLaunch(graph, stream) failed: an illegal memory access was encountered",
]
A_FAULT = ["There is no Stream(cpu, 1) in current thread.", "[matmul] Last dimension of first input has to match.", ""]


@pytest.mark.parametrize("message", OUT_OF_MEMORY)
def test_memory_that_ran_out(message: str) -> None:
    meant = failures.explained(RuntimeError(message))
    assert isinstance(meant, OutOfMemoryError) and isinstance(meant, MemoryError)
    assert str(meant) == failures.NOT_ENOUGH_MEMORY and meant.option == "bits"


@pytest.mark.parametrize("message", FAILED)
def test_a_device_that_failed(message: str) -> None:
    meant = failures.explained(RuntimeError(message))
    assert type(meant) is DeviceError and message[:40] in str(meant)


@pytest.mark.parametrize("message", A_FAULT)
def test_a_fault_in_the_program_stays_what_it_is(message: str) -> None:
    assert failures.explained(RuntimeError(message)) is None
    with pytest.raises(RuntimeError) as raised, failures.explaining():
        raise RuntimeError(message)
    assert type(raised.value) is RuntimeError


def test_what_python_raises() -> None:
    assert isinstance(failures.explained(MemoryError()), OutOfMemoryError)
    assert failures.explained(OutOfMemoryError("our own, in other words")) is None
    assert failures.explained(NotImplementedError("[METAL] a subclass of RuntimeError is not MLX's")) is None
    assert failures.explained(ValueError("[malloc] Unable to allocate 9 bytes.")) is None


def test_explaining_raises_what_is_meant() -> None:
    with pytest.raises(FastVLMError, match="not enough memory") as raised, failures.explaining():
        raise RuntimeError(OUT_OF_MEMORY[0])
    assert str(raised.value.__cause__) == OUT_OF_MEMORY[0]
    with pytest.raises(FastVLMError, match="their own words"), failures.explaining():
        raise OutOfMemoryError("their own words")
    with failures.explaining():
        pass


def test_what_ends_a_command() -> None:
    shapes = failures.of_mlx(ValueError("[matmul] Last dimension of first input with shape (2,3) must match"))
    assert (
        shapes is not None
        and shapes.startswith("MLX failed (")
        and "[matmul] Last" in shapes
        and "newest mlx" in shapes
    )
    assert failures.of_mlx(RuntimeError("There is no Stream(gpu, 1) in current thread.")) is not None
    for ours in (ValueError("[1, 2] is odd"), RuntimeError("nothing"), KeyError("[METAL] x"), TypeError("[a] b")):
        assert failures.of_mlx(ours) is None
