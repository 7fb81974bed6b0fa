"""Accuracy on pictures and phrasings never seen in training, per kind of question.

``python -m training.evaluate CHECKPOINT`` answers with PyTorch from the float32 weights of an exported checkpoint,
``python -m training.evaluate MODEL --backend mlx`` with the package itself (MODEL: what ``fastvlm_mlx.load`` takes);
``--compare CHECKPOINT`` beside it asks PyTorch the same questions and prints the share of equal texts. The answer is a
Markdown table with Wilson's 95 % intervals, or one object with ``--json``.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor

from training import tokenizer as bpe
from training.data import BEFORE_IMAGE, additive_mask, after_image, fixed_items
from training.export import read_checkpoint
from training.model import FastVLM
from training.questions import Question
from training.world import Options, Scene, to_model_pixels

MAX_TOKENS = 64  # more than the longest answer
SHORT_TEXT = 4  # characters
Answer = Callable[[Scene, list[str]], list[str]]


@dataclass(frozen=True)
class Row:
    """One line of the table: how many of a kind were asked and answered exactly."""

    kind: str
    right: int
    asked: int

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the share, 0-1."""
        return wilson(self.right, self.asked)


def wilson(right: int, asked: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval for ``right`` of ``asked``, as shares 0-1."""
    if asked == 0:
        return 0.0, 1.0
    share = right / asked
    centre = share + z * z / (2 * asked)
    spread = z * math.sqrt(share * (1 - share) / asked + z * z / (4 * asked * asked))
    scale = 1 + z * z / asked
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def kind_of(question: Question, scene: Scene) -> str:
    """The table's row for a question; text is split by its length."""
    if question.kind == "text" and scene.text is not None:
        return "text, 3-4 characters" if len(scene.text.string) <= SHORT_TEXT else "text, 5 and more"
    if question.kind == "describe":
        return "describe, with text" if scene.text is not None else "describe, shapes"
    return question.kind


@torch.no_grad()
def greedy(model: FastVLM, tokenizer: Tokenizer, scene: Scene, questions: list[str]) -> list[str]:
    """Greedy answers by PyTorch; all of a picture's prompts advance together, each a row of its own."""
    pixels, _, _, _ = to_model_pixels(scene, model.config.image_size)
    _, _, cells = model.see(torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 255)
    before = torch.tensor(tokenizer.encode(BEFORE_IMAGE, add_special_tokens=False).ids)
    stops = {tokenizer.token_to_id(bpe.END), tokenizer.token_to_id(bpe.END_OF_TEXT)}
    rows = [tokenizer.encode(after_image(question), add_special_tokens=False).ids for question in questions]
    answers: list[list[int]] = [[] for _ in rows]
    done = [False] * len(rows)
    prefix = len(before) + cells.shape[1]
    for _ in range(MAX_TOKENS):
        live = [index for index, finished in enumerate(done) if not finished]
        if not live:
            break
        longest = max(len(rows[index]) for index in live)
        after = torch.tensor([rows[index] + [0] * (longest - len(rows[index])) for index in live])
        mask = additive_mask(torch.ones_like(after), prefix)
        places = torch.arange(prefix + longest).expand(len(live), -1)
        embeddings = model.embed(cells.expand(len(live), -1, -1), before.expand(len(live), -1), after)
        states = model.hidden(embeddings, mask, places)
        last = torch.tensor([prefix + len(rows[index]) - 1 for index in live])
        logits: Tensor = model.decoder.lm_head(states[torch.arange(len(live)), last])
        for index, token in zip(live, logits.argmax(-1).tolist(), strict=True):
            if token in stops:
                done[index] = True
            else:
                rows[index].append(token)
                answers[index].append(token)
    return [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in answers]


def torch_backend(checkpoint: Path) -> Answer:
    """Answers by PyTorch from an exported checkpoint."""
    model, tokenizer = read_checkpoint(checkpoint), bpe.load(checkpoint)
    return lambda scene, questions: greedy(model, tokenizer, scene, questions)


def mlx_backend(name: str) -> Answer:
    """Answers by the package, one question at a time."""
    import fastvlm_mlx

    vlm = fastvlm_mlx.load(name)

    def answer(scene: Scene, questions: list[str]) -> list[str]:
        image: Image.Image = scene.image
        return [vlm.generate(image, question, max_tokens=MAX_TOKENS).text.strip() for question in questions]

    return answer


def tabulate(items: list[tuple[Scene, list[Question]]], answers: list[list[str]]) -> list[Row]:
    """Right and asked per kind, and over all."""
    asked: dict[str, list[bool]] = {}
    for (scene, questions), texts in zip(items, answers, strict=True):
        for question, text in zip(questions, texts, strict=True):
            asked.setdefault(kind_of(question, scene), []).append(text == question.answer)
    rows = [Row(kind, sum(results), len(results)) for kind, results in sorted(asked.items())]
    return [*rows, Row("all", sum(row.right for row in rows), sum(row.asked for row in rows))]


def markdown(rows: list[Row]) -> str:
    """The table."""
    lines = ["| question | asked | exactly right | 95 % interval |", "|---|---|---|---|"]
    for row in rows:
        low, high = row.interval
        lines.append(
            f"| {row.kind} | {row.asked} | {100 * row.right / row.asked:.1f} % | {100 * low:.1f}-{100 * high:.1f} % |"
        )
    return "\n".join(lines)


def main() -> None:
    """Parse, draw, ask, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="checkpoint folder (torch), or what fastvlm_mlx.load takes (mlx)")
    parser.add_argument("--backend", choices=("torch", "mlx"), default="torch")
    parser.add_argument(
        "--compare", type=Path, help="also ask PyTorch with this checkpoint; print the share of equal texts"
    )
    parser.add_argument("--pictures", type=int, default=400)
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--max-characters", type=int, default=4, help="longest printed text")
    parser.add_argument("--mistakes", type=int, default=0, help="also print so many wrong answers")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    options = Options(max_characters=args.max_characters)
    items = fixed_items(options, args.pictures, args.seed, held_out=True)

    def ask_all(backend: Answer) -> list[list[str]]:
        return [backend(scene, [question.question for question in questions]) for scene, questions in items]

    answers = ask_all(torch_backend(Path(args.model)) if args.backend == "torch" else mlx_backend(args.model))
    rows = tabulate(items, answers)
    result: dict[str, object] = {
        "model": args.model, "backend": args.backend, "pictures": args.pictures, "seed": args.seed,
        "kinds": {row.kind: {"right": row.right, "asked": row.asked, "interval": row.interval} for row in rows},
    }  # fmt: skip
    text = markdown(rows)
    if args.compare:
        others = ask_all(torch_backend(args.compare))
        pairs = [
            (a, b) for mine, theirs in zip(answers, others, strict=True) for a, b in zip(mine, theirs, strict=True)
        ]
        equal_pictures = sum(mine == theirs for mine, theirs in zip(answers, others, strict=True))
        equal = sum(a == b for a, b in pairs)
        result["equal_texts"] = {"answers": equal, "asked": len(pairs), "pictures": equal_pictures, "of": len(items)}
        text += f"\n\nThe same text as PyTorch: {equal} of {len(pairs)} answers, "
        text += f"all answers on {equal_pictures} of {len(items)} pictures."
        text += "\n\nPyTorch:\n\n" + markdown(tabulate(items, others))
    if args.json:
        print(json.dumps(result, indent=2))
        return
    print(text)
    wrong = [
        f"- {question.question} -> {text} (right: {question.answer})"
        for (_, questions), texts in zip(items, answers, strict=True)
        for question, text in zip(questions, texts, strict=True)
        if text != question.answer
    ]
    if args.mistakes:
        print("\n" + "\n".join(wrong[: args.mistakes]))


if __name__ == "__main__":
    main()
