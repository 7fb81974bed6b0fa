"""Clients that vanish, servers that stop, disks that are full: nothing hangs, and nothing is left behind."""

import gc
import json
import random
import socket
import struct
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("uvicorn", reason="the extra serve is not installed")

from fastvlm_mlx.decoding.engine import Engine
from fastvlm_mlx.errors import DeviceError, OutOfMemoryError
from fastvlm_mlx.serve.journal import Journal
from fastvlm_mlx.serve.reply import Reply

import mlx.core as mx  # isort: skip  # after the package, so that OpenBLAS is in place

from tests.serving import SHAPES, Server, asked, data_address, events_of, held, server, text_of, wait_until

from .pictures import encoded

QUESTION = "How many shapes are there?"
ENDLESS = {"response_format": {"type": "json_object"}, "max_tokens": 4096}  # `tiny` never closes the object


def raw(found: Server, body: Any, path: str = "/v1/chat/completions", kind: str = "application/json") -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost:{found.port}\r\nContent-Type: {kind}\r\n"
    return f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data


def leave(connection: socket.socket) -> None:
    """As a process does that is killed: no end of the stream, a reset."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def left_over(found: Server) -> dict[str, int]:
    """What a server holds for requests that are under way."""
    service = found.serving.service
    assert service.scheduler is not None
    load = service.scheduler.load
    open_now: Any = list(found.serving.http.server_state.connections)
    return {
        "rows": load.rows,
        "queued": load.queued,
        "answers": service.open_answers,
        "replies": len(service.replies),
        "bodies": service.bodies.held,
        "connections": sum(c.awaits != "" or (c.cycle is not None and not c.cycle.response_complete) for c in open_now),
    }


def open_files() -> int:
    """File descriptors of this process."""
    return len(list(Path("/dev/fd").iterdir()))


def memory(found: Server) -> int:
    """Bytes of arrays beside what is kept on purpose: the model's weights, and what was not let go of."""
    service = found.serving.service
    assert service.scheduler is not None
    gc.collect()
    return mx.get_active_memory() - service.scheduler.load.pool_bytes - service.engine.images.nbytes


def nothing_left(found: Server) -> bool:
    return not any(left_over(found).values())


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_that_waits_is_dropped_with_its_client(tiny: Engine, stream: bool) -> None:
    with server(tiny) as found, held(found) as scheduler:
        connection = found.connect()
        connection.sendall(raw(found, asked(QUESTION, stream=stream)))
        wait_until(lambda: len(scheduler.waiting) == 1)
        leave(connection)
        wait_until(lambda: scheduler.waiting[0].cancelled)
        wait_until(lambda: nothing_left(found))


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_under_way_is_dropped_with_its_client(tiny: Engine, stream: bool) -> None:
    pytest.importorskip("llguidance", reason="the extra schema is not installed")
    with server(tiny) as found:
        connection = found.connect()
        connection.sendall(raw(found, asked(QUESTION, stream=stream, **ENDLESS)))
        wait_until(lambda: left_over(found)["rows"] == 1)
        decoded = found.serving.service.scheduler.load.tokens  # type: ignore[union-attr]
        leave(connection)
        wait_until(lambda: nothing_left(found))
        assert found.serving.service.scheduler.load.tokens - decoded < 1000  # type: ignore[union-attr]
        assert found.answer(asked(QUESTION, SHAPES))["choices"][0]["message"]["content"] == "Three."


def test_a_frame_that_waits_is_dropped_with_its_client(tiny: Engine) -> None:
    with server(tiny) as found, held(found) as scheduler, ThreadPoolExecutor(2) as pool:
        path, kind = f"/v1/live?session=camera&prompt={QUESTION.replace(' ', '+')}", "image/png"
        frame = SHAPES.read_bytes()
        first = pool.submit(httpx.post, found.url + path, content=frame, headers={"Content-Type": kind}, timeout=30)
        wait_until(lambda: len(scheduler.waiting) == 1)
        connection = found.connect()
        connection.sendall(raw(found, frame, path, kind))
        time.sleep(0.1)
        leave(connection)
        time.sleep(0.1)
        second = pool.submit(httpx.post, found.url + path, content=frame, headers={"Content-Type": kind}, timeout=30)
        time.sleep(0.1)
        scheduler.release()
        assert [text_of(events_of(each.result().text)) for each in (first, second)] == ["Three."] * 2


def vanish(found: Server, count: int, seed: int) -> None:
    """So many clients one after the other, each of which leaves at some moment of its own."""
    choice = random.Random(seed)
    picture = raw(found, asked("Describe the image.", SHAPES, stream=True))
    requests = [
        picture,
        raw(found, asked("Describe the image.", SHAPES, n=3, temperature=1.0)),
        raw(found, asked(QUESTION, stream=True, max_tokens=30)),
        raw(found, {"input": QUESTION, "stream": True}, "/v1/responses"),
        raw(found, SHAPES.read_bytes(), "/v1/live?session=a", "image/png"),
        picture.replace(b'"messages"', b'"massages"'),
    ]
    for _ in range(count):
        connection = found.connect()
        request = choice.choice(requests)
        try:
            connection.sendall(request[: choice.randrange(len(request) + 1)] if choice.random() < 0.4 else request)
            if choice.random() < 0.5:
                connection.settimeout(choice.choice([0.001, 0.005, 0.02]))
                connection.recv(choice.choice([1, 100, 10_000]))
        except (TimeoutError, ConnectionError):
            pass
        (leave if choice.random() < 0.7 else socket.socket.close)(connection)


