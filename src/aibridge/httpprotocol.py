"""One client's HTTP/1.1 connection, on httptools: turns its bytes into ASGI calls and their answers into bytes.

It stands in front of clients that nobody vouches for, so memory and time are bounded whatever they send:

- What makes no progress, a head or the trailers behind a body that do not end, is refused at twice `max_head_bytes`. The
  application checks the exact size, but it is called only when a head is complete: here memory is bounded before.
- Requests that come ahead of their turn wait in line, and nothing more is read while one does. A body is read as fast as the
  application takes it.
- A head or a body that comes too slowly is refused with 408, a connection without a request is closed after a while.
- What cannot be read is never answered in the middle of another response. A response that its application leaves unfinished
  is broken off, so that nobody can take it for a whole one.
- Trailers are dropped: they are no header fields (RFC 9110 section 6.5.1).
- A request for an upgrade is read like any other. Httptools takes a body behind it (as Java's HttpClient sends it, with
  ``Upgrade: h2c``) for another protocol, and the next request with it.
"""

import asyncio
import logging
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, Final, cast
from urllib.parse import unquote

from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser, parse_url

from aibridge.asgi import DIRECT, App, Message
from aibridge.deadlines import Deadlines
from aibridge.errors import BadRequest, BridgeError, HeadersTooLarge, RequestTimeout, error_body

logger = logging.getLogger(__name__)

_MAX_BUFFERED: Final = 256 * 1024
_LAST_WORDS_SECONDS: Final = 2.0
_FRAMING: Final = (b"content-length", b"transfer-encoding")
_BODILESS: Final = (204, 304)
_CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"
_STATUS_LINES: Final = {status.value: b"HTTP/1.1 %d %b\r\n" % (status, status.phrase.encode()) for status in HTTPStatus}
_ASGI: Final = {"version": "3.0", "spec_version": "2.3"}


@dataclass(slots=True)
class Serving:
    """What the connections of one server share. Times are in seconds, sizes in bytes."""

    app: App
    max_head_bytes: int
    keep_alive_seconds: float
    request_seconds: float
    """How long a head may take in all, and a body from one piece to the next."""
    connections: "set[HttpProtocol]" = field(default_factory=set)
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    when_empty: Callable[[], None] = lambda: None
    """Is called when the last connection has gone."""
    closing: bool = False
    deadlines: Deadlines = field(init=False)

    def __post_init__(self) -> None:
        self.deadlines = Deadlines(self.connections, min(1.0, self.request_seconds / 4))


