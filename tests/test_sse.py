"""The event stream grammar, and that none of its bytes gets lost.

Truth: the HTML Living Standard, 9.2.5 "Parsing an event stream" and 9.2.6 "Interpreting an event stream"; wire.md E for
line splitting, C3 and failures.md 8 for what clients meet. What is a frame, and the bound on one, is our choice.
"""

import itertools
from collections.abc import Iterable

import pytest
from hypothesis import example, given, strategies as st

from aibridge.wire.sse import Frame, SseDecoder

Event = tuple[bytes, bytes]


def decode(chunks: Iterable[bytes], limit: int = 1000) -> tuple[list[Frame], SseDecoder]:
    decoder = SseDecoder(limit)
    return [frame for chunk in chunks for frame in decoder.feed(chunk)], decoder


def events(stream: bytes) -> list[Event]:
    """What a client's event handlers would see."""
    frames, _ = decode([stream])
    return [(frame.event, frame.data) for frame in frames if frame.data is not None]


@pytest.mark.parametrize(
    ("stream", "expected"),
    [
        # 9.2.5: stream = [ bom ] *event; end-of-line = ( cr lf / cr / lf )
        (b"data: a\n\n", [(b"", b"a")]),
        (b"data: a\r\r", [(b"", b"a")]),
        (b"data: a\r\n\r\n", [(b"", b"a")]),
        (b"data: a\r\n\n", [(b"", b"a")]),
        (b"data: a\n\r", [(b"", b"a")]),
        (b"data: a\r\n\r", [(b"", b"a")]),
        (b"event: x\rdata: a\n\r\ndata: b\r\n\n", [(b"x", b"a"), (b"", b"b")]),
        (b"\xef\xbb\xbfdata: a\n\n", [(b"", b"a")]),
        (b"data: a\n\n\xef\xbb\xbfdata: b\n\n", [(b"", b"a")]),  # only at the start: here it is part of the name
        (b"\xef\xbb\xbf\xef\xbb\xbfdata: a\n\n", []),
        (b"\xef\xbb\xbf\n\ndata: a\n\n", [(b"", b"a")]),
        # 9.2.6: a single space after the colon is no part of the value
        (b"data:a\n\n", [(b"", b"a")]),
        (b"data:  a \n\n", [(b"", b" a ")]),
        (b"data:\ta\n\n", [(b"", b"\ta")]),
        (b"event:x\ndata:a:b\n\n", [(b"x", b"a:b")]),
        # several data lines are joined by a line feed
        (b"data: a\ndata: b\n\n", [(b"", b"a\nb")]),
        (b"data\ndata\n\n", [(b"", b"\n")]),
        (b"data: a\ndata\ndata:\n\n", [(b"", b"a\n\n")]),
        # a line without a colon is a field with an empty value
        (b"data\n\n", [(b"", b"")]),
        (b"data: a\nevent\n\n", [(b"", b"a")]),
        (b"data: \n\n", [(b"", b"")]),
        # the last event field counts, and for one event only
        (b"event: x\nevent: y\ndata: a\n\ndata: b\n\n", [(b"y", b"a"), (b"", b"b")]),
        # no data, no event, and no event name left over either
        (b"event: x\n\ndata: a\n\n", [(b"", b"a")]),
        (b"\n\n\n\ndata: a\n\n\n\n", [(b"", b"a")]),
        # comments, and fields that nobody needs here
        (b": keep-alive\n\ndata: a\n\n", [(b"", b"a")]),
        (b":\ndata: a\n:b\ndata: c\n\n", [(b"", b"a\nc")]),
        (b"id: 1\nretry: 10\ndata: a\nunknown: x\n\n", [(b"", b"a")]),
        (b"Data: a\n data: b\n\n", []),  # names are case-sensitive, a leading space is part of one
        # only CR and LF end a line, whatever str.splitlines() thinks
        ("data: a\u2028b\u2029c\u0085d\n\n".encode(), [(b"", "a\u2028b\u2029c\u0085d".encode())]),
        (b"data: a\x0bb\x0cc\x1cd\x1de\x1ef\x85g\n\n", [(b"", b"a\x0bb\x0cc\x1cd\x1de\x1ef\x85g")]),
        (b"data: a\x00b\xff\n\n", [(b"", b"a\x00b\xff")]),
        # "any pending data must be discarded" at the end; clients read it all the same, which is the observer's business
        (b"data: a\n\ndata: b\n", [(b"", b"a")]),
        (b"data: a", []),
        (b"", []),
    ],
)
def test_grammar(stream: bytes, expected: list[Event]) -> None:
    assert events(stream) == expected
    frames, decoder = decode(stream[at : at + 1] for at in range(len(stream)))
    assert [(frame.event, frame.data) for frame in frames if frame.data is not None] == expected
    assert b"".join(frame.raw for frame in frames) + decoder.rest == stream


def test_frames_are_what_can_be_taken_out() -> None:
    """A block with its blank line; a comment between blocks by itself, so that it is passed on at once (failures.md 8)."""
    frames, decoder = decode([b": a\n: b\n\nevent: x\ndata: 1\n: in between\n\ndata: 2"])
    assert frames == [
        Frame(b": a\n"),
        Frame(b": b\n"),
        Frame(b"\n"),
        Frame(b"event: x\ndata: 1\n: in between\n\n", b"x", b"1"),
    ]
    assert decoder.rest == b"data: 2"


