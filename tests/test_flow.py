"""Bytes that flow from a provider to a client without waking a task for each piece, and what may happen on the way.

Truth: the docstrings of the port (`aibridge.upstream.UpstreamResponse`), first for every implementation of it; then what the
relay makes of it when something ends the flow in the very moment in which it had enough: design.md section 2 (every
interception that was started is ended, whatever happens) and failures.md 18 (no response ends silently before its end).
"""

import asyncio
from collections.abc import AsyncIterator, Callable, MutableMapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, cast

import pytest
from hypothesis import given, strategies as st

from aibridge import Actor, MemoryRecorder, Provider, RequestBridge, as_actor
from aibridge.asgi import DIRECT
from aibridge.errors import Interrupted, UpstreamError, UpstreamTimeout
from aibridge.httpclient import HttpUpstream
from aibridge.httpconnection import Connection, Response
from aibridge.upstream import MemoryResponse, MemoryUpstream, UpstreamRequest, UpstreamResponse
from aibridge.wire.base import Headers
from aibridge.wire.observer import ResponseHead
from tests.support.provider import CUT, STALL, Framing, Gate, Reply, ScriptedProvider, Step, Wait

SECONDS = 10
SOON = 0.2
BODY = bytes(range(256)) * 40


@pytest.fixture(params=["asyncio", "uvloop"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, object]]:
    return "asyncio", {"use_uvloop": request.param == "uvloop"}


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.fixture
async def provider() -> AsyncIterator[ScriptedProvider]:
    async with ScriptedProvider() as provider:
        yield provider


@asynccontextmanager
async def opened(idle_timeout: float = SECONDS) -> AsyncIterator[HttpUpstream]:
    upstream = HttpUpstream(idle_timeout=idle_timeout)
    try:
        async with asyncio.timeout(2 * SECONDS):
            yield upstream
    finally:
        await upstream.aclose()


class Taker:
    """Takes pieces; has had enough at every `enough`-th one."""

    def __init__(self, enough: int = 0) -> None:
        self.pieces: list[bytes] = []
        self.came = asyncio.Event()
        self._enough = enough

    def __call__(self, piece: bytes) -> bool:
        assert piece, "no empty pieces"
        self.pieces.append(piece)
        self.came.set()
        return bool(self._enough) and len(self.pieces) % self._enough == 0

    @property
    def body(self) -> bytes:
        return b"".join(self.pieces)


def to(provider: ScriptedProvider) -> UpstreamRequest:
    return UpstreamRequest("POST", provider.url + "/x", [])


def from_memory(pieces: Sequence[bytes | UpstreamError]) -> UpstreamResponse:
    return MemoryResponse(ResponseHead(200, []), pieces)


# ---- the port ----


async def drained(response: UpstreamResponse, enough: int, reads: int) -> bytes:
    """The body by turns: flowing until there was enough, then some reads."""
    take = Taker(enough)
    while not await response.flow(take):
        for _ in range(reads):
            piece = await response.read()
            take.pieces += [piece] if piece else []
    assert await response.flow(take), "the end stays the end"
    assert await response.read() == b""
    return take.body


@pytest.mark.parametrize("framing", ["chunked", "length", "close"])
@pytest.mark.parametrize(("enough", "reads"), [(0, 0), (1, 0), (1, 1), (2, 1), (3, 2)])
async def test_every_byte_once(provider: ScriptedProvider, framing: Framing, enough: int, reads: int) -> None:
    """However it comes, and by whichever way it is taken. The connection is used again where its framing allows that."""
    splits: list[list[Step]] = [[BODY], [BODY[i : i + 1000] for i in range(0, len(BODY), 1000)], [BODY[:1], BODY[1:]], []]
    async with opened() as upstream:
        for steps in splits:
            provider.reply(Reply(body=steps, framing=framing))
            response = await upstream.send(to(provider))
            assert await drained(response, enough, reads) == (BODY if steps else b"")
    assert provider.connections == (len(splits) if framing == "close" else 1)


@pytest.mark.parametrize("anyio_backend", [("asyncio", {"use_uvloop": False})], ids=["asyncio"])
@given(st.lists(st.binary(min_size=1, max_size=5)), st.integers(0, 3), st.integers(0, 2))
async def test_every_byte_once_from_memory(pieces: list[bytes], enough: int, reads: int) -> None:
    assert await drained(from_memory(pieces), enough, reads) == b"".join(pieces)


