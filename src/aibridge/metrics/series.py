"""Time series: how they are made, and how many there may be.

Whatever comes from outside (names of models, tools and clients, actors) is bounded twice: a label has so many values, and a
metric so many combinations of them; what is beyond counts as ``other``. Otherwise one client could fill the memory of the
gateway and of Prometheus. The first bound alone would not do: a few hundred values of each of a few labels are millions.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Generic, Literal, TypeVar

import msgspec
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.metrics import MetricWrapperBase

OTHER: Final = "other"
_MAX_LENGTH: Final = 128

M = TypeVar("M", bound=MetricWrapperBase)

Combined = Literal["livesum", "livemin", "livemax"]
"""What a gauge says of several workers: the sum, the least or the most. Those that have died do not count."""

Consumers = Mapping[type, Callable[[Any], None]]
"""Who counts the events of a type."""


class Bounds(msgspec.Struct, frozen=True):
    """How many time series there may be, whatever clients send.

    Each label that clients influence has up to `label_values`, that of the actors, who are authenticated, `initiators`. Of
    combinations of such labels there are up to `combinations` in a metric, of which one actor can use up
    `combinations_of_one`.
    """

    label_values: int = 200
    initiators: int = 5000
    combinations: int = 10_000
    combinations_of_one: int = 200


class Bounded:
    """Lets the first values of a label through."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._known: set[str] = set()

    def __call__(self, value: str | None) -> str:
        value = value or ""
        if value not in self._known:
            if len(self._known) >= self._limit or len(value) > _MAX_LENGTH or not _is_text(value):
                return OTHER
            self._known.add(value)
        return value


def _is_text(value: str) -> bool:
    """Whether it can be written as UTF-8: one value that cannot would make every scrape fail."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


class Children(dict[tuple[str, ...], M], Generic[M]):
    """The time series of a metric, by the values of its labels. They appear, with 0, when they are asked for.

    prometheus-client's own look-up costs more than the counting.
    """

    def __init__(self, metric: M) -> None:
        super().__init__()
        self._metric = metric

    def __missing__(self, labels: tuple[str, ...]) -> M:
        child = self[labels] = self._metric.labels(*labels)
        return child

    def within(self, limit: int, labels: tuple[str, ...], instead: tuple[str, ...]) -> M:
        """The series with these labels; where it would be a new one and there are `limit`, the one with others `instead`."""
        return self[labels if labels in self or len(self) < limit else instead]


class Maker:
    """Makes metrics in a registry."""

    def __init__(self, registry: CollectorRegistry, namespace: str) -> None:
        self._registry = registry
        self._namespace = namespace

    def counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, namespace=self._namespace, registry=self._registry)

    def gauge(self, name: str, text: str, *labels: str, combined: Combined = "livesum") -> Gauge:
        return Gauge(name, text, labels, namespace=self._namespace, registry=self._registry, multiprocess_mode=combined)

    def histogram(self, name: str, text: str, *labels: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(name, text, labels, namespace=self._namespace, registry=self._registry, buckets=buckets)
