"""A description of a model, without reading its weights."""

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..backend import ops
from ..config import ModelConfig
from ..decoding.engine import Engine
from ..errors import counted
from ..hub.licence import AGREEMENT, APPLE, FILES
from ..network import memory
from ..network.memory import Memory
from .machine import Lines, in_bytes, usable_memory

COMFORTABLE_SHARE = 0.8  # of the usable memory; above it, other programs may be swapped out


@dataclass(frozen=True)
class ModelInfo:
    """A model as it is in its folder, and the memory it would take on this machine."""

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
        """Whether the model fits into memory, as a phrase, with what to do where it does not."""
        there = f"of {in_bytes(self.usable)} usable"
        if self.memory.total <= COMFORTABLE_SHARE * self.usable:
            return f"yes, {in_bytes(self.memory.total)} {there}"
        if self.fits:
            advice = "close other programs, or use fewer bits or a lower resolution"
            return f"barely, {in_bytes(self.memory.total)} {there}: {advice}"
        for bits in (8, 4) if not self.config.quantization else ():
            fewer = _estimate(memory.with_decoder_bits(self.config, bits), self.memory.context)
            if fewer.total <= self.usable:
                return f"no, {in_bytes(self.memory.total)} {there}; with `bits={bits}` about {in_bytes(fewer.total)}"
        return f"no, {in_bytes(self.memory.total)} {there}; use a smaller model"

    @property
    def licence(self) -> str:
        """The licence's name, and where it can be read."""
        name = self.config.source.license or "not stated"
        file = next((name for name in FILES if (self.folder / name).is_file()), None)
        where = f"see {self.folder / file}" if file else AGREEMENT if name == APPLE else ""
        return ", ".join(part for part in (name, "research purposes only" if name == APPLE else "", where) if part)

    @property
    def quantization(self) -> dict[str, int]:
        """The number of quantised layers by bits and mode."""
        return dict(sorted(Counter(f"{q.bits} bits, {q.mode}" for q in self.config.quantization.values()).items()))

    def lines(self) -> Lines:
        """The description as (name, text) rows of a table."""
        config, text, parts = self.config, self.config.text, memory.parameters(self.config)
        layers = (f"{counted(count, 'layer')} in {form}" for form, count in self.quantization.items())
        counts = ", ".join(f"{part} {count / 1e6:.1f} M" for part, count in parts.items())
        held = self.memory
        return [
            ("model", self.name),
            ("folder", f"{self.folder} ({in_bytes(self.disk)})"),
            ("layout", config.source.layout or "fastvlm_mlx"),
            ("licence", self.licence),
            ("image", f"{config.image.size} pixels, {config.image.fit}: {counted(config.image.tokens, 'token')}"),
            ("tower", f"blocks {config.vision.depths}, channels {config.vision.widths}"),
            (
                "decoder",
                f"{counted(text.num_hidden_layers, 'layer')} of {text.hidden_size}, context "
                f"{text.max_position_embeddings}",
            ),
            ("parameters", f"{sum(parts.values()) / 1e6:.1f} M: {counts}"),
            ("stored as", ", ".join([config.dtype, *layers])),
            ("tokenizer", f"{self.tokens} tokens, stops at {', '.join(map(str, config.eos_token_ids))}"),
            (
                "memory",
                f"{in_bytes(held.total)}: weights {in_bytes(sum(held.weights.values()))}, "
                f"{held.context} positions {in_bytes(held.cache)}, activations {in_bytes(held.activations)}",
            ),
            ("fits", self.verdict),
        ]

    def to_dict(self) -> dict[str, Any]:
        """The description as a JSON object; sizes are in bytes."""
        parts, config = memory.parameters(self.config), self.config
        return {
            "model": self.name, "folder": str(self.folder), "disk_bytes": self.disk, "layout": config.source.layout,
            "source": config.source.name, "licence": config.source.license, "terms": self.licence, "image":
            {**asdict(config.image), "tokens": config.image.tokens}, "vision": asdict(config.vision), "text":
            asdict(config.text), "parameters": {**parts, "total": sum(parts.values())}, "dtype": config.dtype,
            "quantization": self.quantization, "tokenizer_tokens": self.tokens, "stop_tokens":
            list(config.eos_token_ids), "memory": {**asdict(self.memory), "total": self.memory.total},
            "usable_memory_bytes": self.usable, "fits": self.fits, "verdict": self.verdict,
        }  # fmt: skip

    @property
    def disk(self) -> int:
        """Bytes of the folder's files."""
        return sum(path.stat().st_size for path in self.folder.iterdir() if path.is_file())


def describe(model: str, *, tokenizer: str | None = None, resolution: int | None = None) -> ModelInfo:
    """Describe a model that is on this machine; nothing is downloaded.

    Raises HubError where it is not on this machine, and CheckpointError where its files are not in order.
    """
    engine = Engine.open(model, tokenizer=tokenizer, resolution=resolution, cached_only=True)
    folder = engine.opened.folder
    assert folder is not None  # only models made in memory have none
    return ModelInfo(model, folder, engine.config, len(engine.tokenizer), _estimate(engine.config), usable_memory())


def _estimate(config: ModelConfig, context: int | None = None) -> Memory:
    return memory.estimate(config, backend=ops.current(), context=context)
