"""The whole network: pixels -> image embeddings, spliced between the text's -> logits. No file is read here."""

from collections.abc import Mapping, Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from ..backend import ops
from ..config import ModelConfig
from ..inputs.pieces import ImageSlot, Piece
from .kv_cache import KVCache
from .language import Cache, Qwen2
from .projector import Projector
from .vision import FastViTHD

# Level / 255 as float32 divides it, for each of the 256 levels: looked up, so that it is the same on every backend.
LEVELS = np.arange(256, dtype=np.float32) / np.float32(255)

PREFILL_CHUNK = 2048  # positions per forward pass of a long prompt; bounds the memory of its attention


class FastVLM(nn.Module):
    """Tower, projector and decoder of one `ModelConfig`."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.vision = FastViTHD(config.vision)
        self.projector = Projector(config.vision.out_width, config.text.hidden_size)
        self.text = Qwen2(config.text)

    @property
    def backend(self) -> ops.Backend:
        """What computes it: the backend of MLX's default device."""
        return ops.current()

    @property
    def dtype(self) -> mx.Dtype:
        """The type activations are computed in."""
        weight: mx.array = self.text.norm.weight
        return weight.dtype

    def flat_parameters(self) -> dict[str, mx.array]:
        """Every parameter by its path, as our folder names it."""
        return dict(tree_flatten(self.parameters()))

    def nbytes_in(self, dtype: mx.Dtype) -> int:
        """Bytes of all parameters, those that are floating point in this dtype."""
        return sum(
            parameter.size * dtype.size if mx.issubdtype(parameter.dtype, mx.floating) else parameter.nbytes
            for parameter in self.flat_parameters().values()
        )

    def encode(self, pixels: mx.array) -> mx.array:
        """Image embeddings (B, N, D) of pixels (B, H, W, 3), RGB, uint8."""
        levels = mx.array(LEVELS).astype(self.dtype)
        return self.projector(ops.features(self.vision, levels[pixels]))

    def embed(self, pieces: Sequence[Piece], images: Mapping[int, mx.array], skip: int = 0) -> mx.array:
        """Embeddings (1, L, D) of a prompt: its runs of token ids, and each image's embeddings (N, D) in its slot.

        The first `skip` positions are left out; images that lie in them whole need not be given.
        """
        parts = []
        for piece in pieces:
            if skip < len(piece):
                part = images[piece.index] if isinstance(piece, ImageSlot) else self.text.embed_tokens(mx.array(piece))
                parts.append(part[skip:])
            skip = max(0, skip - len(piece))
        return mx.concatenate(parts)[None]

    def prefill(self, embeddings: mx.array, cache: Sequence[KVCache]) -> mx.array:
        """Logits (B, V) after the last of the embeddings (B, L, D), which continue what the cache holds."""
        for start in range(0, embeddings.shape[1] - PREFILL_CHUNK, PREFILL_CHUNK):
            self.text(embeddings[:, start : start + PREFILL_CHUNK], cache)
            mx.eval([layer.state for layer in cache])
            mx.clear_cache()
        rest = (embeddings.shape[1] - 1) // PREFILL_CHUNK * PREFILL_CHUNK
        hidden = self.text(embeddings[:, rest:], cache)
        return self.text.logits(hidden[:, -1:])[:, 0]  # hidden[:, -1] would be copied: its rows lie L * D apart

    def step(self, token: mx.array, cache: Sequence[Cache]) -> mx.array:
        """Logits (B, V) after one more token (B,)."""
        return self.text.logits(self.text(self.text.embed_tokens(token[:, None]), cache)[:, -1])
