"""Ask for JSON of a given form: the answer always keeps to its schema, whatever the model.

Usage: python examples/fields.py [--model MODEL] [--image PICTURE] [--schema FILE]

Needs an extra: pip install 'fastvlm-mlx[schema]'. The built-in model keeps to the form like any other, but has not
learned to answer in JSON, so what it fills in is often wrong.
"""

import argparse
import json
from pathlib import Path

import fastvlm_mlx

SHAPE = {
    "type": "object",
    "properties": {
        "shape": {"enum": ["circle", "square", "triangle", "cross", "star"]},
        "colour": {"enum": ["red", "green", "blue", "yellow", "orange", "black"]},
        "how many": {"type": "integer", "minimum": 0, "maximum": 20},
    },
    "required": ["shape", "colour", "how many"],
    "additionalProperties": False,
}

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="tiny")
parser.add_argument("--image", default=Path(__file__).parent / "shapes.png")
parser.add_argument("--schema", type=Path, default=SHAPE)
args = parser.parse_args()

vlm = fastvlm_mlx.load(args.model)
answer = vlm.generate(args.image, "Describe the largest shape.", schema=args.schema, max_tokens=200)
if answer.finish_reason == "length":
    print(f"Cut short: {answer}")
else:
    for name, value in json.loads(answer.text).items():
        print(f"{name}: {value}")
