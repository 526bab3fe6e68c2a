"""Which definitions of MCP servers' tools were approved, in SQLite, in the same database as the ledger."""

import asyncio
import os
import sqlite3
from collections.abc import Mapping
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from aibridge.recording.schema import connect, directory_beside, migrate

_BUSY_SECONDS: Final = 5.0

_APPROVED: Final = "SELECT server, tool, digest FROM aibridge_mcp_tools"
_APPROVE: Final = """
    INSERT INTO aibridge_mcp_tools (server, tool, digest, approved_at) VALUES (?, ?, ?, ?)
    ON CONFLICT (server, tool) DO UPDATE SET digest = excluded.digest, approved_at = excluded.approved_at
"""


class SqliteApprovals:
    """Keeps approvals in a SQLite database, which is created, and migrated, when it is not there.

    They are asked for seldom, so each call connects anew. Methods raise sqlite3.Error or OSError.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).absolute()  # wherever the process goes from here

    async def approved(self) -> Mapping[tuple[str, str], str]:
        """The digest of the definition that was approved, by server and the server's own name of the tool."""
        return await asyncio.to_thread(self._approved)

    async def approve(self, server: str, tool: str, digest: str) -> None:
        """Approve a definition, and no other one of that tool any more. Returns when that is durable."""
        await asyncio.to_thread(self._approve, server, tool, digest)

    def _approved(self) -> Mapping[tuple[str, str], str]:
        with closing(self._connect()) as database:
            return {(server, tool): digest for server, tool, digest in database.execute(_APPROVED)}

    def _approve(self, server: str, tool: str, digest: str) -> None:
        with closing(self._connect()) as database:
            database.execute(_APPROVE, (server, tool, digest, datetime.now(UTC).isoformat(timespec="microseconds")))

    def _connect(self) -> sqlite3.Connection:
        migrate(self.path, directory_beside(self.path), _BUSY_SECONDS)
        return connect(self.path, _BUSY_SECONDS)
