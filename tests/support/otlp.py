"""A receiver of OTLP over HTTP: takes what an exporter sends, and decodes it with the types of opentelemetry-proto."""

import gzip
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Final, Self

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from .provider import WAIT_SECONDS, Gate

SERVER: Final = Span.SpanKind.SPAN_KIND_SERVER
CLIENT: Final = Span.SpanKind.SPAN_KIND_CLIENT
INTERNAL: Final = Span.SpanKind.SPAN_KIND_INTERNAL


@dataclass(frozen=True, slots=True)
class Spanned:
    """A span as it was received. Ids are in hexadecimal; a root has no parent."""

    name: str
    kind: int
    trace: str
    id: str
    parent: str
    began: int
    ended: int
    status: int
    attributes: Mapping[str, Any]
    resource: Mapping[str, Any]

    @property
    def context(self) -> bytes:
        """It, sampled, as a ``traceparent`` but for the flag of random ids, which begins a trace with us."""
        return f"00-{self.trace}-{self.id}".encode()


@dataclass(frozen=True, slots=True)
class Export:
    """One request of an exporter."""

    path: str
    headers: Mapping[str, str]
    body: bytes
    spans: Sequence[Spanned]


class Receiver:
    """``with Receiver() as receiver``: listens on loopback. Answers with `status`, once `answering` is set."""

    def __init__(self, status: int = 200) -> None:
        self.status = status
        self.exports: list[Export] = []
        self.arrived = Gate()
        self.answering = Gate()
        self.answering.set()
        self._more = threading.Condition()

    def __enter__(self) -> Self:
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                if self.headers.get("content-encoding") == "gzip":
                    body = gzip.decompress(body)
                receiver.take(self.path, {name.lower(): value for name, value in self.headers.items()}, body)
                self.send_response(receiver.status)
                self.send_header("content-length", "0")
                if receiver.status in range(300, 400):
                    self.send_header("location", "/elsewhere")
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.answering.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(WAIT_SECONDS)

    @property
    def url(self) -> str:
        """What a base URL of a collector is."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def spans(self) -> list[Spanned]:
        """All that have come, by the time at which they began."""
        found = [span for export in self.exports for span in export.spans]
        return sorted(found, key=lambda span: (span.began, span.kind != SERVER))

    def take(self, path: str, headers: Mapping[str, str], body: bytes) -> None:
        self.arrived.set()
        self.answering.wait_blocking()
        with self._more:
            self.exports.append(Export(path, headers, body, decoded(body)))
            self._more.notify_all()

    def wait_for(self, condition: Callable[[list[Spanned]], bool]) -> list[Spanned]:
        """The spans, when the condition holds for them. Raises TimeoutError when it does not come to that."""
        with self._more:
            if not self._more.wait_for(lambda: condition(self.spans), WAIT_SECONDS):
                raise TimeoutError([span.name for span in self.spans])
            return self.spans


def decoded(body: bytes) -> list[Spanned]:
    """The spans of a request to export."""
    return [
        Spanned(
            span.name,
            span.kind,
            span.trace_id.hex(),
            span.span_id.hex(),
            span.parent_span_id.hex(),
            span.start_time_unix_nano,
            span.end_time_unix_nano,
            span.status.code,
            _attributes(span.attributes),
            _attributes(of_resource.resource.attributes),
        )
        for of_resource in ExportTraceServiceRequest.FromString(body).resource_spans
        for of_scope in of_resource.scope_spans
        for span in of_scope.spans
    ]


def _attributes(pairs: Sequence[KeyValue]) -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in pairs}


def _value(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(one) for one in value.array_value.values]
    assert kind is not None
    return getattr(value, kind)
