"""What clients do not read: a connection whose client has gone to sleep must not stay for ever."""

import asyncio


class Unread:
    """What one client has not read of what was written to it. Where it reads nothing at all for too long, it is dropped."""

    __slots__ = ("_seconds", "_size", "_transport", "_watched", "deadline")

    def __init__(self, transport: asyncio.Transport, watched: "set[Unread]", seconds: float) -> None:
        self._transport = transport
        self._watched = watched
        self._seconds = seconds
        self._watched.add(self)
        self._wait()

    def expire(self) -> None:
        """Look whether it has read something."""
        size = self._transport.get_write_buffer_size()
        if 0 < size < self._size:
            self._wait()
        else:
            self.forget()
            if size:
                self._transport.abort()

    def forget(self) -> None:
        """Look no more."""
        self._watched.discard(self)

    def _wait(self) -> None:
        self._size = self._transport.get_write_buffer_size()
        self.deadline = asyncio.get_running_loop().time() + self._seconds
