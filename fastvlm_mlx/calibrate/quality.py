"""A model measured against a reference: along the reference's answers, and by right answers where they are known.

Enters: questions, a reference and a candidate. Leaves: how far the candidate's probabilities are from the reference's
(KL divergence, in nats per answer token), how often both choose the same, accuracy, bytes, memory and speed.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..config import ModelConfig, QuantConfig
from ..decoding.engine import Engine
from ..diagnostics import bench
from ..errors import OptionError
from ..network.memory import weight_bytes
from ..network.model import FastVLM
from ..quantize import recipes
from ..quantize.layers import packed_layers
from .chain import Chain, Scores
from .examples import Examples, Progress, Question, answer, answered

SPEED_TOKENS = 24


@dataclass(frozen=True)
class Quality:
    """The figures of one candidate.

    `kl` is in nats per answer token; `top1`, `top5`, `same_answers` and the accuracies are shares, 0-1. `top5` is the
    share of the reference's five likeliest tokens that are among the candidate's five. `bytes` counts the stored
    weights, `bits_per_weight` the quantised layers with their scales. Memory and speed are this machine's.
    """

    name: str
    bytes: int
    bits_per_weight: float | None
    kl: float
    top1: float
    top5: float
    same_answers: float
    accuracy: float | None
    reference_accuracy: float | None
    questions: int
    tokens: int
    peak_memory_bytes: int
    decode_tokens_per_second: float


@dataclass(frozen=True)
class Reference:
    """What candidates are compared with: examples, the scores along their answers, and the model's own figures."""

    config: ModelConfig
    examples: Examples
    scores: Scores
    own: Quality


def reference(engine: Engine, questions: Sequence[Question], name: str, progress: Progress | None = None) -> Reference:
    """Answer the questions with a model whose weights are loaded, and keep its logits along the answers."""
    examples = answered(engine, questions, progress)
    scores = Chain(engine.model, examples).scores()
    right = _accuracy([item.text for item in examples.items], examples)
    memory, speed = _pace(engine, questions)
    own = Quality(
        name, sum(weight_bytes(engine.config).values()), bits_per_weight(engine.model), 0.0, 1.0, 1.0, 1.0, right,
        right, len(examples.items), examples.tokens, memory, speed,
    )  # fmt: skip
    return Reference(engine.config, examples, scores, own)


def compare(engine: Engine, to: Reference, questions: Sequence[Question], name: str) -> Quality:
    """Measure a model whose weights are loaded against a reference.

    Raises OptionError where the two have different vocabularies or picture sizes.
    """
    ours, theirs = engine.config, to.config
    if (ours.text.vocab_size, ours.image, ours.eos_token_ids) != (
        theirs.text.vocab_size,
        theirs.image,
        theirs.eos_token_ids,
    ):
        raise OptionError(
            f"{name} and {to.own.name} do not read the same tokens and pictures; compare versions of one model."
        )
    scores = Chain(engine.model, to.examples).scores()
    kl = divergence(to.scores, scores)
    same: list[bool] = []
    top5 = 0.0
    for theirs_, ours_ in zip(to.scores.rows(), scores.rows(), strict=True):
        same += np.asarray(mx.argmax(theirs_, axis=-1) == mx.argmax(ours_, axis=-1)).tolist()
        five, fives = _likeliest(theirs_), _likeliest(ours_)
        top5 += float(np.asarray((five[:, :, None] == fives[:, None, :]).any(axis=-1).mean(axis=-1)).sum())
    texts = list(_texts(engine, to.examples, same))
    memory, speed = _pace(engine, questions)
    return Quality(
        name=name,
        bytes=sum(weight_bytes(ours).values()),
        bits_per_weight=bits_per_weight(engine.model),
        kl=kl,
        top1=sum(same) / len(same),
        top5=top5 / len(same),
        same_answers=sum(a == b.text for a, b in zip(texts, to.examples.items, strict=True)) / len(texts),
        accuracy=_accuracy(texts, to.examples),
        reference_accuracy=to.own.accuracy,
        questions=len(texts),
        tokens=len(same),
        peak_memory_bytes=memory,
        decode_tokens_per_second=speed,
    )


def divergence(reference: Scores, candidate: Scores) -> float:
    """Mean KL(reference || candidate) in nats per answer token."""
    total, count = 0.0, 0
    for theirs, ours in zip(reference.rows(), candidate.rows(), strict=True):
        theirs = theirs - mx.logsumexp(theirs, axis=-1, keepdims=True)
        ours = ours - mx.logsumexp(ours, axis=-1, keepdims=True)
        total += float((mx.exp(theirs) * (theirs - ours)).sum().item())  # type: ignore[arg-type]
        count += len(theirs)
    return total / count


def _likeliest(logits: mx.array) -> mx.array:
    """The ids (T, 5) of the five largest of logits (T, V)."""
    return mx.argpartition(-logits, kth=4, axis=-1)[:, :5]


def _texts(engine: Engine, examples: Examples, same: list[bool]) -> Iterator[str]:
    """The candidate's answers; where it agrees with the reference on every token, its answer is the reference's."""
    place = 0
    for item in examples.items:
        agreed = all(same[place : place + len(item.ids)])
        place += len(item.ids)
        yield item.text if agreed else answer(engine, examples.pixels[item.picture], item.pieces)[1]


def _accuracy(texts: Sequence[str], examples: Examples) -> float | None:
    """The share of answers that are exactly right, of those whose right answer is known; None where none is."""
    known = [(text, item.label) for text, item in zip(texts, examples.items, strict=True) if item.label is not None]
    return sum(text == label for text, label in known) / len(known) if known else None


def _pace(engine: Engine, questions: Sequence[Question]) -> tuple[int, float]:
    """MLX's peak memory in bytes, and tokens per second, of one long answer."""
    first = questions[0]
    result = bench.measure(engine, [first.image], prompt=first.text, max_tokens=SPEED_TOKENS, rounds=3)
    return result.mlx_peak_memory_bytes, result.decode_tokens_per_second


def bits_per_weight(model: FastVLM) -> float | None:
    """Mean bits per weight of the quantised layers, scales counted; None where there are none."""
    layers = packed_layers(model).values()
    sizes = [layer.scales.size * layer.group_size for layer in layers]
    bits = [recipes.bits_per_weight(QuantConfig(layer.bits, layer.group_size, layer.mode)) for layer in layers]
    return sum(size * each for size, each in zip(sizes, bits, strict=True)) / sum(sizes) if sizes else None
