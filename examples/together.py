"""Many questions at once, as they come in: each joins the others under way, and is answered as if it were alone.

Usage: python examples/together.py [--model MODEL] [--image PICTURE]
"""

import argparse
from pathlib import Path

import fastvlm_mlx
from fastvlm_mlx.decoding.request import Options
from fastvlm_mlx.decoding.scheduler import Scheduler

QUESTIONS = {
    "Describe the image.": Options(max_tokens=64),
    "How many shapes are there?": Options(max_tokens=8),
    "What colour is the circle?": Options(max_tokens=32, temperature=0.7, seed=1),
    "Is there a red circle?": Options(max_tokens=8),
}

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="tiny")
parser.add_argument("--image", default=Path(__file__).parent / "shapes.png")
args = parser.parse_args()

engine = fastvlm_mlx.load(args.model).engine
with Scheduler(engine, max_rows=8) as scheduler:
    pending = {
        question: scheduler.submit(engine.prepare(args.image, question), options)
        for question, options in QUESTIONS.items()
    }
    # One that nobody waits for any longer makes room for others within two steps.
    scheduler.submit(engine.prepare(args.image), Options(max_tokens=1000)).cancel()
    for question, answer in pending.items():
        print(question, end=" ")
        for chunk in answer:  # as it is made
            print(chunk.text, end="", flush=True)
        print()
    load = scheduler.load
    print(f"{load.answers} answers, {load.tokens} tokens; {load.pool_hits} questions found a beginning computed.")