def test_a_crlf_that_two_chunks_share() -> None:
    """The event is not held back until its line feed has come; the line feed is none of a blank line."""
    decoder = SseDecoder()
    (frame,) = decoder.feed(b"data: a\r\n\r")
    assert frame.data == b"a"
    assert decoder.feed(b"\n") == [Frame(b"\n")]
    assert decoder.at_boundary
    (frame,) = decoder.feed(b"data: b\r\n\r\n")
    assert frame == Frame(b"data: b\r\n\r\n", b"", b"b")
    assert decoder.feed(b"data: c\r") == []
    assert decoder.feed(b"data: d\r\r")[0].data == b"c\nd"


@pytest.mark.parametrize(
    ("stream", "boundary"),
    [
        (b"", True),
        (b"data: a\n\n", True),
        (b": a\n", True),
        (b"\n\n", True),
        (b"data: a\r\n\r", True),
        (b"data: a\n", False),
        (b"data: a", False),
        (b": a", False),
        (b"event: a\n", False),
        (b"data: a\n: b\n", False),
        (b"\xef\xbb", False),
    ],
)
def test_where_an_event_can_be_added(stream: bytes, boundary: bool) -> None:
    assert decode([stream])[1].at_boundary is boundary


@pytest.mark.parametrize("chunk", [1, 7, 64, 10_000])
@pytest.mark.parametrize(
    "large",
    [
        b"data: " + b"x" * 400 + b"\n\n",  # one line
        b"event: big\n" + b"data: 0123456789\n" * 40 + b"\n",  # many lines
        b": " + b"x" * 400 + b"\n\n",
        b"data: " + b"x" * 400 + b"\r\n: y\r\n\r\n",
    ],
)
def test_an_event_over_the_bound_passes_unread(large: bytes, chunk: int) -> None:
    """Its bytes are let go of as they come, and the next event is read again."""
    stream = b"data: a\n\n" + large + b"event: y\ndata: b\n\n"
    decoder = SseDecoder(100)
    frames: list[Frame] = []
    for at in range(0, len(stream), chunk):
        frames += decoder.feed(stream[at : at + chunk])
        assert len(decoder.rest) <= 100
    assert b"".join(frame.raw for frame in frames) == stream
    assert [(frame.event, frame.data) for frame in frames if frame.data is not None] == [(b"", b"a"), (b"y", b"b")]
    # A comment says nothing, so it does not matter whether it was over the bound.
    assert sum(frame.oversized for frame in frames) == 1 or large.startswith(b":")
    assert decoder.at_boundary


def test_within_an_event_over_the_bound_there_is_no_boundary() -> None:
    _, decoder = decode([b"data: " + b"x" * 2000])
    assert decoder.rest == b""
    assert not decoder.at_boundary
    decoder.feed(b"\n")
    assert not decoder.at_boundary
    decoder.feed(b"\n")
    assert decoder.at_boundary


def test_no_bound_is_hit_by_many_small_events() -> None:
    frames, _ = decode([b"data: 0123456789\n\n: comment\n\n" * 1000])
    assert not any(frame.oversized for frame in frames)


LINES = st.sampled_from(
    [b"data: a", b"data", b"data:b:c", b"event: x", b": comment", b"id: 1", b"", b"", b"\xef\xbb\xbf", b"data: \xe2\x80\xa8"]
)
ENDS = st.sampled_from([b"\n", b"\r", b"\r\n"])
STREAMS = st.lists(st.builds(bytes.__add__, LINES, ENDS) | st.binary(max_size=4), max_size=25).map(b"".join)


@given(STREAMS, st.lists(st.integers(0, 200), max_size=12))
@example(b"data: a\r\n\r\ndata: b\r\n\r\n", [8, 10, 18, 20])  # between each CR and its LF
@example(b"\xef\xbb\xbfdata: a\n\n", [1, 2])
@example(b"data: a\r\rdata: b\n\n", [8])
def test_a_split_changes_nothing(stream: bytes, cuts: list[int]) -> None:
    places = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    chunks = [stream[start:end] for start, end in itertools.pairwise(places)]
    frames, decoder = decode(chunks)
    whole, rest = decode([stream])
    assert [(frame.event, frame.data) for frame in frames if frame.data is not None] == events(stream)
    assert b"".join(frame.raw for frame in frames) + decoder.rest == stream
    assert b"".join(frame.raw for frame in whole) + rest.rest == stream
    assert decoder.at_boundary == rest.at_boundary


@given(st.lists(st.binary(max_size=300), max_size=10))
def test_nothing_is_lost_of_anything(chunks: list[bytes]) -> None:
    frames, decoder = decode(chunks, limit=64)
    assert b"".join(frame.raw for frame in frames) + decoder.rest == b"".join(chunks)


# ---- editing a frame ----


def test_other_data_in_the_bytes_of_a_frame() -> None:
    (frame,) = SseDecoder().feed(b'event: x\r\nid: 7\r\ndata: {"a":1}\r\n\r\n')
    assert frame.data == b'{"a":1}'
    assert frame.with_data(b'{"a":2}') == b'event: x\r\nid: 7\r\ndata: {"a":2}\r\n\r\n'


def test_data_of_several_lines_is_put_on_one() -> None:
    (frame,) = SseDecoder().feed(b'event: x\ndata: {"a":\ndata: 1}\n\n')
    assert frame.with_data(b'{"a":\r\n2}') == b'event: x\ndata: {"a":  2}\n\n'
    (frame,) = SseDecoder().feed(b'data: {"a":\ndata: 1}\n\n')
    assert frame.with_data(b"{}") == b"data: {}\n\n"
