"""Activation-aware scaling: columns whose inputs are large are scaled up before rounding, and their inputs scaled down.

Source: AWQ (arXiv:2306.00978). The inverse scales are folded into whatever computes those inputs, so that the network
computes the same:

    RMSNorm -> qkv, gate and up
    values -> the output projection (query heads that share a value head share its scales)
    up -> down
    LayerNorm -> qkv, values -> proj of the tower's attention
    the tower's 7x7 depthwise convolution -> fc1

fc1 -> fc2 cannot be folded: a GELU lies between, and GELU(x / s) is not GELU(x) / s. Nothing linear lies right before
the other layers either (downsamplers, projector, head).
"""

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from ..config import QuantConfig
from ..network.language import Block
from ..network.vision import AttentionBlock, RepMixerBlock
from ..quantize.layers import layer_at
from ..quantize.rounding import rounded

RATIOS = tuple(n / 20 for n in range(20))  # exponents of the mean input that are tried; 0 changes nothing
SAMPLED_INPUTS = 512  # inputs of a layer that scales are searched with, about
MIN_SCALE = 1e-4  # least scale, before scales are centred


@dataclass(frozen=True)
class Fold:
    """Scales for the columns of `layer`, and where they are undone: in `count` outputs of `source` from `first` on.

    `count` None stands for all outputs. Each output feeds `repeat` columns, one per query head of its group, in heads
    of `head` channels.
    """

    layer: str
    source: str
    first: int = 0
    count: int | None = None
    repeat: int = 1
    head: int = 1


def folds(path: str, block: nn.Module) -> list[Fold]:
    """The folds inside one block of the decoder or the tower, whose path is `path`; empty for any other module."""
    if isinstance(block, Block):
        attention = block.self_attn
        values, head = attention.kv_heads * attention.head_dim, attention.head_dim
        first, repeat = (attention.heads + attention.kv_heads) * head, attention.heads // attention.kv_heads
        inner = block.mlp.down_proj.weight.shape[1]
        return [
            Fold(f"{path}.self_attn.qkv_proj", f"{path}.input_layernorm"),
            Fold(f"{path}.self_attn.o_proj", f"{path}.self_attn.qkv_proj", first, values, repeat, head),
            Fold(f"{path}.mlp.gate_up_proj", f"{path}.post_attention_layernorm"),
            Fold(f"{path}.mlp.down_proj", f"{path}.mlp.gate_up_proj", inner, inner),
        ]
    if not isinstance(block, (AttentionBlock, RepMixerBlock)):
        return []
    found = [Fold(f"{path}.convffn.fc1", f"{path}.convffn.conv")]
    if isinstance(block, AttentionBlock):
        width = block.token_mixer.proj.weight.shape[1]
        found.append(Fold(f"{path}.token_mixer.qkv", f"{path}.norm"))
        found.append(Fold(f"{path}.token_mixer.proj", f"{path}.token_mixer.qkv", 2 * width, width))
    return found


class Recorder(nn.Module):
    """A stand-in for a linear layer that keeps the inputs (rows, I) it is called with."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self._layer = layer
        self.weight = layer["weight"]
        self.inputs: list[mx.array] = []

    def __call__(self, x: mx.array) -> mx.array:
        self.inputs.append(x.reshape(-1, x.shape[-1]))
        y: mx.array = self._layer(x)
        return y


def gathered(recorder: Recorder) -> mx.array:
    """About SAMPLED_INPUTS of a recorder's inputs (T, I), evenly spread, in float32; the recorder is emptied."""
    every = max(1, sum(map(len, recorder.inputs)) // SAMPLED_INPUTS)
    rows = mx.concatenate([x[::every].astype(mx.float32) for x in recorder.inputs])
    mx.eval(rows)
    recorder.inputs.clear()
    return rows


def search(weight: mx.array, inputs: mx.array, fold: Fold, settings: QuantConfig, stored: mx.Dtype) -> mx.array:
    """The scales (count,) of a fold whose rounded weight gives outputs nearest to those of the exact weight (O, I).

    `inputs` (T, I) are inputs of the layer, `settings` how it is rounded, `stored` the dtype of quantisation scales.
    The scales are found among powers of the mean input, RATIOS being the exponents.
    """
    weight = weight.astype(mx.float32)
    mean = _shared(mx.abs(inputs).mean(axis=0), fold)
    best, least = mx.ones_like(mean), float("inf")
    for ratio in RATIOS:
        scales = mx.maximum(mean**ratio, MIN_SCALE)
        scales = scales / mx.sqrt(scales.max() * scales.min())
        columns = spread(scales, fold)
        error = rounded(weight * columns, settings, stored) / columns - weight
        loss = float(mx.square(inputs @ error.T).mean().item())  # type: ignore[arg-type]
        if loss < least:
            best, least = scales, loss
    mx.eval(best)
    return best


def _shared(columns: mx.array, fold: Fold) -> mx.array:
    """A value per column (I,) -> its mean over the columns that one output of the source feeds."""
    return columns.reshape(-1, fold.repeat, fold.head).mean(axis=1).reshape(-1)


def spread(scales: mx.array, fold: Fold) -> mx.array:
    """Scales of a source's outputs -> scales of the layer's columns (I,)."""
    return mx.repeat(scales.reshape(-1, 1, fold.head), fold.repeat, axis=1).reshape(-1)


def apply_fold(model: nn.Module, fold: Fold, scales: mx.array, stored: mx.Dtype) -> None:
    """Multiply the layer's columns by the scales, and divide the source's outputs by them, in place.

    A norm is stored in 16 bits (`stored`): it is rounded to them here, and the layer's columns take up the rounding
    error.
    """
    layer, source = layer_at(model, fold.layer), layer_at(model, fold.source)
    dtype = layer.weight.dtype
    part = slice(fold.first, None if fold.count is None else fold.first + fold.count)
    if isinstance(source, (nn.RMSNorm, nn.LayerNorm)):
        before = source.weight.astype(mx.float32)
        after = (before / scales).astype(stored).astype(mx.float32)
        usable = (mx.abs(after) > 0) & mx.isfinite(after)
        scales = mx.where(usable, before / mx.where(usable, after, 1), 1)
        source.weight = mx.where(usable, after, before).astype(dtype)
    else:
        weight = source.weight.astype(mx.float32)
        shape = (-1, *(1,) * (weight.ndim - 1))
        weight[part] = weight[part] / scales.reshape(shape)
        source.weight = weight.astype(dtype)
    if "bias" in source:
        bias = source.bias.astype(mx.float32)
        bias[part] = bias[part] / scales
        source.bias = bias.astype(dtype)
    layer.weight = (layer.weight.astype(mx.float32) * spread(scales, fold)).astype(dtype)
    mx.eval(layer.parameters(), source.parameters())
