"""The gateway as an ASGI application: its life, and the change of its configuration (`aibridge.generation`)."""

import asyncio
import logging
from collections.abc import Iterable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from types import TracebackType
from typing import Final, Self

from aibridge.asgi import ClientConnection, Receive, Scope, Send, path_of, peer_of
from aibridge.breakers import BreakerKey, Breakers, BreakerState
from aibridge.calling import Dumps, Tracer
from aibridge.errors import BridgeError, ClientDisconnected, ProviderKind, UpgradeRefused
from aibridge.events import BreakerChanged, Observer, notify
from aibridge.generation import Common, Generation, Lent
from aibridge.httpclient import HttpUpstream
from aibridge.identity import Actor, actor_of
from aibridge.injection import Injection
from aibridge.ledger import Ledger, WhenUnrecordable
from aibridge.limits import Admission, Limits
from aibridge.providers import Provider
from aibridge.recording.base import Recorder
from aibridge.upstream import Upstream

logger = logging.getLogger(__name__)

_LAST_RECORDS_SECONDS: Final = 5.0
_DEFAULT_LIMITS: Final = Limits()


class RequestBridge:
    """An ASGI application that serves ``/<provider name>/...``; it mounts into FastAPI, Starlette or any other.

    It needs an `Actor` in the scope of each request (`as_actor`) and refuses a request without one. `observers` see every
    event, `Metrics` is one of them; so does a `tracer`, which also carries trace context through. With an `injection`
    requests get its tools. `limits` hold for this bridge, not for all processes together. `dumps` keep what goes to
    providers and comes from them.

    Run it inside ``async with bridge:`` in a host that does not forward lifespan events to what it mounts (Starlette and
    FastAPI do not). Entering opens the recorder and connects to MCP servers, leaving ends what is under way, and closes
    all connections and the recorder. Raises ValueError when two providers have the same name.
    """

    def __init__(  # noqa: PLR0913  named, all but two
        self,
        providers: Iterable[Provider],
        recorder: Recorder,
        *,
        observers: Sequence[Observer] = (),
        upstream: Upstream | None = None,
        injection: Injection | None = None,
        when_unrecordable: WhenUnrecordable = "refuse",
        limits: Limits = _DEFAULT_LIMITS,
        tracer: Tracer | None = None,
        dumps: Dumps | None = None,
    ) -> None:
        self._ledger = Ledger(recorder, observers if tracer is None else (*observers, tracer), when_unrecordable)
        self._upstream = HttpUpstream() if upstream is None else upstream
        self._common = Common(self._ledger, self._upstream, Breakers(self._tell_breaker), Admission(), tracer, dumps)
        self._current = Generation(providers, injection=injection, limits=limits, common=self._common)
        self._generations = [self._current]  # and those before it that still have requests
        self._lent = Lent()
        self._changing = asyncio.Lock()
        self._open = AsyncExitStack()

    async def __aenter__(self) -> Self:
        """Open the recorder, and what the injection needs."""
        async with AsyncExitStack() as opened:
            if isinstance(self._ledger.recorder, AbstractAsyncContextManager):
                await opened.enter_async_context(self._ledger.recorder)
            await self._current.open(self._lent)
            opened.push_async_callback(self._close_generations)
            opened.push_async_callback(self._upstream.aclose)
            self._open = opened.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End what is under way, write the last records, close everything."""
        running = [generation.stopping for generation in self._generations]
        await asyncio.gather(*(stopping.interrupt_all(_LAST_RECORDS_SECONDS) for stopping in running))
        await self._ledger.settled(_LAST_RECORDS_SECONDS)
        await self._open.aclose()

    async def reconfigure(self, providers: Iterable[Provider], *, injection: Injection | None, limits: Limits) -> None:
        """Serve the requests that come from now on with another configuration. Those under way end with the one that they
        began with; what only that needs is closed behind the last of them.

        A `history` or `toolbox` that both injections have stays open. Raises ValueError when two providers have the same
        name, and what opening the injection raises; then everything stays as it was, as it does when this is cancelled.
        """
        new = Generation(providers, injection=injection, limits=limits, common=self._common)
        async with self._changing:
            await new.open(self._lent)
            old, self._current = self._current, new
            self._generations.append(new)
            self._common.breakers.keep(new.guarded)
        old.retire(lambda: self._ledger.carry_out(self._close(old)))

    def _tell_breaker(self, key: BreakerKey, state: BreakerState) -> None:
        notify(self._ledger.observers, BreakerChanged(*key, state))

    async def _close(self, generation: Generation) -> None:
        async with self._changing:
            if generation in self._generations:
                self._generations.remove(generation)
                try:
                    await generation.close()
                except Exception:
                    logger.exception("what an earlier configuration needed could not be closed")
                self._common.breakers.keep(self._current.guarded)  # its last requests may have made some anew

    async def _close_generations(self) -> None:
        async with self._changing, AsyncExitStack() as closing:
            for generation in self._generations:
                closing.push_async_callback(generation.close)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI connection."""
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        elif scope["type"] == "websocket":
            self.refused(_NO_WEBSOCKET, path_of(scope), peer_of(scope))
            await _refuse_websocket(scope, receive, send)
        else:
            await self.serve(ClientConnection(scope, receive, send), actor_of(scope))

    def kind_of(self, path: str) -> ProviderKind:
        """The kind of the provider that a request is for, which says how an error must look to its client."""
        return self._current.kind_of(path)

    async def refuse(self, client: ClientConnection, error: BridgeError) -> None:
        """Answer a request that is not served with an error of our own. Observers are told where that is a refusal."""
        await self._current.refuse(client, error)

    def refused(self, error: BridgeError, path: str, peer: str) -> None:
        """Tell observers that a request from `peer` was not let in, which somebody else has answered."""
        self._current.refused(error, path, peer)

    async def serve(self, client: ClientConnection, actor: Actor | None) -> None:
        """Serve one request of somebody, and refuse one of nobody."""
        generation = self._current
        try:
            if client.header(b"upgrade").lower() == "websocket":
                raise _NO_WEBSOCKET
            await generation.serve(client, actor)
        except BridgeError as error:
            await generation.refuse(client, error, actor)
        except ClientDisconnected:
            logger.debug("a client left while its request was read")

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
