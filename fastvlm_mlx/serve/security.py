"""Who may ask from where: the checks that every request passes before anything of it is read.

- Its `Host` names this server, so that a web page whose name was rebound to 127.0.0.1 gets nothing (DNS rebinding).
- Its `Origin`, where a browser sends one, is the server itself, and there are no CORS headers at all (CSRF).
- It holds an API key, where there are any.
- A body is of a type that no page can send elsewhere without being asked: JSON, or a picture for `/v1/live`.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Receive, Scope, Send

from .events import send_json
from .keys import Keys
from .refusal import Refusal

LOOPBACK_NAMES = ("127.0.0.1", "localhost", "[::1]")
OPEN_PATHS = ("/", "/health")  # answered without a key: they say nothing about anybody
DEFAULT_PORTS = {"http": 80, "https": 443}
PICTURE_TYPES = ("image/jpeg", "image/png", "image/webp")
JSON_TYPE = "application/json"
# What the body of a POST may be, for each path that takes one.
BODY_TYPES = {
    prefix + path: types
    for prefix in ("/v1", "")
    for path, types in (("/chat/completions", (JSON_TYPE,)), ("/responses", (JSON_TYPE,)), ("/live", PICTURE_TYPES))
}
MAX_HEADER_CHARS = 512  # of a header that is compared


def is_loopback(host: str) -> bool:
    """Whether a server bound to this host, a name or an address, is reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True)
class Guard:
    """ASGI middleware that refuses what may not come in; what it lets through has `salt` in the scope's state.

    On a loopback address only LOOPBACK_NAMES and the address itself are taken for the server's name; elsewhere any name
    is, as there has to be a key there, which no page has.
    """

    app: ASGIApp
    keys: Keys
    host: str
    port: int
    names: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        own = f"[{self.host}]" if ":" in self.host else self.host
        names: Iterable[str] = {*LOOPBACK_NAMES, own} if is_loopback(self.host) else ()
        suffixes = (f":{self.port}", "") if self.port in DEFAULT_PORTS.values() else (f":{self.port}",)
        object.__setattr__(self, "names", frozenset(name + suffix for name in names for suffix in suffixes))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through to the application, or answer it with what is wrong."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            salt = self.check(scope)
        except Refusal as refusal:
            await send_json(send, refusal.to_dict(), refusal.status, refusal.headers)
            return
        scope.setdefault("state", {})["salt"] = salt
        await self.app(scope, receive, send)

    def check(self, scope: Scope) -> bytes:
        """What the caches of whoever asks are salted with; raises a Refusal."""
        host = self._check_host(_only(scope, b"host"))
        self._check_origin(host, _only(scope, b"origin"), _only(scope, b"sec-fetch-site"))
        if scope["method"] == "POST" and scope["path"] in BODY_TYPES:
            _check_type(BODY_TYPES[scope["path"]], _only(scope, b"content-type"))
        if scope["path"] in OPEN_PATHS:
            return b""
        return self.keys.salt_of(_only(scope, b"authorization"))

    def _check_host(self, host: str | None) -> str:
        host = (host or "").lower()
        if not host or (self.names and host not in self.names):
            raise Refusal(
                403,
                f"The request is for another host than this server, which is 127.0.0.1:{self.port} or "
                f"localhost:{self.port}.",
                code="wrong_host",
            )
        return host

    def _check_origin(self, host: str, origin: str | None, site: str | None) -> None:
        if site is not None and site.lower() not in ("same-origin", "none"):
            raise Refusal(403, "The request comes from another web site, and is refused.", code="foreign_origin")
        if origin is None:
            return
        try:
            parts = urlsplit(origin.lower())
            port = parts.port
        except ValueError:
            parts, port = urlsplit(""), None
        if parts.scheme not in DEFAULT_PORTS or _with_port(parts.netloc, port, parts.scheme) != _with_port(
            host, None, parts.scheme
        ):
            raise Refusal(403, "The request comes from another web site, and is refused.", code="foreign_origin")


def _with_port(netloc: str, port: int | None, scheme: str) -> str:
    """A host with its port, that of the scheme where it names none."""
    named = netloc.rpartition("]")[2].rpartition(":")[1]
    return netloc if named or port is not None else f"{netloc}:{DEFAULT_PORTS[scheme]}"


def _check_type(wanted: tuple[str, ...], content_type: str | None) -> None:
    """Raise a Refusal (415) unless a body is of a type that is wanted."""
    kind, _, rest = (content_type or "").partition(";")
    kind = kind.strip().lower()
    charset = rest.lower().replace(" ", "").replace('"', "").partition("charset=")[2].partition(";")[0]
    if kind not in wanted or (kind == JSON_TYPE and charset not in ("", "utf-8", "utf8")):
        raise Refusal(
            415,
            f"The Content-Type is {kind[:100] or 'missing'}{f' in {charset[:30]}' if charset else ''}, expected "
            f"{' or '.join(wanted)}"
            f"{' in UTF-8' if kind == JSON_TYPE else ''}.",
            code="unsupported_media_type",
        )


def _only(scope: Scope, name: bytes) -> str | None:
    """The value of a header, None where it is missing; raises a Refusal where it comes twice or is very long."""
    values = [value for key, value in scope["headers"] if key == name]
    if not values:
        return None
    if len(values) > 1 or len(values[0]) > MAX_HEADER_CHARS:
        raise Refusal(400, f"The header {name.decode()} is there twice or too long.", code="bad_header")
    return str(values[0].decode("latin-1")).strip()
