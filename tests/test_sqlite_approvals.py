"""Approved definitions of tools, in SQLite. Truth: our choice: one approved definition for each tool of each server."""

import asyncio
import sqlite3
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import pytest

from aibridge.mcp.approvals import Approvals, MemoryApprovals
from aibridge.recording import SqliteApprovals, SqliteHistory
from aibridge.wire.turns import Memory


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "aibridge.db"


async def test_what_was_approved_is_known_to_everybody(path: Path) -> None:
    assert await SqliteApprovals(path).approved() == {}
    await SqliteApprovals(path).approve({("docs", "ask"): "1", ("docs", "read"): "2"})
    await SqliteApprovals(path).trust({("files", "read"): "3"})
    assert await SqliteApprovals(path).approved() == {("docs", "ask"): "1", ("docs", "read"): "2", ("files", "read"): "3"}


async def test_a_tool_has_one_approved_definition(path: Path) -> None:
    approvals = SqliteApprovals(path)
    for digest in ("1", "2", "1", "3"):
        await approvals.approve({("docs", "ask"): digest})
        assert await approvals.approved() == {("docs", "ask"): digest}


@pytest.mark.parametrize("kind", ["memory", "sqlite"])
async def test_who_trusts_a_tool_first_is_right(kind: str, path: Path) -> None:
    approvals: Approvals = MemoryApprovals() if kind == "memory" else SqliteApprovals(path)
    await approvals.trust({("docs", "ask"): "1"})
    await approvals.trust({("docs", "ask"): "2", ("docs", "read"): "3"})
    assert await approvals.approved() == {("docs", "ask"): "1", ("docs", "read"): "3"}


@pytest.mark.parametrize("kind", ["memory", "sqlite"])
async def test_a_server_with_ever_new_tools_is_not_trusted_for_ever(kind: str, path: Path) -> None:
    approvals: Approvals = MemoryApprovals() if kind == "memory" else SqliteApprovals(path)
    await approvals.trust({("docs", "ask"): "1"})
    for start in range(0, 1200, 200):
        await approvals.trust({("evil", f"t{number}"): "1" for number in range(start, start + 200)})
    approved = await approvals.approved()
    assert len(approved) == 1001
    assert ("evil", "t0") in approved and ("evil", "t1100") not in approved
    await approvals.trust({("docs", "read"): "2"})
    await approvals.approve({("evil", "t1100"): "1"})
    assert len(await approvals.approved()) == 1003


async def test_all_of_them_or_none(path: Path) -> None:
    approvals = SqliteApprovals(path)
    with pytest.raises(sqlite3.IntegrityError):
        await approvals.approve({("docs", "ask"): "1", ("docs", "read"): None})  # type: ignore[dict-item]
    assert await approvals.approved() == {}


async def test_reading_leaves_everything_as_it_is(path: Path) -> None:
    reader = SqliteApprovals(path, read_only=True)
    assert await reader.approved() == {}
    await reader.trust({("docs", "ask"): "1"})
    await reader.approve({("docs", "ask"): "1"})
    assert list(path.parent.iterdir()) == []
    with closing(sqlite3.connect(path)) as database:  # one of an older version, which is not migrated
        database.execute("CREATE TABLE alembic_version (version_num TEXT)")
    before = path.read_bytes()
    assert await reader.approved() == {}
    assert (path.read_bytes(), list(path.parent.iterdir())) == (before, [path])
    path.unlink()
    await SqliteApprovals(path).approve({("docs", "ask"): "1"})
    assert await reader.approved() == {("docs", "ask"): "1"}


async def test_it_is_noted_when(path: Path) -> None:
    before = datetime.now(UTC)
    await SqliteApprovals(path).approve({("docs", "ask"): "1"})
    with closing(sqlite3.connect(path)) as database:
        ((at,),) = database.execute("SELECT approved_at FROM aibridge_mcp_tools").fetchall()
    assert before <= datetime.fromisoformat(at) <= datetime.now(UTC)


async def test_it_shares_the_database(path: Path) -> None:
    approvals = SqliteApprovals(path)
    async with SqliteHistory(path) as history:
        await asyncio.gather(
            *(approvals.approve({("docs", f"{n}"): "1"}) for n in range(20)),
            *(history.remember("ada", Memory((f"{n}",), "digest", b"[]"), b"[]") for n in range(20)),
        )
    assert len(await approvals.approved()) == 20
    assert path.stat().st_mode & 0o777 == 0o600


async def test_a_relative_path_stays_where_it_was(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parent)
    approvals = SqliteApprovals(path.name)
    monkeypatch.chdir("/")
    await approvals.approve({("docs", "ask"): "1"})
    assert path.exists()


async def test_what_goes_wrong_is_raised(path: Path) -> None:
    path.write_bytes(b"not a database " * 100)
    with pytest.raises(sqlite3.DatabaseError, match="not a database"):
        await SqliteApprovals(path).approved()
