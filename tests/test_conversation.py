"""The conversation, spoken through: what it asks of the shell, in which order, and what it makes of each mishap.

Truth: design.md 2 (durable before done, errors before and after the first relayed byte) and 4; wire.md rules 1 and 7, A10,
B2, C3; failures.md 1, 9, 10, 13 and 18. Where these are silent, ``aibridge.conversation`` says what was chosen.
"""

from contextlib import suppress
from typing import Any

import msgspec
import pytest

from aibridge.commands import Abort, End, Receive, Record, Relay, Respond, Send
from aibridge.errors import (
    ClientDisconnected,
    Interrupted,
    RecordingFailed,
    UpstreamError,
    UpstreamTimeout,
    error_body,
)
from aibridge.wire import CHAT, MESSAGES, RESPONSES, Request, ResponseFacts, Usage
from aibridge.wire.observer import ResponseHead
from aibridge.wire.reading import Unreadable
from aibridge.wire.sse import SseDecoder
from tests.support.coding import ENCODERS, gzip
from tests.support.dialogue import CUT, FORMATS, Dialogue, head, play

STREAM = head()
EVENTS = Respond(200, [(b"content-type", b"text/event-stream")])
CUT_OFF = "The provider's response ended before it was complete."
DOWN = "The gateway is shutting down."
UNRECORDED = RecordingFailed("The request cannot be recorded at the moment, so it is not served.")

START = (
    b'event: message_start\ndata: {"type":"message_start","message":{"id":"msg_1","model":"m",'
    b'"usage":{"input_tokens":9,"output_tokens":1}}}\n\n'
)
DELTA = b'event: message_delta\ndata: {"type":"message_delta","usage":{"output_tokens":5}}\n\n'
STOP = b'event: message_stop\ndata: {"type":"message_stop"}\n\n'

HELLO = b'data: {"id":"c_1","choices":[{"index":0,"delta":{"content":"Hello"}}]}\n\n'
FINISH = b'data: {"id":"c_1","choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n'
COUNTED = b'data: {"id":"c_1","choices":[],"usage":{"prompt_tokens":9,"completion_tokens":5}}\n\n'
DONE = b"data: [DONE]\n\n"

CREATED = (
    b'event: response.created\ndata: {"type":"response.created","sequence_number":0,"response":'
    b'{"id":"resp_1","status":"in_progress","output":[]}}\n\n'
)
COMPLETED = (
    b'event: response.completed\ndata: {"type":"response.completed","sequence_number":1,"response":'
    b'{"id":"resp_1","status":"completed","output":[],"usage":{"input_tokens":9,"output_tokens":5}}}\n\n'
)

MESSAGE = b'{"id":"msg_1","type":"message","content":[],"usage":{"input_tokens":9,"output_tokens":5}}'


def messages(stream: bool = True) -> Request:
    return MESSAGES.parse(b'{"model":"m","stream":%s,"messages":[]}' % (b"true" if stream else b"false"))


def chat(options: bytes = b'"stream_options":{"include_usage":true},') -> Request:
    return CHAT.parse(b'{"model":"m","stream":true,%s"messages":[]}' % options)


def responses() -> Request:
    return RESPONSES.parse(b'{"model":"m","stream":true,"input":"x"}')


def blocking(body: bytes = MESSAGE, status: int = 200) -> ResponseHead:
    return head("application/json", status, content_length=str(len(body)))


def figures(record: Record) -> tuple[int | None, int | None, str]:
    usage = record.facts.usage
    assert usage is not None
    return usage.input_tokens, usage.output_tokens, record.facts.completeness


def pieces(stream: bytes, size: int) -> list[bytes]:
    return [stream[at : at + size] for at in range(0, len(stream), size)]


def events(stream: bytes) -> list[Any]:
    """The data of the events in a stream, as clients read it."""
    blocks = [block for block in stream.split(b"\n\n") if block]
    return [msgspec.json.decode(block.partition(b"data: ")[2]) for block in blocks]


# --- how it goes when all goes well -----------------------------------------------------------------------------------


def test_a_stream() -> None:
    """Everything is passed on as it comes, but for its end: that waits until it is recorded."""
    request = messages()
    talk = Dialogue(request)
    talk(Send(request), STREAM)
    talk(EVENTS)
    talk(Receive(), START)
    talk(Relay(START))
    talk(Receive(), DELTA)
    talk(Relay(DELTA))
    talk(Receive(), STOP)
    talk(Relay(b""))
    assert figures(talk(Record)) == (9, 5, "complete")
    talk(End("completed", 200))
    talk(Relay(STOP))
    talk(Receive(), b"")
    assert talk.is_over()


