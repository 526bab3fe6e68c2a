"""How spans get to a receiver, and that sending them harms nothing.

Truth: OTLP 1 over HTTP, whose protobuf types decode what comes (`tests.support.otlp`); the issue (a receiver that is down
costs nothing but spans, shutdown flushes within a bound). What the spans say is in ``tests/test_tracing.py``.
"""

import logging
import time
from pathlib import Path

import pytest
from opentelemetry.sdk.trace import TracerProvider

from aibridge.events import CallAnswered, CallBegan, CallEnded, Committed
from aibridge.otlp import OtlpTraces
from tests.support.otlp import CLIENT, INTERNAL, SERVER, Receiver
from tests.support.records import ended, start, usage

SECRET = "s3cret-of-the-collector"


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for name in ("OTEL_SERVICE_NAME", "OTEL_RESOURCE_ATTRIBUTES", "OTEL_TRACES_SAMPLER", "OTEL_EXPORTER_OTLP_HEADERS"):
        monkeypatch.delenv(name, raising=False)


def traces_to(url: str, **options: object) -> OtlpTraces:
    return OtlpTraces(f"{url}/v1/traces", **{"headers": {}, **options})  # type: ignore[arg-type]


def intercept(traces: OtlpTraces, id: str = "i", status: int = 200) -> None:
    """A whole interception."""
    traces(start(id))
    traces(CallBegan(id, "main", "/v1/messages", "claude", "https://api.example.com/v1/messages", 1, 1))
    traces(CallAnswered(id, "main", status, None, 0.1))
    traces(usage(interception_id=id, input_tokens=1, metadata={"stop_reason": "end_turn"}))
    traces(ended(id, http_status=status))
    traces(Committed(id, 0.001))
    traces(CallEnded(id, "main"))


async def test_what_a_receiver_gets() -> None:
    with Receiver() as receiver:
        traces = traces_to(receiver.url, headers={"X-Key": SECRET})
        intercept(traces)
        await traces.aclose()
        (export,) = receiver.exports
    assert (export.path, export.headers["x-key"]) == ("/v1/traces", SECRET)
    assert export.headers["content-type"] == "application/x-protobuf"
    assert SECRET.encode() not in export.body
    spans = {span.name: span for span in export.spans}
    root, call, commit = spans["POST /main/v1/messages"], spans["chat claude"], spans["commit"]
    assert (root.kind, call.kind, commit.kind) == (SERVER, CLIENT, INTERNAL)
    assert root.parent == "" and {call.parent, commit.parent} == {root.id}
    assert {root.trace, call.trace, commit.trace} == {root.trace}
    assert call.attributes["gen_ai.response.finish_reasons"] == ["end_turn"]
    assert call.attributes["gen_ai.usage.input_tokens"] == 1
    assert root.resource["service.name"] == "aibridge" and root.resource["service.version"]


