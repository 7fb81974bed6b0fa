"""A model as a folder for MLX's other programs: mlx-vlm (and mlx-swift-lm), or its decoder alone for mlx-lm.

config.json  model.safetensors (or shards)  tokenizer.json  tokenizer_config.json  README.md  LICENSE  report.json
report.md, and for mlx-vlm preprocessor_config.json, processor_config.json and generation_config.json
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx

from ..config import ATTENTION_STAGES, STRIDE, Dtype, ModelConfig, QuantConfig, VisionConfig, check_dtype
from ..convert import export as transformers
from ..convert.card import licence_text, mlx_card
from ..convert.key_map import MLX_VLM_TOWER, source_name
from ..convert.pipeline import check_place
from ..convert.published import shapes
from ..convert.unfold import unfold
from ..errors import CheckpointError, OptionError, listed, shown
from ..hub.licence import announce
from ..quantize.recipes import BITS, DEFAULT_GROUP, GROUP_SIZES
from ..quantize.rounding import quantized, scale_type
from ..storage.fill import check_finite
from ..storage.open import OpenModel
from ..storage.place import check_target, new_folder
from ..storage.save import save_weights
from .report import EXPORT, NAME, Report, Section
from .targets import Progress

Program = Literal["mlx-vlm", "mlx-lm"]
PREFIX = {"mlx-vlm": "language_model.model.", "mlx-lm": "model."}  # of the decoder's tensors
HEAD = {"mlx-vlm": "language_model.lm_head.", "mlx-lm": "lm_head."}
HEAD_CHANNELS = 768  # of the pooled head that mlx-vlm has a place for and does not use
IMAGE_TOKEN = -200  # that mlx-vlm puts where the picture stands


@dataclass(frozen=True)
class FolderOptions:
    """How a folder is written; raises OptionError for an option outside its range.

    `dtype` is the type of what is not quantised, None for the model's own. `bits` quantise every matrix of the decoder
    alike, in groups of `group_size`; None leaves them as they are.
    """

    dtype: Dtype | None = None
    bits: int | None = None
    group_size: int = DEFAULT_GROUP

    def __post_init__(self) -> None:
        check_dtype(self.dtype)
        if self.bits is not None and (isinstance(self.bits, bool) or self.bits not in BITS):
            raise OptionError(f"`bits` is {shown(self.bits)}, expected one of {listed(BITS)}.")
        if self.group_size not in GROUP_SIZES:
            raise OptionError(f"`group_size` is {shown(self.group_size)}, expected one of {listed(GROUP_SIZES)}.")

    @property
    def quantization(self) -> QuantConfig | None:
        """How matrices are quantised, None where they are not."""
        return None if self.bits is None else QuantConfig(self.bits, self.group_size)


def write(
    opened: OpenModel,
    folder: Path,
    out: Path,
    program: Program,
    options: FolderOptions,
    *,
    force: bool = False,
    progress: Progress = lambda label, share: None,
) -> Report:
    """Write a model opened from `folder` as a folder that mlx-vlm or mlx-lm loads; returns the report that lies in it.

    Layers that come quantised are dequantised first, with a FastVLMWarning. Raises OptionError, CheckpointError for a
    model that the program cannot load, and OutputError; nothing is left half-written.
    """
    check_place(folder, out)
    resolved = opened.resolve()
    config = replace(resolved, dtype=options.dtype or resolved.dtype, quantization={})
    _check_loadable(opened.name, config, program, options)
    parts = ("text.",) if program == "mlx-lm" else ("text.", "projector.", "vision.")
    dtype: mx.Dtype = getattr(mx, config.dtype)
    elements = {name: math.prod(shape) for name, shape in shapes(config).items() if name.startswith(parts)}
    total = sum(elements.values())
    nbytes = total * dtype.size
    check_target(out, nbytes, force, own=EXPORT)
    announce(config.source.license)
    transformers.warn_of_quantised(opened.name, resolved)
    texts = _settings(config, options, program) | {"LICENSE": licence_text(folder, config)}
    texts |= {"README.md": mlx_card(config, program, options.bits)}
    tokenizer = transformers.tokenizer_files(transformers.own_tokenizer(opened), config)
    with new_folder(out, nbytes, force, own=EXPORT) as partial:
        for file, text in (texts | tokenizer).items():
            (partial / file).write_text(text, encoding="utf-8")
        done = 0

        def counted() -> Iterator[tuple[str, mx.array]]:
            nonlocal done
            for name, array in _tensors(opened, config, parts):
                done += elements[name]
                progress("Writing", done / total)
                yield from _named(name, array, config, options, program, opened.name)

        save_weights(partial, counted())
        size = sum(file.stat().st_size for file in partial.iterdir() if file.suffix == ".safetensors")
        facts = {"bytes": size, "licence": config.source.license, "dtype": config.dtype, "quantization": None}
        if options.quantization:
            facts["quantization"] = asdict(options.quantization)
        stored = config.dtype + (f", matrices of the decoder in {options.bits} bits" if options.bits else "")
        section = Section("The folder", f"{size / 1e6:,.1f} MB of weights, {stored}.")
        report = Report(program, config.source.name, out.name, facts, [section])
        report.write(partial / NAME)
    return report


def _check_loadable(name: str, config: ModelConfig, program: Program, options: FolderOptions) -> None:
    """Raise CheckpointError for a model that the program cannot load, however it is written."""
    if program == "mlx-vlm" and config.vision != VisionConfig():
        raise CheckpointError(
            f"{name}: its image encoder has {list(config.vision.depths)} blocks of {list(config.vision.widths)} "
            "channels; mlx-vlm has FastViTHD's sizes fixed in its code, so write it for another target."
        )
    widths = {config.text.hidden_size, config.text.intermediate_size}
    odd = [width for width in widths if width % options.group_size]
    if options.bits is not None and odd:
        raise OptionError(
            f"`group_size` is {options.group_size}, and {name} has matrices of width {listed(odd)}, which no whole "
            "number of groups fits; choose another."
        )


def _tensors(opened: OpenModel, config: ModelConfig, parts: tuple[str, ...]) -> Iterator[tuple[str, mx.array]]:
    """The tensors of these parts under their published names, dequantised, norms and scales that change nothing
    included."""
    for name, array in unfold(transformers.read_tensors(opened), opened.resolve()):
        if name.startswith(parts):
            yield name, array


def _named(
    name: str, array: mx.array, config: ModelConfig, options: FolderOptions, program: Program, origin: str
) -> Iterator[tuple[str, mx.array]]:
    """A tensor as the program has it: its name, its order of axes, its type, and its parts where it is quantised."""
    dtype: mx.Dtype = getattr(mx, config.dtype)
    if name.startswith("text."):
        theirs = name.replace("text.lm_head.", HEAD[program]).replace("text.", PREFIX[program])
    else:
        theirs = source_name(name, "mlx-vlm")
    if ".layer_scale" in name:
        array = array.transpose(1, 2, 0)
    elif array.ndim == 4:
        array = array.transpose(0, 2, 3, 1)
    stored = mx.contiguous(array.astype(dtype))
    check_finite(origin, [(theirs, stored, array)])
    if options.quantization and name.startswith("text.") and array.ndim == 2:
        yield from quantized(theirs, array, options.quantization, scale_type(config.dtype))
    else:
        yield theirs, stored
    if name == "vision.conv_exp.se.expand.bias":
        yield MLX_VLM_TOWER + "head.proj", mx.zeros((config.vision.out_width, HEAD_CHANNELS), dtype)


def _settings(config: ModelConfig, options: FolderOptions, program: Program) -> dict[str, str]:
    """Settings by the name of their file."""
    stored = options.quantization and {"quantization": asdict(options.quantization)}
    model = transformers.qwen2_settings(config) | {"torch_dtype": config.dtype, "license": config.source.license}
    tables: dict[str, Any] = {}
    if program == "mlx-vlm":
        model |= _mlx_vlm_settings(config)
        tables = transformers.processor_settings(config)
        tables["generation_config.json"] = transformers.generation_settings(config)
        for table in tables.values():
            if "processor_class" in table:
                table["processor_class"] = "FastVLMProcessor"
        tables["preprocessor_config.json"]["image_processor_type"] = "CLIPImageProcessor"
    tables["config.json"] = model | (stored or {})
    return transformers.texts_of(tables)


def _end_of_turn(config: ModelConfig) -> int:
    """The one stop token that mlx-vlm reads: the model's last, which ends a turn in Qwen2's tokenizers."""
    return max(config.eos_token_ids)


def _mlx_vlm_settings(config: ModelConfig) -> dict[str, Any]:
    vision, stages = config.vision, range(len(config.vision.depths))
    return {
        "model_type": "llava_qwen2",
        "architectures": ["LlavaQwen2ForCausalLM"],
        "eos_token_id": _end_of_turn(config),
        "image_token_index": IMAGE_TOKEN,
        **({"image_aspect_ratio": "pad"} if config.image.fit == "pad" else {}),
        "mm_hidden_size": vision.out_width,
        "mm_patch_merge_type": "flat",
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_tower": f"mobileclip_l_{config.image.size}",
        "tokenizer_model_max_length": 8192,
        "tokenizer_padding_side": "right",
        "vision_config": {
            "model_type": "llava_qwen2",
            "image_size": config.image.size,
            "patch_size": STRIDE,
            "hidden_size": 1024,
            "intermediate_size": vision.out_width,
            "projection_dim": HEAD_CHANNELS,
            "num_classes": 1000,
            "down_patch_size": 7,
            "down_stride": 2,
            "layer_scale_init_value": 1e-5,
            "cls_ratio": 2.0,
            "layers": list(vision.depths),
            "embed_dims": list(vision.widths),
            "mlp_ratios": [vision.mlp_ratio for _ in stages],
            "downsamples": [True for _ in stages],
            "pos_embs_shapes": [[7, 7] if stage in ATTENTION_STAGES else None for stage in stages],
            "token_mixers": ["attention" if stage in ATTENTION_STAGES else "repmixer" for stage in stages],
            "repmixer_kernel_size": 3,
        },
    }
