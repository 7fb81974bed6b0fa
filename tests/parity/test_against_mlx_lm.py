"""Our decoder against mlx-lm's Qwen2 with the same weights: prefill, cached steps, and what is chosen."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from fastvlm_mlx.config import TextConfig
from fastvlm_mlx.network.language import Qwen2

pytestmark = pytest.mark.slow

models = pytest.importorskip("mlx_lm.models.qwen2", reason="mlx-lm comes with the extra 'lm'")

TIGHT = 1e-5  # of the largest logit: sums of float32 in another order


def in_mlx_lm_names(weights: dict[str, mx.array], config: TextConfig) -> dict[str, mx.array]:
    """Our parameters as mlx-lm names them: one product of ours is three of theirs, or two."""
    kv = config.num_key_value_heads * config.head_dim
    parts = {
        "self_attn.qkv_proj": (
            ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
            [config.hidden_size, kv, kv],
        ),
        "mlp.gate_up_proj": (["mlp.gate_proj", "mlp.up_proj"], [config.intermediate_size] * 2),
    }
    theirs: dict[str, mx.array] = {}
    for name, array in weights.items():
        stacked = next((ours for ours in parts if ours in name), None)
        if stacked is None:
            theirs[name if name.startswith("lm_head") else f"model.{name}"] = array
            continue
        names, rows = parts[stacked]
        places = [sum(rows[:count]) for count in range(1, len(rows))]
        for part, piece in zip(names, mx.split(array, places), strict=True):
            theirs[f"model.{name.replace(stacked, part)}"] = piece
    return theirs


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (6, 1), (2, 2)])
def test_prefill_and_steps(heads: int, kv_heads: int, tied: bool) -> None:
    from mlx.utils import tree_flatten
    from mlx_lm.models.cache import make_prompt_cache

    config = TextConfig(32 * heads, 3, heads, kv_heads, 320, 512, tied, rope_theta=1e6, rms_norm_eps=1e-6)
    ours = Qwen2(config)
    rng = np.random.default_rng(heads)
    flat: Any = tree_flatten(ours.parameters())
    weights = {
        name: mx.array((rng.normal(size=place.shape) / place.shape[-1] ** 0.5 + ("norm" in name)).astype(np.float32))
        for name, place in flat
    }
    ours.load_weights(list(weights.items()))
    theirs = models.Model(
        models.ModelArgs(
            model_type="qwen2", hidden_size=config.hidden_size, num_hidden_layers=3, intermediate_size=320,
            num_attention_heads=heads, rms_norm_eps=1e-6, vocab_size=512, num_key_value_heads=kv_heads,
            max_position_embeddings=2048, rope_theta=1e6, rope_traditional=False, tie_word_embeddings=tied,
        )
    )  # fmt: skip
    theirs.load_weights(list(in_mlx_lm_names(weights, config).items()))
    ids = rng.integers(0, 512, 300).tolist()  # beyond the first growth of the cache, at 256
    cache, their_cache = ours.make_cache(), make_prompt_cache(theirs)
    for start, end in [(0, 250), *((place, place + 1) for place in range(250, 300))]:
        tokens = mx.array([ids[start:end]])
        mine, other = ours.logits(ours(ours.embed_tokens(tokens), cache)), theirs(tokens, their_cache)
        assert mx.abs(mine - other).max() < TIGHT * mx.abs(other).max()
        assert mx.array_equal(mx.argmax(mine, axis=-1), mx.argmax(other, axis=-1))
    whole = ours.logits(ours(ours.embed_tokens(mx.array([ids]))))  # without a cache, as in training
    assert mx.abs(whole[:, -1] - mine[:, -1]).max() < TIGHT * mx.abs(mine).max()
