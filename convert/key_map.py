"""The tables: one per layout, from the names a checkpoint uses to the published form, the common ground of all layouts.

The published form is Apple's reparameterised tower under `vision.`, the projector under `projector.` and Qwen2 under
`text.`; `published.py` lists its names and shapes. A row renames, merges the branches of a training-form block, or drops.
In a template {i} and {b} stand for numbers, {p} for "weight" or "bias", {any} for anything.
"""

import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

import mlx.core as mx

from fastvlm_mlx.errors import CheckpointError, listed

from . import branches

Merge = Callable[[dict[str, mx.array]], dict[str, mx.array]]


class Rename(NamedTuple):
    """One tensor under another name."""

    source: str
    target: str


class Drop(NamedTuple):
    """Tensors left behind, and why."""

    source: str
    reason: str


class Group(NamedTuple):
    """The branches of one training-form block, merged into the tensors of its published form.

    `parts` are relative to `source`, those after a "?" may be absent; `merge` gets them by these names and returns tensors
    by name relative to `target`.
    """

    source: str
    parts: tuple[str, ...]
    target: str
    merge: Merge


Row = Rename | Drop | Group

APPLE_TOWER = "model.vision_tower.vision_tower.model."
BATCH_NORM = ("weight", "bias", "running_mean", "running_var")


def _kept(source: str, target: str, names: Iterable[str]) -> tuple[Row, ...]:
    """Rows for names that only change their prefix."""
    return tuple(Rename(source + name, target + name) for name in names)


def _under(prefix: str, names: Iterable[str], optional: bool = False) -> tuple[str, ...]:
    return tuple(f"{'?' if optional else ''}{prefix}.{name}" for name in names)


TOWER_IN_BOTH_FORMS = (
    "network.{i}.{b}.layer_scale",
    "network.{i}.{b}.layer_scale_1",
    "network.{i}.{b}.layer_scale_2",
    "network.{i}.{b}.norm.{p}",
    "network.{i}.{b}.token_mixer.qkv.weight",
    "network.{i}.{b}.token_mixer.proj.{p}",
    "network.{i}.{b}.convffn.conv.conv.weight",
    *(f"network.{{i}}.{{b}}.convffn.conv.bn.{name}" for name in BATCH_NORM),
    "network.{i}.{b}.convffn.fc1.{p}",
    "network.{i}.{b}.convffn.fc2.{p}",
    "conv_exp.se.reduce.{p}",
    "conv_exp.se.expand.{p}",
)

TOWER_REPARAMETERISED = (
    "patch_embed.{i}.reparam_conv.{p}",
    "network.{i}.{b}.token_mixer.reparam_conv.{p}",
    "network.{i}.proj.0.lkb_reparam.{p}",
    "network.{i}.proj.1.reparam_conv.{p}",
    "network.{i}.reparam_conv.{p}",
    "conv_exp.reparam_conv.{p}",
)

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


def _training_blocks(source: str, target: str) -> tuple[Row, ...]:
    def group(block: str, parts: tuple[str, ...], published: str, merge: Merge) -> Row:
        return Group(source + block, parts, target + published, merge)

    return (
        group("patch_embed.{i}", MOBILE_ONE, "patch_embed.{i}.reparam_conv", branches.mobile_one),
        group("network.{i}.{b}.token_mixer", REP_MIXER, "network.{i}.{b}.token_mixer.reparam_conv", branches.rep_mixer),
        group("network.{i}.proj.0", LARGE_KERNEL, "network.{i}.proj.0.lkb_reparam", branches.large_kernel),
        group("network.{i}.proj.1", MOBILE_ONE, "network.{i}.proj.1.reparam_conv", branches.mobile_one),
        group("network.{i}.pe", ("weight", "bias"), "network.{i}.reparam_conv", branches.rep_cpe),
        group("conv_exp", MOBILE_ONE, "conv_exp.reparam_conv", branches.mobile_one),
    )


APPLE_COMMON = (
    *_kept(APPLE_TOWER, "vision.", TOWER_IN_BOTH_FORMS),
    Drop(APPLE_TOWER + "{any}.num_batches_tracked", "a counter of training steps"),
    Drop(APPLE_TOWER + "head.proj", "the pooled head of image-text pre-training, which FastVLM does not use"),
    Rename("model.mm_projector.0.{p}", "projector.linear_1.{p}"),
    Rename("model.mm_projector.2.{p}", "projector.linear_2.{p}"),
    Rename("model.embed_tokens.weight", "text.embed_tokens.weight"),
    Rename("model.layers.{i}.input_layernorm.weight", "text.layers.{i}.input_layernorm.weight"),
    Rename("model.layers.{i}.post_attention_layernorm.weight", "text.layers.{i}.post_attention_layernorm.weight"),
    *(Rename(f"model.layers.{{i}}.self_attn.{n}.{{p}}", f"text.layers.{{i}}.self_attn.{n}.{{p}}")
      for n in ("q_proj", "k_proj", "v_proj")),
    Rename("model.layers.{i}.self_attn.o_proj.weight", "text.layers.{i}.self_attn.o_proj.weight"),
    *(Rename(f"model.layers.{{i}}.mlp.{n}.weight", f"text.layers.{{i}}.mlp.{n}.weight")
      for n in ("gate_proj", "up_proj", "down_proj")),
    Rename("model.norm.weight", "text.norm.weight"),
    Rename("lm_head.weight", "text.lm_head.weight"),
)  # fmt: skip

