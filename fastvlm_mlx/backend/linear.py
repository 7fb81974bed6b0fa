"""The linear layer of every part: (..., I) -> (..., O); quantised as any other of MLX's."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .ops import Backend, linear


class Linear(nn.Linear):
    """x @ weight.T + bias, weight (O, I), bias (O,) or none, the way its backend does it best.

    The transposed view is made once (`keep_transposed`), not for every product: it would be a ninth of all that MLX is asked
    for per token. Whoever sets `weight`, or reads it and might change it in place, does away with the view, and each product
    makes its own again. An array taken out another way (`parameters()`, `layer["weight"]`) has to be put back once it is changed.
    """

    is_plain = True  # for forms that take its weights and compute with them by themselves
    transposed: mx.array | None  # the view (I, O)

    def __init_subclass__(cls) -> None:
        cls.is_plain = False  # it computes something else, or would be no class of its own

    def __init__(self, in_width: int, out_width: int, *, bias: bool = True, backend: Backend):
        nn.Module.__init__(self)  # not MLX's own, which draws weights that nobody will use
        self["weight"] = mx.zeros((out_width, in_width))
        if bias:
            self.bias = mx.zeros((out_width,))
        self.backend = backend

    def __call__(self, x: mx.array) -> mx.array:
        return linear(x, self["weight"], self.get("bias"), self.backend, self.transposed)

    @property
    def weight(self) -> mx.array:  # type: ignore[override]  # MLX sets it as an item
        """The weight (O, I)."""
        if "weight" not in self:
            raise AttributeError("weight")
        self._keep(None)
        weight: mx.array = self["weight"]
        return weight

    def __setitem__(self, name: str, value: Any) -> None:
        """Every way of setting a parameter ends here: attributes, `update`, `load_weights`."""
        super().__setitem__(name, value)
        if name == "weight":
            self._keep(None)

    def _keep(self, transposed: mx.array | None) -> None:
        object.__setattr__(self, "transposed", transposed)  # beside the parameters, not among them

    def _extra_repr(self) -> str:
        out_width, in_width = self["weight"].shape
        return f"input_dims={in_width}, output_dims={out_width}, bias={'bias' in self}"


def keep_transposed(model: nn.Module) -> None:
    """Make the transposed views of all linear layers of a model whose weights are in place; they take no memory."""
    layers = [layer for layer in model.modules() if isinstance(layer, Linear)]
    views = [layer["weight"].T for layer in layers]
    mx.eval(views)  # or they could only be made by the thread that asked first
    for layer, view in zip(layers, views, strict=True):
        layer._keep(view)
