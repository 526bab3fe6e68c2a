"""failures.md, row 4: records lost at shutdown, in a crash, with the disk full, the database locked or gone.

What it must show: nothing is lost of what a client saw complete; open interceptions are closed at the next start; the loss
counter equals the real loss. With the real server process; the random SIGKILLs are in ``tests/test_sigkill.py``.

The disk is really full in one case, a small tmpfs that needs the right to mount, and is skipped without it. In the other
the kernel refuses to let the process's files grow (RLIMIT_FSIZE), which needs no right and fails the same system calls.
"""

import asyncio
import os
import resource
import signal
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from pathlib import Path
from typing import Final

import pytest

from tests.support.crowd import (
    CHAT_STREAM,
    MESSAGES,
    MESSAGES_STREAM,
    Crowd,
    Seen,
    answer,
    ask,
    assert_nothing_is_missing,
    gated,
    ledger,
    lost,
    refusals,
    spooled,
    until,
)
from tests.support.gateway import Gateway
from tests.support.provider import Gate, Received, Reply, ThreadedProvider

STREAMS: Final = 10


@contextmanager
def behind(provider: ThreadedProvider, **env: str) -> Iterator[Gateway]:
    """A gateway in front of the provider."""
    with Gateway(anthropic_base_url=provider.url, openai_base_url=f"{provider.url}/v1", env=env) as gateway:
        yield gateway


class Halfway:
    """A provider whose streams wait in their middle until `go` opens. Whatever is asked later does not wait."""

    def __init__(self) -> None:
        self.go = Gate()
        self.provider = ThreadedProvider(self._answer)

    def _answer(self, received: Received) -> Reply:
        return gated(received, None if self.go.is_set() else self.go)

    async def streams(self, gateway: Gateway) -> list[asyncio.Task[Seen]]:
        """Clients in the middle of their streams, of both protocols."""
        tasks = [asyncio.create_task(ask(gateway.url, (MESSAGES_STREAM, CHAT_STREAM)[n % 2])) for n in range(STREAMS)]
        await until(lambda: len(self.provider.exchanges) >= STREAMS, "the streams have not begun")
        await until(lambda: ledger(gateway.database).statuses["in_progress"] == STREAMS, "not all were recorded")
        return tasks


@pytest.fixture
def halfway() -> Iterator[Halfway]:
    halfway = Halfway()
    with halfway.provider:
        yield halfway
        halfway.go.set()


# ---- the end of the process ----


async def test_sigterm_lets_streams_end_within_the_grace(halfway: Halfway) -> None:
    with behind(halfway.provider, AIBRIDGE_SERVER__SHUTDOWN_GRACE="20") as gateway:
        tasks = await halfway.streams(gateway)
        gateway.process.send_signal(signal.SIGTERM)
        await until(lambda: "shutting down" in gateway.output, "the signal was not heard")
        halfway.go.set()
        seen = await asyncio.gather(*tasks)
        await ended(gateway)
        assert [one.complete for one in seen] == [True] * STREAMS
        assert_nothing_is_missing(seen, gateway.database)
        assert ledger(gateway.database).statuses == {"completed": STREAMS}


async def test_sigterm_after_the_grace_ends_streams_and_records_what_is_known(halfway: Halfway) -> None:
    with behind(halfway.provider, AIBRIDGE_SERVER__SHUTDOWN_GRACE="1") as gateway:
        tasks = await halfway.streams(gateway)
        gateway.process.send_signal(signal.SIGTERM)
        assert not any(one.complete for one in await asyncio.gather(*tasks))
        await ended(gateway)
        found = ledger(gateway.database)
        assert found.statuses == {"interrupted": STREAMS}
        assert found.counts == {"interceptions": STREAMS, "token_usages": STREAMS, "user_prompts": STREAMS}
        with closing(sqlite3.connect(gateway.database)) as database:
            usages = database.execute("SELECT DISTINCT completeness FROM aibridge_token_usages").fetchall()
            assert usages == [("partial",)]


async def test_sigterm_after_the_grace_says_so_in_band_and_nothing_alarming_in_the_log(halfway: Halfway) -> None:
    with behind(halfway.provider, AIBRIDGE_SERVER__SHUTDOWN_GRACE="1") as gateway:
        tasks = await halfway.streams(gateway)
        gateway.process.send_signal(signal.SIGTERM)
        seen = await asyncio.gather(*tasks)
        await ended(gateway)
        assert all(b"shutting down" in one.body for one in seen)
        assert "Traceback" not in gateway.output


async def test_sigkill_leaves_open_what_the_next_start_closes(halfway: Halfway) -> None:
    with behind(halfway.provider) as gateway:
        tasks = await halfway.streams(gateway)
        over = [await ask(gateway.url, MESSAGES) for _ in range(5)]
        gateway.kill()
        assert not any(one.complete for one in await asyncio.gather(*tasks))
        assert_nothing_is_missing(over, gateway.database)
        assert ledger(gateway.database).statuses == {"in_progress": STREAMS, "completed": 5}
        gateway.start()
        assert ledger(gateway.database).statuses == {"interrupted": STREAMS, "completed": 5}
        assert f"closed {STREAMS} interceptions that a dead process had left open" in gateway.output


