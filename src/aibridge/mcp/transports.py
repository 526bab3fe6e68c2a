"""The ways to a server: streamable HTTP and SSE with the SDK's transports on an HTTP client of ours, stdio with our own.

Under the SDK's HTTP transports lies `_Wire`. It knows of a request what the SDK does not tell: whether the server can have
run it. It also keeps failures apart (in the SDK a POST that raises ends the session, with all calls in flight), ends the
request of a call that was given up (the TypeScript server never does, clients.md 6), bounds what is read, and adds headers
and the query, which the SDK and its HTTP client would log.
"""

import base64
import logging
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar
from functools import cache
from types import TracebackType
from typing import Any, Final, Self, TypeAlias
from urllib.parse import unquote
from urllib.request import getproxies, proxy_bypass

import anyio
import httpx2
import msgspec
from mcp.client.sse import sse_client
from mcp.client.streamable_http import streamable_http_client
from mcp.shared.message import SessionMessage
from mcp_types import JSONRPCResponse

from aibridge.mcp.settings import McpServer
from aibridge.mcp.stdio import stdio_client

Lost: TypeAlias = Callable[[str], None]
"""Told why the connection has ended."""

Streams: TypeAlias = tuple[Any, Any]
"""What the SDK wants of a transport: a stream to read messages from, one to write them to."""

_WRITE_SECONDS: Final = 30.0
_NOTIFICATION_SECONDS: Final = 5.0  # the SDK sends nothing else until the answer to a notification is there
_ACCEPT_SECONDS: Final = 30.0  # an SSE server only accepts a message in its answer, and replies elsewhere
_MAX_REFUSAL: Final = 65_536  # bytes of an answer that is an error

_SESSION_HEADER: Final = "mcp-session-id"
_EVENTS: Final = "text/event-stream"

# What servers say with a 400 where 404 is due: the TypeScript SDK's, and what is built on it (clients.md 6).
_SESSION_LOST: Final = (b"No valid session ID", b"Server not initialized", b"Session not found")

# Ends a call's event stream for the SDK, which would try to resume it otherwise. Nobody waits for the answer any more.
_GIVEN_UP: Final = b'\n\ndata: {"jsonrpc":"2.0","id":0,"error":{"code":-32603,"message":"The call was given up."}}\n\n'


class Exchange:
    """One call, as far as the way to the server knows of it.

    `is_sent`: the server may have got it. `not_run` says why it cannot have run it all the same.
    """

    def __init__(self, *, is_sent: bool = False) -> None:
        self.is_sent = is_sent
        self.not_run: str | None = None
        self.is_over = False
        self._waits: set[anyio.CancelScope] = set()

    def end(self) -> None:
        """Nobody waits for an answer any more: the connection that it would come on is closed."""
        self.is_over = True
        for scope in self._waits:
            scope.cancel()

    @contextmanager
    def waiting(self) -> Iterator[anyio.CancelScope]:
        """A wait that the end of the exchange cuts short."""
        with anyio.CancelScope() as scope:
            self._waits.add(scope)
            if self.is_over:
                scope.cancel()
            try:
                yield scope
            finally:
                self._waits.discard(scope)


exchange: Final[ContextVar[Exchange | None]] = ContextVar("exchange", default=None)
"""The call that the current task makes. The SDK's transports run each message in the context of who sent it."""


@asynccontextmanager
async def transport(server: McpServer, lost: Lost, said: Lost) -> AsyncGenerator[Streams]:
    """Connect to a server. `said` gets what a command writes on its standard error, line by line.

    Raises OSError where a command cannot be started, and httpx2.HTTPError or an exception group of them where the way to an
    SSE server fails at once.
    """
    _sdk_logger.addFilter(_is_news)
    # JSON writes some characters as six, and base64 three bytes as four: no result that fits is refused for its notation.
    limit = 8 * server.max_result_bytes + 1_048_576
    if server.url is None:
        async with stdio_client(server.command, server.env, limit, lost, said) as (read, write):
            yield _Mended(read), write
        return
    wire = _Wire(server, httpx2.URL(server.url), limit, lost)
    timeout = httpx2.Timeout(_WRITE_SECONDS, connect=server.start_timeout, read=None)
    client = httpx2.AsyncClient(transport=wire, timeout=timeout)
    if server.transport == "sse":
        factory: Any = lambda **_: client  # noqa: E731  its parameters are what `client` was made with
        # The SDK reads no event of more than 1 MiB here, and does not let us say otherwise.
        async with sse_client(wire.url, httpx_client_factory=factory) as (read, write):
            yield _Mended(read), write
    else:
        async with client, streamable_http_client(wire.url, http_client=client, max_sse_event_size=limit) as (read, write):
            yield _Mended(read), write


