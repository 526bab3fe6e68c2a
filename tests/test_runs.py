"""Runs of events that are passed over in one step: the ledger must not be able to tell.

Truth: our own contract (`ResponseReader.run`), that reading every event of a run says what reading the last one does. The
reader without a pattern is the reference: it reads each event, as all did before there were runs. The events are those of
wire.md A9, B2 and C3, as the providers and as compatible servers write them, and close misses of those.
"""

import itertools
import json
from collections.abc import Callable, Sequence
from typing import Any, Final

import pytest
from hypothesis import given, settings, strategies as st

from aibridge.merger import VerbatimMerger
from aibridge.wire import CHAT, MESSAGES, RESPONSES, ResponseReader
from aibridge.wire.chat import ChatFormat, ChatReader
from aibridge.wire.messages import MessagesReader
from aibridge.wire.observer import Observer, ResponseHead
from aibridge.wire.responses import ResponsesReader
from aibridge.wire.sse import SseDecoder
from tests.support.coding import gzip
from tests.support.traffic import ALL

HEAD: Final = ResponseHead(200, [(b"content-type", b"text/event-stream")])


class EveryMessagesEvent(MessagesReader):
    run = None


class EveryChatEvent(ChatReader):
    run = None


class EveryResponsesEvent(ResponsesReader):
    run = None


class ChatWithoutRuns(ChatFormat):
    def reader(self) -> ChatReader:
        return EveryChatEvent()


READERS: Final[dict[str, tuple[type[ResponseReader], type[ResponseReader]]]] = {
    "messages": (MessagesReader, EveryMessagesEvent),
    "chat": (ChatReader, EveryChatEvent),
    "responses": (ResponsesReader, EveryResponsesEvent),
}

# JSON strings, with what might be taken for their end or for the end of an event; the last four are none.
STRINGS: Final = [
    b'"Hello"',
    b'""',
    b'"a\\"b\\\\"',
    b'"\\u00e9\\n\\t\\/"',
    b'"\\ud83d\\ude00 \\ud83d"',
    '"é\u2028\x7f"'.encode(),
    b'"\xff\xfe"',
    b'"data: {\\"id\\":1}\\n\\n"',
    b'"],\\"usage\\":null"',
    b'"event: ping"',
    b'"\\\\"',
    b'"\\q"',
    b'"\x01"',
    b'"a\nb"',
    b'"a"b"',
]
NUMBERS: Final = [b"0", b"1", b"7", b"12", b"-1", b"007", b"1.0", b"99999999999999999999", b"null", b'"1"']


Slot = Sequence[bytes]
"""What may stand at a place of an event: the usual first."""


@st.composite
def deviating(draw: st.DrawFn, *slots: Slot | bytes) -> bytes:
    """An event as it usually is, with another value at two places at most."""
    places = [[slot] if isinstance(slot, bytes) else slot for slot in slots]
    chosen = [place[0] for place in places]
    for at in draw(st.lists(st.integers(0, len(places) - 1), max_size=2)):
        chosen[at] = draw(st.sampled_from(places[at]))
    return b"".join(chosen)


SPACE: Final = [b"", b" ", b"  "]
END: Final = [b"\n\n", b"\n\n\n", b"\r\n\r\n", b"\r\r", b"\n", b"\n: ok\n\n", b"\n:\n\n", b"", b"\ndata: {}\n\n"]


def messages_delta(kind: bytes, member: bytes, index: bytes) -> st.SearchStrategy[bytes]:
    return deviating(
        [b"event: content_block_delta\n", b"", b"event: x\n", b"id: 1\n"],
        b'data: {"type":',
        SPACE,
        [b'"content_block_delta"', b'"content_block_start"', b'"x"', b'"content_block_delta","type":"error"'],
        b',"index":',
        [index, *NUMBERS],
        b',"delta":{"type":',
        [b'"%b"' % kind, b'"x"', b'"%b","type":"thinking_delta"' % kind],
        b',"%b":' % member,
        STRINGS,
        [b"}", b',"thinking":"y"}', b',"text":1}', b""],
        SPACE,
        [b"}", b',"type":"message_stop"}', b',"index":1}', b""],
        END,
    )


