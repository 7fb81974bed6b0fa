"""A network's weights and what describes them -> a folder of ours, atomically."""

import json
from pathlib import Path

import mlx.core as mx

from ..config import ModelConfig
from ..errors import CheckpointError, OutputError
from ..files import safetensors
from ..files.shards import INDEX
from .open import Named
from .place import new_folder

SHARD_BYTES = 5_000_000_000
NO_ROOM = "is the disk full?); make room or choose another `out`"


def save(
    out: Path, config: ModelConfig, weights: Named, texts: dict[str, str], *, nbytes: int, force: bool = False
) -> None:
    """Write a folder of `texts` by file name, config.json and the weights, of about `nbytes` bytes; all of it or nothing."""
    with new_folder(out, nbytes, force) as partial:
        write(partial, config, weights, texts)


def write(folder: Path, config: ModelConfig, weights: Named, texts: dict[str, str]) -> None:
    """Fill a new folder, see `new_folder`."""
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(config.to_dict(), indent=2) + "\n", encoding="utf-8")
    save_weights(folder, weights)


def save_weights(folder: Path, weights: Named, order: str = "mlx") -> None:
    """Shards of up to SHARD_BYTES, one of them in memory at a time; a single one is plain model.safetensors.

    `order` is noted in the files: whose order of axes kernels have, "mlx" or "pt" (PyTorch's).
    """
    done: list[tuple[Path, list[str]]] = []
    total = 0

    def flush(shard: dict[str, mx.array]) -> None:
        path = folder / f"shard-{len(done)}.safetensors"
        try:
            mx.save_safetensors(str(path), shard, metadata={"format": order})
            written = safetensors.read_header(path).keys()
        except (RuntimeError, ValueError, CheckpointError) as error:
            raise OutputError(f"{folder.parent} cannot take the weights ({NO_ROOM}.", path=folder.parent) from error
        if written != shard.keys():
            raise OutputError(f"{folder.parent} took only part of the weights ({NO_ROOM}.", path=folder.parent)
        done.append((path, list(shard)))

    shard: dict[str, mx.array] = {}
    size = 0
    for name, array in weights:
        if shard and size + array.nbytes > SHARD_BYTES:
            flush(shard)
            shard, size = {}, 0
        shard[name] = array
        size += array.nbytes
        total += array.nbytes
    flush(shard)
    if len(done) == 1:
        done[0][0].rename(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, (path, names) in enumerate(done, start=1):
        file = f"model-{number:05d}-of-{len(done):05d}.safetensors"
        path.rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
