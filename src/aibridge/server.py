"""The server around the bridge: who may come in, who they are, and the server's own routes."""

import asyncio
import logging
import re
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import msgspec
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    GCCollector,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)

from aibridge.asgi import App, ClientConnection, Receive, Scope, Send
from aibridge.bridge import RequestBridge
from aibridge.config import Settings
from aibridge.dumps import TrafficDumps
from aibridge.errors import BridgeError, NotAuthenticated, ProviderKind
from aibridge.events import Observer
from aibridge.guard import LoopbackGuard
from aibridge.httpclient import HttpUpstream
from aibridge.httpserver import HttpServer
from aibridge.identity import NOBODY, Actor, Authenticator, LocalUser, TrustedProxy
from aibridge.injection import Injection
from aibridge.metrics import Metrics
from aibridge.recording import Recorder, SqliteApprovals, SqliteHistory, SqliteRecorder
from aibridge.sampler import Sampler
from aibridge.upstream import Upstream

if TYPE_CHECKING:
    from aibridge.otlp import OtlpTraces

logger = logging.getLogger(__name__)


class Server:
    """The ASGI application that ``aibridge serve`` runs.

    `scraped` is what ``/metrics`` answers with where that is not about this process alone.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        recorder: Recorder | None = None,
        upstream: Upstream | None = None,
        observers: Sequence[Observer] = (),
        scraped: CollectorRegistry | None = None,
    ) -> None:
        self._registry = CollectorRegistry()
        self._scraped = self._registry if scraped is None else scraped
        if scraped is None:
            for collector in (ProcessCollector, PlatformCollector, GCCollector):
                collector(registry=self._registry)
        self._settings = settings
        self._injection = injection_of(settings)
        self._recorder = SqliteRecorder(settings.database.path) if recorder is None else recorder
        self._dumps = dumps_of(settings)
        self._traces = traces_of(settings)
        metrics = Metrics(self._registry, namespace="aibridge")
        upstream = upstream_of(settings) if upstream is None else upstream
        self._sampler = Sampler(
            metrics,
            recorder=self._recorder,
            upstream=upstream,
            toolbox=lambda: self._injection and self._injection.toolbox,
            ready=lambda: not self._problems,
        )
        self._bridge = RequestBridge(
            settings.enabled_providers(),
            self._recorder,
            observers=(metrics, *observers),
            tracer=self._traces,
            upstream=upstream,
            injection=self._injection,
            dumps=self._dumps,
            when_unrecordable=settings.database.when_unavailable,
            limits=settings.limits.limits(),
        )
        self._authenticator = _authenticator(settings)
        self._guard = _guard(settings)
        self._open = AsyncExitStack()
        self.draining = False
        """The process is about to end."""
        self.notes: Sequence[str] = ()
        """What whoever asks whether the server is ready should know beside."""

    async def reload(self, settings: Settings) -> None:
        """Serve the requests that come from now on by other settings. Connections to providers stay; those to MCP servers do
        where none of these has changed. Raises what opening something new raises; then everything stays as it was.
        """
        injection = await asyncio.to_thread(self._renewed_injection, settings)  # the MCP SDK may have to be loaded
        await self._bridge.reconfigure(settings.enabled_providers(), injection=injection, limits=settings.limits.limits())
        self._settings, self._injection = settings, injection
        self._authenticator, self._guard = _authenticator(settings), _guard(settings)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI connection."""
        if scope["type"] != "http":
            await self._bridge(scope, receive, send)
            return
        client = ClientConnection(scope, receive, send)
        try:
            if self._guard is not None:
                self._guard.check(client.headers)
            match client.path:
                case "/healthz":
                    await _answer(client, 200, b"application/json", b'{"status":"ok"}')
                case "/readyz":
                    await self._answer_ready(client)
                case "/metrics":
                    # In a thread: thousands of series take a tenth of a second, which streams must not wait for.
                    text = await asyncio.to_thread(generate_latest, self._scraped)
                    await _answer(client, 200, CONTENT_TYPE_LATEST.encode(), text)
                case _:
                    await self._bridge.serve(client, await self._identified(client))
        except BridgeError as error:
            await self._bridge.refuse(client, error)

    def kind_of(self, path: str) -> ProviderKind:
        """The kind of the provider that a request is for, which says how an error must look to its client."""
        return self._bridge.kind_of(path)

    def refused(self, error: BridgeError, path: str, peer: str) -> None:
        """The HTTP server has refused a request by itself."""
        self._bridge.refused(error, path, peer)

    async def __aenter__(self) -> Self:
        """Open what the bridge needs."""
        async with AsyncExitStack() as opened:
            if self._traces is not None:
                opened.push_async_callback(self._traces.aclose)
            for part in (self._dumps, self._bridge, self._sampler):
                await opened.enter_async_context(part)
            self._open = opened.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End what is under way, and close everything."""
        await self._open.aclose()

    def _renewed_injection(self, settings: Settings) -> Injection | None:
        new, old = injection_of(settings), self._injection
        if new is None or old is None:
            return new
        rules, before = settings.mcp, self._settings.mcp
        kept: dict[str, Any] = {}
        if rules.servers == before.servers:
            kept["toolbox"] = old.toolbox
        if (rules.history_days, rules.history_max_bytes) == (before.history_days, before.history_max_bytes):
            kept["history"] = old.history
        return replace(new, **kept)

    async def _answer_ready(self, client: ClientConnection) -> None:
        """Whether requests should be sent here: not where their start cannot be recorded, or the process is about to end."""
        problems = self._problems
        found: dict[str, Any] = {"ready": not problems, "reasons": problems}
        if self.notes:
            found["notes"] = self.notes
        await _answer(client, 503 if problems else 200, b"application/json", msgspec.json.encode(found))

    @property
    def _problems(self) -> list[str]:
        """Why requests would not be served, or should not be sent here any more."""
        problem: str | None = getattr(self._recorder, "problem", None)
        problems = [] if problem is None else [problem]
        return [*problems, "the server is shutting down"] if self.draining else problems

    async def _identified(self, client: ClientConnection) -> Actor:
        """Who is behind a request, which forgets what said so. Raises `NotAuthenticated`."""
        names = self._authenticator.consumes
        actor = await self._authenticator.authenticate(client.scope)
        if actor is None:
            raise NotAuthenticated(NOBODY, detail=f"no header {b', '.join(sorted(names)).decode('latin-1')}")
        if names:
            client.without_headers(names)
        return actor


def _guard(settings: Settings) -> LoopbackGuard | None:
    if not settings.server.on_loopback:
        return None
    return LoopbackGuard([settings.server.host, *settings.server.allowed_hosts])


def _authenticator(settings: Settings) -> Authenticator:
    if settings.identity.header is None:
        return LocalUser()
    if settings.identity.trusted_proxies:
        return TrustedProxy(settings.identity.header, settings.identity.trusted_proxies)
    return TrustedProxy(settings.identity.header)


def upstream_of(settings: Settings) -> Upstream:
    """The connections to the providers, as configured."""
    return HttpUpstream(**dict(settings.upstream))


def traces_of(settings: Settings) -> "OtlpTraces | None":
    """Traces of what happens, where there is somewhere to send them to."""
    tracing = settings.tracing
    if tracing.endpoint is None:
        return None
    from aibridge.otlp import OtlpTraces  # noqa: PLC0415  OpenTelemetry takes 0.2 s to load, and 11 MB

    return OtlpTraces(
        tracing.endpoint,
        headers={name: value.get_secret_value() for name, value in tracing.headers.items()},
        sample_ratio=tracing.sample_ratio,
        service_name=tracing.service_name,
        content=tracing.content,
    )


def dumps_of(settings: Settings) -> TrafficDumps:
    """Where the traffic of the providers that want it is dumped."""
    kept = settings.dumps
    return TrafficDumps(
        kept.directory, max_dump_bytes=kept.max_dump_bytes, max_bytes=kept.max_bytes, max_hours=kept.max_hours
    )


def injection_of(settings: Settings) -> Injection | None:
    """The tools of the configured MCP servers, and where conversations keep what is hidden of them; None without servers."""
    servers, rules, path = settings.mcp_servers(), settings.mcp, settings.database.path
    if not servers:
        return None
    from aibridge.mcp.proxy import McpProxy  # noqa: PLC0415  the SDK takes most of a second to load

    return Injection(
        McpProxy(servers, approvals=SqliteApprovals(path)),
        SqliteHistory(path, ttl_seconds=rules.history_days * 86400, max_bytes=rules.history_max_bytes),
        usage=rules.usage,
        max_turns=rules.max_turns,
        max_seconds=rules.max_seconds,
        keep_alive_seconds=rules.keep_alive_seconds,
        skip_models=[re.compile(expression) for expression in rules.skip_models],
    )


async def _answer(client: ClientConnection, status: int, content_type: bytes, body: bytes) -> None:
    length = b"%d" % len(body)
    await client.respond(status, [(b"content-type", content_type), (b"content-length", length)])
    await client.relay(b"" if client.method == "HEAD" else body)
    await client.finish()


def http_server(
    app: App,
    settings: Settings,
    kind_of: Callable[[str], ProviderKind] = lambda _: "openai",
    refused: Callable[[BridgeError, str, str], None] = lambda *_: None,
    *,
    shared: bool = False,
) -> HttpServer:
    """The HTTP server for an application, as configured. `kind_of` says for a path how an error must look, `refused` is told
    what the server refuses by itself; `shared`: whether other processes accept from the same sockets.
    """
    return HttpServer(
        app,
        max_head_bytes=settings.limits.max_header_bytes,
        keep_alive_seconds=settings.server.keep_alive_timeout,
        request_seconds=settings.server.request_timeout,
        write_seconds=settings.server.write_timeout,
        kind_of=kind_of,
        refused=refused,
        shared=shared,
    )
