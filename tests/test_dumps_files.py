"""Traffic dumps: the files, their bounds, and that making them harms nothing.

Truth: issue 5 (private, bounded in size and age), style.md habit 13 (looking at traffic never harms traffic); what becomes
of what does not fit is our choice (docs/operations.md).
"""

import gzip
import logging
import os
import threading
import time
from pathlib import Path

import pytest

from aibridge import dumps as dumps_module
from aibridge.dumpfolder import DumpFolder
from aibridge.dumps import TrafficDumps
from aibridge.providers import Provider
from aibridge.upstream import Body, MemoryResponse
from aibridge.wire.observer import ResponseHead
from tests.support.dumps import (
    KEY,
    PROVIDER,
    Uploading,
    answering,
    call,
    dump_of,
    dumped,
    dumps_in,
    pieces,
    reading,
    request,
    until,
)
from tests.support.provider import WAIT_SECONDS


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "dumps"


# ---- files ----


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o7777


async def test_files_are_private(folder: Path) -> None:
    before = os.umask(0)
    try:
        dump = await dump_of(folder, answering(), request())
    finally:
        os.umask(before)
    assert mode(folder) == 0o700 and mode(dump.path) == 0o600


async def refused(folder: Path, caplog: pytest.LogCaptureFixture) -> str:
    """What the log says of dumps that cannot be made; traffic goes on."""
    async with TrafficDumps(folder) as dumps:
        upstream = dumps.upstream(PROVIDER, answering(b"one", b"two"))
        for _ in range(3):
            assert await call(upstream, request()) == b"onetwo"
    (said,) = [record for record in caplog.records if "cannot be dumped" in record.getMessage()]
    assert said.levelno == logging.WARNING and said.exc_info is None
    return said.getMessage()


