"""What is counted of intercepted requests, out of their records."""

from collections import defaultdict
from datetime import datetime
from typing import Final

from prometheus_client import Counter, Histogram

from aibridge.events import Committed, HistoryMissed
from aibridge.metrics.series import OTHER, Bounded, Bounds, Children, Consumers, Maker
from aibridge.records import Interception, InterceptionEnded, PromptUsage, TokenUsage, ToolUsage

_METHOD: Final = "POST"  # of every intercepted route

# Model turns take from a tenth of a second to tens of minutes.
_DURATIONS: Final = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0)
_FIRST_BYTES: Final = (0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0, 120.0, 300.0)
_COMMITS: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_CALLS: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)

_Labels = tuple[str, str, str, str, str]
"""Provider, model, route, actor, client."""


class Families:
    """The metrics of intercepted requests."""

    def __init__(self, make: Maker) -> None:
        who = ("initiator_id", "client")
        self.inflight = Children(
            make.gauge("interceptions_inflight", "Intercepted requests under way.", "provider", "model", "route")
        )
        self.ended = Children(
            make.counter(
                "interceptions_total",
                "Intercepted requests that have ended.",
                *("provider", "model", "status", "route", "method", *who),
            )
        )
        self.duration = Children(
            make.histogram(
                "interceptions_duration_seconds",
                "Time from the start of an interception to its end.",
                *("provider", "model"),
                buckets=_DURATIONS,
            )
        )
        self.first_byte = Children(
            make.histogram(
                "interceptions_time_to_first_byte_seconds",
                "Time from the start of an interception to the first byte of the provider's response.",
                *("provider", "model"),
                buckets=_FIRST_BYTES,
            )
        )
        self.commit = make.histogram(
            "interceptions_commit_seconds",
            "How long the end of an interception was held back until its records were durable.",
            buckets=_COMMITS,
        )
        self.tokens = Children(
            make.counter("tokens_total", "Tokens that providers reported.", "provider", "model", "type", *who)
        )
        self.prompts = Children(make.counter("prompts_total", "Prompts of users.", "provider", "model", *who))
        self.missed = Children(
            make.counter(
                "hidden_turns_missed_total",
                "Turns of the model whose hidden part could not be put back: it is lost, or nothing is known of the turn.",
                *("provider", "reason"),
            )
        )


class Interceptions:
    """Counts intercepted requests."""

    def __init__(self, make: Maker, bounds: Bounds) -> None:
        self._families = Families(make)
        self._tools = _Tools(make, bounds)
        self._bounds = bounds
        self._model = Bounded(bounds.label_values)
        self._initiator = Bounded(bounds.initiators)
        self._client = Bounded(bounds.label_values)
        self._series: dict[_Labels, _Series] = {}
        self._taken_up: defaultdict[str, int] = defaultdict(int)
        self._open: dict[str, tuple[_Series, datetime]] = {}

    @property
    def consumers(self) -> Consumers:
        """What counts which events."""
        return {
            Interception: self._begin,
            InterceptionEnded: self._end,
            TokenUsage: self._count_tokens,
            PromptUsage: self._count_prompt,
            ToolUsage: self._count_tool,
            HistoryMissed: self._count_missed,
            Committed: self._count_commit,
        }

    def _begin(self, event: Interception) -> None:
        labels = event.provider_name, event.model or "", event.route, event.initiator_id, event.client or ""
        series = self._series.get(labels)
        if series is None:
            labels = self._bounded(*labels)
            series = self._series.get(labels)
            if series is None:
                series = self._series[labels] = _Series(self._families, labels)
        self._open[event.id] = series, event.started_at
        series.inflight.inc()

    def _bounded(self, provider: str, model: str, route: str, initiator: str, client: str) -> _Labels:
        """What a combination counts as that is new. Where it is one too many, it takes up no values of labels either."""
        if len(self._series) >= self._bounds.combinations:
            labels = provider, OTHER, route, initiator, OTHER
            return labels if labels in self._series else (provider, OTHER, route, OTHER, OTHER)
        initiator = self._initiator(initiator)
        if self._taken_up[initiator] >= self._bounds.combinations_of_one:
            return provider, OTHER, route, initiator, OTHER
        labels = provider, self._model(model), route, initiator, self._client(client)
        self._taken_up[initiator] += labels not in self._series
        return labels

    def _end(self, event: InterceptionEnded) -> None:
        series, started_at = self._open.pop(event.interception_id)
        series.inflight.dec()
        if series.duration is None:
            series.duration = self._families.duration[series.provider, series.model]
        series.duration.observe((event.ended_at - started_at).total_seconds())
        if event.time_to_first_byte_ms is not None:
            if series.first_byte is None:
                series.first_byte = self._families.first_byte[series.provider, series.model]
            series.first_byte.observe(event.time_to_first_byte_ms / 1000)
        ended = series.ended.get(event.status)
        if ended is None:
            labels = (series.provider, series.model, event.status, series.route, _METHOD, *series.who)
            ended = series.ended[event.status] = self._families.ended[labels]
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
                    tokens = self._families.tokens[series.provider, series.model, kind, *series.who]
                    series.tokens[kind] = tokens
                tokens.inc(count)

    def _count_prompt(self, usage: PromptUsage) -> None:
        series, _ = self._open[usage.interception_id]
        if series.prompts is None:
            series.prompts = self._families.prompts[series.provider, series.model, *series.who]
        series.prompts.inc()

    def _count_tool(self, usage: ToolUsage) -> None:
        series, _ = self._open[usage.interception_id]
        self._tools.count(series.provider, series.model, usage)

    def _count_missed(self, event: HistoryMissed) -> None:
        series, _ = self._open[event.interception_id]
        self._families.missed[series.provider, "lost"].inc(event.lost)
        self._families.missed[series.provider, "unknown"].inc(event.unknown)

    def _count_commit(self, event: Committed) -> None:
        self._families.commit.observe(event.seconds)


