"""Traffic dumps, for debugging: requests to providers and their responses, as they were on the wire, in files.

`TrafficDumps` wraps the `Upstream` of a provider and sees what passes. The event loop only puts that into a queue; a thread
masks credentials and writes (`aibridge.dumpfiles`). Whatever happens there, traffic goes on.
"""

import asyncio
import logging
import math
import os
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import msgspec

from aibridge.dumpfiles import Begun, DumpFile, Ended, Outcome
from aibridge.dumpfolder import DumpFolder
from aibridge.errors import UpstreamError
from aibridge.ledger import new_id
from aibridge.providers import Provider
from aibridge.upstream import Upstream, UpstreamRequest, UpstreamResponse
from aibridge.wire.observer import ResponseHead

logger = logging.getLogger(__name__)

MAX_DUMP_BYTES: Final = 10 * 1024 * 1024
MAX_BYTES: Final = 1024 * 1024 * 1024
MAX_HOURS: Final = 24.0

# What waits to be written. Beyond it the disk, or the thread, is slower than the traffic, and the rest is left out.
_MAX_WAITING: Final = 64 * 1024 * 1024
# The thread lets what comes gather for so long, rather than wake up for each event of each stream.
_GATHER_SECONDS: Final = 0.05
_LOOK_SECONDS: Final = 60.0  # for dumps that have become too old
_QUIET_SECONDS: Final = 60.0
_LAST_SECONDS: Final = 5.0
_EVENT_BYTES: Final = 1024  # what an event without a body is taken for


