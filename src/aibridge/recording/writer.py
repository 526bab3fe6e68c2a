r"""One bounded queue, one writer thread, one transaction for all that has gathered.

Records that are submitted together get a future that is done when they are durable. Records keep their order. Theory of
operation:

    submit -> queue -> batch -> store.write(batch)        the ordinary case: one commit for the batch
                             \-> spool.append(batch)      the store cannot take it: durable on disk all the same
                              \-> fail                    neither can, after trying for a while: these records are lost

While the spool holds records, everything new goes behind them, and they are replayed as soon as the store takes them.
Writing a record twice changes nothing, so a crash between commit and truncation is harmless.

The bound holds back what begins, not what is under way. While the queue is full the starts of interceptions wait in
line, and with them their requests: nothing goes upstream that is not recorded. So the queue never holds more than its
bound and what the interceptions under way, which cannot become more, have to say; and they do not wait behind newcomers.
"""

import asyncio
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Final, Protocol

from aibridge.errors import RecordingFailed
from aibridge.events import Destination, RecordLost, RecordsReplayed, RecordsWritten
from aibridge.recording.base import RecordsLost, Report
from aibridge.recording.spool import Batch, Spool
from aibridge.records import Interception, Record

logger = logging.getLogger(__name__)

MAX_QUEUED: Final = 10_000
_MAX_BATCH: Final = 1000
_RETRY_STORE_SECONDS: Final = 1.0
_GIVE_UP_SECONDS: Final = 2.0
_PAUSE_SECONDS: Final = 0.05


class StoreUnavailable(Exception):
    """The database cannot take records now: locked, read-only, full (`is_full`), gone. Nothing was written."""

    def __init__(self, message: str, *, is_full: bool = False) -> None:
        super().__init__(message)
        self.is_full = is_full


class Store(Protocol):
    """A database, used from the writer's thread alone."""

    def open(self) -> None:
        """Connect and bring the schema up to date. What it raises stops the recorder from starting: `StoreUnavailable`.

        The spool is acquired by then, so that others know that this process is alive.
        """

    def write(self, records: Sequence[Record], instance: str) -> Mapping[int, str]:
        """Write them in one transaction, as records of that instance; those that are there already stay as they are.

        Answers which of them the database will never take, by their place, and why; all others were written. Raises
        `StoreUnavailable`.
        """

    def close_interrupted(self, alive: Callable[[], Sequence[str]]) -> int:
        """Close the interceptions that no instance in `alive` has open, as ``interrupted``. Answers how many there were.

        `alive` is asked when nobody else can write any more: an instance that is not there by then has nothing open.
        Raises `StoreUnavailable`.
        """

    def close(self) -> None:
        """Disconnect."""


_Item = tuple[Sequence[Record], asyncio.Future[None]]
"""What was submitted together, and who waits for it."""


