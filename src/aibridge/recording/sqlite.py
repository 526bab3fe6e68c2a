"""The ledger in SQLite: WAL, prepared statements, one transaction for a batch.

With ``synchronous = NORMAL`` in WAL mode a commit survives the death of the process at any instant; a power cut may take
the last moments with it, but never the database's integrity (sqlite.org/pragma.html#pragma_synchronous).
"""

import errno
import os
import random
import sqlite3
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import msgspec
from msgspec.structs import astuple

from aibridge.recording.base import Report
from aibridge.recording.schema import connect, directory_beside, identity, migrate
from aibridge.recording.spool import UNENCODABLE, Spool
from aibridge.recording.writer import StoreUnavailable, Writer
from aibridge.records import (
    Interception,
    InterceptionEnded,
    ModelThought,
    PromptUsage,
    Record,
    TokenUsage,
    ToolUsage,
)

_BUSY_SECONDS: Final = 1.0
_PAUSE_SECONDS: Final = 0.0005

# In this order within a batch: what a record refers to is there before it.
_TABLES: Final[dict[type[Record], str]] = {
    Interception: "aibridge_interceptions",
    TokenUsage: "aibridge_token_usages",
    PromptUsage: "aibridge_user_prompts",
    ToolUsage: "aibridge_tool_usages",
    ModelThought: "aibridge_model_thoughts",
}


def _insert(kind: type[Record]) -> str:
    columns = kind.__struct_fields__ + (("instance", "status") if kind is Interception else ())
    marks = ", ".join("?" * len(columns))
    return f"INSERT INTO {_TABLES[kind]} ({', '.join(columns)}) VALUES ({marks}) ON CONFLICT (id) DO NOTHING"  # noqa: S608  constants


_INSERTS: Final = {kind: _insert(kind) for kind in _TABLES}
_END: Final = (
    "UPDATE aibridge_interceptions SET ended_at = ?2, status = ?3, http_status = ?4, error = ?5, time_to_first_byte_ms = ?6"
    " WHERE id = ?1"
)
_INTERRUPT: Final = (
    "UPDATE aibridge_interceptions SET status = 'interrupted', error = 'the process ended before this was recorded',"
    " ended_at = max(?, started_at)"  # the clock may have been set back since
    " WHERE status = 'in_progress' AND instance NOT IN (SELECT value FROM json_each(?))"
)


class SqliteRecorder:
    """Keeps records in a SQLite database, which is created, and migrated, when it is opened.

    Records that the database cannot take go to a spool file beside it (``<path>-spool/``) and are replayed when it can.
    Several processes on one machine may share a database. Use it as an async context manager, or give it to a
    `RequestBridge` that does; it opens by itself at the first record otherwise.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).absolute()  # wherever the process goes from here
        spool = Spool(directory_beside(self.path))
        self._writer = Writer(SqliteStore(self.path, spool), spool)

    @property
    def problem(self) -> str | None:
        """Why records cannot be kept at the moment; None where they can, if only in the spool."""
        return self._writer.problem

    @property
    def failing(self) -> bool:
        """Whether neither database nor spool have taken records for a while, so that they are lost."""
        return self._writer.failing

    @property
    def queued(self) -> int:
        """How many submissions wait to be written."""
        return self._writer.queued

    @property
    def spool_bytes(self) -> int:
        """How much the spool holds that is not in the database yet."""
        return self._writer.spool_bytes

    async def __aenter__(self) -> Self:
        """Open the database; close what a dead process left open. Raises OSError (the spool) or `StoreUnavailable`."""
        await self._writer.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Write what is queued, and close."""
        await self._writer.stop()

    def record_interception(self, record: Interception) -> Awaitable[None]:
        """An interception begins."""
        return self._writer.submit(record)

    def record_interception_ended(self, record: InterceptionEnded) -> Awaitable[None]:
        """An interception has ended."""
        return self._writer.submit(record)

    def record_token_usage(self, record: TokenUsage) -> Awaitable[None]:
        """An upstream response reported its usage, or ended without."""
        return self._writer.submit(record)

    def record_prompt_usage(self, record: PromptUsage) -> Awaitable[None]:
        """The user asked something."""
        return self._writer.submit(record)

    def record_tool_usage(self, record: ToolUsage) -> Awaitable[None]:
        """The model called a tool."""
        return self._writer.submit(record)

    def record_model_thought(self, record: ModelThought) -> Awaitable[None]:
        """The model thought aloud."""
        return self._writer.submit(record)

    def record_together(self, records: Sequence[Record]) -> Awaitable[None]:
        """Records that became known at the same time, of one interception."""
        return self._writer.submit(*records)

    def report_to(self, report: Report) -> None:
        """Tell what is written, and of records that were durable in the spool and could not be brought into the database."""
        self._writer.report_to(report)