async def ended(gateway: Gateway) -> None:
    await until(lambda: gateway.process.poll() is not None, "the gateway has not ended")
    assert gateway.process.returncode == -signal.SIGTERM, gateway.output  # it ends by the signal that it obeyed


# ---- the database under load ----


@asynccontextmanager
async def load(gateway: Gateway, clients: int = 10) -> AsyncIterator[Crowd]:
    """A crowd that has begun; at the end each client finishes what it has begun."""
    crowd = Crowd(gateway.url)
    running = asyncio.create_task(crowd.run(clients))
    try:
        await until(lambda: len(crowd.complete) >= 3 * clients, "the crowd has not begun")
        yield crowd
    finally:
        crowd.leave()
        await running


async def goes_on(crowd: Crowd, count: int = 50) -> None:
    """That many more responses have been seen complete."""
    target = len(crowd.complete) + count
    await until(lambda: len(crowd.complete) >= target, "the crowd is stuck")


async def test_locked_database_under_load() -> None:
    with ThreadedProvider(answer) as provider, behind(provider) as gateway:
        async with load(gateway) as crowd:
            with closing(sqlite3.connect(gateway.database, timeout=20, isolation_level=None)) as other:
                other.execute("BEGIN EXCLUSIVE")
                await until(lambda: spooled(gateway.database) > 0, "nothing was spooled")
                await goes_on(crowd)
                begun = ledger(gateway.database).counts["interceptions"]
                other.execute("ROLLBACK")
            assert begun < len(crowd.complete)
            await until(lambda: spooled(gateway.database) == 0, "the spool was not replayed")
            await goes_on(crowd)
        assert [one.status for one in crowd.seen] == [200] * len(crowd.seen)
        assert len(crowd.complete) == len(crowd.seen)
        assert_nothing_is_missing(crowd.seen, gateway.database)
        assert ledger(gateway.database).statuses == {"completed": len(crowd.seen)}
        assert await lost(gateway.url) == {}
        assert "the database takes records again" in gateway.output


async def test_killed_while_the_database_is_locked() -> None:
    """What the client saw complete is in the spool of a dead process."""
    with ThreadedProvider(answer) as provider, behind(provider) as gateway:
        crowd = Crowd(gateway.url)
        running = asyncio.create_task(crowd.run(10))
        await until(lambda: len(crowd.complete) >= 30, "the crowd has not begun")
        with closing(sqlite3.connect(gateway.database, timeout=20, isolation_level=None)) as other:
            other.execute("BEGIN EXCLUSIVE")
            await until(lambda: spooled(gateway.database) > 0, "nothing was spooled")
            await goes_on(crowd)
            gateway.kill()
            await running
            other.execute("ROLLBACK")
        gateway.start()
        assert_nothing_is_missing(crowd.complete, gateway.database)
        assert ledger(gateway.database).statuses["in_progress"] == 0
        assert spooled(gateway.database) == 0


@pytest.mark.parametrize("suffixes", [("",), ("", "-wal", "-shm")], ids=["the file", "all three files"])
async def test_database_deleted_under_load(suffixes: tuple[str, ...]) -> None:
    """What was over by then has gone with the file. What is asked from then on must be there."""
    with ThreadedProvider(answer) as provider, behind(provider) as gateway:
        async with load(gateway) as earlier:
            for suffix in suffixes:
                gateway.database.with_name(gateway.database.name + suffix).unlink()
            async with load(gateway) as later:
                await goes_on(later)
        everything = [*earlier.seen, *later.seen]
        assert [one.status for one in everything] == [200] * len(everything)
        assert all(one.complete for one in everything)
        assert_nothing_is_missing(later.seen, gateway.database)
        assert set(ledger(gateway.database).statuses) == {"completed"}
        assert await lost(gateway.url) == {}


async def test_streams_that_were_open_when_the_database_was_deleted(halfway: Halfway) -> None:
    with behind(halfway.provider) as gateway:
        tasks = await halfway.streams(gateway)
        gateway.database.unlink()
        halfway.go.set()
        seen = await asyncio.gather(*tasks)
        assert all(one.complete for one in seen)
        assert_nothing_is_missing(seen, gateway.database)
        assert ledger(gateway.database).statuses == {"completed": STREAMS}


# ---- neither database nor spool ----


