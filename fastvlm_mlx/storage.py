"""Our folder: opened strictly, saved whole or not at all.

    config.json  model.safetensors (or shards with an index)  tokenizer.json  README.md  LICENSE
"""

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from . import safetensors
from .config import ModelConfig
from .errors import CheckpointError, OutputError, listed
from .tokenizer import Tokenizer

SHARD_BYTES = 5_000_000_000
INDEX = "model.safetensors.index.json"

Named = Iterable[tuple[str, mx.array]]


@dataclass(frozen=True)
class OpenModel:
    """A model folder whose small files have been read and checked; `weights` reads the large ones, in our names."""

    name: str
    config: ModelConfig
    tokenizer: Tokenizer
    weights: Callable[[], Named]


def is_ours(folder: Path) -> bool:
    """Whether config.json says the folder is in our format; an unreadable one is left to the reader's error."""
    try:
        return '"fastvlm_mlx"' in (folder / "config.json").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False


def open_ours(folder: Path, name: str, tokenizer: Path | None = None) -> OpenModel:
    """Open our folder; raises CheckpointError where a file is missing or contradicts another."""
    config = ModelConfig.from_dict(read_json(folder / "config.json"))
    files = sorted(folder.glob("*.safetensors"))
    tensors: dict[str, safetensors.Tensor] = {}
    for file in files:
        tensors |= safetensors.read_header(file)
    if (folder / INDEX).exists():
        promised = read_json(folder / INDEX).get("weight_map", {})
        missing = sorted({file for file in promised.values() if not (folder / str(file)).is_file()})
        if missing:
            raise CheckpointError(f"{folder}: shard {listed(missing)} is missing; convert the model again.")
    if not files:
        raise CheckpointError(f"{folder}: no model.safetensors in it; convert the model again.")

    def weights() -> Iterator[tuple[str, mx.array]]:
        for file in files:
            arrays = safetensors.load(file)
            for key in list(arrays):
                yield key, arrays.pop(key)

    return OpenModel(name, config, Tokenizer.open(tokenizer or folder / "tokenizer.json"), weights)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds a table; raises CheckpointError otherwise."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.parent}: no {path.name}, so this is not a FastVLM folder; check the path.") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); check the file and its permissions.") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error}); fetch the file again.") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: holds a {type(data).__name__}, expected a table of settings; fetch the file again.")
    return data


def save(out: Path, config: ModelConfig, weights: Named, texts: dict[str, str], *, nbytes: int, force: bool = False) -> None:
    """Write a folder of `texts` by file name, config.json and the weights, of about `nbytes` bytes; all of it or nothing."""
    with new_folder(out, nbytes, force) as partial:
        for name, text in texts.items():
            (partial / name).write_text(text, encoding="utf-8")
        (partial / "config.json").write_text(json.dumps(config.to_dict(), indent=2) + "\n", encoding="utf-8")
        _save_weights(partial, weights)


@contextmanager
def new_folder(out: Path, nbytes: int, force: bool) -> Iterator[Path]:
    """A folder beside `out` that takes its place when the block ends well, and is removed otherwise.

    What a killed run left behind is removed by the next one; two runs at once are told apart by a lock.
    """
    out = out.absolute()
    if out.exists() and not force:
        raise OutputError(f"{out} exists already; give another --out, or --force to replace it.")
    if out.exists() and not (out / "config.json").exists() and any(out.iterdir() if out.is_dir() else [out]):
        raise OutputError(f"{out} is not a model folder, so it is not replaced even with --force; give another --out.")
    partial = out.parent / f".{out.name}.partial"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(out.parent).free
        if free < nbytes:
            raise OutputError(f"{out.parent} has {free / 1e9:.1f} GB free, the result takes {nbytes / 1e9:.1f} GB; make room.")
        partial.mkdir(exist_ok=True)
        lock = os.open(partial, os.O_RDONLY)
    except OSError as error:
        raise OutputError(f"{out.parent} cannot be written ({error.strerror}); choose another --out.") from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise OutputError(f"{out} is being written by another process; wait for it to end.") from error
        try:
            for leftover in partial.iterdir():
                leftover.unlink()
            yield partial
            _take_place(partial, out)
        except OSError as error:
            raise OutputError(f"{out} cannot be written ({error.strerror or error}); nothing was left behind.") from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    finally:
        os.close(lock)


def _take_place(partial: Path, out: Path) -> None:
    old = out.parent / f".{out.name}.replaced"
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    partial.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def _save_weights(folder: Path, weights: Named) -> None:
    """Shards of up to SHARD_BYTES, one of them in memory at a time; a single one is plain model.safetensors."""
    shards: list[tuple[Path, list[str]]] = []
    total = 0

    def flush(shard: dict[str, mx.array]) -> None:
        path = folder / f"shard-{len(shards)}.safetensors"
        try:
            mx.save_safetensors(str(path), shard, metadata={"format": "mlx"})
        except RuntimeError as error:
            raise OutputError(f"{folder.parent} cannot take the weights ({error}); is the disk full?") from error
        if path.stat().st_size < sum(array.nbytes for array in shard.values()):
            raise OutputError(f"{folder.parent} took only part of the weights; is the disk full?")
        shards.append((path, list(shard)))

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
    if len(shards) == 1:
        shards[0][0].rename(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, (path, names) in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        path.rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
