"""The spool: records that the database cannot take are on disk, and its lock says who lives.

Truth: design.md section 2 ("a spool file on disk that is replayed when it can", "a process that starts finds
interceptions that a dead process left open"). That a damaged line is skipped and counted, and stops nobody from starting,
is our choice. That the kernel lets go of a dead process's lock is flock(2); `test_sqlite_recorder` shows it with SIGKILL.
"""

import errno
import fcntl
import os
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from aibridge.recording import spool as spool_module
from aibridge.recording.spool import Spool
from aibridge.records import Record
from tests.support.records import one_of_each, prompt, start, usage

# What no decoder gives back as it was: white space, a number beyond every float, duplicate keys, an escape.
ODD = b'{\n  "input_tokens": 1.0e2,\r\n  "a": 1e400, "a": 123456789012345678901234567890, "s": "\\u00e9"\n}'


def opened(directory: Path) -> Spool:
    spool = Spool(directory)
    spool.acquire()
    return spool


def waiting(spool: Spool) -> list[Record]:
    """All records that wait, which are then forgotten."""
    found: list[Record] = []
    while (batch := spool.next_batch()) is not None:
        found += batch.records
        spool.forget(batch)
    return found


def the_file(directory: Path) -> Path:
    (path,) = directory.glob("*.jsonl")
    return path


def die(spool: Spool) -> None:
    """What the kernel does for a process that is killed."""
    assert spool._file is not None
    os.close(spool._file)


def encoded(records: Sequence[Record]) -> list[bytes]:
    return [msgspec.json.encode(record) for record in records]


def test_records_come_back_as_they_went_in(tmp_path: Path) -> None:
    spool = opened(tmp_path)
    assert spool.append(one_of_each()) == {}
    assert spool.waiting == the_file(tmp_path).stat().st_size > 0
    assert encoded(waiting(spool)) == encoded(one_of_each())
    assert spool.waiting == the_file(tmp_path).stat().st_size == 0


def test_what_a_provider_wrote_stays_as_it_was_but_for_line_feeds(tmp_path: Path) -> None:
    spool = opened(tmp_path)
    spool.append([usage(metadata={"usage": msgspec.Raw(ODD), "model": "m"}), prompt()])
    first, second = waiting(spool)
    assert bytes(first.metadata["usage"]) == ODD.replace(b"\n", b" ")  # type: ignore[union-attr]
    assert second == prompt()


def test_what_is_appended_while_others_are_read_comes_after_them(tmp_path: Path) -> None:
    spool = opened(tmp_path)
    spool.append([start("a")])
    batch = spool.next_batch()
    assert batch is not None
    spool.append([start("b")])
    spool.forget(batch)
    assert waiting(spool) == [start("b")]


def test_only_what_has_no_json_form_is_refused(tmp_path: Path) -> None:
    loop: dict[str, Any] = {}
    loop["loop"] = loop
    spool = opened(tmp_path)
    odd = [start("text", initiator_id="\ud800"), start("type", metadata={"x": object()}), start("depth", metadata=loop)]
    assert spool.append([start("a"), *odd, start("b")]) == {
        1: "UnicodeEncodeError",
        2: "TypeError",
        3: "RecursionError",
    }
    assert waiting(spool) == [start("a"), start("b")]


def test_an_integer_over_64_bits_survives(tmp_path: Path) -> None:
    spool = opened(tmp_path)
    assert spool.append([usage(input_tokens=2**70)]) == {}
    assert waiting(spool) == [usage(input_tokens=2**70)]


