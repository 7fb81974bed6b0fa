"""One table per layout, from a checkpoint's names to the published form, and how a layout is recognised.

The published form is Apple's reparameterised tower under `vision.`, the projector under `projector.` and Qwen2 under
`text.`; `published.py` lists its names and shapes, `rows.py` says what a row can do.
"""

from collections.abc import Iterable
from typing import NamedTuple

from fastvlm_mlx.config import STAGES
from fastvlm_mlx.errors import CheckpointError, OptionError, listed, shown

from . import branches, rows
from .published import network_indices
from .rows import Drop, Group, Plan, Rename, Row, Table

APPLE_TOWER = "model.vision_tower.vision_tower.model."
TIMM_TOWER = "model.vision_tower.timm_model."
MLX_VLM_TOWER = "vision_tower.vision_model."

BATCH_NORM = ("weight", "bias", "running_mean", "running_var")
COUNTER = "a counter of training steps"
ROTARY = "positions, which are computed from rope_theta"
NEWLINE = "the mark between rows of tiles, which a single view of a picture has no use for"
POOLED_HEAD = "the pooled head of image-text pre-training, which FastVLM does not use"


def _kept(source: str, target: str, names: Iterable[str]) -> Table:
    """Rows for names that only change their prefix."""
    return tuple(Rename(source + name, target + name) for name in names)


def _under(prefix: str, names: Iterable[str], optional: bool = False) -> tuple[str, ...]:
    return tuple(f"{'?' if optional else ''}{prefix}.{name}" for name in names)


# Apple's names of a block's tensors, relative to the block, which the other layouts vary.

CONV_FFN = (
    "convffn.conv.conv.weight",
    *_under("convffn.conv.bn", BATCH_NORM),
    "convffn.fc1.{p}",
    "convffn.fc2.{p}",
)
LAYER_SCALES = ("layer_scale", "layer_scale_1", "layer_scale_2")
ATTENTION = ("norm.{p}", "token_mixer.qkv.weight", "token_mixer.proj.{p}")

CONV_BN = ("conv.weight", *_under("bn", BATCH_NORM))
MOBILE_ONE = (
    *_under("rbr_conv.0", CONV_BN),
    *_under("rbr_scale", CONV_BN, optional=True),
    *_under("rbr_skip", BATCH_NORM, optional=True),
)
REP_MIXER = (
    "layer_scale",
    *_under("norm.rbr_skip", BATCH_NORM),
    *_under("mixer", (*_under("rbr_conv.0", CONV_BN), *_under("rbr_scale", CONV_BN), *_under("rbr_skip", BATCH_NORM))),
)
LARGE_KERNEL = (*_under("lkb_origin", CONV_BN), *_under("small_conv", CONV_BN))


def _as_they_are(parts: Iterable[str]) -> dict[str, str]:
    return {part.lstrip("?"): part for part in parts}


def _decoder(source: str, head: str, part: str = "{p}", *, weight: str = "weight") -> Table:
    """Rows for Qwen2 under transformers' names.

    `part` and `weight` are the templates for the tensors of a linear layer with and without a bias.
    """
    layer = "layers.{i}."
    names = [
        f"embed_tokens.{weight}",
        f"{layer}input_layernorm.weight",
        f"{layer}post_attention_layernorm.weight",
        *(f"{layer}self_attn.{name}_proj.{part}" for name in "qkv"),
        *(f"{layer}{name}_proj.{weight}" for name in ("self_attn.o", "mlp.gate", "mlp.up", "mlp.down")),
        "norm.weight",
    ]
    buffers = (Drop(f"{source}{place}rotary_emb.{{r}}", ROTARY) for place in ("", f"{layer}self_attn."))
    return (*_kept(source, "text.", names), *buffers, Rename(f"{head}.{weight}", f"text.lm_head.{weight}"))


def _projector(first: str, second: str, part: str = "{p}") -> Table:
    return (
        Rename(f"{first}.{part}", f"projector.linear_1.{part}"),
        Rename(f"{second}.{part}", f"projector.linear_2.{part}"),
    )


