"""One HTTP/1.1 connection to a provider, on httptools: sends a request, reads its response as it comes.

A request goes out as it is given, byte for byte. What one read of the socket brings of a body is passed on as one piece, and
while somebody lets it `flow`, from here. What goes wrong takes the connection with it, and is told as `UpstreamError` or
`UpstreamTimeout` to whoever waits.
"""

import asyncio
import math
import select
import ssl
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Final, cast

import httptools

from aibridge.errors import Unfinished, Unsendable, UpstreamError, UpstreamTimeout
from aibridge.upstream import UpstreamRequest
from aibridge.upstreamerrors import BROKEN_OFF, UNANSWERED, UNREACHABLE, UNSENT, UNTAKEN, late, translated
from aibridge.wire.base import Headers
from aibridge.wire.observer import ResponseHead

_WRONG_LENGTH: Final = Unsendable(f"{UNSENT}: its body is not as long as declared.")

# Providers and the load balancers before them close idle connections after a minute or more; we do so earlier.
_KEEP_IDLE_SECONDS: Final = 15.0
# Reading stops when this much of a body waits to be read, so that a slow client slows the provider down.
_MAX_BUFFERED: Final = 128 * 1024
_MAX_HEAD_BYTES: Final = 128 * 1024
# A body as clients send it with each turn of a long conversation is written at once. A larger one goes in slices, each of
# which waits for the one before it.
_AT_ONCE: Final = 1024 * 1024
_SLICE: Final = 256 * 1024


class Response:
    """A response under way. Belongs to its connection until it is complete."""

    def __init__(self, connection: "Connection", head: ResponseHead) -> None:
        self.head = head
        self._connection: Connection | None = connection
        self._pieces: list[bytes] = []
        self._buffered = 0
        self._failure: UpstreamError | None = None
        self._waiter: asyncio.Future[bool] | None = None
        self._take: Callable[[bytes], bool] | None = None

    @property
    def is_awaited(self) -> bool:
        """Somebody waits for more."""
        return self._waiter is not None

    async def read(self) -> bytes:
        """The next bytes of the body."""
        while not self._pieces:
            if self._is_over():
                return b""
            await self._news()
        return self._taken()

    async def flow(self, take: Callable[[bytes], bool]) -> bool:
        """Pass the bytes of the body on as they come."""
        while True:
            if self._pieces:
                if take(self._taken()):
                    return False
            elif self._is_over():
                return True
            else:
                self._take = take
                if await self._news():
                    return False

    def close(self) -> None:
        """Let go of the response."""
        if self._connection is not None:
            self._connection.abort()

    # ---- called by the connection ----

    def put(self, piece: bytes) -> bool:
        """The next piece has come. Answers whether no more should, until this one has been read."""
        if self._take is not None and not self._pieces:
            self._pass_on(self._take, piece)
            return False
        self._pieces.append(piece)
        self._buffered += len(piece)
        self._wake(enough=False)
        return self._buffered > _MAX_BUFFERED

    def end(self, failure: UpstreamError | None) -> None:
        """The body has ended, or will never."""
        self._failure = failure
        self._connection = None
        self._wake(enough=False)

    # ---- inside ----

    def _is_over(self) -> bool:
        if self._failure is not None:
            raise self._failure
        return self._connection is None

    async def _news(self) -> bool:
        """Wait until there is something to do. Answers whether `take` has had enough."""
        assert self._connection is not None  # noqa: S101  it is not over
        self._waiter = self._connection.waiter()
        try:
            return await self._waiter
        finally:
            self._waiter = self._take = None

    def _pass_on(self, take: Callable[[bytes], bool], piece: bytes) -> None:
        try:
            enough = take(piece)
        except Exception as error:  # noqa: BLE001  it is for who waits, and not for the event loop
            self._take = None
            if self._waiter is not None and not self._waiter.done():
                self._waiter.set_exception(error)
        else:
            if enough:
                self._wake(enough=True)

    def _wake(self, *, enough: bool) -> None:
        self._take = None
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(enough)

    def _taken(self) -> bytes:
        data = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
        self._pieces.clear()
        self._buffered = 0
        if self._connection is not None:
            self._connection.resume_reading()
        return data


