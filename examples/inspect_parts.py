"""Check parts from several sides: all views of a part in one question, a verdict by schema, a CSV file.

Usage: python examples/inspect_parts.py [--model MODEL] [--image PICTURE ...] [--out FILE.csv]

Views of one part have names that begin alike: bolt7-front.jpg and bolt7-left.jpg are two views of bolt7. Needs an
extra: pip install 'fastvlm-mlx[schema]'. The built-in model keeps to the form like any other, but has learned nothing
about parts, so its verdicts mean nothing.
"""

import argparse
import csv
import json
import sys
from contextlib import nullcontext
from itertools import groupby
from pathlib import Path

import fastvlm_mlx

HERE = Path(__file__).parent
QUESTION = "These are views of one part. Is it in order? Answer in JSON."
VERDICT = {
    "type": "object",
    "properties": {
        "verdict": {"enum": ["in order", "damaged", "unclear"]},
        "holes": {"type": "integer", "minimum": 0, "maximum": 99},
        "remark": {"type": "string", "maxLength": 60},
    },
    "required": ["verdict", "holes", "remark"],
    "additionalProperties": False,
}

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="tiny")
parser.add_argument("--image", nargs="+", type=Path, default=sorted(HERE.glob("part-*.png")))
parser.add_argument("--out", type=Path)
args = parser.parse_args()


def part(view: Path) -> str:
    """The name of the part that a picture is a view of."""
    return view.stem.rpartition("-")[0] or view.stem


vlm = fastvlm_mlx.load(args.model)
parts = {name: list(views) for name, views in groupby(sorted(args.image), part)}
rows = ({"images": views, "prompt": QUESTION} for views in parts.values())
with args.out.open("w", newline="") if args.out else nullcontext(sys.stdout) as file:
    table = csv.DictWriter(file, ["part", "views", *VERDICT["properties"], "error"], lineterminator="\n")
    table.writeheader()
    for name, answer in zip(parts, vlm.map(rows, schema=VERDICT, max_tokens=200), strict=True):
        row = {"part": name, "views": len(parts[name])}
        if isinstance(answer, fastvlm_mlx.FastVLMError):
            row["error"] = str(answer)
        elif answer.finish_reason == "length":
            row["error"] = "cut short"
        else:
            row |= json.loads(answer.text)
        table.writerow(row)
        file.flush()
