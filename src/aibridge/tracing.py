"""OpenTelemetry traces, drawn by one of the bridge's observers: a span for each interception, and below it what it did.

    POST /anthropic/v1/messages      SERVER     the interception
        chat claude-opus-5-5         CLIENT     a request to the provider
        execute_tool search          INTERNAL   a call of an injected tool
        chat claude-opus-5-5         CLIENT     the next turn
        commit                       INTERNAL   waiting for the ledger

Prompts, thoughts, arguments, and the words of errors, which may quote those, are left out unless they are asked for.

OpenTelemetry takes time and memory to load (docs/operations.md): nothing imports this module but what draws traces.
"""

import time
from collections.abc import Callable, Mapping
from datetime import datetime
from importlib.metadata import version
from typing import Any, Final

from opentelemetry.context import Context
from opentelemetry.propagators.textmap import Getter
from opentelemetry.trace import Span, SpanKind, StatusCode, TracerProvider, get_current_span, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from aibridge import spans
from aibridge.events import CallAnswered, CallBegan, CallEnded, Committed, Event
from aibridge.records import Interception, InterceptionEnded, ModelThought, PromptUsage, TokenUsage, ToolUsage
from aibridge.wire.base import Headers

MAX_OPEN: Final = 10_000
_MAX_PARTS: Final = 16  # of the model's message: each may be 16,384 characters, and thousands of spans may wait to be sent


