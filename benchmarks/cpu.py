"""What a CPU makes of each way to compute a model: float32, bfloat16, 8 and 4 bits, each in a process of its own, in
turn.

    env -u OPENBLAS_CORETYPE -u OPENBLAS_L2_SIZE python -m benchmarks.cpu --random 0.5b --resolution 512 --rounds 5

Of each way: loading, encoding a picture (for the first time and again), a prefill of 281 positions, a token of one
answer and of eight rows together, in seconds on the clock and of the processor; and the memory in use at the end beside
the bytes of the weights as a folder holds them. With torch (`--python-torch`), `benchmarks.compare` holds the same
against other runtimes.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

WAYS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "8 bits": {"bits": 8},
    "4 bits": {"bits": 4},
}
POSITIONS = 281
ROWS = 8
TOKENS = 16


def resident_bytes() -> int:
    """Memory in use by this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def serve(size: str, resolution: int, way: dict[str, Any]) -> None:
    """Load a model, then measure once for every line of stdin."""
    import fastvlm_mlx  # noqa: F401  # first, so that OpenBLAS is in place

    import mlx.core as mx  # isort: skip

    from fastvlm_mlx.decoding.engine import Engine
    from fastvlm_mlx.diagnostics.random_model import open_random
    from fastvlm_mlx.network.kv_cache import KVCache
    from fastvlm_mlx.network.memory import weight_bytes

    started = time.perf_counter()
    engine = Engine(open_random(size))
    engine.load_weights(**way)
    model = engine.model
    figures: dict[str, float] = {"load_seconds": time.perf_counter() - started}
    width = engine.config.text.hidden_size
    prompt = (0.02 * mx.random.normal((1, POSITIONS, width))).astype(model.dtype)
    pixels = mx.random.randint(0, 256, (1, resolution, resolution, 3)).astype(mx.uint8)
    mx.eval(prompt, pixels)

    def timed(name: str, work: Callable[[], Any], count: int = 1) -> Any:
        clock, processor = time.perf_counter(), time.process_time()
        result = [work() for _ in range(count)][-1]
        figures[name] = (time.perf_counter() - clock) / count
        figures[f"{name}_cpu"] = (time.process_time() - processor) / count
        return result

    def encode() -> None:
        mx.eval(model.encode(pixels))

    timed("first_picture", encode)
    for _ in sys.stdin:
        timed("picture", encode)
        cache = model.text.make_cache()

        def prefill(cache: list[KVCache] = cache) -> None:
            mx.eval(model.prefill(prompt, cache), [layer.state for layer in cache])

        timed("prefill", prefill)
        for name, rows in (("token", 1), ("rows", ROWS)):
            caches = [KVCache() for _ in cache]
            for layer, held in zip(caches, cache, strict=True):
                layer.update(*(mx.repeat(part, rows, axis=0) for part in held.held))

            def step(caches: list[KVCache] = caches, rows: int = rows) -> None:
                mx.eval(model.step(mx.array([7] * rows), caches))

            step()
            timed(name, step, TOKENS)
        figures["resident_bytes"] = resident_bytes()
        figures["folder_bytes"] = sum(weight_bytes(engine.config).values())
        print(json.dumps(figures), flush=True)


def main() -> None:
    """Start one process for each way, let them take turns, and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--random", default="0.5b", help="size of a model of random weights")
    parser.add_argument("--resolution", type=int, default=512, help="pixels")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.random, options.resolution, WAYS[options.serve])
        return
    command = [
        sys.executable,
        "-m",
        "benchmarks.cpu",
        "--random",
        options.random,
        "--resolution",
        str(options.resolution),
    ]
    processes = {
        way: subprocess.Popen([*command, "--serve", way], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for way in options.ways
    }
    rounds: dict[str, list[dict[str, float]]] = {way: [] for way in options.ways}
    for _ in range(options.rounds + 1):
        for way, process in processes.items():
            assert process.stdin is not None and process.stdout is not None
            print("again", file=process.stdin, flush=True)
            rounds[way].append(json.loads(process.stdout.readline()))
    for process in processes.values():
        process.communicate()
    medians = {
        way: {name: statistics.median(each[name] for each in taken[1:]) for name in taken[0]}
        for way, taken in rounds.items()
    }
    if options.json:
        print(json.dumps(medians, indent=2))
        return
    from fastvlm_mlx.diagnostics.machine import machine

    print(machine().describe(), f"\n\nrandom {options.random} at {options.resolution} pixels\n")
    print(
        "| | load, s | first picture, s | picture, s (CPU) | prefill, s (CPU) | tokens/s (CPU s a token) | "
        f"tokens/s of {ROWS} rows | in use, GB | of the folder |\n|---|---|---|---|---|---|---|---|---|"
    )
    for way, found in medians.items():
        print(
            f"| {way} | {found['load_seconds']:.1f} | {found['first_picture']:.2f} | "
            f"{found['picture']:.2f} ({found['picture_cpu']:.2f}) | "
            f"{found['prefill']:.2f} ({found['prefill_cpu']:.2f}) | "
            f"{1 / found['token']:.1f} ({found['token_cpu']:.3f}) | {ROWS / found['rows']:.1f} | "
            f"{found['resident_bytes'] / 1e9:.2f} | {found['resident_bytes'] / found['folder_bytes']:.2f} |"
        )


if __name__ == "__main__":
    main()