class UnknownInterception(Exception):
    """An interception ended that is not in the database."""


# What says that a record will never be taken, whatever the state of the database.
_REJECTIONS: Final = (
    sqlite3.DataError,
    sqlite3.IntegrityError,
    sqlite3.InterfaceError,
    sqlite3.ProgrammingError,
    *UNENCODABLE,
    UnknownInterception,
)


class SqliteStore:
    """The database behind a `Writer`."""

    def __init__(self, path: Path, spool: Spool) -> None:
        self._path = path
        self._spool = spool
        self._database: sqlite3.Connection | None = None
        self._file: tuple[int, int] | None = None
        # The starts of interceptions that have not ended: should the file be deleted under our feet, they are written anew.
        self._open: dict[str, Interception] = {}

    def open(self) -> None:
        """Connect and migrate."""
        try:
            self._connect()
        except (sqlite3.Error, OSError) as error:
            raise StoreUnavailable(f"the database {self._path} cannot be opened: {error}") from error

    def write(self, records: Sequence[Record], instance: str) -> Mapping[int, str]:
        """Write all that can be written in one transaction."""
        try:
            rejected = self._write(records, instance)
            while self._file != identity(self._path):  # deleted while we wrote: into a file that nobody can find
                rejected = self._write(records, instance)
        except Exception as error:  # whatever it is: the spool keeps what the database does not
            self._disconnect()
            raise StoreUnavailable(str(error), is_full=_is_full(error)) from error
        self._note(records, instance, rejected)
        return rejected

    def close_interrupted(self, alive: Callable[[], Sequence[str]]) -> int:
        """Close the interceptions that no process in `alive` has open."""
        try:
            with _transaction(self._connected()) as database:  # whoever writes from here on has to wait, dead or alive
                instances = _encode(alive()).decode()
                return database.execute(_INTERRUPT, (_time(datetime.now(UTC)), instances)).rowcount
        except (sqlite3.Error, OSError) as error:
            raise StoreUnavailable(f"the database {self._path} cannot be written: {error}") from error

    def close(self) -> None:
        """Disconnect."""
        self._disconnect()

    def _write(self, records: Sequence[Record], instance: str) -> Mapping[int, str]:
        if self._database is None or self._file != identity(self._path):
            self._connect()
            self._transaction(list(self._open.values()), self._spool.instance)
        return self._transaction(records, instance)

    def _transaction(self, records: Sequence[Record], instance: str) -> Mapping[int, str]:
        try:
            with _transaction(self._connected()):
                self._execute(records, instance)
            return {}
        except _REJECTIONS:
            with _transaction(self._connected()):
                return self._execute_one_by_one(records, instance)

    def _execute_one_by_one(self, records: Sequence[Record], instance: str) -> Mapping[int, str]:
        """Answers which of the records the database does not take. Each is one statement, which does all or nothing."""
        rejected: dict[int, str] = {}
        for index, record in enumerate(records):
            try:
                if isinstance(record, InterceptionEnded) and record.interception_id in self._open:
                    self._execute([self._open[record.interception_id]], instance)  # somebody may have deleted the row
                self._execute([record], instance)
            except _REJECTIONS as error:
                rejected[index] = type(error).__name__
        return rejected

    def _execute(self, records: Sequence[Record], instance: str) -> None:
        database = self._connected()
        rows: defaultdict[type[Record], list[list[Any]]] = defaultdict(list)
        for record in records:
            rows[type(record)].append(_row(record))
        for row in rows[Interception]:
            row.extend((instance, "in_progress"))
        for kind, statement in _INSERTS.items():
            if rows[kind]:
                database.executemany(statement, rows[kind])
        ends = rows[InterceptionEnded]
        if ends and database.executemany(_END, ends).rowcount < len(ends):
            raise UnknownInterception

    def _note(self, records: Sequence[Record], instance: str, rejected: Mapping[int, str]) -> None:
        """Keep in mind which of our interceptions are open."""
        for index, record in enumerate(records):
            if isinstance(record, InterceptionEnded):
                self._open.pop(record.interception_id, None)
            elif isinstance(record, Interception) and index not in rejected and instance == self._spool.instance:
                self._open[record.id] = record

    def _connected(self) -> sqlite3.Connection:
        return self._connect() if self._database is None else self._database

    def _connect(self) -> sqlite3.Connection:
        self._disconnect()
        self._spool.acquire()  # who deleted the database may have deleted the spool with it
        migrate(self._path, self._spool.directory, _BUSY_SECONDS)
        self._file = identity(self._path)
        self._database = connect(self._path, _BUSY_SECONDS)
        self._database.execute("PRAGMA journal_mode = WAL")
        self._database.execute("PRAGMA synchronous = NORMAL")
        self._database.execute("PRAGMA busy_timeout = 0")  # from here on `_begin` has the patience
        return self._database

    def _disconnect(self) -> None:
        database, self._database = self._database, None
        if database is not None:
            database.close()


