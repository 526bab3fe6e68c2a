"""The way of the log's lines out of the process, with real pipes.

Truth: write(2), pipe(7) and poll(2) for what a pipe does; that a reader who does not read costs lines, and never the streams
of users, is our choice (docs/operations.md).
"""

import asyncio
import fcntl
import os
import pty
import select
import socket
import sys
import termios
import threading
import tty
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import pytest

from aibridge.logwriter import LineWriter
from tests.support.gateway import wait_until


def lost(count: int) -> bytes:
    return b"lost %d\n" % count


class Pipe:
    """A pipe, which is read when the test reads."""

    def __init__(self) -> None:
        self.read, self.write = os.pipe()
        os.set_blocking(self.read, False)

    @property
    def lines(self) -> list[bytes]:
        """What can be read now."""
        found = b""
        while True:
            try:
                more = os.read(self.read, 65536)
            except BlockingIOError:
                return found.splitlines(keepends=True)
            if not more:
                return found.splitlines(keepends=True)
            found += more

    def fill(self) -> int:
        """Fill it, and answer with how much."""
        os.set_blocking(self.write, False)
        filled = 0
        try:
            while True:
                filled += os.write(self.write, b"." * select.PIPE_BUF)
        except BlockingIOError:
            return filled
        finally:
            os.set_blocking(self.write, True)

    def empty(self, size: int) -> None:
        while size:
            size -= len(os.read(self.read, size))

    def close(self) -> None:
        for file in (self.read, self.write):
            with suppress(OSError):  # a test has closed it
                os.close(file)


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    pipe = Pipe()
    yield pipe
    pipe.close()


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What each call of write(2) got."""
    found: list[bytes] = []
    write = os.write

    def noted(file: int, data: Any) -> int:
        found.append(bytes(data))
        return write(file, data)

    monkeypatch.setattr(os, "write", noted)
    return found


def collected(pipe: Pipe, count: int) -> list[bytes]:
    """So many lines, as soon as they have come."""
    found = b""

    def come() -> bool:
        nonlocal found
        found += b"".join(pipe.lines)
        return found.count(b"\n") >= count

    wait_until(come, f"{count} lines have not come")
    return found.splitlines(keepends=True)


def in_time(action: Callable[..., object], *arguments: object) -> None:
    """Do it, and fail where it waits: a write to a full pipe does so for ever."""
    thread = threading.Thread(target=action, args=arguments, daemon=True)
    thread.start()
    thread.join(30)
    assert not thread.is_alive(), "it waits"


def write_all(writer: LineWriter, *lines: bytes) -> None:
    for line in lines:
        writer.write(line)


def read(reader: IO[bytes], lines: list[bytes]) -> None:
    assert [reader.readline() for _ in lines] == lines


def settled(writer: LineWriter) -> None:
    """No thread waits any more."""
    wait_until(lambda: writer._waiter is None, "a thread still waits for room")


# ---- with a reader ----


def test_a_line_is_written_at_once(pipe: Pipe) -> None:
    writer = LineWriter(pipe.write, lost)
    writer.write(b"one\n")
    assert pipe.lines == [b"one\n"]
    writer.write(b"two\n")
    assert pipe.lines == [b"two\n"]


async def test_what_comes_in_one_turn_of_the_loop_is_one_write(pipe: Pipe, written: list[bytes]) -> None:
    writer = LineWriter(pipe.write, lost)
    for turn in range(2):
        for number in range(5):
            writer.gather(b"%d.%d\n" % (turn, number))
        assert pipe.lines == []
        await asyncio.sleep(0)
        assert pipe.lines == [b"%d.%d\n" % (turn, number) for number in range(5)]
    assert len(written) == 2


async def test_order_is_kept(pipe: Pipe) -> None:
    writer = LineWriter(pipe.write, lost)
    writer.gather(b"one\n")
    writer.write(b"two\n")
    writer.gather(b"three\n")
    await asyncio.sleep(0)
    assert pipe.lines == [b"one\n", b"two\n", b"three\n"]


async def test_whole_lines_in_pieces_that_a_pipe_keeps_together(pipe: Pipe, written: list[bytes]) -> None:
    writer = LineWriter(pipe.write, lost)
    lines = [b"%d%s\n" % (number, b"x" * 300) for number in range(100)]
    for line in lines:
        writer.gather(line)
    await asyncio.sleep(0)
    assert pipe.lines == lines
    assert all(len(piece) <= select.PIPE_BUF and piece.endswith(b"\n") for piece in written)
    assert len(written) == -(-100 // (select.PIPE_BUF // len(lines[-1])))


def test_a_long_line_is_one_write(pipe: Pipe, written: list[bytes]) -> None:
    """Other processes that write to the same pipe cannot come between, while there is room."""
    writer = LineWriter(pipe.write, lost)
    writer.write(b"x" * 20_000 + b"\n")
    assert [len(piece) for piece in written] == [20_001] == [len(line) for line in pipe.lines]


def test_lines_stay_whole_behind_the_news_that_others_are_lost(pipe: Pipe, written: list[bytes]) -> None:
    writer = LineWriter(pipe.write, lost)
    writer._lost = 3
    line = b"x" * (select.PIPE_BUF - 1) + b"\n"
    writer.write(line)
    assert written == [b"lost 3\n", line]


def test_many_threads(pipe: Pipe) -> None:
    """Each line is whole, none is missing, and those of one thread are in order, however slow the reader."""
    writer = LineWriter(pipe.write, lost)

    def say(name: int) -> None:
        for number in range(500):
            writer.write(b"%d %d %s\n" % (name, number, b"x" * 100))

    threads = [threading.Thread(target=say, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    found = collected(pipe, 2000)
    for thread in threads:
        thread.join()
    for name in range(4):
        assert [line for line in found if line.startswith(b"%d " % name)] == [
            b"%d %d %s\n" % (name, number, b"x" * 100) for number in range(500)
        ]
    settled(writer)


def test_a_file(tmp_path: Any) -> None:
    path = tmp_path / "log"
    file = os.open(path, os.O_CREAT | os.O_WRONLY)
    writer = LineWriter(file, lost)
    for number in range(1000):
        writer.gather(b"%d\n" % number)
    writer.close()
    os.close(file)
    assert path.read_bytes() == b"".join(b"%d\n" % number for number in range(1000))


def test_a_file_that_others_write_to(tmp_path: Path) -> None:
    """As a shell opens it for all that runs in its braces, without O_APPEND: all write at one place, which moves on."""
    file = os.open(tmp_path / "log", os.O_CREAT | os.O_WRONLY)
    writer = LineWriter(file, lost)
    for number in range(3):
        writer.write(b"ours %d\n" % number)
        os.write(file, b"theirs %d\n" % number)
    os.close(file)
    assert (tmp_path / "log").read_text().split("\n")[:3] == ["ours 0", "theirs 0", "ours 1"]


def test_what_a_writer_has_opened_goes_with_it(pipe: Pipe) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        before = open_files()
        writers = [LineWriter(file, lost) for file in (pipe.write, ours.fileno())]
        assert len(open_files()) == len(before) + (2 if sys.platform == "linux" else 1)
        writers.clear()
        assert open_files() == before


def open_files() -> set[str]:
    return {entry.name for entry in Path("/dev/fd").iterdir()}


# ---- without ----


class Always:
    """Says that there is room, whether there is or not: another process may take it between poll(2) and write(2)."""

    def poll(self, _: float) -> bool:
        return True


def test_nobody_reads_for_a_while(pipe: Pipe) -> None:
    writer = LineWriter(pipe.write, lost)
    filled = pipe.fill()
    in_time(write_all, writer, *(b"%d\n" % number for number in range(1000)))
    pipe.empty(filled)
    found = collected(pipe, 1000)
    assert found == [b"%d\n" % number for number in range(1000)]
    settled(writer)
    writer.write(b"after\n")
    assert pipe.lines == [b"after\n"]


def test_nobody_reads_and_the_event_loop_goes_on(pipe: Pipe) -> None:
    writer = LineWriter(pipe.write, lost)
    filled = pipe.fill()

    async def go_on() -> None:
        for number in range(3):
            writer.gather(b"%d\n" % number)
            await asyncio.sleep(0)

    in_time(asyncio.run, go_on())
    pipe.empty(filled)
    assert collected(pipe, 3) == [b"0\n", b"1\n", b"2\n"]
    settled(writer)


def test_a_long_line_does_not_wait_for_a_reader(pipe: Pipe) -> None:
    """As one with a traceback. What there is room for is written, and neither thread stands still meanwhile."""
    writer = LineWriter(pipe.write, lost)
    filled = pipe.fill()
    pipe.empty(select.PIPE_BUF)
    long = b"x" * 3 * select.PIPE_BUF + b"\n"
    in_time(write_all, writer, long, b"short\n")
    assert os.get_blocking(pipe.write), "what others use, too, stays as it is"
    pipe.empty(filled - select.PIPE_BUF)
    assert collected(pipe, 2) == [long, b"short\n"]
    settled(writer)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets a pipe be opened anew")
def test_another_process_takes_the_room(pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = LineWriter(pipe.write, lost, max_waiting=10)
    filled = pipe.fill()
    monkeypatch.setattr(writer, "_room", Always())
    in_time(write_all, writer, *(b"%d\n" % number for number in range(6)))
    pipe.empty(filled)
    assert collected(pipe, 6) == [b"lost 1\n", *(b"%d\n" % number for number in range(5))]
    settled(writer)


def test_another_process_takes_the_room_for_the_news_that_lines_are_lost(pipe: Pipe) -> None:
    """It is told when there is room again: nothing of it is forgotten, and no line comes twice."""
    writer = LineWriter(pipe.write, lost)
    writer._lost = 3
    sent: list[bytes] = []

    def put(data: bytes) -> int:
        if sent:
            return os.write(pipe.write, data)
        sent.append(data)
        raise BlockingIOError

    writer._put = put
    in_time(write_all, writer, b"one\n")
    assert collected(pipe, 2) == [b"lost 3\n", b"one\n"] and sent == [b"lost 3\none\n"]
    settled(writer)
    assert writer._size == 0


def test_a_pipe_that_cannot_be_opened_anew(pipe: Pipe, written: list[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """One of another user's, or without /proc: it gets as much at a time as poll(2) promises room for."""

    def forbidden(*_: object) -> int:
        raise PermissionError

    with monkeypatch.context() as changed:
        changed.setattr(os, "open", forbidden)
        writer = LineWriter(pipe.write, lost)
    filled = pipe.fill()
    pipe.empty(select.PIPE_BUF)
    written.clear()
    long = b"x" * 3 * select.PIPE_BUF + b"\n"
    in_time(write_all, writer, long, b"short\n")
    pipe.empty(filled - select.PIPE_BUF)
    assert collected(pipe, 2) == [long, b"short\n"]
    assert all(len(piece) <= select.PIPE_BUF for piece in written)
    settled(writer)


