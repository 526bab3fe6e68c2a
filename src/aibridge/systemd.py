"""What a service manager and a service tell each other: sockets that are handed over, and how the service is.

Conventions of systemd that others follow, too: sd_listen_fds(3) and sd_notify(3), which are environment variables and
datagrams and need no library. Without a service manager nothing here does anything.
"""

import asyncio
import ipaddress
import logging
import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, Self

logger = logging.getLogger(__name__)

_FIRST_DESCRIPTOR: Final = 3  # SD_LISTEN_FDS_START
_SEND_SECONDS: Final = 1.0


class UnusableSocket(Exception):
    """A socket that was handed over is not one to serve on."""


def handed_over() -> list[socket.socket]:
    """The listening sockets that this process was started with; none where it was not.

    Forgets what says so, and the programs that are started from here do not inherit them. Raises `UnusableSocket`.
    """
    pid, count = os.environ.pop("LISTEN_PID", ""), os.environ.pop("LISTEN_FDS", "")
    for name in ("LISTEN_FDNAMES", "LISTEN_PIDFDID"):
        os.environ.pop(name, None)
    if pid != str(os.getpid()) or not count.isdecimal():  # meant for somebody else, who has not taken them
        return []
    return [_listener(descriptor) for descriptor in range(_FIRST_DESCRIPTOR, _FIRST_DESCRIPTOR + int(count))]


def _listener(descriptor: int) -> socket.socket:
    try:
        os.set_inheritable(descriptor, False)  # noqa: FBT003  it has no name
        listener = socket.socket(fileno=descriptor)
        listens = listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError as error:
        raise UnusableSocket(f"descriptor {descriptor} was handed over and is no socket ({error.strerror})") from None
    if not listens or listener.family not in (socket.AF_INET, socket.AF_INET6):
        listener.close()
        raise UnusableSocket(f"descriptor {descriptor} was handed over and is no TCP socket that listens")
    return listener


def address_of(listeners: Sequence[socket.socket]) -> dict[str, Any]:
    """What `server.host` and `server.port` come to with these sockets: the address that most can reach, which says whom a
    request must be known to come from. Nothing where there are none.
    """
    found = [listener.getsockname()[:2] for listener in listeners]
    found.sort(key=lambda address: ipaddress.ip_address(address[0].partition("%")[0]).is_loopback)
    return {"host": found[0][0], "port": found[0][1]} if found else {}


class Notifier:
    """Tells the service manager how this process is, with datagrams to the socket `address`: a path, or ``@`` and a name in
    Linux's abstract namespace (unix(7)). Without an address it tells nobody. `watchdog_seconds` is how long the service
    manager waits for a sign of life.
    """

    def __init__(self, address: str = "", watchdog_seconds: float | None = None) -> None:
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._watchdog_seconds = watchdog_seconds

    @classmethod
    def of_environment(cls) -> Self:
        """As the service manager has asked for. Forgets it: the processes that are started from here have no say."""
        address = os.environ.pop("NOTIFY_SOCKET", "")
        microseconds, pid = os.environ.pop("WATCHDOG_USEC", ""), os.environ.pop("WATCHDOG_PID", "")
        asked = microseconds.isdecimal() and int(microseconds) > 0  # 0 is for none (sd_watchdog_enabled(3))
        watched = asked and pid in ("", str(os.getpid()))
        return cls(address, int(microseconds) / 1e6 if watched else None)

    def ready(self, status: str) -> None:
        """The service has started, or has reloaded its configuration."""
        self._tell("READY=1", f"STATUS={status}")

    def reloading(self) -> None:
        """The service reloads its configuration, and tells when it has. The time is for ``Type=notify-reload``."""
        self._tell("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def stopping(self, status: str) -> None:
        """The service ends."""
        self._tell("STOPPING=1", f"STATUS={status}")

    @contextmanager
    def signs_of_life(self) -> Iterator[None]:
        """Give them for as long as the event loop runs: twice in the time that the service manager waits for one."""
        task = asyncio.create_task(self._give_signs())
        try:
            yield
        finally:
            task.cancel()

    async def _give_signs(self) -> None:
        while self._watchdog_seconds is not None:
            self._tell("WATCHDOG=1", patience=0)
            await asyncio.sleep(self._watchdog_seconds / 2)

    def _tell(self, *assignments: str, patience: float = _SEND_SECONDS) -> None:
        if not self._address:
            return
        lines = (assignment.replace("\n", " ") for assignment in assignments)
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
                sender.settimeout(patience)
                sender.sendto("\n".join(lines).encode(), self._address)
        except OSError as error:
            logger.warning("the service manager cannot be told %s: %s", assignments[0], error)
