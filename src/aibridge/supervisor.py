"""Many cores: a process that starts workers, which serve on one port, and replaces those that die.

Theory of operation. The supervisor binds the sockets and keeps them open. So what has connected to a worker that dies
waits in the kernel for the one that takes its place, and nobody is refused. It holds one end of a pipe to each worker:

    worker -> supervisor    that it accepts clients, or why it cannot; that it has heard; that it serves by other settings
    supervisor -> worker    whether it still answers; to serve by other settings; to drain, to stop, to hurry
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
from dataclasses import dataclass
from functools import partial
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Final

from aibridge.config import Settings
from aibridge.httpserver import shared, stop_handshakes
from aibridge.logs import logging_to_stderr, set_level
from aibridge.multiprocess import forget_gauges
from aibridge.process import (
    CANNOT_START,
    CannotStart,
    Orders,
    bound_or_exit,
    drained,
    end_by,
    obey,
    prepare,
    say_where_traces_go,
    urls,
)
from aibridge.reloading import Configuration, Load
from aibridge.systemd import Notifier
from aibridge.worker import (
    SIGNALS,
    Alive,
    Answer,
    Drain,
    Hurry,
    Job,
    Order,
    Ping,
    Reload,
    Serving,
    Stop,
    TakenOver,
    Unable,
    work,
)

logger = logging.getLogger(__name__)

_spawning: Final = multiprocessing.get_context("spawn")

_SETTLED_SECONDS: Final = 10.0
_FIRST_DELAY: Final = 0.5
_PING_SECONDS: Final = 5.0
_LOADING_SECONDS: Final = 30.0  # until a worker's event loop runs: a second or two, of a machine that has nothing else to do
_LAST_WORDS_SECONDS: Final = 2.0
_LAST_DELAY: Final = 10.0  # clients wait for as long, those whose connections are for that worker


def serve(settings: Settings, load: Load, inherited: Sequence[socket.socket] = ()) -> None:
    """Run workers until told to stop. SIGTERM lets responses end within the grace period.

    `load` reads the configuration anew, on SIGHUP. `inherited` are the sockets to serve on, where there are some. Raises
    SystemExit where they cannot start. Ends by the signal that it obeyed, for whoever sent it to see.
    """
    prepare()
    notifier = Notifier.of_environment()
    count = settings.server.workers
    with logging_to_stderr(**settings.log.model_dump()):
        listeners = inherited or bound_or_exit(settings)
        say_where_traces_go(settings)
        try:
            groups = [list(inherited)] * count if inherited else _shared(listeners, count)
            with metrics_directory() as metrics, asyncio.Runner() as runner:
                supervisor = _Supervisor(Configuration(settings, load), groups, metrics, inherited=bool(inherited))
                stop = runner.run(supervisor.run(notifier))
        except CannotStart as error:
            logger.error("the gateway cannot start: %s", error)  # noqa: TRY400  it says it all
            raise SystemExit(CANNOT_START) from None
    end_by(stop)


def _shared(listeners: Sequence[socket.socket], count: int) -> list[list[socket.socket]]:
    try:
        return shared(listeners, count)
    except OSError as error:  # somebody else was faster to listen, or there are no more files to be had
        raise CannotStart(f"cannot listen on {urls(listeners)}: {error}") from error


class _Orders(Orders):
    """For the supervisor there is a step between the order to stop and that to its workers: `closed` is set behind it."""

    patience = Orders.patience + 2 * _LAST_WORDS_SECONDS  # its workers may take the usual time

    def __init__(self) -> None:
        super().__init__()
        self.closed = asyncio.Event()


class _Supervisor:
    """Keeps the places of the workers filled, each with its group of sockets."""

    def __init__(
        self, configuration: Configuration, groups: Sequence[Sequence[socket.socket]], metrics: Path, *, inherited: bool
    ) -> None:
        self._configuration = configuration
        self._groups = groups
        self._metrics = metrics
        self._inherited = inherited
        self._places: list[_Place] = []

    async def run(self, notifier: Notifier) -> signal.Signals | None:
        """Run workers until told to stop. Answers the signal that said so. Raises `CannotStart`."""
        where = f"listening on {urls(self._groups[0])} ({len(self._groups)} workers)"
        orders = _Orders()
        orders.obey_signals()
        for number, group in enumerate(self._groups, 1):
            self._places.append(_Place(number, group, self._metrics, self._configuration, orders))
        starting = asyncio.gather(*(place.began for place in self._places))
        with notifier.signs_of_life():
            async with asyncio.TaskGroup() as keeping:
                for place in self._places:
                    keeping.create_task(place.keep())
                if not await orders.unless_stopped(asyncio.wait({starting})):
                    logger.info("told to stop before the start was complete")
                elif starting.exception() is None:
                    logger.info(where)
                    await obey(orders, notifier, partial(self._configuration.noted, where), self._reload)
                    await drained(self._configuration.settings, orders)
                orders.stop.set()  # where one of them cannot start, the others need not
                self._close()
                orders.closed.set()
        if starting.done():
            await starting
        return orders.signal

    async def _reload(self) -> None:
        async def take_over(settings: Settings) -> None:
            """The workers do the rest."""
            set_level(settings.log.level)

        await self._configuration.reload(take_over)
        await asyncio.gather(*(place.renewed() for place in self._places))

    def _close(self) -> None:
        """Who connects from now on is refused, as soon as the workers have closed the sockets, too."""
        listeners = {listener for group in self._groups for listener in group}
        if not self._inherited:
            stop_handshakes(listeners)
        for listener in listeners:
            listener.close()


class _Place:
    """The place of one worker, which is filled again when that dies."""

    def __init__(
        self, number: int, group: Sequence[socket.socket], metrics: Path, configuration: Configuration, orders: _Orders
    ) -> None:
        self._number = number
        self._group = group
        self._metrics = metrics
        self._configuration = configuration
        self._orders = orders
        self._name = f"worker {number}"
        self._news = asyncio.Event()
        """Set when the configuration was read anew, until the worker is told."""
        self._up_to_date = asyncio.Event()
        """Set when the worker serves by it."""
        self.began: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when the first worker accepts clients; raises `CannotStart` where it never does."""

    async def renewed(self) -> None:
        """Have the worker serve by the configuration that was read anew, and wait until it does; not for one that hangs."""
        self._up_to_date.clear()
        self._news.set()
        try:
            await asyncio.wait_for(self._up_to_date.wait(), self._configuration.settings.server.worker_timeout)
        except TimeoutError:
            logger.warning("%s has not taken over the configuration yet", self._name)

    async def keep(self) -> None:
        """Keep a worker here until there is the order to stop."""
        stop, back_off, clock = self._orders.stop, BackOff(), asyncio.get_running_loop().time
        while not stop.is_set():
            since = clock()
            end = await self._fill()
            if stop.is_set():
                return
            if not self.began.done():
                self.began.set_exception(CannotStart(f"{self._name} {end.how}"))
                return
            delay = back_off.after(clock() - since)
            level = logging.INFO if end.orderly else logging.ERROR
            logger.log(level, "%s %s; it is replaced%s", self._name, end.how, f" in {delay:g} seconds" if delay else "")
            with suppress(TimeoutError):
                async with asyncio.timeout(delay):
                    await stop.wait()

    async def _fill(self) -> "_End":
        """The life of one worker. Answers how it ended."""
        ours, theirs = _spawning.Pipe()
        told = self._told()
        job = Job(self._number, told, self._group, self._metrics)
        process = _spawning.Process(target=work, args=(job, theirs), name=self._name)
        with ours:
            try:
                with theirs, _signals_blocked():
                    process.start()
            except OSError as error:  # such as for want of memory
                return _End(f"cannot be started: {error}", orderly=False)
            answered, greeted = asyncio.Event(), asyncio.get_running_loop().create_future()
            with self._listening(ours, answered, greeted):
                attending = self._attend(process, ours, answered)
                tasks = [asyncio.create_task(task) for task in (_pass_on(self._orders, process, ours), attending)]
                try:
                    greeting = await greeted
                    if greeting == Serving():
                        self._begin(process, told)
                    await _readable(process.sentinel)
                finally:
                    for task in tasks:
                        task.cancel()
                    await asyncio.wait(tasks)
        process.join()
        forget_gauges(self._metrics, self._number)
        return _ended(process, greeting)

    def _told(self) -> Reload:
        return Reload(self._configuration.attempts, self._configuration.settings, self._configuration.notes)

    def _serves_by(self, number: int) -> None:
        if number == self._configuration.attempts:
            self._up_to_date.set()

    def _begin(self, process: SpawnProcess, told: Reload) -> None:
        logger.info("%s is ready (process %d)", self._name, process.pid)
        self._serves_by(told.number)
        if not self.began.done():
            self.began.set_result(None)

    async def _attend(self, process: SpawnProcess, worker: "Connection[Order, Answer]", answered: asyncio.Event) -> None:
        """Tell a worker what is new in the configuration, and see that it answers, from its start on. End one that hangs.

        It is told after each order to reload, whether or not something has changed: it may have failed to take it over.

        There is never more than one question without an answer, so that the pipe has room and no worker can block us.
        """
        loading = _LOADING_SECONDS
        with suppress(OSError):  # it has just died
            while True:
                patience = self._configuration.settings.server.worker_timeout
                order = self._told() if self._news.is_set() else Ping()
                self._news.clear()
                answered.clear()
                worker.send(order)
                try:
                    await asyncio.wait_for(answered.wait(), loading + patience)
                except TimeoutError:
                    logger.error("%s has not answered for %g seconds, it hangs", self._name, loading + patience)  # noqa: TRY400  nothing to add
                    await _end(process)
                    return
                loading = 0.0
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._news.wait(), min(_PING_SECONDS, patience / 2))

    @contextmanager
    def _listening(
        self, worker: "Connection[Order, Answer]", answered: asyncio.Event, greeted: asyncio.Future[Answer | None]
    ) -> Iterator[None]:
        """Hear what a worker says. `greeted` becomes what it says of its start; None where it has died without a word."""
        loop, file = asyncio.get_running_loop(), worker.fileno()

        def listen() -> None:
            try:
                answer = worker.recv()
            except (EOFError, OSError):  # it has just died
                loop.remove_reader(file)
                if not greeted.done():
                    greeted.set_result(None)
                return
            match answer:
                case Alive():
                    answered.set()
                case TakenOver(number):
                    self._serves_by(number)
                case _:
                    greeted.set_result(answer)

        loop.add_reader(file, listen)
        try:
            yield
        finally:
            loop.remove_reader(file)


