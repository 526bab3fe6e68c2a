"""A thin HTTP/1.1 client on httptools: what the bridge needs of one, and nothing that it would have to switch off.

A request goes out as it is given, byte for byte; a response comes in as it arrives. `HttpUpstream` keeps the pools,
`_Connection` is one socket and reads one response at a time, `_Response` is what the relay sees of it. The head and each
piece of a response go through one callback each; the timer of a connection is moved, not set anew, for every wait.
"""

import asyncio
import base64
import os
import select
import socket
import ssl
from collections import deque
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from string import printable
from typing import Final, cast
from urllib.parse import quote, unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohappyeyeballs
import httptools

from aibridge.errors import UpstreamError, UpstreamTimeout
from aibridge.upstream import UpstreamRequest, UpstreamResponse
from aibridge.wire.base import Headers
from aibridge.wire.observer import ResponseHead

# Providers and the load balancers before them close idle connections after a minute or more; we do so earlier.
_KEEP_IDLE_SECONDS: Final = 15.0
# Reading stops when this much of a body waits to be read, so that a slow client slows the provider down.
_MAX_BUFFERED: Final = 128 * 1024
_MAX_HEAD_BYTES: Final = 128 * 1024
# What the kernel takes at once is sent at once. A larger body goes in slices, each of which waits for the one before it.
_AT_ONCE: Final = 64 * 1024
_SLICE: Final = 256 * 1024

_UNREACHABLE: Final = "The provider could not be reached"
_BROKEN_OFF: Final = "The provider's response broke off"
_UNSENT: Final = "The request could not be sent"
_WRONG_LENGTH: Final = UpstreamError(f"{_UNSENT}: its body is not as long as declared.")
_NEXT_ADDRESS_SECONDS: Final = 0.25
_PORTS: Final = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class _Origin:
    """Where a connection goes: what requests must have in common to share one."""

    scheme: str
    host: str
    port: int
    ca_file: str | None
    proxy: str | None

    @property
    def bracketed_host(self) -> str:
        return f"[{self.host}]" if ":" in self.host else self.host

    @property
    def authority(self) -> str:
        return self.bracketed_host if self.port == _PORTS[self.scheme] else f"{self.bracketed_host}:{self.port}"


class HttpUpstream:
    """Pooled keep-alive connections. Implements `aibridge.upstream.Upstream`.

    Proxies are taken from HTTP_PROXY, HTTPS_PROXY and NO_PROXY, trusted certificates from the system (or SSL_CERT_FILE)
    and the request's `ca_file`. `connect_timeout` (look-up, connection, proxy and TLS together) and `idle_timeout` are in
    seconds; there is no limit on the whole.
    """

    def __init__(self, *, connect_timeout: float = 10.0, idle_timeout: float = 600.0) -> None:
        self._connect_timeout = connect_timeout
        self._idle_timeout = idle_timeout
        self._proxies = getproxies()
        self._tls: dict[str | None, ssl.SSLContext] = {}
        self._idle: dict[_Origin, deque[_Connection]] = {}
        self._connections: set[_Connection] = set()

    async def send(self, request: UpstreamRequest) -> UpstreamResponse:
        """Send a request and wait for the response's head."""
        try:
            url = request.url if request.url.isascii() else quote(request.url, safe=printable, encoding="latin-1")
            parts = urlsplit(url)
            proxy = self._proxy_for(parts.scheme, parts.netloc)
            port = parts.port or _PORTS[parts.scheme]
            origin = _Origin(parts.scheme, parts.hostname or "", port, request.ca_file, proxy)
            path = url[url.index("//") + 2 + len(parts.netloc) :]
            head = _request_head(request, origin, path)
        except (ValueError, KeyError) as error:
            raise UpstreamError(f"{_UNREACHABLE}: the request cannot be written as HTTP.") from error
        connection = self._take_idle(origin)
        if connection is None:
            connection = await self._connect(origin)
        return await connection.exchange(request, head)

    async def aclose(self) -> None:
        """Close all connections."""
        connections = list(self._connections)
        for connection in connections:
            connection.abort()
        for connection in connections:
            await connection.lost

    def _take_idle(self, origin: _Origin) -> "_Connection | None":
        """The connection that was used last, if it is still alive: one that the provider has closed is let go of."""
        idle = self._idle.get(origin)
        while idle:
            connection = idle.pop()
            if connection.usable():
                return connection
        return None

    async def _connect(self, origin: _Origin) -> "_Connection":
        loop = asyncio.get_running_loop()
        connection = _Connection(self._idle_timeout, self._idle.setdefault(origin, deque()), self._connections)
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
                    raise UpstreamError(f"{_UNREACHABLE}: only proxies with an http:// address are supported.")
                connected = await _connected_socket(proxy.hostname, proxy.port or _PORTS["http"])
                await loop.create_connection(lambda: connection, sock=connected)
                if tls is not None:
                    await connection.tunnel(origin, tls)
                return connection
        except (TimeoutError, OSError, ValueError, UpstreamError) as error:
            connection.abort()
            raise _translated(error, _UNREACHABLE) from error
        except asyncio.CancelledError:
            connection.abort()
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