_sdk_logger: Final = logging.getLogger("mcp.client.streamable_http")


def _is_news(record: logging.LogRecord) -> bool:
    """Not what arrives for a session that is being closed. The SDK logs the closed stream as an error of the server's."""
    error = record.exc_info[1] if record.exc_info else None
    return not isinstance(error, anyio.BrokenResourceError | anyio.ClosedResourceError)


class _Mended:
    """The messages of a server.

    One tool with a schema that MCP does not allow would make the SDK refuse the whole list: it gets one that allows no
    arguments, by which the catalog knows it. This is as much of a stream as the SDK uses.
    """

    def __init__(self, messages: Any) -> None:
        self._messages = messages

    @property
    def last_context(self) -> Any:
        """The sender's context, of the streams that know it."""
        return getattr(self._messages, "last_context", None)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Any:
        return _mended(await self._messages.__anext__())

    async def __aenter__(self) -> Self:
        await self._messages.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._messages.__aexit__(kind, error, trace)


UNUSABLE: Final = {"type": "object", "not": {}}
"""Stands for an input schema that MCP does not allow."""


def _mended(item: Any) -> Any:
    if isinstance(item, SessionMessage) and isinstance(item.message, JSONRPCResponse):
        tools = item.message.result.get("tools")
        for tool in tools if isinstance(tools, list) else ():
            if isinstance(tool, dict):
                schema = tool.get("inputSchema")
                if not isinstance(schema, dict) or schema.get("type") != "object":
                    tool["inputSchema"] = UNUSABLE
    return item


class _Sent(msgspec.Struct):
    """A message of ours. Notifications have no id."""

    id: Any = None


class _Error(msgspec.Struct):
    """An answer that is a JSON-RPC error."""

    error: dict[str, Any]


class _Wire(httpx2.AsyncBaseTransport):
    """Sends the SDK's requests to one server."""

    def __init__(self, server: McpServer, url: httpx2.URL, limit: int, lost: Lost) -> None:
        self.url = str(url.copy_with(userinfo=b"", query=None, fragment=None))
        self._server = server
        self._configured = url
        self._limit = limit
        self._lost = lost
        self._is_sse = server.transport == "sse"
        self._inner = httpx2.AsyncHTTPTransport(verify=_tls(), proxy=_proxy(url))

    async def aclose(self) -> None:
        await self._inner.aclose()

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Send a request. Failures of a POST, and of the DELETE that ends a session, are answers."""
        is_notification = request.method == "POST" and msgspec.json.decode(request.content, type=_Sent).id is None
        # That a call is cancelled is told when it is over, and is no part of it.
        call = (None if is_notification else exchange.get()) or Exchange()
        call.is_sent = True
        try:
            with call.waiting() as wait:
                response = await self._inner.handle_async_request(
                    self._outgoing(request, self._patience(request, is_notification=is_notification))
                )
        except httpx2.TransportError as error:
            if request.method == "GET":
                raise
            reason = describe(error)
            if isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout | httpx2.ProxyError | httpx2.PoolTimeout):
                call.not_run = reason
            return self._failed(request, reason)
        if wait.cancelled_caught:
            return httpx2.Response(202)
        if response.status_code >= 400 and request.method == "POST":
            return await self._refused(request, response, call)
        ended = self._lost if self._is_sse and request.method == "GET" and response.status_code == 200 else None
        body = _Body(response, call, self._limit, ended)
        return httpx2.Response(response.status_code, headers=response.headers, stream=body, extensions=response.extensions)

    def _patience(self, request: httpx2.Request, *, is_notification: bool) -> float | None:
        """How many seconds the answer may take. A call's may take as long as it has; event streams are silent."""
        if request.method == "DELETE" or is_notification:
            return _NOTIFICATION_SECONDS
        return _ACCEPT_SECONDS if self._is_sse and request.method == "POST" else None

    def _outgoing(self, request: httpx2.Request, patience: float | None) -> httpx2.Request:
        """The request with what was kept from the SDK."""
        headers = request.headers.copy()
        if self._configured.userinfo:
            user, password = unquote(self._configured.username), unquote(self._configured.password)
            headers["authorization"] = _basic(user, password)
        headers.update(self._server.headers)
        url = request.url
        if self._configured.query and url.path == self._configured.path and not url.query:
            url = url.copy_with(query=self._configured.query)
        extensions = {**request.extensions, "timeout": {**request.extensions["timeout"], "read": patience}}
        return httpx2.Request(request.method, url, headers=headers, stream=request.stream, extensions=extensions)

    async def _refused(self, request: httpx2.Request, response: httpx2.Response, call: Exchange) -> httpx2.Response:
        body = _Body(response, call, _MAX_REFUSAL, None)
        try:
            raw = b"".join([chunk async for chunk in body])
        except httpx2.StreamError:
            raw = b""
        finally:
            await body.aclose()
        reason = f"HTTP {response.status_code} {response.reason_phrase}".rstrip()
        in_session = self._is_sse or _SESSION_HEADER in request.headers
        if in_session and (
            response.status_code == 404 or (response.status_code == 400 and any(p in raw for p in _SESSION_LOST))
        ):
            call.not_run = f"{reason}: the session is not known to the server any more"
        if self._is_sse:
            return self._failed(request, reason)
        try:
            msgspec.json.decode(raw, type=_Error)
        except msgspec.DecodeError:
            return self._failed(request, reason)
        return httpx2.Response(response.status_code, headers={"content-type": "application/json"}, content=raw)

    def _failed(self, request: httpx2.Request, reason: str) -> httpx2.Response:
        """What the SDK gets instead of an answer."""
        if request.method == "DELETE":
            return httpx2.Response(200)
        if self._is_sse:  # the answer would come on the event stream, which ends with the connection
            self._lost(reason)
            return httpx2.Response(202)
        error = {"code": -32603, "message": reason}
        return httpx2.Response(502, json={"jsonrpc": "2.0", "id": None, "error": error})


