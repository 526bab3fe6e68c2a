"""Metrics.

Truth: design.md section 3 for names and labels, failures.md row 14 for the bound; docs/metrics.md is compared with both.
"""

import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.metrics import MetricWrapperBase

from aibridge.config import load
from aibridge.events import HistoryMissed, PassedThrough, RecordLost
from aibridge.metrics import MAX_LABEL_VALUES, Metrics
from aibridge.records import Interception, InterceptionEnded, ModelThought, PromptUsage, TokenUsage, ToolUsage
from aibridge.server import Server

DOCUMENTATION = Path(__file__).parent.parent / "docs" / "metrics.md"
NOW = datetime(2026, 11, 21, tzinfo=UTC)

# design.md section 3. The count of lost records is asked for in section 2 ("counted"), that of hidden turns that cannot be
# put back in wire.md D6 ("record the event"); both are named by us.
CONTRACT = {
    "interceptions_total": ("provider", "model", "status", "route", "method", "initiator_id", "client"),
    "interceptions_inflight": ("provider", "model", "route"),
    "interceptions_duration_seconds": ("provider", "model"),
    "tokens_total": ("provider", "model", "type", "initiator_id", "client"),
    "prompts_total": ("provider", "model", "initiator_id", "client"),
    "injected_tool_invocations_total": ("provider", "model", "server", "name"),
    "hidden_turns_missed_total": ("provider", "reason"),
    "non_injected_tool_selections_total": ("provider", "model", "name"),
    "passthrough_total": ("provider", "route", "method"),
    "records_lost_total": ("kind",),
}
KINDS = {Counter: "counter", Gauge: "gauge", Histogram: "histogram"}


class Counted:
    """Metrics, and what a scrape of them says."""

    def __init__(self, **options: Any) -> None:
        self.registry = CollectorRegistry()
        self.metrics = Metrics(self.registry, **options)
        self._ids = 0

    def begin(self, model: str | None = "m", *, who: str = "alice", client: str | None = "curl") -> str:
        self._ids += 1
        self.metrics(
            Interception(
                id=str(self._ids),
                initiator_id=who,
                provider="openai",
                provider_name="vllm",
                model=model,
                started_at=NOW,
                route="/v1/responses",
                streaming=True,
                client=client,
            )
        )
        return str(self._ids)

    def end(self, interception: str, status: Any = "completed") -> None:
        self.metrics(InterceptionEnded(interception_id=interception, ended_at=NOW + timedelta(seconds=3), status=status))

    def value(self, metric: str, /, **labels: str) -> float | None:
        return self.registry.get_sample_value(metric, labels)

    @property
    def series(self) -> int:
        return sum(len(family.samples) for family in self.registry.collect())


def registered(registry: CollectorRegistry) -> dict[str, MetricWrapperBase]:
    """The metrics of a registry by the names under which they are scraped."""
    found = {}
    for collector in registry._collector_to_names:
        if isinstance(collector, MetricWrapperBase):
            name = collector._name
            found[f"{name}_total" if isinstance(collector, Counter) else name] = collector
    return found


# ---- the contract ----


def test_names_and_labels() -> None:
    found = registered(Counted().registry)
    assert {name: metric._labelnames for name, metric in found.items()} == CONTRACT


def test_the_server_puts_its_name_before_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert set(registered(Server(load())._registry)) == {f"aibridge_{name}" for name in CONTRACT}


def test_the_documentation_says_the_same() -> None:
    rows = re.findall(r"^\| `(aibridge_\w+)` \| (\w+) \| (.*?) \|", DOCUMENTATION.read_text(), re.MULTILINE)
    documented = {name: (kind, tuple(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows}
    found = registered(Counted(namespace="aibridge").registry)
    assert documented == {name: (KINDS[type(metric)], metric._labelnames) for name, metric in found.items()}


def test_every_label_and_its_values_are_documented() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]*) \|$", DOCUMENTATION.read_text(), re.MULTILINE))
    assert set(rows) == {label for labels in CONTRACT.values() for label in labels}
    for status in ("completed", "failed", "client_disconnected", "interrupted"):
        assert f"`{status}`" in rows["status"]
    assert re.findall(r"`(\w+)`", rows["type"]) == ["input", "output", "cache_read", "cache_write"]
    assert f"first {MAX_LABEL_VALUES} values" in DOCUMENTATION.read_text()


# ---- what is counted ----


def test_an_interception() -> None:
    counted = Counted()
    one, two = counted.begin(), counted.begin()
    where = {"provider": "vllm", "model": "m", "route": "/v1/responses"}
    assert counted.value("interceptions_inflight", **where) == 2
    counted.end(one)
    counted.end(two, "failed")
    assert counted.value("interceptions_inflight", **where) == 0
    who = {"initiator_id": "alice", "client": "curl", "method": "POST"}
    assert counted.value("interceptions_total", **where, **who, status="completed") == 1
    assert counted.value("interceptions_total", **where, **who, status="failed") == 1
    assert counted.value("interceptions_duration_seconds_sum", provider="vllm", model="m") == 6
    assert counted.metrics._open == {}, "nothing is kept of what has ended"


