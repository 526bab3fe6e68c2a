"""The dashboard and the alerts in deploy: all that they name is there, and Prometheus takes them.

Truth: issue 5 ("checked by a test that every metric they name exists"): our registry and prometheus-client's own collectors
for what there is, docs/metrics.md for the values of labels; promtool, which is Prometheus' own, for the rest.
"""

import asyncio
import json
import re
import shutil
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any, Final

import pytest
import yaml
from prometheus_client import CollectorRegistry, Histogram, PlatformCollector, ProcessCollector

from tests.support.crowd import MESSAGES, answer, ask
from tests.support.gateway import Gateway, wait_until
from tests.support.promql import Query, read
from tests.support.provider import WAIT_SECONDS, ThreadedProvider
from tests.test_metrics import ALL, DOCUMENTATION, Counted, registered

DEPLOY: Final = Path(__file__).parent.parent / "deploy"
DASHBOARD: Final[dict[str, Any]] = json.loads((DEPLOY / "grafana" / "aibridge.json").read_text())
ALERTS_FILE: Final = DEPLOY / "prometheus" / "alerts.yaml"

NO_PROMTOOL: Final = "promtool is not installed (Debian has it in the package prometheus)"
needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason=NO_PROMTOOL)


def series() -> dict[str, set[str]]:
    """The series that there are to be scraped, and their labels."""
    found: dict[str, set[str]] = {"up": set()}
    for name, metric in registered(Counted(namespace="aibridge").registry).items():
        labels = set(metric._labelnames)
        if isinstance(metric, Histogram):
            found |= {f"{name}_bucket": labels | {"le"}, f"{name}_sum": labels, f"{name}_count": labels}
        else:
            found[name] = labels
    registry = CollectorRegistry()
    for collector in (ProcessCollector, PlatformCollector):
        collector(registry=registry)
    for family in registry.collect():
        found |= {sample.name: set(sample.labels) for sample in family.samples}
    return {name: labels | {"job", "instance"} for name, labels in found.items()}


SERIES: Final = series()
VALUES: Final = {
    label: set(re.findall(r"`(\w+)`", values))
    for label, values in re.findall(r"^\| `(\w+)` \| ([^|]*) \|$", DOCUMENTATION.read_text(), re.MULTILINE)
    if label in ("status", "type", "reason", "to", "state", "kind")
}


def complaints(expression: str) -> Iterator[str]:
    """What an expression names that is not there."""
    try:
        query = read(expression)
    except ValueError as error:
        yield str(error)
        return
    if not query.selectors:
        yield "it looks at nothing"
    for selector in query.selectors:
        labels = SERIES.get(selector.metric)
        if labels is None:
            yield f"there is no {selector.metric}"
            continue
        for label, _, value in selector.matchers:
            if label not in labels:
                yield f"{selector.metric} has no label {label}"
            elif "$" not in value and label in VALUES:
                yield from (f"{label} is never {one}" for one in value.split("|") if one not in VALUES[label])
        yield from (f"{selector.metric} has no label {label}" for label in (query.by | query.on) - labels)


def named(query: Query) -> set[str]:
    """The labels that a result has, to be named in texts about it."""
    return query.by or set.union(*(SERIES[selector.metric] for selector in query.selectors))


# ---- the dashboard ----

PANELS: Final[list[dict[str, Any]]] = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
TARGETS: Final[list[dict[str, Any]]] = [target for panel in PANELS for target in panel["targets"]]
VARIABLES: Final[dict[str, dict[str, Any]]] = {one["name"]: one for one in DASHBOARD["templating"]["list"]}


def test_all_that_the_dashboard_names_is_there() -> None:
    found = {target["expr"]: [*complaints(target["expr"])] for target in TARGETS}
    assert {expression: what for expression, what in found.items() if what} == {}
    for target in TARGETS:
        assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= named(read(target["expr"])), target


def test_the_variables() -> None:
    assert list(VARIABLES) == ["datasource", "instance", "provider", "model"]
    for variable in VARIABLES.values():
        if variable["type"] == "query":
            found = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"]["query"])
            assert found is not None
            expression, label = found.groups()
            assert [*complaints(expression)] == [] and label == variable["name"]
            assert label in named(read(expression))
    used = set(re.findall(r"\$(\w+)", json.dumps(PANELS))) | {"datasource"}
    assert used - {"__rate_interval", "__range"} == set(VARIABLES)


