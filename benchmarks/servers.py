"""Servers in processes of their own, ours and mlx-vlm's, a client that times what comes of them, and our engine without
one.

python -m benchmarks.servers FOLDER      (started by `benchmarks.serve`: the engine without a server, told what to do by
lines)
"""

import asyncio
import base64
import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).parents[1]
OPENBLAS = "libopenblas.so.0"
HINDRANCES = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")  # settings that slow OpenBLAS down
LOADING_SECONDS = 600.0
clock = time.perf_counter


@dataclass
class Timed:
    """One streamed answer as its client saw it: seconds to the first text, between the first and the last, and pieces
    of text.
    """

    first_seconds: float
    decode_seconds: float
    pieces: int
    text: str
    cached_tokens: int
    prompt_tokens: int
    completion_tokens: int
    timings: dict[str, float]

    @property
    def rate(self) -> float:
        """Pieces of text a second, after the first."""
        return (self.pieces - 1) / max(self.decode_seconds, 1e-9)


class Server:
    """A server's process. `name` is "ours" or "mlx-vlm"; `ready_seconds` is from its start to its first answer to
    /health.
    """

    def __init__(self, name: str, command: list[str], port: int, model: str, log: Path, *, preload: bool):
        self.name, self.model, self.log = name, model, log
        self.url = f"http://127.0.0.1:{port}"
        environment = {key: value for key, value in os.environ.items() if key not in HINDRANCES}
        if preload:
            environment["LD_PRELOAD"] = OPENBLAS
        started = clock()
        self.process = subprocess.Popen(
            command, stdout=log.open("w"), stderr=subprocess.STDOUT, env=environment, cwd=log.parent
        )
        self.ready_seconds = self._wait(started)

    def _wait(self, started: float) -> float:
        while clock() - started < LOADING_SECONDS:
            if self.process.poll() is not None:
                break
            try:
                if httpx.get(f"{self.url}/health", timeout=5).status_code == 200:
                    return clock() - started
            except httpx.TransportError:
                pass
            time.sleep(0.02)
        raise SystemExit(f"{self.name} did not begin; the end of what it said:\n{self.log.read_text()[-2000:]}")

    def memory(self) -> int:
        """Resident memory, in bytes; 0 off Linux."""
        try:
            lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        except OSError:
            return 0
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))

    def stop(self) -> None:
        """End it."""
        self.process.terminate()
        self.process.wait()


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


def ours(folder: str, log: Path) -> Server:
    """Our server of a model's folder."""
    port = free_port()
    command = [sys.executable, "-m", "fastvlm_mlx", "serve", "--model", folder, "--port", str(port), "--metrics"]
    return Server("ours", command, port, "", log, preload=False)


def theirs(python: str, folder: str, log: Path) -> Server:
    """mlx-vlm's server, its settings as they are but for the address."""
    port = free_port()
    command = [python, "-m", "mlx_vlm.server", "--model", folder, "--host", "127.0.0.1", "--port", str(port)]
    return Server("mlx-vlm", command, port, folder, log, preload=sys.platform == "linux")


def message(text: str, *pictures: bytes) -> dict[str, Any]:
    """A user's message that shows pictures (PNG) and asks."""
    parts: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64.b64encode(picture).decode()}"}}
        for picture in pictures
    ]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


async def ask(client: httpx.AsyncClient, server: Server, messages: list[dict[str, Any]], tokens: int) -> Timed:
    """One streamed answer."""
    body: dict[str, Any] = {"messages": messages, "max_tokens": tokens, "temperature": 0, "stream": True}
    body |= {"stream_options": {"include_usage": True}} | ({"model": server.model} if server.model else {})
    data = json.dumps(body).encode()
    times: list[float] = []
    text = ""
    usage: dict[str, Any] = {}
    timings: dict[str, float] = {}
    started = clock()
    headers = {"Content-Type": "application/json"}
    async with client.stream("POST", f"{server.url}/v1/chat/completions", content=data, headers=headers) as response:
        if response.status_code != 200:
            raise SystemExit(f"{server.name}: {response.status_code} {(await response.aread())[:500]!r}")
        async for line in response.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line[6:])
            usage = event.get("usage") or usage
            timings = event.get("timings") or timings
            for choice in event.get("choices") or []:
                if piece := (choice.get("delta") or {}).get("content"):
                    times.append(clock())
                    text += piece
    if not times:
        raise SystemExit(f"{server.name} answered nothing; the end of what it said:\n{server.log.read_text()[-2000:]}")
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    prompt = usage.get("prompt_tokens") or usage.get("input_tokens") or 0  # as mlx-vlm calls them
    completion = usage.get("completion_tokens") or usage.get("output_tokens") or 0
    first, last = times[0], times[-1]
    return Timed(first - started, last - first, len(times), text, int(cached), int(prompt), int(completion), timings)


async def health(client: httpx.AsyncClient, server: Server, over: asyncio.Event) -> list[float]:
    """Seconds that /health took, asked again and again until something is over."""
    found = []
    while not over.is_set():
        started = clock()
        await client.get(f"{server.url}/health")
        found.append(clock() - started)
        await asyncio.sleep(0.02)
    return found


class Engine:
    """Our engine in a process without a server, for what HTTP adds: `ask` sends a command and waits for its figures."""

    def __init__(self, folder: str, log: Path):
        environment = {key: value for key, value in os.environ.items() if key not in HINDRANCES}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.servers", folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("w"),
            text=True,
            env=environment,
            cwd=ROOT,
        )

    def ask(self, **command: Any) -> dict[str, Any]:
        """The figures that a command gives."""
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps(command), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("the engine without a server has ended")
        return dict(json.loads(line))

    def stop(self) -> None:
        """End it."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def _serve_lines(folder: str) -> None:
    """The other side of `Engine`: "prefill" some positions behind others, "decode" an answer, or tell the "machine"."""
    from fastvlm_mlx.decoding.engine import Engine as Loaded
    from fastvlm_mlx.decoding.request import Options
    from fastvlm_mlx.decoding.scheduler import Scheduler
    from fastvlm_mlx.diagnostics.machine import machine

    import mlx.core as mx  # isort: skip  # after the package, so that OpenBLAS is in place

    engine = Loaded.open(folder)
    engine.load_weights()
    model = engine.model
    with Scheduler(engine) as scheduler:
        for line in sys.stdin:
            command = json.loads(line)
            if command["do"] == "machine":
                found: dict[str, Any] = asdict(machine())
            elif command["do"] == "decode":
                request = engine.prepare(None, command["text"])
                answer = scheduler.submit(request, Options(command["tokens"])).result()
                found = {"rate": answer.stats.decode_tokens_per_second}
            else:
                cache = model.text.make_cache()
                held, new = [1] * command["held"], [2] * command["new"]
                mx.eval(model.prefill(model.embed([held], {}), cache))
                started = clock()
                mx.eval(mx.argmax(model.prefill(model.embed([new], {}), cache)))
                found = {"seconds": clock() - started}
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    _serve_lines(sys.argv[1])