LAYOUTS: dict[str, tuple[Row, ...]] = {
    "llava": (*_kept(APPLE_TOWER, "vision.", TOWER_REPARAMETERISED), *APPLE_COMMON),
    "llava-training": (*_training_blocks(APPLE_TOWER, "vision."), *APPLE_COMMON),
}


def recognise(names: Iterable[str]) -> str:
    """The layout of a llava_qwen2 checkpoint, told by its tower's names."""
    training = any(name.startswith(APPLE_TOWER) and (".rbr_conv." in name or ".lkb_origin." in name) for name in names)
    return "llava-training" if training else "llava"


class Plan(NamedTuple):
    """What a table makes of a set of names: renames by target, merges, and drops by source."""

    renames: dict[str, str]
    merges: list[tuple[Group, str, str, dict[str, str]]]  # row, source prefix, target prefix, part -> source name
    drops: dict[str, str]


def match(names: Iterable[str], layout: str) -> Plan:
    """Assign every name to exactly one row of the layout's table; raises CheckpointError naming those no row takes."""
    plan = Plan({}, [], {})
    groups: dict[tuple[int, str], dict[str, str]] = {}
    matchers = list(_matchers(LAYOUTS[layout]))
    unknown = []
    for name in names:
        hits = [(row, part, found) for row, part, regex in matchers if (found := regex.fullmatch(name))]
        if not hits:
            unknown.append(name)
            continue
        if len(hits) > 1:
            raise AssertionError(f"layout {layout!r}: {len(hits)} rows take {name!r}")
        row, part, found = hits[0]
        if isinstance(row, Rename):
            plan.renames[row.target.format(**found.groupdict())] = name
        elif isinstance(row, Drop):
            plan.drops[name] = row.reason
        else:
            numbers = {key: value for key, value in found.groupdict().items() if key != "any"}
            key = (LAYOUTS[layout].index(row), row.target.format(**numbers))
            groups.setdefault(key, {"": row.source.format(**numbers)})[part] = name
    if unknown:
        raise CheckpointError(
            f"{len(unknown)} tensors of unknown name, {listed(sorted(unknown))}: not the {layout!r} layout of FastVLM; "
            "fetch the checkpoint again."
        )
    for (index, target), parts in groups.items():
        row = LAYOUTS[layout][index]
        assert isinstance(row, Group)
        source = parts.pop("")
        missing = [f"{source}.{part}" for part in row.parts if not part.startswith("?") and part not in parts]
        whole = {part.lstrip("?").split(".")[0] for part in row.parts if part.startswith("?")}
        for branch in whole & {part.split(".")[0] for part in parts}:
            members = (part[1:] for part in row.parts if part.startswith(f"?{branch}."))
            missing += [f"{source}.{part}" for part in members if part not in parts]
        if missing:
            raise CheckpointError(f"tensors {listed(missing)} are missing; fetch the checkpoint again.")
        plan.merges.append((row, source, target, parts))
    return plan


def source_name(target: str, layout: str) -> str:
    """What a tensor of the published form is called in a layout; for a merged one, the block its branches are in."""
    for row in LAYOUTS[layout]:
        if isinstance(row, Rename) and (found := _regex(row.target).fullmatch(target)):
            return row.source.format(**found.groupdict())
        if isinstance(row, Group) and (found := _regex(row.target + ".{p}").fullmatch(target)):
            return row.source.format(**found.groupdict()) + ".*"
    raise AssertionError(f"layout {layout!r} has no row for {target!r}")


def _matchers(rows: Iterable[Row]) -> Iterable[tuple[Row, str, re.Pattern[str]]]:
    for row in rows:
        if isinstance(row, Group):
            for part in (part.lstrip("?") for part in row.parts):
                yield row, part, _regex(f"{row.source}.{part}")
        else:
            yield row, "", _regex(row.source)


def _regex(template: str) -> re.Pattern[str]:
    pattern = re.escape(template)
    for placeholder, what in (("i", r"\d+"), ("b", r"\d+"), ("p", "weight|bias"), ("any", ".+")):
        pattern = pattern.replace(rf"\{{{placeholder}\}}", f"(?P<{placeholder}>{what})", 1)
    return re.compile(pattern)
