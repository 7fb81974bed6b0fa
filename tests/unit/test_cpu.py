"""The CPU's own forms of GELU, depthwise convolution and one-row products against the definitions."""

import math
import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from fastvlm_mlx import blas, cpu


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


@pytest.mark.skipif(blas.library is None, reason="OpenBLAS is not installed")
@pytest.mark.parametrize("shape", [(5,), (1, 5), (1, 1, 5), (4, 1, 5), (1, 3, 5)])
@pytest.mark.parametrize("biased", [False, True])
def test_row_product(shape: tuple[int, ...], biased: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "STRIPE", 15)
    rng = np.random.default_rng(0)
    x, weight, bias = (rng.normal(size=size).astype(np.float32) for size in (shape, (7, 5), (7,)))
    ours = cpu.row_product(mx.array(x), mx.array(weight), mx.array(bias) if biased else None)
    assert ours is not None and ours.shape == (*shape[:-1], 7)
    assert np.allclose(np.array(ours), x @ weight.T + (bias if biased else 0), atol=1e-5)
    assert cpu.row_product(mx.array(x), mx.array(weight).astype(mx.bfloat16), None) is None
    turned = mx.array(weight).T  # not in the order of rows
    assert cpu.row_product(mx.array(np.ones(7, np.float32)), turned, None) is None


@pytest.mark.parametrize("fault", ["no temporary folder", "a compiler that fails"])
def test_gelu_where_nothing_can_be_compiled(fault: str, tmp_path: Path) -> None:
    """In a process of its own: what MLX has compiled once, it keeps."""
    compiler = tmp_path / "g++"
    compiler.write_text("#!/bin/sh\nexit 1\n")
    compiler.chmod(0o755)
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"} if fault == "a compiler that fails" else {"TMPDIR": "/no/such/folder"}
    (tmp_path / "tmp").mkdir()
    code = "from fastvlm_mlx import cpu; import mlx.core as mx; print(cpu.gelu(mx.ones((cpu.COMPILE_FROM,)))[0].item())"
    environment = {**os.environ, "TMPDIR": str(tmp_path / "tmp"), **path}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert abs(float(done.stdout) - 0.8413447) < 1e-6
