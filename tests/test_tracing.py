"""What spans say of what happens.

Truth: the issue (one span per interception, with children; W3C context; no content unless asked for), W3C Trace Context, and
the semantic conventions of OpenTelemetry for HTTP and for generative AI (open-telemetry/semantic-conventions-genai, November
2026), whose notes on single attributes are quoted where a test is about one. Names with ``aibridge.`` are ours. The judge is
the official SDK: what it would export is looked at. How it is exported is in ``tests/test_otlp.py``.
"""

import json
import time
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON, ParentBased
from opentelemetry.trace import NoOpTracerProvider, SpanKind, StatusCode

from aibridge import Traces
from aibridge.events import CallAnswered, CallBegan, CallEnded, Committed, Event, PassedThrough, RecordLost
from aibridge.wire.base import Headers
from tests.support.records import ended, prompt, start, thought, tool, usage

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"
SAMPLED = f"00-{TRACE}-{PARENT}-01".encode()
SECRET = "s3cret content"


class Drawing:
    """Traces, and the spans that have ended."""

    def __init__(self, **options: Any) -> None:
        self.exporter = InMemorySpanExporter()
        provider = TracerProvider(options.pop("sampler", ParentBased(ALWAYS_ON)), shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.traces = Traces(provider, **options)

    def tell(self, *events: Event) -> "Drawing":
        for event in events:
            self.traces(event)
        return self

    @property
    def spans(self) -> list[ReadableSpan]:
        return list(self.exporter.get_finished_spans())

    def named(self, name: str) -> list[ReadableSpan]:
        return [span for span in self.spans if span.name == name]

    @property
    def root(self) -> ReadableSpan:
        (root,) = [span for span in self.spans if span.kind is SpanKind.SERVER]
        return root

    @property
    def call(self) -> ReadableSpan:
        """The only request to the provider."""
        (call,) = [span for span in self.spans if span.kind is SpanKind.CLIENT]
        return call


def began(hop: int = 1, attempt: int = 1, **fields: Any) -> CallBegan:
    known = {
        "interception_id": "i",
        "provider_name": "main",
        "route": "/v1/messages",
        "model": "claude-opus-5-5",
        "url": "https://api.example.com/v1/messages?key=s3cret",
    }
    return CallBegan(**{**known, **fields}, hop=hop, attempt=attempt)


def answered(status: int | None = 200, error: str | None = None) -> CallAnswered:
    return CallAnswered("i", "main", status, error, 0.5)


CALL_ENDED = CallEnded("i", "main")
COMMITTED = Committed("i", 0.002)


def attributes(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


def family(span: ReadableSpan) -> tuple[int | None, int | None]:
    """Its trace, and its parent's span."""
    assert span.context is not None
    return span.context.trace_id, None if span.parent is None else span.parent.span_id


def values(headers: Headers, name: bytes) -> list[bytes]:
    return [value for field, value in headers if field == name]


def complete(**fields: Any) -> list[Event]:
    """A whole interception with one request, in the order in which it happens (`aibridge.relay`)."""
    return [
        start(**fields),
        began(),
        answered(),
        prompt(prompt=SECRET),
        usage(metadata={"stop_reason": "end_turn"}),
        COMMITTED,
        ended(http_status=200),
        CALL_ENDED,
    ]


# ---- an interception ----


def test_an_interception() -> None:
    now = datetime.now(UTC)
    drawing = Drawing().tell(*complete(started_at=now, client="codex", client_session_id="s", user_agent="codex/1"))
    root = drawing.root
    assert root.name == "POST /main/v1/messages"
    assert attributes(root) == {
        "http.request.method": "POST",
        "http.route": "/main/v1/messages",
        "url.path": "/main/v1/messages",
        "http.response.status_code": 200,
        "user.id": "ada",
        "user_agent.original": "codex/1",
        "gen_ai.conversation.id": "s",
        "aibridge.interception.id": "i",
        "aibridge.provider": "main",
        "aibridge.client": "codex",
        "aibridge.status": "completed",
    }
    assert root.status.status_code is StatusCode.UNSET, "must be left unset where nothing has failed (recording errors)"
    assert root.parent is None
    assert root.start_time is not None and abs(root.start_time - now.timestamp() * 1e9) < 2000
    assert root.instrumentation_scope is not None and root.instrumentation_scope.name == "aibridge"
    assert drawing.traces._open == {}, "nothing is kept of what is over"


def test_the_request_to_the_provider() -> None:
    drawing = Drawing().tell(
        start(client_session_id="s"),
        began(),
        answered(),
        usage(
            provider_response_id="msg_1",
            input_tokens=5,
            output_tokens=7,
            cache_read_input_tokens=300,
            cache_write_input_tokens=20,
            metadata={"model": "claude-opus-5-5-20261001", "stop_reason": "end_turn"},
        ),
        COMMITTED,
        ended(),
        CALL_ENDED,
    )
    call = drawing.call
    assert call.name == "chat claude-opus-5-5"
    assert attributes(call) == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "anthropic",
        "gen_ai.request.model": "claude-opus-5-5",
        "gen_ai.request.stream": True,
        "gen_ai.conversation.id": "s",
        "server.address": "api.example.com",
        "server.port": 443,
        "http.response.status_code": 200,
        "aibridge.hop": 1,
        "gen_ai.response.id": "msg_1",
        "gen_ai.response.model": "claude-opus-5-5-20261001",
        "gen_ai.response.finish_reasons": ("end_turn",),
        # [28] "This value SHOULD include all types of input tokens, including cached tokens."
        "gen_ai.usage.input_tokens": 325,
        "gen_ai.usage.cache_read.input_tokens": 300,
        "gen_ai.usage.cache_write.input_tokens": 20,
        "gen_ai.usage.output_tokens": 7,
        "aibridge.usage.completeness": "complete",
    }
    assert call.status.status_code is StatusCode.UNSET
    assert drawing.root.context is not None
    assert family(call) == (drawing.root.context.trace_id, drawing.root.context.span_id)


def test_what_was_not_reported_is_not_said() -> None:
    drawing = Drawing().tell(
        start(model=None, streaming=False), began(model=None), answered(), usage(), COMMITTED, ended(), CALL_ENDED
    )
    assert drawing.call.name == "chat"
    assert not [name for name in attributes(drawing.call) if "usage." in name and name != "aibridge.usage.completeness"]
    # [11] "If unset, the request is assumed to be non-streaming."
    assert "gen_ai.request.stream" not in attributes(drawing.call)
    assert "gen_ai.response.finish_reasons" not in attributes(drawing.call)


@pytest.mark.parametrize(("route", "api"), [("/v1/chat/completions", "chat_completions"), ("/v1/responses", "responses")])
def test_openai_has_two_interfaces(route: str, api: str) -> None:
    drawing = Drawing().tell(*complete(provider="openai", route=route))
    assert attributes(drawing.call)["openai.api.type"] == api


@pytest.mark.parametrize(
    ("url", "server"),
    [
        ("http://gpu-1:8000/v1/x", ("gpu-1", 8000)),
        ("http://gpu-1/v1/x", ("gpu-1", 80)),
        ("https://[::1]/v1/x", ("::1", 443)),
    ],
)
def test_where_the_provider_is(url: str, server: tuple[str, int]) -> None:
    drawing = Drawing().tell(start(), began(url=url), answered(), COMMITTED, ended(), CALL_ENDED)
    assert (attributes(drawing.call)["server.address"], attributes(drawing.call)["server.port"]) == server


def test_the_time_to_the_first_chunk() -> None:
    """ "Measured from when the client issues the generation request to when the first chunk is received", in seconds."""
    drawing = Drawing()
    drawing.tell(start(started_at=datetime.now(UTC) - timedelta(seconds=10)), began(), answered())
    drawing.tell(COMMITTED, ended(time_to_first_byte_ms=10_500), CALL_ENDED)
    first = attributes(drawing.call)["gen_ai.response.time_to_first_chunk"]
    assert 0 < first <= 0.51, "0.5 s after the request, less what the test has taken since"


def test_the_commit() -> None:
    drawing = Drawing().tell(*complete())
    (commit,) = drawing.named("commit")
    assert commit.kind is SpanKind.INTERNAL
    assert commit.start_time is not None and commit.end_time is not None
    assert commit.end_time - commit.start_time == 2_000_000
    assert drawing.root.context is not None and family(commit)[1] == drawing.root.context.span_id
    assert drawing.root.end_time is not None and drawing.root.end_time >= commit.end_time


# ---- several requests ----


def test_a_conversation_with_a_tool() -> None:
    now = datetime.now(UTC)
    drawing = Drawing().tell(
        start(started_at=now),
        began(hop=1),
        answered(),
        usage("u1", provider_response_id="msg_1", metadata={"stop_reason": "tool_use"}),
        CALL_ENDED,
        tool(
            tool="look",
            injected=True,
            tool_call_id="toolu_1",
            input=json.dumps({"for": SECRET}),
            created_at=now,
            metadata={"server": "wiki", "duration_ms": 12.5},
        ),
        began(hop=2),
        answered(),
        usage("u2", provider_response_id="msg_2", metadata={"stop_reason": "end_turn"}),
        CALL_ENDED,
        COMMITTED,
        ended(),
    )
    first, second = drawing.named("chat claude-opus-5-5")
    assert [attributes(call)["gen_ai.response.id"] for call in (first, second)] == ["msg_1", "msg_2"]
    assert [attributes(call)["aibridge.hop"] for call in (first, second)] == [1, 2]
    assert first.end_time is not None and second.end_time is not None and first.end_time < second.end_time
    (execution,) = drawing.named("execute_tool look")
    assert execution.kind is SpanKind.INTERNAL
    assert attributes(execution) == {
        "gen_ai.operation.name": "execute_tool",
        "gen_ai.tool.name": "look",
        "gen_ai.tool.type": "extension",
        "gen_ai.tool.call.id": "toolu_1",
        "aibridge.tool.server": "wiki",
    }
    assert execution.start_time is not None and execution.end_time is not None
    assert execution.end_time - execution.start_time == 12_500_000
    assert abs(execution.end_time - now.timestamp() * 1e9) < 2000
    root = drawing.root.context
    assert root is not None
    assert {family(span) for span in (first, second, execution)} == {(root.trace_id, root.span_id)}


def test_a_tool_that_failed() -> None:
    failed = tool(tool="look", injected=True, invocation_error=SECRET, metadata={"server": "w", "duration_ms": 1.0})
    drawing = Drawing().tell(start(), failed)
    (execution,) = drawing.spans
    assert (execution.status.status_code, execution.status.description) == (StatusCode.ERROR, None)
    assert attributes(execution)["error.type"] == "tool_error"
    drawing = Drawing(content=True).tell(start(), failed)
    assert drawing.spans[0].status.description == SECRET


def test_attempts() -> None:
    """Each is a span. The interception has not failed: "Errors that were retried ... SHOULD NOT be recorded"."""
    drawing = Drawing().tell(
        start(),
        began(attempt=1),
        answered(503),
        CALL_ENDED,
        began(attempt=2),
        answered(None, "cannot connect"),
        CALL_ENDED,
        began(attempt=3),
        answered(),
        usage(metadata={"stop_reason": "end_turn"}),
        COMMITTED,
        ended(http_status=200),
        CALL_ENDED,
    )
    calls = drawing.named("chat claude-opus-5-5")
    assert [attributes(call).get("http.request.resend_count") for call in calls] == [None, 1, 2]
    assert [attributes(call).get("error.type") for call in calls] == ["503", "no_response", None]
    assert [call.status.status_code for call in calls] == [StatusCode.ERROR, StatusCode.ERROR, StatusCode.UNSET]
    assert [call.status.description for call in calls] == [None, "cannot connect", None], "ours, which quotes nothing"
    assert drawing.root.status.status_code is StatusCode.UNSET and "error.type" not in attributes(drawing.root)


# ---- what goes wrong ----


def test_a_request_that_the_provider_refuses() -> None:
    """HTTP: 4xx is an error to a client's span, and "MUST be left unset" on a server's."""
    drawing = Drawing().tell(start(), began(), answered(429), usage())
    drawing.tell(COMMITTED, ended(status="failed", http_status=429, error=f"rate_limit_error: {SECRET}"), CALL_ENDED)
    assert (drawing.call.status.status_code, attributes(drawing.call)["error.type"]) == (StatusCode.ERROR, "429")
    assert drawing.root.status.status_code is StatusCode.UNSET
    assert attributes(drawing.root)["aibridge.status"] == "failed" and "error.type" not in attributes(drawing.root)


def test_a_provider_that_fails() -> None:
    drawing = Drawing().tell(start(), began(), answered(529), usage())
    drawing.tell(COMMITTED, ended(status="failed", http_status=529, error="overloaded_error: "), CALL_ENDED)
    for span in (drawing.call, drawing.root):
        assert (span.status.status_code, attributes(span)["error.type"]) == (StatusCode.ERROR, "529")


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (f"overloaded_error: {SECRET}", "overloaded_error"),
        ("The provider's response broke off.", "broken_off"),
        (SECRET, "broken_off"),
        (None, "broken_off"),
    ],
)
def test_a_response_without_an_end(error: str | None, kind: str) -> None:
    """[18] "If a finish reason was expected but not received ... instrumentations SHOULD report `error`"."""
    drawing = Drawing().tell(start(), began(), answered(), CALL_ENDED, usage(completeness="partial", output_tokens=3))
    drawing.tell(COMMITTED, ended(status="failed", http_status=200, error=error))
    for span in (drawing.call, drawing.root):
        assert (span.status.status_code, span.status.description) == (StatusCode.ERROR, None)
        assert attributes(span)["error.type"] == kind
    assert attributes(drawing.call)["gen_ai.response.finish_reasons"] == ("error",)
    assert attributes(drawing.call)["gen_ai.usage.output_tokens"] == 3, "what comes after the end of the call counts"


