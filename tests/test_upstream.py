"""What every `Upstream` must do. Truth: the port's docstrings, RFC 9110 and 9112 for the bytes; limits are our choice.

The suite is for any implementation that opens sockets: add it to IMPLEMENTATIONS. It runs on asyncio's own event loop and
on uvloop, which the server uses: the two differ in TLS and in how they report a lost connection.
"""

import asyncio
import base64
import gc
import shutil
import socket
import ssl
import struct
import tempfile
import tracemalloc
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Protocol

import pytest

from aibridge.dumps import TrafficDumps
from aibridge.errors import ConnectTimeout, Unfinished, Unreachable, Unsendable, UpstreamError, UpstreamTimeout
from aibridge.httpclient import HttpUpstream
from aibridge.httpconnection import Connection
from aibridge.providers import Provider
from aibridge.upstream import (
    Body,
    MemoryResponse,
    MemoryUpstream,
    Upstream,
    UpstreamRequest,
    UpstreamResponse,
)
from aibridge.wire.observer import ResponseHead
from tests.support.provider import CUT, RESET, STALL, Cut, Framing, Gate, Reply, ScriptedProvider, Step, Wait
from tests.support.tls import Authority


class Make(Protocol):
    """How an implementation is made; what is not given has the implementation's default."""

    def __call__(
        self, *, connect_timeout: float = ..., first_byte_timeout: float = ..., idle_timeout: float = ...
    ) -> Upstream: ...


class Dumped:
    """What traffic dumps wrap is a port all the same."""

    def __init__(self, **timeouts: float) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="dumps-")
        self._dumps = TrafficDumps(Path(self._folder.name) / "dumps")
        provider = Provider("anthropic", "anthropic", "http://127.0.0.1:9", dump=True)
        self._upstream = self._dumps.upstream(provider, HttpUpstream(**timeouts))

    async def send(self, request: UpstreamRequest) -> UpstreamResponse:
        return await self._upstream.send(request)

    async def aclose(self) -> None:
        await self._upstream.aclose()
        await self._dumps.__aexit__(None, None, None)
        self._folder.cleanup()


IMPLEMENTATIONS: Sequence[Make] = [HttpUpstream, Dumped]

Fields = Sequence[tuple[bytes, bytes]]
BOUND = 15.0
SOON = 0.3
"""A timeout that has to strike: nothing comes before it."""
BRIEF = 1.0
"""A timeout within which something else has to happen first, which takes a loaded machine milliseconds."""


@pytest.fixture(params=["asyncio", "uvloop"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, object]]:
    return "asyncio", {"use_uvloop": request.param == "uvloop"}


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.fixture(params=IMPLEMENTATIONS, ids=lambda make: make.__name__)
def make(request: pytest.FixtureRequest) -> Make:
    made: Make = request.param
    return made


@pytest.fixture
async def upstream(make: Make) -> AsyncIterator[Upstream]:
    async with opened(make()) as upstream:
        yield upstream


@pytest.fixture
async def provider() -> AsyncIterator[ScriptedProvider]:
    async with ScriptedProvider() as provider:
        yield provider


@asynccontextmanager
async def opened(upstream: Upstream) -> AsyncIterator[Upstream]:
    try:
        yield upstream
    finally:
        await upstream.aclose()


def to(
    origin: ScriptedProvider | str,
    target: str = "/v1/x",
    *,
    method: str = "POST",
    headers: Fields = (),
    body: Body = b"",
    ca_file: str | None = None,
) -> UpstreamRequest:
    url = origin if isinstance(origin, str) else origin.url
    return UpstreamRequest(method, url + target, headers, body, ca_file)


async def rest(response: UpstreamResponse) -> bytes:
    """The body to its end."""
    body = bytearray()
    try:
        async with asyncio.timeout(BOUND):
            while data := await response.read():
                body += data
    finally:
        response.close()
    return bytes(body)


async def ask(upstream: Upstream, request: UpstreamRequest) -> tuple[ResponseHead, bytes]:
    async with asyncio.timeout(BOUND):
        response = await upstream.send(request)
    return response.head, await rest(response)


async def fails(upstream: Upstream, request: UpstreamRequest, kind: type[UpstreamError] = UpstreamError) -> UpstreamError:
    """The error of a request that gets no response. Its kind says whether it may be sent again, and whose fault it was."""
    with pytest.raises(kind) as caught:
        await ask(upstream, request)
    assert type(caught.value) is kind, "a timeout is one, and nothing else is"
    return caught.value


async def pieces(*given: bytes) -> AsyncIterator[bytes]:
    for piece in given:
        yield piece


# ---- the request, as received ----

ODD_TARGETS = (
    "/v1/models/a%2Fb%20c",
    "/v1/models/%C3%A9;v=1,2(3)'~*!$",
    "/a%zz%/b",
    "/a//b/../c/./d",
    "/v1/messages?beta=true",
    '/x?a=1&a=2&&=&b&c=+%20%2B&d=%E9&e[]={}|\\^`"<>',
    "/x?q=a?b/c:d@e%23",
)


@pytest.mark.parametrize("target", ODD_TARGETS)
async def test_the_target_is_sent_as_it_is(upstream: Upstream, provider: ScriptedProvider, target: str) -> None:
    provider.reply(Reply())
    await ask(upstream, to(provider, target))
    assert provider.requests[0].target == target