class Exchange:
    """One request and its response: the ``receive`` and ``send`` of an ASGI call, and `aibridge.asgi.Direct`."""

    __slots__ = (
        "_asked",
        "_buffered",
        "_chunked",
        "_connection",
        "_gone",
        "_left",
        "_news",
        "_pieces",
        "_told",
        "bodiless",
        "complete",
        "disconnected",
        "keep_alive",
        "more_body",
        "scope",
        "started",
    )

    def __init__(self, connection: "HttpProtocol", scope: dict[str, Any], *, keep_alive: bool, expects: bool) -> None:
        scope[DIRECT] = self
        self.scope = scope
        self.keep_alive = keep_alive
        self.more_body = True
        self.started = False
        self.complete = False
        self.disconnected = False
        self._connection = connection
        self._pieces: list[bytes] = []
        self._buffered = 0
        self._told = False  # the application has all of the body
        self._asked = not expects  # the client need not be asked for its body
        self._news: asyncio.Event | None = None
        self._gone: Callable[[], None] | None = None
        self._chunked = False
        self._left: int | None = None
        self.bodiless = scope["method"] == "HEAD"

    @property
    def waits_to_be_asked(self) -> bool:
        """The client may still hold its body back."""
        return not self._asked and self.more_body

    async def run(self, app: App) -> None:
        """Have the application answer."""
        try:
            await app(self.scope, self.receive, self.send)
        except Exception:
            logger.exception("a request failed")
        finally:
            if not self.complete:
                self._connection.give_up(self)

    async def receive(self) -> Message:
        """The next piece of the body, or that the client has gone or has its response."""
        while True:
            if self.disconnected or self.complete:
                return {"type": "http.disconnect"}
            if self._pieces or not (self.more_body or self._told):
                break
            if not self._asked:
                self._asked = True
                self._connection.write(_CONTINUE)
            self._news = self._news or asyncio.Event()
            self._news.clear()
            await self._news.wait()
        body = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
        self._pieces.clear()
        if self._buffered > _MAX_BUFFERED:
            self._connection.read_on()
        self._buffered = 0
        self._told = not self.more_body
        return {"type": "http.request", "body": body, "more_body": self.more_body}

    async def send(self, message: Message) -> None:
        """Write a part of the response; waits while the client is slow to read. Nothing is written to one that has gone.

        Raises ValueError for a response that could not be told from another one.
        """
        if self.disconnected:
            return
        if message["type"] == "http.response.start":
            self._start(message["status"], message["headers"])
        else:
            self._write(message.get("body", b""), more=message.get("more_body", False))
        await self.caught_up()

    def write(self, data: bytes) -> bool:
        """Write a piece of the body, and do not wait."""
        if self.disconnected:
            return False
        self._write(data, more=True)
        return self._connection.drained is not None

    async def caught_up(self) -> None:
        """Wait until the client has read what was written, or has gone."""
        drained = self._connection.drained
        if drained is not None:
            await drained.wait()

    def when_gone(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Have something called when the client has gone, unless what is answered is called before."""
        self._gone = callback
        if self.disconnected:
            callback()
        return self._forget

    def put(self, piece: bytes) -> bool:
        """A piece of the body has come. Answers whether no more should for now."""
        if self.complete:  # nobody wants it any more
            return False
        self._asked = True
        self._pieces.append(piece)
        self._buffered += len(piece)
        self._wake()
        return self._buffered > _MAX_BUFFERED

    def end(self) -> None:
        """The body has ended."""
        self.more_body = False
        self._wake()

    def disconnect(self) -> None:
        """The client has gone."""
        self.disconnected = True
        self._wake()
        if self._gone is not None:
            self._gone()

    def _forget(self) -> None:
        self._gone = None

    def _wake(self) -> None:
        if self._news is not None:
            self._news.set()

    def _start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        if self.started:
            raise ValueError("a response has one start")
        lines = [_STATUS_LINES.get(status) or b"HTTP/1.1 %d \r\n" % status]
        self.bodiless = self.bodiless or status in _BODILESS
        for name, value in headers:
            if name == b"content-length":
                self._left = int(value)
            elif name == b"transfer-encoding":
                continue
            elif name == b"connection" and value.lower() == b"close":
                self.keep_alive = False
                continue
            lines.append(b"%b: %b\r\n" % (name, value))
        if self._left is None and not self.bodiless:
            if self.scope["http_version"] == "1.0":
                self.keep_alive = False  # the end of the connection is the end of the body
            else:
                self._chunked = True
                lines.append(b"transfer-encoding: chunked\r\n")
        if not self.keep_alive or self._connection.closing:
            lines.append(b"connection: close\r\n")
        head = b"".join(lines)
        if head.count(b"\n") != len(lines) or head.count(b"\r") != len(lines):
            raise ValueError("a header field of a response holds a line break")
        self.started = True
        self._connection.write(head + b"\r\n")

    def _write(self, data: bytes, *, more: bool) -> None:
        if not self.started or self.complete:
            raise ValueError("a body stands between the start and the end of a response")
        if self.bodiless:
            data = b""
        elif self._left is not None:
            self._left -= len(data)
            if self._left < 0 or (self._left and not more):
                raise ValueError("the body is not as long as declared")
        elif self._chunked:
            if data:
                data = b"%x\r\n%b\r\n" % (len(data), data)
            if not more:
                data += b"0\r\n\r\n"
        if data:
            self._connection.write(data)
        if not more:
            self.complete = True
            self._wake()
            self._connection.go_on(self)


class HttpProtocol(asyncio.Protocol):
    """One client's connection. Answers one request at a time, in their order."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving
        self._loop = asyncio.get_running_loop()
        self._parser = HttpRequestParser(self)
        self._exchange: Exchange | None = None  # that is being answered
        self._waiting: deque[Exchange] = deque()
        self._reading: Exchange | None = None  # whose body is being read
        self._reads_head = False
        self._resumes = False
        self._hung_up = False
        self._unread = 0  # received since the parser last came a step further
        self._target = b""
        self._headers: list[tuple[bytes, bytes]] = []
        self._expects = False
        self.drained: asyncio.Event | None = None
        """Set when the client has caught up with what was written; None where it has not fallen behind."""
        self.deadline = math.inf
        """When the client's patience with us, or ours with it, is over (`asyncio` time)."""

    @property
    def closing(self) -> bool:
        """This is the last response."""
        return self._serving.closing

    # ---- asyncio's callbacks ----

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client has connected."""
        self._transport = cast("asyncio.Transport", transport)
        self._serving.connections.add(self)
        self._serving.deadlines.start()
        peer = transport.get_extra_info("peername")
        here = transport.get_extra_info("sockname")
        self._client = (str(peer[0]), int(peer[1])) if isinstance(peer, tuple) else None
        self._server = (str(here[0]), int(here[1])) if isinstance(here, tuple) else None
        self._scheme = "https" if transport.get_extra_info("sslcontext") else "http"
        self._wait_for(self._serving.keep_alive_seconds)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002  why does not matter
        """The client has gone, or we have hung up."""
        self._hung_up = True
        for exchange in (self._exchange, *self._waiting):
            if exchange is not None:
                exchange.disconnect()
        self._waiting.clear()
        self.resume_writing()
        self._serving.connections.discard(self)
        if not self._serving.connections:
            self._serving.deadlines.stop()
            self._serving.when_empty()

    def eof_received(self) -> None:
        """The client has closed its side. Whether it still reads cannot be told, and the provider's work costs money."""
        if self._exchange is not None:
            self._transport.abort()

    def pause_writing(self) -> None:
        """The client is slow to read."""
        self.drained = asyncio.Event()

    def resume_writing(self) -> None:
        """It has caught up."""
        if self.drained is not None:
            self.drained.set()
            self.drained = None

    def data_received(self, data: bytes) -> None:
        """Bytes have come."""
        if self._hung_up:
            return
        self._unread += len(data)
        try:
            self._feed(data)
        except HttpParserError:
            self._refuse(BadRequest("This is not HTTP."))
        if self._unread > 2 * self._serving.max_head_bytes and not self._transport.is_closing():
            limit = self._serving.max_head_bytes
            self._refuse(HeadersTooLarge(f"The request headers are larger than {limit} bytes."))

    # ---- the parser's callbacks ----

    def on_message_begin(self) -> None:
        """A head begins."""
        self._unread = 0
        if not self._resumes:
            self._reads_head = True
            self._target = b""
            self._headers = []
            self._expects = False
            self._wait_for(self._serving.request_seconds)

    def on_url(self, url: bytes) -> None:
        """A piece of the request's target."""
        if not self._resumes:
            self._target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header field or a trailer."""
        if self._reads_head:
            name = name.lower()
            self._headers.append((name, value.rstrip(b" \t")))
            if name == b"expect" and value.lower() == b"100-continue":
                self._expects = True

    def on_headers_complete(self) -> None:
        """The head is complete."""
        self._unread = 0
        if self._resumes:
            return
        self._reads_head = False
        version = self._parser.get_http_version()
        path, query = _split_target(self._target)
        scope: dict[str, Any] = {
            "type": "http",
            "asgi": _ASGI,
            "http_version": version,
            "method": self._parser.get_method().decode("ascii"),
            "scheme": self._scheme,
            "path": unquote(path.decode("latin-1")),
            "raw_path": path,
            "query_string": query,
            "root_path": "",
            "headers": self._headers,
            "client": self._client,
            "server": self._server,
        }
        keep_alive = version != "1.0" and self._parser.should_keep_alive()
        self._reading = Exchange(self, scope, keep_alive=keep_alive, expects=self._expects)
        if self._exchange is None:
            self._answer(self._reading)
        else:
            self._waiting.append(self._reading)
            self._transport.pause_reading()
            self._wait_for(math.inf)

    def on_body(self, body: bytes) -> None:
        """A piece of the body."""
        self._unread = 0
        if self._reading is not None and self._reading.put(body):
            self._transport.pause_reading()
            self._wait_for(math.inf)
        else:
            self._wait_for(self._serving.request_seconds)

    def on_message_complete(self) -> None:
        """The request is complete, unless httptools only thinks so because of an upgrade."""
        self._unread = 0
        if not self._parser.should_upgrade() and self._reading is not None:
            self._reading.end()
            self._reading = None
            self._wait_for(math.inf if self._exchange is not None else self._serving.keep_alive_seconds)

    # ---- called by exchanges ----

    def write(self, data: bytes) -> None:
        """Write to the client."""
        self._transport.write(data)

    def read_on(self) -> None:
        """The application has taken what it was sent of the body."""
        if not (self._waiting or self._transport.is_closing()):
            self._transport.resume_reading()
            if self._reading is not None:
                self._wait_for(self._serving.request_seconds)

    def go_on(self, exchange: Exchange) -> None:
        """A response is complete: the next request, if the connection lasts."""
        if exchange.waits_to_be_asked or (exchange.more_body and not exchange.keep_alive):
            self._hang_up()  # what comes next could be the body or a request
        elif not exchange.keep_alive or self._serving.closing:
            self._transport.close()
        elif self._waiting:
            self._answer(self._waiting.popleft())
            self.read_on()
        else:
            self._exchange = None
            if self._reading is None:
                self._wait_for(self._serving.keep_alive_seconds)
            self.read_on()

    def give_up(self, exchange: Exchange) -> None:
        """The application has left its response unfinished."""
        if exchange.disconnected:
            return
        if exchange.started:
            self._hung_up = True
            self._transport.abort()
        else:
            self._write_error(BridgeError("The gateway failed."))
            exchange.disconnected = True
            self._hang_up()

    # ---- called by the server ----

    def shut(self) -> None:
        """Close the connection, after the response that is under way."""
        if self._exchange is None:
            self._transport.close()

    def abort(self) -> None:
        """Drop the connection."""
        self._transport.abort()

    def expire(self) -> None:
        """The deadline has passed."""
        self._wait_for(self._serving.request_seconds)
        if self._reading is None and not self._reads_head:
            self._transport.close()
        elif self._reading is not None or self._exchange is None:  # else it is the next request that has only begun
            self._refuse(RequestTimeout("The request did not come in time."))

    # ---- inside ----

    def _wait_for(self, seconds: float) -> None:
        self.deadline = self._loop.time() + seconds

    def _answer(self, exchange: Exchange) -> None:
        self._exchange = exchange
        task = self._loop.create_task(exchange.run(self._serving.app))
        self._serving.tasks.add(task)
        task.add_done_callback(self._serving.tasks.discard)

    def _feed(self, data: bytes) -> None:
        while data:
            try:
                self._parser.feed_data(data)
            except HttpParserUpgrade as upgrade:
                data = data[upgrade.args[0] :]
                self._ignore_upgrade()
            else:
                return

    def _ignore_upgrade(self) -> None:
        """Read on with a parser that knows how the body is framed, but not of the upgrade."""
        framing = (name + b": " + value + b"\r\n" for name, value in self._headers if name in _FRAMING)
        self._parser = HttpRequestParser(self)
        self._resumes = True
        self._parser.feed_data(b"POST / HTTP/1.1\r\n%b\r\n" % b"".join(framing))
        self._resumes = False

    def _refuse(self, error: BridgeError) -> None:
        """Answer what cannot be read, unless a response is under way."""
        exchange = self._exchange
        if exchange is not None and not exchange.complete:
            if self._waiting or exchange.started:
                self._hung_up = True
                self._transport.abort()
                return
            exchange.disconnect()
        self._write_error(error)
        self._hang_up()

    def _write_error(self, error: BridgeError) -> None:
        body = error_body("openai", error.status, error.message)
        self._transport.write(
            b"%bcontent-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n%b"
            % (_STATUS_LINES[error.status], len(body), body)
        )

    def _hang_up(self) -> None:
        """Say nothing more and read nothing more, but give the client a moment to read what was said."""
        self._hung_up = True
        if not self._transport.is_closing():
            self._transport.resume_reading()  # what is on its way is thrown away
            self._transport.write_eof()
            self._loop.call_later(_LAST_WORDS_SECONDS, self._transport.abort)


def _split_target(target: bytes) -> tuple[bytes, bytes]:
    """Path and query, percent-encoded as they are. Raises HttpParserError for what is no target of a request to a server."""
    if not target.startswith(b"/"):
        if target == b"*":
            return target, b""
        found = parse_url(target)  # clients that take us for a proxy send all of the URL (RFC 9112 section 3.2.2)
        if not found.schema:
            raise HttpParserError("a target without a path")
        return found.path or b"/", found.query or b""
    path, _, query = target.partition(b"?")
    return path, query
