"""The server in a process: a socket, the model loaded in a thread while the socket answers already, and a clean end.

Enters: an engine without weights. Leaves: nothing, when it is interrupted; answers under way end with an error object
first.
"""

from __future__ import annotations

import logging
import resource
import socket
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import uvicorn

from ..decoding.engine import Engine
from ..decoding.prefix_pool import POOL_BYTES
from ..decoding.rows import MAX_BATCH_ROWS
from ..decoding.scheduler import Scheduler
from ..errors import OptionError, OutputError, shown
from ..inputs.imagefile import MAX_PIXELS
from .application import application
from .fetching import Fetcher
from .journal import Handler, Journal
from .keys import Keys
from .names import ModelNames
from .protocol import MAX_CONNECTIONS, GuardedProtocol
from .security import is_loopback
from .service import MAX_WAITING, Limits, Service

STOPPING_SECONDS = 5  # that clients get to read the last of their answers
POOL_POSITIONS = 20_000  # of finished answers, kept for prompts that begin alike
SPARE_FILES = 256  # file descriptors beside those of connections
LOGGERS = ("uvicorn", "uvicorn.error", "uvicorn.access", "asyncio")


@dataclass(frozen=True)
class Settings:
    """How a server is to be: where it listens, who may ask, and how much it does at a time."""

    host: str = "127.0.0.1"
    port: int = 8080
    keys: Sequence[str] = ()
    allow_url_images: bool = False
    max_rows: int = MAX_BATCH_ROWS
    max_waiting: int = MAX_WAITING
    exact: bool = False
    metrics: bool = False
    max_pixels: int = MAX_PIXELS
    keyring: Keys = field(init=False)

    def __post_init__(self) -> None:
        if not 0 <= self.port < 1 << 16:
            raise OptionError(f"`port` is {shown(self.port)}, expected a number from 0 (any that is free) to 65535.")
        if self.max_rows < 1:
            raise OptionError(f"`max_rows` is {shown(self.max_rows)}, expected a whole number of at least 1.")
        object.__setattr__(self, "keyring", Keys(self.keys))
        if not is_loopback(self.host) and not self.keys:
            raise OptionError(
                f"`host` is {shown(self.host)}, which others can reach, so a key is needed; give one (`api_key`)."
            )


def listen(settings: Settings) -> socket.socket:
    """The socket of a server, before anything heavy is begun; raises OutputError where it cannot be had."""
    host, port = settings.host.strip("[]"), settings.port
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        found = socket.socket(family, kind, protocol)
    except OSError as error:
        raise OutputError(
            f"`host` {shown(host)} is no address of this machine ({error.strerror}); check it."
        ) from error
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        found.set_inheritable(False)
    except OSError as error:
        found.close()
        raise OutputError(
            f"Port {port} of {host} cannot be had ({error.strerror}); stop what uses it, or choose another one "
            "(`port`)."
        ) from error
    return found


class Serving:
    """A server on a socket that is bound already. `run` serves until it is interrupted, or `stop` is called.

    `service` is its inside, and `http` what runs it. The protocol is that of its connections, a GuardedProtocol.
    """

    def __init__(
        self,
        engine: Engine,
        listening: socket.socket,
        settings: Settings,
        *,
        journal: Journal | None = None,
        fetcher: Fetcher | None = None,
        protocol: type[GuardedProtocol] = GuardedProtocol,
    ):
        if settings.allow_url_images and fetcher is None:
            fetcher = Fetcher()
        self.journal = journal or Journal()
        self.settings, self.listening = settings, listening
        self.port: int = listening.getsockname()[1]
        limits = Limits(settings.max_rows, settings.max_waiting)
        self.service = Service(
            engine, ModelNames.of(engine.name), limits, self.journal, max_pixels=settings.max_pixels, fetcher=fetcher
        )
        config = uvicorn.Config(
            application(self.service, settings.keyring, settings.host, self.port, with_metrics=settings.metrics),
            http=protocol,
            ws="none",
            lifespan="off",
            loop="asyncio",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=STOPPING_SECONDS,
        )
        self.http = _Server(config, self.service)

    @property
    def address(self) -> str:
        """Where it is reached."""
        return address(self.settings.host, self.port)

    def run(self, load: Callable[[], None], ready: Callable[[], None]) -> None:
        """Serve; `load` loads the engine's weights, in a thread, and `ready` is called when questions are answered.

        Raises what loading raises, and KeyboardInterrupt where it was interrupted.
        """
        _allow_files(MAX_CONNECTIONS + SPARE_FILES)
        loader = _Loader(self.http, self.service, load, self.settings, ready)
        with self.journal, _logging_to(self.journal):
            loader.start()
            try:
                self.http.run([self.listening])
            finally:
                loader.close()
                self.service.close()
        if loader.error is not None:
            raise loader.error

    def stop(self) -> None:
        """Let `run` end, from any thread."""
        self.http.should_exit = True


