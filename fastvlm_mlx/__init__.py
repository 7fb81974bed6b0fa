"""FastVLM on Apple Silicon: a picture and a question in, an answer out.

    import fastvlm_mlx
    vlm = fastvlm_mlx.load("apple/FastVLM-0.5B")
    print(vlm.generate("photo.jpg", "What is on the table?"))

Names are imported when first used, so that importing the package costs next to nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import blas

blas.preload()

if TYPE_CHECKING:
    from .errors import FastVLMError
    from .generate import Answer, Chunk, Stats
    from .stream import Stream
    from .vlm import VLM, load

__version__ = "0.1.0"
__all__ = ["VLM", "Answer", "Chunk", "FastVLMError", "Stats", "Stream", "__version__", "load"]

_HOMES = {
    "VLM": "vlm", "load": "vlm", "Answer": "generate", "Chunk": "generate", "Stats": "generate", "Stream": "stream",
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