def test_a_body() -> None:
    """A client that was told the length knows the end by it, so the bytes that fill it are held back."""
    request = messages(stream=False)
    talk = Dialogue(request)
    talk(Send(request), blocking())
    talk(Respond(200, blocking().headers))
    talk(Receive(), MESSAGE[:10])
    talk(Relay(MESSAGE[:10]))
    talk(Receive(), MESSAGE[10:])
    talk(Relay(b""))
    talk(Receive(), b"")
    assert figures(talk(Record)) == (9, 5, "complete")
    talk(End("completed", 200))
    talk(Relay(MESSAGE[10:]))
    talk(Receive(), b"")
    assert talk.is_over()


def test_a_body_without_a_length() -> None:
    """Its end is the end of the connection or the last chunk, which the shell writes when the conversation is over."""
    talk = Dialogue(messages(stream=False))
    talk(Send, head("application/json"))
    talk(Respond)
    talk(Receive(), MESSAGE)
    talk(Relay(MESSAGE))
    talk(Receive(), b"")
    assert figures(talk(Record)) == (9, 5, "complete")
    talk(End("completed", 200))
    talk(Relay(b""))
    talk(Receive(), b"")
    assert talk.is_over()


@pytest.mark.parametrize("response_head", [head("text/plain", 503, content_length="0"), ResponseHead(204, [])])
def test_a_response_without_a_body(response_head: ResponseHead) -> None:
    """Its head is all there is, so the head is held back."""
    talk = Dialogue(messages(stream=False))
    talk(Send, response_head)
    talk(Record)
    assert talk(End).http_status == response_head.status
    talk(Respond(response_head.status, response_head.headers))
    assert talk.is_over()


def test_a_response_without_a_body_that_cannot_be_recorded() -> None:
    talk = Dialogue(messages(stream=False))
    talk(Send, ResponseHead(503, [(b"content-length", b"0")]))
    talk(Record)
    talk(End, UNRECORDED)
    assert talk(Respond).status == 503
    talk(Relay(error_body("anthropic", 503, UNRECORDED.message)))
    assert talk.is_over()


@pytest.mark.parametrize(
    ("request_", "stream", "end"),
    [(messages(), START + DELTA, STOP), (chat(), HELLO + FINISH + COUNTED, DONE), (responses(), CREATED, COMPLETED)],
)
def test_the_end_is_held_back_wherever_it_is_split(request_: Request, stream: bytes, end: bytes) -> None:
    """Neither the blank line that completes the last event, nor the line before it, on which clients that read by line act,
    can a client have before the records are durable."""
    for at in range(len(end)):
        played = play(request_, STREAM, [stream, end[:at], end[at:]] if at else [stream, end])
        assert played.relayed == stream + end
        assert played.before_end == stream + (end[:at] if at < len(end) - 1 else b"")
        assert played.facts[0].usage is not None
        assert played.facts[0].usage.output_tokens == 5


def test_what_follows_the_last_event_is_passed_on() -> None:
    """In the same chunk, and in later ones, for as long as the provider keeps talking (wire.md rule 1)."""
    talk = Dialogue(messages())
    talk(Send, STREAM)
    talk(EVENTS)
    talk(Receive(), START + DELTA + STOP + b": bye")
    talk(Relay(b""))
    talk(Record)
    talk(End("completed", 200))
    talk(Relay(START + DELTA + STOP + b": bye"))
    talk(Receive(), b"-bye\n\n")
    talk(Relay(b"-bye\n\n"))
    talk(Receive(), STOP)
    talk(Relay(STOP))
    talk(Receive(), b"")
    assert talk.is_over()


@pytest.mark.parametrize("mishap", [UpstreamTimeout("silence"), CUT, ClientDisconnected(), Interrupted()])
def test_a_provider_that_keeps_the_connection_open_after_the_end(mishap: Exception) -> None:
    """Whatever ends it then: the client has its answer, and the ledger says so already."""
    talk = Dialogue(messages())
    talk(Send, STREAM)
    talk(EVENTS)
    talk(Receive(), START + DELTA + STOP)
    talk(Relay(b""))
    talk(Record)
    talk(End("completed", 200))
    talk(Relay(START + DELTA + STOP))
    talk(Receive(), mishap)
    assert talk.is_over()


@pytest.mark.parametrize("mishap", [ClientDisconnected(), Interrupted()])
def test_an_answer_that_does_not_get_its_end_does_not_look_complete(mishap: Exception) -> None:
    talk = Dialogue(messages())
    talk(Send, STREAM)
    talk(EVENTS)
    talk(Receive(), START + DELTA + STOP)
    talk(Relay(b""))
    talk(Record)
    talk(End("completed", 200))
    talk(Relay, mishap)
    talk(Abort())
    assert talk.is_over()


def test_a_stream_of_a_provider_that_was_not_asked_for_one() -> None:
    played = play(messages(stream=False), STREAM, [START + DELTA, STOP])
    assert played.facts[0].usage is not None
    assert (played.facts[0].usage.output_tokens, played.before_end) == (5, START + DELTA)


