"""One of several processes that serve on one port. `aibridge.supervisor` starts them, and says how they get on."""

import asyncio
import logging
import os
import signal
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Final, Literal

import uvloop

from aibridge.config import Settings
from aibridge.logs import logging_to_stderr
from aibridge.multiprocess import count_in_files, registry_of_all
from aibridge.server import CANNOT_START, CannotStart, Orders, Server, run

logger = logging.getLogger(__name__)

Order = Literal["stop", "hurry"]

SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)
"""The signals that a worker is started with blocked, until it can obey them."""

READY: Final = ""
"""What a worker sends when it accepts clients. Anything else is why it cannot start."""


@dataclass(frozen=True, slots=True)
class Job:
    """What makes a worker. `number` counts from 1; `metrics` is the directory where all of them count."""

    number: int
    settings: Settings
    listeners: Sequence[socket.socket]
    metrics: Path


def work(job: Job, supervisor: "Connection[str, Order]") -> None:
    """Serve until the supervisor says to stop, or has gone. Raises SystemExit where that cannot begin."""
    count_in_files(job.metrics, job.number)
    with logging_to_stderr(**job.settings.log.model_dump(), worker=job.number) as log:
        server = Server(job.settings, observers=[log], scraped=registry_of_all(job.metrics, os.getppid()))
        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(_work(server, job, supervisor))
        except CannotStart as error:
            supervisor.send(f"{type(error.__cause__).__name__}: {error.__cause__}")
            raise SystemExit(CANNOT_START) from None


async def _work(server: Server, job: Job, supervisor: "Connection[str, Order]") -> None:
    orders = Orders()

    def obey() -> None:
        try:
            order = supervisor.recv()
        except (EOFError, OSError):
            logger.error("the supervisor has gone")  # noqa: TRY400  that is what the end of the file says
            asyncio.get_running_loop().remove_reader(supervisor.fileno())
            order = "stop"
        (orders.stop if order == "stop" else orders.hurry).set()

    asyncio.get_running_loop().add_reader(supervisor.fileno(), obey)
    with _listening_to_signals(orders):
        await run(server, job.settings, job.listeners, orders, lambda: supervisor.send(READY))


@contextmanager
def _listening_to_signals(orders: Orders) -> Iterator[None]:
    """SIGTERM says to stop, however often it comes: a service manager sends it to all processes, and so to the supervisor,
    which passes it on. At a keyboard SIGINT goes to all, too, and only the supervisor need mind it.
    """
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, orders.stop.set)
    loop.add_signal_handler(signal.SIGINT, lambda: None)  # not ignored: programs that we start would inherit that
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    try:
        yield
    finally:  # what comes when the loop has gone must not spoil the end
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
