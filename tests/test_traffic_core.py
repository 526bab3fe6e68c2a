"""Recorded provider traffic through the core: identical bytes and the expected facts, however the stream is split.

Truth: the corpus and its expectations (``tests/support/traffic.py``), which the vendors' SDKs agree with; that chunking
must not matter is style.md habit 6 and failures.md 8, that a compressed response passes as sent failures.md 9.
"""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from aibridge.wire import ResponseFacts, Usage
from aibridge.wire.reading import Unreadable
from aibridge.wire.sse import SseDecoder
from tests.support.coding import ENCODERS
from tests.support.dialogue import FORMATS, Played, play_recording
from tests.support.provider import bytewise, whole
from tests.support.recording import Recording
from tests.support.traffic import ALL


def by_name(recording: Recording) -> str:
    return recording.name


EVERY = pytest.mark.parametrize("recording", ALL, ids=by_name)


def rows(facts: Sequence[ResponseFacts]) -> dict[str, Any]:
    """Facts in the corpus's terms."""
    (only,) = facts
    usage = only.usage
    return {
        "response_id": only.response_id,
        "usage": [
            {
                "input_tokens": usage.input_tokens,
                "output_tokens": usage.output_tokens,
                "cache_read_input_tokens": usage.cache_read_input_tokens,
                "cache_write_input_tokens": usage.cache_write_input_tokens,
                "completeness": only.completeness,
            }
            for usage in ([] if usage is None else [usage])
        ],
        "tool_calls": [
            {
                "tool_call_id": call.id,
                "tool": call.name,
                "input": call.input,
                "run_by": call.details.get("run_by", "client"),
            }
            for call in only.tool_calls
        ],
        "thoughts": [(thought.source, thought.content) for thought in only.thoughts],
    }


def check(recording: Recording, played: Played) -> None:
    expect = recording.expect
    assert played.end is not None
    assert (played.end.status, played.end.http_status) == (expect.status, expect.http_status)
    assert (played.end.error is None) == (expect.status == "completed")
    seen = rows(played.facts)
    for name, value in seen.items():
        if name not in expect.undecided:
            assert value == list(getattr(expect, name)) if name != "response_id" else value == expect.response_id


def check_bytes(recording: Recording, played: Played) -> None:
    """What the provider said is passed on to the last byte; what it left unfinished ends in a way that shows."""
    response = recording.response
    assert played.relayed.startswith(response)
    after = played.relayed[len(response) :]
    expect = recording.expect
    if expect.status == "completed" or expect.http_status != 200 or played.facts[0].error is not None:
        assert after == b""
        assert not played.aborted
    elif played.aborted:
        assert after == b""
        assert not recording.streams
    else:
        assert after.endswith(b"\n\n")
        assert played.end is not None
        assert played.end.error is not None
        assert played.end.error in what_a_client_reads(recording, played.relayed)


def what_a_client_reads(recording: Recording, stream: bytes) -> str:
    """The error that a reader of the whole stream finds in it."""
    reader = FORMATS[recording.format].reader()
    for frame in SseDecoder().feed(stream):
        if frame.data is not None:
            with suppress(Unreadable):  # the event that broke off
                reader.read_event(frame.data)
    return reader.facts().error or ""


@EVERY
def test_what_a_request_says(recording: Recording) -> None:
    request = FORMATS[recording.format].parse(recording.request)
    facts = request.facts
    expect = recording.expect
    assert request.body == recording.request
    assert facts.prompt == expect.prompt
    assert facts.correlating_tool_call_id == expect.correlating_tool_call_id
    assert facts.stream == expect.stream
    assert facts.model == expect.model
    assert facts.notes == ()


@EVERY
def test_whole(recording: Recording) -> None:
    played = play_recording(recording, whole(recording.response))
    check(recording, played)
    check_bytes(recording, played)


@EVERY
def test_byte_by_byte(recording: Recording) -> None:
    played = play_recording(recording, bytewise(recording.response))
    check(recording, played)
    check_bytes(recording, played)
    assert played.facts == play_recording(recording, whole(recording.response)).facts


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(ALL), st.data())
def test_split_anywhere(recording: Recording, data: st.DataObject) -> None:
    body = recording.response
    cuts = sorted(data.draw(st.lists(st.integers(0, len(body)), max_size=20)))
    chunks = [body[start:end] for start, end in zip([0, *cuts], [*cuts, len(body)], strict=True)]
    played = play_recording(recording, chunks)
    check(recording, played)
    check_bytes(recording, played)


@pytest.mark.parametrize("coding", ENCODERS)
@EVERY
def test_compressed(recording: Recording, coding: str) -> None:
    """Passed on as it came, and read all the same. One that breaks off has no room for words: it is broken off too."""
    body = ENCODERS[coding](recording.response)
    chunks = [body[at : at + 7] for at in range(0, len(body), 7)]
    played = play_recording(recording, chunks, content_encoding=coding)
    check(recording, played)
    assert played.relayed == body
    if recording.cut:
        assert played.aborted


@EVERY
def test_what_ends_a_response_waits_for_its_records(recording: Recording) -> None:
    """The client of a complete response has not got all of it before the records are durable (design.md 2)."""
    played = play_recording(recording, bytewise(recording.response))
    ended_by_its_connection = recording.response.endswith((b"}", b"[DONE]")) and recording.streams
    if recording.expect.status == "completed" and not ended_by_its_connection and "missing-done" not in recording.name:
        assert len(played.before_end) < len(recording.response)


def test_nothing_is_known_of_what_never_came() -> None:
    """A cut before the first byte of a stream that the provider accepted: figures exist, nobody knows them."""
    (recording,) = [recording for recording in ALL if recording.name == "chat-cut-before-anything"]
    (facts,) = play_recording(recording, []).facts
    assert (facts.usage, facts.completeness) == (Usage(), "partial")
