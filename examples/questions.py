"""Ask several questions about one picture: it is looked at once, and what was said is not computed again.

Usage: python examples/questions.py [PICTURE] [MODEL]
"""

import sys
from pathlib import Path

import fastvlm_mlx

picture = sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent / "shapes.png"
vlm = fastvlm_mlx.load(sys.argv[2] if len(sys.argv) > 2 else "tiny")

for question in ("How many shapes are there?", "What colour is the triangle?", "Is there a red circle?"):
    answer = vlm.generate(picture, question, max_tokens=64)
    print(f"{question} {answer}  ({answer.stats.ttft_seconds * 1000:.0f} ms to the first token)")
