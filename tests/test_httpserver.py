"""The HTTP server over time: order, patience, clients that leave or do not read, responses that go wrong, and the end.

Truth: RFC 9110 and 9112 (section numbers below), the ASGI specification (HTTP, version 2.3) for what an application is told;
how patient the server is, is our choice. The timeouts here are tiny, and every wait for one has an event at its end.
"""

import asyncio
import gc
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest

from aibridge.asgi import DIRECT, Receive, Scope, Send
from aibridge.httpserver import HttpServer, bound
from tests.support.provider import WAIT_SECONDS, Gate
from tests.support.rawclient import RawClient
from tests.support.site import CHUNKED, GET, HOST, NEXT, POST, Echo, Site, respond, serving, statuses, whole_body

BRIEF = 0.05
"""Seconds that the server is patient, where a test waits for it to lose patience."""
LENGTH = b"Content-Length: 3\r\n\r\n"
EXPECT = b"Expect: 100-continue\r\n"
PADDING = b"x" * 100_000


@pytest.fixture(params=["asyncio", "uvloop"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, object]]:
    return "asyncio", {"use_uvloop": request.param == "uvloop"}


class Stream:
    """Answers at once with a piece, and when its gate opens with the end. Tells who has gone how often."""

    def __init__(self, *, declared: int | None = None, reads: bool = True) -> None:
        self.gate = Gate()
        self.ended = Gate()
        self.gone = Gate()
        self.times_gone = 0
        self.calls = 0
        self._declared = declared
        self._reads = reads

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.calls += 1
        try:
            if self._reads:
                await whole_body(receive)
            forget = scope[DIRECT].when_gone(self._has_gone)
            fields = [] if self._declared is None else [(b"content-length", b"%d" % self._declared)]
            await send({"type": "http.response.start", "status": 200, "headers": fields})
            await send({"type": "http.response.body", "body": b"one", "more_body": True})
            await self.gate.wait(WAIT_SECONDS)
            await send({"type": "http.response.body", "body": b"two"})
            forget()
        finally:
            self.ended.set()

    def _has_gone(self) -> None:
        self.times_gone += 1
        self.gone.set()


async def no_response(client: RawClient) -> bool:
    """The connection has ended without another response: closed or reset."""
    with suppress(ConnectionError):
        return await client.closed() == b""
    return True


# ---- the order of requests ----


async def test_each_is_answered_in_its_turn() -> None:
    """In one read and in every other; with bodies, without, and with upgrades between."""
    upgrade = b"Connection: Upgrade\r\nUpgrade: h2c\r\n"
    sent = b"".join([
        *(GET + b"\r\n", POST + LENGTH + b"abc", GET + upgrade + b"\r\n"),
        POST + CHUNKED + b"\r\n2\r\nde\r\n0\r\na: b\r\n\r\n",
        *(POST + upgrade + LENGTH + b"GET", POST + upgrade + CHUNKED + b"\r\n3\r\nGET\r\n0\r\n\r\n", GET + EXPECT + b"\r\n"),
        POST + EXPECT + LENGTH + b"fgh",
    ])  # fmt: skip
    bodies = [b"", b"abc", b"", b"de", b"GET", b"GET", b"", b"fgh"]
    async with serving(Echo()) as site, site.client() as client:
        for size in (len(sent), 1, 7, 50):
            for start in range(0, len(sent), size):
                await client.write(sent[start : start + size])
            found: list[bytes] = []
            while len(found) < len(bodies):
                answer = await client.answer()
                if answer.head.status != 100:
                    found.append(answer.body.removeprefix(b"/ "))
            assert found == bodies, size


async def test_thousands_of_requests_at_once_take_bounded_memory() -> None:
    """Some wait in line; what is more than anybody pipelines is refused behind them."""
    app = Stream()
    tiny = b"GET / HTTP/1.1\r\nHost:h\r\n\r\n"
    async with serving(app) as site, site.client() as client:
        gc.collect()
        tracemalloc.start()
        await client.write(tiny * 40_000)
        await site.until(lambda: app.calls and site.connections[0]._refusal)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 4_000_000, "the test's own bytes among them"
        app.gate.set()
        answered = 0
        while (head := await client.head()).status == 200:
            assert await client.rest() == (b"onetwo", True)
            answered += 1
        assert head.status == 400 and answered == app.calls > 1000
        await client.rest()
        assert await no_response(client)


