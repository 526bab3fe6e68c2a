"""A provider that does exactly what its script says, byte for byte.

No HTTP library stands between a test and the wire: what a test writes is what the peer reads, and what the peer sent is
kept as it came (header case and order, the exact body). The vocabulary:

- a *Reply* is a status, headers and a body made of *steps*; a step is bytes (one write, and one HTTP chunk when the
  framing is chunked), ``Wait(gate)`` (go on when the gate opens), ``CUT`` or ``RESET`` (drop the connection here), or
  ``STALL`` (say nothing more until the client goes);
- a *Gate* is an event that any thread may open, and any loop or thread may wait for: tests synchronise without sleeps;
- an *Exchange* is one request with what became of its reply.

``ScriptedProvider`` lives in the test's own event loop; ``ThreadedProvider`` has the same interface on a thread of its
own, for blocking tests and for clients that are subprocesses.
"""

import asyncio
import json
import random
import socket
import struct
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from itertools import pairwise
from types import TracebackType
from typing import Any, Literal, Self

Headers = Sequence[tuple[str, str]]
Framing = Literal["chunked", "length", "close"]

WAIT_SECONDS = 10.0
"""The bound of every wait that a test does not bound itself: far above what a loaded machine needs."""


class Gate:
    """An event across threads and loops: ``asyncio.Event`` belongs to one loop, ``threading.Event`` blocks a loop."""

    def __init__(self) -> None:
        self._open = threading.Event()
        self._lock = threading.Lock()
        self._waiters: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    def set(self) -> None:
        with self._lock:
            self._open.set()
            waiters, self._waiters = self._waiters, []
        for loop, event in waiters:
            with suppress(RuntimeError):  # that loop has ended, and its waiter with it
                loop.call_soon_threadsafe(event.set)

    def is_set(self) -> bool:
        return self._open.is_set()

    async def wait(self, seconds: float = WAIT_SECONDS) -> None:
        """Return when the gate is open; raise TimeoutError when it stays shut."""
        with self._lock:
            if self._open.is_set():
                return
            event = asyncio.Event()
            self._waiters.append((asyncio.get_running_loop(), event))
        async with asyncio.timeout(seconds):
            await event.wait()

    def wait_blocking(self, seconds: float = WAIT_SECONDS) -> None:
        """As ``wait``, for a thread that runs no event loop."""
        if not self._open.wait(seconds):
            raise TimeoutError


@dataclass(frozen=True, slots=True)
class Wait:
    """Go on when the gate opens. The server itself waits without a bound: leaving the provider ends it."""

    gate: Gate | asyncio.Event


@dataclass(frozen=True, slots=True)
class Cut:
    """Drop the connection: with FIN as a dying process does, or with RST as a dying machine does."""

    reset: bool


@dataclass(frozen=True, slots=True)
class Stall:
    """Say nothing more, and keep the connection until the client goes."""


CUT = Cut(reset=False)
RESET = Cut(reset=True)
STALL = Stall()

Step = bytes | Wait | Cut | Stall


def whole(body: bytes) -> list[bytes]:
    return [body] if body else []


def bytewise(body: bytes) -> list[bytes]:
    return [body[i : i + 1] for i in range(len(body))]


def at_random(body: bytes, seed: int, pieces: int = 12) -> list[bytes]:
    """Split at (at most) ``pieces - 1`` points that depend on the seed only, wherever they fall in a character."""
    points = sorted(random.Random(seed).choices(range(1, len(body)), k=pieces - 1)) if len(body) > 1 else []
    edges = [0, *points, len(body)]
    return [body[a:b] for a, b in pairwise(edges) if a < b]


def cut_after(body: bytes, at: int, how: Cut = CUT) -> list[Step]:
    """The first ``at`` bytes, then the cut; the rest stands behind it so that a declared length is the full one."""
    return [*whole(body[:at]), how, *whole(body[at:])]


