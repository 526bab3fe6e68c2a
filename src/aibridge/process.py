"""The process that serves: what it is told, what it listens on, and how it starts, takes over settings and stops.

To stop takes four steps (docs/operations.md, "Lifecycle"): ``/readyz`` says so, and each response is its connection's last;
after `server.drain_delay` nobody is let in any more; responses under way get `server.shutdown_grace` to end; then they are
ended.
"""

import asyncio
import faulthandler
import gc
import logging
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import CoroutineType
from typing import Any, Final

import uvloop
from prometheus_client import disable_created_metrics

from aibridge.config import Settings
from aibridge.httpconnection import bracketed
from aibridge.httpserver import bound, listen
from aibridge.logs import logging_to_stderr, set_level
from aibridge.recording.writer import StoreUnavailable
from aibridge.reloading import Configuration, Load
from aibridge.server import Server, http_server
from aibridge.systemd import Notifier

logger = logging.getLogger(__name__)

CANNOT_START: Final = 3
"""The exit status where it cannot."""

SHUTTING_DOWN: Final = "shutting down: waiting for responses under way"

_CLOSING_SECONDS: Final = 60.0  # well above all that closing waits for by itself: a locked database, MCP servers, spans
_OPEN_FILES: Final = 65_536
_GARBAGE_THRESHOLD: Final = 20_000


class CannotStart(Exception):
    """What the gateway needs is not to be had, and what that is. It is raised from what nobody had foreseen."""


