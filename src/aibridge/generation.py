"""What of a bridge depends on its configuration: a *generation*. A reload makes another one for the requests that come from
then on; those that have begun end in their own.
"""

import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from itertools import chain

from aibridge.asgi import ClientConnection
from aibridge.breakers import Breakers
from aibridge.calling import Caller, Dumps, Tracer
from aibridge.errors import BridgeError, HeadersTooLarge, NotAuthenticated, ProviderKind, UnknownRoute
from aibridge.events import Refused, notify
from aibridge.identity import NOBODY, Actor
from aibridge.injection import Injection
from aibridge.interruptible import Stopping
from aibridge.ledger import Ledger
from aibridge.limits import Admission, Limits
from aibridge.passthrough import pass_through
from aibridge.providers import Provider, Route
from aibridge.relay import Interceptor, scope_of
from aibridge.sidecalls import Adapted, adapt
from aibridge.upstream import Upstream


class Lent:
    """Lends the parts of injections to generations. One is opened for the first that needs it and closed behind the last,
    so that what a new configuration has in common with the old one goes on.
    """

    def __init__(self) -> None:
        self._users: dict[int, int] = {}

    @asynccontextmanager
    async def to_one_more(self, part: AbstractAsyncContextManager[object]) -> AsyncIterator[None]:
        """Lend a part. Not while it is being closed."""
        if id(part) not in self._users:
            await part.__aenter__()
            self._users[id(part)] = 0
        self._users[id(part)] += 1
        try:
            yield
        finally:
            self._users[id(part)] -= 1
            if not self._users[id(part)]:
                del self._users[id(part)]
                await part.__aexit__(None, None, None)


@dataclass(frozen=True, slots=True)
class Common:
    """What all generations of a bridge share: it outlives each of them."""

    ledger: Ledger
    upstream: Upstream
    breakers: Breakers
    admission: Admission
    tracer: Tracer | None
    dumps: Dumps | None

    def caller(self, provider: Provider) -> Caller:
        """What calls a provider."""
        upstream = self.upstream if self.dumps is None else self.dumps.upstream(provider, self.upstream)
        is_dumped = upstream is not self.upstream
        return Caller(provider, upstream, self.ledger.observers, self.breakers, self.tracer, is_dumped)


class Generation:
    """Serves the requests that come while its configuration is the current one. Raises ValueError when two providers have
    the same name.
    """

    def __init__(
        self,
        providers: Iterable[Provider],
        *,
        injection: Injection | None,
        limits: Limits,
        common: Common,
    ) -> None:
        self._callers: dict[str, Caller] = {}
        for provider in providers:
            if provider.name in self._callers:
                raise ValueError(f"two providers are named {provider.name!r}")
            self._callers[provider.name] = common.caller(provider)
        self._common = common
        self._injection = injection
        self._limits = limits
        self._interceptors = {
            f"/{name}{route.pattern}": Interceptor(
                route, route.format, caller, common.ledger, limits.max_body_bytes, injection
            )
            for name, caller in self._callers.items()
            for route in caller.provider.routes
            if route.format is not None
        }
        self._requests = 0  # under way
        self._when_unused: Callable[[], object] | None = None
        self._lent = AsyncExitStack()
        self.stopping = Stopping()
        """The exchanges under way."""

    @property
    def guarded(self) -> set[str]:
        """The names of the providers that have circuit breakers."""
        return {name for name, caller in self._callers.items() if caller.provider.breaker is not None}

    async def open(self, lent: Lent) -> None:
        """Open what the injection needs. Raises what that raises; then nothing stays open."""
        parts = () if self._injection is None else (self._injection.history, self._injection.toolbox)
        async with AsyncExitStack() as opened:
            for part in parts:
                if isinstance(part, AbstractAsyncContextManager):
                    await opened.enter_async_context(lent.to_one_more(part))
            self._lent = opened.pop_all()

    async def close(self) -> None:
        """Close it again, where no other generation needs it."""
        await self._lent.aclose()

    def retire(self, when_unused: Callable[[], object]) -> None:
        """No more requests come. `when_unused` is called when the last one is over."""
        self._when_unused = when_unused
        if not self._requests:
            when_unused()

    def kind_of(self, path: str) -> ProviderKind:
        """The kind of the provider that a request is for, which says how an error must look to its client."""
        caller, _ = self._provider_at(path)
        return "openai" if caller is None else caller.provider.kind

    async def refuse(self, client: ClientConnection, error: BridgeError, actor: Actor | None = None) -> None:
        """Answer a request with an error of our own. Observers are told where that is a refusal."""
        self.refused(error, client.path, client.peer, actor)
        await client.refuse(self.kind_of(client.path), error)

    def refused(self, error: BridgeError, path: str, peer: str, actor: Actor | None = None) -> None:
        """Tell observers that a request was answered with an error of our own, where that is a refusal."""
        if error.reason is not None:
            caller, _ = self._provider_at(path)
            name = "" if caller is None else caller.provider.name
            who = "" if actor is None else actor.id
            notify(self._common.ledger.observers, Refused(name, who, error.reason, peer, error.detail))

    async def serve(self, client: ClientConnection, actor: Actor | None) -> None:
        """Serve one request. Raises `BridgeError` where it is refused, `ClientDisconnected`."""
        self._requests += 1
        try:
            await self._dispatch(client, actor)
        finally:
            self._requests -= 1
            if self._when_unused is not None and not self._requests:
                self._when_unused()

    async def _dispatch(self, client: ClientConnection, actor: Actor | None) -> None:
        if sum(map(len, chain.from_iterable(client.headers))) > self._limits.max_header_bytes:
            raise HeadersTooLarge(f"The request headers are larger than {self._limits.max_header_bytes} bytes.")
        if actor is None:
            raise NotAuthenticated(NOBODY, detail="no actor in the scope of the request")
        interceptor = self._interceptors.get(client.path) if client.method == "POST" else None
        if interceptor is None:
            caller, route, path = self._find(client.method, client.path)
            self._admit(actor, lasts=False)
            await self._pass_through(client, actor, caller, route, path)
            return
        self._admit(actor, lasts=True)
        try:
            await interceptor.handle(client, actor, stopping=self.stopping)
        finally:
            self._common.admission.leave(actor.id)

    def _admit(self, actor: Actor, *, lasts: bool) -> None:
        """Let a request in. Raises `TooManyRequests` or `Overloaded`."""
        refusal = self._common.admission.admit(actor.id, self._limits, time.monotonic(), lasts=lasts)
        if refusal is not None:
            raise refusal.error

    async def _pass_through(self, client: ClientConnection, actor: Actor, caller: Caller, route: Route, path: str) -> None:
        adapted = Adapted(path)
        if self._injection is not None and route.about is not None:
            history = scope_of(actor, caller.provider, route.about)
            adapted = await adapt(self._injection, route.about, history, client, path, self._limits.max_body_bytes)
        await pass_through(client, route, adapted, caller=caller, max_body_bytes=self._limits.max_body_bytes)

    def _find(self, method: str, path: str) -> tuple[Caller, Route, str]:
        caller, rest = self._provider_at(path)
        route = None if caller is None else caller.provider.route(method, rest)
        if caller is None or route is None:
            raise UnknownRoute("There is no such route on this gateway.")
        return caller, route, rest

    def _provider_at(self, path: str) -> tuple[Caller | None, str]:
        """What calls the provider that a path is for, if there is one, and the path below its name."""
        name, _, rest = path.removeprefix("/").partition("/")
        return self._callers.get(name), "/" + rest
