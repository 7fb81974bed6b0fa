"""Logits -> token ids, one after another, each computed while the last is read. No text, no pictures, no clock.

As `generate_step` of mlx-lm: the step that follows a token is under way before that token is handed out.
"""

from collections.abc import Iterator, Sequence

import mlx.core as mx

from ..network.kv_cache import KVCache
from ..network.model import FastVLM
from .sampling import Sampler


def token_ids(
    model: FastVLM, cache: Sequence[KVCache], logits: mx.array, sampler: Sampler, limit: int
) -> Iterator[int]:
    """Up to `limit` token ids, the first drawn from `logits` (1, V); it is under way when this returns.

    The cache grows by a position for every token but the last.
    """
    token = sampler(logits)
    mx.async_eval(token)
    return _token_ids(model, cache, token, sampler, limit)


def _token_ids(
    model: FastVLM, cache: Sequence[KVCache], token: mx.array, sampler: Sampler, limit: int
) -> Iterator[int]:
    for count in range(1, limit + 1):
        logits = following = token
        if count < limit:
            logits = model.step(token, cache)
            following = logits if sampler.waits else sampler(logits)
            mx.async_eval(following)
        drawn = int(token.item())  # type: ignore[arg-type]  # token ids are whole numbers
        sampler.accept(drawn)
        yield drawn
        if count < limit and sampler.waits:
            following = sampler(logits)
            mx.async_eval(following)
        token = following