MESSAGES_START: Final = (
    b'event: message_start\ndata: {"type":"message_start","message":{"id":"msg_1","usage":{"input_tokens":3}}}\n\n'
    b'data: {"type":"content_block_start","index":0,"content_block":{"type":"thinking","thinking":""}}\n\n'
    b'data: {"type":"content_block_start","index":1,"content_block":{"type":"tool_use","id":"t","name":"n","input":{}}}\n\n'
)
MESSAGES_OTHERS: Final = st.sampled_from(
    [
        b'data: {"type":"content_block_stop","index":0}\n\n',
        b'event: ping\ndata: {"type": "ping"}\n\n',
        b'event: ping\ndata: {"type":"ping"}  \n\n',
        b'data: {"type":"message_delta","delta":{"stop_reason":"end_turn"},"usage":{"output_tokens":5}}\n\n',
        b'data: {"type":"message_stop"}\n\n',
        b'data: {"type":"error","error":{"type":"overloaded_error","message":"x"}}\n\n',
        b": keep-alive\n\n",
        b"\n",
        b"\xef\xbb\xbf",
    ]
)

CHAT_DELTAS: Final = deviating(
    [b"", b"event: x\n"],
    b'data: {"id":',
    [b'"c1"', b'"c2"', b'""', b"null", b'"\xff"', b'"\\u0041"'],
    b',"object":"chat.completion.chunk","created":17',
    [b',"model":"m1"', b',"model":"m2"', b',"model":""', b"", b',"model":null'],
    [b',"system_fingerprint":"fp"', b"", b',"provider":"P","service_tier":null', b',"id":""', b',"error":"x"', b',"x":1'],
    [b',"choices":[{', b',"choices":[{"x":1,', b',"choices":[{"index":0},{'],
    [b'"index":0,', b'"index":1,', b'"index":-1,', b""],
    b'"delta":{',
    [b"", b'"role":"assistant",'],
    [b'"content":', b'"reasoning_content":', b'"refusal":'],
    STRINGS,
    [
        b"",
        b',"refusal":null',
        b',"reasoning_content":null,"tool_calls":null',
        b',"tool_calls":[{"index":0,"id":"c","function":{"name":"n","arguments":"{}"}}]',
        b',"reasoning":"hm"',
        b',"function_call":null',
    ],
    b"}",
    [b',"logprobs":null,"finish_reason":null', b',"finish_reason":"stop"', b"", b',"finish_reason":null,"index":2'],
    [b"}]", b"},{}]", b"}"],
    [
        b',"usage":null',
        b"",
        b',"usage":{"prompt_tokens":3}',
        b',"usage":null,"usage":{"prompt_tokens":4}',
        b',"usage" : null',
    ],
    [b"", b',"obfuscation":"abc"', b',"obfuscation":""', b',"obfuscation":"a\\"b"', b',"id":"c3"'],
    b"}",
    END,
)
CHAT_OTHERS: Final = st.sampled_from(
    [
        b'data: {"id":"c1","model":"m1","choices":[],"usage":{"prompt_tokens":3,"completion_tokens":4}}\n\n',
        b'data: {"id":"c1","model":"m1","choices":[{"index":0,"delta":{},"finish_reason":"stop"}],"usage":null}\n\n',
        b'data: {"id":"","model":"","choices":[]}\n\n',
        b'data: {"error":{"message":"x"}}\n\n',
        b"data: [DONE]\n\n",
        b"data: [DONE]\n",
        b": OPENROUTER PROCESSING\n\n",
        b"\n",
        b"\xef\xbb\xbf",
    ]
)


def responses_delta(kind: bytes) -> st.SearchStrategy[bytes]:
    return deviating(
        [b"event: response.%b.delta\n" % kind, b"", b"event: response.reasoning_text.delta\n"],
        b'data: {"type":"response.%b.delta"' % kind,
        [b',"sequence_number":', b',"number":'],
        [b"4", *NUMBERS],
        [b',"item_id":"i1"', b',"item_id":"i2"', b""],
        b',"output_index":',
        [b"0", *NUMBERS],
        [b"", b',"sequence_number":5', b',"type":"error"', b',"response":{"id":"r9"}'],
        b',"delta":',
        STRINGS,
        [b',"content_index":0', b"", b',"summary_index":1'],
        [b"", b',"logprobs":[]', b',"logprobs":[{}]'],
        [b"", b',"obfuscation":"abc"'],
        [b"}", b',"sequence_number":9}', b""],
        END,
    )


