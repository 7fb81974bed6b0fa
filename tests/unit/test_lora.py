"""Low-rank updates: what they compute on plain and packed layers, fused, and beside mlx-lm's own."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from fastvlm_mlx.backend.linear import Linear
from fastvlm_mlx.config import QuantConfig
from fastvlm_mlx.network.lora import LoRALinear, dequantised, fused
from fastvlm_mlx.quantize.layers import QuantizedLinear

ROWS, WIDTH, RANK, SCALE = 96, 64, 4, 1.5


def noise(*shape: int, seed: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


def plain(bias: bool = True) -> Linear:
    layer = Linear(WIDTH, ROWS, bias=bias)
    layer.weight = noise(ROWS, WIDTH, seed=0) / 8
    if bias:
        layer.bias = noise(ROWS, seed=1)
    return layer


def packed(bits: int, mode: str = "affine") -> QuantizedLinear:
    settings = QuantConfig(bits, 32, mode)
    layer = QuantizedLinear(ROWS, WIDTH, settings, bias=True)
    parts = mx.quantize(noise(ROWS, WIDTH, seed=0) / 8, 32, bits, mode)
    for name, part in zip(("weight", "scales", "biases"), parts, strict=False):
        layer[name] = part
    layer.bias = noise(ROWS, seed=1)
    return layer


LAYERS = {"plain": plain, "no bias": lambda: plain(False), "3 bits": lambda: packed(3), "4 bits": lambda: packed(4),
          "6 bits": lambda: packed(6), "8 bits": lambda: packed(8), "mxfp4": lambda: packed(4, "mxfp4")}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dora", [False, True])
def test_it_computes_what_its_fused_weight_computes(name: str, dora: bool) -> None:
    """Of one row and of many, which take different forms on a CPU."""
    layer: Any = LAYERS[name]()
    magnitude = 1 + mx.abs(noise(ROWS, seed=4)) if dora else None
    update = LoRALinear(layer, noise(RANK, WIDTH, seed=2), noise(ROWS, RANK, seed=3), SCALE, magnitude)
    weight = np.array(fused(dequantised(layer), update.lora_a, update.lora_b, SCALE, magnitude))
    expected = np.array(dequantised(layer)) + SCALE * np.array(update.lora_b) @ np.array(update.lora_a)
    if dora:
        assert magnitude is not None
        expected *= (np.array(magnitude) / np.linalg.norm(expected, axis=1))[:, None]
        np.testing.assert_allclose(np.linalg.norm(weight, axis=1), np.array(magnitude), rtol=1e-5)
    np.testing.assert_allclose(weight, expected, rtol=1e-4, atol=1e-5)
    for rows in (1, 40):
        x = noise(rows, WIDTH, seed=5)
        y = np.array(x) @ expected.T + (np.array(layer.bias) if "bias" in layer else 0)
        np.testing.assert_allclose(np.array(update(x)), y, rtol=1e-4, atol=1e-4)


def test_an_update_of_nothing_changes_nothing() -> None:
    layer = plain()
    lengths = mx.sqrt(mx.square(layer.weight).sum(axis=1))
    x = noise(3, WIDTH, seed=5)
    nothing = mx.zeros((ROWS, RANK))
    assert mx.array_equal(LoRALinear(layer, noise(RANK, WIDTH, seed=2), nothing, SCALE)(x), layer(x)).item()
    dora = LoRALinear(layer, noise(RANK, WIDTH, seed=2), nothing, SCALE, lengths)
    np.testing.assert_allclose(np.array(dora(x)), np.array(layer(x)), rtol=1e-5, atol=1e-5)


def test_activations_keep_their_dtype() -> None:
    layer = plain()
    layer.weight, layer.bias = layer.weight.astype(mx.bfloat16), layer.bias.astype(mx.bfloat16)
    for magnitude in (None, mx.ones(ROWS)):
        update = LoRALinear(layer, noise(RANK, WIDTH, seed=2), noise(ROWS, RANK, seed=3), SCALE, magnitude)
        assert update(noise(2, WIDTH, seed=5).astype(mx.bfloat16)).dtype == mx.bfloat16


@pytest.mark.parametrize("dora", [False, True])
def test_beside_mlx_lm(dora: bool) -> None:
    """The same output and the same gradient as mlx-lm's layers, which have A and B turned."""
    from mlx_lm.tuner.dora import DoRALinear
    from mlx_lm.tuner.lora import LoRALinear as TheirLoRALinear

    kind: Any = DoRALinear if dora else TheirLoRALinear
    layer = plain()
    a, b = noise(RANK, WIDTH, seed=2), noise(ROWS, RANK, seed=3)
    reference = nn.Linear(WIDTH, ROWS)
    reference.weight, reference.bias = layer.weight, layer.bias
    theirs = kind.from_base(reference, r=RANK, scale=SCALE)
    theirs.lora_a, theirs.lora_b = a.T, b.T
    lengths = theirs.m if dora else None
    x = noise(5, WIDTH, seed=5)
    ours = LoRALinear(layer, a, b, SCALE, lengths)
    np.testing.assert_allclose(np.array(ours(x)), np.array(theirs(x)), rtol=1e-5, atol=1e-5)

    def gradient(module: Any, names: tuple[str, str]) -> list[np.ndarray]:
        module.freeze()
        module.unfreeze(recurse=False, keys=list(names))
        tree = nn.value_and_grad(module, lambda: (module(x) ** 2).sum())()[1]
        return [np.array(tree[name]) for name in names]

    found, wanted = (gradient(each, ("lora_a", "lora_b")) for each in (ours, theirs))
    for one, two in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, two.T, rtol=1e-4, atol=1e-3 * np.abs(two).max())
