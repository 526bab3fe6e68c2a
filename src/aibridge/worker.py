"""One of several processes that serve on one port. `aibridge.supervisor` starts them, and says how they get on."""

import asyncio
import logging
import os
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Final, TypeAlias

import uvloop

from aibridge.config import Settings
from aibridge.logs import logging_to_stderr
from aibridge.multiprocess import count_in_files, registry_of_all
from aibridge.process import CANNOT_START, CannotStart, Orders, Service, obey, prepare
from aibridge.server import Server
from aibridge.systemd import Notifier

logger = logging.getLogger(__name__)

SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""The signals that a worker is started with blocked, until it can obey them."""


@dataclass(frozen=True, slots=True)
class Drain:
    """An order not to be ready any more, and to serve on for now."""


@dataclass(frozen=True, slots=True)
class Stop:
    """An order to let responses end, and to end."""


@dataclass(frozen=True, slots=True)
class Hurry:
    """An order not to wait for responses any more."""


@dataclass(frozen=True, slots=True)
class Ping:
    """A question whether the event loop runs."""


@dataclass(frozen=True, slots=True)
class Reload:
    """An order to serve by these settings from now on, and to have ``/readyz`` say the notes. Orders are numbered."""

    number: int
    settings: Settings
    notes: tuple[str, ...]


Order: TypeAlias = Drain | Stop | Hurry | Ping | Reload
"""What the supervisor tells a worker."""


@dataclass(frozen=True, slots=True)
class Unable:
    """An answer: it cannot start, and why."""

    why: str


@dataclass(frozen=True, slots=True)
class Serving:
    """An answer: it accepts clients. It is sent once."""


@dataclass(frozen=True, slots=True)
class Alive:
    """An answer: its event loop runs. It is sent for each `Ping` and `Reload`, also before it accepts clients."""


@dataclass(frozen=True, slots=True)
class TakenOver:
    """An answer: it serves by the settings of the `Reload` of that number, or by the old ones and has said why."""

    number: int


Answer: TypeAlias = Unable | Serving | Alive | TakenOver
"""What a worker tells its supervisor."""


@dataclass(frozen=True, slots=True)
class Job:
    """What makes a worker. `number` counts from 1; `metrics` is the directory where all of them count."""

    number: int
    told: Reload
    listeners: Sequence[socket.socket]
    metrics: Path


def work(job: Job, supervisor: "Connection[Answer, Order]") -> None:
    """Serve until the supervisor says to stop, or has gone. Raises SystemExit where that cannot begin."""
    prepare()
    settings = job.told.settings
    with logging_to_stderr(**settings.log.model_dump(), worker=job.number) as log:
        try:
            _make_room(job)
            server = Server(settings, observers=[log], scraped=registry_of_all(job.metrics, os.getppid()))
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(_work(server, job, supervisor))
        except CannotStart as error:
            supervisor.send(Unable(str(error)))
            raise SystemExit(CANNOT_START) from None


def _make_room(job: Job) -> None:
    """For what is counted. Raises `CannotStart`."""
    try:
        count_in_files(job.metrics, job.number)
    except OSError as error:
        raise CannotStart(str(error)) from None


async def _work(server: Server, job: Job, supervisor: "Connection[Answer, Order]") -> None:
    service = Service(server, job.told.settings, shared=True)
    service.note(job.told.notes)
    orders = _Told(supervisor, job.told, service.drain)

    async def reload() -> None:
        told = orders.told
        await take_over(service, told)
        with suppress(OSError):  # the supervisor has gone
            supervisor.send(TakenOver(told.number))

    with _listening_to_signals(orders):
        if await service.start(job.listeners, orders):
            supervisor.send(Serving())
            await obey(orders, Notifier(), str, reload)
            await service.stop(orders)


async def take_over(service: Service, told: Reload) -> None:
    """Serve as the supervisor says. Where that cannot be, log and ``/readyz`` say so."""
    notes = told.notes
    if told.settings != service.settings:
        try:
            await service.reload(told.settings)
        except Exception:
            logger.exception("the configuration could not be taken over; the old one still holds")
            notes = ("the configuration could not be taken over, the log says why; the old one still holds", *notes)
    service.note(notes)


class _Told(Orders):
    """The supervisor's orders. `drain` is called when it says so."""

    def __init__(self, supervisor: "Connection[Answer, Order]", told: Reload, drain: Callable[[], None]) -> None:
        super().__init__()
        self.told = told
        self._drain = drain
        self._supervisor = supervisor
        asyncio.get_running_loop().add_reader(supervisor.fileno(), self._listen)

    def _listen(self) -> None:
        try:
            order = self._supervisor.recv()
            if isinstance(order, Ping | Reload):
                self._supervisor.send(Alive())
        except (EOFError, OSError):
            logger.error("the supervisor has gone")  # noqa: TRY400  that is what the end of the file says
            asyncio.get_running_loop().remove_reader(self._supervisor.fileno())
            order = Stop()
        match order:
            case Drain():
                self._drain()
            case Stop():
                self.stop.set()
            case Hurry():
                self.hurry.set()
            case Reload():
                self.told = order
                self.reload.set()


@contextmanager
def _listening_to_signals(orders: Orders) -> Iterator[None]:
    """SIGTERM says to stop, however often it comes: a service manager sends it to all processes, and so to the supervisor,
    which passes it on. At a keyboard SIGINT goes to all, too, and only the supervisor need mind it; so does the SIGHUP of a
    terminal.
    """
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, orders.stop.set)
    for number in (signal.SIGINT, signal.SIGHUP):
        loop.add_signal_handler(number, lambda: None)  # not ignored: programs that we start would inherit that
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    try:
        yield
    finally:  # what comes when the loop has gone must not spoil the end
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
