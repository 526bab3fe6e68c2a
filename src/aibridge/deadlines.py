"""Deadlines of many, looked after with one timer: setting one costs an assignment, however often it is moved."""

import asyncio
from collections.abc import Collection
from typing import Protocol


class Expiring(Protocol):
    """Something that must not take too long."""

    deadline: float
    """When it has, in the event loop's time; infinity for never."""

    def expire(self) -> None:
        """The deadline has passed."""


class Deadlines:
    """Looks, every `seconds`, for what has passed its deadline: that is how late it may be told. Safe to start twice."""

    def __init__(self, members: Collection[Expiring], seconds: float) -> None:
        self._members = members
        self._seconds = seconds
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Look from now on, until there is nothing left to look after or `stop`."""
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._seconds, self._look)

    def stop(self) -> None:
        """Look no more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        self._timer = None
        now = asyncio.get_running_loop().time()
        if self._members:
            self.start()
        for late in [member for member in self._members if member.deadline <= now]:
            late.expire()
