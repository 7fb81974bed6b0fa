"""Where downloads are kept, how large they are, and how to be rid of them.

Ours is the environment's FASTVLM_CACHE, else fastvlm-mlx in XDG_CACHE_HOME or ~/.cache:

    models/NAME         Apple's archives, unpacked     archives/NAME.zip.part    one that was interrupted
    notices/apple-amlr  that the licence was pointed at
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import HubError


@dataclass(frozen=True)
class Cache:
    """Something kept on disk: what it is, where, and its bytes, `partial` of them of downloads that were interrupted."""

    name: str
    path: Path
    nbytes: int
    partial: int = 0

    @property
    def clear(self) -> str:
        """The shell command that removes it."""
        import shlex

        return f"rm -r {shlex.quote(str(self.path))}"


def root() -> Path:
    """The folder of our cache, which need not exist; raises HubError where there is no home for it."""
    chosen = os.environ.get("FASTVLM_CACHE")
    parent = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = Path(os.path.expanduser(chosen or f"{parent}/fastvlm-mlx"))  # noqa: PTH111  (leaves what it cannot expand)
    if not folder.is_absolute() and not chosen:
        raise HubError(f"There is no home folder to keep downloads in ({folder}); set FASTVLM_CACHE to a folder.")
    return folder


def every() -> Iterator[Cache]:
    """What downloads have left on this machine: FastVLM repositories of the Hub, Apple's archives, and MLX's compiled kernels."""
    for folder in _folders(_hub_cache(), "models--*"):
        if "fastvlm" in folder.name.lower():
            name = folder.name.removeprefix("models--").replace("--", "/", 1)
            yield Cache(name, folder, _size(folder), _size(folder, ".incomplete"))
    try:
        ours = root()
    except HubError:
        return
    for folder in _folders(ours / "models", "*"):
        yield Cache(folder.name, folder, _size(folder))
    archives = ours / "archives"
    if _size(archives, ".zip") or _size(archives, ".part"):
        yield Cache("archives", archives, _size(archives), _size(archives, ".part"))
    import tempfile

    kernels = Path(tempfile.gettempdir()) / "mlx"  # where MLX's CPU backend puts what it has compiled
    if _size(kernels):
        yield Cache("compiled kernels", kernels, _size(kernels))


def _hub_cache() -> Path:
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


def _folders(parent: Path, pattern: str) -> list[Path]:
    """The folders of a cache, none where it is missing or cannot be read."""
    try:
        return sorted(path for path in parent.glob(pattern) if path.is_dir() and not path.name.startswith("."))
    except OSError:
        return []


def _size(folder: Path, suffix: str = "") -> int:
    """Bytes of a folder's files whose names end so, all the way down; links count nothing."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            path = Path(parent) / name
            if name.endswith(suffix) and not path.is_symlink():
                try:
                    total += path.stat().st_size
                except OSError:  # removed meanwhile
                    continue
    return total
