"""What a client that pools connections must never mix up, beside what tests/test_upstream.py demands of any.

Truth: RFC 9110 (9.3.6: a length in the answer to CONNECT is to be ignored; 6.5.1: trailers are no header fields) and
RFC 9112 (6.3: how a body's length is told; 9.2: a response without a request ends the connection).
"""

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

import pytest

from aibridge import httpclient
from aibridge.errors import ConnectTimeout, Unfinished, UpstreamError, UpstreamTimeout
from aibridge.httpclient import HttpUpstream
from aibridge.upstream import Body, UpstreamRequest, UpstreamResponse

SECONDS = 10
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"

Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def listening(talk: Talk) -> AsyncIterator[str]:
    """A server that says what it likes."""
    writers: list[asyncio.StreamWriter] = []

    async def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            await talk(reader, writer)

    server = await asyncio.start_server(accepted, "127.0.0.1", 0)
    try:
        async with asyncio.timeout(SECONDS):
            yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for writer in writers:
            writer.close()


async def body_of(response: UpstreamResponse) -> bytes:
    return b"".join([piece async for piece in pieces_of(response)])


async def pieces_of(response: UpstreamResponse) -> AsyncIterator[bytes]:
    while piece := await response.read():
        yield piece


@asynccontextmanager
async def client(*, idle_timeout: float = SECONDS, **timeouts: float) -> AsyncIterator[HttpUpstream]:
    upstream = HttpUpstream(idle_timeout=idle_timeout, **timeouts)
    try:
        yield upstream
    finally:
        async with asyncio.timeout(SECONDS):
            await upstream.aclose()


def post(url: str, body: Body = b"", *headers: tuple[bytes, bytes]) -> UpstreamRequest:
    return UpstreamRequest("POST", url + "/x", headers, body)


async def streamed(*pieces: bytes) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece


