"""An adapter of ours -> the folder that PEFT loads on transformers' FastVlmForConditionalGeneration.

A stacked update splits exactly: each projection has the same A, and its own rows of B. A projector that was trained
whole becomes one of PEFT's modules_to_save, with its columns in transformers' order.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx

from fastvlm_mlx.errors import CheckpointError, listed
from fastvlm_mlx.files.adapters import ADAPTER_CONFIG
from fastvlm_mlx.storage.adapter import Adapter, write_tensors
from fastvlm_mlx.storage.place import new_folder

from .adapters import PEFT_WEIGHTS
from .key_map import source_name
from .packed import STACKED
from .unfold import by_channel

ROOT = "base_model.model."
PROJECTOR_MODULE = "multi_modal_projector"


def to_peft(adapter: Adapter, out: Path, *, force: bool = False) -> None:
    """Write an adapter as PEFT has it; raises OutputError, and CheckpointError naming what PEFT has no place for."""
    config = adapter.config
    odd = [name for name in config.trained if not name.startswith("projector.")]
    if odd:
        raise CheckpointError(
            f"{adapter.origin}: it holds {listed(odd)} whole, which PEFT has no place for beside updates; fuse it "
            "into its model "
            "instead (`convert` with `adapter`)."
        )
    tensors: dict[str, mx.array] = {}
    ranks: dict[str, int] = {}
    for target in config.targets:
        for published, b, magnitude in _rows(adapter, target):
            path = source_name(f"{published}.weight", "transformers").removesuffix(".weight")
            a = adapter.tensors[f"{target}.lora_a"]
            a = by_channel(a, 1) if target == "projector.linear_1" else a
            tensors |= {f"{ROOT}{path}.lora_A.weight": a, f"{ROOT}{path}.lora_B.weight": b}
            ranks[path] = a.shape[0]
            if magnitude is not None:
                tensors[f"{ROOT}{path}.lora_magnitude_vector"] = magnitude
    for name in config.trained:
        array = adapter.tensors[name]
        turned = name == "projector.linear_1.weight"
        tensors[ROOT + source_name(name, "transformers")] = by_channel(array, 1) if turned else array
    table = _settings(adapter, ranks)
    with new_folder(out, sum(array.nbytes for array in tensors.values()), force) as partial:
        write_tensors(partial / PEFT_WEIGHTS, {name: mx.contiguous(array) for name, array in tensors.items()})
        (partial / ADAPTER_CONFIG).write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")


def _rows(adapter: Adapter, target: str) -> Iterator[tuple[str, mx.array, mx.array | None]]:
    """The projections that a layer of ours stacks: the published path, the rows of B, and those of DoRA's lengths."""
    b, magnitude = adapter.tensors[f"{target}.lora_b"], adapter.tensors.get(f"{target}.magnitude")
    whole = next((whole for whole in STACKED if target.endswith(whole)), None)
    if whole is None:
        yield target, b, magnitude
        return
    names = STACKED[whole]
    width = adapter.tensors[f"{target}.lora_a"].shape[1]
    kv = (b.shape[0] - width) // 2
    ends = [width, width + kv] if len(names) == 3 else [b.shape[0] // 2]
    lengths: list[Any] = [None] * len(names) if magnitude is None else list(mx.split(magnitude, ends))
    for name, rows, length in zip(names, mx.split(b, ends), lengths, strict=True):
        yield target.removesuffix(whole) + name, rows, length


def _settings(adapter: Adapter, ranks: dict[str, int]) -> dict[str, Any]:
    """adapter_config.json as PEFT has it: one rank and alpha, and by path those that differ."""
    config = adapter.config

    def alpha(rank: int) -> float:
        return config.scale * (rank**0.5 if config.rslora else rank)

    other = {path: rank for path, rank in ranks.items() if rank != config.rank}
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": config.base_model,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": alpha(config.rank),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": config.rslora,
        "use_dora": config.dora,
        "target_modules": sorted(ranks),
        "rank_pattern": other,
        "alpha_pattern": {path: alpha(rank) for path, rank in other.items()},
        "modules_to_save": [PROJECTOR_MODULE] if config.trained else None,
    }
