"""Our server and mlx-vlm's, on the same weights, pictures and questions, in turn: one table, one picture, as JSON too.

    python -m benchmarks.serve --python-mlx-vlm VENV/bin/python --random 0.5b --resolution 512
    python -m benchmarks.serve --memory                     # ours alone: memory after 300 and after 1,000 pictures, on
    `tiny`

In each round both are asked the same, one at a time, and nobody always goes first; the figures are medians over rounds.
A client in a process of its own sees what is timed: from the request to the first text, and the texts of all streams
over the time from the first to the last. What to install: requirements-mlx-vlm.txt. Results go to benchmarks/results/;
the exit code is 1 where a bar is missed.
"""

import argparse
import asyncio
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

from benchmarks import charts, checkpoint
from benchmarks.servers import Engine, Server, Timed, ask, health, message, ours, theirs
from fastvlm_mlx.diagnostics.bench import seconds
from fastvlm_mlx.diagnostics.machine import Machine

HERE = Path(__file__).parent
STREAMS = (1, 4, 8, 16)
QUESTIONS = ("Describe the image.", "Which of the things is nearest to the left edge?", "And which is the largest?")
TIMEOUT = httpx.Timeout(600)

# What is measured of each server, by key and by what the table calls it.
LATENCIES = {
    "new": "a new picture: first text",
    "again": "the same picture and question again",
    "other": "the same picture, a new question",
    "follow_up": "a follow-up question",
    "text": "text only",
}


def main() -> int:
    """Measure and write; 1 where a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="a folder in Apple's layout")
    parser.add_argument("--random", default="0.5b", help="instead: random weights of this size, 0.5b, 1.5b or 7b")
    parser.add_argument("--layers", type=int, help="with --random: keep this many decoder layers")
    parser.add_argument(
        "--python-mlx-vlm", metavar="PYTHON", help="an interpreter that has mlx-vlm (left out: ours alone)"
    )
    parser.add_argument(
        "--prepared", type=Path, help="keep the folders made from the checkpoint here, for the next run"
    )
    parser.add_argument("--resolution", type=int, default=512, help="pixels (default 512)")
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", action="store_true", help="memory after 300 and 1,000 pictures instead, on `tiny`")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="serve-"))
    try:
        if options.memory:
            return _memory(work)
        result = asyncio.run(_compare(options, work))
    finally:
        shutil.rmtree(work, ignore_errors=True)
    path = save(result, options.out)
    print(path.read_text(encoding="utf-8"))
    return int(any(bar["met"] is False for bar in result["bars"]))


async def _compare(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    cut = f", {options.layers} decoder layers" if options.layers else ""
    name = str(options.checkpoint.resolve()) if options.checkpoint else f"random weights of {options.random}{cut}"

    def source() -> Path:
        if options.checkpoint:
            return Path(options.checkpoint)
        return checkpoint.make_talkative(checkpoint.write_random(work / "random", options.random, options.layers))

    folders = checkpoint.prepare(name, source, options.prepared or work / "prepared", options.resolution, "float32")
    servers = [ours(str(folders["ours"]), work / "ours.log")]
    engine = Engine(str(folders["ours"]), work / "engine.log")
    try:
        if options.python_mlx_vlm:
            servers.append(theirs(options.python_mlx_vlm, str(folders["mlx-vlm"]), work / "mlx-vlm.log"))
        rounds: dict[str, list[dict[str, Any]]] = {server.name: [] for server in servers}
        pictures = _pictures(options.resolution)
        for number in range(-1, options.rounds):
            picture = next(pictures)
            turn = number % len(servers)
            for server in servers[turn:] + servers[:turn]:  # nobody always goes first
                figures = await _round(server, picture, options.max_tokens)
                if server.name == "ours":
                    figures |= _direct(engine, figures, options.max_tokens)
                print(f"round {number + 1}: {server.name}, a new picture {figures['new']:.2f} s", file=sys.stderr)
                if number >= 0:
                    rounds[server.name].append(figures)
        described = engine.ask(do="machine")
    finally:
        engine.stop()
        for server in servers:
            server.stop()
    medians = {
        name: {key: statistics.median(each[key] for each in found) for key in found[0]}
        for name, found in rounds.items()
    }
    for server in servers:
        medians[server.name]["ready"] = server.ready_seconds
    settings = {"weights": Path(name).name if options.checkpoint else name, "resolution": options.resolution}
    settings |= {"generated_tokens": options.max_tokens, "rounds": options.rounds}
    return {
        "machine": described,
        "settings": settings,
        "medians": medians,
        "bars": _bars(medians),
        "rounds": rounds,
    }


def _pictures(size: int) -> Iterator[bytes]:
    """PNG pictures of noise on a ramp, each another one, of the tower's own size."""
    for seed in range(1 << 30):
        rng = np.random.default_rng(seed)
        ramp = np.linspace(0, 200, size)[:, None, None] + rng.integers(0, 50, (size, size, 3))
        file = BytesIO()
        Image.fromarray(ramp.astype(np.uint8)).save(file, "PNG", compress_level=1)
        yield file.getvalue()