def test_a_socket_that_nobody_reads() -> None:
    """As of journald."""
    ours, theirs = socket.socketpair()
    lines = [b"%d%s\n" % (number, b"x" * 10_000) for number in range(100)]
    with ours, theirs, theirs.makefile("rb") as reader:
        writer = LineWriter(ours.fileno(), lost)
        in_time(write_all, writer, *lines)
        assert writer._lines and ours.getblocking()
        in_time(read, reader, lines)
        settled(writer)


def test_a_terminal_that_is_stopped() -> None:
    """With Ctrl-S (termios(3), tcflow)."""
    ours, theirs = pty.openpty()
    tty.setraw(theirs)
    lines = [b"%d%s\n" % (number, b"x" * 1000) for number in range(100)]
    writer = LineWriter(theirs, lost)
    termios.tcflow(theirs, termios.TCOOFF)
    in_time(write_all, writer, *lines)
    assert len(writer._lines) == len(lines)
    termios.tcflow(theirs, termios.TCOON)
    with os.fdopen(ours, "rb") as reader:
        in_time(read, reader, lines)
    settled(writer)
    os.close(theirs)


def test_nobody_reads_for_too_long(pipe: Pipe) -> None:
    """What is over the bound is lost, and that is said."""
    writer = LineWriter(pipe.write, lost, max_waiting=10)
    filled = pipe.fill()
    in_time(write_all, writer, *(b"%d\n" % number for number in range(10)))
    assert writer._size == 10
    pipe.empty(filled)
    found = collected(pipe, 6)
    assert found == [b"lost 5\n", *(b"%d\n" % number for number in range(5))]
    settled(writer)
    writer.write(b"after\n")
    assert pipe.lines == [b"after\n"]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets a pipe be made smaller")
