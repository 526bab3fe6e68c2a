"""HTTP to the providers, behind a small port.

`Upstream` is all that the rest of the bridge knows of it: send a request, read the response as it comes, give up at any
time. Whatever implements it passes the conformance tests in ``tests/test_upstream.py``. Foreign exceptions end here:
callers see `UpstreamError` and `UpstreamTimeout` only.
"""

import asyncio
import os
import ssl
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass
from string import printable
from typing import Final, Protocol
from urllib.parse import quote, urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp
from aiohttp.abc import AbstractStreamWriter
from aiohttp.connector import Connection
from aiohttp.http import StreamWriter
from multidict import CIMultiDict
from yarl import URL

from aibridge.errors import UpstreamError, UpstreamTimeout
from aibridge.wire.base import Headers
from aibridge.wire.observer import ResponseHead

Body = bytes | AsyncIterator[bytes]


@dataclass(frozen=True, slots=True)
class UpstreamRequest:
    """A request to a provider. `headers` are sent as they are, without Host and, for a body of bytes, Content-Length.

    The `url` goes out as it is encoded; characters beyond ASCII stand for bytes, as in latin-1, and are percent-encoded.
    A streamed `body` is sent with the Content-Length among the headers, or chunked where there is none.
    """

    method: str
    url: str
    headers: Headers
    body: Body = b""
    ca_file: str | None = None


class UpstreamResponse(Protocol):
    """A response under way."""

    head: ResponseHead

    async def read(self) -> bytes:
        """The next bytes of the body as soon as there are any, undecoded; ``b""`` at its end. Safe to cancel.

        Raises `UpstreamError` when the body breaks off, `UpstreamTimeout` when nothing came for too long.
        """

    def close(self) -> None:
        """Let go of the response. Before its end this drops the connection, so that the provider stops working."""


class Upstream(Protocol):
    """Sends requests. Safe for concurrent use from one event loop."""

    async def send(self, request: UpstreamRequest) -> UpstreamResponse:
        """Send a request and wait for the response's head.

        Raises `UpstreamError` when there is none, `UpstreamTimeout` when it takes too long. Never retries, never follows
        a redirect.
        """

    async def aclose(self) -> None:
        """Close all connections."""


# What the kernel takes at once is sent at once. A larger body goes in slices: one write of that size is cheap, and between
# two of them other streams get their turn, and it shows whether the provider still reads.
_AT_ONCE: Final = 64 * 1024
_SLICE: Final = 256 * 1024
_MAX_HEAD_BYTES: Final = 128 * 1024
_MAX_HEAD_FIELDS: Final = 1000
_READ_BUFFER: Final = 64 * 1024
_FRAMING: Final = (b"content-length", b"transfer-encoding")
# aiohttp adds these where they are missing. What the client did not send, the provider does not get.
_AUTOMATIC: Final = ("User-Agent", "Accept", "Accept-Encoding", "Content-Type")


