"""The layers that compute with packed weights, in the place of linear layers and embeddings."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..backend.cpu.gradients import Form
from ..backend.ops import quantized_linear
from ..config import QuantConfig
from ..errors import CheckpointError, shown
from .recipes import BITS, GROUP_SIZES, MODES, Plan


class Packed(nn.Module):
    """What a quantised linear layer and a quantised embedding share: a matrix (O, I) in its packed form.

    weight (O, I * bits / 32) holds integers, scales is (O, I / group_size), and in affine mode biases as many offsets.
    """

    def __init__(self, rows: int, width: int, settings: QuantConfig, dtype: mx.Dtype = mx.float32):
        super().__init__()
        self.bits, self.group_size, self.mode = settings.bits, settings.group_size, settings.mode
        groups = (rows, width // settings.group_size)
        self.weight = mx.zeros((rows, width * settings.bits // 32), mx.uint32)
        self.scales = mx.zeros(groups, dtype if settings.mode == "affine" else mx.uint8)
        if settings.mode == "affine":
            self.biases = mx.zeros(groups, dtype)
        self._dequantised: mx.array | None = None
        self.keeps_dequantised = False
        self.form: Form | None = None

    def __setitem__(self, name: str, value: Any) -> None:
        """Every way of setting a parameter ends here; a copy in float32 of what was there before is let go of."""
        super().__setitem__(name, value)
        if name in ("weight", "scales", "biases"):
            self._dequantised = None

    def product(self, x: mx.array, bias: mx.array | None = None) -> mx.array:
        """x (..., I) with the matrix -> (..., O)."""
        return quantized_linear(x, self, bias)


def packed_layers(model: nn.Module) -> dict[str, "QuantizedLinear | QuantizedEmbedding"]:
    """The quantised layers of a model by path."""
    return {
        path: layer for path, layer in model.named_modules() if isinstance(layer, (QuantizedLinear, QuantizedEmbedding))
    }


class QuantizedLinear(Packed):
    """A linear layer (..., I) -> (..., O) with packed weights."""

    def __init__(self, rows: int, width: int, settings: QuantConfig, dtype: mx.Dtype = mx.float32, *, bias: bool):
        super().__init__(rows, width, settings, dtype)
        if bias:
            self.bias = mx.zeros((rows,), dtype)

    def __call__(self, x: mx.array) -> mx.array:
        return self.product(x, self.bias if "bias" in self else None)


class QuantizedEmbedding(Packed):
    """Rows by token id, and the head where it shares the matrix."""

    def __call__(self, ids: mx.array) -> mx.array:
        offsets = self.biases[ids] if self.mode == "affine" else None
        return mx.dequantize(self.weight[ids], self.scales[ids], offsets, self.group_size, self.bits, self.mode)

    def as_linear(self, x: mx.array) -> mx.array:
        """Scores (..., V) of hidden states (..., D)."""
        return self.product(x)


def apply(model: nn.Module, plan: Plan) -> None:
    """Put an empty quantised layer in the place of each that a plan names; raises CheckpointError where it cannot."""
    layers = dict(model.named_modules())
    for path, settings in plan.items():
        layer = layers.get(path)
        if not isinstance(layer, (nn.Linear, nn.Embedding)):
            raise CheckpointError(
                f"config.json: quantization names {shown(path)}, which is no matrix; convert the model again."
            )
        rows, width = layer.weight.shape
        fixed = MODES.get(settings.mode)
        known = settings == fixed or (
            settings.mode == "affine" and settings.bits in BITS and settings.group_size in GROUP_SIZES
        )
        if not known or width % settings.group_size:
            raise CheckpointError(
                f"config.json: MLX cannot quantise {shown(path)} of width {width} with {settings.bits} bits in groups "
                f"of {settings.group_size} ({shown(settings.mode)}); convert the model again."
            )
        if isinstance(layer, nn.Embedding):
            put_layer(model, path, QuantizedEmbedding(rows, width, settings, layer.weight.dtype))
        else:
            put_layer(model, path, QuantizedLinear(rows, width, settings, layer.weight.dtype, bias="bias" in layer))


def layer_at(model: nn.Module, path: str) -> Any:
    """The module at a path."""
    module: Any = model
    for name in path.split("."):
        module = module[int(name)] if isinstance(module, list) else module[name]
    return module


def put_layer(model: nn.Module, path: str, layer: nn.Module) -> None:
    """Put another module at a path."""
    parent, _, name = path.rpartition(".")
    container = layer_at(model, parent) if parent else model
    container[name] = layer
