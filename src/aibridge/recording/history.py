"""The hidden turns of conversations in SQLite, in the same database as the ledger.

One thread has the connection. It takes all that waits in its queue: what is to be written goes into one transaction, and
a call is answered when that is committed. In between it keeps house. Theory of operation for a memory, by the time that
it was not used:

    fresh --ttl--> husk --ttl--> gone

A husk has lost its data but keeps its keys: that something is missing can be told from that nothing was ever there. A
memory over the size bound becomes a husk early, the least recently used first. One that hid nothing has nothing to lose
and stays as it is until it goes.
"""

import asyncio
import logging
import os
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from itertools import groupby
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

_BUSY_SECONDS: Final = 5.0  # unlike a record, a memory has no spool to go to: waiting is better than losing it
_MAX_BATCH: Final = 100
_TOUCH_SECONDS: Final = 3600.0
_PRUNE_SECONDS: Final = 60.0
_PRUNE_ROWS: Final = 100

# The keys are found first, and each turn is read once, however many of its keys are asked for. CROSS JOIN fixes the order.
_RECALL: Final = """
    SELECT turn.id, found.keys, turn.keys, turn.toolset, turn.data, turn.used_at
    FROM (
        SELECT known.turn, json_group_array(known.key) AS keys
        FROM json_each(:keys) AS wanted
        CROSS JOIN aibridge_hidden_turn_keys AS known ON known.scope = :scope AND known.key = wanted.value
        GROUP BY known.turn
    ) AS found
    CROSS JOIN aibridge_hidden_turns AS turn ON turn.id = found.turn
"""
_REMEMBER: Final = """
    INSERT INTO aibridge_hidden_turns (id, scope, keys, toolset, size, created_at, used_at, data)
    VALUES (:id, :scope, :keys, :toolset, :size, :now, :now, :data)
"""
_REMEMBER_KEYS: Final = """
    INSERT INTO aibridge_hidden_turn_keys (scope, key, turn) SELECT :scope, value, :id FROM json_each(:keys) WHERE true
    ON CONFLICT (scope, key) DO UPDATE SET turn = excluded.turn
"""
_TOUCH: Final = "UPDATE aibridge_hidden_turns SET used_at = ? WHERE id IN (SELECT value FROM json_each(?))"
_REMEMBER_TOOLSET: Final = """
    INSERT INTO aibridge_toolsets (digest, used_at, tools) VALUES (:digest, :now, :tools)
    ON CONFLICT (digest) DO UPDATE SET used_at = excluded.used_at WHERE used_at < :due
"""
_DROP_EXPIRED: Final = """
    UPDATE aibridge_hidden_turns SET data = NULL, size = 0 WHERE id IN
    (SELECT id FROM aibridge_hidden_turns WHERE size > 0 AND used_at < ? ORDER BY used_at LIMIT ?)
"""
_TOTAL_SIZE: Final = "SELECT coalesce(sum(size), 0) FROM aibridge_hidden_turns WHERE size > 0"
_LEAST_USED: Final = "SELECT id, size FROM aibridge_hidden_turns WHERE size > 0 ORDER BY used_at LIMIT ?"
_DROP: Final = "UPDATE aibridge_hidden_turns SET data = NULL, size = 0 WHERE id = ?"
_GONE: Final = "SELECT id, scope, keys FROM aibridge_hidden_turns WHERE size = 0 AND used_at < ? ORDER BY used_at LIMIT ?"
_DELETE_KEYS: Final = """
    DELETE FROM aibridge_hidden_turn_keys
    WHERE turn = ?1 AND scope = ?2 AND key IN (SELECT value FROM json_each(?3))
"""
_DELETE: Final = "DELETE FROM aibridge_hidden_turns WHERE id = ?"
_DELETE_TOOLSETS: Final = """
    DELETE FROM aibridge_toolsets WHERE used_at < ?
    AND NOT EXISTS (SELECT 1 FROM aibridge_hidden_turns WHERE toolset = digest)
"""