def test_the_words_of_errors_are_content() -> None:
    words = f"overloaded_error: {SECRET}"
    drawing = Drawing(content=True).tell(start(), began(), answered())
    drawing.tell(COMMITTED, ended(status="failed", http_status=200, error=words), CALL_ENDED)
    assert (drawing.call.status.description, drawing.root.status.description) == (words, words)


def test_no_response() -> None:
    drawing = Drawing().tell(start(), began(), answered(None, "The provider cannot be reached."), CALL_ENDED)
    drawing.tell(COMMITTED, ended(status="failed", http_status=502, error="The provider cannot be reached."))
    assert attributes(drawing.call)["error.type"] == "no_response"
    assert drawing.call.status.description == "The provider cannot be reached."
    assert attributes(drawing.root)["error.type"] == "502" and drawing.root.status.status_code is StatusCode.ERROR


@pytest.mark.parametrize("head", [[answered()], []])
def test_a_client_that_leaves(head: list[Event]) -> None:
    """It is no error of the server's, as 499 is none, nor of the provider's; but what is missing is named."""
    drawing = Drawing().tell(start(), began(), *head, usage(completeness="partial"))
    drawing.tell(COMMITTED, ended(status="client_disconnected"), CALL_ENDED)
    for span in (drawing.call, drawing.root):
        assert (span.status.status_code, attributes(span)["error.type"]) == (StatusCode.UNSET, "client_disconnected")
    assert attributes(drawing.root)["aibridge.status"] == "client_disconnected"