class _Response:
    """A response under way. Belongs to its connection until it is complete."""

    def __init__(self, connection: "_Connection", head: ResponseHead) -> None:
        self.head = head
        self._connection: _Connection | None = connection
        self._pieces: list[bytes] = []
        self._buffered = 0
        self._failure: UpstreamError | None = None
        self._waiter: asyncio.Future[None] | None = None

    async def read(self) -> bytes:
        """The next bytes of the body."""
        while not self._pieces:
            if self._failure is not None:
                raise self._failure
            if self._connection is None:
                return b""
            self._waiter = self._connection.waiter()
            try:
                await self._waiter
            finally:
                self._waiter = None
        data = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
        self._pieces.clear()
        self._buffered = 0
        if self._connection is not None:
            self._connection.resume_reading()
        return data

    def close(self) -> None:
        """Let go of the response."""
        if self._connection is not None:
            self._connection.abort()

    # ---- called by the connection ----

    def put(self, piece: bytes) -> bool:
        """The next piece has come. Answers whether no more should, until this one has been read."""
        self._pieces.append(piece)
        self._buffered += len(piece)
        self._wake()
        return self._buffered > _MAX_BUFFERED

    def end(self, failure: UpstreamError | None) -> None:
        """The body has ended, or will never."""
        self._failure = failure
        self._connection = None
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class _Connection(asyncio.Protocol):
    """One socket. Reads one response at a time."""

    def __init__(self, idle_timeout: float, pool: "deque[_Connection]", connections: "set[_Connection]") -> None:
        self._loop = asyncio.get_running_loop()
        self.lost: asyncio.Future[None] = self._loop.create_future()
        self._idle_timeout = idle_timeout
        self._pool = pool
        self._connections = connections
        self._transport: asyncio.Transport | None = None
        self._writable = asyncio.Event()
        self._writable.set()
        self._upload: asyncio.Task[None] | None = None
        self._head: asyncio.Future[_Response] | None = None
        self._response: _Response | None = None
        self._without_body = False
        self._tunnelling = False
        self._failure: UpstreamError | None = None
        self._timer: asyncio.TimerHandle | None = None  # of what is waited for
        self._expiry: asyncio.TimerHandle | None = None  # of the connection in the pool
        self._deadline = 0.0
        self._waiting: asyncio.Future[None] | asyncio.Future[_Response] | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._fields: list[tuple[bytes, bytes]] = []
        self._head_bytes = 0

    # ---- exchanges ----

    async def exchange(self, request: UpstreamRequest, head: bytes) -> _Response:
        """Send a request and wait for the head of its response. What goes wrong takes the connection with it."""
        assert self._transport is not None  # noqa: S101  connected
        self._begin(without_body=request.method == "HEAD")
        body = request.body
        assert self._head is not None  # noqa: S101  _begin made it
        awaited = self._head
        try:
            if isinstance(body, bytes) and len(body) <= _AT_ONCE:
                self._transport.write(head + body)
                self._watch(awaited)
            else:
                self._transport.write(head)
                pieces, length = (_slices(body), len(body)) if isinstance(body, bytes) else (body, _length(request.headers))
                self._upload = self._loop.create_task(self._send_body(pieces, length))
            return await awaited
        except BaseException:
            if self._head is awaited:  # else the exchange has ended, and the connection may be somebody else's by now
                self.abort()
            raise

    async def tunnel(self, origin: _Origin, tls: ssl.SSLContext) -> None:
        """Have the proxy at the other end connect through to `origin`, and speak TLS from there on."""
        assert self._transport is not None  # noqa: S101  connected
        self._begin(without_body=False)
        self._tunnelling = True
        assert self._head is not None  # noqa: S101  _begin made it
        authority = f"{origin.bracketed_host}:{origin.port}".encode()
        self._transport.write(
            b"CONNECT %b HTTP/1.1\r\nHost: %b\r\n%b\r\n" % (authority, authority, _proxy_authorization(origin.proxy))
        )
        response = await self._head
        if not response.head.ok:
            raise UpstreamError(f"{_UNREACHABLE}: the proxy answers with HTTP {response.head.status}.")
        plain = self._transport
        try:
            transport = await self._loop.start_tls(plain, self, tls, server_hostname=origin.host)
            if transport is None or plain.is_closing():
                raise UpstreamError(f"{_UNREACHABLE}: it closed the connection.")
        except BaseException:
            plain.abort()
            self.connection_lost(None)  # a protocol whose handshake was broken off is not always told
            raise
        self._transport = transport
        self._head, self._tunnelling = None, False

    def usable(self) -> bool:
        """Whether an idle connection can be used: not where the provider has closed it, or sent what nobody asked for."""
        if self._expiry is not None:
            self._expiry.cancel()
        if self._transport is None or self._transport.is_closing():
            return False
        poll = select.poll()
        poll.register(self._transport.get_extra_info("socket").fileno(), select.POLLIN)
        if poll.poll(0):
            self.abort()
            return False
        return True

    def abort(self) -> None:
        """Drop the connection at once."""
        self._failure = self._failure or UpstreamError(f"{_BROKEN_OFF}: it was dropped.")
        if self._transport is not None:
            self._transport.abort()

    def waiter(self) -> "asyncio.Future[None]":
        """A future for the next thing to happen to the response, which fails when nothing does for too long."""
        waiter: asyncio.Future[None] = self._loop.create_future()
        self._watch(waiter)
        return waiter

    def resume_reading(self) -> None:
        """What had come has been read."""
        if self._transport is not None and not self._transport.is_reading() and not self._transport.is_closing():
            self._transport.resume_reading()

    def _begin(self, *, without_body: bool) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._head = self._loop.create_future()
        self._head.add_done_callback(_retrieved)
        self._response = None
        self._upload = None
        self._without_body = without_body
        self._head_bytes = 0

    async def _send_body(self, pieces: AsyncIterator[bytes], length: int | None) -> None:
        """Send a body of a declared length, or chunked where there is none. It is held to its length: what is too much would
        be another request to the provider, and what is missing would be taken from the next one.
        """
        sent = 0
        try:
            async for piece in pieces:
                sent += len(piece)
                if length is not None and sent > length:
                    raise _WRONG_LENGTH
                await self._drain()
                if self._transport is None or self._transport.is_closing():
                    return
                if piece:  # an empty chunk would be the end
                    self._transport.write(piece if length is not None else b"%x\r\n%b\r\n" % (len(piece), piece))
            if length is not None and sent < length:
                raise _WRONG_LENGTH
            if length is None and self._transport is not None:
                self._transport.write(b"0\r\n\r\n")
            await self._drain()
            if self._head is not None and not self._head.done():
                self._watch(self._head)
        except BaseException as error:  # the body breaks off, whatever the reason: so does the request
            self._fail(_translated(error, _UNSENT))
            if not isinstance(error, Exception):
                raise

    async def _drain(self) -> None:
        """Wait until the provider has taken what was written; it has to within the idle timeout."""
        if not self._writable.is_set():
            async with asyncio.timeout(self._idle_timeout):
                await self._writable.wait()

    # ---- the timer ----

    def _watch(self, waiting: "asyncio.Future[None] | asyncio.Future[_Response]") -> None:
        self._waiting = waiting
        self._deadline = self._loop.time() + self._idle_timeout
        if self._timer is None:
            self._timer = self._loop.call_at(self._deadline, self._look_at_the_time)

    def _look_at_the_time(self) -> None:
        self._timer = None
        if self._waiting is None or self._waiting.done():
            return
        if self._loop.time() >= self._deadline:
            what = _BROKEN_OFF if self._response is not None else _UNREACHABLE
            self._fail(UpstreamTimeout(f"{what}: no answer in time."))
        else:
            self._timer = self._loop.call_at(self._deadline, self._look_at_the_time)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # ---- asyncio's callbacks ----

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The socket, or TLS on it, is there."""
        self._transport = cast("asyncio.Transport", transport)  # a stream's: it need not be one by inheritance
        self._connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """The socket is gone."""
        response = self._response
        ends_here = exc is None and response is not None and _ends_with_connection(response.head)
        if ends_here and self._failure is None:
            self._complete()
        self._fail(_translated(exc or ConnectionError(), _UNREACHABLE if response is None else _BROKEN_OFF))
        self._stop_timer()
        if self._expiry is not None:
            self._expiry.cancel()
        self._writable.set()
        if self._upload is not None:
            self._upload.cancel()
        with suppress(ValueError):
            self._pool.remove(self)
        self._connections.discard(self)
        self._transport = None
        if not self.lost.done():
            self.lost.set_result(None)

    def pause_writing(self) -> None:
        """The provider is slow to take what is sent."""
        self._writable.clear()

    def resume_writing(self) -> None:
        """It has caught up."""
        self._writable.set()

    def data_received(self, data: bytes) -> None:
        """Bytes have come."""
        head = self._head
        if head is None:  # nobody asked
            self.abort()
            return
        if not head.done():
            self._head_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self._fail(UpstreamError(f"{_BROKEN_OFF if head.done() else _UNREACHABLE}: its answer is not HTTP."))
        if self._head_bytes > _MAX_HEAD_BYTES and not head.done():
            self._fail(UpstreamError(f"{_UNREACHABLE}: the head of its answer is too large."))

    # ---- the parser's callbacks ----

    def on_message_begin(self) -> None:
        """A head begins: of the response, or of an interim one. After the response it is one that nobody asked for."""
        self._fields = []
        if self._head is None:
            self.abort()

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header field. Trailers, which come here too, are none (RFC 9110 section 6.5.1)."""
        if self._head is None or self._head.done():
            return
        self._fields.append((name.lower(), value.rstrip(b" \t")))

    def on_headers_complete(self) -> None:
        """The head is complete."""
        status = self._parser.get_status_code()
        if status < 200 and status != 101:  # interim: the response is still to come (RFC 9110 section 15.2)
            self._head_bytes = 0
            return
        if self._head is None or self._head.done():
            return
        if status == 101:  # nobody asked for another protocol
            self._fail(UpstreamError(f"{_UNREACHABLE}: its answer is not HTTP."))
            return
        response = _Response(self, ResponseHead(status, self._fields))
        self._head.set_result(response)
        if self._tunnelling:  # a length here is to be ignored (RFC 9110 section 9.3.6): what follows is the tunnel
            return
        self._response = response
        if self._without_body:
            self._complete()

    def on_body(self, body: bytes) -> None:
        """A piece of the body."""
        if self._response is None:
            self.abort()
            return
        full = self._response.put(body)
        if full and self._transport is not None and self._transport.is_reading():
            self._transport.pause_reading()

    def on_message_complete(self) -> None:
        """The response has ended, unless it was an interim one."""
        if self._response is not None:
            self._complete()

    def _complete(self) -> None:
        response, self._response, self._head = self._response, None, None
        assert response is not None  # noqa: S101  there is no end without a beginning
        response.end(None)
        self._waiting = None
        sent = self._upload is None or self._upload.done()
        if self._transport is None or self._transport.is_closing():
            return
        if sent and self._reusable(response.head):
            self.resume_reading()
            self._stop_timer()
            self._expiry = self._loop.call_later(_KEEP_IDLE_SECONDS, self._transport.close)
            self._pool.append(self)
        elif not sent:  # nobody wants the rest of the upload
            self.abort()
        else:
            self._transport.close()

    def _reusable(self, head: ResponseHead) -> bool:
        return self._parser.should_keep_alive() and not _ends_with_connection(head)

    def _fail(self, failure: UpstreamError) -> None:
        """Tell whoever waits, and drop the connection."""
        self._failure = self._failure or failure
        if self._head is not None and not self._head.done():
            self._head.set_exception(self._failure)
        if self._response is not None:
            self._response.end(self._failure)
            self._response = None
        self._head = None
        self.abort()


