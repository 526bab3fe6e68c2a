"""What is counted of requests to providers: calls, retries, circuit breakers, connections; and of those not let in."""

from collections import defaultdict
from collections.abc import Mapping
from typing import Final

from aibridge.breakers import BreakerState
from aibridge.events import (
    GIVEN_UP,
    BreakerChanged,
    BreakerRejected,
    CallAnswered,
    CallBegan,
    CallEnded,
    PassedThrough,
    Refused,
    Retried,
)
from aibridge.metrics.series import Bounded, Bounds, Children, Consumers, Maker
from aibridge.upstream import Connections

_STATES: Final[Mapping[BreakerState, float]] = {"closed": 0.0, "half_open": 0.5, "open": 1.0}
_Place = tuple[str, str, str]
"""Provider, route, model."""


class Calls:
    """Counts requests to providers, those that are tried again, and those that were not let in."""

    def __init__(self, make: Maker, bounds: Bounds) -> None:
        self._inflight = Children(make.gauge("upstream_calls_inflight", "Requests to providers under way.", "provider"))
        self._responses = Children(
            make.counter(
                "upstream_responses_total",
                "Answers of providers to requests, by the class of their status, and what came in place of one.",
                *("provider", "status"),
            )
        )
        self._retries = Children(
            make.counter("upstream_retries_total", "Requests to providers that were tried again.", "provider", "reason")
        )
        self._passed_through = Children(
            make.counter("passthrough_total", "Requests on passthrough routes.", "provider", "route", "method")
        )
        self._refusals = Children(make.counter("refusals_total", "Requests that were not let in.", "provider", "reason"))
        self._reason = Bounded(bounds.label_values)

    @property
    def consumers(self) -> Consumers:
        """What counts which events."""
        return {
            CallBegan: self._begin,
            CallAnswered: self._answer,
            CallEnded: self._end,
            Retried: self._retry,
            PassedThrough: self._pass_through,
            Refused: self._refuse,
        }

    def _begin(self, event: CallBegan) -> None:
        self._inflight[event.provider_name,].inc()

    def _answer(self, event: CallAnswered) -> None:
        self._responses[event.provider_name, _status(event)].inc()

    def _end(self, event: CallEnded) -> None:
        self._inflight[event.provider_name,].dec()

    def _retry(self, event: Retried) -> None:
        self._retries[event.provider_name, self._reason(event.reason)].inc()

    def _pass_through(self, event: PassedThrough) -> None:
        self._passed_through[event.provider_name, event.route, event.method].inc()

    def _refuse(self, event: Refused) -> None:
        self._refusals[event.provider_name, event.reason].inc()


def _status(answer: CallAnswered) -> str:
    if answer.http_status is not None:
        return f"{answer.http_status // 100}xx"
    return "given_up" if answer.error == GIVEN_UP else "error"


class Breakers:
    """Shows the states of circuit breakers."""

    def __init__(self, make: Maker, bounds: Bounds) -> None:
        place = ("provider", "route", "model")
        self._state = Children(
            make.gauge(
                "breaker_state",
                "The state of a circuit breaker: 0 closed, 0.5 half-open, 1 open.",
                *place,
                combined="livemax",
            )
        )
        self._trips = Children(make.counter("breaker_trips_total", "How often a circuit breaker has opened.", *place))
        self._rejections = Children(
            make.counter("breaker_rejections_total", "Requests that an open circuit breaker kept from a provider.", *place)
        )
        self._model = Bounded(bounds.label_values)
        self._not_closed: defaultdict[_Place, dict[str, float]] = defaultdict(dict)

    @property
    def consumers(self) -> Consumers:
        """What counts which events."""
        return {BreakerChanged: self._change, BreakerRejected: self._reject}

    def _change(self, event: BreakerChanged) -> None:
        """Of several breakers whose models share a label, it shows the one that is furthest from closed."""
        model = event.model or ""
        place = event.provider_name, event.route, self._model(model)
        states = self._not_closed[place]
        states.pop(model, None)
        if event.state != "closed":
            states[model] = _STATES[event.state]
        self._state[place].set(max(states.values(), default=0.0))
        if event.state == "open":
            self._trips[place].inc()

    def _reject(self, event: BreakerRejected) -> None:
        self._rejections[event.provider_name, event.route, self._model(event.model)].inc()


class Pool:
    """Shows the connections to providers."""

    def __init__(self, make: Maker) -> None:
        self._connections = Children(make.gauge("upstream_connections", "Open connections to providers.", "host", "state"))
        self._opened = Children(
            make.counter("upstream_connections_opened_total", "Connections to providers that were opened.", "host")
        )
        self._before: dict[str, int] = {}

    def show(self, hosts: Mapping[str, Connections]) -> None:
        """Show the connections to each host."""
        for host, connections in hosts.items():
            self._connections[host, "idle"].set(connections.idle)
            self._connections[host, "in_use"].set(connections.in_use)
            self._opened[host,].inc(connections.opened - self._before.get(host, 0))
            self._before[host] = connections.opened
