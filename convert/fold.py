"""Published form -> ours: everything that is constant at inference is folded into its neighbours, once, in float32.

- A ConvFFN's batch norm: its scale into the 7x7 weights, its shift through fc1 into fc1's bias. Both are exact, as no
  padding lies between the norm and fc1.
- Layer scales: into the rows of fc2 and of the attention's output projection.
- 1x1 convolutions become linear layers; kernels get MLX's order of axes (O, k, k, I).
- A convolution with r outputs per channel becomes r depthwise ones. Its outputs then come filter by filter instead of
  channel by channel, and the columns of the layer that reads them are put in that order.
- Query, key and value projections are stacked, and so are gate and up; quantised ones stay quantised.
"""

from collections.abc import Iterator

import mlx.core as mx

from fastvlm_mlx.config import ATTENTION_STAGES, ModelConfig, VisionConfig
from fastvlm_mlx.errors import listed

from .branches import batch_norm
from .packed import PARTS
from .published import network_indices

Named = Iterator[tuple[str, mx.array]]


class Tensors:
    """Tensors under a prefix, each given out once."""

    def __init__(self, tensors: dict[str, mx.array], prefix: str):
        self.tensors, self.prefix = tensors, prefix

    def take(self, name: str) -> mx.array:
        """Remove and return a tensor, so that its memory is freed as soon as the caller is done."""
        return self.tensors.pop(f"{self.prefix}.{name}")

    def exactly(self, name: str) -> mx.array:
        """Remove and return a tensor in float32, for computing with it."""
        return self.take(name).astype(mx.float32)

    def parts(self, name: str) -> list[str]:
        """The last parts of the names of a linear layer's tensors.

        These are weight, with scales and biases where it is quantised, and bias where it has one.
        """
        return [part for part in (*PARTS, "bias") if f"{self.prefix}.{name}.{part}" in self.tensors]

    def under(self, name: str) -> "Tensors":
        """The tensors below a further prefix."""
        return Tensors(self.tensors, f"{self.prefix}.{name}")


def fold(tensors: dict[str, mx.array], config: ModelConfig) -> Named:
    """Yield our tensors by name, unevaluated, in float32 where something was folded.

    Empties `tensors`, whose names and shapes have been checked.
    """
    yield from _tower(Tensors(tensors, "vision"), config.vision)
    yield from _projector(Tensors(tensors, "projector"))
    yield from _decoder(Tensors(tensors, "text"), config.text.num_hidden_layers, config.text.tie_word_embeddings)
    if tensors:
        raise AssertionError(f"folding left over {listed(tensors)}")


def _tower(source: Tensors, config: VisionConfig) -> Named:
    yield "vision.patch_embed.conv.weight", source.take("patch_embed.0.reparam_conv.weight").transpose(0, 2, 3, 1)
    yield "vision.patch_embed.conv.bias", source.take("patch_embed.0.reparam_conv.bias")
    yield from _depthwise(source.under("patch_embed.1.reparam_conv"), "vision.patch_embed.depthwise")
    yield from _linear(source.under("patch_embed.2.reparam_conv"), "vision.patch_embed.linear")
    for stage, (downsample, position, blocks) in enumerate(network_indices(len(config.widths))):
        ours = f"vision.stages.{stage}"
        if downsample >= 0:
            widen = config.widths[stage] // config.widths[stage - 1]
            yield from _downsample(source.under(f"network.{downsample}.proj"), f"{ours}.downsample", widen)
        if position >= 0:
            yield from _depthwise(source.under(f"network.{position}.reparam_conv"), f"{ours}.position")
        for i in range(config.depths[stage]):
            block = source.under(f"network.{blocks}.{i}")
            if stage in ATTENTION_STAGES:
                yield from _attention(block, f"{ours}.blocks.{i}")
                yield from _convffn(
                    block.under("convffn"), block.exactly("layer_scale_2"), f"{ours}.blocks.{i}.convffn"
                )
            else:
                yield from _depthwise(block.under("token_mixer.reparam_conv"), f"{ours}.blocks.{i}.token_mixer")
                yield from _convffn(block.under("convffn"), block.exactly("layer_scale"), f"{ours}.blocks.{i}.convffn")
    yield from _conv_exp(source.under("conv_exp"))


def _linear(source: Tensors, ours: str) -> Named:
    """A 1x1 convolution (O, I, 1, 1) with bias."""
    yield f"{ours}.weight", source.take("weight").squeeze((2, 3))
    yield f"{ours}.bias", source.take("bias")


def _depthwise(source: Tensors, ours: str) -> Named:
    yield f"{ours}.weight", source.take("weight").transpose(0, 2, 3, 1)
    yield f"{ours}.bias", source.take("bias")


