"""Lines of the log on their way out, to standard error, which somebody reads, or nobody.

Theory of operation. Standard error is a file, or it leads to a program: a terminal, a container engine, journald. When that
program does not read, a pipe fills up, and the next write waits for as long; and with it, in most programs, everything else.
Here the streams of all users would stand still. So we write what there is room for, and do not wait. For that a pipe or a
terminal is opened anew: O_NONBLOCK belongs to the open file (open(2)), and others have the one that we were given, too, such
as a shell, and the programs that we start.

No more than ``PIPE_BUF`` bytes go into one write: that is what POSIX keeps in one piece where several processes write to one
pipe, as workers do. Only a single line that is longer is written as far as there is room. Its rest comes later, and lines of
others may come between.

A pipe that cannot be opened anew, because it is another user's or there is no ``/proc``, gets ``PIPE_BUF`` bytes at a time,
when poll(2) says that there is room for so many. There a write waits if another process is faster to take the last room.

While there is no room, lines wait in memory, and a thread waits for room. Beyond a bound they are lost; how many, a line
says as soon as there is room again. No line is lost for a reader that is merely slow, and the end waits for it, too.
"""

import asyncio
import os
import select
import socket
import stat
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Final

MAX_WAITING: Final = 4 * 1024 * 1024
"""Bytes of lines that wait for room, about ten thousand lines."""

_LAST_SECONDS: Final = 2.0
_PAUSE_SECONDS: Final = 0.01


class LineWriter:
    """Writes lines to a file descriptor, from any thread, and never waits for a reader.

    `lost` makes the line that says how many lines were lost.
    """

    def __init__(self, file: int, lost: Callable[[int], bytes], max_waiting: int = MAX_WAITING) -> None:
        self._file = file
        self._put = _way_to(file)
        self._lost_line = lost
        self._max_waiting = max_waiting
        self._room = _room_in(file)
        # Reentrant: a signal or a destructor may have something to say in the middle of a write.
        self._lock = threading.RLock()
        self._lines: deque[bytes] = deque()
        self._size = 0
        self._lost = 0
        self._cut = False  # the first line is the rest of one
        self._torn = False  # such a rest was lost
        self._writing = False
        self._waiter: threading.Thread | None = None

    def write(self, line: bytes) -> None:
        """Write a line now, behind those that were gathered."""
        with self._lock:
            self._keep(line)
            self.flush()

    def gather(self, line: bytes) -> None:
        """Write a line with all others that come in this turn of the event loop, when it is over: writing costs more than
        making them.
        """
        with self._lock:
            first = not self._lines
            self._keep(line)
        if first:
            try:
                asyncio.get_running_loop().call_soon(self.flush)
            except RuntimeError:  # there is none
                self.flush()

    def flush(self) -> None:
        """Write what there is, as far as there is room."""
        with self._lock:
            if self._writing:
                return
            self._writing = True
            try:
                while self._lines and self._room.poll(0) and self._write_some():
                    pass
            finally:
                self._writing = False
            if self._lines and self._waiter is None:
                self._wait_for_room()

    def close(self, seconds: float = _LAST_SECONDS) -> None:
        """Write what there is, and wait so many seconds for room. What has none then is lost."""
        end, room = time.monotonic() + seconds, _room_in(self._file)
        self.flush()
        while self._lines and (left := end - time.monotonic()) > 0:
            room.poll(left * 1000)
            self.flush()

    def _keep(self, line: bytes) -> None:
        if self._size + len(line) > self._max_waiting:
            self._lost += 1
        else:
            self._lines.append(line)
            self._size += len(line)

    def _write_some(self) -> bool:
        """Whole lines, behind the rest of one that was not written whole. Answers whether something became of them."""
        lost, report = 0, b""
        if self._lost and not self._cut:
            lost, self._lost = self._lost, 0
            report = (b"\n" if self._torn else b"") + self._lost_line(lost)
        lines: list[bytes] = []
        size = len(report)
        while self._lines and (not size or size + len(self._lines[0]) <= select.PIPE_BUF):
            lines.append(self._take())
            size += len(lines[-1])
        data = report + b"".join(lines)
        try:
            written = self._put(data)
        except BlockingIOError:  # another process has taken the room
            self._lost += lost
            for line in reversed(lines):
                self._put_back(line)
            return False
        except OSError:  # nobody is there to read any more, or the disk is full
            self._lost += lost + len(lines or [self._take()])
            self._cut, self._torn = False, self._torn or self._cut
            return True
        self._cut, self._torn = written < size, False
        if self._cut:
            self._put_back(data[written:])
        return True

    def _take(self) -> bytes:
        line = self._lines.popleft()
        self._size -= len(line)
        return line

    def _put_back(self, line: bytes) -> None:
        self._lines.appendleft(line)
        self._size += len(line)

    def _wait_for_room(self) -> None:
        self._waiter = threading.Thread(target=self._write_with_room, name="log", daemon=True)
        with suppress(RuntimeError):  # too late for threads, or too many: then whoever writes next tries again
            self._waiter.start()
            return
        self._waiter = None

    def _write_with_room(self) -> None:
        room = _room_in(self._file)  # a poll object is for one thread
        while True:
            room.poll()
            with self._lock:
                self.flush()
                if not self._lines:
                    self._waiter = None
                    return
            time.sleep(_PAUSE_SECONDS)  # a terminal may say that it has room, and take nothing


def _room_in(file: int) -> select.poll:
    room = select.poll()
    room.register(file, select.POLLOUT)
    return room


def _way_to(file: int) -> Callable[[bytes], int]:
    """What writes as much as there is room for, and answers with how much. Raises OSError: BlockingIOError for no room."""
    try:
        kind = os.fstat(file).st_mode
        if stat.S_ISSOCK(kind):
            return _sending(socket.socket(fileno=os.dup(file)))
        if stat.S_ISFIFO(kind) or os.isatty(file):
            return _writing(os.open(f"/proc/self/fd/{file}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY))
    except OSError:
        return lambda data: os.write(file, data[: select.PIPE_BUF])
    # A file always has room. Opened anew it would have a place of its own, and others would write over what we have written.
    return lambda data: os.write(file, data)


def _sending(connected: socket.socket) -> Callable[[bytes], int]:
    def send(data: bytes) -> int:
        return connected.send(data, socket.MSG_DONTWAIT)

    weakref.finalize(send, connected.close).atexit = False
    return send


def _writing(file: int) -> Callable[[bytes], int]:
    def write(data: bytes) -> int:
        return os.write(file, data)

    weakref.finalize(write, os.close, file).atexit = False
    return write
