"""Adapters of other libraries -> ours: PEFT's (LoRA, rsLoRA, DoRA, modules_to_save) and mlx-lm's (LoRA, DoRA, full).

Their updates are of the projections as published, ours of the stacked ones. Three updates of query, key and value
become one whose A are put one below the other and whose B stand along the diagonal, of three times the rank; where the
three share one A, as what `peft.py` writes does, they become what they were.
"""

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from fastvlm_mlx.config import ModelConfig, is_number, is_whole
from fastvlm_mlx.errors import CheckpointError, listed, shown
from fastvlm_mlx.files import safetensors
from fastvlm_mlx.files.adapters import ADAPTER_CONFIG
from fastvlm_mlx.files.jsonfile import read_table
from fastvlm_mlx.storage.adapter import Adapter, AdapterConfig

from .fold import by_filter
from .packed import STACKED

PEFT_WEIGHTS, MLX_LM_WEIGHTS = "adapter_model.safetensors", "adapters.safetensors"
DECODER = re.compile(r"(?:^|\.)layers\.(\d+)\.(self_attn\.[qkvo]_proj|mlp\.(?:gate|up|down)_proj)$")
NORM = re.compile(r"(?:^|\.)layers\.(\d+)\.(input_layernorm|post_attention_layernorm)$")
PROJECTOR = {
    "multi_modal_projector.linear_1": "linear_1", "mm_projector.0": "linear_1",
    "multi_modal_projector.linear_0": "linear_1",
    "multi_modal_projector.linear_2": "linear_2", "mm_projector.2": "linear_2",
}  # fmt: skip
HOME = {part: whole for whole, parts in STACKED.items() for part in parts}
UNREAD = (
    "bias",
    "fan_in_fan_out",
    "lora_bias",
    "trainable_token_indices",
    "target_parameters",
    "alora_invocation_tokens",
)


@dataclass(frozen=True)
class Update:
    """A low-rank update of one projection: A (rank, I), B (O, rank), what they are multiplied with, and DoRA's lengths
    (O,).
    """

    a: mx.array
    b: mx.array
    scale: float
    magnitude: mx.array | None = None


def open_foreign_adapter(folder: Path, config: ModelConfig | None = None) -> Adapter:
    """Open an adapter of PEFT's or of mlx-lm's for a model; raises CheckpointError that names what cannot be taken
    over.

    Without the model's config it has to have updates of a key or value projection wherever it has one of a query.
    """
    if not (folder / ADAPTER_CONFIG).is_file():
        raise CheckpointError(f"{folder}: no {ADAPTER_CONFIG} in it, so this is no adapter; check `adapter`.")
    table = read_table(folder / ADAPTER_CONFIG)
    if table.get("peft_type") is not None:
        return _from_peft(folder, table, config)
    if table.get("fine_tune_type") is not None or "lora_parameters" in table:
        return _from_mlx_lm(folder, table, config)
    raise CheckpointError(
        f"{folder / ADAPTER_CONFIG}: it says neither model_type (ours), nor peft_type (PEFT), nor fine_tune_type "
        "(mlx-lm); expected an "
        "adapter of one of these."
    )


def _tensors(path: Path) -> dict[str, mx.array]:
    if not path.is_file():
        raise CheckpointError(f"{path.parent}: no {path.name} in it; save the adapter as safetensors.")
    safetensors.read_header(path)
    return {name: array.astype(mx.float32) for name, array in dict(safetensors.load(path)).items()}


def _from_peft(folder: Path, table: dict[str, Any], config: ModelConfig | None) -> Adapter:
    if table["peft_type"] != "LORA":
        raise CheckpointError(f"{folder}: an adapter of the kind {shown(table['peft_type'])}; expected LORA.")
    odd = [name for name in UNREAD if table.get(name) not in (None, False, "none", [], {})]
    if odd:
        raise CheckpointError(
            f"{folder / ADAPTER_CONFIG}: {listed(odd)} cannot be taken over; merge the adapter with PEFT instead."
        )
    updates: dict[str, dict[str, mx.array]] = defaultdict(dict)
    whole: dict[str, mx.array] = {}
    for name, array in _tensors(folder / PEFT_WEIGHTS).items():
        name = name.removeprefix("base_model.model.")
        found = re.fullmatch(r"(.*)\.(lora_A|lora_B|lora_magnitude_vector)(?:\.default)?(?:\.weight)?", name)
        if found:
            updates[found[1]][found[2]] = array
        else:
            whole[name.replace(".modules_to_save.default", "")] = array
    _check_complete(
        folder, updates, ("lora_A", "lora_B", *(["lora_magnitude_vector"] if table.get("use_dora") else []))
    )

    def scale(path: str) -> float:
        rank = _patterned(table.get("rank_pattern"), path, table.get("r"))
        alpha = _patterned(table.get("alpha_pattern"), path, table.get("lora_alpha"))
        if not is_whole(rank) or rank < 1 or not is_number(alpha):
            raise CheckpointError(
                f"{folder / ADAPTER_CONFIG}: r and lora_alpha are {shown(rank)} and {shown(alpha)}, expected numbers."
            )
        return float(alpha) / (rank**0.5 if table.get("use_rslora") else rank)

    found_updates = {
        path: Update(parts["lora_A"], parts["lora_B"], scale(path), parts.get("lora_magnitude_vector"))
        for path, parts in updates.items()
    }
    return _ours(folder, found_updates, whole, config, base=str(table.get("base_model_name_or_path") or ""))


