"""The server around the bridge: who may come in, who they are, and the server's own routes; and the process it runs in."""

import asyncio
import logging
import re
import resource
import socket
from types import FrameType
from typing import Any, Final

import msgspec
import uvicorn
from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    GCCollector,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from aibridge.asgi import ClientConnection, Message, Receive, Scope, Send, path_of
from aibridge.bridge import RequestBridge
from aibridge.config import Settings
from aibridge.errors import BadRequest, BridgeError, HeadersTooLarge, NotAuthenticated, error_body
from aibridge.guard import LoopbackGuard
from aibridge.httpclient import HttpUpstream
from aibridge.identity import Authenticator, LocalUser, TrustedProxy, as_actor, without_headers
from aibridge.injection import Injection
from aibridge.metrics import Metrics
from aibridge.recording import Recorder, SqliteApprovals, SqliteHistory, SqliteRecorder
from aibridge.upstream import Upstream

# A client's pooled connection should end on the client's side: one that we close under its next request costs it an error.
_KEEP_ALIVE_SECONDS: Final = 75
_OPEN_FILES: Final = 65_536
_UNFINISHED: Final = "ASGI callable returned without completing response."
_LAST_WORDS_SECONDS: Final = 2.0
_FRAMING: Final = (b"content-length", b"transfer-encoding")


