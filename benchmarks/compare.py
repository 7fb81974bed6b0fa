"""Ours, mlx-vlm and transformers on the same weights, picture and prompt: one table, one picture, as JSON too.

    python -m benchmarks.compare --python-mlx-vlm VENV1/bin/python --python-torch VENV2/bin/python --random 0.5b
    python -m benchmarks.compare ... --checkpoint FOLDER --resolution 512 --rounds 5

Each runs in a process of its own, one at a time and in turn, round after round; the figures are medians over rounds,
after a warm-up. Nothing is timed before all three have given the same image features. What to install:
requirements-mlx-vlm.txt and requirements-transformers.txt beside this file, each in an environment of its own. Results
go to benchmarks/results/.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import charts, checkpoint
from fastvlm_mlx.diagnostics import bench
from fastvlm_mlx.diagnostics.machine import Machine

HERE = Path(__file__).parent
OPENBLAS = "libopenblas.so.0"
TOLERANCE = (
    1e-3  # of the largest feature: three orders of summation in float32 differ by 1e-5 or so, a wrong weight by 1e-1
)
TOLERANCE_NARROW = 5e-2  # the same in bfloat16 or float16
PHOTO = "photo.jpg"

STAGES = (
    ("preprocess_seconds", "preprocess"),
    ("vision_seconds", "vision"),
    ("prefill_seconds", "prefill"),
    ("ttft_seconds", "first token"),
)
OTHERS = (
    ("decode_tokens_per_second", "decode, tokens/s"),
    ("peak_memory_bytes", "peak memory"),
    ("start_seconds", "start: import and load"),
    ("photo_seconds", "12-megapixel JPEG"),
    ("photo_memory_bytes", "its extra memory"),
)


class Process:
    """A runner (`benchmarks.runner`) and the lines exchanged with it."""

    def __init__(self, name: str, python: str, folder: Path, preload: bool, log: Path):
        self.name = name
        environment = {**os.environ, "PYTHONPATH": str(HERE.parent), "STARTED": str(time.time())}
        if preload:
            environment["LD_PRELOAD"] = OPENBLAS
        self.log = log
        self.pipe = subprocess.Popen(
            [python, "-m", "benchmarks.runner", name, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("w"),
            text=True,
            env=environment,
            cwd=HERE.parent,
        )
        self.start = self.reply()

    def reply(self) -> dict[str, Any]:
        """The next line; ends everything where the process has died."""
        assert self.pipe.stdout is not None
        line = self.pipe.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} stopped; the end of what it said:\n{self.log.read_text()[-2000:]}")
        return dict(json.loads(line))

    def ask(self, command: str, **settings: Any) -> dict[str, Any]:
        """Send a command and wait for what it gives."""
        assert self.pipe.stdin is not None
        print(json.dumps({"command": command, **settings}), file=self.pipe.stdin, flush=True)
        return self.reply()

    def quit(self) -> None:
        """Let it end."""
        self.pipe.communicate(json.dumps({"command": "quit"}))


def compare(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Everything that was measured, as it goes into the JSON file."""
    cut = f", {options.layers} decoder layers" if options.layers else ""
    name = str(options.checkpoint.resolve()) if options.checkpoint else f"random weights of {options.random}{cut}"

    def source() -> Path:
        return options.checkpoint or checkpoint.write_random(work / "random", options.random, options.layers)

    folders = checkpoint.prepare(name, source, options.prepared or work / "prepared", options.resolution, options.dtype)
    picture, photo = work / "picture.png", work / PHOTO
    _picture(picture, options.resolution)
    photo.write_bytes(bench.made_photo())
    pythons = {"ours": sys.executable, "mlx-vlm": options.python_mlx_vlm, "transformers": options.python_torch}
    if options.channels_last:
        pythons["transformers, channels_last"] = options.python_torch
    processes = [
        Process(
            name,
            python,
            folders[name.partition(",")[0]],
            name == "mlx-vlm" and sys.platform == "linux",
            work / f"{name}.log",
        )
        for name, python in pythons.items()
        if python
    ]
    say = lambda text: print(text, file=sys.stderr)  # noqa: E731
    try:
        difference = _check_features(processes, work, picture, options.dtype)
        say("features agree: " + ", ".join(f"{name} {value:.1e}" for name, value in difference.items()))
        rounds: dict[str, list[dict[str, float]]] = {process.name: [] for process in processes}
        for number in range(-options.warmup, options.rounds):
            turn = number % len(processes)
            for process in processes[turn:] + processes[:turn]:  # nobody always goes first
                figures = process.ask("run", image=str(picture), prompt=options.prompt, tokens=options.max_tokens)
                turn_name = "warm-up" if number < 0 else f"round {number + 1}"
                say(f"{turn_name}: {process.name} {figures['ttft_seconds']:.2f} s")
                if number >= 0:
                    rounds[process.name].append(figures)
        photos = {process.name: process.ask("photo", image=str(photo)) for process in processes}
    finally:
        for process in processes:
            process.quit()
    counts = {name: taken[0]["prompt_tokens"] for name, taken in rounds.items()}
    if len(set(counts.values())) > 1:
        raise SystemExit(f"the prompts differ in length: {counts}")
    medians = {
        process.name: {
            **{
                key: statistics.median(figures[key] for figures in rounds[process.name])
                for key in rounds[process.name][0]
            },
            "start_seconds": process.start["start_seconds"],
            **photos[process.name],
        }
        for process in processes
    }
    settings = {
        "weights": Path(name).name if options.checkpoint else name,
        "resolution": options.resolution,
        "dtype": options.dtype,
        "prompt_tokens": int(counts["ours"]),
        "generated_tokens": options.max_tokens,
        "rounds": options.rounds,
        "warmup": options.warmup,
        "preloaded": OPENBLAS if sys.platform == "linux" and options.python_mlx_vlm else "",
    }
    return {
        "machine": processes[0].start["machine"],
        "settings": settings,
        "versions": {process.name: process.start["versions"] for process in processes},
        "features_difference": difference,
        "medians": medians,
        "rounds": rounds,
    }


