"""The linear layer of every part: (..., I) -> (..., O); quantised as any other of MLX's."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .backend import Backend, linear


class Linear(nn.Linear):
    """x @ weight.T + bias, weight (O, I), bias (O,) or none, the way its backend does it best.

    The transposed view is made when the weight is set, not for every product: asking for one each time is a ninth of all that
    MLX is asked for per token. Whoever reads `weight` may change it in place, and from then on it is made for every product.
    """

    turned: mx.array | None  # the weight (I, O), or None

    def __init__(self, in_width: int, out_width: int, *, bias: bool = True, backend: Backend):
        nn.Module.__init__(self)  # not MLX's own, which draws weights that nobody will use
        self.backend = backend
        self["weight"] = mx.zeros((out_width, in_width))
        if bias:
            self.bias = mx.zeros((out_width,))

    def __call__(self, x: mx.array) -> mx.array:
        return linear(x, self["weight"], self.get("bias"), self.backend, self.turned)

    @property
    def weight(self) -> mx.array:  # type: ignore[override]  # MLX sets it as an item
        """The weight (O, I)."""
        object.__setattr__(self, "turned", None)
        weight: mx.array = self["weight"]
        return weight

    def __setitem__(self, name: str, value: Any) -> None:
        """Every way of setting a parameter ends here: attributes, `update`, `load_weights`."""
        super().__setitem__(name, value)
        if name == "weight":
            object.__setattr__(self, "turned", value.T)  # no parameter, so beside the others
