"""The schema: made once, by whoever comes first, all of it or nothing; and brought up to date by Alembic.

Truth: the tables of design.md section 3, spelled out here; `aibridge.records` says that field names are column names.
"""

import fcntl
import os
import re
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, Final

import pytest
from alembic.config import Config
from alembic.script import ScriptDirectory

from aibridge.recording import schema
from aibridge.recording.schema import HEAD, MIGRATIONS, connect, migrate
from aibridge.records import Interception, InterceptionEnded, ModelThought, PromptUsage, TokenUsage, ToolUsage

# design.md section 3, and no more than that but for `instance`, which says whose an interception in progress is. The last
# four are ours: what wire.md D6 wants kept of conversations, and the definitions of tools that were approved.
CONTRACT: Final = {
    "aibridge_interceptions": {
        *("id", "initiator_id", "provider", "provider_name", "model", "started_at", "ended_at", "metadata", "client"),
        *("client_session_id", "user_agent", "correlating_tool_call_id", "credential_kind", "credential_hint"),
        *("status", "http_status", "error", "streaming", "route", "time_to_first_byte_ms", "instance"),
    },
    "aibridge_token_usages": {
        *("id", "interception_id", "provider_response_id", "input_tokens", "output_tokens", "cache_read_input_tokens"),
        *("cache_write_input_tokens", "metadata", "created_at", "completeness"),
    },
    "aibridge_user_prompts": {"id", "interception_id", "provider_response_id", "prompt", "metadata", "created_at"},
    "aibridge_tool_usages": {
        *("id", "interception_id", "provider_response_id", "tool_call_id", "server_url", "tool", "input", "injected"),
        *("invocation_error", "metadata", "created_at"),
    },
    "aibridge_model_thoughts": {"id", "interception_id", "content", "metadata", "created_at"},
    "aibridge_hidden_turns": {"id", "scope", "keys", "toolset", "size", "created_at", "used_at", "last_id", "data"},
    "aibridge_hidden_turn_keys": {"scope", "key", "turn"},
    "aibridge_toolsets": {"digest", "used_at", "tools"},
    "aibridge_mcp_tools": {"server", "tool", "digest", "approved_at"},
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "below" / "aibridge.db"


@pytest.fixture
def locks(tmp_path: Path) -> Path:
    return tmp_path / "locks"


def query(path: Path, statement: str) -> list[tuple[object, ...]]:
    with closing(connect(path, 1.0)) as database:
        return database.execute(statement).fetchall()


def tables(path: Path) -> set[object]:
    return {name for (name,) in query(path, "SELECT name FROM sqlite_master WHERE type = 'table'")}


def columns(path: Path, table: str) -> set[object]:
    return {row[1] for row in query(path, f"PRAGMA table_info({table})")}


def test_a_fresh_database_has_the_tables_of_the_contract(path: Path, locks: Path) -> None:
    migrate(path, locks, 1.0)
    assert tables(path) == {*CONTRACT, "alembic_version"}
    assert {table: columns(path, table) for table in CONTRACT} == CONTRACT
    assert query(path, "PRAGMA journal_mode") == [("wal",)]


def test_columns_are_the_fields_of_the_records(path: Path, locks: Path) -> None:
    migrate(path, locks, 1.0)
    interception = {*Interception.__struct_fields__, *InterceptionEnded.__struct_fields__, "instance"} - {"interception_id"}
    assert columns(path, "aibridge_interceptions") == interception
    assert columns(path, "aibridge_token_usages") == set(TokenUsage.__struct_fields__)
    assert columns(path, "aibridge_user_prompts") == set(PromptUsage.__struct_fields__)
    assert columns(path, "aibridge_tool_usages") == set(ToolUsage.__struct_fields__)
    assert columns(path, "aibridge_model_thoughts") == set(ModelThought.__struct_fields__)


def test_the_constant_is_the_only_head(path: Path, locks: Path) -> None:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.set_main_option("path_separator", "os")
    assert ScriptDirectory.from_config(config).get_heads() == [HEAD]
    migrate(path, locks, 1.0)
    assert query(path, "SELECT version_num FROM alembic_version") == [(HEAD,)]


def test_nobody_else_may_read_it(path: Path, locks: Path) -> None:
    old = os.umask(0)
    try:
        migrate(path, locks, 1.0)
        with closing(connect(path, 1.0)) as database:
            database.execute("CREATE TABLE x (y)")
            modes = {file.name: file.stat().st_mode & 0o777 for file in path.parent.iterdir()}
    finally:
        os.umask(old)
    assert modes == dict.fromkeys(("aibridge.db", "aibridge.db-wal", "aibridge.db-shm"), 0o600)
    assert locks.stat().st_mode & 0o777 == 0o700
    assert (locks / "migration.lock").stat().st_mode & 0o777 == 0o600


START = """
import asyncio, sys
from aibridge.recording import SqliteRecorder
from tests.support.records import start

async def main():
    async with SqliteRecorder(sys.argv[1]) as recorder:
        await recorder.record_interception(start(sys.argv[2]))

asyncio.run(main())
print(*sorted({"alembic", "sqlalchemy"} & set(sys.modules)))
"""


def started(path: Path, id: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-W", "error", "-c", START, str(path), id]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_processes_that_start_together_on_a_fresh_database_take_turns(path: Path) -> None:
    processes = [started(path, str(n)) for n in range(4)]
    for process in processes:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
    assert sorted(query(path, "SELECT id FROM aibridge_interceptions")) == [("0",), ("1",), ("2",), ("3",)]


def test_nobody_else_creates_or_upgrades_meanwhile(path: Path, locks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []

    def alone(name: str, call: Callable[..., None]) -> Callable[..., None]:
        def checked(*arguments: Any) -> None:
            with (locks / "migration.lock").open() as lock, pytest.raises(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            taken.append(name)
            call(*arguments)

        return checked

    for name in ("_create", "_populate", "_upgrade"):
        monkeypatch.setattr(schema, name, alone(name, getattr(schema, name)))
    migrate(path, locks, 1.0)
    monkeypatch.setattr(schema, "HEAD", "a later one")
    migrate(path, locks, 1.0)
    assert taken == ["_create", "_populate", "_create", "_upgrade"]
    with (locks / "migration.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def schema_of(path: Path) -> list[tuple[object, ...]]:
    """All that SQLite knows of it, but for the white space of statements."""
    found = query(path, "SELECT type, name, tbl_name, coalesce(sql, '') FROM sqlite_master ORDER BY type, name")
    return [(*names, re.sub(r"\s", "", str(sql))) for *names, sql in found]


@pytest.fixture
def migrations(tmp_path: Path) -> Path:
    """A directory of migrations that has only the first one."""
    directory = tmp_path / "migrations"
    (directory / "versions").mkdir(parents=True)
    (first,) = (MIGRATIONS / "versions").glob("0001*.py")
    for file in (MIGRATIONS / "env.py", first):
        (directory / file.relative_to(MIGRATIONS)).write_text(file.read_text())
    return directory


def migrated(path: Path, migrations: Path = MIGRATIONS) -> None:
    """Make a database from the migrations alone."""
    schema._create(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schema, "MIGRATIONS", migrations)
        schema._upgrade(path, 1.0)


def test_a_new_database_is_what_the_migrations_come_to(path: Path, locks: Path, tmp_path: Path) -> None:
    migrate(path, locks, 1.0)
    stepwise = tmp_path / "stepwise.db"
    migrated(stepwise)
    assert schema_of(path) == schema_of(stepwise)
    for of_it in ("SELECT * FROM alembic_version", "PRAGMA journal_mode"):
        assert query(path, of_it) == query(stepwise, of_it)


def test_only_a_database_of_an_earlier_version_needs_alembic(path: Path, tmp_path: Path, migrations: Path) -> None:
    earlier = tmp_path / "earlier.db"
    migrated(earlier, migrations)
    for start, (database, loaded) in enumerate([(path, "\n"), (path, "\n"), (earlier, "alembic sqlalchemy\n")]):
        output, errors = started(database, str(start)).communicate(timeout=60)
        assert output == loaded, errors


def test_a_database_of_an_earlier_version_is_brought_up_to_date(
    path: Path, locks: Path, tmp_path: Path, migrations: Path
) -> None:
    migrated(path, migrations)
    query(path, "INSERT INTO aibridge_model_thoughts VALUES ('m', 'i', 'Hm.', '{}', '2026-11-21')")
    assert "aibridge_hidden_turns" not in tables(path)
    migrate(path, locks, 1.0)
    assert query(path, "SELECT id, content FROM aibridge_model_thoughts") == [("m", "Hm.")]
    fresh = tmp_path / "fresh.db"
    migrate(fresh, locks, 1.0)
    assert schema_of(path) == schema_of(fresh)


def test_a_migration_that_fails_leaves_nothing_behind(
    path: Path, locks: Path, migrations: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    migrated(path, migrations)
    before = schema_of(path)
    (migrations / "versions" / "0002.py").write_text(
        'from alembic import op\nrevision, down_revision = "0002", "0001"\n'
        'def upgrade():\n    op.execute("CREATE TABLE half (x)")\n    op.execute("CREATE TABLE half (x)")\n'
    )
    with monkeypatch.context() as patch:
        patch.setattr(schema, "MIGRATIONS", migrations)
        with pytest.raises(sqlite3.OperationalError, match="half already exists"):
            migrate(path, locks, 1.0)
    assert schema_of(path) == before
    migrate(path, locks, 1.0)
    assert tables(path) == {*CONTRACT, "alembic_version"}


def test_a_new_database_that_fails_has_nothing_in_it(
    path: Path, locks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "schema.sql"
    broken.write_text(schema.SCHEMA.read_text() + "CREATE TABLE half (x);\nCREATE TABLE half (x);\n")
    with monkeypatch.context() as patch:
        patch.setattr(schema, "SCHEMA", broken)
        with pytest.raises(sqlite3.OperationalError, match="half already exists"):
            migrate(path, locks, 1.0)
    assert tables(path) == set()
    migrate(path, locks, 1.0)
    assert tables(path) == {*CONTRACT, "alembic_version"}


def test_it_may_stand_beside_tables_of_others(path: Path, locks: Path) -> None:
    path.parent.mkdir()
    with closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE theirs (x)")
    migrate(path, locks, 1.0)
    assert tables(path) == {*CONTRACT, "alembic_version", "theirs"}


def test_a_database_of_a_later_version_is_refused(path: Path, locks: Path) -> None:
    migrate(path, locks, 1.0)
    query(path, "UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(sqlite3.DatabaseError, match=r"not one of this version of aibridge: .*9999"):
        migrate(path, locks, 1.0)


def test_a_file_that_is_no_database_is_refused_and_left_alone(path: Path, locks: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(b"minutes of the meeting\n" * 100)
    with pytest.raises(sqlite3.DatabaseError, match="not a database"):
        migrate(path, locks, 1.0)
    assert path.read_bytes() == b"minutes of the meeting\n" * 100


def test_what_a_deleted_database_has_left_is_not_taken_for_the_new_one(path: Path, locks: Path) -> None:
    path.parent.mkdir()
    for suffix in ("-wal", "-shm"):
        path.with_name(path.name + suffix).write_bytes(b"old" * 2000)
    schema._create(path)  # SQLite takes the log away as well, but would share the index with whoever still has it open
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    migrate(path, locks, 1.0)
    assert query(path, "SELECT count(*) FROM aibridge_interceptions") == [(0,)]
    assert query(path, "PRAGMA integrity_check") == [("ok",)]


def test_a_path_may_hold_anything(tmp_path: Path) -> None:
    path = tmp_path / "a b?c#d%41%" / "é.db"
    migrate(path, tmp_path / "locks", 1.0)
    assert path.is_file() and tables(path) >= set(CONTRACT)
