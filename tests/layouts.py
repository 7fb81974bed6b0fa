"""Folders of every other layout, made from one of Apple's: the same weights under the names, in the order and in the
types that transformers, mlx-vlm and Apple's export for its app write them. Written out by hand, not by the tables that
are tested.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx

from fastvlm_mlx.convert.key_map import APPLE_TOWER

from . import checkpoint
from .checkpoint import Arrays

Bits = Callable[[str], dict[str, Any] | None]  # a layer's path -> how it is quantised, if it is


def transformers(apple: Path, out: Path, **settings: Any) -> Path:
    """As transformers' save_pretrained does: timm's names in stages, no head where it is tied."""
    theirs = json.loads((apple / "config.json").read_text())
    weights = {_timm(name): array for name, array in checkpoint.read(apple).items() if not name.endswith("head.proj")}
    if theirs["tie_word_embeddings"]:
        del weights["lm_head.weight"]
    text = {name: theirs[name] for name in (*checkpoint.TEXT, "vocab_size", "rms_norm_eps", "hidden_act")}
    text |= {"model_type": "qwen2", "rope_parameters": {"rope_theta": theirs["rope_theta"], "rope_type": "default"}}
    text |= {
        "layer_types": ["full_attention"] * theirs["num_hidden_layers"],
        "use_sliding_window": False,
        "eos_token_id": None,
    }
    args = {
        "inference_mode": True,
        "layers": theirs["vision_config"]["depths"],
        "embed_dims": theirs["vision_config"]["widths"],
    }
    config = {
        "model_type": "fast_vlm", "architectures": ["FastVlmForConditionalGeneration"], "dtype": "bfloat16",
        "image_token_index": 5, "image_seq_length": 4, "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": -1, "vision_feature_select_strategy": "full",
        "tie_word_embeddings": theirs["tie_word_embeddings"],
        "text_config": text, "vision_config":
        {"model_type": "timm_wrapper", "architecture": "fastvit_mci3", "model_args": args},
    }  # fmt: skip
    return _write(apple, out, weights, config | settings, "pt")


def mlx_vlm(apple: Path, out: Path, bits: Bits | None = None, **settings: Any) -> Path:
    """As mlx-vlm's convert does: kernels (O, k, k, I), layer scales (1, 1, C), an index also for a single file."""
    theirs = json.loads((apple / "config.json").read_text())
    weights = {}
    for name, array in checkpoint.read(apple).items():
        if name.endswith("num_batches_tracked") or (name == "lm_head.weight" and theirs["tie_word_embeddings"]):
            continue
        if name.startswith(APPLE_TOWER) and array.ndim == 4:
            array = array.transpose(0, 2, 3, 1)
        elif "layer_scale" in name:
            array = array.transpose(1, 2, 0)
        name = mlx_vlm_name(name)
        weights[name] = mx.contiguous(array)
    del theirs["torch_dtype"]
    quantization = _quantize(weights, bits)
    _write(apple, out, weights, theirs | quantization | settings, "mlx")
    index = {"metadata": {"total_size": 0}, "weight_map": dict.fromkeys(sorted(weights), "model.safetensors")}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    return out


def mlx_vlm_name(name: str) -> str:
    """Apple's name as mlx-vlm has it."""
    if name.startswith(APPLE_TOWER):
        return "vision_tower.vision_model." + name.removeprefix(APPLE_TOWER).replace(
            "patch_embed.", "patch_embed.blocks."
        )
    return name.removeprefix("model.") if "mm_projector" in name else f"language_model.{name}"


