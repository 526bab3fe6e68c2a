"""An HTTP/1.1 client that hides nothing: exact bytes, event by event, and it may leave at any moment.

Only the transfer coding is taken off a body; its content coding and every header field stay as they came. Every wait is
bounded.
"""

import asyncio
import socket
import struct
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

from .provider import WAIT_SECONDS

HeaderLines = Sequence[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Head:
    """The status line and the header fields of a response, names in lower case, in the order they came."""

    status: int
    reason: str
    headers: tuple[tuple[str, str], ...]

    def all(self, name: str) -> list[str]:
        """Every value of a header field, in order."""
        return [value for key, value in self.headers if key == name.lower()]

    def get(self, name: str) -> str | None:
        """The only value of a header field, or None. Raises AssertionError where there are several."""
        values = self.all(name)
        assert len(values) < 2, f"{name} came {len(values)} times"
        return values[0] if values else None


@dataclass(frozen=True, slots=True)
class Answer:
    """A response read to its end. ``complete``: it ended as its framing promised, and did not break off."""

    head: Head
    body: bytes
    complete: bool


class RawClient:
    """One connection: ``async with RawClient(url) as client``. Leaving closes it, in whatever state it is.

    `patience` is how many seconds it waits for anything.
    """

    def __init__(self, url: str, patience: float = WAIT_SECONDS) -> None:
        self._patience = patience
        parts = urlsplit(url)
        self.host, self.port = parts.hostname or "", parts.port or 80
        self.path = parts.path
        self._body = bytearray()  # freed of its transfer coding, and not yet handed out
        self._ended: bool | None = None  # True: as promised; False: broken off
        self._left: int | None = None
        self._chunked = False
        self._chunk_left: int | None = None

    async def __aenter__(self) -> Self:
        async with asyncio.timeout(self._patience):
            self._reader, self._writer = await asyncio.open_connection(self.host, self.port, limit=2**20)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.leave()

    async def leave(self) -> None:
        """Close the connection, as a client does that is not interested any more."""
        self._writer.close()
        with suppress(OSError):
            await self._writer.wait_closed()

    def die(self) -> None:
        """Reset the connection, as a killed process or machine does."""
        sock: socket.socket = self._writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._writer.transport.abort()

    async def send(self, method: str, target: str, headers: HeaderLines = (), body: bytes | None = None) -> None:
        """Send a request. ``target`` stands below the URL's own path. Host and Content-Length are added where missing."""
        given = {name.lower() for name, _ in headers}
        lines = [f"{method} {self.path}{target} HTTP/1.1"]
        if "host" not in given:
            lines.append(f"Host: {self.host}:{self.port}")
        lines += (f"{name}: {value}" for name, value in headers)
        if body is not None and not given & {"content-length", "transfer-encoding"}:
            lines.append(f"Content-Length: {len(body)}")
        await self.write("\r\n".join([*lines, "", ""]).encode("latin-1") + (body or b""))

    async def write(self, data: bytes) -> None:
        """Write bytes as they are."""
        self._writer.write(data)
        async with asyncio.timeout(self._patience):
            await self._writer.drain()

    async def head(self) -> Head:
        """The head of the next response. Raises EOFError or ConnectionError where there is none."""
        self._body.clear()
        self._ended = self._left = self._chunk_left = None
        async with asyncio.timeout(self._patience):
            raw = await self._reader.readuntil(b"\r\n\r\n")
        status_line, *lines = raw.decode("latin-1").split("\r\n")[:-2]
        _, status, reason = status_line.split(" ", 2)
        fields = tuple((name.lower(), value.strip(" \t")) for name, _, value in (line.partition(":") for line in lines))
        head = Head(int(status), reason, fields)
        self._chunked = "chunked" in head.all("transfer-encoding")
        length = head.get("content-length")
        self._left = int(length) if length is not None else None
        if self._left == 0 or head.status in (204, 304):
            self._ended = True
        return head

    async def exactly(self, count: int) -> bytes:
        """The next ``count`` bytes of the body. Raises EOFError where it ends before."""
        while len(self._body) < count:
            await self._more()
        return self._take(count)

    async def until(self, separator: bytes = b"\n\n") -> bytes:
        """The body up to and including the next separator: one event, by default. Raises EOFError where there is none."""
        while (at := self._body.find(separator)) < 0:
            await self._more()
        return self._take(at + len(separator))

    async def rest(self) -> tuple[bytes, bool]:
        """The body to its end, and whether that came as promised."""
        while self._ended is None:
            await self._more()
        return self._take(len(self._body)), self._ended

    async def answer(self) -> Answer:
        """The next response, whole."""
        head = await self.head()
        body, complete = await self.rest()
        return Answer(head, body, complete)

    async def request(self, method: str, target: str, headers: HeaderLines = (), body: bytes | None = None) -> Answer:
        """Send a request and read the whole response."""
        await self.send(method, target, headers, body)
        return await self.answer()

    @property
    def ended(self) -> bool:
        """Whether the server is known to have closed the connection."""
        return self._reader.at_eof()

    async def closed(self) -> bytes:
        """What still comes until the server closes the connection."""
        async with asyncio.timeout(self._patience):
            return await self._reader.read()

    def _take(self, count: int) -> bytes:
        taken = bytes(self._body[:count])
        del self._body[:count]
        return taken

    async def _more(self) -> None:
        """Read on, at least to the next byte of the body or to its end. Raises EOFError when that was reached before."""
        if self._ended is not None:
            raise EOFError
        try:
            async with asyncio.timeout(self._patience):
                await (self._more_of_chunks() if self._chunked else self._more_of_length())
        except (EOFError, ConnectionError):
            self._ended = False

    async def _more_of_length(self) -> None:
        data = await self._reader.read(65536 if self._left is None else self._left)
        if not data:
            self._ended = self._left is None
            return
        self._body += data
        if self._left is not None:
            self._left -= len(data)
            self._ended = True if self._left == 0 else None

    async def _more_of_chunks(self) -> None:
        if self._chunk_left is None:
            self._chunk_left = int((await self._reader.readuntil(b"\r\n")).partition(b";")[0], 16)
            if self._chunk_left == 0:
                while await self._reader.readuntil(b"\r\n") != b"\r\n":
                    pass
                self._ended = True
                return
        data = await self._reader.read(self._chunk_left)
        if not data:
            raise EOFError
        self._body += data
        self._chunk_left -= len(data)
        if self._chunk_left == 0:
            await self._reader.readexactly(2)
            self._chunk_left = None
