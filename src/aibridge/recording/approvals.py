"""Which definitions of MCP servers' tools were approved, in SQLite, in the same database as the ledger."""

import asyncio
import os
import sqlite3
from collections.abc import Mapping
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from aibridge.mcp.approvals import TRUSTED_PER_SERVER
from aibridge.recording.schema import connect, directory_beside, migrate

_BUSY_SECONDS: Final = 5.0

_APPROVED: Final = "SELECT server, tool, digest FROM aibridge_mcp_tools"
_IS_THERE: Final = "SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = 'aibridge_mcp_tools'"
_TRUST: Final = f"""
    INSERT INTO aibridge_mcp_tools (server, tool, digest, approved_at) SELECT :server, :tool, :digest, :at
    WHERE (SELECT count(*) FROM aibridge_mcp_tools WHERE server = :server) < {TRUSTED_PER_SERVER}
    ON CONFLICT (server, tool) DO NOTHING
"""  # noqa: S608  a number of ours
_APPROVE: Final = """
    INSERT INTO aibridge_mcp_tools (server, tool, digest, approved_at) VALUES (:server, :tool, :digest, :at)
    ON CONFLICT (server, tool) DO UPDATE SET digest = excluded.digest, approved_at = excluded.approved_at
"""


class SqliteApprovals:
    """Keeps approvals in a SQLite database, which is created, and migrated, when it is not there.

    They are asked for seldom, so each call connects anew. With `read_only` nothing is ever written: what is not there is not
    created, and nothing is approved. Methods raise sqlite3.Error or OSError.
    """

    def __init__(self, path: str | os.PathLike[str], *, read_only: bool = False) -> None:
        self.path = Path(path).absolute()  # wherever the process goes from here
        self._read_only = read_only

    async def approved(self) -> Mapping[tuple[str, str], str]:
        """The digest of the definition that was approved, by server and the server's own name of the tool."""
        return await asyncio.to_thread(self._approved)

    async def trust(self, digests: Mapping[tuple[str, str], str]) -> None:
        """Approve definitions of tools that have none, up to `TRUSTED_PER_SERVER`. Returns when that is durable."""
        await asyncio.to_thread(self._write, _TRUST, digests)

    async def approve(self, digests: Mapping[tuple[str, str], str]) -> None:
        """Approve definitions, and no other ones of those tools any more. Returns when that is durable."""
        await asyncio.to_thread(self._write, _APPROVE, digests)

    def _approved(self) -> Mapping[tuple[str, str], str]:
        if self._read_only and not self.path.exists():
            return {}
        with closing(self._connect()) as database:
            if self._read_only and not database.execute(_IS_THERE).fetchone():
                return {}
            return {(server, tool): digest for server, tool, digest in database.execute(_APPROVED)}

    def _write(self, statement: str, digests: Mapping[tuple[str, str], str]) -> None:
        """All of them or none."""
        if self._read_only:
            return
        at = datetime.now(UTC).isoformat(timespec="microseconds")
        rows = ({"server": server, "tool": tool, "digest": digest, "at": at} for (server, tool), digest in digests.items())
        with closing(self._connect()) as database:
            database.execute("BEGIN IMMEDIATE")
            database.executemany(statement, rows)
            database.execute("COMMIT")

    def _connect(self) -> sqlite3.Connection:
        if not self._read_only:
            migrate(self.path, directory_beside(self.path), _BUSY_SECONDS)
        return connect(self.path, _BUSY_SECONDS)
