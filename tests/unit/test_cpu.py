"""The CPU's own forms of GELU and depthwise convolution against the definitions."""

import math

import mlx.core as mx
import numpy as np
import pytest

from fastvlm_mlx import cpu


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
@pytest.mark.parametrize("shape", [(1, 1, 1, 4), (2, 3, 5, 3), (1, 16, 16, 8), (1, 9, 40, 2), (1, 33, 17, 5), (3, 2, 64, 1)])
def test_depthwise(shape: tuple[int, ...], kernel: int, stride: int) -> None:
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=shape), rng.normal(size=(shape[-1], kernel, kernel, 1))
    ours = cpu.depthwise(mx.array(x.astype(np.float32)), mx.array(weight.astype(np.float32)), stride)
    expected = slow_depthwise(x, weight, stride)
    assert ours.shape == expected.shape
    assert np.abs(np.array(ours) - expected).max() < 1e-5 * max(1, np.abs(expected).max())


@pytest.mark.parametrize("compiled", [False, True])
def test_gelu(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if compiled:
        monkeypatch.setattr(cpu, "COMPILE_FROM", 1)
    x = np.concatenate([np.linspace(-12, 12, 20001), [0.0, 1e-30, -1e-30, 1e4, -1e4]]).astype(np.float32)
    expected = np.array([0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in x.astype(float)])
    assert (np.abs(np.array(cpu.gelu(mx.array(x))) - expected) <= 2e-7 * np.maximum(1, np.abs(x))).all()


def test_gelu_passes_on_what_is_not_a_number() -> None:
    y = np.array(cpu.gelu(mx.array([float("nan"), float("inf")])))
    assert np.isnan(y[0]) and np.isposinf(y[1])
