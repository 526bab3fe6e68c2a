"""The gateway in the test's own event loop: behind its HTTP server, or called as ASGI with the test as its server."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, MutableMapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext, suppress
from typing import Any

from aibridge.asgi import App
from aibridge.config import Settings
from aibridge.httpserver import bound
from aibridge.identity import Actor, as_actor
from aibridge.server import http_server
from tests.support.provider import WAIT_SECONDS, Gate

Fields = Sequence[tuple[bytes, bytes]]

ALICE = Actor("alice")


def settings(**sections: Mapping[str, Any]) -> Settings:
    """Settings that no file and no variable has a say in."""
    return Settings.model_validate({"server": {"shutdown_grace": 1}, **sections})


@asynccontextmanager
async def serving(app: Any, configuration: Settings, *ask_and_tell: Callable[..., Any]) -> AsyncIterator[str]:
    """The HTTP server, configured as ``aibridge serve`` does; the URL that it listens on.

    `ask_and_tell` are the application's ``kind_of`` and ``refused``, where it has them.
    """
    (listener,) = bound("127.0.0.1", 0)
    server = http_server(app, configuration, *ask_and_tell)
    async with app if isinstance(app, AbstractAsyncContextManager) else nullcontext():
        await server.start([listener])
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            async with asyncio.timeout(WAIT_SECONDS):
                await server.stop(configuration.server.shutdown_grace)


def scope(
    method: str, path: str, headers: Fields = (), *, root_path: str = "", query: bytes = b"", raw_path: bytes | None = None
) -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": root_path + path,
        "raw_path": (root_path + path).encode() if raw_path is None else raw_path,
        "root_path": root_path,
        "query_string": query,
        "headers": [(b"host", b"127.0.0.1"), *headers],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
    }


class Call:
    """One request to an ASGI application, with the test in the server's place.

    The body comes in as many messages as there are pieces. `reading` shut means a client that does not read: `send` waits,
    as a server's does. `leave` disconnects.
    """

    def __init__(self, app: App, scope: Mapping[str, Any], pieces: Iterable[bytes] = ()) -> None:
        self._messages: asyncio.Queue[MutableMapping[str, Any]] = asyncio.Queue()
        self.sent: list[MutableMapping[str, Any]] = []
        self.started = Gate()
        self.reading = Gate()
        self.reading.set()
        given = list(pieces) or [b""]
        for index, piece in enumerate(given):
            more = index + 1 < len(given)
            self._messages.put_nowait({"type": "http.request", "body": piece, "more_body": more})
        self.task = asyncio.create_task(self._run(app, scope))

    async def _run(self, app: App, scope: Mapping[str, Any]) -> None:
        await app(scope, self._messages.get, self._send)

    async def _send(self, message: MutableMapping[str, Any]) -> None:
        await self.reading.wait(3600)
        self.sent.append(message)
        self.started.set()

    def leave(self) -> None:
        self._messages.put_nowait({"type": "http.disconnect"})

    async def over(self) -> "Call":
        async with asyncio.timeout(WAIT_SECONDS):
            await self.task
        return self

    async def abandon(self) -> None:
        self.task.cancel()
        with suppress(asyncio.CancelledError):
            await self.task

    @property
    def status(self) -> int:
        starts = [message for message in self.sent if message["type"] == "http.response.start"]
        assert len(starts) == 1 and self.sent[0] is starts[0], "a response has one start, at its start"
        status: int = starts[0]["status"]
        return status

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        headers: list[tuple[bytes, bytes]] = self.sent[0]["headers"]
        return headers

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent[1:])

    @property
    def complete(self) -> bool:
        return bool(self.sent) and not self.sent[-1].get("more_body", False)

    def json(self) -> Any:
        return json.loads(self.body)


async def call(app: App, scope: Mapping[str, Any], *pieces: bytes, actor: Actor | None = ALICE) -> Call:
    """One request, and its whole response."""
    return await Call(app, scope if actor is None else as_actor(scope, actor), pieces).over()
