"""Teach what is wrong with a part, seen from several sides: every row shows two pictures, and the answer depends on
both.

Usage: python examples/tune/defects.py [--model MODEL] [--out ADAPTER] [--steps N]

The script draws grey parts from the front and from the side; some have a dark scratch on one of the two.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

import fastvlm_mlx
from fastvlm_mlx import TuneOptions

QUESTION = "Is the part in order?"


def draw(folder: Path, count: int) -> list[dict[str, object]]:
    """Rows of two views each, with the verdict."""
    rng, rows = np.random.default_rng(0), []
    for number in range(count):
        fault = number % 3  # none, in front, at the side
        names = []
        for view in (1, 2):
            picture = Image.new("RGB", (192, 192), tuple(int(c) for c in rng.integers(190, 240, 3)))
            pen = ImageDraw.Draw(picture)
            pen.rounded_rectangle((30, 40 * view, 160, 150), 20, fill=(120, 125, 130))
            if view == fault:
                x, y = (int(n) for n in rng.integers(60, 110, 2))
                pen.line((x, y, x + 30, y + 25), fill=(15, 15, 15), width=6)
            names.append(str(folder / f"{number:03d}-{view}.png"))
            picture.save(names[-1])
        answer = ("Yes.", "No, a scratch in front.", "No, a scratch at the side.")[fault]
        rows.append({"images": names, "question": QUESTION, "answer": answer})
    return rows


parser = argparse.ArgumentParser()
parser.add_argument("--model", default="tiny")
parser.add_argument("--out", type=Path, default=Path("defects-adapter"))
parser.add_argument("--steps", type=int, default=200)
args = parser.parse_args()

with tempfile.TemporaryDirectory() as folder:
    rows = draw(Path(folder), 36)
    vlm = fastvlm_mlx.load(args.model)
    tuned = fastvlm_mlx.tune(vlm, rows, TuneOptions(steps=args.steps, lr=1e-3, projector_lr=1e-3), out=args.out)
    vlm.use(tuned.adapter)
    for row in rows[:3]:
        print(f"{row['answer']} -> {vlm.generate(row['images'], QUESTION, max_tokens=40)}")  # type: ignore[call-overload]
print(f"held-out parts before and after: {tuned.before.get('held_out')} {tuned.after.get('held_out')}")
