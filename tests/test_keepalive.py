"""Keeping a stream alive: something at most every so many seconds of silence, from its beginning on, never after its end.

Truth: failures.md row 8, wire.md D5 ("Idle time"). The clock is the event loop's; a write is waited for, never slept for.
"""

import asyncio

from aibridge.errors import ClientDisconnected
from aibridge.keepalive import KeepAlive

SECONDS = 10
PING = b"ping"


class Stream:
    """What was written, and a way to wait for so many writes."""

    def __init__(self) -> None:
        self.written: list[bytes] = []
        self._news = asyncio.Condition()

    async def write(self, data: bytes) -> None:
        async with self._news:
            self.written.append(data)
            self._news.notify_all()

    async def holds(self, count: int) -> None:
        async with asyncio.timeout(SECONDS), self._news:
            await self._news.wait_for(lambda: len(self.written) >= count)


async def test_a_silent_stream_is_kept_alive_once_it_has_begun() -> None:
    stream = Stream()
    keep_alive = KeepAlive(stream.write, PING, 0.01)
    assert stream.written == []
    await keep_alive.write(b"start")
    await stream.holds(3)
    assert stream.written[:3] == [b"start", PING, PING]
    keep_alive.stop()


async def test_nothing_is_written_after_the_end() -> None:
    stream = Stream()
    keep_alive = KeepAlive(stream.write, PING, 0.0)
    await keep_alive.write(b"start")
    keep_alive.stop()
    await keep_alive.write(b"end")
    for _ in range(20):
        await asyncio.sleep(0)
    assert stream.written == [b"start", b"end"]


async def test_what_is_written_resets_the_silence() -> None:
    stream = Stream()
    keep_alive = KeepAlive(stream.write, PING, 3600)
    await keep_alive.write(b"1")
    await keep_alive.write(b"2")
    for _ in range(20):
        await asyncio.sleep(0)
    keep_alive.stop()
    assert stream.written == [b"1", b"2"]


async def test_a_client_that_has_gone_needs_nothing() -> None:
    wrote = asyncio.Event()

    async def write(data: bytes) -> None:
        if data == PING:
            wrote.set()
            raise ClientDisconnected

    keep_alive = KeepAlive(write, PING, 0.0)
    await keep_alive.write(b"start")
    async with asyncio.timeout(SECONDS):
        await wrote.wait()
    keep_alive.stop()