# Apple's own: the tower as published, or with the branches it is trained with.

APPLE_COMMON: Table = (
    *_kept(APPLE_TOWER + "network.{i}.{b}.", "vision.network.{i}.{b}.", (*CONV_FFN, *LAYER_SCALES, *ATTENTION)),
    *_kept(APPLE_TOWER, "vision.", ("conv_exp.se.reduce.{p}", "conv_exp.se.expand.{p}")),
    Drop(APPLE_TOWER + "{any}.num_batches_tracked", COUNTER),
    Drop(APPLE_TOWER + "head.proj", POOLED_HEAD),
    Drop("model.image_newline", NEWLINE),
    *_projector("model.mm_projector.0", "model.mm_projector.2"),
    *_decoder("model.", "lm_head"),
)

LLAVA: Table = (
    *_kept(
        APPLE_TOWER,
        "vision.",
        (
            "patch_embed.{i}.reparam_conv.{p}",
            "network.{i}.{b}.token_mixer.reparam_conv.{p}",
            "network.{i}.proj.0.lkb_reparam.{p}",
            "network.{i}.proj.1.reparam_conv.{p}",
            "network.{i}.reparam_conv.{p}",
            "conv_exp.reparam_conv.{p}",
        ),
    ),
    *APPLE_COMMON,
)


def _llava_blocks() -> Table:
    def group(block: str, parts: Iterable[str], published: str, merge: rows.Merge) -> Row:
        return Group(APPLE_TOWER + block, _as_they_are(parts), "vision." + published, merge)

    return (
        group("patch_embed.{i}", MOBILE_ONE, "patch_embed.{i}.reparam_conv", branches.mobile_one),
        group("network.{i}.{b}.token_mixer", REP_MIXER, "network.{i}.{b}.token_mixer.reparam_conv", branches.rep_mixer),
        group("network.{i}.proj.0", LARGE_KERNEL, "network.{i}.proj.0.lkb_reparam", branches.large_kernel),
        group("network.{i}.proj.1", MOBILE_ONE, "network.{i}.proj.1.reparam_conv", branches.mobile_one),
        group("network.{i}.pe", ("weight", "bias"), "network.{i}.reparam_conv", branches.rep_cpe),
        group("conv_exp", MOBILE_ONE, "conv_exp.reparam_conv", branches.mobile_one),
    )


LLAVA_TRAINING: Table = (*_llava_blocks(), *APPLE_COMMON)

# transformers' own: the tower is timm's, in stages, with names of its own for the same blocks and branches.

TIMM_PARTS = {"rbr_conv": "conv_kxk", "rbr_scale": "conv_scale", "rbr_skip": "identity", "lkb_origin": "large_conv"}


def _timm(parts: Iterable[str]) -> dict[str, str]:
    """Apple's names of a block's branches -> timm's."""
    spelled = {}
    for part in parts:
        words = [TIMM_PARTS.get(word, word) for word in part.lstrip("?").split(".")]
        spelled[".".join(words) + (".gamma" if words == ["layer_scale"] else "")] = part
    return spelled


def _stages() -> Iterable[tuple[str, str | None, str | None, str]]:
    """Each of timm's stages, with the members of Apple's `network` that it corresponds to.

    These are its downsampler, its positions and its blocks.
    """
    for stage, (downsample, position, blocks) in enumerate(network_indices(STAGES)):
        yield (
            f"{TIMM_TOWER}stages.{stage}.",
            f"vision.network.{downsample}." if downsample >= 0 else None,
            f"vision.network.{position}." if position >= 0 else None,
            f"vision.network.{blocks}.{{b}}.",
        )


