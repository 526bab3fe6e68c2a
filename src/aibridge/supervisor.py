"""Many cores: a process that starts workers, which serve on one port, and replaces those that die.

Theory of operation. The supervisor binds the sockets and keeps them open. So what has connected to a worker that dies
waits in the kernel for the one that takes its place, and nobody is refused. It holds one end of a pipe to each worker:

    worker -> supervisor    that it accepts clients, or why it cannot
    supervisor -> worker    to stop; to hurry
    end of file             the supervisor has died, however that happened: the worker stops in an orderly way

Each worker is a new interpreter and no fork of this one: locks, threads and event loops do not survive a fork. What they
share is the sockets, the database, which is made for several processes, and the files in which they count
(`aibridge.multiprocess`).
"""

import asyncio
import fcntl
import logging
import multiprocessing
import os
import signal
import socket
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, Final

from aibridge.config import Settings
from aibridge.httpserver import shared
from aibridge.logs import logging_to_stderr
from aibridge.multiprocess import forget_gauges
from aibridge.server import CANNOT_START, CannotStart, Orders, bound_or_exit, end_by, raise_open_file_limit, urls
from aibridge.worker import READY, SIGNALS, Job, Order, work

logger = logging.getLogger(__name__)

_spawning: Final = multiprocessing.get_context("spawn")

_SETTLED_SECONDS: Final = 10.0
_FIRST_DELAY: Final = 0.5
_LAST_DELAY: Final = 10.0  # clients wait for as long, those whose connections are for that worker


def serve(settings: Settings) -> None:
    """Run workers until told to stop. SIGTERM lets responses end within the grace period.

    Raises SystemExit where they cannot start. Ends by the signal that it obeyed, for whoever sent it to see.
    """
    raise_open_file_limit()
    with logging_to_stderr(**settings.log.model_dump()):
        listeners = bound_or_exit(settings)
        try:
            groups = _shared(listeners, settings.server.workers)
            with metrics_directory() as metrics, asyncio.Runner() as runner:
                stop = runner.run(_serve(settings, groups, metrics))
        except CannotStart as error:
            logger.error("the gateway cannot start: %s", error)  # noqa: TRY400  it says it all
            raise SystemExit(CANNOT_START) from None
    end_by(stop)


def _shared(listeners: Sequence[socket.socket], count: int) -> list[list[socket.socket]]:
    try:
        return shared(listeners, count)
    except OSError as error:  # somebody else was faster to listen, or there are no more files to be had
        raise CannotStart(f"cannot listen on {urls(listeners)}: {error}") from error


async def _serve(settings: Settings, groups: Sequence[Sequence[socket.socket]], metrics: Path) -> signal.Signals | None:
    where = urls(groups[0])
    orders = Orders()
    orders.obey_signals()
    places = [_Place(Job(number, settings, group, metrics), orders) for number, group in enumerate(groups, 1)]
    starting = asyncio.gather(*(place.began for place in places))
    stop = asyncio.create_task(orders.stop.wait())
    waiting: list[asyncio.Future[Any]] = [starting, stop]
    async with asyncio.TaskGroup() as keeping:
        for place in places:
            keeping.create_task(place.keep())
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            logger.info("told to stop before the start was complete")
        elif starting.exception() is None:
            logger.info("listening on %s (%d workers)", where, len(places))
            await stop
        orders.stop.set()  # where one of them cannot start, the others need not
        for listener in {listener for group in groups for listener in group}:
            listener.close()  # as the workers do: who connects from now on is refused
    if starting.done():
        await starting
    return orders.signal


class _Place:
    """The place of one worker, which is filled again when that dies."""

    def __init__(self, job: Job, orders: Orders) -> None:
        self._job = job
        self._orders = orders
        self._name = f"worker {job.number}"
        self.began: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when the first worker accepts clients; raises `CannotStart` where it never does."""

    async def keep(self) -> None:
        """Keep a worker here until there is the order to stop."""
        stop, back_off, clock = self._orders.stop, BackOff(), asyncio.get_running_loop().time
        while not stop.is_set():
            since = clock()
            end = await self._fill()
            if stop.is_set():
                return
            if not self.began.done():
                self.began.set_exception(CannotStart(f"{self._name} {end}"))
                return
            delay = back_off.after(clock() - since)
            logger.error("%s %s; it is replaced%s", self._name, end, f" in {delay:g} seconds" if delay else "")
            with suppress(TimeoutError):
                async with asyncio.timeout(delay):
                    await stop.wait()

    async def _fill(self) -> str:
        """The life of one worker. Answers how it ended."""
        ours, theirs = _spawning.Pipe()
        process = _spawning.Process(target=work, args=(self._job, theirs), name=self._name)
        with ours:
            try:
                with theirs, _signals_blocked():
                    process.start()
            except OSError as error:  # such as for want of memory
                return f"cannot be started: {error}"
            passing_on = asyncio.create_task(_pass_on(self._orders, ours))
            try:
                problem = await self._greeting(process, ours)
                await _readable(process.sentinel)
            finally:
                passing_on.cancel()
        process.join()
        forget_gauges(self._job.metrics, self._job.number)
        return _ended(process, problem)

    async def _greeting(self, process: SpawnProcess, worker: "Connection[Order, str]") -> str:
        """Wait until the worker accepts clients. Answers why it does not; nothing where it does, or has just died."""
        await _readable(worker.fileno())
        try:
            problem = worker.recv()
        except (EOFError, OSError):
            return ""
        if problem == READY:
            logger.info("%s is ready (process %d)", self._name, process.pid)
            if not self.began.done():
                self.began.set_result(None)
        return problem


async def _pass_on(orders: Orders, worker: "Connection[Order, str]") -> None:
    with suppress(OSError):  # it has just died
        await orders.stop.wait()
        worker.send("stop")
        await orders.hurry.wait()
        worker.send("hurry")


class BackOff:
    """How long to wait before something is done again that has failed, in seconds: longer each time it fails soon."""

    def __init__(self) -> None:
        self._next = 0.0

    def after(self, seconds: float) -> float:
        """How long to wait now that it has failed after so many seconds."""
        if seconds >= _SETTLED_SECONDS:
            self._next = 0.0
        delay, self._next = self._next, min(max(2 * self._next, _FIRST_DELAY), _LAST_DELAY)
        return delay


def _ended(process: SpawnProcess, problem: str) -> str:
    code = process.exitcode or 0
    how = f"(process {process.pid}) ended " + (f"by signal {-code}" if code < 0 else f"with status {code}")
    return f"{how}: {problem}" if problem else how


async def _readable(file: int) -> None:
    loop, readable = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(file, readable.set)
    try:
        await readable.wait()
    finally:
        loop.remove_reader(file)


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """For a process that is started: signals wait until it can obey them. They are not lost for this one either."""
    resource_tracker.ensure_running()  # a process of multiprocessing's own, whose start would unblock them
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def metrics_directory() -> Iterator[Path]:
    """A private temporary directory. It is locked, so that nobody tidies it up (tmpfiles.d(5), on the aging of files).

    Raises `CannotStart`.
    """
    try:
        folder = tempfile.TemporaryDirectory(prefix="aibridge-", ignore_cleanup_errors=True)
    except OSError as error:
        raise CannotStart(f"no temporary directory for metrics: {error}") from error
    with folder as path:
        lock = os.open(path, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_SH)
        try:
            yield Path(path)
        finally:
            os.close(lock)
