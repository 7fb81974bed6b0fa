"""Logits -> token ids, one after another. No text, no pictures, no clock.

As in `generate_step` of mlx-lm, a GPU is at the step that follows a token before that token is read.
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
    mx.async_eval(token, *sampler.kept)
    return _token_ids(model, cache, token, sampler, limit)


def _token_ids(
    model: FastVLM, cache: Sequence[KVCache], token: mx.array, sampler: Sampler, limit: int
) -> Iterator[int]:
    ahead = model.backend != "cpu"  # which has no queue to be kept full, and would compute a step behind a stop token
    for count in range(1, limit + 1):
        last = count == limit
        logits = following = token
        if ahead and not last:
            logits = model.step(token, cache)
            following = logits if sampler.waits else sampler(logits)
            mx.async_eval(following, *sampler.kept)
        drawn = int(token.item())  # type: ignore[arg-type]  # token ids are whole numbers
        sampler.accept(drawn)
        yield drawn
        if last:
            return
        if not ahead:
            logits = model.step(token, cache)
        if not ahead or sampler.waits:
            following = sampler(logits)
            mx.async_eval(following, *sampler.kept)
        token = following
