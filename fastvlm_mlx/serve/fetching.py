"""Pictures at addresses of the web, where `--allow-url-images` has allowed them: from public addresses only.

A name is looked up once, every address that it has must be public, and the connection is made to one of these, so that
a name that changes its mind (DNS rebinding) leads nowhere else. Each redirect is checked in the same way. There are no
proxies, no cookies and no keys, and what comes is bounded in size and time.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import cached_property
from urllib.parse import SplitResult, urljoin, urlsplit

import h11

from ..errors import shown
from ..version import __version__
from .refusal import Refusal, bad_request

MAX_DOWNLOAD = 20 << 20  # bytes of a picture
FETCH_SECONDS = 10.0  # for everything, redirects included
MAX_REDIRECTS = 3
PORTS = {"http": 80, "https": 443}
REDIRECTS = (301, 302, 303, 307, 308)
# Public as far as `ipaddress` knows, but ways to other addresses: NAT64, 6to4, Teredo, and what stands for IPv4 in
# IPv6.
TRANSLATED = tuple(
    map(ipaddress.ip_network, ("64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/32", "::ffff:0:0/96", "::/96"))
)

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public Internet, for one machine, and not a way to any other."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if any(found.version == network.version and found in network for network in TRANSLATED):
        return False
    return found.is_global and not (found.is_multicast or found.is_reserved or found.is_unspecified)


async def resolve(host: str, port: int) -> list[str]:
    """The IP addresses of a host; raises OSError."""
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


class Fetcher:
    """Fetches pictures; `public` says which IP addresses may be connected to, `resolve` what addresses a name has."""

    def __init__(
        self,
        *,
        public: Callable[[str], bool] = is_public,
        resolve: Resolve = resolve,
        seconds: float = FETCH_SECONDS,
        max_download: int = MAX_DOWNLOAD,
        ports: dict[str, int] | None = None,
    ):
        self._public, self._resolve = public, resolve
        self._seconds, self._max_download = seconds, max_download
        self._ports = ports or PORTS

    async def fetch(self, address: str, param: str) -> bytes:
        """The bytes at an address; raises a Refusal (400) that says what is wrong with it, and nothing of what it leads
        to.
        """
        try:
            async with asyncio.timeout(self._seconds):
                for _ in range(MAX_REDIRECTS + 1):
                    found = await self._get(address, param)
                    if isinstance(found, bytes):
                        return found
                    address = urljoin(address, found)
        except TimeoutError as error:
            raise bad_request(
                f"`{param}` did not come within {self._seconds:g} seconds; send the picture itself.", param
            ) from error
        except (OSError, h11.ProtocolError, ValueError, EOFError) as error:
            raise bad_request(
                f"`{param}` cannot be fetched; send the picture itself, as a 'data:' address.", param
            ) from error
        raise bad_request(f"`{param}` redirects more than {MAX_REDIRECTS} times; send the picture itself.", param)

    async def _get(self, address: str, param: str) -> bytes | str:
        """The bytes at an address, or where it redirects to."""
        parts, host, port = self._split(address, param)
        addresses = await self._resolve(host, port)
        if not addresses or not all(map(self._public, addresses)):
            raise self._not_public(param)
        context = self._tls if parts.scheme == "https" else None
        reader, writer = await asyncio.open_connection(
            addresses[0], port, ssl=context, server_hostname=host if context else None
        )
        try:
            peer = writer.get_extra_info("peername")
            if peer is None or not self._public(str(peer[0])):
                raise self._not_public(param)
            return await self._exchange(reader, writer, parts, param)
        finally:
            writer.close()
            with suppress(OSError, ssl.SSLError):
                writer.transport.abort()

    @cached_property
    def _tls(self) -> ssl.SSLContext:
        return ssl.create_default_context()  # reads every certificate of the system: tens of milliseconds

    def _split(self, address: str, param: str) -> tuple[SplitResult, str, int]:
        parts = urlsplit(address)
        port = parts.port or self._ports.get(parts.scheme, 0)
        host = parts.hostname
        if (
            parts.scheme not in self._ports
            or not host
            or parts.username is not None
            or port != self._ports[parts.scheme]
        ):
            raise bad_request(
                f"`{param}` leads to {shown(address[:100])}, expected http:// or https:// on its usual port and "
                "without a user.",
                param,
            )
        return parts, host, port

    async def _exchange(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, parts: SplitResult, param: str
    ) -> bytes | str:
        connection = h11.Connection(h11.CLIENT)
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        fields = {"Host": parts.netloc, "Accept": "image/*", "Accept-Encoding": "identity", "Connection": "close"}
        headers = [*fields.items(), ("User-Agent", f"fastvlm-mlx/{__version__}")]
        writer.write(connection.send(h11.Request(method="GET", target=target, headers=headers)) or b"")
        writer.write(connection.send(h11.EndOfMessage()) or b"")
        await writer.drain()
        found = bytearray()
        while True:
            event = connection.next_event()
            if event is h11.NEED_DATA:
                connection.receive_data(await reader.read(1 << 16))
            elif isinstance(event, h11.Response):
                if event.status_code in REDIRECTS:
                    places = [value.decode("latin-1") for name, value in event.headers if name == b"location"]
                    if len(places) != 1:
                        raise ValueError("a redirect to nowhere")
                    return places[0]
                if event.status_code != 200:
                    raise ValueError("not there")
            elif isinstance(event, h11.Data):
                found += event.data
                if len(found) > self._max_download:
                    raise bad_request(
                        f"`{param}` is larger than {self._max_download >> 20} MiB; send a smaller picture.", param
                    )
            elif isinstance(event, h11.EndOfMessage):
                return bytes(found)
            elif isinstance(event, h11.ConnectionClosed):
                raise EOFError

    @staticmethod
    def _not_public(param: str) -> Refusal:
        return bad_request(
            f"`{param}` does not lead to a public address of the Internet; send the picture itself.", param
        )