class Server:
    """The ASGI application that ``aibridge serve`` runs."""

    def __init__(self, settings: Settings, *, recorder: Recorder | None = None, upstream: Upstream | None = None) -> None:
        self._registry = CollectorRegistry()
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
            max_body_bytes=settings.limits.max_body_bytes,
            max_header_bytes=settings.limits.max_header_bytes,
        )
        self._authenticator = _authenticator(settings)
        self._starting: asyncio.Task[Any] | None = None
        self._guard = (
            LoopbackGuard([settings.server.host, *settings.server.allowed_hosts]) if settings.server.on_loopback else None
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI connection."""
        if scope["type"] == "lifespan":
            await self._live(scope, receive, send)
            return
        if scope["type"] != "http":
            await self._bridge(scope, receive, send)
            return
        client = ClientConnection(scope, receive, send)
        try:
            if self._guard is not None:
                self._guard.check(client.headers)
            match path_of(scope):
                case "/healthz":
                    await _answer(client, 200, b"application/json", b'{"status":"ok"}')
                case "/readyz":
                    await self._answer_ready(client)
                case "/metrics":
                    await _answer(client, 200, CONTENT_TYPE_LATEST.encode(), generate_latest(self._registry))
                case _:
                    await self._bridge(await self._identified(scope), receive, send)
        except BridgeError as error:
            await client.refuse(self._bridge.kind_of(scope), error)

    def give_up(self) -> None:
        """Start no further, and end what was started. May be called by a signal handler."""
        if self._starting is not None:
            self._starting.get_loop().call_soon_threadsafe(self._starting.cancel)

    async def _live(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def said(message: Message) -> None:
            self._starting = None
            await send(message)

        self._starting = asyncio.current_task()
        try:
            await self._bridge(scope, receive, said)
        except asyncio.CancelledError:
            await send({"type": "lifespan.startup.failed", "message": "told to stop before the start was complete"})

    async def _answer_ready(self, client: ClientConnection) -> None:
        """Whether requests would be served now: not where their start cannot be recorded."""
        problem = getattr(self._recorder, "problem", None)
        found = {"ready": problem is None, "reasons": [] if problem is None else [problem]}
        await _answer(client, 200 if problem is None else 503, b"application/json", msgspec.json.encode(found))

    async def _identified(self, scope: Scope) -> Scope:
        """The request with its actor, without what said who it is. Without an actor the bridge refuses it."""
        actor = await self._authenticator.authenticate(scope)
        if actor is None:
            raise NotAuthenticated("Nobody is known to be behind this request.")
        return as_actor(without_headers(scope, self._authenticator.consumes), actor)


def _authenticator(settings: Settings) -> Authenticator:
    if settings.identity.header is None:
        return LocalUser()
    if settings.identity.trusted_proxies:
        return TrustedProxy(settings.identity.header, settings.identity.trusted_proxies)
    return TrustedProxy(settings.identity.header)


def upstream_of(settings: Settings) -> Upstream:
    """The connections to the providers, as configured."""
    return HttpUpstream(connect_timeout=settings.upstream.connect_timeout, idle_timeout=settings.upstream.idle_timeout)


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


def serve(settings: Settings) -> None:
    """Run the server until it is told to stop. SIGTERM lets responses end within the grace period."""
    _raise_open_file_limit()
    # A response that is left unfinished is how a client gets to see that the provider's broke off; the relay says so itself.
    logging.getLogger("uvicorn.error").addFilter(lambda line: line.msg != _UNFINISHED)
    disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each one, which nobody reads
    _Process(Server(settings), settings).run()


class _Process(uvicorn.Server):
    """Uvicorn, which by itself acts on a signal only when the start is complete: MCP servers may take long."""

    def __init__(self, server: Server, settings: Settings) -> None:
        super().__init__(uvicorn_config(server, settings))
        self._server = server

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal has come."""
        super().handle_exit(sig, frame)
        self._server.give_up()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start. That it was given up is no failure."""
        try:
            await super().startup(sockets)
        except SystemExit:
            if not self.should_exit:
                raise


def uvicorn_config(app: Any, settings: Settings) -> uvicorn.Config:
    """How the server is run: no header of its own, no proxy headers believed, no WebSocket."""
    return uvicorn.Config(
        app,
        host=settings.server.host,
        port=settings.server.port,
        http=head_bounded(settings.limits.max_header_bytes),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        date_header=False,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=max(1, round(settings.server.shutdown_grace)),
    )


class HeadBounded(HttpToolsProtocol):
    """Uvicorn's HTTP protocol, with what it lacks in front of clients that nobody vouches for.

    - What makes no progress, a head or the trailers behind a body that do not end, is refused at twice `max_head`. The
      application checks the exact size, but it is called only when a head is complete: here memory is bounded before.
    - Trailers are dropped. They are no header fields (RFC 9110 section 6.5.1), but uvicorn adds them to those.
    - A request for an upgrade is read like any other. Httptools takes a body behind it (as Java's HttpClient sends it, with
      ``Upgrade: h2c``) for another protocol, and the next request with it.
    - What cannot be read is never answered in the middle of another response.
    """

    max_head: int
    _unread = 0  # received since the parser last came a step further
    _reads_head = True
    _resumes = False
    _hung_up = False

    def data_received(self, data: bytes) -> None:
        """Bytes have come."""
        if self._hung_up:
            return
        self._unset_keepalive_if_required()
        self._unread += len(data)
        try:
            self._feed(data)
        except HttpParserError:
            self._refuse(BadRequest("This is not HTTP."), b"400 Bad Request")
        if self._unread > 2 * self.max_head and not self.transport.is_closing():
            too_large = HeadersTooLarge(f"The request headers are larger than {self.max_head} bytes.")
            self._refuse(too_large, b"431 Request Header Fields Too Large")

    def on_message_begin(self) -> None:
        """A head begins."""
        self._unread = 0
        if not self._resumes:
            self._reads_head = True
            super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """A piece of the request's target."""
        if not self._resumes:
            super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header field or a trailer."""
        if self._reads_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The head is complete."""
        self._unread = 0
        if not self._resumes:
            self._reads_head = False
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A piece of the body."""
        self._unread = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The request is complete, unless httptools only thinks so because of an upgrade."""
        self._unread = 0
        if not self.parser.should_upgrade():
            super().on_message_complete()

    def on_response_complete(self) -> None:
        """A response is complete. A client that still waits to be asked for its body may send that next, or a request."""
        super().on_response_complete()
        if self.expect_100_continue and self.cycle.more_body:
            self._hang_up()

    def _feed(self, data: bytes) -> None:
        while data:
            try:
                self.parser.feed_data(data)
            except HttpParserUpgrade as upgrade:
                data = data[upgrade.args[0] :]
                self._ignore_upgrade()
            else:
                return

    def _ignore_upgrade(self) -> None:
        """Read on with a parser that knows how the body is framed, but not of the upgrade."""
        framing = (name + b": " + value + b"\r\n" for name, value in self.headers if name in _FRAMING)
        self.parser = HttpRequestParser(self)
        self._resumes = True
        self.parser.feed_data(b"POST / HTTP/1.1\r\n%b\r\n" % b"".join(framing))
        self._resumes = False

    def _refuse(self, error: BridgeError, status: bytes) -> None:
        """Answer, unless a response is under way."""
        cycle: RequestResponseCycle | None = getattr(self, "cycle")  # noqa: B009  it is None at first
        if cycle is not None and not cycle.response_complete:
            if self.pipeline or cycle.response_started:
                self._hung_up = True
                self.transport.abort()
                return
            cycle.disconnected = True
            cycle.message_event.set()
        body = error_body("openai", error.status, error.message)
        self.transport.write(
            b"HTTP/1.1 %b\r\ncontent-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n%b"
            % (status, len(body), body)
        )
        self._hang_up()

    def _hang_up(self) -> None:
        """Say nothing more and read nothing more, but give the client a moment to read what was said."""
        self._hung_up = True
        if not self.transport.is_closing():
            self.transport.write_eof()
            self.loop.call_later(_LAST_WORDS_SECONDS, self.transport.abort)


def head_bounded(limit: int) -> type[HeadBounded]:
    """The protocol for heads up to a limit."""
    return type("HeadBounded", (HeadBounded,), {"max_head": limit})


def _raise_open_file_limit() -> None:
    """Each stream takes two sockets; the usual soft limit of 1,024 files is there for programs that use select(2)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
