"""Databases that are locked, full, read-only, deleted, replaced, and processes that are killed while they write."""

import asyncio
import os
import random
import shutil
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Final

from tests.support.crowd import Crowd, Seen, ledger, lost, spooled, until
from tests.support.gateway import Gateway

from .load import (
    CLIENTS,
    COMPLETE,
    LOST_AND_COUNTED,
    NOTHING_COMPLETE,
    REFUSED,
    Books,
    gateway,
    goes_on,
    load,
    replayed,
    temporary_folder,
)
from .scenario import NOTHING, Chapter, Impossible, Observed, Outcome, Scale, Scenario

COMPLETED: Final = "`completed`"
KILLED: Final = "each `completed` or `interrupted`"

DELETED: Final = "what was in the file, and nothing that came later"
DOES_NOT_START: Final = "no answer: the gateway does not start, and says why"

CONTINUE: Final = {"AIBRIDGE_DATABASE__WHEN_UNAVAILABLE": "continue"}


@contextmanager
def mounted(at: Path, options: str) -> Iterator[None]:
    """A file system in memory there. Raises `Impossible` where nothing can be mounted."""
    at.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(at)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        raise Impossible("nothing can be mounted here: it takes root, and a container that lets it")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(at)], check=True)


# ---- the database does not take records for a while ----


