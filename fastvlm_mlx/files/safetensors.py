"""safetensors files; the header is checked against the size of the file before any tensor is read.

Format: 8 bytes with the header's length (little-endian), a JSON header {name: {dtype, shape, data_offsets}}, the data.
"""

import math
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

from ..errors import CheckpointError, about_its_path, shown
from . import regular as files
from .jsonfile import parse_table

DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2, "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64":
    8,
}  # fmt: skip
# Dtypes of the format that MLX lacks.
UNSUPPORTED_DTYPES = (
    "F64", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F4", "F6_E2M3", "F6_E3M2", "C64",
)  # fmt: skip
LFS_POINTER = b"version https://git-lfs"  # how a file begins that Git LFS has not downloaded yet
MAX_HEADER_BYTES = 20_000_000  # bytes; 7B's takes a hundredth of that
MAX_DIMENSIONS, MAX_SIZE = 8, (1 << 31) - 1  # MLX counts in int32


class Tensor(NamedTuple):
    """One tensor as a header describes it: its file, its dtype as safetensors names it ("BF16"), and its shape."""

    file: Path
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of the tensor's data in bytes."""
        return DTYPE_BYTES[self.dtype] * math.prod(self.shape)


@about_its_path
def read_header(path: Path) -> dict[str, Tensor]:
    """Read the header of one file: name -> tensor.

    Raises CheckpointError where header and file disagree, or for a dtype that MLX does not have.
    """
    try:
        size = files.size_of(path)
        with path.open("rb") as file:
            start = file.read(len(LFS_POINTER))
            if start == LFS_POINTER:
                raise CheckpointError(f"{path}: a pointer of Git LFS, not the file itself; fetch it by 'git lfs pull'.")
            length = int.from_bytes(start[:8], "little")
            file.seek(8)
            if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise CheckpointError(
                    f"{path}: truncated or not a safetensors file ({size} bytes, a header of {length} bytes "
                    "announced); fetch it again."
                )
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror}); check the file and its permissions."
        ) from error
    header = parse_table(text, f"{path}, header")
    header.pop("__metadata__", None)
    _check_layout(path, header, size - 8 - length)
    return {name: Tensor(path, entry["dtype"], tuple(entry["shape"])) for name, entry in header.items()}


@about_its_path
def load(path: Path) -> dict[str, mx.array]:
    """Open the tensors of a file whose header has been checked: name -> array, each read when it is first evaluated.

    Raises CheckpointError where MLX cannot open the file.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise CheckpointError(f"{path}: MLX cannot open a path that is not UTF-8; rename the folder.") from error
    try:
        return dict(mx.load(str(path), format="safetensors"))  # type: ignore[arg-type]
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path}: MLX cannot read it ({error}); fetch it again.") from error


def _check_layout(path: Path, header: dict[str, Any], data_size: int) -> None:
    """Check that every entry is well formed and that the entries together cover the data exactly once.

    Raises CheckpointError.
    """
    spans = []
    for name, entry in header.items():
        try:
            dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            whole = all(type(n) is int and 0 <= n <= MAX_SIZE for n in shape) and type(start) is type(end) is int
            right = (
                whole
                and len(shape) <= MAX_DIMENSIONS
                and 0 <= start <= end
                and end - start == DTYPE_BYTES[dtype] * math.prod(shape)
            )
        except (KeyError, TypeError, ValueError):  # not a table, an entry is missing, or not three parts
            right = False
        if not right and isinstance(entry, dict) and entry.get("dtype") in UNSUPPORTED_DTYPES:
            raise CheckpointError(
                f"{path}: {shown(name)} is stored as {entry['dtype']}, which MLX cannot read; save the model in "
                "bfloat16 or float32."
            )
        if not right:
            raise CheckpointError(
                f"{path}: the header's entry for {shown(name)} is malformed or of unknown type; fetch it again."
            )
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
