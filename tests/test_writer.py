"""The writer: one queue, one thread, one commit for all that has gathered; to the spool what the store does not take.

Truth: design.md section 2 ("Recording"): in order, through one bounded queue, in groups, durable before done, spooled
and replayed when the database cannot take records, lost only when that fails too, and then counted.
"""

import asyncio
import errno
import os
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from aibridge.errors import RecordingFailed
from aibridge.events import RecordLost
from aibridge.recording import writer as writer_module
from aibridge.recording.base import RecordsLost
from aibridge.recording.spool import Spool
from aibridge.recording.writer import StoreUnavailable, Writer
from aibridge.records import Record
from tests.support.provider import WAIT_SECONDS
from tests.support.records import ended, one_of_each, prompt, start, usage
from tests.support.store import MemoryStore, Told


class FullSpool(Spool):
    """A spool on a disk that may be full, or have room for little."""

    full = False
    short = False
    attempts = 0

    @property
    def is_short_of_room(self) -> bool:
        return self.short

    def append(self, records: Sequence[Record]) -> Mapping[int, str]:
        self.attempts += 1
        if self.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().append(records)


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "_RETRY_STORE_SECONDS", 0.02)
    monkeypatch.setattr(writer_module, "_PAUSE_SECONDS", 0.005)


@pytest.fixture
def store() -> Iterator[MemoryStore]:
    store = MemoryStore()
    yield store
    store.gate.set()


@pytest.fixture
def spool(tmp_path: Path) -> FullSpool:
    return FullSpool(tmp_path)


@asynccontextmanager
async def running(store: MemoryStore, spool: Spool, max_queued: int = 10_000) -> AsyncIterator[Writer]:
    writer = Writer(store, spool, max_queued=max_queued)
    await writer.start()
    try:
        yield writer
    finally:
        store.gate.set()
        await writer.stop()


async def within_bounds(*awaitables: Awaitable[None]) -> list[BaseException | None]:
    """What became of each: None, or what it raised."""
    async with asyncio.timeout(WAIT_SECONDS):
        return await asyncio.gather(*awaitables, return_exceptions=True)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_SECONDS):
        while not condition():
            await asyncio.sleep(0.001)


async def stuck(store: MemoryStore, writer: Writer) -> asyncio.Future[None]:
    """A record whose write has begun and does not end before the gate opens."""
    store.gate.clear()
    store.entered.clear()
    future = writer.submit(start("stuck"))
    await until(store.entered.is_set)
    return future


# ---- durable, in order, in groups ----


async def test_a_record_is_done_when_it_is_committed(store: MemoryStore, spool: FullSpool) -> None:
    async with running(store, spool) as writer:
        future = await stuck(store, writer)
        assert not future.done() and store.records == []
        store.gate.set()
        await within_bounds(future)
        assert store.records == [start("stuck")]
        assert store.instances == [spool.instance]


async def test_what_gathers_during_one_commit_is_the_next_one(store: MemoryStore, spool: FullSpool) -> None:
    async with running(store, spool) as writer:
        futures = [await stuck(store, writer)]
        futures += [writer.submit(usage(str(n))) for n in range(499)]
        store.gate.set()
        assert await within_bounds(*futures) == [None] * 500
    assert [len(commit) for commit in store.commits] == [1, 499]
    assert store.records == [start("stuck"), *(usage(str(n)) for n in range(499))]


async def test_one_commit_takes_a_thousand_at_most(store: MemoryStore, spool: FullSpool) -> None:
    async with running(store, spool) as writer:
        futures = [await stuck(store, writer)]
        futures += [writer.submit(usage(str(n))) for n in range(2500)]
        store.gate.set()
        await within_bounds(*futures)
    assert [len(commit) for commit in store.commits] == [1, 1000, 1000, 500]


