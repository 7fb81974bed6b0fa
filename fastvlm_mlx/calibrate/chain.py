"""The network as a chain of steps over all examples at once: one step can be repeated, changed or inspected alone.

What passes along is a list of arrays: pixels (1, S, S, 3) and maps (1, H, W, C) per picture, then image embeddings (1,
N, D); in the decoder (B, L, D) per batch of examples, padded on the right (a causal decoder never attends there); at
last the hidden states (T, D) that predict the answers of each batch. L tokens, T answer tokens of a batch, V
vocabulary.

All examples are in memory at one step. Steps that nobody inspects are run as one, picture by picture, because what lies
between them is large (25 MB per picture after the first stage of FastViTHD at 1024 pixels).
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from itertools import groupby

import mlx.core as mx
import mlx.nn as nn

from ..errors import PromptError, listed
from ..inputs.pieces import ImageSlot, outside
from ..network.kv_cache import KVCache
from ..network.model import LEVELS, FastVLM
from .examples import Example, Examples

MAX_BATCH_POSITIONS = 4096  # of a batch, padding counted; bounds the memory of a step
MAX_LOGIT_ROWS = 64  # tokens whose logits, (V) each, are in memory at a time

State = list[mx.array]


@dataclass(frozen=True)
class Step:
    """A part of the network: the paths of its layers, what it does, and whether it does so item by item."""

    paths: tuple[str, ...]
    run: Callable[[State], State]
    each: bool = True

    def among(self, layers: Collection[str]) -> list[str]:
        """The layers, of those given, that lie in this step."""
        return [layer for layer in layers for path in self.paths if layer == path or layer.startswith(f"{path}.")]


@dataclass(frozen=True)
class Scores:
    """The logits along all answers: the hidden states (T, D) of each batch, and the head that makes logits of them."""

    hidden: State
    head: Callable[[mx.array], mx.array]

    def rows(self) -> Iterator[mx.array]:
        """Yield logits (up to MAX_LOGIT_ROWS, V) in float32, token after token."""
        for states in self.hidden:
            for row in range(0, len(states), MAX_LOGIT_ROWS):
                yield self.head(states[row : row + MAX_LOGIT_ROWS]).astype(mx.float32)


class Chain:
    """The steps of a model on some examples.

    Each of `layers` lies in a step that has no other block of the network before it. Raises PromptError where the
    examples hold token ids that the model does not have.
    """

    def __init__(self, model: FastVLM, examples: Examples, layers: Collection[str] = ()):
        self.model, self.examples = model, examples
        runs = [
            piece for item in examples.items for piece in (*item.pieces, item.ids) if not isinstance(piece, ImageSlot)
        ]
        vocabulary = model.text.embed_tokens.weight.shape[0]
        if foreign := outside([token for run in runs for token in run], vocabulary):
            raise PromptError(
                f"The examples hold the token {listed(foreign)}, and this model has those from 0 to {vocabulary - 1}: "
                "they were made for another model; make them again with this one."
            )
        self.batches = list(_batches(examples.items))
        self.steps = list(_joined(self._steps(), layers))

    def start(self) -> State:
        """The input of the first step: pixels (1, S, S, 3), uint8, per picture."""
        return [mx.array(pixels[None]) for pixels in self.examples.pixels]

    def run(self, state: State, first: int = 0) -> Scores:
        """The scores of every batch, from the input of step `first`."""
        for step in self.steps[first:]:
            state = step.run(state)
        return Scores(state, self.model.text.head)

    def scores(self) -> Scores:
        """The scores of every batch."""
        return self.run(self.start())

    def _steps(self) -> Iterator[Step]:
        vision, text = self.model.vision, self.model.text
        levels = mx.array(LEVELS).astype(self.model.dtype)
        yield Step(("vision.patch_embed",), _each(lambda pixels: vision.patch_embed(levels[pixels])))
        for number, stage in enumerate(vision.stages):
            path = f"vision.stages.{number}"
            for name in ("downsample", "position"):
                if name in stage:
                    yield Step((f"{path}.{name}",), _each(stage[name]))
            for index, block in enumerate(stage.blocks):
                yield Step((f"{path}.blocks.{index}",), _each(block))
        yield Step(("vision.conv_exp",), _each(lambda x: _flat(vision.conv_exp(x))))
        yield Step(("projector",), _each(self.model.projector))
        yield Step(("text.embed_tokens",), self._splice, each=False)
        for index, layer in enumerate(text.layers):
            yield Step((f"text.layers.{index}",), _each(_block(layer)))
        yield Step(("text.lm_head",), self._answers, each=False)

    def _splice(self, shown: State) -> State:
        """Image embeddings (1, N, D) per picture -> embeddings (B, L, D) per batch.

        These are the prompt's, followed by those of the answer's tokens but the last.
        """
        state = []
        for batch in self.batches:
            rows = []
            longest = max(_length(item) for item in batch)
            for item in batch:
                pieces = [*item.pieces, list(item.ids[:-1])]
                row = self.model.embed([piece for piece in pieces if piece], {0: shown[item.picture][0]})
                rows.append(mx.pad(row, [(0, 0), (0, longest - row.shape[1]), (0, 0)]))
            state.append(mx.concatenate(rows))
            mx.eval(state)
        return state

    def _answers(self, state: State) -> State:
        """Hidden states (B, L, D) per batch -> the states (T, D) from which the head predicts the answers' tokens."""
        every = []
        for batch, x in zip(self.batches, state, strict=True):
            rows = [row for row, item in enumerate(batch) for _ in item.ids]
            positions = [position for item in batch for position in range(_length(item) - len(item.ids), _length(item))]
            every.append(self.model.text.norm(x[mx.array(rows), mx.array(positions)]))
            mx.eval(every)
        return every


def _joined(steps: Iterator[Step], layers: Collection[str]) -> Iterator[Step]:
    """The steps, with neighbouring ones that go item by item and have none of `layers` joined into one."""
    for alone, some in groupby(steps, lambda step: not step.each or bool(step.among(layers))):
        if alone:
            yield from some
        else:
            yield _one(list(some))


def _one(steps: list[Step]) -> Step:
    def run(state: State) -> State:
        results = []
        for item in state:
            items = [item]
            for step in steps:
                items = step.run(items)
            results += items
        return results

    return Step(tuple(path for step in steps for path in step.paths), run)


def _batches(items: list[Example]) -> Iterator[list[Example]]:
    """The examples in order, in batches of up to MAX_BATCH_POSITIONS padded positions."""
    batch: list[Example] = []
    for item in items:
        longest = max(_length(each) for each in [*batch, item])
        if batch and longest * (len(batch) + 1) > MAX_BATCH_POSITIONS:
            yield batch
            batch = []
        batch.append(item)
    yield batch


def _length(item: Example) -> int:
    return sum(map(len, item.pieces)) + len(item.ids) - 1


def _each(run: Callable[[mx.array], mx.array]) -> Callable[[State], State]:
    def step(state: State) -> State:
        results = []
        for x in state:
            results.append(run(x))
            mx.eval(results[-1])
        return results

    return step


def _block(layer: nn.Module) -> Callable[[mx.array], mx.array]:
    return lambda x: layer(x, KVCache())


def _flat(x: mx.array) -> mx.array:
    return x.reshape(x.shape[0], -1, x.shape[-1])
