"""A server in this process, or one in a process of its own, and what the tests of it send."""

import base64
import json
import os
import queue
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from typing import Any

import httpx

from fastvlm_mlx.decoding.engine import Engine
from fastvlm_mlx.serve.journal import Journal
from fastvlm_mlx.serve.protocol import GuardedProtocol
from fastvlm_mlx.serve.server import Serving, Settings, listen

EXAMPLES = Path(__file__).parents[1] / "examples"
SHAPES, SIGN = EXAMPLES / "shapes.png", EXAMPLES / "sign.png"
PATIENCE = 30.0  # seconds that anything gets to happen, far beyond what it takes


def data_address(picture: Path | bytes, kind: str = "image/png") -> str:
    """A picture's file, or its bytes, as a `data:` address."""
    data = picture if isinstance(picture, bytes) else picture.read_bytes()
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def asked(text: str, *pictures: Path, **more: Any) -> dict[str, Any]:
    """The body of a chat completion: a question about pictures."""
    parts: list[dict[str, Any]] = [{"type": "text", "text": text}]
    parts += [{"type": "image_url", "image_url": {"url": data_address(path)}} for path in pictures]
    return {"model": "tiny", "messages": [{"role": "user", "content": parts if pictures else text}], **more}


def events_of(text: str) -> list[Any]:
    """The events of a stream: parsed, and "[DONE]" as it is."""
    found = re.findall(r"(?m)^data: (.*)$", text)
    return [each if each == "[DONE]" else json.loads(each) for each in found]


def text_of(events: list[Any], choice: int = 0) -> str:
    """The text of one answer in the chunks of a stream."""
    deltas = [each["choices"][0] for each in events if isinstance(each, dict) and each.get("choices")]
    return "".join(each["delta"].get("content", "") for each in deltas if each["index"] == choice)


@dataclass
class Server:
    """A server that is up, a client of it, and what it has logged."""

    serving: Serving
    client: httpx.Client
    log: StringIO

    @property
    def url(self) -> str:
        """Its address."""
        return self.serving.address

    @property
    def port(self) -> int:
        """Its port."""
        return self.serving.port

    def ask(self, body: Any, path: str = "/v1/chat/completions", **more: Any) -> httpx.Response:
        """Post a body as JSON."""
        return self.client.post(path, json=body, **more)

    def answer(self, body: Any, **more: Any) -> dict[str, Any]:
        """The object of an answer; fails where it is none."""
        found = self.ask(body, **more)
        assert found.status_code == 200, found.text
        return dict(found.json())

    def refusal(self, body: Any, **more: Any) -> tuple[int, dict[str, Any]]:
        """The status and the error of a request that is refused."""
        found = self.ask(body, **more)
        return found.status_code, found.json()["error"]

    def connect(self) -> socket.socket:
        """A bare connection."""
        found = socket.create_connection(("127.0.0.1", self.port), PATIENCE)
        found.settimeout(PATIENCE)
        return found

    def send(self, data: bytes) -> bytes:
        """Send bytes on a connection of their own; gives all that comes until it is closed."""
        with self.connect() as connection:
            connection.sendall(data)
            return received(connection)


def received(connection: socket.socket) -> bytes:
    """All that comes on a connection until it is closed."""
    found = b""
    with suppress(ConnectionResetError):
        while part := connection.recv(1 << 16):
            found += part
    return found


@contextmanager
def server(
    engine: Engine, *, protocol: type[GuardedProtocol] = GuardedProtocol, fetcher: Any = None, **settings: Any
) -> Iterator[Server]:
    """A server of an engine, whose weights are loaded, in a thread of this process."""
    chosen = replace(Settings(port=0), **settings) if "host" not in settings else Settings(port=0, **settings)
    log = StringIO()
    with listen(chosen) as listening:
        serving = Serving(engine, listening, chosen, journal=Journal(log), protocol=protocol, fetcher=fetcher)
        up = threading.Event()
        failed: queue.SimpleQueue[BaseException] = queue.SimpleQueue()

        def run() -> None:
            try:
                serving.run(lambda: None, up.set)
            except BaseException as error:
                failed.put(error)
                up.set()

        thread = threading.Thread(target=run)
        thread.start()
        try:
            assert up.wait(PATIENCE) and failed.empty()
            with httpx.Client(base_url=serving.address, timeout=PATIENCE) as client:
                yield Server(serving, client, log)
        finally:
            serving.stop()
            thread.join(PATIENCE)
            assert not thread.is_alive()


class HeldScheduler:
    """A stand-in for a server's scheduler: what is submitted waits until it is released, and then goes to the real
    one.
    """

    def __init__(self, inner: Any):
        self.inner = inner
        self.waiting: list[Held] = []
        self._released = False

    def submit(self, *arguments: Any, **options: Any) -> "Held":
        """Take a question, for later."""
        found = Held(lambda: self.inner.submit(*arguments, **options))
        self.waiting.append(found)
        if self._released:
            found.release()
        return found

    def release(self) -> None:
        """Let everything go on that was not cancelled."""
        self._released = True
        for each in list(self.waiting):
            each.release()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


class Held:
    """An answer that has not begun."""

    def __init__(self, begin: Callable[[], Any]):
        self.cancelled = False
        self._begin: Callable[[], Any] | None = begin
        self._pending: Any = None

    def release(self) -> None:
        """Begin it."""
        begin, self._begin = self._begin, None
        if begin is not None and not self.cancelled:
            self._pending = begin()

    def cancel(self) -> None:
        """Break it off."""
        self.cancelled = True
        if self._pending is not None:
            self._pending.cancel()


@contextmanager
def held(found: Server) -> Iterator[HeldScheduler]:
    """Within the block nothing that a server is asked begins before it is released."""
    service = found.serving.service
    scheduler = HeldScheduler(service.scheduler)
    service.scheduler = scheduler  # type: ignore[assignment]  # a stand-in
    try:
        yield scheduler
    finally:
        scheduler.release()
        service.scheduler = scheduler.inner


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for something to become so; fails where it does not."""
    end = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > end:
            raise AssertionError("it did not happen")
        time.sleep(0.005)


class Process:
    """`fastvlm-mlx serve` in a process of its own, on a port that is free; a context manager."""

    def __init__(self, *arguments: str, **options: Any):
        command = [sys.executable, "-m", "fastvlm_mlx", "serve", "--port", "0", *arguments]
        options.setdefault("stderr", subprocess.PIPE)
        environment = {**os.environ, **options.pop("env", {})}
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, **options)
        assert self.process.stdout is not None
        self.line = self.process.stdout.readline()
        found = re.search(r"http://\S+", self.line)
        self.url = found[0] if found else ""

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()
