"""What writing a Core ML package takes: seconds, memory and megabytes of each form, and what rounding costs.

    python -m benchmarks.export --size 0.5b

Random weights of a published size (or --model), at its own resolution. Each form is a process of its own. The exit code
is 1 where a form takes more than 90 seconds or 3 GB, which an idle machine with two cores is asked for. Unset
OPENBLAS_CORETYPE and OPENBLAS_L2_SIZE, where they are set, for the command.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

from .checkpoint import write_random

FORMS = {
    "float32": ["--precision", "float32"],
    "float16": [],
    "8 bits": ["--tower-bits", "8"],
    "6 bits": ["--tower-bits", "6"],
}
MAX_SECONDS, MAX_BYTES = 90.0, 3e9
RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes of what the system counts memory in


def measure(model: str, out: Path, options: list[str]) -> tuple[float, int]:
    """Write a package in a process of its own; returns seconds and peak memory in bytes."""
    command = [sys.executable, "-m", "fastvlm_mlx", "convert", model, "--to", "coreml", "--out", str(out), *options]
    started = time.perf_counter()
    silent = os.open(os.devnull, os.O_WRONLY)
    process = os.posix_spawn(sys.executable, command, os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, silent, 2)])
    _, status, usage = os.wait4(process, 0)
    os.close(silent)
    if status:
        raise SystemExit(f"writing {out.name} failed: run {' '.join(command)}")
    return time.perf_counter() - started, usage.ru_maxrss * RSS_UNIT


def main() -> None:
    """Print a table; exits with 1 where a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="0.5b", help="random weights of this size")
    parser.add_argument("--model", help="a model instead")
    parser.add_argument("--forms", nargs="*", choices=FORMS, default=list(FORMS))
    args = parser.parse_args()
    missed = False
    with tempfile.TemporaryDirectory() as folder:
        model = args.model or str(write_random(Path(folder) / "model", args.size, layers=1))
        print(
            "| form | seconds | peak memory, GB | package, MB | difference | worst cosine |\n|---|---|---|---|---|---|"
        )
        for number, form in enumerate(args.forms):
            out = Path(folder) / f"{number}.mlpackage"
            seconds, peak = measure(model, out, FORMS[form])
            report = json.loads(out.with_suffix(".report.json").read_text(encoding="utf-8"))
            found = report["comparison"] or {"difference": 0.0, "cosine": 1.0}
            print(
                f"| {form} | {seconds:.0f} | {peak / 1e9:.2f} | {report['bytes'] / 1e6:.0f} "
                f"| {found['difference']:.1e} | {found['cosine']:.6f} |",
                flush=True,
            )
            missed |= seconds > MAX_SECONDS or peak > MAX_BYTES
    raise SystemExit(int(missed))


if __name__ == "__main__":
    main()
