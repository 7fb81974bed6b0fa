"""config.json of every other layout -> ours; settings that this package does not support are refused by name.

mlx-vlm and Apple's MLX exports keep Apple's settings (`model_type` "llava_qwen2"). transformers has its own
(`model_type` "fast_vlm"), with the picture's size in another file beside config.json.
"""

import math
import re
from pathlib import Path
from typing import Any

from fastvlm_mlx.config import STRIDE, Fit, ImageConfig, ModelConfig, SourceConfig, TextConfig, VisionConfig, check
from fastvlm_mlx.errors import CheckpointError, OptionError, listed, shown, warn
from fastvlm_mlx.files.jsonfile import read_table
from fastvlm_mlx.hub.licence import APPLE

# The tower's name ends in the side of its pictures, in pixels; trainers also write it as a path, of any system, of what
# it is in.
TOWER = re.compile(r"mobileclip_l_(\d{1,6})(?!\w)", re.IGNORECASE | re.ASCII)
ARCHITECTURE = "fastvit_mci3"  # timm's name of FastViTHD
FITS: tuple[Fit, ...] = ("pad", "crop")

# Settings that change what a model computes, and the only values the runtime computes.
ONLY = {
    "hidden_act": "silu",
    "mm_projector_type": "mlp2x_gelu",
    "mm_use_im_start_end": False,
    "mm_resampler_type": None,
    "s2": False,
    "use_sliding_window": False,
}
ONLY_TRANSFORMERS = {
    "projector_hidden_act": "gelu",
    "multimodal_projector_bias": True,
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "full",
}
ONLY_QWEN2 = {"model_type": "qwen2", "hidden_act": "silu", "use_sliding_window": False}
ONLY_ROPE = {"type": "default", "rope_type": "default", "factor": 1, "partial_rotary_factor": 1}
MODEL_ARGS = ("inference_mode", "layers", "embed_dims")  # of timm's tower
ONLY_PROCESSOR = {
    "image_mean": [0, 0, 0],
    "image_std": [1, 1, 1],
    "do_resize": True,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "resample": 3,
}
# Ways of a picture that other processors have, each None or as here where it is not taken.
ONLY_WAYS = {
    "do_flip_channel_order": False, "do_image_splitting": False, "crop_to_patches": False, "do_pan_and_scan": False,
    "image_grid_pinpoints": [], "min_pixels": None, "max_pixels": None, "offset": False,
}  # fmt: skip
TILES = (
    "image_grid_pinpoints",
    "image_crop_resolution",
    "image_split_resolution",
)  # for views beside the whole picture
NOT_SQUARE = "the image processor neither pads nor crops, FastVLM's pictures are square"


def check_fit(fit: str | None) -> None:
    """Raise OptionError unless `fit` is one of FITS or None (the checkpoint's own)."""
    if fit is not None and fit not in FITS:
        raise OptionError(f"`fit` is {shown(fit)}, expected 'pad' or 'crop'.")


def from_llava(
    theirs: dict[str, Any], folder: Path | None = None, *, name: str, layout: str, fit: Fit | None = None
) -> ModelConfig:
    """Read Apple's settings; raises CheckpointError naming a setting that is missing or not supported.

    `folder` is where an image processor's settings may lie, which have to agree. A `fit` that is given replaces the
    settings', which may then leave it out.
    """
    _check_only(theirs, ONLY)
    return ModelConfig(
        text=_text(theirs, tied=_flag(theirs, "tie_word_embeddings")),
        vision=_vision(_table(theirs, "vision_config"), "depths", "widths"),
        image=_llava_image(theirs, {} if folder is None else _processor(folder), fit),
        source=SourceConfig(name=name, layout=layout, license=_license(theirs)),
        eos_token_ids=_eos(theirs),
    )


def from_transformers(
    theirs: dict[str, Any], folder: Path, *, name: str, layout: str, fit: Fit | None = None
) -> ModelConfig:
    """Read transformers' settings, of current and earlier releases; raises CheckpointError as `from_llava` does.

    `folder` holds the processor's settings: the size of the picture, and whether it is padded.
    """
    text, vision = _table(theirs, "text_config"), _table(theirs, "vision_config")
    check(bool(text), "text_config is missing or empty")
    model_args = _table(vision, "model_args")
    _check_only(theirs, ONLY_TRANSFORMERS)
    _check_only(text, ONLY_QWEN2, "text_config.")
    architecture = str(vision.get("architecture")).split(".")[0]
    check(
        architecture == ARCHITECTURE,
        f"vision_config.architecture is {shown(architecture)}, FastVLM has {ARCHITECTURE!r}",
    )
    for key in model_args:
        check(key in MODEL_ARGS, f"vision_config.model_args has {shown(key)}, of which FastVLM knows nothing")
    tied = any(_flag(table, "tie_word_embeddings") for table in (theirs, text) if "tie_word_embeddings" in table)
    return ModelConfig(
        text=_text(text, tied=tied, prefix="text_config."),
        vision=_vision(model_args, "layers", "embed_dims"),
        image=_transformers_image(theirs, _processor(folder), fit),
        source=SourceConfig(name=name, layout=layout, license=_license(theirs)),
        eos_token_ids=_eos(theirs) or _eos(text),
    )


