"""The HTTP server: listens for clients, and ends in an orderly way. One connection is in `aibridge.httpprotocol`."""

import asyncio
import ctypes
import errno
import logging
import socket
import struct
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Final

from aibridge.asgi import App
from aibridge.errors import BridgeError, ProviderKind
from aibridge.httpprotocol import HttpProtocol, Serving

logger = logging.getLogger(__name__)

# A client's pooled connection should end on the client's side: one that we close under its next request costs it an error.
_KEEP_ALIVE_SECONDS: Final = 75.0
_REQUEST_SECONDS: Final = 60.0
_WRITE_SECONDS: Final = 300.0
_BACKLOG: Final = 2048
_NOT_HERE: Final = (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL)  # such as IPv6 where the machine has none
_LAST_RECORDS_SECONDS: Final = 10.0
_LAST_BYTES_SECONDS: Final = 1.0
_SO_ATTACH_FILTER: Final = 26  # asm-generic/socket.h; Python has no name for it


class HttpServer:
    """Serves one ASGI application, whose lifetime is its owner's business. Times are in seconds, sizes in bytes.

    `request_seconds` bounds how long a client may take to send a head, and each piece of a body; `keep_alive_seconds` how
    long a connection may be idle; `write_seconds` how long a client may read nothing of what was written. `kind_of` says for
    a path, percent-encoded, how an error must look to who has asked for it. `refused` is told of each refusal of the
    server's own: the error, the path as far as it is known, and the client's address. `shared`: other processes accept from
    the same sockets, now or when this one has gone.
    """

    def __init__(
        self,
        app: App,
        *,
        max_head_bytes: int,
        keep_alive_seconds: float = _KEEP_ALIVE_SECONDS,
        request_seconds: float = _REQUEST_SECONDS,
        write_seconds: float = _WRITE_SECONDS,
        kind_of: Callable[[str], ProviderKind] = lambda _: "openai",
        refused: Callable[[BridgeError, str, str], None] = lambda *_: None,
        shared: bool = False,
    ) -> None:
        self._serving = Serving(
            app,
            max_head_bytes,
            keep_alive_seconds,
            request_seconds,
            write_seconds,
            kind_of,
            refused,
            when_over=self._look_if_over,
        )
        self._protocol = partial(HttpProtocol, self._serving)
        self._shared = shared
        self._listening: list[tuple[socket.socket, asyncio.Server]] = []
        self._queue: list[socket.socket] = []  # who has connected when we stopped to listen
        self._over = asyncio.Event()  # nothing is under way, or nobody is patient any more

    @property
    def max_head_bytes(self) -> int:
        """How large a request's head may be, about."""
        return self._serving.max_head_bytes

    @max_head_bytes.setter
    def max_head_bytes(self, size: int) -> None:
        self._serving.max_head_bytes = size

    async def start(self, listeners: Iterable[socket.socket]) -> None:
        """Listen on sockets that are bound."""
        loop = asyncio.get_running_loop()
        for listener in listeners:
            server = await loop.create_server(self._protocol, sock=listener, backlog=_BACKLOG)
            self._listening.append((listener, server))

    def wind_down(self) -> None:
        """From now on each response that begins is the last one of its connection."""
        self._serving.closing = True

    async def stop(self, grace: float) -> None:
        """Let nobody new in, let responses end within `grace` seconds, then end the rest.

        Nothing is cut off that can be answered: who waits to be let in, is, and what idle connections ask for within a
        moment is answered.
        """
        self._serving.stop()
        self._queue += self._close_listeners()
        while self._queue:
            await asyncio.get_running_loop().connect_accepted_socket(self._protocol, self._queue[0])
            del self._queue[0]
        self._look_if_over()
        await self._until_over(grace)
        tasks = list(self._serving.tasks)
        if tasks:
            logger.warning("%d responses have not ended in time", len(tasks))
        for task in tasks:  # they record what is known, and tell their clients
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=_LAST_RECORDS_SECONDS)
            await self._until_over(_LAST_BYTES_SECONDS)
        for connection in list(self._serving.connections):
            connection.abort()

    def hurry(self) -> None:
        """Wait no longer for responses to end."""
        self._over.set()

    def _close_listeners(self) -> list[socket.socket]:
        """Close the sockets that listen, and answer those that have connected to them. All in one step of the event loop."""
        if not self._shared:
            stop_handshakes(listener for listener, _ in self._listening)
        waiting: list[socket.socket] = []
        for listener, server in self._listening:
            with suppress(OSError):  # nobody else waits, or there is no room for them
                while True:
                    waiting.append(listener.accept()[0])
            server.close()
        self._listening.clear()
        return waiting

    async def _until_over(self, seconds: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._over.wait()

    def _look_if_over(self) -> None:
        if self._serving.stopping and not (self._queue or self._serving.connections or self._serving.tasks):
            self._over.set()


def stop_handshakes(listeners: Iterable[socket.socket]) -> None:
    """Have nobody come into the queues of sockets that listen any more: who waits in one when it is closed is reset.

    On Linux a filter drops all that comes for them (SO_ATTACH_FILTER in socket(7)): who connects now tries again a second
    later, and is refused then or let in by somebody else. Elsewhere there is no such thing, and who connects between our
    last look and the close is reset.
    """
    if sys.platform != "linux":
        return
    drop = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0))  # BPF_RET | BPF_K: keep 0 bytes of a packet
    program = struct.pack("HP", 1, ctypes.addressof(drop))
    for listener in listeners:
        with suppress(OSError):  # not every container lets us
            listener.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program)