async def test_records_that_are_submitted_together_share_a_future_and_a_commit(store: MemoryStore, spool: FullSpool) -> None:
    async with running(store, spool) as writer:
        futures = [await stuck(store, writer)]
        futures += [writer.submit(usage(f"{n} a"), usage(f"{n} b"), ended(str(n))) for n in range(400)]
        store.gate.set()
        assert await within_bounds(*futures) == [None] * 401
    # As many as it takes to reach a thousand; what came together is not torn apart.
    assert [len(commit) for commit in store.commits] == [1, 1002, 198]
    assert store.records[1:4] == [usage("0 a"), usage("0 b"), ended("0")]


async def test_a_cancelled_wait_does_not_lose_the_record(store: MemoryStore, spool: FullSpool) -> None:
    async with running(store, spool) as writer:
        first = await stuck(store, writer)
        second = writer.submit(usage("kept"))
        assert first.cancel() and second.cancel()
        store.gate.set()
        await within_bounds(writer.submit(usage("later")))
    assert store.records == [start("stuck"), usage("kept"), usage("later")]


# ---- the bound ----


async def test_a_full_queue_holds_back_what_begins_and_not_what_is_under_way(store: MemoryStore, spool: FullSpool) -> None:
    async with running(store, spool, max_queued=10) as writer:
        futures = [await stuck(store, writer)]
        futures += [writer.submit(start(f"s{n}")) for n in range(15)]
        futures += [writer.submit(ended("stuck"))]
        assert writer._queue.qsize() == 11  # ten starts, and the end of one under way
        store.gate.set()
        await within_bounds(*futures)
    begun = [start(f"s{n}") for n in range(15)]
    assert store.records == [start("stuck"), *begun[:10], ended("stuck"), *begun[10:]]


async def test_the_queue_stays_bounded_while_it_drains(store: MemoryStore, spool: FullSpool) -> None:
    longest = 0
    async with running(store, spool, max_queued=10) as writer:
        futures = [await stuck(store, writer)]
        for n in range(200):
            futures.append(writer.submit(start(f"s{n}")))
            futures[-1].add_done_callback(lambda _: sizes.append(writer._queue.qsize()))
        sizes = [writer._queue.qsize()]
        store.gate.set()
        await within_bounds(*futures)
        longest = max(sizes)
    assert longest <= 10
    assert store.records == [start("stuck"), *(start(f"s{n}") for n in range(200))]


async def test_stopping_takes_in_what_was_held_back(store: MemoryStore, spool: FullSpool) -> None:
    async with running(store, spool, max_queued=2) as writer:
        futures = [await stuck(store, writer), *(writer.submit(start(f"s{n}")) for n in range(9))]
        stopping = asyncio.create_task(writer.stop())
        await asyncio.sleep(0)
        store.gate.set()
        await within_bounds(stopping, *futures)
    assert len(store.records) == 10


# ---- the spool ----


async def test_what_the_store_does_not_take_is_durable_in_the_spool(store: MemoryStore, spool: FullSpool) -> None:
    async with running(store, spool) as writer:
        store.unavailable = True
        records = one_of_each()
        assert await within_bounds(*(writer.submit(record) for record in records)) == [None] * len(records)
        assert store.records == []
        assert spool.waiting == next(spool.directory.glob("*.jsonl")).stat().st_size > 0
        store.unavailable = False
        await until(lambda: spool.waiting == 0)  # nobody has to come for it
        assert store.records == records
        assert await within_bounds(writer.submit(usage("direct"))) == [None]
        assert store.records == [*records, usage("direct")]
        assert spool.attempts == 1


async def test_what_comes_later_goes_behind_what_is_spooled(store: MemoryStore, spool: FullSpool) -> None:
    async with running(store, spool) as writer:
        store.unavailable = True
        expected = [usage(str(n)) for n in range(300)]
        for n, record in enumerate(expected):
            await within_bounds(writer.submit(record))
            store.unavailable = n % 100 != 99
        store.unavailable = False
        await until(lambda: spool.waiting == 0)
    assert store.records == expected