def _picture(path: Path, size: int) -> None:
    """A square picture of the tower's own size, so that nobody's way of fitting other shapes makes a difference."""
    from io import BytesIO

    from PIL import Image

    with Image.open(BytesIO(bench.made_photo(size, size))) as image:
        image.save(path)


def _check_features(processes: list[Process], work: Path, picture: Path, dtype: str) -> dict[str, float]:
    """Largest difference to ours, relative to the largest feature; ends everything where it is too large."""
    features = {}
    for process in processes:
        out = work / f"{process.name}.npy"
        process.ask("features", image=str(picture), out=str(out))
        features[process.name] = np.load(out)
    ours = features.pop("ours")
    tolerance = TOLERANCE if dtype == "float32" else TOLERANCE_NARROW
    found = {}
    for name, theirs in features.items():
        if theirs.shape != ours.shape:
            raise SystemExit(f"{name} gives features of shape {theirs.shape}, ours are {ours.shape}")
        found[name] = float(np.abs(theirs - ours).max() / np.abs(theirs).max())
        if not found[name] < tolerance:
            raise SystemExit(
                f"{name}'s features differ from ours by {found[name]:.1e} of the largest, more than {tolerance}"
            )
    return found


def markdown(result: dict[str, Any]) -> str:
    """The table, and the lines without which it says nothing."""
    medians, settings = result["medians"], result["settings"]
    names = list(medians)
    lines = [f"| | {' | '.join(names)} |", f"|---|{'---:|' * len(names)}"]
    for key, label in (*STAGES, *OTHERS):
        lines.append(f"| {label} | {' | '.join(_cell(key, medians, name) for name in names)} |")
    machine = Machine(**result["machine"])
    versions = "; ".join(
        f"{name}: {', '.join(f'{library} {number}' for library, number in found.items())}"
        for name, found in result["versions"].items()
    )
    agreement = ", ".join(f"{name} {value:.0e}" for name, value in result["features_difference"].items())
    described = (
        f"{settings['weights']}, {settings['dtype']}, one {settings['resolution']}x{settings['resolution']} picture, "
        f"{settings['prompt_tokens']} prompt tokens, {settings['generated_tokens']} generated; medians of "
        f"{settings['rounds']} rounds after {settings['warmup']} to warm up, in turn. "
        "In brackets: how many times ours. "
        f"Image features differ from ours by (of the largest): {agreement}."
    )
    if settings["preloaded"]:
        described += f" mlx-vlm was given {settings['preloaded']}, which it does not load by itself."
    return "\n".join([*lines, "", described, "", machine.describe().replace("\n", "; ") + ".", "", f"{versions}.", ""])


