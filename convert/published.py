"""The published form: names and shapes of every tensor, from the sizes in the config.

Names are Apple's for the reparameterised tower (apple/ml-fastvlm at 592b4ad), under `vision.`, `projector.` and
`text.`.
"""

from collections.abc import Callable

from fastvlm_mlx.config import ATTENTION_STAGES, ModelConfig, TextConfig, VisionConfig
from fastvlm_mlx.errors import CheckpointError, listed
from fastvlm_mlx.network.vision import SE_RATIO

Shapes = dict[str, tuple[int, ...]]
VOCAB_MATRICES = ("text.embed_tokens.weight", "text.lm_head.weight")  # one per token


def network_indices(stages: int) -> list[tuple[int, int, int]]:
    """Per stage, the indices in Apple's `network` of its downsampler, its positions (RepCPE) and its blocks.

    -1 stands for a member that the stage does not have.
    """
    rows, index = [], 0
    for stage in range(stages):
        downsample = position = -1
        if stage > 0:
            downsample, index = index, index + 1
        if stage in ATTENTION_STAGES:
            position, index = index, index + 1
        rows.append((downsample, position, index))
        index += 1
    return rows


def shapes(config: ModelConfig) -> Shapes:
    """The shape of every tensor of the published form; `text.lm_head.weight` is one only where it is not tied."""
    return {**_tower(config.vision), **_projector(config), **_decoder(config.text)}


def check(found: Shapes, config: ModelConfig, source_name: Callable[[str], str]) -> None:
    """Raise CheckpointError, in the checkpoint's names, unless `found` is exactly what the config calls for."""
    expected = shapes(config)
    missing = [source_name(name) for name in expected if name not in found]
    if missing:
        raise CheckpointError(f"tensors {listed(missing)} are missing; fetch the checkpoint again.")
    surplus = [source_name(name) for name in found if name not in expected]
    if surplus:
        raise CheckpointError(
            f"tensors {listed(surplus)} are more than config.json's sizes call for; do the two belong together?"
        )
    for name, shape in expected.items():
        if found[name] != shape and name in VOCAB_MATRICES and found[name][1:] == shape[1:]:
            raise CheckpointError(
                f"{source_name(name)!r} has {found[name][0]} rows, config.json says vocab_size {shape[0]}; where "
                f"training has resized the embedding, write {found[name][0]} there."
            )
        if found[name] != shape:
            raise CheckpointError(
                f"{source_name(name)!r} has shape {found[name]}, config.json calls for {shape}; do the two belong "
                "together?"
            )


def _conv(name: str, out: int, per_group: int, kernel: int, *, bias: bool = True) -> Shapes:
    weight: Shapes = {f"{name}.weight": (out, per_group, kernel, kernel)}
    return weight | {f"{name}.bias": (out,)} if bias else weight


def _tower(config: VisionConfig) -> Shapes:
    first = config.widths[0]
    out = {
        **_conv("patch_embed.0.reparam_conv", first, 3, 3),
        **_conv("patch_embed.1.reparam_conv", first, 1, 3),
        **_conv("patch_embed.2.reparam_conv", first, first, 1),
    }
    for stage, (downsample, position, blocks) in enumerate(network_indices(len(config.widths))):
        width = config.widths[stage]
        if downsample >= 0:
            out |= _conv(f"network.{downsample}.proj.0.lkb_reparam", width, 1, 7)
            out |= _conv(f"network.{downsample}.proj.1.reparam_conv", width, width, 1)
        if position >= 0:
            out |= _conv(f"network.{position}.reparam_conv", width, 1, 7)
        for block in range(config.depths[stage]):
            out |= _block(f"network.{blocks}.{block}", width, config.mlp_ratio, attention=stage in ATTENTION_STAGES)
    wide = config.out_width
    out |= _conv("conv_exp.reparam_conv", wide, 1, 3)
    out |= _conv("conv_exp.se.reduce", wide // SE_RATIO, wide, 1)
    out |= _conv("conv_exp.se.expand", wide, wide // SE_RATIO, 1)
    return {f"vision.{name}": shape for name, shape in out.items()}


def _block(name: str, width: int, ratio: int, *, attention: bool) -> Shapes:
    out = _conv(f"{name}.convffn.conv.conv", width, 1, 7, bias=False)
    out |= {f"{name}.convffn.conv.bn.{part}": (width,) for part in ("weight", "bias", "running_mean", "running_var")}
    out |= _conv(f"{name}.convffn.fc1", ratio * width, width, 1) | _conv(f"{name}.convffn.fc2", width, ratio * width, 1)
    if not attention:
        return out | {f"{name}.layer_scale": (width, 1, 1)} | _conv(f"{name}.token_mixer.reparam_conv", width, 1, 3)
    return out | {
        f"{name}.layer_scale_1": (width, 1, 1),
        f"{name}.layer_scale_2": (width, 1, 1),
        f"{name}.norm.weight": (width,),
        f"{name}.norm.bias": (width,),
        f"{name}.token_mixer.qkv.weight": (3 * width, width),
        f"{name}.token_mixer.proj.weight": (width, width),
        f"{name}.token_mixer.proj.bias": (width,),
    }


def _projector(config: ModelConfig) -> Shapes:
    wide, hidden = config.vision.out_width, config.text.hidden_size
    return {
        "projector.linear_1.weight": (hidden, wide),
        "projector.linear_1.bias": (hidden,),
        "projector.linear_2.weight": (hidden, hidden),
        "projector.linear_2.bias": (hidden,),
    }


def _decoder(config: TextConfig) -> Shapes:
    hidden, inner = config.hidden_size, config.intermediate_size
    kv = config.num_key_value_heads * config.head_dim
    out: Shapes = {"embed_tokens.weight": (config.vocab_size, hidden), "norm.weight": (hidden,)}
    if not config.tie_word_embeddings:
        out["lm_head.weight"] = (config.vocab_size, hidden)
    for i in range(config.num_hidden_layers):
        out |= {f"layers.{i}.{norm}.weight": (hidden,) for norm in ("input_layernorm", "post_attention_layernorm")}
        for name, rows in (("q", hidden), ("k", kv), ("v", kv)):
            out[f"layers.{i}.self_attn.{name}_proj.weight"] = (rows, hidden)
            out[f"layers.{i}.self_attn.{name}_proj.bias"] = (rows,)
        out[f"layers.{i}.self_attn.o_proj.weight"] = (hidden, hidden)
        out[f"layers.{i}.mlp.gate_proj.weight"] = out[f"layers.{i}.mlp.up_proj.weight"] = (inner, hidden)
        out[f"layers.{i}.mlp.down_proj.weight"] = (hidden, inner)
    return {f"text.{name}": shape for name, shape in out.items()}
