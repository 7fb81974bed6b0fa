"""The linear layer of every part against MLX's own."""

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import pytest

from fastvlm_mlx.backend.linear import Linear
from fastvlm_mlx.backend.ops import Backend, forms_of


@pytest.mark.parametrize("backend", ["cpu", "metal"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(6,), (1, 6), (2, 7, 6)])
def test_the_definition(shape: tuple[int, ...], bias: bool, backend: Backend) -> None:
    layer, plain, x = Linear(6, 5, bias=bias), nn.Linear(6, 5, bias=bias), mx.random.normal(shape)
    layer.update(plain.parameters())
    with forms_of(backend):
        assert mx.abs(layer(x) - plain(x)).max() < 1e-6
    assert layer.parameters().keys() == plain.parameters().keys()
    assert "input_dims=6, output_dims=5" in repr(layer)


def assign(layer: Linear) -> None:
    layer.weight = 2 * layer.weight


def load(layer: Linear) -> None:
    layer.load_weights([("weight", 2 * layer.weight)], strict=False)


def change_in_place(layer: Linear) -> None:
    weight = layer["weight"]
    weight[:] = 2 * weight


@pytest.mark.parametrize("change", [assign, load, change_in_place])
def test_a_changed_weight_counts(change: Callable[[Linear], None]) -> None:
    layer, x = Linear(6, 5, bias=False), mx.random.normal((7, 6))
    layer.weight = mx.random.normal((5, 6))
    before = layer(x)
    change(layer)
    assert mx.allclose(layer(x), 2 * before)


def test_a_derived_layer_is_not_taken_for_a_plain_one() -> None:
    class Doubled(Linear):
        def __call__(self, x: mx.array) -> mx.array:
            return 2 * super().__call__(x)

    assert Linear.is_plain and not Doubled.is_plain
