"""One step of learning: gradients of all of its batches added up, divided by its tokens, clipped, and taken by the
optimizer.

Because losses are added up over tokens, several small batches, one large one and several processes come to the same
step.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from ..network.model import FastVLM
from .batches import Batch
from .loss import encoded, loss_of
from .optimizer import optimizer_for
from .options import TuneOptions
from .parts import learned

Tree = dict[str, Any]
Part = tuple[
    Batch, list[mx.array]
]  # and the features (N, C) of its pictures, or their pixels (S, S, 3) where the tower learns


@dataclass(frozen=True)
class Taken:
    """A step that was taken: the loss in nats per token, its tokens, and the gradient's norm before clipping."""

    loss: float
    tokens: int
    norm: float


@dataclass(frozen=True)
class Moment:
    """Everything that learning goes on from: the parameters that learn, by name, and the optimizer's state, as trees of
    arrays.
    """

    parameters: dict[str, mx.array]
    optimizer: dict[str, mx.array]


class Learner:
    """A network that learns, and its optimizer over so many steps.

    `total` adds arrays up over all processes; the identity where there is one.
    """

    def __init__(
        self, model: FastVLM, options: TuneOptions, steps: int, total: Callable[[mx.array], mx.array] = lambda x: x
    ):
        self.model, self.options, self.total = model, options, total
        self.tower_learns = "tower" in (options.train or ())
        self.optimizer = optimizer_for(options, learned(model), steps)
        self.optimizer.init(model.trainable_parameters())
        self._gradient = nn.value_and_grad(model, self._loss)

    def _loss(self, batch: Batch, shown: list[mx.array]) -> mx.array:
        checkpoint = self.options.checkpoint
        features = encoded(self.model, shown, checkpoint) if self.tower_learns else shown
        return loss_of(self.model, batch, features, checkpoint)

    def gradient(self, parts: Sequence[Part]) -> tuple[float, int, Tree]:
        """The loss added up over tokens, the number of tokens, and the gradient of the loss per token, over all
        processes.
        """
        loss, tokens, summed = mx.array(0.0), 0, None
        for batch, shown in parts:
            value, gradient = self._gradient(batch, shown)
            summed = gradient if summed is None else tree_map(mx.add, summed, gradient)
            loss, tokens = loss + value, tokens + batch.tokens
            mx.eval(loss, summed)
        if summed is None:  # a process that no batch fell to
            summed = tree_map(mx.zeros_like, self.model.trainable_parameters())
        counts = self.total(mx.stack([loss, mx.array(float(tokens))]))
        summed = self._totals(summed)
        loss_sum, count = np.array(counts).tolist()
        return loss_sum, round(count), tree_map(lambda g: g / count, summed)

    def _totals(self, gradient: Tree) -> Tree:
        """Every array added up over all processes, in one message."""
        names, arrays = zip(*tree_flatten(gradient), strict=True)
        flat = self.total(mx.concatenate([array.reshape(-1) for array in arrays]))
        ends = [0]
        for array in arrays:
            ends.append(ends[-1] + array.size)
        found = [
            (name, flat[start:end].reshape(array.shape))
            for name, array, start, end in zip(names, arrays, ends[:-1], ends[1:], strict=True)
        ]
        tree: Tree = tree_unflatten(found)
        return tree

    def step(self, parts: Sequence[Part]) -> Taken:
        """Learn from some batches together; where the loss or the gradient is no number, nothing is learned."""
        loss, tokens, gradient = self.gradient(parts)
        clipped, norm = optimizers.clip_grad_norm(gradient, self.options.clip)
        length = float(norm.item())
        taken = Taken(loss / max(1, tokens), tokens, length)
        if taken.loss - taken.loss == 0 and length - length == 0:  # both are finite
            self.optimizer.update(self.model, clipped)
            mx.eval(self.model.trainable_parameters(), self.optimizer.state)
        return taken

    def moment(self) -> Moment:
        """What learning goes on from; its arrays are never written to."""
        flat: Any = tree_flatten(self.optimizer.state)
        return Moment(learned(self.model), dict(flat))

    def go_back(self, moment: Moment) -> None:
        """Go on from an earlier moment, or from one that was saved."""
        self.model.update(tree_unflatten(list(moment.parameters.items())))
        self.optimizer.state = tree_unflatten(list(moment.optimizer.items()))
