"""The CPU's own forms of activations, attention, depthwise convolution and one-row products against the definitions."""

import math
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from fastvlm_mlx.backend import blas, cpu
from fastvlm_mlx.backend import ops as backend
from fastvlm_mlx.backend.cpu import activations, convolution
from fastvlm_mlx.backend.cpu import cores as cpu_cores
from fastvlm_mlx.backend.linear import Linear


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
def test_activations_of_every_size(shape: tuple[int, ...]) -> None:
    """Of one piece and of several; of arrays that are parts of others."""
    mx.random.seed(0)
    x, up = mx.random.normal(shape), mx.random.normal(shape)
    both = mx.split(mx.concatenate([x, up], axis=-1), 2, axis=-1)
    for ours, expected in (
        (cpu.gelu(x), nn.gelu(x)),
        (cpu.swiglu(x, up), x * mx.sigmoid(x) * up),
        (cpu.swiglu(*both), x * mx.sigmoid(x) * up),
    ):
        assert ours.shape == expected.shape
        assert np.allclose(ours, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("little", [1, 100])
def test_swiglu_far_from_zero(little: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "LITTLE", little)
    gate = mx.array([-1e30, -200.0, -88.0, 0.0, 88.0, 200.0, 1e30])
    assert mx.allclose(backend.swiglu(gate, mx.ones(7)), mx.array([0, 0, 0, 0, 88.0, 200.0, 1e30]), atol=1e-6)


def test_feed_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some rows at a time, and the input stays as it was."""
    monkeypatch.setattr(activations, "HIDDEN", 1)
    monkeypatch.setattr(activations, "MIN_ROWS", 7)
    fc1, fc2 = Linear(6, 24), Linear(24, 6)
    for layer in (fc1, fc2):
        layer.weight, layer.bias = mx.random.normal(layer.weight.shape), mx.random.normal(layer.bias.shape)
    x = mx.random.normal((30, 6))
    before = np.array(x)
    assert mx.abs(cpu.feed_forward(x, fc1, fc2) - fc2(nn.gelu(fc1(x)))).max() < 2e-5
    assert (np.array(x) == before).all()


@pytest.mark.parametrize("scores", [1, 50, 1 << 22])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "L", "K"), [(4, 4, 9, 9), (6, 2, 5, 11), (3, 1, 2, 2), (2, 1, 1, 7)])
def test_attention(
    heads: int, kv_heads: int, L: int, K: int, causal: bool, scores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All scores at once, a strip of them, and row by row."""
    monkeypatch.setattr("fastvlm_mlx.backend.cpu.softmax.SCORES", scores)
    q, k, v = (mx.random.normal((2, h, n, 8)) for h, n in ((heads, L), (kv_heads, K), (kv_heads, K)))
    ours = cpu.attention(q, k, v, 0.35, causal=causal)
    expected = mx.fast.scaled_dot_product_attention(q, k, v, scale=0.35, mask="causal" if causal else None)
    assert ours.shape == expected.shape
    assert mx.abs(ours - expected).max() < 1e-5


def test_attention_of_large_scores() -> None:
    q = mx.full((1, 1, 3, 4), 300.0)
    assert mx.allclose(cpu.attention(q, q, mx.ones((1, 1, 3, 4)), 1.0), mx.ones((1, 1, 3, 4)))


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


@pytest.mark.skipif(blas.library is None, reason="OpenBLAS is not installed")
@pytest.mark.parametrize("shape", [(5,), (1, 5), (1, 1, 5), (4, 1, 5), (1, 3, 5)])
@pytest.mark.parametrize("biased", [False, True])
def test_row_product(shape: tuple[int, ...], biased: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastvlm_mlx.backend.cpu.products.STRIPE", 15)
    monkeypatch.setattr("fastvlm_mlx.backend.cpu.products.LEAST", 1)
    rng = np.random.default_rng(0)
    x, weight, bias = (rng.normal(size=size).astype(np.float32) for size in (shape, (7, 5), (7,)))
    ours = cpu.row_product(mx.array(x), mx.array(weight), mx.array(bias) if biased else None)
    assert ours is not None and ours.shape == (*shape[:-1], 7)
    assert np.allclose(np.array(ours), x @ weight.T + (bias if biased else 0), atol=1e-5)
    assert cpu.row_product(mx.array(x), mx.array(weight).astype(mx.bfloat16), None) is None
    if biased:
        assert cpu.row_product(mx.array(x), mx.array(weight), mx.array(bias).astype(mx.float16)) is None
    turned = mx.array(weight).T  # its rows do not lie in order
    assert cpu.row_product(mx.array(np.ones(7, np.float32)), turned, None) is None


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