def _is_full(error: Exception) -> bool:
    if isinstance(error, sqlite3.Error):
        return getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL  # not every error has a code
    return isinstance(error, OSError) and error.errno == errno.ENOSPC


@contextmanager
def _transaction(database: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
    """All of it or nothing. Raises sqlite3.Error, also where other processes leave no gap for so long."""
    _begin(database)
    try:
        yield database
        database.execute("COMMIT")
    except BaseException:
        if database.in_transaction:
            database.execute("ROLLBACK")
        raise


def _begin(database: sqlite3.Connection) -> None:
    """Take the lock for writing, which is all that a writer waits for in WAL mode.

    SQLite's own busy handler waits longer each time, up to 100 ms (sqliteDefaultBusyCallback in its main.c): between writers
    that never pause, whoever came late starves. A commit takes less than a millisecond, so all look again that often.
    """
    give_up_at = time.monotonic() + _BUSY_SECONDS
    while True:
        try:
            database.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() >= give_up_at:
                raise
        else:
            return
        time.sleep(random.uniform(0, 2 * _PAUSE_SECONDS))  # noqa: S311  so that they do not look all at once


_encode: Final = msgspec.json.Encoder().encode
_TIME_LENGTH: Final = len('"2026-11-21T12:00:00.123456Z"')

# Where among the fields of a record its time is.
_TIMES: Final = {
    kind: next(index for index, name in enumerate(kind.__struct_fields__) if name.endswith("_at"))
    for kind in (*_TABLES, InterceptionEnded)
}


def _row(record: Record) -> list[Any]:
    """What is bound for a record's fields, in their order. Metadata come last; only an end has none."""
    kind = type(record)
    values = list(astuple(record))
    at = _TIMES[kind]
    values[at] = _time(values[at])
    if kind is not InterceptionEnded:
        values[-1] = _encode(values[-1]).decode()
    return values


def _time(value: datetime) -> str:
    """In the form of `datetime.isoformat`, which takes fifteen times as long as msgspec."""
    encoded = _encode(value)
    if len(encoded) == _TIME_LENGTH and encoded.endswith(b'Z"'):
        return encoded[1:-2].decode() + "+00:00"
    return value.astimezone(UTC).isoformat(timespec="microseconds")  # no microseconds, or not in UTC
