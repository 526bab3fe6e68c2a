"""The scripted provider keeps its word. Truth: RFC 9112 for the bytes; the rest is our own choice."""

import asyncio
import http.client
import random

import pytest

from tests.support.provider import (
    CUT,
    RESET,
    STALL,
    Gate,
    Reply,
    ScriptedProvider,
    ThreadedProvider,
    Wait,
    at_random,
    bytewise,
    cut_after,
    whole,
)

GET = b"GET /a?b=%20c HTTP/1.1\r\nHost: x\r\nX-Odd:  Two  words \r\nx-odd: again\r\n\r\n"


async def send(provider: ScriptedProvider, data: bytes, until: bytes = b"") -> bytes:
    """What the peer answers: up to ``until``, else until it closes (a reset counts as closing)."""
    reader, writer = await asyncio.open_connection("127.0.0.1", provider.port)
    try:
        writer.write(data)
        async with asyncio.timeout(10):
            if until:
                return await reader.readuntil(until)
            return await reader.read()
    finally:
        writer.close()


async def test_requests_are_kept_as_they_came() -> None:
    async with ScriptedProvider() as provider:
        provider.reply(Reply(body=[b"hello"], framing="close"))
        answer = await send(provider, GET)
    assert answer == b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nhello"
    (received,) = provider.requests
    assert (received.method, received.target, received.path, received.query) == ("GET", "/a?b=%20c", "/a", "b=%20c")
    assert received.headers == ((b"Host", b"x"), (b"X-Odd", b"Two  words"), (b"x-odd", b"again"))
    assert received.header("X-ODD") == ["Two  words", "again"]


async def test_framings_keep_alive_and_head() -> None:
    async with ScriptedProvider() as provider:
        provider.replies(
            Reply(body=[b"ab", b"", b"c"]),
            Reply(529, [("X-Y", "z")], [b"ab", b"c"], framing="length"),
            Reply(body=[b"abc"], framing="length"),
            Reply(body=[b"abc"], close=True),
        )
        head = GET.replace(b"GET", b"HEAD")
        answer = await send(provider, GET + GET + head + GET)
    assert answer == (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n1\r\nc\r\n0\r\n\r\n"
        b"HTTP/1.1 529 Unnamed\r\nX-Y: z\r\nContent-Length: 3\r\n\r\nabc"
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n"
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n3\r\nabc\r\n0\r\n\r\n"
    )
    assert provider.connections == 1
    assert [exchange.sent_all for exchange in provider.exchanges] == [True] * 4


async def test_request_bodies_and_expect() -> None:
    sized = b"POST / HTTP/1.1\r\nContent-Length: 3\r\nExpect: 100-continue\r\n\r\na\x00c"
    chunked = b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n2;x=y\r\nab\r\n1\r\nc\r\n0\r\nTrailer: t\r\n\r\n"
    async with ScriptedProvider(handler=lambda received: Reply.json(received.body)) as provider:
        answer = await send(provider, sized + chunked + GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
    assert answer.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n")
    assert [received.body for received in provider.requests] == [b"a\x00c", b"abc", b""]


@pytest.mark.parametrize("how", [CUT, RESET])
async def test_a_cut_body(how: object) -> None:
    async with ScriptedProvider() as provider:
        provider.replies(
            Reply(body=cut_after(b"abcdef", 3), framing="length"), Reply(body=[b"abc", CUT if how is CUT else RESET])
        )
        short = await send(provider, GET)
        assert short == b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nabc"
        try:
            assert (await send(provider, GET)).endswith(b"3\r\nabc\r\n")
        except ConnectionResetError:
            assert how is RESET
        assert not any(exchange.client_gone.is_set() or exchange.sent_all for exchange in provider.exchanges)


async def test_gates_and_departures() -> None:
    gate = Gate()
    async with ScriptedProvider() as provider:
        provider.replies(Reply(body=[b"one", Wait(gate), b"two"]), Reply(body=[b"one", STALL]), Reply(before=[CUT]))
        waiting = asyncio.create_task(send(provider, GET, until=b"0\r\n\r\n"))
        exchange = await provider.exchange(0)
        assert not exchange.sent_all
        gate.set()
        assert (await waiting).endswith(b"3\r\none\r\n3\r\ntwo\r\n0\r\n\r\n")
        await exchange.finished.wait()
        assert exchange.sent_all and not exchange.client_gone.is_set()

        await send(provider, GET, until=b"one")
        left = await provider.exchange(1)
        await left.client_gone.wait()
        await left.finished.wait()

        assert await send(provider, GET) == b""


async def test_leaving_waits_for_nobody() -> None:
    async with ScriptedProvider(handler=lambda _: Reply(body=[bytes(50_000_000)])) as provider:
        reader, writer = await asyncio.open_connection("127.0.0.1", provider.port)
        writer.write(GET)
        async with asyncio.timeout(10):
            await reader.readline()  # and nothing more, while the provider still has megabytes to send
    writer.close()


async def test_leaving_reports_what_was_not_foreseen() -> None:
    with pytest.raises(AssertionError, match="no reply scripted for GET /a"):
        async with ScriptedProvider() as provider:
            assert b"500" in await send(provider, GET, until=b"for this")


def test_the_threaded_variant() -> None:
    gate = Gate()
    with ThreadedProvider() as provider:
        provider.replies(Reply.stream([b"one", Wait(gate), b"two"]), Reply.stream([b"one", STALL]))
        client = http.client.HTTPConnection("127.0.0.1", provider.port, timeout=10)
        client.request("POST", "/x", body=b"{}")
        assert provider.exchange(0).received.json() == {}
        response = client.getresponse()
        assert response.read(3) == b"one"
        gate.set()
        assert response.read() == b"two"
        client.request("POST", "/y")
        client.getresponse().close()
        client.close()
        provider.exchange(1).client_gone.wait_blocking()
        assert provider.connections == 1


def test_splits_lose_nothing() -> None:
    body = random.Random(7).randbytes(300)
    for split in (whole(body), bytewise(body), at_random(body, 1), at_random(body, 1, pieces=999)):
        assert b"".join(split) == body
        assert all(split)
    assert at_random(body, 5) == at_random(body, 5) != at_random(body, 6)
    assert whole(b"") == bytewise(b"") == at_random(b"", 3) == []
