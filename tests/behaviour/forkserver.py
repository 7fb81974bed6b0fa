"""A process that has everything imported and runs the command line in a forked child per request, measured and
time-limited.

A child goes through the real `fastvlm_mlx.cli.main` with the real file descriptors, and costs some milliseconds instead
of the seconds that a new interpreter takes. Requests and results are lines of JSON.
"""

import base64
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CPU_SECONDS = 5.0  # of all cores together, which a busy machine does not stretch
MEMORY = 1_000_000_000  # bytes beyond what the server holds already
PATIENCE = 60.0  # seconds after which a command that hangs is ended


@dataclass(frozen=True)
class Result:
    """How a command ended. `code` is negative for a signal, `memory` the growth in bytes, `seconds` those on the
    clock."""

    args: list[str]
    code: int
    out: bytes
    err: str
    seconds: float
    cpu_seconds: float
    memory: int

    def refused(self, *says: str, code: int = 1, after: tuple[str, ...] = ()) -> None:
        """Assert that the command was turned down as promised: one sentence that names the thing, and nothing else.

        `after` are the beginnings of lines that stderr had before.
        """
        cost = f"{self.cpu_seconds:.1f} s {self.memory >> 20} MB"
        shown = f"{self.args}\n{self.code} {cost}\nout {self.out[:300]!r}\nerr {self.err}"
        assert self.code == code, shown
        assert self.out == b"", shown
        *before, err = self.err.splitlines()
        assert len(before) == len(after) and all(map(str.startswith, before, after)), shown
        assert err.startswith("fastvlm-mlx: ") and self.err.endswith("\n"), shown
        assert len(err) < 1100 and err.isprintable(), shown
        assert "Traceback" not in self.err and "of its own" not in self.err, shown
        assert any(word in err for word in ADVICE), shown
        for text in says:
            assert text in err, f"{text!r} is not in\n{shown}"
        self.cheap()

    def answered(self, *notes: str) -> None:
        """Assert an answer on stdout, and on stderr nothing but lines with these notes.

        Tests ask for few tokens, so that the note of an answer cut there may come as well.
        """
        shown = f"{self.args}\n{self.code}\nout {self.out[:300]!r}\nerr {self.err}"
        assert self.code == 0 and self.out, shown
        assert len([line for line in self.err.splitlines() if "the answer was cut" not in line]) == len(notes), shown
        for note in notes:
            assert note in self.err, shown
        self.cheap()

    def cheap(self) -> None:
        """Assert that it took little computing and memory."""
        assert self.cpu_seconds < CPU_SECONDS, self
        assert self.memory < MEMORY, self


Run = Callable[..., Result]  # `run(*arguments, stdin=b"", env={}, cwd=folder)` is `fastvlm-mlx ARGUMENTS`

# What to do, in one of the words that say it.
ADVICE = (
    "expected",
    "check",
    "choose",
    "fetch",
    "convert",
    "save",
    "export",
    "give",
    "see '",
    "name ",
    "make ",
    "shorten",
    "remove",
    "unpack",
    "pass ",
    "do the two",
    "try",
    "cut",
    "fewer",
    "rename",
    "write",
    "load it",
)


class ForkServer:
    """Starts the server, which imports `modules` besides what every command needs, and asks it to run commands."""

    def __init__(self, *modules: str) -> None:
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "100"}
        env.pop("FASTVLM_TRACEBACK", None)
        command = [sys.executable, "-m", "tests.behaviour.forkserver", *modules]
        root = Path(__file__).parents[2]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, cwd=root)

    def run(
        self, *args: object, stdin: bytes | None = None, cwd: Path | None = None, env: dict[str, str] | None = None
    ) -> Result:
        """Run `fastvlm-mlx ARGS`; stdin is empty unless given, `env` is set on top of the environment."""
        words = [os.fsdecode(arg) if isinstance(arg, bytes) else str(arg) for arg in args]
        request = {
            "args": words,
            "stdin": base64.b64encode(stdin or b"").decode(),
            "cwd": str(cwd or "/"),
            "env": env or {},
        }
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(request).encode() + b"\n")
        self.process.stdin.flush()
        reply = json.loads(self.process.stdout.readline())
        out, err = (base64.b64decode(reply[name]) for name in ("out", "err"))
        return Result(words, reply["code"], out, err.decode(), reply["seconds"], reply["cpu_seconds"], reply["memory"])

    def stop(self) -> None:
        """End the server."""
        self.process.communicate()


def _serve() -> None:
    """Answer requests until stdin ends."""
    for name in ("fastvlm_mlx.cli.app", "fastvlm_mlx.convert", "fastvlm_mlx.vlm", *sys.argv[1:]):
        importlib.import_module(name)
    importlib.import_module("fastvlm_mlx.cli.app").build()  # every command
    importlib.import_module("PIL.Image").init()
    replies = os.fdopen(os.dup(1), "wb")
    for line in sys.stdin.buffer:
        replies.write(json.dumps(_run(json.loads(line))).encode() + b"\n")
        replies.flush()


def _run(request: dict[str, Any]) -> dict[str, Any]:
    held = _resident()
    with tempfile.TemporaryFile() as stdin, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        stdin.write(base64.b64decode(request["stdin"]))
        stdin.seek(0)
        started = time.monotonic()
        child = os.fork()
        if child == 0:
            _become(request, stdin.fileno(), out.fileno(), err.fileno())
        status, usage = _wait(child, started + PATIENCE)
        seconds = time.monotonic() - started
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(base64.b64encode(file.read(1_000_000)).decode())
    memory = max(0, usage.ru_maxrss * (1024 if sys.platform == "linux" else 1) - held)
    code = os.waitstatus_to_exitcode(status)
    return {
        "code": code, "out": texts[0], "err": texts[1],
        "seconds": seconds, "cpu_seconds": usage.ru_utime + usage.ru_stime, "memory": memory,
    }  # fmt: skip


def _become(request: dict[str, Any], stdin: int, out: int, err: int) -> None:
    """In the child: the command line, as if just started."""
    try:
        for source, target in ((stdin, 0), (out, 1), (err, 2)):
            os.dup2(source, target)
        sys.stdin, sys.stdout = os.fdopen(0, "r"), os.fdopen(1, "w")
        sys.stderr = os.fdopen(2, "w", errors="backslashreplace", buffering=1)
        os.chdir(request["cwd"])
        os.environ.update(request["env"])
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.argv = ["fastvlm-mlx", *request["args"]]
        from fastvlm_mlx.cli import main

        main()  # which ends the process
    except BaseException:
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
    os._exit(99)


def _wait(child: int, deadline: float) -> tuple[int, resource.struct_rusage]:
    while time.monotonic() < deadline:
        pid, status, usage = os.wait4(child, os.WNOHANG)
        if pid:
            return status, usage
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    _, status, usage = os.wait4(child, 0)
    return status, usage


def _resident() -> int:
    if sys.platform == "linux":
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    _serve()