def apple_mlx(apple: Path, out: Path, bits: Bits | None = None, **settings: Any) -> Path:
    """As Apple's patched mlx-vlm exports the decoder and the projector for its app."""
    theirs = json.loads((apple / "config.json").read_text())
    weights = {}
    for name, array in checkpoint.read(apple).items():
        if name.startswith(APPLE_TOWER) or (name == "lm_head.weight" and theirs["tie_word_embeddings"]):
            continue
        projector = name.startswith("model.mm_projector.")
        name = (
            name.replace("model.mm_projector.", "multi_modal_projector.linear_")
            if projector
            else f"language_model.{name}"
        )
        weights[name] = array
    return _write(apple, out, weights, theirs | _quantize(weights, bits) | {"image_token_index": 5} | settings, "mlx")


def alike(bits: int = 4, group_size: int = 64, mode: str = "affine") -> Bits:
    """Every linear layer outside the tower in the same way."""
    how = {"bits": bits, "group_size": group_size, "mode": mode}
    return lambda path: None if path.startswith("vision_tower") else how


def whole(path: str) -> dict[str, Any] | None:
    """The tower's attention too."""
    return {"bits": 8, "group_size": 32, "mode": "affine"} if "head.proj" not in path else None


def mixed(path: str) -> dict[str, Any] | None:
    """The first layer's value projection in more bits, as mlx-vlm's mixed recipes have it."""
    return alike(6 if "layers.0.self_attn.v_proj" in path else 4)(path)


def _quantize(weights: Arrays, bits: Bits | None) -> dict[str, Any]:
    """Quantise linear layers and embeddings in place; returns what config.json says of it."""
    if bits is None:
        return {}
    usual = bits("")
    assert usual is not None
    table: dict[str, Any] = dict(usual)
    for name in [name for name, array in weights.items() if array.ndim == 2 and name.endswith(".weight")]:
        path = name.removesuffix(".weight")
        how = bits(path)
        if how is None:
            continue
        parts = mx.quantize(weights[name], **how)
        weights |= {f"{path}.{part}": array for part, array in zip(("weight", "scales", "biases"), parts, strict=False)}
        if how != usual:
            table[path] = how
    return {"quantization": table, "quantization_config": table}


def _write(apple: Path, out: Path, weights: Arrays, config: dict[str, Any], kind: str) -> Path:
    out.mkdir(parents=True)
    for file in apple.iterdir():
        if file.suffix != ".safetensors" and file.name != "config.json":
            (out / file.name).write_bytes(file.read_bytes())
    (out / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(out / "model.safetensors"), weights, metadata={"format": kind})
    return out


def _timm(name: str) -> str:
    """Apple's name as transformers has it."""
    name = re.sub(r"^model\.(layers|embed_tokens|norm)\.", r"model.language_model.\1.", name)
    name = name.replace("model.mm_projector.0", "model.multi_modal_projector.linear_1")
    name = name.replace("model.mm_projector.2", "model.multi_modal_projector.linear_2")
    if not name.startswith(APPLE_TOWER):
        return name
    name = name.removeprefix(APPLE_TOWER)
    for network, stage in enumerate(("0.blocks", "1.downsample", "1.blocks", "2.downsample", "2.blocks", "3.downsample",
                                     "3.pos_emb", "3.blocks", "4.downsample", "4.pos_emb", "4.blocks")):  # fmt: skip
        name = re.sub(rf"^network\.{network}\.", f"stages.{stage}.", name)
    name = re.sub(r"(layer_scale(_\d)?)$", r"\1.gamma", name)
    for apples, timms in (("patch_embed", "stem"), ("conv_exp", "final_conv"), ("se.reduce", "se.fc1"),
                          ("se.expand", "se.fc2"),
                          ("convffn", "mlp"), ("lkb_reparam", "reparam_conv")):  # fmt: skip
        name = name.replace(apples, timms)
    return "model.vision_tower.timm_model." + name


# Each layout under the name that parametrised tests give it.
WRITERS: dict[str, Callable[[Path, Path], Path]] = {
    "transformers": transformers,
    "mlx-vlm": mlx_vlm,
    "mlx-vlm quantised": lambda apple, out: mlx_vlm(apple, out, alike(4, 32)),
    "apple-mlx": apple_mlx,
}
