"""The port to the providers, and an implementation of it without a network.

`Upstream` is all that the rest of the bridge knows of HTTP clients: send a request, read the response as it comes, give up
at any time. What opens sockets is in `aibridge.httpclient`; whatever does passes the conformance tests in
``tests/test_upstream.py``.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from typing import NamedTuple, Protocol

import msgspec

from aibridge.errors import UpstreamError
from aibridge.wire.base import Headers
from aibridge.wire.observer import ResponseHead

Body = bytes | AsyncIterator[bytes]


class UpstreamRequest(msgspec.Struct, frozen=True):
    """A request to a provider. `headers` are sent as they are, without Host and, for a body of bytes, Content-Length.

    The `url` goes out as it is encoded; characters beyond ASCII stand for bytes, as in latin-1, and are percent-encoded.
    A streamed `body` is sent with the Content-Length among the headers, or chunked where there is none.

    `secrets` are the credentials in the request, and `call_id` is what it is known by, where somebody keeps a copy of it.
    """

    method: str
    url: str
    headers: Headers
    body: Body = b""
    ca_file: str | None = None
    secrets: tuple[str, ...] = ()
    call_id: str = ""


class UpstreamResponse(Protocol):
    """A response under way."""

    head: ResponseHead

    async def read(self) -> bytes:
        """The next bytes of the body as soon as there are any, undecoded; ``b""`` at its end. Safe to cancel.

        Raises `UpstreamError` when the body breaks off, `UpstreamTimeout` when nothing came for too long, nothing else.
        """

    async def flow(self, take: Callable[[bytes], bool]) -> bool:
        """Give the bytes to `take` as they come, until it says that it has had enough. Answers whether the body has ended.

        Like `read`, but no task has to be woken for each piece: `take` may be called from anywhere in the event loop. Raises
        what `read` raises, and what `take` does. Safe to cancel.
        """

    def close(self) -> None:
        """Let go of the response. Before its end this drops the connection, so that the provider stops working."""


class Upstream(Protocol):
    """Sends requests. Safe for concurrent use from one event loop."""

    async def send(self, request: UpstreamRequest) -> UpstreamResponse:
        """Send a request and wait for the response's head.

        Raises `UpstreamError` when there is none, `UpstreamTimeout` when it takes too long, `Unreachable` when the provider
        cannot have got all of the request, `Unsendable` when the request may be the reason; nothing else. Never retries,
        never follows a redirect.
        """

    async def aclose(self) -> None:
        """Close all connections."""


class Connections(NamedTuple):
    """The connections to one host: how many are open and idle, how many in use, and how many were ever opened."""

    idle: int
    in_use: int
    opened: int


class MemoryResponse:
    """A response from memory: its head and the pieces of its body, one for each read. An exception among them is raised."""

    def __init__(self, head: ResponseHead, pieces: Iterable[bytes | UpstreamError] = ()) -> None:
        self.head = head
        self.closed = False
        self._pieces = iter(pieces)

    async def read(self) -> bytes:
        """The next piece."""
        await asyncio.sleep(0)
        piece = next(self._pieces, b"")
        if isinstance(piece, UpstreamError):
            raise piece
        return piece

    async def flow(self, take: Callable[[bytes], bool]) -> bool:
        """Piece by piece."""
        while piece := await self.read():
            if take(piece):
                return False
        return True

    def close(self) -> None:
        """Remember that the response was let go of."""
        self.closed = True


class MemoryUpstream:
    """Providers without a network: a function answers each request. Keeps the requests that it was sent."""

    def __init__(self, answer: Callable[[UpstreamRequest], UpstreamResponse]) -> None:
        self._answer = answer
        self.requests: list[UpstreamRequest] = []

    async def send(self, request: UpstreamRequest) -> UpstreamResponse:
        """The function's answer; what it raises is raised."""
        self.requests.append(request)
        await asyncio.sleep(0)
        return self._answer(request)

    async def aclose(self) -> None:
        """There is nothing to close."""
