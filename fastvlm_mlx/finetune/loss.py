"""A batch -> the loss of its answers: cross-entropy in nats, added up over tokens, so that parts of a step add up
exactly.

Logits are made of the rows that predict an answer's token, and of no other. With `checkpoint`, every decoder layer is
computed a second time on the way back instead of kept; a prefix that sequences share has its keys and values made anew
inside.
"""

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

from ..network.model import LEVELS, FastVLM
from .batches import Batch

LOGIT_ROWS = 256  # tokens whose logits are kept for the way back at a time; more are computed twice


class SharedPrefix:
    """What a decoder layer's attention sees as its cache: keys and values of prefixes first, then, for each sequence,
    its group's.

    Nothing is written in place, so it may be differentiated and computed twice.
    """

    def __init__(self, group: mx.array):
        self._group = group
        self._held: tuple[mx.array, mx.array] | None = None
        self.offset = 0

    def update(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Keep the prefixes' at first; then put each sequence's group before its own (R, kv_heads, P + L, head_dim)."""
        if self._held is None:
            self._held, self.offset = (keys, values), keys.shape[2]
            return keys, values
        before, seen = (array[self._group] for array in self._held)
        return mx.concatenate([before, keys], axis=2), mx.concatenate([seen, values], axis=2)

    def mask(self, tokens: int, heads: int = 1) -> str:
        """Every position sees itself and what comes before."""
        return "causal"


def hidden_states(model: FastVLM, batch: Batch, features: Sequence[mx.array], checkpoint: bool) -> mx.array:
    """The hidden states (T, D) that predict a batch's tokens; `features` (N, C) are its pictures', in order."""
    text = model.text
    images = _projected(model, features)
    x = _spliced(model, batch.ids, batch.images, images)
    prefix = _spliced(model, batch.prefix, batch.prefix_images, images) if batch.prefix.size else None
    group = mx.array(batch.group)
    for layer in text.layers:

        def run(x: mx.array, prefix: mx.array | None = None, layer: nn.Module = layer) -> tuple[mx.array, ...]:
            if prefix is None:
                return (layer(x, None),)
            cache = SharedPrefix(group)
            prefix = layer(prefix, cache)
            return layer(x, cache), prefix

        call = nn.utils.checkpoint(layer, run) if checkpoint else run
        x, *rest = call(x) if prefix is None else call(x, prefix)
        prefix = rest[0] if rest else None
    states: mx.array = text.norm(x[mx.array(batch.rows), mx.array(batch.places)])
    return states


def _projected(model: FastVLM, features: Sequence[mx.array]) -> mx.array | None:
    """The embeddings of all pictures, one position after another (K * N, D)."""
    if not features:
        return None
    embeddings = model.projector(mx.stack(list(features)))
    return embeddings.reshape(-1, embeddings.shape[-1])


def _spliced(model: FastVLM, ids: object, places: object, images: mx.array | None) -> mx.array:
    """Embeddings (rows, L, D) of token ids, with those of pictures in their places."""
    embedded: mx.array = model.text.embed_tokens(mx.array(ids))  # type: ignore[arg-type]
    if images is None:
        return embedded
    where = mx.array(places)  # type: ignore[arg-type]
    return mx.where((where >= 0)[..., None], images.astype(embedded.dtype)[mx.maximum(where, 0)], embedded)


def losses_of(model: FastVLM, hidden: mx.array, targets: mx.array) -> mx.array:
    """The loss (T,) of each token, float32."""
    losses: mx.array = nn.losses.cross_entropy(model.text.logits(hidden).astype(mx.float32), targets)
    return losses


def loss_of(model: FastVLM, batch: Batch, features: Sequence[mx.array], checkpoint: bool = False) -> mx.array:
    """The loss of a batch, added up over its tokens."""
    hidden = hidden_states(model, batch, features, checkpoint)
    targets = mx.array(batch.targets)
    if len(batch.targets) <= LOGIT_ROWS:
        return losses_of(model, hidden, targets).sum()

    parts = []
    for start in range(0, len(batch.targets), LOGIT_ROWS):
        some = targets[start : start + LOGIT_ROWS]

        def part(states: mx.array, wanted: mx.array = some) -> mx.array:
            return losses_of(model, states, wanted).sum()

        parts.append(nn.utils.checkpoint(model.text, part)(hidden[start : start + LOGIT_ROWS]))
    return mx.stack(parts).sum()


def encoded(model: FastVLM, pixels: Sequence[mx.array], checkpoint: bool) -> list[mx.array]:
    """The features (N, C) of pictures (S, S, 3), uint8, by a tower that learns; one picture after the other."""
    levels = mx.array(LEVELS)

    def run(picture: mx.array) -> mx.array:
        features: mx.array = model.vision(picture[None])[0]
        return features

    call = nn.utils.checkpoint(model.vision, run) if checkpoint else run
    return [call(levels[picture]) for picture in pixels]