def bound(host: str, port: int) -> list[socket.socket]:
    """Sockets for all addresses of a host that the machine has, to listen on the same port. Port 0 takes a free one.

    Raises OSError where there are none, or one of them is taken: its clients would talk to somebody else.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    sockets: list[socket.socket] = []
    failure: OSError | None = None
    for family, kind, protocol, _, address in dict.fromkeys(found):
        try:
            listener = _bound(family, kind, protocol, (address[0], port, *address[2:]))
        except OSError as error:
            failure = error
            if error.errno not in _NOT_HERE:
                break
        else:
            port = listener.getsockname()[1]
            sockets.append(listener)
    if not sockets or (failure is not None and failure.errno not in _NOT_HERE):
        for listener in sockets:
            listener.close()
        raise failure or OSError(f"{host} has no address")
    return sockets


def _bound(family: int, kind: int, protocol: int, address: tuple[Any, ...]) -> socket.socket:
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind(address)
    except OSError:
        listener.close()
        raise
    return listener


def listen(listeners: Iterable[socket.socket]) -> None:
    """Let clients connect to sockets that are bound, and wait there. Raises OSError, as where others listen already."""
    for listener in listeners:
        listener.listen(_BACKLOG)


def shared(listeners: Sequence[socket.socket], count: int) -> list[list[socket.socket]]:
    """Sockets for `count` processes that serve together where `bound` has found that nobody else does. They listen already.

    On Linux each process gets sockets of its own, and the kernel spreads the connections over them by a hash of the
    addresses (SO_REUSEPORT in socket(7)). Elsewhere that option gives all connections to one socket, so the processes accept
    from the same ones. The first sockets are bound without the option: with it, another server of the same user could be on
    the port already, and nobody would know. Raises OSError.
    """
    if sys.platform != "linux":
        groups = [list(listeners)] * count
    else:
        for listener in listeners:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        groups = [list(listeners), *([_beside(listener) for listener in listeners] for _ in range(count - 1))]
    for group in groups:
        listen(group)
    return groups


def _beside(listener: socket.socket) -> socket.socket:
    """One more socket on the same address."""
    socket_options = [(socket.SOL_SOCKET, socket.SO_REUSEADDR), (socket.SOL_SOCKET, socket.SO_REUSEPORT)]
    if listener.family == socket.AF_INET6:
        socket_options.append((socket.IPPROTO_IPV6, socket.IPV6_V6ONLY))
    another = socket.socket(listener.family, listener.type, listener.proto)
    for level, option in socket_options:
        another.setsockopt(level, option, 1)
    another.bind(listener.getsockname())
    return another