class Connection(asyncio.Protocol):
    """One socket. Reads one response at a time."""

    def __init__(
        self,
        first_byte_timeout: float,
        idle_timeout: float,
        pool: "deque[Connection]",
        connections: "set[Connection]",
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self.lost: asyncio.Future[None] = self._loop.create_future()
        self._first_byte_timeout = first_byte_timeout
        self._idle_timeout = idle_timeout
        self._pool = pool
        self._connections = connections
        self._transport: asyncio.Transport | None = None
        self._writable = asyncio.Event()
        self._writable.set()
        self._upload: asyncio.Task[None] | None = None
        self._head: asyncio.Future[Response | UpstreamError] | None = None
        self._response: Response | None = None
        self._without_body = False
        self._tunnelling = False
        self._failure: UpstreamError | None = None
        self.deadline = math.inf
        """When the provider must have said something, or an idle connection ends (the event loop's time)."""
        self._poll = select.poll()
        self._fields: list[tuple[bytes, bytes]] = []
        self._body: list[bytes] = []  # what the read under way has brought of it
        self.on_body = self._body.append  # called by the parser; in a burst for each of hundreds of chunks
        self._head_bytes = 0
        self._parser = httptools.HttpResponseParser(self)

    # ---- exchanges ----

    async def exchange(self, request: UpstreamRequest, head: bytes) -> Response:
        """Send a request and wait for the head of its response. What goes wrong takes the connection with it."""
        assert self._transport is not None  # noqa: S101  connected
        self._begin(without_body=request.method == "HEAD")
        body = request.body
        assert self._head is not None  # noqa: S101  _begin made it
        awaited = self._head
        try:
            if isinstance(body, bytes) and len(body) <= _AT_ONCE:
                self._transport.writelines((head, body))
                self._expect_head()
            else:
                self._transport.write(head)
                pieces, length = (
                    (_slices(body), len(body)) if isinstance(body, bytes) else (body, declared_length(request.headers))
                )
                self._upload = self._loop.create_task(self._send_body(pieces, length))
            found = await awaited
        except BaseException:
            if self._head is awaited:  # else the exchange has ended, and the connection may be somebody else's by now
                self.abort()
            raise
        if isinstance(found, UpstreamError):
            raise found
        return found

    async def tunnel(self, host: str, port: int, authorization: bytes, tls: ssl.SSLContext) -> None:
        """Have the proxy at the other end connect through to a host, and speak TLS from there on.

        `authorization` is the header line for the proxy, or empty. Raises OSError or `UpstreamError`.
        """
        assert self._transport is not None  # noqa: S101  connected
        self._begin(without_body=False)
        self._tunnelling = True
        assert self._head is not None  # noqa: S101  _begin made it
        authority = f"{bracketed(host)}:{port}".encode()
        self._transport.write(b"CONNECT %b HTTP/1.1\r\nHost: %b\r\n%b\r\n" % (authority, authority, authorization))
        response = await self._head
        if isinstance(response, UpstreamError):
            raise response
        if not response.head.ok:
            raise UpstreamError(f"{UNREACHABLE}: the proxy answers with HTTP {response.head.status}.")
        plain = self._transport
        try:
            transport = await self._loop.start_tls(plain, self, tls, server_hostname=host)
            if transport is None or plain.is_closing():
                raise UpstreamError(f"{UNREACHABLE}: it closed the connection.")
        except BaseException:
            self.give_up()  # a protocol whose handshake was broken off is not always told either
            raise
        self._transport = transport
        self._head, self._tunnelling = None, False
        self.deadline = math.inf

    def usable(self) -> bool:
        """Whether an idle connection can be used: not where the provider has closed it, or sent what nobody asked for."""
        if self._transport is None or self._transport.is_closing():
            return False
        if self._poll.poll(0):
            self.abort()
            return False
        return True

    def abort(self) -> None:
        """Drop the connection at once."""
        self._failure = self._failure or UpstreamError(f"{BROKEN_OFF}: it was dropped.")
        if self._transport is not None:
            self._transport.abort()

    def give_up(self) -> None:
        """Drop the connection before it was used.

        uvloop closes the transport of a connection that is given up while it comes about, and does not tell its protocol.
        """
        self.abort()
        self.connection_lost(None)

    def waiter(self) -> "asyncio.Future[bool]":
        """A future for the next thing to happen to the response, which ends when nothing does for too long."""
        self._expect_news()
        return self._loop.create_future()

    def resume_reading(self) -> None:
        """What had come has been read."""
        if self._transport is not None and not self._transport.is_reading() and not self._transport.is_closing():
            self._transport.resume_reading()

    def _begin(self, *, without_body: bool) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._head = self._loop.create_future()
        self._response = None
        self._upload = None
        self._body.clear()
        self.deadline = math.inf
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
            if self._head is not None:
                (self._expect_news if self._head.done() else self._expect_head)()
        except BaseException as error:  # the body breaks off, whatever the reason: so does the request
            failure = translated(error, UNTAKEN if isinstance(error, TimeoutError) else UNSENT)
            self._fail(failure if isinstance(failure, UpstreamTimeout) else Unsendable(failure.message))
            if not isinstance(error, Exception):
                raise

    async def _drain(self) -> None:
        """Wait until the provider has taken what was written; it has to within the idle timeout."""
        if not self._writable.is_set():
            async with asyncio.timeout(self._idle_timeout):
                await self._writable.wait()

    # ---- time ----

    def _expect_head(self) -> None:
        self.deadline = self._loop.time() + self._first_byte_timeout

    def _expect_news(self) -> None:
        self.deadline = self._loop.time() + self._idle_timeout

    def expire(self) -> None:
        """Nothing has come for too long, or nobody has used the connection."""
        self.deadline = math.inf
        if self._head is None and self._transport is not None:
            self._transport.close()
        elif self._upload is not None and not self._upload.done():
            pass  # the provider may wait for the rest of it, which has a time of its own
        elif self._response is None or self._response.is_awaited:
            self._fail(late(self._reached))

    # ---- asyncio's callbacks ----

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The socket, or TLS on it, is there."""
        if self.lost.done():  # nobody waits for it any more
            cast("asyncio.Transport", transport).abort()
            return
        self._transport = cast("asyncio.Transport", transport)  # a stream's: it need not be one by inheritance
        self._connections.add(self)
        self._poll.register(transport.get_extra_info("socket").fileno(), select.POLLIN)

    def connection_lost(self, exc: Exception | None) -> None:
        """The socket is gone."""
        response = self._response
        ends_here = exc is None and response is not None and _ends_with_connection(response.head)
        if ends_here and self._failure is None:
            self._complete()
        reached = self._reached
        failure = translated(exc or ConnectionError(), reached)
        self._fail(Unfinished(failure.message) if reached == UNTAKEN else failure)
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
        else:
            self.deadline = self._loop.time() + self._idle_timeout
        try:
            self._parser.feed_data(data)
            if self._body:
                self._deliver()
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            if self._body:
                self._deliver()
            self._fail(UpstreamError(f"{self._reached}: what it sent is not HTTP."))
        if self._head_bytes > _MAX_HEAD_BYTES and not head.done():
            self._fail(UpstreamError(f"{self._reached}: the head of what it sent is too large."))

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
            self._fail(UpstreamError(f"{self._reached}: what it sent is not HTTP."))
            return
        response = Response(self, ResponseHead(status, self._fields))
        self._head.set_result(response)
        if self._tunnelling:  # a length here is to be ignored (RFC 9110 section 9.3.6): what follows is the tunnel
            return
        self._response = response
        if self._without_body:
            self._complete()

    def on_message_complete(self) -> None:
        """The response has ended, unless it was an interim one."""
        if self._body:
            self._deliver()
        if self._response is not None:
            self._complete()

    def _deliver(self) -> None:
        """Pass on what the read under way has brought of the body."""
        piece = self._body[0] if len(self._body) == 1 else b"".join(self._body)
        self._body.clear()
        if self._response is None:
            self.abort()
        elif self._response.put(piece) and self._transport is not None and self._transport.is_reading():
            self._transport.pause_reading()

    @property
    def _reached(self) -> str:
        """How far the exchange has come."""
        if self._response is not None:
            return BROKEN_OFF
        if self._head is None or self._tunnelling:  # a proxy's answer is none of the provider's
            return UNREACHABLE
        return UNANSWERED if self._upload is None or self._upload.done() else UNTAKEN

    def _complete(self) -> None:
        response, self._response, self._head = self._response, None, None
        assert response is not None  # noqa: S101  there is no end without a beginning
        response.end(None)
        if self._transport is None or self._transport.is_closing():
            return
        sent = (self._upload is None or self._upload.done()) and not self._transport.get_write_buffer_size()
        if sent and self._reusable(response.head):
            self.resume_reading()
            self.deadline = self._loop.time() + _KEEP_IDLE_SECONDS
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
            self._head.set_result(self._failure)
        if self._response is not None:
            self._response.end(self._failure)
            self._response = None
        self._head = None
        self.abort()


def bracketed(host: str) -> str:
    """A host as it stands before a port."""
    return f"[{host}]" if ":" in host else host


def declared_length(headers: Headers) -> int | None:
    """The declared length. Raises ValueError where it is none."""
    return next((int(value) for name, value in headers if name == b"content-length"), None)


def _ends_with_connection(head: ResponseHead) -> bool:
    """Whether only the end of the connection ends the body (RFC 9112 section 6.3)."""
    chunked = any(name == b"transfer-encoding" and b"chunked" in value.lower() for name, value in head.headers)
    framed = chunked or head.content_length is not None
    return not framed and head.status not in (204, 304)


async def _slices(body: bytes) -> AsyncIterator[bytes]:
    view = memoryview(body)
    for start in range(0, len(view), _SLICE):
        yield bytes(view[start : start + _SLICE])
