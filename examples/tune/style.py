"""Teach a style of caption: from pictures with a text beside each to captions in that style.

Usage: python examples/tune/style.py [--model MODEL] [--photos FOLDER] [--out ADAPTER] [--steps N]

FOLDER holds pictures and, beside each, a .txt of the same name with the caption it should have. Without one the script
draws pictures of a shape and writes captions as a museum would put them.
"""

import argparse
import tempfile
from pathlib import Path

from PIL import Image, ImageDraw

import fastvlm_mlx
from fastvlm_mlx import TuneOptions

COLOURS = {"red": "Scarlet", "green": "Emerald", "blue": "Azure", "yellow": "Golden"}


def draw(folder: Path, count: int) -> None:
    """Pictures of a circle or a square, each with its caption."""
    for number in range(count):
        colour, round_one = list(COLOURS)[number % 4], number // 4 % 2 == 0
        picture = Image.new("RGB", (192, 192), (235, 235, 225))
        box = (40 + number % 7 * 6, 50, 120 + number % 7 * 6, 130)
        (ImageDraw.Draw(picture).ellipse if round_one else ImageDraw.Draw(picture).rectangle)(box, fill=colour)
        picture.save(folder / f"{number:03d}.png")
        caption = f"{COLOURS[colour]} {'Disc' if round_one else 'Panel'}, oil on canvas."
        (folder / f"{number:03d}.txt").write_text(caption, encoding="utf-8")


parser = argparse.ArgumentParser()
parser.add_argument("--model", default="tiny")
parser.add_argument("--photos", type=Path)
parser.add_argument("--out", type=Path, default=Path("style-adapter"))
parser.add_argument("--steps", type=int, default=150)
args = parser.parse_args()

with tempfile.TemporaryDirectory() as drawn:
    photos = args.photos or Path(drawn)
    if args.photos is None:
        draw(photos, 32)
    vlm = fastvlm_mlx.load(args.model)
    options = TuneOptions(steps=args.steps, lr=1e-3, projector_lr=1e-3, prompt="Write the caption.")
    tuned = fastvlm_mlx.tune(vlm, photos, options, out=args.out)
    picture = next(path for path in sorted(photos.iterdir()) if path.suffix != ".txt")
    print(f"before: {vlm.generate(picture, 'Write the caption.', max_tokens=40)}")
    vlm.use(tuned.adapter)
    print(f"after:  {vlm.generate(picture, 'Write the caption.', max_tokens=40)}")
print(f"The adapter is in {args.out}.")
