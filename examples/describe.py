"""Describe a picture, word by word as the answer comes.

Usage: python examples/describe.py [PICTURE] [MODEL]
"""

import sys
from pathlib import Path

import fastvlm_mlx

picture = sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent / "shapes.png"
vlm = fastvlm_mlx.load(sys.argv[2] if len(sys.argv) > 2 else "tiny")

for chunk in vlm.stream(picture, "Describe the image."):
    print(chunk.text, end="", flush=True)
print()
