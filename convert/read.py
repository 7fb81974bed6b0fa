"""A checkpoint folder: its config.json, and names, shapes and dtypes of its tensors; no data is read yet.

Nothing in a folder is executed: `auto_map`, `model_file` and *.py are never read, and where there are no safetensors,
pickles are opened by PyTorch's loader of plain tensors only.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from fastvlm_mlx.errors import CheckpointError
from fastvlm_mlx.files import safetensors, shards
from fastvlm_mlx.files.adapters import check_whole
from fastvlm_mlx.files.jsonfile import read_table
from fastvlm_mlx.files.safetensors import Tensor

from . import pickles
from .wrappers import check_plain, unwrapped

MAX_TENSORS = 20_000  # 7B in training form has about 1,900; each name is looked for in a table of hundreds of rows


@dataclass(frozen=True)
class Checkpoint:
    """A folder's config, and its tensors as its files announce them.

    `tensors` are by the layout's names, `names` gives the layout's name of each stored one, and `arrays` loads one
    file's tensors by their stored names.
    """

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    names: dict[str, str]
    arrays: Callable[[Path], dict[str, mx.array]] = safetensors.load

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def load(self) -> dict[str, mx.array]:
        """Every tensor by the layout's names, unevaluated: each is read from its file when it is needed."""
        arrays: dict[str, mx.array] = {}
        for file in sorted({tensor.file for tensor in self.tensors.values()}):
            arrays |= {self.names.get(stored, stored): array for stored, array in self.arrays(file).items()}
        return arrays


def read_checkpoint(folder: Path) -> Checkpoint:
    """Open a folder of safetensors, single or sharded, or of pickles.

    Raises CheckpointError for anything missing or contradictory.
    """
    check_whole(folder)
    config = read_table(folder / "config.json")
    tensors, arrays = shards.read_headers(folder), safetensors.load
    if not tensors:
        tensors, arrays = pickles.read_headers(folder), pickles.load
    if not tensors:
        raise CheckpointError(
            f"{folder}: no *.safetensors in it; expected model.safetensors or shards with {shards.INDEX}."
        )
    if len(tensors) > MAX_TENSORS:
        raise CheckpointError(
            f"{folder}: holds {len(tensors)} tensors, FastVLM has at most {MAX_TENSORS}; check the folder."
        )
    check_plain(tensors, config)
    names = unwrapped(tensors)
    return Checkpoint(folder, config, {names[stored]: tensor for stored, tensor in tensors.items()}, names, arrays)