class SqliteHistory:
    """Keeps memories in a SQLite database, which is created, and migrated, when it is opened.

    A memory that was not used for `ttl_seconds` loses its data, and is forgotten after that time again. All data together
    may have `max_bytes`; this is looked after once a minute. Neither bound may be 0; `math.inf` seconds is for ever.
    `clock` gives the time in seconds since the epoch.

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
        self._store = partial(_Store, self.path, ttl_seconds, max_bytes, clock)
        self._worker: _Worker | None = None

    async def __aenter__(self) -> Self:
        """Open the database. Raises OSError or sqlite3.Error."""
        try:
            await self._do(lambda _: None)
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
        return await self._do(lambda store: store.recall(scope, keys))

    async def remember(self, scope: str, memory: Memory) -> None:
        """Keep a memory under all its keys."""
        await self._do(lambda store: store.remember(scope, memory), writes=True)

    async def recall_toolset(self, digest: str) -> bytes | None:
        """The encoded tool set with that digest."""
        return await self._do(lambda store: store.recall_toolset(digest))

    async def remember_toolset(self, digest: str, encoded: bytes) -> None:
        """Keep a tool set. It stays for as long as a memory refers to it, and for `ttl_seconds` in any case."""
        await self._do(lambda store: store.remember_toolset(digest, encoded), writes=True)

    async def _do(self, call: "Callable[[_Store], T]", *, writes: bool = False) -> T:
        if self._worker is None:
            self._worker = _Worker(self._store())
        return await asyncio.shield(asyncio.wrap_future(self._worker.submit(call, writes=writes)))

    async def _stop(self) -> None:
        worker, self._worker = self._worker, None
        if worker is not None:
            await asyncio.get_running_loop().run_in_executor(None, worker.stop)


@dataclass(frozen=True, slots=True, eq=False)
class _Job:
    call: "Callable[[_Store], Any]"
    writes: bool
    answer: "Future[Any]" = field(default_factory=Future)


class _Worker:
    """The thread that has a store, and its queue."""

    def __init__(self, store: "_Store") -> None:
        self._store = store
        self._queue: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._prune_at = 0.0
        self._thread = threading.Thread(target=self._run, name="aibridge-history", daemon=True)
        self._thread.start()

    def submit(self, call: "Callable[[_Store], T]", *, writes: bool) -> "Future[T]":
        """Queue a call."""
        job = _Job(call, writes)
        self._queue.put(job)
        return job.answer

    def stop(self) -> None:
        """Do what is queued and end the thread."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (batch := self._next_batch()) is not None:
            for writes, jobs in groupby(batch, lambda job: job.writes):
                self._perform(list(jobs), writes=writes)
            self._keep_house()
        self._store.close()

    def _next_batch(self) -> list[_Job] | None:
        """What has gathered in the queue, nothing when it is time to keep house; None at the end."""
        batch: list[_Job] = []
        try:
            job = self._queue.get(timeout=max(0.0, self._prune_at - time.monotonic()) if self._store.is_open else None)
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

    def _perform(self, jobs: Sequence[_Job], *, writes: bool) -> None:
        try:
            answers = self._store.perform([job.call for job in jobs], writes=writes)
        except Exception as error:  # noqa: BLE001  whatever it is, the callers get to know
            if len(jobs) > 1 and not isinstance(error, sqlite3.OperationalError | OSError):
                for job in jobs:  # what one of them brought need not be the others' loss
                    self._perform([job], writes=writes)
                return
            self._store.close()
            for job in jobs:
                job.answer.set_exception(error)
        else:
            for job, answer in zip(jobs, answers, strict=True):
                job.answer.set_result(answer)

    def _keep_house(self) -> None:
        if not self._store.is_open:
            return
        try:
            self._store.touch()
            if time.monotonic() >= self._prune_at:
                self._prune_at = time.monotonic() + _PRUNE_SECONDS
                if self._store.prune():  # the rest comes after those who wait
                    self._prune_at = 0.0
        except Exception:  # a thread that died would leave everybody waiting
            logger.exception("the history could not be tidied")


