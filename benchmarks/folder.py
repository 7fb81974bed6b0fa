"""Folders of pictures: how the time and the memory grow with their number, and how fast others are.

    python -m benchmarks.folder growth --count 100 --count 1000 --count 10000
    env -u OPENBLAS_CORETYPE -u OPENBLAS_L2_SIZE python -m benchmarks.folder speed --random 0.5b --resolution 512 \\
        --pictures 64 --python-mlx-vlm PYTHON --python-torch PYTHON

`growth` runs `fastvlm-mlx batch` with `tiny` over small drawings, each run in a process of its own: seconds for each
picture, the process's peak memory, and what the record of what is done takes in memory and on the disk. `speed` answers
one question about the same pictures with the same random weights, in turn: ours as `vlm.map` does, mlx-vlm's
`batch_generate` and transformers' `generate`, both so many pictures at a time as `--together` says.
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
import tracemalloc
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from benchmarks import charts
from fastvlm_mlx.diagnostics.machine import Machine, machine
from fastvlm_mlx.folder.ledger import Ledger

RESULTS = Path(__file__).parent / "results"
COLOURS = ("red", "green", "blue", "yellow", "orange", "black")
QUESTION = "Describe the image."
MEGABYTE = 1e6


@dataclass(frozen=True)
class Grown:
    """A run over so many pictures: seconds of all, and of each after the first tenth; peak memory of the process."""

    count: int
    seconds: float
    seconds_each: float
    peak_memory_bytes: int
    file_bytes: int


def drawing(number: int, size: int) -> Image.Image:
    """Shapes on white, from a seed."""
    rng = np.random.default_rng(number)
    image = Image.new("RGB", (size, size), "white")
    draw = ImageDraw.Draw(image)
    for _ in range(1 + int(rng.integers(4))):
        x, y, radius = (int(each) for each in rng.integers((10, 10, 6), (size - 10, size - 10, size // 4)))
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=COLOURS[int(rng.integers(len(COLOURS)))])
    return image


def album(folder: Path, count: int, size: int) -> list[Path]:
    """Write so many drawings."""
    folder.mkdir(parents=True)
    paths = [folder / f"{number:07d}.jpg" for number in range(count)]
    for number, path in enumerate(paths):
        drawing(number, size).save(path)
    return paths


def grow(folder: Path, count: int, tokens: int) -> Grown:
    """Run the command over a new album."""
    album(folder, count, 96)
    ledger = folder / "fastvlm-batch.jsonl"
    command = [sys.executable, "-m", "fastvlm_mlx", "batch", str(folder), "-m", "tiny", "--max-tokens", str(tokens)]
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    first: tuple[int, float] | None = None
    while True:
        done, status, usage = os.wait4(process.pid, os.WNOHANG)
        if done:
            break
        time.sleep(0.05)
        if first is None and ledger.exists() and (lines := ledger.read_bytes().count(b"\n")) >= count // 10:
            first = (lines, time.monotonic())
    ended = time.monotonic()
    if os.waitstatus_to_exitcode(status):
        raise SystemExit(f"the run over {count} pictures ended with {os.waitstatus_to_exitcode(status)}")
    lines, since = first or (0, started)
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Grown(count, ended - started, (ended - since) / (count - lines), peak, ledger.stat().st_size)


def record_bytes(folder: Path, count: int) -> float:
    """Bytes of memory for each picture that a file of so many lines tells of."""
    out = folder / "record.jsonl"
    line = {"image": "", "digest": "0" * 64, "prompt": QUESTION, "text": "A red circle.", "recipe": "0" * 16}
    with out.open("w", encoding="utf-8") as file:
        for number in range(count):
            name = f"{number:07d}.jpg"
            file.write(
                json.dumps({**line, "image": f"photos/{name}", "name": name, "modified": 10**18 + number}) + "\n"
            )
    tracemalloc.start()
    ledger = Ledger(out, [], "jsonl", [])
    used = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(ledger.known) == count
    return used / count


def growth(counts: Sequence[int], tokens: int, lines: int) -> dict[str, Any]:
    """Everything that was measured, as it goes into the JSON file."""
    work = Path(tempfile.mkdtemp(prefix="folder-"))
    try:
        each = record_bytes(work, lines)
        grown = []
        for count in counts:
            grown.append(grow(work / str(count), count, tokens))
            print(f"{count} pictures: {grown[-1]}", file=sys.stderr, flush=True)
            shutil.rmtree(work / str(count))
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return {
        "machine": asdict(machine()), "folder_growth": [asdict(one) for one in grown], "tokens": tokens,
        "record_bytes": each, "record_lines": lines,
    }  # fmt: skip


def growth_markdown(result: dict[str, Any]) -> str:
    """The table of a growth, and what follows for a million pictures."""
    grown = [Grown(**each) for each in result["folder_growth"]]
    lines = ["| pictures | seconds | ms a picture | peak memory | file |", "|---:|---:|---:|---:|---:|"]
    lines += [
        f"| {one.count:,} | {one.seconds:.0f} | {1e3 * one.seconds_each:.1f} | "
        f"{one.peak_memory_bytes / MEGABYTE:.0f} MB | {one.file_bytes / MEGABYTE:.2f} MB |"
        for one in grown
    ]
    largest, record = grown[-1], result["record_bytes"]
    lines += [
        "",
        f"`tiny`, drawings of 96 pixels, up to {result['tokens']} tokens each. What is remembered of a picture takes "
        f"{record:.0f} bytes of memory (counted over {result['record_lines']:,} lines) and "
        f"{largest.file_bytes / largest.count:.0f} on the disk: of a million, {record:.0f} and "
        f"{largest.file_bytes / largest.count:.0f} MB.",
        "",
        Machine(**result["machine"]).describe().replace("\n", "; ") + ".",
        "",
    ]
    return "\n".join(lines)


def growth_charts(result: dict[str, Any]) -> dict[str, str]:
    """Time and memory against the number of pictures, in SVG, by the end of the file's name."""
    grown = [Grown(**each) for each in result["folder_growth"]]
    below = f"tiny, drawings of 96 pixels; {result['machine']['cpu']}, {result['machine']['date'][:10]}"
    time_each = [(float(one.count), 1e3 * one.seconds_each) for one in grown]
    memory = [(float(one.count), one.peak_memory_bytes / MEGABYTE) for one in grown]
    return {
        "time": charts.curves("Time a picture", below, "pictures", "milliseconds", {"batch": time_each}),
        "memory": charts.curves("Peak memory of the process", below, "pictures", "MB", {"batch": memory}),
    }


