"""Weights in PyTorch's own files (.bin, .pt, .pth, .ckpt), read by its loader of plain tensors; nothing in them is run.

A pickle can ask for any code to be run. PyTorch's loader with `weights_only=True` (safe since 2.6) takes a file of
tensors and refuses everything else. It comes with the extra `pickles`. Only archives in the format of PyTorch 1.6 and
later are opened.
"""

import zipfile
from pathlib import Path
from typing import Any

import mlx.core as mx

from fastvlm_mlx.errors import CheckpointError, listed
from fastvlm_mlx.files import paths
from fastvlm_mlx.files import regular as files
from fastvlm_mlx.files.safetensors import MAX_DIMENSIONS, MAX_SIZE, Tensor
from fastvlm_mlx.files.unzip import Bounded

SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
OF_THE_TRAINING = (
    "training_args",
    "optimizer",
    "scheduler",
    "rng_state",
    "scaler",
)  # what Trainer leaves beside the weights
INSTEAD = "save the weights as safetensors instead"


def read_headers(folder: Path) -> dict[str, Tensor]:
    """Every tensor by name of the folder's pickles; empty where there are none.

    Raises CheckpointError for files that hold anything but tensors.
    """
    left_out = (*OF_THE_TRAINING, paths.COMPANION)
    found = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES and not path.stem.startswith(left_out))
    shards = [path for path in found if path.name.startswith("pytorch_model")]
    chosen = shards or found
    if len(chosen) > 1 and not shards:
        raise CheckpointError(
            f"{folder}: its weights could be in any of {listed(path.name for path in chosen)}; remove the others.",
            path=folder,
        )
    tensors: dict[str, Tensor] = {}
    for path in chosen:
        header = {name: _described(path, name, tensor) for name, tensor in _open(path).items()}
        twice = tensors.keys() & header.keys()
        if twice:
            raise CheckpointError(
                f"{folder}: {listed(sorted(twice))} are stored in two files; remove the files left over.",
                path=folder,
            )
        tensors |= header
    return tensors


def load(path: Path) -> dict[str, mx.array]:
    """The tensors of a file, each in memory once."""
    import torch

    tensors = _open(path)
    arrays = {}
    for name in list(tensors):
        tensor = tensors.pop(name).detach().contiguous()
        if tensor.dtype == torch.bfloat16:  # NumPy has no such dtype
            arrays[name] = mx.array(tensor.view(torch.int16).numpy()).view(mx.bfloat16)
        else:
            arrays[name] = mx.array(tensor.numpy())
    return arrays


def _open(path: Path) -> dict[str, Any]:
    """The tensors of a file by name, memory-mapped and not read yet."""
    _check_archive(path)
    torch = _torch(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # of many classes
        reason = " ".join(str(error).split())[:150]
        raise CheckpointError(
            f"{path}: holds more than tensors, or is damaged ({reason}); nothing in it was run; {INSTEAD}, or fetch "
            "it again.",
            path=path,
        ) from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    plain = isinstance(state, dict) and all(
        isinstance(name, str) and isinstance(t, torch.Tensor) for name, t in state.items()
    )
    if not plain:
        raise CheckpointError(
            f"{path}: holds a {type(state).__name__}, expected a table of names and tensors; {INSTEAD}.",
            path=path,
        )
    return dict(state)


def _torch(path: Path) -> Any:
    try:
        import torch
    except ImportError as error:
        raise CheckpointError(
            f"{path}: the weights are a pickle, which only PyTorch's loader of plain tensors may open; install it with "
            f"pip install torch (the extra 'pickles'), or {INSTEAD}.",
            path=path,
        ) from error
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 6):
        raise CheckpointError(
            f"{path}: before 2.6 PyTorch's loader could be made to run code, and this is {torch.__version__}; make it "
            "newer.",
            path=path,
        )
    return torch


def _check_archive(path: Path) -> None:
    """Raise CheckpointError for anything but an uncompressed archive.

    Reading one never takes more than the file's size.
    """
    try:
        size = files.size_of(path)
        with Bounded(path) as file, zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror}); check the file and its permissions.",
            path=path,
        ) from error
    except (zipfile.BadZipFile, ValueError, NotImplementedError, UnicodeError) as error:
        raise CheckpointError(
            f"{path}: not an archive as PyTorch writes it, or damaged; {INSTEAD}, or fetch it again.",
            path=path,
        ) from error
    if (
        any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
        or sum(entry.file_size for entry in entries) > size
    ):
        raise CheckpointError(f"{path}: a compressed archive, which PyTorch does not write; {INSTEAD}.", path=path)


def _described(path: Path, name: str, tensor: Any) -> Tensor:
    """A tensor as a safetensors header would describe it."""
    import torch

    dtypes = {
        torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64", torch.int32: "I32",
        torch.uint8: "U8", torch.bool: "BOOL",
    }  # fmt: skip
    shape = tuple(tensor.shape)
    plain = tensor.layout == torch.strided and tensor.dtype in dtypes and len(shape) <= MAX_DIMENSIONS
    # A stored number can stand for a tensor of terabytes by being repeated.
    if (
        not plain
        or any(side > MAX_SIZE for side in shape)
        or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes()
    ):
        raise CheckpointError(f"{path}: {name[:200]!r} is no plain tensor of a type FastVLM has; {INSTEAD}.", path=path)
    return Tensor(path, dtypes[tensor.dtype], shape)