async def _round(server: Server, picture: bytes, tokens: int) -> dict[str, float]:
    """Everything that one server is asked about a picture that it has not seen."""
    async with httpx.AsyncClient(timeout=TIMEOUT) as client:
        first = message(QUESTIONS[0], picture)
        new = await ask(client, server, [first], tokens)
        again = await ask(client, server, [first], tokens)
        other = await ask(client, server, [message(QUESTIONS[1], picture)], tokens)
        said = [first, {"role": "assistant", "content": new.text}, message(QUESTIONS[2])]
        follow_up = await ask(client, server, said, tokens)
        text = await ask(client, server, [message(f"{time.time()}: what can you do?")], tokens)
        answers = {"new": new, "again": again, "other": other, "follow_up": follow_up, "text": text}
        found: dict[str, float] = {key: answer.first_seconds for key, answer in answers.items()}
        found |= {f"{key}_cached": answer.cached_tokens for key, answer in answers.items()}
        found |= {f"{key}_prompt": answer.prompt_tokens for key, answer in answers.items()}
        found["text_rate"] = text.rate
        if server.name == "ours":
            found["http"] = statistics.median(map(_added, answers.values()))
        for count in STREAMS:
            over = asyncio.Event()
            watch = asyncio.create_task(health(client, server, over))
            started = time.perf_counter()
            questions = [[message(f"{number} {time.time()}: {QUESTIONS[1]}", picture)] for number in range(count)]
            streams = await asyncio.gather(*(ask(client, server, question, tokens) for question in questions))
            taken = time.perf_counter() - started
            over.set()
            found[f"streams_{count}"] = sum(stream.completion_tokens or stream.pieces for stream in streams) / taken
            found[f"health_{count}"] = float(np.quantile(await watch, 0.99))
        found["memory"] = server.memory()
        return found


def _added(answer: Timed) -> float:
    """Seconds to the first text that the engine did not take: what the server and HTTP add."""
    return answer.first_seconds - answer.timings["engine_ttft_ms"] / 1e3


def _direct(engine: Engine, figures: dict[str, float], tokens: int) -> dict[str, float]:
    """A question without a server: seconds of the prefill of its new positions alone, and tokens/s of decoding."""
    held = int(figures["other_cached"])
    bare = [engine.ask(do="prefill", held=held, new=int(figures["other_prompt"]) - held)["seconds"] for _ in range(3)]
    rate = engine.ask(do="decode", text=f"{time.time()}: what can you do?", tokens=tokens)["rate"]
    return {"bare_prefill": statistics.median(bare), "direct_rate": rate}