def _cell(key: str, medians: dict[str, dict[str, float]], name: str) -> str:
    """A figure and, beside the others', how many times ours."""
    value, ours = medians[name].get(key), medians.get("ours", {}).get(key)
    if value is None:
        return "-"
    text = (
        f"{value / 1e9:.2f} GB"
        if key.endswith("bytes")
        else bench.seconds(value)
        if key.endswith("seconds")
        else f"{value:.1f}"
    )
    return text if name == "ours" or not ours else f"{text} ({value / ours:.1f}x)"


def save(result: dict[str, Any], out: Path) -> Path:
    """Write NAME.json, NAME.md and NAME.svg; the name says when, on what, and at which size."""
    machine, settings = result["machine"], result["settings"]
    words = f"{machine['date'][:10]} {machine['cpu']} {machine['backend']} {settings['dtype']} {settings['resolution']}"
    name = "-".join("".join(c if c.isalnum() else " " for c in words).lower().split())
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (out / f"{name}.md").write_text(markdown(result), encoding="utf-8")
    (out / f"{name}.svg").write_text(chart(result), encoding="utf-8")
    return out / f"{name}.md"


def chart(result: dict[str, Any]) -> str:
    """The stages of each runtime as bars, in SVG."""
    machine, settings = result["machine"], result["settings"]
    stages = [(label, {who: figures[key] for who, figures in result["medians"].items()}) for key, label in STAGES]
    title = f"One {settings['resolution']}x{settings['resolution']} picture, {settings['weights']}, {settings['dtype']}"
    return charts.bars(title, f"{machine['cpu']}, {machine['date'][:10]}", stages)


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="a folder in Apple's layout")
    parser.add_argument("--random", help="instead: random weights of this size, 0.5b, 1.5b or 7b")
    parser.add_argument("--layers", type=int, help="with --random: keep this many decoder layers")
    parser.add_argument(
        "--prepared", type=Path, help="keep the three folders made from the checkpoint here, for the next run"
    )
    parser.add_argument(
        "--python-mlx-vlm", metavar="PYTHON", help="an interpreter that has mlx-vlm (left out: not compared)"
    )
    parser.add_argument("--python-torch", metavar="PYTHON", help="an interpreter that has transformers, torch and timm")
    parser.add_argument(
        "--channels-last", action="store_true", help="torch also in its other memory layout, in a column of its own"
    )
    parser.add_argument("--resolution", type=int, default=1024, help="pixels (default 1024)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--prompt", default="Describe the image.")
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--out", type=Path, default=HERE / "results")
    options = parser.parse_args()
    if (options.checkpoint is None) == (options.random is None):
        parser.error("give either --checkpoint or --random")
    work = Path(tempfile.mkdtemp(prefix="compare-"))
    try:
        result = compare(options, work)
        table = save(result, options.out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(table.read_text(encoding="utf-8"))
    print(f"written: {table} (and .json, .svg)", file=sys.stderr)


if __name__ == "__main__":
    main()
