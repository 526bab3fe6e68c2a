"""One client's HTTP/1.1 connection, on httptools: turns its bytes into ASGI calls, each an `aibridge.httpexchange.Exchange`.

It stands in front of clients that nobody vouches for, so memory and time are bounded whatever they send:

- What makes no progress, a head or the trailers behind a body that do not end, is refused at twice `max_head_bytes`. The
  application checks the exact size, but it is called only when a head is complete: here memory is bounded before.
- Requests that come ahead of their turn wait in line, and nothing more is read while one does. A body is read as fast as the
  application takes it.
- A head or a body that comes too slowly is refused with 408, a connection without a request is closed after a while. Only
  the client's time counts: not while we do not read, and not while it waits to be asked for its body.
- A client that reads nothing of what was written for too long is dropped. What its application is told is that it has gone.
- What cannot be read is refused in its turn, once, and is the last that is answered: where it ends cannot be told. What was
  complete before it is answered as ever. A response that its application leaves unfinished is broken off, so that nobody can
  take it for a whole one.
- What two readers could read in two ways is refused: how requests are smuggled past one of them (RFC 9112 section 11.2).
  Httptools does most of that. We add transfer codings other than chunked, any in HTTP/1.0, more than one Host, fragments.
- Trailers are dropped: they are no header fields (RFC 9110 section 6.5.1).
- A request for an upgrade is read like any other. Httptools takes a body behind it (as Java's HttpClient sends it, with
  ``Upgrade: h2c``) for another protocol, and the next request with it.
"""

import asyncio
import math
import select
import socket
import struct
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, cast
from urllib.parse import unquote

from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser, parse_url

from aibridge.asgi import App
from aibridge.deadlines import Deadlines
from aibridge.errors import SHUTDOWN, BadRequest, BridgeError, HeadersTooLarge, ProviderKind, RequestTimeout, error_body
from aibridge.httpexchange import STATUS_LINES, Exchange
from aibridge.unread import Unread

_LAST_WORDS_SECONDS: Final = 2.0
_LAST_IDLE_SECONDS: Final = 1.0
_MAX_WAITING: Final = 1000  # each takes a kilobyte, and can be sent in 26 bytes
_FRAMING: Final = (b"content-length", b"transfer-encoding")
_TELLING: Final = frozenset({b"host", b"expect", b"transfer-encoding"})
_VERSIONS: Final = frozenset({"1.0", "1.1"})
_CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"
_ASGI: Final = {"version": "3.0", "spec_version": "2.3"}


