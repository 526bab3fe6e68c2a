"""The HTTP server's patience: with requests that come slowly or not at all, with clients that do not read, with those that
leave.

Truth: RFC 9110 and 9112 (section numbers below), the ASGI specification (HTTP, version 2.3) for what an application is told;
how patient the server is, is our choice. The timeouts here are tiny, and every wait for one has an event at its end.
"""

import asyncio
import json
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest

from aibridge.asgi import DIRECT, Receive, Scope, Send
from aibridge.errors import ProviderKind
from tests.support.provider import WAIT_SECONDS, Gate
from tests.support.rawclient import RawClient
from tests.support.site import (
    BRIEF,
    CHUNKED,
    EXPECT,
    GET,
    HOST,
    LENGTH,
    NEXT,
    PADDING,
    POST,
    Echo,
    Pouring,
    Stream,
    no_response,
    respond,
    serving,
    statuses,
)


@pytest.fixture(params=["asyncio", "uvloop"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, object]]:
    return "asyncio", {"use_uvloop": request.param == "uvloop"}


# ---- patience ----


@pytest.mark.parametrize("begun", [GET, b"GET /", POST + LENGTH, POST + LENGTH + b"ab", POST + CHUNKED + b"\r\n1\r\na\r\n"])
async def test_a_request_that_does_not_come_to_its_end(begun: bytes) -> None:
    async with serving(Echo(), request_seconds=BRIEF) as site, site.client() as client:
        await client.write(begun)
        answer = await client.answer()
        assert (answer.head.status, answer.head.get("connection")) == (408, "close")
        assert await client.closed() == b""


async def test_a_head_that_comes_byte_by_byte() -> None:
    """Its time is counted from its first byte."""
    async with serving(Echo(), request_seconds=4 * BRIEF) as site, site.client() as client:

        async def drip() -> None:
            with suppress(ConnectionError):
                while True:
                    await client.write(b"G" if not client._writer.transport.is_closing() else b"")
                    await asyncio.sleep(BRIEF / 2)

        await client.write(b"GET /")
        dripping = asyncio.create_task(drip())
        assert (await client.head()).status == 408
        dripping.cancel()


async def test_a_body_that_comes_slowly_and_steadily() -> None:
    async with serving(Echo(), request_seconds=8 * BRIEF) as site, site.client() as client:
        await client.write(POST + b"Content-Length: 20\r\n\r\n")
        for _ in range(20):
            await asyncio.sleep(BRIEF)
            await client.write(b"x")
        assert (await client.answer()).body == b"/ " + b"x" * 20


async def test_a_body_that_stalls_behind_the_start_of_its_response() -> None:
    app = Stream(reads=False)
    async with serving(app, request_seconds=BRIEF) as site, site.client() as client:
        await client.write(POST + LENGTH)
        assert (await client.head()).status == 200
        assert await client.rest() == (b"one", False), "broken off, and nothing said in its middle"
        await app.gone.wait()
        app.gate.set()


async def test_a_body_that_stalls_behind_its_response_is_not_answered_twice() -> None:
    async def refuse(scope: Scope, receive: Receive, send: Send) -> None:
        await respond(send, status=413)

    for rest in (b"a", b""):
        async with serving(refuse, request_seconds=BRIEF) as site, site.client() as client:
            await client.write(POST + LENGTH + rest)
            assert statuses(await client.closed()) == [413]
    async with serving(refuse) as site, site.client() as client:
        await client.write(POST + CHUNKED + b"\r\n")
        await client.answer()
        await client.write(b"zz\r\n")
        assert await no_response(client)


async def test_an_idle_connection_is_closed_silently() -> None:
    async with serving(Echo(), keep_alive_seconds=BRIEF, request_seconds=BRIEF) as site, site.client() as client:
        assert await client.closed() == b""
    async with serving(Echo(), keep_alive_seconds=BRIEF, request_seconds=BRIEF) as site, site.client() as client:
        await client.write(GET + b"\r\n\r\n")  # blank lines behind it are nothing (section 2.2)
        assert (await client.answer()).head.status == 200
        assert await client.closed() == b""


@pytest.mark.parametrize("behind", [b"GET /", POST + LENGTH + b"a", POST + EXPECT + LENGTH, NEXT], ids=range(4))
async def test_only_the_response_takes_its_time(behind: bytes) -> None:
    """What waits behind it, and is not read, is not slow; what has only begun has its time when its turn comes."""
    app = Stream()
    async with serving(app, request_seconds=BRIEF, keep_alive_seconds=BRIEF) as site, site.client() as client:
        await client.write(GET + b"\r\n")
        await client.head()
        await client.exactly(3)
        await client.write(behind)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(10 * BRIEF):
                await client.until(b"two")
        app.gate.set()
        assert await client.rest() == (b"two", True)
        rest = await client.closed()
        assert statuses(rest) == [200] if behind is NEXT else statuses(rest)[-1:] == [408], rest


