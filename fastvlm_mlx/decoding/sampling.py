"""Logits -> the next token: the likeliest, or one drawn from the likeliest few, of those that may come.

What is done to the logits, in this order: the schema's mask, the repetition penalty (Keskar et al., arXiv:1909.05858),
the temperature, `top_k`, `top_p` (arXiv:1904.09751), `min_p` (arXiv:2407.01082).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from math import log
from typing import TYPE_CHECKING, cast

import mlx.core as mx

from ..backend import ops
from ..inputs.tokenizer import Tokenizer
from .logprobs import TokenLogprob, token_logprob
from .request import Options, Request

if TYPE_CHECKING:
    from .constraints import Constraint
    from .engine import Engine

# Tokens before the next one that the repetition penalty looks at. Prompt and answer alike, as in transformers, but no
# more than so many, so that a step costs no more the longer the conversation.
REPETITION_WINDOW = 1024
MAX_SORTED_TOKENS = 4096  # of the likeliest, put in order on a CPU where their probabilities add up to `top_p`
ROUNDING = 5e-4  # more than sums of a vocabulary's probabilities differ by with the order of their terms, in float32


class Sampler:
    """Draws the tokens of one answer, each from the logits (1, V) of its position.

    Calling it takes nothing from a GPU: the next step can be queued on what it returns before the last token is read.
    Each token that is read is then told to `accept`, in order; where the sampler `waits`, before the next is drawn.
    """

    def __init__(
        self,
        options: Options,
        tokenizer: Tokenizer,
        *,
        prompt: Sequence[int] = (),
        constraint: Constraint | None = None,
    ):
        self._options, self._tokenizer, self._constraint = options, tokenizer, constraint
        self.logprobs: list[TokenLogprob] = []  # of the accepted tokens, where the options ask for them
        self._text: list[int] | None = None  # of the prompt, as far as the penalty looks back
        if options.repetition_penalty != 1:
            # The signs that end a turn are in every prompt; penalised, an answer would not find its end.
            self._text = [token for token in prompt if not tokenizer.is_special(token)][-REPETITION_WINDOW:]
        self.begin_again()
        extra = constraint is not None or self._recent is not None or options.logprobs is not None
        self._greedy = options.temperature == 0 and not extra

    def begin_again(self) -> None:
        """Take back the draw of a first token that was not accepted: its logits had to be computed again."""
        self._likely: deque[tuple[mx.array, ...]] = deque()  # of the tokens drawn and not accepted yet
        # Made of numbers alone: another thread may draw, which can compute nothing that is left undone here.
        self._key = self._options.key()
        self._recent = mx.array([self._text], mx.uint32) if self._text is not None else None

    @property
    def greedy(self) -> bool:
        """Whether it takes the likeliest token of each position and does nothing else: rows may be drawn together."""
        return self._greedy

    @property
    def waits(self) -> bool:
        """Whether a token must be accepted before the next can be drawn."""
        return self._constraint is not None

    @property
    def ended(self) -> bool:
        """Whether the answer is complete by its schema, and nothing may follow; never without one."""
        return self._constraint is not None and self._constraint.ended

    def __call__(self, logits: mx.array) -> mx.array:
        """The next token's id (1,) from logits (1, V); raises OptionError where a schema has become too large."""
        if self._greedy:
            return mx.argmax(logits, axis=-1)
        options, raw = self._options, logits
        if self._constraint is not None:
            allowed = self._constraint.allowed()
            logits = mx.where(mx.array(allowed), logits, -mx.inf)
        if self._recent is not None:
            logits = penalised(logits, self._recent, options.repetition_penalty)
        key = None
        if self._key is not None:
            self._key, key = mx.random.split(self._key)
        token = choose(logits, options.temperature, options.top_p, key, options.top_k, options.min_p)
        if self._recent is not None:
            self._recent = mx.concatenate([self._recent, token[None]], axis=-1)[:, -REPETITION_WINDOW:]
        if options.logprobs is not None:
            self._likely.append(likeliest(raw, token, options.logprobs))
        return token

    @property
    def kept(self) -> Sequence[mx.array]:
        """What the last draw left for the next ones and for `accept`, to be evaluated with its token: another thread
        may go on, and cannot compute what this one has left undone."""
        found = [each for each in (self._key, self._recent) if each is not None]
        return [*found, *self._likely[-1]] if self._likely else found

    def accept(self, token: int) -> None:
        """Tell which token was drawn: the oldest that was not accepted yet."""
        if self._constraint is not None:
            self._constraint.accept(token)
        if self._likely:
            chosen, ids, values = self._likely.popleft()
            others = zip(cast(list[int], ids[0].tolist()), cast(list[float], values[0].tolist()), strict=True)
            self.logprobs.append(token_logprob(self._tokenizer, token, cast(float, chosen.item()), others))


def sampler_of(engine: Engine, request: Request, options: Options) -> Sampler:
    """The sampler of a new answer to a request; raises OptionError for a schema that cannot be kept to.

    The first with a schema builds what llguidance needs of the tokenizer (`constraints.constraints_of`).
    """
    constraint = None
    if isinstance(options.schema, str):
        from .constraints import constraints_of  # not on the way to a first token

        constraint = constraints_of(engine.tokenizer).constraint(
            options.schema, engine.config.text.vocab_size, engine.stop_tokens(options)
        )
    prompt = request.text_ids if options.repetition_penalty != 1 else ()
    return Sampler(options, engine.tokenizer, prompt=prompt, constraint=constraint)