def test_an_interrupted_one() -> None:
    drawing = Drawing().tell(start(), began(), answered(), COMMITTED, ended(status="interrupted"), CALL_ENDED)
    for span in (drawing.call, drawing.root):
        assert (span.status.status_code, attributes(span)["error.type"]) == (StatusCode.ERROR, "interrupted")


def test_a_response_that_was_whole_has_not_failed() -> None:
    """The client leaves while tools run: the request before that is none of it. Nor is it of a breaker that then opens."""
    for outcome in (ended(status="client_disconnected"), ended(status="failed", http_status=503)):
        drawing = Drawing().tell(start(), began(), answered(), usage(metadata={"stop_reason": "tool_use"}), CALL_ENDED)
        drawing.tell(COMMITTED, outcome)
        assert "error.type" not in attributes(drawing.call)
        assert attributes(drawing.call)["gen_ai.response.finish_reasons"] == ("tool_use",)


def test_no_request_was_made() -> None:
    """A breaker is open. What belongs to a request has no place then."""
    events: list[Event] = [start(), prompt(), thought(), usage(), tool(), COMMITTED, ended(status="failed", http_status=503)]
    drawing = Drawing(content=True).tell(*events)
    assert [span.name for span in drawing.spans] == ["commit", "POST /main/v1/messages"]


