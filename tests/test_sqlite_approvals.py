"""Approved definitions of tools, in SQLite. Truth: our choice: one approved definition for each tool of each server."""

import asyncio
import sqlite3
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import pytest

from aibridge.recording import SqliteApprovals, SqliteHistory


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "aibridge.db"


async def test_what_was_approved_is_known_to_everybody(path: Path) -> None:
    assert await SqliteApprovals(path).approved() == {}
    await SqliteApprovals(path).approve("docs", "ask", "1")
    await SqliteApprovals(path).approve("docs", "read", "2")
    await SqliteApprovals(path).approve("files", "read", "3")
    assert await SqliteApprovals(path).approved() == {("docs", "ask"): "1", ("docs", "read"): "2", ("files", "read"): "3"}


async def test_a_tool_has_one_approved_definition(path: Path) -> None:
    approvals = SqliteApprovals(path)
    for digest in ("1", "2", "1", "3"):
        await approvals.approve("docs", "ask", digest)
        assert await approvals.approved() == {("docs", "ask"): digest}


async def test_it_is_noted_when(path: Path) -> None:
    before = datetime.now(UTC)
    await SqliteApprovals(path).approve("docs", "ask", "1")
    with closing(sqlite3.connect(path)) as database:
        ((at,),) = database.execute("SELECT approved_at FROM aibridge_mcp_tools").fetchall()
    assert before <= datetime.fromisoformat(at) <= datetime.now(UTC)


async def test_it_shares_the_database(path: Path) -> None:
    approvals = SqliteApprovals(path)
    async with SqliteHistory(path) as history:
        await asyncio.gather(
            *(approvals.approve("docs", f"{n}", "1") for n in range(20)),
            *(history.remember_toolset(f"{n}", b"[]") for n in range(20)),
        )
    assert len(await approvals.approved()) == 20
    assert path.stat().st_mode & 0o777 == 0o600


async def test_a_relative_path_stays_where_it_was(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parent)
    approvals = SqliteApprovals(path.name)
    monkeypatch.chdir("/")
    await approvals.approve("docs", "ask", "1")
    assert path.exists()


async def test_what_goes_wrong_is_raised(path: Path) -> None:
    path.write_bytes(b"not a database " * 100)
    with pytest.raises(sqlite3.DatabaseError, match="not a database"):
        await SqliteApprovals(path).approved()