def test_a_body_of_a_provider_that_was_asked_for_a_stream() -> None:
    played = play(messages(), head("application/json; charset=utf-8"), [MESSAGE])
    assert played.end == End("completed", 200)
    assert played.facts[0].response_id == "msg_1"


@pytest.mark.parametrize("content_type", ["", "text/plain", "application/octet-stream"])
def test_a_stream_of_a_provider_that_does_not_say_so(content_type: str) -> None:
    played = play(messages(), head(content_type), [START, DELTA, STOP])
    assert played.end == End("completed", 200)
    assert played.before_end == START + DELTA


# --- the provider fails -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("request_", [messages(), messages(stream=False), chat(), responses()])
@pytest.mark.parametrize("error", [UpstreamError("refused"), UpstreamTimeout("no answer in time")])
def test_a_provider_that_cannot_be_reached(request_: Request, error: UpstreamError) -> None:
    """Nothing was relayed yet, so it is an HTTP error, in the provider's shape. There is no usage to know of, unless the
    provider may have begun: then it is known that nobody knows."""
    body = error_body(request_.format.kind, error.status, error.message)
    talk = Dialogue(request_)
    talk(Send(request_), error)
    sent = isinstance(error, UpstreamTimeout)
    talk(Record(ResponseFacts(usage=Usage(), completeness="partial") if sent else ResponseFacts()))
    talk(End("failed", error.status, error.message))
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    talk(Respond(error.status, headers))
    talk(Relay(body))
    assert talk.is_over()


def test_a_provider_that_cannot_be_reached_and_a_ledger_that_cannot_be_written() -> None:
    talk = Dialogue(messages())
    talk(Send, UpstreamError("refused"))
    talk(Record)
    talk(End, UNRECORDED)
    assert talk(Respond).status == 503
    talk(Relay(error_body("anthropic", 503, UNRECORDED.message)))
    assert talk.is_over()


@pytest.mark.parametrize("mishap", [ClientDisconnected(), Interrupted()])
def test_a_client_that_does_not_wait_for_a_refusal(mishap: Exception) -> None:
    talk = Dialogue(messages())
    talk(Send, UpstreamError("refused"))
    talk(Record)
    talk(End)
    talk(Respond)
    talk(Relay, mishap)
    talk(Abort())
    assert talk.is_over()


def test_an_error_of_the_provider_is_passed_on_as_it_came() -> None:
    """Status, fields and body (wire.md rule 9). It has no usage; its words go into the ledger."""
    body = b'{"type":"error","error":{"type":"rate_limit_error","message":"Slow down."} }\n'
    response_head = ResponseHead(429, [(b"retry-after", b"7"), (b"content-length", b"%d" % len(body))])
    talk = Dialogue(messages())
    talk(Send, response_head)
    talk(Respond(429, response_head.headers))
    talk(Receive(), body)
    talk(Relay(b""))
    talk(Receive(), b"")
    record = talk(Record)
    assert record.facts.usage is None
    talk(End("failed", 429, "rate_limit_error: Slow down."))
    talk(Relay(body))
    talk(Receive(), b"")
    assert talk.is_over()


@pytest.mark.parametrize("body", [b"", b"<html>Bad gateway</html>", b'{"detail":"?"}', b"[]", b'{"error":null}'])
def test_an_error_without_words(body: bytes) -> None:
    played = play(messages(), head("text/html", 502), [body])
    assert played.end == End("failed", 502, "HTTP 502")
    assert played.relayed == body
    assert not played.aborted


def test_an_error_event_of_the_provider_is_held_back_like_any_other_end() -> None:
    event = b'event: error\ndata: {"type":"error","error":{"type":"overloaded_error","message":"Overloaded"}}\n\n'
    talk = Dialogue(messages())
    talk(Send, STREAM)
    talk(EVENTS)
    talk(Receive(), START)
    talk(Relay(START))
    talk(Receive(), event)
    talk(Relay(b""))
    assert figures(talk(Record)) == (9, 1, "partial")
    talk(End("failed", 200, "overloaded_error: Overloaded"))
    talk(Relay(event))
    talk(Receive(), b"")
    assert talk.is_over()


def test_a_chat_error_chunk_and_the_end_that_still_follows_it() -> None:
    error = b'data: {"error":{"code":502,"message":"Gone"},"choices":[{"delta":{},"finish_reason":"error"}]}\n\n'
    played = play(chat(), STREAM, [HELLO, error, DONE])
    assert played.end == End("failed", 200, "error: Gone")
    assert (played.before_end, played.relayed) == (HELLO, HELLO + error + DONE)