@dataclass(frozen=True, slots=True)
class Reply:
    """What to answer.

    ``framing="length"`` declares the bytes of all steps, those behind a cut included. A framing header given in
    ``headers`` is kept instead of ours, so a reply may lie. ``before`` is played ahead of the status line (its bytes
    are written raw): a slow provider, an interim response, a connection dropped without an answer.
    """

    status: int = 200
    headers: Headers = ()
    body: Sequence[Step] = ()
    framing: Framing = "chunked"
    before: Sequence[Step] = ()
    reason: str | None = None
    close: bool = False

    @classmethod
    def json(cls, body: bytes | Any, status: int = 200, headers: Headers = ()) -> Self:
        """A blocking answer of known length. Bytes are sent as they are."""
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        return cls(status, [("Content-Type", "application/json"), *headers], whole(raw), "length")

    @classmethod
    def stream(cls, body: bytes | Sequence[Step], headers: Headers = ()) -> Self:
        """A stream of server-sent events; bytes are one step."""
        steps = whole(body) if isinstance(body, bytes) else body
        return cls(200, [("Content-Type", "text/event-stream; charset=utf-8"), *headers], steps)


@dataclass(frozen=True, slots=True)
class Received:
    """One request as it stood on the wire; ``body`` is freed of its transfer coding only."""

    method: str
    target: str
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes
    connection: int

    @property
    def path(self) -> str:
        return self.target.partition("?")[0]

    @property
    def query(self) -> str:
        return self.target.partition("?")[2]

    def header(self, name: str) -> list[str]:
        """Every value of a header, in order; names compare without regard to case."""
        wanted = name.lower().encode()
        return [value.decode("latin-1") for key, value in self.headers if key.lower() == wanted]

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(slots=True)
class Exchange:
    """One request and the fate of its reply.

    ``client_gone`` opens when the peer closes before the reply was written to its last byte. ``finished`` opens when
    the provider has nothing more to do for this request, whatever the reason; ``sent_all`` then tells whether the
    script was played to its end.
    """

    received: Received
    client_gone: Gate = field(default_factory=Gate)
    finished: Gate = field(default_factory=Gate)
    sent_all: bool = False


Handler = Callable[[Received], Reply | Awaitable[Reply]]


class _Malformed(Exception):
    """The peer's request is not HTTP/1.1 as this server reads it."""


class _Inbound:
    """The receiving side of a connection.

    It reads all the time, even while a reply is being written: otherwise a departed client would go unnoticed until
    the next write, and a stalled reply has none.
    """

    def __init__(self, reader: asyncio.StreamReader) -> None:
        self._reader = reader
        self._buffer = bytearray()
        self._changed = asyncio.Event()
        self.ended = asyncio.Event()

    async def pump(self) -> None:
        try:
            with suppress(ConnectionError):
                while data := await self._reader.read(65536):
                    self._buffer += data
                    self._changed.set()
        finally:
            self.ended.set()
            self._changed.set()

    async def _more(self) -> None:
        """Wait for bytes; raise EOFError when there will be none."""
        if self.ended.is_set():
            raise EOFError
        self._changed.clear()
        await self._changed.wait()

    async def until(self, separator: bytes) -> bytes:
        while (at := self._buffer.find(separator)) < 0:
            await self._more()
        return self._take(at + len(separator))[:at]

    async def exactly(self, count: int) -> bytes:
        while len(self._buffer) < count:
            await self._more()
        return self._take(count)

    def _take(self, count: int) -> bytes:
        taken = bytes(self._buffer[:count])
        del self._buffer[:count]
        return taken


