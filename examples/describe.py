"""Describe a picture, word by word as the answer comes.

Usage: python examples/describe.py [--model MODEL] [--image PICTURE]
"""

import argparse
from pathlib import Path

import fastvlm_mlx

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="tiny")
parser.add_argument("--image", default=Path(__file__).parent / "shapes.png")
args = parser.parse_args()

vlm = fastvlm_mlx.load(args.model)
for chunk in vlm.stream(args.image, "Describe the image."):
    print(chunk.text, end="", flush=True)
print()