RESPONSES_OTHERS: Final = st.sampled_from(
    [
        b'event: response.created\ndata: {"type":"response.created","sequence_number":0,"response":{"id":"r1"}}\n\n',
        b'data: {"type":"response.output_item.done","sequence_number":3,"output_index":0,"item":{"type":"reasoning"}}\n\n',
        b'data: {"type":"response.completed","sequence_number":8,"response":{"id":"r1","usage":{"input_tokens":3}}}\n\n',
        b'data: {"type":"error","code":"x","message":"y"}\n\n',
        b'data: {"type":"response.in_progress"}\n\n',
        b"data: [DONE]\n\n",
        b": ok\n\n",
        b"\n",
    ]
)

STARTS: Final = {"messages": MESSAGES_START, "chat": b"", "responses": b": ok\n\n"}
EVENTS: Final = {
    "messages": st.one_of(
        messages_delta(b"text_delta", b"text", b"2"),
        messages_delta(b"thinking_delta", b"thinking", b"0"),
        messages_delta(b"input_json_delta", b"partial_json", b"1"),
        MESSAGES_OTHERS,
    ),
    "chat": CHAT_DELTAS | CHAT_DELTAS | CHAT_OTHERS,
    "responses": st.one_of(
        responses_delta(b"output_text"),
        responses_delta(b"function_call_arguments"),
        responses_delta(b"reasoning_text"),
        RESPONSES_OTHERS,
    ),
}


@st.composite
def streams(draw: st.DrawFn, form: str) -> list[bytes]:
    """A stream in chunks: some events often repeated, as providers do, and cut anywhere."""
    events = draw(st.lists(st.tuples(EVENTS[form], st.sampled_from([1, 1, 2, 3])), max_size=10))
    start = draw(st.sampled_from([STARTS[form], STARTS[form], b""]))
    body = start + b"".join(event * times for event, times in events)
    cuts = sorted({0, *draw(st.lists(st.integers(0, len(body)), max_size=8)), len(body)})
    return [body[start:end] for start, end in itertools.pairwise(cuts)]


QUESTIONS: Final[Sequence[Callable[[Observer], Any]]] = [
    lambda observer: observer.facts(cut=False),
    lambda observer: observer.ends_at_eof,
    lambda observer: observer.error_event(502, "x"),
    lambda observer: (observer.finished, observer.at_boundary, observer.error),
]


def seen(observer: Observer, first: int) -> list[Any]:
    """What an observer answers. What is asked `first` may depend on events that were passed over."""
    return [QUESTIONS[(first + number) % len(QUESTIONS)](observer) for number in range(len(QUESTIONS))]


def check(form: str, chunks: Sequence[bytes], *, first: int = 0, often: bool = False, head: ResponseHead = HEAD) -> None:
    skipping, reading = (Observer(reader(), head, stream=True) for reader in READERS[form])
    for chunk in chunks:
        frames, every = skipping.feed(chunk), reading.feed(chunk)
        assert b"".join(frame.raw for frame in frames) == b"".join(frame.raw for frame in every)
        assert (skipping.finished, skipping.at_boundary) == (reading.finished, reading.at_boundary)
        if often:
            assert seen(skipping, first) == seen(reading, first)
    skipping.end()
    reading.end()
    assert seen(skipping, first) == seen(reading, first)


@pytest.mark.parametrize("form", READERS)
def test_passing_over_a_run_says_what_reading_it_does(form: str) -> None:
    @settings(max_examples=400, deadline=None)
    @given(streams(form), st.integers(0, len(QUESTIONS) - 1), st.booleans())
    def run(chunks: Sequence[bytes], first: int, often: bool) -> None:
        check(form, chunks, first=first, often=often)

    run()


def chunk(index: int = 0, id: bytes = b'"c1"', finish: bytes = b"null") -> bytes:
    return b'data: {"id":%b,"model":"m","choices":[{"index":%d,"delta":{"content":""},"finish_reason":%b}]}\n\n' % (
        id,
        index,
        finish,
    )


@pytest.mark.parametrize(
    "events",
    [
        # a choice that only a run tells of has not finished
        [chunk(), chunk(1), chunk(), chunk(finish=b'"stop"')],
        [chunk(1, finish=b'"stop"'), chunk()],
        # the last id that can be read is the response's
        [chunk(), chunk(id=b'"c2"'), chunk(id=b'"\xff"')],
        [chunk(), chunk(id=b'"c2"'), chunk(id=b'""')],
        [chunk(), chunk(id=b'"c2"'), chunk(id=b"null")],
    ],
)
@pytest.mark.parametrize("first", range(len(QUESTIONS)))
def test_what_chat_runs_have_to_say(events: Sequence[bytes], first: int) -> None:
    check("chat", events, first=first)
    check("chat", [b"".join(events)], first=first)