class Orders:
    """What a process that serves is told: to stop, and then not to wait for responses under way any more; to reload."""

    patience = 15.0
    """How many seconds a process may take to end that is to hurry."""

    def __init__(self) -> None:
        self.stop = asyncio.Event()
        self.hurry = asyncio.Event()
        self.reload = asyncio.Event()
        self.signal: signal.Signals | None = None
        """The signal that said to stop."""
        self._at_terminal = False

    def obey_signals(self) -> None:
        """From now on, in the event loop that runs, SIGINT and SIGTERM mean: to stop, and the second one, to hurry.

        SIGHUP means to reload, but to stop where the terminal has gone at which the process was started: so a program is
        told that its window was closed. Not under nohup(1), which is for programs that are to go on.
        """
        loop = asyncio.get_running_loop()
        self._at_terminal = signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN and _has_terminal()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._obey, number)
        loop.add_signal_handler(signal.SIGHUP, self._obey_hangup)

    async def unless_stopped(self, work: Coroutine[Any, Any, object], patience: float | None = None) -> bool:
        """Do something, unless there is the order to stop before it is done. Answers whether it was; raises what it does.

        `patience`: in how many seconds the process has to end where there is that order, though the work does not break off.
        """
        loop = asyncio.get_running_loop()
        stop, working = loop.create_task(self.stop.wait()), loop.create_task(work)
        await asyncio.wait({stop, working}, return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()
        if working.done():
            working.result()
            return True
        working.cancel()
        if patience is not None:
            self.end_within(patience)
        await asyncio.wait({working})
        return False

    def end_within(self, seconds: float) -> None:
        """End the process where it has not ended by then, whatever hangs, if only the event loop runs."""
        asyncio.get_running_loop().call_later(seconds, self._end)

    def _end(self) -> None:
        waiting = "; ".join(map(_waits_for, asyncio.all_tasks()))
        logger.error("the process does not come to its end and is ended; it waits for: %s", waiting or "a thread")
        logging.shutdown()
        end_by(self.signal or signal.SIGTERM)

    def _obey(self, number: signal.Signals) -> None:
        if self.signal is None:
            self.signal = number
            self.stop.set()
        elif not self.hurry.is_set():
            self.hurry.set()
            self.end_within(self.patience)

    def _obey_hangup(self) -> None:
        if self._at_terminal and not _has_terminal():
            self._obey(signal.SIGHUP)
        else:
            self.reload.set()


def _has_terminal() -> bool:
    """Whether this process has a controlling terminal (tty(4))."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
    except OSError:
        return False
    return True


def _waits_for(task: asyncio.Task[Any]) -> str:
    """The coroutines of a task that wait for each other, the innermost last."""
    found: object = task.get_coro()
    names = []
    while isinstance(found, CoroutineType):
        names.append(found.__qualname__)
        found = found.cr_await
    return " > ".join(names) or task.get_name()


class Service:
    """A server that listens, from its start to its end.

    `shared`: other processes accept from the same sockets, now or when this one has gone.
    """

    def __init__(self, server: Server, settings: Settings, *, shared: bool) -> None:
        self._server = server
        self.settings = settings
        self._http = http_server(server, settings, server.kind_of, server.refused, shared=shared)

    async def start(self, listeners: Sequence[socket.socket], orders: Orders) -> bool:
        """Accept clients from sockets that listen. Answers whether it does: not where it is told to stop before.

        Raises `CannotStart`.
        """
        try:
            if not await orders.unless_stopped(self._server.__aenter__(), _CLOSING_SECONDS):  # MCP servers may take long
                logger.info("told to stop before the start was complete")
                return False
        except (StoreUnavailable, OSError) as error:
            raise CannotStart(str(error)) from None
        except Exception as error:
            raise CannotStart(f"{type(error).__name__}: {error}") from error
        _collect_garbage_seldom()
        await self._http.start(listeners)
        return True

    async def reload(self, settings: Settings) -> None:
        """Serve new requests as the settings say. Raises where what they need cannot be had; then nothing has changed."""
        await self._server.reload(settings)
        self._http.max_head_bytes = settings.limits.max_header_bytes
        set_level(settings.log.level)
        self.settings = settings

    def note(self, notes: Sequence[str]) -> None:
        """Have ``/readyz`` say so."""
        self._server.notes = notes

    def drain(self) -> None:
        """Not be ready any more, and send clients away with their next response; those who come are let in."""
        self._server.draining = True
        self._http.wind_down()

    async def stop(self, orders: Orders) -> None:
        """Let nobody in, let responses end, then end the rest, and close everything. With the order to hurry, do not wait.
        What cannot be closed does not keep the process from ending.
        """
        self.drain()
        logger.info(SHUTTING_DOWN)
        hurrying = asyncio.create_task(orders.hurry.wait())
        hurrying.add_done_callback(lambda _: self._http.hurry())
        try:
            await self._http.stop(self.settings.server.shutdown_grace)
        finally:
            hurrying.cancel()
            orders.end_within(_CLOSING_SECONDS)
            await self._server.__aexit__(None, None, None)


def serve(settings: Settings, load: Load, inherited: Sequence[socket.socket] = ()) -> None:
    """Run the server until it is told to stop. SIGTERM lets responses end within the grace period.

    `load` reads the configuration anew, on SIGHUP. `inherited` are the sockets to serve on, where there are some. Raises
    SystemExit where it cannot start. Ends by the signal that it obeyed, for whoever sent it to see.
    """
    prepare()
    disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each one, which nobody reads
    notifier = Notifier.of_environment()
    configuration = Configuration(settings, load)
    with logging_to_stderr(**settings.log.model_dump()) as log:
        listeners = inherited or bound_or_exit(settings)
        say_where_traces_go(settings)
        try:
            _listen(listeners)
            server = Server(settings, observers=[log])
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                stop = runner.run(_serve(server, configuration, listeners, notifier, shared=bool(inherited)))
        except CannotStart as error:
            logger.error("the gateway cannot start: %s", error, exc_info=error.__cause__)  # noqa: TRY400  ours adds nothing
            raise SystemExit(CANNOT_START) from None
    end_by(stop)


async def _serve(
    server: Server, configuration: Configuration, listeners: Sequence[socket.socket], notifier: Notifier, *, shared: bool
) -> signal.Signals | None:
    orders = Orders()
    orders.obey_signals()
    where = f"listening on {urls(listeners)}"
    service = Service(server, configuration.settings, shared=shared)

    async def reload() -> None:
        await configuration.reload(service.reload)
        service.note(configuration.notes)

    with notifier.signs_of_life():
        if await service.start(listeners, orders):
            logger.info(where)
            await obey(orders, notifier, partial(configuration.noted, where), reload)
            service.drain()
            await drained(service.settings, orders)
            await service.stop(orders)
    return orders.signal


async def obey(
    orders: Orders, notifier: Notifier, status: Callable[[], str], reload: Callable[[], Coroutine[Any, Any, object]]
) -> None:
    """Reload where that is ordered, until there is the order to stop; and tell the service manager its `status`."""
    notifier.ready(status())
    while await orders.unless_stopped(orders.reload.wait()):
        orders.reload.clear()
        notifier.reloading()
        await orders.unless_stopped(reload())
        notifier.ready(status())
    notifier.stopping(SHUTTING_DOWN)


async def drained(settings: Settings, orders: Orders) -> None:
    """Wait as long as a load balancer may need to see that the server is not ready; not with the order to hurry."""
    delay = settings.server.drain_delay
    if delay:
        logger.info("not ready any more; clients are let in for another %g seconds", delay)
        with suppress(TimeoutError):
            await asyncio.wait_for(orders.hurry.wait(), delay)


def prepare() -> None:
    """Make the process fit to serve. One that a watchdog ends with SIGABRT (systemd.service(5)) says where it hung."""
    faulthandler.enable()
    raise_open_file_limit()
    _keep_descriptors()


def _keep_descriptors() -> None:
    """What this process was started with is not for the programs that it starts, such as MCP servers, which may outlive it.

    A worker's descriptors come to it inheritable, and uvloop does not close them in a child as `subprocess` does. One that
    stays open there keeps a port, and hides from the supervisor that the worker has died.
    """
    for descriptor in [int(entry.name) for entry in Path("/dev/fd").iterdir()]:
        if descriptor > sys.stderr.fileno():
            with suppress(OSError):  # the one that the listing took
                os.set_inheritable(descriptor, False)  # noqa: FBT003  it has no name


def say_where_traces_go(settings: Settings) -> None:
    """OpenTelemetry's own variables, which others set, may have switched them on, or off."""
    if settings.tracing.unused is not None:
        logger.warning("no traces are sent: %s", settings.tracing.unused)
    elif settings.tracing.destination is not None:
        logger.info("traces go to %s", settings.tracing.destination)


def bound_or_exit(settings: Settings) -> list[socket.socket]:
    """The sockets to listen on, as configured. Raises SystemExit, and says why, where there can be none."""
    try:
        return bound(settings.server.host, settings.server.port)
    except OSError as error:
        where = f"{settings.server.host} port {settings.server.port}"
        logger.error("cannot listen on %s: %s", where, (error.strerror or str(error)).lower())  # noqa: TRY400  it says it all
        raise SystemExit(CANNOT_START) from None


def _listen(listeners: Sequence[socket.socket]) -> None:
    """Have clients wait from now on, as they do where several workers start, and not be refused."""
    try:
        listen(listeners)
    except OSError as error:  # somebody else was faster
        raise CannotStart(f"cannot listen on {urls(listeners)}: {error}") from None


def urls(listeners: Sequence[socket.socket]) -> str:
    """Where clients reach what listens."""
    return ", ".join(map(_url, listeners))


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://{bracketed(host)}:{port}"


def end_by(stop: signal.Signals | None) -> None:
    """End this process by the signal that it obeyed."""
    if stop is not None:
        signal.signal(stop, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {stop})  # a worker that has left its event loop blocks it
        signal.raise_signal(stop)


def _collect_garbage_seldom() -> None:
    """What was loaded stays, and a request leaves few cycles behind. To look for them every 700 objects, as Python does by
    default, takes a tenth of all the time (docs/performance.md).
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(_GARBAGE_THRESHOLD)


def raise_open_file_limit() -> None:
    """Each stream takes two sockets; the usual soft limit of 1,024 files is there for programs that use select(2)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
