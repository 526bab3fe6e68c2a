"""The ledger: what is recorded, and where it is kept.

`Recorder` is the extension point. `SqliteRecorder` keeps records in SQLite, `MemoryRecorder` in lists; any class with the
same methods works.
"""

from aibridge.recording.base import MemoryRecorder, Recorder
from aibridge.recording.sqlite import SqliteRecorder

__all__ = ["MemoryRecorder", "Recorder", "SqliteRecorder"]