class Writer:
    """The queue and its thread. Starts with the first record, or with `start`, and again after `stop`."""

    def __init__(self, store: Store, spool: Spool, *, max_queued: int = MAX_QUEUED) -> None:
        self._store = store
        self._spool = spool
        self._max_queued = max_queued
        self._queue: queue.SimpleQueue[_Item | None] = queue.SimpleQueue()
        self._held_back: deque[_Item] = deque()  # starts that wait for room; touched in the event loop only
        self._thread: threading.Thread | None = None
        self._stopping: threading.Thread | None = None
        self._opened: asyncio.Future[None] | None = None
        self._reports: list[Report] = []
        self._store_failed = False
        self._store_is_full = False
        self._lost_for_want_of_room = False
        self._retry_store_at = 0.0
        self._failing_since: float | None = None

    async def start(self) -> None:
        """Open the store, replay what dead processes left in their spools, close their interceptions.

        Raises `StoreUnavailable`; OSError where there can be no spool.
        """
        await asyncio.shield(self._ensure_started())

    def submit(self, *records: Record) -> asyncio.Future[None]:
        """Queue records, of which only the first may be the start of an interception.

        The future is done when all of them are durable. It raises `RecordingFailed` when the record is lost, `RecordsLost`
        when some of several are.
        """
        if self._thread is None:
            _ = self._ensure_started()
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if isinstance(records[0], Interception) and (self._held_back or self._queue.qsize() >= self._max_queued):
            self._held_back.append((records, future))
        else:
            self._queue.put((records, future))
        return future

    async def stop(self) -> None:
        """Write what is queued and end the thread."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._stopping = thread
            self._admit(len(self._held_back))
            self._queue.put(None)
            await asyncio.get_running_loop().run_in_executor(None, thread.join)

    def report_to(self, report: Report) -> None:
        """Tell what is written, and of each record that is lost after its future was done."""
        self._reports.append(report)

    @property
    def problem(self) -> str | None:
        """Why records cannot be kept at the moment; None where they can, if only in the spool."""
        if self._opened is None or not self._opened.done() or self._opened.exception() is not None:
            return "the database is not open"
        return None if self._failing_since is None else "neither database nor spool take records"

    @property
    def failing(self) -> bool:
        """Whether that has lasted for so long that records are lost."""
        return self._failing_since is not None and time.monotonic() - self._failing_since >= _GIVE_UP_SECONDS

    @property
    def queued(self) -> int:
        """How many submissions wait to be written, those that are held back included."""
        return self._queue.qsize() + len(self._held_back)

    @property
    def spool_bytes(self) -> int:
        """How much the spool holds that is not in the database yet."""
        return self._spool.waiting

    # ---- in the event loop ----

    def _ensure_started(self) -> asyncio.Future[None]:
        if self._thread is None or self._opened is None:
            self._opened = asyncio.get_running_loop().create_future()
            self._thread = threading.Thread(
                target=self._run, args=(self._opened, self._stopping), name="aibridge-recorder", daemon=True
            )
            self._thread.start()
        return self._opened

    def _admit(self, count: int) -> None:
        for _ in range(min(count, len(self._held_back))):
            self._queue.put(self._held_back.popleft())

    def _complete(self, batch: Sequence[_Item], failed: Mapping[int, str], written: RecordsWritten | None) -> None:
        begin = 0
        for records, future in batch:
            _settle(future, _error(records, begin, failed) if failed else None)
            begin += len(records)
        if self._held_back:
            self._admit(self._max_queued - self._queue.qsize())
        if written is not None:
            self._tell(written)

    def _tell(self, event: RecordLost | RecordsWritten | RecordsReplayed) -> None:
        for report in self._reports:
            report(event)

    def _not_opened(self, opened: asyncio.Future[None], error: Exception) -> None:
        """Nothing that was queued can be kept; the next record tries again."""
        if self._opened is opened:
            self._thread = None
        _settle(opened, error)
        self._admit(len(self._held_back))
        with suppress(queue.Empty):
            while True:
                item = self._queue.get_nowait()
                if item is not None:
                    _settle(item[1], RecordingFailed(f"the database cannot be opened: {error}"))

    # ---- the writer's thread ----

    def _run(self, opened: asyncio.Future[None], before: threading.Thread | None) -> None:
        if before is not None:  # it may still be stopping, and has the store until it has ended
            before.join()
        try:
            self._open()
        except Exception as error:  # noqa: BLE001  whatever it is, the caller of start() gets to know
            self._close()
            _in_loop(opened, partial(self._not_opened, opened, error))
            return
        _in_loop(opened, partial(_settle, opened, None))
        while (batch := self._next_batch()) is not None:
            try:
                self._keep(batch)
            except Exception:  # a thread that died would leave everybody waiting
                logger.exception("the recorder failed")
                self._fail(batch, "the recorder failed")
        self._replay(force=True)
        self._close()

    def _open(self) -> None:
        self._spool.acquire()
        self._store.open()
        give_up_at = time.monotonic() + _GIVE_UP_SECONDS
        while True:  # a process that shares the database may be at its busiest
            try:
                self._recover()
            except StoreUnavailable:
                if time.monotonic() >= give_up_at:
                    raise
                time.sleep(_PAUSE_SECONDS)
            else:
                return

    def _recover(self) -> None:
        for batch in self._spool.left_behind():
            self._write_waiting(batch)
        closed = self._store.close_interrupted(self._spool.alive)
        if closed:
            logger.warning("closed %d interceptions that a dead process had left open", closed)

    def _close(self) -> None:
        try:
            self._spool.release()
        except OSError as error:
            logger.warning("the spool file cannot be removed: %s", error)
        self._store.close()

    def _next_batch(self) -> list[_Item] | None:
        """What has gathered in the queue, at least one record; None at the end. Uses idle time to replay the spool."""
        first = self._wait_for_one()
        if first is None:
            return None
        batch = [first]
        room = _MAX_BATCH - len(first[0])
        while room > 0:
            try:
                item = self._queue.get_nowait()
            except queue.Empty:
                break
            if item is None:
                self._queue.put(None)  # the end comes after this batch
                break
            batch.append(item)
            room -= len(item[0])
        return batch

    def _wait_for_one(self) -> _Item | None:
        while True:
            try:
                in_trouble = self._spool.waiting or self._failing_since is not None
                return self._queue.get(timeout=_RETRY_STORE_SECONDS if in_trouble else None)
            except queue.Empty:
                self._replay()
                self._try_again()

    def _try_again(self) -> None:
        """Look whether the database is back though no record comes: a process that is not ready gets no requests."""
        if self._failing_since is None or self._is_short_of_room:
            return
        try:
            self._store.write([], self._spool.instance)
        except StoreUnavailable as error:
            self._unavailable(error)
        else:
            self._recovered()
            self._available()

    def _keep(self, batch: Sequence[_Item]) -> None:
        """Make a batch durable, in the database or in the spool, or fail it."""
        records = [record for together, _ in batch for record in together]
        while True:
            self._replay()
            try:
                began = time.perf_counter()
                if self._spool.waiting or not self._store_is_due:  # behind what is there already: the order is kept
                    to: Destination = "spool"
                    rejected = self._spool.append(records)
                else:
                    to = "database"
                    rejected = self._store.write(records, self._spool.instance)
                    self._available()
                seconds = time.perf_counter() - began
            except StoreUnavailable as error:
                self._unavailable(error)
            except OSError as error:
                if self._is_hopeless():
                    self._lost_for_want_of_room = self._store_is_full
                    self._fail(batch, f"neither database nor spool take records: {error.strerror}")
                    return
                time.sleep(_PAUSE_SECONDS)  # in the writer's own thread: for a disk to get room, a lock to end
                self._retry_store_at = 0.0
            else:
                if not self._is_short_of_room:  # else what does not fit would come again, and be lost again
                    self._recovered()
                failed = {index: f"the record cannot be stored: {why}" for index, why in rejected.items()}
                self._answer(batch, failed, RecordsWritten(len(records) - len(failed), seconds, to))
                return

    def _is_hopeless(self) -> bool:
        """Whether neither database nor spool have taken a record for a while."""
        if self._failing_since is None:
            self._failing_since = time.monotonic()
        return self.failing

    @property
    def _is_short_of_room(self) -> bool:
        """Whether what was lost last would not fit even now. What is smaller may."""
        return self._lost_for_want_of_room and self._spool.is_short_of_room

    def _recovered(self) -> None:
        self._failing_since = None
        self._lost_for_want_of_room = False

    def _replay(self, *, force: bool = False) -> None:
        """Move the spool's records into the store, as far as it takes them."""
        if not self._spool.waiting or not (force or self._store_is_due):
            return
        replayed = 0
        try:
            while (batch := self._spool.next_batch()) is not None:
                replayed += self._write_waiting(batch)
                self._spool.forget(batch)
        except (StoreUnavailable, OSError) as error:
            self._unavailable(error)
        else:
            self._available()
        if replayed:
            logger.warning("replayed %d records from the spool", replayed)

    def _write_waiting(self, batch: Batch) -> int:
        """Write records that nobody waits for any more. Answers how many were. Raises `StoreUnavailable`."""
        rejected = self._store.write(batch.records, batch.instance)
        for index, why in rejected.items():
            record = batch.records[index]
            logger.error("record lost: %s cannot be stored: %s", type(record).__name__, why)
            self._tell_in_loop(RecordLost.of(record))
        for _ in range(batch.damaged):
            logger.error("record lost: a line of the spool cannot be read")
            self._tell_in_loop(RecordLost.of(None))
        written = len(batch.records) - len(rejected)
        if written:
            self._tell_in_loop(RecordsReplayed(written))
        return written

    def _tell_in_loop(self, event: RecordLost | RecordsReplayed) -> None:
        if self._opened is not None:
            _in_loop(self._opened, partial(self._tell, event))

    @property
    def _store_is_due(self) -> bool:
        return time.monotonic() >= self._retry_store_at

    def _available(self) -> None:
        if self._store_failed:
            self._store_failed = False
            logger.warning("the database takes records again")

    def _unavailable(self, error: Exception) -> None:
        if not self._store_failed:
            self._store_failed = True
            logger.warning("the database cannot take records, they go to the spool: %s", error)
        self._store_is_full = isinstance(error, StoreUnavailable) and error.is_full
        self._retry_store_at = time.monotonic() + _RETRY_STORE_SECONDS

    def _fail(self, batch: Sequence[_Item], reason: str) -> None:
        self._answer(batch, dict.fromkeys(range(sum(len(records) for records, _ in batch)), reason))

    def _answer(self, batch: Sequence[_Item], failed: Mapping[int, str], written: RecordsWritten | None = None) -> None:
        """Complete the futures and tell what was written, with one wake-up of the event loop for all of it."""
        _in_loop(batch[-1][1], partial(self._complete, batch, failed, written))


def _in_loop(future: asyncio.Future[None], call: Callable[[], object]) -> None:
    try:
        future.get_loop().call_soon_threadsafe(call)
    except RuntimeError:  # the loop is closed: nobody waits any more
        logger.debug("an answer came after the event loop had been closed")


def _error(records: Sequence[Record], begin: int, failed: Mapping[int, str]) -> RecordingFailed | None:
    """What to say of records that stand at `begin` in their batch."""
    lost = {place: failed[begin + place] for place in range(len(records)) if begin + place in failed}
    if not lost:
        return None
    return RecordingFailed(lost[0]) if len(records) == 1 else RecordsLost(lost)


def _settle(future: asyncio.Future[None], error: Exception | None) -> None:
    """Complete a future, unless its waiter has gone, or its event loop."""
    if future.done():
        return
    try:
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)
            future.exception()  # asyncio warns of failures that nobody looks at, but perhaps nobody waits for it any more
    except RuntimeError:
        logger.debug("an answer came after the event loop had been closed")
