"""The linear layer of every part against MLX's own."""

from collections.abc import Callable
from copy import copy

import mlx.core as mx
import mlx.nn as nn
import pytest

from fastvlm_mlx.backend.linear import Linear, keep_transposed
from fastvlm_mlx.backend.ops import Backend


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


def change_and_put_back(layer: Linear) -> None:
    parameters = layer.parameters()
    parameters["weight"] *= 2
    layer.update(parameters)


CHANGES = (assign, assign_parameters, load, change_in_place, change_its_items, change_later, change_and_put_back)


@pytest.fixture
def kept() -> Linear:
    """A layer that keeps its transposed view."""
    layer = Linear(6, 5, bias=False, backend="metal")
    layer.weight = mx.random.normal((5, 6))
    keep_transposed(layer)
    return layer


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_weight_counts(kept: Linear, change: Callable[[Linear], None]) -> None:
    x = mx.random.normal((7, 6))
    before = kept(x)
    change(kept)
    assert mx.allclose(kept(x), 2 * before)
    keep_transposed(kept)
    assert mx.allclose(kept(x), 2 * before)


def test_a_copy_goes_its_own_way(kept: Linear) -> None:
    x = mx.random.normal((7, 6))
    before, other = kept(x), copy(kept)
    assign(other)
    assert mx.allclose(kept(x), before) and mx.allclose(other(x), 2 * before)


def test_learning_leaves_the_weight_that_was(kept: Linear) -> None:
    x = mx.random.normal((7, 6))
    before = kept(x)
    nn.value_and_grad(kept, lambda x: kept(x).sum())(x)
    assert mx.allclose(kept(x), before)


def test_a_kept_view_stays(kept: Linear) -> None:
    """Through products and print, and it is no parameter; a changed bias has nothing to do with it."""
    view = kept.transposed
    kept(mx.zeros((7, 6)))
    assert "input_dims=6, output_dims=5" in repr(kept)
    kept.bias = mx.ones(5)
    assert view is not None and kept.transposed is view
    assert kept.parameters().keys() == {"weight", "bias"}


def test_a_layer_without_its_weight(kept: Linear) -> None:
    del kept["weight"]
    assert not hasattr(kept, "weight")
    kept.weight = mx.ones((5, 6))
    assert mx.allclose(kept(mx.ones((2, 6))), mx.full((2, 5), 6))