async def _pass_on(orders: _Orders, process: SpawnProcess, worker: "Connection[Order, Answer]") -> None:
    """Pass orders on. A worker that is to hurry and does not, such as one that hangs, is ended."""
    with suppress(OSError):  # it has just died
        await orders.stop.wait()
        worker.send(Drain())
        await orders.closed.wait()
        worker.send(Stop())
        await orders.hurry.wait()
        worker.send(Hurry())
        await asyncio.sleep(Orders.patience)
        logger.error("process %d has not ended in time", process.pid)
        await _end(process)


async def _end(process: SpawnProcess) -> None:
    """End a process that hangs. With SIGABRT it says where, if it can. Is cancelled when the process has ended."""
    assert process.pid is not None  # noqa: S101  it was started
    os.kill(process.pid, signal.SIGABRT)
    await asyncio.sleep(_LAST_WORDS_SECONDS)
    process.kill()


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


@dataclass(frozen=True, slots=True)
class _End:
    """How a worker ended, for people; `orderly` where it was told to, as by SIGTERM."""

    how: str
    orderly: bool


def _ended(process: SpawnProcess, greeting: Answer | None) -> _End:
    code = process.exitcode or 0
    how = f"(process {process.pid}) ended " + (f"by signal {-code}" if code < 0 else f"with status {code}")
    return _End(f"{how}: {greeting.why}" if isinstance(greeting, Unable) else how, orderly=code == 0)


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
