"""Inspect a part from several angles: the same questions about every view, then one question about all views together.

Usage: python examples/compare.py [--model MODEL] [--image PICTURE --image PICTURE ...]

The pictures that are here show a plate that should have four holes; on the third, one is missing. The built-in model
counts them, but was trained on one picture at a time: what it says of all three together means nothing. A larger model
compares.
"""

import argparse
from pathlib import Path

import fastvlm_mlx

here = Path(__file__).parent
QUESTIONS = ["How many shapes are there?", "Describe the image."]

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="tiny")
parser.add_argument("--image", action="append", help="a view; repeat for several")
args = parser.parse_args()
views = args.image or [here / f"part-{side}.png" for side in ("front", "left", "right")]

vlm = fastvlm_mlx.load(args.model)
answers = iter(vlm.batch([(view, question) for view in views for question in QUESTIONS], max_tokens=64))
for view in views:
    print(Path(view).name)
    for question in QUESTIONS:
        print(f"  {question} {next(answers)}")

together = vlm.generate(views, "What is different between the images?", max_tokens=64)
print(f"All {len(views)} together ({together.stats.image_tokens} image tokens): {together}")
