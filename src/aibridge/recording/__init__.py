"""The ledger: what is recorded, and where it is kept; and beside it what else must outlive the process.

`Recorder` is the extension point. `SqliteRecorder` keeps records in SQLite, `MemoryRecorder` in lists; any class with the
same methods works. `SqliteHistory` keeps the hidden turns of conversations (`aibridge.history.History`) in the same
database, `SqliteApprovals` which tools of MCP servers were approved.
"""

from aibridge.recording.approvals import SqliteApprovals
from aibridge.recording.base import MemoryRecorder, Recorder
from aibridge.recording.history import SqliteHistory
from aibridge.recording.sqlite import SqliteRecorder

__all__ = ["MemoryRecorder", "Recorder", "SqliteApprovals", "SqliteHistory", "SqliteRecorder"]
