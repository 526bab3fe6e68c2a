"""The server around the bridge: who may come in, who they are, and the server's own routes; and the process it runs in."""

import resource
from typing import Any, Final

import uvicorn
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    GCCollector,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from aibridge.asgi import ClientConnection, Receive, Scope, Send, path_of
from aibridge.bridge import RequestBridge
from aibridge.config import Settings
from aibridge.errors import BridgeError, HeadersTooLarge, NotAuthenticated, error_body
from aibridge.guard import LoopbackGuard
from aibridge.identity import Authenticator, LocalUser, TrustedProxy, as_actor, without_headers
from aibridge.metrics import Metrics
from aibridge.recording import Recorder, SqliteRecorder
from aibridge.upstream import AiohttpUpstream, Upstream

# A client's pooled connection should end on the client's side: one that we close under its next request costs it an error.
_KEEP_ALIVE_SECONDS: Final = 75
_OPEN_FILES: Final = 65_536


class Server:
    """The ASGI application that ``aibridge serve`` runs."""

    def __init__(self, settings: Settings, *, recorder: Recorder | None = None, upstream: Upstream | None = None) -> None:
        self._registry = CollectorRegistry()
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self._registry)
        self._bridge = RequestBridge(
            settings.enabled_providers(),
            SqliteRecorder(settings.database.path) if recorder is None else recorder,
            observers=(Metrics(self._registry, namespace="aibridge"),),
            upstream=upstream_of(settings) if upstream is None else upstream,
            when_unrecordable=settings.database.when_unavailable,
            max_body_bytes=settings.limits.max_body_bytes,
            max_header_bytes=settings.limits.max_header_bytes,
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
            match path_of(scope):
                case "/healthz":
                    await _answer(client, b"application/json", b'{"status":"ok"}')
                case "/metrics":
                    await _answer(client, CONTENT_TYPE_LATEST.encode(), generate_latest(self._registry))
                case _:
                    await self._bridge(await self._identified(scope), receive, send)
        except BridgeError as error:
            await client.refuse(self._bridge.kind_of(scope), error)

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
    return AiohttpUpstream(connect_timeout=settings.upstream.connect_timeout, idle_timeout=settings.upstream.idle_timeout)


async def _answer(client: ClientConnection, content_type: bytes, body: bytes) -> None:
    length = b"%d" % len(body)
    await client.respond(200, [(b"content-type", content_type), (b"content-length", length)])
    await client.relay(b"" if client.method == "HEAD" else body)
    await client.finish()


def serve(settings: Settings) -> None:
    """Run the server until it is told to stop. SIGTERM lets responses end within the grace period."""
    _raise_open_file_limit()
    disable_created_metrics()  # a second series for each one, which nobody reads
    uvicorn.Server(uvicorn_config(Server(settings), settings)).run()


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


def head_bounded(limit: int) -> type[HttpToolsProtocol]:
    """Uvicorn's HTTP protocol, with the bound on the size of a request head that it lacks.

    The application checks the exact size, but it is called only when the head is complete: here memory is bounded before.
    """

    class HeadBounded(HttpToolsProtocol):
        _head = 0
        _in_head = True

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._head += len(data) if self._in_head else 0
            if self._head > 2 * limit and not self.transport.is_closing():
                self._refuse_head()

        def on_message_begin(self) -> None:
            self._head, self._in_head = 0, True
            super().on_message_begin()

        def on_headers_complete(self) -> None:
            self._head, self._in_head = 0, False
            super().on_headers_complete()

        def on_message_complete(self) -> None:
            self._in_head = True
            super().on_message_complete()

        def _refuse_head(self) -> None:
            error = HeadersTooLarge(f"The request headers are larger than {limit} bytes.")
            body = error_body("openai", error.status, error.message)
            self.transport.write(
                b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-type: application/json\r\n"
                b"connection: close\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
            )
            self.transport.close()

    return HeadBounded


def _raise_open_file_limit() -> None:
    """Each stream takes two sockets; the usual soft limit of 1,024 files is there for programs that use select(2)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
