"""A model and an adapter -> a model of plain weights: the update is added to the weight it is of, in float32, and cast
last.

Where the weight is packed, the layer comes out unpacked: rounding it again would undo most of a small update.
"""

from collections.abc import Iterator
from dataclasses import replace

import mlx.core as mx

from fastvlm_mlx.config import ModelConfig, QuantConfig
from fastvlm_mlx.errors import CheckpointError, listed
from fastvlm_mlx.network.lora import fused
from fastvlm_mlx.storage.adapter import Adapter, check_base
from fastvlm_mlx.storage.open import OpenModel

from .packed import PARTS


def fuse(opened: OpenModel, adapter: Adapter) -> OpenModel:
    """The model that answers as `opened` does with the adapter; raises CheckpointError for another model's."""
    check_base(adapter, opened)
    settings, base = adapter.config, opened.resolve()
    changed = {*settings.targets, *(name.rpartition(".")[0] for name in settings.trained)}
    text = replace(base.text, vocab_size=settings.vocab_size or base.text.vocab_size)
    plan = {layer: q for layer, q in base.quantization.items() if layer not in changed}
    stops = settings.eos_token_ids or base.eos_token_ids
    config = replace(base, text=text, quantization=plan, eos_token_ids=stops)

    def weights() -> Iterator[tuple[str, mx.array]]:
        tensors = dict(opened.weights())
        strange = [name for name in settings.trained if name not in tensors]
        strange += [path for path in settings.targets if f"{path}.weight" not in tensors]
        if strange:
            raise CheckpointError(f"{adapter.origin}: this model has no {listed(strange)}; fuse it into its own.")
        for path in changed:
            if path in base.quantization:
                tensors[f"{path}.weight"] = dequantised(tensors, path, base.quantization[path])
        for path in settings.targets:
            tensors[f"{path}.weight"] = _updated(tensors.pop(f"{path}.weight"), adapter, path)
        for name in settings.trained:
            tensors[name] = adapter.tensors[name]
        for name in list(tensors):
            yield name, tensors.pop(name)

    words = adapter.tokenizer or opened.tokenizer
    return replace(opened, config=config, weights=weights, resolve=lambda: config, tokenizer=words)


def unpacked(opened: OpenModel) -> OpenModel:
    """A model whose quantised layers are the values they stand for, so that it can be quantised in another way."""
    base = opened.resolve()
    config: ModelConfig = replace(base, quantization={})

    def weights() -> Iterator[tuple[str, mx.array]]:
        tensors = dict(opened.weights())
        for path, how in base.quantization.items():
            tensors[f"{path}.weight"] = dequantised(tensors, path, how)
        for name in list(tensors):
            yield name, tensors.pop(name)

    return replace(opened, config=config, weights=weights, resolve=lambda: config)


def dequantised(tensors: dict[str, mx.array], path: str, how: QuantConfig) -> mx.array:
    """The weight (O, I), float32, of a quantised layer, whose parts are taken out."""
    weight, scales, offsets = (tensors.pop(f"{path}.{part}", None) for part in PARTS)
    assert weight is not None and scales is not None  # checked where the model was opened
    plain: mx.array = mx.dequantize(weight, scales, offsets, how.group_size, how.bits, how.mode)
    return plain.astype(mx.float32)


def _updated(weight: mx.array, adapter: Adapter, path: str) -> mx.array:
    a, b, magnitude = (adapter.tensors.get(f"{path}.{part}") for part in ("lora_a", "lora_b", "magnitude"))
    assert a is not None and b is not None  # read_adapter has seen to it
    return fused(weight, a, b, adapter.config.scale, magnitude)
