r"""One bounded queue, one writer thread, one transaction for all that has gathered.

Every record gets an awaitable that is done when the record is durable. Records keep their order. Theory of operation:

    submit -> queue -> batch -> store.write(batch)        the ordinary case: one commit for the batch
                             \-> spool.append(batch)      the store cannot take it: durable on disk all the same
                              \-> fail                    neither can, after trying for a while: these records are lost

While the spool holds records, everything new goes behind them, and they are replayed as soon as the store takes them.
Writing a record twice changes nothing, so a crash between commit and truncation is harmless.
"""

import asyncio
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, Protocol

from aibridge.errors import RecordingFailed
from aibridge.recording.spool import Spool
from aibridge.records import Record

logger = logging.getLogger(__name__)

MAX_QUEUED: Final = 10_000
_MAX_BATCH: Final = 1000
_RETRY_STORE_SECONDS: Final = 1.0
_GIVE_UP_SECONDS: Final = 2.0
_PAUSE_SECONDS: Final = 0.05


class StoreUnavailable(Exception):
    """The database cannot take records now: locked, read-only, full, gone. Nothing of the batch was written."""


class RecordRejected(Exception):
    """The database will never take this record. Nothing of the batch was written. `index` is its place in the batch."""

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(reason)
        self.index = index


class Store(Protocol):
    """A database, used from the writer's thread alone."""

    def open(self) -> None:
        """Connect and bring the schema up to date. What it raises stops the recorder from starting."""

    def write(self, records: Sequence[Record]) -> None:
        """Write all of them in one transaction; those that are there already are left as they are.

        Raises `StoreUnavailable` or `RecordRejected`.
        """

    def close_interrupted(self, alive: Sequence[str]) -> int:
        """Close the interceptions that no process in `alive` has open, as ``interrupted``. Answers how many there were."""

    def close(self) -> None:
        """Disconnect."""


class _Item:
    __slots__ = ("future", "record")

    def __init__(self, record: Record, future: asyncio.Future[None]) -> None:
        self.record = record
        self.future = future


