"""A clock that is set while streams run: the wall clock of the gateway's process alone jumps, by libfaketime."""

import asyncio
import re
import sqlite3
from contextlib import closing
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Final

from tests.support.crowd import CHAT_STREAM, MESSAGES_STREAM, answer, ask, gated, until
from tests.support.gateway import Gateway
from tests.support.provider import Gate, Received, Reply, ThreadedProvider
from tests.support.rawclient import RawClient

from .load import CLIENTS, COMPLETE, Books, temporary_folder
from .scenario import Chapter, Impossible, Observed, Outcome, Scale, Scenario

# Debian's package libfaketime; others have it elsewhere.
LIBRARIES: Final = (*Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), Path("/usr/lib/faketime/libfaketimeMT.so.1"))
LONGEST_SECONDS: Final = 60.0
"""What no duration may come near: the jumps are of a day."""

IN_ORDER: Final = "`completed`, nothing before its start, durations as they were"


class Clock:
    """The wall clock of a process. What measures time, the monotonic clock, goes on as it does when a clock is set."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.jump("+0")

    def jump(self, offset: str) -> None:
        """Set it that far from what it would be, such as ``-1d``."""
        unfinished = self._file.with_suffix(".new")
        unfinished.write_text(offset)
        unfinished.rename(self._file)

    @property
    def environment(self) -> dict[str, str]:
        """For the process. Raises `Impossible`."""
        library = next((path for path in LIBRARIES if path.exists()), None)
        if library is None:
            raise Impossible("libfaketime is not installed")
        return {
            "LD_PRELOAD": str(library),
            "FAKETIME_TIMESTAMP_FILE": str(self._file),
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "FAKETIME_NO_CACHE": "1",
        }


async def _jumps(offset: str, folder: Path, _: Scale) -> Observed:
    clock, go = Clock(folder / f"clock{offset}"), Gate()

    def answered(received: Received) -> Reply:
        return answer(received) if go.is_set() else gated(received, go)

    with (
        ThreadedProvider(answered) as provider,
        Gateway(anthropic_base_url=provider.url, openai_base_url=f"{provider.url}/v1", env=clock.environment) as server,
    ):
        asking = [asyncio.create_task(ask(server.url, (MESSAGES_STREAM, CHAT_STREAM)[n % 2])) for n in range(CLIENTS)]
        await until(lambda: len(provider.exchanges) >= CLIENTS, "the streams have not begun")
        clock.jump(offset)
        go.set()
        under_way = await asyncio.gather(*asking)
        later = [await ask(server.url, MESSAGES_STREAM) for _ in range(CLIENTS)]
        assert _jumped(server.database), "the clock of the process was not set"
        client, said, lost = (await Books.of([*under_way, *later], server, server.database)).outcome
        in_order = said == "`completed`" and await _durations_are_sane(server)
        return Observed(Outcome(client, IN_ORDER if in_order else f"{said}, with absurd durations", lost))


def _jumped(database: Path) -> bool:
    """Whether the starts are a day apart."""
    starts = [started for started, _ in _times(database)]
    return (max(starts) - min(starts)).total_seconds() > 23 * 3600


def _times(database: Path) -> list[tuple[datetime, datetime]]:
    with closing(sqlite3.connect(database)) as opened:
        rows = opened.execute("SELECT started_at, ended_at FROM aibridge_interceptions").fetchall()
    return [(datetime.fromisoformat(started), datetime.fromisoformat(ended)) for started, ended in rows]


async def _durations_are_sane(server: Gateway) -> bool:
    """Whether neither a row nor the metrics have a duration below zero, or one that took a day."""
    rows = [(ended - started).total_seconds() for started, ended in _times(server.database)]
    async with RawClient(server.url) as client:
        text = (await client.request("GET", "/metrics")).body.decode()
    sums = [float(found) for found in re.findall(r"_seconds_sum(?:\{[^}]*\})? (\S+)", text)]
    assert sums
    return all(0 <= seconds < LONGEST_SECONDS for seconds in [*rows, *sums])


CLOCKS: Final = Chapter(
    "The clock is set",
    "The wall clock of the gateway's process, by libfaketime, while streams run. Others are asked for afterwards.",
    temporary_folder,
    [
        Scenario("a day back", Outcome(COMPLETE, IN_ORDER), partial(_jumps, "-1d")),
        Scenario("a day forward", Outcome(COMPLETE, IN_ORDER), partial(_jumps, "+1d")),
    ],
)