def choose(
    logits: mx.array, temperature: float, top_p: float, key: mx.array | None, top_k: int = 0, min_p: float = 0.0
) -> mx.array:
    """Token ids (B,) from logits (B, V). Temperature 0 takes the likeliest and needs no key; otherwise drawn with it.

    top_k keeps that many of the likeliest (0: all). Of these, top_p keeps the smallest set whose probabilities add up
    to at least that much (nucleus sampling), and min_p those with at least that share of the likeliest one's
    probability. The likeliest token is always kept.
    """
    if temperature == 0 or top_k == 1:
        return mx.argmax(logits, axis=-1)
    logits = logits.astype(mx.float32) / temperature
    ids: mx.array | None = None  # of the columns of `logits`, where they are not all tokens in order
    if 0 < top_k < logits.shape[-1]:
        ids = mx.argpartition(-logits, top_k - 1, axis=-1)[:, :top_k]
        logits = mx.take_along_axis(logits, ids, axis=-1)
    if top_p < 1:
        places, logits = nucleus(logits, top_p)
        ids = places if ids is None else mx.take_along_axis(ids, places, axis=-1)
    if min_p > 0:
        least = logits.max(axis=-1, keepdims=True) + log(min_p)
        logits = mx.where(logits >= least, logits, -mx.inf)
    drawn = mx.random.categorical(logits, key=key)
    return drawn if ids is None else mx.take_along_axis(ids, drawn[:, None], axis=-1)[:, 0]


def nucleus(logits: mx.array, top_p: float) -> tuple[mx.array, mx.array]:
    """The places (B, V) of logits (B, V), float32, by falling logit and equal ones in order, and the logits in that
    order, -inf behind the smallest set whose probabilities add up to `top_p`, where the places are in any order.

    To sort a vocabulary takes a CPU many times as long as to find its likeliest few thousand, so it sorts those alone
    where they add up to enough, and waits for them to know. A GPU sorts all, unasked.
    """
    if ops.current() == "cpu" and logits.shape[-1] > 2 * MAX_SORTED_TOKENS:
        parted = mx.argpartition(-logits, MAX_SORTED_TOKENS - 1, axis=-1)
        head = mx.sort(parted[:, :MAX_SORTED_TOKENS], axis=-1)  # so that sorting by logit leaves equal ones in order
        head = mx.take_along_axis(head, mx.argsort(-mx.take_along_axis(logits, head, axis=-1), axis=-1), axis=-1)
        places = mx.concatenate([head, parted[:, MAX_SORTED_TOKENS:]], axis=-1)
        ranked = mx.take_along_axis(logits, places, axis=-1)
        probabilities = mx.softmax(ranked, axis=-1)
        # Others that equal the last of the head may have been left behind, so none of them counts.
        sure = ranked > ranked[:, MAX_SORTED_TOKENS - 1 : MAX_SORTED_TOKENS]
        if (mx.where(sure, probabilities, 0).sum(axis=-1) >= top_p + ROUNDING).all().item():
            return places, _cut(ranked, probabilities, top_p)
    places = mx.argsort(-logits, axis=-1)
    ranked = mx.take_along_axis(logits, places, axis=-1)
    return places, _cut(ranked, mx.softmax(ranked, axis=-1), top_p)


def _cut(ranked: mx.array, probabilities: mx.array, top_p: float) -> mx.array:
    before = mx.cumsum(probabilities, axis=-1) - probabilities
    return mx.where(before < top_p, ranked, -mx.inf)


def penalised(logits: mx.array, recent: mx.array, penalty: float) -> mx.array:
    """Logits (B, V) in which those of the tokens `recent` (B, N) are divided by the penalty where positive, else
    multiplied."""
    if recent.shape[-1] == 0:
        return logits
    logits = logits.astype(mx.float32)
    found = mx.take_along_axis(logits, recent, axis=-1)
    return mx.put_along_axis(logits, recent, mx.where(found > 0, found / penalty, found * penalty), axis=-1)


def likeliest(logits: mx.array, token: mx.array, count: int) -> tuple[mx.array, mx.array, mx.array]:
    """Log-probabilities, float32, of the tokens (B,) drawn at logits (B, V), and the ids (B, count) and
    log-probabilities (B, count) of the likeliest, in no order."""
    logits = logits.astype(mx.float32)
    total = mx.logsumexp(logits, axis=-1, keepdims=True)
    chosen = (mx.take_along_axis(logits, token[:, None], axis=-1) - total)[:, 0]
    count = min(count, logits.shape[-1])
    if count == 0:  # and nothing is put in order
        return chosen, mx.zeros((len(logits), 0), mx.uint32), mx.zeros((len(logits), 0))
    ids = mx.argpartition(-logits, count - 1, axis=-1)[:, :count]
    return chosen, ids, mx.take_along_axis(logits, ids, axis=-1) - total
