"""What a follow-up question costs: its time to the first token, against a bare prefill of its own tokens on the same
caches.

    python -m benchmarks.followup --random 0.5b             # conversations of 2, 8 and 32 questions about one picture
    python -m benchmarks.followup --model tiny --json

The follow-up is timed from outside, from the call of `Chat.ask` to its return with one token: rendering the
conversation, finding what the caches hold, and the rest. The bare prefill is the decoder's forward pass and the choice
of a token, nothing else. The two take turns, and start from the same caches each time.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from fastvlm_mlx.chat.conversation import Chat
from fastvlm_mlx.decoding.engine import Engine
from fastvlm_mlx.decoding.loading import open_model
from fastvlm_mlx.diagnostics import bench  # before mlx, so that OpenBLAS is in place
from fastvlm_mlx.diagnostics.machine import machine
from fastvlm_mlx.diagnostics.random_model import open_random
from fastvlm_mlx.hub.find import find

import mlx.core as mx  # isort: skip

QUESTION = "Which of the things that you have just described is nearest to the left edge, and which colour is it?"


def measure(engine: Engine, questions: int, rounds: int, answer_tokens: int) -> dict[str, Any]:
    """Medians over `rounds`, in a conversation of so many questions about one picture."""
    chat = Chat(engine)
    for number in range(questions):
        image = bench.made_photo() if number == 0 else None
        chat.ask(f"{number}. What else is there to be seen?", image, max_tokens=answer_tokens)
    prefix = chat._prefix
    held = list(prefix.held)
    first = chat.ask(QUESTION, max_tokens=1)
    own = [position for position in prefix.held[first.stats.reused_tokens :] if isinstance(position, int)]
    bare, follow_up = [], []
    for _ in range(rounds + 1):
        chat.undo()
        prefix.commit(held)
        bare.append(_bare(engine, chat, own))
        prefix.commit(held)
        started = time.perf_counter()
        answer = chat.ask(QUESTION, max_tokens=1)
        follow_up.append(time.perf_counter() - started)
        if answer.token_ids != first.token_ids or answer.stats.prompt_tokens - answer.stats.reused_tokens != len(own):
            raise AssertionError("the follow-up did not start from the same caches")
    times = {"bare_seconds": statistics.median(bare[1:]), "follow_up_seconds": statistics.median(follow_up[1:])}
    ratio = times["follow_up_seconds"] / times["bare_seconds"]
    return {"questions": questions, "held_tokens": len(held), "own_tokens": len(own), **times, "ratio": ratio}


def _bare(engine: Engine, chat: Chat, own: list[int]) -> float:
    started = time.perf_counter()
    mx.eval(mx.argmax(engine.model.prefill(engine.model.embed([own], {}), chat._prefix.layers)))
    return time.perf_counter() - started


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder, a Hub name or 'tiny'")
    parser.add_argument("--random", help="random weights of a published size: 0.5b, 1.5b, 7b (or small)")
    parser.add_argument("--layers", type=int, help="with --random: keep this many decoder layers")
    parser.add_argument("--resolution", type=int, help="pixels along a picture's side")
    parser.add_argument(
        "--questions", type=int, action="append", help="questions before the follow-up; repeatable [2, 8, 32]"
    )
    parser.add_argument("--answer-tokens", type=int, default=24, help="tokens of each answer before it")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    opened = (
        open_random(options.random, options.layers) if options.random else open_model(find(options.model or "tiny"))
    )
    config = replace(opened.resolve(), eos_token_ids=())  # nothing ends an answer early
    engine = Engine(replace(opened, config=config, resolve=lambda: config))
    engine = engine.at(options.resolution) if options.resolution else engine
    engine.load_weights()
    results = [
        measure(engine, number, options.rounds, options.answer_tokens) for number in options.questions or (2, 8, 32)
    ]
    if options.json:
        print(json.dumps({"machine": asdict(machine()), "model": engine.name, "results": results}))
        return
    print(machine().describe(), f"\n\n{engine.name}\n")
    print("| questions before | tokens held | own tokens | bare prefill, ms | follow-up, ms | ratio |")
    print("|---|---|---|---|---|---|")
    for result in results:
        print(
            f"| {result['questions']} | {result['held_tokens']} | {result['own_tokens']} "
            f"| {result['bare_seconds'] * 1e3:.1f} | {result['follow_up_seconds'] * 1e3:.1f} | {result['ratio']:.2f} |"
        )


if __name__ == "__main__":
    main()
