"""Teach formulas as LaTeX: the script draws sums, powers and fractions, and the answer is the source that they were
drawn from.

Usage: python examples/tune/formulas.py [--model MODEL] [--out ADAPTER] [--steps N]

Reading new signs is new sight: with a large model and many rows the image encoder learns as well (--tower).
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import fastvlm_mlx
from fastvlm_mlx import TuneOptions

QUESTION = "Write the formula as LaTeX."


def draw(path: Path, kind: int, one: str, two: str) -> str:
    """Draw a sum, a power or a fraction of two letters; returns its source."""
    picture = Image.new("RGB", (192, 192), "white")
    pen, large, small = ImageDraw.Draw(picture), ImageFont.load_default(64), ImageFont.load_default(36)
    if kind == 0:
        pen.text((20, 60), f"{one}+{two}", fill="black", font=large)
    elif kind == 1:
        pen.text((50, 70), one, fill="black", font=large)
        pen.text((95, 50), two, fill="black", font=small)
    else:
        pen.text((75, 20), one, fill="black", font=large)
        pen.line((55, 98, 140, 98), fill="black", width=5)
        pen.text((75, 100), two, fill="black", font=large)
    picture.save(path)
    return (f"${one}+{two}$", f"${one}^{two}$", rf"$\frac{{{one}}}{{{two}}}$")[kind]


parser = argparse.ArgumentParser()
parser.add_argument("--model", default="tiny")
parser.add_argument("--out", type=Path, default=Path("formulas-adapter"))
parser.add_argument("--steps", type=int, default=300)
parser.add_argument("--tower", action="store_true")
args = parser.parse_args()

with tempfile.TemporaryDirectory() as folder:
    rng, rows = np.random.default_rng(0), []
    for number in range(60):
        name = str(Path(folder) / f"{number:03d}.png")
        one, two = (str(letter) for letter in rng.choice(list("abnxyk2357"), 2))
        rows.append({"image": name, "question": QUESTION, "answer": draw(Path(name), number % 3, one, two)})
    vlm = fastvlm_mlx.load(args.model)
    parts = ("lora", "projector", "tower") if args.tower else ("lora", "projector")
    options = TuneOptions(train=parts, steps=args.steps, lr=1e-3, projector_lr=1e-3, tower_lr=1e-4)
    tuned = fastvlm_mlx.tune(vlm, rows, options, out=args.out)
    vlm.use(tuned.adapter)
    for row in rows[:3]:
        print(f"{row['answer']} -> {vlm.generate(row['image'], QUESTION, max_tokens=40)}")
print(f"The adapter is in {args.out}.")
