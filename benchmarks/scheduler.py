"""Answers under way together: tokens per second by rows, what joining and leaving costs, and how long a token waits for
pictures.

    env -u OPENBLAS_CORETYPE -u OPENBLAS_L2_SIZE python -m benchmarks.scheduler --random 0.5b --resolution 512

Three tables. Rows: the steps of 1, 2, 4, 8 and 16 rows, each round all of them in turn, as a ratio to one row of the
same round. Joining and leaving: steps of eight rows just after a row has joined or left, against steps of eight rows at
rest. Gaps: the time between two tokens of four long answers while a question with a new picture joins as soon as the
one before is answered, against one picture, one chunk of a prompt and one step by themselves.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from fastvlm_mlx.decoding.engine import Engine
from fastvlm_mlx.decoding.request import Options, Request
from fastvlm_mlx.decoding.row import Row
from fastvlm_mlx.decoding.rows import SHARED_PREFILL_CHUNK, Rows
from fastvlm_mlx.diagnostics.machine import machine
from fastvlm_mlx.diagnostics.random_model import open_random

import mlx.core as mx  # isort: skip

SIZES = (1, 2, 4, 8, 16)
QUESTION = "what colour is the thing on the left side of the picture and where are the others"
LONG = 100_000  # tokens that no answer here comes to


@dataclass(frozen=True)
class Speed:
    """Seconds of a step of so many rows, and tokens per second as a multiple of one row's in the same round."""

    rows: int
    seconds: float
    ratio: float


@dataclass(frozen=True)
class Gaps:
    """Seconds: one picture, one chunk and one step alone, once per arrival, and every gap between two tokens."""

    pictures: list[float]
    chunks: list[float]
    steps: list[float]
    waited: list[float]

    def bound(self, at: float) -> float:
        """What a token may wait: one picture or one chunk, and a step, each at this quantile of its own times."""
        return max(quantile(self.pictures, at), quantile(self.chunks, at)) + quantile(self.steps, at)


def quantile(seconds: Sequence[float], at: float) -> float:
    """The value at a quantile from 0 to 1."""
    return sorted(seconds)[min(len(seconds) - 1, int(at * len(seconds)))]


def asked(engine: Engine, number: int, picture: bool = False) -> Request:
    """A question of its own length, about a picture that nobody has seen or none."""
    noise = np.random.default_rng(number).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    return engine.prepare(noise if picture else None, " ".join(QUESTION.split()[: 3 + 7 * number % 13]) + f" {number}?")


def add(rows: Rows, request: Request, tokens: int = LONG) -> Row:
    """Let a question wait whose answer has exactly so many tokens."""
    row = Row(rows.engine, request, Options(tokens, stop_tokens=()), lambda _: None)
    rows.add(row)
    return row


def timed_turn(rows: Rows) -> float:
    """Seconds of a turn."""
    started = time.perf_counter()
    rows.turn()
    return time.perf_counter() - started


def full(engine: Engine, count: int) -> Rows:
    """So many rows being answered, and nobody waiting."""
    rows = Rows(engine, fill=True)
    for number in range(count):
        add(rows, asked(engine, number))
    rows.turn()
    rows.fill = False
    return rows


def speeds(engine: Engine, sizes: Sequence[int], steps: int, rounds: int) -> list[Speed]:
    """Steps of so many rows, `steps` of each size in each round; medians over rounds."""
    every = {size: full(engine, size) for size in sizes}
    seconds: dict[int, list[float]] = {size: [] for size in sizes}
    for _ in range(rounds):
        for size, rows in every.items():
            seconds[size].append(statistics.median(timed_turn(rows) for _ in range(steps)))
    found = []
    for size, each in seconds.items():
        ratios = [size * one / many for one, many in zip(seconds[sizes[0]], each, strict=True)]
        found.append(Speed(size, statistics.median(each), statistics.median(ratios)))
    return found


