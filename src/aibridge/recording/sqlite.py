"""The ledger in SQLite: WAL, prepared statements, one transaction for a batch.

With ``synchronous = NORMAL`` in WAL mode a commit survives the death of the process at any instant; a power cut may take
the last moments with it, but never the database's integrity (sqlite.org/pragma.html#pragma_synchronous).
"""

import os
import sqlite3
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import msgspec

from aibridge.recording.base import LossReport
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
        self.path = Path(path).absolute()  # wherever the process goes from here
        spool = Spool(directory_beside(self.path))
        self._writer = Writer(SqliteStore(self.path, spool), spool)

    @property
    def problem(self) -> str | None:
        """Why records cannot be kept at the moment; None where they can, if only in the spool."""
        return self._writer.problem

    async def __aenter__(self) -> Self:
        """Open the database; close what a dead process left open. Raises OSError, sqlite3.Error or `StoreUnavailable`."""
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

    def report_losses(self, to: LossReport) -> None:
        """Tell of records that were durable in the spool, and then could not be brought into the database."""
        self._writer.report_losses(to)


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
        """Connect and migrate. Raises OSError or sqlite3.Error."""
        self._connect()

    def write(self, records: Sequence[Record], instance: str) -> Mapping[int, str]:
        """Write all that can be written in one transaction."""
        try:
            rejected = self._write(records, instance)
            while self._file != identity(self._path):  # deleted while we wrote: into a file that nobody can find
                rejected = self._write(records, instance)
        except Exception as error:  # whatever it is: the spool keeps what the database does not
            self._disconnect()
            raise StoreUnavailable(str(error)) from error
        for index, record in enumerate(records):
            if isinstance(record, InterceptionEnded):
                self._open.pop(record.interception_id, None)
            elif isinstance(record, Interception) and index not in rejected and instance == self._spool.instance:
                self._open[record.id] = record
        return rejected

    def close_interrupted(self, alive: Sequence[str]) -> int:
        """Close the interceptions that no process in `alive` has open."""
        now, instances = _time(datetime.now(UTC)), msgspec.json.encode(alive).decode()
        try:
            cursor = self._connected().execute(_INTERRUPT, (now, instances))
        except (sqlite3.Error, OSError) as error:
            raise StoreUnavailable(str(error)) from error
        return cursor.rowcount

    def close(self) -> None:
        """Disconnect."""
        self._disconnect()

    def _write(self, records: Sequence[Record], instance: str) -> Mapping[int, str]:
        if self._database is None or self._file != identity(self._path):
            self._connect()
            self._transaction(list(self._open.values()), self._spool.instance)
        return self._transaction(records, instance)

    def _transaction(self, records: Sequence[Record], instance: str) -> Mapping[int, str]:
        database = self._connected()
        database.execute("BEGIN IMMEDIATE")
        try:
            try:
                self._execute(records, instance)
                rejected: Mapping[int, str] = {}
            except _REJECTIONS:
                database.execute("ROLLBACK")
                database.execute("BEGIN IMMEDIATE")
                rejected = self._execute_one_by_one(records, instance)
            database.execute("COMMIT")
        except BaseException:
            if database.in_transaction:
                database.execute("ROLLBACK")
            raise
        return rejected

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
        for kind, statement in _INSERTS.items():
            extra = (instance, "in_progress") if kind is Interception else ()
            rows = [_row(record, extra) for record in records if type(record) is kind]
            if rows:
                database.executemany(statement, rows)
        ends = [
            (_time(end.ended_at), end.status, end.http_status, end.error, end.time_to_first_byte_ms, end.interception_id)
            for end in records
            if isinstance(end, InterceptionEnded)
        ]
        if ends and database.executemany(_END, ends).rowcount < len(ends):
            raise UnknownInterception

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
        return self._database

    def _disconnect(self) -> None:
        database, self._database = self._database, None
        if database is not None:
            database.close()


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
