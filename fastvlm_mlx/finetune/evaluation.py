"""How well rows are known: their loss, and the share whose answer is right token by token.

A greedy answer is exactly the row's if at every place of the row's own answer its token is the likeliest, the end of
the turn included; so one forward pass tells what answering would, up to rounding.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..network.model import FastVLM
from .batches import Batch
from .learner import Part
from .loss import LOGIT_ROWS, encoded, hidden_states, losses_of


@dataclass(frozen=True)
class Score:
    """How well some rows are known: `loss` in nats per token, `tokens_right` and `exact`, shares of tokens and of rows,
    0-1.
    """

    loss: float
    tokens_right: float
    exact: float
    rows: int


def score(model: FastVLM, parts: Iterable[Part], tower_learns: bool) -> Score | None:
    """The score of batches; None where there are none."""
    loss, right, tokens, exact, rows = 0.0, 0, 0, 0, 0
    for batch, shown in parts:
        losses, hits = _token_by_token(model, batch, encoded(model, shown, False) if tower_learns else shown)
        wrong = np.zeros(len(batch.samples), np.int64)
        np.add.at(wrong, batch.sample_of, ~hits)
        loss, right, tokens = loss + float(losses.sum(dtype=np.float64)), right + int(hits.sum()), tokens + len(hits)
        exact, rows = exact + int((wrong == 0).sum()), rows + len(wrong)
    return Score(loss / tokens, right / tokens, exact / rows, rows) if rows else None


def _token_by_token(model: FastVLM, batch: Batch, features: list[mx.array]) -> tuple[np.ndarray, np.ndarray]:
    """The loss (T,) of each token to be learned, and whether it is the likeliest (T,)."""
    hidden = hidden_states(model, batch, features, False)
    targets = mx.array(batch.targets)
    losses, hits = [], []
    for start in range(0, len(batch.targets), LOGIT_ROWS):
        states, wanted = hidden[start : start + LOGIT_ROWS], targets[start : start + LOGIT_ROWS]
        losses.append(np.array(losses_of(model, states, wanted)))
        hits.append(np.array(mx.argmax(model.text.logits(states), axis=-1) == wanted))
    return np.concatenate(losses), np.concatenate(hits)


def row_losses(model: FastVLM, part: Part, tower_learns: bool) -> list[tuple[str, float]]:
    """The loss of each row of a batch, with where it was read: which of them made a step fail."""
    batch, shown = part
    losses, _ = _token_by_token(model, batch, encoded(model, shown, False) if tower_learns else shown)
    found = np.zeros(len(batch.samples), np.float64)
    np.add.at(found, batch.sample_of, losses)
    return [(sample.row.origin, float(value)) for sample, value in zip(batch.samples, found, strict=True)]
