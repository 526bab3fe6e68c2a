"""The HTTP server over time: the order of requests, bodies that wait to be asked for, responses that go wrong, and the end.

Truth: RFC 9110 and 9112 (section numbers below), the ASGI specification (HTTP, version 2.3).
"""

import asyncio
import gc
import os
import socket
import sys
import tracemalloc
from contextlib import ExitStack, suppress
from typing import Any

import pytest

from aibridge.asgi import Receive, Scope, Send
from aibridge.httpexchange import Exchange
from aibridge.httpserver import HttpServer, bound, stop_handshakes
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
    Site,
    Stream,
    no_response,
    respond,
    serving,
    statuses,
    whole_body,
)


@pytest.fixture(params=["asyncio", "uvloop"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, object]]:
    return "asyncio", {"use_uvloop": request.param == "uvloop"}


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


async def test_a_request_leaves_no_garbage() -> None:
    """Which is looked for seldom (`aibridge.server`)."""

    def exchanges() -> int:
        return sum(type(one) is Exchange for one in gc.get_objects())

    async with serving(Echo()) as site, site.client() as client:
        gc.collect()
        gc.disable()
        try:
            before = exchanges()  # of tests before this one
            for _ in range(20):
                await client.request("POST", "/", [], b"abc")
            assert exchanges() - before < 3
        finally:
            gc.enable()


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
        assert await idle.closed() == b"" and statuses(await begun.closed()) == [408]
        app.gate.set()
        assert await client.rest() == (b"onetwo", True)
        assert await client.closed() == b""
        await stop
        assert app.times_gone == 0
        with pytest.raises(OSError):  # noqa: PT011  refused
            await RawClient(site.url).__aenter__()


async def test_the_last_response_says_that_it_is() -> None:
    """What waits in line by then is answered, and what comes behind the last one is not: section 9.6."""
    held = Gate()

    async def late(scope: Scope, receive: Receive, send: Send) -> None:
        await held.wait()
        await respond(send, b"ok")

    async with serving(late) as site, site.client() as client:
        await client.write(GET + b"\r\n" + NEXT)
        await site.until(lambda: site.connections and site.connections[0]._waiting)
        stop = await stopping(site, WAIT_SECONDS)
        held.set()
        for last in (None, "close"):
            answer = await client.answer()
            assert (answer.body, answer.head.get("connection")) == (b"ok", last)
        await client.write(NEXT)
        assert await client.closed() == b"", "it was not begun"
        await client.leave()
        await stop


async def test_what_idle_connections_ask_for_within_a_moment_is_answered() -> None:
    """A client that has not heard of the end may ask at any instant; also behind a stream whose head said nothing of it."""
    app = Stream()
    async with serving(app) as site, site.client() as idle, site.client() as streaming:
        await streaming.write(GET + b"\r\n")
        assert (await streaming.head()).get("connection") is None
        await site.until(lambda: len(site.connections) == 2)
        stop = await stopping(site, WAIT_SECONDS)
        app.gate.set()
        assert await streaming.rest() == (b"onetwo", True)
        for client in (idle, streaming):
            await client.write(NEXT)
            answer = await client.answer()
            assert (answer.body, answer.head.get("connection")) == (b"onetwo", "close")
            assert await client.closed() == b""
            await client.leave()
        await stop


async def test_who_has_sent_something_is_not_idle() -> None:
    """The event loop may look at the clock before it looks at the sockets."""
    async with serving(Echo()) as site, site.client() as client:
        await site.until(lambda: site.connections)
        (connection,) = site.connections
        os.write(client._writer.get_extra_info("socket").fileno(), NEXT)  # at once: nothing is awaited
        connection.expire()
        assert (await client.answer()).body == b"/next "
        connection.expire()
        assert await client.closed() == b""


async def test_the_last_response_is_read_to_its_end() -> None:
    """Also where the client had more to say by then: section 9.6."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await respond(send, PADDING)

    async with serving(app) as site, site.client() as client:
        await site.until(lambda: site.connections)
        site.server.wind_down()
        client._writer.transport.pause_reading()  # type: ignore[attr-defined]
        await client.write(NEXT)
        await site.until(lambda: all(one._hung_up for one in site.connections))
        for _ in range(10):
            await client.write(PADDING)
        client._writer.transport.resume_reading()  # type: ignore[attr-defined]
        answer = await client.answer()
        assert answer.complete and answer.body == PADDING and answer.head.get("connection") == "close"


async def test_who_waits_to_be_let_in_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    """A socket that is closed resets those who wait in it. The event loop has not seen these clients; the one that it has
    leaves before it is the turn of the first of them.
    """
    loop = asyncio.get_running_loop()
    let_in = loop.connect_accepted_socket

    async def hesitate(*given: Any) -> Any:
        await left.wait()
        return await let_in(*given)

    left = Gate()
    monkeypatch.setattr(loop, "connect_accepted_socket", hesitate)
    async with serving(Echo()) as site, site.client() as leaves:
        await site.until(lambda: site.connections)
        leaves.die()
        gone = asyncio.create_task(site.until(lambda: not site.connections))
        gone.add_done_callback(lambda _: left.set())
        address = ("127.0.0.1", int(site.url.rpartition(":")[2]))
        with ExitStack() as stack:
            clients = [stack.enter_context(socket.create_connection(address)) for _ in range(20)]
            for client in clients:
                client.send(NEXT)
            stop = asyncio.create_task(site.server.stop(WAIT_SECONDS))
            for client in clients:
                answered = await asyncio.to_thread(client.makefile("rb").read)
                assert answered.endswith(b"/next ") and b"connection: close" in answered
                client.close()
            await stop


async def test_nobody_comes_in_while_the_socket_is_closed() -> None:
    if sys.platform != "linux":
        pytest.skip("only Linux can keep them out")
    (listener,) = bound("127.0.0.1", 0)
    with listener, socket.socket() as early, socket.socket() as late:
        listener.listen()
        early.connect(listener.getsockname())
        stop_handshakes([listener])
        late.settimeout(BRIEF)
        with pytest.raises(TimeoutError):
            late.connect(listener.getsockname())
        accepted, _ = listener.accept()
        with accepted:
            early.send(b"x")
            assert accepted.recv(1) == b"x", "who was in before is not affected"


async def test_a_shared_socket_goes_on_without_us() -> None:
    (listener,) = bound("127.0.0.1", 0)
    with socket.socket(fileno=os.dup(listener.fileno())) as another:
        server = HttpServer(Echo(), max_head_bytes=65_536, shared=True)
        await server.start([listener])
        await server.stop(1)
        with socket.create_connection(another.getsockname(), timeout=WAIT_SECONDS):
            another.accept()[0].close()


async def test_winding_down_lets_clients_in() -> None:
    """And each response says that it is its connection's last one, so that whoever comes back is let in elsewhere."""
    async with serving(Echo()) as site, site.client() as client:
        await client.request("GET", "/")
        site.server.wind_down()
        assert (await client.request("GET", "/")).head.get("connection") == "close"
        async with site.client() as another:
            assert (await another.request("GET", "/")).head.get("connection") == "close"


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
        assert statuses(await stalled.closed()) in ([502], [])
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