# ---- content ----


def with_content(drawing: Drawing) -> Drawing:
    return drawing.tell(
        start(),
        began(),
        answered(),
        prompt(prompt=f"{SECRET} asked"),
        usage(metadata={"stop_reason": "tool_use"}),
        tool(tool="Read", input=f'{{"path": "{SECRET}"}}', tool_call_id="toolu_1"),
        thought(content=f"{SECRET} thought"),
        tool(tool="look", injected=True, input=f'{{"for": "{SECRET}"}}', metadata={"server": "w", "duration_ms": 1.0}),
        COMMITTED,
        ended(),
        CALL_ENDED,
    )


def test_no_content_by_default() -> None:
    drawing = with_content(Drawing())
    assert len(drawing.spans) == 4
    assert SECRET not in "".join(span.to_json() for span in drawing.spans)


def test_content_where_it_is_asked_for() -> None:
    """By the JSON schemas for messages (gen-ai-input-messages.json, gen-ai-output-messages.json)."""
    drawing = with_content(Drawing(content=True))
    said = attributes(drawing.call)
    asked = {"role": "user", "parts": [{"type": "text", "content": f"{SECRET} asked"}]}
    assert json.loads(said["gen_ai.input.messages"]) == [asked]
    answer = {
        "role": "assistant",
        "parts": [
            {"type": "tool_call", "id": "toolu_1", "name": "Read", "arguments": f'{{"path": "{SECRET}"}}'},
            {"type": "reasoning", "content": f"{SECRET} thought"},
        ],
        "finish_reason": "tool_use",
    }
    assert json.loads(said["gen_ai.output.messages"]) == [answer]
    (execution,) = drawing.named("execute_tool look")
    assert attributes(execution)["gen_ai.tool.call.arguments"] == f'{{"for": "{SECRET}"}}'