class Traces:
    """Draws interceptions as traces. Give it to a `RequestBridge` as its tracer.

    `provider` makes the spans, samples and exports them. `content`: with what people and models say.

    An interception that is in an active span, as of an instrumented framework, goes below that, else below the client's
    (W3C Trace Context), else it begins a trace. Passthrough has no spans, and what the client sent of its context goes on.

    At most `max_open` interceptions are followed: the span of the oldest is ended, as in progress, for a newer one.
    """

    def __init__(self, provider: TracerProvider, *, content: bool = False, max_open: int = MAX_OPEN) -> None:
        self._tracer = provider.get_tracer("aibridge", version("aibridge"))
        self._content = content
        self._max_open = max_open
        self._arrived: dict[str, Context] = {}  # of which the start has not been told
        self._open: dict[str, _Trace] = {}
        self._draws: dict[type, Callable[[Any], None]] = {
            Interception: self._begin,
            CallBegan: self._begin_call,
            CallAnswered: self._answer_call,
            CallEnded: self._end_call,
            TokenUsage: self._draw_usage,
            PromptUsage: self._draw_prompt,
            ModelThought: self._draw_thought,
            ToolUsage: self._draw_tool,
            InterceptionEnded: self._end,
            Committed: self._commit,
        }

    def __call__(self, event: Event) -> None:
        """Draw an event."""
        draw = self._draws.get(type(event))
        if draw is not None:
            draw(event)

    def arrived(self, interception_id: str, headers: Headers) -> None:
        """Read the context that a request came with. One that is invalid is none."""
        if not any(name == b"traceparent" for name, _ in headers):
            return
        context = _W3C.extract(headers, Context(), _FIELDS)
        if context:
            if len(self._arrived) >= self._max_open:
                del self._arrived[next(iter(self._arrived))]
            self._arrived[interception_id] = context

    def outgoing(self, interception_id: str, headers: Headers) -> Headers:
        """The header fields of a request to the provider, with the context of its span in place of the client's.

        `baggage` is the client's own and goes on as it came, like every field.
        """
        trace = self._open.get(interception_id)
        if trace is None:
            return headers
        context = (trace.calls[-1].span if trace.calls else trace.span).get_span_context()
        if not context.is_valid:
            return headers
        sent = [field for field in headers if field[0] not in _CONTEXT_FIELDS]
        parent = f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"
        sent.append((b"traceparent", parent.encode()))
        if context.trace_state:
            sent.append((b"tracestate", context.trace_state.to_header().encode()))
        return sent

    def close(self) -> None:
        """End the spans that are open."""
        for trace in list(self._open.values()):
            self._finish(trace)

    def _begin(self, interception: Interception) -> None:
        arrived = self._arrived.pop(interception.id, None) or Context()
        active = get_current_span()
        span = self._tracer.start_span(
            spans.interception_name(interception),
            set_span_in_context(active, Context()) if active.get_span_context().is_valid else arrived,
            SpanKind.SERVER,
            spans.of_interception(interception),
            start_time=_nanoseconds(interception.started_at),
        )
        if len(self._open) >= self._max_open:
            self._finish(next(iter(self._open.values())))
        self._open[interception.id] = _Trace(interception, span)

    def _begin_call(self, event: CallBegan) -> None:
        trace = self._drawn(event.interception_id)
        if trace is not None:
            began = trace.now()
            span = self._tracer.start_span(
                spans.call_name(event),
                trace.context,
                SpanKind.CLIENT,
                spans.of_call(trace.interception, event),
                start_time=began,
            )
            trace.calls.append(_Call(span, began))

    def _answer_call(self, event: CallAnswered) -> None:
        call = self._call(event.interception_id)
        if call is not None:
            call.head = event

    def _end_call(self, event: CallEnded) -> None:
        trace = self._drawn(event.interception_id)
        if trace is not None and trace.calls:
            trace.calls[-1].ended = trace.until = trace.now()
            self._finish_where_over(trace)

    def _draw_usage(self, usage: TokenUsage) -> None:
        call = self._call(usage.interception_id)
        if call is not None:
            call.span.set_attributes(spans.of_usage(usage))
            call.stop_reason = usage.metadata.get("stop_reason")

    def _draw_prompt(self, usage: PromptUsage) -> None:
        call = self._call(usage.interception_id) if self._content else None
        if call is not None:
            call.span.set_attribute("gen_ai.input.messages", spans.encoded(spans.question(usage.prompt)))

    def _draw_thought(self, thought: ModelThought) -> None:
        call = self._call(thought.interception_id) if self._content else None
        if call is not None:
            call.say(spans.thought(thought.content))

    def _draw_tool(self, usage: ToolUsage) -> None:
        if usage.injected:
            self._draw_execution(usage)
            return
        call = self._call(usage.interception_id) if self._content else None
        if call is not None:
            call.say(spans.tool_call(usage))

    def _draw_execution(self, usage: ToolUsage) -> None:
        """A call of an injected tool, which is over by the time that there is a record of it."""
        trace = self._drawn(usage.interception_id)
        if trace is None:
            return
        ended = _nanoseconds(usage.created_at)
        began = ended - round(usage.metadata.get("duration_ms", 0) * 1e6)
        attributes = spans.of_tool(usage, content=self._content)
        span = self._tracer.start_span(spans.tool_name(usage), trace.context, attributes=attributes, start_time=began)
        if usage.invocation_error is not None:
            span.set_status(StatusCode.ERROR, usage.invocation_error if self._content else None)
        span.end(ended)

    def _end(self, outcome: InterceptionEnded) -> None:
        trace = self._drawn(outcome.interception_id)
        if trace is None:
            self._open.pop(outcome.interception_id, None)
            return
        trace.outcome, trace.until = outcome, max(trace.until, _nanoseconds(outcome.ended_at))
        self._finish_where_over(trace)

    def _commit(self, event: Committed) -> None:
        trace = self._drawn(event.interception_id)
        if trace is not None:
            trace.until = trace.now()
            span = self._tracer.start_span("commit", trace.context, start_time=trace.until - round(event.seconds * 1e9))
            span.end(trace.until)

    def _drawn(self, interception_id: str) -> "_Trace | None":
        """The trace of an interception, if it is sampled."""
        trace = self._open.get(interception_id)
        return trace if trace is not None and trace.sampled else None

    def _call(self, interception_id: str) -> "_Call | None":
        """The last request to the provider."""
        trace = self._drawn(interception_id)
        return trace.calls[-1] if trace is not None and trace.calls else None

    def _finish_where_over(self, trace: "_Trace") -> None:
        if trace.over:
            self._finish(trace)

    def _finish(self, trace: "_Trace") -> None:
        del self._open[trace.interception.id]
        trace.finish(content=self._content)