@pytest.mark.parametrize("truncates", [True, False])
def test_an_append_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, truncates: bool) -> None:
    def full(file: int, data: memoryview, offset: int) -> int:
        if offset > before + 9:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(file, data[:10], offset)

    def broken(file: int, length: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    spool = opened(tmp_path)
    spool.append([start("a")])
    before, write = spool.waiting, os.pwrite
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        if not truncates:
            patch.setattr(os, "ftruncate", broken)
        with pytest.raises(OSError, match="No space left"):
            spool.append([start("lost"), start("lost too")])
    assert spool.waiting == before
    assert (the_file(tmp_path).stat().st_size == before) is truncates
    spool.append([start("b")])
    assert waiting(spool) == [start("a"), start("b")]


def test_a_disk_that_has_room_for_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That what is small still fits does not mean that the next large record will."""
    write, room = os.pwrite, 1000

    def full(file: int, data: memoryview, offset: int) -> int:
        if len(data) > room:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(file, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=room // 10, f_frsize=10))
    spool = opened(tmp_path)
    assert not spool.is_short_of_room
    with pytest.raises(OSError, match="No space left"):
        spool.append([start("x" * 5000)])
    assert spool.append([start("b")]) == {}
    assert spool.is_short_of_room
    room = 10_000
    assert not spool.is_short_of_room
    assert spool.append([start("x" * 5000)]) == {}


def test_a_line_that_a_crash_cut_off_was_never_promised(tmp_path: Path) -> None:
    dead = opened(tmp_path)
    dead.append([start("a")])
    with the_file(tmp_path).open("ab") as file:
        file.write(msgspec.json.encode(start("torn"))[:-5])
    die(dead)
    (batch,) = opened(tmp_path).left_behind()
    assert (batch.instance, batch.records, batch.damaged) == (dead.instance, [start("a")], 0)


DAMAGE = {
    "zeros": b"\0" * 40,
    "half a record": b"{",
    "not Unicode": b"\xff",
    "no object": b"[]",
    "too deep": b"[" * 100_000,
    "of a later version": b'{"type":"Later","id":"x"}',
    "without its fields": b'{"type":"Interception"}',
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_line_is_skipped_and_counted(tmp_path: Path, damage: bytes) -> None:
    dead = opened(tmp_path)
    dead.append([start("a")])
    with the_file(tmp_path).open("ab") as file:
        file.write(damage + b"\n" + msgspec.json.encode(start("b")) + b"\n")
    die(dead)
    (batch,) = opened(tmp_path).left_behind()
    assert (batch.records, batch.damaged) == ([start("a"), start("b")], 1)


def test_a_file_that_somebody_cut_short_counts_as_damaged(tmp_path: Path) -> None:
    spool = opened(tmp_path)
    spool.append([start("a")])
    os.truncate(the_file(tmp_path), 3)
    batch = spool.next_batch()
    assert batch is not None and (batch.records, batch.damaged) == ((), 1)
    spool.forget(batch)
    spool.append([start("b")])
    assert waiting(spool) == [start("b")]


def test_batches_are_bounded_by_count_and_by_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool_module, "_BATCH", 3)
    monkeypatch.setattr(spool_module, "_BATCH_BYTES", 5000)
    dead = opened(tmp_path)
    dead.append([*(prompt(str(n)) for n in range(7)), prompt("long", prompt="x" * 5000), prompt("last")])
    die(dead)
    batches = [[record.id for record in batch.records] for batch in opened(tmp_path).left_behind()]  # type: ignore[union-attr]
    assert batches == [["0", "1", "2"], ["3", "4", "5"], ["6", "long"], ["last"]]


def test_the_living_are_left_alone_and_the_dead_taken_over(tmp_path: Path) -> None:
    living, dead, idle = opened(tmp_path), opened(tmp_path), opened(tmp_path)
    living.append([start("living")])
    dead.append([start("dead")])
    die(dead)
    die(idle)
    mine = opened(tmp_path)
    assert sorted(mine.alive()) == sorted([mine.instance, living.instance])
    assert [(batch.instance, batch.records) for batch in mine.left_behind()] == [(dead.instance, [start("dead")])]
    assert {path.stem for path in tmp_path.glob("*.jsonl")} == {mine.instance, living.instance}
    assert waiting(living) == [start("living")]


def test_a_dead_mans_file_stays_until_its_records_are_written(tmp_path: Path) -> None:
    dead = opened(tmp_path)
    dead.append([start("a")])
    die(dead)
    mine = opened(tmp_path)
    taking_over = mine.left_behind()
    next(taking_over)
    taking_over.close()  # the database would not take them
    assert [batch.records for batch in mine.left_behind()] == [[start("a")]]
    assert list(mine.left_behind()) == []


def test_a_file_that_vanishes_while_others_look_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spool = opened(tmp_path)
    monkeypatch.setattr(spool, "_others", lambda: [tmp_path / "gone.jsonl"])
    assert list(spool.left_behind()) == []
    assert spool.alive() == [spool.instance]


def test_a_file_has_its_lock_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a process that starts at the same time takes it for a dead one's, and removes it."""
    seen: list[list[Path]] = []
    flock = fcntl.flock

    def watched(file: int, operation: int) -> None:
        seen.append(list(tmp_path.glob("*.jsonl")))
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", watched)
    opened(tmp_path)
    assert seen == [[]]
    assert the_file(tmp_path).exists()


@pytest.mark.parametrize("directory_too", [False, True])
def test_deleted_under_our_feet_it_comes_back_with_all_that_it_held(tmp_path: Path, directory_too: bool) -> None:
    directory = tmp_path / "spool"
    spool = opened(directory)
    spool.append([start("a")])
    the_file(directory).unlink()
    if directory_too:
        directory.rmdir()
    spool.append([start("b")])
    other = opened(directory)
    assert sorted(other.alive()) == sorted([spool.instance, other.instance])
    die(spool)
    assert [batch.records for batch in other.left_behind()] == [[start("a"), start("b")]]


def test_released_empty_it_leaves_nothing(tmp_path: Path) -> None:
    spool = opened(tmp_path)
    spool.append([start("a")])
    waiting(spool)
    spool.release()
    spool.release()
    assert list(tmp_path.iterdir()) == []


def test_released_with_records_it_is_there_for_the_next_life(tmp_path: Path) -> None:
    spool = opened(tmp_path)
    spool.append([start("a")])
    first = spool.instance
    spool.release()
    spool.acquire()
    assert spool.instance != first
    assert spool.waiting == 0
    assert [(batch.instance, batch.records) for batch in spool.left_behind()] == [(first, [start("a")])]


def test_nobody_else_may_read_it(tmp_path: Path) -> None:
    spool = opened(tmp_path / "spool")
    spool.append([start("a")])
    assert (tmp_path / "spool").stat().st_mode & 0o777 == 0o700
    assert the_file(tmp_path / "spool").stat().st_mode & 0o777 == 0o600


def test_a_file_that_cannot_be_locked_is_not_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(file: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(OSError, match="No locks available"):
        opened(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_acquired_leaves_nothing_open(tmp_path: Path) -> None:
    (tmp_path / "spool").write_text("a file where the directory should be")
    spool = Spool(tmp_path / "spool")
    with pytest.raises(FileExistsError):
        spool.acquire()
    with pytest.raises(FileExistsError):
        spool.append([start("a")])
    assert spool.next_batch() is None
    spool.release()