class AiohttpUpstream:
    """Pooled keep-alive connections with aiohttp.

    Proxies are taken from HTTP_PROXY, HTTPS_PROXY and NO_PROXY, trusted certificates from the system (or SSL_CERT_FILE)
    and the request's `ca_file`. `connect_timeout` (look-up, connection, proxy and TLS together) and `idle_timeout` are in
    seconds; there is no limit on the whole.

    The one thing that is not sent byte for byte: of a request without a body, header values that are not UTF-8 arrive in it.
    """

    def __init__(self, *, connect_timeout: float = 10.0, idle_timeout: float = 600.0) -> None:
        self._idle_timeout = idle_timeout
        self._timeout = aiohttp.ClientTimeout(total=None, connect=connect_timeout, sock_read=idle_timeout)
        self._session: aiohttp.ClientSession | None = None
        self._tls: dict[str | None, ssl.SSLContext] = {}
        self._proxies = getproxies()

    async def send(self, request: UpstreamRequest) -> UpstreamResponse:
        """Send a request and wait for the response's head."""
        exact = bool(request.body)
        fields = [(name.decode("latin-1"), _text(value, exact=exact)) for name, value in request.headers]
        upload: _Upload | None = None
        if not isinstance(request.body, bytes):
            upload = _Upload(request.body, self._idle_timeout)
        elif len(request.body) > _AT_ONCE:
            fields.append(("content-length", str(len(request.body))))
            upload = _Upload(_slices(request.body), self._idle_timeout)
        try:
            if upload is None:
                response = await self._request(request, fields, request.body or None)
            else:
                async with upload.watch:
                    upload.response = response = await self._request(request, fields, upload.pieces())
        except (TimeoutError, aiohttp.ClientError, OSError, ValueError) as error:
            raise _translated(error, "The provider could not be reached") from error
        return _AiohttpResponse(response)

    async def _request(
        self, request: UpstreamRequest, fields: list[tuple[str, str]], body: Body | None
    ) -> aiohttp.ClientResponse:
        return await self._open_session().request(
            request.method,
            URL(_target(request.url), encoded=True),
            data=body,
            headers=CIMultiDict(fields),
            skip_auto_headers=_AUTOMATIC,
            allow_redirects=False,
            proxy=self._proxy(request.url),
            ssl=self._tls_context(request.ca_file) if request.url.startswith("https:") else True,
        )

    async def aclose(self) -> None:
        """Close all connections."""
        if self._session is not None:
            session, self._session = self._session, None
            await session.close()

    def _open_session(self) -> aiohttp.ClientSession:
        """The session, made on first use: it belongs to the event loop that runs by then."""
        if self._session is None:
            self._session = session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, ttl_dns_cache=60),
                cookie_jar=aiohttp.DummyCookieJar(),  # one user's cookies are not another's
                timeout=self._timeout,
                auto_decompress=False,
                read_bufsize=_READ_BUFFER,
                max_line_size=_MAX_HEAD_BYTES,
                max_field_size=_MAX_HEAD_BYTES,
                max_headers=_MAX_HEAD_FIELDS,
                request_class=_Request,
            )
            session._retry_connection = False  # noqa: SLF001  or it sends a GET again that nobody has answered
        return self._session

    def _tls_context(self, ca_file: str | None) -> ssl.SSLContext:
        if ca_file not in self._tls:
            context = ssl.create_default_context()
            if ca_file is not None:
                context.load_verify_locations(ca_file)
            self._tls[ca_file] = context
        return self._tls[ca_file]

    def _proxy(self, url: str) -> str | None:
        """The proxy for a URL. aiohttp could read the environment too, but would send credentials from ~/.netrc as well."""
        if not self._proxies:
            return None
        parts = urlsplit(url)
        proxy = None if proxy_bypass(parts.netloc) else self._proxies.get(parts.scheme)
        return f"http://{proxy}" if proxy and "://" not in proxy else proxy


class _AiohttpResponse:
    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response
        self._failure: UpstreamError | None = None
        headers = [(name.lower(), value) for name, value in response.raw_headers]
        self.head = ResponseHead(response.status, headers)
        protocol = None if response.connection is None else response.connection.protocol
        self._closed = None if protocol is None else protocol.closed
        if self._closed is not None:
            self._closed.add_done_callback(self._see_how_it_closed)
            # A future wants its exception looked at, at last when the connection is idle; once for all its responses.
            self._closed.remove_done_callback(asyncio.Future.exception)
            self._closed.add_done_callback(asyncio.Future.exception)

    async def read(self) -> bytes:
        if self._failure is not None:
            raise self._failure
        content = self._response.content
        try:
            data = await content.readany()
            if not data and (lost := content.exception()):
                raise lost
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            self._failure = _translated(error, "The provider's response broke off")
            content.set_exception(None)  # type: ignore[arg-type]  # or it keeps back what had come before
            data = content.read_nowait()
            if not data:
                raise self._failure from error
        return data

    def close(self) -> None:
        if self._closed is not None:
            self._closed.remove_done_callback(self._see_how_it_closed)
        self._response.close()

    def _see_how_it_closed(self, closed: asyncio.Future[None]) -> None:
        """Two things that aiohttp overlooks: it waits on after chunks that it cannot read, and takes a reset for an end."""
        content, reset = self._response.content, closed.exception()
        ends_with_connection = not any(name in _FRAMING for name, _ in self.head.headers)
        if content.exception() is None and (not content.is_eof() or (reset and ends_with_connection)):
            content.set_exception(reset or aiohttp.ClientPayloadError())