def test_content_is_bounded() -> None:
    long = "x" * 1_000_000
    drawing = Drawing(content=True).tell(start(), began(), answered(), prompt(prompt=long))
    for _ in range(100):
        drawing.tell(tool(input=long), thought(content=long))
    drawing.tell(COMMITTED, ended(), CALL_ENDED)
    assert len(attributes(drawing.call)["gen_ai.input.messages"]) < 20_000
    assert len(attributes(drawing.call)["gen_ai.output.messages"]) < 300_000


def test_what_clients_choose_is_bounded() -> None:
    long = "x" * 100_000
    drawing = Drawing().tell(
        start(client=long, client_session_id=long, user_agent=long, model=long),
        began(model=long),
        answered(),
        usage(provider_response_id=long, metadata={"stop_reason": long, "model": long}),
        tool(tool=long, injected=True, tool_call_id=long, metadata={"server": "w", "duration_ms": 1.0}),
        COMMITTED,
        ended(),
        CALL_ENDED,
    )
    assert len("".join(span.to_json() for span in drawing.spans)) < 10_000


def test_a_query_is_in_no_span() -> None:
    """Some providers take a key there."""
    assert "s3cret" not in "".join(span.to_json() for span in Drawing().tell(*complete()).spans)


# ---- W3C Trace Context ----