@pytest.mark.slow
def test_a_thousand_clients_that_vanish(tiny: Engine) -> None:
    with server(tiny, max_waiting=1000) as found:
        vanish(found, 30, 0)
        wait_until(lambda: nothing_left(found))
        files, threads, before = open_files(), threading.active_count(), memory(found)
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda seed: vanish(found, 250, seed), range(1, 5)))
        wait_until(lambda: nothing_left(found))
        wait_until(lambda: open_files() <= files and memory(found) <= before + 100_000)
        assert threading.active_count() <= threads + 1
        assert found.answer(asked(QUESTION, SHAPES))["choices"][0]["message"]["content"] == "Three."
    assert "failed" not in found.log.getvalue()


def test_answers_under_way_end_with_an_error_when_the_server_stops(tiny: Engine) -> None:
    with server(tiny) as found, held(found) as scheduler, ThreadPoolExecutor(2) as pool:
        whole = pool.submit(httpx.post, f"{found.url}/v1/chat/completions", json=asked(QUESTION), timeout=30)
        streamed = pool.submit(
            httpx.post, f"{found.url}/v1/chat/completions", json=asked(QUESTION, stream=True), timeout=30
        )
        wait_until(lambda: len(scheduler.waiting) == 2)
        found.serving.stop()
        refused, events = whole.result(), events_of(streamed.result().text)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "stopping")
        assert events[-1]["error"]["code"] == "stopping" and "[DONE]" not in events


@pytest.mark.slow
def test_who_does_not_read_does_not_keep_the_server_from_stopping(tiny: Engine) -> None:
    with server(tiny) as found, held(found) as scheduler:
        connection = found.connect()
        connection.sendall(raw(found, asked(QUESTION, stream=True)))
        wait_until(lambda: len(scheduler.waiting) == 1)
        lines: Any = list(found.serving.http.server_state.connections)
        for line in lines:
            line.loop.call_soon_threadsafe(line.pause_writing)  # as where the system takes no more for a client
        found.serving.stop()  # and it ends, which `server` waits for
    connection.close()


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (OutOfMemoryError("The memory ran out."), 503, "out_of_memory"),
        (DeviceError("The GPU failed."), 503, "device_error"),
        (RuntimeError("of our own"), 500, "internal_error"),
    ],
)
def test_what_fails_in_the_middle(tiny: Engine, error: Exception, status: int, code: str) -> None:
    """Before anything was sent it is the status; in a stream it is the last event, and there is no [DONE]."""

    def fail(*_: Any, **__: Any) -> None:
        raise error

    with server(tiny) as found:
        scheduler = found.serving.service.scheduler
        assert scheduler is not None
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(tiny.model, "prefill", fail)
            said = found.refusal(asked("Why?"))
            assert (said[0], said[1]["code"]) == (status, code)
            events = events_of(found.ask(asked("Why?", stream=True)).text)
            assert events[-1]["error"]["code"] == code and "[DONE]" not in events
        assert found.answer(asked(QUESTION, SHAPES))["choices"][0]["message"]["content"] == "Three."
        wait_until(lambda: nothing_left(found))


class Stuck:
    """A log that nobody reads: writing waits for ever, until it is let go."""

    def __init__(self) -> None:
        self.free = threading.Event()

    def write(self, text: str) -> int:
        self.free.wait()
        return len(text)

    def flush(self) -> None:
        pass


class Full:
    """A log on a disk that is full."""

    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")

    def flush(self) -> None:
        raise OSError(28, "No space left on device")


def test_a_log_that_cannot_be_written_holds_nobody_up() -> None:
    stuck = Stuck()
    with Journal(stuck) as journal:  # type: ignore[arg-type]  # as much of a stream as it uses
        for _ in range(5000):
            journal.write("a line")  # and comes back
        assert journal.lost >= 3900
        stuck.free.set()
    with Journal(Full()) as journal:  # type: ignore[arg-type]
        for _ in range(10):
            journal.write("a line")
        wait_until(lambda: journal.lost >= 10)


@pytest.mark.slow
def test_what_is_finished_is_let_go(tiny: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its pixels, its positions and all that was kept to answer it."""
    with server(tiny) as found:
        service, seen = found.serving.service, []
        opened = service.opened

        def noted(reply: Reply) -> None:
            seen.append(weakref.ref(reply))
            opened(reply)

        monkeypatch.setattr(service, "opened", noted)
        for stream in (False, True):
            assert found.ask(asked(QUESTION, SHAPES, stream=stream)).status_code == 200
        connection = found.connect()
        connection.sendall(raw(found, asked("Describe the image.", SHAPES, stream=True)))
        wait_until(lambda: len(seen) == 3)
        leave(connection)
        wait_until(lambda: gc.collect() >= 0 and not any(ref() for ref in seen))


@pytest.mark.slow
def test_memory_and_caches_stay_bounded(tiny: Engine) -> None:
    """Each request another picture: what is kept of earlier ones does not grow beyond its bounds."""
    from PIL import Image

    with server(tiny) as found:
        service = found.serving.service
        service.pictures.capacity = 4 * 192 * 192 * 3
        for number in range(8):
            body = asked(QUESTION)
            address = data_address(encoded(Image.new("RGB", (20, 20), (number, 0, 0)), "PNG"))
            body["messages"][0]["content"] = [{"type": "image_url", "image_url": {"url": address}}]
            assert found.answer(body)
        assert 0 < service.pictures.nbytes <= service.pictures.capacity
        assert len(service.pictures) == 4