def test_tokens_that_were_reported() -> None:
    counted = Counted()
    for given in ({"input_tokens": 3, "output_tokens": 0}, {"input_tokens": 4, "cache_write_input_tokens": 5}):
        began = counted.begin()
        counted.metrics(TokenUsage(id="u", interception_id=began, created_at=NOW, completeness="complete", **given))  # type: ignore[arg-type]
    labels = {"provider": "vllm", "model": "m", "initiator_id": "alice", "client": "curl"}
    found = {
        kind: counted.value("tokens_total", **labels, type=kind) for kind in ("input", "output", "cache_read", "cache_write")
    }
    assert found == {"input": 7, "output": None, "cache_read": None, "cache_write": 5}


def test_prompts_tools_and_the_rest() -> None:
    counted = Counted()
    began = counted.begin()
    counted.metrics(PromptUsage(id="p", interception_id=began, created_at=NOW, prompt="hi"))
    counted.metrics(ToolUsage(id="t", interception_id=began, created_at=NOW, tool="look"))
    about: dict[str, Any] = {"injected": True, "metadata": {"server": "wiki"}}
    counted.metrics(ToolUsage(id="i", interception_id=began, created_at=NOW, tool="ask", **about))
    counted.metrics(HistoryMissed(began, lost=2, unknown=1))
    counted.metrics(ModelThought(id="h", interception_id=began, created_at=NOW, content="hm"))
    counted.metrics(PassedThrough("vllm", "/v1/models", "GET", 404))
    counted.metrics(RecordLost(began, "ToolUsage"))
    counted.metrics(RecordLost("", ""))
    assert counted.value("prompts_total", provider="vllm", model="m", initiator_id="alice", client="curl") == 1
    assert counted.value("non_injected_tool_selections_total", provider="vllm", model="m", name="look") == 1
    assert counted.value("injected_tool_invocations_total", provider="vllm", model="m", server="wiki", name="ask") == 1
    assert counted.value("hidden_turns_missed_total", provider="vllm", reason="lost") == 2
    assert counted.value("hidden_turns_missed_total", provider="vllm", reason="unknown") == 1
    assert counted.value("passthrough_total", provider="vllm", route="/v1/models", method="GET") == 1
    assert counted.value("records_lost_total", kind="ToolUsage") == 1


def test_what_is_not_known_is_empty() -> None:
    counted = Counted()
    counted.end(counted.begin(None, client=None))
    assert counted.value("interceptions_duration_seconds_count", provider="vllm", model="") == 1


# ---- the bound ----


def test_ten_thousand_models_leave_a_bounded_number_of_series() -> None:
    counted = Counted()
    sizes = []
    for number in range(10_000):
        began = counted.begin(f"model-{number}")
        counted.metrics(TokenUsage(id="u", interception_id=began, created_at=NOW, completeness="complete", input_tokens=1))
        counted.metrics(PromptUsage(id="p", interception_id=began, created_at=NOW, prompt="hi"))
        counted.metrics(ToolUsage(id="t", interception_id=began, created_at=NOW, tool="look"))
        counted.end(began)
        if number in (MAX_LABEL_VALUES, 9_999):
            sizes.append(counted.series)
    assert sizes[0] == sizes[1]
    assert counted.value("interceptions_duration_seconds_count", provider="vllm", model="model-0") == 1
    assert counted.value("interceptions_duration_seconds_count", provider="vllm", model="other") == 10_000 - MAX_LABEL_VALUES
    assert counted.value("interceptions_inflight", provider="vllm", model="other", route="/v1/responses") == 0


@pytest.mark.parametrize("label", ["model", "who", "client", "tool"])
def test_each_label_from_outside_is_bounded(label: str) -> None:
    counted = Counted(max_label_values=3, max_initiators=3)
    for number in range(20):
        value = f"{label}-{number}"
        began = counted.begin(**({label: value} if label != "tool" else {}))
        counted.metrics(ToolUsage(id="t", interception_id=began, created_at=NOW, tool=value if label == "tool" else "look"))
        counted.end(began)
    names = {"model": "model", "who": "initiator_id", "client": "client", "tool": "name"}
    seen = {
        sample.labels[names[label]]
        for family in counted.registry.collect()
        for sample in family.samples
        if names[label] in sample.labels
    }
    assert seen == {f"{label}-0", f"{label}-1", f"{label}-2", "other"}


def test_long_values_are_other() -> None:
    counted = Counted()
    for model in ("x" * 128, "x" * 129, "x" * 1_000_000):
        counted.end(counted.begin(model))
    assert counted.value("interceptions_duration_seconds_count", provider="vllm", model="x" * 128) == 1
    assert counted.value("interceptions_duration_seconds_count", provider="vllm", model="other") == 2