class _Script:
    """Replies in order, then the handler; the list of what came in. Shared by both providers, hence the lock."""

    def __init__(self, handler: Handler | None) -> None:
        self.handler = handler
        self.queue: deque[Reply] = deque()
        self.exchanges: list[Exchange] = []
        self.connections = 0
        self.failures: list[str] = []
        self._lock = threading.Lock()
        self._arrivals: dict[int, Gate] = {}

    def arrival(self, index: int) -> Gate:
        """The gate that opens when the request of that index has been read in full."""
        with self._lock:
            gate = self._arrivals.setdefault(index, Gate())
            if len(self.exchanges) > index:
                gate.set()
            return gate

    def add(self, received: Received) -> Exchange:
        exchange = Exchange(received)
        with self._lock:
            self.exchanges.append(exchange)
            if gate := self._arrivals.get(len(self.exchanges) - 1):
                gate.set()
        return exchange

    async def answer(self, received: Received) -> Reply:
        """The next reply. A script that has none, or a handler that fails, is reported when the test leaves."""
        try:
            if self.queue:
                return self.queue.popleft()
            if self.handler is not None:
                reply = self.handler(received)
                return reply if isinstance(reply, Reply) else await reply
            self.failures.append(f"no reply scripted for {received.method} {received.target}")
        except Exception as error:  # noqa: BLE001  raised in the test, not in the server's task
            self.failures.append(f"the handler failed on {received.method} {received.target}: {error!r}")
        return Reply(500, [("Content-Type", "text/plain")], [b"the test's provider has no reply for this"], "length")


class _Provider:
    """The part of the interface that needs no event loop."""

    _port: int = 0

    def __init__(self, handler: Handler | None = None) -> None:
        self._script = _Script(handler)

    @property
    def url(self) -> str:
        """The origin, without a trailing slash."""
        return f"http://127.0.0.1:{self._port}"

    @property
    def port(self) -> int:
        return self._port

    @property
    def exchanges(self) -> list[Exchange]:
        return self._script.exchanges

    @property
    def requests(self) -> list[Received]:
        return [exchange.received for exchange in self._script.exchanges]

    @property
    def connections(self) -> int:
        """How many connections were ever accepted."""
        return self._script.connections

    @property
    def failures(self) -> list[str]:
        """What the script did not foresee. Leaving the provider raises when there is any; a test may clear it."""
        return self._script.failures

    def reply(self, reply: Reply) -> None:
        """Answer the next unanswered request with this. Queued replies come before the handler."""
        self._script.queue.append(reply)

    def replies(self, *replies: Reply) -> None:
        self._script.queue.extend(replies)

    def handle(self, handler: Handler | None) -> None:
        self._script.handler = handler

    def _verdict(self) -> None:
        if self._script.failures:
            raise AssertionError("; ".join(self._script.failures))