def _patterned(patterns: Any, path: str, usual: Any) -> Any:
    """What a table of PEFT's says of a path: by the first pattern that its end matches."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return value
    return usual


def _from_mlx_lm(folder: Path, table: dict[str, Any], config: ModelConfig | None) -> Adapter:
    kind = table.get("fine_tune_type", "lora")
    settings = table.get("lora_parameters") or {}
    scale = settings.get("scale", 20.0) if isinstance(settings, dict) else None
    if kind not in ("lora", "dora", "full") or not is_number(scale):
        raise CheckpointError(
            f"{folder / ADAPTER_CONFIG}: an adapter of the kind {shown(kind)}, scale {shown(scale)}; expected lora "
            "or dora."
        )
    updates: dict[str, dict[str, mx.array]] = defaultdict(dict)
    whole = {}
    for name, array in _tensors(folder / MLX_LM_WEIGHTS).items():
        path, _, part = name.rpartition(".")
        if part in ("lora_a", "lora_b", "m"):
            updates[path][part] = array
        else:
            whole[name] = array
    _check_complete(folder, updates, ("lora_a", "lora_b", *(["m"] if kind == "dora" else [])))
    found = {
        path: Update(parts["lora_a"].T, parts["lora_b"].T, float(scale), parts.get("m"))
        for path, parts in updates.items()
    }
    return _ours(folder, found, whole, config, base=str(table.get("model") or ""))


def _check_complete(folder: Path, updates: Mapping[str, Mapping[str, mx.array]], parts: tuple[str, ...]) -> None:
    odd = [path for path, found in updates.items() if set(found) != set(parts)]
    if odd:
        raise CheckpointError(f"{folder}: {listed(odd)} have not all of {', '.join(parts)}; save the adapter again.")


def _ours(
    folder: Path, updates: Mapping[str, Update], whole: Mapping[str, mx.array], config: ModelConfig | None, *, base: str
) -> Adapter:
    """Updates and parameters by the other library's paths, as an adapter of ours; every name has to have a place."""
    by_layer: dict[str, dict[str, Update]] = defaultdict(dict)
    strange = []
    for path, update in updates.items():
        decoder = DECODER.search(path)
        projector = next((ours for theirs, ours in PROJECTOR.items() if path.endswith(theirs)), None)
        if decoder:
            part = decoder[2]
            by_layer[f"text.layers.{decoder[1]}.{HOME.get(part, part)}"][part] = update
        elif projector:
            a = by_filter(update.a, 1) if projector == "linear_1" else update.a
            by_layer[f"projector.{projector}"][projector] = Update(a, update.b, update.scale, update.magnitude)
        else:
            strange.append(path)
    if strange:
        raise CheckpointError(
            f"{folder}: it changes {listed(strange)}, which have no place here (expected projections of the decoder, "
            "and the "
            "projector); merge the adapter with the library it is from, and convert the result."
        )
    dora = any(update.magnitude is not None for update in updates.values())
    scale = next(iter(updates.values())).scale if updates else 1.0
    tensors: dict[str, mx.array] = {}
    for target, of_target in by_layer.items():
        stacked = _stacked(folder, target, of_target, config, scale)
        tensors |= {f"{target}.lora_a": stacked.a, f"{target}.lora_b": stacked.b}
        if dora and stacked.magnitude is not None:
            tensors[f"{target}.magnitude"] = stacked.magnitude
    trained = _whole(folder, whole)
    rank = max((update.a.shape[0] for update in updates.values()), default=1)
    settings = AdapterConfig(
        base or folder.name, "", "", tuple(by_layer), tuple(trained), rank, scale * rank, scale, dora=dora
    )
    return Adapter(settings, tensors | trained, str(folder))


