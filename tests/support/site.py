"""The HTTP server alone, with a small ASGI application behind it, and clients that hide nothing."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

from aibridge.asgi import DIRECT, Receive, Scope, Send
from aibridge.httpprotocol import HttpProtocol
from aibridge.httpserver import HttpServer, bound
from tests.support.provider import WAIT_SECONDS, Gate
from tests.support.rawclient import RawClient

Asgi = Callable[[Scope, Receive, Send], Awaitable[None]]

HOST = b"Host: h\r\n"
GET = b"GET / HTTP/1.1\r\n" + HOST
POST = b"POST / HTTP/1.1\r\n" + HOST
CHUNKED = b"Transfer-Encoding: chunked\r\n"
NEXT = b"GET /next HTTP/1.1\r\n" + HOST + b"\r\n"
BRIEF = 0.05
"""Seconds that the server is patient, where a test waits for it to lose patience."""
LENGTH = b"Content-Length: 3\r\n\r\n"
EXPECT = b"Expect: 100-continue\r\n"
PADDING = b"x" * 100_000


@dataclass(frozen=True, slots=True)
class Seen:
    """A request as the application was given it."""

    method: str
    target: bytes
    headers: list[tuple[bytes, bytes]]
    body: bytes
    complete: bool


async def whole_body(receive: Receive) -> tuple[bytes, bool]:
    """The body, and whether it came to its end before the client went."""
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return bytes(body), False
        body += message["body"]
        if not message["more_body"]:
            return bytes(body), True


async def respond(send: Send, body: bytes = b"", *fields: tuple[bytes, bytes], status: int = 200) -> None:
    """A whole response of a declared length."""
    await send(
        {"type": "http.response.start", "status": status, "headers": [(b"content-length", b"%d" % len(body)), *fields]}
    )
    await send({"type": "http.response.body", "body": body})


class Echo:
    """Answers with the body of the request, behind its target; keeps what it was given."""

    def __init__(self) -> None:
        self.seen: list[Seen] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        query = b"?" + scope["query_string"] if scope["query_string"] else b""
        body, complete = await whole_body(receive)
        self.seen.append(Seen(scope["method"], scope["raw_path"] + query, scope["headers"], body, complete))
        await respond(send, scope["raw_path"] + b" " + body)


class Stream:
    """Answers at once with a piece, and when its gate opens with the end. Tells who has gone how often."""

    def __init__(self, *, declared: int | None = None, reads: bool = True) -> None:
        self.gate = Gate()
        self.ended = Gate()
        self.gone = Gate()
        self.times_gone = 0
        self.calls = 0
        self._declared = declared
        self._reads = reads

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.calls += 1
        try:
            if self._reads:
                await whole_body(receive)
            forget = scope[DIRECT].when_gone(self._has_gone)
            fields = [] if self._declared is None else [(b"content-length", b"%d" % self._declared)]
            await send({"type": "http.response.start", "status": 200, "headers": fields})
            await send({"type": "http.response.body", "body": b"one", "more_body": True})
            await self.gate.wait(WAIT_SECONDS)
            await send({"type": "http.response.body", "body": b"two"})
            forget()
        finally:
            self.ended.set()

    def _has_gone(self) -> None:
        self.times_gone += 1
        self.gone.set()


class Pouring:
    """Writes as fast as its client reads, and counts."""

    def __init__(self, pieces: int) -> None:
        self.pieces = pieces
        self.written = 0
        self.ended = Gate()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            direct = scope[DIRECT]
            for _ in range(self.pieces):
                if direct.write(PADDING):
                    await direct.caught_up()
                self.written += 1
            await send({"type": "http.response.body"})
        finally:
            self.ended.set()


class Site:
    """A server that runs."""

    def __init__(self, server: HttpServer, port: int) -> None:
        self.server = server
        self.url = f"http://127.0.0.1:{port}"

    @property
    def connections(self) -> list[HttpProtocol]:
        return list(self.server._serving.connections)

    def client(self) -> RawClient:
        return RawClient(self.url)

    async def raw(self, *pieces: bytes) -> bytes:
        """All that a connection answers until the server closes it."""
        async with self.client() as client:
            for piece in pieces:
                with suppress(ConnectionError):
                    await client.write(piece)
            return await client.closed()

    async def until(self, holds: Callable[[], Any]) -> None:
        """Wait for something that nobody tells."""
        async with asyncio.timeout(WAIT_SECONDS):
            while not holds():
                await asyncio.sleep(0.005)


@asynccontextmanager
async def serving(app: Asgi, *, max_head_bytes: int = 65_536, grace: float = 1, **options: Any) -> AsyncIterator[Site]:
    (listener,) = bound("127.0.0.1", 0)
    server = HttpServer(app, max_head_bytes=max_head_bytes, **options)
    await server.start([listener])
    try:
        yield Site(server, listener.getsockname()[1])
    finally:
        async with asyncio.timeout(WAIT_SECONDS):
            await server.stop(grace)


def statuses(answered: bytes) -> Sequence[int]:
    """The statuses of responses in what a connection has answered."""
    return [int(part[:3]) for part in answered.split(b"HTTP/1.1 ")[1:]]


async def no_response(client: RawClient) -> bool:
    """The connection has ended without another response: closed or reset."""
    with suppress(ConnectionError):
        return await client.closed() == b""
    return True
