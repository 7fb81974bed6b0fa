"""What `tiny` learns and what it forgets: German answers to two kinds of question, or which shape is largest.

    python -m benchmarks.forgetting german --run /path/to/a/folder
    python -m benchmarks.forgetting largest --run /path/to/a/folder --steps 1500

Draws new pictures from the world `tiny` was trained on (training/), fine-tunes with replay of old questions, and asks
the model with its adapter: new questions about pictures held out, and old ones in phrasings and about pictures that
nothing was trained on. Run again, it goes on where it was. Prints a table and writes RUN/result.json; nothing but the
answers' exact texts counts.
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import fastvlm_mlx
from fastvlm_mlx import TuneOptions, tune
from training.questions import article, ask
from training.world import Options, Scene, Shape, draw

GERMAN_SHAPES = {
    "circle": ("der", "Kreis"), "square": ("das", "Quadrat"), "triangle": ("das", "Dreieck"), "star": ("der", "Stern"),
    "ring": ("der", "Ring"), "cross": ("das", "Kreuz"),
}  # fmt: skip
GERMAN_COLOURS = {
    "red": "rot", "green": "grün", "blue": "blau", "yellow": "gelb", "orange": "orange", "purple": "lila",
    "black": "schwarz",
    "white": "weiß",
}  # fmt: skip
GERMAN_NUMBERS = ("Keine.", "Eine.", "Zwei.", "Drei.", "Vier.")
LARGEST = "Which shape is the largest?"
MARGIN = 1.15  # how much larger than the next the largest has to be, in diameter
Entry = dict[str, Any]


def german(scene: Scene) -> Iterator[tuple[str, str]]:
    """Questions in German about the colour of a shape that is there once, and about the number of shapes."""
    kinds = [shape.kind for shape in scene.shapes]
    for shape in scene.shapes:
        if kinds.count(shape.kind) == 1 and shape.colour:
            the, name = GERMAN_SHAPES[shape.kind]
            yield (
                f"Welche Farbe hat {the} {name}?",
                f"{the.capitalize()} {name} ist {GERMAN_COLOURS[shape.colour]}.",
            )
    yield "Wie viele Formen sind zu sehen?", GERMAN_NUMBERS[len(kinds)]


def largest(scene: Scene) -> Iterator[tuple[str, str]]:
    """Questions about sizes, the first of which is the one that is measured: which shape is the largest, where one
    clearly is.
    """
    shapes = sorted(scene.shapes, key=lambda shape: -shape.size)
    if len(shapes) < 2 or shapes[0].size < MARGIN * shapes[1].size:
        return
    yield LARGEST, _named(shapes[0])
    if shapes[-2].size >= MARGIN * shapes[-1].size:
        yield "Which shape is the smallest?", _named(shapes[-1])
    kinds = [shape.kind for shape in shapes]
    for one, two in ((shapes[0], shapes[-1]), (shapes[-1], shapes[0]), (shapes[1], shapes[0])):
        if kinds.count(one.kind) == kinds.count(two.kind) == 1:
            yield f"Is the {one.kind} larger than the {two.kind}?", "Yes." if one.size > two.size else "No."


def _named(shape: Shape) -> str:
    return f"{article(shape.colour).split()[0].capitalize()} {shape.colour} {shape.kind}."


TASKS = {"german": german, "largest": largest}


def write(folder: Path, pictures: int, seed: tuple[int, ...], questions: Any, options: Options) -> list[Entry]:
    """Draw pictures into a folder with a metadata.jsonl; returns its rows, whose pictures are paths."""
    listing = folder / "metadata.jsonl"
    if not listing.exists():
        folder.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(seed)
        rows = []
        for number in range(pictures):
            scene = draw(rng, options)
            asked = list(questions(scene, rng))
            if asked:
                scene.image.save(folder / f"{number:04d}.png")
            rows += [{"file_name": f"{number:04d}.png", "question": q, "answer": a} for q, a in asked]
        listing.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    found = [json.loads(line) for line in listing.read_text(encoding="utf-8").split("\n") if line]
    return [row | {"file_name": str(folder / row["file_name"])} for row in found]


def right(vlm: fastvlm_mlx.VLM, rows: list[Entry]) -> int:
    """How many rows are answered exactly."""
    answers = vlm.batch([(row["file_name"], row["question"]) for row in rows], max_tokens=64)
    return sum(answer.text.strip() == row["answer"] for answer, row in zip(answers, rows, strict=True))


def main() -> None:
    """Parse, draw, learn, ask, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--pictures", type=int, default=1500)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=6e-4)
    parser.add_argument("--tower-lr", type=float, default=2e-4)
    parser.add_argument("--replay-share", type=float, default=0.6)
    parser.add_argument("--share", action="store_true", help="a sequence for each picture instead of each question")
    args = parser.parse_args()
    shapes, seen = Options(only="shapes"), Options(text_share=0.3)
    data, task = args.run / "data", TASKS[args.task]

    def new(scene: Scene, rng: np.random.Generator) -> Iterator[tuple[str, str]]:
        yield from task(scene)

    def old(scene: Scene, rng: np.random.Generator) -> Iterator[tuple[str, str]]:
        yield from ((each.question, each.answer) for each in ask(scene, rng, 4))

    def unseen(scene: Scene, rng: np.random.Generator) -> Iterator[tuple[str, str]]:
        yield from ((each.question, each.answer) for each in ask(scene, rng, 4, held_out=True))

    write(data / "new", args.pictures, (77, 1), new, shapes)
    write(data / "old", args.pictures, (77, 2), old, seen)
    asked = write(data / "asked", 160 if args.task == "german" else 500, (77, 3), new, shapes)
    asked = [row for row in asked if args.task == "german" or row["question"] == LARGEST]
    kept = write(data / "kept", 340, (77, 4), unseen, Options(text_share=0.3, held_out=True))
    vlm = fastvlm_mlx.load("tiny")
    options = TuneOptions(
        train=("full", "projector", "tower") if args.task == "largest" else ("lora", "projector"),
        lr=args.lr, projector_lr=args.lr, tower_lr=args.tower_lr, steps=args.steps, batch=args.batch, share=args.share,
        replay=data / "old", replay_share=args.replay_share, eval_every=max(1, args.steps // 20),
    )  # fmt: skip
    out = args.run / "adapter"
    started = time.time()

    def listen(event: Entry) -> None:
        if "best" in event or event["step"] % 50 == 0:
            print(round(time.time() - started), json.dumps(event), flush=True)

    tuned = tune(vlm, data / "new", options, out=out, resume=out.exists(), listen=listen)
    before, old_before = right(vlm, asked), right(vlm, kept)
    vlm.use(tuned.adapter)
    after, old_after = right(vlm, asked), right(vlm, kept)
    seconds = sum(event["seconds"] for event in tuned.history if "seconds" in event)
    result = {
        "task": args.task, "steps": len([e for e in tuned.history if "seconds" in e]), "batch": args.batch,
        "lr": args.lr, "replay_share": args.replay_share, "new_asked": len(asked), "new_right": [before, after],
        "old_asked": len(kept),
        "old_right": [old_before, old_after], "best_step": tuned.best_step, "training_seconds": round(seconds),
    }  # fmt: skip
    (args.run / "result.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print("| questions | asked | before | after |\n|---|---|---|---|")
    for name, count, (one, two) in (
        (f"new: {args.task}", len(asked), (before, after)),
        ("old", len(kept), (old_before, old_after)),
    ):
        print(f"| {name} | {count} | {one} ({one / count:.1%}) | {two} ({two / count:.1%}) |")


if __name__ == "__main__":
    main()