def _translated(error: Exception, what: str) -> UpstreamError:
    match error:
        case TimeoutError():
            return UpstreamTimeout(f"{what}: no answer in time.")
        case aiohttp.ClientConnectorCertificateError(certificate_error=ssl.SSLCertVerificationError() as reason):
            return UpstreamError(f"{what}: its certificate is not trusted ({reason.verify_message}).")
        case aiohttp.ClientHttpProxyError():
            return UpstreamError(f"{what}: the proxy answers with HTTP {error.status}.")
        case aiohttp.ClientResponseError():
            return UpstreamError(f"{what}: its answer is not HTTP.")
        case aiohttp.ServerDisconnectedError() | aiohttp.ClientPayloadError():
            return UpstreamError(f"{what}: it closed the connection.")
        case OSError(errno=int(number)) if number > 0:
            return UpstreamError(f"{what}: {os.strerror(number)}.")  # its own text holds the address
        case OSError(strerror=str(reason)):
            return UpstreamError(f"{what}: {reason}.")
    return UpstreamError(f"{what}: {type(error).__name__}.")


def _target(url: str) -> str:
    """What is no URL because of bytes beyond ASCII, as one."""
    return url if url.isascii() else quote(url, safe=printable, encoding="latin-1")


def _text(value: bytes, *, exact: bool) -> str:
    """A header value as text. aiohttp writes it in UTF-8; other bytes are for `_Request` to write, or become characters."""
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value.decode("utf-8", "surrogateescape") if exact else value.decode("latin-1")


class _Request(aiohttp.ClientRequest):
    """Writes header values that are not UTF-8, too: Node.js, for one, sends them in latin-1."""

    async def write_bytes(self, writer: AbstractStreamWriter, conn: Connection, content_length: int | None = None) -> None:
        """Write the body, and the head that waits to be written together with it."""
        if isinstance(writer, StreamWriter) and not all(map(str.isascii, self.headers.values())):
            request_line = (writer._headers_buf or b"").partition(b"\r\n")[0]  # noqa: SLF001
            lines = (f"{name}: {value}".encode(errors="surrogateescape") for name, value in self.headers.items())
            writer._headers_buf = b"\r\n".join((request_line, *lines, b"", b""))  # noqa: SLF001
        await super().write_bytes(writer, conn, content_length)


class _Upload:
    """A body on its way to the provider, which has to take each piece in time: aiohttp watches only what it reads.

    How long the client takes to bring a piece does not count. A body that breaks off takes with it a response that the
    provider may have begun.
    """

    def __init__(self, body: AsyncIterator[bytes], seconds: float) -> None:
        self.watch = asyncio.timeout(None)
        self.response: aiohttp.ClientResponse | None = None
        self._body = body
        self._seconds = seconds

    async def pieces(self) -> AsyncIterator[bytes]:
        try:
            async for piece in self._body:
                self._reschedule(asyncio.get_running_loop().time() + self._seconds)
                yield piece
                self._reschedule(None)
        except Exception:
            if self.response is not None:
                self.response.close()
            raise
        self._reschedule(asyncio.get_running_loop().time() + self._seconds)

    def _reschedule(self, when: float | None) -> None:
        if self.response is None:
            self.watch.reschedule(when)


async def _slices(body: bytes) -> AsyncIterator[bytes]:
    view = memoryview(body)
    for start in range(0, len(view), _SLICE):
        yield bytes(view[start : start + _SLICE])


class MemoryResponse:
    """A response from memory: its head and the pieces of its body, one for each read. An exception among them is raised."""

    def __init__(self, head: ResponseHead, pieces: Iterable[bytes | UpstreamError] = ()) -> None:
        self.head = head
        self.closed = False
        self._pieces = iter(pieces)

    async def read(self) -> bytes:
        """The next piece."""
        await asyncio.sleep(0)
        piece = next(self._pieces, b"")
        if isinstance(piece, UpstreamError):
            raise piece
        return piece

    def close(self) -> None:
        """Remember that the response was let go of."""
        self.closed = True


class MemoryUpstream:
    """Providers without a network: a function answers each request. Keeps the requests that it was sent."""

    def __init__(self, answer: Callable[[UpstreamRequest], UpstreamResponse]) -> None:
        self._answer = answer
        self.requests: list[UpstreamRequest] = []

    async def send(self, request: UpstreamRequest) -> UpstreamResponse:
        """The function's answer; what it raises is raised."""
        self.requests.append(request)
        await asyncio.sleep(0)
        return self._answer(request)

    async def aclose(self) -> None:
        """There is nothing to close."""