async def test_bytes_beyond_ascii_in_the_target_are_encoded(upstream: Upstream, provider: ScriptedProvider) -> None:
    # RFC 3986 knows none. A server that lets them pass gives them to us as latin-1.
    provider.reply(Reply())
    await ask(upstream, to(provider, "/x?a=%zz\xc3\xa9&b"))
    assert provider.requests[0].target == "/x?a=%zz%C3%A9&b"


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "PATCH", "DELETE", "HEAD"])
async def test_nothing_is_added_to_the_headers(upstream: Upstream, provider: ScriptedProvider, method: str) -> None:
    provider.replies(Reply(204), Reply(204))
    await ask(upstream, to(provider, method=method))
    await ask(upstream, to(provider, method=method, headers=[(b"accept", b"x/y")]))
    first, second = provider.requests
    assert first.method == second.method == method
    host = (b"host", f"127.0.0.1:{provider.port}".encode())
    length = (b"content-length", b"0")  # without one a server may ask for it with 411 (RFC 9110 section 8.6)
    may = [[host], [host, length]]
    assert [(name.lower(), value) for name, value in first.headers] in may
    assert [(name.lower(), value) for name, value in second.headers if name != b"accept"] in may
    assert second.header("accept") == ["x/y"]


async def test_header_fields_are_sent_as_they_are(upstream: Upstream, provider: ScriptedProvider) -> None:
    fields = [
        (b"anthropic-beta", b"a-1,b-2"),
        (b"x-twice", b"1"),
        (b"anthropic-beta", b"c-3"),
        (b"user-agent", b"odd/1.0 (x; y)"),
        (b"x-twice", b"1"),
        (b"accept-encoding", b"br, zstd"),
        (b"x-empty", b""),
        (b"x-tab", b"a\tb  c"),
        (b"x-utf8", "é€𝄞".encode()),
        (b"x_under.score!#$%&'*+^`|~", b'"\\,;=:@?'),
        (b"content-type", b"application/json; charset=utf-8"),
        (b"authorization", b"Bearer a:b@c"),
    ]
    provider.reply(Reply())
    await ask(upstream, to(provider, headers=fields, body=b"{}"))
    received = [(name.lower(), value) for name, value in provider.requests[0].headers]
    added = (b"host", b"content-length")
    assert [field for field in received if field[0] not in added] == fields
    assert [name for name, _ in received if name in added] == [*added]


@pytest.mark.parametrize("body", [b"{}", bytes(100_000), None], ids=["small", "large", "streamed"])
async def test_header_values_are_bytes(upstream: Upstream, provider: ScriptedProvider, body: bytes | None) -> None:
    # RFC 9110 section 5.5. Node.js, for one, writes them in latin-1.
    provider.reply(Reply())
    fields = [(b"x-a", b"Andr\xe9"), (b"x-b", b"\xff\x80\xc3 \xc3\xa9"), (b"x-c", "é".encode()), (b"x-d", b"plain")]
    await ask(upstream, to(provider, headers=fields, body=pieces(b"one") if body is None else body))
    received = provider.requests[0]
    assert [field for field in received.headers if field[0].startswith(b"x-")] == fields
    assert received.method == "POST" and received.target == "/v1/x"
    assert received.body == (b"one" if body is None else body)


async def test_header_values_in_latin_1_without_a_body(upstream: Upstream, provider: ScriptedProvider) -> None:
    provider.reply(Reply())
    await ask(upstream, to(provider, headers=[(b"x-name", b"Andr\xe9")]))
    assert provider.requests[0].header("x-name") == ["Andr\xe9"]


@pytest.mark.parametrize("value", [b"a\r\nx-injected: 1", b"a\nb", b"a\x00b"])
async def test_header_values_that_would_break_the_framing_are_not_sent(
    upstream: Upstream, provider: ScriptedProvider, value: bytes
) -> None:
    await fails(upstream, to(provider, headers=[(b"x-a", value)]), Unsendable)
    assert not provider.requests


BODIES = (b"{}", b"\x00\xff" * 40_000, bytes(range(256)) * 20_000)


@pytest.mark.parametrize("body", BODIES, ids=lambda body: f"{len(body)}B")
async def test_a_body_of_bytes(upstream: Upstream, provider: ScriptedProvider, body: bytes) -> None:
    provider.reply(Reply.json(b"{}"))
    await ask(upstream, to(provider, body=body))
    (received,) = provider.requests
    assert received.body == body
    assert received.header("content-length") == [str(len(body))] and not received.header("transfer-encoding")


async def test_a_streamed_body_of_unknown_length(upstream: Upstream, provider: ScriptedProvider) -> None:
    provider.reply(Reply.json(b"{}"))
    await ask(upstream, to(provider, body=pieces(b"one", b"two", bytes(300_000))))
    (received,) = provider.requests
    assert received.body == b"onetwo" + bytes(300_000)
    assert received.header("transfer-encoding") == ["chunked"] and not received.header("content-length")


async def test_a_streamed_body_of_known_length(upstream: Upstream, provider: ScriptedProvider) -> None:
    provider.reply(Reply.json(b"{}"))
    headers = [(b"content-length", b"300006")]
    await ask(upstream, to(provider, headers=headers, body=pieces(b"one", b"two", bytes(300_000))))
    (received,) = provider.requests
    assert received.body == b"onetwo" + bytes(300_000)
    assert received.header("content-length") == ["300006"] and not received.header("transfer-encoding")


async def test_a_streamed_body_goes_out_as_it_comes(upstream: Upstream) -> None:
    first_arrived = Gate()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        assert await reader.readexactly(5) == b"first"
        first_arrived.set()
        assert await reader.readexactly(6) == b"second"
        writer.write(b"HTTP/1.1 204 No Content\r\n\r\n")

    async def body() -> AsyncIterator[bytes]:
        yield b"first"
        await first_arrived.wait()
        yield b"second"

    async with listening(serve) as origin:
        head, _ = await ask(upstream, to(origin, headers=[(b"content-length", b"11")], body=body()))
        assert head.status == 204


