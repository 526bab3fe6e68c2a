"""Where traces go, as configured and as OpenTelemetry's own variables say.

Truth: the specification of the OTLP exporter (endpoints, headers as in W3C Baggage) and of the SDK's variables; that they
count where `tracing.endpoint` is not given, and what of them we take, is our choice (docs/configuration.md).
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from aibridge.check import describe, traces
from aibridge.config import Settings
from aibridge.otelenv import traces_endpoint, traces_headers
from aibridge.settings import TracingSettings
from tests.serving import settings
from tests.support.gateway import Gateway

SECRET = "s3cret-of-the-collector"


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)


def test_off_by_default() -> None:
    given = settings().tracing
    assert (given.endpoint, given.headers, given.content) == (None, {}, False)


@pytest.mark.parametrize(
    ("given", "endpoint"),
    [
        ("http://collector:4318", "http://collector:4318/v1/traces"),
        ("http://collector:4318/", "http://collector:4318/v1/traces"),
        ("https://collector/v1/traces", "https://collector/v1/traces"),
        ("https://cloud.example/api/otel/", "https://cloud.example/api/otel/"),
    ],
)
def test_an_endpoint(given: str, endpoint: str) -> None:
    assert TracingSettings(endpoint=given).endpoint == endpoint


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"endpoint": "collector:4317"}, "http://"),
        ({"endpoint": ""}, "http://"),
        ({"endpoint": f"https://me:{SECRET}@collector"}, "must not hold credentials; use headers"),
        ({"endpoint": f"https://collector/?key={SECRET}"}, "without a query"),
        ({"headers": {"x key": SECRET}}, "not the name of a header field"),
        ({"headers": {"x": f"a\n{SECRET}"}}, "control characters"),
        ({"headers": SECRET}, "dictionary"),
        ({"sample_ratio": 1.1}, "less than or equal to 1"),
        ({"service_name": ""}, "at least 1 character"),
    ],
)
def test_what_cannot_be(given: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError) as caught:
        TracingSettings.model_validate(given)
    assert said in caught.value.errors()[0]["msg"]


def test_headers_are_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://collector:4318")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", f"authorization=Bearer%20{SECRET}")
    given = Settings()
    assert given.tracing.headers["authorization"].get_secret_value() == f"Bearer {SECRET}"
    shown = describe(given)
    assert SECRET not in shown + repr(given) and "http://collector:4318/v1/traces" in shown


# ---- OpenTelemetry's own variables ----


@pytest.mark.parametrize(
    ("variables", "endpoint"),
    [
        ({}, None),
        ({"ENDPOINT": "http://c:4318"}, "http://c:4318/v1/traces"),
        ({"ENDPOINT": "http://c:4318/otlp/"}, "http://c:4318/otlp/v1/traces"),
        ({"ENDPOINT": "http://c", "TRACES_ENDPOINT": "http://t/x"}, "http://t/x"),
        ({"ENDPOINT": ""}, None),
        ({"ENDPOINT": "localhost:4317"}, None),
        ({"ENDPOINT": "http://c:4318", "PROTOCOL": "http/protobuf"}, "http://c:4318/v1/traces"),
        ({"ENDPOINT": "http://c:4317", "PROTOCOL": "grpc"}, None),
        ({"ENDPOINT": "http://c", "PROTOCOL": "grpc", "TRACES_PROTOCOL": "http/protobuf"}, "http://c/v1/traces"),
        ({"ENDPOINT": "http://c", "TRACES_PROTOCOL": "http/json"}, None),
    ],
)
def test_the_endpoint_of_the_environment(variables: dict[str, str], endpoint: str | None) -> None:
    assert traces_endpoint({f"OTEL_EXPORTER_OTLP_{name}": value for name, value in variables.items()}) == endpoint


@pytest.mark.parametrize("endpoint", ["http://c:4318", "http://c:4318/", "http://c:4318/v1/traces/"])
def test_an_endpoint_that_the_environment_gives_for_traces_is_taken_as_it_is(
    endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ "the URL MUST be used as-is without any modification" (OTLP exporter, endpoint URLs for OTLP/HTTP)."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", endpoint)
    assert TracingSettings().endpoint == endpoint
    assert Settings().tracing.endpoint == endpoint


@pytest.mark.parametrize(
    ("name", "value", "on"),
    [
        ("OTEL_SDK_DISABLED", "TRUE", False),
        ("OTEL_SDK_DISABLED", "false", True),
        ("OTEL_TRACES_EXPORTER", "none", False),
        ("OTEL_TRACES_EXPORTER", "console", False),
        ("OTEL_TRACES_EXPORTER", "otlp", True),
        ("OTEL_TRACES_EXPORTER", "", True),
    ],
)
def test_the_environment_can_switch_its_endpoint_off(name: str, value: str, *, on: bool) -> None:
    found = traces_endpoint({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c", name: value})
    assert (found is not None) is on


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({}, "none are sent: there is no endpoint"),
        ({"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "none are sent: there is no endpoint"),
        ({"ENDPOINT": "https://c:4318/key-in-a-path"}, "https://c:4318, sample ratio 1"),
        (
            {"ENDPOINT": "http://c", "OTEL_TRACES_SAMPLER": "always_off"},
            "http://c, sampled by OTEL_TRACES_SAMPLER=always_off",
        ),
        ({"ENDPOINT": "c:4317"}, "none are sent: the endpoint in OTEL_EXPORTER_OTLP_* is no http:// or https:// URL"),
        ({"ENDPOINT": "http://c", "OTEL_SDK_DISABLED": "true"}, "none are sent: OTEL_SDK_DISABLED is true"),
        (
            {"ENDPOINT": "http://c", "OTEL_TRACES_EXPORTER": "console"},
            "none are sent: OTEL_TRACES_EXPORTER is 'console', not 'otlp'",
        ),
        (
            {"ENDPOINT": "http://c", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"},
            "none are sent: OTEL_EXPORTER_OTLP_PROTOCOL is 'grpc', and the gateway speaks http/protobuf only",
        ),
    ],
)
def test_where_traces_go_is_said(variables: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in variables.items():
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT" if name == "ENDPOINT" else name, value)
    assert traces(Settings()) == said


def test_a_configured_endpoint_that_the_sdk_does_not_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    """The SDK's tracers draw nothing with this variable, whoever made them (OpenTelemetry, "SDK variables")."""
    given = settings(tracing={"endpoint": "http://c", "sample_ratio": 0.1})
    assert traces(given) == "http://c, sample ratio 0.1"
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    assert traces(given) == "none are sent: OTEL_SDK_DISABLED is true"


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    ("variable", "line"),
    [
        ({}, ("info", "traces go to http://127.0.0.1:9, sample ratio 1")),
        (
            {"OTEL_TRACES_EXPORTER": "console"},
            ("warning", "no traces are sent: OTEL_TRACES_EXPORTER is 'console', not 'otlp'"),
        ),
    ],
)
def test_the_gateway_says_it_once(variable: dict[str, str], line: tuple[str, str], workers: int) -> None:
    variables = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9/secret", "AIBRIDGE_SERVER__WORKERS": str(workers)}
    variables["AIBRIDGE_LOG__FORMAT"] = "json"
    with Gateway(env=variables | variable) as gateway:
        gateway.stop()
        logged = [json.loads(line) for line in gateway.output.splitlines()]
    assert [(one["level"], one["message"]) for one in logged if "traces" in one["message"]] == [line]


