"""One request and its response on a client's connection: an ASGI call, and what it answers as HTTP/1.1 (RFC 9112)."""

import asyncio
import logging
from collections.abc import Callable
from http import HTTPStatus
from typing import Any, Final, Protocol

from aibridge.asgi import DIRECT, App, Message
from aibridge.wire.base import Headers

logger = logging.getLogger(__name__)

STATUS_LINES: Final = {status.value: b"HTTP/1.1 %d %b\r\n" % (status, status.phrase.encode()) for status in HTTPStatus}

_MAX_BUFFERED: Final = 256 * 1024
_BODILESS: Final = (204, 304)


class Connection(Protocol):
    """What an exchange needs of its connection."""

    drained: asyncio.Event | None
    """Set when the client has caught up with what was written; None where it has not fallen behind."""

    @property
    def closing(self) -> bool:
        """The response that begins now is the last one."""

    @property
    def write(self) -> Callable[[bytes], None]:
        """Writes to the client."""

    def ask(self, exchange: "Exchange") -> bool:
        """The application waits for a body that its client may hold back. Answers whether the client was asked for it."""

    def read_on(self) -> None:
        """The application has taken what it was sent of the body."""

    def go_on(self, exchange: "Exchange") -> None:
        """A response is complete: the next request, if the connection lasts."""

    def give_up(self, exchange: "Exchange") -> None:
        """The application has left its response unfinished."""


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

    def __init__(self, connection: "Connection", scope: dict[str, Any], *, keep_alive: bool, expects: bool) -> None:
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

    @property
    def framed(self) -> bool:
        """A client can tell whether it has all of the response."""
        return self.bodiless or self._chunked or self._left is not None

    async def run(self, app: App) -> None:
        """Have the application answer."""
        if self.disconnected:  # before its turn came
            return
        self.scope[DIRECT] = self
        try:
            await app(self.scope, self.receive, self.send)
        except Exception:
            logger.exception("a request failed")
        finally:
            self.scope.pop(DIRECT, None)  # else each request would be a cycle, and garbage is seldom looked for
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
                self._asked = self._connection.ask(self)
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
            self.start(message["status"], message["headers"])
        else:
            self._write(message.get("body", b""), more=message.get("more_body", False))
        await self.caught_up()

    def start(self, status: int, headers: Headers) -> None:
        """Begin the response."""
        if self.disconnected:
            return
        if self.started:
            raise ValueError("a response has one start")
        lines = [STATUS_LINES.get(status) or b"HTTP/1.1 %d \r\n" % status]
        self.bodiless = self.bodiless or status in _BODILESS
        for name, value in headers:
            if name == b"content-length":
                if self._left is not None or not value.isdigit():
                    raise ValueError("a response has one length")
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
        self.keep_alive = self.keep_alive and not self._connection.closing
        if not self.keep_alive:
            lines.append(b"connection: close\r\n")
        head = b"".join(lines)
        if head.count(b"\n") != len(lines) or head.count(b"\r") != len(lines):
            raise ValueError("a header field of a response holds a line break")
        self.started = True
        self._connection.write(head + b"\r\n")

    def finish(self) -> None:
        """End the response."""
        if not self.disconnected:
            self._write(b"", more=False)

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
        if self.disconnected:
            return
        self.disconnected = True
        self._wake()
        if self._gone is not None:
            self._gone()

    def _forget(self) -> None:
        self._gone = None

    def _wake(self) -> None:
        if self._news is not None:
            self._news.set()

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