def outgoing(drawing: Drawing, *headers: tuple[bytes, bytes]) -> Headers:
    """What a request to the provider carries, of a client that sent these fields."""
    drawing.traces.arrived("i", headers)
    drawing.tell(start(), began())
    return drawing.traces.outgoing("i", headers)


def test_the_clients_trace_goes_on() -> None:
    drawing = Drawing()
    sent = outgoing(drawing, (b"traceparent", SAMPLED), (b"accept", b"x"), (b"tracestate", b"a=1"), (b"tracestate", b"b=2"))
    drawing.tell(COMMITTED, ended(), CALL_ENDED)
    assert drawing.root.parent is not None and drawing.root.parent.is_remote
    assert family(drawing.root) == (int(TRACE, 16), int(PARENT, 16))
    assert drawing.call.context is not None
    assert values(sent, b"traceparent") == [f"00-{TRACE}-{drawing.call.context.span_id:016x}-01".encode()]
    assert values(sent, b"tracestate") == [b"a=1,b=2"], "fields with one name are one list (RFC 9110 section 5.3)"
    assert values(sent, b"accept") == [b"x"]


def test_each_request_has_its_own_context() -> None:
    drawing = Drawing()
    first = outgoing(drawing)
    drawing.tell(answered(503), CALL_ENDED, began(attempt=2))
    second = drawing.traces.outgoing("i", [])
    drawing.tell(answered(), COMMITTED, ended(), CALL_ENDED)
    spans = [span.context.span_id for span in drawing.named("chat claude-opus-5-5") if span.context is not None]
    sent = [int(values(headers, b"traceparent")[0].split(b"-")[2], 16) for headers in (first, second)]
    assert sent == spans and len(set(spans)) == 2


@pytest.mark.parametrize(
    "fields",
    [
        [],
        [(b"traceparent", b"00-" + TRACE.upper().encode() + b"-" + PARENT.encode() + b"-01")],
        [(b"traceparent", b"00-" + b"0" * 32 + b"-" + PARENT.encode() + b"-01")],
        [(b"traceparent", b"00-" + TRACE.encode() + b"-" + b"0" * 16 + b"-01")],
        [(b"traceparent", b"ff-" + TRACE.encode() + b"-" + PARENT.encode() + b"-01")],
        [(b"traceparent", SAMPLED + b"-more")],
        [(b"traceparent", b"\xff\xfe")],
        [(b"traceparent", SAMPLED), (b"traceparent", SAMPLED)],
    ],
)
def test_without_a_valid_context_a_trace_begins(fields: list[tuple[bytes, bytes]]) -> None:
    """ "If the vendor failed to parse traceparent, it MUST NOT attempt to parse tracestate" (section 3.3)."""
    drawing = Drawing()
    sent = outgoing(drawing, *fields, (b"tracestate", b"a=1"))
    assert drawing.traces._arrived == {}
    drawing.tell(COMMITTED, ended(), CALL_ENDED)
    root, call = drawing.root.context, drawing.call.context
    assert root is not None and call is not None
    assert drawing.root.parent is None and root.trace_id != int(TRACE, 16)
    # 02: the identifier of a trace that begins here is random (Trace Context, level 2)
    assert values(sent, b"traceparent") == [f"00-{root.trace_id:032x}-{call.span_id:016x}-{root.trace_flags:02x}".encode()]
    assert root.trace_flags.sampled
    assert values(sent, b"tracestate") == []


