"""Traces of whole conversations, as a receiver gets them, with the client's context coming in and ours going out.

Truth: the issue (point "Traces"), W3C Trace Context, and what the receiver decodes (`tests.support.otlp`). What single spans
say is in ``tests/test_tracing.py``, what a receiver may do wrong in ``tests/test_otlp.py``.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest

from aibridge import MemoryRecorder, Provider, RequestBridge
from aibridge.otlp import OtlpTraces
from aibridge.upstream import MemoryResponse, MemoryUpstream, UpstreamRequest
from aibridge.wire.observer import ResponseHead
from tests.serving import ALICE, call, scope
from tests.support.crowd import MESSAGES_STREAM, answer, ask
from tests.support.gateway import SESSION_HEADER, Gateway, wait_until
from tests.support.injected import QUESTION, Dialect, Refuses, Says, Thinks, turn, usage_of
from tests.support.injected_dialects import CHAT, MESSAGES, RESPONSES, both_ways, each_dialect
from tests.support.injected_loop import SECRET, InnerLoop, fails, looks
from tests.support.otlp import CLIENT, INTERNAL, SERVER, Receiver, Spanned
from tests.support.provider import ThreadedProvider

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"
CONTEXT = [
    (b"traceparent", f"00-{TRACE}-{PARENT}-01".encode()),
    (b"tracestate", b"vendor=x"),
    (b"baggage", b"tenant=blue"),
]
KEYS = {"gateway": "sk-client-0f5c1d", "provider": "sk-provider-77aa01", "receiver": "sk-receiver-5e2b90"}
OPERATIONS = {"messages": None, "chat": "chat_completions", "responses": "responses"}


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver() as receiver:
        yield receiver


@asynccontextmanager
async def traced(receiver: Receiver, *, content: bool = False) -> AsyncIterator[OtlpTraces]:
    """A tracer, of which everything has been received at the end."""
    traces = OtlpTraces(f"{receiver.url}/v1/traces", headers={"x-key": KEYS["receiver"]}, content=content)
    yield traces
    await traces.aclose()
    assert not (traces._open or traces._arrived), "nothing is kept of what is over"


def header(request: UpstreamRequest, name: bytes) -> list[bytes]:
    return [value for field, value in request.headers if field == name]


def only(spans: list[Spanned], kind: int) -> Spanned:
    (span,) = [span for span in spans if span.kind == kind]
    return span


# ---- a conversation with injected tools ----

TWO_HOPS = (
    turn(1, Thinks("Let me see.", "signature-1"), looks("one"), fails("two")),
    turn(2, Says("It is 3.")),
)


@both_ways
@each_dialect
async def test_a_conversation_of_two_hops(dialect: Dialect, *, stream: bool, receiver: Receiver) -> None:
    async with traced(receiver) as traces, InnerLoop(dialect, *TWO_HOPS, tracer=traces) as loop:
        seen = await loop.ask(dialect.asking(stream=stream), [*CONTEXT, (b"x-session-id", b"s")])
        assert seen.status == 200
    spans = receiver.spans
    assert [(span.name.partition(" ")[0], span.kind) for span in spans] == [
        ("POST", SERVER),
        ("chat", CLIENT),
        ("execute_tool", INTERNAL),
        ("execute_tool", INTERNAL),
        ("chat", CLIENT),
        ("commit", INTERNAL),
    ]
    root, first, *tools, second, _ = spans
    # the client's trace goes on, all spans below the one of the interception
    assert {span.trace for span in spans} == {TRACE}
    assert root.parent == PARENT and {span.parent for span in spans[1:]} == {root.id}
    assert root.name == f"POST {dialect.path}" and root.attributes["http.response.status_code"] == 200
    # the provider gets the context of each request's own span, and the client's baggage as it is
    sent = loop.upstream.requests
    assert [header(request, b"traceparent") for request in sent] == [[first.context + b"-01"], [second.context + b"-01"]]
    assert [header(request, b"tracestate") for request in sent] == [[b"vendor=x"]] * 2
    assert [header(request, b"baggage") for request in sent] == [[b"tenant=blue"]] * 2
    # what was used, as in the ledger but with what was cached
    for number, span in enumerate((first, second), start=1):
        row = loop.recorder.token_usages[number - 1]
        cached = (row.cache_read_input_tokens or 0) + (row.cache_write_input_tokens or 0)
        assert row.input_tokens is not None
        assert span.attributes["gen_ai.usage.input_tokens"] == row.input_tokens + cached
        assert span.attributes["gen_ai.usage.output_tokens"] == row.output_tokens == usage_of(number)[2]
        assert span.attributes["gen_ai.response.id"] == row.provider_response_id
        assert span.attributes["aibridge.hop"] == number and span.attributes["gen_ai.conversation.id"] == "s"
        assert span.attributes.get("openai.api.type") == OPERATIONS[dialect.format]
        assert span.attributes["http.response.status_code"] == 200
        assert root.began <= span.began <= span.ended <= root.ended
    assert first.ended <= second.began, "one after the other"
    assert ("gen_ai.response.time_to_first_chunk" in first.attributes) is stream
    # the calls, of which one has failed
    found = {span.attributes["gen_ai.tool.name"]: span for span in tools}
    assert {name: span.attributes["gen_ai.tool.call.id"] for name, span in found.items()} == {
        row.tool: row.tool_call_id for row in loop.recorder.tool_usages
    }
    assert (found["look"].status, found["fail"].status) == (0, 2)
    assert found["fail"].attributes["error.type"] == "tool_error"
    # no content
    exported = b"".join(export.body for export in receiver.exports)
    for words in ("Let me see", "It is 3", str(QUESTION["content"]), f"no {SECRET}", '"for"'):
        assert words.encode() not in exported


@each_dialect
async def test_content_where_it_is_asked_for(dialect: Dialect, receiver: Receiver) -> None:
    async with traced(receiver, content=True) as traces, InnerLoop(dialect, *TWO_HOPS, tracer=traces) as loop:
        await loop.ask(dialect.asking())
        thoughts = [row.content for row in loop.recorder.thoughts]
    first = next(span for span in receiver.spans if span.kind == CLIENT)
    (asked,) = json.loads(first.attributes["gen_ai.input.messages"])
    assert asked == {"role": "user", "parts": [{"type": "text", "content": QUESTION["content"]}]}
    if thoughts:
        (said,) = json.loads(first.attributes["gen_ai.output.messages"])
        assert said["parts"] == [{"type": "reasoning", "content": thoughts[0]}]
    (looked,) = [span for span in receiver.spans if span.name == "execute_tool look"]
    assert json.loads(looked.attributes["gen_ai.tool.call.arguments"])["for"] == f"{SECRET} one"


async def test_no_secret_is_in_a_trace(receiver: Receiver) -> None:
    """Neither of ours nor of the client's, which providers quote in their errors, nor of the receiver's."""
    played = (
        (MESSAGES, Provider.anthropic(api_key=KEYS["provider"]), KEYS["provider"]),
        (CHAT, Provider.openai(), KEYS["gateway"]),
    )
    credential = (b"authorization", f"Bearer {KEYS['gateway']}".encode())
    async with traced(receiver, content=True) as traces:
        for dialect, provider, quoted in played:
            refusal = Refuses(401, f"invalid x-api-key {quoted}")
            async with InnerLoop(dialect, refusal, tracer=traces, provider=provider) as loop:
                await loop.ask(dialect.asking(), [credential])
    exported = b"".join(export.body for export in receiver.exports)
    assert len(receiver.spans) == 6 and exported.count(b"[credential]") == 2
    assert not [key for key in KEYS.values() if key.encode() in exported]


async def test_a_client_that_leaves(receiver: Receiver) -> None:
    """While a tool runs: the request before it was whole, and there is no other."""
    running = asyncio.Event()

    async def look(_: object) -> str:
        running.set()
        await asyncio.Event().wait()
        raise AssertionError

    async with traced(receiver) as traces, InnerLoop(RESPONSES, TWO_HOPS[0], tools={"look": look}, tracer=traces) as loop:
        asked = loop.begin(RESPONSES.asking())
        async with asyncio.timeout(10):
            await running.wait()
        asked.leave()
        await asked.over()
    root, chat = only(receiver.spans, SERVER), only(receiver.spans, CLIENT)
    assert (root.attributes["error.type"], root.status) == ("client_disconnected", 0)
    assert "error.type" not in chat.attributes and chat.status == 0


async def test_passthrough_is_not_traced(receiver: Receiver) -> None:
    """The client's context goes through as it came."""

    upstream = MemoryUpstream(lambda _: MemoryResponse(ResponseHead(200, []), [b"{}"]))
    async with traced(receiver) as traces:
        bridge = RequestBridge([Provider.openai()], MemoryRecorder(), upstream=upstream, tracer=traces)
        found = await call(bridge, scope("GET", "/openai/v1/models", CONTEXT), actor=ALICE)
    assert found.status == 200 and receiver.spans == []
    assert [field for field in upstream.requests[0].headers if field in CONTEXT] == CONTEXT


