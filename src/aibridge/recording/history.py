"""The hidden turns of conversations in SQLite, in the same database as the ledger.

Two threads have a connection each. One reads: in WAL mode that waits for nobody's lock, so a request that needs its
history never waits for those who write theirs (sqlite.org/wal.html#concurrency). The other one takes all that waits in its
queue into one transaction, and answers when that is committed. In between it keeps house. Theory of operation for a
memory, by the time that it was not used:

    fresh --ttl--> husk --ttl--> gone

A husk has lost its data but keeps its keys: that something is missing can be told from that nothing was ever there. A
memory over the size bound becomes a husk early, the least recently used first. One that hid nothing has nothing to lose
and stays as it is until it goes.

A tool set stays for as long as a memory refers to it. Over the size bound it goes early too, after the data of all
memories that refer to it: it is noted to be in use whenever one of them is.
"""

import asyncio
import logging
import os
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TypeVar

import msgspec
import uuid_utils

from aibridge.recording.schema import connect, directory_beside, identity, migrate
from aibridge.wire.turns import Memory

logger = logging.getLogger(__name__)

T = TypeVar("T")
Clock = Callable[[], float]

TTL_SECONDS: Final = 30 * 24 * 3600.0
MAX_BYTES: Final = 1024**3

_BUSY_SECONDS: Final = 5.0  # of writers; what is not written then is lost, as there is no spool
_MAX_BATCH: Final = 100
_TOUCH_SECONDS: Final = 3600.0
_PRUNE_SECONDS: Final = 60.0
_PRUNE_ROWS: Final = 100

# The keys are found first, and each turn is read once, however many of its keys are asked for. CROSS JOIN fixes the order.
_RECALL: Final = """
    SELECT turn.id, found.keys, turn.keys, turn.toolset, turn.data, turn.last_id, turn.used_at
    FROM (
        SELECT known.turn, json_group_array(known.key) AS keys
        FROM json_each(:keys) AS wanted
        CROSS JOIN aibridge_hidden_turn_keys AS known ON known.scope = :scope AND known.key = wanted.value
        GROUP BY known.turn
    ) AS found
    CROSS JOIN aibridge_hidden_turns AS turn ON turn.id = found.turn
"""
_REMEMBER: Final = """
    INSERT INTO aibridge_hidden_turns (id, scope, keys, toolset, size, created_at, used_at, last_id, data)
    VALUES (:id, :scope, :keys, :toolset, :size, :now, :now, :last_id, :data)
"""
_REMEMBER_KEYS: Final = """
    INSERT INTO aibridge_hidden_turn_keys (scope, key, turn) SELECT :scope, value, :id FROM json_each(:keys) WHERE true
    ON CONFLICT (scope, key) DO UPDATE SET turn = excluded.turn
"""
_TOUCH: Final = "UPDATE aibridge_hidden_turns SET used_at = ?1 WHERE id IN (SELECT value FROM json_each(?2))"
_TOUCH_TOOLSETS: Final = """
    UPDATE aibridge_toolsets SET used_at = ?1 WHERE digest IN
    (SELECT toolset FROM aibridge_hidden_turns WHERE id IN (SELECT value FROM json_each(?2)))
"""
_REMEMBER_TOOLSET: Final = """
    INSERT INTO aibridge_toolsets (digest, used_at, tools) VALUES (:toolset, :now, :tools)
    ON CONFLICT (digest) DO UPDATE SET used_at = excluded.used_at
"""
_DROP_EXPIRED: Final = """
    UPDATE aibridge_hidden_turns SET data = NULL, size = 0 WHERE id IN
    (SELECT id FROM aibridge_hidden_turns WHERE size > 0 AND used_at < ? ORDER BY used_at LIMIT ?)
"""
_TOTAL_SIZE: Final = """
    SELECT coalesce((SELECT sum(size) FROM aibridge_hidden_turns WHERE size > 0), 0)
    + coalesce((SELECT sum(length(tools)) FROM aibridge_toolsets), 0)
"""
# A memory comes before a tool set of the same time, which it may refer to: NULL is the smallest.
_LEAST_USED: Final = """
    SELECT id AS turn, NULL AS toolset, size, used_at FROM aibridge_hidden_turns WHERE size > 0
    UNION ALL SELECT NULL, digest, length(tools), used_at FROM aibridge_toolsets
    ORDER BY used_at, toolset LIMIT ?
"""
_DROP: Final = "UPDATE aibridge_hidden_turns SET data = NULL, size = 0 WHERE id = ?"
_DELETE_TOOLSET: Final = "DELETE FROM aibridge_toolsets WHERE digest = ?"
_GONE: Final = "SELECT id, scope, keys FROM aibridge_hidden_turns WHERE size = 0 AND used_at < ? ORDER BY used_at LIMIT ?"
_DELETE_KEYS: Final = """
    DELETE FROM aibridge_hidden_turn_keys
    WHERE turn = ?1 AND scope = ?2 AND key IN (SELECT value FROM json_each(?3))
"""
_DELETE: Final = "DELETE FROM aibridge_hidden_turns WHERE id = ?"
_DELETE_TOOLSETS: Final = """
    DELETE FROM aibridge_toolsets WHERE NOT EXISTS (SELECT 1 FROM aibridge_hidden_turns WHERE toolset = digest)
"""