def test_of_a_later_version_the_known_part_counts() -> None:
    drawing = Drawing()
    outgoing(drawing, (b"traceparent", b"01" + SAMPLED[2:] + b"-more"))
    drawing.tell(COMMITTED, ended(), CALL_ENDED)
    assert family(drawing.root) == (int(TRACE, 16), int(PARENT, 16))


def test_baggage_is_the_clients_own() -> None:
    """It goes on byte for byte, as without traces, and is in no span."""
    baggage = [(b"baggage", b"tenant=s3cret"), (b"baggage", b"b = 2;p, c=%20")]
    drawing = Drawing()
    assert [field for field in outgoing(drawing, *baggage) if field[0] == b"baggage"] == baggage
    drawing.tell(COMMITTED, ended(), CALL_ENDED)
    assert "s3cret" not in "".join(span.to_json() for span in drawing.spans)


def test_what_the_client_does_not_sample() -> None:
    drawing = Drawing()
    sent = outgoing(drawing, (b"traceparent", SAMPLED[:-1] + b"0"), (b"tracestate", b"a=1"))
    (parent,) = values(sent, b"traceparent")
    assert parent.startswith(b"00-" + TRACE.encode()) and parent.endswith(b"-00") and PARENT.encode() not in parent
    assert values(sent, b"tracestate") == [b"a=1"]
    assert drawing.tell(*complete()[2:]).spans == []
    assert drawing.traces._open == {}


def test_sampling_that_is_off() -> None:
    drawing = Drawing(sampler=ALWAYS_OFF)
    (parent,) = values(outgoing(drawing), b"traceparent")
    assert parent[-2:] in (b"00", b"02"), "not sampled"
    assert drawing.tell(*complete()[2:]).spans == [] and drawing.traces._open == {}


def test_without_an_sdk_the_clients_context_goes_on() -> None:
    """As a library, where the application has set up none."""
    traces = Traces(NoOpTracerProvider())
    for fields in ([], [(b"traceparent", SAMPLED), (b"tracestate", b"a=1")]):
        traces.arrived("i", fields)
        traces(start())
        traces(began())
        assert traces.outgoing("i", fields) == fields
        traces(ended())


def test_below_a_span_that_is_active() -> None:
    """As of a framework that is instrumented, into which the bridge is mounted: it has read the client's context itself."""
    provider = TracerProvider(shutdown_on_exit=False)
    drawing = Drawing()
    with provider.get_tracer("framework").start_as_current_span("POST") as outer:
        outgoing(drawing, (b"traceparent", SAMPLED))
    drawing.tell(COMMITTED, ended(), CALL_ENDED)
    assert family(drawing.root) == (outer.get_span_context().trace_id, outer.get_span_context().span_id)


def test_what_is_not_intercepted_goes_as_it_is() -> None:
    """Passthrough has no interception, and no span."""
    drawing = Drawing()
    drawing.tell(began(interception_id=""), PassedThrough("main", "/v1/models", "GET", 200))
    fields = [(b"traceparent", SAMPLED)]
    assert drawing.traces.outgoing("", fields) == fields
    assert drawing.tell(CallEnded("", "main")).spans == []


# ---- what never ends ----


def test_what_arrived_and_did_not_start_is_forgotten() -> None:
    drawing = Drawing(max_open=3)
    for number in range(10):
        drawing.traces.arrived(str(number), [(b"traceparent", SAMPLED)])
    assert list(drawing.traces._arrived) == ["7", "8", "9"]


