"""The forms of GELU, depthwise convolution and sums that small models take on a CPU, against the definitions."""

import math
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from fastvlm_mlx.backend import cpu
from fastvlm_mlx.backend import ops as backend
from fastvlm_mlx.backend.cpu import convolution
from fastvlm_mlx.backend.cpu import cores as cpu_cores


def slow_depthwise(x: np.ndarray, weight: np.ndarray, stride: int) -> np.ndarray:
    B, H, W, C = x.shape
    k = weight.shape[1]
    padded = np.pad(x, [(0, 0), (k // 2, k // 2), (k // 2, k // 2), (0, 0)])
    y = np.zeros((B, -(-H // stride), -(-W // stride), C))
    for i in range(y.shape[1]):
        for j in range(y.shape[2]):
            window = padded[:, i * stride : i * stride + k, j * stride : j * stride + k]
            y[:, i, j] = np.einsum("bhwc,chw->bc", window, weight[..., 0])
    return y


@pytest.mark.parametrize("kernel", [3, 7])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 4), (2, 3, 5, 3), (1, 16, 16, 8), (1, 9, 40, 2), (1, 33, 17, 5), (3, 2, 64, 1)]
)
def test_depthwise(shape: tuple[int, ...], kernel: int, stride: int) -> None:
    check_depthwise(shape, kernel, stride)


@pytest.mark.parametrize("kernel", [3, 7])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("shape", [(1, 16, 16, 8), (2, 9, 40, 2), (1, 33, 17, 5), (1, 7, 1, 3), (1, 8, 2, 3)])
@pytest.mark.parametrize("rows", [1, 3])
def test_depthwise_in_strips(
    shape: tuple[int, ...], kernel: int, stride: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convolution, "strip_rows", lambda *_: rows)
    check_depthwise(shape, kernel, stride)


def check_depthwise(shape: tuple[int, ...], kernel: int, stride: int) -> None:
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=shape), rng.normal(size=(shape[-1], kernel, kernel, 1))
    ours = cpu.depthwise(mx.array(x.astype(np.float32)), mx.array(weight.astype(np.float32)), stride)
    expected = slow_depthwise(x, weight, stride)
    assert ours.shape == expected.shape
    assert np.abs(np.array(ours) - expected).max() < 1e-5 * max(1, np.abs(expected).max())


def test_gelu() -> None:
    x = np.concatenate([np.linspace(-12, 12, 20001), [0.0, 1e-30, -1e-30, 1e4, -1e4, 1e30, -1e30]]).astype(np.float32)
    expected = np.array([0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in x.astype(float)])
    assert (np.abs(np.array(cpu.gelu(mx.array(x))) - expected) <= 2e-7 * np.maximum(1, np.abs(x))).all()


def test_gelu_passes_on_what_is_not_a_number() -> None:
    y = np.array(cpu.gelu(mx.array([float("nan"), float("inf")])))
    assert np.isnan(y[0]) and np.isposinf(y[1])


@pytest.mark.parametrize("shape", [(1,), (3, 5), (2, 70, 3000), (0,), (3, 0)])
def test_gelu_of_every_size(shape: tuple[int, ...]) -> None:
    """Of one piece and of several; of arrays that are parts of others."""
    x = mx.split(mx.random.normal((*shape[:-1], 2 * shape[-1])), 2, axis=-1)[1]
    assert cpu.gelu(x).shape == x.shape
    assert np.allclose(cpu.gelu(x), nn.gelu(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("cores", [1, 2, 5])
def test_work_reaches_every_piece_and_errors_come_back(cores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_cores, "count", lambda: cores)
    pool = ThreadPoolExecutor(cores)
    monkeypatch.setattr(cpu_cores, "pool", lambda: pool)
    done: list[int] = []
    cpu_cores.share_out(done.append, range(20))
    assert sorted(done) == list(range(20))

    def fails(piece: int) -> None:
        done.append(1 // piece)

    with pytest.raises(ZeroDivisionError):
        cpu_cores.share_out(fails, [1, 0, 2])


def test_depthwise_in_another_thread() -> None:
    """MLX's streams belong to the thread that made them."""
    x, weight = mx.random.normal((1, 40, 40, 32)), mx.random.normal((32, 7, 7, 1))
    mx.eval(x, weight)
    here = np.array(cpu.depthwise(x, weight, 1))
    with ThreadPoolExecutor(1) as other:
        there = other.submit(lambda: np.array(cpu.depthwise(x, weight, 1))).result()
    assert (here == there).all()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["cpu", "metal"])
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_totals(dtype: mx.Dtype, name: backend.Backend) -> None:
    arrays = [
        mx.array([[1.5, -0.5], [2.0, 4.0]], dtype).T, mx.zeros((0,), dtype), mx.array(3, dtype),
        mx.array([1.0, math.nan], dtype), mx.array([math.inf, -math.inf], dtype),
    ]  # fmt: skip
    with backend.forms_of(name):
        *finite, nan, both = backend.totals(arrays)
    assert finite == [7, 0, 3] and math.isnan(nan) and math.isnan(both)