@pytest.mark.parametrize("framing", [b"Content-Length: 1000000\r\n\r\n", CHUNKED + b"\r\nf4240\r\n"])
async def test_a_client_whose_body_we_do_not_take_is_not_slow(framing: bytes) -> None:
    ready = Gate()
    app = Echo()

    async def later(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await ready.wait()
        await app(scope, receive, send)

    async with serving(later, request_seconds=BRIEF) as site, site.client() as client:
        writing = asyncio.create_task(client.write(POST + framing + PADDING * 10 + b"\r\n0\r\n\r\n"))
        await site.until(lambda: site.connections and site.connections[0]._exchange)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(10 * BRIEF):
                await client.closed()
        exchange = site.connections[0]._exchange
        assert exchange is not None and exchange._buffered < 600_000, "memory is bounded"
        ready.set()
        await writing
        assert (await client.answer()).head.status == 200
    assert app.seen[0].complete


async def test_a_client_that_does_not_read_is_waited_for() -> None:
    app = Pouring(300)
    async with serving(app, request_seconds=BRIEF, keep_alive_seconds=BRIEF) as site, site.client() as client:
        client._writer.transport.pause_reading()  # type: ignore[attr-defined]
        await client.write(GET + b"\r\n")
        await site.until(lambda: site.connections and site.connections[0].drained)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(10 * BRIEF):
                await app.ended.wait(WAIT_SECONDS)
        assert app.written < 200, "what it does not read is not kept"
        client._writer.transport.resume_reading()  # type: ignore[attr-defined]
        body, complete = (await client.answer()).body, True
        assert complete and len(body) == 300 * len(PADDING)


async def test_a_whole_response_waits_for_its_reader_whatever_comes_behind() -> None:
    """The last words are not cut short: a refused upload, and a client that is slow to read the refusal."""

    async def refuse(scope: Scope, receive: Receive, send: Send) -> None:
        await respond(send, PADDING * 60, (b"connection", b"close"), status=413)

    async with serving(refuse) as site, site.client() as client:
        client._writer.transport.pause_reading()  # type: ignore[attr-defined]
        await client.write(POST + LENGTH)
        await site.until(lambda: site.connections and site.connections[0]._hung_up)
        connection = site.connections[0]
        connection.expire()
        await asyncio.sleep(0)
        client._writer.transport.resume_reading()  # type: ignore[attr-defined]
        answer = await client.answer()
        assert (answer.complete, len(answer.body)) == (True, 6_000_000)
        connection.expire()  # now there is nothing left to read
        await site.until(lambda: not site.connections)


# ---- clients that leave ----

LEAVING: dict[str, Callable[[RawClient], Any]] = {
    "reset": lambda client: client.die(),
    "closed": lambda client: client._writer.close(),
    "half closed": lambda client: client._writer.write_eof(),
}


@pytest.mark.parametrize("how", LEAVING)
@pytest.mark.parametrize("phase", [b"", b"GET /", GET, POST + LENGTH, POST + LENGTH + b"ab", POST + EXPECT + LENGTH])
async def test_a_client_that_leaves_inside_its_request(how: str, phase: bytes) -> None:
    """Nobody is told more than that it has gone."""
    app = Echo()
    async with serving(app) as site, site.client() as client:
        await client.write(phase)
        await site.until(lambda: site.connections and (not phase.endswith(b"\r\n\r\n") or site.connections[0]._exchange))
        LEAVING[how](client)
        await site.until(lambda: not site.connections and not site.server._serving.tasks)
        if how == "half closed":
            assert statuses(await client.closed()) in ([], [100])
    assert [seen for seen in app.seen if seen.complete] == []


@pytest.mark.parametrize("how", LEAVING)
async def test_a_client_that_leaves_during_a_response(how: str) -> None:
    app = Stream()
    async with serving(app) as site, site.client() as client:
        await client.write(GET + b"\r\n")
        await client.head()
        await client.exactly(3)
        LEAVING[how](client)
        await app.gone.wait()
        await site.until(lambda: not site.connections)
        app.gate.set()
        await app.ended.wait()
    assert app.times_gone == 1


async def test_a_client_that_leaves_during_back_pressure() -> None:
    app = Pouring(300)
    async with serving(app) as site, site.client() as client:
        client._writer.transport.pause_reading()  # type: ignore[attr-defined]
        await client.write(GET + b"\r\n")
        await site.until(lambda: site.connections and site.connections[0].drained)
        client.die()
        await app.ended.wait()
        await site.until(lambda: not site.connections)


async def test_a_client_that_leaves_after_its_response() -> None:
    for leave in LEAVING.values():
        app = Stream()
        app.gate.set()
        async with serving(app) as site, site.client() as client:
            await client.write(GET + b"\r\n")
            assert (await client.answer()).complete
            leave(client)
            await site.until(lambda: not site.connections)
        assert app.times_gone == 0


async def test_a_refused_client_may_close_its_side_and_read_the_answer() -> None:
    """Once nothing is under way, that it has closed its side does not tell that it has gone."""

    async def refuse(scope: Scope, receive: Receive, send: Send) -> None:
        await respond(send, PADDING * 60, (b"connection", b"close"), status=413)

    async with serving(refuse) as site, site.client() as client:
        client._writer.transport.pause_reading()  # type: ignore[attr-defined]
        await client.write(POST + LENGTH)
        await site.until(lambda: site.connections and site.connections[0]._hung_up)
        client._writer.write_eof()
        client._writer.transport.resume_reading()  # type: ignore[attr-defined]
        answer = await client.answer()
        assert (answer.complete, len(answer.body)) == (True, 6_000_000)


async def test_a_request_that_is_refused_tells_its_application_once() -> None:
    gone: list[str] = []
    told = Gate()

    async def watch(scope: Scope, receive: Receive, send: Send) -> None:
        scope[DIRECT].when_gone(lambda: gone.append("gone"))
        assert (await receive())["type"] == "http.disconnect"
        assert (await receive())["type"] == "http.disconnect"
        await respond(send, b"for nobody")
        assert not scope[DIRECT].write(b"nor this")
        scope[DIRECT].when_gone(lambda: gone.append("at once"))
        told.set()

    async with serving(watch, request_seconds=BRIEF) as site, site.client() as client:
        await client.write(POST + LENGTH)
        assert statuses(await client.closed()) == [408]
        await told.wait()
    assert gone == ["gone", "at once"]


# ---- clients that do not read ----


async def test_a_client_that_never_reads_is_dropped() -> None:
    app = Pouring(300)
    async with serving(app, write_seconds=4 * BRIEF) as site, site.client() as client:
        client._writer.transport.pause_reading()  # type: ignore[attr-defined]
        await client.write(GET + b"\r\n")
        await site.until(lambda: site.connections and site.connections[0].drained)
        await app.ended.wait()
        await site.until(lambda: not site.connections)
        assert not site.server._serving.unread
        client._writer.transport.resume_reading()  # type: ignore[attr-defined]
        assert not (await client.answer()).complete


async def test_a_client_that_reads_slowly_is_not() -> None:
    """A piece now and then, however long it takes in all."""
    app = Pouring(100)
    async with serving(app, write_seconds=20 * BRIEF) as site, site.client() as client:
        await client.write(GET + b"\r\n")
        for _ in range(10):
            await client.exactly(1_000_000)
            await asyncio.sleep(4 * BRIEF)
        await app.ended.wait()
        await site.until(lambda: not site.server._serving.unread)
        assert site.connections


@pytest.mark.parametrize("fields", [(), ((b"connection", b"close"),)], ids=["kept alive", "the last"])
async def test_a_whole_response_that_nobody_reads(fields: tuple[tuple[bytes, bytes], ...]) -> None:
    """All of it was written, and the application has ended: its connection must not stay for ever either."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        await respond(send, PADDING * 60, *fields)

    async with serving(answer, write_seconds=4 * BRIEF, keep_alive_seconds=BRIEF) as site, site.client() as client:
        client._writer.transport.pause_reading()  # type: ignore[attr-defined]
        await client.write(GET + b"\r\n")
        await site.until(lambda: site.connections and site.connections[0].drained)
        await site.until(lambda: not site.connections)


async def test_a_refusal_that_nobody_reads() -> None:
    async def refuse(scope: Scope, receive: Receive, send: Send) -> None:
        await respond(send, PADDING * 60, status=413)

    async with serving(refuse, write_seconds=4 * BRIEF) as site, site.client() as client:
        client._writer.transport.pause_reading()  # type: ignore[attr-defined]
        await client.write(POST + EXPECT + LENGTH)
        await site.until(lambda: site.connections and site.connections[0]._hung_up)
        await site.until(lambda: not site.connections)


# ---- the shape of errors ----


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"POST /anthropic/v1/messages?x=/openai HTTP/1.1\r\n" + HOST + LENGTH, 408),
        (b"POST /anthropic/v1/messages HTTP/1.1\r\n", 408),
        (b"POST /anthropic/v1/messages HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: gzip\r\n\r\n", 400),
        (b"POST /anthropic/v1/messages HTTP/1.1\r\n" + HOST + b"X: " + PADDING * 10, 431),
    ],
)
async def test_errors_look_as_the_path_says(sent: bytes, status: int) -> None:
    asked: list[str] = []

    def kind_of(path: str) -> ProviderKind:
        asked.append(path)
        return "anthropic"

    async with serving(Echo(), request_seconds=20 * BRIEF, kind_of=kind_of) as site, site.client() as client:
        await client.write(sent)
        answer = await client.answer()
    assert answer.head.status == status and asked == ["/anthropic/v1/messages"]
    assert json.loads(answer.body)["type"] == "error", "as Anthropic says it"
