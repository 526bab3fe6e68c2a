"""The ledger in SQLite: the rows, and what happens when the database is locked, gone, damaged, or its process killed.

Truth: design.md section 3 for tables and values (NULL is not 0, times in UTC, usage objects as received), section 2 for
the guarantees. The spool directory's name and the words of `error` for an interrupted interception are our choice.
"""

import asyncio
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Iterator, Sequence
from contextlib import asynccontextmanager, closing, contextmanager
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import msgspec
import pytest

from aibridge.errors import RecordingFailed
from aibridge.events import RecordLost
from aibridge.recording import SqliteRecorder, sqlite as sqlite_module, writer as writer_module
from aibridge.recording.base import RecordsLost
from aibridge.recording.schema import HEAD
from aibridge.recording.spool import Spool
from aibridge.recording.sqlite import SqliteStore
from aibridge.records import (
    Interception,
    InterceptionEnded,
    ModelThought,
    PromptUsage,
    Record,
    TokenUsage,
    ToolUsage,
)
from tests.support.provider import WAIT_SECONDS
from tests.support.records import NOON, ended, one_of_each, prompt, start, thought, tool, usage
from tests.support.store import Told

NOON_TEXT = "2026-11-21T12:00:00.123456+00:00"


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite_module, "_BUSY_SECONDS", 0.02)
    monkeypatch.setattr(writer_module, "_RETRY_STORE_SECONDS", 0.02)
    monkeypatch.setattr(writer_module, "_PAUSE_SECONDS", 0.005)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "aibridge.db"


def record(recorder: SqliteRecorder, record: Record) -> Awaitable[None]:
    match record:
        case Interception():
            return recorder.record_interception(record)
        case InterceptionEnded():
            return recorder.record_interception_ended(record)
        case TokenUsage():
            return recorder.record_token_usage(record)
        case PromptUsage():
            return recorder.record_prompt_usage(record)
        case ToolUsage():
            return recorder.record_tool_usage(record)
        case ModelThought():
            return recorder.record_model_thought(record)


async def record_all(recorder: SqliteRecorder, records: Sequence[Record]) -> list[BaseException | None]:
    """What became of each: None, or what it raised."""
    async with asyncio.timeout(WAIT_SECONDS):
        return await asyncio.gather(*(record(recorder, one) for one in records), return_exceptions=True)


@contextmanager
def database(path: Path) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(path, timeout=WAIT_SECONDS, isolation_level=None)) as connection:
        connection.row_factory = sqlite3.Row
        yield connection


def rows(path: Path, table: str) -> list[dict[str, Any]]:
    with database(path) as connection:
        return [dict(row) for row in connection.execute(f"SELECT * FROM aibridge_{table} ORDER BY rowid")]


def row(path: Path, table: str) -> dict[str, Any]:
    (found,) = rows(path, table)
    return found


def statuses(path: Path) -> dict[str, str]:
    return {row["id"]: row["status"] for row in rows(path, "interceptions")}


def spooled(path: Path) -> int:
    return sum(file.stat().st_size for file in spool_files(path))


def spool_files(path: Path) -> list[Path]:
    return list(path.with_name(path.name + "-spool").glob("*.jsonl"))


async def replayed(path: Path) -> None:
    async with asyncio.timeout(WAIT_SECONDS):
        while spooled(path):
            await asyncio.sleep(0.002)


# ---- rows ----