async def test_a_streamed_body_that_breaks_off_is_an_error_and_no_request(
    upstream: Upstream, provider: ScriptedProvider
) -> None:
    async def body() -> AsyncIterator[bytes]:
        yield b"one"
        raise ConnectionError("the client has gone")

    await fails(upstream, to(provider, body=body()), Unsendable)
    assert not provider.requests, "a body without its end must not look like a whole one"


async def test_a_streamed_body_that_breaks_off_takes_the_response_with_it(upstream: Upstream) -> None:
    """A provider may begin to answer before it has the whole body, and then wait for the rest."""
    answered = Gate()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nearly")
        await reader.read(-1)

    async def body() -> AsyncIterator[bytes]:
        yield b"one"
        await answered.wait()
        raise UpstreamError("anything")

    async with listening(serve) as origin, asyncio.timeout(BOUND):
        response = await upstream.send(to(origin, body=body()))
        assert await response.read() == b"early"
        answered.set()
        with pytest.raises(UpstreamError):
            await response.read()
        response.close()


async def test_an_answer_that_does_not_wait_for_the_body(upstream: Upstream) -> None:
    # RFC 9112 section 9.5: a server may answer early, as with 413, and close.
    answered = Gate()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 413 Content Too Large\r\nContent-Length: 3\r\nConnection: close\r\n\r\nbig")
        answered.set()
        await reader.read(-1)

    async def body() -> AsyncIterator[bytes]:
        yield b"some"
        await answered.wait()
        await asyncio.Event().wait()  # and the rest never comes

    async with listening(serve) as origin:
        head, said = await ask(upstream, to(origin, headers=[(b"content-length", b"11")], body=body()))
        assert (head.status, said) == (413, b"big")


# ---- the response ----


@pytest.mark.parametrize("framing", ["chunked", "length", "close"])
async def test_pieces_come_one_by_one_as_they_were_sent(
    upstream: Upstream, provider: ScriptedProvider, framing: Framing
) -> None:
    gates = [Gate(), Gate()]
    provider.reply(Reply(body=[b"one", Wait(gates[0]), b"two", Wait(gates[1]), b"three"], framing=framing))
    async with asyncio.timeout(BOUND):
        response = await upstream.send(to(provider))
        assert await response.read() == b"one"
        gates[0].set()
        assert await response.read() == b"two"
        gates[1].set()
        assert await response.read() == b"three"
        assert await response.read() == b""
        assert await response.read() == b"", "the end stays the end"
    response.close()


async def test_the_head_comes_before_the_body(upstream: Upstream, provider: ScriptedProvider) -> None:
    gate = Gate()
    provider.reply(Reply(529, [("X-Odd", "a"), ("retry-after", "7"), ("x-odd", " b  c ")], [Wait(gate), b"x"]))
    async with asyncio.timeout(BOUND):
        response = await upstream.send(to(provider))
    assert response.head.status == 529 and not response.head.ok
    assert [field for field in response.head.headers if field[0] != b"transfer-encoding"] == [
        (b"x-odd", b"a"),
        (b"retry-after", b"7"),
        (b"x-odd", b"b  c"),
    ]
    gate.set()
    assert await rest(response) == b"x"


async def test_response_header_values_are_bytes(upstream: Upstream, provider: ScriptedProvider) -> None:
    provider.reply(Reply(200, [("x-latin", "Andr\xe9"), ("x-utf8", "é".encode().decode("latin-1")), ("x-empty", "")]))
    head, _ = await ask(upstream, to(provider))
    values = dict(head.headers)
    assert (values[b"x-latin"], values[b"x-utf8"], values[b"x-empty"]) == (b"Andr\xe9", "é".encode(), b"")


@pytest.mark.parametrize("framing", ["chunked", "length", "close"])
async def test_a_large_body(upstream: Upstream, provider: ScriptedProvider, framing: Framing) -> None:
    body = [bytes([i]) * 100_000 for i in range(100)]
    provider.reply(Reply(body=body, framing=framing))
    assert (await ask(upstream, to(provider)))[1] == b"".join(body)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_redirects_are_answers(upstream: Upstream, provider: ScriptedProvider, status: int) -> None:
    # One followed would carry the credential to wherever it points.
    provider.reply(Reply(status, [("Location", "/elsewhere")], [b"there"], "length"))
    head, body = await ask(upstream, to(provider, method="GET"))
    assert (head.status, body, len(provider.requests)) == (status, b"there", 1)


async def test_cookies_are_not_kept(upstream: Upstream, provider: ScriptedProvider) -> None:
    cookies = [("Set-Cookie", "a=1; Path=/"), ("Set-Cookie", "odd \x80=;;=")]
    provider.replies(Reply(200, cookies), Reply())
    head, _ = await ask(upstream, to(provider))
    assert len([name for name, _ in head.headers if name == b"set-cookie"]) == 2
    await ask(upstream, to(provider))
    assert provider.requests[1].header("cookie") == []


@pytest.mark.parametrize(
    "headers",
    [[("x-big", "v" * 60_000)], [(f"x-{i}", "v" * 100) for i in range(600)]],
    ids=["one field", "600 fields"],
)
async def test_big_response_headers(
    upstream: Upstream, provider: ScriptedProvider, headers: Sequence[tuple[str, str]]
) -> None:
    provider.reply(Reply(200, headers, [b"x"]))
    head, body = await ask(upstream, to(provider))
    assert [(k.decode(), v.decode()) for k, v in head.headers if k.startswith(b"x-")] == list(headers) and body == b"x"


async def test_an_endless_response_head_is_given_up(upstream: Upstream) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\n")
        for _ in range(1000):
            writer.write(b"x-a: " + bytes(b"v" * 100_000))
            await writer.drain()

    async with listening(serve) as origin:
        await fails(upstream, to(origin))


