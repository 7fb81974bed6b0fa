"""The names and shapes of Apple's checkpoints, written out here once more from what was published, against our
tables."""

from dataclasses import replace
from pathlib import Path

import pytest

from fastvlm_mlx.config import ModelConfig
from fastvlm_mlx.convert import published
from fastvlm_mlx.convert.key_map import match, recognise, source_name
from fastvlm_mlx.diagnostics.random_model import config as published_config
from fastvlm_mlx.errors import CheckpointError

TOWER = "model.vision_tower.vision_tower.model."
Shapes = dict[str, tuple[int, ...]]


def block(prefix: str, c: int, attention: bool) -> Shapes:
    out: Shapes = {
        "convffn.conv.conv.weight": (c, 1, 7, 7), "convffn.conv.bn.num_batches_tracked": (),
        **{f"convffn.conv.bn.{name}": (c,) for name in ("weight", "bias", "running_mean", "running_var")},
        "convffn.fc1.weight": (4 * c, c, 1, 1), "convffn.fc1.bias": (4 * c,),
        "convffn.fc2.weight": (c, 4 * c, 1, 1), "convffn.fc2.bias": (c,),
    }  # fmt: skip
    if attention:
        out |= {
            "layer_scale_1": (c, 1, 1), "layer_scale_2": (c, 1, 1), "norm.weight": (c,), "norm.bias": (c,),
            "token_mixer.qkv.weight": (3 * c, c), "token_mixer.proj.weight": (c, c), "token_mixer.proj.bias": (c,),
        }  # fmt: skip
    else:
        out |= {"layer_scale": (c, 1, 1)}
        out |= {"token_mixer.reparam_conv.weight": (c, 1, 3, 3), "token_mixer.reparam_conv.bias": (c,)}
    return {prefix + name: shape for name, shape in out.items()}


def apples(hidden: int, layers: int, kv: int, inner: int, vocab: int) -> Shapes:
    """What a published safetensors header says, by name and shape."""
    out: Shapes = {
        "patch_embed.0.reparam_conv.weight": (96, 3, 3, 3), "patch_embed.0.reparam_conv.bias": (96,),
        "patch_embed.1.reparam_conv.weight": (96, 1, 3, 3), "patch_embed.1.reparam_conv.bias": (96,),
        "patch_embed.2.reparam_conv.weight": (96, 96, 1, 1), "patch_embed.2.reparam_conv.bias": (96,),
        "conv_exp.reparam_conv.weight": (3072, 1, 3, 3), "conv_exp.reparam_conv.bias": (3072,),
        "conv_exp.se.reduce.weight": (192, 3072, 1, 1), "conv_exp.se.reduce.bias": (192,),
        "conv_exp.se.expand.weight": (3072, 192, 1, 1), "conv_exp.se.expand.bias": (3072,),
        "head.proj": (3072, 768),
    }  # fmt: skip
    for index, depth, c in ((0, 2, 96), (2, 12, 192), (4, 24, 384), (7, 4, 768), (10, 2, 1536)):
        for b in range(depth):
            out |= block(f"network.{index}.{b}.", c, index >= 7)
    for index, c in ((1, 192), (3, 384), (5, 768), (8, 1536)):
        out |= {
            f"network.{index}.proj.0.lkb_reparam.weight": (c, 1, 7, 7),
            f"network.{index}.proj.0.lkb_reparam.bias": (c,),
        }
        out |= {
            f"network.{index}.proj.1.reparam_conv.weight": (c, c, 1, 1),
            f"network.{index}.proj.1.reparam_conv.bias": (c,),
        }
    for index, c in ((6, 768), (9, 1536)):
        out |= {f"network.{index}.reparam_conv.weight": (c, 1, 7, 7), f"network.{index}.reparam_conv.bias": (c,)}
    out = {TOWER + name: shape for name, shape in out.items()}
    out |= {"model.mm_projector.0.weight": (hidden, 3072), "model.mm_projector.0.bias": (hidden,)}
    out |= {"model.mm_projector.2.weight": (hidden, hidden), "model.mm_projector.2.bias": (hidden,)}
    out |= {
        "model.embed_tokens.weight": (vocab, hidden),
        "lm_head.weight": (vocab, hidden),
        "model.norm.weight": (hidden,),
    }
    for i in range(layers):
        layer: Shapes = {
            "input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,),
            "self_attn.q_proj.weight": (hidden, hidden), "self_attn.q_proj.bias": (hidden,),
            "self_attn.k_proj.weight": (kv, hidden), "self_attn.k_proj.bias": (kv,),
            "self_attn.v_proj.weight": (kv, hidden), "self_attn.v_proj.bias": (kv,),
            "self_attn.o_proj.weight": (hidden, hidden), "mlp.gate_proj.weight": (inner, hidden),
            "mlp.up_proj.weight": (inner, hidden), "mlp.down_proj.weight": (hidden, inner),
        }  # fmt: skip
        out |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    return out


SIZES = {
    "0.5b": (896, 24, 128, 4864, 151936),
    "1.5b": (1536, 28, 256, 8960, 151936),
    "7b": (3584, 28, 512, 18944, 152064),
}


def test_counts() -> None:
    header = apples(*SIZES["0.5b"])
    assert len(header) == 924
    assert sum(name.startswith(TOWER) for name in header) == 629


@pytest.mark.parametrize("size", SIZES)
def test_every_published_name_finds_its_row_and_every_shape_fits(size: str) -> None:
    header = apples(*SIZES[size])
    assert recognise(header) == "llava"
    plan = match(header, "llava")
    assert len(plan.renames) + len(plan.drops) == len(header) and not plan.merges
    config: ModelConfig = published_config(size)
    config = replace(config, text=replace(config.text, tie_word_embeddings=False))  # the head is stored in every size
    published.check({target: header[source] for target, (source, _) in plan.renames.items()}, config, lambda name: name)
    assert all(plan.renames[target].source == source_name(target, "llava") for target in plan.renames)


@pytest.mark.parametrize("name", ["model.layers.3.self_attn.k_proj.bias", TOWER + "network.7.2.layer_scale_1"])
def test_a_name_left_out_or_misspelt_does_not_pass(name: str, tmp_path: Path) -> None:
    header = apples(*SIZES["0.5b"])
    shape = header.pop(name)
    plan = match(header, "llava")
    config = published_config("0.5b")
    config = replace(config, text=replace(config.text, tie_word_embeddings=False))
    with pytest.raises(CheckpointError, match="missing"):
        published.check(
            {t: header[s] for t, (s, _) in plan.renames.items()}, config, lambda target: source_name(target, "llava")
        )
    with pytest.raises(CheckpointError, match="unknown name"):
        match(header | {name.replace("weight", "wieght").replace("bias", "bais") + ".x": shape}, "llava")