async def test_an_interception(path: Path) -> None:
    full = start(
        client="claude-code",
        client_session_id="s",
        user_agent="claude-cli/2",
        correlating_tool_call_id="toolu_1",
        credential_kind="byok",
        credential_hint="...abcd",
        metadata={"agent": "a1"},
    )
    async with SqliteRecorder(path) as recorder:
        await recorder.record_interception(full)
        begun = row(path, "interceptions")
        assert begun.pop("instance") == spool_files(path)[0].stem
        assert begun == {
            "id": "i",
            "initiator_id": "ada",
            "provider": "anthropic",
            "provider_name": "main",
            "model": "claude-opus-5-5",
            "started_at": NOON_TEXT,
            "ended_at": None,
            "status": "in_progress",
            "http_status": None,
            "error": None,
            "route": "/v1/messages",
            "streaming": 1,
            "time_to_first_byte_ms": None,
            "client": "claude-code",
            "client_session_id": "s",
            "user_agent": "claude-cli/2",
            "correlating_tool_call_id": "toolu_1",
            "credential_kind": "byok",
            "credential_hint": "...abcd",
            "metadata": '{"agent":"a1"}',
        }
        end = ended(status="failed", http_status=529, error="Overloaded", time_to_first_byte_ms=12.5)
        await recorder.record_interception_ended(end)
        over = row(path, "interceptions")
    changed = {name for name, value in begun.items() if over[name] != value}
    assert changed == {"ended_at", "status", "http_status", "error", "time_to_first_byte_ms"}
    assert [over[name] for name in ("ended_at", "status", "http_status", "error", "time_to_first_byte_ms")] == [
        *(NOON_TEXT, "failed", 529, "Overloaded", 12.5)
    ]


async def test_what_was_never_reported_is_null_and_zero_is_zero(path: Path) -> None:
    async with SqliteRecorder(path) as recorder:
        await record_all(recorder, [usage("a", completeness="unknown"), usage("b", input_tokens=0, output_tokens=5)])
    counters = ("input_tokens", "output_tokens", "cache_read_input_tokens", "cache_write_input_tokens")
    assert [[found[name] for name in counters] for found in rows(path, "token_usages")] == [
        [None, None, None, None],
        [0, 5, None, None],
    ]
    assert [found["completeness"] for found in rows(path, "token_usages")] == ["unknown", "complete"]


async def test_the_children_of_an_interception(path: Path) -> None:
    async with SqliteRecorder(path) as recorder:
        await record_all(
            recorder,
            [
                prompt(prompt="Wh\0y é 💡?", provider_response_id="msg_1"),
                tool(
                    input='{"a" :1.0}', tool_call_id="toolu_1", invocation_error="no", server_url="http://x", injected=True
                ),
                thought(metadata={"source": "thinking"}),
            ],
        )
    assert row(path, "user_prompts") == {
        "id": "p",
        "interception_id": "i",
        "provider_response_id": "msg_1",
        "prompt": "Wh\0y é 💡?",
        "metadata": "{}",
        "created_at": NOON_TEXT,
    }
    assert row(path, "tool_usages") == {
        "id": "t",
        "interception_id": "i",
        "provider_response_id": None,
        "tool_call_id": "toolu_1",
        "server_url": "http://x",
        "tool": "Read",
        "input": '{"a" :1.0}',
        "injected": 1,
        "invocation_error": "no",
        "metadata": "{}",
        "created_at": NOON_TEXT,
    }
    assert row(path, "model_thoughts") == {
        "id": "m",
        "interception_id": "i",
        "content": "Hm.",
        "metadata": '{"source":"thinking"}',
        "created_at": NOON_TEXT,
    }


async def test_times_are_in_utc_whatever_the_clock_of_who_made_them(path: Path) -> None:
    kolkata = NOON.astimezone(timezone(timedelta(hours=5, minutes=30)))
    async with SqliteRecorder(path) as recorder:
        await record_all(recorder, [start(started_at=kolkata), ended(ended_at=kolkata.replace(microsecond=0))])
        await recorder.record_token_usage(usage(created_at=NOON.replace(microsecond=0)))
    found = row(path, "interceptions")
    on_the_second = "2026-11-21T12:00:00.000000+00:00"
    assert (found["started_at"], found["ended_at"]) == (NOON_TEXT, on_the_second)
    assert row(path, "token_usages")["created_at"] == on_the_second


async def test_a_providers_usage_object_is_kept_as_received(path: Path) -> None:
    raw = b'{\n "a": 1.0e2, "b": 1e400, "a": 123456789012345678901234567890}'
    async with SqliteRecorder(path) as recorder:
        await recorder.record_token_usage(usage(metadata={"usage": msgspec.Raw(raw)}))
    assert row(path, "token_usages")["metadata"] == '{"usage":' + raw.decode() + "}"