class Disk:
    """A disk that the test fills and empties."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def environment(self) -> dict[str, str]:
        return {} if self._folder is None else {"AIBRIDGE_DATABASE__URL": f"sqlite:///{self._folder}/aibridge.db"}

    def database(self, gateway: Gateway) -> Path:
        return gateway.database if self._folder is None else self._folder / "aibridge.db"

    def fill(self, gateway: Gateway) -> None:
        if self._folder is None:
            self._limit(gateway, 150_000)  # the write-ahead log, the spool and the log file may become as large
            return
        with (self._folder / "ballast").open("wb", buffering=0) as ballast:
            try:
                while True:
                    ballast.write(b"x" * 4096)
            except OSError:
                ballast.truncate(ballast.tell() - 50 * 4096)

    def make_room(self, gateway: Gateway) -> None:
        if self._folder is None:
            self._limit(gateway, resource.RLIM_INFINITY)
        else:
            (self._folder / "ballast").unlink()

    @staticmethod
    def _limit(gateway: Gateway, size: int) -> None:
        resource.prlimit(gateway.process.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


@pytest.fixture(params=["tmpfs", "size limit"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Disk]:
    if request.param == "size limit":
        yield Disk(None)
        return
    mounted = tmp_path / "small"
    mounted.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(mounted)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("nothing can be mounted here")
    try:
        yield Disk(mounted)
    finally:
        subprocess.run(["umount", "--lazy", str(mounted)], check=True)


async def test_full_disk_refuses_and_counts_what_is_lost(disk: Disk) -> None:
    with ThreadedProvider(answer) as provider, behind(provider, **disk.environment()) as gateway:
        crowd = Crowd(gateway.url)
        running = asyncio.create_task(crowd.run(10))
        await until(lambda: len(crowd.complete) >= 30, "the crowd has not begun")
        disk.fill(gateway)
        await until(lambda: sum(one.status == 503 for one in crowd.seen) >= 50, "the disk is never full")
        disk.make_room(gateway)
        await goes_on(crowd)
        crowd.leave()
        await running
        refused = [one for one in crowd.seen if one.status == 503]
        broken_off = [one for one in crowd.seen if one.status == 200 and not one.complete]
        assert all(b"cannot be recorded" in one.body for one in refused)
        assert len(crowd.complete) + len(refused) + len(broken_off) == len(crowd.seen)

        await until(lambda: spooled(disk.database(gateway)) == 0, "the spool was not replayed")
        assert_nothing_is_missing(crowd.complete, disk.database(gateway))
        found = ledger(disk.database(gateway))
        counted = await lost(gateway.url)
        assert found.counts["interceptions"] == len(crowd.seen) - len(refused)
        assert await refusals(gateway.url) == {"recording": len(refused)}
        assert 0 < counted["Interception"] <= len(refused), "once records are lost, nothing is begun for them to be lost of"
        assert counted == +Counter(
            Interception=counted["Interception"],
            PromptUsage=found.counts["interceptions"] - found.counts["user_prompts"],
            TokenUsage=found.counts["interceptions"] - found.counts["token_usages"],
            InterceptionEnded=found.statuses["in_progress"],
        )

        gateway.stop()
        gateway.start()
        statuses = ledger(disk.database(gateway)).statuses
        assert statuses == +Counter(completed=found.statuses["completed"], interrupted=found.statuses["in_progress"])


async def test_full_disk_may_go_on_and_counts_what_is_lost(disk: Disk) -> None:
    policy = {"AIBRIDGE_DATABASE__WHEN_UNAVAILABLE": "continue"}
    with ThreadedProvider(answer) as provider, behind(provider, **disk.environment(), **policy) as gateway:
        crowd = Crowd(gateway.url)
        running = asyncio.create_task(crowd.run(10))
        await until(lambda: len(crowd.complete) >= 30, "the crowd has not begun")
        disk.fill(gateway)
        await until(lambda: "record lost" in gateway.output, "the disk is never full")
        await goes_on(crowd)
        disk.make_room(gateway)
        await goes_on(crowd)
        crowd.leave()
        await running
        assert len(crowd.complete) == len(crowd.seen)

        await until(lambda: spooled(disk.database(gateway)) == 0, "the spool was not replayed")
        found = ledger(disk.database(gateway))
        total = len(crowd.seen)
        assert await lost(gateway.url) == +Counter(
            Interception=total - found.counts["interceptions"],
            PromptUsage=total - found.counts["user_prompts"],
            TokenUsage=total - found.counts["token_usages"],
            InterceptionEnded=total - found.statuses["completed"],
        )


# ---- no place for a database ----

# Root may write everywhere; a process that has given that up may not. Harmless for everybody else.
_WITHOUT_PRIVILEGE = """
import ctypes, os, sys
for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


@pytest.mark.parametrize("there", [False, True], ids=["no database yet", "a database"])
def test_read_only_directory_is_refused_at_the_start(tmp_path: Path, there: bool) -> None:
    folder = tmp_path / "read-only"
    folder.mkdir()
    serve = ["-m", "aibridge", "serve", "--port", "0"]
    environment = {"PATH": os.defpath, "HOME": str(folder), "LOGNAME": "somebody"}
    if there:
        with sqlite3.connect(folder / "aibridge.db") as database:
            database.execute("CREATE TABLE x (y)")
        database.close()
    folder.chmod(0o500)
    try:
        process = subprocess.run(
            [sys.executable, "-c", _WITHOUT_PRIVILEGE, *serve],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
    finally:
        folder.chmod(0o700)
    assert process.returncode not in (0, -signal.SIGTERM)
    assert "Permission denied" in process.stderr
    assert "listening on" not in process.stderr