@pytest.mark.parametrize("behind", [b"garbage\r\n\r\n", GET + b"no colon\r\n\r\n", POST + CHUNKED + b"\r\nzz\r\n"])
@pytest.mark.parametrize("between", [0, 2])
async def test_what_cannot_be_read_is_refused_in_its_turn(behind: bytes, between: int) -> None:
    app = Stream()
    async with serving(app) as site, site.client() as client:
        await client.write(GET + b"\r\n")
        await client.head()
        await client.write(NEXT * between + behind + NEXT)
        app.gate.set()
        assert await client.rest() == (b"onetwo", True)
        for _ in range(between):
            assert (await client.answer()).body == b"onetwo"
        assert (await client.answer()).head.status == 400
        assert await no_response(client)
    assert app.calls == 1 + between


@pytest.mark.parametrize("last", [GET + b"Connection: close\r\n\r\n", b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n"])
@pytest.mark.parametrize("behind", [NEXT, b"\r\n", b"garbage", b"x" * 1_000_000])
async def test_nothing_is_read_behind_the_last_request(last: bytes, behind: bytes) -> None:
    """Nor does it spoil the response: section 9.6."""
    app = Stream(declared=6)
    async with serving(app) as site, site.client() as client:
        await client.write(last + behind)
        assert (await client.head()).get("connection") == "close"
        await client.write(behind)
        app.gate.set()
        assert await client.rest() == (b"onetwo", True)
        assert await no_response(client)
    assert app.calls == 1 and app.times_gone == 0


async def test_a_client_leaves_while_requests_wait() -> None:
    app = Stream()
    async with serving(app) as site:
        async with site.client() as client:
            await client.write(GET + b"\r\n")
            await client.head()
            await client.write(NEXT * 3)
            await site.until(lambda: site.connections[0]._waiting)
            client.die()
        app.gate.set()  # nothing is read while some wait, so that only a write can tell
        await app.ended.wait()
        await site.until(lambda: not site.connections)
    assert app.calls <= 2


async def test_the_end_behind_a_response_is_no_reset() -> None:
    """Unread bytes would make the system reset the connection, and the client lose what it has not read (section 9.6)."""

    async def close(scope: Scope, receive: Receive, send: Send) -> None:
        await respond(send, PADDING, (b"connection", b"close"))

    async with serving(close) as site, site.client() as client:
        await client.write(GET + b"\r\n" + NEXT * 5)
        client._writer.transport.pause_reading()  # type: ignore[attr-defined]
        await site.until(lambda: site.connections[0]._hung_up)
        for _ in range(10):
            await client.write(PADDING)
        client._writer.transport.resume_reading()  # type: ignore[attr-defined]
        answer = await client.answer()
        assert answer.complete and answer.body == PADDING
        assert await client.closed() == b""


# ---- 100 Continue (RFC 9110 section 10.1.1) ----


async def test_a_body_that_is_sent_without_waiting_is_not_asked_for() -> None:
    async with serving(Echo()) as site, site.client() as client:
        await client.write(POST + EXPECT + LENGTH + b"abc")
        assert (await client.answer()).body == b"/ abc"


async def test_a_body_is_asked_for_once_and_the_connection_goes_on() -> None:
    async with serving(Echo()) as site, site.client() as client:
        for _ in range(2):
            await client.write(POST + EXPECT + CHUNKED + b"\r\n")
            assert (await client.head()).status == 100
            await client.write(b"3\r\nabc\r\n")
            await client.write(b"0\r\n\r\n")
            assert (await client.answer()).body == b"/ abc"


async def test_http_1_0_knows_no_100() -> None:
    async with serving(Echo()) as site, site.client() as client:
        await client.write(b"POST / HTTP/1.0\r\n" + EXPECT + LENGTH)
        await site.until(lambda: site.connections[0]._exchange)
        await client.write(b"abc")
        assert (await client.answer()).body == b"/ abc"


async def test_nobody_is_asked_in_the_middle_of_a_response() -> None:
    """It would be taken for a part of it. And as the body may come or not, nothing can follow."""
    asked = Gate()

    async def duplex(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        reading = asyncio.ensure_future(receive())
        await asyncio.sleep(0)
        asked.set()
        await send({"type": "http.response.body", "body": b"ok"})
        assert (await reading)["type"] == "http.disconnect"

    async with serving(duplex) as site, site.client() as client:
        await client.write(POST + EXPECT + LENGTH)
        answer = await client.answer()
        assert (answer.head.status, answer.body, asked.is_set()) == (200, b"ok", True)
        with suppress(ConnectionError):
            await client.write(NEXT)
        assert await no_response(client)


async def test_a_client_that_was_not_asked_yet_is_not_slow() -> None:
    """And one that was, and sends nothing, is."""
    ready = Gate()

    async def hesitate(scope: Scope, receive: Receive, send: Send) -> None:
        await ready.wait()
        await whole_body(receive)

    async with serving(hesitate, request_seconds=BRIEF) as site, site.client() as client:
        await client.write(POST + EXPECT + LENGTH)
        await site.until(lambda: site.connections[0]._exchange)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(10 * BRIEF):
                await client.closed()
        ready.set()
        assert statuses(await client.closed()) == [100, 408]


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


class Pouring:
    """Writes as fast as its client reads, and counts."""

    def __init__(self, pieces: int) -> None:
        self.pieces = pieces
        self.written = 0
        self.ended = Gate()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            direct = scope[DIRECT]
            for _ in range(self.pieces):
                if direct.write(PADDING):
                    await direct.caught_up()
                self.written += 1
            await send({"type": "http.response.body"})
        finally:
            self.ended.set()


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


# ---- responses ----

Message = dict[str, Any]
START: Message = {"type": "http.response.start", "status": 200, "headers": []}


def start(*headers: tuple[bytes, bytes], status: int = 200) -> Message:
    return {"type": "http.response.start", "status": status, "headers": list(headers)}


def body(data: bytes = b"", *, more: bool = False) -> Message:
    return {"type": "http.response.body", "body": data, "more_body": more}


LONG = (b"content-length", b"3")
WRONG: dict[str, tuple[list[Message], bool]] = {  # and whether a response has begun
    "nothing": ([], False),
    "no start": ([body(b"ok")], False),
    "a line break": ([start((b"a", b"b\r\nc: d"))], False),
    "a line break in a name": ([start((b"a\nb", b"c"))], False),
    "no length": ([start((b"content-length", b"+3"))], False),
    "two lengths": ([start(LONG, LONG)], False),
    "no end": ([start(), body(b"ok", more=True)], True),
    "no body": ([start()], True),
    "two starts": ([start(), start()], True),
    "too long": ([start(LONG), body(b"abcd")], True),
    "too long, in pieces": ([start(LONG), body(b"ab", more=True), body(b"cd")], True),
    "too short": ([start(LONG), body(b"ab")], True),
    "none of its length": ([start(LONG), body()], True),
}


@pytest.mark.parametrize("what", WRONG)
async def test_a_response_that_goes_wrong(what: str, caplog: pytest.LogCaptureFixture) -> None:
    """It is an error where it has not begun, and else broken off: nobody takes it for a whole one."""
    messages, begun = WRONG[what]

    async def wrong(scope: Scope, receive: Receive, send: Send) -> None:
        for message in messages:
            await send(message)

    async with serving(wrong) as site, site.client() as client:
        await client.write(GET + b"\r\n")
        head = await client.head()
        assert head.status == (200 if begun else 500)
        _, complete = await client.rest()
        assert complete is not begun
        assert await no_response(client)


async def test_a_response_that_ends_with_its_connection_is_broken_off_with_a_reset() -> None:
    """Of HTTP/1.0 without a length: a mere end would look like its end (section 8)."""

    async def fail(scope: Scope, receive: Receive, send: Send) -> None:
        await send(start())
        await send(body(b"ok", more=True))
        raise ZeroDivisionError

    async with serving(fail) as site, site.client() as client:
        await client.write(b"GET / HTTP/1.0\r\n\r\n")
        assert (await client.head()).get("connection") == "close"
        with pytest.raises(ConnectionResetError):
            await client.closed()


@pytest.mark.parametrize(
    ("method", "response", "read"),
    [
        ("HEAD", [start(LONG), body(b"abc")], b"content-length: 3\r\n\r\n"),
        ("HEAD", [start(), body(b"abc")], b"HTTP/1.1 200 OK\r\n\r\n"),
        ("GET", [start(status=204), body()], b"HTTP/1.1 204 No Content\r\n\r\n"),
        ("GET", [start((b"etag", b"x"), status=304), body(b"abc")], b"HTTP/1.1 304 Not Modified\r\netag: x\r\n\r\n"),
        (
            "GET",
            [start(status=299), body(b"abc")],
            b"HTTP/1.1 299 \r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
        ),
        ("GET", [start((b"transfer-encoding", b"gzip")), body()], b"OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n"),
        ("GET", [start(LONG), body(more=True), body(b"a", more=True), body(b"bc")], b"content-length: 3\r\n\r\nabc"),
    ],
)
async def test_framing(method: str, response: list[Message], read: bytes) -> None:
    """RFC 9112 section 6; the connection goes on."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        for message in response:
            await send(message)

    async with serving(app) as site:
        request = method.encode() + b" / HTTP/1.1\r\n" + HOST
        twice = await site.raw(request + b"\r\n" + request + b"Connection: close\r\n\r\n")
        first, last = twice[: len(twice) // 2], twice.replace(b"connection: close\r\n", b"")
        assert first.endswith(read) or read in last
        assert last.count(read) == 2


# ---- the end ----


async def stopping(site: Site, grace: float) -> "asyncio.Task[None]":
    task = asyncio.create_task(site.server.stop(grace))
    await asyncio.sleep(0)
    return task


async def test_the_server_waits_for_responses_and_only_for_those() -> None:
    app = Stream()
    async with serving(app) as site, site.client() as idle, site.client() as begun, site.client() as client:
        await begun.write(GET)
        await client.write(GET + b"\r\n")
        await client.head()
        await site.until(lambda: len(site.connections) == 3 and any(one._reads_head for one in site.connections))
        stop = await stopping(site, WAIT_SECONDS)
        assert await idle.closed() == b"" and await begun.closed() == b""
        app.gate.set()
        assert await client.rest() == (b"onetwo", True)
        assert await client.closed() == b""
        await stop
        assert app.times_gone == 0
        with pytest.raises(OSError):  # noqa: PT011  refused
            await RawClient(site.url).__aenter__()


async def test_the_last_response_says_that_it_is() -> None:
    held = Gate()

    async def late(scope: Scope, receive: Receive, send: Send) -> None:
        await held.wait()
        await respond(send, b"ok")

    async with serving(late) as site, site.client() as client:
        await client.write(GET + b"\r\n" + NEXT)
        await site.until(lambda: site.connections and site.connections[0]._waiting)
        stop = await stopping(site, WAIT_SECONDS)
        held.set()
        answer = await client.answer()
        assert (answer.body, answer.head.get("connection")) == (b"ok", "close")
        assert await client.closed() == b"", "the next one was not begun"
        await client.leave()
        await stop


@pytest.mark.parametrize("hurried", [False, True])
async def test_who_does_not_end_is_ended(hurried: bool) -> None:
    """With a response under way, one that nobody reads, and one whose request does not come to its end."""
    app, pouring = Stream(), Pouring(10_000)

    async def both(scope: Scope, receive: Receive, send: Send) -> None:
        await (pouring if scope["path"] == "/next" else app)(scope, receive, send)

    async with serving(both) as site, site.client() as client, site.client() as slow, site.client() as stalled:
        await client.write(GET + b"\r\n")
        await client.head()
        slow._writer.transport.pause_reading()  # type: ignore[attr-defined]
        await slow.write(NEXT)
        await stalled.write(POST + LENGTH)
        await site.until(lambda: app.calls == 2 and any(one.drained for one in site.connections))
        stop = await stopping(site, WAIT_SECONDS if hurried else BRIEF)
        if hurried:
            site.server.hurry()
        async with asyncio.timeout(WAIT_SECONDS):
            await stop
        assert await client.rest() == (b"one", False)
        assert statuses(await stalled.closed()) in ([500], [])
        await site.until(lambda: not site.connections)
        assert not site.server._serving.tasks and pouring.ended.is_set()


async def test_the_server_waits_for_calls_whose_client_has_gone() -> None:
    """They have something to record."""
    recorded = Gate()

    async def record(scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        await recorded.wait()
        finished.append(scope["path"])

    finished: list[str] = []
    async with serving(record) as site, site.client() as client:
        await client.write(GET + b"\r\n")
        await site.until(lambda: site.connections and site.connections[0]._exchange)
        client.die()
        await site.until(lambda: not site.connections)
        stop = await stopping(site, WAIT_SECONDS)
        recorded.set()
        await stop
    assert finished == ["/"]


async def test_it_may_be_stopped_twice() -> None:
    async with serving(Echo()) as site:
        await site.server.stop(0)
        await site.server.stop(0)


async def test_two_sockets() -> None:
    listeners = [*bound("127.0.0.1", 0), *bound("127.0.0.1", 0)]
    server = HttpServer(Echo(), max_head_bytes=65_536)
    await server.start(listeners)
    for listener in listeners:
        async with RawClient(f"http://127.0.0.1:{listener.getsockname()[1]}") as client:
            assert (await client.request("GET", "/")).head.status == 200
    await server.stop(1)
