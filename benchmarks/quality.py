"""What quantising costs, on pictures and phrasings that neither training nor calibration has seen.

``python -m benchmarks.quality tiny --out benchmarks/results/NAME`` quantises a model of the trained world by every
recipe in memory, asks it the held-out questions of ``training.evaluate``, prints a table and the bars that must be met,
and writes NAME.json and NAME.svg. ``python -m benchmarks.quality --random 0.5b --layers 4`` compares on random weights
and made pictures: there is no right answer there, and divergence between them is all that is measured. The exit code is
1 where a bar is missed.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from benchmarks import charts
from fastvlm_mlx.calibrate import pipeline, quality, report
from fastvlm_mlx.calibrate.examples import Question, questions_for
from fastvlm_mlx.calibrate.quality import Quality
from fastvlm_mlx.decoding.engine import Engine
from fastvlm_mlx.decoding.loading import open_model
from fastvlm_mlx.diagnostics import bench
from fastvlm_mlx.diagnostics.machine import machine
from fastvlm_mlx.diagnostics.random_model import open_random
from fastvlm_mlx.hub.find import find
from fastvlm_mlx.hub.names import BUILT_IN
from fastvlm_mlx.quantize.recipes import RECIPES, Recipe

WITH_TOWER = replace(RECIPES["mixed"], name="mixed, image encoder too", tower=4)
LOST = {"8bit": 0.005, "4bit": 0.03, "mixed": 0.015}  # accuracy that may be lost against the reference
LEAST_GAIN = 0.7  # of plain 4-bit rounding's divergence, that `mixed` may have at no more bytes
MADE = ("Describe the image.", "What is on the table?", "Which colours are there?")


def held_out(pictures: int, seed: int) -> list[Question]:
    """The questions of ``training.evaluate`` with their answers."""
    from training.data import fixed_items
    from training.world import Options

    items = fixed_items(Options(), pictures, seed, held_out=True)
    return [Question(scene.image, each.question, each.answer) for scene, questions in items for each in questions]


def made(pictures: int) -> list[Question]:
    """Soft pictures of no meaning, each with every question of MADE."""
    photos = [bench.made_photo(640, 480, seed=number) for number in range(pictures)]
    return [Question(photo, question) for photo in photos for question in MADE]


def bars(results: dict[str, quality.Quality]) -> list[tuple[str, bool]]:
    """Every bar as a sentence with its figures, and whether it is met."""
    plain, mixed = results["plain"], results["mixed"]
    found = []
    for name, most in LOST.items():
        each = results[name]
        if each.accuracy is not None and each.reference_accuracy is not None:
            lost = each.reference_accuracy - each.accuracy
            found.append((f"{name} loses {100 * lost:.2f} points of accuracy, at most {100 * most:.1f}", lost <= most))
    found.append(
        (f"mixed takes {mixed.bytes:,} bytes, plain 4-bit rounding {plain.bytes:,}", mixed.bytes <= plain.bytes)
    )
    ratio = mixed.kl / plain.kl
    found.append(
        (
            f"mixed has {ratio:.2f} of its KL divergence ({mixed.kl:.2e} of {plain.kl:.2e}), at most {LEAST_GAIN}",
            ratio <= LEAST_GAIN,
        )
    )
    return found


def chart(qualities: Sequence[Quality]) -> str:
    """KL divergence against size, a point per recipe with how often it is right, in SVG; the first is what they are
    held to."""
    own, *others = qualities
    unit, factor = ("GB", 1e9) if own.bytes >= 1e9 else ("MB", 1e6)
    points = {named(each): (each.bytes / factor, each.kl) for each in others if each.kl > 0}
    y_label = "KL divergence, nats per token"
    return charts.trade(
        f"What quantising costs: {own.name}",
        f"size of the weights, {unit}",
        y_label,
        points,
        (named(own), own.bytes / factor),
    )


def named(model: Quality) -> str:
    """A model's name with how often it is right, where that was asked."""
    return model.name if model.accuracy is None else f"{model.name}: {100 * model.accuracy:.1f} % right"


def main() -> int:
    """Parse, quantise, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="tiny", help="what fastvlm_mlx.load takes, of the trained world")
    parser.add_argument("--random", help="a published size with random weights instead: 0.5b, 1.5b, 7b (or small)")
    parser.add_argument("--layers", type=int, help="with --random: keep only this many decoder layers")
    parser.add_argument("--resolution", type=int, help="with --random: side in pixels that pictures are brought to")
    parser.add_argument("--pictures", type=int, default=200)
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--recipes", nargs="*", default=[*RECIPES, WITH_TOWER.name])
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.svg")
    args = parser.parse_args()
    recipes: dict[str, Recipe] = {**RECIPES, WITH_TOWER.name: WITH_TOWER}

    if args.random:
        opened = open_random(args.random, args.layers)
        if args.resolution:
            config = replace(opened.config, image=replace(opened.config.image, size=args.resolution))
            opened = replace(opened, config=config, resolve=lambda: config)
        questions, calibration = made(args.pictures), made(args.pictures + 2)[len(made(args.pictures)) :]
    else:
        opened = open_model(find(args.model))
        questions, calibration = held_out(args.pictures, args.seed), questions_for(open_model(find(BUILT_IN)), None)
    engine = Engine(opened)
    engine.load_weights()
    reference = quality.reference(engine, questions, opened.name)
    del engine
    results = {opened.name: reference.own}
    for name in args.recipes:
        print(f"{name} ...", file=sys.stderr, flush=True)
        results[name] = quality.compare(pipeline.trial(opened, recipes[name], calibration), reference, questions, name)
    ordered = list(results.values())
    print(report.table(ordered))
    verdicts = bars(results) if {"plain", "mixed", *LOST} <= results.keys() else []
    for sentence, met in verdicts:
        print(f"{'met' if met else 'MISSED'}: {sentence}")
    if args.out:
        about = {
            "machine": asdict(machine()), "model": opened.name, "pictures": args.pictures, "seed": args.seed,
            "bars": [{"bar": sentence, "met": met} for sentence, met in verdicts],
        }  # fmt: skip
        args.out.with_name(f"{args.out.name}.json").write_text(report.to_json(ordered, **about), encoding="utf-8")
        args.out.with_name(f"{args.out.name}.svg").write_text(chart(ordered), encoding="utf-8")
    return 0 if all(met for _, met in verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