# --- the response breaks off ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mishap", [CUT, UpstreamTimeout("no answer in time"), b""], ids=["cut", "silence", "clean end"])
def test_a_stream_that_breaks_off_between_events(mishap: bytes | UpstreamError) -> None:
    """A cut must not look like success (failures.md 18): the client gets the protocol's own error event."""
    why = CUT_OFF if mishap == b"" else str(mishap)
    status = mishap.status if isinstance(mishap, UpstreamError) else 502
    talk = Dialogue(messages())
    talk(Send, STREAM)
    talk(EVENTS)
    talk(Receive(), START)
    talk(Relay(START))
    talk(Receive(), mishap)
    assert figures(talk(Record)) == (9, 1, "partial")
    talk(End("failed", 200, why))
    talk(Relay(b"event: error\ndata: " + error_body("anthropic", status, why) + b"\n\n"))
    assert talk.is_over()


def test_how_chat_says_that_it_broke_off() -> None:
    played = play(chat(), STREAM, [HELLO, CUT])
    assert played.relayed == HELLO + b"data: " + error_body("openai", 502, str(CUT)) + b"\n\n"


def test_how_responses_says_that_it_broke_off() -> None:
    """``response.failed`` for the response under way, with its id, numbered on (wire.md C3)."""
    played = play(responses(), STREAM, [CREATED, CUT])
    assert played.relayed.startswith(CREATED + b"event: response.failed\n")
    (_, failed) = events(played.relayed)
    assert failed == {
        "type": "response.failed",
        "sequence_number": 1,
        "response": {
            "id": "resp_1",
            "status": "failed",
            "output": [],
            "error": {"code": "server_error", "message": str(CUT)},
        },
    }


def test_how_responses_says_that_it_never_began() -> None:
    """The bare error event, flat as HTTP has it."""
    played = play(responses(), STREAM, [CUT])
    assert played.relayed.startswith(b"event: error\n")
    (event,) = events(played.relayed)
    assert event == {
        "type": "error",
        "sequence_number": 0,
        "code": "server_error",
        "message": str(CUT),
        "param": None,
    }


@pytest.mark.parametrize("mishap", [CUT, b""], ids=["cut", "clean end"])
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("torn", [b"data: {", b"data", b"event: x\ndata: {}\n", b": comm", b"\n\ndata: {}\r"])
def test_an_error_is_no_part_of_the_event_that_broke_off(form: str, torn: bytes, mishap: bytes | UpstreamError) -> None:
    """What is left of it is ended first: a line of its own would not do, only a blank one ends an event."""
    request = FORMATS[form].parse(b'{"stream":true}')
    played = play(request, STREAM, [torn, mishap] if mishap else [torn])
    assert played.relayed.startswith(torn + b"\n\n")
    words = played.relayed.removeprefix(torn + b"\n\n")
    (event,) = events(words)
    assert "error" in words.decode()
    assert str(CUT_OFF if mishap == b"" else mishap) in str(event)


def test_no_gap_is_left_where_none_is_needed() -> None:
    for whole in (START, START + b": comment\n", START + b"\n", b""):
        played = play(messages(), STREAM, [*filter(None, [whole]), CUT])
        assert played.relayed.startswith(whole + b"event: error\n")


@pytest.mark.parametrize("coding", ENCODERS)
def test_a_compressed_stream_has_no_room_for_words(coding: str) -> None:
    body = ENCODERS[coding](START + DELTA + STOP)[:-20]
    played = play(messages(), head(content_encoding=coding), [body, CUT])
    assert played.aborted
    assert played.relayed == body
    assert played.end == End("failed", 200, str(CUT))


def test_a_declared_length_has_no_room_for_words() -> None:
    played = play(messages(), head(content_length="1000"), [START, CUT])
    assert played.aborted
    assert played.relayed == START


@pytest.mark.parametrize("after", [[], [CUT]])
def test_a_stream_that_has_ended_may_owe_bytes_of_its_length(after: list[Exception]) -> None:
    """All was said, so it is complete. But the client was promised more bytes, and must not wait for them."""
    whole = START + DELTA + STOP
    played = play(messages(), head(content_length=str(len(whole) + 5)), [whole, *after])
    assert played.relayed == whole
    assert played.end == End("completed", 200)
    assert played.aborted


def test_a_body_has_no_room_for_words() -> None:
    talk = Dialogue(messages(stream=False))
    talk(Send, blocking())
    talk(Respond)
    talk(Receive(), MESSAGE[:30])
    talk(Relay(MESSAGE[:30]))
    talk(Receive(), CUT)
    record = talk(Record)
    assert (record.facts.usage, record.facts.completeness) == (Usage(), "partial")
    talk(End("failed", 200, str(CUT)))
    talk(Abort())
    assert talk.is_over()


