"""The linear layer: the definition, and never with a weight that has been replaced."""

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
    plain.update(layer.parameters())
    assert layer.parameters().keys() == plain.parameters().keys()
    assert mx.abs(layer(x) - plain(x)).max() < 1e-6


def test_a_new_weight_is_used_at_once() -> None:
    layer, x = Linear(6, 5, backend="cpu"), mx.random.normal((2, 6))
    layer(x)
    assert layer.turned is layer.turned
    layer.update({"weight": mx.zeros((5, 6))})
    assert (layer(x) == layer.bias).all()
    layer.weight = mx.ones((5, 6))
    assert mx.abs(layer(x) - layer.bias - x.sum(axis=-1, keepdims=True)).max() < 1e-5
    layer.set_dtype(mx.bfloat16)
    assert layer(x.astype(mx.bfloat16)).dtype == mx.bfloat16
