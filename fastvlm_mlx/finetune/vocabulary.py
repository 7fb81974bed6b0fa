"""Another tokenizer for a model that is to be fine-tuned with it: rows of the embedding for tokens it has not had.

A token that both tokenizers spell alike keeps its row. A new one starts as the mean of the rows of the tokens that it
was before. Where its id lies within the matrix, a free row is used; where not, the matrix grows. The matrix is trained,
and the head with it.
"""

import copy

import mlx.core as mx
import numpy as np

from ..config import ModelConfig
from ..decoding.adapting import EMBEDDING, HEAD, adapted
from ..decoding.engine import Engine
from ..errors import TokenizerError
from ..inputs.tokenizer import Tokenizer
from ..network.lora import dequantised
from ..quantize.layers import layer_at
from ..storage.adapter import Adapter, AdapterConfig

ROWS_MULTIPLE = 64  # a matrix that grows has a multiple of so many rows


def with_tokenizer(engine: Engine, tokenizer: Tokenizer, base: AdapterConfig) -> tuple[Engine, Adapter | None]:
    """An engine that reads and writes by another tokenizer, and what was changed for it; None where the two agree.

    Raises TokenizerError for a tokenizer without the tokens that end an answer.
    """
    old, config = engine.tokenizer, engine.config
    if tokenizer.to_json() == old.to_json():
        return engine, None
    sources = _sources(old, tokenizer)
    rows = config.text.vocab_size
    if len(tokenizer) > rows:
        rows = len(tokenizer) + -len(tokenizer) % ROWS_MULTIPLE
    names = [f"{EMBEDDING}.weight"]
    if not config.text.tie_word_embeddings:
        names.append(f"{HEAD}.weight")
    tensors = {}
    for name in names:
        matrix = np.array(dequantised(layer_at(engine.model, name.removesuffix(".weight"))))
        grown = np.zeros((rows, matrix.shape[1]), np.float32)
        grown[: min(rows, len(matrix))] = matrix[:rows]
        for token, parts in sources.items():
            grown[token] = matrix[parts].mean(axis=0)
        tensors[name] = mx.array(grown)
    settings = {"trained": tuple(names), "vocab_size": rows, "eos_token_ids": _stops(engine, tokenizer, config)}
    changed = Adapter(AdapterConfig(**{**base.__dict__, **settings}), tensors, "the tokenizer", tokenizer)
    other = copy.copy(engine)
    other.become(*adapted(engine.model, config, changed), tokenizer)
    return other, changed


def _sources(old: Tokenizer, new: Tokenizer) -> dict[int, list[int]]:
    """For each token of the new tokenizer the tokens of the old one whose rows it starts from."""
    found = {}
    for spelling, token in new.bpe.get_vocab(with_added_tokens=True).items():
        known = old.find(spelling)
        if known is not None:
            found[token] = [known]
            continue
        text = new.decode([token])
        parts = old.encode(text) if text and "\ufffd" not in text else []
        parts = parts or [part for each in new.bytes_of(token) for part in _byte(old, each)]
        if parts:
            found[token] = parts
    return found


def _byte(tokenizer: Tokenizer, value: int) -> list[int]:
    """The token of one byte, if there is one."""
    return [token for token in range(min(512, len(tokenizer))) if tokenizer.bytes_of(token) == bytes([value])][:1]


def _stops(engine: Engine, tokenizer: Tokenizer, config: ModelConfig) -> tuple[int, ...]:
    """The tokens that end an answer, by the new tokenizer's ids."""
    stops = []
    for token in config.eos_token_ids:
        spelling = engine.tokenizer.bpe.id_to_token(token)
        found = tokenizer.find(spelling) if spelling else None
        if found is None:
            raise TokenizerError(
                f"{tokenizer.origin}: it has no token {spelling!r}, with which this model ends an answer; add it as "
                "a special token."
            )
        stops.append(found)
    return tuple(stops)