def _stacked(
    folder: Path, target: str, parts: Mapping[str, Update], config: ModelConfig | None, scale: float
) -> Update:
    """The updates of the projections that one of our layers stacks, as one; a projection without one gets none."""
    names = next((names for whole, names in STACKED.items() if target.endswith(whole)), None)
    if names is None:
        (update,) = parts.values()
        return Update(update.a, update.b * (update.scale / scale), scale, update.magnitude)
    rows = _rows(folder, names, parts, config)
    magnitudes = [parts[name].magnitude if name in parts else None for name in names]
    lengths = [m for m in magnitudes if m is not None]
    if lengths and len(lengths) != len(names):
        raise CheckpointError(
            f"{folder}: DoRA of some of {listed(names)} only, which are one layer here; train all of them."
        )
    magnitude = mx.concatenate(lengths) if lengths else None
    found = [parts.get(name) for name in names]
    first = next(update for update in found if update is not None)
    if all(u is not None and u.a.shape == first.a.shape and mx.array_equal(u.a, first.a).item() for u in found):
        return Update(
            first.a, mx.concatenate([u.b * (u.scale / scale) for u in found if u is not None]), scale, magnitude
        )
    a = mx.concatenate([update.a for update in found if update is not None])
    blocks, column = [], 0
    for part, count in zip(found, rows, strict=True):
        rank = 0 if part is None else part.a.shape[0]
        block = mx.zeros((count, 0)) if part is None else part.b * (part.scale / scale)
        if block.shape[0] != count:
            raise CheckpointError(
                f"{folder}: the updates of {target} have {block.shape[0]} rows, and this model's have {count}."
            )
        blocks.append(mx.pad(block, [(0, 0), (column, a.shape[0] - column - rank)]))
        column += rank
    return Update(a, mx.concatenate(blocks), scale, magnitude)


def _rows(folder: Path, names: tuple[str, ...], parts: Mapping[str, Update], config: ModelConfig | None) -> list[int]:
    """How many rows each projection of a stack has."""
    if config is not None:
        text = config.text
        kv = text.num_key_value_heads * text.head_dim
        return [text.hidden_size, kv, kv] if len(names) == 3 else [text.intermediate_size] * 2
    found = [parts[name].b.shape[0] if name in parts else None for name in names]
    query = next(iter(parts.values())).a.shape[1] if len(names) == 3 else None  # as many as columns
    others = next((count for count in found[len(names) - 2 :] if count is not None), None)
    if others is None:
        raise CheckpointError(
            f"{folder}: it changes queries and neither keys nor values, so how many rows those have is not known; "
            "load it "
            "with its model (`adapter`) instead of converting it."
        )
    return [query, others, others] if query is not None else [others, others]


def _whole(folder: Path, whole: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """Parameters that were trained whole, by our names."""
    found: dict[str, mx.array] = {}
    stacks: dict[str, dict[str, mx.array]] = defaultdict(dict)
    strange = []
    for name, array in whole.items():
        path, _, part = name.rpartition(".")
        decoder, norm = DECODER.search(path), NORM.search(path)
        projector = next((ours for theirs, ours in PROJECTOR.items() if path.endswith(theirs)), None)
        if projector and part in ("weight", "bias"):
            turned = projector == "linear_1" and part == "weight"
            found[f"projector.{projector}.{part}"] = by_filter(array, 1) if turned else array
        elif norm and part == "weight":
            found[f"text.layers.{norm[1]}.{norm[2]}.weight"] = array
        elif decoder and part in ("weight", "bias"):
            target = f"text.layers.{decoder[1]}.{HOME.get(decoder[2], decoder[2])}.{part}"
            if decoder[2] in HOME:
                stacks[target][decoder[2]] = array
            else:
                found[target] = array
        else:
            strange.append(name)
    for target, parts in stacks.items():
        names = next(names for whole_name, names in STACKED.items() if whole_name in target)
        if parts.keys() == set(names):
            found[target] = mx.concatenate([parts[each] for each in names])
        else:
            strange += [f"{target} without {each}" for each in names if each not in parts]
    if strange:
        raise CheckpointError(
            f"{folder}: it holds {listed(strange)}, which have no place here; merge the adapter with the library it "
            "is from, and "
            "convert the result."
        )
    return found