def test_a_client_that_goes_before_it_hears_of_the_failure() -> None:
    talk = Dialogue(messages())
    talk(Send, STREAM)
    talk(EVENTS)
    talk(Receive(), CUT)
    talk(Record)
    talk(End("failed", 200, str(CUT)))
    talk(Relay, ClientDisconnected())
    talk(Abort())
    assert talk.is_over()


@pytest.mark.parametrize("rest", [b"", b"\n", b"\n\n"])
def test_a_last_event_without_its_blank_line_ends_the_stream(rest: bytes) -> None:
    """Both SDKs read it (wire.md E), so it is no cut."""
    stream = START + DELTA + STOP.rstrip(b"\n") + rest
    played = play(messages(), STREAM, [stream])
    assert played.end == End("completed", 200)
    assert played.relayed == stream
    assert played.facts[0].completeness == "complete"


@pytest.mark.parametrize("ending", [[FINISH], [FINISH, COUNTED], [COUNTED]], ids=["finish", "finish, usage", "usage"])
def test_a_chat_stream_may_lack_its_done(ending: list[bytes]) -> None:
    """Clients accept EOF (wire.md B2), once every choice has finished or the usage has come, which is the last chunk."""
    played = play(chat(), STREAM, [HELLO, *ending])
    assert played.end == End("completed", 200)
    assert played.relayed == b"".join([HELLO, *ending])


def test_a_chat_stream_is_cut_while_one_choice_has_not_finished() -> None:
    other = HELLO.replace(b'"index":0', b'"index":1')
    played = play(chat(), STREAM, [HELLO, other, FINISH])
    assert played.end == End("failed", 200, CUT_OFF)


@pytest.mark.parametrize("stream", [b"", b"\n", b": keep-alive\n\n", b'data: {"choices":[]}\n\n'])
@pytest.mark.parametrize("form", FORMATS)
def test_a_stream_that_says_nothing_is_cut(form: str, stream: bytes) -> None:
    played = play(FORMATS[form].parse(b'{"stream":true}'), STREAM, [stream])
    assert played.end == End("failed", 200, CUT_OFF)
    assert played.facts[0].usage == Usage()
    assert played.facts[0].completeness == "partial"


def test_an_event_too_large_to_be_read_may_have_been_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading must not harm: a response that the client has whole does not fail because we read too little of it."""
    monkeypatch.setattr("aibridge.wire.observer.SseDecoder.__init__.__defaults__", (200,))
    large = COMPLETED.replace(b'"output":[]', b'"output":["%s"]' % (b"x" * 400))
    played = play(responses(), STREAM, [CREATED, large])
    assert played.end == End("completed", 200)
    assert played.relayed == CREATED + large
    assert played.facts[0].completeness == "unknown"
    assert played.facts[0].notes == ("response: event over the size bound",)


def test_a_stream_that_cannot_be_decoded_passes_unread() -> None:
    played = play(messages(), head(content_encoding="gzip"), [b"not gzip", b" at all"])
    assert played.end == End("completed", 200)
    assert played.relayed == b"not gzip at all"
    assert played.facts[0].notes == ("response: error",)
    assert (played.facts[0].usage, played.facts[0].completeness) == (Usage(), "unknown")


# --- the client goes, the process stops -------------------------------------------------------------------------------


def test_a_client_that_goes_before_the_provider_has_answered() -> None:
    """The provider may have begun, and bill it: the figures are not known, which is not the same as none."""
    talk = Dialogue(messages())
    talk(Send, ClientDisconnected())
    talk(Record(ResponseFacts(usage=Usage(), completeness="partial")))
    talk(End("client_disconnected"))
    assert talk.is_over()


def test_a_client_that_goes_before_a_provider_that_has_refused_is_asked_again() -> None:
    """Nothing was accepted, so there is nothing to bill, as after any refusal."""
    talk = Dialogue(messages())
    left = ClientDisconnected()
    left.refused = True
    talk(Send, left)
    talk(Record(ResponseFacts()))
    talk(End("client_disconnected"))
    assert talk.is_over()


@pytest.mark.parametrize("result", [True, UNRECORDED])
def test_a_process_that_stops_before_the_provider_has_answered(result: Any) -> None:
    """The client is still there, and is told."""
    talk = Dialogue(messages())
    talk(Send, Interrupted())
    talk(Record(ResponseFacts(usage=Usage(), completeness="partial")))
    talk(End("interrupted", 502), result)
    status, message = (502, DOWN) if result is True else (503, UNRECORDED.message)
    assert talk(Respond).status == status
    talk(Relay(error_body("anthropic", status, message)))
    assert talk.is_over()


def test_a_client_that_goes_while_the_provider_talks() -> None:
    talk = Dialogue(messages())
    talk(Send, STREAM)
    talk(EVENTS)
    talk(Receive(), START)
    talk(Relay(START))
    talk(Receive(), ClientDisconnected())
    assert figures(talk(Record)) == (9, 1, "partial")
    talk(End("client_disconnected", 200))
    assert talk.is_over()


def test_a_client_that_goes_while_it_is_written_to() -> None:
    talk = Dialogue(messages())
    talk(Send, STREAM)
    talk(EVENTS)
    talk(Receive(), START + DELTA)
    talk(Relay(START + DELTA), ClientDisconnected())
    assert figures(talk(Record)) == (9, 5, "partial")
    talk(End("client_disconnected", 200))
    assert talk.is_over()


def test_a_client_that_goes_and_a_ledger_that_cannot_be_written() -> None:
    talk = Dialogue(messages())
    talk(Send, STREAM)
    talk(EVENTS)
    talk(Receive(), ClientDisconnected())
    talk(Record)
    talk(End, UNRECORDED)
    assert talk.is_over()


def test_a_response_that_is_read_on_for_the_record() -> None:
    """``on_disconnect = "drain"``: exact figures (failures.md 1), and the ledger still says that the client went."""
    talk = Dialogue(messages())
    talk(Send, STREAM)
    talk(EVENTS)
    talk(Receive(), START)
    talk(Relay(START), False)
    talk(Receive(), DELTA)
    talk(Relay(DELTA), False)
    talk(Receive(), STOP)
    talk(Relay(b""), False)
    assert figures(talk(Record)) == (9, 5, "complete")
    talk(End("client_disconnected", 200))
    assert talk.is_over()


@pytest.mark.parametrize(
    ("mishap", "status"),
    [(CUT, "client_disconnected"), (ClientDisconnected(), "client_disconnected"), (b"", "client_disconnected")],
    ids=["cut", "for too long", "clean end"],
)
def test_a_response_that_is_read_on_and_breaks_off(mishap: Any, status: str) -> None:
    talk = Dialogue(messages())
    talk(Send, STREAM)
    talk(EVENTS)
    talk(Receive(), START)
    talk(Relay(START), False)
    talk(Receive(), mishap)
    assert figures(talk(Record)) == (9, 1, "partial")
    assert talk(End).status == status
    assert talk.is_over()


@pytest.mark.parametrize("place", ["receive", "relay"])
def test_a_process_that_stops_in_the_middle(place: str) -> None:
    """The client learns of it in the protocol's way."""
    talk = Dialogue(messages())
    talk(Send, STREAM)
    talk(EVENTS)
    if place == "relay":
        talk(Receive(), START)
        talk(Relay(START), Interrupted())
    else:
        talk(Receive(), Interrupted())
    record = talk(Record)
    assert record.facts.completeness == "partial"
    talk(End("interrupted", 200))
    talk(Relay(b"event: error\ndata: " + error_body("anthropic", 502, DOWN) + b"\n\n"))
    assert talk.is_over()


