"""Read a document: the whole page, then what is asked for.

Usage: python examples/page.py [--model MODEL] [--image PICTURE] [--resolution PIXELS]

Small print needs a large picture: Apple's models see 1024 x 1024 pixels; --resolution 1536 shows them more of a dense
page, at more than twice the work. The built-in model sees 192 pixels and reads one line of a few large letters: on a
page it answers, but wrongly.
"""

import argparse
from pathlib import Path

import fastvlm_mlx

FIELDS = ["What is the number of the delivery note?", "What is the total weight?", "Where was it sent from?"]

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="tiny")
parser.add_argument("--image", default=Path(__file__).parent / "page.png")
parser.add_argument("--resolution", type=int)
args = parser.parse_args()

vlm = fastvlm_mlx.load(args.model, resolution=args.resolution)
for chunk in vlm.stream(args.image, "Read the text.", max_tokens=512):
    print(chunk.text, end="", flush=True)
print("\n")
for field, answer in zip(FIELDS, vlm.generate(args.image, FIELDS, max_tokens=32), strict=True):
    print(f"{field} {answer}")
