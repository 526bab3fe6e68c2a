"""The server around the bridge: who may come in, who they are, and the server's own routes; and the process it runs in."""

import asyncio
import gc
import logging
import re
import resource
import signal
import socket
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Final, Self

import msgspec
import uvloop
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    GCCollector,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)

from aibridge.asgi import App, ClientConnection, Receive, Scope, Send
from aibridge.bridge import RequestBridge
from aibridge.config import Settings
from aibridge.errors import BridgeError, ProviderKind
from aibridge.guard import LoopbackGuard
from aibridge.httpclient import HttpUpstream
from aibridge.httpconnection import bracketed
from aibridge.httpserver import HttpServer, bound
from aibridge.identity import Actor, Authenticator, LocalUser, TrustedProxy
from aibridge.injection import Injection
from aibridge.metrics import Metrics
from aibridge.recording import Recorder, SqliteApprovals, SqliteHistory, SqliteRecorder
from aibridge.upstream import Upstream

logger = logging.getLogger(__name__)

CANNOT_START: Final = 3
"""The exit status where it cannot."""

_OPEN_FILES: Final = 65_536
_GARBAGE_THRESHOLD: Final = 20_000
# Beside what we say ourselves they tell of each request to an MCP server, its session, and what it has answered wrong.
_QUIET: Final = {"alembic": logging.WARNING, "httpx2": logging.WARNING, "mcp": logging.CRITICAL}


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
        scraped: CollectorRegistry | None = None,
    ) -> None:
        self._registry = CollectorRegistry()
        self._scraped = self._registry if scraped is None else scraped
        if scraped is None:
            for collector in (ProcessCollector, PlatformCollector, GCCollector):
                collector(registry=self._registry)
        self._recorder = SqliteRecorder(settings.database.path) if recorder is None else recorder
        self._bridge = RequestBridge(
            settings.enabled_providers(),
            self._recorder,
            observers=(Metrics(self._registry, namespace="aibridge"),),
            upstream=upstream_of(settings) if upstream is None else upstream,
            injection=injection_of(settings),
            when_unrecordable=settings.database.when_unavailable,
            limits=settings.limits.limits(),
        )
        self._authenticator = _authenticator(settings)
        self._guard = (
            LoopbackGuard([settings.server.host, *settings.server.allowed_hosts]) if settings.server.on_loopback else None
        )

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
            await client.refuse(self.kind_of(client.path), error)

    def kind_of(self, path: str) -> ProviderKind:
        """The kind of the provider that a request is for, which says how an error must look to its client."""
        return self._bridge.kind_of(path)

    async def __aenter__(self) -> Self:
        """Open what the bridge needs."""
        await self._bridge.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End what is under way, and close everything."""
        await self._bridge.__aexit__(kind, error, traceback)

    async def _answer_ready(self, client: ClientConnection) -> None:
        """Whether requests would be served now: not where their start cannot be recorded."""
        problem = getattr(self._recorder, "problem", None)
        found = {"ready": problem is None, "reasons": [] if problem is None else [problem]}
        await _answer(client, 200 if problem is None else 503, b"application/json", msgspec.json.encode(found))

    async def _identified(self, client: ClientConnection) -> Actor | None:
        """Who is behind a request, which forgets what said so. Without an actor the bridge refuses it."""
        actor = await self._authenticator.authenticate(client.scope)
        if self._authenticator.consumes:
            client.without_headers(self._authenticator.consumes)
        return actor


def _authenticator(settings: Settings) -> Authenticator:
    if settings.identity.header is None:
        return LocalUser()
    if settings.identity.trusted_proxies:
        return TrustedProxy(settings.identity.header, settings.identity.trusted_proxies)
    return TrustedProxy(settings.identity.header)


def upstream_of(settings: Settings) -> Upstream:
    """The connections to the providers, as configured."""
    return HttpUpstream(**dict(settings.upstream))


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


class CannotStart(Exception):
    """What the gateway needs is not to be had. It is raised from what is in the way, or says it."""


class Orders:
    """What a process that serves is told: to stop, and then not to wait for responses under way any more."""

    def __init__(self) -> None:
        self.stop = asyncio.Event()
        self.hurry = asyncio.Event()
        self.signal: signal.Signals | None = None
        """The signal that said to stop."""

    def obey_signals(self) -> None:
        """From now on, in the event loop that runs, SIGINT and SIGTERM mean: to stop, and the second one, to hurry."""
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, self._obey, number)

    def _obey(self, number: signal.Signals) -> None:
        if self.signal is None:
            self.signal = number
            self.stop.set()
        else:
            self.hurry.set()


def serve(settings: Settings) -> None:
    """Run the server until it is told to stop. SIGTERM lets responses end within the grace period.

    Raises SystemExit where it cannot start. Ends by the signal that it obeyed, for whoever sent it to see.
    """
    raise_open_file_limit()
    disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each one, which nobody reads
    listeners = bound_or_exit(settings)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            stop = runner.run(_serve(settings, listeners))
    except CannotStart as error:
        logger.error("the gateway cannot start", exc_info=error.__cause__)  # noqa: TRY400  ours adds nothing
        raise SystemExit(CANNOT_START) from None
    end_by(stop)


async def _serve(settings: Settings, listeners: Sequence[socket.socket]) -> signal.Signals | None:
    orders = Orders()
    orders.obey_signals()
    await run(Server(settings), settings, listeners, orders, lambda: logger.info("listening on %s", urls(listeners)))
    return orders.signal


async def run(
    server: Server, settings: Settings, listeners: Sequence[socket.socket], orders: Orders, when_ready: Callable[[], object]
) -> None:
    """Serve until there is the order to stop. `when_ready` is called when clients are accepted. Raises `CannotStart`."""
    loop = asyncio.get_running_loop()
    stop = loop.create_task(orders.stop.wait())
    starting = loop.create_task(server.__aenter__())
    await asyncio.wait({stop, starting}, return_when=asyncio.FIRST_COMPLETED)
    if not starting.done():  # MCP servers may take long
        starting.cancel()
        await asyncio.wait({starting})
        logger.info("told to stop before the start was complete")
        return
    try:
        await starting
    except Exception as error:
        stop.cancel()
        raise CannotStart from error
    http = http_server(server, settings, server.kind_of)
    _collect_garbage_seldom()
    try:
        try:
            await http.start(listeners)
        except OSError as error:  # somebody else was faster to listen
            raise CannotStart from error
        when_ready()
        await stop
        logger.info("shutting down: waiting for responses under way")
        hurry = loop.create_task(orders.hurry.wait())
        hurry.add_done_callback(lambda _: http.hurry())
        await http.stop(settings.server.shutdown_grace)
        hurry.cancel()
    finally:
        await server.__aexit__(None, None, None)


def http_server(app: App, settings: Settings, kind_of: Callable[[str], ProviderKind] = lambda _: "openai") -> HttpServer:
    """The HTTP server for an application, as configured. `kind_of` says for a path how an error must look."""
    return HttpServer(
        app,
        max_head_bytes=settings.limits.max_header_bytes,
        keep_alive_seconds=settings.server.keep_alive_timeout,
        request_seconds=settings.server.request_timeout,
        write_seconds=settings.server.write_timeout,
        kind_of=kind_of,
    )


def bound_or_exit(settings: Settings) -> list[socket.socket]:
    """The sockets to listen on, as configured. Raises SystemExit, and says why, where there can be none."""
    try:
        return bound(settings.server.host, settings.server.port)
    except OSError as error:
        where = f"{settings.server.host} port {settings.server.port}"
        logger.error("cannot listen on %s: %s", where, (error.strerror or str(error)).lower())  # noqa: TRY400  it says it all
        raise SystemExit(CANNOT_START) from None


def urls(listeners: Sequence[socket.socket]) -> str:
    """Where clients reach what listens."""
    return ", ".join(map(_url, listeners))


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://{bracketed(host)}:{port}"


def end_by(stop: signal.Signals | None) -> None:
    """End this process by the signal that it obeyed."""
    if stop is not None:
        signal.signal(stop, signal.SIG_DFL)
        signal.raise_signal(stop)


def log_to_stderr(who: str = "") -> None:
    """Set up the log of this process, which stands in each line as `who`."""
    logging.basicConfig(level=logging.INFO, format=f"%(asctime)s %(levelname)s %(name)s{who and f' [{who}]'}: %(message)s")
    for library, level in _QUIET.items():
        logging.getLogger(library).setLevel(level)


def _collect_garbage_seldom() -> None:
    """What was loaded stays, and a request leaves few cycles behind. To look for them every 700 objects, as Python does by
    default, takes a tenth of all the time (docs/performance.md).
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(_GARBAGE_THRESHOLD)


def raise_open_file_limit() -> None:
    """Each stream takes two sockets; the usual soft limit of 1,024 files is there for programs that use select(2)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
