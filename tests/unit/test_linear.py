"""The linear layer of every part against MLX's own."""

from collections.abc import Callable
from copy import copy

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


def assign(layer: Linear) -> None:
    layer.weight = 2 * layer.weight


def assign_parameters(layer: Linear) -> None:
    layer.update({"weight": 2 * layer.parameters()["weight"]})


def load(layer: Linear) -> None:
    layer.load_weights([("weight", 2 * layer.weight)], strict=False)


def change_in_place(layer: Linear) -> None:
    layer.weight *= 2


def change_its_items(layer: Linear) -> None:
    layer.weight[:] = 2 * layer.weight


def change_later(layer: Linear) -> None:
    weight = layer.weight
    layer(mx.zeros((2, 6)))
    weight[:] = 2 * weight


@pytest.mark.parametrize("backend", ["cpu", "metal"])
@pytest.mark.parametrize("change", [assign, assign_parameters, load, change_in_place, change_its_items, change_later])
def test_a_changed_weight_counts(change: Callable[[Linear], None], backend: Backend) -> None:
    layer, x = Linear(6, 5, bias=False, backend=backend), mx.random.normal((7, 6))
    layer.weight = mx.random.normal((5, 6))
    before = layer(x)
    other = copy(layer)
    change(layer)
    assert mx.allclose(layer(x), 2 * before)
    if change not in (change_in_place, change_its_items, change_later):  # those change the array that both have
        assert mx.allclose(other(x), before)


def test_learning_leaves_the_weight_that_was() -> None:
    layer, x = Linear(6, 5, backend="metal"), mx.random.normal((7, 6))
    layer.weight = mx.random.normal((5, 6))
    before = layer(x)
    nn.value_and_grad(layer, lambda x: layer(x).sum())(x)
    assert mx.allclose(layer(x), before)


def test_the_view_is_made_once() -> None:
    layer, x = Linear(6, 5, backend="metal"), mx.zeros((7, 6))
    first = layer.turned
    layer(x)
    assert layer.turned is first
    assert layer.parameters().keys() == {"weight", "bias"}
