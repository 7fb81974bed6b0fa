"""Compiled programs for models of any size on a CPU, which only large models have otherwise."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from fastvlm_mlx.backend import cpu, ops
from fastvlm_mlx.backend.cpu import compiler, products, quantised


def for_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the test is over, let nothing be too small for a program; the test is skipped without the library."""
    monkeypatch.setattr(
        compiler, "openvino_module", None
    )  # as it will be again: other tests compute as small models do
    if ops.current() != "cpu" or not cpu.load():
        pytest.skip("OpenVINO, which computes large models on a CPU, is not installed")
    for module in (products, quantised):
        monkeypatch.setattr(module, "MIN_ELEMENTS", 1)
    monkeypatch.setattr(products, "MIN_ACTIVATIONS", 1)


def compile_tower(tower: nn.Module) -> None:
    """Have the tower of a small model compiled, as that of a large one is."""
    cpu.prepare_tower(tower)


def difference(found: mx.array, expected: mx.array) -> float:
    """The largest difference, in parts of the largest value expected."""
    found, expected = found.astype(mx.float32), expected.astype(mx.float32)
    return float(np.abs(np.array(found) - np.array(expected)).max() / np.abs(np.array(expected)).max())
