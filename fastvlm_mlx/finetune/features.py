"""What the tower makes of pictures, computed once: features (N, C) before the projector, in memory and on disk.

They are kept by the pixels, the size, the fit, the type and the tower's weights, so a hit is bit for bit what would be
computed. A file each: `ROOT/features/TOWER-DTYPE-SIZE-FIT/DIGEST.safetensors`.
"""

import os
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from ..decoding.engine import Engine
from ..errors import CheckpointError, OutputError
from ..files import paths, safetensors
from ..hub import caches
from ..inputs.image import Pixels
from ..network.model import LEVELS, FastVLM
from ..storage.adapter import write_tensors
from .options import NONE

MAX_DISK_BYTES = 20_000_000_000  # of all features on disk: 12,700 pictures at 1024 pixels in bfloat16
CHECK_DISK_BYTES = 200_000_000  # written between two looks at how much there is on disk
MAX_MEMORY_BYTES = 1_000_000_000  # of the features held


def tower_digest(model: FastVLM) -> str:
    """What identifies a tower's weights and the type they are in."""
    digest = blake2b(digest_size=12)
    flat: list[tuple[str, mx.array]] = tree_flatten(model.vision.parameters())  # type: ignore[assignment]
    for name, array in sorted(flat, key=lambda each: each[0]):
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(np.asarray(array.astype(mx.float32) if array.dtype == mx.bfloat16 else array).tobytes())
    return digest.hexdigest()


class Features:
    """The features of pictures for one tower at one resolution.

    `folder` is where they are kept, `computed` how many the tower was asked for. Only what `keep` and `of` have seen is
    known.
    """

    def __init__(self, engine: Engine, cache: str | None):
        self.engine, self.model = engine, engine.model
        self.computed = 0
        self.folder: Path | None = None
        if cache != NONE:
            root = caches.root() / caches.FEATURES if cache is None else Path(paths.find(cache))
            image = engine.config.image
            dtype = str(self.model.dtype).removeprefix("mlx.core.")
            self.folder = root / f"{tower_digest(self.model)}-{dtype}-{image.size}-{image.fit}"
        self._held: OrderedDict[bytes, mx.array] = OrderedDict()
        self._bytes = 0
        self._written = CHECK_DISK_BYTES  # so that the first write looks

    def encode(self, pixels: Pixels) -> mx.array:
        """The features (N, C) of prepared pixels (S, S, 3), fresh from the tower."""
        levels = mx.array(LEVELS).astype(self.model.dtype)
        found: mx.array = self.model.vision(levels[mx.array(pixels[None])])[0]
        if not mx.isfinite(found).all().item():
            raise CheckpointError(
                "The image encoder's numbers overflow; load the model with `dtype='bfloat16'` or `dtype='float32'`."
            )
        self.computed += 1
        return found

    def keep(self, key: bytes, pixels: Pixels) -> None:
        """See to it that a picture's features are at hand."""
        if self._look_up(key) is not None:
            return
        found = self.encode(pixels)
        mx.eval(found)
        self._hold(key, found)
        if self.folder is not None:
            self._write(key, found)

    def of(self, keys: Sequence[bytes], sources: Sequence[Any]) -> list[mx.array]:
        """The features of pictures by their digests; one that is nowhere any more is opened and encoded again."""
        found = []
        for key, source in zip(keys, sources, strict=True):
            array = self._look_up(key)
            if array is None:
                array = self.encode(self.engine.pixels(source))
                mx.eval(array)
                self._hold(key, array)
            found.append(array)
        return found

    def _look_up(self, key: bytes) -> mx.array | None:
        if key in self._held:
            self._held.move_to_end(key)
            return self._held[key]
        path = self._path(key)
        found = self._read(path) if path is not None else None
        if found is not None:
            self._hold(key, found)
        return found

    def _path(self, key: bytes) -> Path | None:
        return None if self.folder is None else self.folder / f"{key.hex()}.safetensors"

    def _read(self, path: Path) -> mx.array | None:
        """The features in a file; None where there is none, or it is damaged, which is removed."""
        if not path.exists():
            return None
        try:
            safetensors.read_header(path)
            found = dict(safetensors.load(path))["features"]
            mx.eval(found)
        except (CheckpointError, KeyError, OSError, RuntimeError, ValueError):
            path.unlink(missing_ok=True)
            return None
        with suppress(OSError):
            os.utime(path)  # used now
        return found

    def _hold(self, key: bytes, array: mx.array) -> None:
        self._held[key] = array
        self._bytes += array.nbytes
        while self._bytes > MAX_MEMORY_BYTES and len(self._held) > 1:
            self._bytes -= self._held.popitem(last=False)[1].nbytes

    def _write(self, key: bytes, array: mx.array) -> None:
        path = self._path(key)
        assert path is not None and self.folder is not None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(
                f"{self.folder} cannot be made ({error.strerror}); name another folder as `cache`, or 'none' for no "
                "cache."
            ) from error
        write_tensors(path, {"features": array})
        self._written += array.nbytes
        if self._written >= CHECK_DISK_BYTES:
            make_room(self.folder.parent, MAX_DISK_BYTES)
            self._written = 0


def make_room(root: Path, limit: int) -> int:
    """Remove the features that were used least recently until all take `limit` bytes at most; returns how many were
    removed.
    """
    files = []
    for path in root.glob("*/*.safetensors"):
        with suppress(OSError):
            status = path.stat()
            files.append((status.st_mtime, status.st_size, path))
    total, removed = sum(size for _, size, _ in files), 0
    for _, size, path in sorted(files):
        if total <= limit:
            break
        path.unlink(missing_ok=True)
        total -= size
        removed += 1
    return removed
