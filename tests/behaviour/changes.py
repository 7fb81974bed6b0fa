"""Changes to a model's folder, each a function of the folder: what the tests of hostile folders damage whole ones
with."""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from .. import checkpoint

Change = Callable[[Path], object]


def settings(**changes: Any) -> Change:
    """Change config.json; a value of None removes the entry, and a dictionary changes the table there."""

    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        for key, value in changes.items():
            if value is None:
                del config[key]
            elif isinstance(value, dict) and isinstance(config.get(key), dict):
                config[key] |= value
            else:
                config[key] = value
        (folder / "config.json").write_text(json.dumps(config))

    return change


def text(name: str, content: str | bytes) -> Change:
    """Replace a file."""
    return lambda folder: (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


def without(*names: str) -> Change:
    """Remove files."""
    return lambda folder: [(folder / name).unlink() for name in names]


def pipe(name: str) -> Change:
    """A pipe in a file's place, which would block whoever opens it."""

    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return change


def link(name: str, to: str) -> Change:
    """A link in a file's place."""

    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(to)

    return change


def weights(change: Callable[[dict[str, Any]], object]) -> Change:
    """Change the tensors and save them again."""

    def apply(folder: Path) -> None:
        tensors = checkpoint.read(folder)
        change(tensors)
        checkpoint.save(folder / "model.safetensors", tensors)

    return apply


def poison(name: str, value: float) -> Change:
    """One value of a tensor that is no number."""

    def change(tensors: dict[str, Any]) -> None:
        flat = np.array(tensors[name].astype(mx.float32))
        flat.reshape(-1)[flat.size // 2] = value
        tensors[name] = mx.array(flat).astype(tensors[name].dtype)

    return weights(change)


def header(change: Callable[[dict[str, Any]], object], *, grow: int = 0) -> Change:
    """Change what model.safetensors says of itself, leaving the data."""

    def apply(folder: Path) -> None:
        path = folder / "model.safetensors"
        data = path.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        table = json.loads(data[8 : 8 + length])
        new = change(table)
        body = new if isinstance(new, bytes) else json.dumps(table).encode()
        path.write_bytes(struct.pack("<Q", len(body)) + body + data[8 + length :] + bytes(grow))

    return apply


def cut(part: float) -> Change:
    """Only the first part of the weights' file."""

    def apply(folder: Path) -> None:
        data = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(data[: int(len(data) * part)])

    return apply


def set_entry(name: str, **entry: Any) -> Change:
    return header(lambda table: table[name].update(entry))


def first(table: dict[str, Any]) -> str:
    return next(name for name in table if name != "__metadata__")


def index(change: Callable[[dict[str, Any]], object]) -> Change:
    """Two shards and an index, then the index changed."""

    def apply(folder: Path) -> None:
        checkpoint.shard(folder, 2)
        path = folder / "model.safetensors.index.json"
        table = json.loads(path.read_text())
        change(table)
        path.write_text(json.dumps(table))

    return apply


def then(*changes: Change) -> Change:
    return lambda folder: [change(folder) for change in changes]


def sharded(folder: Path) -> None:
    checkpoint.shard(folder, 2)


class Attack:
    """Unpickled, it creates a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.path),)
