"""A database in memory for the recorder's writer, which can be told to be slow, locked, picky or broken."""

import threading
from collections.abc import Callable, Mapping, Sequence

from aibridge.events import RecordLost, RecordsReplayed, RecordsWritten
from aibridge.recording.writer import StoreUnavailable
from aibridge.records import Record

from .provider import WAIT_SECONDS


class Told(list[RecordLost | RecordsWritten | RecordsReplayed]):
    """What a recorder has told."""

    @property
    def losses(self) -> list[RecordLost]:
        return [event for event in self if isinstance(event, RecordLost)]

    @property
    def replayed(self) -> int:
        return sum(event.records for event in self if isinstance(event, RecordsReplayed))

    @property
    def written(self) -> list[tuple[str, int]]:
        """Where to, and how many records."""
        return [(event.to, event.records) for event in self if isinstance(event, RecordsWritten)]


class MemoryStore:
    """Keeps what was committed, in order, and which write committed it.

    `entered` is set when a write has begun; it goes on when `gate` is open. A record whose id begins with "poison" is
    never taken.
    """

    def __init__(self) -> None:
        self.commits: list[list[Record]] = []
        self.instances: list[str] = []
        self.alive: list[list[str]] = []
        self.left_open = 0
        self.closed = 0
        self.refusals = 0
        """How many writes were refused for `unavailable`."""
        self.unavailable = False
        self.full = False
        """Why it is unavailable."""
        self.bug: Exception | None = None
        self.open_error: Exception | None = None
        self.busy_when_closing = 0
        self.entered = threading.Event()
        self.gate = threading.Event()
        self.gate.set()

    @property
    def records(self) -> list[Record]:
        return [record for commit in self.commits for record in commit]

    def open(self) -> None:
        if self.open_error is not None:
            raise self.open_error

    def write(self, records: Sequence[Record], instance: str) -> Mapping[int, str]:
        self.entered.set()
        if not self.gate.wait(WAIT_SECONDS):
            raise TimeoutError
        if self.bug is not None:
            raise self.bug
        if self.unavailable:
            self.refusals += 1
            raise StoreUnavailable("told to be", is_full=self.full)
        rejected = {index: "Poison" for index, record in enumerate(records) if _is_poison(record)}
        self.commits.append([record for index, record in enumerate(records) if index not in rejected])
        self.instances.append(instance)
        return rejected

    def close_interrupted(self, alive: Callable[[], Sequence[str]]) -> int:
        self.alive.append(list(alive()))
        if self.busy_when_closing:
            self.busy_when_closing -= 1
            raise StoreUnavailable("busy")
        return self.left_open

    def close(self) -> None:
        self.closed += 1


def _is_poison(record: Record) -> bool:
    return getattr(record, "id", "").startswith("poison")