class _Body(httpx2.AsyncByteStream):
    """The body of a response. Reading it raises httpx2.StreamError only, which the SDK takes for a failure of this request.

    `ended`: the body is the event stream that an SSE connection consists of.
    """

    def __init__(self, response: httpx2.Response, call: Exchange, limit: int, ended: Lost | None) -> None:
        self._response = response
        self._call = call
        self._is_events = response.headers.get("content-type", "").startswith(_EVENTS)
        self._left = limit
        self._ended = ended

    async def __aiter__(self) -> AsyncIterator[bytes]:
        assert isinstance(self._response.stream, httpx2.AsyncByteStream)  # noqa: S101  it is of an asynchronous transport
        chunks = aiter(self._response.stream)
        while True:
            with self._call.waiting() as wait:
                chunk = await self._next(chunks)
            if wait.cancelled_caught:
                if self._is_events:
                    yield _GIVEN_UP
                    return
                raise httpx2.StreamError("the call was given up")
            if chunk is None:
                if self._ended is not None:
                    self._ended("the server has ended the connection")
                return
            yield self._counted(chunk)

    async def _next(self, chunks: AsyncIterator[bytes]) -> bytes | None:
        try:
            return await anext(chunks, None)
        except httpx2.TransportError as error:
            if self._ended is not None:
                return None
            raise httpx2.StreamError(describe(error)) from error

    def _counted(self, chunk: bytes) -> bytes:
        if not self._is_events:  # the SDK bounds each event; the stream as a whole may be endless
            self._left -= len(chunk)
            if self._left < 0:
                raise httpx2.StreamError("the answer is too large")
        return chunk

    async def aclose(self) -> None:
        await self._response.aclose()


def cause(error: BaseException) -> BaseException:
    """The first cause of what task groups have put together."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def describe(error: BaseException) -> str:
    """What went wrong, in a line."""
    match cause(error):
        case httpx2.HTTPStatusError() as error:
            return f"HTTP {error.response.status_code} {error.response.reason_phrase}".rstrip()
        case (httpx2.ConnectError() | httpx2.ConnectTimeout() | httpx2.ProxyError()) as error:
            return f"it cannot be reached: {error}".rstrip(": ")
        case httpx2.TimeoutException():
            return "it did not answer in time"
        case httpx2.TransportError() as error:
            return f"the connection was lost: {error}".rstrip(": ")
        case FileNotFoundError():
            return "the program was not found"
        case error:
            return str(error).strip().partition("\n")[0] or type(error).__name__


@cache
def _tls() -> ssl.SSLContext:
    """Loading the certificates takes longer than a call."""
    return httpx2.create_ssl_context()


def _basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


def _proxy(url: httpx2.URL) -> str | None:
    """The proxy that the environment names, which an HTTP client with a transport of its own does not look for."""
    proxy = None if proxy_bypass(url.host) else getproxies().get(url.scheme)
    return f"http://{proxy}" if proxy and "://" not in proxy else proxy
