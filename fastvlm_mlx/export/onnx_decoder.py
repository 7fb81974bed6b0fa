"""Qwen2 as two ONNX graphs: token ids -> embeddings, and embeddings with the cache of what went before -> logits.

Names and shapes are those that transformers.js loads: `inputs_embeds` (B, L, D), `attention_mask` (B, P + L),
`position_ids` (B, L) and `past_key_values.N.key`, `.value` (B, kv_heads, P, head_dim) give `logits` (B, L, V) and
`present.N.key`, `.value`, with P positions in the cache, none at first.
"""

from collections.abc import Mapping

import numpy as np

from ..config import ModelConfig
from .encoder import Weights
from .onnx_graph import Graph

UNSEEN = -1e9  # added to the score of what may not be seen: finite, so that a row of padding alone stays a number


def embedding_graph(weights: Mapping[str, Weights], config: ModelConfig, *, half: bool) -> Graph:
    """`input_ids` (B, L) -> `inputs_embeds` (B, L, D)."""
    g = Graph("embed_tokens", half=half)
    ids = g.input("input_ids", "INT64", ["batch_size", "sequence_length"])
    matrix = weights["text.embed_tokens.weight"]
    rows = g("Gather", g.weight("embed_tokens.weight", matrix.astype(np.float16 if half else np.float32)), ids)
    g.output(g.to(rows, "FLOAT") if half else rows, "inputs_embeds", ["batch_size", "sequence_length", matrix.shape[1]])
    return g


def decoder_graph(weights: dict[str, Weights], config: ModelConfig, *, half: bool) -> Graph:
    """The decoder with its head, from tensors under their published names, which are taken out of `weights`."""
    return _Writer(weights, config, half).decoder()


