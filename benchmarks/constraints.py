"""What an answer held to a JSON schema costs: what is built once, the mask of a token, and a token beside a free one.

    python -m benchmarks.constraints --model tiny
    python -m benchmarks.constraints --random 0.5b --tokenizer FOLDER   # a full vocabulary: vocab.json and merges.txt

The schema asks for more than there is room for, so that no answer ends early. Held and free answers take turns, and
the ratio of each pair is taken; the pair beside it is a free answer against a free one, which says how much is noise.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from fastvlm_mlx.convert.tokenizer import read_tokenizer
from fastvlm_mlx.decoding import generate
from fastvlm_mlx.decoding.answer import finish
from fastvlm_mlx.decoding.constraints import Constraints, constraints_of
from fastvlm_mlx.decoding.engine import Engine
from fastvlm_mlx.decoding.loading import open_model
from fastvlm_mlx.decoding.request import Options
from fastvlm_mlx.decoding.schema import grammar, read_schema
from fastvlm_mlx.diagnostics.machine import machine
from fastvlm_mlx.diagnostics.random_model import open_random
from fastvlm_mlx.hub.find import find

SCHEMA = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {
            "title": {"type": "string"},
            "price": {"type": "number"},
            "colour": {"enum": ["red", "green", "blue"]},
            "sizes": {"type": "array", "items": {"type": "integer"}},
        },
        "required": ["title", "price", "colour", "sizes"],
        "additionalProperties": False,
    },
    "minItems": 1000,
}


def build(engine: Engine, rounds: int) -> dict[str, float]:
    """Seconds to build llguidance's form of the tokenizer, and of the schema: medians."""
    tokenizers, schemas = [], []
    text = read_schema(SCHEMA)
    for _ in range(rounds):
        started = time.perf_counter()
        built = Constraints(engine.tokenizer)
        tokenizers.append(time.perf_counter() - started)
        grammar.cache_clear()
        started = time.perf_counter()
        built.constraint(text, engine.config.text.vocab_size, ())
        schemas.append(time.perf_counter() - started)
    return {"tokenizer_seconds": statistics.median(tokenizers), "schema_seconds": statistics.median(schemas)}


def masks(engine: Engine, tokens: int) -> dict[str, float]:
    """Milliseconds of a mask, and of going on behind a token, over an answer of a model that draws at random."""
    rng, times = random.Random(0), []
    held = constraints_of(engine.tokenizer).constraint(read_schema(SCHEMA), engine.config.text.vocab_size, ())
    for _ in range(tokens):
        started = time.perf_counter()
        allowed = held.allowed()
        taken = time.perf_counter() - started
        token = rng.choice(allowed.nonzero()[0].tolist())
        started = time.perf_counter()
        held.accept(token)
        times.append((taken + time.perf_counter() - started) * 1e3)
    return {
        "mask_median_ms": statistics.median(times),
        "mask_mean_ms": statistics.mean(times),
        "mask_max_ms": max(times),
    }


def answers(engine: Engine, rounds: int, tokens: int) -> dict[str, float]:
    """Milliseconds per token of free and held answers, and the medians of the ratios of neighbours."""
    request = engine.prepare(None, "What is for sale?")
    free = Options(tokens, stop_tokens=())
    held = replace(free, schema=SCHEMA)

    def milliseconds(options: Options) -> float:
        answer = finish(generate.stream(engine, request, options))
        if len(answer.token_ids) != tokens:
            raise AssertionError("an answer ended early")
        return 1e3 / answer.stats.decode_tokens_per_second

    milliseconds(free), milliseconds(held)
    rows = [(milliseconds(free), milliseconds(free), milliseconds(held)) for _ in range(rounds)]
    return {
        "free_ms": statistics.median(second for _, second, _ in rows),
        "held_ms": statistics.median(found for *_, found in rows),
        "free_to_free": statistics.median(second / first for first, second, _ in rows),
        "held_to_free": statistics.median(found / second for _, second, found in rows),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder, a Hub name or 'tiny'")
    parser.add_argument("--random", help="random weights of a published size: 0.5b, 1.5b, 7b (or small)")
    parser.add_argument("--layers", type=int, help="with --random: keep this many decoder layers")
    parser.add_argument("--tokenizer", type=Path, help="a folder with a tokenizer to use instead of the model's")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    opened = (
        open_random(options.random, options.layers) if options.random else open_model(find(options.model or "tiny"))
    )
    engine = Engine(replace(opened, tokenizer=read_tokenizer(options.tokenizer)) if options.tokenizer else opened)
    engine.load_weights()
    found: dict[str, Any] = build(engine, options.rounds) | masks(engine, options.tokens)
    found |= answers(engine, options.rounds, options.tokens)
    if options.json:
        print(
            json.dumps({"machine": asdict(machine()), "model": engine.name, "tokens": len(engine.tokenizer), **found})
        )
        return
    print(machine().describe(), f"\n\n{engine.name}, {len(engine.tokenizer):,} tokens\n")
    print("| what | time |\n|---|---|")
    print(f"| tokenizer, once | {found['tokenizer_seconds']:.3f} s |")
    print(f"| schema, once | {found['schema_seconds'] * 1e3:.2f} ms |")
    print(
        f"| mask of a token: median, mean, largest | {found['mask_median_ms']:.3f}, {found['mask_mean_ms']:.3f}, "
        f"{found['mask_max_ms']:.1f} ms |"
    )
    print(f"| a token, free | {found['free_ms']:.2f} ms ({found['free_to_free']:.3f} of the one before it) |")
    print(f"| a token, held to the schema | {found['held_ms']:.2f} ms ({found['held_to_free']:.3f} of a free one) |")


if __name__ == "__main__":
    main()