class SqliteHistory:
    """Keeps memories in a SQLite database, which is created, and migrated, when it is opened.

    A memory that was not used for `ttl_seconds` loses its data, and is forgotten after that time again. All data and tool
    sets together may have `max_bytes`; this is looked after once a minute. Neither bound may be 0; `math.inf` seconds is
    for ever. `clock` gives the time in seconds since the epoch.

    Several processes on one machine may share a database, and a `SqliteRecorder` may have the same one. Use it as an async
    context manager; it opens by itself at the first call otherwise. What is to be remembered is, also when the caller is
    cancelled meanwhile. Methods raise sqlite3.Error or OSError, and ValueError for text that is not Unicode.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        ttl_seconds: float = TTL_SECONDS,
        max_bytes: int = MAX_BYTES,
        clock: Clock = time.time,
    ) -> None:
        if not (ttl_seconds > 0 and max_bytes > 0):
            raise ValueError("a history that keeps nothing is of no use: ttl_seconds and max_bytes must be positive")
        self.path = Path(path).absolute()  # wherever the process goes from here
        self._open = partial(_Threads, self.path, ttl_seconds, max_bytes, clock)
        self._threads: _Threads | None = None

    async def __aenter__(self) -> Self:
        """Open the database. Raises OSError or sqlite3.Error."""
        try:
            await self._write(lambda _: None)
        except BaseException:
            await self._stop()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Do what is queued, and close."""
        await self._stop()

    async def recall(self, scope: str, keys: Sequence[str]) -> Mapping[str, Memory]:
        """The newest memory under each of the keys, where there is one, with its data or as a husk."""
        return await self._read(lambda reader: reader.recall(scope, keys))

    async def remember(self, scope: str, memory: Memory, toolset: bytes) -> None:
        """Keep a memory under all its keys, and its tool set."""
        await self._write(lambda writer: writer.remember(scope, memory, toolset))

    async def recall_toolset(self, digest: str) -> bytes | None:
        """The encoded tool set with that digest."""
        return await self._read(lambda reader: reader.recall_toolset(digest))

    async def _read(self, call: "Callable[[_Reader], T]") -> T:
        return await asyncio.wrap_future(self._running().read(call))

    async def _write(self, call: "Callable[[_Writer], T]") -> T:
        return await asyncio.shield(asyncio.wrap_future(self._running().write(call)))

    def _running(self) -> "_Threads":
        if self._threads is None:
            self._threads = self._open()
        return self._threads

    async def _stop(self) -> None:
        threads, self._threads = self._threads, None
        if threads is not None:
            await asyncio.get_running_loop().run_in_executor(None, threads.stop)


class _Threads:
    """The one that reads, and the one that writes."""

    def __init__(self, path: Path, ttl_seconds: float, max_bytes: int, clock: Clock) -> None:
        self._reading = ThreadPoolExecutor(max_workers=1, thread_name_prefix="aibridge-history-reader")
        self._writing = _Worker(_Writer(path, ttl_seconds, max_bytes, clock))
        # Often enough for what is in use not to expire, and seldom enough to spare writes.
        touch_seconds = min(_TOUCH_SECONDS, ttl_seconds / 8)
        self._reader = _Reader(path, lambda: clock() - touch_seconds, self._touch)

    def read(self, call: "Callable[[_Reader], T]") -> "Future[T]":
        """Queue a call that reads."""
        return self._reading.submit(self._reader.perform, call)

    def write(self, call: "Callable[[_Writer], T]") -> "Future[T]":
        """Queue a call that writes."""
        return self._writing.submit(call)

    def stop(self) -> None:
        """Do what is queued, and end."""
        self._reading.submit(self._reader.close)  # by the thread that connected
        self._reading.shutdown()
        self._writing.stop()

    def _touch(self, turns: Sequence[str]) -> None:
        """Nobody waits for this. Should it fail, it is done when they are recalled again."""
        self.write(lambda writer: writer.touch(turns)).add_done_callback(_report_untouched)


