"""Whole processes from start to end, ours and mlx-vlm's in turn: imports, `--help`, and an answer of `tiny`.

    python -m benchmarks.startup --python-mlx-vlm PYTHON

PYTHON has mlx-vlm installed. Ratios are of medians; CPU seconds are the process's own, which other work on the machine
disturbs less than the clock. The exit code is 1 where a bar is missed.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIBRARIES = "import mlx.core, mlx.nn, numpy"


@dataclass(frozen=True)
class Bar:
    """What is compared, and how many times as fast ours has to be."""

    ours: str
    theirs: str
    least: float


BARS = (
    Bar("import", "libraries", 1 / 1.3),
    Bar("generate --help", "mlx-vlm's generate --help", 7),
    Bar("generate --model tiny", "mlx-vlm's generate --help", 3.5),
)


def processes(python_mlx_vlm: str) -> dict[str, list[str]]:
    """The command lines by name."""
    tiny = ["generate", "--model", "tiny", "--image", str(ROOT / "examples" / "shapes.png")]
    ours = [str(Path(sys.executable).with_name("fastvlm-mlx"))]
    return {
        "libraries": [sys.executable, "-c", LIBRARIES],
        "import": [sys.executable, "-c", "import fastvlm_mlx"],
        "import, and the libraries": [sys.executable, "-c", f"import fastvlm_mlx; {LIBRARIES}"],
        "generate --help": [*ours, "generate", "--help"],
        "generate --model tiny": [*ours, *tiny],
        "mlx-vlm's generate --help": [python_mlx_vlm, "-m", "mlx_vlm", "generate", "--help"],
    }


def measure(command: list[str]) -> tuple[float, float]:
    """Seconds on the clock and on the CPU, children included."""
    before, started = os.times(), time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return time.perf_counter() - started, used


def main() -> int:
    """Measure in turn, print a table and how each bar is met; 1 where one is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python-mlx-vlm", required=True, help="a Python that has mlx-vlm installed")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    commands = processes(options.python_mlx_vlm)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for number in range(options.rounds + 1):
        for name, command in commands.items():
            taken = measure(command)
            if number:  # the first reads the disk
                times[name].append(taken)
    medians = {name: [statistics.median(each) for each in zip(*taken, strict=True)] for name, taken in times.items()}
    print("| process | seconds | CPU seconds |\n|---|---:|---:|")
    for name, (clock, cpu) in medians.items():
        print(f"| {name} | {clock:.2f} | {cpu:.2f} |")
    print()
    missed = False
    for bar in BARS:
        (ours, ours_cpu), (theirs, theirs_cpu) = medians[bar.ours], medians[bar.theirs]
        met = theirs / ours >= bar.least
        words = (
            f"{bar.ours}: {theirs / ours:.2f} times as fast as {bar.theirs} (CPU seconds: {theirs_cpu / ours_cpu:.2f})"
        )
        print(f"{words}, at least {bar.least:.2f}: {'met' if met else 'MISSED'}")
        missed |= not met
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
