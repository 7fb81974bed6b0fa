"""A checkpoint folder as found: its config.json and the names, shapes and types of its tensors; no data is read yet.

Nothing in a folder is executed: pickles are refused by name, and `auto_map`, `model_file` and *.py are never looked at.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from fastvlm_mlx import safetensors
from fastvlm_mlx.errors import CheckpointError, listed
from fastvlm_mlx.safetensors import Tensor
from fastvlm_mlx.storage import INDEX, read_json

PICKLES = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True)
class Checkpoint:
    """A folder's config and what its safetensors headers announce."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def load(self) -> dict[str, mx.array]:
        """Every tensor, unevaluated: read from its file when it is needed."""
        arrays: dict[str, mx.array] = {}
        for file in sorted({tensor.file for tensor in self.tensors.values()}):
            arrays |= safetensors.load(file)
        return arrays


def read_checkpoint(folder: Path) -> Checkpoint:
    """Open a folder of safetensors, single or sharded; raises CheckpointError for anything missing or contradictory."""
    config = read_json(folder / "config.json")
    tensors: dict[str, Tensor] = {}
    for file in _weight_files(folder):
        header = safetensors.read_header(file)
        twice = tensors.keys() & header.keys()
        if twice:
            raise CheckpointError(f"{folder}: {listed(sorted(twice))} are stored in two files; remove the files left over.")
        tensors |= header
    if (folder / INDEX).exists():
        _check_index(folder, tensors)
    return Checkpoint(folder, config, tensors)


def _weight_files(folder: Path) -> list[Path]:
    index = folder / INDEX
    if index.exists():
        names = sorted({str(name) for name in _weight_map(index).values()})
        outside = [name for name in names if Path(name).name != name]
        if outside:
            raise CheckpointError(f"{index}: names files outside the folder, {listed(outside)}; this index is not to be trusted.")
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise CheckpointError(f"{folder}: shard {listed(missing)} is missing; fetch the checkpoint again.")
        return [folder / name for name in names]
    files = sorted(folder.glob("*.safetensors"))
    if files:
        return files
    pickles = [path.name for path in sorted(folder.iterdir()) if path.suffix in PICKLES]
    if pickles:
        raise CheckpointError(
            f"{folder}: its weights are pickles ({listed(pickles)}), which can run code when opened and are never read; "
            "save them as safetensors first."
        )
    raise CheckpointError(f"{folder}: no *.safetensors in it; expected model.safetensors or shards with {INDEX}.")


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: no 'weight_map' in it; fetch the file again.")
    return weight_map


def _check_index(folder: Path, tensors: dict[str, Tensor]) -> None:
    weight_map = _weight_map(folder / INDEX)
    absent = [name for name, file in weight_map.items() if name not in tensors or tensors[name].file.name != file]
    if absent:
        raise CheckpointError(f"{folder}: {INDEX} promises {listed(absent)} in shards that lack them; fetch the checkpoint again.")
    unknown = sorted(tensors.keys() - weight_map.keys())
    if unknown:
        raise CheckpointError(f"{folder}: its shards hold {listed(unknown)}, unknown to {INDEX}; fetch the checkpoint again.")
