"""How sure is the model? The probability of each answer to a question that has only a few.

Usage: python examples/choices.py [--model MODEL] [--image PICTURE] [--question TEXT --choices A B ...]
"""

import argparse
from pathlib import Path

import fastvlm_mlx

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="tiny")
parser.add_argument("--image", default=Path(__file__).parent / "shapes.png")
parser.add_argument("--question", default="Is there a red circle?")
parser.add_argument("--choices", nargs="+", default=["Yes", "No"])
args = parser.parse_args()

vlm = fastvlm_mlx.load(args.model)
# One token is enough to tell them apart, if they begin differently: what else could have stood in its place is in it.
[first] = vlm.generate(args.image, args.question, max_tokens=1, logprobs=20).logprobs
found = {
    choice: sum(
        token.probability
        for token in first.top_logprobs
        if token.token.strip() and choice.lower().startswith(token.token.strip().lower())
    )
    for choice in args.choices
}
for choice, probability in sorted(found.items(), key=lambda each: -each[1]):
    print(f"{choice:<12} {probability:8.3%}")
print(f"{'other':<12} {max(0.0, 1 - sum(found.values())):8.3%}")