def test_too_many_interceptions() -> None:
    drawing = Drawing(max_open=3)
    for number in range(5):
        drawing.tell(start(str(number)), began(interception_id=str(number)))
    assert len(drawing.traces._open) == 3
    roots = drawing.named("POST /main/v1/messages")
    assert [attributes(root)["aibridge.interception.id"] for root in roots] == ["0", "1"]
    assert {attributes(root)["aibridge.status"] for root in roots} == {"in_progress"}
    drawing.tell(CallEnded("0", "main"), Committed("0", 0.1), ended("0"), RecordLost("0", "TokenUsage"))
    assert len(drawing.named("POST /main/v1/messages")) == 2, "what was let go of is over"
    assert drawing.traces.outgoing("0", []) == []


def test_an_interception_without_a_commit() -> None:
    """Its records are lost, or whoever was to wait for them has failed (`Entry.abandon`)."""
    drawing = Drawing().tell(start(), RecordLost("i", "TokenUsage"), ended())
    assert drawing.spans == [drawing.root] and drawing.root.status.status_code is StatusCode.UNSET
    assert drawing.root.end_time == round(ended().ended_at.timestamp() * 1e6) * 1000


def test_close_ends_all() -> None:
    drawing = Drawing().tell(start("a"), start("b"), began(interception_id="b"))
    before = time.time_ns()
    drawing.traces.close()
    assert len(drawing.spans) == 3 and drawing.traces._open == {}
    assert all(span.end_time is not None and span.end_time <= before for span in drawing.spans)


@pytest.mark.parametrize("days", [-1, 1])
def test_setting_the_clock_moves_no_span(days: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ledger's times do not follow it either."""
    drawing = Drawing().tell(start(started_at=datetime.now(UTC)), began())
    real = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: real() + days * 86_400 * 10**9)
    drawing.tell(answered(), CallEnded("i", "main"), began(2), answered(), CallEnded("i", "main"))
    drawing.tell(Committed("i", 0.0), ended(ended_at=datetime.now(UTC)))
    monkeypatch.undo()
    assert len(drawing.spans) == 4
    for span in drawing.spans:
        assert span.start_time is not None and span.end_time is not None
        assert real() - 60 * 10**9 < span.start_time <= span.end_time <= real()


def test_events_of_nobody() -> None:
    """An observer never raises: what it does not know is none of its business."""
    strangers: list[Event] = [*complete()[1:], RecordLost("i", ""), tool(injected=True), thought()]
    assert Drawing(content=True).tell(*strangers).spans == []


def test_the_names_are_those_of_the_conventions() -> None:
    """As far as the official package has them. `cache_write` is newer: semantic-conventions-genai #440 renamed it."""
    from opentelemetry.semconv._incubating.attributes import (
        gen_ai_attributes,
        http_attributes,
        openai_attributes,
        server_attributes,
        url_attributes,
        user_agent_attributes,
        user_attributes,
    )

    modules = (
        gen_ai_attributes,
        http_attributes,
        openai_attributes,
        server_attributes,
        url_attributes,
        user_agent_attributes,
        user_attributes,
    )
    known = {value for module in modules for value in vars(module).values() if isinstance(value, str)}
    newer = {"gen_ai.usage.cache_write.input_tokens", "gen_ai.response.time_to_first_chunk", "gen_ai.request.stream"}
    drawing = with_content(Drawing(content=True))
    drawing.tell(*complete(provider="openai", route="/v1/responses", client_session_id="s", user_agent="x"))
    drawing.tell(start(), began(attempt=2), answered(529), usage(cache_read_input_tokens=1, input_tokens=1))
    drawing.tell(COMMITTED, ended(status="failed", http_status=529, time_to_first_byte_ms=1.0), CALL_ENDED)
    said: Mapping[str, Any] = {name: None for span in drawing.spans for name in attributes(span)}
    ours = {name for name in said if name.startswith("aibridge.")}
    assert set(said) - ours - {"error.type"} <= known | newer
