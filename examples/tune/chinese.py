"""Teach the built-in model Chinese answers, with a tokenizer of its own that has whole words for them.

Usage: python examples/tune/chinese.py [--out ADAPTER] [--steps N] [--pictures N]

`tiny` has 576 rows of embedding and a tokenizer that uses 525 of them; in it a Chinese character is three tokens, its
bytes. The words below become tokens in free rows; with more words than rows the embedding would grow. A new row starts
as the mean of the rows of the bytes that it replaces, and is trained with the rest.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from tokenizers import Tokenizer

import fastvlm_mlx
from fastvlm_mlx import TuneOptions

COLOURS = {"red": "红色", "green": "绿色", "blue": "蓝色", "yellow": "黄色", "black": "黑色", "white": "白色"}
NUMBERS = ("一个", "两个", "三个")
WORDS = [*COLOURS.values(), *NUMBERS, "形状", "什么", "颜色", "多少", "图里", "有", "是", "的", "？", "。"]


def draw(folder: Path, count: int) -> list[dict[str, str]]:
    """Pictures of one to three circles of one colour, with a question about the colour and one about the number."""
    rng, rows = np.random.default_rng(0), []
    for number in range(count):
        colour, circles = str(rng.choice(list(COLOURS))), int(rng.integers(1, 4))
        picture = Image.new("RGB", (192, 192), (128, 120, 140))
        for place in rng.permutation(4)[:circles]:
            x, y = 20 + 90 * (int(place) % 2), 20 + 90 * (int(place) // 2)
            ImageDraw.Draw(picture).ellipse((x, y, x + 60, y + 60), fill=colour)
        name = str(folder / f"{number:03d}.png")
        picture.save(name)
        rows.append({"image": name, "question": "图里的形状是什么颜色？", "answer": f"{COLOURS[colour]}。"})
        rows.append({"image": name, "question": "图里有多少形状？", "answer": f"{NUMBERS[circles - 1]}。"})
    return rows


parser = argparse.ArgumentParser()
parser.add_argument("--out", type=Path, default=Path("chinese-adapter"))
parser.add_argument("--steps", type=int, default=400)
parser.add_argument("--pictures", type=int, default=200)
args = parser.parse_args()

with tempfile.TemporaryDirectory() as folder:
    rows = draw(Path(folder), args.pictures)
    vlm = fastvlm_mlx.load("tiny")
    words = Tokenizer.from_str(vlm.tokenizer.to_json())
    words.add_tokens(WORDS)
    (Path(folder) / "words").mkdir()
    words.save(str(Path(folder) / "words" / "tokenizer.json"))
    options = TuneOptions(steps=args.steps, lr=1e-3, projector_lr=1e-3, share=True)
    tuned = fastvlm_mlx.tune(vlm, rows, options, out=args.out, tokenizer=Path(folder) / "words")
    print(f"{WORDS[0]} was {len(vlm.tokenizer.encode(WORDS[0]))} tokens")
    vlm.use(tuned.adapter)
    print(f"{WORDS[0]} is {len(vlm.tokenizer.encode(WORDS[0]))} token")
    for row in rows[:4]:
        print(f"{row['question']} {row['answer']} -> {vlm.generate(row['image'], row['question'], max_tokens=20)}")
print(f"held-out rows before and after: {tuned.before.get('held_out')} {tuned.after.get('held_out')}")
