"""The observer, and what it takes from a response's head.

Truth: RFC 9110 (sections 6.4.1, 8.3, 8.4) for heads; our own contract that looking at traffic never harms it (style.md
habit 13): nothing is raised, and a note quotes no content.
"""

import pytest

from aibridge.wire import MESSAGES, ResponseFacts, ResponseReader, Usage
from aibridge.wire.observer import Observer, ResponseHead
from aibridge.wire.sse import MAX_EVENT_BYTES
from tests.support.coding import gzip

SECRET = b'{"type":"message_start","message":"sk-secret'


def head(status: int = 200, **fields: str) -> ResponseHead:
    return ResponseHead(status, [(name.replace("_", "-").encode(), value.encode()) for name, value in fields.items()])


# --- heads ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content_type", "requested", "stream"),
    [
        ("text/event-stream", False, True),
        ("text/event-stream; charset=utf-8", False, True),
        (" Text/Event-Stream;charset=utf-8", True, True),
        ("application/json", True, False),
        ("application/json; charset=utf-8", True, False),
        ("application/problem+json", True, False),
        ("", True, True),
        ("text/plain", True, True),
        ("", False, False),
        ("text/plain", False, False),
        ("text/event-streaming", False, False),
    ],
)
def test_what_is_a_stream(content_type: str, requested: bool, stream: bool) -> None:
    assert head(content_type=content_type).is_stream(requested=requested) is stream


def test_what_is_a_stream_without_a_word_about_it() -> None:
    assert head().is_stream(requested=True)
    assert not head().is_stream(requested=False)


def test_an_error_is_a_stream_only_if_it_says_so() -> None:
    assert not head(500, content_type="text/plain").is_stream(requested=True)
    assert head(500, content_type="text/event-stream").is_stream(requested=True)


@pytest.mark.parametrize(("value", "coding"), [("", ""), ("identity", ""), ("Gzip ", "gzip"), ("x-made-up", "x-made-up")])
def test_codings(value: str, coding: str) -> None:
    assert head(content_encoding=value).coding == coding
    assert head().coding == ""


@pytest.mark.parametrize(
    ("value", "length"),
    [
        ("0", 0),
        ("17", 17),
        (" 17 ", 17),
        ("9" * 18, 10**18 - 1),
        ("9" * 5000, None),
        ("", None),
        ("-1", None),
        ("1.5", None),
        ("1, 1", None),
        ("\u00b2", None),
        ("x", None),
    ],
)
def test_lengths(value: str, length: int | None) -> None:
    assert ResponseHead(200, [(b"content-length", value.encode("latin-1"))]).content_length == length
    assert head().content_length is None


@pytest.mark.parametrize(
    ("response_head", "bodiless"),
    [
        (head(204), True),
        (head(304, content_length="10"), True),
        (head(200, content_length="0"), True),
        (head(500, content_length="0"), True),
        (head(200), False),
        (head(200, content_length="1"), False),
    ],
)
def test_responses_without_a_body(response_head: ResponseHead, bodiless: bool) -> None:
    assert response_head.bodiless is bodiless


@pytest.mark.parametrize(("status", "ok"), [(200, True), (201, True), (299, True), (304, False), (400, False), (529, False)])
def test_acceptance(status: int, ok: bool) -> None:
    assert head(status).ok is ok


# --- reading ----------------------------------------------------------------------------------------------------------


class Broken(ResponseReader):
    """A reader with a bug."""

    def read_event(self, data: bytes) -> None:
        raise ZeroDivisionError(data)

    def read_body(self, body: bytes) -> None:
        raise ZeroDivisionError(body)

    def is_last(self, data: bytes) -> bool:
        return False

    def facts(self) -> ResponseFacts:
        return ResponseFacts(response_id="still known")

    def error_event(self, status: int, message: str) -> bytes:
        return b"%d %s" % (status, message.encode())


@pytest.mark.parametrize("stream", [True, False])
def test_a_bug_of_ours_is_a_note(stream: bool) -> None:
    observer = Observer(Broken(), head(), stream=stream)
    observer.feed(b"data: " + SECRET + b"\n\n")
    observer.end()
    facts = observer.facts(cut=False)
    assert facts.response_id == "still known"
    assert facts.notes == ("response: unreadable: ZeroDivisionError",)
    assert observer.error_event(502, "x") == b"502 x"


@pytest.mark.parametrize(
    ("coding", "note"),
    [
        ("", "response: unreadable: Unreadable"),
        ("gzip", "response: error"),
        ("sk-secret", "response: unknown content coding of 9 characters"),
    ],
)
def test_notes_quote_nothing(coding: str, note: str) -> None:
    observer = Observer(MESSAGES.reader(), head(content_encoding=coding), stream=False)
    observer.feed(SECRET)
    observer.feed(SECRET)
    observer.end()
    assert observer.facts(cut=False) == ResponseFacts(usage=Usage(), notes=(note,))


@pytest.mark.parametrize("coding", ["", "gzip"])
def test_a_body_over_the_bound_is_not_kept(monkeypatch: pytest.MonkeyPatch, coding: str) -> None:
    monkeypatch.setattr("aibridge.wire.observer.MAX_BODY_BYTES", 100)
    observer = Observer(MESSAGES.reader(), head(content_encoding=coding), stream=False)
    body = b'{"id":"msg_1","x":"' + b"x" * 60 + b'"}'
    for piece in [gzip(body + body)] if coding else [body, body]:
        observer.feed(piece)
    assert observer._body == []
    observer.end()
    assert observer.facts(cut=False).notes == ("response: body over the size bound",)
    assert observer.ends_at_eof


def test_a_compressed_stream_with_an_event_without_end_is_not_read_on() -> None:
    """A gzip bomb: to take a gigabyte apart would keep everybody waiting for seconds. Its bytes pass, as ever."""
    observer = Observer(MESSAGES.reader(), head(content_encoding="gzip"), stream=True)
    bomb = gzip(b" " * (MAX_EVENT_BYTES + 2**20) + b"\n\ndata: {}\n\n")
    assert observer.feed(bomb) is not None and observer.feed(bomb) == ()
    assert observer.undecodable is not None and observer.ends_at_eof
    assert observer.facts(cut=False) == ResponseFacts(
        usage=Usage(), completeness="unknown", notes=("response: event over the size bound",)
    )


def test_a_body_is_read_when_it_has_ended() -> None:
    observer = Observer(MESSAGES.reader(), head(), stream=False)
    observer.feed(b'{"id":"msg_1",')
    observer.feed(b'"usage":{"input_tokens":1}}')
    assert observer.facts(cut=True).response_id is None
    assert not observer.finished
    observer.end()
    assert observer.facts(cut=False).response_id == "msg_1"
    assert observer.finished


def test_a_refused_request_has_no_usage() -> None:
    """The provider did no work; of an accepted one there are figures, known or not."""
    assert Observer(MESSAGES.reader(), head(429), stream=False).facts(cut=True).usage is None
    assert Observer(MESSAGES.reader(), head(200), stream=False).facts(cut=True).usage == Usage()
