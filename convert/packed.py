"""Quantised tensors of a checkpoint: which of them our layout can hold as they are, and the values of the others.

The forms are MLX's: weights packed into uint32 along a row (O, I * bits / 32), a scale per group of a row, and in
"affine" mode a bias per group. Rows can be stacked as they are; columns that change places, or are computed with,
cannot be kept packed.
"""

import re
from typing import Any, NamedTuple

import mlx.core as mx

from fastvlm_mlx.config import QuantConfig, check
from fastvlm_mlx.errors import CheckpointError, shown

from .published import Shapes

PARTS = ("weight", "scales", "biases")
AFFINE = {(bits, group) for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64, 128)}
FORMS = {"affine": AFFINE, "mxfp4": {(4, 32)}, "mxfp8": {(8, 32)}, "nvfp4": {(4, 16)}}  # mode -> (bits, group size)

Plan = dict[str, QuantConfig]  # layer (of the published form, or ours) -> setting

# Layers that our layout holds as they are, and those it stacks into one.
MOVED = re.compile(r"text\.(embed_tokens|lm_head|layers\.\d+\.(self_attn\.o_proj|mlp\.down_proj))|projector\.linear_2")
STACKED = {"self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
           "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj")}  # fmt: skip


def settings(theirs: dict[str, Any], sources: dict[str, str]) -> Plan:
    """How each quantised layer is quantised, according to config.json.

    `sources` maps tensors of the published form to the checkpoint's names, by which config.json makes exceptions.
    Raises CheckpointError for settings that are missing or that MLX does not have.
    """
    layers = {
        target.removesuffix(".scales"): source for target, source in sources.items() if target.endswith(".scales")
    }
    if not layers:
        return {}
    table = theirs.get("quantization") or theirs.get("quantization_config")
    check(
        isinstance(table, dict), f"quantization is {shown(table)}, expected a table, since there are quantised tensors"
    )
    assert isinstance(table, dict)
    plan = {}
    for layer, source in layers.items():
        path = source.removesuffix(".scales")
        entry = table.get(path, {})
        check(isinstance(entry, dict), f"quantization says {shown(entry)} of {path}, which is quantised")
        bits, group_size, mode = ((table | entry).get(key) for key in ("bits", "group_size", "mode"))
        mode = "affine" if mode is None else mode
        right = (
            type(bits) is type(group_size) is int
            and isinstance(mode, str)
            and (bits, group_size) in FORMS.get(mode, ())
        )
        check(
            right,
            f"quantization of {path}: MLX has no {shown(bits)} bits in groups of {shown(group_size)}, mode "
            f"{shown(mode)}",
        )
        plan[layer] = QuantConfig(bits, group_size, mode)
    return plan


def unpacked_shapes(found: Shapes, dtypes: dict[str, str], plan: Plan, names: dict[str, str]) -> Shapes:
    """The shapes as if nothing were quantised; raises CheckpointError where a layer's parts do not fit each other.

    `dtypes` are safetensors' names of them; `names` gives the checkpoint's names of the tensors, for messages.
    """
    shapes = dict(found)
    for layer, q in plan.items():
        parts = PARTS if q.mode == "affine" else PARTS[:2]
        missing = [part for part in parts if f"{layer}.{part}" not in found]
        weight, scales = f"{layer}.weight", f"{layer}.scales"
        if missing:
            raise CheckpointError(f"{names[scales]!r} comes without its {missing[0]}; fetch the checkpoint again.")
        width = found[scales][-1] * q.group_size if found[scales] else 0
        right = (
            dtypes[weight] == "U32"
            and found[weight] == (*found[scales][:-1], width * q.bits // 32)
            and len(found[weight]) == 2
        )
        for part in parts[1:]:
            dtype = dtypes[f"{layer}.{part}"]
            right &= dtype == "U8" if q.mode != "affine" else dtype in ("F32", "F16", "BF16")
            right &= found[f"{layer}.{part}"] == found[scales]
        if not right:
            raise CheckpointError(
                f"{names[weight]!r} and its scales do not fit {q.bits} bits in groups of {q.group_size}, which "
                "config.json calls for; do the two belong together?"
            )
        for part in parts[1:]:
            del shapes[f"{layer}.{part}"]
        shapes[weight] = (found[weight][0], width)
    return shapes


class Kept(NamedTuple):
    """The layers of ours that stay quantised, and the layers of the published form that are dequantised."""

    layers: Plan
    unpacked: Plan


def keep(plan: Plan) -> Kept:
    """Decide which layers stay quantised: those that are only moved, and stacks of parts that are quantised alike."""
    kept = {layer: q for layer, q in plan.items() if MOVED.fullmatch(layer)}
    used = set(kept)
    for ours, parts in STACKED.items():
        for first in [layer for layer in plan if layer.endswith(f".{parts[0]}")]:
            block = first.removesuffix(parts[0])
            if all(plan.get(block + part) == plan[first] for part in parts):
                kept[block + ours] = plan[first]
                used |= {block + part for part in parts}
    return Kept(kept, {layer: q for layer, q in plan.items() if layer not in used})


def unpack(tensors: dict[str, mx.array], plan: Plan) -> None:
    """Dequantise these layers in place, to float32, unevaluated."""
    for layer, q in plan.items():
        parts = [tensors.pop(f"{layer}.{part}") for part in PARTS if f"{layer}.{part}" in tensors]
        tensors[f"{layer}.weight"] = values(*parts, settings=q)


def values(weight: mx.array, scales: mx.array, biases: mx.array | None = None, *, settings: QuantConfig) -> mx.array:
    """The values (O, I) of a quantised layer in float32."""
    if biases is not None:
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    form = {"group_size": settings.group_size, "bits": settings.bits, "mode": settings.mode}
    return mx.dequantize(weight, scales, biases, dtype=mx.float32, **form)  # type: ignore[arg-type]  # the stub has no None