def _check_only(theirs: dict[str, Any], only: dict[str, Any], prefix: str = "") -> None:
    for key, value in only.items():
        found = theirs.get(key, value)
        right = found == value or (found is None and value is False)
        check(right, f"{prefix}{key} is {shown(found)}, FastVLM has {value!r}")


def _text(theirs: dict[str, Any], *, tied: bool, prefix: str = "") -> TextConfig:
    """The decoder's settings; messages call the table they are in `prefix`."""
    layer_types = theirs.get("layer_types") or []
    check(
        isinstance(layer_types, list) and all(layer_type == "full_attention" for layer_type in layer_types),
        f"{prefix}layer_types has others than full_attention",
    )
    try:
        return TextConfig(
            hidden_size=theirs["hidden_size"],
            num_hidden_layers=theirs["num_hidden_layers"],
            num_attention_heads=theirs["num_attention_heads"],
            num_key_value_heads=theirs["num_key_value_heads"],
            intermediate_size=theirs["intermediate_size"],
            vocab_size=theirs["vocab_size"],
            tie_word_embeddings=tied,
            rope_theta=_rope_theta(theirs, prefix),
            rms_norm_eps=_number(theirs, "rms_norm_eps"),
            max_position_embeddings=theirs["max_position_embeddings"],
        )
    except KeyError as error:
        raise _absent(error.args[0]) from error


def _rope_theta(theirs: dict[str, Any], prefix: str) -> float:
    """The base of the rotary positions, which transformers 5 has in a table.

    Raises CheckpointError for any but plain rotary positions.
    """
    found = theirs
    for key in ("rope_scaling", "rope_parameters"):
        rope = {name: value for name, value in _table(theirs, key).items() if value is not None}
        _check_only(rope, ONLY_ROPE, f"{prefix}{key}.")
        unknown = [name for name in rope if name not in (*ONLY_ROPE, "rope_theta")]
        check(not unknown, f"{prefix}{key} has {listed(unknown)}, of which FastVLM's rotary positions know nothing")
        found = rope if "rope_theta" in rope else found
    return _number(found, "rope_theta")


def _vision(theirs: dict[str, Any], depths: str, widths: str) -> VisionConfig:
    """The tower's sizes: FastViTHD's, unless these two keys give others."""
    published = VisionConfig()
    for key in (depths, widths):
        value = theirs.get(key, [])
        check(isinstance(value, list), f"{key} of the image encoder is {shown(value)}, expected a list of sizes")
    return VisionConfig(tuple(theirs.get(depths, published.depths)), tuple(theirs.get(widths, published.widths)))


def _llava_image(theirs: dict[str, Any], processor: dict[str, Any], fit: Fit | None) -> ImageConfig:
    """The picture's size, which ends the tower's name, and its fit."""
    merge, ratio = theirs.get("mm_patch_merge_type"), theirs.get("image_aspect_ratio")
    if merge not in (None, "flat"):
        raise CheckpointError(
            f"config.json: mm_patch_merge_type is {shown(merge)}, so the model was trained on pictures cut into "
            "tiles, which is not supported yet; use one with 'flat', a single view of the whole picture."
        )
    if ratio not in (None, "pad") and not (ratio == "square" and fit is not None):
        raise CheckpointError(
            f"config.json: image_aspect_ratio is {shown(ratio)}, a way of preparing pictures that is not supported "
            "yet; use a model with 'pad' (black bars make pictures square), or without the setting (they are cropped "
            "to a square)."
        )
    tower = theirs.get("mm_vision_tower", theirs.get("vision_tower"))
    sizes = TOWER.findall(tower) if isinstance(tower, str) else []
    sides = _check_processor(processor)
    if not sizes and not sides:
        raise CheckpointError(
            f"config.json: mm_vision_tower is {shown(tower)}, expected 'mobileclip_l_' and the image size, at the end "
            "of a path or alone; write it so, or fetch the file again."
        )
    size = int(sizes[-1]) if sizes else sides[0]
    check(
        all(side == size for side in sides),
        f"mm_vision_tower is {shown(tower)}, but the image processor has sides of {shown(sides)} pixels; the two have "
        "to agree",
    )
    tiles = [key for key in TILES if theirs.get(key)]
    if tiles:
        warn(f"config.json: {listed(tiles)} describes pictures cut into tiles, and is ignored: each is a single view.")
    if fit is None:
        fit = "pad" if ratio == "pad" or processor.get("do_pad") is True else "crop"
        check(fit == "pad" or processor.get("do_center_crop") is not False, NOT_SQUARE)
    return ImageConfig(size=size, fit=fit)