async def test_the_answer_to_connect_is_no_response(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a length of zero it once looked complete, and its connection, without TLS, was given to the next request."""
    seen: list[bytes] = []
    connected = asyncio.Event()

    async def proxy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        connected.set()
        while data := await reader.read(65536):
            seen.append(data)

    async with listening(proxy) as url:
        monkeypatch.setenv("HTTPS_PROXY", url)
        monkeypatch.delenv("NO_PROXY", raising=False)
        monkeypatch.delenv("no_proxy", raising=False)
        async with client() as upstream:
            first = asyncio.create_task(upstream.send(post("https://[2001:db8::1]", b"secret")))
            await connected.wait()
            second = asyncio.create_task(upstream.send(post("https://[2001:db8::1]", b"secret")))
            while len(seen) < 4:  # two tunnels, and a handshake in each
                await asyncio.sleep(0.01)
            first.cancel()
            second.cancel()
            await asyncio.wait([first, second])
        assert sum(data.startswith(b"CONNECT [2001:db8::1]:443 HTTP/1.1\r\n") for data in seen) == 2
        assert b"secret" not in b"".join(seen)


@pytest.mark.parametrize("pieces", [[b"12345", b"GET /smuggled HTTP/1.1\r\n\r\n"], [b"12"], []])
async def test_a_body_is_held_to_its_length(pieces: list[bytes]) -> None:
    """What is too much would be another request, what is missing would be taken from the next."""
    seen = bytearray()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            seen.extend(data)

    async with listening(talk) as url, client() as upstream:
        with pytest.raises(UpstreamError, match="not as long as declared"):
            await upstream.send(post(url, streamed(*pieces), (b"content-length", b"5")))
    assert b"smuggled" not in seen


async def test_trailers_are_no_header_fields() -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
        writer.write(head + b"2\r\nok\r\n0\r\nset-cookie: a=b\r\ncontent-encoding: gzip\r\n\r\n")

    async with listening(talk) as url, client() as upstream:
        response = await upstream.send(post(url))
        assert await body_of(response) == b"ok"
        assert response.head.headers == [(b"transfer-encoding", b"chunked")]


@pytest.mark.parametrize("extra", [OK, b"ok", b"HTTP/1.1 200 OK\r\n"])
async def test_what_follows_a_response_is_not_the_next_one(extra: bytes) -> None:
    connections = 0

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        answer = OK + extra if connections == 1 else OK.replace(b"ok", b"me")
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)

    async with listening(talk) as url, client() as upstream:
        assert await body_of(await upstream.send(post(url))) == b"ok"
        assert await body_of(await upstream.send(post(url))) == b"me"
    assert connections == 2


async def test_chunked_is_chunked_whatever_came_before_it() -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n")
        writer.close()

    async with listening(talk) as url, client() as upstream:
        response = await upstream.send(post(url))
        assert await response.read() == b"ok"
        with pytest.raises(UpstreamError):
            await response.read()


async def test_what_was_dropped_has_not_ended() -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\n\r\nok")
        await reader.read()

    async with listening(talk) as url, client() as upstream:
        response = await upstream.send(post(url))
        assert await response.read() == b"ok"
        await upstream.aclose()
        with pytest.raises(UpstreamError):
            await response.read()


async def test_nobody_waits_for_the_rest_of_an_upload_that_was_answered() -> None:
    gone, never = asyncio.Event(), asyncio.Event()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\n\r\n")
        try:
            while await reader.read(65536):
                pass
        finally:
            gone.set()

    async def endless() -> AsyncIterator[bytes]:
        yield b"1"
        await never.wait()

    async with listening(talk) as url, client() as upstream:
        response = await upstream.send(post(url, endless()))
        assert response.head.status == 413 and await response.read() == b""
        await gone.wait()


async def test_a_body_whose_reading_is_cancelled_fails_the_request() -> None:
    async def cancelled() -> AsyncIterator[bytes]:
        yield b"1"
        raise asyncio.CancelledError

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async with listening(talk) as url, client() as upstream:
        with pytest.raises(UpstreamError):
            await upstream.send(post(url, cancelled()))


@pytest.mark.parametrize("url", ["http://http:1/x", "http://h:1/x", "http://p:1/v1"])
async def test_a_host_that_looks_like_a_part_of_the_scheme(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    targets: list[bytes] = []

    async def proxy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        targets.append((await reader.readuntil(b"\r\n\r\n")).split(b" ")[1])
        writer.write(OK)

    async with listening(proxy) as address:
        monkeypatch.setenv("HTTP_PROXY", address)
        monkeypatch.delenv("NO_PROXY", raising=False)
        monkeypatch.delenv("no_proxy", raising=False)
        async with client() as upstream:
            await upstream.send(UpstreamRequest("GET", url, []))
    assert targets == [url.encode()]


@pytest.mark.parametrize("target", ["/a b", "/a\tb", "/a\x7f", "/a\x0bHTTP/1.1"])
async def test_a_target_that_servers_might_split(target: str) -> None:
    async with client() as upstream:
        with pytest.raises(UpstreamError, match="cannot be written as HTTP"):
            await upstream.send(UpstreamRequest("GET", "http://127.0.0.1:1" + target, []))


async def test_a_connection_whose_request_was_not_read_is_not_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A provider may refuse a request by its head alone. What it left unread would be in front of the next one."""
    connected = httpclient._connected_socket

    async def with_little_room(host: str, port: int) -> socket.socket:
        found = await connected(host, port)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16_384)
        return found

    monkeypatch.setattr(httpclient, "_connected_socket", with_little_room)
    writers: list[asyncio.StreamWriter] = []

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        head = await reader.readuntil(b"\r\n\r\n")
        refused = b"content-length: 900000" in head  # and not read: the reader has its bound
        writer.write(b"HTTP/1.1 429 Too Many Requests\r\nContent-Length: 2\r\n\r\nno" if refused else OK)

    server = await asyncio.start_server(talk, "127.0.0.1", 0, limit=4096)
    for listener in server.sockets:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with asyncio.timeout(SECONDS), client() as upstream:
        first = await upstream.send(post(url, bytes(900_000)))
        assert (first.head.status, await body_of(first)) == (429, b"no")
        assert await body_of(await upstream.send(post(url, b"small"))) == b"ok"
    server.close()
    for writer in writers:
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()