def test_the_dashboard_is_one() -> None:
    """What Grafana's documentation of its dashboards' JSON model asks for."""
    assert isinstance(DASHBOARD["schemaVersion"], int) and DASHBOARD["title"] == "aibridge" and DASHBOARD["id"] is None
    everything = DASHBOARD["panels"]
    assert len({panel["id"] for panel in everything}) == len(everything)
    assert {panel["type"] for panel in everything} == {"row", "stat", "table", "timeseries"}
    for panel in PANELS:
        assert panel["title"] and panel["datasource"]["uid"] == "${datasource}"
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"]) > 0
        assert panel["fieldConfig"]["defaults"]["unit"]
    places = [(panel["title"], panel["gridPos"]) for panel in everything]
    for (one, first), (other, second) in combinations(places, 2):
        apart = any(
            first[at] + first[size] <= second[at] or second[at] + second[size] <= first[at] for at, size in ("xw", "yh")
        )
        assert apart, f"{one} lies over {other}"
    assert all(place["x"] + place["w"] <= 24 for _, place in places)


# ---- the alerts ----

RULES: Final[list[dict[str, Any]]] = [
    rule for group in yaml.safe_load(ALERTS_FILE.read_text())["groups"] for rule in group["rules"]
]
ONCE: Final = {"AibridgeRecordsLost", "AibridgeHiddenTurnsLost", "AibridgeRestarting"}
"""Alerts about what has happened, which no waiting undoes."""


def test_all_that_the_alerts_name_is_there() -> None:
    found = {rule["alert"]: [*complaints(rule["expr"])] for rule in RULES}
    assert {alert: what for alert, what in found.items() if what} == {}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_an_alert_says_what_there_is_to_know(rule: dict[str, Any]) -> None:
    assert rule["alert"].startswith("Aibridge") and rule["labels"]["severity"] in ("critical", "warning")
    assert ("for" in rule) == (rule["alert"] not in ONCE)
    texts = rule["annotations"]
    assert set(texts) == {"summary", "description"} and len(texts["summary"]) < 100
    assert set(re.findall(r"\$labels\.(\w+)", json.dumps(texts))) <= named(read(rule["expr"]))


def test_nothing_is_left_out() -> None:
    """Every metric is to be seen on the dashboard; each alert has a name of its own."""
    seen = {selector.metric for target in TARGETS for selector in read(target["expr"]).selectors}
    families = {f"aibridge_{name}" for name in ALL}
    assert families - {re.sub("_(bucket|sum|count)$", "", name) for name in seen} == set()
    assert len({rule["alert"] for rule in RULES}) == len(RULES)


# ---- that what is wrong is found ----

WRONG: Final = {
    "aibridge_interception_total": "there is no aibridge_interception_total",
    "sum(rate(aibridge_tokens_total[5m])) / sum(rate(aibridge_interceptions[5m]))": "there is no aibridge_interceptions",
    "aibridge_tokens": "there is no aibridge_tokens",
    "rate(aibridge_interceptions_duration_seconds[5m])": "there is no aibridge_interceptions_duration_seconds",
    'aibridge_ready and on (job) proces_open_fds{instance="x"}': "there is no proces_open_fds",
    'aibridge_tokens_total{initiator="x"}': "aibridge_tokens_total has no label initiator",
    'aibridge_tokens_total{type=~"input|cached"}': "type is never cached",
    'aibridge_interceptions_total{status="error ",model="x"}': "status is never error ",
    "sum by (server) (aibridge_tokens_total)": "aibridge_tokens_total has no label server",
    "aibridge_ready and on (provider) aibridge_breaker_state": "aibridge_ready has no label provider",
    "rates(aibridge_tokens_total[5m])": "there is no function 'rates'",
    '{type="input"}': "a selector without a metric",
    "aibridge_tokens_total{type~'input'}": "not understood: \"~'input'}\"",
    "aibridge_tokens_total{type}": "'}' where there should be operator",
    "time()": "it looks at nothing",
}


@pytest.mark.parametrize("expression", WRONG)
def test_what_is_wrong_is_found(expression: str) -> None:
    assert WRONG[expression] in [*complaints(expression)]


def test_a_misspelt_metric_anywhere_is_found() -> None:
    """Each name in each expression in turn, with a letter too many."""
    expressions = [*(target["expr"] for target in TARGETS), *(rule["expr"] for rule in RULES)]
    tried = 0
    for expression in expressions:
        for selector in read(expression).selectors:
            wrong = re.sub(rf"\b{selector.metric}\b", f"{selector.metric}s", expression)
            assert f"there is no {selector.metric}s" in [*complaints(wrong)]
            tried += 1
    assert tried > len(expressions)


# ---- what Prometheus says ----


