"""Write the image encoder as a Core ML package, and say what is known of it.

Usage: python examples/coreml.py [--model MODEL] [--image PICTURE]  (needs the extra 'coreml')
"""

import argparse
import json
import tempfile
import warnings
from pathlib import Path

import fastvlm_mlx

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="tiny")
parser.add_argument("--image", type=Path, default=Path(__file__).parent / "shapes.png", help="measured on its folder")
args = parser.parse_args()

warnings.simplefilter("ignore", fastvlm_mlx.FastVLMWarning)
with tempfile.TemporaryDirectory() as folder:
    package = fastvlm_mlx.convert_to_coreml(
        args.model, Path(folder) / "fastvithd.mlpackage", pictures=args.image.parent
    )
    report = json.loads(package.with_suffix(".report.json").read_text(encoding="utf-8"))
print(f"{report['file']}: {report['bytes'] / 1e6:.1f} MB, {report['output']['name']} {report['output']['shape']}")
print(f"features in float16 differ by {report['comparison']['difference']:.1e} of the largest")
for rule in report["rules"]:
    print(f"{rule['name']}: {'kept' if rule['kept'] else 'NOT kept'} ({rule['found']})")