def _request_head(request: UpstreamRequest, origin: _Origin, path: str) -> bytes:
    """The head as bytes. Raises ValueError where it would not be one head."""
    target = path if path.startswith("/") else "/" + path
    fields = [(b"Host", origin.authority.encode("ascii")), *request.headers]
    if origin.proxy is not None and origin.scheme == "http":
        target = f"http://{origin.authority}{target}"
    body = request.body
    if not isinstance(body, bytes):
        if _length(request.headers) is None:
            fields.append((b"transfer-encoding", b"chunked"))
    elif body or request.method not in ("GET", "HEAD", "DELETE"):
        fields.append((b"content-length", b"%d" % len(body)))
    lines = [b"%b %b HTTP/1.1" % (request.method.encode("ascii"), target.encode("latin-1"))]
    lines += [b"%b: %b" % field for field in fields]
    if not request.method.isalpha() or any(byte <= 32 or byte == 127 for byte in target.encode("latin-1")):
        raise ValueError("no method, or a target that servers might split")
    if any(b"\r" in line or b"\n" in line or b"\0" in line for line in lines):
        raise ValueError("a line break")
    proxy = _proxy_authorization(origin.proxy) if origin.scheme == "http" else b""
    return b"\r\n".join(lines) + b"\r\n" + proxy + b"\r\n"


