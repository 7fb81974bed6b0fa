"""Show two pictures in one question.

Usage: python examples/compare.py [PICTURE] [PICTURE] [MODEL]

The built-in model was trained on one picture at a time; a larger one answers such questions better.
"""

import sys
from pathlib import Path

import fastvlm_mlx

here = Path(__file__).parent
pictures = sys.argv[1:3] if len(sys.argv) > 2 else [here / "shapes.png", here / "sign.png"]
vlm = fastvlm_mlx.load(sys.argv[3] if len(sys.argv) > 3 else "tiny")

answer = vlm.generate(pictures, "What is different between the two images?", max_tokens=64)
print(answer)
print(f"{answer.stats.images} pictures, {answer.stats.image_tokens} image tokens of {answer.stats.prompt_tokens} in the prompt")