def test_a_process_that_stops_in_the_middle_of_a_body() -> None:
    talk = Dialogue(messages(stream=False))
    talk(Send, blocking())
    talk(Respond)
    talk(Receive(), Interrupted())
    talk(Record)
    talk(End("interrupted", 200))
    talk(Abort())
    assert talk.is_over()


# --- the ledger fails -------------------------------------------------------------------------------------------------


def test_a_stream_that_cannot_be_recorded_does_not_end_well() -> None:
    """The error stands in place of the end that was held back."""
    talk = Dialogue(messages())
    talk(Send, STREAM)
    talk(EVENTS)
    talk(Receive(), START + DELTA)
    talk(Relay(START + DELTA))
    talk(Receive(), STOP)
    talk(Relay(b""))
    talk(Record)
    talk(End("completed", 200), UNRECORDED)
    talk(Relay(b"event: error\ndata: " + error_body("anthropic", 503, UNRECORDED.message) + b"\n\n"))
    assert talk.is_over()


ENDINGS = {"messages": (START + DELTA, STOP), "chat": (HELLO + FINISH, DONE), "responses": (CREATED, COMPLETED)}


@pytest.mark.parametrize("unrecorded", [True, False])
@pytest.mark.parametrize("form", FORMATS)
def test_no_client_sees_the_end_of_a_response_that_has_not_ended(form: str, unrecorded: bool) -> None:
    """Wherever the last event is split: not even when all of it but its blank line has been passed on, which would have to
    be added before an event of ours."""
    begun, end = ENDINGS[form]
    request = FORMATS[form].parse(b'{"stream":true}')
    for at in range(len(end)):
        chunks: list[bytes] = [*filter(None, [begun, end[:at]])]
        if unrecorded:
            played = play(request, STREAM, [*chunks, end[at:]], at_end=UNRECORDED)
        else:
            played = play(request, STREAM, [*chunks, CUT])
            if at == len(end) - 1:  # all but its blank line, without which clients read it as well
                assert played.end == End("completed", 200)
                assert played.relayed == begun + end[:at]
                continue
        reader = FORMATS[form].reader()
        for frame in SseDecoder().feed(played.relayed):
            with suppress(Unreadable):
                reader.read_event(frame.data or b"")
        assert reader.finished == (not played.aborted)
        said = str(UNRECORDED if unrecorded else CUT)
        assert played.aborted or (reader.facts().error or "").endswith(said)