def _groups(source: Tensors, ours: str, widen: int) -> Named:
    """A convolution with `widen` outputs per channel, output c * widen + j being filter j of channel c."""
    weight, bias = source.take("weight").transpose(0, 2, 3, 1), source.take("bias")
    for j in range(widen):
        yield f"{ours}.filters.{j}.weight", weight[j::widen]
        yield f"{ours}.filters.{j}.bias", bias[j::widen]


def by_filter(x: mx.array, axis: int, widen: int = 2) -> mx.array:
    """Reorder an axis from channel by channel (the input of `_groups`) to filter by filter (its output)."""
    return x[tuple([slice(None)] * axis + [mx.arange(x.shape[axis]).reshape(-1, widen).T.reshape(-1)])]


def _downsample(source: Tensors, ours: str, widen: int) -> Named:
    yield from _groups(source.under("0.lkb_reparam"), f"{ours}.groups", widen)
    yield f"{ours}.linear.weight", by_filter(source.take("1.reparam_conv.weight").squeeze((2, 3)), 1, widen)
    yield f"{ours}.linear.bias", source.take("1.reparam_conv.bias")


def _convffn(source: Tensors, layer_scale: mx.array, ours: str) -> Named:
    scale, shift = batch_norm(
        {name: source.take(f"conv.bn.{name}") for name in ("weight", "bias", "running_mean", "running_var")}
    )
    yield f"{ours}.conv.weight", source.exactly("conv.conv.weight").transpose(0, 2, 3, 1) * scale[:, None, None, None]
    fc1 = source.exactly("fc1.weight").squeeze((2, 3))
    yield f"{ours}.fc1.bias", source.exactly("fc1.bias") + fc1 @ shift
    yield f"{ours}.fc1.weight", fc1
    layer_scale = layer_scale.reshape(-1)
    yield f"{ours}.fc2.weight", source.exactly("fc2.weight").squeeze((2, 3)) * layer_scale[:, None]
    yield f"{ours}.fc2.bias", source.exactly("fc2.bias") * layer_scale


def _attention(source: Tensors, ours: str) -> Named:
    layer_scale = source.exactly("layer_scale_1").reshape(-1)
    yield f"{ours}.norm.weight", source.take("norm.weight")
    yield f"{ours}.norm.bias", source.take("norm.bias")
    yield f"{ours}.token_mixer.qkv.weight", source.take("token_mixer.qkv.weight")
    yield f"{ours}.token_mixer.proj.weight", source.exactly("token_mixer.proj.weight") * layer_scale[:, None]
    yield f"{ours}.token_mixer.proj.bias", source.exactly("token_mixer.proj.bias") * layer_scale


def _conv_exp(source: Tensors) -> Named:
    ours = "vision.conv_exp"
    yield from _groups(source.under("reparam_conv"), f"{ours}.groups", 2)
    yield f"{ours}.reduce.weight", by_filter(source.take("se.reduce.weight").squeeze((2, 3)), 1)
    yield f"{ours}.reduce.bias", source.take("se.reduce.bias")
    yield f"{ours}.expand.weight", by_filter(source.take("se.expand.weight").squeeze((2, 3)), 0)
    yield f"{ours}.expand.bias", by_filter(source.take("se.expand.bias"), 0)


def _moved(source: Tensors, name: str, ours: str) -> Named:
    """A layer unchanged, quantised or not."""
    for part in source.parts(name):
        yield f"{ours}.{part}", source.take(f"{name}.{part}")


def _stacked(source: Tensors, names: list[str], ours: str) -> Named:
    """Layers with the same inputs as one layer, quantised or not: their rows one after another."""
    for part in source.parts(names[0]):
        yield f"{ours}.{part}", mx.concatenate([source.take(f"{name}.{part}") for name in names])


def _projector(source: Tensors) -> Named:
    yield "projector.linear_1.weight", by_filter(source.take("linear_1.weight"), 1)
    yield "projector.linear_1.bias", source.take("linear_1.bias")
    yield from _moved(source, "linear_2", "projector.linear_2")


def _decoder(source: Tensors, layers: int, tied: bool) -> Named:
    yield from _moved(source, "embed_tokens", "text.embed_tokens")
    for i in range(layers):
        layer, ours = source.under(f"layers.{i}"), f"text.layers.{i}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{ours}.{norm}.weight", layer.take(f"{norm}.weight")
        yield from _stacked(layer, [f"self_attn.{n}_proj" for n in "qkv"], f"{ours}.self_attn.qkv_proj")
        yield from _moved(layer, "self_attn.o_proj", f"{ours}.self_attn.o_proj")
        yield from _stacked(layer, ["mlp.gate_proj", "mlp.up_proj"], f"{ours}.mlp.gate_up_proj")
        yield from _moved(layer, "mlp.down_proj", f"{ours}.mlp.down_proj")
    yield "text.norm.weight", source.take("norm.weight")
    if not tied:
        yield from _moved(source, "lm_head", "text.lm_head")