class _Writer:
    def __init__(self, weights: dict[str, Weights], config: ModelConfig, half: bool):
        self.weights, self.text = weights, config.text
        self.graph = Graph("decoder_model_merged", half=half)

    def decoder(self) -> Graph:
        g, text = self.graph, self.text
        x = g.input("inputs_embeds", "FLOAT", ["batch_size", "sequence_length", text.hidden_size])
        mask = g.input("attention_mask", "INT64", ["batch_size", "total_sequence_length"])
        positions = g.input("position_ids", "INT64", ["batch_size", "sequence_length"])
        cache: list[int | str] = ["batch_size", text.num_key_value_heads, "past_sequence_length", text.head_dim]
        past = [
            [g.input(f"past_key_values.{layer}.{part}", "FLOAT", cache) for part in ("key", "value")]
            for layer in range(text.num_hidden_layers)
        ]
        turns = self.turns(positions)
        unseen = self.unseen(x, mask)
        present: list[str] = []
        for layer in range(text.num_hidden_layers):
            home = f"text.layers.{layer}"
            y, held = self.attention(self.norm(x, f"{home}.input_layernorm"), home, turns, unseen, past[layer])
            present += held
            x = g("Add", x, y)
            x = g("Add", x, self.mlp(self.norm(x, f"{home}.post_attention_layernorm"), home))
        x = self.norm(x, "text.norm")
        head = self.weights.pop("text.lm_head.weight", None)
        logits = g.linear(x, "lm_head", self.weights["text.embed_tokens.weight"] if head is None else head)
        g.output(logits, "logits", ["batch_size", "sequence_length", text.vocab_size])
        held_shape = [*cache[:2], "total_sequence_length", cache[3]]
        for place, value in enumerate(present):
            g.output(value, f"present.{place // 2}.{('key', 'value')[place % 2]}", held_shape)
        return g

    def turns(self, positions: str) -> tuple[str, str]:
        """Cosine and sine of every position's turns, (B, 1, L, head_dim / 2)."""
        g, half = self.graph, self.text.head_dim // 2
        rates = self.text.rope_theta ** (-np.arange(half, dtype=np.float64) / half)
        angles = g(
            "Mul",
            g("Unsqueeze", g.to(positions, "FLOAT"), g.constant(1, 3)),
            g.weight("rates", rates.astype(np.float32)),
        )
        return g("Cos", angles), g("Sin", angles)

    def unseen(self, x: str, mask: str) -> str:
        """What is added to scores, (B, 1, 1, L, P + L): nothing for what a position may see, UNSEEN for what follows it
        and for padding."""
        g = self.graph
        length = g("Gather", g("Shape", x), g.constant(1, scalar=True))
        total = g("Gather", g("Shape", mask), g.constant(1, scalar=True))
        one = g.constant(1, scalar=True)
        keys = g("Range", g.constant(0, scalar=True), total, one)
        queries = g("Unsqueeze", g("Range", g("Sub", total, length), total, one), g.constant(1))
        seen = g("And", g("LessOrEqual", keys, queries), g("Unsqueeze", g.to(mask, "BOOL"), g.constant(1, 2, 3)))
        return g("Where", seen, g.number(0.0), g.number(UNSEEN))

    def norm(self, x: str, name: str) -> str:
        g = self.graph
        mean = g("ReduceMean", g("Mul", x, x), g.constant(-1), keepdims=1)
        x = g("Div", x, g("Sqrt", g("Add", mean, g.number(self.text.rms_norm_eps))))
        return g("Mul", x, g.weight(name, self.weights.pop(f"{name}.weight")))

    def attention(
        self, x: str, home: str, turns: tuple[str, str], unseen: str, past: list[str]
    ) -> tuple[str, list[str]]:
        """What attention adds, and the keys and values of all positions."""
        g, text = self.graph, self.text
        heads, kv, width = text.num_attention_heads, text.num_key_value_heads, text.head_dim
        q, k, v = (
            self.heads(x, f"{home}.self_attn.{part}_proj", count)
            for part, count in (("q", heads), ("k", kv), ("v", kv))
        )
        k = g("Concat", past[0], self.turned(k, turns), axis=2)
        v = g("Concat", past[1], v, axis=2)
        q = g("Mul", self.turned(q, turns), g.number(width**-0.5))
        q = g("Reshape", q, g.constant(0, kv, heads // kv, -1, width))  # the queries that share keys and values
        wide_k, wide_v = (g("Unsqueeze", each, g.constant(2)) for each in (k, v))
        scores = g("Add", g("MatMul", q, g("Transpose", wide_k, perm=[0, 1, 2, 4, 3])), unseen)
        y = g("MatMul", g("Softmax", scores, axis=-1), wide_v)
        y = g("Reshape", y, g.constant(0, heads, -1, width))
        y = g("Reshape", g("Transpose", y, perm=[0, 2, 1, 3]), g.constant(0, -1, heads * width))
        return g.linear(y, f"{home}.o_proj", self.weights.pop(f"{home}.self_attn.o_proj.weight")), [k, v]

    def heads(self, x: str, name: str, count: int) -> str:
        """A projection as (B, heads, L, head_dim)."""
        g = self.graph
        y = g.linear(x, name, self.weights.pop(f"{name}.weight"), self.weights.pop(f"{name}.bias"))
        return g("Transpose", g("Reshape", y, g.constant(0, -1, count, self.text.head_dim)), perm=[0, 2, 1, 3])

    def turned(self, x: str, turns: tuple[str, str]) -> str:
        """Rotary positions: each element of the first half turns with its partner in the second."""
        g, (cosine, sine) = self.graph, turns
        a, b = g.several("Split", 2, x, axis=-1, num_outputs=2)
        first = g("Sub", g("Mul", a, cosine), g("Mul", b, sine))
        second = g("Add", g("Mul", b, cosine), g("Mul", a, sine))
        return g("Concat", first, second, axis=-1)

    def mlp(self, x: str, home: str) -> str:
        g = self.graph
        gate, up = (
            g.linear(x, f"{home}.{part}", self.weights.pop(f"{home}.mlp.{part}_proj.weight")) for part in ("gate", "up")
        )
        y = g("Mul", g("Mul", gate, g("Sigmoid", gate)), up)
        return g.linear(y, f"{home}.down", self.weights.pop(f"{home}.mlp.down_proj.weight"))