class ScriptedProvider(_Provider):
    """The provider in the test's own event loop: ``async with ScriptedProvider() as provider``."""

    async def __aenter__(self) -> Self:
        self._live: set[asyncio.Task[None]] = set()
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0, backlog=512)
        self._port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.close()
        for task in self._live:
            task.cancel()
        await asyncio.gather(*self._live, return_exceptions=True)
        await self._server.wait_closed()
        if kind is None:
            self._verdict()

    async def exchange(self, index: int = 0, seconds: float = WAIT_SECONDS) -> Exchange:
        """The exchange of that index, as soon as its request has been read in full."""
        await self._script.arrival(index).wait(seconds)
        return self._script.exchanges[index]

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        def ended(task: asyncio.Task[None]) -> None:
            # Here and not in the task: one that is cancelled before its first step, or in its last, closes nothing.
            writer.transport.abort()
            self._live.discard(task)

        if not self._server.is_serving():
            writer.transport.abort()  # accepted by the kernel just before we left
            return
        task = asyncio.create_task(self._converse(reader, writer))
        self._live.add(task)
        task.add_done_callback(ended)

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        number = self._script.connections
        self._script.connections += 1
        # A write that is not on the wire yet is not drained: each step must leave as a segment of its own.
        writer.transport.set_write_buffer_limits(high=0)
        inbound = _Inbound(reader)
        pump = asyncio.create_task(inbound.pump())
        try:
            while await self._serve_one(inbound, writer, number):
                pass
        except EOFError:
            pass  # the peer closed between two requests, or in the middle of one that then never arrived
        except _Malformed as error:
            self._script.failures.append(f"malformed request: {error}")
        except asyncio.CancelledError:
            writer.transport.abort()  # the test is over: closing would wait for a peer that reads no more
            raise
        finally:
            pump.cancel()
            await asyncio.gather(pump, return_exceptions=True)
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()

    async def _serve_one(self, inbound: _Inbound, writer: asyncio.StreamWriter, number: int) -> bool:
        """Read a request, play its reply. True when the connection may carry another one."""
        received, keep = await _read_request(inbound, writer, number)
        exchange = self._script.add(received)
        reply = await self._script.answer(received)
        play = asyncio.create_task(_play(reply, exchange, writer))
        gone = asyncio.create_task(inbound.ended.wait())
        try:
            await asyncio.wait({play, gone}, return_when=asyncio.FIRST_COMPLETED)
            if play.done():
                return play.result() and keep
            if not exchange.sent_all:
                exchange.client_gone.set()
            return False
        except ConnectionError:
            if not exchange.sent_all:
                exchange.client_gone.set()
            return False
        finally:
            play.cancel()
            gone.cancel()
            await asyncio.gather(play, gone, return_exceptions=True)
            exchange.finished.set()


class ThreadedProvider(_Provider):
    """The provider on a thread of its own: ``with ThreadedProvider() as provider``, and nothing to await."""

    def __enter__(self) -> Self:
        ready = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._run, args=(ready,), name="scripted-provider", daemon=True)
        self._thread.start()
        if not ready.wait(WAIT_SECONDS):
            raise TimeoutError("the provider's thread did not start")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(WAIT_SECONDS)
        if self._thread.is_alive():
            raise TimeoutError("the provider's thread did not end")
        if kind is None:
            self._verdict()

    def exchange(self, index: int = 0, seconds: float = WAIT_SECONDS) -> Exchange:
        """The exchange of that index, as soon as its request has been read in full."""
        self._script.arrival(index).wait_blocking(seconds)
        return self._script.exchanges[index]

    def _run(self, ready: threading.Event) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve(ready))

    async def _serve(self, ready: threading.Event) -> None:
        inner = ScriptedProvider()
        inner._script = self._script
        with suppress(AssertionError):  # raised in the test's thread, by __exit__
            async with inner:
                self._port = inner.port
                ready.set()
                await self._stop.wait()


Provider = ScriptedProvider | ThreadedProvider


async def _read_request(inbound: _Inbound, writer: asyncio.StreamWriter, number: int) -> tuple[Received, bool]:
    """One request, and whether its sender wants to keep the connection. Raises EOFError, _Malformed."""
    request_line, *lines = (await inbound.until(b"\r\n\r\n")).split(b"\r\n")
    try:
        method, target, version = request_line.decode("latin-1").split(" ")
    except ValueError as error:
        raise _Malformed(repr(request_line)) from error
    headers: list[tuple[bytes, bytes]] = []
    for line in lines:
        name, colon, value = line.partition(b":")
        if not colon or name != name.strip():
            raise _Malformed(repr(line))
        headers.append((name, value.strip(b" \t")))
    head = Received(method, target, tuple(headers), b"", number)
    if "100-continue" in _tokens(head, "expect"):
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        await writer.drain()
    body = await _read_body(inbound, head)
    keep = version == "HTTP/1.1" and "close" not in _tokens(head, "connection")
    return Received(method, target, tuple(headers), body, number), keep


def _tokens(received: Received, name: str) -> set[str]:
    return {token.strip().lower() for value in received.header(name) for token in value.split(",")}


