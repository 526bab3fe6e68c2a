"""Prometheus metrics, as one of the bridge's observers. Names and labels are a contract (docs/metrics.md).

Whatever clients choose freely (model and tool names, client names) is bounded: beyond a number of distinct values, or a
length, a label becomes ``other``. Otherwise one client could fill the memory of the bridge and of Prometheus.
"""

from collections.abc import Callable
from datetime import datetime
from typing import Any, Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from aibridge.events import Event, HistoryMissed, PassedThrough, RecordLost
from aibridge.records import Interception, InterceptionEnded, PromptUsage, TokenUsage, ToolUsage

MAX_LABEL_VALUES: Final = 200
MAX_INITIATORS: Final = 5000
_MAX_LABEL_LENGTH: Final = 128
_OTHER: Final = "other"
_METHOD: Final = "POST"  # of every intercepted route

# Model turns take from a tenth of a second to tens of minutes.
_DURATIONS: Final = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0)


class _Bounded:
    """Lets the first values of a label through."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._known: set[str] = set()

    def __call__(self, value: str | None) -> str:
        value = value or ""
        if value not in self._known:
            if len(self._known) >= self._limit or len(value) > _MAX_LABEL_LENGTH:
                return _OTHER
            self._known.add(value)
        return value


class Metrics:
    """Counts what happens. Give it to a `RequestBridge` as an observer.

    `namespace` is put before each name, with an underscore; the server uses ``aibridge``. `max_label_values` bounds the
    distinct values of each label that clients influence, `max_initiators` those of the actors, who are authenticated.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        *,
        namespace: str = "",
        max_label_values: int = MAX_LABEL_VALUES,
        max_initiators: int = MAX_INITIATORS,
    ) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, labels, namespace=namespace, registry=registry)

        self._interceptions = counter(
            "interceptions_total",
            "Intercepted requests that have ended.",
            "provider",
            "model",
            "status",
            "route",
            "method",
            "initiator_id",
            "client",
        )
        self._inflight = Gauge(
            "interceptions_inflight",
            "Intercepted requests under way.",
            ("provider", "model", "route"),
            namespace=namespace,
            registry=registry,
            multiprocess_mode="livesum",  # of workers that share one port
        )
        self._duration = Histogram(
            "interceptions_duration_seconds",
            "Time from the start of an interception to its end.",
            ("provider", "model"),
            namespace=namespace,
            registry=registry,
            buckets=_DURATIONS,
        )
        self._tokens = counter(
            "tokens_total", "Tokens that providers reported.", "provider", "model", "type", "initiator_id", "client"
        )
        self._prompts = counter("prompts_total", "Prompts of users.", "provider", "model", "initiator_id", "client")
        self._tool_selections = counter(
            "non_injected_tool_selections_total",
            "Calls that models made of tools that the bridge did not inject.",
            "provider",
            "model",
            "name",
        )
        self._tool_invocations = counter(
            "injected_tool_invocations_total",
            "Calls of injected tools, whatever came of them.",
            "provider",
            "model",
            "server",
            "name",
        )
        self._missed = counter(
            "hidden_turns_missed_total",
            "Turns of the model whose hidden part could not be put back: it is lost, or nothing is known of the turn.",
            "provider",
            "reason",
        )
        self._passthrough = counter("passthrough_total", "Requests on passthrough routes.", "provider", "route", "method")
        self._lost = counter("records_lost_total", "Records that neither database nor spool could keep.", "kind")
        self._model = _Bounded(max_label_values)
        self._initiator = _Bounded(max_initiators)
        self._client = _Bounded(max_label_values)
        self._tool = _Bounded(max_label_values)
        self._injected = _Bounded(max_label_values)  # servers choose these
        self._series: dict[tuple[str, str, str, str, str], _Series] = {}
        self._open: dict[str, tuple[_Series, datetime]] = {}
        self._counts: dict[type, Callable[[Any], None]] = {
            Interception: self._begin,
            InterceptionEnded: self._end,
            TokenUsage: self._count_tokens,
            PromptUsage: self._count_prompt,
            ToolUsage: self._count_tool,
            PassedThrough: self._count_passthrough,
            RecordLost: self._count_loss,
            HistoryMissed: self._count_missed,
        }

    def __call__(self, event: Event) -> None:
        """Count an event."""
        count = self._counts.get(type(event))
        if count is not None:
            count(event)

    def _begin(self, event: Interception) -> None:
        key = (
            event.provider_name,
            self._model(event.model),
            event.route,
            self._initiator(event.initiator_id),
            self._client(event.client),
        )
        series = self._series.get(key)
        if series is None:
            series = self._series[key] = _Series(self._inflight, *key)
        self._open[event.id] = series, event.started_at
        series.inflight.inc()

    def _end(self, event: InterceptionEnded) -> None:
        series, started_at = self._open.pop(event.interception_id)
        series.inflight.dec()
        if series.duration is None:
            series.duration = self._duration.labels(series.provider, series.model)
        series.duration.observe((event.ended_at - started_at).total_seconds())
        ended = series.ended.get(event.status)
        if ended is None:
            labels = (series.provider, series.model, event.status, series.route, _METHOD, *series.who)
            ended = series.ended[event.status] = self._interceptions.labels(*labels)
        ended.inc()

    def _count_tokens(self, usage: TokenUsage) -> None:
        series, _ = self._open[usage.interception_id]
        for kind, count in (
            ("input", usage.input_tokens),
            ("output", usage.output_tokens),
            ("cache_read", usage.cache_read_input_tokens),
            ("cache_write", usage.cache_write_input_tokens),
        ):
            if count:
                tokens = series.tokens.get(kind)
                if tokens is None:
                    tokens = self._tokens.labels(series.provider, series.model, kind, *series.who)
                    series.tokens[kind] = tokens
                tokens.inc(count)

    def _count_prompt(self, usage: PromptUsage) -> None:
        series, _ = self._open[usage.interception_id]
        if series.prompts is None:
            series.prompts = self._prompts.labels(series.provider, series.model, *series.who)
        series.prompts.inc()

    def _count_tool(self, usage: ToolUsage) -> None:
        series, _ = self._open[usage.interception_id]
        if usage.injected:
            server, name = str(usage.metadata.get("server", "")), self._injected(usage.tool)
            self._tool_invocations.labels(series.provider, series.model, server, name).inc()
        else:
            self._tool_selections.labels(series.provider, series.model, self._tool(usage.tool)).inc()

    def _count_passthrough(self, event: PassedThrough) -> None:
        self._passthrough.labels(event.provider_name, event.route, event.method).inc()

    def _count_loss(self, event: RecordLost) -> None:
        self._lost.labels(event.kind).inc()

    def _count_missed(self, event: HistoryMissed) -> None:
        series, _ = self._open[event.interception_id]
        self._missed.labels(series.provider, "lost").inc(event.lost)
        self._missed.labels(series.provider, "unknown").inc(event.unknown)


class _Series:
    """The time series of interceptions that have all labels in common: finding them costs more than counting.

    Those that may never be needed are looked up when they are: looking one up is what makes it appear, with 0.
    """

    __slots__ = ("duration", "ended", "inflight", "model", "prompts", "provider", "route", "tokens", "who")

    def __init__(self, inflight: Gauge, provider: str, model: str, route: str, *who: str) -> None:
        self.provider = provider
        self.model = model
        self.route = route
        self.who = who
        self.inflight = inflight.labels(provider, model, route)
        self.duration: Histogram | None = None
        self.prompts: Counter | None = None
        self.ended: dict[str, Counter] = {}
        self.tokens: dict[str, Counter] = {}
