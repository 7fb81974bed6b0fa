"""Ask in Chinese, with the tokenizer of another folder if one is named.

Usage: python examples/chinese.py [--model MODEL] [--tokenizer-path FOLDER] [--image PICTURE]

--tokenizer-path is for a checkpoint in Apple's layout that lies apart from its tokenizer, or that was fine-tuned with
another tokenizer, better at Chinese. The folder's token ids must be the ones the model was trained with: others are
refused where that can be detected, and give nonsense where it cannot.

Qwen2, the decoder of Apple's models, was trained on Chinese, and its tokenizer has whole words of it; how well the
models answer in it was not tried here. The built-in model knows none: every character takes three tokens, one per byte,
which it never saw in training. What it shows is that any text arrives whole, not that it is understood.
"""

import argparse
from pathlib import Path

import fastvlm_mlx

QUESTIONS = ["图里有什么？", "有几个图形？", "请用一句话描述这张图片。"]

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="tiny")
parser.add_argument("--tokenizer-path")
parser.add_argument("--image", default=Path(__file__).parent / "shapes.png")
args = parser.parse_args()

vlm = fastvlm_mlx.load(args.model, tokenizer=args.tokenizer_path)
for question, answer in zip(QUESTIONS, vlm.generate(args.image, QUESTIONS, max_tokens=64), strict=True):
    ids = vlm.tokenizer.encode(question)
    print(f"{vlm.tokenizer.decode(ids)} ({len(question)} characters, {len(ids)} tokens) {answer}")
