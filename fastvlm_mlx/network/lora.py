"""Low-rank updates of linear layers, quantised or not: y = layer(x) + scale * (x A^T) B^T, activations as the layer has
them.

Sources: LoRA (arXiv:2106.09685); DoRA (arXiv:2402.09353), whose rows are brought to lengths of their own. A is (rank,
I) and B (O, rank) of a layer (..., I) -> (..., O); both are kept as they are stored and take part in the dtype of the
activations.
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..backend.ops import linear
from ..quantize.layers import Packed, put_layer


class LoRALinear(nn.Module):
    """A linear layer with a low-rank update; with `magnitude` (O,) the rows of the updated weight have these lengths
    (DoRA).
    """

    def __init__(
        self, layer: nn.Module, lora_a: mx.array, lora_b: mx.array, scale: float, magnitude: mx.array | None = None
    ):
        super().__init__()
        self.layer, self.lora_a, self.lora_b, self.scale = layer, lora_a, lora_b, scale
        if magnitude is not None:
            self.magnitude = magnitude
            self._squares = mx.square(dequantised(layer)).sum(axis=1)  # of the weight's rows, which stay as they are

    def __call__(self, x: mx.array) -> mx.array:
        """x (..., I) -> (..., O)."""
        update = self.scale * ((x @ self.lora_a.astype(x.dtype).T) @ self.lora_b.astype(x.dtype).T)
        if "magnitude" not in self:
            y: mx.array = self.layer(x) + update
            return y
        y = (product(self.layer, x) + update) * (self.magnitude / self.lengths(x.dtype)).astype(x.dtype)
        return y + self.layer.bias if "bias" in self.layer else y

    def lengths(self, dtype: mx.Dtype = mx.float32) -> mx.array:
        """The lengths (O,), float32, of the rows of weight + scale * B A, constants when differentiated, as DoRA's
        authors have it.

        `dtype` is what the weight is multiplied in, so that a packed one need not be dequantised.
        """
        a, b = self.lora_a.astype(mx.float32), self.lora_b.astype(mx.float32)
        crossed = product(self.layer, a.astype(dtype)).T.astype(mx.float32)  # weight A^T (O, rank)
        squares = self._squares + 2 * self.scale * (crossed * b).sum(axis=1)
        squares = squares + self.scale**2 * ((b @ (a @ a.T)) * b).sum(axis=1)
        return mx.stop_gradient(mx.sqrt(squares))


def product(layer: Any, x: mx.array) -> mx.array:
    """x (..., I) with the weight of a linear layer and without its bias -> (..., O)."""
    return layer.product(x) if isinstance(layer, Packed) else linear(x, layer.weight, None)


def dequantised(layer: Any) -> mx.array:
    """The weight (O, I) of a linear layer or an embedding, float32."""
    if not isinstance(layer, Packed):
        return layer.weight.astype(mx.float32)  # type: ignore[no-any-return]
    offsets = layer.biases if layer.mode == "affine" else None
    plain: mx.array = mx.dequantize(layer.weight, layer.scales, offsets, layer.group_size, layer.bits, layer.mode)
    return plain.astype(mx.float32)


def fused(
    weight: mx.array, lora_a: mx.array, lora_b: mx.array, scale: float, magnitude: mx.array | None = None
) -> mx.array:
    """The weight (O, I) that a layer's own and its update come to, float32; the others as `LoRALinear` takes them."""
    weight = weight.astype(mx.float32) + scale * (lora_b.astype(mx.float32) @ lora_a.astype(mx.float32))
    if magnitude is None:
        return weight
    return weight * (magnitude / mx.sqrt(mx.square(weight).sum(axis=1)))[:, None]


def attach(model: nn.Module, path: str, update: LoRALinear) -> None:
    """Put a layer with an update in the place of the one it was made for."""
    put_layer(model, path, update)


def attached(model: nn.Module) -> dict[str, LoRALinear]:
    """The layers of a model that have a low-rank update, by path."""
    return {path: layer for path, layer in model.named_modules() if isinstance(layer, LoRALinear)}
