"""Where downloads are kept, and how large they are.

Our cache is FASTVLM_CACHE of the environment, else fastvlm-mlx in XDG_CACHE_HOME or ~/.cache:

    models/NAME         Apple's archives, unpacked     archives/NAME.zip.part    one that was interrupted
    notices/apple-amlr  the licence has been pointed out
    features/           what the image encoder made of pictures that were fine-tuned on
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import HubError

FEATURES = "features"  # the folder of the image encoder's results


@dataclass(frozen=True)
class Cache:
    """One thing kept on disk: its name, where it is, and its bytes; `partial` of them are unfinished downloads."""

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
    """The folder of our cache, which need not exist; raises HubError where there is no home folder to put it in."""
    chosen = os.environ.get("FASTVLM_CACHE")
    parent = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = Path(os.path.expanduser(chosen or f"{parent}/fastvlm-mlx"))  # noqa: PTH111  (leaves what it cannot expand)
    if not folder.is_absolute() and not chosen:
        raise HubError(f"There is no home folder to keep downloads in ({folder}); set FASTVLM_CACHE to a folder.")
    return folder


def every() -> Iterator[Cache]:
    """Everything in this machine's caches: FastVLM repositories of the Hub, Apple's archives, MLX's kernels."""
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
    features = ours / FEATURES
    if _size(features):
        yield Cache("the image encoder's results", features, _size(features))
    archives = ours / "archives"
    if _size(archives, ".zip") or _size(archives, ".part"):
        yield Cache("archives", archives, _size(archives), _size(archives, ".part"))
    import tempfile

    kernels = Path(tempfile.gettempdir()) / "mlx"  # the compiled kernels of MLX's CPU backend
    if _size(kernels):
        yield Cache("compiled kernels", kernels, _size(kernels))


def _hub_cache() -> Path:
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


def _folders(parent: Path, pattern: str) -> list[Path]:
    """The folders in a cache that match a pattern; empty where the cache is missing or cannot be read."""
    try:
        return sorted(path for path in parent.glob(pattern) if path.is_dir() and not path.name.startswith("."))
    except OSError:
        return []


def _size(folder: Path, suffix: str = "") -> int:
    """Bytes of the files below a folder whose names end in `suffix`; links are not counted."""
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
