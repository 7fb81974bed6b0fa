"""Ours -> published form, the inverse of `fold.py`; folded layers stay folded, beside norms and scales of one.

- A batch norm that changes nothing: mean 0 and variance 1 - eps, so that the square root of variance + eps rounds to 1.
- Layer scales of one.
- Stacked projections are taken apart; filters, and the columns that read them, are put back in the published order.
"""

from collections.abc import Iterator

import mlx.core as mx

from fastvlm_mlx.config import ATTENTION_STAGES, ModelConfig, TextConfig, VisionConfig
from fastvlm_mlx.errors import listed

from . import packed
from .branches import BATCH_NORM_EPS
from .fold import Tensors
from .published import network_indices

Named = Iterator[tuple[str, mx.array]]


def unfold(tensors: dict[str, mx.array], config: ModelConfig) -> Named:
    """Yield the published form by name, unevaluated, quantised layers dequantised; empties `tensors`."""
    packed.unpack(tensors, config.quantization)
    yield from tower(Tensors(tensors, "vision"), config.vision)
    yield from projector(Tensors(tensors, "projector"))
    yield from decoder(Tensors(tensors, "text"), config.text)
    if tensors:
        raise AssertionError(f"unfolding left over {listed(tensors)}")


def tower(source: Tensors, config: VisionConfig) -> Named:
    """Yield the tower's tensors by their published names below `vision.`, taking ours out of `source`."""
    yield from _convolution(source.under("patch_embed.conv"), "vision.patch_embed.0.reparam_conv")
    yield from _convolution(source.under("patch_embed.depthwise"), "vision.patch_embed.1.reparam_conv")
    yield from _pointwise(source.under("patch_embed.linear"), "vision.patch_embed.2.reparam_conv")
    for stage, (downsample, position, blocks) in enumerate(network_indices(len(config.widths))):
        ours = source.under(f"stages.{stage}")
        if downsample >= 0:
            widen = config.widths[stage] // config.widths[stage - 1]
            yield from _downsample(ours.under("downsample"), f"vision.network.{downsample}.proj", widen)
        if position >= 0:
            yield from _convolution(ours.under("position"), f"vision.network.{position}.reparam_conv")
        for i in range(config.depths[stage]):
            block, name = ours.under(f"blocks.{i}"), f"vision.network.{blocks}.{i}"
            yield from _block(block, name, config.widths[stage], attention=stage in ATTENTION_STAGES)
    yield from _conv_exp(source.under("conv_exp"), "vision.conv_exp")


def _convolution(source: Tensors, name: str) -> Named:
    yield f"{name}.weight", source.take("weight").transpose(0, 3, 1, 2)
    yield f"{name}.bias", source.take("bias")


def _pointwise(source: Tensors, name: str) -> Named:
    """A 1x1 convolution."""
    yield f"{name}.weight", source.take("weight")[:, :, None, None]
    yield f"{name}.bias", source.take("bias")


def _groups(source: Tensors, name: str, widen: int) -> Named:
    """Depthwise convolutions as one with `widen` outputs per channel."""
    for part in ("weight", "bias"):
        filters = [source.take(f"filters.{j}.{part}") for j in range(widen)]
        whole = mx.stack(filters, axis=1).flatten(0, 1)
        yield f"{name}.{part}", whole.transpose(0, 3, 1, 2) if part == "weight" else whole


def by_channel(x: mx.array, axis: int, widen: int = 2) -> mx.array:
    """Reorder an axis from filter by filter to channel by channel."""
    return x[tuple([slice(None)] * axis + [mx.arange(x.shape[axis]).reshape(widen, -1).T.reshape(-1)])]


def _downsample(source: Tensors, name: str, widen: int) -> Named:
    yield from _groups(source.under("groups"), f"{name}.0.lkb_reparam", widen)
    yield f"{name}.1.reparam_conv.weight", by_channel(source.take("linear.weight"), 1, widen)[:, :, None, None]
    yield f"{name}.1.reparam_conv.bias", source.take("linear.bias")


def _block(source: Tensors, name: str, width: int, *, attention: bool) -> Named:
    scales = ("layer_scale_1", "layer_scale_2") if attention else ("layer_scale",)
    yield from ((f"{name}.{scale}", mx.ones((width, 1, 1))) for scale in scales)
    if attention:
        for part in (
            "norm.weight",
            "norm.bias",
            "token_mixer.qkv.weight",
            "token_mixer.proj.weight",
            "token_mixer.proj.bias",
        ):
            yield f"{name}.{part}", source.take(part)
    else:
        yield from _convolution(source.under("token_mixer"), f"{name}.token_mixer.reparam_conv")
    yield f"{name}.convffn.conv.conv.weight", source.take("convffn.conv.weight").transpose(0, 3, 1, 2)
    for part, value in (("weight", 1), ("bias", 0), ("running_mean", 0), ("running_var", 1 - BATCH_NORM_EPS)):
        yield f"{name}.convffn.conv.bn.{part}", mx.full((width,), value, dtype=mx.float32)
    yield from _pointwise(source.under("convffn.fc1"), f"{name}.convffn.fc1")
    yield from _pointwise(source.under("convffn.fc2"), f"{name}.convffn.fc2")


def _conv_exp(source: Tensors, name: str) -> Named:
    yield from _groups(source.under("groups"), f"{name}.reparam_conv", 2)
    yield f"{name}.se.reduce.weight", by_channel(source.take("reduce.weight"), 1)[:, :, None, None]
    yield f"{name}.se.reduce.bias", source.take("reduce.bias")
    yield f"{name}.se.expand.weight", by_channel(source.take("expand.weight"), 0)[:, :, None, None]
    yield f"{name}.se.expand.bias", by_channel(source.take("expand.bias"), 0)


def projector(source: Tensors) -> Named:
    """Yield the projector's tensors by their published names below `projector.`, taking ours out of `source`."""
    yield "projector.linear_1.weight", by_channel(source.take("linear_1.weight"), 1)
    for name in ("linear_1.bias", "linear_2.weight", "linear_2.bias"):
        yield f"projector.{name}", source.take(name)


def decoder(source: Tensors, config: TextConfig) -> Named:
    """Yield the decoder's tensors by their published names below `text.`, taking ours out of `source`."""
    rows, kv = config.hidden_size, config.num_key_value_heads * config.head_dim
    yield "text.embed_tokens.weight", source.take("embed_tokens.weight")
    for i in range(config.num_hidden_layers):
        layer, name = source.under(f"layers.{i}"), f"text.layers.{i}"
        for part in ("weight", "bias"):
            stacked = mx.split(layer.take(f"self_attn.qkv_proj.{part}"), [rows, rows + kv])
            yield from ((f"{name}.self_attn.{n}_proj.{part}", array) for n, array in zip("qkv", stacked, strict=True))
        gate, up = mx.split(layer.take("mlp.gate_up_proj.weight"), 2)
        yield f"{name}.mlp.gate_proj.weight", gate
        yield f"{name}.mlp.up_proj.weight", up
        for part in ("self_attn.o_proj", "mlp.down_proj", "input_layernorm", "post_attention_layernorm"):
            yield f"{name}.{part}.weight", layer.take(f"{part}.weight")
    yield "text.norm.weight", source.take("norm.weight")
    if not config.tie_word_embeddings:
        yield "text.lm_head.weight", source.take("lm_head.weight")