async def test_writing_twice_changes_nothing(path: Path) -> None:
    async with SqliteRecorder(path) as recorder:
        await record_all(recorder, one_of_each())
        once = [rows(path, table) for table in ("interceptions", "token_usages", "user_prompts", "tool_usages")]
        assert await record_all(recorder, [*one_of_each()[1:-1], start(), ended()]) == [None] * 6
        twice = [rows(path, table) for table in ("interceptions", "token_usages", "user_prompts", "tool_usages")]
    assert once == twice


# ---- files, threads, commits ----


async def test_nobody_else_may_read_what_it_keeps(path: Path) -> None:
    old = os.umask(0)
    try:
        async with SqliteRecorder(path) as recorder:
            await recorder.record_interception(start())
            modes = {file.name: file.stat().st_mode & 0o777 for file in path.parent.rglob("*") if file.suffix != ".jsonl"}
            assert [file.stat().st_mode & 0o777 for file in spool_files(path)] == [0o600]
    finally:
        os.umask(old)
    assert modes == {
        "aibridge.db": 0o600,
        "aibridge.db-wal": 0o600,
        "aibridge.db-shm": 0o600,
        "aibridge.db-spool": 0o700,
        "migration.lock": 0o600,
    }


async def test_it_leaves_neither_threads_nor_files_behind(path: Path) -> None:
    async with SqliteRecorder(path) as recorder:
        await recorder.record_interception(start())
    assert not [thread for thread in threading.enumerate() if thread.name == "aibridge-recorder"]
    assert {file.name for file in path.parent.rglob("*")} == {"aibridge.db", "aibridge.db-spool", "migration.lock"}


async def test_it_opens_by_itself(path: Path) -> None:
    recorder = SqliteRecorder(path)
    await recorder.record_interception(start())
    assert statuses(path) == {"i": "in_progress"}
    await recorder.__aexit__(None, None, None)


async def test_a_relative_path_stays_where_it_was(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parent)
    recorder = SqliteRecorder(path.name)
    monkeypatch.chdir("/")
    async with recorder:
        await recorder.record_interception(start())
    assert statuses(path) == {"i": "in_progress"}


