"""What a bridge takes at most, and who is let in. Pure: whoever asks says what time it is.

Beside sizes two things are limited. *Concurrency* is that of interceptions: they last for minutes, and each takes memory and
a connection to the provider. The *rate* is that of all requests of an actor to providers, passthrough routes included: one
that asks for the list of models in a loop is to be slowed down, too.

A rate is a bucket of tokens for each actor. It holds as many as a minute brings, so a minute's worth may come at once:
agents send in bursts. What is refused takes none.
"""

from itertools import islice
from typing import Final

import msgspec

from aibridge.errors import BridgeError, Overloaded, RefusalReason, TooManyRequests, TooManyUnderWay, retry_after_field

MAX_BODY_BYTES: Final = 32 * 1024 * 1024
MAX_HEADER_BYTES: Final = 64 * 1024

_MINUTE: Final = 60.0
_ONE: Final = 1 - 1e-9  # who waits for as long as he was told must find a token, however the sums were rounded
_SOON: Final = 1.0  # when one of those under way ends, nobody knows


class Limits(msgspec.Struct, frozen=True):
    """The limits of a bridge; None is none. Sizes are in bytes, `max_concurrent` counts interceptions under way."""

    max_body_bytes: int = MAX_BODY_BYTES
    max_header_bytes: int = MAX_HEADER_BYTES
    max_concurrent: int | None = None
    max_concurrent_per_actor: int | None = None
    requests_per_minute: int | None = None
    """Of one actor."""


class Refusal(msgspec.Struct, frozen=True):
    """That a request is not let in, and in how many seconds one might be."""

    reason: RefusalReason
    seconds: float

    @property
    def error(self) -> BridgeError:
        """How its client is told."""
        return _KINDS[self.reason](_WORDS[self.reason], [retry_after_field(self.seconds)])


_KINDS: Final[dict[RefusalReason | None, type[BridgeError]]] = {
    kind.reason: kind for kind in (TooManyRequests, TooManyUnderWay, Overloaded)
}
_WORDS: Final[dict[RefusalReason, str]] = {
    "rate": "You have sent too many requests through this gateway within a minute.",
    "actor_concurrency": "You have too many requests under way through this gateway.",
    "concurrency": "This gateway has as many requests under way as it may have.",
}


class Admission:
    """Who is let in. Counts what is under way, and what actors have sent of late.

    Of `max_actors` at most, those that were seen last, it is remembered what they have sent. An actor that is forgotten has
    a full bucket.
    """

    def __init__(self, max_actors: int = 10_000) -> None:
        self._max_actors = max_actors
        self._under_way = 0
        self._of_actor: dict[str, int] = {}  # those who have some
        self._buckets: dict[str, tuple[float, float]] = {}  # tokens, and when there were so many; last seen, last

    def admit(self, actor_id: str, limits: Limits, now: float, *, lasts: bool) -> Refusal | None:
        """Let a request in, or say why not. One that `lasts`, an interception, is let out again by `leave`.

        `now` is in seconds, from whatever start.
        """
        if lasts:
            if _reached(limits.max_concurrent_per_actor, self._of_actor.get(actor_id, 0)):
                return Refusal("actor_concurrency", _SOON)
            if _reached(limits.max_concurrent, self._under_way):
                return Refusal("concurrency", _SOON)
        if limits.requests_per_minute is not None:
            missing = self._take(actor_id, limits.requests_per_minute, now)
            if missing:
                return Refusal("rate", missing)
        if lasts:
            self._under_way += 1
            self._of_actor[actor_id] = self._of_actor.get(actor_id, 0) + 1
        return None

    def leave(self, actor_id: str) -> None:
        """An interception is over."""
        self._under_way -= 1
        self._of_actor[actor_id] -= 1
        if not self._of_actor[actor_id]:
            del self._of_actor[actor_id]

    def _take(self, actor_id: str, per_minute: int, now: float) -> float:
        """Take a token. Answers with how many seconds are missing until there is one."""
        tokens, since = self._buckets.pop(actor_id, (float(per_minute), now))
        tokens = min(per_minute, tokens + (now - since) * per_minute / _MINUTE)
        missing = 0.0 if tokens >= _ONE else (1 - tokens) * _MINUTE / per_minute
        self._buckets[actor_id] = (tokens if missing else tokens - 1), now
        self._forget_some(now)
        return missing

    def _forget_some(self, now: float) -> None:
        """Those who were not seen for a minute have a full bucket, whatever their rate."""
        for actor_id, (_, since) in list(islice(self._buckets.items(), 2)):
            if since + _MINUTE < now or len(self._buckets) > self._max_actors:
                del self._buckets[actor_id]


def _reached(limit: int | None, count: int) -> bool:
    return limit is not None and count >= limit
