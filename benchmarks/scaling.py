"""What a picture costs as it gets larger, and what more of them cost: time and memory, plotted, beside the work to be
done.

    python -m benchmarks.scaling --random 0.5b                                  # 256 to 2048 pixels, 1 to 8 pictures
    python -m benchmarks.scaling --random small --resolution 64 --resolution 128 --images 1 --images 2    # seconds

The tower's work is counted from the config: convolutions and layers grow with the number of pixels, attention's two
products with its square. Where the measured time grows faster than that work, the table shows it: its last column is
the time per multiply-accumulate, against the smallest size. Memory is the peak of MLX's allocator, weights included;
the process itself keeps what it has once had.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastvlm_mlx.config import ATTENTION_STAGES, VisionConfig
from fastvlm_mlx.decoding.engine import Engine
from fastvlm_mlx.diagnostics import bench  # before mlx, so that OpenBLAS is in place
from fastvlm_mlx.diagnostics.machine import Machine, machine
from fastvlm_mlx.diagnostics.random_model import open_random
from fastvlm_mlx.network.vision import SE_RATIO

import mlx.core as mx  # isort: skip

from benchmarks import charts

RESOLUTIONS = (256, 512, 768, 1024, 1536, 2048)
IMAGES = (1, 2, 4, 8)
RESULTS = Path(__file__).parent / "results"


def tower_work(config: VisionConfig, side: int) -> tuple[int, int]:
    """Multiply-accumulates of one picture of side x side pixels: (all but attention's products, those alone)."""
    first = config.widths[0]
    grid = -(-side // 2)
    linear = grid**2 * first * 27
    grid = -(-grid // 2)
    linear += grid**2 * (9 * first + first**2)
    attention = 0
    for stage, (depth, width) in enumerate(zip(config.depths, config.widths, strict=True)):
        if stage:
            grid = -(-grid // 2)
            linear += grid**2 * (49 * width + width**2)
        tokens, ffn = grid**2, 49 * width + 2 * config.mlp_ratio * width**2
        if stage in ATTENTION_STAGES:
            linear += tokens * (49 * width + depth * (ffn + 4 * width**2))
            attention += depth * 2 * tokens**2 * width
        else:
            linear += tokens * depth * (9 * width + ffn)
    wide = config.out_width
    return linear + grid**2 * 9 * wide + 2 * wide * wide // SE_RATIO, attention


def measure(
    engine: Engine, resolutions: Sequence[int], counts: Sequence[int], side: int, rounds: int, tokens: int
) -> dict[str, Any]:
    """Results by resolution with one picture, and by number of pictures at `side` pixels."""
    photos = [bench.made_photo(seed=number) for number in range(max(counts))]  # no two alike: a picture is encoded once
    sizes: list[dict[str, Any]] = []
    several: list[dict[str, Any]] = []
    for resolution, images, into in [
        *((size, 1, sizes) for size in resolutions),
        *((side, count, several) for count in counts),
    ]:
        mx.clear_cache()
        result = bench.measure(
            engine, photos[:images], resolution=resolution, rounds=rounds, max_tokens=tokens,
            progress=lambda line: print(line, file=sys.stderr),
        )  # fmt: skip
        into.append(asdict(result))
    return {"resolutions": sizes, "images": several}


def growth(vision: VisionConfig, results: Sequence[dict[str, Any]]) -> list[dict[str, float]]:
    """Per result: the tower's work in GMAC, attention's share of it, and vision time per MAC against the first
    result's."""
    rows: list[dict[str, float]] = []
    for result in results:
        linear, attention = tower_work(vision, result["resolution"])
        work = (linear + attention) * result["images"]
        row = {
            "gmac": work / 1e9,
            "attention": attention / (linear + attention),
            "seconds_per_mac": result["vision_seconds"] / work,
        }
        row["relative"] = row["seconds_per_mac"] / (rows[0]["seconds_per_mac"] if rows else row["seconds_per_mac"])
        rows.append(row)
    return rows


def markdown(measured: dict[str, Any], vision: VisionConfig, here: Machine) -> str:
    """Two tables and where they were taken."""
    parts = []
    for label, key in (("pixels", "resolutions"), ("pictures", "images")):
        results = measured[key]
        if not results:
            continue
        parts += [
            f"| {label} | image tokens | work, GMAC | attention's share | vision | prefill | first token | peak memory "
            "| time per MAC |",
            "|---:|" + "---:|" * 8,
        ]
        for result, row in zip(results, growth(vision, results), strict=True):
            times = " | ".join(
                bench.seconds(result[name]) for name in ("vision_seconds", "prefill_seconds", "ttft_seconds")
            )
            size = result["resolution" if label == "pixels" else "images"]
            memory = f"{result['mlx_peak_memory_bytes'] / 1e9:.2f} GB"
            parts.append(
                f"| {size} | {result['image_tokens']} | {row['gmac']:.1f} | {row['attention']:.1%} | {times} "
                f"| {memory} | {row['relative']:.2f}x |"
            )
        parts.append("")
    first = (measured["resolutions"] or measured["images"])[0]
    parts += [f"{first['model']}, {first['dtype']}; medians of {first['rounds']} rounds after one to warm up.", ""]
    return "\n".join([*parts, here.describe().replace("\n", "; ") + ".", ""])


def save(measured: dict[str, Any], vision: VisionConfig, here: Machine, out: Path) -> Path:
    """Write the tables, the figures and four plots."""
    out.mkdir(parents=True, exist_ok=True)
    title = f"scaling {here.date[:10]} {here.cpu} {here.backend}"
    name = "-".join("".join(c if c.isalnum() else " " for c in title).lower().split())
    data = {"machine": asdict(here), **measured}
    (out / f"{name}.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    (out / f"{name}.md").write_text(markdown(measured, vision, here), encoding="utf-8")
    for suffix, drawn in plots(measured, here).items():
        (out / f"{name}-{suffix}.svg").write_text(drawn, encoding="utf-8")
    return out / f"{name}.md"


def plots(measured: dict[str, Any], here: Machine) -> dict[str, str]:
    """Time and memory against resolution and against the number of pictures, in SVG, by the end of the file's name."""
    drawn: dict[str, str] = {}
    below = f"{here.cpu}, {here.backend}, {here.date[:10]}"
    for key, axis, label in (("resolutions", "resolution", "pixels along a side"), ("images", "images", "pictures")):
        results = measured[key]
        if not results:
            continue
        names = {"vision": "image encoder", "prefill": "prefill", "ttft": "first token"}
        times = {name: [(r[axis], r[f"{stage}_seconds"]) for r in results] for stage, name in names.items()}
        memory = {"peak memory": [(r[axis], r["mlx_peak_memory_bytes"] / 1e9) for r in results]}
        title = f"{results[0]['model']}: time to the first token"
        drawn[f"{axis}-time"] = charts.curves(title, below, label, "seconds", times)
        title = f"{results[0]['model']}: peak memory"
        drawn[f"{axis}-memory"] = charts.curves(title, below, label, "GB", memory)
    return drawn


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder or a Hub name")
    parser.add_argument("--random", help="instead: random weights of this size, 0.5b, 1.5b, 7b or small")
    parser.add_argument("--layers", type=int, help="with --random: keep this many decoder layers")
    parser.add_argument("--resolution", type=int, action="append", help="pixels; repeat (default 256 to 2048)")
    parser.add_argument("--images", type=int, action="append", help="pictures; repeat (default 1, 2, 4, 8)")
    parser.add_argument("--images-at", type=int, default=512, help="resolution for several pictures (default 512)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=8)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if (options.model is None) == (options.random is None):
        parser.error("give either --model or --random")
    engine = Engine.open(options.model) if options.model else Engine(open_random(options.random, options.layers))
    engine.load_weights()
    resolutions, counts = options.resolution or RESOLUTIONS, options.images or IMAGES
    measured = measure(engine, resolutions, counts, options.images_at, options.rounds, options.max_tokens)
    print(save(measured, engine.config.vision, machine(), options.out).read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
