"""Which backend's forms are taken: those of the default device, or those that a block of one thread asks for."""

from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import pytest

from fastvlm_mlx.backend import ops


def test_the_default_device_decides_when_an_operation_is_called() -> None:
    with mx.stream(mx.cpu):
        assert ops.current() == "cpu"


def test_a_block_takes_another_backends_forms_in_its_thread_alone() -> None:
    with mx.stream(mx.cpu), ops.forms_of("metal"):
        assert ops.current() == "metal"
        with ops.forms_of("cuda"), ops.general_forms():
            assert ops.current() == "cuda"
        assert ops.current() == "metal"
        with ThreadPoolExecutor(1) as other:
            assert other.submit(ops.current).result() == ("cpu" if not mx.metal.is_available() else "metal")


def test_the_block_ends_where_it_raises() -> None:
    before = ops.current()
    with pytest.raises(ZeroDivisionError), ops.forms_of("metal"):
        raise ZeroDivisionError
    assert ops.current() == before


@pytest.mark.parametrize("backend", ["cpu", "metal", "cuda"])
def test_a_narrow_head_is_padded_for_metal_alone(backend: ops.Backend) -> None:
    """By the graph that is built: a head of 32 is filled up to what Metal's fused attention takes."""
    qkv = mx.zeros((1, 6, 5, 32))
    found: list[str] = []
    with ops.forms_of(backend), ops.general_forms():
        mx.export_function(lambda step: found.append(step.get("name", "")), ops.attention, qkv)
    assert ("Pad" in found) == (backend == "metal")


@pytest.mark.parametrize("backend", ["cpu", "metal"])
@pytest.mark.parametrize("shape", [(14,), (1, 14), (1, 1, 14), (3, 14), (2, 5, 14)])
def test_swiglu_of_halves(shape: tuple[int, ...], backend: ops.Backend) -> None:
    x = mx.random.normal(shape)
    gate, up = mx.split(x, 2, axis=-1)
    with ops.forms_of(backend):
        y = ops.swiglu(x)
    assert y.shape == gate.shape
    assert mx.abs(y - gate * mx.sigmoid(gate) * up).max() < 1e-6


def test_swiglu_far_from_zero() -> None:
    gate = mx.array([-1e30, -200.0, -88.0, 0.0, 88.0, 200.0, 1e30])
    y = ops.swiglu(mx.concatenate([gate, mx.ones(7)]))
    assert mx.allclose(y, mx.array([0, 0, 0, 0, 88.0, 200.0, 1e30]), atol=1e-6)
