"""The projector (LLaVA's mlp2x_gelu): image features (B, N, C) -> image embeddings (B, N, D), as wide as the decoder."""

import mlx.core as mx
import mlx.nn as nn

from ..backend.linear import Linear
from ..backend.ops import Backend, feed_forward


class Projector(nn.Module):
    """Linear, GELU, Linear."""

    def __init__(self, in_width: int, out_width: int, backend: Backend):
        super().__init__()
        self.backend = backend
        self.linear_1 = Linear(in_width, out_width, backend=backend)
        self.linear_2 = Linear(out_width, out_width, backend=backend)

    def __call__(self, features: mx.array) -> mx.array:
        return feed_forward(features, self.linear_1, self.linear_2, self.backend)
