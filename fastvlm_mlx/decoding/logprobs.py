"""How likely each token of an answer was, and what else would have been: natural logarithms of probabilities.

They are those of the model itself, the softmax of its raw logits, whatever temperature, limits, penalty or schema an
answer was drawn with.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ..inputs.tokenizer import Tokenizer

MAX_LOGPROBS = 20  # likeliest tokens listed for each position


@dataclass(frozen=True)
class Candidate:
    """A token that could have come: its text (U+FFFD for parts of characters, the name of a special token), its id, the
    natural logarithm of its probability, and its exact bytes (none for a special token)."""

    token: str
    id: int
    logprob: float
    bytes: bytes

    @property
    def probability(self) -> float:
        """From 0 to 1."""
        return math.exp(self.logprob)

    def to_json(self) -> dict[str, Any]:
        """As the OpenAI API writes it, with the `id` beside; bytes are numbers, or null for a special token."""
        return {
            "token": self.token,
            "id": self.id,
            "logprob": self.logprob,
            "bytes": list(self.bytes) if self.bytes else None,
        }

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.token!r}, {self.id}, {self.logprob:.4f}, {self.probability:.2%})"


@dataclass(frozen=True, repr=False)
class TokenLogprob(Candidate):
    """A token that came, and the likeliest that could have come in its place, `top_logprobs`, the likeliest first."""

    top_logprobs: tuple[Candidate, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As the OpenAI API writes it, with the `id` beside."""
        return {**super().to_json(), "top_logprobs": [candidate.to_json() for candidate in self.top_logprobs]}


class Logprobs(tuple[TokenLogprob, ...]):
    """The tokens of an answer with their log-probabilities, one for each of its `token_ids`; printed, and in a
    notebook, a table."""

    def to_json(self) -> list[dict[str, Any]]:
        """As the OpenAI API writes `logprobs.content`, with each token's `id` beside."""
        return [token.to_json() for token in self]

    def __str__(self) -> str:
        return "\n".join(
            f"{token.token!r:<16} {token.probability:7.2%}"
            + "".join(f"   {other.token!r} {other.probability:.2%}" for other in token.top_logprobs)
            for token in self
        )

    def _repr_html_(self) -> str:
        from html import escape  # not on the way to a first token

        def cell(candidate: Candidate) -> str:
            text = escape(repr(candidate.token))
            return f'<td style="text-align:left"><code>{text}</code> {candidate.probability:.1%}</td>'

        rows = "".join(f"<tr>{cell(token)}{''.join(map(cell, token.top_logprobs))}</tr>" for token in self)
        others = max((len(token.top_logprobs) for token in self), default=0)
        head = "<th>token</th>" + "".join(f"<th>{place}</th>" for place in range(1, others + 1))
        return f'<table class="tex2jax_ignore mathjax_ignore"><tr>{head}</tr>{rows}</table>'


def token_logprob(
    tokenizer: Tokenizer, token: int, logprob: float, others: Iterable[tuple[int, float]]
) -> TokenLogprob:
    """A token that came, with `others`, pairs of an id and its log-probability, put in order, the likeliest first."""
    ranked = sorted(others, key=lambda other: (-other[1], other[0]))
    top = tuple(Candidate(*_named(tokenizer, other), value, tokenizer.bytes_of(other)) for other, value in ranked)
    return TokenLogprob(*_named(tokenizer, token), logprob, tokenizer.bytes_of(token), top)


def _named(tokenizer: Tokenizer, token: int) -> tuple[str, int]:
    """The text of a token, and its id."""
    return tokenizer.bytes_of(token).decode(errors="replace") or tokenizer.name_of(token), token
