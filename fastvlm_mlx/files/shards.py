"""The safetensors of a folder, one file or shards listed by an index -> the tensors that their headers describe.

No data is read.
"""

import os
from pathlib import Path

from ..errors import CheckpointError, about_its_path, listed
from . import paths, safetensors
from .jsonfile import read_table
from .safetensors import Tensor

INDEX = "model.safetensors.index.json"


@about_its_path
def read_headers(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder by name; empty where the folder has no safetensors.

    Raises CheckpointError where a file is damaged or missing, or index and shards disagree.
    """
    index = folder / INDEX
    promised = _weight_map(index) if index.exists() else {}
    files = (
        _shards(index, promised)
        if promised
        else sorted(path for path in folder.glob("*.safetensors") if not paths.is_companion(path.name))
    )
    tensors: dict[str, Tensor] = {}
    for file in files:
        header = safetensors.read_header(file)
        twice = tensors.keys() & header.keys()
        if twice:
            raise CheckpointError(
                f"{folder}: {listed(sorted(twice))} are stored in two files; remove the files left over."
            )
        tensors |= header
    if promised:
        _check_index(folder, promised, tensors)
    return tensors


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_table(index).get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(file, str) for file in weight_map.values())
    ):
        raise CheckpointError(
            f"{index}: no 'weight_map' of tensors and their files in it; fetch the file again.", path=index
        )
    return weight_map


def _shards(index: Path, promised: dict[str, str]) -> list[Path]:
    names = sorted(set(promised.values()))
    outside = [name for name in names if Path(name).name != name or not name.endswith(".safetensors") or "\0" in name]
    if outside:
        raise CheckpointError(
            f"{index}: names files that are no safetensors of this folder, {listed(outside)}, and is not to be "
            "trusted; fetch the model again.",
            path=index,
        )
    exists = os.path.exists  # Path's raises for names that are too long
    missing = [name for name in names if not exists(index.parent / name)]
    if missing:
        raise CheckpointError(f"{index.parent}: shard {listed(missing)} is missing; fetch the model again.")
    return [index.parent / name for name in names]


def _check_index(folder: Path, promised: dict[str, str], tensors: dict[str, Tensor]) -> None:
    absent = [name for name, file in promised.items() if name not in tensors or tensors[name].file.name != file]
    if absent:
        raise CheckpointError(
            f"{folder}: {INDEX} promises {listed(absent)} in shards that lack them; fetch the model again."
        )
    unknown = sorted(tensors.keys() - promised.keys())
    if unknown:
        raise CheckpointError(
            f"{folder}: its shards hold {listed(unknown)}, unknown to {INDEX}; fetch the model again."
        )
