"""A checkpoint folder as found: its config.json and the names, shapes and types of its tensors; no data is read yet.

Nothing in a folder is executed: pickles are refused by name, and `auto_map`, `model_file` and *.py are never looked at.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from fastvlm_mlx import safetensors, shards
from fastvlm_mlx.errors import CheckpointError, listed
from fastvlm_mlx.jsonfile import read_table
from fastvlm_mlx.safetensors import Tensor

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
    config = read_table(folder / "config.json")
    tensors = shards.read_headers(folder)
    if not tensors:
        raise _without_weights(folder)
    return Checkpoint(folder, config, tensors)


def _without_weights(folder: Path) -> CheckpointError:
    pickles = [path.name for path in sorted(folder.iterdir()) if path.suffix in PICKLES]
    if pickles:
        return CheckpointError(
            f"{folder}: its weights are pickles ({listed(pickles)}), which can run code when opened and are never read; "
            "save them as safetensors first."
        )
    return CheckpointError(f"{folder}: no *.safetensors in it; expected model.safetensors or shards with {shards.INDEX}.")