@dataclass(slots=True)
class Serving:
    """What the connections of one server share. Times are in seconds, sizes in bytes."""

    app: App
    max_head_bytes: int
    keep_alive_seconds: float
    request_seconds: float
    """How long a head may take in all, and a body from one piece to the next."""
    write_seconds: float
    """How long a client may read nothing of what was written."""
    kind_of: Callable[[str], ProviderKind]
    """How an error must look to who has asked for a path, percent-encoded."""
    refused: Callable[[BridgeError, str, str], None] = lambda *_: None
    """Is told of what is refused here, before there is a request for the application or in its place: the error, the path,
    and the client's address. Either is empty where it is not known."""
    connections: "set[HttpProtocol]" = field(default_factory=set)
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    when_over: Callable[[], None] = lambda: None
    """Is called when the last connection has gone, and while the server is stopping, when a call has ended."""
    closing: bool = False
    """Each response that begins is the last one of its connection."""
    stopping: bool = False
    """Nobody new is let in."""
    unread: set[Unread] = field(default_factory=set)
    deadlines: Deadlines = field(init=False)
    write_deadlines: Deadlines = field(init=False)

    def __post_init__(self) -> None:
        self.deadlines = Deadlines(self.connections, min(1.0, self.request_seconds / 4))
        self.write_deadlines = Deadlines(self.unread, min(1.0, self.write_seconds / 4))

    @property
    def idle_seconds(self) -> float:
        """How long a connection may be without a request.

        At the end that is a moment: a connection that is in use is asked for something within it, gets to know with the
        answer that there are no more, and nobody's request is cut off.
        """
        return min(_LAST_IDLE_SECONDS, self.keep_alive_seconds) if self.stopping else self.keep_alive_seconds

    def stop(self) -> None:
        """Let nobody new in, and answer what is under way and what comes within a moment."""
        self.closing = self.stopping = True
        self.deadlines.stop()
        self.deadlines = Deadlines(self.connections, _LAST_IDLE_SECONDS / 10)
        self.deadlines.start()
        for connection in list(self.connections):
            connection.shut()

    def answered(self, task: asyncio.Task[None]) -> None:
        """A call of the application is over."""
        self.tasks.discard(task)
        if self.stopping:
            self.when_over()


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
        self._deaf = False  # what still comes is thrown away
        self._refusal: BridgeError | None = None  # behind the responses that are owed
        self._hung_up = False  # all was said
        self._unread = 0  # received since the parser last came a step further
        self._unread_by_client: Unread | None = None
        self._target = b""
        self._headers: list[tuple[bytes, bytes]] = []
        self._hosts = 0
        self._chunked = False
        self._expects = False
        self.drained: asyncio.Event | None = None
        """Set when the client has caught up with what was written; None where it has not fallen behind."""
        self.deadline = math.inf
        """When the client's patience with us, or ours with it, is over (`asyncio` time)."""

    @property
    def closing(self) -> bool:
        """The response that begins now is the last one: nothing that has come by now waits behind it."""
        return self._serving.closing and not self._waiting

    # ---- asyncio's callbacks ----

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client has connected."""
        self._transport = cast("asyncio.Transport", transport)
        self.write = self._transport.write
        self._serving.connections.add(self)
        self._serving.deadlines.start()
        peer = transport.get_extra_info("peername")
        here = transport.get_extra_info("sockname")
        self._client = (str(peer[0]), int(peer[1])) if isinstance(peer, tuple) else None
        self._server = (str(here[0]), int(here[1])) if isinstance(here, tuple) else None
        self._scheme = "https" if transport.get_extra_info("sslcontext") else "http"
        self._wait_for(self._serving.idle_seconds)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002  why does not matter
        """The client has gone, or we have hung up."""
        self._deaf = self._hung_up = True
        for exchange in (self._exchange, *self._waiting):
            if exchange is not None:
                exchange.disconnect()
        self._waiting.clear()
        self.resume_writing()
        self._serving.connections.discard(self)
        if not self._serving.connections:
            self._serving.deadlines.stop()
            self._serving.write_deadlines.stop()
            self._serving.when_over()

    def eof_received(self) -> None:
        """The client has closed its side. Whether it still reads cannot be told, and the provider's work costs money."""
        if self._exchange is not None and not self._hung_up:
            self._transport.abort()

    def pause_writing(self) -> None:
        """The client is slow to read."""
        self.drained = asyncio.Event()
        self._watch_reader()

    def resume_writing(self) -> None:
        """It has caught up."""
        if self._unread_by_client is not None:
            self._unread_by_client.forget()
            self._unread_by_client = None
        if self.drained is not None:
            self.drained.set()
            self.drained = None

    def data_received(self, data: bytes) -> None:
        """Bytes have come."""
        if self._deaf:
            return
        self._unread += len(data)
        try:
            self._feed(data)
        except HttpParserError as error:
            if not self._deaf:
                cause = error.__context__
                self._refuse(cause if isinstance(cause, BridgeError) else BadRequest("This is not HTTP."))
        if self._unread > 2 * self._serving.max_head_bytes and not self._deaf:
            limit = self._serving.max_head_bytes
            self._refuse(HeadersTooLarge(f"The request headers are larger than {limit} bytes."))

    # ---- the parser's callbacks: what they raise ends the parser's work, and is the context of its error ----

    def on_message_begin(self) -> None:
        """A head begins."""
        self._unread = 0
        if self._deaf:
            raise BadRequest("A request follows the last one.")
        if not self._resumes:
            self._reads_head = True
            self._target = b""
            self._headers = []
            self._hosts = 0
            self._chunked = False
            self._expects = False
            self._wait_for(self._serving.request_seconds)

    def on_url(self, url: bytes) -> None:
        """A piece of the request's target."""
        if not self._resumes:
            self._target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header field or a trailer."""
        if self._reads_head:
            name, value = name.lower(), value.rstrip(b" \t")
            self._headers.append((name, value))
            if name in _TELLING:
                self._note(name, value.lower())

    def on_headers_complete(self) -> None:
        """The head is complete."""
        self._unread = 0
        if self._resumes:
            return
        self._reads_head = False
        version = self._parser.get_http_version()
        method = self._parser.get_method().decode("ascii")
        self._check_head(method, version)
        path, query = _split_target(self._target)
        scope: dict[str, Any] = {
            "type": "http",
            "asgi": _ASGI,
            "http_version": version,
            "method": method,
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
            self._wait_for(math.inf if self._expects else self._serving.request_seconds)
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
            self._wait_for(math.inf if self._waiting else self._serving.request_seconds)

    def on_message_complete(self) -> None:
        """The request is complete, unless httptools only thinks so because of an upgrade."""
        self._unread = 0
        if not self._parser.should_upgrade() and self._reading is not None:
            self._reading.end()
            self._deaf = self._deaf or not self._reading.keep_alive  # nothing is read behind the last request
            self._reading = None
            self._wait_for(math.inf if self._exchange is not None else self._serving.idle_seconds)

    # ---- called by exchanges ----

    def ask(self, exchange: Exchange) -> bool:
        """The application waits for a body that its client may hold back. Answers whether the client was asked for it."""
        self._wait_for(self._serving.request_seconds)
        if exchange.started:  # what asks would be taken for a part of the response
            return False
        self._transport.write(_CONTINUE)
        return True

    def read_on(self) -> None:
        """The application has taken what it was sent of the body."""
        if not (self._waiting or self._transport.is_closing()):
            self._transport.resume_reading()
            if self._reading is not None:
                self._wait_for(math.inf if self._reading.waits_to_be_asked else self._serving.request_seconds)

    def go_on(self, exchange: Exchange) -> None:
        """A response is complete: the next request, if the connection lasts."""
        if exchange.waits_to_be_asked or (exchange.more_body and not exchange.keep_alive):
            self._hang_up()  # what comes next could be the body or a request
        elif not exchange.keep_alive:
            self._end()
        elif self._waiting:
            self._answer(self._waiting.popleft())
            self.read_on()
        elif self._refusal is not None:
            self._say(self._refusal)
        else:
            self._exchange = None
            idle = self._reading is None and not self._reads_head
            self._wait_for(self._serving.idle_seconds if idle else self._serving.request_seconds)
            self.read_on()

    def give_up(self, exchange: Exchange) -> None:
        """The application has left its response unfinished."""
        if exchange.disconnected:
            return
        if exchange.started:
            self._break_off(exchange)
        else:
            exchange.disconnected = True
            self._say(SHUTDOWN if self._serving.stopping else BridgeError("The gateway failed."), exchange)

    # ---- called by the server ----

    def shut(self) -> None:
        """Close the connection soon. What comes within a moment is answered, as the last."""
        if self._exchange is None and not self._hung_up:
            self._wait_for(self._serving.idle_seconds)

    def abort(self) -> None:
        """Drop the connection."""
        self._transport.abort()

    def expire(self) -> None:
        """The deadline has passed."""
        self._wait_for(self._serving.request_seconds)
        if self._transport.is_closing():
            return
        if self._hung_up:
            if not self._transport.get_write_buffer_size():
                self._transport.abort()
        elif self._reading is None and not self._reads_head:
            if not self._has_mail():
                self._close()
        elif self._reading is not None or self._exchange is None:  # else it is the next request that has only begun
            self._refuse(RequestTimeout("The request did not come in time."))

    # ---- inside ----

    def _wait_for(self, seconds: float) -> None:
        self.deadline = self._loop.time() + seconds

    def _has_mail(self) -> bool:
        """Whether something has come that we have not read yet: a request that is as early is not cut off."""
        poll = select.poll()
        poll.register(self._transport.get_extra_info("socket").fileno(), select.POLLIN)
        return bool(poll.poll(0))

    def _answer(self, exchange: Exchange) -> None:
        self._exchange = exchange
        task = self._loop.create_task(exchange.run(self._serving.app))
        self._serving.tasks.add(task)
        task.add_done_callback(self._serving.answered)

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

    def _note(self, name: bytes, value: bytes) -> None:
        """A field of the head that says how to read the rest."""
        match name:
            case b"host":
                self._hosts += 1
            case b"expect":
                self._expects = value == b"100-continue"
            case _:
                if self._chunked or value != b"chunked":
                    raise BadRequest("The transfer coding is not supported.")
                self._chunked = True

    def _check_head(self, method: str, version: str) -> None:
        """Raises BadRequest for what others may read in another way."""
        if method == "CONNECT":  # what follows its response is a tunnel (RFC 9110 section 9.3.6)
            raise BadRequest("This is no proxy.")
        if version not in _VERSIONS:
            raise BadRequest("The HTTP version is not supported.")
        if self._hosts != 1 and (self._hosts or version == "1.1"):  # RFC 9112 section 3.2
            raise BadRequest("A request names one host.")
        if version == "1.0":
            self._expects = False  # RFC 9110 section 10.1.1
            if self._chunked:  # RFC 9112 section 6.1
                raise BadRequest("HTTP/1.0 has no transfer codings.")
        if len(self._waiting) >= _MAX_WAITING:
            raise BadRequest("Too many requests wait for their turn.")

    def _refuse(self, error: BridgeError) -> None:
        """Answer what cannot be read, in its turn."""
        self._deaf = True
        broken, self._reading = self._reading, None
        if self._waiting and self._waiting[-1] is broken:
            self._waiting.pop()
            broken = None
        if broken is None:
            if self._exchange is None:
                self._say(error)
            else:
                self._refusal = error
                self._wait_for(math.inf)
        elif broken.complete:  # it has its answer
            self._hang_up()
        elif broken.started:
            self._break_off(broken)
        else:
            broken.disconnect()
            self._say(error, broken)

    def _say(self, error: BridgeError, exchange: Exchange | None = None) -> None:
        """Answer with an error of our own, and hang up. Without an exchange it is about the head that came last."""
        path = self._target.partition(b"?")[0] if exchange is None else exchange.scope["raw_path"]
        asked_for = path.decode("latin-1")
        self._serving.refused(error, asked_for, "" if self._client is None else self._client[0])
        body = error_body(self._serving.kind_of(asked_for), error.status, error.message)
        bodiless = exchange is not None and exchange.bodiless
        self._transport.write(
            b"%bcontent-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n%b"
            % (STATUS_LINES[error.status], len(body), b"" if bodiless else body)
        )
        self._hang_up()

    def _end(self) -> None:
        """Close the connection behind its last response.

        What is still unread would make the system reset it, and the client lose what it has not read (RFC 9112 section 9.6).
        A client that did not say itself that this is its last request may have sent another one by now.
        """
        if self._waiting or self._serving.closing:
            self._hang_up()
        else:
            self._close()

    def _close(self) -> None:
        """Close the connection when the client has read everything."""
        self._transport.close()
        self._watch_reader()

    def _hang_up(self) -> None:
        """Say nothing more and read nothing more, but give the client a moment to read what was said."""
        self._deaf = self._hung_up = True
        if not self._transport.is_closing():
            self._transport.resume_reading()  # what is on its way is thrown away
            self._transport.write_eof()
            self._wait_for(_LAST_WORDS_SECONDS)
            self._watch_reader()

    def _watch_reader(self) -> None:
        if self._unread_by_client is None and self._transport.get_write_buffer_size():
            self._unread_by_client = Unread(self._transport, self._serving.unread, self._serving.write_seconds)
            self._serving.write_deadlines.start()

    def _break_off(self, exchange: Exchange) -> None:
        """Drop the connection in the middle of a response."""
        self._deaf = self._hung_up = True
        if not exchange.framed:  # the end of the connection would be its end, unless it is a reset
            sock = self._transport.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._transport.abort()


def _split_target(target: bytes) -> tuple[bytes, bytes]:
    """Path and query, percent-encoded as they are. Raises BadRequest or HttpParserError for what names no resource."""
    if b"#" in target:
        raise BadRequest("A target has no fragment.")
    if not target.startswith(b"/"):
        if target == b"*":
            return target, b""
        found = parse_url(target)  # clients that take us for a proxy send all of the URL (RFC 9112 section 3.2.2)
        if not found.schema:
            raise BadRequest("A target has a path.")
        return found.path or b"/", found.query or b""
    path, _, query = target.partition(b"?")
    return path, query
