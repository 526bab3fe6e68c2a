"""What a run has found, and what is computed from it: medians, ratios to nginx of the same round, targets met or missed."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec

Samples = Sequence[float | None]
"""One number a round; None where the measurement failed."""


class Results(msgspec.Struct):
    """A run, as it is written to the JSON file."""

    when: str
    command: str
    machine: dict[str, str | int]
    versions: dict[str, str]
    """Of every subject and tool; the commit of aibridge."""
    absent: dict[str, str]
    """Subjects that were not measured, and why."""
    samples: dict[str, dict[str, list[float | None]]] = msgspec.field(default_factory=dict)
    """Row, subject, rounds."""
    problems: list[str] = msgspec.field(default_factory=list)
    """Measurements that failed or were skipped, and why."""

    def add(self, row: str, subject: str, value: float | None) -> None:
        """Note one round's number."""
        self.samples.setdefault(row, {}).setdefault(subject, []).append(value)

    def of(self, row: str, subject: str) -> Samples:
        """A row's numbers for a subject, one a round; empty where it was not measured."""
        return self.samples.get(row, {}).get(subject, ())


def median(samples: Samples) -> float | None:
    """The median of the rounds that have a number."""
    there = [sample for sample in samples if sample is not None]
    return statistics.median(there) if there else None


def paired(samples: Samples, base: Samples, compare: Callable[[float, float], float]) -> Samples:
    """Each round's number compared with that of the same round in `base`."""
    return [None if one is None or other is None else compare(one, other) for one, other in zip(samples, base, strict=False)]


def ratio(samples: Samples, base: Samples) -> float | None:
    """The median of the rounds' ratios. A round whose base is nothing or less has none: two such differ by noise only."""
    return median(
        paired(samples, [other if other and other > 0 else None for other in base], lambda one, other: one / other)
    )


def difference(samples: Samples, base: Samples) -> float | None:
    """The median of the rounds' differences."""
    return median(paired(samples, base, lambda one, other: one - other))


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    key: str
    title: str
    unit: str
    digits: int = 0
    over_direct: bool = False
    """Shown is what comes on top of the same without a subject."""
    compare: bool = True
    """Whether the ratio to nginx is shown."""

    def values(self, results: Results, subject: str) -> Samples:
        """The row's numbers for a subject, one a round."""
        samples = results.of(self.key, subject)
        if not self.over_direct:
            return samples
        return paired(samples, results.of(self.key, "direct"), lambda one, other: one - other)


ROWS: Final = (
    Row("cpu_request", "CPU per 2 KB request", "µs"),
    Row("cpu_request_chat", "CPU per 2 KB request, Chat", "µs"),
    Row("cpu_large_request", "CPU per 200 KB request", "µs"),
    Row("cpu_event", "CPU per event, flushed one by one", "µs", 1),
    Row("cpu_burst_event", "CPU per event, in bursts", "µs", 2),
    Row("throughput", "requests on one core", "1/s", compare=False),
    Row("latency_p50", "added latency at 20/s, p50", "ms", 2, over_direct=True),
    Row("latency_p99", "added latency at 20/s, p99", "ms", 2, over_direct=True),
    Row("first_event_p50", "added time to first event, p50", "ms", 2, over_direct=True),
    Row("first_event_p99", "added time to first event, p99", "ms", 2, over_direct=True),
    Row("event_delay_p50", "event delay, 100 streams, p50", "ms", 2),
    Row("event_delay_p99", "event delay, 100 streams, p99", "ms", 2),
    Row("memory_at_rest", "memory at rest", "MB", 1),
    Row("memory_1000", "memory, 1,000 streams", "MB", 1),
    Row("kb_per_stream_1000", "memory per stream, 1,000 open", "KB", 1),
    Row("memory_5000", "memory, 5,000 streams", "MB", 1),
    Row("kb_per_stream_5000", "memory per stream, 5,000 open", "KB", 1),
    Row("lag_p99_1000", "loop lag, 1,000 streams, p99", "ms", 1, compare=False),
    Row("lag_p99_5000", "loop lag, 5,000 streams, p99", "ms", 1, compare=False),
    Row("start", "start to first answer", "s", 2, compare=False),
    Row("start_again", "the same with a ledger there", "s", 2, compare=False),
    Row("two_workers", "two workers' requests, to one's", "x", 2, compare=False),
)


@dataclass(frozen=True)
class Target:
    """What must hold. `limit` is the largest value allowed, or the smallest with `at_least`."""

    title: str
    limit: float
    measured: Callable[[Results], float | None]
    at_least: bool = False

    def verdict(self, results: Results) -> tuple[str, float | None]:
        """``ok``, ``missed`` or ``not measured``, and the value."""
        value = self.measured(results)
        if value is None:
            return "not measured", None
        return "ok" if (value >= self.limit if self.at_least else value <= self.limit) else "missed", value


def _times_nginx(row: str) -> Callable[[Results], float | None]:
    return lambda results: ratio(results.of(row, "aibridge"), results.of(row, "nginx"))


def _times_less_than(peer: str) -> Callable[[Results], float | None]:
    def smallest(results: Results) -> float | None:
        rows = ("cpu_request", "cpu_request_chat")
        ratios = [ratio(results.of(row, peer), results.of(row, "aibridge")) for row in rows]
        return min((value for value in ratios if value is not None), default=None)

    return smallest


def _median_of(row: str) -> Callable[[Results], float | None]:
    return lambda results: median(results.of(row, "aibridge"))


def _over_nginx(row: str) -> Callable[[Results], float | None]:
    return lambda results: difference(results.of(row, "aibridge"), results.of(row, "nginx"))


TARGETS: Final = (
    Target("CPU per 2 KB request, times nginx's", 6, _times_nginx("cpu_request")),
    Target("CPU per separately flushed event, times nginx's", 2, _times_nginx("cpu_event")),
    Target("CPU per burst event, times nginx's", 6, _times_nginx("cpu_burst_event")),
    Target("CPU per 200 KB request, times nginx's", 1.8, _times_nginx("cpu_large_request")),
    Target("times less CPU per request than Portkey", 8, _times_less_than("portkey"), at_least=True),
    Target("times less CPU per request than LiteLLM", 80, _times_less_than("litellm"), at_least=True),
    Target("latency at 20/s over nginx's, median, ms", 0.5, _over_nginx("latency_p50")),
    Target("event delay with 100 streams, p99, times nginx's", 2, _times_nginx("event_delay_p99")),
    Target("loop lag with 1,000 streams, p99, ms", 20, _median_of("lag_p99_1000")),
    Target("memory at rest, MB", 60, _median_of("memory_at_rest")),
    Target("memory per stream, 1,000 open, KB", 40, _median_of("kb_per_stream_1000")),
    Target("memory per stream, 5,000 open, KB", 40, _median_of("kb_per_stream_5000")),
    Target("start to first answer, s", 1, _median_of("start")),
    Target("two workers' requests, times one's", 1.8, _median_of("two_workers"), at_least=True),
)
"""What the gateway promises; docs/performance.md says how it stands."""