def test_a_body_that_cannot_be_recorded_does_not_end() -> None:
    talk = Dialogue(messages(stream=False))
    talk(Send, blocking())
    talk(Respond)
    talk(Receive(), MESSAGE)
    talk(Relay(b""))
    talk(Receive(), b"")
    talk(Record)
    talk(End("completed", 200), UNRECORDED)
    talk(Abort())
    assert talk.is_over()


def test_the_end_of_a_response_that_cannot_be_recorded_names_no_usage_twice() -> None:
    """Responses: the failed response is the one that was about to complete."""
    talk = Dialogue(responses())
    talk(Send, STREAM)
    talk(EVENTS)
    talk(Receive(), CREATED + COMPLETED)
    talk(Relay(b""))
    talk(Record)
    talk(End("completed", 200), UNRECORDED)
    (event,) = events(talk(Relay).data)
    assert (event["type"], event["response"]["status"], event["response"]["id"]) == ("response.failed", "failed", "resp_1")
    assert talk.is_over()


# --- usage that the bridge asked for and the client did not (failures.md 13) ------------------------------------------


def asking(options: bytes = b"") -> Request:
    return CHAT.asking_for_usage(chat(options))


NULL = HELLO.replace(b"]}\n\n", b'],"usage":null}\n\n')


def test_the_extra_chunk_is_for_the_ledger_only() -> None:
    talk = Dialogue(asking())
    talk(Send, head(cache_control="no-cache"))
    talk(Respond)
    talk(Receive(), NULL + FINISH)
    talk(Relay(HELLO + FINISH))
    talk(Receive(), COUNTED)
    talk(Relay(b""))
    talk(Receive(), DONE)
    talk(Relay(b""))
    assert figures(talk(Record)) == (9, 5, "complete")
    talk(End("completed", 200))
    talk(Relay(DONE))
    talk(Receive(), b"")
    assert talk.is_over()


@pytest.mark.parametrize(
    "options",
    [
        b"",
        b'"stream_options":null,',
        b'"stream_options":{},',
        b'"stream_options" : { "include_usage" : false } ,',
        b'"stream_options":{"include_usage":null},',
        b'"stream_options":{"include_obfuscation":false},',
    ],
)
def test_it_is_hidden_from_every_client_that_did_not_ask(options: bytes) -> None:
    request = asking(options)
    assert request.hides_usage
    assert msgspec.json.decode(request.body)["stream_options"]["include_usage"] is True
    played = play(request, STREAM, [NULL, FINISH, COUNTED, DONE])
    assert played.relayed == HELLO + FINISH + DONE
    assert played.facts[0].usage is not None


def test_a_client_that_asked_itself_gets_everything() -> None:
    request = asking(b'"stream_options":{"include_usage":true},')
    assert request == chat(b'"stream_options":{"include_usage":true},')
    stream = [NULL, FINISH, COUNTED, DONE]
    assert play(request, STREAM, stream).relayed == b"".join(stream)


@pytest.mark.parametrize("split", [1, 2, 3, 7, 50])
def test_it_is_hidden_however_the_stream_is_split(split: int) -> None:
    stream = b": hi\n\n" + NULL + FINISH + COUNTED + DONE + b": bye\n\n"
    played = play(asking(), STREAM, pieces(stream, split))
    assert played.relayed == b": hi\n\n" + HELLO + FINISH + DONE + b": bye\n\n"
    assert DONE not in played.before_end
    crlf = play(asking(), STREAM, pieces(stream.replace(b"\n", b"\r\n"), split))
    assert crlf.relayed == played.relayed.replace(b"\n", b"\r\n")


@pytest.mark.parametrize("ending", [b"\n", b""])
@pytest.mark.parametrize("last", [DONE, COUNTED, FINISH], ids=["done", "usage", "finish"])
def test_it_is_hidden_in_a_last_event_without_its_blank_line(last: bytes, ending: bytes) -> None:
    """Clients read such an event, so it must neither be lost nor shown."""
    played = play(asking(), STREAM, [NULL + FINISH, last.rstrip() + ending])
    shown = b"" if last == COUNTED else last.rstrip() + ending
    assert played.relayed == HELLO + FINISH + shown
    assert played.end == End("completed", 200)


