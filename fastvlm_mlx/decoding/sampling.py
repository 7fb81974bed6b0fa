"""Logits -> the next token: the likeliest, or one drawn from the likeliest few."""

from typing import TYPE_CHECKING

import mlx.core as mx

from .request import Options, Request

if TYPE_CHECKING:
    from .engine import Engine


def choose(logits: mx.array, temperature: float, top_p: float, key: mx.array | None) -> mx.array:
    """Token ids (B,) from logits (B, V). Temperature 0 takes the likeliest and needs no key; otherwise drawn with it.

    top_p keeps the smallest set of tokens whose probabilities add up to at least that much (nucleus sampling,
    arXiv:1904.09751); the likeliest token is always in it.
    """
    if temperature == 0:
        return mx.argmax(logits, axis=-1)
    logits = logits.astype(mx.float32) / temperature
    if top_p < 1:
        order = mx.argsort(-logits, axis=-1)
        ranked = mx.take_along_axis(logits, order, axis=-1)
        probabilities = mx.softmax(ranked, axis=-1)
        before = mx.cumsum(probabilities, axis=-1) - probabilities
        ranked = mx.where(before < top_p, ranked, -mx.inf)
        drawn = mx.random.categorical(ranked, key=key)
        return mx.take_along_axis(order, drawn[:, None], axis=-1)[:, 0]
    return mx.random.categorical(logits, key=key)


class Sampler:
    """Draws the tokens of one answer, each from the logits (1, V) of its position, with a random key of its own."""

    waits = ended = False

    def __init__(self, options: Options):
        self._options = options
        self._keys = options.keys()
        self.greedy = options.temperature == 0

    def __call__(self, logits: mx.array) -> mx.array:
        """The next token's id (1,) from logits (1, V), not evaluated."""
        return choose(logits, self._options.temperature, self._options.top_p, next(self._keys))

    def accept(self, token: int) -> None:
        """Tell which token was drawn."""


def sampler_of(engine: "Engine", request: Request, options: Options) -> Sampler:
    """The sampler of a new answer to a request."""
    return Sampler(options)
