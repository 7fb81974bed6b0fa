"""Drawing tokens: what options leave of the logits, against plain arithmetic, and what a sampler knows of an answer."""

import math
from collections import Counter
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from fastvlm_mlx import VLM
from fastvlm_mlx.backend.ops import forms_of
from fastvlm_mlx.decoding.request import Options
from fastvlm_mlx.decoding.sampling import (
    MAX_SORTED_TOKENS,
    REPETITION_WINDOW,
    Sampler,
    choose,
    likeliest,
    penalised,
)

LOGITS = np.random.default_rng(0).normal(0, 2, (1, 50)).astype(np.float32)
DRAWS = 400


def kept(temperature: float, top_p: float, top_k: int, min_p: float) -> set[int]:
    """The tokens that the filters leave, one after the other, in float64."""
    chances = np.exp(LOGITS[0].astype(np.float64) / temperature)
    order = np.argsort(-chances)[: top_k or None]
    chances = chances[order] / chances[order].sum()
    order = order[np.cumsum(chances) - chances < top_p]
    chances = chances[: len(order)]
    return set(order[chances >= min_p * chances[0]].tolist())


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k", "min_p"),
    [
        (1, 1, 5, 0),
        (2, 0.8, 0, 0),
        (1, 1, 0, 0.1),
        (3, 0.7, 12, 0.15),
        (1, 0.5, 60, 0),
        (5, 1, 50, 0.5),
        (0.5, 1, 0, 1),
    ],
)
def test_what_may_be_drawn(temperature: float, top_p: float, top_k: int, min_p: float) -> None:
    expected = kept(temperature, top_p, top_k, min_p)
    many = mx.broadcast_to(mx.array(LOGITS), (DRAWS, LOGITS.size))
    drawn = Counter(np.array(choose(many, temperature, top_p, mx.random.key(0), top_k, min_p)).tolist())
    assert set(drawn) <= expected
    chances = {token: math.exp(LOGITS[0, token] / temperature) for token in expected}
    for token, chance in chances.items():
        share = chance / sum(chances.values())
        assert abs(drawn[token] - DRAWS * share) <= 5 * math.sqrt(DRAWS * share * (1 - share)) + 1


@pytest.mark.parametrize("seed", range(3))
def test_one_token_is_the_likeliest(seed: int) -> None:
    tied = mx.array([[0.0, 3.0, 1.0, 3.0]])
    for options in ({"top_k": 1}, {"min_p": 1.0, "top_k": 1}):
        assert choose(tied, 1.0, 1.0, mx.random.key(seed), **options).item() == 1
    assert choose(tied, 1.0, 1.0, mx.random.key(seed), 0, 1.0).item() in (1, 3)


def test_filters_that_are_off_change_no_draw() -> None:
    logits = mx.array(LOGITS)
    for seed in range(20):
        plain = choose(logits, 1.3, 0.9, mx.random.key(seed))
        assert plain.item() == choose(logits, 1.3, 0.9, mx.random.key(seed), 0, 0.0).item()


def peaked(rows: int, levels: float) -> mx.array:
    """Logits (rows, 12000) of which a few hundred stand out, rounded to so many levels per unit: many are equal."""
    rng = np.random.default_rng(1)
    logits = rng.normal(0, 2, (rows, 12000)) + 9 * (rng.random((rows, 12000)) < 0.02)
    return mx.array(np.round(logits * levels) / levels, mx.float32)


@pytest.mark.parametrize(
    ("logits", "temperature", "sorts"),
    [
        (peaked(1, 1e9), 1.0, False),
        (peaked(3, 1e9), 0.7, False),
        (peaked(3, 4), 1.0, False),
        (peaked(1, 1), 1.0, False),
        (mx.where(peaked(2, 4) > 5, peaked(2, 4), -mx.inf), 1.0, False),  # as a schema leaves few
        (peaked(1, 1e9), 50.0, True),  # too many are likely
        (mx.concatenate([peaked(1, 1e9), mx.zeros((1, 12000))]), 1.0, True),  # for one row
        (mx.zeros((1, 12000)), 1.0, True),
    ],
    ids=["rows-1", "rows-3", "ties", "more ties", "masked", "hot", "one is flat", "all equal"],
)
@pytest.mark.parametrize("top_p", [0.5, 0.9, 0.99])
def test_a_cpu_sorts_the_likeliest_alone_and_draws_what_a_gpu_draws(
    logits: mx.array, temperature: float, sorts: bool, top_p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds = range(12)
    with forms_of("metal"):
        expected = [choose(logits, temperature, top_p, mx.random.key(seed)).tolist() for seed in seeds]
    widths: list[int] = []
    argsort = mx.argsort
    monkeypatch.setattr(mx, "argsort", lambda x, axis: [widths.append(x.shape[-1]), argsort(x, axis=axis)][1])
    with forms_of("cpu"):
        assert [choose(logits, temperature, top_p, mx.random.key(seed)).tolist() for seed in seeds] == expected
    assert widths == ([MAX_SORTED_TOKENS, 12000] if sorts else [MAX_SORTED_TOKENS]) * len(seeds)


def test_the_repetition_penalty_is_that_of_transformers() -> None:
    transformers = pytest.importorskip("transformers", reason="the reference for the penalty")
    torch = pytest.importorskip("torch", reason="the reference for the penalty")
    recent = np.array([[3, 7, 7, 49, 3]])
    theirs = transformers.RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor(recent), torch.tensor(LOGITS))
    ours = penalised(mx.array(LOGITS), mx.array(recent), 1.7)
    assert np.allclose(np.array(ours), theirs.numpy(), atol=1e-6)