async def test_nothing_overtakes_what_is_spooled_though_the_store_would_take_it(
    store: MemoryStore, spool: FullSpool, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = store.write

    def not_the_first(records: Sequence[Record], instance: str) -> Mapping[int, str]:
        if usage("a") in records and stubborn:
            raise StoreUnavailable("not yet")
        return commit(records, instance)

    stubborn = True
    monkeypatch.setattr(store, "write", not_the_first)
    async with running(store, spool) as writer:
        await within_bounds(writer.submit(usage("a")))
        monkeypatch.setattr(writer_module, "_RETRY_STORE_SECONDS", 0.0)  # always due
        await until(lambda: writer._store_is_due)
        assert await within_bounds(writer.submit(usage("b"))) == [None]
        assert store.records == []
        stubborn = False
    assert store.records == [usage("a"), usage("b")]


async def test_a_replay_that_breaks_off_goes_on_where_it_was(
    store: MemoryStore, spool: FullSpool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aibridge.recording.spool._BATCH", 2)
    async with running(store, spool) as writer:
        store.unavailable = True
        await within_bounds(*(writer.submit(usage(str(n))) for n in range(6)))
        commit = store.write

        def fails_at_the_third(records: Sequence[Record], instance: str) -> Mapping[int, str]:
            if records[0] == usage("4") and refusals:
                raise refusals.pop()
            return commit(records, instance)

        refusals = [StoreUnavailable("again")]
        monkeypatch.setattr(store, "write", fails_at_the_third)
        store.unavailable = False
        await until(lambda: spool.waiting == 0)
    assert store.records == [usage(str(n)) for n in range(6)]


async def test_what_is_spooled_at_the_end_is_replayed_before_the_end(store: MemoryStore, spool: FullSpool) -> None:
    async with running(store, spool) as writer:
        store.unavailable = True
        await within_bounds(writer.submit(usage("a")))
        store.unavailable = False
    assert store.records == [usage("a")]
    assert list(spool.directory.iterdir()) == []


async def test_what_cannot_be_replayed_at_the_end_is_there_for_the_next_process(
    store: MemoryStore, spool: FullSpool, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(store, spool) as writer:
        store.unavailable = True
        await within_bounds(*(writer.submit(record) for record in one_of_each()))
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        "the database cannot take records, they go to the spool: told to be"  # said once, not every time
    ]
    left = spool.instance
    fresh = MemoryStore()
    async with running(fresh, Spool(spool.directory)):
        assert fresh.records == one_of_each()
        assert fresh.instances == [left]


# ---- lost, and counted ----


async def test_with_neither_store_nor_spool_a_record_is_lost_after_a_while(
    store: MemoryStore, spool: FullSpool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "_GIVE_UP_SECONDS", 0.1)
    async with running(store, spool) as writer:
        store.unavailable = spool.full = True
        outcomes = await within_bounds(writer.submit(start()), writer.submit(usage()))
        assert [type(outcome) for outcome in outcomes] == [RecordingFailed] * 2
        assert outcomes[0] is not outcomes[1]
        assert "No space left" in str(outcomes[0])
        assert writer.failing
        patience, spool.attempts = spool.attempts, 0
        assert patience > 1
        assert writer.problem == "neither database nor spool take records"
        await within_bounds(writer.submit(usage("again")))  # it is known by now, nobody has to wait for it again
        assert spool.attempts == 1
        store.unavailable = False
        await until(lambda: writer.problem is None)  # which it finds out by itself
        assert await within_bounds(writer.submit(usage("kept"))) == [None]
    assert store.records == [usage("kept")]
    assert Writer(store, spool).problem == "the database is not open"


async def test_what_still_fits_is_kept_and_does_not_mean_that_all_would(
    store: MemoryStore, spool: FullSpool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "_GIVE_UP_SECONDS", 0.1)
    async with running(store, spool) as writer:
        assert not writer.failing
        store.unavailable = store.full = spool.full = spool.short = True
        assert await within_bounds(writer.submit(usage("lost"))) != [None]
        assert writer.failing
        spool.full = False
        assert await within_bounds(writer.submit(usage("kept"))) == [None]
        store.unavailable = False
        assert await within_bounds(writer.submit(usage("kept too"))) == [None]
        assert writer.failing and writer.problem is not None
        spool.short = False
        await until(lambda: writer.problem is None and not writer.failing)
    assert store.records == [usage("kept"), usage("kept too")]


async def test_a_database_that_was_only_locked_is_believed_when_it_is_back(
    store: MemoryStore, spool: FullSpool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has room of its own: what the spool would have is of no account."""
    monkeypatch.setattr(writer_module, "_GIVE_UP_SECONDS", 0.1)
    async with running(store, spool) as writer:
        store.unavailable = spool.full = spool.short = True
        assert await within_bounds(writer.submit(usage("lost"))) != [None]
        store.unavailable = False
        await until(lambda: writer.problem is None and not writer.failing)


async def test_a_batch_that_is_kept_in_the_end_leaves_no_doubt(store: MemoryStore, spool: FullSpool) -> None:
    """Nothing was lost, though there was no room for it in the spool for a while."""
    async with running(store, spool) as writer:
        store.unavailable = store.full = spool.full = spool.short = True
        kept = writer.submit(usage("kept"))
        await until(lambda: spool.attempts > 1)
        store.unavailable = False
        assert await within_bounds(kept) == [None]
        assert not writer.failing and writer.problem is None


async def test_a_short_want_of_room_loses_nothing(store: MemoryStore, spool: FullSpool) -> None:
    async with running(store, spool) as writer:
        store.unavailable = spool.full = True
        future = writer.submit(usage())
        await until(lambda: spool.attempts > 3)
        spool.full = False
        assert await within_bounds(future) == [None]


async def test_patience_begins_anew_after_every_success(
    store: MemoryStore, spool: FullSpool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "_GIVE_UP_SECONDS", 0.1)
    async with running(store, spool) as writer:
        store.unavailable = spool.full = True
        future = writer.submit(usage("a"))
        await until(lambda: spool.attempts > 0)
        since = time.monotonic()
        spool.full = False
        assert await within_bounds(future) == [None]
        await until(lambda: time.monotonic() > since + 0.1)
        spool.full, spool.attempts = True, 0
        assert [type(outcome) for outcome in await within_bounds(writer.submit(usage("b")))] == [RecordingFailed]
        assert spool.attempts > 1


async def test_poison_loses_itself_only(store: MemoryStore, spool: FullSpool) -> None:
    async with running(store, spool) as writer:
        futures = [await stuck(store, writer)]
        futures += [writer.submit(usage(n)) for n in ("a", "poison 1", "b", "poison 2", "c")]
        store.gate.set()
        outcomes = await within_bounds(*futures)
    assert [type(outcome) for outcome in outcomes if outcome is not None] == [RecordingFailed] * 2
    assert outcomes[2] is not None and outcomes[4] is not None
    assert store.records == [start("stuck"), usage("a"), usage("b"), usage("c")]


async def test_who_submitted_poison_among_others_is_told_which(store: MemoryStore, spool: FullSpool) -> None:
    async with running(store, spool) as writer:
        futures = [await stuck(store, writer)]
        futures.append(writer.submit(usage("a"), usage("b")))
        futures.append(writer.submit(usage("poison 1"), usage("c"), usage("poison 2")))
        futures.append(writer.submit(usage("poison 3")))
        store.gate.set()
        *kept, several, single = await within_bounds(*futures)
    assert kept == [None, None]
    assert isinstance(several, RecordsLost) and sorted(several.lost) == [0, 2]
    assert "Poison" in several.lost[0] and "Poison" in str(single)
    assert type(single) is RecordingFailed
    assert store.records == [start("stuck"), usage("a"), usage("b"), usage("c")]


async def test_with_neither_store_nor_spool_all_that_came_together_is_lost(
    store: MemoryStore, spool: FullSpool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "_GIVE_UP_SECONDS", 0.0)
    async with running(store, spool) as writer:
        store.unavailable = spool.full = True
        (outcome,) = await within_bounds(writer.submit(usage("a"), usage("b")))
        assert isinstance(outcome, RecordsLost) and sorted(outcome.lost) == [0, 1]
        store.unavailable = False


async def test_poison_for_the_spool_loses_itself_only(store: MemoryStore, spool: FullSpool) -> None:
    async with running(store, spool) as writer:
        store.unavailable = True
        records = [usage("a"), usage("x", metadata={"x": object()}), usage("b")]
        outcomes = await within_bounds(*(writer.submit(record) for record in records))
        assert [type(outcome) for outcome in outcomes] == [type(None), RecordingFailed, type(None)]
        store.unavailable = False
        await until(lambda: spool.waiting == 0)
    assert store.records == [usage("a"), usage("b")]


async def test_what_turns_out_to_be_poison_in_the_replay_is_reported(store: MemoryStore, spool: FullSpool) -> None:
    told = Told()
    async with running(store, spool) as writer:
        writer.report_to(told.append)
        store.unavailable = True
        records = [usage("a"), usage("poison"), usage("b")]
        assert await within_bounds(*(writer.submit(record) for record in records)) == [None] * 3
        store.unavailable = False
        await until(lambda: told.replayed == 2)
        assert told.losses == [RecordLost.of(usage("poison"))]
        assert sum(count for to, count in told.written if to == "spool") == 3
    assert store.records == [usage("a"), usage("b")]


async def test_a_spool_that_somebody_damaged_is_reported_and_stops_nobody(store: MemoryStore, spool: FullSpool) -> None:
    told = Told()
    async with running(store, spool) as writer:
        writer.report_to(told.append)
        store.unavailable = True
        await within_bounds(writer.submit(usage("a")))
        os.truncate(next(spool.directory.glob("*.jsonl")), 5)
        store.unavailable = False
        await until(lambda: told.losses == [RecordLost.of(None)])
        assert await within_bounds(writer.submit(usage("b"))) == [None]
        assert told.replayed == 0
    assert store.records == [usage("b")]


async def test_a_bug_in_the_store_fails_the_batch_and_not_the_thread(store: MemoryStore, spool: FullSpool) -> None:
    async with running(store, spool) as writer:
        store.bug = ZeroDivisionError()
        assert [type(outcome) for outcome in await within_bounds(writer.submit(usage("a")))] == [RecordingFailed]
        store.bug = None
        assert await within_bounds(writer.submit(usage("b"))) == [None]


# ---- what it tells ----


async def test_it_tells_of_each_write_after_who_waited_for_it(store: MemoryStore, spool: FullSpool) -> None:
    told: list[tuple[Any, bool]] = []
    async with running(store, spool) as writer:
        store.gate.clear()
        first = writer.submit(usage("a"))
        writer.report_to(lambda event: told.append((event, first.done())))
        await asyncio.to_thread(store.entered.wait, WAIT_SECONDS)
        rest = [writer.submit(usage("b"), usage("poison")), writer.submit(usage("c"))]
        assert writer.queued == 2
        store.gate.set()
        await within_bounds(*rest)
        assert writer.queued == 0
    (one, others) = told
    assert (one[0].records, one[0].to, one[1]) == (1, "database", True)
    assert (others[0].records, others[0].to, others[1]) == (2, "database", True)
    assert one[0].seconds > 0 and others[0].seconds > 0


async def test_what_cannot_be_kept_was_not_written(
    store: MemoryStore, spool: FullSpool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "_GIVE_UP_SECONDS", 0.0)
    told = Told()
    async with running(store, spool) as writer:
        writer.report_to(told.append)
        store.unavailable = spool.full = True
        assert [type(outcome) for outcome in await within_bounds(writer.submit(usage("a")))] == [RecordingFailed]
    assert told == []


async def test_what_the_spool_holds(store: MemoryStore, spool: FullSpool) -> None:
    async with running(store, spool) as writer:
        assert writer.spool_bytes == 0
        store.unavailable = True
        await within_bounds(writer.submit(usage("a")))
        assert writer.spool_bytes == spool.waiting > 0
        store.unavailable = False
        await until(lambda: writer.spool_bytes == 0)


# ---- the beginning and the end ----


async def test_a_start_takes_over_what_the_dead_have_left(store: MemoryStore, tmp_path: Path) -> None:
    dead = Spool(tmp_path)
    dead.acquire()
    dead.append(one_of_each())
    assert dead._file is not None
    os.close(dead._file)
    path = next(tmp_path.glob("*.jsonl"))
    with path.open("ab") as file:
        file.write(b"damaged\n")
    told = Told()
    mine = Spool(tmp_path)
    writer = Writer(store, mine)
    writer.report_to(told.append)
    await writer.start()
    assert (store.records, store.instances, store.alive) == (one_of_each(), [dead.instance], [[mine.instance]])
    await until(lambda: told.losses == [RecordLost.of(None)] and told.replayed == len(one_of_each()))
    assert not path.exists()
    await writer.stop()


async def test_a_start_has_patience_with_a_busy_database(store: MemoryStore, spool: FullSpool) -> None:
    store.busy_when_closing = 3
    async with running(store, spool):
        assert len(store.alive) == 4


async def test_a_start_has_no_endless_patience(
    store: MemoryStore, spool: FullSpool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "_GIVE_UP_SECONDS", 0.05)
    store.busy_when_closing = 10_000
    with pytest.raises(StoreUnavailable, match="busy"):
        await Writer(store, spool).start()
    assert list(spool.directory.iterdir()) == []
    assert store.closed == 1


async def test_a_store_that_does_not_open_fails_everybody_and_the_next_may_try_again(
    store: MemoryStore, spool: FullSpool
) -> None:
    writer = Writer(store, spool, max_queued=1)
    store.open_error = PermissionError(errno.EACCES, "Permission denied")
    outcomes = await within_bounds(writer.start(), *(writer.submit(start(str(n))) for n in range(3)))
    assert [type(outcome) for outcome in outcomes] == [PermissionError, *[RecordingFailed] * 3]
    await until(lambda: not any(thread.name == "aibridge-recorder" for thread in threading.enumerate()))
    store.open_error = None
    assert await within_bounds(writer.submit(start("b"))) == [None]
    await writer.stop()
    assert store.records == [start("b")]


async def test_it_opens_by_itself_and_again_after_it_was_stopped(store: MemoryStore, spool: FullSpool) -> None:
    writer = Writer(store, spool)
    await writer.stop()
    for name in ("a", "b"):
        assert await within_bounds(writer.submit(usage(name))) == [None]
        await writer.stop()
        await writer.stop()
    assert store.records == [usage("a"), usage("b")]
    assert len(store.alive) == store.closed == 2
    assert store.alive[0] != store.alive[1]


async def test_a_spool_file_that_cannot_be_removed_does_not_stop_the_end(
    store: MemoryStore, spool: FullSpool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken() -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    async with running(store, spool):
        monkeypatch.setattr(spool, "release", broken)
    assert store.closed == 1
    assert "the spool file cannot be removed" in caplog.text


async def test_stopping_writes_what_is_queued_and_loses_nothing_that_comes_meanwhile(
    store: MemoryStore, spool: FullSpool
) -> None:
    writer = Writer(store, spool)
    await writer.start()
    futures = [await stuck(store, writer), *(writer.submit(usage(str(n))) for n in range(1500))]
    stopping = asyncio.create_task(writer.stop())
    await asyncio.sleep(0)
    futures.append(writer.submit(usage("late")))
    store.gate.set()
    assert set(await within_bounds(stopping, *futures)) == {None}
    await writer.stop()
    assert store.records[-1] == usage("late") and len(store.records) == 1502


def test_an_event_loop_that_ends_early_takes_nothing_with_it(store: MemoryStore, spool: FullSpool) -> None:
    async def leave() -> Writer:
        writer = Writer(store, spool)
        await writer.start()
        forgotten = [await stuck(store, writer)]
        forgotten.append(writer.submit(usage("a")))
        return writer

    async def come_back(writer: Writer) -> None:
        store.gate.set()
        assert await within_bounds(writer.submit(prompt("b"))) == [None]
        await writer.stop()

    asyncio.run(come_back(asyncio.run(leave())))
    assert store.records == [start("stuck"), usage("a"), prompt("b")]