def address(host: str, port: int) -> str:
    """Where a server is reached that was bound to a host and a port."""
    host = host.strip("[]")
    host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def pool_bytes(engine: Engine) -> int:
    """Bytes that keys and values of finished answers may take: POOL_POSITIONS of them, but no more than POOL_BYTES.

    A model so small that nobody could ask that much of it does not collect until the memory is full.
    """
    text = engine.config.text
    position = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * engine.model.dtype.size
    return min(POOL_BYTES, POOL_POSITIONS * position)


class _Server(uvicorn.Server):
    """uvicorn's, which ends open answers before it waits for them."""

    def __init__(self, config: uvicorn.Config, service: Service):
        super().__init__(config)
        self._service = service

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop: answers under way end with an error object; who has not read that by then is left."""
        self._service.stop()
        await super().shutdown(sockets)
        for connection in list(self.server_state.connections):
            connection.transport.abort()


class _Loader(threading.Thread):
    """Loads the weights while the server answers that they are being loaded, and gives it a scheduler then."""

    def __init__(
        self,
        server: uvicorn.Server,
        service: Service,
        load: Callable[[], None],
        settings: Settings,
        ready: Callable[[], None],
    ):
        super().__init__(name="fastvlm-load", daemon=True)
        self.error: BaseException | None = None
        self._server, self._service, self._load, self._settings, self._ready = server, service, load, settings, ready
        self._scheduler: Scheduler | None = None
        self._closed = False

    def run(self) -> None:
        """Load, and say so; what goes wrong ends the server."""
        try:
            self._load()
            settings = self._settings
            engine = self._service.engine
            self._scheduler = Scheduler(
                engine, max_rows=settings.max_rows, pool_bytes=pool_bytes(engine), exact=settings.exact
            )
            if self._closed:
                self._scheduler.close()
                return
            self._service.begin(self._scheduler)
            if not self._server.should_exit:
                self._ready()
        except BaseException as error:
            self.error = error
            self._server.should_exit = True

    def close(self) -> None:
        """Let the scheduler end, also one that is still to come."""
        self._closed = True
        if self._scheduler is not None:
            self._scheduler.close()


@contextmanager
def _logging_to(journal: Journal) -> Iterator[None]:
    """Have what libraries log, and the package's own notes, written by the journal."""
    handler = Handler(journal.write)
    loggers = [logging.getLogger(name) for name in LOGGERS]
    before = [(logger.handlers, logger.propagate) for logger in loggers]
    before_notes = warnings.showwarning
    for logger in loggers:
        logger.handlers, logger.propagate = [handler], False
    warnings.showwarning = lambda message, *_, **__: journal.write(f"Note: {' '.join(str(message).split())}")
    try:
        yield
    finally:
        warnings.showwarning = before_notes
        for logger, (handlers, propagate) in zip(loggers, before, strict=True):
            logger.handlers, logger.propagate = handlers, propagate


def _allow_files(wanted: int) -> None:
    """As many file descriptors as connections may take, where the system's limit is lower and can be raised."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(OSError, ValueError):
            most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
