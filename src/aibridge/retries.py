"""Sending a request to a provider again: whether, and after how long. Pure: chance and time are passed in.

A request is only sent again where the provider cannot have accepted it (`aibridge.errors.Unreachable`), or where it has
answered with a status that is configured for that: before anything of the response was relayed, recorded or acted upon. By
default none is: clients retry by themselves, and two layers that do multiply what a provider in trouble gets.
"""

import re
from email.utils import mktime_tz, parsedate_tz
from typing import Final

import msgspec

_FIRST_SECONDS: Final = 0.5
_DIGITS: Final = re.compile(r"[0-9]+(\.[0-9]+)?")


class RetryRules(msgspec.Struct, frozen=True):
    """How often a request is sent again at most, for which statuses, and after how many seconds at most."""

    attempts: int = 0
    statuses: frozenset[int] = frozenset()
    max_delay: float = 10.0

    def delay(self, attempt: int, chance: float, retry_after: float | None = None) -> float | None:
        """In how many seconds the request is sent again after so many attempts; None where it is not.

        The time doubles with each attempt, and `chance`, from 0 to 1, takes off up to half of it: clients that failed
        together must not come back together. That is added to what the provider asks for. Where it asks for more than
        `max_delay`, whoever waits had better know.
        """
        if attempt > self.attempts or (retry_after or 0.0) > self.max_delay:
            return None
        own = _FIRST_SECONDS * 2.0 ** (attempt - 1) * (1 - chance / 2)
        return min((retry_after or 0.0) + own, self.max_delay)


def retry_after(field: str, now: float) -> float | None:
    """In how many seconds a Retry-After field asks to come back: it holds those, or a date (RFC 9110 section 10.2.3).

    `now` is in seconds since the epoch. None where the field is neither.
    """
    field = field.strip()
    if _DIGITS.fullmatch(field):
        return float(field)
    try:
        date = parsedate_tz(field)
        return None if date is None else max(0.0, mktime_tz(date) - now)
    except (ValueError, OverflowError):
        return None
