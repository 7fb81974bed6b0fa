"""What a model is and takes, without reading its weights; and what this machine computes with and keeps."""

import platform
from collections import Counter
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..backend import blas, cpu
from ..backend import ops as backend
from ..config import ModelConfig
from ..hub import caches
from ..hub.find import find
from ..hub.licence import AGREEMENT, APPLE, FILES
from ..version import __version__
from ..vlm import VLM
from . import memory
from .memory import Memory

LIBRARIES = ("mlx", "numpy", "pillow", "tokenizers", "huggingface_hub")
EASY = 0.8  # of the memory there is; above, other programs may have to give way
Lines = list[tuple[str, str]]


@dataclass(frozen=True)
class ModelInfo:
    """A model as it lies in its folder, and as it would lie in this machine's memory."""

    name: str
    folder: Path
    config: ModelConfig
    tokens: int
    memory: Memory
    usable: int

    @property
    def fits(self) -> bool:
        """Whether it can answer in this machine's memory."""
        return self.memory.total <= self.usable

    @property
    def verdict(self) -> str:
        """That in words, with what to do where it does not fit."""
        there = f"of {_gb(self.usable)} usable"
        if self.memory.total <= EASY * self.usable:
            return f"yes, {_gb(self.memory.total)} {there}"
        if self.fits:
            return f"barely, {_gb(self.memory.total)} {there}: close other programs, or use fewer bits or a lower resolution"
        for bits in (8, 4) if not self.config.quantization else ():
            fewer = _estimate(memory.with_decoder_bits(self.config, bits), self.memory.context)
            if fewer.total <= self.usable:
                return f"no, {_gb(self.memory.total)} {there}; with --bits {bits} about {_gb(fewer.total)}"
        return f"no, {_gb(self.memory.total)} {there}; use a smaller model"

    @property
    def licence(self) -> str:
        """The licence's name, and where it can be read."""
        name = self.config.source.license or "not stated"
        file = next((name for name in FILES if (self.folder / name).is_file()), None)
        where = f"see {self.folder / file}" if file else AGREEMENT if name == APPLE else ""
        return ", ".join(part for part in (name, "research purposes only" if name == APPLE else "", where) if part)

    @property
    def quantization(self) -> dict[str, int]:
        """Number of layers by bits and mode."""
        return dict(sorted(Counter(f"{q.bits} bits, {q.mode}" for q in self.config.quantization.values()).items()))

    def lines(self) -> Lines:
        """For people."""
        config, text, parts = self.config, self.config.text, memory.parameters(self.config)
        layers = (f"{count} layers in {kind}" for kind, count in self.quantization.items())
        counts = ", ".join(f"{part} {count / 1e6:.1f} M" for part, count in parts.items())
        held = self.memory
        return [
            ("model", self.name),
            ("folder", f"{self.folder} ({_gb(self.disk)})"),
            ("layout", config.source.layout or "fastvlm_mlx"),
            ("licence", self.licence),
            ("image", f"{config.image.size} pixels, {config.image.fit}: {config.image.tokens} tokens"),
            ("tower", f"blocks {config.vision.depths}, channels {config.vision.widths}"),
            ("decoder", f"{text.num_hidden_layers} layers of {text.hidden_size}, context {text.max_position_embeddings}"),
            ("parameters", f"{sum(parts.values()) / 1e6:.1f} M: {counts}"),
            ("stored as", ", ".join([config.dtype, *layers])),
            ("tokenizer", f"{self.tokens} tokens, stops at {', '.join(map(str, config.eos_token_ids))}"),
            (
                "memory",
                f"{_gb(held.total)}: weights {_gb(sum(held.weights.values()))}, {held.context} positions {_gb(held.cache)}, "
                f"activations {_gb(held.activations)}",
            ),
            ("fits", self.verdict),
        ]

    def to_dict(self) -> dict[str, Any]:
        """For programs; sizes in bytes."""
        parts, config = memory.parameters(self.config), self.config
        return {
            "model": self.name, "folder": str(self.folder), "disk_bytes": self.disk, "layout": config.source.layout,
            "source": config.source.name, "licence": config.source.license, "terms": self.licence,
            "image": {**asdict(config.image), "tokens": config.image.tokens}, "vision": asdict(config.vision),
            "text": asdict(config.text), "parameters": {**parts, "total": sum(parts.values())}, "dtype": config.dtype,
            "quantization": self.quantization, "tokenizer_tokens": self.tokens, "stop_tokens": list(config.eos_token_ids),
            "memory": {**asdict(self.memory), "total": self.memory.total}, "usable_memory_bytes": self.usable,
            "fits": self.fits, "verdict": self.verdict,
        }  # fmt: skip

    @property
    def disk(self) -> int:
        """Bytes of the folder's files."""
        return sum(path.stat().st_size for path in self.folder.iterdir() if path.is_file())


