"""The client's side of one request, on top of ASGI."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, MutableMapping
from typing import Any, TypeVar
from urllib.parse import quote

from aibridge.errors import BodyTooLarge, BridgeError, ClientDisconnected, ProviderKind, error_body
from aibridge.wire.base import Headers

Scope = Mapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
T = TypeVar("T")
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class ClientConnection:
    """Reads the request and writes the response of one HTTP exchange."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.headers: Headers = scope["headers"]
        self.method: str = scope["method"]
        self.query: str = scope.get("query_string", b"").decode("latin-1")
        self.started = False
        """The response has begun: from here on an error can only be told in-band."""
        self.upload_error: BridgeError | ClientDisconnected | None = None
        """Why the request body could not be read to its end."""
        self._receive = receive
        self._send = send

    def header(self, name: bytes) -> str:
        """The first value of a request header, or an empty string."""
        return next((value.decode("latin-1") for key, value in self.headers if key == name), "")

    async def body(self, limit: int) -> bytes:
        """The whole request body. Raises `BodyTooLarge` or `ClientDisconnected`."""
        return b"".join([piece async for piece in self.pieces(limit)])

    async def pieces(self, limit: int) -> AsyncIterator[bytes]:
        """The request body as it comes. Raises `BodyTooLarge` or `ClientDisconnected`."""
        left = limit
        declared = self.header(b"content-length")
        if declared.isdecimal() and int(declared) > limit:
            self.upload_error = _too_large(limit)
            raise self.upload_error
        more = True
        while more:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                self.upload_error = ClientDisconnected()
                raise self.upload_error
            more = message.get("more_body", False)
            left -= len(message.get("body", b""))
            if left < 0:
                self.upload_error = _too_large(limit)
                raise self.upload_error
            if message.get("body"):
                yield message["body"]

    async def gone(self) -> None:
        """Wait until the client has disconnected. The request body must have been read."""
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def respond(self, status: int, headers: Headers) -> None:
        """Begin the response."""
        self.started = True
        await self._send({"type": "http.response.start", "status": status, "headers": list(headers)})

    async def relay(self, data: bytes) -> None:
        """Write a piece of the response body; waits while the client is slow to read."""
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def finish(self) -> None:
        """End the response."""
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def refuse(self, kind: ProviderKind, error: BridgeError) -> None:
        """Answer with an error of our own, in the provider's shape."""
        body = error_body(kind, error.status, error.message)
        await self.respond(
            error.status,
            [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)), *error.headers],
        )
        await self.relay(b"" if self.method == "HEAD" else body)
        await self.finish()


class Interruptible:
    """Lets somebody else end one wait of the task that runs it, with an event of their choice.

    Only waits under `wait` end early; between them the task is left alone. One event is raised and no other after it, so
    that what the task does about it is not interrupted in turn; being cancelled counts as that event. Cheaper than a task
    for each wait, which would be one for each streamed event.
    """

    def __init__(self) -> None:
        self._task: asyncio.Task[Any] | None = asyncio.current_task()
        self._waiting = False
        self._event: Exception | None = None
        self._spent = False

    def interrupt(self, event: Exception) -> None:
        """End the wait under way, or else the next one, by raising `event` in it."""
        if self._event is None and not self._spent:
            self._event = event
            if self._waiting and self._task is not None:
                self._task.cancel()

    async def wait(self, awaitable: Awaitable[T]) -> T:
        """Wait for something. Raises the event of `interrupt`, or CancelledError where the task is cancelled."""
        if self._event is not None:
            if isinstance(awaitable, Coroutine):
                awaitable.close()
            raise self._take_event(self._event)
        self._waiting = True
        try:
            return await awaitable
        except asyncio.CancelledError:
            self._spent = True
            if self._event is None or self._task is None:
                raise
            self._task.uncancel()
            raise self._take_event(self._event) from None
        finally:
            self._waiting = False

    def _take_event(self, event: Exception) -> Exception:
        self._event, self._spent = None, True
        return event


def path_of(scope: Scope) -> str:
    """The path below where the application is mounted, percent-encoded as the client sent it where the server tells."""
    raw: bytes | None = scope.get("raw_path")
    path = raw.partition(b"?")[0].decode("latin-1") if raw else quote(scope["path"])
    root = scope.get("root_path", "")
    return path[len(root) :] if root and path.startswith(root + "/") else path


def _too_large(limit: int) -> BodyTooLarge:
    return BodyTooLarge(f"The request body is larger than {limit} bytes.")