async def test_a_directory_that_others_can_read_is_refused(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder.mkdir()
    folder.chmod(0o755)
    assert "mode 700" in await refused(folder, caplog)
    assert mode(folder) == 0o755 and list(folder.iterdir()) == [], "it may be any directory, so it is left as it is"


async def test_a_link_is_not_followed(tmp_path: Path, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    folder.symlink_to(elsewhere)
    await refused(folder, caplog)
    assert list(elsewhere.iterdir()) == []


def test_a_file_that_is_there_is_not_written_to(tmp_path: Path, folder: Path) -> None:
    from datetime import UTC, datetime

    dumps = DumpFolder(folder, 1000, 60)
    at = datetime.now(UTC)
    name, file = dumps.create(at, "anthropic", "x")
    os.close(file)
    with pytest.raises(FileExistsError):
        dumps.create(at, "anthropic", "x")
    (folder / name).unlink()
    (folder / name).symlink_to(tmp_path / "target")
    with pytest.raises(FileExistsError):
        dumps.create(at, "anthropic", "x")
    assert not (tmp_path / "target").exists()


# ---- bounds ----


@pytest.mark.parametrize("streamed", [False, True])
async def test_one_dump_is_bounded(folder: Path, streamed: bool) -> None:
    body: Body = pieces(b"a" * 40, b"b" * 40) if streamed else b"a" * 40 + b"b" * 40
    upstream = Uploading(lambda _: MemoryResponse(ResponseHead(200, []), [b"c" * 15, b"d" * 15, b"e" * 15]))
    dump = await dump_of(folder, upstream, request(body), max_dump_bytes=100)
    assert dump.request.body == b"a" * 40 + b"b" * 40 and dump.request.truncated is None
    assert dump.response is not None and dump.response.body == b"c" * 15 + b"d" * 5
    assert dump.response.truncated == "length"
    assert dump.facts == {"outcome": "complete", "request-bytes": "80", "response-bytes": "45"}


async def test_a_request_that_is_cut(folder: Path) -> None:
    dump = await dump_of(folder, answering(b"x"), request(b"a" * 80), max_dump_bytes=50)
    assert dump.request.body == b"a" * 50 and dump.request.truncated == "length"
    assert dump.response is not None and dump.response.body == b"" and dump.response.truncated == "length"
    assert dump.facts["request-bytes"] == "80" and dump.facts["response-bytes"] == "1"


async def test_a_cut_does_not_show_a_part_of_a_secret(folder: Path) -> None:
    dump = await dump_of(folder, answering(b"x" * 10 + KEY.encode()), request(b""), max_dump_bytes=25)
    assert dump.response is not None and dump.response.body == b"x" * 10 + b"*" * 15


async def test_all_dumps_are_bounded_and_the_oldest_go(folder: Path) -> None:
    async with TrafficDumps(folder, max_bytes=100_000) as dumps:
        upstream = dumps.upstream(PROVIDER, answering())
        for index in range(20):
            await call(upstream, request(b"a" * 20_000, id=f"call-{index:02}"))
            await until(lambda count=index: any(f"call-{count:02}" in path.name for path in dumps_in(folder)))  # type: ignore[misc]
    left = dumps_in(folder)
    assert 2 < len(left) < 6 and sum(path.stat().st_size for path in left) <= 100_000
    assert [path.stem[-7:] for path in left] == [f"call-{index:02}" for index in range(20 - len(left), 20)]


async def test_old_dumps_go_and_nothing_else(folder: Path) -> None:
    """Also when nobody dumps any more: what is left of earlier dumps is looked after."""
    await dump_of(folder, answering(), request())
    (dump,) = dumps_in(folder)
    others = [folder / "notes.txt", folder / "mine.warc", folder / "20261122T101112.000000Z-x.warc.bak"]
    for path in others:
        path.touch()
    for path in [dump, *others]:
        os.utime(path, (time.time() - 7200,) * 2)
    async with TrafficDumps(folder, max_hours=3):
        pass
    assert dump.exists()
    async with TrafficDumps(folder, max_hours=1):
        pass
    assert sorted(folder.iterdir()) == sorted(others)


async def test_processes_share_a_directory(folder: Path) -> None:
    async with TrafficDumps(folder, max_bytes=60_000) as one, TrafficDumps(folder, max_bytes=60_000) as other:
        both = [dumps.upstream(PROVIDER, answering()) for dumps in (one, other)]
        for index in range(10):
            for which, upstream in enumerate(both):
                await call(upstream, request(b"a" * 10_000, id=f"{index}-{which}"))
    left = dumps_in(folder)
    assert left and sum(path.stat().st_size for path in left) <= 60_000
    assert all(dumped(path).facts["outcome"] == "complete" for path in left)


# ---- harm ----


async def test_a_provider_without_dumps_is_left_alone(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    upstream = answering()
    async with TrafficDumps(folder) as dumps:
        assert dumps.upstream(Provider.anthropic(), upstream) is upstream
    assert not folder.exists() and not caplog.records
    assert not any(thread.name == "aibridge-dumps" for thread in threading.enumerate())


async def test_who_dumps_is_warned(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    TrafficDumps(folder).upstream(PROVIDER, answering())
    (said,) = caplog.messages
    assert "anthropic" in said and str(folder) in said and "in clear" in said


async def test_trouble_with_the_disk_is_told_and_passes(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dumps_module, "_QUIET_SECONDS", 0)
    folder.write_text("a file")
    async with TrafficDumps(folder) as dumps:
        upstream = dumps.upstream(PROVIDER, answering(b"one"))
        assert await call(upstream, request()) == b"one"
        await until(lambda: "(2 so far)" in caplog.text)  # that it cannot be tidied is the first
        folder.unlink()
        assert await call(upstream, request()) == b"one"
    assert len(dumps_in(folder)) == 1 and "3 so far" not in caplog.text


async def test_without_a_thread_there_are_no_dumps(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cannot(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", cannot)
    upstream = TrafficDumps(folder).upstream(PROVIDER, answering(b"one"))
    assert await call(upstream, request()) == b"one" == await call(upstream, request())
    assert caplog.text.count("can't start new thread") == 1 and not folder.exists()


async def test_a_mistake_of_ours_costs_a_dump_and_is_told(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mistaken(*_: object) -> None:
        raise ZeroDivisionError

    async with TrafficDumps(folder) as dumps:
        upstream = dumps.upstream(PROVIDER, answering(b"one"))
        with monkeypatch.context() as patch:
            patch.setattr("aibridge.dumpfiles.masked_fields", mistaken)
            assert await call(upstream, request()) == b"one"
            await until(lambda: "ZeroDivisionError" in caplog.text)
        assert await call(upstream, request()) == b"one"
    assert len(dumps_in(folder)) == 1 and "Traceback" in caplog.text


async def test_a_full_disk_leaves_no_half_dump(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = os.pwrite

    def full(file: int, data: bytes, offset: int) -> int:
        if offset > 2000:
            raise OSError(28, os.strerror(28))
        return written(file, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    async with TrafficDumps(folder) as dumps:
        assert (
            await call(dumps.upstream(PROVIDER, answering(b"a" * 5000, b"b" * 5000)), request()) == b"a" * 5000 + b"b" * 5000
        )
    assert list(folder.iterdir()) == [] and "No space left" in caplog.text


async def test_a_disk_that_hangs_stops_nobody(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rest of what does not fit in memory is left out, and the dump says so; later calls have none."""
    stuck, create = threading.Event(), DumpFolder.create

    def hang(*arguments: object) -> tuple[str, int]:
        assert stuck.wait(WAIT_SECONDS)
        return create(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(DumpFolder, "create", hang)
    monkeypatch.setattr(dumps_module, "_MAX_WAITING", 100_000)
    async with TrafficDumps(folder) as dumps:
        upstream = dumps.upstream(PROVIDER, answering(*[b"x" * 10_000] * 20))
        for _ in range(3):
            assert len(await call(upstream, request())) == 200_000
        stuck.set()
    found = [dumped(path) for path in dumps_in(folder)]
    assert sum(len(one.response.body) for one in found if one.response) < 100_000
    for one in found:
        assert one.response is not None and one.response.truncated == "unspecified"
        assert one.facts["bytes-lost-because-the-writer-was-behind"] == str(200_000 - len(one.response.body))
        assert one.facts["response-bytes"] == "200000" and one.facts["outcome"] == "complete"
    assert len(found[0].response.body if found[0].response else b"") > 50_000
    assert caplog.text.count("faster than it is written") == 1


async def test_it_can_be_entered_again(folder: Path) -> None:
    """Between the two nothing is dumped, and traffic goes on."""
    dumps = TrafficDumps(folder)
    upstream = dumps.upstream(PROVIDER, answering(b"x"))
    for number in (1, 2):
        async with dumps:
            await call(upstream, request(id=str(number)))
        assert [dumped(path).facts["outcome"] for path in dumps_in(folder)] == ["complete"] * number
        assert await call(upstream, request(id="between")) == b"x"


async def test_held_bodies_count_as_waiting(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compressed streams are held until their end: many of them must not fill the memory."""
    monkeypatch.setattr(dumps_module, "_MAX_WAITING", 190_000)
    coded = gzip.compress(os.urandom(60_000))
    provider = answering(coded[:50_000], coded[50_000:], headers=[(b"content-encoding", b"gzip")])
    async with TrafficDumps(folder) as dumps:
        upstream = dumps.upstream(PROVIDER, provider)
        responses = [await upstream.send(request(id=str(index))) for index in range(4)]
        for response in responses:
            await until(lambda: not dumps._writer._queue)
            await response.read()
        for response in responses:
            assert [piece async for piece in reading(response)] == [coded[50_000:]]
        await until(lambda: not dumps._writer._queue)
        await call(upstream, request(id="later"))
    found = [dumped(path) for path in dumps_in(folder)]
    assert [one.facts["outcome"] for one in found] == ["complete"] * 5
    whole = [one.response is not None and one.response.truncated is None for one in found]
    assert whole == [True, True, True, False, True]