async def _read_body(inbound: _Inbound, head: Received) -> bytes:
    if "chunked" in _tokens(head, "transfer-encoding"):
        body = bytearray()
        while size := await _read_chunk_size(inbound):
            body += await inbound.exactly(size)
            if await inbound.exactly(2) != b"\r\n":
                raise _Malformed("a chunk longer than it says")
        while await inbound.until(b"\r\n"):
            pass  # trailers
        return bytes(body)
    lengths = head.header("content-length")
    if not lengths:
        return b""
    if len(set(lengths)) > 1 or not lengths[0].isdecimal():
        raise _Malformed(f"content-length {lengths}")
    return await inbound.exactly(int(lengths[0]))


async def _read_chunk_size(inbound: _Inbound) -> int:
    line = (await inbound.until(b"\r\n")).partition(b";")[0].strip()
    try:
        return int(line, 16)
    except ValueError as error:
        raise _Malformed(f"chunk size {line!r}") from error


async def _play(reply: Reply, exchange: Exchange, writer: asyncio.StreamWriter) -> bool:
    """Write the reply. True when the connection outlives it. Raises ConnectionError when the peer has gone."""
    bodiless = exchange.received.method == "HEAD" or reply.status in (204, 304)
    steps: Sequence[Step] = () if bodiless else reply.body
    for step in reply.before:
        if not await _take_step(step, writer):
            return False
    outstanding = sum(isinstance(step, bytes) and bool(step) for step in steps)
    ends_with_last_step = reply.framing != "chunked" or bodiless
    exchange.sent_all = ends_with_last_step and not outstanding
    await _write(writer, _head(reply))
    for step in steps:
        if isinstance(step, bytes):
            if not step:
                continue  # an empty chunk would be the terminal one
            outstanding -= 1
            # Set before the write is drained: the peer may close as soon as it has the last byte, and flees nothing.
            exchange.sent_all = ends_with_last_step and not outstanding
            await _write(writer, b"%x\r\n%b\r\n" % (len(step), step) if reply.framing == "chunked" else step)
        elif not await _take_step(step, writer):
            return False
    if not ends_with_last_step:
        exchange.sent_all = True
        await _write(writer, b"0\r\n\r\n")
    return not (reply.close or reply.framing == "close")


async def _take_step(step: Step, writer: asyncio.StreamWriter) -> bool:
    """False when the connection is over."""
    match step:
        case bytes():
            await _write(writer, step)
        case Wait(gate):
            # Unbounded on purpose: the connection's task ends with the client or with the provider.
            await (gate.wait(seconds=3600) if isinstance(gate, Gate) else gate.wait())
        case Stall():
            await asyncio.Event().wait()
        case Cut(reset):
            if reset:
                sock: socket.socket = writer.get_extra_info("socket")
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                writer.transport.abort()
            return False
    return True


async def _write(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(data)
    await writer.drain()
    # One turn of the loop, so that a client on this same loop may read each write by itself.
    await asyncio.sleep(0)


def _head(reply: Reply) -> bytes:
    reason = reply.reason
    if reason is None:
        reason = HTTPStatus(reply.status).phrase if reply.status in _STATUSES else "Unnamed"
    given = {name.lower() for name, _ in reply.headers}
    lines = [f"HTTP/1.1 {reply.status} {reason}", *(f"{name}: {value}" for name, value in reply.headers)]
    if reply.status not in (204, 304) and not given & {"content-length", "transfer-encoding"}:
        lines += _framing_header(reply)
    if (reply.close or reply.framing == "close") and "connection" not in given:
        lines.append("Connection: close")
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def _framing_header(reply: Reply) -> Iterable[str]:
    match reply.framing:
        case "chunked":
            yield "Transfer-Encoding: chunked"
        case "length":
            yield f"Content-Length: {sum(len(step) for step in reply.body if isinstance(step, bytes))}"
        case "close":
            return


_STATUSES = frozenset(HTTPStatus)