class TrafficDumps:
    """Dumps of the calls of those providers that have `dump` set, in files of `directory` that only their owner can read.

    `max_dump_bytes` bounds how much of the bodies of one call is kept, `max_bytes` the size of all dumps, of which the
    oldest go first, and `max_hours` their age. Processes may share the directory. Used as ``async with``, or started by the
    first call; leaving writes what is still to be written, and nothing more is dumped until it is entered again.
    """

    def __init__(
        self,
        directory: Path,
        *,
        max_dump_bytes: int = MAX_DUMP_BYTES,
        max_bytes: int = MAX_BYTES,
        max_hours: float = MAX_HOURS,
    ) -> None:
        self._directory = directory
        self._max_dump_bytes = max_dump_bytes
        self._writer = _Writer(DumpFolder(directory, max_bytes, max_hours * 3600), max_dump_bytes)

    def upstream(self, provider: Provider, upstream: Upstream) -> Upstream:
        """The upstream for the calls of a provider, which are dumped if that is wanted of it."""
        if not provider.dump:
            return upstream
        said = "the traffic of provider %s is dumped to %s, with prompts and answers in clear"
        logger.warning(said, provider.name, self._directory)
        return _DumpedUpstream(self._writer, provider, upstream, self._max_dump_bytes)

    async def __aenter__(self) -> Self:
        """Begin to look after the directory, if there are dumps of earlier times."""
        self._writer.reopen()
        if await asyncio.to_thread(os.path.exists, self._directory):
            self._writer.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Write what there is, for at most a few seconds."""
        await asyncio.to_thread(self._writer.stop)


@dataclass(frozen=True, slots=True)
class _DumpedUpstream:
    """An `Upstream` that tells the writer of each call."""

    writer: "_Writer"
    provider: Provider
    upstream: Upstream
    max_bytes: int

    async def send(self, request: UpstreamRequest) -> UpstreamResponse:
        call = _Call(self.writer, self.max_bytes)
        call.begin(Begun(request.call_id or new_id(), _now(), self.provider, request))
        if isinstance(request.body, bytes):
            call.sent(request.body)
            call.sent_all()
        else:
            request = msgspec.structs.replace(request, body=_Tapped(request.body, call))
        try:
            response = await self.upstream.send(request)
        except UpstreamError as error:
            call.end("no response", error)
            raise
        except BaseException:
            call.end("let go")
            raise
        return _DumpedResponse(response, call)

    async def aclose(self) -> None:
        await self.upstream.aclose()


class _Tapped:
    """A streamed body on its way to the provider."""

    def __init__(self, pieces: AsyncIterator[bytes], call: "_Call") -> None:
        self._pieces = pieces
        self._call = call

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        try:
            piece = await anext(self._pieces)
        except StopAsyncIteration:
            self._call.sent_all()
            raise
        self._call.sent(piece)
        return piece


class _DumpedResponse:
    """A response under way, of which the writer is told."""

    def __init__(self, response: UpstreamResponse, call: "_Call") -> None:
        self.head = response.head
        self._response = response
        self._call = call
        call.respond(response.head)

    async def read(self) -> bytes:
        try:
            piece = await self._response.read()
        except UpstreamError as error:
            self._call.end("broken off", error)
            raise
        if piece:
            self._call.received(piece)
        else:
            self._call.end("complete")
        return piece

    async def flow(self, take: Callable[[bytes], bool]) -> bool:
        def tapped(piece: bytes) -> bool:
            self._call.received(piece)
            return take(piece)

        try:
            ended = await self._response.flow(tapped)
        except UpstreamError as error:
            self._call.end("broken off", error)
            raise
        if ended:
            self._call.end("complete")
        return ended

    def close(self) -> None:
        self._response.close()
        self._call.end("complete" if self._call.has_all_of(self.head) else "let go")


class _Call:
    """What the event loop knows of a call, and tells the writer: no more of it than will be kept."""

    def __init__(self, writer: "_Writer", max_bytes: int) -> None:
        self._writer = writer
        self._left = max_bytes
        self._sent = 0
        self._received = 0
        self._lost = 0
        self._answered = False
        self._cut: str | None = None  # WARC's word for why no more of the body under way is kept
        self._dump: _Dump | None = None  # none, or no more of it

    def begin(self, begun: Begun) -> None:
        """A request is about to be sent."""
        dump = _Dump()
        if self._writer.put(_EVENT_BYTES, dump, DumpFile, begun):
            self._dump = dump

    def sent(self, piece: bytes) -> None:
        """A piece of the request's body goes out. What does so after an early response is not kept."""
        self._sent += len(piece)
        if not self._answered:
            self._keep(piece)

    def sent_all(self) -> None:
        """The request has gone out."""
        if not self._answered:
            self._end_body(self._cut)

    def respond(self, head: ResponseHead) -> None:
        """The head of the response has come."""
        self._answered = True
        self._cut = None
        self._tell(DumpFile.respond, _now(), head)

    def received(self, piece: bytes) -> None:
        """A piece of the response's body has come."""
        self._received += len(piece)
        self._keep(piece)

    def has_all_of(self, head: ResponseHead) -> bool:
        """Whether what has come is all that was announced."""
        return head.bodiless or self._received == head.content_length

    def end(self, outcome: Outcome, error: UpstreamError | None = None) -> None:
        """The call is over, unless it was before."""
        if self._dump is None:
            return
        self._end_body(self._cut or _WHY_BROKEN.get(outcome, "unspecified"))
        message = None if error is None else error.message
        self._tell(DumpFile.end, Ended(_now(), outcome, message, self._sent, self._received), self._lost)
        self._dump = None

    def _keep(self, piece: bytes) -> None:
        if self._dump is None or not piece:
            return
        if self._cut is None:
            kept = piece if len(piece) <= self._left else piece[: self._left]
            if self._writer.put(len(kept), self._dump, DumpFile.body, kept):
                self._left -= len(kept)
                self._cut = None if len(kept) == len(piece) else "length"
                return
            self._cut = "unspecified"
        if self._cut == "unspecified":
            self._lost += len(piece)

    def _end_body(self, truncated: str | None) -> None:
        self._tell(DumpFile.end_body, truncated)

    def _tell(self, what: Callable[..., None], *facts: Any) -> None:
        if self._dump is not None:
            self._writer.put(0, self._dump, what, *facts)


_WHY_BROKEN: Final[dict[Outcome, str | None]] = {"complete": None, "broken off": "disconnect"}


def _now() -> datetime:
    return datetime.now(UTC)


class _Dump:
    """A dump in the hands of the writer's thread."""

    def __init__(self) -> None:
        self.name = ""
        self.descriptor = -1
        self.file: DumpFile | None = None

    @property
    def held(self) -> int:
        return 0 if self.file is None else self.file.held