def _report_untouched(answer: "Future[None]") -> None:
    if answer.exception() is not None:
        logger.warning("that memories are in use could not be noted: %s", answer.exception())


@dataclass(frozen=True, slots=True, eq=False)
class _Job:
    call: "Callable[[_Writer], Any]"
    answer: "Future[Any]" = field(default_factory=Future)


class _Worker:
    """The thread that writes, and its queue. No exception ends it: everybody who waits gets an answer."""

    def __init__(self, writer: "_Writer") -> None:
        self._writer = writer
        self._queue: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._prune_at: float | None = None  # on the monotonic clock; nothing is there before the first call
        self._thread = threading.Thread(target=self._run, name="aibridge-history-writer", daemon=True)
        self._thread.start()

    def submit(self, call: "Callable[[_Writer], T]") -> "Future[T]":
        """Queue a call. It is made, also when its caller does not wait any more."""
        job = _Job(call)
        job.answer.set_running_or_notify_cancel()
        self._queue.put(job)
        return job.answer

    def stop(self) -> None:
        """Do what is queued and end the thread."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (batch := self._next_batch()) is not None:
            if batch:
                self._perform(batch)
            self._keep_house()
        self._writer.close()

    def _next_batch(self) -> list[_Job] | None:
        """What has gathered in the queue, nothing when it is time to keep house; None at the end."""
        batch: list[_Job] = []
        patience = None if self._prune_at is None else max(0.0, self._prune_at - time.monotonic())
        try:
            job = self._queue.get(timeout=patience)
            while job is not None:
                batch.append(job)
                if len(batch) == _MAX_BATCH:
                    return batch
                job = self._queue.get_nowait()
        except queue.Empty:
            return batch
        if not batch:
            return None
        self._queue.put(None)  # the end comes after this batch
        return batch

    def _perform(self, jobs: Sequence[_Job]) -> None:
        try:
            answers = self._writer.perform([job.call for job in jobs])
        except BaseException as error:  # noqa: BLE001  whatever it is, the callers get to know
            if len(jobs) > 1 and not isinstance(error, sqlite3.OperationalError | OSError):
                for job in jobs:  # what one of them brought need not be the others' loss
                    self._perform([job])
                return
            for job in jobs:
                job.answer.set_exception(error)
        else:
            for job, answer in zip(jobs, answers, strict=True):
                job.answer.set_result(answer)

    def _keep_house(self) -> None:
        now = time.monotonic()
        if self._prune_at is not None and now < self._prune_at:
            return
        self._prune_at = now + _PRUNE_SECONDS
        try:
            if self._writer.is_current() and self._writer.prune():
                self._prune_at = now  # the rest comes after those who wait
        except BaseException:  # whatever it is: without this thread every later call would wait for ever
            logger.exception("the history could not be tidied")


class _Connected:
    """A connection to the file that is in its place, whatever happens to files. Used from one thread alone."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._connection: sqlite3.Connection | None = None
        self._file: tuple[int, int] | None = None

    def is_current(self) -> bool:
        """Whether there is a connection, and to the file that is in its place, as far as anybody can see."""
        try:
            return self._connection is not None and self._file == identity(self._path)
        except OSError:
            return False

    def close(self) -> None:
        """Disconnect."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def _database(self) -> sqlite3.Connection:
        if self._connection is None:
            migrate(self._path, directory_beside(self._path), _BUSY_SECONDS)
            self._file = identity(self._path)
            self._connection = connect(self._path, _BUSY_SECONDS)
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute("PRAGMA synchronous = NORMAL")
        return self._connection


class _Reader(_Connected):
    """Reads the tables. What was last used before `due()`, and is so again, it passes on to `touch`."""

    def __init__(self, path: Path, due: Callable[[], float], touch: Callable[[Sequence[str]], None]) -> None:
        super().__init__(path)
        self._due = due
        self._touch = touch

    def perform(self, call: "Callable[[_Reader], T]") -> T:
        """Make a call and answer what it returns. Raises what it raises, OSError or sqlite3.Error."""
        if not self.is_current():
            self.close()
        try:
            return call(self)
        except BaseException:
            self.close()
            raise

    def recall(self, scope: str, keys: Sequence[str]) -> dict[str, Memory]:
        """The newest memory under each of the keys."""
        due = _time(self._due())
        memories: dict[str, Memory] = {}
        used: list[str] = []
        wanted = {"scope": scope, "keys": _json(keys)}
        for turn, found, all_keys, toolset, data, last_id, used_at in self._database().execute(_RECALL, wanted):
            memory = Memory(msgspec.json.decode(all_keys, type=tuple[str, ...]), toolset, data, last_id)
            memories |= dict.fromkeys(msgspec.json.decode(found), memory)
            if used_at < due:
                used.append(turn)
        if used:
            self._touch(used)
        return memories

    def recall_toolset(self, digest: str) -> bytes | None:
        """The encoded tool set with that digest."""
        found = self._database().execute("SELECT tools FROM aibridge_toolsets WHERE digest = ?", (digest,)).fetchone()
        return None if found is None else found[0]


class _Writer(_Connected):
    """Writes the tables."""

    def __init__(self, path: Path, ttl_seconds: float, max_bytes: int, clock: Clock) -> None:
        super().__init__(path)
        self._ttl_seconds = ttl_seconds
        self._max_bytes = max_bytes
        self._clock = clock

    def perform(self, calls: "Sequence[Callable[[_Writer], Any]]") -> Sequence[Any]:
        """Make calls in one transaction and answer what they return. Raises what they raise, OSError or sqlite3.Error."""
        while True:
            if not self.is_current():
                self.close()
            try:
                with _transaction(self._database()):
                    answers = [call(self) for call in calls]
            except BaseException:
                self.close()
                raise
            if self.is_current():
                return answers
            # It was deleted while we wrote, into a file that nobody can find.

    # ---- calls ----

    def remember(self, scope: str, memory: Memory, toolset: bytes) -> None:
        """Keep a memory, and the tools that it refers to."""
        row = {
            "id": str(uuid_utils.uuid7()),
            "scope": scope,
            "keys": _json(memory.keys),
            "toolset": memory.toolset,
            "size": len(memory.data or b""),
            "now": _time(self._clock()),
            "last_id": memory.last_id,
            "data": memory.data,
            "tools": toolset,
        }
        for statement in (_REMEMBER, _REMEMBER_KEYS, _REMEMBER_TOOLSET):
            self._database().execute(statement, row)

    def touch(self, turns: Sequence[str]) -> None:
        """Note that memories are in use, and their tools."""
        used = (_time(self._clock()), _json(turns))
        self._database().execute(_TOUCH, used)
        self._database().execute(_TOUCH_TOOLSETS, used)

    # ---- housekeeping ----

    def prune(self) -> bool:
        """Take away what is over its age or the size bound, so much at a time. Answers whether there may be more."""
        database, now = self._database(), self._clock()
        expired, gone = _time(now - self._ttl_seconds), _time(now - 2 * self._ttl_seconds)
        with _transaction(database):
            counts = (
                database.execute(_DROP_EXPIRED, (expired, _PRUNE_ROWS)).rowcount,
                self._drop_excess(database),
                self._delete(database, gone),
            )
            database.execute(_DELETE_TOOLSETS)
        return _PRUNE_ROWS in counts

    def _drop_excess(self, database: sqlite3.Connection) -> int:
        (total,) = database.execute(_TOTAL_SIZE).fetchone()
        if total <= self._max_bytes:
            return 0
        excess = total - self._max_bytes
        dropped = []
        for turn, toolset, size, _ in database.execute(_LEAST_USED, (_PRUNE_ROWS,)).fetchall():
            if excess <= 0:
                break
            dropped.append((turn, toolset))
            excess -= size
        database.executemany(_DROP, [(turn,) for turn, _ in dropped if turn])
        database.executemany(_DELETE_TOOLSET, [(toolset,) for _, toolset in dropped if toolset])
        return len(dropped)

    def _delete(self, database: sqlite3.Connection, gone: str) -> int:
        rows = database.execute(_GONE, (gone, _PRUNE_ROWS)).fetchall()
        database.executemany(_DELETE_KEYS, rows)
        database.executemany(_DELETE, [(turn,) for turn, _, _ in rows])
        return len(rows)


@contextmanager
def _transaction(database: sqlite3.Connection) -> Iterator[None]:
    database.execute("BEGIN IMMEDIATE")
    try:
        yield
        database.execute("COMMIT")
    except BaseException:
        if database.in_transaction:
            database.execute("ROLLBACK")
        raise


def _time(seconds: float) -> str:
    """As in the ledger. What was before the epoch was never."""
    return datetime.fromtimestamp(max(0.0, seconds), UTC).isoformat(timespec="microseconds")


def _json(texts: Sequence[str]) -> str:
    return msgspec.json.encode(texts).decode()