def promtool(*arguments: str | Path) -> str:
    done = subprocess.run(["promtool", *arguments], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_promtool
def test_prometheus_takes_the_rules_and_the_configuration() -> None:
    assert f"{len(RULES)} rules found" in promtool("check", "rules", "--lint=all", "--lint-fatal", ALERTS_FILE)
    assert "SUCCESS" in promtool("check", "config", DEPLOY / "prometheus" / "prometheus.yaml")


@needs_promtool
def test_prometheus_takes_what_the_dashboard_asks(tmp_path: Path) -> None:
    """As rules that record it, with something in the place of Grafana's variables."""
    asked = [re.sub(r"\$__\w+", "5m", target["expr"]) for target in TARGETS]
    rules = [{"record": f"panel:{number}", "expr": expression} for number, expression in enumerate(asked)]
    file = tmp_path / "dashboard.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    assert f"{len(asked)} rules found" in promtool("check", "rules", file)


@needs_promtool
def test_the_alerts_go_off_when_they_should() -> None:
    promtool("test", "rules", DEPLOY / "prometheus" / "alerts_test.yaml")


# ---- a real Prometheus ----

EMPTY: Final = {
    "Cache hit share by model",
    "Cache hits",
    "Calls of injected tools",
    "Circuit breakers",
    "Duration of calls, p95",
    "Failures by provider",
    "Hidden turns missed",
    "Injected tools",
    "MCP servers",
    "Passed through, and refused",
    "Tools of clients",
    "Trips and rejections",
}
"""Panels that have nothing to show where nothing of the kind has happened."""


class Prometheus:
    """A Prometheus that watches one gateway, and is asked over HTTP."""

    def __init__(self, folder: Path, gateway: Gateway) -> None:
        configuration = (DEPLOY / "prometheus" / "prometheus.yaml").read_text()
        file = folder / "prometheus.yaml"
        file.write_text(configuration.replace("127.0.0.1:8080", f"127.0.0.1:{gateway.port}").replace("15s", "1s"))
        shutil.copy(ALERTS_FILE, folder)
        self._log = folder / "log"
        with self._log.open("wb") as log:
            command = ["prometheus", f"--config.file={file}", f"--storage.tsdb.path={folder / 'data'}"]
            self.process = subprocess.Popen([*command, "--web.listen-address=127.0.0.1:0"], stdout=log, stderr=log)

    def ask(self, path: str, **query: str) -> Any:
        """The data of an answer of its API (prometheus.io/docs/prometheus/latest/querying/api)."""
        url = f"http://127.0.0.1:{self._port}/api/v1/{path}?{urllib.parse.urlencode(query)}"
        with urllib.request.urlopen(url, timeout=WAIT_SECONDS) as response:  # raises where it is not understood
            return json.load(response)["data"]

    def query(self, expression: str) -> Any:
        return self.ask("query", query=expression)["result"]

    @property
    def _port(self) -> int:
        wait_until(lambda: "Server is ready" in self._log.read_text(), "Prometheus does not start")
        found = re.search(r'msg="Listening on" address=127\.0\.0\.1:(\d+)', self._log.read_text())
        assert found is not None
        return int(found[1])


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[tuple[Gateway, Prometheus]]:
    with ThreadedProvider(answer) as provider, Gateway(anthropic_base_url=provider.url) as gateway:
        prometheus = Prometheus(tmp_path, gateway)
        try:
            yield gateway, prometheus
        finally:
            prometheus.process.terminate()
            prometheus.process.wait(WAIT_SECONDS)


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="Prometheus is not installed (Debian has it in prometheus)")
def test_a_real_prometheus_has_an_answer_for_every_panel(watched: tuple[Gateway, Prometheus]) -> None:
    gateway, prometheus = watched

    def has_rates() -> bool:
        asyncio.run(ask(gateway.url, MESSAGES))
        rate = "rate(aibridge_interceptions_time_to_first_byte_seconds_count[1m]) > 0"
        return bool(prometheus.query(f"{rate} and on (instance) increase(aibridge_tokens_total[1m])"))

    wait_until(has_rates, "there is nothing to see")
    answered = set()
    for panel in PANELS:
        for target in panel["targets"]:
            asked = re.sub(r"\$__\w+", "1m", target["expr"])
            if prometheus.query(re.sub(r"\$(instance|provider|model)", ".*", asked)):
                answered.add(panel["title"])
    assert {panel["title"] for panel in PANELS} - answered == EMPTY
    (target,) = prometheus.ask("targets")["activeTargets"]
    assert (target["health"], target["lastError"]) == ("up", "")
    assert [alert["labels"]["alertname"] for alert in prometheus.ask("alerts")["alerts"]] == []
