"""Answers together against one by one: how much faster the decoder is, in pairs of runs that follow each other.

    python -m benchmarks.batch --model tiny
    python -m benchmarks.batch --random 0.5b --rows 4 --rows 8

Every question has a picture and a length of its own, and every answer has the same number of tokens, so that the work
is equal. Pictures are small and already encoded: what remains is the decoder. Rounds alternate in which of the two
comes first.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastvlm_mlx import Answer
from fastvlm_mlx.decoding.answer import finish
from fastvlm_mlx.decoding.batch import answer_in_order
from fastvlm_mlx.decoding.engine import Engine
from fastvlm_mlx.decoding.generate import stream
from fastvlm_mlx.decoding.request import Options
from fastvlm_mlx.diagnostics.machine import machine
from fastvlm_mlx.diagnostics.random_model import open_random
from fastvlm_mlx.inputs.image import Images

BATCH_SIZES = (2, 4, 8, 16)
WORDS = [
    "what",
    "colour",
    "is",
    "the",
    "thing",
    "on",
    "the",
    "left",
    "side",
    "of",
    "the",
    "picture",
    "and",
    "where",
    "others",
]
SIZE = 128  # pixels that random models are shown

Questions = Sequence[tuple[Images, str]]


@dataclass(frozen=True)
class Pair:
    """Time of one by one over time together: of the decoding steps alone, and of everything; and whether the ids were
    equal.
    """

    decode: float
    whole: float
    equal: bool


def questions(count: int) -> list[tuple[Images, str]]:
    """As many questions of 3 to 15 words, each about a picture of noise."""
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (count, 64, 64, 3), dtype=np.uint8)
    return [(picture, " ".join(WORDS[: 3 + 7 * number % 13])) for number, picture in enumerate(pictures)]


def decode_seconds(answer: Answer) -> float:
    """From the first token of an answer to its last."""
    return (answer.stats.completion_tokens - 1) / answer.stats.decode_tokens_per_second


def measure(engine: Engine, asked: Questions, tokens: int, rounds: int) -> list[Pair]:
    """`rounds` pairs, after one of each kind that does not count; no token ends an answer early."""
    options = Options(tokens, stop_tokens=())

    def alone() -> tuple[list[Answer], float, float]:
        started = time.perf_counter()
        answers = [finish(stream(engine, engine.prepare(image, prompt), options)) for image, prompt in asked]
        return answers, sum(map(decode_seconds, answers)), time.perf_counter() - started

    def together() -> tuple[list[Answer], float, float]:
        started = time.perf_counter()
        answers = answer_in_order(engine, engine.prepare_all(asked), options)
        return answers, max(map(decode_seconds, answers)), time.perf_counter() - started

    pairs = []
    for number in range(rounds + 1):
        runs = [run() for run in ((alone, together) if number % 2 else (together, alone))]
        (one, one_decode, one_whole), (many, many_decode, many_whole) = runs if number % 2 else runs[::-1]
        equal = [answer.token_ids for answer in one] == [answer.token_ids for answer in many]
        pairs.append(Pair(one_decode / many_decode, one_whole / many_whole, equal))
    return pairs[1:]


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="a folder, a Hub name or tiny")
    parser.add_argument("--random", help="instead: random weights of this size, 0.5b, 1.5b, 7b or small")
    parser.add_argument("--rows", type=int, action="append", help="questions at a time; repeat (default 2, 4, 8, 16)")
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    engine = Engine(open_random(options.random)).at(SIZE) if options.random else Engine.open(options.model)
    engine.load_weights()
    print("| questions | decoder, times as fast as one by one | from lowest to highest | everything | equal ids |")
    print("|---:|---:|---:|---:|---|")
    for rows in options.rows or BATCH_SIZES:
        pairs = measure(engine, questions(rows), options.max_tokens, options.rounds)
        decode = sorted(pair.decode for pair in pairs)
        whole = statistics.median(pair.whole for pair in pairs)
        equal = sum(pair.equal for pair in pairs)
        cells = (rows, f"{statistics.median(decode):.2f}", f"{decode[0]:.2f}-{decode[-1]:.2f}", f"{whole:.2f}")
        print(f"| {' | '.join(map(str, cells))} | {equal} of {len(pairs)} |", flush=True)
    print(f"\n{engine.name}, {options.max_tokens} tokens each, {options.rounds} pairs.\n{machine().describe()}")


if __name__ == "__main__":
    main()