class _Store:
    """The tables, used from one thread alone."""

    def __init__(self, path: Path, ttl_seconds: float, max_bytes: int, clock: Clock) -> None:
        self._path = path
        self._ttl_seconds = ttl_seconds
        self._max_bytes = max_bytes
        self._clock = clock
        # Often enough for what is in use not to expire, and seldom enough to spare writes.
        self._touch_seconds = min(_TOUCH_SECONDS, ttl_seconds / 8)
        self._database: sqlite3.Connection | None = None
        self._file: tuple[int, int] | None = None
        self._touched: set[str] = set()
        # All that this process knows: whoever deleted the file, a memory never lacks its tools.
        self._toolsets: dict[str, bytes] = {}

    # ---- calls ----

    def recall(self, scope: str, keys: Sequence[str]) -> dict[str, Memory]:
        """The newest memory under each of the keys."""
        due = _time(self._clock() - self._touch_seconds)
        memories: dict[str, Memory] = {}
        wanted = {"scope": scope, "keys": _json(keys)}
        for turn, found, all_keys, toolset, data, used_at in self._connected().execute(_RECALL, wanted):
            memory = Memory(msgspec.json.decode(all_keys, type=tuple[str, ...]), toolset, data)
            memories |= dict.fromkeys(msgspec.json.decode(found), memory)
            if used_at < due:
                self._touched.add(turn)
        return memories

    def remember(self, scope: str, memory: Memory) -> None:
        """Keep a memory, and with it the tools that it refers to."""
        row = {
            "id": str(uuid_utils.uuid7()),
            "scope": scope,
            "keys": _json(memory.keys),
            "toolset": memory.toolset,
            "size": len(memory.data or b""),
            "now": _time(self._clock()),
            "data": memory.data,
        }
        self._connected().execute(_REMEMBER, row)
        self._connected().execute(_REMEMBER_KEYS, row)
        tools = self._toolsets.get(memory.toolset)
        if tools is not None:
            self.remember_toolset(memory.toolset, tools)

    def recall_toolset(self, digest: str) -> bytes | None:
        """The encoded tool set with that digest."""
        found = self._connected().execute("SELECT tools FROM aibridge_toolsets WHERE digest = ?", (digest,)).fetchone()
        if found is None:
            return None
        return self._toolsets.setdefault(digest, found[0])

    def remember_toolset(self, digest: str, encoded: bytes) -> None:
        """Keep a tool set."""
        now = self._clock()
        row = {"digest": digest, "tools": encoded, "now": _time(now), "due": _time(now - self._touch_seconds)}
        self._connected().execute(_REMEMBER_TOOLSET, row)
        self._toolsets[digest] = encoded

    # ---- housekeeping ----

    def touch(self) -> None:
        """Note that what was recalled is in use. Should that fail, it is noted when they are recalled again."""
        touched, self._touched = self._touched, set()
        if touched:
            self._connected().execute(_TOUCH, (_time(self._clock()), _json(list(touched))))

    def prune(self) -> bool:
        """Take away what is over its age or the size bound, so much at a time. Answers whether there may be more."""
        database, now = self._connected(), self._clock()
        expired, gone = _time(now - self._ttl_seconds), _time(now - 2 * self._ttl_seconds)
        with _transaction(database, writes=True):
            counts = (
                database.execute(_DROP_EXPIRED, (expired, _PRUNE_ROWS)).rowcount,
                self._drop_excess(database),
                self._delete(database, gone),
            )
            database.execute(_DELETE_TOOLSETS, (expired,))
        return _PRUNE_ROWS in counts

    def _drop_excess(self, database: sqlite3.Connection) -> int:
        (total,) = database.execute(_TOTAL_SIZE).fetchone()
        excess = total - self._max_bytes
        dropped = []
        for turn, size in database.execute(_LEAST_USED, (_PRUNE_ROWS,)).fetchall():
            if excess <= 0:
                break
            dropped.append((turn,))
            excess -= size
        database.executemany(_DROP, dropped)
        return len(dropped)

    def _delete(self, database: sqlite3.Connection, gone: str) -> int:
        rows = database.execute(_GONE, (gone, _PRUNE_ROWS)).fetchall()
        database.executemany(_DELETE_KEYS, rows)
        database.executemany(_DELETE, [(turn,) for turn, _, _ in rows])
        return len(rows)

    # ---- the connection ----

    def perform(self, calls: "Sequence[Callable[[_Store], Any]]", *, writes: bool) -> Sequence[Any]:
        """Make calls in one transaction and answer what they return. Raises what they raise, OSError or sqlite3.Error."""
        while True:
            if not self.is_open:
                self.close()
            with _transaction(self._connected(), writes=writes):
                answers = [call(self) for call in calls]
            if not writes or self.is_open:
                return answers
            # It was deleted while we wrote, into a file that nobody can find.

    def close(self) -> None:
        """Disconnect."""
        database, self._database = self._database, None
        if database is not None:
            database.close()

    @property
    def is_open(self) -> bool:
        """Whether there is a connection, and to the file that is in its place."""
        return self._database is not None and self._file == identity(self._path)

    def _connected(self) -> sqlite3.Connection:
        if self._database is None:
            migrate(self._path, directory_beside(self._path), _BUSY_SECONDS)
            self._file = identity(self._path)
            self._database = connect(self._path, _BUSY_SECONDS)
            self._database.execute("PRAGMA journal_mode = WAL")
            self._database.execute("PRAGMA synchronous = NORMAL")
        return self._database


@contextmanager
def _transaction(database: sqlite3.Connection, *, writes: bool) -> Iterator[None]:
    database.execute("BEGIN IMMEDIATE" if writes else "BEGIN")
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
