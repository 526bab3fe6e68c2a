"""Scenarios, chapters, outcomes: see the package."""

from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

NOTHING: Final = "nothing"


class Outcome(NamedTuple):
    """What a fault costs, in the words of the table. `lost` is of what the ledger had to keep."""

    client: str
    ledger: str
    lost: str = NOTHING


class Impossible(Exception):
    """A fault cannot be brought about on this machine. The message says why."""


@dataclass(frozen=True, slots=True)
class Scale:
    """How much of everything."""

    clients: int
    """Dropped at once."""

    events: int
    """Of one stream."""

    seconds: float
    """That a database is locked, beside the load."""

    kills: int

    tools: int
    """That a server lists."""

    megabytes: int
    """Of a tool's result."""

    inflated: int
    """Megabytes of a decompression bomb."""


WHOLE: Final = Scale(clients=500, events=1_000_000, seconds=5, kills=20, tools=1_000_000, megabytes=50, inflated=1024)
SMALL: Final = Scale(clients=100, events=100_000, seconds=2, kills=2, tools=10_000, megabytes=20, inflated=300)


@dataclass(frozen=True, slots=True)
class Scenario:
    """A fault, in the words of the table, what is promised, and how to find out. `run` raises `Impossible`."""

    fault: str
    promised: Outcome
    run: Callable[[Any, Scale], Awaitable["Observed"]]


@dataclass(frozen=True, slots=True)
class Observed:
    """What came of a fault, and what was seen beside it, of which nothing is promised: how the SDKs put it, say."""

    outcome: Outcome
    beside: str = ""


@dataclass(frozen=True, slots=True)
class Chapter:
    """Scenarios that share what `stage` opens. `about` says in a few sentences what goes for all of them."""

    title: str
    about: str
    stage: Callable[[], AbstractContextManager[Any]]
    scenarios: Sequence[Scenario]
