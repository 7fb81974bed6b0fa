"""Ask several questions about one picture: it is looked at once, and the answers are made together.

Usage: python examples/questions.py [--model MODEL] [--image PICTURE]
"""

import argparse
from pathlib import Path

import fastvlm_mlx

QUESTIONS = ["How many shapes are there?", "What colour is the triangle?", "Is there a red circle?"]

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="tiny")
parser.add_argument("--image", default=Path(__file__).parent / "shapes.png")
args = parser.parse_args()

vlm = fastvlm_mlx.load(args.model)
for question, answer in zip(QUESTIONS, vlm.generate(args.image, QUESTIONS, max_tokens=64), strict=True):
    print(
        f"{question} {answer}  ({answer.stats.reused_tokens} of {answer.stats.prompt_tokens} positions were there "
        "already)"
    )
