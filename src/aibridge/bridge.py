"""The gateway as an ASGI application: finds the provider and the route, and hands the request to who serves it."""

import logging
from collections.abc import Iterable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from itertools import chain
from types import TracebackType
from typing import Final, Self

from aibridge.asgi import ClientConnection, Receive, Scope, Send
from aibridge.errors import (
    BridgeError,
    ClientDisconnected,
    HeadersTooLarge,
    NotAuthenticated,
    ProviderKind,
    UnknownRoute,
    UpgradeRefused,
)
from aibridge.events import Observer
from aibridge.httpclient import HttpUpstream
from aibridge.identity import Actor, actor_of
from aibridge.injection import Injection
from aibridge.interruptible import Stopping
from aibridge.ledger import Ledger, WhenUnrecordable
from aibridge.passthrough import pass_through
from aibridge.providers import Provider, Route
from aibridge.recording.base import Recorder
from aibridge.relay import Interceptor, scope_of
from aibridge.sidecalls import Adapted, adapt
from aibridge.upstream import Upstream

logger = logging.getLogger(__name__)

MAX_BODY_BYTES: Final = 32 * 1024 * 1024
MAX_HEADER_BYTES: Final = 64 * 1024
_LAST_RECORDS_SECONDS: Final = 5.0


class RequestBridge:
    """An ASGI application that serves ``/<provider name>/...``; it mounts into FastAPI, Starlette or any other.

    It needs an `Actor` in the scope of each request (`as_actor`) and refuses a request without one. `observers` see every
    event, `Metrics` is one of them. With an `injection` requests get its tools. Sizes are in bytes.

    Run it inside ``async with bridge:`` in a host that does not forward lifespan events to what it mounts (Starlette and
    FastAPI do not). Entering opens the recorder and connects to MCP servers, leaving ends what is under way, and closes
    all connections and the recorder. Raises ValueError when two providers have the same name.
    """

    def __init__(
        self,
        providers: Iterable[Provider],
        recorder: Recorder,
        *,
        observers: Sequence[Observer] = (),
        upstream: Upstream | None = None,
        injection: Injection | None = None,
        when_unrecordable: WhenUnrecordable = "refuse",
        max_body_bytes: int = MAX_BODY_BYTES,
        max_header_bytes: int = MAX_HEADER_BYTES,
    ) -> None:
        self._providers: dict[str, Provider] = {}
        for provider in providers:
            if provider.name in self._providers:
                raise ValueError(f"two providers are named {provider.name!r}")
            self._providers[provider.name] = provider
        self._ledger = Ledger(recorder, observers, when_unrecordable)
        self._upstream = HttpUpstream() if upstream is None else upstream
        self._injection = injection
        self._max_body_bytes = max_body_bytes
        self._max_header_bytes = max_header_bytes
        self._interceptors = {
            f"/{provider.name}{route.pattern}": Interceptor(
                provider, route, route.format, self._upstream, self._ledger, max_body_bytes, injection
            )
            for provider in self._providers.values()
            for route in provider.routes
            if route.format is not None
        }
        self._stopping = Stopping()
        self._open = AsyncExitStack()

    async def __aenter__(self) -> Self:
        """Open the recorder, and what the injection needs."""
        parts: list[object] = [self._ledger.recorder]
        if self._injection is not None:
            parts += [self._injection.history, self._injection.toolbox]
        async with AsyncExitStack() as opened:
            for part in parts:
                if isinstance(part, AbstractAsyncContextManager):
                    await opened.enter_async_context(part)
            opened.push_async_callback(self._upstream.aclose)
            self._open = opened.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End what is under way, write the last records, close everything."""
        await self._stopping.interrupt_all(_LAST_RECORDS_SECONDS)
        await self._open.aclose()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI connection."""
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        elif scope["type"] == "websocket":
            await _refuse_websocket(scope, receive, send)
        else:
            await self.serve(ClientConnection(scope, receive, send), actor_of(scope))

    def kind_of(self, path: str) -> ProviderKind:
        """The kind of the provider that a request is for, which says how an error must look to its client."""
        provider = self._providers.get(path.removeprefix("/").partition("/")[0])
        return "openai" if provider is None else provider.kind

    async def serve(self, client: ClientConnection, actor: Actor | None) -> None:
        """Serve one request of somebody, and refuse one of nobody."""
        try:
            await self._dispatch(client, actor)
        except BridgeError as error:
            await client.refuse(self.kind_of(client.path), error)
        except ClientDisconnected:
            logger.debug("a client left while its request was read")

    async def _dispatch(self, client: ClientConnection, actor: Actor | None) -> None:
        if client.header(b"upgrade").lower() == "websocket":
            raise _NO_WEBSOCKET
        if sum(map(len, chain.from_iterable(client.headers))) > self._max_header_bytes:
            raise HeadersTooLarge(f"The request headers are larger than {self._max_header_bytes} bytes.")
        if actor is None:
            raise NotAuthenticated("Nobody is known to be behind this request.")
        interceptor = self._interceptors.get(client.path) if client.method == "POST" else None
        if interceptor is not None:
            await interceptor.handle(client, actor, stopping=self._stopping)
        else:
            await self._pass_through(client, actor)

    async def _pass_through(self, client: ClientConnection, actor: Actor) -> None:
        provider, route, path = self._find(client.method, client.path)
        adapted = Adapted(path)
        if self._injection is not None and route.about is not None:
            history = scope_of(actor, provider, route.about)
            adapted = await adapt(self._injection, route.about, history, client, path, self._max_body_bytes)
        await pass_through(
            client,
            provider,
            route,
            adapted,
            upstream=self._upstream,
            observers=self._ledger.observers,
            max_body_bytes=self._max_body_bytes,
        )

    def _find(self, method: str, path: str) -> tuple[Provider, Route, str]:
        name, _, rest = path.removeprefix("/").partition("/")
        provider = self._providers.get(name)
        route = None if provider is None else provider.route(method, "/" + rest)
        if provider is None or route is None:
            raise UnknownRoute("There is no such route on this gateway.")
        return provider, route, "/" + rest

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        await receive()
        try:
            await self.__aenter__()
        except Exception as error:
            logger.exception("the gateway cannot start")
            await send({"type": "lifespan.startup.failed", "message": str(error)})
            return
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self.__aexit__(None, None, None)
        await send({"type": "lifespan.shutdown.complete"})


_NO_WEBSOCKET: Final = UpgradeRefused("WebSocket is not supported here. Use HTTP.", [(b"upgrade", b"HTTP/1.1")])


async def _refuse_websocket(scope: Scope, receive: Receive, send: Send) -> None:
    """Refuse with 426, where the server can answer an upgrade with HTTP, else by closing."""
    await receive()
    if "websocket.http.response" not in scope.get("extensions", {}):
        await send({"type": "websocket.close", "code": 1008})
        return
    await send({"type": "websocket.http.response.start", "status": _NO_WEBSOCKET.status, "headers": []})
    await send({"type": "websocket.http.response.body", "body": _NO_WEBSOCKET.message.encode(), "more_body": False})