def test_the_penalty_looks_at_the_text_of_the_prompt_and_the_answer(small: VLM) -> None:
    """And at no special token of the prompt: those that end turns are in every one."""
    end = small.tokenizer.special("<|im_end|>")
    logits = np.zeros((1, len(small.tokenizer)), np.float32)
    logits[0, [end, 0, 1, 2, 3, 4]] = [9, 8, 7, 6, 5, 4]
    sampler = Sampler(Options(repetition_penalty=100.0), small.tokenizer, prompt=[0, 2, end])
    assert [sampler(mx.array(logits)).item() for _ in range(4)] == [end, 1, 3, 4]


@pytest.mark.parametrize(("further", "expected"), [(0, 2), (1, 0)])
def test_the_penalty_looks_back_so_far_and_no_further(small: VLM, further: int, expected: int) -> None:
    prompt = [0] + [1] * (REPETITION_WINDOW - 1 + further)
    sampler = Sampler(Options(repetition_penalty=100.0), small.tokenizer, prompt=prompt)
    assert sampler(mx.array([[9.0, 8.0, 7.0]])).item() == expected
    short = Sampler(Options(repetition_penalty=100.0), small.tokenizer, prompt=prompt[1:])
    assert short(mx.array([[9.0, 8.0, 7.0]])).item() == 0


def test_log_probabilities_are_those_of_the_raw_logits(small: VLM) -> None:
    expected = LOGITS[0] - np.log(np.exp(LOGITS[0].astype(np.float64)).sum())
    options = Options(temperature=3.0, top_k=4, repetition_penalty=2.0, seed=5, logprobs=20)
    sampler = Sampler(options, small.tokenizer, prompt=[1, 2, 3])
    tokens = [sampler(mx.array(LOGITS)) for _ in range(3)]  # one behind the other, none read yet
    for token in tokens:
        sampler.accept(int(np.array(token)[0]))
    assert [found.id for found in sampler.logprobs] == [token.item() for token in tokens]
    for found in sampler.logprobs:
        assert found.logprob == pytest.approx(expected[found.id], abs=1e-5)
        assert [other.id for other in found.top_logprobs] == np.argsort(-expected)[:20].tolist()
        assert [other.logprob for other in found.top_logprobs] == pytest.approx(sorted(expected)[:-21:-1], abs=1e-5)


@pytest.mark.parametrize("count", [0, 1, 3, 20])
def test_so_many_of_the_likeliest(count: int) -> None:
    chosen, ids, values = likeliest(mx.array(LOGITS[:, :7]), mx.array([2]), count)
    assert chosen.shape == (1,) and ids.shape == values.shape == (1, min(count, 7))


def test_a_first_token_that_is_drawn_again(small: VLM) -> None:
    """As where its logits came of a picture that had overflowed."""
    options = Options(temperature=1.0, seed=3, repetition_penalty=1.5, logprobs=1)
    once, twice = (Sampler(options, small.tokenizer, prompt=[4, 5]) for _ in range(2))
    twice(mx.array(-LOGITS))
    twice.begin_again()
    for sampler in (once, twice):
        for token in [sampler(mx.array(LOGITS)) for _ in range(4)]:
            sampler.accept(int(np.array(token)[0]))
    assert once.logprobs == twice.logprobs


def test_a_greedy_answer_does_nothing_else(small: VLM) -> None:
    assert Sampler(Options(), small.tokenizer).greedy
    assert Sampler(Options(top_k=5, min_p=0.5, stop="x"), small.tokenizer).greedy
    for options in (Options(temperature=1), Options(repetition_penalty=1.1), Options(logprobs=0)):
        assert not Sampler(options, small.tokenizer).greedy
    assert not Sampler(Options(), small.tokenizer).waits


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": -1}, {"top_k": 1.5}, {"top_k": True}, {"top_k": None}, {"min_p": -0.1}, {"min_p": 1.1},
        {"min_p": float("nan")}, {"min_p": "0"}, {"repetition_penalty": 0}, {"repetition_penalty": -1},
        {"repetition_penalty": 101}, {"repetition_penalty": float("inf")}, {"repetition_penalty": None},
        {"stop": ""}, {"stop": ["a", ""]}, {"stop": list("abcde")}, {"stop": 5}, {"stop": [5]}, {"stop": {"a": 1}},
        {"stop": "\ud800"}, {"stop": "x" * 1001}, {"stop": b"x"}, {"logprobs": -1}, {"logprobs": 21},
        {"logprobs": True}, {"logprobs": 2.0},
    ],
    ids=str,
)  # fmt: skip
def test_what_is_out_of_range(options: dict[str, object]) -> None:
    name = next(iter(options))
    with pytest.raises(Exception, match=f"`{name}` (is|holds)") as raised:
        Options(**options)  # type: ignore[arg-type]
    assert type(raised.value).__name__ == "OptionError" and str(raised.value).count(". ") == 0


def test_numpy_s_numbers_are_numbers() -> None:
    given: dict[str, Any] = {
        "top_k": np.int64(5),
        "min_p": np.float32(0.5),
        "repetition_penalty": np.float64(1.5),
        "logprobs": np.uint8(3),
        "stop": ["x"],
    }
    options = Options(**given)
    assert options == Options(top_k=5, min_p=0.5, repetition_penalty=1.5, logprobs=3, stop="x")
    assert {type(options.top_k), type(options.logprobs)} == {int}
    assert {type(options.min_p), type(options.repetition_penalty)} == {float}
    assert options.stop == ("x",) and hash(options) == hash(Options(**vars(options)))