async def test_a_body_that_breaks_off(provider: ScriptedProvider) -> None:
    provider.reply(Reply(body=[b"one", CUT, b"two"], framing="length"))
    async with opened() as upstream:
        for response in (await upstream.send(to(provider)), from_memory([b"one", UpstreamError("broken off")])):
            take = Taker()
            with pytest.raises(UpstreamError):
                await response.flow(take)
            assert take.body == b"one"


async def test_what_take_raises(provider: ScriptedProvider) -> None:
    """Where it was called from, in the event loop or not, it goes to who waits; and what comes after it is not lost."""
    gate = Gate()
    provider.reply(Reply(body=[b"one", Wait(gate), b"two"]))

    def refuse(piece: bytes) -> bool:
        raise ZeroDivisionError

    async with opened() as upstream:
        for response in (await upstream.send(to(provider)), from_memory([b"one", b"two"])):
            with pytest.raises(ZeroDivisionError):
                await response.flow(refuse)
            gate.set()
            assert await response.read() == b"two"


async def test_it_is_safe_to_cancel(provider: ScriptedProvider) -> None:
    first, second = Gate(), Gate()
    provider.reply(Reply(body=[Wait(first), b"one", Wait(second), b"two"]))
    async with opened() as upstream:
        response = await upstream.send(to(provider))
        unheard, take = Taker(), Taker()
        flowing = asyncio.create_task(response.flow(unheard))
        await asyncio.sleep(0)
        flowing.cancel()
        await asyncio.wait([flowing])
        assert flowing.cancelled()
        flowing = asyncio.create_task(response.flow(take))
        first.set()
        await take.came.wait()
        flowing.cancel()
        await asyncio.wait([flowing])
        second.set()
        assert await response.flow(take)
    assert (unheard.body, take.body) == (b"", b"onetwo")


async def test_letting_go_ends_a_flow(provider: ScriptedProvider) -> None:
    provider.reply(Reply(body=[b"one", STALL]))
    async with opened() as upstream:
        response = await upstream.send(to(provider))
        take = Taker()
        flowing = asyncio.create_task(response.flow(take))
        await take.came.wait()
        response.close()
        with pytest.raises(UpstreamError):
            await flowing
    await provider.exchanges[0].client_gone.wait()


async def test_a_provider_that_says_nothing_more(provider: ScriptedProvider) -> None:
    provider.reply(Reply(body=[b"one", STALL]))
    async with opened(idle_timeout=SOON) as upstream:
        response = await upstream.send(to(provider))
        take = Taker()
        with pytest.raises(UpstreamTimeout):
            await response.flow(take)
        assert take.body == b"one"


async def test_a_reader_that_has_had_enough_is_not_a_silent_provider(provider: ScriptedProvider) -> None:
    """It takes its time; and when it goes on, the provider's begins anew."""
    gate = Gate()
    provider.reply(Reply(body=[b"one", Wait(gate), b"two"]))
    async with opened(idle_timeout=SOON) as upstream:
        response = await upstream.send(to(provider))
        take = Taker(enough=1)
        assert not await response.flow(take)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(3 * SOON):
                await provider.exchanges[0].client_gone.wait(SECONDS)
        flowing = asyncio.create_task(response.flow(take))
        await asyncio.sleep(0)
        gate.set()
        assert not await flowing
        assert await response.flow(take) and take.body == b"onetwo"


async def test_a_provider_with_a_slow_reader_is_slowed_down(provider: ScriptedProvider) -> None:
    size, count = 100_000, 300
    provider.reply(Reply(body=[bytes(size)] * count))
    async with opened() as upstream:
        response = await upstream.send(to(provider))
        take = Taker(enough=1)
        assert not await response.flow(take)
        with pytest.raises(TimeoutError):
            await provider.exchanges[0].finished.wait(3 * SOON)
        assert cast("Response", response)._buffered < 1_000_000
        while not await response.flow(take):
            pass
        assert len(take.body) == size * count


