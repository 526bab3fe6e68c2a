"""Hidden turns in SQLite: what survives what, how things expire, and what happens when the database is not as it was.

Truth: `aibridge.history.History`; wire.md D6: the store outlives sessions and processes, and a miss is told from nothing.
The tables, the two lives of a memory (fresh, then a husk) and the hour between two notes of its use are our choice.
"""

import asyncio
import errno
import json
import math
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from aibridge.recording import SqliteHistory, SqliteRecorder, history as history_module
from aibridge.recording.history import _Writer
from aibridge.recording.schema import identity
from aibridge.wire.turns import Memory
from tests.support.provider import WAIT_SECONDS
from tests.support.records import start

TOOLS = b"[]"
DAY = 86400.0
TTL = 30 * DAY


class Clock:
    """Stands still until it is told to go on."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "aibridge.db"


def memory(*keys: str, data: bytes | None = b"hidden", toolset: str = "digest") -> Memory:
    return Memory(keys, toolset, data)


@contextmanager
def database(path: Path) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(path, timeout=WAIT_SECONDS, isolation_level=None)) as connection:
        connection.row_factory = sqlite3.Row
        yield connection


def rows(path: Path, table: str) -> list[dict[str, Any]]:
    with database(path) as connection:
        return [dict(row) for row in connection.execute(f"SELECT * FROM aibridge_{table} ORDER BY 1, 2")]


def turns(path: Path) -> dict[str, bytes | None]:
    """The data of each turn by its first key."""
    return {json.loads(row["keys"])[0]: row["data"] for row in rows(path, "hidden_turns")}


def its_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("aibridge-history")]


def used(path: Path) -> list[str]:
    return [row["used_at"] for row in rows(path, "hidden_turns")]


async def written(history: SqliteHistory) -> None:
    """Returns when all that waits to be written is: that memories are in use is noted after they were recalled."""
    await history._write(lambda _: None)


async def became(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_SECONDS):
        while not condition():
            await asyncio.sleep(0.002)


async def pruned(path: Path, clock: Clock, **limits: Any) -> None:
    """Open and close once: housekeeping comes with it, until there is nothing left to do."""
    async with SqliteHistory(path, clock=clock, **{"ttl_seconds": TTL, **limits}) as history:
        await history.recall("", [])


# ---- rows, files, threads, commits ----


async def test_rows(path: Path, clock: Clock) -> None:
    async with SqliteHistory(path, clock=clock) as history:
        await history.remember("ada", memory("b", "a", data=b"\0\xff"), TOOLS)
        (turn,) = rows(path, "hidden_turns")
        assert rows(path, "hidden_turn_keys") == [
            {"scope": "ada", "key": "a", "turn": turn["id"]},
            {"scope": "ada", "key": "b", "turn": turn["id"]},
        ]
        now = "2027-01-15T08:00:00.000000+00:00"
        assert rows(path, "toolsets") == [{"digest": "digest", "tools": b"[]", "used_at": now}]
        assert turn.pop("id")
        assert turn == {
            "scope": "ada",
            "keys": '["b","a"]',
            "toolset": "digest",
            "size": 2,
            "created_at": now,
            "used_at": now,
            "last_id": None,
            "data": b"\0\xff",
        }


async def test_nobody_else_may_read_what_it_keeps(path: Path) -> None:
    old = os.umask(0)
    try:
        async with SqliteHistory(path) as history:
            await history.remember("ada", memory("a"), TOOLS)
            modes = {file.name: file.stat().st_mode & 0o777 for file in path.parent.iterdir()}
    finally:
        os.umask(old)
    private = dict.fromkeys(("aibridge.db", "aibridge.db-wal", "aibridge.db-shm"), 0o600)
    assert modes == {**private, "aibridge.db-spool": 0o700}


async def test_it_leaves_neither_threads_nor_files_behind(path: Path) -> None:
    async with SqliteHistory(path) as history:
        await history.remember("ada", memory("a"), TOOLS)
        await history.recall("ada", ["a"])
        assert len(its_threads()) == 2
    assert its_threads() == []
    assert {file.name for file in path.parent.rglob("*")} == {"aibridge.db", "aibridge.db-spool", "migration.lock"}


async def test_it_opens_by_itself_and_again(path: Path) -> None:
    history = SqliteHistory(path)
    for key in ("a", "b"):
        await history.remember("ada", memory(key), TOOLS)
        await history.__aexit__(None, None, None)
    await history.__aexit__(None, None, None)
    assert turns(path) == {"a": b"hidden", "b": b"hidden"}


async def test_a_relative_path_stays_where_it_was(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parent)
    history = SqliteHistory(path.name)
    monkeypatch.chdir("/")
    async with history:
        await history.remember("ada", memory("a"), TOOLS)
    assert turns(path) == {"a": b"hidden"}


async def test_what_waits_is_written_together(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remembered: list[int] = []
    perform = _Writer.perform

    def counted(writer: _Writer, calls: Sequence[Callable[[_Writer], Any]]) -> Sequence[Any]:
        answers = perform(writer, calls)
        remembered.append(len(calls))
        return answers

    monkeypatch.setattr(_Writer, "perform", counted)
    async with SqliteHistory(path) as history:
        await asyncio.gather(*(history.remember("ada", memory(f"{n}"), TOOLS) for n in range(1000)))
        assert len(await history.recall("ada", [f"{n}" for n in range(1000)])) == 1000
    assert sum(remembered) == 1000 + 1  # the first one opens the database
    assert len(remembered) < 100
    assert max(remembered) <= history_module._MAX_BATCH


async def test_who_reads_never_waits_for_those_who_write(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """WAL: "readers do not block writers and a writer does not block readers" (sqlite.org/wal.html#concurrency)."""
    monkeypatch.setattr(history_module, "_BUSY_SECONDS", 2 * WAIT_SECONDS)
    async with SqliteHistory(path) as history:
        await history.remember("ada", memory("a"), TOOLS)
        with database(path) as other:
            other.execute("BEGIN IMMEDIATE")
            waiting = []
            async with asyncio.timeout(WAIT_SECONDS):
                for n in range(5):
                    waiting.append(asyncio.create_task(history.remember("ada", memory(f"{n}"), TOOLS)))
                    assert await history.recall("ada", ["a"]) == {"a": memory("a")}
                    assert await history.recall_toolset("digest") == TOOLS
            assert not any(task.done() for task in waiting)
            other.execute("ROLLBACK")
        await asyncio.gather(*waiting)
    assert len(turns(path)) == 6


async def test_what_waits_when_it_closes_is_written(path: Path) -> None:
    history = SqliteHistory(path)
    waiting = [asyncio.ensure_future(history.remember("ada", memory(f"{n}"), TOOLS)) for n in range(150)]
    await asyncio.sleep(0)  # all of them are in the queue now
    await history.__aexit__(None, None, None)
    assert len(turns(path)) == 150
    await asyncio.gather(*waiting)


async def test_who_is_cancelled_has_remembered_all_the_same(path: Path) -> None:
    """A client that leaves may well replay what it has seen (wire.md D6)."""
    async with SqliteHistory(path) as history:
        with database(path) as other:
            other.execute("BEGIN IMMEDIATE")
            task = asyncio.create_task(history.remember("ada", memory("a"), TOOLS))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            other.execute("ROLLBACK")
    assert turns(path) == {"a": b"hidden"}


async def test_recalling_reads_no_more_than_it_has_to(path: Path) -> None:
    """SQLite's own word for it: searches by primary key, from the wanted keys to the turns."""
    async with SqliteHistory(path):
        pass
    with database(path) as connection:
        plan = connection.execute(f"EXPLAIN QUERY PLAN {history_module._RECALL}", {"scope": "", "keys": "[]"}).fetchall()
    steps = [row["detail"] for row in plan]
    assert any("SEARCH known USING PRIMARY KEY (scope=? AND key=?)" in step for step in steps), steps
    assert any("SEARCH turn USING INDEX" in step and "(id=?)" in step for step in steps), steps


@settings(deadline=None, max_examples=30)
@given(
    st.text(max_size=20),
    st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")), min_size=1, max_size=5),
    st.none() | st.binary(max_size=20_000),
)
def test_everything_comes_back(scope: str, keys: list[str], data: bytes | None) -> None:
    """Keys are without NUL (`key_of`, `Prefix.key`): SQLite's JSON would end them there. Scopes may hold anything."""
    kept = memory(*keys, data=data)

    async def there_and_back(path: Path) -> None:
        async with SqliteHistory(path) as history:
            await history.remember(scope, kept, TOOLS)
        async with SqliteHistory(path) as history:
            assert await history.recall(scope, keys) == dict.fromkeys(keys, kept)

    with tempfile.TemporaryDirectory() as directory:
        asyncio.run(there_and_back(Path(directory) / "aibridge.db"))


# ---- other processes ----

CHILD = """
import asyncio, os, signal, sys
from aibridge.recording import SqliteHistory
from tests.test_sqlite_history import TOOLS, memory

async def main(path, name):
    async with SqliteHistory(path) as history:
        {work}

asyncio.run(main(*sys.argv[1:]))
"""


def child(path: Path, name: str, work: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-W", "error", "-c", CHILD.format(work=work), str(path), name]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


async def test_what_was_remembered_survives_a_sigkill(path: Path) -> None:
    work = (
        "await history.remember('ada', memory('a', data=b'x' * 100_000), TOOLS)\n"
        "        os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = child(path, "", work)
    _, errors = killed.communicate(timeout=60)
    assert killed.returncode == -signal.SIGKILL, errors
    async with SqliteHistory(path) as history:
        assert await history.recall("ada", ["a"]) == {"a": memory("a", data=b"x" * 100_000)}
        assert await history.recall_toolset("digest") == b"[]"


async def test_processes_share_conversations(path: Path) -> None:
    """They start together, write at the same time, and each sees what the others wrote."""
    work = (
        "await asyncio.gather(*(history.remember('ada', memory(f'{name} {n}'), TOOLS) for n in range(200)))\n"
        "        print('written', flush=True)\n"
        "        sys.stdin.readline()\n"
        "        print(len(await history.recall('ada', [f'{m} {n}' for m in range(3) for n in range(200)])))"
    )
    children = [child(path, f"{name}", work) for name in range(3)]
    for process in children:
        assert process.stdout is not None
        assert process.stdout.readline() == "written\n"
    for process in children:
        output, errors = process.communicate("go on\n", timeout=60)
        assert (output, process.returncode) == ("600\n", 0), errors
    assert len(turns(path)) == 600


async def test_it_shares_the_database_with_the_recorder(path: Path) -> None:
    async with SqliteRecorder(path) as recorder, SqliteHistory(path) as history:
        for n in range(50):
            await asyncio.gather(recorder.record_interception(start(f"{n}")), history.remember("ada", memory(f"{n}"), TOOLS))
    assert len(turns(path)) == len(rows(path, "interceptions")) == 50


# ---- age ----


async def test_what_a_response_is_known_by_outlives_its_data(path: Path, clock: Clock) -> None:
    async with SqliteHistory(path, clock=clock, ttl_seconds=TTL) as history:
        await history.remember("ada", Memory(("a",), "digest", b"hidden", "resp_22222222"), TOOLS)
    clock.now += 31 * DAY
    await pruned(path, clock)
    async with SqliteHistory(path, clock=clock, ttl_seconds=TTL) as history:
        assert await history.recall("ada", ["a"]) == {"a": Memory(("a",), "digest", None, "resp_22222222")}


async def test_a_memory_loses_its_data_first_and_goes_later(path: Path, clock: Clock) -> None:
    async with SqliteHistory(path, clock=clock, ttl_seconds=TTL) as history:
        await history.remember("ada", memory("a", "b"), TOOLS)
    begun = clock.now
    for days, left in ((29, b"hidden"), (31, None), (59, None)):
        clock.now = begun + days * DAY
        await pruned(path, clock)
        assert turns(path) == {"a": left}
        assert len(rows(path, "hidden_turn_keys")) == 2
        assert len(rows(path, "toolsets")) == 1
    assert [row["size"] for row in rows(path, "hidden_turns")] == [0]
    clock.now = begun + 61 * DAY
    await pruned(path, clock)
    assert rows(path, "hidden_turns") == rows(path, "hidden_turn_keys") == rows(path, "toolsets") == []


async def test_a_husk_is_found(path: Path, clock: Clock) -> None:
    async with SqliteHistory(path, clock=clock, ttl_seconds=TTL) as history:
        await history.remember("ada", memory("a", "b"), TOOLS)
        clock.now += 31 * DAY
    await pruned(path, clock)
    async with SqliteHistory(path, clock=clock, ttl_seconds=TTL) as history:
        assert await history.recall("ada", ["a"]) == {"a": memory("a", "b", data=None)}
    clock.now += 59 * DAY  # from its last use
    await pruned(path, clock)
    assert turns(path) == {"a": None}


async def test_recalling_keeps_it(path: Path, clock: Clock) -> None:
    async with SqliteHistory(path, clock=clock, ttl_seconds=TTL) as history:
        await history.remember("ada", memory("a", "b"), TOOLS)
        await history.remember("ada", memory("c"), TOOLS)
        for _ in range(10):
            clock.now += 20 * DAY
            assert await history.recall("ada", ["b"]) == {"b": memory("a", "b")}
    await pruned(path, clock)
    assert turns(path) == {"a": b"hidden"}


async def test_use_is_noted_once_an_hour(path: Path, clock: Clock) -> None:
    async with SqliteHistory(path, clock=clock) as history:
        await history.remember("ada", memory("a"), TOOLS)
        noted = set()
        for _ in range(5 * 6):
            clock.now += 600
            await history.recall("ada", ["a"])
            await written(history)
            noted.update(used(path))
    assert len(noted) == 5


async def test_what_hid_nothing_never_counts_as_lost(path: Path, clock: Clock) -> None:
    async with SqliteHistory(path, clock=clock, ttl_seconds=TTL) as history:
        await history.remember("ada", memory("a", data=b""), TOOLS)
    clock.now += 59 * DAY
    await pruned(path, clock)
    assert turns(path) == {"a": b""}
    clock.now += 2 * DAY
    await pruned(path, clock)
    assert turns(path) == {}


async def test_a_short_life_is_noted_in_time(path: Path, clock: Clock) -> None:
    """Once an hour would be too seldom for what lives a minute."""
    async with SqliteHistory(path, clock=clock, ttl_seconds=60) as history:
        await history.remember("ada", memory("a"), TOOLS)
        for _ in range(20):
            clock.now += 30
            await history.recall("ada", ["a"])
    await pruned(path, clock, ttl_seconds=60)
    assert turns(path) == {"a": b"hidden"}


async def test_for_ever_is_possible(path: Path, clock: Clock) -> None:
    async with SqliteHistory(path, clock=clock, ttl_seconds=math.inf) as history:
        await history.remember("ada", memory("a"), TOOLS)
    clock.now += 10_000 * DAY
    await pruned(path, clock, ttl_seconds=math.inf)
    assert turns(path) == {"a": b"hidden"}


@pytest.mark.parametrize("limits", [{"ttl_seconds": 0}, {"ttl_seconds": -1}, {"ttl_seconds": math.nan}, {"max_bytes": 0}])
def test_no_limit_means_to_keep_nothing(path: Path, limits: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        SqliteHistory(path, **limits)


async def test_a_key_that_has_moved_on_stays_when_its_old_turn_goes(path: Path, clock: Clock) -> None:
    async with SqliteHistory(path, clock=clock, ttl_seconds=TTL) as history:
        await history.remember("ada", memory("a", "b", data=b"old"), TOOLS)
        clock.now += 61 * DAY
        await history.remember("ada", memory("b", data=b"new"), TOOLS)
    await pruned(path, clock)
    await pruned(path, clock)
    assert turns(path) == {"b": b"new"}
    assert [row["key"] for row in rows(path, "hidden_turn_keys")] == ["b"]


async def test_tools_go_with_the_last_memory_that_refers_to_them(path: Path, clock: Clock) -> None:
    async with SqliteHistory(path, clock=clock, ttl_seconds=TTL) as history:
        for key, toolset in (("a", "old"), ("b", "in use")):
            await history.remember("ada", memory(key, toolset=toolset), TOOLS)
        clock.now += 40 * DAY
        await history.remember("ada", memory("c", toolset="in use"), TOOLS)
    await pruned(path, clock)
    assert turns(path) == {"a": None, "b": None, "c": b"hidden"}
    assert [row["digest"] for row in rows(path, "toolsets")] == ["in use", "old"]
    clock.now += 21 * DAY
    await pruned(path, clock)
    assert turns(path) == {"c": b"hidden"}
    assert [row["digest"] for row in rows(path, "toolsets")] == ["in use"]


# ---- size ----


async def test_the_least_recently_used_go_first(path: Path, clock: Clock) -> None:
    async with SqliteHistory(path, clock=clock) as history:
        for key in "abcd":
            clock.now += DAY
            await history.remember("ada", memory(key, data=b"x" * 100), TOOLS)
        clock.now += DAY
        await history.recall("ada", ["a"])
    await pruned(path, clock, max_bytes=250)
    assert turns(path) == {"a": b"x" * 100, "b": None, "c": None, "d": b"x" * 100}
    assert len(rows(path, "hidden_turn_keys")) == 4


async def test_what_fits_stays(path: Path, clock: Clock) -> None:
    async with SqliteHistory(path, clock=clock) as history:
        await history.remember("ada", memory("a", data=b"x" * 100), TOOLS)
        await history.remember("ada", memory("b", data=b""), TOOLS)
    await pruned(path, clock, max_bytes=102)
    assert turns(path) == {"a": b"x" * 100, "b": b""}


@pytest.mark.parametrize(("recalled", "left"), [("b", "new"), ("a", "old")])
async def test_tool_sets_count_too(path: Path, clock: Clock, recalled: str, left: str) -> None:
    """A server that describes itself otherwise each time must not fill the disk. What is in use keeps its tools."""
    async with SqliteHistory(path, clock=clock) as history:
        for key, toolset in (("a", "old"), ("b", "new")):
            await history.remember("ada", memory(key, data=b"x" * 100, toolset=toolset), b"t" * 100)
            clock.now += DAY
        await history.recall("ada", [recalled])
    await pruned(path, clock, max_bytes=300)
    assert turns(path) == {"a": None, "b": None} | {recalled: b"x" * 100}
    assert len(rows(path, "toolsets")) == 2  # the data goes before the tools
    await pruned(path, clock, max_bytes=299)
    assert turns(path) == {"a": None, "b": None} | {recalled: b"x" * 100}
    assert [row["digest"] for row in rows(path, "toolsets")] == [left]
    await pruned(path, clock, max_bytes=1)
    assert turns(path) == {"a": None, "b": None}
    assert rows(path, "toolsets") == []
    async with SqliteHistory(path, clock=clock) as history:
        assert await history.recall("ada", ["a"]) == {"a": memory("a", data=None, toolset="old")}
        assert await history.recall_toolset("old") is None


async def test_much_is_taken_away_a_little_at_a_time(path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests come between: each batch is a transaction of its own."""
    prune, batches = _Writer.prune, []

    def counted(writer: _Writer) -> bool:
        batches.append(len([data for data in turns(path).values() if data is not None]))
        return prune(writer)

    async with SqliteHistory(path, clock=clock, ttl_seconds=TTL) as history:
        await asyncio.gather(*(history.remember("ada", memory(f"{n}"), TOOLS) for n in range(20)))
    monkeypatch.setattr(history_module, "_PRUNE_ROWS", 3)
    monkeypatch.setattr(_Writer, "prune", counted)
    clock.now += 31 * DAY
    async with SqliteHistory(path, clock=clock, ttl_seconds=TTL) as history:
        await became(lambda: set(turns(path).values()) == {None})
        assert [before - after for before, after in pairwise(batches)][:6] == [3] * 6
        assert len(await history.recall("ada", [f"{n}" for n in range(20)])) == 20


async def test_it_keeps_house_while_nobody_calls(path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history_module, "_PRUNE_SECONDS", 0.01)
    async with SqliteHistory(path, clock=clock, ttl_seconds=TTL) as history:
        await history.remember("ada", memory("a"), TOOLS)
        clock.now += 31 * DAY
        await became(lambda: turns(path) == {"a": None})
        clock.now += 31 * DAY
        await became(lambda: turns(path) == {})


# ---- the database is not as it was ----


@pytest.fixture
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history_module, "_BUSY_SECONDS", 0.02)


@pytest.mark.usefixtures("_impatient")
async def test_locked(path: Path, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing can be remembered, but all can be recalled; what cannot be noted meanwhile is noted later."""
    async with SqliteHistory(path, clock=clock) as history:
        await history.remember("ada", memory("a"), TOOLS)
        before = used(path)
        clock.now += DAY
        with database(path) as other:
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(sqlite3.OperationalError, match="locked"):
                await history.remember("ada", memory("b"), TOOLS)
            assert await history.recall("ada", ["a", "b"]) == {"a": memory("a")}
            await became(lambda: "that memories are in use could not be noted: database is locked" in caplog.text)
            assert used(path) == before
            other.execute("ROLLBACK")
        await history.recall("ada", ["a"])
        await history.remember("ada", memory("b"), TOOLS)
        assert used(path)[0] > before[0]
    assert len(turns(path)) == 2


@pytest.mark.parametrize("what", ["aibridge.db", "aibridge.db*"])
async def test_deleted(path: Path, what: str) -> None:
    async with SqliteHistory(path) as history:
        await history.remember("ada", memory("a"), TOOLS)
        for file in path.parent.glob(what):
            if file.is_file():
                file.unlink()
        assert await history.recall("ada", ["a"]) == {}
        await history.remember("ada", memory("b"), TOOLS)
        assert await history.recall("ada", ["a", "b"]) == {"b": memory("b")}
        assert await history.recall_toolset("digest") == TOOLS
        assert path.stat().st_mode & 0o777 == 0o600
    assert turns(path) == {"b": b"hidden"}


async def test_deleted_while_the_recorder_has_it_too(path: Path) -> None:
    async with SqliteRecorder(path) as recorder, SqliteHistory(path) as history:
        await history.remember("ada", memory("a"), TOOLS)
        path.unlink()
        for n in range(20):
            await recorder.record_interception(start(f"{n}"))
            await history.remember("ada", memory(f"{n}"), TOOLS)
    assert len(turns(path)) == len(rows(path, "interceptions")) == 20
    with database(path) as connection:
        assert [tuple(row) for row in connection.execute("PRAGMA integrity_check")] == [("ok",)]


async def test_deleted_during_the_commit(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remember, todo = _Writer.remember, [path]

    def interfering(writer: _Writer, scope: str, memory: Memory, toolset: bytes) -> None:
        remember(writer, scope, memory, toolset)
        if todo:
            todo.pop().unlink()

    monkeypatch.setattr(_Writer, "remember", interfering)
    async with SqliteHistory(path) as history:
        await history.remember("ada", memory("a"), TOOLS)
        assert not todo
        assert turns(path) == {"a": b"hidden"}


async def test_deleted_and_not_needed_any_more_it_stays_deleted(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Housekeeping, of which there has been some when it looks often, creates nothing."""
    looked = threading.Event()

    def noted(path: Path) -> tuple[int, int] | None:
        found = identity(path)
        if found is None:
            looked.set()
        return found

    monkeypatch.setattr(history_module, "_PRUNE_SECONDS", 0.01)
    monkeypatch.setattr(history_module, "identity", noted)
    async with SqliteHistory(path) as history:
        await history.remember("ada", memory("a"), TOOLS)
        path.unlink()
        await became(looked.is_set)
    assert not path.exists()


async def test_replaced_by_something_that_is_no_database(path: Path) -> None:
    async with SqliteHistory(path) as history:
        await history.remember("ada", memory("a"), TOOLS)
        rubbish = path.with_name("rubbish")
        rubbish.write_bytes(b"not a database " * 1000)
        rubbish.replace(path)
        outcomes = await asyncio.gather(
            history.recall("ada", ["a"]),
            history.remember("ada", memory("b"), TOOLS),
            history.remember("ada", memory("c"), TOOLS),
            return_exceptions=True,
        )
        assert [type(outcome) for outcome in outcomes] == [sqlite3.DatabaseError] * 3
        path.unlink()
        await history.remember("ada", memory("d"), TOOLS)
    assert turns(path) == {"d": b"hidden"}


async def test_poison_loses_itself_only(path: Path) -> None:
    async with SqliteHistory(path) as history:
        outcomes = await asyncio.gather(
            history.remember("ada", memory("a"), TOOLS),
            history.remember("\ud800", memory("b"), TOOLS),
            history.remember("ada", memory("c", "\ud800"), TOOLS),
            history.remember("ada", memory("d"), TOOLS),
            return_exceptions=True,
        )
        assert [type(outcome) for outcome in outcomes] == [type(None), UnicodeEncodeError, UnicodeEncodeError, type(None)]
        with pytest.raises(UnicodeEncodeError):
            await history.recall("ada", ["\ud800"])
        assert set(await history.recall("ada", ["a", "b", "c", "d"])) == {"a", "d"}
    assert set(turns(path)) == {"a", "d"}


async def test_an_error_half_way_writes_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remember, todo = _Writer.remember, [sqlite3.OperationalError("disk I/O error")]

    def breaks_once(writer: _Writer, scope: str, memory: Memory, toolset: bytes) -> None:
        remember(writer, scope, memory, toolset)
        if todo:
            raise todo.pop()

    monkeypatch.setattr(_Writer, "remember", breaks_once)
    async with SqliteHistory(path) as history:
        with pytest.raises(sqlite3.OperationalError, match="disk I/O error"):
            await history.remember("ada", memory("a"), TOOLS)
        assert turns(path) == {}
        assert rows(path, "toolsets") == []
        await history.remember("ada", memory("b"), TOOLS)
    assert turns(path) == {"b": b"hidden"}


@pytest.mark.parametrize("code", [errno.EACCES, errno.ENOTDIR, errno.ESTALE, errno.EIO])
async def test_a_file_that_cannot_be_looked_at(path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """A network file system comes and goes, and takes its time: who calls meanwhile is told, and then all is well again."""
    looked = threading.Semaphore(0)

    def fails(_: Path) -> tuple[int, int] | None:
        looked.release()
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(history_module, "_PRUNE_SECONDS", 0.01)
    async with asyncio.timeout(WAIT_SECONDS), SqliteHistory(path) as history:
        await history.remember("ada", memory("a"), TOOLS)
        with monkeypatch.context() as broken:
            broken.setattr(history_module, "identity", fails)
            for _ in range(3):  # housekeeping goes on
                await became(lambda: looked.acquire(blocking=False))
            for call in (history.recall("ada", ["a"]), history.remember("ada", memory("b"), TOOLS)):
                with pytest.raises(OSError, match=os.strerror(code)):
                    await call
        assert await history.recall("ada", ["a"]) == {"a": memory("a")}
        await history.remember("ada", memory("c"), TOOLS)
    assert turns(path) == {"a": b"hidden", "c": b"hidden"}


async def test_its_directory_is_away_for_a_while(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history_module, "_PRUNE_SECONDS", 0.01)
    directory, away = path.parent / "data", path.parent / "away"
    async with asyncio.timeout(WAIT_SECONDS), SqliteHistory(directory / path.name) as history:
        await history.remember("ada", memory("a"), TOOLS)
        directory.rename(away)
        directory.write_text("a file is in its place")
        for call in (history.recall("ada", ["a"]), history.remember("ada", memory("b"), TOOLS)):
            with pytest.raises(OSError, match=r"exists|Not a directory"):
                await call
        directory.unlink()
        away.rename(directory)
        assert await history.recall("ada", ["a"]) == {"a": memory("a")}
        await history.remember("ada", memory("c"), TOOLS)
    assert turns(directory / path.name) == {"a": b"hidden", "c": b"hidden"}


class Odd(BaseException):
    """Nothing that anybody expects."""


def fails(*_: object) -> None:
    raise Odd


@pytest.mark.parametrize("method", ["prune", "is_current"])
async def test_no_exception_ends_housekeeping(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, method: str
) -> None:
    monkeypatch.setattr(history_module, "_PRUNE_SECONDS", 0.01)
    async with asyncio.timeout(WAIT_SECONDS), SqliteHistory(path) as history:
        with monkeypatch.context() as broken:
            broken.setattr(_Writer, method, fails)
            await became(lambda: caplog.text.count("the history could not be tidied") > 1)
        await history.remember("ada", memory("a"), TOOLS)
    assert turns(path) == {"a": b"hidden"}


@pytest.mark.parametrize("methods", [["remember"], ["is_current"], ["perform"], ["remember", "close"]])
async def test_no_exception_leaves_anybody_waiting(path: Path, monkeypatch: pytest.MonkeyPatch, methods: list[str]) -> None:
    async with asyncio.timeout(WAIT_SECONDS), SqliteHistory(path) as history:
        with monkeypatch.context() as broken:
            for method in methods:
                broken.setattr(_Writer, method, fails)
            together = (history.remember("ada", memory(f"{n}"), TOOLS) for n in range(3))
            outcomes = await asyncio.gather(*together, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [Odd] * 3
        await history.remember("ada", memory("a"), TOOLS)
    assert turns(path) == {"a": b"hidden"}


async def test_it_does_not_start_with_a_file_that_is_no_database(path: Path) -> None:
    path.write_bytes(b"not a database " * 100)
    history = SqliteHistory(path)
    with pytest.raises(sqlite3.DatabaseError, match="not a database"):
        await history.__aenter__()
    assert its_threads() == []
    path.unlink()
    async with history:
        await history.remember("ada", memory("a"), TOOLS)
    assert turns(path) == {"a": b"hidden"}