def _length(headers: Headers) -> int | None:
    """The declared length. Raises ValueError where it is none."""
    return next((int(value) for name, value in headers if name == b"content-length"), None)


def _ends_with_connection(head: ResponseHead) -> bool:
    """Whether only the end of the connection ends the body (RFC 9112 section 6.3)."""
    chunked = any(name == b"transfer-encoding" and b"chunked" in value.lower() for name, value in head.headers)
    framed = chunked or head.content_length is not None
    return not framed and head.status not in (204, 304)


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


async def _slices(body: bytes) -> AsyncIterator[bytes]:
    view = memoryview(body)
    for start in range(0, len(view), _SLICE):
        yield bytes(view[start : start + _SLICE])


def _retrieved(future: "asyncio.Future[_Response]") -> None:
    if not future.cancelled():
        future.exception()


def _translated(error: BaseException, what: str) -> UpstreamError:
    match error:
        case UpstreamError():
            return error
        case TimeoutError():
            return UpstreamTimeout(f"{what}: no answer in time.")
        case ssl.SSLCertVerificationError():
            return UpstreamError(f"{what}: its certificate is not trusted ({error.verify_message}).")
        case ssl.SSLError():  # its errno is none of the system's
            return UpstreamError(f"{what}: TLS failed ({error.reason}).")
        case ConnectionError(errno=None):
            return UpstreamError(f"{what}: it closed the connection.")
        case OSError(errno=int(number)) if number > 0:
            return UpstreamError(f"{what}: {os.strerror(number)}.")  # its own text holds the address
        case OSError(strerror=str(reason)):
            return UpstreamError(f"{what}: {reason}.")
    return UpstreamError(f"{what}: {type(error).__name__}.")