def _bars(medians: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    """What was to be reached, what was found, and whether that is enough."""
    mine, other = medians["ours"], medians.get("mlx-vlm")
    bars = [
        (
            "the same picture, a new question, over a bare prefill of its new positions",
            mine["other"] / mine["bare_prefill"],
            1.2,
            "most",
        ),
        ("HTTP adds to the first token, ms", mine["http"] * 1e3, 5.0, "most"),
        ("HTTP adds to decoding, %", (mine["direct_rate"] / mine["text_rate"] - 1) * 100, 3.0, "most"),
        ("/health under 16 streams, p99, ms", mine["health_16"] * 1e3, 10.0, "most"),
    ]
    if other is not None:
        bars += [
            ("a new picture, times as soon as mlx-vlm", other["new"] / mine["new"], 4.0, "least"),
            (
                "the same picture, a new question, times as soon as mlx-vlm",
                other["other"] / mine["other"],
                20.0,
                "least",
            ),
            ("ready, times as soon as mlx-vlm", other["ready"] / mine["ready"], 3.0, "least"),
            ("8 streams, tokens/s over mlx-vlm's", mine["streams_8"] / other["streams_8"], 1.0, "least"),
            ("16 streams, tokens/s over mlx-vlm's", mine["streams_16"] / other["streams_16"], 1.0, "least"),
        ]
    return [
        {
            "bar": bar,
            "found": found,
            "limit": limit,
            "kind": kind,
            "met": found <= limit if kind == "most" else found >= limit,
        }
        for bar, found, limit, kind in bars
    ]


def markdown(result: dict[str, Any]) -> str:
    """The table, the bars, and the lines without which they say nothing."""
    medians, settings = result["medians"], result["settings"]
    names = list(medians)
    lines = [f"| | {' | '.join(names)} |", f"|---|{'---:|' * len(names)}"]
    rows = [("ready", "start: until it answers"), *LATENCIES.items()]
    lines += [f"| {label} | {' | '.join(seconds(medians[name][key]) for name in names)} |" for key, label in rows]
    for count in STREAMS:
        rates = (f"{medians[name][f'streams_{count}']:.1f}" for name in names)
        lines.append(f"| {count} streams about one picture, tokens/s | {' | '.join(rates)} |")
    memory = (f"{medians[name]['memory'] / 1e9:.2f} GB" for name in names)
    lines.append(f"| memory | {' | '.join(memory)} |")
    bars = [
        f"- {bar['bar']}: {bar['found']:.2f}, at {bar['kind']} {bar['limit']:g}: {'met' if bar['met'] else 'MISSED'}"
        for bar in result["bars"]
    ]
    described = (
        f"{settings['weights']}, float32, pictures of {settings['resolution']} pixels, "
        f"{settings['generated_tokens']} tokens "
        f"generated; medians of {settings['rounds']} rounds after 1 to warm up, in turn."
    )
    return "\n".join(
        [*lines, "", *bars, "", described, "", Machine(**result["machine"]).describe().replace("\n", "; ") + ".", ""]
    )


def chart(result: dict[str, Any]) -> str:
    """The seconds to the first text of each, as bars."""
    found, settings = result["machine"], result["settings"]
    stages = [
        (label, {who: figures[key] for who, figures in result["medians"].items()}) for key, label in LATENCIES.items()
    ]
    title = f"Seconds to the first text, {settings['weights']}, {settings['resolution']} pixels"
    return charts.bars(title, f"{found['cpu']}, {found['date'][:10]}", stages)


def save(result: dict[str, Any], out: Path) -> Path:
    """Write NAME.json, NAME.md and NAME.svg; the name says when, on what, and at which size."""
    found, settings = result["machine"], result["settings"]
    words = f"{found['date'][:10]} serve {found['cpu']} {found['backend']} {settings['resolution']}"
    name = "-".join("".join(c if c.isalnum() else " " for c in words).lower().split())
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (out / f"{name}.md").write_text(markdown(result), encoding="utf-8")
    (out / f"{name}.svg").write_text(chart(result), encoding="utf-8")
    return out / f"{name}.md"


def _memory(work: Path) -> int:
    """Resident memory of our server after 300 and after 1,000 different pictures; 1 where it grows by more than a
    twentieth.
    """
    server = ours("tiny", work / "ours.log")
    found = {}

    async def show() -> None:
        async with httpx.AsyncClient(timeout=TIMEOUT) as client:
            for number, picture in enumerate(_pictures(192), start=1):
                await ask(client, server, [message(QUESTIONS[0], picture)], 16)
                if number in (300, 1000):
                    found[number] = server.memory()
                    print(f"after {number} pictures: {found[number] / 1e6:.1f} MB", flush=True)
                if number == 1000:
                    return

    try:
        asyncio.run(show())
    finally:
        server.stop()
    ratio = found[1000] / max(found[300], 1)
    print(f"{ratio:.3f} times, at most 1.05: {'met' if ratio <= 1.05 else 'MISSED'}")
    return int(ratio > 1.05)


if __name__ == "__main__":
    sys.exit(main())
