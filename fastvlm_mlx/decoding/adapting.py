"""A network with an adapter: another network that shares the arrays of the first, which stays as it is.

Enters: a network with its weights in place, an adapter. Leaves: a network that computes with the adapter.
"""

from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..backend.linear import Linear
from ..config import ModelConfig
from ..errors import CheckpointError, listed
from ..network.lora import LoRALinear, attach, dequantised
from ..network.model import FastVLM
from ..quantize import layers
from ..quantize.layers import Packed, QuantizedEmbedding, layer_at, put_layer
from ..storage.adapter import Adapter

EMBEDDING, HEAD = "text.embed_tokens", "text.lm_head"


def twin(model: FastVLM, config: ModelConfig) -> FastVLM:
    """Another network of the same arrays, whose layers can be replaced; its config is the one given."""
    other = FastVLM(config)
    layers.apply(other, config.quantization)
    other.load_weights(list(model.flat_parameters().items()))
    for path, layer in layers.packed_layers(model).items():
        layer_at(other, path).keeps_dequantised = layer.keeps_dequantised
    return other


def adapted(model: FastVLM, config: ModelConfig, adapter: Adapter) -> tuple[FastVLM, ModelConfig]:
    """A network that computes with an adapter, and its config; raises CheckpointError where it does not fit."""
    settings, tensors = adapter.config, adapter.tensors
    other = twin(model, config)
    if not any(name.startswith("vision.") for name in settings.trained):
        other.vision = model.vision  # with the program that may have been compiled for it
    modules = dict(other.named_modules())
    whole = {name: name.rpartition(".")[0] for name in settings.trained}
    strange = [path for path in settings.targets if not isinstance(modules.get(path), (nn.Linear, Packed))]
    strange += [name for name, path in whole.items() if path not in modules]
    if strange:
        raise CheckpointError(
            f"{adapter.origin}: this model has no layers {listed(strange)}; load the model it was made for."
        )
    for path in dict.fromkeys(whole.values()):
        if isinstance(modules[path], Packed):
            put_layer(other, path, unpacked(modules[path]))
    for name, path in whole.items():
        layer, part = layer_at(other, path), name.rpartition(".")[2]
        expected = layer[part].shape
        if path in (EMBEDDING, HEAD) and settings.vocab_size:
            expected = (settings.vocab_size, *expected[1:])
        _check_shape(adapter, name, tensors[name].shape, expected)
        layer[part] = tensors[name].astype(layer[part].dtype)
    for path in settings.targets:
        layer = layer_at(other, path)
        a, b, magnitude = (tensors.get(f"{path}.{part}") for part in ("lora_a", "lora_b", "magnitude"))
        assert a is not None and b is not None  # read_adapter has seen to it
        rows, width = shape_of(layer)
        _check_shape(adapter, f"{path}.lora_a", a.shape, (b.shape[-1], width))
        _check_shape(adapter, f"{path}.lora_b", b.shape, (rows, a.shape[0]))
        if magnitude is not None:
            _check_shape(adapter, f"{path}.magnitude", magnitude.shape, (rows,))
        attach(other, path, LoRALinear(layer, a, b, settings.scale, magnitude))
    plan = {path: how for path, how in config.quantization.items() if path not in whole.values()}
    text = replace(config.text, vocab_size=settings.vocab_size or config.text.vocab_size)
    stops = settings.eos_token_ids or config.eos_token_ids
    config = replace(config, text=text, quantization=plan, eos_token_ids=stops)
    mx.eval(other.parameters())
    return other, config


def shape_of(layer: Any) -> tuple[int, int]:
    """Rows and columns (O, I) of a linear layer's weight, packed or not."""
    rows, columns = layer.weight.shape
    return rows, columns * 32 // layer.bits if isinstance(layer, Packed) else columns


def unpacked(layer: Any) -> nn.Module:
    """A layer of plain weights like a quantised one, in the dtype of its scales, or float32 where those are no numbers
    of it.
    """
    dtype = layer.scales.dtype if mx.issubdtype(layer.scales.dtype, mx.floating) else mx.float32
    rows, width = shape_of(layer)
    plain: Any = (
        nn.Embedding(1, width) if isinstance(layer, QuantizedEmbedding) else Linear(width, rows, bias="bias" in layer)
    )
    plain.weight = dequantised(layer).astype(dtype)
    if "bias" in layer:
        plain.bias = layer.bias
    return plain  # type: ignore[no-any-return]


def _check_shape(adapter: Adapter, name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if found != expected:
        raise CheckpointError(
            f"{adapter.origin}: {name} has the shape {found}, and this model calls for {expected}; load the model it "
            "was made for."
        )
