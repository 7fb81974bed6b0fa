"""The linear layer of every part: (..., I) -> (..., O); quantised as any other of MLX's."""

import mlx.core as mx
import mlx.nn as nn

from .backend import Backend, linear


class Linear(nn.Linear):
    """x @ weight.T + bias, weight (O, I), bias (O,) or none, the way its backend does it best."""

    def __init__(self, in_width: int, out_width: int, *, bias: bool = True, backend: Backend):
        super().__init__(in_width, out_width, bias=bias)
        self.backend = backend
        self._turned: tuple[mx.array, mx.array] | None = None

    @property
    def turned(self) -> mx.array:
        """The weight as products take it, (I, O): a view that is made once for each weight, and not for every token."""
        weight = self.weight
        if self._turned is None or self._turned[0] is not weight:
            self._turned = weight, weight.T
        return self._turned[1]

    def __call__(self, x: mx.array) -> mx.array:
        return linear(x, self.turned, self.bias if "bias" in self else None, self.backend)
