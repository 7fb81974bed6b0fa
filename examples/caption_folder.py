"""Captions for a folder of pictures, as trainers read them: a text file for each picture, and what to look at again.

Usage: python examples/caption_folder.py [--model MODEL] [--image FOLDER] [--out FOLDER] [--prefix WORDS]

The command does the same and more: fastvlm-mlx batch FOLDER --write txt. Here the rules are your own code. Started
again, it goes on with the pictures that have no text yet.
"""

import argparse
import tempfile
from pathlib import Path

import fastvlm_mlx
from fastvlm_mlx.folder import sidecar
from fastvlm_mlx.folder.captions import Rules, repeated
from fastvlm_mlx.inputs.folder import pictures

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="tiny")
parser.add_argument("--image", default=str(Path(__file__).parent))
parser.add_argument("--out", type=Path, help="by default a temporary folder, to try it out")
parser.add_argument("--prefix", default="my_style, ")
args = parser.parse_args()

out = args.out or Path(tempfile.mkdtemp(prefix="captions-"))
rules = Rules(prefix=args.prefix, strip_start=("The image shows", "This is"), forbidden=("watermark",))
missing = [path for path in map(Path, pictures(args.image)) if sidecar.read(out / f"{path.stem}.txt") is None]

vlm = fastvlm_mlx.load(args.model)
for path, answer in zip(missing, vlm.map(missing, "Describe the image.", max_tokens=64), strict=True):
    if isinstance(answer, fastvlm_mlx.FastVLMError):
        print(f"{path.name}: left out: {answer}")
    elif phrase := rules.breach(answer.text) or repeated(answer.text):
        print(f"{path.name}: left out: it holds {phrase!r}")
    else:
        sidecar.write(out / f"{path.stem}.txt", rules.caption(answer.text))  # whole or not at all
        print(f"{path.name}: {rules.caption(answer.text)}")
