"""The pictures and questions that quantising ``tiny`` is calibrated on.

They are drawn as for training; nothing is held out. ``python -m training.calibration fastvlm_mlx/tiny/calibration``
writes WebP pictures and ``questions.jsonl``, one question a line; the same bytes every time with the same Pillow.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from training.questions import ask
from training.world import Options, draw

SEED = (40, 11)  # no seed of training or of the evaluation begins so
QUESTIONS = 4  # of a picture


def main() -> None:
    """Parse, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--pictures", type=int, default=48)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(SEED)
    lines = []
    for number in range(args.pictures):
        scene = draw(rng, Options())
        name = f"{number:02d}.webp"
        scene.image.save(args.out / name, quality=85, method=6)
        for question in ask(scene, rng, limit=QUESTIONS):
            lines.append({"image": name, "question": question.question, "answer": question.answer})
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (args.out / "questions.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
