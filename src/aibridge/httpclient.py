"""The HTTP client for the providers: what the bridge needs of one, and nothing that it would have to switch off.

`HttpUpstream` finds or makes a connection and hands it the request; `aibridge.httpconnection` is that connection.
"""

import asyncio
import base64
import re
import socket
import ssl
from collections import Counter, deque
from collections.abc import Callable, Mapping
from functools import lru_cache
from string import printable
from typing import Final, NamedTuple
from urllib.parse import quote, unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohappyeyeballs

from aibridge.deadlines import Deadlines
from aibridge.errors import ConnectTimeout, Unreachable, Unsendable, UpstreamError, UpstreamTimeout
from aibridge.httpconnection import Connection, bracketed, declared_length
from aibridge.upstream import Connections, UpstreamRequest, UpstreamResponse
from aibridge.upstreamerrors import UNREACHABLE, UNSENT, translated

_NEXT_ADDRESS_SECONDS: Final = 0.25
_CLOSE_SECONDS: Final = 1.0
_PORTS: Final = {"http": 80, "https": 443}
_NO_TARGET: Final = re.compile(rb"[\x00-\x20\x7f]")
_MAX_PLACES: Final = 256


class _Origin(NamedTuple):
    """Where a connection goes: what requests must have in common to share one."""

    scheme: str
    host: str
    port: int
    ca_file: str | None
    proxy: str | None

    @property
    def authority(self) -> str:
        host = bracketed(self.host)
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"


class HttpUpstream:
    """Pooled keep-alive connections. Implements `aibridge.upstream.Upstream`.

    Proxies are taken from HTTP_PROXY, HTTPS_PROXY and NO_PROXY, trusted certificates from the system (or SSL_CERT_FILE)
    and the request's `ca_file`. Times are in seconds: `connect_timeout` for look-up, connection, proxy and TLS together,
    `first_byte_timeout` from a request that was sent to the whole head of its response (by default that of silence),
    `idle_timeout` from one piece of a body to the next, either way. There is no limit on the whole.
    """

    def __init__(
        self, *, connect_timeout: float = 10.0, first_byte_timeout: float | None = None, idle_timeout: float = 600.0
    ) -> None:
        self._connect_timeout = connect_timeout
        self._first_byte_timeout = idle_timeout if first_byte_timeout is None else first_byte_timeout
        self._idle_timeout = idle_timeout
        self._proxies = getproxies()
        self._tls: dict[str | None, ssl.SSLContext] = {}
        self._idle: dict[_Origin, deque[Connection]] = {}
        self._connections: set[Connection] = set()
        self._open: Counter[str] = Counter()
        self._opened: Counter[str] = Counter()
        self._deadlines = Deadlines(self._connections, min(1.0, idle_timeout / 4, self._first_byte_timeout / 4))
        self._place = lru_cache(_MAX_PLACES)(self._find_place)

    async def send(self, request: UpstreamRequest) -> UpstreamResponse:
        """Send a request and wait for the response's head."""
        try:
            origin, target = self._place(request.url, request.ca_file)
            head = _request_head(request, origin, target)
        except (ValueError, KeyError) as error:
            raise Unsendable(f"{UNSENT}: it cannot be written as HTTP.") from error
        connection = self._take_idle(origin)
        if connection is None:
            connection = await self._connect(origin)
            self._count(connection, origin.authority)
            self._deadlines.start()
        return await connection.exchange(request, head)

    def connections(self) -> Mapping[str, Connections]:
        """The connections to each host, by its name and its port where that is not the scheme's."""
        idle: Counter[str] = Counter()
        for origin, connections in self._idle.items():
            idle[origin.authority] += len(connections)
        return {
            host: Connections(idle[host], max(self._open[host] - idle[host], 0), opened)
            for host, opened in self._opened.items()
        }

    async def aclose(self) -> None:
        """Close all connections."""
        self._deadlines.stop()
        connections = list(self._connections)
        for connection in connections:
            connection.abort()
        if connections:
            await asyncio.wait([connection.lost for connection in connections], timeout=_CLOSE_SECONDS)

    def _count(self, connection: "Connection", host: str) -> None:
        self._opened[host] += 1
        self._open[host] += 1
        connection.lost.add_done_callback(lambda _: self._open.subtract((host,)))

    def _take_idle(self, origin: _Origin) -> "Connection | None":
        """The connection that was used last, if it is still alive: one that the provider has closed is let go of."""
        idle = self._idle.get(origin)
        while idle:
            connection = idle.pop()
            if connection.usable():
                return connection
        return None

    def _find_place(self, url: str, ca_file: str | None) -> tuple[_Origin, bytes]:
        """Where a request goes, and its target there. Raises ValueError or KeyError for what is no URL of a server."""
        return _place(url, ca_file, self._proxy_for)

    async def _connect(self, origin: _Origin) -> "Connection":
        loop = asyncio.get_running_loop()
        pool = self._idle.setdefault(origin, deque())
        connection = Connection(self._first_byte_timeout, self._idle_timeout, pool, self._connections)
        try:
            tls = self._tls_context(origin.ca_file) if origin.scheme == "https" else None
            async with asyncio.timeout(self._connect_timeout):
                if origin.proxy is None:
                    name = origin.host if tls else None
                    connected = await _connected_socket(origin.host, origin.port)
                    await loop.create_connection(lambda: connection, sock=connected, ssl=tls, server_hostname=name)
                    return connection
                proxy = urlsplit(origin.proxy)
                if proxy.scheme != "http" or proxy.hostname is None:
                    raise UpstreamError(f"{UNREACHABLE}: only proxies with an http:// address are supported.")
                connected = await _connected_socket(proxy.hostname, proxy.port or _PORTS["http"])
                await loop.create_connection(lambda: connection, sock=connected)
                if tls is not None:
                    await connection.tunnel(origin.host, origin.port, _proxy_authorization(origin.proxy), tls)
                return connection
        except (TimeoutError, OSError, ValueError, UpstreamError) as error:
            connection.give_up()
            failure = translated(error, UNREACHABLE)
            kind = ConnectTimeout if isinstance(failure, UpstreamTimeout) else Unreachable
            raise kind(failure.message) from error
        except asyncio.CancelledError:
            connection.give_up()
            raise

    def _tls_context(self, ca_file: str | None) -> ssl.SSLContext:
        if ca_file not in self._tls:
            context = ssl.create_default_context()
            if ca_file is not None:
                context.load_verify_locations(ca_file)
            self._tls[ca_file] = context
        return self._tls[ca_file]

    def _proxy_for(self, scheme: str, netloc: str) -> str | None:
        if not self._proxies:
            return None
        proxy = None if proxy_bypass(netloc) else self._proxies.get(scheme)
        return f"http://{proxy}" if proxy and "://" not in proxy else proxy


