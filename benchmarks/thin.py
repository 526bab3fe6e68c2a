"""The least that a relay in Python can cost: httptools and uvloop, a client's connection, a provider's, and nothing else.

It knows no routes, no errors, no time-outs and no slow clients, reads nothing of what it passes on and records nothing. So
it is no gateway, but what one can be compared with: a program in Python that has to do more than this costs more.
``python -m benchmarks.thin PORT PROVIDER_PORT``.
"""

import asyncio
import sys
from collections import deque
from typing import cast

import httptools
import uvloop

_NOT_SENT = (b"host", b"content-length", b"connection")


class Answering(asyncio.Protocol):
    """A connection to the provider: passes bytes on as they come, until the response has ended."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """It is there."""
        self.transport = cast("asyncio.Transport", transport)

    def ask(self, client: asyncio.Transport, request: bytes) -> "asyncio.Future[None]":
        """Send a request. Answers with what is done when the client has its response."""
        self._client = client
        self._parser = httptools.HttpResponseParser(self)
        self._over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.transport.write(request)
        return self._over

    def data_received(self, data: bytes) -> None:
        """Bytes for the client."""
        self._client.write(data)
        self._parser.feed_data(data)

    def on_message_complete(self) -> None:
        """The response has ended."""
        self._over.set_result(None)


class Asking(asyncio.Protocol):
    """A client's connection: reads a request, and has it answered."""

    def __init__(self, provider: int, idle: "deque[Answering]") -> None:
        self._provider, self._idle = provider, idle
        self._parser = httptools.HttpRequestParser(self)
        self._target = b""
        self._fields: list[bytes] = []
        self._body: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client has connected."""
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """Bytes of a request."""
        self._parser.feed_data(data)

    def on_url(self, url: bytes) -> None:
        """The request's target."""
        self._target = url

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header field."""
        if name.lower() not in _NOT_SENT:
            self._fields.append(b"%b: %b\r\n" % (name, value))

    def on_body(self, body: bytes) -> None:
        """A piece of the body."""
        self._body.append(body)

    def on_message_complete(self) -> None:
        """The request is complete."""
        if self._parser.get_method() == b"GET":  # whether it serves
            self._transport.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
        else:
            body = b"".join(self._body)
            line = b"POST %b HTTP/1.1\r\nhost: provider\r\ncontent-length: %d\r\n" % (self._target, len(body))
            request = b"".join((line, *self._fields, b"\r\n", body))
            self._relaying = asyncio.get_running_loop().create_task(self._relay(request))
        self._fields.clear()
        self._body.clear()

    async def _relay(self, request: bytes) -> None:
        if self._idle:
            connection = self._idle.pop()
        else:
            loop = asyncio.get_running_loop()
            _, connection = await loop.create_connection(Answering, "127.0.0.1", self._provider)
        await connection.ask(self._transport, request)
        self._idle.append(connection)


async def serve(port: int, provider: int) -> None:
    """Serve until the process ends."""
    idle: deque[Answering] = deque()
    server = await asyncio.get_running_loop().create_server(lambda: Asking(provider, idle), "127.0.0.1", port)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(serve(*map(int, sys.argv[1:])))
