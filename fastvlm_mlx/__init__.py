"""FastVLM on Apple Silicon: a picture and a question in, an answer out.

    import fastvlm_mlx
    vlm = fastvlm_mlx.load("apple/FastVLM-0.5B")
    print(vlm.generate("photo.jpg", "What is on the table?"))

Names are imported when they are first used, so that importing the package takes next to no time.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .backend import blas
from .version import __version__

blas.preload()

if TYPE_CHECKING:
    from .decoding.answer import Answer, Answers, Chunk, Stats
    from .decoding.stream import Stream
    from .errors import (
        BusyError,
        CancelledError,
        CheckpointError,
        DeviceError,
        FastVLMError,
        FastVLMWarning,
        HubError,
        ImageError,
        OptionError,
        OutOfMemoryError,
        OutputError,
        PromptError,
        TokenizerError,
        TrainingError,
    )
    from .export.coreml import convert_to_coreml
    from .finetune.options import TuneOptions
    from .finetune.tune import Tuned, tune
    from .storage.adapter import Adapter
    from .vlm import VLM, load

_HOMES = {
    "vlm": ("VLM", "load"),
    "decoding.answer": ("Answer", "Answers", "Chunk", "Stats"),
    "decoding.stream": ("Stream",),
    "export.coreml": ("convert_to_coreml",),
    "errors": (
        "BusyError", "CancelledError", "CheckpointError", "DeviceError", "FastVLMError", "FastVLMWarning", "HubError",
        "ImageError", "OptionError", "OutOfMemoryError", "OutputError", "PromptError", "TokenizerError",
        "TrainingError",
    ),
    "finetune.options": ("TuneOptions",),
    "finetune.tune": ("Tuned", "tune"),
    "storage.adapter": ("Adapter",),
}  # fmt: skip
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "VLM", "Adapter", "Answer", "Answers", "BusyError", "CancelledError", "CheckpointError", "Chunk", "DeviceError",
    "FastVLMError", "FastVLMWarning", "HubError", "ImageError", "OptionError", "OutOfMemoryError", "OutputError",
    "PromptError", "Stats", "Stream", "TokenizerError", "TrainingError", "TuneOptions", "Tuned", "__version__",
    "convert_to_coreml", "load", "tune",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'fastvlm_mlx' has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
