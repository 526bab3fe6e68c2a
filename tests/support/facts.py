"""What the observer makes of a response, given as the events of a stream or as one body."""

import json
from typing import Any

from aibridge.wire import ResponseFacts, WireFormat
from aibridge.wire.observer import Observer, ResponseHead

Json = dict[str, Any]


def encode(value: Json | bytes) -> bytes:
    """JSON as it is sent. Bytes are left as they are, for what no encoder writes."""
    return value if isinstance(value, bytes) else json.dumps(value, ensure_ascii=False).encode()


def of_stream(form: WireFormat, *events: Json | bytes, cut: bool = False) -> ResponseFacts:
    observer = Observer(form.reader(), ResponseHead(200, [(b"content-type", b"text/event-stream")]), stream=True)
    for event in events:
        observer.feed(b"data: " + encode(event) + b"\n\n")
    if not cut:
        observer.end()
    return observer.facts(cut=cut)


def of_body(form: WireFormat, body: Json | bytes, status: int = 200) -> ResponseFacts:
    observer = Observer(form.reader(), ResponseHead(status, [(b"content-type", b"application/json")]), stream=False)
    observer.feed(encode(body))
    observer.end()
    return observer.facts(cut=False)