def test_a_slow_reader_gets_everything(pipe: Pipe) -> None:
    fcntl.fcntl(pipe.write, fcntl.F_SETPIPE_SZ, 4096)
    writer = LineWriter(pipe.write, lost)
    lines = [b"%d%s\n" % (number, b"x" * 500) for number in range(200)]
    in_time(write_all, writer, *lines)
    assert collected(pipe, 200) == lines
    settled(writer)


def test_the_reader_has_gone(pipe: Pipe) -> None:
    writer = LineWriter(pipe.write, lost)
    os.close(pipe.read)
    writer.write(b"one\n")
    writer.write(b"two\n")
    assert not writer._lines and writer._lost == 2


def test_the_reader_has_gone_before_it_could_be_told_of_lost_lines(pipe: Pipe) -> None:
    writer = LineWriter(pipe.write, lost)
    writer._lost = 3
    os.close(pipe.read)
    in_time(write_all, writer, b"x" * select.PIPE_BUF)
    assert not writer._lines and (writer._size, writer._lost) == (0, 4)


def test_it_is_closed(pipe: Pipe) -> None:
    """As by ``2>&-``."""
    os.close(pipe.write)
    writer = LineWriter(pipe.write, lost)
    writer.write(b"one\n")
    assert not writer._lines and writer._lost == 1