async def test_each_process_is_an_instance_of_the_service(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test,service.name=lost")
    with Receiver() as receiver:
        for name in (None, "gateway"):
            traces = traces_to(receiver.url, service_name=name)
            intercept(traces)
            await traces.aclose()
    resources = [export.spans[0].resource for export in receiver.exports]
    assert [resource["service.name"] for resource in resources] == ["aibridge", "gateway"]
    assert {resource["deployment.environment.name"] for resource in resources} == {"test"}
    assert len({resource["service.instance.id"] for resource in resources}) == 1, "of one process"


async def test_the_standard_name_of_the_service(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "standard")
    with Receiver() as receiver:
        for name in (None, "gateway"):
            traces = traces_to(receiver.url, service_name=name)
            intercept(traces)
            await traces.aclose()
    assert [export.spans[0].resource["service.name"] for export in receiver.exports] == ["standard", "gateway"]


async def test_credentials_for_other_receivers_stay_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither what the environment has for its own endpoint goes along, nor what ~/.netrc has for the host."""
    (tmp_path / ".netrc").write_text(f"machine 127.0.0.1 login me password {SECRET}")
    (tmp_path / ".netrc").chmod(0o600)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", f"x-other={SECRET}")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip")
    with Receiver() as receiver:
        for headers in ({}, {"authorization": "Bearer ours"}):
            traces = traces_to(receiver.url, headers=headers)
            intercept(traces)
            await traces.aclose()
    first, second = (export.headers for export in receiver.exports)
    assert "x-other" not in first and "authorization" not in first
    assert second["authorization"] == "Bearer ours" and second["content-encoding"] == "gzip"


@pytest.mark.parametrize(("ratio", "count"), [(0.0, 0), (1.0, 3)])
async def test_sampling(ratio: float, count: int) -> None:
    """Of what begins here. A trace of the client's goes on where the client says so."""
    with Receiver() as receiver:
        traces = traces_to(receiver.url, sample_ratio=ratio)
        intercept(traces)
        traces.arrived("j", [(b"traceparent", b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")])
        intercept(traces, "j")
        traces.arrived("k", [(b"traceparent", b"00-0af7651916cd43dd8448eb211c80319d-b7ad6b7169203331-00")])
        intercept(traces, "k")
        await traces.aclose()
    assert len(receiver.spans) == 3 + count
    assert len([span for span in receiver.spans if span.trace == "0af7651916cd43dd8448eb211c80319c"]) == 3


async def test_sampling_as_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "always_off")
    with Receiver() as receiver:
        for ratio in (None, 1.0):
            traces = traces_to(receiver.url, sample_ratio=ratio)
            intercept(traces)
            await traces.aclose()
    assert len(receiver.spans) == 3, "what is configured is stronger"


@pytest.mark.parametrize(("variables", "most"), [({}, 128), ({"OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "50"}, 50)])
async def test_batches(variables: dict[str, str], most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are small unless the environment wants others: while one is serialized, streams wait."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with Receiver() as receiver:
        traces = traces_to(receiver.url)
        for number in range(100):
            intercept(traces, str(number))
        await traces.aclose()
    assert max(len(export.spans) for export in receiver.exports) == most and len(receiver.spans) == 300


# ---- a receiver that does not do its part ----


@pytest.mark.parametrize("status", [400, 401, 500, 302, 307])
async def test_a_receiver_that_refuses(status: int, caplog: pytest.LogCaptureFixture) -> None:
    with Receiver(status) as receiver:
        traces = traces_to(receiver.url, headers={"x-key": SECRET})
        intercept(traces)
        await traces.aclose()
        assert len(receiver.exports) == 1, "one request, and no redirect that is followed"
    if status >= 400:  # a redirect is what the exporter takes for an acceptance
        assert any(record.levelno == logging.ERROR and str(status) in record.getMessage() for record in caplog.records)
    assert SECRET not in caplog.text


async def test_a_receiver_that_is_down(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Nobody listens. Interceptions go on at once, the queue has a bound, and the end does not wait for ever."""
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "30")
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "10")
    with Receiver() as receiver:
        url = receiver.url
    monkeypatch.setattr("aibridge.otlp._LAST_SPANS_SECONDS", 0.2)
    traces = traces_to(url, headers={"x-key": SECRET})
    for number in range(100):
        intercept(traces, str(number))
    assert traces._open == {}
    began = time.monotonic()
    await traces.aclose()
    assert time.monotonic() - began < 10, "not the exporter's own patience, for three batches"
    assert "Queue full, dropping Span." in caplog.text and "the last spans are lost" in caplog.text
    assert SECRET not in caplog.text


async def test_a_receiver_that_never_answers(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("aibridge.otlp._LAST_SPANS_SECONDS", 0.2)
    with Receiver() as receiver:
        receiver.answering = type(receiver.answering)()  # shut
        traces = traces_to(receiver.url)
        intercept(traces)
        await traces.aclose()
        assert "the last spans are lost" in caplog.text


async def test_the_end_of_what_is_under_way() -> None:
    """The process ends: what is open is sent as it is."""
    with Receiver() as receiver:
        traces = traces_to(receiver.url)
        traces(start())
        await traces.aclose()
    assert [(span.name, span.attributes["aibridge.status"]) for span in receiver.spans] == [
        ("POST /main/v1/messages", "in_progress")
    ]


async def test_nothing_global_is_touched() -> None:
    """An application around the bridge has an SDK of its own."""
    from opentelemetry import trace

    with Receiver() as receiver:
        traces = traces_to(receiver.url)
        assert not isinstance(trace.get_tracer_provider(), TracerProvider)
        await traces.aclose()
