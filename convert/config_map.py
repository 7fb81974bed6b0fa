"""Apple's config.json (`model_type` "llava_qwen2") -> ours. What the runtime does not do is refused here, by name."""

import re
from typing import Any

from fastvlm_mlx.config import Fit, ImageConfig, ModelConfig, SourceConfig, TextConfig, VisionConfig, check
from fastvlm_mlx.errors import CheckpointError, shown
from fastvlm_mlx.licence import APPLE

LICENSE = APPLE
TOWER = re.compile(r"mobileclip_l_(\d+)")

# Settings that change what a model computes, and the only values the runtime computes.
ONLY = {
    "hidden_act": "silu",
    "mm_projector_type": "mlp2x_gelu",
    "mm_use_im_start_end": False,
    "mm_use_im_patch_token": False,
    "rope_scaling": None,
    "use_sliding_window": False,
}


def from_llava(theirs: dict[str, Any], *, name: str, layout: str) -> ModelConfig:
    """Read Apple's settings; raises CheckpointError naming a setting that is missing or that FastVLM does not have."""
    for key, value in ONLY.items():
        check(theirs.get(key, value) == value, f"{key} is {shown(theirs.get(key))}, FastVLM has {value!r}")
    tower = str(theirs.get("mm_vision_tower"))
    size = TOWER.fullmatch(tower.rsplit("/", 1)[-1])
    if size is None:
        raise CheckpointError(
            f"config.json: mm_vision_tower is {shown(tower)}, expected 'mobileclip_l_' and the image size; fetch the file again."
        )
    fit: Fit = "pad" if theirs.get("image_aspect_ratio") == "pad" else "crop"
    vision = theirs.get("vision_config") or {}
    check(isinstance(vision, dict), "vision_config is not a table")
    for key in ("depths", "widths"):
        check(isinstance(vision.get(key, []), list), f"vision_config.{key} is {shown(vision.get(key))}, expected a list of sizes")
    published = VisionConfig()
    depths, widths = (tuple(vision.get(key, getattr(published, key))) for key in ("depths", "widths"))
    try:
        text = TextConfig(
            hidden_size=theirs["hidden_size"],
            num_hidden_layers=theirs["num_hidden_layers"],
            num_attention_heads=theirs["num_attention_heads"],
            num_key_value_heads=theirs["num_key_value_heads"],
            intermediate_size=theirs["intermediate_size"],
            vocab_size=theirs["vocab_size"],
            tie_word_embeddings=_flag(theirs, "tie_word_embeddings"),
            rope_theta=_number(theirs, "rope_theta"),
            rms_norm_eps=_number(theirs, "rms_norm_eps"),
            max_position_embeddings=theirs["max_position_embeddings"],
        )
    except KeyError as error:
        raise CheckpointError(f"config.json: no {error.args[0]!r} in it; fetch the file again.") from error
    return ModelConfig(
        text=text,
        vision=VisionConfig(depths, widths),
        image=ImageConfig(size=int(size[1]), fit=fit),
        source=SourceConfig(name=name, layout=layout, license=_license(theirs)),
        eos_token_ids=_eos(theirs),
    )


def _license(theirs: dict[str, Any]) -> str:
    """Apple's, unless the config says it is not."""
    stated = theirs.get("license", LICENSE)
    check(isinstance(stated, str), f"license is {shown(stated)}, expected a name")
    return str(stated)


def _flag(table: dict[str, Any], key: str) -> bool:
    check(isinstance(table[key], bool), f"{key} is {shown(table[key])}, expected true or false")
    return bool(table[key])


def _number(table: dict[str, Any], key: str) -> float:
    value = table[key]
    right = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 1e12
    check(right, f"{key} is {shown(value)}, expected a positive number")
    return float(value)


def _eos(theirs: dict[str, Any]) -> tuple[int, ...]:
    ids = theirs.get("eos_token_id")
    return () if ids is None else tuple(ids) if isinstance(ids, list) else (ids,)