class _Series:
    """The time series of interceptions that have all labels in common: finding them costs more than counting.

    Those that may never be needed are looked up when they are: looking one up is what makes it appear, with 0.
    """

    __slots__ = ("duration", "ended", "first_byte", "inflight", "model", "prompts", "provider", "route", "tokens", "who")

    def __init__(self, families: Families, labels: _Labels) -> None:
        self.provider, self.model, self.route, *who = labels
        self.who = tuple(who)
        self.inflight = families.inflight[self.provider, self.model, self.route]
        self.duration: Histogram | None = None
        self.first_byte: Histogram | None = None
        self.prompts: Counter | None = None
        self.ended: dict[str, Counter] = {}
        self.tokens: dict[str, Counter] = {}


class _Tools:
    """Counts calls of tools."""

    def __init__(self, make: Maker, bounds: Bounds) -> None:
        self._selections = Children(
            make.counter(
                "non_injected_tool_selections_total",
                "Calls that models made of tools that the bridge did not inject.",
                *("provider", "model", "name"),
            )
        )
        self._invocations = Children(
            make.counter(
                "injected_tool_invocations_total",
                "Calls of injected tools, whatever came of them.",
                *("provider", "model", "server", "name"),
            )
        )
        self._duration = Children(
            make.histogram("mcp_call_duration_seconds", "How long calls of injected tools took.", "server", buckets=_CALLS)
        )
        self._failures = Children(
            make.counter("mcp_call_failures_total", "Calls of injected tools that failed, or were not made.", "server")
        )
        self._limit = bounds.combinations
        self._name = Bounded(bounds.label_values)
        self._injected = Bounded(bounds.label_values)  # servers choose these
        self._server = Bounded(bounds.label_values)

    def count(self, provider: str, model: str, usage: ToolUsage) -> None:
        """Count one call in an interception with these labels."""
        if not usage.injected:
            labels = provider, model, self._name(usage.tool)
            self._selections.within(self._limit, labels, (provider, model, OTHER)).inc()
            return
        server = self._server(usage.metadata.get("server"))
        named = provider, model, server, self._injected(usage.tool)
        self._invocations.within(self._limit, named, (provider, model, server, OTHER)).inc()
        self._duration[server,].observe(usage.metadata.get("duration_ms", 0.0) / 1000)
        failures = self._failures[server,]  # appears with the first call: a rate needs the 0 before the 1
        if usage.invocation_error is not None:
            failures.inc()