def describe(model: str, *, tokenizer: str | None = None, resolution: int | None = None) -> ModelInfo:
    """Describe a model that is on this machine; raises HubError where it is not, CheckpointError where it is not in order."""
    folder = find(model, cached_only=True)
    vlm = VLM.open(model, tokenizer=tokenizer, resolution=resolution, cached_only=True)
    return ModelInfo(model, folder, vlm.config, len(vlm.tokenizer), _estimate(vlm.config), usable_memory())


def _estimate(config: ModelConfig, context: int | None = None) -> Memory:
    return memory.estimate(config, backend=backend.current(), context=context)


def usable_memory() -> int:
    """Bytes a model can take here: on a GPU what the system recommends, elsewhere the memory there is, or is allowed to us."""
    device = mx.device_info()
    if backend.current() != "cpu":
        for key in ("max_recommended_working_set_size", "total_memory", "memory_size"):
            if key in device:
                return int(device[key])
    total = cpu.memory_bytes()
    try:
        allowed = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
    except OSError:
        return total
    return min(total, int(allowed)) if allowed.isdigit() else total


@dataclass(frozen=True)
class MachineInfo:
    """This machine, the versions in use, and what is kept on its disk."""

    libraries: dict[str, str]
    machine: str
    memory_bytes: int
    usable: int
    backend: str
    device: str
    blas: str
    caches: list[caches.Cache]

    def lines(self) -> Lines:
        """For people."""
        sizes = f"{_gb(self.memory_bytes)} of memory, a model can take up to {_gb(self.usable)}"
        lines = [("machine", f"{self.machine}, {sizes}"), ("backend", f"{self.backend} ({self.device})"), ("BLAS", self.blas)]
        lines += self.libraries.items()
        for cache in self.caches:
            partial = f", {_gb(cache.partial)} of it interrupted downloads" if cache.partial else ""
            lines.append(("cache", f"{cache.name}: {_gb(cache.nbytes)}{partial}; to clear it: {cache.clear}"))
        return lines if self.caches else [*lines, ("cache", "nothing is kept")]

    def to_dict(self) -> dict[str, Any]:
        """For programs; sizes in bytes."""
        kept = [
            {"name": c.name, "path": str(c.path), "bytes": c.nbytes, "partial_bytes": c.partial, "clear": c.clear}
            for c in self.caches
        ]
        return {
            "libraries": self.libraries, "machine": self.machine, "memory_bytes": self.memory_bytes,
            "usable_memory_bytes": self.usable, "backend": self.backend, "device": self.device, "blas": self.blas, "caches": kept,
        }  # fmt: skip


def machine() -> MachineInfo:
    """Describe this machine."""
    device = mx.device_info()
    return MachineInfo(
        libraries={
            "fastvlm-mlx": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in LIBRARIES},
        },
        machine=f"{platform.system()} {platform.machine()}",
        memory_bytes=cpu.memory_bytes(),
        usable=usable_memory(),
        backend=backend.current(),
        device=str(device.get("device_name", device.get("architecture", "unknown"))),
        blas=blas.status(),
        caches=list(caches.every()),
    )


def _gb(nbytes: int) -> str:
    """Bytes for people, with three figures or so."""
    return f"{nbytes / 1e6:.1f} MB" if nbytes < 1e8 else f"{nbytes / 1e9:.2f} GB"