def _transformers_image(theirs: dict[str, Any], processor: dict[str, Any], fit: Fit | None) -> ImageConfig:
    """The picture's size and fit, from the processor's settings, or else from the number of image tokens."""
    sides = _check_processor(processor)
    tokens = theirs.get("image_seq_length", 0)
    check(
        type(tokens) is int and 0 <= tokens <= 1 << 20,
        f"image_seq_length is {shown(tokens)}, expected a number of tokens",
    )
    check(math.isqrt(tokens) ** 2 == tokens, f"image_seq_length is {tokens}, which is no square")
    size = sides[0] if sides else STRIDE * math.isqrt(tokens) or ImageConfig().size
    pad = processor.get("do_pad") is True
    check(fit is not None or pad or processor.get("do_center_crop") is not False, NOT_SQUARE)
    return ImageConfig(size=size, fit=fit or ("pad" if pad else "crop"))


def _check_processor(processor: dict[str, Any]) -> list[Any]:
    """The sides in pixels that an image processor's settings name.

    Raises CheckpointError for settings FastVLM does not have.
    """
    _check_only(processor, ONLY_PROCESSOR, "image processor: ")
    for key, value in ONLY_WAYS.items():
        found = processor.get(key)
        check(found is None or found == value, f"image processor: {key} is {shown(found)}, FastVLM has {value!r}")
    ratio = processor.get("image_aspect_ratio")
    check(ratio in (None, "pad", "square"), f"image processor: image_aspect_ratio is {shown(ratio)}, FastVLM has 'pad'")
    sides = [side for key in ("size", "crop_size", "pad_size") for side in _sides(processor.get(key))]
    check(
        all(side == sides[0] for side in sides),
        f"the image processor has sides of {shown(sides)} pixels, FastVLM's are one",
    )
    return sides


def _processor(folder: Path) -> dict[str, Any]:
    """The image processor's settings, from its own file or the processor's; empty where there is neither."""
    if (folder / "preprocessor_config.json").exists():
        return read_table(folder / "preprocessor_config.json")
    if (folder / "processor_config.json").exists():
        return _table(read_table(folder / "processor_config.json"), "image_processor")
    return {}


def _sides(size: object) -> list[Any]:
    """The sides that an image processor's `size` or `crop_size` names."""
    if isinstance(size, dict):
        return [side for side in size.values() if side is not None]
    return [] if size is None else [size]


def _license(theirs: dict[str, Any]) -> str:
    """Apple's licence, unless the config names another."""
    stated = theirs.get("license", APPLE)
    check(isinstance(stated, str), f"license is {shown(stated)}, expected a name")
    return str(stated)


def _table(theirs: dict[str, Any], key: str) -> dict[str, Any]:
    """A table within a table, empty where it is missing."""
    table = theirs.get(key) or {}
    check(isinstance(table, dict), f"{key} is {shown(table)}, expected a table")
    return dict(table)


def _flag(table: dict[str, Any], key: str) -> bool:
    if key not in table:
        raise _absent(key)
    check(isinstance(table[key], bool), f"{key} is {shown(table[key])}, expected true or false")
    return bool(table[key])


def _number(table: dict[str, Any], key: str) -> float:
    if key not in table:
        raise _absent(key)
    value = table[key]
    right = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 1e12
    check(right, f"{key} is {shown(value)}, expected a positive number")
    return float(value)


def _absent(key: str) -> CheckpointError:
    return CheckpointError(f"config.json: no {key!r} in it; fetch the file again.")


def _eos(theirs: dict[str, Any]) -> tuple[int, ...]:
    ids = theirs.get("eos_token_id")
    return () if ids is None else tuple(ids) if isinstance(ids, list) else (ids,)
