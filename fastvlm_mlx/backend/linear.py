"""The linear layer of every part: (..., I) -> (..., O); quantised as any other of MLX's."""

import mlx.core as mx
import mlx.nn as nn

from .ops import linear


class Linear(nn.Linear):
    """x @ weight.T + bias, weight (O, I), bias (O,) or none, in its best form here (`ops.linear`)."""

    is_plain = True  # for forms that take its weights and compute with them by themselves

    def __init__(self, in_width: int, out_width: int, *, bias: bool = True):
        nn.Module.__init__(self)  # not MLX's own, which draws weights that nobody will use
        self.weight = mx.zeros((out_width, in_width))
        if bias:
            self.bias = mx.zeros((out_width,))

    def __init_subclass__(cls) -> None:
        cls.is_plain = False  # it computes something else, or would be no class of its own

    def __call__(self, x: mx.array) -> mx.array:
        return linear(x, self.weight, self.get("bias"))