def test_the_disk_was_full(pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a line is written, then nothing; afterwards it is said how many are missing."""
    writer = LineWriter(pipe.write, lost)
    write, room = os.write, [3, 0, 0]

    def full(file: int, data: bytes) -> int:
        if not room:
            return write(file, data)
        if size := room.pop(0):
            return write(file, data[:size])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    writer.write(b"one1\n")
    writer.write(b"two\n")
    writer.write(b"three\n")
    assert b"".join(pipe.lines) == b"one\nlost 2\nthree\n"


# ---- at the end ----


def test_the_end_waits_for_a_slow_reader(pipe: Pipe) -> None:
    writer = LineWriter(pipe.write, lost)
    filled = pipe.fill()
    in_time(write_all, writer, b"last\n")
    closing = threading.Thread(target=writer.close, args=(30,))
    closing.start()
    pipe.empty(filled)
    closing.join(30)
    assert not closing.is_alive() and pipe.lines == [b"last\n"]
    settled(writer)


def test_but_not_for_ever(pipe: Pipe) -> None:
    writer = LineWriter(pipe.write, lost)
    pipe.fill()
    in_time(write_all, writer, b"last\n")
    writer.close(0.01)
    assert list(writer._lines) == [b"last\n"]
    os.close(pipe.read)  # so that the thread ends
    settled(writer)


async def test_nothing_that_was_gathered_is_lost_at_the_end(pipe: Pipe) -> None:
    writer = LineWriter(pipe.write, lost)
    writer.gather(b"last\n")
    writer.close()
    assert pipe.lines == [b"last\n"]


def test_a_line_from_within_a_write(pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a destructor that runs just then: it waits for its turn."""
    writer = LineWriter(pipe.write, lost)
    write, said = os.write, [b"inner\n"]

    def interrupted(file: int, data: bytes) -> int:
        while said:
            writer.write(said.pop())
        return write(file, data)

    monkeypatch.setattr(os, "write", interrupted)
    in_time(write_all, writer, b"outer\n")
    assert pipe.lines == [b"outer\n", b"inner\n"]


def test_no_thread_can_be_started(pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """As at the very end of an interpreter (threading.Thread.start: RuntimeError). Who writes next tries again."""

    begin = threading.Thread.start

    def start(self: threading.Thread) -> None:
        if self.name == "log":
            raise RuntimeError("can't start new thread")
        begin(self)

    monkeypatch.setattr(threading.Thread, "start", start)
    writer = LineWriter(pipe.write, lost)
    filled = pipe.fill()
    in_time(write_all, writer, b"one\n")
    pipe.empty(filled)
    writer.write(b"two\n")
    assert pipe.lines == [b"one\n", b"two\n"]


def test_the_rest_of_a_line_comes_before_the_news_that_others_are_lost(pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal may end a write in its middle (signal(7), "Interruption of system calls")."""
    writer = LineWriter(pipe.write, lost, max_waiting=10)
    write, sizes = os.write, [3]

    def interrupted(file: int, data: bytes) -> int:
        if not sizes:
            return write(file, data)
        writer.write(b"too long by far\n")
        return write(file, data[: sizes.pop()])

    monkeypatch.setattr(os, "write", interrupted)
    writer.write(b"one1\n")
    writer.write(b"two\n")
    assert pipe.lines == [b"one1\n", b"lost 1\n", b"two\n"]
