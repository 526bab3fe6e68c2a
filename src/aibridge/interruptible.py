"""Ending the waits of exchanges from outside: when the client goes, and when the process stops."""

import asyncio
import logging
from collections.abc import Awaitable, Coroutine
from typing import Any, TypeVar

from aibridge.errors import Interrupted

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Interruptible:
    """Lets somebody else end one wait of the task that runs it, with an event of their choice.

    Only waits under `wait` end early; between them the task is left alone. One event is raised and no other after it, so
    that what the task does about it is not interrupted in turn; being cancelled counts as that event. Cheaper than a task
    for each wait, which would be one for each streamed event.
    """

    def __init__(self) -> None:
        self._task: asyncio.Task[Any] | None = asyncio.current_task()
        self._waiting = False
        self._event: Exception | None = None
        self._spent = False

    def interrupt(self, event: Exception) -> None:
        """End the wait under way, or else the next one, by raising `event` in it."""
        if self._event is None and not self._spent:
            self._event = event
            if self._waiting and self._task is not None:
                self._task.cancel()

    def postpone(self, event: Exception) -> None:
        """What `wait` has raised came too late for that wait: raise it in the next one."""
        self._event, self._spent = event, False

    async def wait(self, awaitable: Awaitable[T]) -> T:
        """Wait for something. Raises the event of `interrupt`, or CancelledError where the task is cancelled."""
        if self._event is not None:
            if isinstance(awaitable, Coroutine):
                awaitable.close()
            raise self._take_event(self._event)
        self._waiting = True
        try:
            return await awaitable
        except asyncio.CancelledError:
            self._spent = True
            if self._event is None or self._task is None:
                raise
            self._task.uncancel()
            raise self._take_event(self._event) from None
        finally:
            self._waiting = False

    def _take_event(self, event: Exception) -> Exception:
        self._event, self._spent = None, True
        return event


class Stopping:
    """The exchanges under way, so that a shutdown can end them."""

    def __init__(self) -> None:
        self._running: set[Interruptible] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    def add(self, waits: Interruptible) -> None:
        """An exchange begins."""
        self._running.add(waits)
        self._idle.clear()

    def remove(self, waits: Interruptible) -> None:
        """An exchange is over, its records are written."""
        self._running.discard(waits)
        if not self._running:
            self._idle.set()

    async def interrupt_all(self, seconds: float) -> None:
        """End all of them, and wait at most `seconds` for their last records."""
        for waits in list(self._running):
            waits.interrupt(Interrupted())
        try:
            await asyncio.wait_for(self._idle.wait(), seconds)
        except TimeoutError:
            logger.warning("%d exchanges did not end in time", len(self._running))
