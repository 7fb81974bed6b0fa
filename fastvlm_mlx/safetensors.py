"""safetensors files, read with suspicion: the header is checked against the file before any tensor is believed.

Format: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, then the data.
"""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

from .errors import CheckpointError, listed

BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2, "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8,
}  # fmt: skip
MAX_HEADER = 100_000_000  # bytes, as the reference implementation allows


class Tensor(NamedTuple):
    """What a header says of one tensor."""

    file: Path
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        return BYTES[self.dtype] * math.prod(self.shape)


def read_header(path: Path) -> dict[str, Tensor]:
    """Name -> tensor of one file; raises CheckpointError where the header and the file disagree."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER):
                raise CheckpointError(
                    f"{path}: truncated or not a safetensors file ({size} bytes, a header of {length} bytes announced); "
                    "fetch it again."
                )
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); check the file and its permissions.") from error
    try:
        header = json.loads(text, object_pairs_hook=lambda pairs: _unique(path, pairs))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: its header is not valid JSON, so it is damaged; fetch it again.") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: its header is not a table of tensors, so it is damaged; fetch it again.")
    header.pop("__metadata__", None)
    _check_layout(path, header, size - 8 - length)
    return {name: Tensor(path, entry["dtype"], tuple(entry["shape"])) for name, entry in header.items()}


def load(path: Path) -> dict[str, mx.array]:
    """The tensors of a file whose header has been checked; each is read when it is first evaluated."""
    try:
        return dict(mx.load(str(path), format="safetensors"))  # type: ignore[arg-type]
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path}: MLX cannot read it ({error}); fetch it again.") from error


def _unique(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        names = [name for name, _ in pairs]
        twice = {name for name in names if names.count(name) > 1}
        raise CheckpointError(f"{path}: {listed(sorted(twice))} appear twice in its header; fetch it again.")
    return table


def _check_layout(path: Path, header: dict[str, Any], data_size: int) -> None:
    """Every entry well formed, and the entries together covering the data exactly once."""
    spans = []
    for name, entry in header.items():
        try:
            dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            whole = all(isinstance(n, int) and n >= 0 for n in (*shape, start, end))
            right = whole and end - start == BYTES[dtype] * math.prod(shape)
        except (KeyError, TypeError, ValueError):
            right = False
        if not right:
            raise CheckpointError(f"{path}: the header's entry for {name!r} is malformed or of an unknown type; fetch it again.")
        spans.append((start, end))
    position = 0
    for start, end in sorted(spans):
        if start != position:
            raise CheckpointError(f"{path}: its tensors overlap or leave gaps, so it is damaged; fetch it again.")
        position = end
    if position != data_size:
        raise CheckpointError(
            f"{path}: the header describes {position} bytes of tensors, the file holds {data_size}; fetch it again."
        )
