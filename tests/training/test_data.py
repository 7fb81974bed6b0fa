"""What training is shown and not taught: pairs of shape and colour that are held out are neither drawn nor ruled
out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from training import tokenizer as bpe
from training.data import IGNORE, fixed_items, make_batch, partners, unlearned
from training.model import ModelConfig
from training.questions import ask, corpus
from training.train import without
from training.world import HELD_OUT_PAIRS, RGB, UNNAMED, Options, draw


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return bpe.assemble(*bpe.build(corpus()))


@pytest.mark.parametrize(
    ("answer", "left_out"),
    [
        ("The star is red.", {" red": " blue"}),
        ("The star is blue.", {}),
        (
            "A red circle, a blue ring and a white cross.",
            {" circle": " cross", " ring": " star", " cross": " triangle"},
        ),
        ("I see no star.", {}),
        ("Three.", {}),
    ],
)
def test_the_token_that_would_complete_a_held_out_pair_is_left_out(
    tokenizer: Tokenizer, answer: str, left_out: dict[str, str]
) -> None:
    ids = tokenizer.encode(answer, add_special_tokens=False).ids
    found = unlearned(ids, partners(tokenizer))
    words = {tokenizer.decode([a]): tokenizer.decode([b]) for a, b in zip(ids, found, strict=True) if b != IGNORE}
    assert words == left_out


def test_what_is_left_out_has_no_gradient() -> None:
    logits = torch.zeros(2, 4, requires_grad=True)
    torch.nn.functional.cross_entropy(without(logits, torch.tensor([3, IGNORE])), torch.tensor([0, 0])).backward()
    assert logits.grad is not None
    assert (logits.grad[0] == 0).tolist() == [False, False, False, True]
    assert (logits.grad[1] != 0).all()


@pytest.mark.slow
def test_training_never_names_a_held_out_pair(tokenizer: Tokenizer) -> None:
    rng = np.random.default_rng(5)
    texts = []
    for _ in range(150):
        scene = draw(rng, Options(only="shapes"))
        texts += [f"{q.question} {q.answer}" for q in ask(scene, rng)]
    assert not [text for text in texts for shape, colour in HELD_OUT_PAIRS if f"{colour} {shape}" in text]


def test_shapes_in_colours_without_a_name(tokenizer: Tokenizer) -> None:
    options = Options(only="shapes", unnamed_share=1.0)
    items = fixed_items(options, 12, seed=3, held_out=False)
    assert all(shape.colour == UNNAMED for scene, _ in items for shape in scene.shapes)
    assert not [q for _, asked in items for q in asked for colour in RGB if f" {colour}" in f"{q.question} {q.answer}"]
    targets = make_batch(items, tokenizer, ModelConfig()).targets
    assert set(targets["fine_colour"].unique().tolist()) == {IGNORE, len(RGB)}
    assert (targets["objects"] == IGNORE).any()