# ---- the server ----


@pytest.mark.parametrize("workers", [1, 2])
async def test_the_server_exports_what_it_serves(workers: int, receiver: Receiver) -> None:
    """Each worker is an instance of the service. What is not sent yet when it stops is sent then."""
    env = {
        "AIBRIDGE_SERVER__WORKERS": str(workers),
        "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.url,
        "OTEL_EXPORTER_OTLP_HEADERS": f"x-key={KEYS['receiver']}",
        "OTEL_BSP_SCHEDULE_DELAY": "60000",
    }
    count = 1 if workers == 1 else 64
    with ThreadedProvider(answer) as provider, Gateway(anthropic_base_url=provider.url, env=env) as gateway:
        sessions = [f"session-{number}" for number in range(count)]
        async with asyncio.timeout(30):
            await asyncio.gather(*(ask(gateway.url, MESSAGES_STREAM, [(SESSION_HEADER, one)]) for one in sessions))
        requests = {received.header("traceparent")[0] for received in provider.requests}
        await asyncio.to_thread(gateway.stop)
        assert KEYS["receiver"] not in gateway.output and "Traceback" not in gateway.output
    assert {export.headers["x-key"] for export in receiver.exports} == {KEYS["receiver"]}
    roots = [span for span in receiver.spans if span.kind == SERVER]
    assert sorted(str(root.attributes["gen_ai.conversation.id"]) for root in roots) == sorted(sessions)
    chats = {(span.context + f"-{flags}".encode()).decode() for span in receiver.spans for flags in ("01", "03")}
    assert len(requests) == count and requests <= chats
    assert len({root.resource["service.instance.id"] for root in roots}) == workers


async def test_a_receiver_that_is_down_costs_nothing_but_spans() -> None:
    with Receiver() as gone:
        url = gone.url
    with ThreadedProvider(answer) as provider:
        toml = f'[tracing]\nendpoint = "{url}"\nheaders = {{ x-key = "{KEYS["receiver"]}" }}\n'
        env = {"OTEL_BSP_SCHEDULE_DELAY": "10", "OTEL_EXPORTER_OTLP_TIMEOUT": "1"}
        with Gateway(anthropic_base_url=provider.url, toml=toml, env=env) as gateway:
            async with asyncio.timeout(30):
                seen = await asyncio.gather(*(ask(gateway.url, MESSAGES_STREAM) for _ in range(20)))
            assert all(one.complete and one.status == 200 for one in seen)
            await asyncio.to_thread(wait_until, lambda: "Failed to export spans batch" in gateway.output, "no word of it")
            assert await asyncio.to_thread(gateway.stop) == -15
            assert KEYS["receiver"] not in gateway.output and "Traceback" not in gateway.output
