"""A server on loopback that serves one archive as honestly, or not, as a list of behaviours says; and archives to
serve."""

import http.server
import io
import socketserver
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import ClassVar

NAME = "llava-fastvithd_0.5b_stage3"
Behaviour = Callable[["Handler"], object]


def zipped(folder: Path, top: str = NAME) -> bytes:
    """A folder as an archive like Apple's: its files in one folder, with what macOS adds."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.mkdir(top)
        for path in sorted(folder.iterdir()):
            archive.write(path, f"{top}/{path.name}")
        archive.writestr(f"__MACOSX/{top}/._config.json", b"Mac OS X")
    return out.getvalue()


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers GET by the next behaviour in the list, honestly once there is none left; HEAD always honestly."""

    data: ClassVar[bytes]
    tag: ClassVar[str]
    script: ClassVar[list[Behaviour]]
    requests: ClassVar[list[dict[str, str]]]

    def do_GET(self) -> None:
        self.requests.append(dict(self.headers))
        with suppress(BrokenPipeError, ConnectionResetError):
            (self.script.pop(0) if self.script else honest)(self)

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.data)))
        self.end_headers()

    def send(self, status: int, headers: dict[str, object], body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


def asked_from(handler: Handler) -> int:
    """The first byte that the request asks for, of this very file; 0 for all of it."""
    start = handler.headers.get("Range")
    if start is None or handler.headers.get("If-Range") != handler.tag:
        return 0
    return int(start.removeprefix("bytes=").rstrip("-"))


def honest(handler: Handler, cut: int | None = None) -> None:
    """What a good server does; with `cut`, it hangs up after so many bytes."""
    start, data = asked_from(handler), handler.data
    headers: dict[str, object] = {"ETag": handler.tag, "Content-Length": len(data) - start, "Accept-Ranges": "bytes"}
    if start:
        headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
    handler.send(206 if start else 200, headers, data[start:][:cut])


def drops(after: int) -> Behaviour:
    return lambda handler: honest(handler, after)


def replies(status: int, headers: dict[str, object] | None = None, body: bytes | None = None) -> Behaviour:
    """A fixed answer, of the whole file unless given."""

    def answer(handler: Handler) -> None:
        data = handler.data if body is None else body
        handler.send(status, {"Content-Length": len(data), **(headers or {})}, data)

    return answer


def raw(data: bytes) -> Behaviour:
    """Bytes instead of HTTP."""
    return lambda handler: handler.wfile.write(data)


class Server(http.server.ThreadingHTTPServer):
    """Asks no name server what this machine is called, and waits for nobody at its end."""

    daemon_threads = True
    block_on_close = False

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]


@contextmanager
def serving(data: bytes) -> Iterator[tuple[type[Handler], str]]:
    """The server's handler, to script and to look at, and its address."""

    class Served(Handler):
        tag = '"one"'
        script: ClassVar[list[Behaviour]] = []
        requests: ClassVar[list[dict[str, str]]] = []

    Served.data = data
    httpd = Server(("127.0.0.1", 0), Served)
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield Served, f"http://127.0.0.1:{httpd.server_port}"
    finally:
        httpd.shutdown()
        httpd.server_close()
