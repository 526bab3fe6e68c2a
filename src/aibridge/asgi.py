"""The client's side of one request, on top of ASGI."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, MutableMapping
from contextlib import suppress
from typing import Any, Final, Protocol
from urllib.parse import quote

from aibridge.errors import BodyTooLarge, BridgeError, ClientDisconnected, ProviderKind, error_body
from aibridge.wire.base import Headers

DIRECT: Final = "aibridge.direct"
"""The scope's key for the `Direct` of a server that offers one."""

_MAX_DIGITS: Final = 18
_BODILESS: Final = (204, 304)

Scope = Mapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class Direct(Protocol):
    """What our own HTTP server offers beside ASGI's calls, each of which costs a coroutine or a task."""

    def when_gone(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Have something called when the client has gone, unless what is answered is called before."""

    def start(self, status: int, headers: Headers) -> None:
        """Begin the response."""

    def write(self, data: bytes) -> bool:
        """Write a piece of the response body, and do not wait. Answers whether the client has fallen behind."""

    async def caught_up(self) -> None:
        """Wait until the client has read what was written, or has gone."""

    def finish(self) -> None:
        """End the response."""


class ClientConnection:
    """Reads the request and writes the response of one HTTP exchange."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scope = scope
        self.headers: Headers = scope["headers"]
        self.path = path_of(scope)
        self.method: str = scope["method"]
        self.query: str = scope.get("query_string", b"").decode("latin-1")
        self.started = False
        """The response has begun: from here on an error can only be told in-band."""
        self.upload_error: BridgeError | ClientDisconnected | None = None
        """Why the request body could not be read to its end."""
        self.direct: Direct | None = scope.get(DIRECT)
        """A shorter way to the client, where its server offers one."""
        self._receive = receive
        self._send = send
        self._first: dict[bytes, bytes] = dict(reversed(self.headers))

    @property
    def peer(self) -> str:
        """The address that the request came from, or an empty string."""
        return peer_of(self.scope)

    def header(self, name: bytes) -> str:
        """The first value of a request header, or an empty string."""
        return self._first.get(name, b"").decode("latin-1")

    def without_headers(self, names: frozenset[bytes]) -> None:
        """Forget some header fields: nobody else gets to know them."""
        self.headers = [field for field in self.headers if field[0] not in names]
        self._first = dict(reversed(self.headers))

    async def body(self, limit: int) -> bytes:
        """The whole request body. Raises `BodyTooLarge` or `ClientDisconnected`."""
        self._check_declared_length(limit)
        body, more = await self._piece(limit, limit)
        if not more:
            return body
        pieces = [body]
        left = limit - len(body)
        while more:
            piece, more = await self._piece(left, limit)
            pieces.append(piece)
            left -= len(piece)
        return b"".join(pieces)

    async def pieces(self, limit: int) -> AsyncIterator[bytes]:
        """The request body as it comes. Raises `BodyTooLarge` or `ClientDisconnected`."""
        self._check_declared_length(limit)
        left, more = limit, True
        while more:
            piece, more = await self._piece(left, limit)
            left -= len(piece)
            if piece:
                yield piece

    def _check_declared_length(self, limit: int) -> None:
        declared = self.header(b"content-length")
        if declared.isdecimal() and (len(declared) > _MAX_DIGITS or int(declared) > limit):
            raise self._over(limit)

    async def _piece(self, left: int, limit: int) -> tuple[bytes, bool]:
        """The next piece of the body, and whether there are more."""
        message = await self._receive()
        if message["type"] == "http.disconnect":
            self.upload_error = ClientDisconnected()
            raise self.upload_error
        piece: bytes = message.get("body", b"")
        if len(piece) > left:
            raise self._over(limit)
        return piece, message.get("more_body", False)

    def _over(self, limit: int) -> BodyTooLarge:
        self.upload_error = error = BodyTooLarge(f"The request body is larger than {limit} bytes.")
        return error

    def when_gone(self, callback: Callable[[], None]) -> Callable[[], object]:
        """Have something called when the client has disconnected, unless what is answered is called before.

        The request body must have been read.
        """
        if self.direct is not None:
            return self.direct.when_gone(callback)
        return asyncio.create_task(self._gone(callback)).cancel

    async def _gone(self, callback: Callable[[], None]) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        callback()

    async def respond(self, status: int, headers: Headers) -> None:
        """Begin the response."""
        self.started = True
        if status in _BODILESS:  # a length there is that of another body (RFC 9110 section 8.6); servers wait for it
            headers = [field for field in headers if field[0] != b"content-length"]
        if self.direct is not None:
            self.direct.start(status, headers)
        else:
            await self._tell({"type": "http.response.start", "status": status, "headers": list(headers)})

    async def relay(self, data: bytes) -> None:
        """Write a piece of the response body; waits while the client is slow to read."""
        if self.direct is None:
            await self._tell({"type": "http.response.body", "body": data, "more_body": True})
        elif self.direct.write(data):
            await self.direct.caught_up()

    async def finish(self) -> None:
        """End the response."""
        if self.direct is None:
            await self._tell({"type": "http.response.body", "body": b"", "more_body": False})
        else:
            self.direct.finish()

    async def refuse(self, kind: ProviderKind, error: BridgeError) -> None:
        """Answer with an error of our own, in the provider's shape."""
        body = error_body(kind, error.status, error.message)
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)), *error.headers]
        with suppress(ClientDisconnected):
            await self.respond(error.status, headers)
            await self.relay(b"" if self.method == "HEAD" else body)
            await self.finish()

    async def _tell(self, message: Message) -> None:
        try:
            await self._send(message)
        except OSError:  # since version 2.4 of the ASGI specification servers may say so in this way
            raise ClientDisconnected from None


def peer_of(scope: Scope) -> str:
    """The address that a connection came from; an empty string where it has none, such as a Unix domain socket."""
    peer = scope.get("client")
    return str(peer[0]) if peer else ""


def path_of(scope: Scope) -> str:
    """The path below where the application is mounted, percent-encoded as the client sent it where the server tells."""
    raw: bytes | None = scope.get("raw_path")
    path = raw.partition(b"?")[0].decode("latin-1") if raw else quote(scope["path"])
    root = scope.get("root_path", "")
    return path[len(root) :] if root and path.startswith(root + "/") else path
