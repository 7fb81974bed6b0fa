"""The parts of a network that are to learn: everything else is frozen, and what learns is float32.

Enters: a network with its weights in place, options. Leaves: a network of its own whose trainable parameters are those
of the parts; the arrays that do not learn are the given network's. What is quantised and is to learn as a whole is
dequantised first.
"""

from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map

from ..config import ModelConfig
from ..decoding.adapting import shape_of, twin, unpacked
from ..errors import OptionError
from ..inputs.tokenizer import Tokenizer
from ..network.lora import LoRALinear, attach, attached, dequantised
from ..network.model import FastVLM
from ..quantize import layers
from ..quantize.layers import layer_at, put_layer
from ..storage.adapter import Adapter, AdapterConfig, names_of
from .options import TuneOptions

PROJECTIONS = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")  # of a decoder layer


def network_to_train(model: FastVLM, config: ModelConfig, options: TuneOptions) -> FastVLM:
    """A network that shares the arrays of `model`, with the parts that `options` name ready to learn."""
    copy = twin(model, config)
    copy.freeze()
    train = options.train or ()
    if "lora" in train:
        _add_updates(copy, config, options)
    if "embeddings" in train:
        for module in (copy.text.embed_tokens, copy.text.get("lm_head")):
            if module is not None:
                _unfreeze_whole(module)
    for part, module in (("projector", copy.projector), ("full", copy.text), ("tower", copy.vision)):
        if part in train:
            _unfreeze_whole(module)
    return copy


def update_paths(config: ModelConfig, last: int | None) -> list[str]:
    """The layers that get a low-rank update: the projections of the `last` decoder layers, of all where it is None."""
    count = config.text.num_hidden_layers
    if last is not None and last > count:
        raise OptionError(f"`layers` is {last}, and the decoder has {count}; give a number up to that.")
    first = 0 if last is None else count - last
    return [f"text.layers.{number}.{name}" for number in range(first, count) for name in PROJECTIONS]


def _add_updates(model: FastVLM, config: ModelConfig, options: TuneOptions) -> None:
    """Updates of nothing at first: A is drawn evenly from +-1/sqrt(I), B is zero, and DoRA's lengths are the weight's
    own.
    """
    rng = np.random.default_rng([options.seed, 1])
    for path in update_paths(config, options.layers):
        layer = layer_at(model, path)
        rows, width = shape_of(layer)
        a = mx.array(rng.uniform(-1, 1, (options.rank, width)).astype(np.float32) / np.float32(width**0.5))
        magnitude = mx.sqrt(mx.square(dequantised(layer)).sum(axis=1)) if options.dora else None
        update = LoRALinear(layer, a, mx.zeros((rows, options.rank)), options.scale, magnitude)
        attach(model, path, update)
        update.freeze(recurse=True)
        update.unfreeze(recurse=False, keys=["lora_a", "lora_b", "magnitude"])


def _unfreeze_whole(module: nn.Module) -> None:
    for path, layer in list(layers.packed_layers(module).items()):
        put_layer(module, path, unpacked(layer))
    module.update(tree_map(lambda array: array.astype(mx.float32), module.parameters()))
    module.unfreeze()


def learned(model: FastVLM) -> dict[str, mx.array]:
    """The parameters that learn, by name."""
    return dict(tree_flatten(model.trainable_parameters()))


def adapter_of(
    base: AdapterConfig, parameters: dict[str, mx.array], model: FastVLM, words: Tokenizer | None = None
) -> Adapter:
    """What was learned as an adapter; `base` says everything of it but which layers, `words` is its own
    tokenizer."""
    targets = tuple(attached(model))
    updates = set(names_of(targets, base.dora))
    trained = tuple(name for name in parameters if name not in updates)
    return Adapter(replace(base, targets=targets, trained=trained), dict(parameters), tokenizer=words)


def group_of(name: str) -> str:
    """Whose learning rate a parameter has: "projector", "tower" or "decoder"."""
    return {"projector": "projector", "vision": "tower"}.get(name.partition(".")[0], "decoder")