async def test_time_is_kept_for_a_connection_that_took_long_to_make(
    provider: ScriptedProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one timer for all stops where there is nothing to look after: it must not be before the connection is there."""
    from aibridge import httpclient

    connect, looked = httpclient._connected_socket, asyncio.Event()

    async def slowly(host: str, port: int) -> Any:
        await looked.wait()
        return await connect(host, port)

    monkeypatch.setattr(httpclient, "_connected_socket", slowly)
    provider.reply(Reply(body=[b"one", STALL]))
    async with opened(idle_timeout=SOON) as upstream:
        sending = asyncio.create_task(upstream.send(to(provider)))
        await asyncio.sleep(0)
        while upstream._deadlines._timer is not None:
            await asyncio.sleep(SOON / 8)
        looked.set()
        with pytest.raises(UpstreamTimeout):
            await (await sending).flow(Taker())


async def test_an_upload_under_way_is_no_silence_of_the_provider(provider: ScriptedProvider) -> None:
    """Not even where the provider has said something before its end (RFC 9110 section 15.2)."""
    told, go_on = asyncio.Event(), asyncio.Event()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 102 Processing\r\n\r\n")
        told.set()
        await reader.readuntil(b"two\r\n0\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        writer.close()

    async def upload() -> AsyncIterator[bytes]:
        yield b"one"
        await go_on.wait()
        yield b"two"

    server = await asyncio.start_server(talk, "127.0.0.1", 0)
    async with server, opened(idle_timeout=SOON) as upstream:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/x"
        sending = asyncio.create_task(upstream.send(UpstreamRequest("POST", url, [], upload())))
        await told.wait()
        done, _ = await asyncio.wait([sending], timeout=3 * SOON)
        assert not done
        go_on.set()
        assert await (await sending).read() == b"ok"


# ---- the relay ----


def event(name: str, rest: str = "") -> bytes:
    return f'event: {name}\ndata: {{"type":"{name}"{rest}}}\n\n'.encode()


EVENTS = [
    event(
        "message_start",
        ',"message":{"id":"msg_1","type":"message","content":[],"usage":{"input_tokens":3,"output_tokens":1}}',
    ),
    event("message_delta", ',"delta":{"stop_reason":"end_turn"},"usage":{"output_tokens":5}'),
    event("message_stop"),
]


class Line:
    """A connection to a provider, with the test in the provider's place."""

    def __init__(self) -> None:
        head = ResponseHead(200, [(b"content-type", b"text/event-stream")])
        self.response = Response(cast("Connection", self), head)
        self.waits = asyncio.Event()
        self.aborted = False

    def waiter(self) -> "asyncio.Future[bool]":
        self.waits.set()
        return asyncio.get_running_loop().create_future()

    def resume_reading(self) -> None:
        pass

    def abort(self) -> None:
        self.aborted = True
        self.response.end(UpstreamError("dropped"))


class Client:
    """An ASGI server's side of one request, with a `Direct`. `falls_behind` at every write, if the test says so."""

    def __init__(self) -> None:
        self.sent = b""
        self.complete = False
        self.gone = False
        self.falls_behind = False
        self.reads = asyncio.Event()
        self._callback: Callable[[], None] = lambda: None

    def when_gone(self, callback: Callable[[], None]) -> Callable[[], None]:
        self._callback = callback
        return lambda: None

    def write(self, data: bytes) -> bool:
        if not self.gone:
            self.sent += data
        return self.falls_behind and not self.gone

    async def caught_up(self) -> None:
        if self.falls_behind and not self.gone:
            await self.reads.wait()

    def start(self, status: int, headers: Headers) -> None:
        """What is begun is of no interest here."""

    def finish(self) -> None:
        self.complete = not self.gone

    async def send(self, message: MutableMapping[str, Any]) -> None:
        raise AssertionError("there is a shorter way")

    def leave(self) -> None:
        self.gone = True
        self.reads.set()
        self._callback()


class Stage:
    """A bridge with one request under way, whose response flows."""

    def __init__(self, **options: Any) -> None:
        self.line, self.client, self.recorder = Line(), Client(), MemoryRecorder()
        self.bridge = RequestBridge(
            [replace(Provider.anthropic(), **options)], self.recorder, upstream=MemoryUpstream(lambda _: self.line.response)
        )
        body = b'{"model":"m","stream":true,"messages":[{"role":"user","content":"hi"}]}'
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> MutableMapping[str, Any]:
            return messages.pop()

        scope: dict[str, Any] = {
            "type": "http",
            "method": "POST",
            "path": "/anthropic/v1/messages",
            "headers": [],
            "query_string": b"",
        }
        scope[DIRECT] = self.client
        self.task = asyncio.create_task(self.bridge(as_actor(scope, Actor("ada")), receive, self.client.send))

    async def waits(self) -> None:
        """Until the relay waits for the provider."""
        async with asyncio.timeout(SECONDS):
            await self.line.waits.wait()
        self.line.waits.clear()

    def stop(self) -> None:
        """What the bridge does at the end of the grace period."""
        (running,) = self.bridge._current.stopping._running
        running.interrupt(Interrupted())

    async def over(self) -> str:
        """Wait for the end. Answers with the status that was recorded, once."""
        async with asyncio.timeout(SECONDS):
            await asyncio.wait([self.task])
            while not self.recorder.ended:
                await asyncio.sleep(0)
        (ended,) = self.recorder.ended
        return ended.status

    @property
    def output_tokens(self) -> list[int | None]:
        return [usage.output_tokens for usage in self.recorder.token_usages]


async def test_the_relay_of_a_stream() -> None:
    stage = Stage()
    await stage.waits()
    for event in EVENTS[:2]:
        stage.line.response.put(event)
        assert stage.client.sent.endswith(event), "written in the callback that brought it"
    stage.line.response.put(EVENTS[2])
    stage.line.response.end(None)
    assert await stage.over() == "completed"
    assert stage.client.sent == b"".join(EVENTS) and stage.client.complete
    assert stage.output_tokens == [5]


HOW: dict[str, Callable[[Stage], Any]] = {
    "leaves": lambda stage: stage.client.leave(),
    "stops": Stage.stop,
    "is cancelled": lambda stage: stage.task.cancel(),
}


@pytest.mark.parametrize("how", HOW)
async def test_the_end_comes_in_the_iteration_in_which_the_flow_had_enough(how: str) -> None:
    """The response was complete by then, and is recorded as such, once; its end reaches a client that is still there."""
    stage = Stage()
    await stage.waits()
    for event in EVENTS:
        stage.line.response.put(event)
    HOW[how](stage)
    assert await stage.over() == "completed"
    assert stage.output_tokens == [5]
    if how != "leaves":
        assert stage.client.complete and stage.client.sent == b"".join(EVENTS)


@pytest.mark.parametrize("how", HOW)
async def test_the_end_comes_in_the_iteration_before_the_last_bytes(how: str) -> None:
    """The wait had ended when they came: they are taken all the same, and nothing is recorded twice."""
    stage = Stage()
    await stage.waits()
    stage.line.response.put(EVENTS[0])
    HOW[how](stage)
    for event in EVENTS[1:]:
        stage.line.response.put(event)
    assert await stage.over() == ("client_disconnected" if how == "leaves" else "completed")
    assert stage.output_tokens == [5]
    if how != "leaves":
        assert stage.client.complete and stage.client.sent == b"".join(EVENTS)


@pytest.mark.parametrize("how", HOW)
async def test_the_end_comes_between_events(how: str) -> None:
    stage = Stage()
    await stage.waits()
    stage.line.response.put(EVENTS[0])
    HOW[how](stage)
    assert await stage.over() == ("client_disconnected" if how == "leaves" else "interrupted")
    assert stage.output_tokens == [1] and stage.line.aborted
    if how != "leaves":
        assert stage.client.complete and b"event: error" in stage.client.sent


@pytest.mark.parametrize("how", HOW)
async def test_the_end_comes_while_the_client_is_behind(how: str) -> None:
    stage = Stage()
    await stage.waits()
    stage.client.falls_behind = True
    stage.line.response.put(EVENTS[0])
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    stage.line.response.put(EVENTS[1])
    assert stage.client.sent == EVENTS[0], "it waits for the client"
    HOW[how](stage)
    stage.client.falls_behind = False
    assert await stage.over() == ("client_disconnected" if how == "leaves" else "interrupted")
    assert stage.output_tokens == [1]


async def test_a_client_that_catches_up() -> None:
    stage = Stage()
    await stage.waits()
    stage.client.falls_behind = True
    for event in EVENTS:
        stage.line.response.put(event)
    await asyncio.sleep(0)
    stage.client.falls_behind = False
    stage.client.reads.set()
    await stage.waits()
    stage.line.response.end(None)
    assert await stage.over() == "completed"
    assert stage.client.sent == b"".join(EVENTS) and stage.client.complete


@pytest.mark.parametrize("leaves_first", [False, True])
async def test_the_provider_breaks_off_as_the_client_leaves(leaves_first: bool) -> None:
    stage = Stage()
    await stage.waits()
    stage.line.response.put(EVENTS[0])
    if leaves_first:
        stage.client.leave()
    stage.line.response.end(UpstreamError("broken off"))
    if not leaves_first:
        stage.client.leave()
    assert await stage.over() in ("failed", "client_disconnected")
    assert stage.output_tokens == [1]


async def test_a_provider_is_heard_to_its_end_for_the_record() -> None:
    stage = Stage(on_disconnect="drain")
    await stage.waits()
    stage.line.response.put(EVENTS[0])
    stage.client.leave()
    for event in EVENTS[1:]:
        stage.line.response.put(event)
    stage.line.response.end(None)
    assert await stage.over() == "client_disconnected"
    assert stage.output_tokens == [5] and stage.client.sent == EVENTS[0]