def changes(engine: Engine, count: int, rounds: int) -> tuple[float, float, float]:
    """Seconds of a step of `count` rows: at rest, just after the last of them joined, and just after one more left."""
    rows = full(engine, count - 1)
    rest, joined, left = [], [], []
    for number in range(rounds):
        row = add(rows, asked(engine, number))
        while row not in rows.decoding:
            rows.turn()
        joined.append(timed_turn(rows))
        rest += [timed_turn(rows) for _ in range(3)]
        leaving = add(rows, asked(engine, number + 100))
        while leaving not in rows.decoding:
            rows.turn()
        leaving.cancelled = True
        left.append(timed_turn(rows))
        rest.append(timed_turn(rows))
        row.cancelled = True
        rows.turn()
    return statistics.median(rest), statistics.median(joined), statistics.median(left)


def gaps(engine: Engine, count: int, arrivals: int) -> Gaps:
    """Time between tokens of `count` long answers while `arrivals` questions with new pictures join in turn."""
    model = engine.model
    rows = full(engine, count)
    pixels = mx.array(asked(engine, 0, picture=True).pixels[0][None])
    cache = model.text.make_cache()
    filler = model.text.embed_tokens(mx.array([[1] * SHARED_PREFILL_CHUNK]))

    def timed(compute: Callable[[], mx.array]) -> float:
        started = time.perf_counter()
        mx.eval(compute())
        mx.clear_cache()
        return time.perf_counter() - started

    def chunk() -> mx.array:
        for layer in cache:
            layer.trim(0)
        return model.text(filler, cache)

    found = Gaps([], [], [], [])
    for number in range(arrivals + 1):
        alone = timed(lambda: model.encode(pixels)), timed(chunk), timed_turn(rows)
        row = add(rows, asked(engine, 1000 + number, picture=True), 4)
        turns = []
        while row in rows.waiting or row is rows.beginning or row in rows.decoding:
            turns.append(timed_turn(rows))
        if number > 0:  # the first is to warm up
            for each, seconds in zip((found.pictures, found.chunks, found.steps), alone, strict=True):
                each.append(seconds)
            found.waited.extend(turns)
    return found


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="a folder, a Hub name or tiny")
    parser.add_argument("--random", help="instead: random weights of this size, 0.5b, 1.5b, 7b or small")
    parser.add_argument("--resolution", type=int, default=512, help="pixels that pictures are brought to")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--arrivals", type=int, default=25, help="pictures that arrive while gaps are measured")
    options = parser.parse_args()
    engine = Engine(open_random(options.random)) if options.random else Engine.open(options.model)
    engine = engine.at(options.resolution)
    engine.load_weights()
    print("| rows | a step, ms | tokens/s | times one row's |\n|---:|---:|---:|---:|")
    for found in speeds(engine, SIZES, 4, options.rounds):
        print(
            f"| {found.rows} | {found.seconds * 1e3:.1f} | {found.rows / found.seconds:.1f} | {found.ratio:.2f} |",
            flush=True,
        )
    rest, joined, left = changes(engine, 8, options.rounds)
    print("\n| eight rows | a step, ms | to rest |\n|---|---:|---:|")
    for name, seconds in (("at rest", rest), ("just after one joined", joined), ("just after one left", left)):
        print(f"| {name} | {seconds * 1e3:.1f} | {seconds / rest:.2f} |", flush=True)
    gap = gaps(engine, 4, options.arrivals)
    print("\n| | picture, ms | chunk, ms | step, ms | gap between tokens, ms | gap to max(picture, chunk) + step |")
    print("|---|---:|---:|---:|---:|---:|")
    for name, at in (("median", 0.5), ("p99", 0.99)):
        each = [quantile(seconds, at) for seconds in (gap.pictures, gap.chunks, gap.steps, gap.waited)]
        ratio = f"{each[3] / gap.bound(at):.2f}"
        print(f"| {name} | {' | '.join(f'{seconds * 1e3:.1f}' for seconds in each)} | {ratio} |")
    print(f"\nThe gap's p99 to the bound of medians: {quantile(gap.waited, 0.99) / gap.bound(0.5):.2f}")
    print(f"\n{engine.name}, pictures at {options.resolution}, {options.rounds} rounds.\n{machine().describe()}")


if __name__ == "__main__":
    main()
