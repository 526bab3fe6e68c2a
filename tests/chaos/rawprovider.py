"""A provider below HTTP: it reads as much of a request as it likes, writes any bytes, and ends connections in any way.

What it does is a *script*: steps that are carried out one after the other on each connection, which then ends. It carries
one request. `Answer` is what a good provider would say, in the pieces in which it stands on the wire.
"""

import asyncio
import json
import socket
import struct
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import Enum
from types import TracebackType
from typing import Any, Final, Self

from tests.support.injected import Dialect, Says, turn
from tests.support.injected_dialects import DIALECTS
from tests.support.provider import WAIT_SECONDS

TURN: Final = turn(1, Says("An answer of some length."))


class Read(Enum):
    """Read of the request: its head, its head and some of its body, all of it."""

    HEAD = 1
    PART = 2
    ALL = 3


class Ending(Enum):
    """How a connection ends: by FIN, as when a process dies; by RST, as when a machine does; when the peer ends it."""

    FIN = 1
    RESET = 2
    STALL = 3


@dataclass(frozen=True, slots=True)
class Answer:
    """What a good provider would say: the head, the body in chunks, the last chunk."""

    dialect: Dialect
    stream: bool
    pieces: Sequence[bytes]
    """The body: a stream's events, or three parts of a whole one."""

    @property
    def kind(self) -> str:
        """The content type."""
        return "text/event-stream" if self.stream else "application/json"

    @property
    def head(self) -> bytes:
        return head(self.kind, CHUNKED)

    @property
    def chunks(self) -> list[bytes]:
        """The pieces as chunks."""
        return [chunked(piece) for piece in self.pieces]

    @property
    def body(self) -> bytes:
        return b"".join(self.pieces)

    @property
    def whole(self) -> bytes:
        return self.head + b"".join(self.chunks) + LAST_CHUNK


CHUNKED: Final = "Transfer-Encoding: chunked"
LAST_CHUNK: Final = b"0\r\n\r\n"


def chunked(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def head(kind: str, *fields: str, status: str = "200 OK") -> bytes:
    """The head of a response. Its framing is a field like others. A connection carries one."""
    return "\r\n".join([f"HTTP/1.1 {status}", f"Content-Type: {kind}", "Connection: close", *fields, "", ""]).encode()


def answer(dialect: Dialect, *, stream: bool) -> Answer:
    """An answer of one turn."""
    if stream:
        events = list(dialect.events(TURN, {"stream": True, "stream_options": {"include_usage": True}}))
        return Answer(dialect, stream, events)
    body = dialect.body(TURN, {})
    third = len(body) // 3
    parts = [body[:third], body[third : 2 * third], body[2 * third :]]
    return Answer(dialect, stream, parts)


Step = Read | bytes | Ending | Iterable[bytes]
"""Reading, writing at once, ending, or writing one by one."""

Script = Callable[[Callable[[], Answer]], Iterable[Step]]
"""The steps. What it is given answers with what a good provider would say to the request, once that was read."""


class RawProvider:
    """The provider, on a thread of its own: ``with RawProvider() as provider``."""

    def __init__(self) -> None:
        self.script: Script = lambda _: [Read.ALL]
        self.open = 0
        """Connections that are open."""
        self.failures: list[Exception] = []
        """What went wrong with scripts."""
        self._port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def __enter__(self) -> Self:
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        ready = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(ready,), name="raw-provider", daemon=True)
        self._thread.start()
        if not ready.wait(WAIT_SECONDS):
            raise TimeoutError("the provider's thread did not start")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(WAIT_SECONDS)

    @contextmanager
    def away(self) -> Iterator[None]:
        """Nobody listens there for a while."""
        asyncio.run_coroutine_threadsafe(self._unlisten(), self._loop).result(WAIT_SECONDS)
        try:
            yield
        finally:
            asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result(WAIT_SECONDS)

    def _run(self, ready: threading.Event) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve(ready))

    async def _serve(self, ready: threading.Event) -> None:
        await self._listen()
        ready.set()
        await self._stop.wait()
        await self._unlisten()

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._converse, "127.0.0.1", self._port, backlog=512)
        self._port = self._server.sockets[0].getsockname()[1]

    async def _unlisten(self) -> None:
        self._server.close()

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = _Request(reader)
        self.open += 1
        try:
            with suppress(OSError, EOFError):
                for step in self.script(request.answer):
                    await _take(step, request, writer)
        except Exception as error:  # noqa: BLE001  it is for who plays the scenario
            self.failures.append(error)
        finally:
            self.open -= 1
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()


class _Request:
    """The request of a connection, as far as it was read."""

    def __init__(self, reader: asyncio.StreamReader) -> None:
        self._reader = reader
        self._head = b""
        self._body = b""

    async def read(self, what: Read) -> None:
        self._head = await self._reader.readuntil(b"\r\n\r\n")
        lengths = [line for line in self._head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
        length = int(lengths[0].partition(b":")[2])
        if what is not Read.HEAD:
            self._body = await self._reader.readexactly(length if what is Read.ALL else length // 2)

    async def until_left(self) -> None:
        while await self._reader.read(65536):
            pass

    def answer(self) -> Answer:
        target = self._head.split(b" ")[1].decode()
        dialect = next(one for one in DIALECTS if target.endswith(one.path.rpartition("/v1")[2]))
        asked: dict[str, Any] = json.loads(self._body)
        return answer(dialect, stream=asked.get("stream") is True)


async def _take(step: Step, request: _Request, writer: asyncio.StreamWriter) -> None:
    match step:
        case Read():
            await request.read(step)
        case bytes():
            writer.write(step)
            await writer.drain()
        case Ending.FIN:
            writer.close()
        case Ending.STALL:
            await request.until_left()
        case Ending.RESET:
            sock: socket.socket = writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
        case _:
            for piece in step:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0)