class _Trace:
    """What has been drawn of one interception. `until` is when something was last heard of it."""

    __slots__ = ("_epoch", "calls", "context", "interception", "outcome", "sampled", "span", "until")

    def __init__(self, interception: Interception, span: Span) -> None:
        self.interception = interception
        self.span = span
        self.sampled = span.is_recording()
        self.context = set_span_in_context(span, Context())
        self.calls: list[_Call] = []
        self.outcome: InterceptionEnded | None = None
        self.until = _nanoseconds(interception.started_at)
        self._epoch = time.time_ns() - time.monotonic_ns()

    def now(self) -> int:
        """The time in nanoseconds, by a clock that has not been set since the start, as in the ledger."""
        return self._epoch + time.monotonic_ns()

    @property
    def over(self) -> bool:
        """Whether nothing more will be heard of it."""
        return self.outcome is not None and (not self.calls or self.calls[-1].ended is not None)

    def finish(self, *, content: bool) -> None:
        """End all spans. `content`: with the words of errors."""
        outcome = self.outcome
        if outcome is None:
            self.span.set_attribute("aibridge.status", "in_progress")
        else:
            self.span.set_attributes(spans.of_outcome(outcome))
            if spans.has_failed(outcome):
                self.span.set_status(StatusCode.ERROR, outcome.error if content else None)
            if self.interception.streaming and outcome.time_to_first_byte_ms is not None:
                self._time_first_byte(outcome.time_to_first_byte_ms)
        for call in self.calls:
            call.finish(outcome if call is self.calls[-1] else None, self.until, content=content)
        self.span.end(self.until)

    def _time_first_byte(self, milliseconds: float) -> None:
        """The record counts from the start of the interception, the conventions from that of the request."""
        first = _nanoseconds(self.interception.started_at) + round(milliseconds * 1e6)
        for call in self.calls:
            if call.head is not None and call.head.http_status is not None:
                call.span.set_attribute("gen_ai.response.time_to_first_chunk", max(0, first - call.began) / 1e9)
                return


class _Call:
    """A request to the provider. `said` are parts of the model's message, `stop_reason` says why that has ended."""

    __slots__ = ("began", "ended", "head", "said", "span", "stop_reason")

    def __init__(self, span: Span, began: int) -> None:
        self.span = span
        self.began = began
        self.ended: int | None = None
        self.head: CallAnswered | None = None
        self.said: list[Mapping[str, Any]] = []
        self.stop_reason: str | None = None

    def say(self, part: Mapping[str, Any]) -> None:
        """The model's message has this part, too."""
        if len(self.said) < _MAX_PARTS:
            self.said.append(part)

    def finish(self, outcome: InterceptionEnded | None, until: int, *, content: bool) -> None:
        """End the span. `outcome` is that of the interception, if this was its last request."""
        status = None if self.head is None else self.head.http_status
        if status is not None:
            self.span.set_attribute("http.response.status_code", status)
        failure = spans.call_failure(self.head, outcome if self.stop_reason is None else None)
        if failure is not None:
            self.span.set_attribute("error.type", failure)
            if status is not None and status < spans.FIRST_ERROR:
                self.span.set_attribute("gen_ai.response.finish_reasons", ("error",))
            if failure != "client_disconnected":
                self.span.set_status(StatusCode.ERROR, self._words(outcome, content=content))
        if self.said:
            message = spans.answer(self.said, self.stop_reason or "error")
            self.span.set_attribute("gen_ai.output.messages", spans.encoded(message))
        self.span.end(until if self.ended is None else self.ended)

    def _words(self, outcome: InterceptionEnded | None, *, content: bool) -> str | None:
        """What is said about a failure: by us, where there was no response; else by the provider, who may quote anything."""
        if self.head is not None and self.head.http_status is None:
            return self.head.error
        return outcome.error if content and outcome is not None else None


class _Fields(Getter[Headers]):
    """Header fields, as OpenTelemetry reads them."""

    def get(self, carrier: Headers, key: str) -> list[str] | None:
        """The values of a field. A second ``traceparent`` makes the context invalid (W3C Trace Context, section 3.2.1)."""
        name = key.encode()
        values = [value.decode("latin-1") for field, value in carrier if field == name]
        return None if name == b"traceparent" and len(values) > 1 else values

    def keys(self, carrier: Headers) -> list[str]:
        return [name.decode("latin-1") for name, _ in carrier]


_FIELDS: Final = _Fields()
_W3C: Final = TraceContextTextMapPropagator()
_CONTEXT_FIELDS: Final = frozenset({b"traceparent", b"tracestate"})


def _nanoseconds(moment: datetime) -> int:
    return round(moment.timestamp() * 1e6) * 1000  # a float has no room for nanoseconds
