"""Sums up what happens over and over, so that a log says it in few lines. Pure: whoever asks says what time it is.

The first of a kind is told at once. What follows within some seconds is told as one when they are over, and begins as many
seconds again. A kind that was not heard of for that long is new.
"""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(slots=True)
class _Held(Generic[T]):
    until: float
    last: T
    count: int = 0


class Summaries(Generic[T]):
    """Holds back, of each kind, what follows another one within `seconds`: it keeps the last, and how many there were."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._held: dict[Hashable, _Held[T]] = {}  # what is due first, first

    def add(self, kind: Hashable, event: T, now: float) -> bool:
        """Something has happened. Answers whether it is to be told at once; else it is among what will be `due`.

        `now` is in seconds, from whatever start.
        """
        held = self._held.get(kind)
        if held is None:
            self._held[kind] = _Held(now + self._seconds, event)
            return True
        held.last = event
        held.count += 1
        return False

    @property
    def next_due(self) -> float | None:
        """When to ask for what is `due`; None where nothing is remembered."""
        return next((held.until for held in self._held.values()), None)

    def due(self, now: float) -> list[tuple[T, int]]:
        """What is to be told now: the last of each kind, and for how many it stands."""
        over = [(kind, held) for kind, held in self._held.items() if held.until <= now]
        for kind, held in over:
            del self._held[kind]
            if held.count:
                self._held[kind] = _Held(now + self._seconds, held.last)
        return [(held.last, held.count) for _, held in over if held.count]
