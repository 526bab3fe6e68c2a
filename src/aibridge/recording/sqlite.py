"""The ledger in SQLite: WAL, prepared statements, one transaction for a batch.

With ``synchronous = NORMAL`` in WAL mode a commit survives the death of the process at any instant; a power cut may take
the last moments with it, but never the database's integrity (sqlite.org/pragma.html#pragma_synchronous).
"""

import os
import sqlite3
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import msgspec
import uuid_utils

from aibridge.recording.schema import migrate
from aibridge.recording.spool import Spool
from aibridge.recording.writer import RecordRejected, StoreUnavailable, Writer
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

# In this order within a batch: what a record refers to is there before it.
_TABLES: Final[dict[type[Record], str]] = {
    Interception: "aibridge_interceptions",
    TokenUsage: "aibridge_token_usages",
    PromptUsage: "aibridge_user_prompts",
    ToolUsage: "aibridge_tool_usages",
    ModelThought: "aibridge_model_thoughts",
}


def _insert(table: str, columns: Sequence[str]) -> str:
    marks = ", ".join("?" * len(columns))
    return f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({marks}) ON CONFLICT (id) DO NOTHING"  # noqa: S608  constants


_COLUMNS: Final = {kind: kind.__struct_fields__ for kind in _TABLES}
_INSERTS: Final = {
    kind: _insert(table, (*_COLUMNS[kind], *(("instance", "status") if kind is Interception else ())))
    for kind, table in _TABLES.items()
}
_END: Final = (
    "UPDATE aibridge_interceptions SET ended_at = ?, status = ?, http_status = ?, error = ?, time_to_first_byte_ms = ?"
    " WHERE id = ?"
)
_INTERRUPT: Final = (
    "UPDATE aibridge_interceptions SET status = 'interrupted', ended_at = ?, error = 'the process ended before the response'"
    " WHERE status = 'in_progress' AND instance NOT IN (SELECT value FROM json_each(?))"
)


class SqliteRecorder:
    """Keeps records in a SQLite database, which is created, and migrated, when it is opened.

    Records that the database cannot take go to a spool file beside it (``<path>-spool/``) and are replayed when it can.
    Several processes on one machine may share a database. Use it as an async context manager, or give it to a
    `RequestBridge` that does; it opens by itself at the first record otherwise.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        instance = str(uuid_utils.uuid7())
        spool = Spool(self.path.with_name(self.path.name + "-spool"), instance)
        self._writer = Writer(SqliteStore(self.path, spool), spool)

    async def __aenter__(self) -> Self:
        """Open the database; close what a dead process left open. Raises OSError or sqlite3.Error."""
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
        """Connect, migrate, and let the other processes know that this one is alive. Raises OSError or sqlite3.Error."""
        self._spool.acquire()
        self._connect()

    def write(self, records: Sequence[Record]) -> None:
        """Write all of them in one transaction."""
        try:
            if self._database is None or self._file != _identity(self._path):
                self._connect()
                self._transaction(list(self._open.values()))
            self._transaction(records)
            while self._file != _identity(self._path):  # deleted while we wrote: into a file that nobody can find
                self._connect()
                self._transaction([*self._open.values(), *records])
        except (sqlite3.OperationalError, sqlite3.DatabaseError, OSError) as error:
            self._disconnect()
            raise StoreUnavailable(str(error)) from error
        for record in records:
            if isinstance(record, Interception):
                self._open[record.id] = record
            elif isinstance(record, InterceptionEnded):
                self._open.pop(record.interception_id, None)

    def close_interrupted(self, alive: Sequence[str]) -> int:
        """Close the interceptions that no process in `alive` has open."""
        database = self._connected()
        cursor = database.execute(_INTERRUPT, (_time(datetime.now(UTC)), msgspec.json.encode(alive).decode()))
        return cursor.rowcount

    def close(self) -> None:
        """Disconnect."""
        self._disconnect()

    def _transaction(self, records: Sequence[Record]) -> None:
        database = self._connected()
        database.execute("BEGIN IMMEDIATE")
        try:
            for statement, rows in self._statements(records):
                database.executemany(statement, rows)
            database.execute("COMMIT")
        except (sqlite3.IntegrityError, sqlite3.InterfaceError, sqlite3.ProgrammingError, *_UNBINDABLE):
            database.execute("ROLLBACK")
            self._reject_one(records)
            raise
        except BaseException:
            if database.in_transaction:
                database.execute("ROLLBACK")
            raise

    def _statements(self, records: Sequence[Record]) -> Iterable[tuple[str, list[tuple[Any, ...]]]]:
        for kind, statement in _INSERTS.items():
            extra = (self._spool.instance, "in_progress") if kind is Interception else ()
            rows = [_row(record, extra) for record in records if type(record) is kind]
            if rows:
                yield statement, rows
        ends = [
            (_time(end.ended_at), end.status, end.http_status, end.error, end.time_to_first_byte_ms, end.interception_id)
            for end in records
            if isinstance(end, InterceptionEnded)
        ]
        if ends:
            yield _END, ends

    def _reject_one(self, records: Sequence[Record]) -> None:
        """Find the record that the database does not take, by writing each on its own, and raise `RecordRejected`."""
        database = self._connected()
        for index, record in enumerate(records):
            database.execute("BEGIN")
            try:
                for statement, rows in self._statements([record]):
                    database.executemany(statement, rows)
            except (sqlite3.IntegrityError, sqlite3.InterfaceError, sqlite3.ProgrammingError, *_UNBINDABLE) as error:
                raise RecordRejected(index, type(error).__name__) from error
            finally:
                database.execute("ROLLBACK")

    def _connected(self) -> sqlite3.Connection:
        if self._database is None:
            raise StoreUnavailable("not connected")
        return self._database

    def _connect(self) -> None:
        self._disconnect()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600))  # prompts are nobody else's business
        migrate(self._path, self._spool.directory)
        database = sqlite3.connect(self._path, timeout=_BUSY_SECONDS, isolation_level=None, cached_statements=32)
        try:
            database.execute("PRAGMA journal_mode = WAL")
            database.execute("PRAGMA synchronous = NORMAL")
        except sqlite3.Error:
            database.close()
            raise
        self._database = database
        self._file = _identity(self._path)

    def _disconnect(self) -> None:
        database, self._database = self._database, None
        if database is not None:
            database.close()


# What binding a value raises that is no SQL error: an integer over 64 bits, text that is not Unicode, a type without a form.
_UNBINDABLE: Final = (OverflowError, UnicodeError, TypeError, ValueError)


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


def _time(value: datetime) -> str:
    return value.astimezone(UTC).isoformat(timespec="microseconds")


def _json(value: Mapping[str, Any]) -> str:
    return msgspec.json.encode(value).decode()


# How a field's value is bound; most are bound as they are.
_BINDINGS: Final[dict[str, Callable[[Any], Any]]] = {"started_at": _time, "created_at": _time, "metadata": _json}
_BINDERS: Final = {kind: tuple((name, _BINDINGS.get(name)) for name in names) for kind, names in _COLUMNS.items()}


def _row(record: Record, extra: tuple[str, ...]) -> tuple[Any, ...]:
    values = (
        getattr(record, name) if bind is None else bind(getattr(record, name)) for name, bind in _BINDERS[type(record)]
    )
    return (*values, *extra)