def _transformers_common() -> Iterable[Row]:
    for stage, _, _, block in _stages():
        theirs = stage + "blocks.{b}."
        yield from (Rename(theirs + name.replace("convffn", "mlp"), block + name) for name in CONV_FFN)
        yield from (Rename(f"{theirs}{name}.gamma", block + name) for name in LAYER_SCALES)
        yield from _kept(theirs, block, ATTENTION)
    yield Rename(TIMM_TOWER + "final_conv.se.fc1.{p}", "vision.conv_exp.se.reduce.{p}")
    yield Rename(TIMM_TOWER + "final_conv.se.fc2.{p}", "vision.conv_exp.se.expand.{p}")
    yield Drop(TIMM_TOWER + "{any}.num_batches_tracked", COUNTER)
    yield from _projector("model.multi_modal_projector.linear_1", "model.multi_modal_projector.linear_2")
    yield from _decoder("model.language_model.", "lm_head")


def _transformers_blocks() -> Iterable[Row]:
    yield Rename(TIMM_TOWER + "stem.{i}.reparam_conv.{p}", "vision.patch_embed.{i}.reparam_conv.{p}")
    for stage, downsample, position, block in _stages():
        yield Rename(stage + "blocks.{b}.token_mixer.reparam_conv.{p}", block + "token_mixer.reparam_conv.{p}")
        if downsample:
            yield Rename(stage + "downsample.proj.0.reparam_conv.{p}", downsample + "proj.0.lkb_reparam.{p}")
            yield Rename(stage + "downsample.proj.1.reparam_conv.{p}", downsample + "proj.1.reparam_conv.{p}")
        if position:
            yield Rename(stage + "pos_emb.reparam_conv.{p}", position + "reparam_conv.{p}")
    yield Rename(TIMM_TOWER + "final_conv.reparam_conv.{p}", "vision.conv_exp.reparam_conv.{p}")


def _transformers_training_blocks() -> Iterable[Row]:
    mobile_one = _timm(MOBILE_ONE)
    yield Group(TIMM_TOWER + "stem.{i}", mobile_one, "vision.patch_embed.{i}.reparam_conv", branches.mobile_one)
    for stage, downsample, position, block in _stages():
        yield Group(
            stage + "blocks.{b}.token_mixer", _timm(REP_MIXER), block + "token_mixer.reparam_conv", branches.rep_mixer
        )
        if downsample:
            theirs = stage + "downsample.proj."
            yield Group(theirs + "0", _timm(LARGE_KERNEL), downsample + "proj.0.lkb_reparam", branches.large_kernel)
            yield Group(theirs + "1", mobile_one, downsample + "proj.1.reparam_conv", branches.mobile_one)
        if position:
            yield Group(
                stage + "pos_emb.pos_enc", _timm(("weight", "bias")), position + "reparam_conv", branches.rep_cpe
            )
    yield Group(TIMM_TOWER + "final_conv", mobile_one, "vision.conv_exp.reparam_conv", branches.mobile_one)


TRANSFORMERS: Table = (*_transformers_blocks(), *_transformers_common())
TRANSFORMERS_TRAINING: Table = (*_transformers_training_blocks(), *_transformers_common())

# mlx-vlm's: kernels in MLX's order (O, k, k, I), layer scales (1, 1, C); linear layers may be quantised.

KERNEL, SCALE = (0, 3, 1, 2), (2, 0, 1)


def _convolution(source: str, target: str) -> Table:
    return Rename(f"{source}.weight", f"{target}.weight", KERNEL), Rename(f"{source}.bias", f"{target}.bias")


