"""Keeping a client's stream alive while the bridge is busy with what the client does not see."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress

from aibridge.errors import ClientDisconnected


class KeepAlive:
    """Writes a stream, and something of its own whenever the stream was silent for so many seconds, once it has begun.

    Clients give a stream up that says nothing for minutes (wire.md D5), and proxies sooner.
    """

    def __init__(self, write: Callable[[bytes], Awaitable[None]], data: bytes, seconds: float) -> None:
        self._write = write
        self._data = data
        self._seconds = seconds
        self._loop = asyncio.get_running_loop()
        self._last = 0.0
        self._task: asyncio.Task[None] | None = None
        self._stopped = False

    async def write(self, data: bytes) -> None:
        """Write a piece of the stream."""
        await self._write(data)
        self._last = self._loop.time()
        if self._task is None and not self._stopped:
            self._task = self._loop.create_task(self._run())

    def stop(self) -> None:
        """The stream ends."""
        self._stopped = True
        if self._task is not None:
            self._task.cancel()

    async def _run(self) -> None:
        with suppress(ClientDisconnected):
            while True:
                silent = self._loop.time() - self._last
                if silent >= self._seconds:
                    await self._write(self._data)
                    self._last = self._loop.time()
                    silent = 0.0
                await asyncio.sleep(self._seconds - silent)