def test_headers_of_the_environment() -> None:
    assert traces_headers({}) == {}
    listed = "X-Key=a%2Cb , authorization = Bearer%20x=,=lost,lost,y=,"
    assert traces_headers({"OTEL_EXPORTER_OTLP_HEADERS": listed}) == {"x-key": "a,b", "authorization": "Bearer x="}
    both = {"OTEL_EXPORTER_OTLP_HEADERS": "a=1", "OTEL_EXPORTER_OTLP_TRACES_HEADERS": "b=2"}
    assert traces_headers(both) == {"b": "2"}


def test_what_is_configured_is_stronger(monkeypatch: pytest.MonkeyPatch) -> None:
    """A credential for one receiver must not reach another by accident, as with the vendors' keys."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://elsewhere")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", f"authorization={SECRET}")
    given = TracingSettings(endpoint="http://collector")
    assert (given.endpoint, given.headers) == ("http://collector/v1/traces", {})
    given = TracingSettings.model_validate({"headers": {"authorization": "ours", "x": "y"}})
    assert given.endpoint == "http://elsewhere/v1/traces"
    assert {name: value.get_secret_value() for name, value in given.headers.items()} == {"authorization": "ours", "x": "y"}


# ---- what costs nothing while it is off ----


@pytest.mark.parametrize(("tracing", "loaded"), [({}, False), ({"endpoint": "http://127.0.0.1:9"}, True)])
def test_opentelemetry_is_loaded_only_where_it_is_used(tracing: dict[str, str], *, loaded: bool, tmp_path: Path) -> None:
    """Start-up time and memory at rest are promises (docs/performance.md)."""
    program = (
        "import sys\n"
        "from aibridge.config import Settings\n"
        "from aibridge.server import Server\n"
        f"Server(Settings(tracing={tracing!r}))\n"
        "print([name for name in sys.modules if name.partition('.')[0] in ('opentelemetry', 'requests', 'google')])\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=tmp_path, env={"PATH": ""}
    )
    assert bool(json.loads(found.stdout.replace("'", '"'))) is loaded
