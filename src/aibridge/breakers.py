"""Circuit breakers: a provider that has failed several times in a row is given a rest, and its clients an answer at once.

Pure: whoever asks says what time it is. There is a breaker for each provider, route and model, because they fail one by one:
an overloaded model must not take the others with it.

    closed     requests go through. `threshold` failures in a row open the breaker.
    open       no request goes through for `open_seconds`, or for longer where the provider's last answer asks for that.
    half-open  `probes` requests at a time go through. As many successes close the breaker, one failure opens it again.

What is said here is said of everybody's requests, so nothing may count that is only about one of them:

- A *failure* is a status that is configured as one, or no answer at all: no connection, or none in time. Statuses below 500
  cannot be configured. A 429 is about whose rate limit is used up, a 401 about whose key is wrong.
- A *success* is a response that was accepted. That is all: a stream that breaks off later is one stream.
- Everything else is *neither*. Rate limiters and checks of keys stand before the model and answer when it is down, so what
  they say must not close a breaker, nor end a run of failures that others have: a client with a wrong key that asks all the
  time would keep the breaker from ever opening. A status such as 500 that is not configured, a connection that is closed
  while a large body is sent (perhaps too large a one), a client that has left and a process that ends say as little.
"""

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Final, Literal, NamedTuple

import msgspec

from aibridge.errors import BreakerOpen, ProviderKind, retry_after_field

BreakerState = Literal["closed", "half_open", "open"]

FAILURES: Final[Mapping[ProviderKind, frozenset[int]]] = {
    "anthropic": frozenset({503, 504, 529}),  # the last is its own: overloaded (wire.md A10)
    "openai": frozenset({503, 504}),
}
"""The statuses that say of each kind of provider that it does not work at the moment."""

_MAX_OPEN_SECONDS: Final = 300.0  # whatever a provider asks for
_ANOTHER_PROBE_SECONDS: Final = 1.0  # nobody knows when a probe is answered
_MAX_MODEL: Final = 256  # longer than what metrics show, so that of these they show none in part
_ACCEPTED: Final = range(200, 400)


class BreakerRules(msgspec.Struct, frozen=True):
    """When breakers of a provider open and close. See the module's docstring."""

    statuses: frozenset[int]
    threshold: int = 5
    open_seconds: float = 30.0
    probes: int = 1


class BreakerKey(NamedTuple):
    """What has a breaker of its own."""

    provider_name: str
    route: str
    model: str | None


class Permit:
    """Leave to make one request. Exactly one of its methods is called, when it is known how that went."""

    __slots__ = ("_breaker", "_epoch", "_rules")

    def __init__(self, breaker: "_Breaker", rules: BreakerRules) -> None:
        self._breaker = breaker
        self._epoch = breaker.epoch
        self._rules = rules

    def answered(self, status: int, now: float, retry_after: float | None = None) -> None:
        """The provider has answered. `retry_after` is for how many seconds it wants to be left alone."""
        if status in self._rules.statuses:
            self.failed(now, retry_after)
        elif status not in _ACCEPTED:
            self.release()
        elif self._breaker.epoch == self._epoch:
            self._breaker.succeed(self._rules)

    def failed(self, now: float, retry_after: float | None = None) -> None:
        """The provider has failed."""
        if self._breaker.epoch == self._epoch:
            self._breaker.fail(self._rules, now, retry_after or 0.0)

    def release(self) -> None:
        """Nothing is known of the provider by this request."""
        if self._breaker.epoch == self._epoch:
            self._breaker.under_way -= 1


class Breakers:
    """The breakers of all providers. `changed` is told of each that is in another state.

    At most `max_breakers` are kept. What was not asked for longest goes first, but nothing that is not closed as long as
    there is something that is.
    """

    def __init__(self, changed: Callable[[BreakerKey, BreakerState], None], max_breakers: int = 1000) -> None:
        self._changed = changed
        self._max_breakers = max_breakers
        self._breakers: dict[BreakerKey, _Breaker] = {}  # in the order in which they were asked

    def admit(self, key: BreakerKey, rules: BreakerRules, now: float) -> Permit:
        """Leave to make a request. Raises `BreakerOpen` where there is none. `now` is in seconds, from whatever start."""
        key = _bounded(key)
        breaker = self._breakers.pop(key, None)
        if breaker is None:
            self._make_room()
            breaker = _Breaker(partial(self._changed, key))
        self._breakers[key] = breaker
        breaker.admit(rules, now)
        return Permit(breaker, rules)

    def is_closed(self, key: BreakerKey) -> bool:
        """Whether requests go through, as far as is known."""
        breaker = self._breakers.get(_bounded(key))
        return breaker is None or breaker.state == "closed"

    def keep(self, provider_names: Collection[str]) -> None:
        """Forget the breakers of all other providers."""
        for key in [key for key in self._breakers if key.provider_name not in provider_names]:
            self._forget(key)

    def _make_room(self) -> None:
        if len(self._breakers) >= self._max_breakers:
            closed = (key for key, breaker in self._breakers.items() if breaker.state == "closed")
            self._forget(next(closed, next(iter(self._breakers))))

    def _forget(self, key: BreakerKey) -> None:
        breaker = self._breakers.pop(key)
        breaker.epoch += 1  # what is under way must not open it where nobody can close it
        if breaker.state != "closed":
            self._changed(key, "closed")  # as one is of which nothing is known


class _Breaker:
    """One breaker. What was let through before it changed its state last, in an earlier *epoch*, counts no more."""

    __slots__ = ("_changed", "_failures", "_successes", "_until", "epoch", "state", "under_way")

    def __init__(self, changed: Callable[[BreakerState], None]) -> None:
        self._changed = changed
        self._until = 0.0  # while open
        self.epoch = 0
        self._begin("closed")

    def admit(self, rules: BreakerRules, now: float) -> None:
        if self.state == "open":
            if now < self._until:
                raise _rejection(self._until - now)
            self._become("half_open")
        if self.state == "half_open" and self.under_way >= rules.probes:
            raise _rejection(_ANOTHER_PROBE_SECONDS)
        self.under_way += 1

    def succeed(self, rules: BreakerRules) -> None:
        self.under_way -= 1
        self._failures = 0
        self._successes += 1
        if self.state == "half_open" and self._successes >= rules.probes:
            self._become("closed")

    def fail(self, rules: BreakerRules, now: float, retry_after: float) -> None:
        self.under_way -= 1
        self._failures += 1
        if self.state == "half_open" or self._failures >= rules.threshold:
            self._until = now + max(rules.open_seconds, min(retry_after, _MAX_OPEN_SECONDS))
            self._become("open")

    def _become(self, state: BreakerState) -> None:
        self._begin(state)
        self._changed(state)

    def _begin(self, state: BreakerState) -> None:
        self.state: BreakerState = state
        self.epoch += 1
        self.under_way = 0
        self._failures = 0  # in a row
        self._successes = 0


def _bounded(key: BreakerKey) -> BreakerKey:
    """Clients choose the model. Those with the same long beginning share a breaker."""
    return key if key.model is None or len(key.model) <= _MAX_MODEL else key._replace(model=key.model[:_MAX_MODEL])


def _rejection(seconds: float) -> BreakerOpen:
    return BreakerOpen("The provider has failed several times in a row and is given a rest.", [retry_after_field(seconds)])
