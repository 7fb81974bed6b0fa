"""The projector (LLaVA's mlp2x_gelu): image features (B, N, C) -> image embeddings (B, N, D) for the decoder."""

import mlx.core as mx
import mlx.nn as nn

from ..backend.linear import Linear
from ..backend.ops import feed_forward


class Projector(nn.Module):
    """Linear, GELU, Linear."""

    def __init__(self, in_width: int, out_width: int):
        super().__init__()
        self.linear_1 = Linear(in_width, out_width)
        self.linear_2 = Linear(out_width, out_width)

    def __call__(self, features: mx.array) -> mx.array:
        return feed_forward(features, self.linear_1, self.linear_2)
