"""The linear layer of every part against MLX's own."""

import mlx.core as mx
import mlx.nn as nn
import pytest

from fastvlm_mlx.backend import Backend
from fastvlm_mlx.linear import Linear


@pytest.mark.parametrize("backend", ["cpu", "metal"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(6,), (1, 6), (2, 7, 6)])
def test_the_definition(shape: tuple[int, ...], bias: bool, backend: Backend) -> None:
    layer, plain, x = Linear(6, 5, bias=bias, backend=backend), nn.Linear(6, 5, bias=bias), mx.random.normal(shape)
    layer.update(plain.parameters())
    assert mx.abs(layer(x) - plain(x)).max() < 1e-6
    assert layer.parameters().keys() == plain.parameters().keys()