@contextmanager
def locked(database: Path) -> Iterator[None]:
    with closing(sqlite3.connect(database, timeout=20, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        yield
        other.execute("ROLLBACK")


async def _locked(_: None, scale: Scale) -> Observed:
    with gateway() as server:
        async with load(server) as crowd:
            with locked(server.database):
                await until(lambda: spooled(server.database) > 0, "nothing was spooled")
                await asyncio.sleep(scale.seconds)
                await goes_on(crowd)
        return Observed((await Books.of(crowd.seen, server, server.database)).outcome)


async def _locked_and_killed(_: None, scale: Scale) -> Observed:
    """What clients saw complete is in the spool of a dead process."""
    with gateway() as server:
        crowd = Crowd(server.url)
        running = asyncio.create_task(crowd.run(CLIENTS))
        await until(lambda: len(crowd.complete) >= 3 * CLIENTS, "the crowd has not begun")
        with locked(server.database):
            await until(lambda: spooled(server.database) > 0, "nothing was spooled")
            await goes_on(crowd)
            server.kill()
            await running
        server.start()
        return Observed(await _after_a_kill(crowd.seen, server))


async def _full(policy: dict[str, str], _: None, scale: Scale) -> Observed:
    with temporary_folder() as at, mounted(at / "small", "size=32m"), gateway(at / "small", **policy) as server:
        ballast = at / "small" / "ballast"
        async with load(server) as crowd:
            _fill(ballast)
            await _in_trouble(crowd, server)
            ballast.unlink()
            await goes_on(crowd)
        return Observed((await Books.of(crowd.seen, server, at / "small" / "aibridge.db")).outcome)


def _fill(ballast: Path) -> None:
    """Fill the disk, up to the last 200 KB: the crowd does the rest, in the middle of its writing."""
    with ballast.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"x" * 4096)
        except OSError:
            file.truncate(file.tell() - 50 * 4096)


async def _read_only(policy: dict[str, str], _: None, scale: Scale) -> Observed:
    """A file system that cannot be written covers the database, and its spool."""
    with temporary_folder() as at, gateway(at / "data", **policy) as server:
        async with load(server) as crowd:
            with mounted(at / "data", "size=1m,ro"):
                await _in_trouble(crowd, server)
            await goes_on(crowd)
        return Observed((await Books.of(crowd.seen, server, at / "data" / "aibridge.db")).outcome)


async def _in_trouble(crowd: Crowd, server: Gateway) -> None:
    """Records are being lost, or their requests refused, and clients go on to ask."""
    await until(lambda: "record lost" in server.output, "nothing is lost", 60)
    asked = len(crowd.seen)
    await until(lambda: len(crowd.seen) >= asked + 5 * CLIENTS, "the crowd is stuck", 60)


# ---- the database is gone ----


async def _gone(damage: Callable[[Path], None], repair: Callable[[Path], None], _: None, scale: Scale) -> Observed:
    with temporary_folder() as at, gateway(at / "data") as server:
        database = at / "data" / "aibridge.db"
        async with load(server) as earlier:
            before = earlier.complete
            damage(database)
            async with load(server) as later:
                await goes_on(later)
                repair(database)
                await goes_on(later)
        await replayed(database)
        found, counted = ledger(database), await lost(server.url)
        missing = sum(found.completed[one.response_id] != 1 for one in later.complete)
        gone = sum(found.completed[one.response_id] != 1 for one in before)
        books = Books([*earlier.seen, *later.seen], found, counted).outcome
        if missing or counted:
            return Observed(books._replace(lost=f"{missing} later responses, {sum(counted.values())} records counted"))
        return Observed(books._replace(lost=DELETED if gone else NOTHING))


def _delete(database: Path) -> None:
    database.unlink()


def _delete_folder(database: Path) -> None:
    shutil.rmtree(database.parent)


def _replace(database: Path) -> None:
    garbage = database.with_name("garbage")
    garbage.write_bytes(random.Random(1).randbytes(100_000))
    garbage.rename(database)


def _leave(_: Path) -> None:
    pass


def _use(database: Path) -> None:
    with gateway(database.parent):
        pass


async def _does_not_start(
    prepare: Callable[[Path], None],
    meanwhile: Callable[[Path], AbstractContextManager[object]],
    why: str,
    _: None,
    scale: Scale,
) -> Observed:
    with temporary_folder() as at:
        database = at / "aibridge.db"
        prepare(database)
        before = database.read_bytes()
        try:
            with meanwhile(database), gateway(at):
                return Observed(Outcome("an answer", "?", "?"))
        except RuntimeError as error:
            said = f"the database {database} {why}" in str(error)
        client = DOES_NOT_START if said else "no answer, and nobody knows why"
        return Observed(Outcome(client, "as it was" if database.read_bytes() == before else "changed"))


# ---- the process is killed ----


async def _killed(_: None, scale: Scale) -> Observed:
    """At seeded moments, with 50 clients and commits under way."""
    chance = random.Random(7)
    with gateway() as server:
        seen: list[Seen] = []
        for number in range(scale.kills):
            crowd = Crowd(server.url, seed=number)
            _kill_amid(crowd, server, after=chance.randint(1, 200), delay=chance.uniform(0, 0.02))
            async with asyncio.timeout(60):
                await crowd.run(50)
            server.process.wait(10)
            server.start()
            seen += crowd.seen
        return Observed(await _after_a_kill(seen, server))


def _kill_amid(crowd: Crowd, server: Gateway, *, after: int, delay: float) -> None:
    """Kill the process when so many responses were seen complete, and a little later."""
    left = iter(range(after, 0, -1))

    def count() -> None:
        if next(left, 0) == 1:
            asyncio.get_running_loop().call_later(delay, server.process.kill)

    crowd.on_complete = count


async def _after_a_kill(seen: list[Seen], server: Gateway) -> Outcome:
    """A client that was cut off knows nothing, so what the ledger must have is what was complete."""
    found = ledger(server.database)
    complete = [one for one in seen if one.complete and one.status == 200]
    missing = sum(found.completed[one.response_id] != 1 for one in complete)
    cut = len(seen) > len(complete)
    # How many it met under way is chance; that none is left open, and none is anything else, is not.
    ended = set(found.statuses) <= {"completed", "interrupted"}
    statuses = KILLED if ended else ", ".join(f"`{status}`" for status in sorted(found.statuses))
    client = "complete until then, then broken off" if cut else "complete"
    return Outcome(client, statuses, f"{missing} complete responses" if missing else NOTHING)


DATABASES: Final = Chapter(
    "The database cannot be written",
    f"Beside {CLIENTS} clients that ask all the time. What a client saw complete and the ledger has not is lost, and so is"
    " any record that is missing and was not counted. An interception whose end could not be written stays `in_progress`"
    " until the next start closes it as `interrupted`.",
    nullcontext,
    [
        Scenario("locked by another process", Outcome(COMPLETE, COMPLETED), _locked),
        Scenario(
            "locked, and the process is killed meanwhile",
            Outcome("complete until then, then broken off", KILLED),
            _locked_and_killed,
        ),
        Scenario(
            'the disk is full, `when_unavailable = "refuse"`',
            Outcome(REFUSED, COMPLETED, NOTHING_COMPLETE),
            partial(_full, {}),
        ),
        Scenario(
            'the disk is full, `when_unavailable = "continue"`',
            Outcome(COMPLETE, COMPLETED, LOST_AND_COUNTED),
            partial(_full, CONTINUE),
        ),
        Scenario(
            'read-only, `when_unavailable = "refuse"`',
            Outcome(REFUSED, COMPLETED, NOTHING_COMPLETE),
            partial(_read_only, {}),
        ),
        Scenario(
            'read-only, `when_unavailable = "continue"`',
            Outcome(COMPLETE, COMPLETED, LOST_AND_COUNTED),
            partial(_read_only, CONTINUE),
        ),
        Scenario("the file is deleted", Outcome(COMPLETE, COMPLETED, DELETED), partial(_gone, _delete, _leave)),
        Scenario(
            "the folder is deleted, spool and all",
            Outcome(COMPLETE, COMPLETED, DELETED),
            partial(_gone, _delete_folder, _leave),
        ),
        Scenario(
            "the file is replaced by garbage, and that is removed later",
            Outcome(COMPLETE, COMPLETED, DELETED),
            partial(_gone, _replace, _delete),
        ),
        Scenario(
            "the file is garbage at the start",
            Outcome(DOES_NOT_START, "as it was"),
            partial(_does_not_start, _replace, nullcontext, "cannot be opened: file is not a database"),
        ),
        Scenario(
            "locked by another process at the start, for longer than the gateway waits",
            Outcome(DOES_NOT_START, "as it was"),
            partial(_does_not_start, _use, locked, "cannot be written: database is locked"),
        ),
        Scenario(
            "SIGKILL in the middle of a group commit",
            Outcome("complete until then, then broken off", KILLED),
            _killed,
        ),
    ],
)