def speed(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Pictures a minute and peak memory of each runtime, in turn."""
    from benchmarks import checkpoint  # which imports MLX
    from benchmarks.compare import Process

    name = f"random weights of {options.random}"
    folders = checkpoint.prepare(
        name,
        lambda: checkpoint.write_random(work / "random", options.random, None),
        options.prepared or work / "prepared",
        options.resolution,
        "float32",
    )
    images = [str(path) for path in album(work / "album", options.pictures, options.resolution)]
    pythons = {"ours": sys.executable, "mlx-vlm": options.python_mlx_vlm, "transformers": options.python_torch}
    processes = [
        Process(who, python, folders[who], who == "mlx-vlm" and sys.platform == "linux", work / f"{who}.log")
        for who, python in pythons.items()
        if python
    ]
    rounds: dict[str, list[dict[str, float]]] = {process.name: [] for process in processes}
    asked = {"prompt": QUESTION, "tokens": options.max_tokens, "together": options.together}
    try:
        for process in processes:
            process.ask("folder", images=images[:2], **asked)  # what is built on first use
        for number in range(options.rounds):
            turn = number % len(processes)
            for process in processes[turn:] + processes[:turn]:
                found = process.ask("folder", images=images, **asked)
                if found["tokens"] != len(images) * options.max_tokens:
                    print(f"{process.name}: {found['tokens']} tokens, fewer than asked for", file=sys.stderr)
                rounds[process.name].append({**found, "per_minute": 60 * len(images) / found["seconds"]})
                print(f"{process.name}: {rounds[process.name][-1]}", file=sys.stderr, flush=True)
    finally:
        for process in processes:
            process.quit()
    return {
        "machine": processes[0].start["machine"],
        "versions": {process.name: process.start["versions"] for process in processes},
        "settings": {
            **asked, "pictures": len(images), "resolution": options.resolution, "weights": name,
            "rounds": options.rounds,
        },
        "folder_rounds": rounds,
    }  # fmt: skip


def speed_markdown(result: dict[str, Any]) -> str:
    """The table of a comparison: medians, and the ratio of rounds that follow each other."""
    rounds, settings = result["folder_rounds"], result["settings"]
    lines = ["| | pictures a minute | ours is faster | peak memory |", "|---|---:|---:|---:|"]
    for name, found in rounds.items():
        ratios = [ours["per_minute"] / theirs["per_minute"] for ours, theirs in zip(rounds["ours"], found, strict=True)]
        rate = statistics.median(each["per_minute"] for each in found)
        peak = max(each["peak_memory_bytes"] for each in found)
        lines.append(f"| {name} | {rate:.1f} | {statistics.median(ratios):.2f}x | {peak / 1e9:.2f} GB |")
    lines += [
        "",
        f"{settings['weights']}, float32, {settings['pictures']} pictures at {settings['resolution']}, "
        f"{settings['tokens']} tokens each; the others {settings['together']} at a time; {settings['rounds']} rounds, "
        "in turn.",
        "",
        Machine(**result["machine"]).describe().replace("\n", "; ") + ".",
        "",
    ]
    return "\n".join(lines)


def save(result: dict[str, Any], kind: str, text: str, out: Path, drawn: dict[str, str]) -> None:
    """Write NAME.json, NAME.md and the charts, and print the table."""
    found = result["machine"]
    words = f"{found['date'][:10]} {found['cpu']} {found['backend']} folder {kind}"
    name = "-".join("".join(c if c.isalnum() else " " for c in words).lower().split())
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (out / f"{name}.md").write_text(text, encoding="utf-8")
    for suffix, svg in drawn.items():
        (out / f"{name}-{suffix}.svg").write_text(svg, encoding="utf-8")
    print(text)


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("growth", "speed"))
    parser.add_argument("--count", type=int, action="append", help="growth: pictures; repeat (default 100 and 1000)")
    parser.add_argument("--lines", type=int, default=100_000, help="growth: of a record whose memory is counted")
    parser.add_argument("--random", default="0.5b", help="speed: random weights of this size")
    parser.add_argument("--prepared", type=Path, help="speed: keep the folders of weights here, for the next run")
    parser.add_argument("--python-mlx-vlm", metavar="PYTHON", help="speed: an interpreter that has mlx-vlm")
    parser.add_argument("--python-torch", metavar="PYTHON", help="speed: one that has transformers, torch and timm")
    parser.add_argument("--resolution", type=int, default=512, help="speed: pixels")
    parser.add_argument("--pictures", type=int, default=64, help="speed: how many")
    parser.add_argument("--together", type=int, default=16, help="speed: pictures at a time, of the others")
    parser.add_argument("--max-tokens", type=int, help="of each answer (default 12 for growth, 32 for speed)")
    parser.add_argument("--rounds", type=int, default=3, help="speed: of each runtime")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    options.max_tokens = options.max_tokens or (12 if options.kind == "growth" else 32)
    if options.kind == "growth":
        result = growth(options.count or [100, 1000], options.max_tokens, options.lines)
        save(result, "growth", growth_markdown(result), options.out, growth_charts(result))
        return
    work = Path(tempfile.mkdtemp(prefix="folder-"))
    try:
        result = speed(options, work)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    save(result, "speed", speed_markdown(result), options.out, {})


if __name__ == "__main__":
    main()