# ---- what there is to tell ----


async def test_the_connections_to_each_host() -> None:
    gate = asyncio.Event()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            if head.startswith(b"GET /slow"):
                await gate.wait()
            writer.write(OK)

    async with listening(talk) as one, listening(talk) as other, client() as upstream:
        host, other_host = (url.removeprefix("http://") for url in (one, other))
        assert upstream.connections() == {}
        slow = asyncio.create_task(upstream.send(UpstreamRequest("GET", f"{one}/slow", [])))
        for url in (one, one, other):
            assert await body_of(await upstream.send(UpstreamRequest("GET", url, []))) == b"ok"
        assert upstream.connections() == {host: (1, 1, 2), other_host: (1, 0, 1)}
        gate.set()
        assert await body_of(await slow) == b"ok"
        assert upstream.connections()[host] == (2, 0, 2)
        gate.clear()
        given_up = asyncio.create_task(upstream.send(UpstreamRequest("GET", f"{one}/slow", [])))
        await asyncio.sleep(0)
        assert upstream.connections()[host] == (1, 1, 2)
        given_up.cancel()
        while upstream.connections()[host].in_use:
            await asyncio.sleep(0)
        assert upstream.connections()[host] == (1, 0, 2)
    while any(connections.in_use for connections in upstream.connections().values()):
        await asyncio.sleep(0)
    assert upstream.connections() == {host: (0, 0, 2), other_host: (0, 0, 1)}


async def test_what_could_not_be_connected_was_not_opened() -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        async with client() as upstream:
            with pytest.raises(UpstreamError):
                await upstream.send(UpstreamRequest("GET", f"http://127.0.0.1:{nobody.getsockname()[1]}", []))
            assert upstream.connections() == {}


# ---- which of its times is over, and how far a request has come: whoever sets timeouts has to know ----

LARGE = bytes(20_000_000)
BEGUN = b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nbegun"


async def reads_on(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
    while await reader.read(65536):
        pass


async def reads_nothing(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await writer.wait_closed()


async def begins(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(BEGUN)
    await reads_on(reader, writer)


async def hangs_up_early(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")
    writer.transport.abort()


def hangs_up_after(said: bytes) -> Talk:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(said)
        writer.close()

    return talk


@pytest.mark.parametrize(
    ("talk", "body", "timeouts", "kind", "words"),
    [
        (reads_on, b"", {"connect_timeout": 0.3}, ConnectTimeout, "The provider could not be reached in time."),
        (reads_nothing, LARGE, {"idle_timeout": 0.3}, UpstreamTimeout, "The provider did not take the request in time."),
        (reads_on, b"", {"first_byte_timeout": 0.3}, UpstreamTimeout, "The provider gave no answer in time."),
        (begins, b"", {"idle_timeout": 0.3}, UpstreamTimeout, "The provider's response broke off: nothing came in time."),
        (hangs_up_early, LARGE, {}, Unfinished, "The provider did not take the request: "),
        (hangs_up_after(b""), b"", {}, UpstreamError, "The provider gave no answer: it closed the connection."),
        (hangs_up_after(b"SSH-2.0\r\n"), b"", {}, UpstreamError, "The provider gave no answer: what it sent is not HTTP."),
        (hangs_up_after(BEGUN), b"", {}, UpstreamError, "The provider's response broke off: it closed the connection."),
    ],
)
async def test_an_error_says_how_far_it_came(
    talk: Talk, body: bytes, timeouts: dict[str, float], kind: type[UpstreamError], words: str
) -> None:
    """Our own words. Each timeout has its own; only where there was no connection was the provider not reached."""
    async with listening(talk) as url, client(**timeouts) as upstream:
        scheme = "https:" if kind is ConnectTimeout else "http:"  # and nobody answers the handshake
        with pytest.raises(kind) as failed:
            await body_of(await upstream.send(post(url.replace("http:", scheme), body)))
    assert type(failed.value) is kind
    assert failed.value.message == words or (words.endswith(" ") and failed.value.message.startswith(words))
