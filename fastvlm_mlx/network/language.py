"""Qwen2, the decoder: embeddings (B, L, D) -> logits (B, V) of the token that follows.

Source: Qwen2 (arXiv:2407.10671); transformers, models/qwen2. The query, key and value projections are one product, and
so are the MLP's gate and up projections: fewer, larger steps per token. B batch, L tokens, D width, V vocabulary.
"""

from collections.abc import Callable, Sequence
from itertools import repeat

import mlx.core as mx
import mlx.nn as nn

from ..backend.linear import Linear
from ..backend.ops import causal_attention, linear, swiglu
from ..config import TextConfig
from ..quantize.layers import QuantizedEmbedding
from .kv_cache import KVCache, RaggedCache

Cache = KVCache | RaggedCache


class Attention(nn.Module):
    """Causal attention with rotary positions and grouped key-value heads."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        self.rope_theta = config.rope_theta
        width = (self.heads + 2 * self.kv_heads) * self.head_dim
        self.qkv_proj = Linear(config.hidden_size, width, bias=True)
        self.o_proj = Linear(config.hidden_size, config.hidden_size, bias=False)

    def __call__(self, x: mx.array, cache: Cache | None) -> mx.array:
        B, L, D = x.shape
        queries, keys, values = self.project(x, 0 if cache is None else cache.offset)
        y = self.attend(queries, keys, values, cache)
        return self.o_proj(y.transpose(0, 2, 1, 3).reshape(B, L, D))

    def attend(self, queries: mx.array, keys: mx.array, values: mx.array, cache: Cache | None) -> mx.array:
        """Attention (B, heads, L, head_dim) to what the cache holds and to new keys and values, which it holds then.

        Rows of a `RaggedCache` attend one by one; what is returned for those that it holds nothing of is zero.
        """
        if isinstance(cache, RaggedCache):
            rows = [
                self.attend(queries[i : i + 1], keys[i : i + 1], values[i : i + 1], row)
                for i, row in enumerate(cache.rows)
            ]
            unused = len(queries) - len(rows)
            return mx.concatenate([*rows, mx.zeros((unused, *queries.shape[1:]), queries.dtype)] if unused else rows)
        mask: str | None = "causal"
        if cache is not None:
            keys, values = cache.update(keys, values)
            mask = cache.mask(queries.shape[2])
        return causal_attention(queries, keys, values, mask)

    def project(self, x: mx.array, offset: int | mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """Queries, keys and values (B, their heads, L, head_dim) of x (B, L, D), which begins at position `offset`."""
        B, L, _ = x.shape
        qkv = self.qkv_proj(x).reshape(B, L, -1, self.head_dim).transpose(0, 2, 1, 3)
        turned = self.heads + self.kv_heads  # queries and keys turn with their position, values do not
        qk = mx.fast.rope(
            qkv[:, :turned], self.head_dim, traditional=False, base=self.rope_theta, scale=1.0, offset=offset
        )
        return qk[:, : self.heads], qk[:, self.heads :], qkv[:, turned:]


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.gate_up_proj = Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(swiglu(self.gate_up_proj(x)))


class Block(nn.Module):
    """One decoder layer: attention and MLP, each on a normed copy, each added back."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = MLP(config)

    def __call__(self, x: mx.array, cache: Cache | None) -> mx.array:
        x = x + self.self_attn(self.input_layernorm(x), cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Qwen2(nn.Module):
    """The decoder with its embedding and its head, which share one matrix where the config says they are tied."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = [Block(config) for _ in range(config.num_hidden_layers)]
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)

    def __call__(self, x: mx.array, cache: Sequence[Cache] | None = None) -> mx.array:
        """Hidden states (B, L, D) after the last layer's norm; x continues the positions already in the cache.

        Without a cache x is all there is, and nothing is kept: the path for training, whose layers may be computed
        twice (`mx.checkpoint`).
        """
        for layer, layer_cache in zip(self.layers, cache or repeat(None, len(self.layers)), strict=True):
            x = layer(x, layer_cache)
        hidden: mx.array = self.norm(x)
        return hidden

    def logits(self, hidden: mx.array) -> mx.array:
        """Scores (..., V) of every token of the vocabulary, from hidden states (..., D)."""
        return self.head(hidden)

    @property
    def head(self) -> Callable[[mx.array], mx.array]:
        """The function from hidden states (..., D) to scores (..., V): the layer that is the head now.

        It holds that layer alone, neither the decoder nor a layer that takes the head's place later.
        """
        if "lm_head" in self:
            head: Callable[[mx.array], mx.array] = self.lm_head
            return head
        embedding = self.embed_tokens
        if isinstance(embedding, QuantizedEmbedding):
            return embedding.as_linear
        return lambda hidden: linear(hidden, embedding.weight)

    def make_cache(self) -> list[KVCache]:
        """An empty cache, one entry per layer."""
        return [KVCache() for _ in self.layers]