class Writer:
    """The queue and its thread. Starts with the first record, or with `start`."""

    def __init__(self, store: Store, spool: Spool, *, max_queued: int = MAX_QUEUED) -> None:
        self._store = store
        self._spool = spool
        self._max_queued = max_queued
        self._queue: queue.SimpleQueue[_Item | None] = queue.SimpleQueue()
        self._waiting: deque[asyncio.Future[None]] = deque()  # for room in the queue; touched in the event loop only
        self._thread: threading.Thread | None = None
        self._opened: asyncio.Future[None] | None = None
        self._store_retry_at = 0.0

    async def start(self) -> None:
        """Open the store, replay what dead processes left in their spools, close their interceptions.

        Raises what `Store.open` raises.
        """
        await asyncio.shield(self._ensure_started())

    def submit(self, record: Record) -> Awaitable[None]:
        """Queue a record. The awaitable is done when it is durable; it raises `RecordingFailed` when it is lost."""
        _ = self._ensure_started()
        if self._queue.qsize() >= self._max_queued:
            return self._submit_when_there_is_room(record)
        return self._enqueue(record)

    async def stop(self) -> None:
        """Write what is queued and end the thread."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._queue.put(None)
            await asyncio.get_running_loop().run_in_executor(None, thread.join)

    def _ensure_started(self) -> asyncio.Future[None]:
        if self._thread is None or self._opened is None:
            self._opened = asyncio.get_running_loop().create_future()
            self._opened.add_done_callback(_retrieved)
            self._thread = threading.Thread(target=self._run, args=(self._opened,), name="aibridge-recorder", daemon=True)
            self._thread.start()
        return self._opened

    def _enqueue(self, record: Record) -> asyncio.Future[None]:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        future.add_done_callback(_retrieved)
        self._queue.put(_Item(record, future))
        return future

    async def _submit_when_there_is_room(self, record: Record) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        await turn
        await self._enqueue(record)

    # ---- the writer's thread ----

    def _run(self, opened: asyncio.Future[None]) -> None:
        try:
            self._store.open()
            self._recover()
        except Exception as error:  # noqa: BLE001  whatever it is, the caller of start() gets to know
            failure: Exception = error
            _in_loop(opened, lambda: _settle(opened, failure))
            self._refuse_all()
            return
        _in_loop(opened, lambda: _settle(opened, None))
        try:
            while (batch := self._next_batch()) is not None:
                self._keep(batch)
        finally:
            self._replay(force=True)
            self._spool.release()
            self._store.close()

    def _recover(self) -> None:
        for records in self._spool.left_behind():
            self._write_each(records)
        closed = self._store.close_interrupted([self._spool.instance, *self._spool.alive()])
        if closed:
            logger.warning("closed %d interceptions that a dead process had left open", closed)

    def _next_batch(self) -> list[_Item] | None:
        """What has gathered in the queue, at least one record; None at the end. Uses idle time to replay the spool."""
        first = self._wait_for_one()
        if first is None:
            return None
        batch = [first]
        while len(batch) < _MAX_BATCH:
            try:
                item = self._queue.get_nowait()
            except queue.Empty:
                break
            if item is None:
                self._queue.put(None)  # the end comes after this batch
                break
            batch.append(item)
        return batch

    def _wait_for_one(self) -> _Item | None:
        while True:
            try:
                return self._queue.get(timeout=_RETRY_STORE_SECONDS if self._spool.size else None)
            except queue.Empty:
                self._replay()

    def _keep(self, batch: list[_Item]) -> None:
        """Make a batch durable, in the database or in the spool, or fail it."""
        give_up_at = time.monotonic() + _GIVE_UP_SECONDS
        while batch:
            try:
                self._replay()
                if not self._spool.size and time.monotonic() >= self._store_retry_at:
                    self._store.write([item.record for item in batch])
                else:  # behind what is there already, so that the order is kept
                    self._spool.append([item.record for item in batch])
            except RecordRejected as error:
                self._answer([batch.pop(error.index)], RecordingFailed(f"the database rejects the record: {error}"))
            except StoreUnavailable as error:
                self._unavailable(error)
            except OSError as error:
                if time.monotonic() >= give_up_at:
                    self._answer(batch, RecordingFailed(f"neither database nor spool take records: {error.strerror}"))
                    return
                time.sleep(_PAUSE_SECONDS)  # in the writer's own thread: for a disk to get room, a lock to end
                self._store_retry_at = 0.0
            else:
                self._answer(batch, None)
                return

    def _replay(self, *, force: bool = False) -> None:
        """Move the spool's records into the store, if it takes them again."""
        if not self._spool.size or (time.monotonic() < self._store_retry_at and not force):
            return
        try:
            replayed = 0
            for records in self._spool.batches():
                self._write_each(records)
                replayed += len(records)
            self._spool.clear()
            logger.warning("replayed %d records from the spool", replayed)
        except (StoreUnavailable, OSError) as error:
            self._unavailable(error)

    def _write_each(self, records: list[Record]) -> None:
        """Write records that nobody waits for any more. Raises `StoreUnavailable`."""
        records = list(records)
        while records:
            try:
                self._store.write(records)
                return
            except RecordRejected as error:
                logger.error("record lost: the database rejects %s: %s", type(records[error.index]).__name__, error)  # noqa: TRY400
                del records[error.index]

    def _unavailable(self, error: Exception) -> None:
        if time.monotonic() >= self._store_retry_at:
            logger.warning("the database cannot take records, they go to the spool: %s", error)
        self._store_retry_at = time.monotonic() + _RETRY_STORE_SECONDS

    def _answer(self, batch: Sequence[_Item], error: Exception | None) -> None:
        """Complete the futures, with one wake-up of the event loop for all of them."""

        def complete() -> None:
            for item in batch:
                _settle(item.future, error)
            while self._waiting and self._queue.qsize() < self._max_queued:
                _settle(self._waiting.popleft(), None)

        _in_loop(batch[0].future, complete)

    def _refuse_all(self) -> None:
        """The store did not open: nothing that was queued can be kept."""
        while (item := self._queue.get()) is not None:
            self._answer([item], RecordingFailed("the database could not be opened"))


def _in_loop(future: asyncio.Future[None], call: Callable[[], object]) -> None:
    try:
        future.get_loop().call_soon_threadsafe(call)
    except RuntimeError:  # the loop is closed: nobody waits any more
        logger.debug("an answer came after the event loop had been closed")


def _settle(future: asyncio.Future[None], error: Exception | None) -> None:
    if future.done():  # cancelled: its waiter has gone
        return
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)


def _retrieved(future: asyncio.Future[None]) -> None:
    """Nobody may wait for a future any more when it fails; that is not worth a warning."""
    if not future.cancelled():
        future.exception()