def written_head(request: UpstreamRequest) -> bytes:
    """The head of a request as it is sent where there is no proxy. Raises ValueError or KeyError where it cannot be sent."""
    return _request_head(request, *_place(request.url, None, lambda _scheme, _netloc: None))


def encoded(url: str) -> str:
    """A URL as it goes out: characters beyond ASCII stand for bytes, and are percent-encoded."""
    return url if url.isascii() else quote(url, safe=printable, encoding="latin-1")


def _place(url: str, ca_file: str | None, proxy_for: Callable[[str, str], str | None]) -> tuple[_Origin, bytes]:
    url = encoded(url)
    parts = urlsplit(url)
    proxy = proxy_for(parts.scheme, parts.netloc)
    origin = _Origin(parts.scheme, parts.hostname or "", parts.port or _PORTS[parts.scheme], ca_file, proxy)
    path = url[url.index("//") + 2 + len(parts.netloc) :]
    target = path if path.startswith("/") else "/" + path
    if proxy is not None and origin.scheme == "http":
        target = f"http://{origin.authority}{target}"
    written = target.encode("latin-1")
    if _NO_TARGET.search(written):
        raise ValueError("a target that servers might split")
    return origin, written


def _request_head(request: UpstreamRequest, origin: _Origin, target: bytes) -> bytes:
    """The head as bytes. Raises ValueError where it would not be one head."""
    lines = [b"%b %b HTTP/1.1\r\nHost: %b\r\n" % (request.method.encode("ascii"), target, origin.authority.encode("ascii"))]
    lines += [b"%b: %b\r\n" % field for field in request.headers]
    body = request.body
    if not isinstance(body, bytes):
        if declared_length(request.headers) is None:
            lines.append(b"transfer-encoding: chunked\r\n")
    elif body or request.method not in ("GET", "HEAD", "DELETE"):
        lines.append(b"content-length: %d\r\n" % len(body))
    head = b"".join(lines)
    breaks = len(lines) + 1  # two in the first
    if not request.method.isalpha() or head.count(b"\r") != breaks or head.count(b"\n") != breaks or b"\0" in head:
        raise ValueError("no method, or a line break where none can be")
    return head + (_proxy_authorization(origin.proxy) if origin.scheme == "http" else b"") + b"\r\n"


def _proxy_authorization(proxy: str | None) -> bytes:
    parts = urlsplit(proxy or "")
    if parts.username is None:
        return b""
    credentials = f"{unquote(parts.username)}:{unquote(parts.password or '')}".encode()
    return b"Proxy-Authorization: Basic " + base64.b64encode(credentials) + b"\r\n"


async def _connected_socket(host: str, port: int) -> socket.socket:
    """The first of the host's addresses that answers (RFC 8305): one that does not must not cost the whole timeout."""
    addresses = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    connected = await aiohappyeyeballs.start_connection(addresses, happy_eyeballs_delay=_NEXT_ADDRESS_SECONDS)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connected
