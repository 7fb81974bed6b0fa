"""FastVLM on Apple Silicon: a picture and a question in, an answer out.

    import fastvlm_mlx
    vlm = fastvlm_mlx.load("apple/FastVLM-0.5B")
    print(vlm.generate("photo.jpg", "What is on the table?"))

Names are imported when first used, so that importing the package costs next to nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .backend import blas
from .version import __version__

blas.preload()

if TYPE_CHECKING:
    from .decoding.generate import Answer, Chunk, Stats
    from .decoding.stream import Stream
    from .errors import FastVLMError
    from .vlm import VLM, load

__all__ = ["VLM", "Answer", "Chunk", "FastVLMError", "Stats", "Stream", "__version__", "load"]

_HOMES = {
    "VLM": "vlm", "load": "vlm", "Answer": "decoding.generate", "Chunk": "decoding.generate", "Stats": "decoding.generate",
    "Stream": "decoding.stream",
    "FastVLMError": "errors",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fastvlm_mlx' has no attribute {name!r}")
    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