def _mlx_vlm() -> Iterable[Row]:
    ours = "vision."
    yield from _convolution(
        MLX_VLM_TOWER + "patch_embed.blocks.{i}.reparam_conv", ours + "patch_embed.{i}.reparam_conv"
    )
    for conv in (
        "network.{i}.{b}.token_mixer.reparam_conv", "network.{i}.{b}.convffn.fc1", "network.{i}.{b}.convffn.fc2",
        "network.{i}.proj.0.lkb_reparam", "network.{i}.proj.1.reparam_conv", "network.{i}.reparam_conv",
        "conv_exp.reparam_conv", "conv_exp.se.reduce", "conv_exp.se.expand",
    ):  # fmt: skip
        yield from _convolution(MLX_VLM_TOWER + conv, ours + conv)
    block, blocks = MLX_VLM_TOWER + "network.{i}.{b}.", ours + "network.{i}.{b}."
    yield Rename(block + "convffn.conv.conv.weight", blocks + "convffn.conv.conv.weight", KERNEL)
    yield from _kept(block, blocks, _under("convffn.conv.bn", BATCH_NORM))
    yield from (Rename(block + name, blocks + name, SCALE) for name in LAYER_SCALES)
    yield from _kept(block, blocks, ("norm.{p}", "token_mixer.qkv.{q}", "token_mixer.proj.{q}"))
    yield Drop(MLX_VLM_TOWER + "head.proj", POOLED_HEAD)
    yield from _projector("mm_projector.0", "mm_projector.2", "{q}")
    yield from _decoder("language_model.model.", "language_model.lm_head", "{q}", weight="{q}")


MLX_VLM: Table = tuple(_mlx_vlm())

# Apple's exports for its app: no tower.

APPLE_MLX: Table = (
    *_projector("multi_modal_projector.linear_0", "multi_modal_projector.linear_2", "{q}"),
    *_decoder("language_model.model.", "language_model.lm_head", "{q}", weight="{q}"),
)


class Layout(NamedTuple):
    """A layout's table, and how it is recognised: its model_type, and one of `signs` in the name of some tensor.

    Layouts are tried in order; the first whose sign is found is taken.
    """

    table: Table
    model_types: tuple[str, ...]
    signs: tuple[str, ...]
    has_tower: bool = True


LAYOUTS = {
    "llava-training": Layout(LLAVA_TRAINING, ("llava_qwen2",), (".rbr_conv.", ".lkb_origin.")),
    "llava": Layout(LLAVA, ("llava_qwen2",), (APPLE_TOWER,)),
    "apple-mlx": Layout(APPLE_MLX, ("llava_qwen2", "fastvlm"), ("multi_modal_projector.linear_0.",), has_tower=False),
    "mlx-vlm": Layout(MLX_VLM, ("llava_qwen2", "fastvlm"), (MLX_VLM_TOWER, "language_model.model.")),
    "transformers-training": Layout(TRANSFORMERS_TRAINING, ("fast_vlm",), (".conv_kxk.", ".large_conv.")),
    "transformers": Layout(TRANSFORMERS, ("fast_vlm",), (TIMM_TOWER,)),
}
USUAL = {"llava_qwen2": "llava", "fastvlm": "mlx-vlm", "fast_vlm": "transformers"}  # where no name has a layout's sign


def recognise(names: Iterable[str], model_type: object = "llava_qwen2") -> str:
    """The layout of a checkpoint; raises CheckpointError for a model_type that is not one of FastVLM's."""
    if not isinstance(model_type, str) or model_type not in USUAL:
        raise CheckpointError(
            f"config.json: model_type is {shown(model_type)}, expected {listed(USUAL)} (FastVLM's layouts) or a "
            "folder written by 'fastvlm-mlx convert'."
        )
    possible = {name: layout for name, layout in LAYOUTS.items() if model_type in layout.model_types}
    names = list(names)
    for name, layout in possible.items():
        if any(sign in tensor for sign in layout.signs for tensor in names):
            return name
    return USUAL[model_type]


def check_layout(layout: str | None) -> None:
    """Raise OptionError unless it is one of LAYOUTS; None stands for the one recognised."""
    if layout is not None and layout not in LAYOUTS:
        raise OptionError(f"`layout` is {shown(layout)}, expected one of {', '.join(map(repr, LAYOUTS))}.")


def match(names: Iterable[str], layout: str) -> Plan:
    """Assign every name to exactly one row of the layout's table; raises CheckpointError naming those no row takes."""
    return rows.match(names, LAYOUTS[layout].table, layout)


def source_name(target: str, layout: str) -> str:
    """What a tensor of the published form is called in a layout."""
    return rows.source_name(target, LAYOUTS[layout].table)