async def test_many_records_take_few_commits(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """1,000 interceptions at once, each of them six records: seen from another connection, as commits."""
    commits = 0
    transaction = SqliteStore._transaction

    def counted(store: SqliteStore, records: Sequence[Record], instance: str) -> Any:
        nonlocal commits
        commits += 1
        return transaction(store, records, instance)

    monkeypatch.setattr(SqliteStore, "_transaction", counted)

    async def one(recorder: SqliteRecorder, id: str) -> None:
        about = {"interception_id": id}
        await recorder.record_interception(start(id))
        await record_all(recorder, [make(id, **about) for make in (prompt, usage, tool, thought)])
        await recorder.record_interception_ended(ended(id))

    async with SqliteRecorder(path) as recorder:
        await asyncio.gather(*(one(recorder, str(n)) for n in range(1000)))
    assert set(statuses(path).values()) == {"completed"} and len(statuses(path)) == 1000
    assert len(rows(path, "token_usages")) == 1000
    assert commits < 100


# ---- the database does not take it ----


@pytest.mark.parametrize("mode", ["IMMEDIATE", "EXCLUSIVE"])
async def test_locked(path: Path, mode: str) -> None:
    async with SqliteRecorder(path) as recorder:
        await recorder.record_interception(start())
        with database(path) as other:
            other.execute(f"BEGIN {mode}")
            assert await record_all(recorder, one_of_each()[1:]) == [None] * 5
            assert spooled(path) > 0
            other.execute("ROLLBACK")
        await replayed(path)
        assert row(path, "token_usages")["id"] == "u"
        assert statuses(path) == {"i": "completed"}


async def test_locked_for_a_moment_is_no_trouble(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lock ends only when the writer has met it: then it draws how long to wait."""
    met = threading.Event()

    def draw(least: float, most: float) -> float:
        met.set()
        return most

    monkeypatch.setattr(sqlite_module, "_BUSY_SECONDS", WAIT_SECONDS)
    monkeypatch.setattr("aibridge.recording.sqlite.random.uniform", draw)
    async with SqliteRecorder(path) as recorder:
        recorder._writer._spool.append = None  # type: ignore[method-assign,assignment]  # it must not come to that
        with database(path) as other:
            other.execute("BEGIN IMMEDIATE")
            recording = asyncio.create_task(record_all(recorder, one_of_each()))
            assert await asyncio.to_thread(met.wait, WAIT_SECONDS)
            other.execute("ROLLBACK")
            assert await recording == [None] * 6
    assert statuses(path) == {"i": "completed"}


async def test_processes_that_never_pause_leave_room_for_each_other(path: Path) -> None:
    """The spool is for trouble, and others that write are none."""
    processes = [
        subprocess.Popen([sys.executable, "-c", BUSY, str(path), str(n)], stderr=subprocess.PIPE, text=True)
        for n in range(4)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=60)
        assert (process.returncode, errors) == (0, "")
    assert statuses(path) == {f"{n} {k}": "completed" for n in range(4) for k in range(400)}
    assert len(rows(path, "token_usages")) == 1600


BUSY = """
import asyncio, logging, sys
from aibridge.recording import SqliteRecorder
from tests.support.records import ended, start, usage

async def one(recorder, id):
    await recorder.record_interception(start(id))
    await asyncio.gather(
        recorder.record_token_usage(usage(id, interception_id=id)), recorder.record_interception_ended(ended(id))
    )

async def some(recorder, client):
    for n in range(client, 400, 8):
        await one(recorder, f"{sys.argv[2]} {n}")

async def main():
    async with SqliteRecorder(sys.argv[1]) as recorder:
        await asyncio.gather(*(some(recorder, client) for client in range(8)))

logging.basicConfig(level=logging.WARNING)
asyncio.run(main())
"""


@pytest.mark.parametrize("at", ["_execute", "_connect"])
async def test_an_error_half_way_writes_nothing_and_loses_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    call = getattr(SqliteStore, at)

    def breaks_once(store: SqliteStore, *arguments: Any) -> Any:
        answer = call(store, *arguments)
        if todo:
            raise todo.pop()
        return answer

    todo: list[Exception] = []
    monkeypatch.setattr(SqliteStore, at, breaks_once)
    async with SqliteRecorder(path) as recorder:
        await recorder.record_interception(start())
        if at == "_connect":
            path.unlink()
        todo.append(sqlite3.OperationalError("disk I/O error"))
        assert await record_all(recorder, one_of_each()[1:]) == [None] * 5
        await replayed(path)
        assert not todo
        assert statuses(path) == {"i": "completed"}
        assert len(rows(path, "token_usages")) == 1


async def test_read_only(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite's own way of being read-only: file permissions do not bind root, who runs many a test."""
    transaction = SqliteStore._transaction
    todo = ["PRAGMA query_only = 1"]

    def read_only(store: SqliteStore, records: Sequence[Record], instance: str) -> Any:
        if todo:
            store._connected().execute(todo.pop())
        return transaction(store, records, instance)

    monkeypatch.setattr(SqliteStore, "_transaction", read_only)
    async with SqliteRecorder(path) as recorder:
        assert await record_all(recorder, one_of_each()) == [None] * 6
        await replayed(path)
        assert statuses(path) == {"i": "completed"}
    assert len(rows(path, "user_prompts")) == 1


@pytest.mark.parametrize("what", ["aibridge.db", "aibridge.db*"])
async def test_deleted(path: Path, what: str) -> None:
    async with SqliteRecorder(path) as recorder:
        await record_all(recorder, [start("open"), start("over"), ended("over"), start("still open")])
        for file in path.parent.glob(what):
            if file.is_file():
                file.unlink()
            else:
                for spool in file.iterdir():
                    spool.unlink()
                file.rmdir()
        assert await record_all(recorder, [prompt(interception_id="open"), ended("open"), start("new")]) == [None] * 3
        # What was over has gone with the file.
        assert statuses(path) == {"open": "completed", "still open": "in_progress", "new": "in_progress"}
        assert path.stat().st_mode & 0o777 == 0o600
        other = SqliteRecorder(path)
        async with other:
            assert statuses(path)["new"] == "in_progress"  # nobody takes this process for dead


async def test_deleted_while_two_processes_use_it(path: Path) -> None:
    """What the deleted file leaves in use by the one must not become part of the other's new one."""
    async with SqliteRecorder(path) as here:
        await here.record_interception(start("here"))
        there = subprocess.Popen(
            [sys.executable, "-c", BESIDE, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert there.stdin is not None and there.stdout is not None
        with there.stdin, there.stdout:
            assert there.stdout.readline() == "ready\n"
            path.unlink()
            for n in range(50):
                await here.record_token_usage(usage(f"here {n}"))
                there.stdin.write(f"there {n}\n")
                there.stdin.flush()
                assert there.stdout.readline() == "kept\n"
        assert there.wait(WAIT_SECONDS) == 0
        await here.record_interception_ended(ended("here"))
    assert {row["id"] for row in rows(path, "token_usages")} == {
        f"{who} {n}" for who in ("here", "there") for n in range(50)
    }
    assert statuses(path) == {"here": "completed", "there": "in_progress"}
    with database(path) as connection:
        assert [tuple(row) for row in connection.execute("PRAGMA integrity_check")] == [("ok",)]


BESIDE = """
import asyncio, sys
from aibridge.recording import SqliteRecorder
from tests.support.records import start, usage

async def main():
    async with SqliteRecorder(sys.argv[1]) as recorder:
        await recorder.record_interception(start("there"))
        print("ready", flush=True)
        for line in sys.stdin:
            await recorder.record_token_usage(usage(line.strip()))
            print("kept", flush=True)

asyncio.run(main())
"""


async def test_deleted_during_the_commit(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transaction = SqliteStore._transaction
    todo = [path]

    def interfering(store: SqliteStore, records: Sequence[Record], instance: str) -> Any:
        answer = transaction(store, records, instance)
        if todo and any(isinstance(record, InterceptionEnded) for record in records):
            todo.pop().unlink()
        return answer

    monkeypatch.setattr(SqliteStore, "_transaction", interfering)
    async with SqliteRecorder(path) as recorder:
        await recorder.record_interception(start())
        await record_all(recorder, one_of_each()[1:])
        assert not todo
        assert statuses(path) == {"i": "completed"}
        assert row(path, "token_usages")["id"] == "u"


async def test_replaced_by_something_that_is_no_database(path: Path) -> None:
    async with SqliteRecorder(path) as recorder:
        await recorder.record_interception(start())
        rubbish = path.with_name("rubbish")
        rubbish.write_bytes(b"not a database " * 1000)
        rubbish.replace(path)
        assert await record_all(recorder, one_of_each()[1:]) == [None] * 5
        assert spooled(path) > 0
        path.unlink()
        await replayed(path)
        assert statuses(path) == {"i": "completed"}
        assert row(path, "token_usages")["id"] == "u"


async def test_replaced_by_a_later_schema(path: Path, tmp_path: Path) -> None:
    later = tmp_path / "later.db"
    async with SqliteRecorder(later):
        pass
    with database(later) as other:
        other.execute("UPDATE alembic_version SET version_num = '9999'")
    async with SqliteRecorder(path) as recorder:
        later.replace(path)
        assert await record_all(recorder, one_of_each()) == [None] * 6
        with database(path) as other:
            other.execute("UPDATE alembic_version SET version_num = ?", (HEAD,))
        await replayed(path)
        assert statuses(path) == {"i": "completed"}


async def test_rows_that_somebody_deleted_are_written_anew_when_they_end(path: Path) -> None:
    async with SqliteRecorder(path) as recorder:
        await recorder.record_interception(start())
        with database(path) as other:
            other.execute("DELETE FROM aibridge_interceptions")
        assert await record_all(recorder, [ended()]) == [None]
    assert statuses(path) == {"i": "completed"}


# ---- records that it never takes ----

POISON: dict[str, Record] = {
    "integer over 64 bits": usage("x", input_tokens=2**70),
    "text that is not Unicode": prompt("x", prompt="\ud800"),
    "metadata without a JSON form": thought("x", metadata={"x": object()}),
    "metadata that is not Unicode": tool("x", metadata={"x": "\udfff"}),
    "a null where none may be": prompt("x", prompt=None),
    "no time": tool("x", created_at=None),
    "an end without a beginning": ended("never begun"),
}


@pytest.mark.parametrize("name", POISON)
async def test_poison_loses_itself_only(path: Path, name: str) -> None:
    records = [*one_of_each(), POISON[name], start("other"), ended("other")]
    async with SqliteRecorder(path) as recorder:
        outcomes = await record_all(recorder, records)
    assert [type(outcome) for outcome in outcomes] == [*[type(None)] * 6, RecordingFailed, *[type(None)] * 2]
    assert statuses(path) == {"i": "completed", "other": "completed"}
    children = ("token_usages", "user_prompts", "tool_usages", "model_thoughts")
    assert [len(rows(path, table)) for table in children] == [1, 1, 1, 1]


@pytest.mark.parametrize("name", POISON)
async def test_poison_loses_itself_only_of_what_is_recorded_together(path: Path, name: str) -> None:
    async with SqliteRecorder(path) as recorder:
        with pytest.raises(RecordsLost) as raised:
            await recorder.record_together([*one_of_each(), POISON[name]])
        assert list(raised.value.lost) == [6]
        await recorder.record_together([start("other"), usage("v", interception_id="other"), ended("other")])
    assert statuses(path) == {"i": "completed", "other": "completed"}
    assert len(rows(path, "token_usages")) == 2


@pytest.mark.parametrize("name", POISON)
async def test_poison_in_the_spool_is_counted_once(path: Path, name: str) -> None:
    told = Told()
    async with SqliteRecorder(path) as recorder:
        recorder.report_to(told.append)
        with database(path) as other:
            other.execute("BEGIN IMMEDIATE")
            outcomes = await record_all(recorder, [*one_of_each(), POISON[name], start("other"), ended("other")])
            other.execute("ROLLBACK")
        await replayed(path)
    refused = [outcome for outcome in outcomes if outcome is not None]
    assert len(refused) + len(told.losses) == 1
    assert told.replayed == 8
    assert statuses(path) == {"i": "completed", "other": "completed"}


# ---- the dead and the living ----


async def test_a_start_closes_what_a_dead_process_left_open_and_nothing_else(path: Path) -> None:
    living = SqliteRecorder(path)
    async with living:
        await living.record_interception(start("living"))
        dead = killed(path, "await recorder.record_interception(start('dead'))")
        assert statuses(path) == {"living": "in_progress", "dead": "in_progress"}
        before = datetime.now(UTC)
        async with SqliteRecorder(path):
            assert statuses(path) == {"living": "in_progress", "dead": "interrupted"}
            found = rows(path, "interceptions")[1]
            assert found["error"] == "the process ended before this was recorded"
            assert before <= datetime.fromisoformat(found["ended_at"]) <= datetime.now(UTC)
            assert found["instance"] == dead
            assert [file.stem for file in spool_files(path)].count(dead) == 0
        await living.record_interception_ended(ended("living"))
    assert statuses(path) == {"living": "completed", "dead": "interrupted"}


async def test_what_a_dead_process_left_open_does_not_end_before_it_began(path: Path) -> None:
    """The clock was set back since."""
    tomorrow = (datetime.now(UTC) + timedelta(days=1)).isoformat(timespec="microseconds")
    killed(path, "await recorder.record_interception(start('dead'))")
    with database(path) as opened:
        opened.execute("UPDATE aibridge_interceptions SET started_at = ?", (tomorrow,))
    async with SqliteRecorder(path):
        assert row(path, "interceptions")["ended_at"] == tomorrow


async def test_nobody_begins_anything_between_the_look_at_who_lives_and_the_closing(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a process that starts in between would be taken for dead."""
    alive = Spool.alive
    refused: list[str] = []

    def interfering(spool: Spool) -> list[str]:
        with closing(sqlite3.connect(path, timeout=0, isolation_level=None)) as other:
            with pytest.raises(sqlite3.OperationalError) as found:
                other.execute("BEGIN IMMEDIATE")
            refused.append(found.value.sqlite_errorname)
        return alive(spool)

    monkeypatch.setattr(Spool, "alive", interfering)
    async with SqliteRecorder(path):
        assert refused == ["SQLITE_BUSY"]


async def test_what_a_dead_process_had_spooled_is_replayed_before_its_rest_is_closed(path: Path) -> None:
    async with SqliteRecorder(path):
        pass
    with database(path) as other:
        other.execute("BEGIN IMMEDIATE")
        dead = killed(
            path,
            "for one in (start('over'), usage(interception_id='over'), ended('over'), start('open')):\n"
            "        await record(recorder, one)",
            locked=True,
        )
        other.execute("ROLLBACK")
    (left,) = spool_files(path)
    assert left.stem == dead
    with left.open("r+b") as file:  # beside it, what a crash leaves, and what nobody can explain
        lines = file.readlines()
        file.seek(0)
        file.writelines([b"rubbish\n", *lines, lines[0][:20]])
    told = Told()
    recorder = SqliteRecorder(path)
    recorder.report_to(told.append)
    async with recorder:
        assert statuses(path) == {"over": "completed", "open": "interrupted"}
        assert rows(path, "interceptions")[1]["instance"] == dead
        assert row(path, "token_usages")["interception_id"] == "over"
        assert not left.exists()
        assert (told.losses, told.replayed) == ([RecordLost.of(None)], 4)
        path.unlink()
        await recorder.record_interception(start("mine"))
        assert statuses(path) == {"mine": "in_progress"}  # what the dead had open was never open here


CHILD = """
import asyncio, os, signal, sys
from pathlib import Path
from aibridge.recording import SqliteRecorder
from aibridge.recording.schema import HEAD
from aibridge.recording.sqlite import SqliteStore
from tests.support.records import *
from tests.test_sqlite_recorder import record

async def main():
    recorder = SqliteRecorder(sys.argv[1])
    if {locked}:  # the lock that the test holds began after the start of this process
        SqliteStore.close_interrupted = lambda *_: 0
    await recorder.__aenter__()
    print(recorder._writer._spool.instance, flush=True)
    {work}
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""


def killed(path: Path, work: str, *, locked: bool = False) -> str:
    """Record something in a process that is killed the instant it is durable. Answers its instance."""
    code = CHILD.format(work=work, locked=locked)
    process = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=60, check=False
    )
    assert process.returncode == -signal.SIGKILL, process.stderr
    return process.stdout.strip()


# ---- it cannot start ----


@asynccontextmanager
async def not_started(path: Path, error: type[Exception], text: str) -> AsyncIterator[SqliteRecorder]:
    recorder = SqliteRecorder(path)
    with pytest.raises(error, match=text):
        await recorder.__aenter__()
    assert spool_files(path) == []
    yield recorder
    await recorder.__aexit__(None, None, None)


async def test_it_does_not_start_with_a_file_that_is_no_database(path: Path) -> None:
    path.write_bytes(b"not a database " * 100)
    async with not_started(path, writer_module.StoreUnavailable, "not a database") as recorder:
        with pytest.raises(RecordingFailed, match="not a database"):
            await recorder.record_interception(start())
        path.unlink()
        await recorder.record_interception(start())
    assert json.loads(row(path, "interceptions")["metadata"]) == {}


async def test_it_does_not_start_where_there_can_be_no_spool(path: Path) -> None:
    spool = path.with_name(path.name + "-spool")
    spool.write_text("in the way")
    with pytest.raises(FileExistsError):
        await SqliteRecorder(path).__aenter__()
    assert not path.exists()


async def test_it_does_not_start_on_a_database_that_stays_locked(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "_GIVE_UP_SECONDS", 0.05)
    async with SqliteRecorder(path):
        pass
    with database(path) as other:
        other.execute("BEGIN IMMEDIATE")
        said = f"^the database {path} cannot be written: database is locked$"
        async with not_started(path, writer_module.StoreUnavailable, said):
            pass
