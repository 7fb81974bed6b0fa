"""What a run would take, worked out before any weights are read: rows, lengths, bytes on disk, memory, the first row as
rendered.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..backend import ops
from ..config import ModelConfig
from ..decoding.engine import Engine
from ..network import memory
from ..network.memory import BYTES
from .batches import LENGTH_MULTIPLE
from .loss import LOGIT_ROWS
from .material import Rows, samples_at
from .options import TuneOptions
from .parts import PROJECTIONS
from .samples import as_shown, open_pictures

FLOAT, ADAM = 4, 8  # bytes of what learns, and of its two moments
# Numbers that a decoder layer keeps for the way back, of a position: in widths D and in inner widths I.
KEPT_WIDTHS, KEPT_INNER = 12, 5


@dataclass(frozen=True)
class Preview:
    """A run before it is begun; bytes, and positions of the decoder."""

    rows: dict[str, int]
    pictures: int
    lengths: tuple[int, int, int]
    learned_tokens: int
    parameters: int
    cache_bytes: int
    memory_bytes: int
    first: str

    def to_dict(self) -> dict[str, Any]:
        """Everything as a JSON object."""
        return {
            "rows": self.rows, "pictures": self.pictures, "lengths": list(self.lengths),
            "learned_tokens": self.learned_tokens,
            "parameters": self.parameters, "cache_bytes": self.cache_bytes, "memory_bytes": self.memory_bytes,
            "first": self.first,
        }  # fmt: skip


def preview(engine: Engine, rows: Rows, options: TuneOptions) -> Preview:
    """Work out what a run over these rows takes; raises PromptError and ImageError for rows that cannot be used."""
    every, pictures = samples_at(engine, rows)
    open_pictures(engine, [sample for some in every for sample in some], lambda index, pixels: None)
    lengths = sorted(len(sample) for sample in every[0])
    computed = "float32" if ops.current() == "cpu" else engine.config.dtype
    sizes = options.resolution or (engine.config.image.size,)
    features = sum(engine.at(size).config.image.tokens for size in sizes) * engine.config.vision.out_width
    learns = "tower" in (options.train or ())
    names = ("to learn from", "held out", "old, replayed", "old, held out")
    return Preview(
        {name: len(some) for name, some in zip(names, every, strict=True)},
        pictures,
        (lengths[0], lengths[len(lengths) // 2], lengths[-1]),
        sum(len(sample.places) for sample in every[0]),
        learning(engine.config, options),
        0 if learns else pictures * features * BYTES[computed],
        memory_of_step(engine.config, options, lengths[-1], int(np.mean([len(s.places) for s in every[0]]))),
        as_shown(engine, every[0][0]),
    )


def learning(config: ModelConfig, options: TuneOptions) -> int:
    """How many parameters learn."""
    counts, train, text = memory.parameters(config), options.train or (), config.text
    total = 0
    if "lora" in train:
        kv = text.num_key_value_heads * text.head_dim
        width, inner = text.hidden_size, text.intermediate_size
        shapes = ((width + 2 * kv, width), (width, width), (2 * inner, width), (width, inner))
        assert len(shapes) == len(PROJECTIONS)
        layers = min(options.layers or text.num_hidden_layers, text.num_hidden_layers)
        total += layers * sum(
            options.rank * (rows + columns) + (rows if options.dora else 0) for rows, columns in shapes
        )
    total += counts["projector"] if "projector" in train else 0
    total += counts["embeddings"] + counts["decoder"] if "full" in train else 0
    return total + (counts["tower"] if "tower" in train else 0)


def memory_of_step(config: ModelConfig, options: TuneOptions, longest: int, answer: int) -> int:
    """Bytes at the peak of a step: weights, what learns with its gradient and moments, what is kept for the way back,
    logits.
    """
    computed = "float32" if ops.current() == "cpu" else config.dtype
    item, text = BYTES[computed], config.text
    positions = options.batch * (longest + -longest % LENGTH_MULTIPLE)
    layer = positions * (KEPT_WIDTHS * text.hidden_size + KEPT_INNER * text.intermediate_size)
    layer += options.batch * text.num_attention_heads * longest**2
    layers = text.num_hidden_layers
    kept = layer + layers * positions * text.hidden_size if options.checkpoint else layers * layer
    logits = 3 * min(LOGIT_ROWS, options.batch * answer) * text.vocab_size * FLOAT
    weights = sum(memory.weight_bytes(config, computed).values())
    learned = learning(config, options) * (2 * FLOAT + ADAM)
    if "tower" in (options.train or ()):
        kept += options.batch * memory.estimate(config, backend=ops.current(), dtype=computed).activations * 4
    return weights + learned + kept * item + logits