class _Complaint:
    """Something that may go wrong often: told at most once a minute, with how often it has by then."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._count = 0
        self._quiet_until = -math.inf

    def tell(self, reason: str, error: Exception | None = None) -> None:
        """It has gone wrong again. `error` is told with its traceback."""
        self._count += 1
        now = time.monotonic()
        if now >= self._quiet_until:
            self._quiet_until = now + _QUIET_SECONDS
            logger.warning("%s: %s (%d so far)", self._text, reason, self._count, exc_info=error)


class _Writer:
    """A queue, and the thread that writes what comes through it."""

    def __init__(self, folder: DumpFolder, max_dump_bytes: int) -> None:
        self._folder = folder
        self._max_dump_bytes = max_dump_bytes
        self._queue: deque[tuple[int, _Dump, Callable[..., Any], tuple[Any, ...]]] = deque()
        self._taken = 0  # bytes, counted by the event loop
        self._freed = 0  # counted by the thread
        self._wake = threading.Event()
        self._stopping = threading.Event()  # of this thread, not of those before it
        self._thread: threading.Thread | None = None
        self._before: threading.Thread | None = None
        self._behind = _Complaint("traffic is not all dumped")
        self._trouble = _Complaint(f"traffic cannot be dumped to {folder.directory}")

    # ---- in the event loop ----

    def start(self) -> None:
        """Start the thread, unless it runs. Raises RuntimeError where there can be none."""
        if self._thread is None:
            arguments = self._stopping, self._before
            thread = threading.Thread(target=self._run, args=arguments, name="aibridge-dumps", daemon=True)
            thread.start()
            self._thread = thread

    def stop(self) -> None:
        """Write what waits, and end. Blocks, for at most a few seconds."""
        self._stopping.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join(_LAST_SECONDS)

    def reopen(self) -> None:
        """Take what there is to write again, if it was stopped."""
        if self._stopping.is_set():
            self._stopping = threading.Event()
            self._thread, self._before = None, self._thread

    def put(self, size: int, dump: _Dump, what: Callable[..., Any], *facts: Any) -> bool:
        """Have something done for a dump, which keeps so many bytes in memory. Answers False where that is too much."""
        if self._stopping.is_set():
            return False
        try:
            self.start()
        except RuntimeError as error:
            self._behind.tell(str(error))
            return False
        if size and self._taken - self._freed + size > _MAX_WAITING:
            self._behind.tell("it comes faster than it is written")
            return False
        self._taken += size
        self._queue.append((size, dump, what, facts))
        if not self._wake.is_set():
            self._wake.set()
        return True

    # ---- in the thread ----

    def _run(self, stop: threading.Event, before: threading.Thread | None) -> None:
        if before is not None:  # which may hang on a disk
            before.join()
        self._tidy()
        stopping = False
        while not (stopping and not self._queue):
            self._wake.wait(_LOOK_SECONDS)
            stopping = stop.wait(_GATHER_SECONDS)
            self._wake.clear()
            written: set[_Dump] = set()
            while self._queue:
                size, dump, what, facts = self._queue.popleft()
                self._freed += size - self._carry_out(dump, what, facts)
                written.add(dump)
            for dump in written:
                self._freed -= self._carry_out(dump, DumpFile.flush, ())
            if self._folder.untidy:
                self._tidy()

    def _carry_out(self, dump: _Dump, what: Callable[..., Any], facts: tuple[Any, ...]) -> int:
        """Do what is to be done, and answer how much more memory is held since."""
        held = dump.held
        try:
            if what is DumpFile:
                self._create(dump, *facts)
            elif dump.file is not None:
                what(dump.file, *facts)
                if what is DumpFile.end:
                    dump.file = None
                    self._folder.close(dump.descriptor)
        except OSError as error:
            self._discard(dump)
            self._trouble.tell(_said(error))
        except Exception as error:  # noqa: BLE001  looking at traffic never harms traffic, nor what comes after
            self._discard(dump)
            self._trouble.tell(type(error).__name__, error)
        return dump.held - held

    def _create(self, dump: _Dump, begun: Begun) -> None:
        dump.name, dump.descriptor = self._folder.create(begun.at, begun.provider.name, begun.call_id)
        try:
            dump.file = DumpFile(dump.descriptor, begun, self._max_dump_bytes)
        except (ValueError, KeyError):  # it cannot be sent, so it was not
            self._discard(dump)

    def _discard(self, dump: _Dump) -> None:
        dump.file = None
        if dump.descriptor >= 0:
            with suppress(OSError):
                self._folder.discard(dump.name, dump.descriptor)

    def _tidy(self) -> None:
        try:
            self._folder.tidy()
        except OSError as error:
            self._trouble.tell(_said(error))


def _said(error: OSError) -> str:
    """What is wrong, without the name of the file, which is another one each time."""
    return error.strerror or str(error)