@pytest.mark.parametrize("recording", [recording for recording in ALL if recording.streams], ids=lambda one: one.name)
@pytest.mark.parametrize("size", [1, 50, 1000, 100_000])
def test_recordings(recording: Any, size: int) -> None:
    body = recording.response
    check(recording.format, [body[at : at + size] for at in range(0, len(body), size)])


@pytest.mark.parametrize("form", READERS)
def test_decoded_streams_have_runs_too(form: str) -> None:
    body = USUAL[form] * 2000
    head = ResponseHead(200, [*HEAD.headers, (b"content-encoding", b"gzip")])
    packed = gzip(body)
    check(form, [packed[at : at + 100] for at in range(0, len(packed), 100)], head=head)


# What the providers themselves send most: wire.md A9, B2 and C3.
USUAL: Final = {
    "messages": (
        b"event: content_block_delta\n"
        b'data: {"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"Hello \\"you\\""}       }\n\n'
    ),
    "chat": (
        b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1795219200,"model":"gpt-5.4","service_tier":'
        b'"default","system_fingerprint":"fp_44709d6fcb","choices":[{"index":0,"delta":{"content":"Hello \\"you\\""},'
        b'"logprobs":null,"finish_reason":null}],"usage":null,"obfuscation":"x7Pq"}\n\n'
    ),
    "responses": (
        b"event: response.output_text.delta\n"
        b'data: {"type":"response.output_text.delta","sequence_number":4,"item_id":"m_1","output_index":0,"content_index":0,'
        b'"delta":"Hello \\"you\\"","logprobs":[],"obfuscation":"x7Pq"}\n\n'
    ),
}


@pytest.mark.parametrize("form", READERS)
def test_what_providers_send_most_is_one_run(form: str) -> None:
    """Else all of this would be for nothing, and no other test would say so."""
    decoder = SseDecoder(run=READERS[form][0].run)
    decoder.feed(b": hello\n\n")
    events = [USUAL[form], USUAL[form].replace(b"Hello", b"Bye"), USUAL[form].replace(b"x7Pq", b"y").replace(b":4,", b":5,")]
    (run,) = decoder.feed(b"".join(events))
    assert (run.run, run.raw, run.data) == (True, b"".join(events), None)


@pytest.mark.parametrize("form", READERS)
def test_the_first_frame_is_no_run(form: str) -> None:
    """A byte order mark may stand before it."""
    for mark in (b"", b"\xef\xbb\xbf"):
        (first, second) = SseDecoder(run=READERS[form][0].run).feed(mark + USUAL[form] * 3)
        assert (first.run, second.run) == (False, True)


@settings(max_examples=400, deadline=None)
@given(streams("chat"))
def test_hiding_usage_in_a_run(chunks: Sequence[bytes]) -> None:
    """The client gets the same bytes."""
    shown = []
    for form in (CHAT, ChatWithoutRuns()):
        merger = VerbatimMerger(form.asking_for_usage(form.parse(b'{"stream":true}')))
        merger.begin(HEAD)
        out = b"".join(map(merger.feed, chunks))
        merger._observer.end()
        shown.append(out + merger.finish() + merger.rest())
    assert shown[0] == shown[1]


def test_usage_is_hidden_in_a_run() -> None:
    merger = VerbatimMerger(CHAT.asking_for_usage(CHAT.parse(b'{"stream":true}')))
    merger.begin(HEAD)
    assert merger.feed(USUAL["chat"] * 5) == USUAL["chat"].replace(b',"usage":null', b"") * 5
    assert json.loads(USUAL["chat"][6:])["usage"] is None


def test_the_number_of_an_error_follows_the_last_event_of_a_run() -> None:
    """As the provider counted (wire.md C3), though nothing of the run was read."""
    observer = Observer(RESPONSES.reader(), HEAD, stream=True)
    observer.feed(b'data: {"type":"response.created","sequence_number":0,"response":{"id":"r"}}\n\n')
    for number in range(1, 100):
        observer.feed(USUAL["responses"].replace(b":4,", b":%d," % number))
    assert b'"sequence_number":100,' in observer.error_event(502, "x")


def test_a_run_over_the_size_bound_is_looked_at() -> None:
    decoder = SseDecoder(200, run=MESSAGES.reader().run)
    decoder.feed(b": hello\n\n")
    assert [frame.run for frame in decoder.feed(USUAL["messages"] * 2)] == [False, False]