@pytest.mark.parametrize("interim", [b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n"])
async def test_interim_responses_are_no_answers(upstream: Upstream, provider: ScriptedProvider, interim: bytes) -> None:
    provider.reply(Reply(201, before=[interim, interim], body=[b"x"]))
    head, body = await ask(upstream, to(provider, body=b"{}"))
    assert (head.status, body) == (201, b"x")
    assert not any(name == b"link" for name, _ in head.headers)


@pytest.mark.parametrize(
    ("method", "reply"),
    [
        ("HEAD", Reply(200, [("Content-Length", "10")])),
        ("HEAD", Reply(200, framing="chunked")),
        ("GET", Reply(204)),
        ("GET", Reply(304, [("Content-Length", "10"), ("ETag", '"x"')])),
    ],
    ids=["HEAD", "chunked HEAD", "204", "304"],
)
async def test_responses_without_a_body(upstream: Upstream, provider: ScriptedProvider, method: str, reply: Reply) -> None:
    # RFC 9112 section 6.3: whatever their headers say; and the connection goes on.
    provider.replies(reply, reply)
    for _ in range(2):
        head, body = await ask(upstream, to(provider, method=method))
        assert (head.status, body) == (reply.status, b"")
    assert provider.connections == 1


@pytest.mark.parametrize("coding", ["gzip", "br", "zstd", "deflate", "made-up"])
async def test_nothing_is_decoded(upstream: Upstream, provider: ScriptedProvider, coding: str) -> None:
    # And it need not even be what it says.
    provider.reply(Reply(200, [("Content-Encoding", coding)], [b"\x1f\x8b no ", b"such thing"]))
    head, body = await ask(upstream, to(provider))
    assert (head.coding, body) == (coding, b"\x1f\x8b no such thing")


# ---- what goes wrong ----


@pytest.mark.parametrize("how", [CUT, RESET], ids=["FIN", "RST"])
@pytest.mark.parametrize("framing", ["chunked", "length", "close"])
async def test_a_cut_body_is_an_error_after_what_came_before_it(
    upstream: Upstream, provider: ScriptedProvider, framing: Framing, how: Cut
) -> None:
    gate = Gate()
    steps: list[Step] = [b"one", b"two", Wait(gate), how, b"never"]
    provider.reply(Reply(body=steps, framing=framing))
    async with asyncio.timeout(BOUND):
        response = await upstream.send(to(provider))
    received = bytearray()
    while len(received) < 6:
        received += await response.read()
    gate.set()
    if framing == "close" and how is CUT:
        assert await rest(response) == b""  # the end of such a body is the end of the connection
    else:
        with pytest.raises(UpstreamError) as caught:
            await rest(response)
        assert not isinstance(caught.value, UpstreamTimeout)
        with pytest.raises(UpstreamError):
            await response.read()  # it stays broken
    response.close()
    assert bytes(received) == b"onetwo"


@pytest.mark.parametrize("framing", ["chunked", "length"])
async def test_what_came_before_a_cut_is_not_lost_on_a_slow_reader(
    upstream: Upstream, provider: ScriptedProvider, framing: Framing
) -> None:
    provider.reply(Reply(body=[b"one", b"two", CUT, b"never"], framing=framing))
    async with asyncio.timeout(BOUND):
        response = await upstream.send(to(provider))
        await (await provider.exchange()).finished.wait()
        await another_round_trip(provider)  # by now the end of the connection has been noticed, too
    assert await response.read() == b"onetwo"
    with pytest.raises(UpstreamError):
        await response.read()
    response.close()


@pytest.mark.parametrize("body", [b"zz\r\nabc\r\n", b"3\r\nabcd\r\n", b"-1\r\n\r\n", b"ffffffffffffffffff\r\n"])
async def test_broken_chunks_are_an_error(upstream: Upstream, provider: ScriptedProvider, body: bytes) -> None:
    provider.reply(Reply(200, [("Transfer-Encoding", "chunked")], [b"2\r\nok\r\n", body, STALL], "length"))
    await fails(upstream, to(provider))


@pytest.mark.parametrize(
    "head",
    [
        b"garbage\r\n\r\n",
        b"HTTP/1.1 2000 OK\r\n\r\n",
        b"HTTP/1.1 abc OK\r\n\r\n",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
        b"HTTP/1.1 200 OK\r\nContent-Length: -3\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nContent-Le",
        b"",
    ],
    ids=lambda head: repr(head[:70]),
)
async def test_what_is_not_http_is_an_error(upstream: Upstream, provider: ScriptedProvider, head: bytes) -> None:
    # Two framings in one head are how responses are smuggled (RFC 9112 section 6.3, item 3).
    provider.reply(Reply(before=[head, CUT]))
    error = await fails(upstream, to(provider))
    assert "127.0.0.1" not in error.message and "Error" not in error.message


@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
async def test_a_request_is_sent_once(upstream: Upstream, provider: ScriptedProvider, method: str) -> None:
    # design.md section 4: no retries, whatever RFC 9110 allows for GET: the caller decides.
    provider.handle(lambda _: Reply(before=[CUT]))
    await fails(upstream, to(provider, method=method))
    assert len(provider.requests) == 1
    provider.reply(Reply())
    await ask(upstream, to(provider, method=method))
    await fails(upstream, to(provider, method=method))  # the same on a connection that had been used
    assert len(provider.requests) == 3


async def test_nobody_listens(upstream: Upstream) -> None:
    async with ScriptedProvider() as provider:
        gone = provider.url
    error = await fails(upstream, to(gone), Unreachable)
    assert error.status == 502 and "refused" in error.message.lower()


async def test_a_name_that_does_not_resolve(upstream: Upstream) -> None:
    error = await fails(upstream, to("http://no-such-host.invalid"), Unreachable)  # RFC 2606
    assert error.status == 502


@pytest.mark.parametrize("streamed", [False, True], ids=["bytes", "streamed"])
async def test_a_provider_that_closes_before_it_has_the_request(upstream: Upstream, streamed: bool) -> None:
    """It cannot have accepted it. Whether it is down, or does not want a body of that size, cannot be told."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.transport.abort()

    async with listening(serve) as origin:
        body = bytes(20_000_000)
        await fails(upstream, to(origin, body=pieces(body, body) if streamed else body), Unfinished)


@pytest.mark.parametrize("url", ["http://127.0.0.1:99999", "http://", "ftp://127.0.0.1", "http://[::1"])
async def test_what_is_no_url(upstream: Upstream, url: str) -> None:
    await fails(upstream, to(url), Unreachable if url == "http://" else Unsendable)


async def test_timeout_of_the_connection(make: Make, silent_tls: str) -> None:
    """A connection is open when TLS is: here the server accepts, and says nothing."""
    async with opened(make(connect_timeout=SOON, idle_timeout=BOUND)) as upstream:
        error = await fails(upstream, to(silent_tls), ConnectTimeout)
    assert error.status == 504


@pytest.mark.parametrize("name", ["idle_timeout", "first_byte_timeout"])
async def test_timeout_before_the_head(make: Make, provider: ScriptedProvider, name: str) -> None:
    provider.reply(Reply(before=[STALL]))
    async with opened(make(**{name: SOON})) as upstream:
        error = await fails(upstream, to(provider), UpstreamTimeout)
    assert error.status == 504
    await (await provider.exchange()).client_gone.wait()


async def test_a_head_that_comes_byte_by_byte_is_none_in_time(make: Make) -> None:
    """Nor are interim responses the one that is awaited."""

    async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 200 OK\r\nx: ")
        while not writer.is_closing():
            writer.write(b"x")
            await asyncio.sleep(SOON / 4)

    async with listening(drip) as origin, opened(make(first_byte_timeout=SOON)) as upstream:
        await fails(upstream, to(origin), UpstreamTimeout)


async def test_a_slow_first_byte_is_not_a_slow_body(make: Make, provider: ScriptedProvider) -> None:
    """A model thinks for minutes before it says something, and then must not fall silent for as long."""
    gate = Gate()
    provider.reply(Reply(before=[Wait(gate)], body=[b"one", STALL, b"never"], framing="length"))
    async with opened(make(first_byte_timeout=BOUND, idle_timeout=SOON)) as upstream:
        asked = asyncio.create_task(upstream.send(to(provider)))
        assert not (await asyncio.wait([asked], timeout=3 * SOON))[0]
        gate.set()
        response = await asked
        with pytest.raises(UpstreamTimeout):
            await rest(response)
        response.close()


async def test_after_a_large_body_the_head_has_its_own_time(make: Make, provider: ScriptedProvider) -> None:
    provider.reply(Reply(before=[STALL]))
    async with opened(make(first_byte_timeout=SOON)) as upstream:
        await fails(upstream, to(provider, body=bytes(3_000_000)), UpstreamTimeout)


@pytest.mark.parametrize("framing", ["chunked", "length", "close"])
async def test_timeout_within_the_body(make: Make, provider: ScriptedProvider, framing: Framing) -> None:
    provider.reply(Reply(body=[b"one", STALL, b"never"], framing=framing))
    async with opened(make(idle_timeout=BRIEF)) as upstream:
        response = await upstream.send(to(provider))
        assert await response.read() == b"one"
        with pytest.raises(UpstreamTimeout):
            await rest(response)
        response.close()
        await (await provider.exchange()).client_gone.wait()


@pytest.mark.parametrize("streamed", [False, True], ids=["bytes", "streamed"])
async def test_timeout_while_the_provider_does_not_take_the_body(make: Make, streamed: bool) -> None:
    async with listening(never_reads) as origin, opened(make(idle_timeout=SOON)) as upstream:
        body = bytes(20_000_000)
        await fails(upstream, to(origin, body=pieces(body, body) if streamed else body), UpstreamTimeout)


async def test_a_slow_upload_is_not_a_slow_provider(make: Make, provider: ScriptedProvider) -> None:
    gate = Gate()
    provider.reply(Reply(204))

    async def body() -> AsyncIterator[bytes]:
        yield b"one"
        await gate.wait()
        yield b"two"

    async with opened(make(idle_timeout=BRIEF)) as upstream:
        sending = asyncio.create_task(ask(upstream, to(provider, body=body())))
        done, _ = await asyncio.wait([sending], timeout=1.5 * BRIEF)
        assert not done
        gate.set()
        head, _ = await sending
    assert head.status == 204 and provider.requests[0].body == b"onetwo"


async def test_a_slow_reader_is_not_a_slow_provider(make: Make, provider: ScriptedProvider) -> None:
    body = bytes(8_000_000)
    provider.reply(Reply(body=[body], framing="length"))
    async with opened(make(idle_timeout=BRIEF)) as upstream:
        response = await upstream.send(to(provider))
        start = await response.read()
        await asyncio.wait([asyncio.create_task(asyncio.Event().wait())], timeout=1.5 * BRIEF)  # a client that is busy
        assert start + await rest(response) == body


async def test_closing_drops_the_connection(upstream: Upstream, provider: ScriptedProvider) -> None:
    provider.replies(Reply(body=[b"one", STALL]), Reply(before=[STALL]))
    response = await upstream.send(to(provider))
    assert await response.read() == b"one"
    response.close()
    response.close()  # a second time does no harm
    await (await provider.exchange(0)).client_gone.wait()


async def test_cancelling_drops_the_connection(upstream: Upstream, provider: ScriptedProvider) -> None:
    provider.reply(Reply(before=[STALL]))
    sending = asyncio.create_task(upstream.send(to(provider, body=bytes(1_000_000))))
    exchange = await provider.exchange(0)
    sending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await sending
    await exchange.client_gone.wait()


async def test_who_leaves_while_the_connection_comes_about(
    provider: ScriptedProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the very turn of the event loop, in which uvloop closes the transport and tells nobody."""

    class Watched(Connection):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            super().connection_made(transport)
            asyncio.get_running_loop().call_soon(sending.cancel)

    monkeypatch.setattr("aibridge.httpclient.Connection", Watched)
    async with opened(HttpUpstream()) as upstream, asyncio.timeout(BOUND):
        for _ in range(3):
            sending = asyncio.create_task(upstream.send(to(provider)))
            with pytest.raises(asyncio.CancelledError):
                await sending
        assert isinstance(upstream, HttpUpstream)
        while upstream._connections:
            await asyncio.sleep(0)


async def test_a_read_may_be_cancelled(upstream: Upstream, provider: ScriptedProvider) -> None:
    gate = Gate()
    provider.reply(Reply(body=[b"one", Wait(gate), b"two"]))
    response = await upstream.send(to(provider))
    assert await response.read() == b"one"
    reading = asyncio.create_task(response.read())
    await another_round_trip(provider)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    gate.set()
    assert await rest(response) == b"two", "nothing is lost"


async def test_aclose_drops_what_is_under_way(make: Make, provider: ScriptedProvider) -> None:
    provider.reply(Reply(body=[b"one", STALL]))
    upstream = make()
    response = await upstream.send(to(provider))
    await upstream.aclose()
    await upstream.aclose()
    await (await provider.exchange(0)).client_gone.wait()
    response.close()


# ---- connections ----


async def test_connections_are_used_again(upstream: Upstream, provider: ScriptedProvider) -> None:
    provider.handle(lambda received: Reply.json(received.body, status=200 if received.method == "GET" else 429))
    for method in ("GET", "POST", "POST", "DELETE"):
        await ask(upstream, to(provider, method=method, body=b"x" * 1000))
    assert (len(provider.requests), provider.connections) == (4, 1)


async def test_streams_have_connections_of_their_own(upstream: Upstream, provider: ScriptedProvider) -> None:
    gate = Gate()
    provider.handle(lambda received: Reply(body=[received.target.encode(), Wait(gate)]))
    responses = await asyncio.gather(*(upstream.send(to(provider, f"/{i}")) for i in range(150)))
    gate.set()
    assert [await rest(response) for response in responses] == [f"/{i}".encode() for i in range(150)]
    assert provider.connections == 150, "no limit on how many: one would make streams wait for each other"


async def test_a_connection_that_the_server_closed_while_idle_is_replaced(
    upstream: Upstream, provider: ScriptedProvider
) -> None:
    for _ in range(3):
        provider.reply(Reply(204, close=True, headers=[("Connection", "keep-alive")]))  # it says so, and closes
        head, _ = await ask(upstream, to(provider, body=b"{}"))
        assert head.status == 204
        await provider.exchanges[-1].finished.wait()
        await another_round_trip(provider)
    assert len([one for one in provider.requests if one.target == "/v1/x"]) == 3


async def test_a_connection_that_is_reset_while_idle_is_replaced(
    upstream: Upstream, provider: ScriptedProvider, caplog: pytest.LogCaptureFixture
) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 204 No Content\r\n\r\n")
        await writer.drain()
        await reset.wait()
        sock: socket.socket = writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()

    async with listening(serve) as origin:
        for _ in range(3):
            reset = Gate()
            assert (await ask(upstream, to(origin)))[0].status == 204
            reset.set()
            await another_round_trip(provider)
    gc.collect()
    assert not caplog.records, "nothing was lost, so there is nothing to report"


async def test_a_half_read_response_is_not_used_again(upstream: Upstream, provider: ScriptedProvider) -> None:
    gate = Gate()
    provider.replies(Reply(body=[b"one", Wait(gate), b"two"]), Reply.json(b"{}"))
    response = await upstream.send(to(provider))
    await response.read()
    response.close()
    gate.set()
    assert (await ask(upstream, to(provider)))[1] == b"{}"
    assert [received.connection for received in provider.requests] == [0, 1]


async def test_back_pressure(upstream: Upstream) -> None:
    """A reader that does not read stops the provider; nobody keeps the rest in memory."""
    total, piece, sent = 64_000_000, bytes(64_000), 0
    stuck = Gate()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        await reader.readuntil(b"\r\n\r\n")
        writer.transport.set_write_buffer_limits(high=0)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % total)
        while sent < total:
            writer.write(piece)
            sent += len(piece)
            with suppress(TimeoutError):
                async with asyncio.timeout(1):
                    await writer.drain()
                    continue
            stuck.set()
            await writer.drain()

    async with listening(serve) as origin:
        tracemalloc.start()
        try:
            response = await upstream.send(to(origin))
            await stuck.wait()
            held, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert held < 2_000_000, "in this process: both sides' buffers"
        assert sent < 12_000_000, "most of it in the kernel, which lets a loopback connection have up to 10 MB"
        received = 0
        while data := await response.read():
            received += len(data)
        assert received == total
        response.close()


# ---- TLS ----


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl command to make certificates with")
    return Authority.make(tmp_path_factory.mktemp("ca"))


@pytest.fixture(scope="session")
def certificates(authority: Authority) -> dict[str, ssl.SSLContext]:
    return {"own": authority.server("IP:127.0.0.1", "DNS:localhost"), "other": authority.server("DNS:elsewhere.example")}


async def test_tls_with_a_custom_ca(
    upstream: Upstream, provider: ScriptedProvider, authority: Authority, certificates: dict[str, ssl.SSLContext]
) -> None:
    provider.handle(lambda received: Reply(body=[received.body]))
    async with terminating(certificates["own"], provider) as origin:
        for _ in range(2):
            request = to(origin, "/s?x", body=bytes(500_000), ca_file=str(authority.ca_file))
            assert (await ask(upstream, request))[1] == bytes(500_000)
    assert provider.connections == 1, "kept alive"
    assert provider.requests[0].target == "/s?x"


async def test_tls_with_an_unknown_ca_is_refused(
    upstream: Upstream, provider: ScriptedProvider, certificates: dict[str, ssl.SSLContext], tmp_path: Path
) -> None:
    strangers = Authority.make(tmp_path)
    async with terminating(certificates["own"], provider) as origin:
        error = await fails(upstream, to(origin), Unreachable)
        assert "certificate" in error.message
        await fails(upstream, to(origin, ca_file=str(strangers.ca_file)), Unreachable)
    assert not provider.requests


async def test_tls_checks_the_name(
    upstream: Upstream, provider: ScriptedProvider, authority: Authority, certificates: dict[str, ssl.SSLContext]
) -> None:
    async with terminating(certificates["other"], provider) as origin:
        error = await fails(upstream, to(origin, ca_file=str(authority.ca_file)), Unreachable)
    assert "certificate" in error.message and not provider.requests


async def test_a_ca_is_trusted_for_its_own_provider_only(
    upstream: Upstream, provider: ScriptedProvider, authority: Authority, certificates: dict[str, ssl.SSLContext]
) -> None:
    provider.handle(lambda _: Reply())
    async with terminating(certificates["own"], provider) as origin:
        await ask(upstream, to(origin, ca_file=str(authority.ca_file)))
        await fails(upstream, to(origin), Unreachable)


@pytest.mark.parametrize("content", [None, "not a certificate"], ids=["missing", "no PEM"])
async def test_a_ca_file_that_is_none(upstream: Upstream, tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "ca.pem"
    if content is not None:
        path.write_text(content)
    await fails(upstream, to("https://127.0.0.1:9", ca_file=str(path)), Unreachable)


async def test_plain_http_where_tls_is_expected(upstream: Upstream) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    async with listening(serve) as origin:
        await fails(upstream, to(origin.replace("http:", "https:")), Unreachable)


# ---- proxies ----


class Proxy:
    """An HTTP proxy that keeps the heads of what it was asked, and connects to where it is told whatever the name is."""

    def __init__(self, target_port: int, refuse: int = 0) -> None:
        self.heads: list[bytes] = []
        self._target_port = target_port
        self._refuse = refuse

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        self.heads.append(head)
        if self._refuse:
            writer.write(b"HTTP/1.1 %d No\r\nContent-Length: 0\r\n\r\n" % self._refuse)
            return
        there, away = await asyncio.open_connection("127.0.0.1", self._target_port)
        if head.startswith(b"CONNECT "):
            writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        else:
            away.write(head)
        await splice((reader, away), (there, writer))


async def test_http_proxy(make: Make, provider: ScriptedProvider, monkeypatch: pytest.MonkeyPatch) -> None:
    provider.handle(lambda _: Reply.json(b"{}"))
    proxy = Proxy(provider.port)
    async with listening(proxy.serve) as origin:
        monkeypatch.setenv("HTTP_PROXY", origin.replace("http://", "http://us%40er:pw@"))
        async with opened(make()) as upstream:
            await ask(upstream, to("http://api.example:81", "/a%20b?c", headers=[(b"x-a", b"1")], body=b"{}"))
    request_line, *lines = proxy.heads[0].decode().split("\r\n")
    assert request_line == "POST http://api.example:81/a%20b?c HTTP/1.1"  # RFC 9112 section 3.2.2
    assert "host: api.example:81" in map(str.lower, lines)
    assert f"Proxy-Authorization: Basic {base64.b64encode(b'us@er:pw').decode()}" in lines
    assert provider.requests[0].header("x-a") == ["1"]


async def test_https_proxy(
    make: Make,
    provider: ScriptedProvider,
    authority: Authority,
    certificates: dict[str, ssl.SSLContext],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Through CONNECT, with TLS from here to the provider: the proxy sees the name and no more."""
    provider.handle(lambda _: Reply.json(b"{}"))
    async with terminating(certificates["own"], provider) as secure:
        proxy = Proxy(int(secure.rpartition(":")[2]))
        async with listening(proxy.serve) as origin:
            monkeypatch.setenv("https_proxy", origin.replace("http://", "http://user:pw@"))
            async with opened(make()) as upstream:
                ca_file = str(authority.ca_file)
                for _ in range(2):
                    request = to("https://localhost:81", "/secret", headers=[(b"x-api-key", b"sk")], ca_file=ca_file)
                    assert (await ask(upstream, request))[1] == b"{}"
    (head,) = proxy.heads
    assert head.startswith(b"CONNECT localhost:81 HTTP/1.1\r\n")  # RFC 9110 section 9.3.6
    assert b"secret" not in head and b"sk" not in head.lower()
    assert b"Proxy-Authorization: Basic dXNlcjpwdw==" in head
    assert provider.requests[0].header("proxy-authorization") == [] and provider.requests[0].target == "/secret"


async def test_a_proxy_without_a_scheme(make: Make, provider: ScriptedProvider, monkeypatch: pytest.MonkeyPatch) -> None:
    provider.handle(lambda _: Reply.json(b"{}"))
    proxy = Proxy(provider.port)
    async with listening(proxy.serve) as origin:
        monkeypatch.setenv("http_proxy", origin.removeprefix("http://"))  # as curl takes it
        async with opened(make()) as upstream:
            await ask(upstream, to("http://api.example"))
    assert len(proxy.heads) == 1


@pytest.mark.parametrize("no_proxy", ["127.0.0.1", "*", "localhost,127.0.0.1", ".example, 127.0.0.1"])
async def test_no_proxy(make: Make, provider: ScriptedProvider, monkeypatch: pytest.MonkeyPatch, no_proxy: str) -> None:
    provider.handle(lambda _: Reply())
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", no_proxy)
    async with opened(make()) as upstream:
        await ask(upstream, to(provider))
    assert len(provider.requests) == 1


@pytest.mark.parametrize("status", [407, 503])
async def test_a_proxy_that_refuses(make: Make, monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    proxy = Proxy(9, refuse=status)
    async with listening(proxy.serve) as origin:
        monkeypatch.setenv("HTTPS_PROXY", origin.replace("http://", "http://user:hunter2@"))
        async with opened(make()) as upstream:
            error = await fails(upstream, to("https://api.example"), Unreachable)
    assert str(status) in error.message and "hunter2" not in error.message


async def test_a_proxy_that_is_not_there(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://user:hunter2@127.0.0.1:9")
    async with opened(make()) as upstream:
        error = await fails(upstream, to("https://api.example"), Unreachable)
    assert "hunter2" not in error.message


async def test_a_proxy_that_says_nothing(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    async with listening(never_reads) as origin:
        monkeypatch.setenv("HTTPS_PROXY", origin)
        async with opened(make(connect_timeout=SOON)) as upstream:
            await fails(upstream, to("https://api.example"), ConnectTimeout)


@pytest.mark.parametrize("proxied", [False, True], ids=["direct", "with a proxy"])
async def test_netrc_is_not_used(
    make: Make, provider: ScriptedProvider, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, proxied: bool
) -> None:
    # A credential that nobody configured would take the place of none, or of the client's.
    (tmp_path / ".netrc").write_text("default login user password hunter2\n")
    (tmp_path / ".netrc").chmod(0o600)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    provider.handle(lambda _: Reply())
    proxy = Proxy(provider.port)
    async with listening(proxy.serve) as origin:
        if proxied:
            monkeypatch.setenv("HTTP_PROXY", origin)
        async with opened(make()) as upstream:
            await ask(upstream, to(provider))
    (received,) = provider.requests
    assert received.header("authorization") == [] and received.header("proxy-authorization") == []
    assert len(proxy.heads) == proxied


# ---- the fake ----


async def test_memory_upstream_answers_from_memory() -> None:
    broken = UpstreamError("cut")
    upstream = MemoryUpstream(lambda request: MemoryResponse(ResponseHead(200, []), [request.url.encode(), broken]))
    response = await upstream.send(UpstreamRequest("GET", "http://x/y", []))
    assert await response.read() == b"http://x/y"
    with pytest.raises(UpstreamError) as caught:
        await response.read()
    assert caught.value is broken
    assert await response.read() == b""
    response.close()
    assert isinstance(response, MemoryResponse) and response.closed
    assert [request.url for request in upstream.requests] == ["http://x/y"]
    await upstream.aclose()


async def test_memory_upstream_raises_what_its_function_raises() -> None:
    def refuse(request: UpstreamRequest) -> UpstreamResponse:
        raise UpstreamTimeout("late")

    with pytest.raises(UpstreamTimeout):
        await MemoryUpstream(refuse).send(UpstreamRequest("GET", "http://x", []))


# ---- servers ----

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], object]


@asynccontextmanager
async def listening(serve: Callable[..., object], context: ssl.SSLContext | None = None) -> AsyncIterator[str]:
    """A server of a few lines; its connections end with their function, or with the test."""
    running: set[asyncio.Task[None]] = set()

    async def one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        running.add(task)
        try:
            await serve(reader, writer)  # type: ignore[misc]
            with suppress(OSError):
                await writer.drain()
        except (EOFError, OSError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(one, "127.0.0.1", 0, ssl=context)
    scheme = "http" if context is None else "https"
    try:
        yield f"{scheme}://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


@asynccontextmanager
async def terminating(context: ssl.SSLContext, provider: ScriptedProvider) -> AsyncIterator[str]:
    """TLS in front of a scripted provider."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, away = await asyncio.open_connection("127.0.0.1", provider.port)
        await splice((reader, away), (there, writer))

    async with listening(serve, context) as origin:
        yield origin


async def splice(*ways: tuple[asyncio.StreamReader, asyncio.StreamWriter]) -> None:
    """Copy from each reader to its writer until one of them ends."""

    async def copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await source.read(65536):
                sink.write(data)
                await sink.drain()

    copies = [asyncio.create_task(copy(*way)) for way in ways]
    try:
        await asyncio.wait(copies, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for _, sink in ways:
            sink.close()
        for task in copies:
            task.cancel()
        await asyncio.gather(*copies, return_exceptions=True)


async def never_reads(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    reader._transport.pause_reading()  # type: ignore[attr-defined]
    await asyncio.Event().wait()


@pytest.fixture
async def silent_tls() -> AsyncIterator[str]:
    async with listening(never_reads) as origin:
        yield origin.replace("http:", "https:")


async def another_round_trip(provider: ScriptedProvider) -> None:
    """Turns of the event loop enough for what has already happened on other connections to be noticed."""
    provider.reply(Reply(204, close=True))
    reader, writer = await asyncio.open_connection("127.0.0.1", provider.port)
    writer.write(b"GET /another-round-trip HTTP/1.1\r\nHost: x\r\n\r\n")
    async with asyncio.timeout(BOUND):
        await reader.read()
    writer.close()
    with suppress(OSError):
        await writer.wait_closed()