@pytest.mark.parametrize("coding", ENCODERS)
def test_a_compressed_stream_is_decoded_to_hide_it(coding: str) -> None:
    """A provider that compresses all the same: then the fields that speak of the compressed body go, too."""
    stream = ENCODERS[coding](NULL + FINISH + COUNTED + DONE)
    played = play(
        asking(),
        head(content_encoding=coding, content_length=str(len(stream)), x_request_id="r"),
        [stream[:20], stream[20:]],
    )
    assert played.relayed == HELLO + FINISH + DONE
    assert played.response == Respond(200, [(b"content-type", b"text/event-stream"), (b"x-request-id", b"r")])
    assert played.facts[0].usage is not None


def test_a_compressed_stream_that_breaks_off_is_told_of_in_words_as_it_was_decoded() -> None:
    played = play(asking(), head(content_encoding="gzip"), [gzip(HELLO), b"garbage"])
    assert played.end is not None
    assert (played.end.status, played.end.error) == ("failed", "The provider's response cannot be decoded: error.")
    assert played.relayed == HELLO + b"data: " + error_body("openai", 502, played.end.error or "") + b"\n\n"


def test_what_breaks_off_behind_the_end_of_a_compressed_stream_harms_nobody() -> None:
    stream = gzip(HELLO + FINISH + COUNTED + DONE)
    played = play(asking(), head(content_encoding="gzip"), [stream, b"garbage"])
    assert played.end == End("completed", 200)
    assert played.relayed == HELLO + FINISH + DONE


def test_a_compressed_stream_that_we_cannot_decode_passes_with_everything_in_it() -> None:
    played = play(asking(), head(content_encoding="zlib-ng"), [b"whatever"])
    assert played.relayed == b"whatever"
    assert played.response is not None
    assert (b"content-encoding", b"zlib-ng") in played.response.headers


def test_a_frame_that_broke_off_is_not_shown_when_frames_are_looked_at() -> None:
    played = play(asking(), STREAM, [HELLO + b'data: {"us', CUT])
    assert played.relayed == HELLO + b"data: " + error_body("openai", 502, str(CUT)) + b"\n\n"


def test_an_edited_stream_that_cannot_be_recorded() -> None:
    talk = Dialogue(asking())
    talk(Send, STREAM)
    talk(EVENTS)
    talk(Receive(), HELLO + FINISH)
    talk(Relay(HELLO + FINISH))
    talk(Receive(), DONE)
    talk(Relay(b""))
    talk(Record)
    talk(End("completed", 200), UNRECORDED)
    talk(Relay(b"data: " + error_body("openai", 503, UNRECORDED.message) + b"\n\n"))
    assert talk.is_over()


def test_an_http_error_and_a_body_are_not_edited() -> None:
    body = b'{"choices":[],"usage":null}'
    for response_head in (head("application/json"), head("application/json", 400)):
        assert play(asking(), response_head, [body]).relayed == body


@pytest.mark.parametrize(
    ("sent", "shown"),
    [
        (b'{"usage":null,"choices":[1]}', b'{"choices":[1]}'),
        (b'{ "usage" : null , "choices":[1]}', b'{ "choices":[1]}'),
        (b'{"choices":[1] , "usage" : null }', b'{"choices":[1]  }'),
        (b'{"a":1,"usage":null,"choices":[1],"usage":null}', b'{"a":1,"choices":[1]}'),
        (b'{"choices":[1],"usage":null,"usage":null}', b'{"choices":[1]}'),
        (b'{"\\u0075sage":null,"choices":["usage"],"usage":"usage"}', None),
        (b'{"usage":1,"choices":["usage"],"\\u0075sage":null}', b'{"choices":["usage"]}'),
        (b'{"choices":[{"usage":null}]}', None),  # not at the top: none of our doing
        (b'{"usage":null}', None),  # no chunk of a completion
        (b'{"choices":[1],"usage":{"prompt_tokens":1}}', None),  # sent unasked, and beside choices harmless
        (b'{"choices":[ ],"usage":{"prompt_tokens":1}}', b""),
        (b'{"choices":[],"usage":{"prompt_tokens":1},"error":{"message":"x"}}', None),  # an error is not hidden
        (b'{"choices":[],"usage":null', None),
        (b'"usage"', None),
        (b'\xef\xbb\xbf{"usage":null,"choices":[1]}', None),  # the reader is more lenient than the editor
    ],
)
def test_what_is_taken_out_of_a_chunk(sent: bytes, shown: bytes | None) -> None:
    played = play(asking(), STREAM, [b"id: 1\ndata: " + sent + b"\n\n", FINISH, DONE])
    expected = b"id: 1\ndata: " + (sent if shown is None else shown) + b"\n\n" if shown != b"" else b""
    assert played.relayed.startswith(expected)
    assert b"error" in sent or played.relayed == expected + FINISH + DONE


def test_data_on_several_lines_is_left_alone() -> None:
    event = b'data: {"choices":[1],\ndata: "usage":null}\n\n'
    assert play(asking(), STREAM, [event, FINISH, DONE]).relayed == event + FINISH + DONE
