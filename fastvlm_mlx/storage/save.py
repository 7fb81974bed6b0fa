"""A network's weights and the files that describe them -> a folder of ours, written atomically."""

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
    """Write a model folder atomically: `texts` by file name, config.json and the weights.

    `nbytes` is about what the folder takes; `force` replaces a folder of ours at `out`. Raises OutputError.
    """
    with new_folder(out, nbytes, force) as partial:
        write(partial, config, weights, texts)


def write(folder: Path, config: ModelConfig, weights: Named, texts: dict[str, str]) -> None:
    """Write `texts`, config.json and the weights into an empty folder, such as `new_folder` gives.

    Raises OutputError.
    """
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(config.to_dict(), indent=2) + "\n", encoding="utf-8")
    save_weights(folder, weights)


def save_weights(folder: Path, weights: Named, order: str = "mlx") -> None:
    """Write weights as model.safetensors, or as shards of up to SHARD_BYTES with an index.

    One shard is in memory at a time. `order` is the order of the kernels' axes, "mlx" or "pt" (PyTorch's), which is
    noted in the files. Raises OutputError.
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
