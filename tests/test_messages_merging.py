"""Several responses of Anthropic Messages as one.

Truth: the official SDKs' stream helpers and accumulators, in Python and in JavaScript; wire.md A7 to A10 for what providers
send, D5 for what the client has to get, E for what must survive. What the provider has in a body is the truth for what is
rebuilt from its stream.
"""

import json
import random
from collections.abc import Iterable
from typing import Any

import anthropic
import pytest
from hypothesis import given, strategies as st

from aibridge.tools import Toolset
from aibridge.wire import MESSAGES
from aibridge.wire.reading import Unreadable
from aibridge.wire.sse import Frame, SseDecoder
from aibridge.wire.turns import Turn, TurnMerger, UsagePolicy
from tests.support.jssdk import JavaScript
from tests.support.traffic import ALL
from tests.support.turns_messages import (
    ERROR,
    NOW,
    PING,
    TOOLSET,
    ZONE,
    Reply,
    Said,
    Split,
    accumulated,
    calls,
    event,
    feed,
    merged,
    merger,
    parsed,
    says,
    thinks,
    whole,
)


def bytewise(stream: bytes) -> Iterable[bytes]:
    return (stream[at : at + 1] for at in range(len(stream)))


def randomly(stream: bytes) -> Iterable[bytes]:
    dice = random.Random(len(stream))
    at = 0
    while at < len(stream):
        size = dice.randint(1, 60)
        yield stream[at : at + size]
        at += size


SPLITS: list[Split] = [whole, bytewise, randomly]
splits = pytest.mark.parametrize("split", SPLITS, ids=lambda split: split.__name__)

TWO_CALLS = Reply([thinks("sig-1"), calls("toolu_1", NOW, '{"a":1}'), calls("toolu_2", NOW)], "tool_use", 1)
ANOTHER = Reply([says("Let me see."), calls("toolu_3", ZONE)], "tool_use", 2)
MIXED = Reply([calls("toolu_4", NOW), calls("toolu_5", "Read", '{"path":"a"}'), calls("toolu_6", ZONE)], "tool_use", 2)
ANSWER = Reply([thinks("sig-2", ""), says("It is noon. 🌍")], number=3)


def told(message: anthropic.types.Message) -> list[Any]:
    """The blocks as a client replays them."""
    return [block.to_dict() for block in message.content]


def expected(*replies: Reply) -> list[Any]:
    """What is left for the client when the injected calls are taken away."""
    blocks = [json.loads(block.whole) for reply in replies for block in reply.blocks]
    return [block for block in blocks if block.get("name") not in (NOW, ZONE)]


SCENES = {
    "text": [Reply([says("Hello")])],
    "thinking and text": [ANSWER],
    "two calls of one tool": [TWO_CALLS, ANSWER],
    "three hops": [TWO_CALLS, ANOTHER, ANSWER],
    "a mixed turn": [TWO_CALLS, MIXED],
    "hidden alone": [Reply([calls("toolu_7", NOW)], "tool_use", 1), ANSWER],
    "nothing to see": [Reply([calls("toolu_7", NOW)], "tool_use", 1), Reply([], number=2)],
}


@pytest.mark.parametrize("replies", SCENES.values(), ids=SCENES)
@splits
async def test_the_sdks_take_it_for_one_message(replies: list[Reply], split: Split, js: JavaScript) -> None:
    stream = merged(*(reply.stream for reply in replies), split=split)
    message = accumulated(stream)
    assert told(message) == expected(*replies)
    assert message.id == "msg_1" if replies[0].number == 1 else message.id == "msg_3"
    assert message.stop_reason == replies[-1].stop_reason
    assert message.usage.output_tokens == sum(reply.number for reply in replies)
    assert message.usage.input_tokens == 100 * message.usage.output_tokens
    assert message.usage.cache_read_input_tokens == 10 * message.usage.output_tokens
    assert stream.count(b"event: message_start") == stream.count(b"event: message_stop") == 1
    final = await js.read("messages", [stream])
    assert final["content"] == expected(*replies)
    assert (final["id"], final["stop_reason"]) == (message.id, message.stop_reason)
    assert final["usage"]["input_tokens"] == message.usage.input_tokens


@pytest.mark.parametrize("replies", SCENES.values(), ids=SCENES)
def test_a_body_says_what_a_stream_says(replies: list[Reply]) -> None:
    merging = merger()
    turns: list[Turn] = []
    for reply in replies:
        merging.begin()
        merging.read_body(reply.body)
        turns.append(merging.turn())
    message = parsed(merging.finish())
    streamed = accumulated(merged(*(reply.stream for reply in replies)))
    assert told(message) == told(streamed)
    assert (message.id, message.model, message.stop_reason) == (streamed.id, streamed.model, streamed.stop_reason)
    assert message.usage.input_tokens == streamed.usage.input_tokens
    assert message.usage.output_tokens == streamed.usage.output_tokens
    for turn, reply in zip(turns, replies, strict=True):
        assert [piece.raw.decode() for piece in turn.pieces] == [block.whole for block in reply.blocks]


def test_the_usage_of_the_last_response_where_the_context_is_measured() -> None:
    """wire.md D5: the input of the last hop, the output of all."""
    streamed = accumulated(merged(TWO_CALLS.stream, ANSWER.stream, policy="last"))
    assert (streamed.usage.input_tokens, streamed.usage.cache_read_input_tokens) == (300, 30)
    assert streamed.usage.output_tokens == 4


# --- nothing hidden: nothing changed ----------------------------------------------------------------------------------

RECORDED = [
    r for r in ALL if r.format == "messages" and r.status == 200 and (r.content_type != "application/json" or not r.cut)
]


def relayed(merging: TurnMerger, stream: bytes, split: Split) -> bytes:
    """As the engine feeds it: what cannot be read is relayed as it is."""
    merging.begin()
    decoder = SseDecoder()
    shown = b""
    for chunk in split(stream):
        for frame in decoder.feed(chunk):
            try:
                shown += merging.read_event(frame)
            except Unreadable:
                shown += frame.raw
    return shown + merging.finish() + decoder.rest


@pytest.mark.parametrize("recording", RECORDED, ids=lambda recording: recording.name)
@splits
def test_one_response_without_injected_calls_passes_byte_for_byte(recording: Any, split: Split) -> None:
    merging = merger()
    if recording.content_type.startswith("text/event-stream"):
        assert relayed(merging, recording.response, split) == recording.response
    else:
        merging.begin()
        merging.read_body(recording.response)
        assert merging.finish() == recording.response
    assert merging.turn().calls == ()


@pytest.mark.parametrize(
    "stream",
    [
        b": a comment\n\n" + PING + ANSWER.stream,
        ANSWER.stream.replace(b"event: message_stop", PING + b": late\n\nevent: message_stop"),
        ANSWER.stream.replace(b'"index":1', b'"index":7'),  # a hole, which is the provider's
        ANSWER.stream.replace(b'"index":1', b'"index":0'),
        ANSWER.stream.replace(b',"index":0', b""),
        ANSWER.stream.replace(b"\n", b"\r\n"),
        ANSWER.stream + b": bye\n\n",
        b"".join([ANSWER.opening[0], event("message_delta", delta={}), *ANSWER.opening[1:], ANSWER.ending]),  # early: no end
        event("content_block_delta", index=3, delta={"type": "text_delta", "text": "?"}) + ANSWER.stream,
        event("content_block_wink", index=0) + event("wink") + b"data: 1\n\n" + ANSWER.stream,
        event("message_start") + event("content_block_start", index=0) + event("message_stop"),
        event("content_block_start", index=0, content_block=None) + event("content_block_delta", index=0, delta=1),
        b"".join(ANSWER.opening) + ERROR,
        ERROR,
        b"",
    ],
)
@splits
def test_what_is_odd_passes_too(stream: bytes, split: Split) -> None:
    """Rule 2 of wire.md: everything is an open set."""
    merging = merger()
    assert relayed(merging, stream, split) == stream
    merging.turn()


def test_what_ends_a_response_is_held_and_nothing_else() -> None:
    merging = merger()
    merging.begin()
    for frame in SseDecoder().feed(ANSWER.stream.replace(ANSWER.ending, b"")):
        assert merging.read_event(frame) == frame.raw
    for frame in SseDecoder().feed(ANSWER.ending):
        assert merging.read_event(frame) == b""
    assert merging.finish() == ANSWER.ending


def test_an_oversized_event_passes_and_its_response_calls_nothing() -> None:
    merging = merger()
    merging.begin()
    assert merging.read_event(Frame(b"data: ...\n\n", oversized=True)) == b"data: ...\n\n"
    for frame in SseDecoder().feed(TWO_CALLS.stream):
        merging.read_event(frame)
    assert merging.turn().calls == ()


def test_a_response_of_which_something_cannot_be_read_calls_nothing() -> None:
    """It may be a piece of the arguments."""
    merging = merger()
    merging.begin()
    with pytest.raises(Unreadable):
        merging.read_event(Frame(b"data: {\n\n", data=b"{"))
    for frame in SseDecoder().feed(TWO_CALLS.stream):
        merging.read_event(frame)
    assert merging.turn().calls == ()
    assert accumulated(merged_after(merging)).stop_reason == "end_turn"


def merged_after(merging: TurnMerger) -> bytes:
    return b"".join(Reply([]).opening) + merging.finish()


# --- nothing hidden leaks ---------------------------------------------------------------------------------------------


@splits
def test_no_byte_of_an_injected_call_is_shown(split: Split) -> None:
    stream = merged(TWO_CALLS.stream, ANOTHER.stream, MIXED.stream, split=split)
    for secret in (b"bmcp_", b"toolu_1", b"toolu_2", b"toolu_3", b"toolu_4", b"toolu_6"):
        assert secret not in stream
    assert b"toolu_5" in stream
    late = event("content_block_delta", index=1, delta={"type": "input_json_delta", "partial_json": "secret"})
    assert b"secret" not in merged(TWO_CALLS.stream + late, split=split)


def test_a_number_that_no_block_has_says_nothing_once_numbers_differ() -> None:
    """It would be taken for another block's."""
    stray = event("content_block_delta", index=9, delta={"type": "text_delta", "text": "stray"})
    assert b"stray" not in merged(TWO_CALLS.stream, b"".join([*ANSWER.opening, stray, ANSWER.ending]))


def test_numbers_without_gaps_from_servers_that_have_some() -> None:
    """Python's SDK fails on a hole (clients.md 4)."""
    holed = ANSWER.stream.replace(b'"index":1', b'"index":4').replace(b',"index":0', b"")
    assert told(accumulated(merged(TWO_CALLS.stream, holed))) == expected(TWO_CALLS, ANSWER)


# --- how a turn ends --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reason", ["max_tokens", "model_context_window_exceeded", "refusal", "pause_turn", "compaction"])
def test_calls_of_an_unfinished_turn_are_not_run(reason: str) -> None:
    """wire.md A7."""
    for stream in (True, False):
        merging = merger()
        reply = Reply([says("Wait."), calls("toolu_1", NOW)], reason)
        if stream:
            shown = feed(merging, reply.stream)
        else:
            merging.begin()
            merging.read_body(reply.body)
            shown = b""
        turn = merging.turn()
        assert (turn.calls, turn.awaits_client) == ((), False)
        assert [piece.call is not None for piece in turn.pieces] == [False, True]
        ended = accumulated(shown + merging.finish()) if stream else parsed(merging.finish())
        assert ended.stop_reason == reason
        assert told(ended) == expected(reply)


@pytest.mark.parametrize("replies", [[TWO_CALLS], [TWO_CALLS, ANOTHER]])
def test_a_response_that_ends_with_calls_that_nobody_runs_ends_plainly(replies: list[Reply]) -> None:
    """At the limit of hops: a client that is told ``tool_use`` looks for a call."""
    message = accumulated(merged(*(reply.stream for reply in replies)))
    assert message.stop_reason == "end_turn"
    assert told(message) == expected(*replies)
    merging = merger()
    for reply in replies:
        merging.begin()
        merging.read_body(reply.body)
    body = parsed(merging.finish())
    assert (body.stop_reason, told(body)) == ("end_turn", expected(*replies))


@pytest.mark.parametrize("stream", [True, False])
def test_calls_and_whom_they_await(stream: bool) -> None:
    merging = merger()
    if stream:
        feed(merging, MIXED.stream)
    else:
        merging.begin()
        merging.read_body(MIXED.body)
    turn = merging.turn()
    assert turn.response_id == "msg_2"
    assert turn.awaits_client
    assert [(call.id, call.tool.name, call.arguments, call.refusal) for call in turn.calls] == [
        ("toolu_4", NOW, "{}", None),
        ("toolu_6", ZONE, "{}", None),
    ]


def test_calls_without_an_id_or_with_the_same_one_are_calls_of_their_own() -> None:
    """Compatible servers send both (wire.md D3)."""
    merging = merger()
    feed(merging, Reply([calls("", NOW), calls("", NOW), calls("toolu_1", NOW), calls("toolu_1", NOW)], "tool_use").stream)
    assert [call.id for call in merging.turn().calls] == ["", "", "toolu_1", "toolu_1"]
    merging = merger()
    started = event("content_block_start", index=0, content_block={"type": "tool_use", "name": NOW})
    feed(merging, started + event("message_stop"))
    (call,) = merging.turn().calls
    assert (call.id, call.arguments) == ("", "{}")
    assert json.loads(merging.turn().pieces[0].raw) == {"type": "tool_use", "name": NOW, "input": {}}


def test_events_that_servers_leave_out() -> None:
    """No stop of the block, no delta of the message."""
    merging = merger()
    stream = TWO_CALLS.stream.replace(b'event: content_block_stop\ndata: {"type":"content_block_stop","index":1}\n\n', b"")
    feed(merging, stream.replace(TWO_CALLS.ending, event("message_stop")))
    assert [call.arguments for call in merging.turn().calls] == ['{"a":1}', "{}"]
    assert merging.finish() == event("message_stop")


# --- arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", ['{"a":1', '{"a":1}}', "[1]", '"x"', "nonsense", '{"a":NaN}', " ", "\ufeff{}"])
def test_arguments_that_are_no_object_are_not_run(arguments: str) -> None:
    """Nor sent back: the provider takes nothing but an object."""
    merging = merger()
    feed(merging, Reply([calls("toolu_1", NOW, arguments)], "tool_use").stream)
    turn = merging.turn()
    (call,) = turn.calls
    assert call.refusal is not None
    assert call.arguments == arguments
    assert json.loads(turn.pieces[0].raw)["input"] == {}


def test_arguments_that_cannot_be_decoded_are_not_run() -> None:
    """Bytes that are no UTF-8, where an empty text would mean that there are none."""
    merging = merger()
    feed(merging, Reply([calls("toolu_1", NOW, '{"a":"???"}', size=99)], "tool_use").stream.replace(b"???", b"\xff"))
    (call,) = merging.turn().calls
    assert call.refusal is not None
    assert json.loads(merging.turn().pieces[0].raw)["input"] == {}


@pytest.mark.parametrize("start", ['{"a": 1e400, "a":2}', "null", '"x"'])
def test_arguments_that_a_server_sends_whole(start: str) -> None:
    """What a block begins with is a placeholder, but some have it all there (wire.md A9)."""
    said = Said({"type": "tool_use", "id": "t", "name": NOW, "input": "HERE"}, [], "")
    stream = Reply([said], "tool_use").stream.replace(b'"HERE"', start.encode())
    merging = merger()
    feed(merging, stream)
    turn = merging.turn()
    wanted = {"null": "{}", '"x"': "{}"}.get(start, start)
    assert turn.pieces[0].raw.decode().endswith(f'"input":{wanted}}}')
    assert (turn.calls[0].refusal is None) == (start != '"x"')


@pytest.mark.parametrize("arguments", ['{"a": 1E400, "b":-0, "b": 1.0 }', '{"n":123456789012345678901234567890}', "{ \n }"])
@splits
def test_arguments_are_sent_back_as_they_were_written(arguments: str, split: Split) -> None:
    """wire.md E: what a decode and re-encode would change."""
    merging = merger()
    feed(merging, Reply([calls("toolu_1", NOW, arguments, size=2)], "tool_use").stream, split)
    turn = merging.turn()
    assert turn.pieces[0].raw.decode() == calls("toolu_1", NOW, arguments).whole
    assert turn.calls[0].arguments == arguments


def test_arguments_nested_deeper_than_anybody_can_follow_are_not_run() -> None:
    reply = Reply([calls("toolu_1", NOW, '{"a":' + "[" * 100_000 + "]" * 100_000 + "}", size=10**6)], "tool_use")
    merging = merger()
    feed(merging, reply.stream)
    (call,) = merging.turn().calls
    assert call.refusal is not None
    merging = merger()
    merging.begin()
    with pytest.raises(Unreadable):
        merging.read_body(reply.body)


# --- blocks from deltas -----------------------------------------------------------------------------------------------


def rebuilt(start: str, *deltas: str) -> str:
    """The one piece of a response whose block starts so, with JSON text that no encoder here would write."""
    stream = b'data: {"type":"content_block_start","index":0,"content_block":%b}\n\n' % start.encode()
    for delta in deltas:
        stream += b'data: {"type":"content_block_delta","index":0,"delta":%b}\n\n' % delta.encode()
    merging = merger()
    merging.begin()
    for frame in SseDecoder().feed(stream):
        assert merging.read_event(frame) == frame.raw
    (piece,) = merging.turn().pieces
    return piece.raw.decode()


@pytest.mark.parametrize(
    ("start", "deltas", "block"),
    [
        # wire.md A9: text and thinking are joined, signatures replaced, citations appended, compactions replaced
        (
            '{"text":"a","type":"text"}',
            ['{"type":"text_delta","text":"b\\u00e9\\/"}'],
            '{"text":"ab\\u00e9\\/","type":"text"}',
        ),
        ('{"type":"text"}', ['{"type":"text_delta","text":"b"}'], '{"type":"text","text":"b"}'),
        ('{"type":"text","text":null}', ['{"type":"text_delta","text":"b"}'], '{"type":"text","text":"b"}'),
        (
            '{"type":"thinking","thinking":"","signature":"x"}',
            [
                '{"type":"thinking_delta","thinking":"h","estimated_tokens":7}',
                '{"type":"signature_delta","signature":"y"}',
                '{"type":"signature_delta","signature":"z"}',
            ],
            '{"type":"thinking","thinking":"h","signature":"z"}',
        ),
        (
            '{"type":"text","text":"","citations":null}',
            ['{"type":"citations_delta","citation":{"a": 1.0}}', '{"type":"citations_delta","citation":{"b":2}}'],
            '{"type":"text","text":"","citations":[{"a": 1.0},{"b":2}]}',
        ),
        (
            '{"type":"text","text":"","citations":[{"a":1}]}',
            ['{"type":"citations_delta","citation":{"b":2}}'],
            '{"type":"text","text":"","citations":[{"a":1},{"b":2}]}',
        ),
        (
            '{"type":"compaction","content":"a","encrypted_content":"b"}',
            ['{"type":"compaction_delta","content":null,"encrypted_content":"c"}'],
            '{"type":"compaction","content":null,"encrypted_content":"c"}',
        ),
        # of kinds that nobody knows yet, strings grow
        ('{"type":"song","tune":"la"}', ['{"type":"song_delta","tune":"la","beat":4}'], '{"type":"song","tune":"lala"}'),
        ('{"type":"redacted_thinking","data":"Zm9v"}', [], '{"type":"redacted_thinking","data":"Zm9v"}'),
        # a pair of surrogates in two halves, each of which is no character; and one half alone
        (
            '{"type":"text","text":""}',
            ['{"type":"text_delta","text":"\\ud83c"}', '{"type":"text_delta","text":"\\udf0d \\ud800"}'],
            '{"type":"text","text":"\\ud83c\\udf0d \\ud800"}',
        ),
        (
            '{"type":"server_tool_use","id":"s","name":"web","input":{}}',
            ['{"type":"input_json_delta","partial_json":"{\\"q\\":"}', '{"type":"input_json_delta","partial_json":"1.0}"}'],
            '{"type":"server_tool_use","id":"s","name":"web","input":{"q":1.0}}',
        ),
        ('{"type":"text","text":"a"}', ['{"type":"text_delta","text":7}', "7"], '{"type":"text","text":"a"}'),
    ],
)
def test_a_block_is_what_its_deltas_made_of_it(start: str, deltas: list[str], block: str) -> None:
    assert rebuilt(start, *deltas) == block


@given(words=st.lists(st.text(max_size=8), max_size=8), ascii_only=st.booleans(), seed=st.integers(0, 2**16))
def test_text_is_joined_as_it_was_written(words: list[str], ascii_only: bool, seed: int) -> None:
    """However it is escaped and cut into deltas, the SDK and the piece agree, and no escape changes."""
    written = [json.dumps(word, ensure_ascii=ascii_only) for word in words]
    stream = event("content_block_start", index=0, content_block={"type": "text", "text": ""})
    for string in written:
        delta = f'{{"type":"content_block_delta","index":0,"delta":{{"type":"text_delta","text":{string}}}}}'
        stream += b"event: content_block_delta\ndata: " + delta.encode() + b"\n\n"
    opening, ending = Reply([]).opening, Reply([]).ending
    stream = b"".join([*opening, stream, event("content_block_stop", index=0), ending])
    merging = merger()
    dice = random.Random(seed)
    cuts = sorted(dice.randrange(len(stream)) for _ in range(20))
    chunks = [stream[start:end] for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    shown = feed(merging, stream, lambda _: chunks) + merging.finish()
    assert shown == stream
    (piece,) = merging.turn().pieces
    assert piece.raw.decode() == '{"type":"text","text":"' + "".join(string[1:-1] for string in written) + '"}'
    assert told(accumulated(shown)) == [json.loads(piece.raw)]


LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=4)


@given(arguments=st.dictionaries(st.text(), VALUES, max_size=4), size=st.integers(1, 9))
def test_arguments_survive_any_fragmentation(arguments: dict[str, Any], size: int) -> None:
    written = json.dumps(arguments)
    merging = merger()
    feed(merging, Reply([calls("toolu_1", NOW, written, size)], "tool_use").stream)
    (call,) = merging.turn().calls
    assert (call.arguments, call.refusal) == (written, None)
    assert json.loads(merging.turn().pieces[0].raw)["input"] == arguments


# --- errors -----------------------------------------------------------------------------------------------------------


@splits
def test_an_error_event_of_the_first_response_is_the_clients(split: Split) -> None:
    merging = merger()
    shown = feed(merging, b"".join(TWO_CALLS.opening) + ERROR, split)
    assert ERROR not in shown
    assert merging.turn().calls == ()
    assert merging.finish() == ERROR
    with pytest.raises(anthropic.APIStatusError, match="Overloaded"):
        accumulated(shown + ERROR)


@splits
async def test_an_error_event_of_a_later_response_is_the_clients(split: Split, js: JavaScript) -> None:
    stream = merged(TWO_CALLS.stream, b"".join(ANSWER.opening) + ERROR, split=split)
    assert stream.endswith(ERROR)
    with pytest.raises(anthropic.APIStatusError, match="Overloaded"):
        accumulated(stream)
    with pytest.raises(Exception, match="Overloaded"):
        await js.read("messages", [stream])


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b'{"type":"error",\n"error":{"type":"api_error","message":"Their words"},\r\n"request_id":"r"}', "Their words"),
        (b'{"message":"no error member"}', "Our words"),
        (b"<html>", "Our words"),
        (b"", "Our words"),
    ],
)
@splits
def test_a_later_response_that_fails_ends_the_stream_with_an_error(body: bytes, said: str, split: Split) -> None:
    """The status of the first is out, so it is said in-band (wire.md D5); what the first ended with is never said."""
    merging = merger()
    shown = feed(merging, TWO_CALLS.stream, split) + merging.error_event(529, "Our words", body)
    assert b"message_delta" not in shown
    with pytest.raises(anthropic.APIStatusError, match=said):
        accumulated(shown)


def test_what_keeps_the_stream_alive_is_nothing_to_the_client() -> None:
    merging = merger()
    shown = feed(merging, TWO_CALLS.stream) + merging.keep_alive * 3 + feed(merging, ANSWER.stream) + merging.finish()
    assert told(accumulated(shown)) == expected(TWO_CALLS, ANSWER)


# --- bodies -----------------------------------------------------------------------------------------------------------


def in_bodies(*bodies: bytes, policy: UsagePolicy = "sum", toolset: Toolset = TOOLSET) -> bytes:
    merging = MESSAGES.turns.merger(b"{}", toolset, policy)
    for body in bodies:
        merging.begin()
        merging.read_body(body)
    return merging.finish()


def test_a_body_is_edited_and_not_written_anew() -> None:
    """The members of the last one stay where they are, and as they are."""
    first = b'{"id":"msg_1","model":"m1","content":[{"type":"tool_use","id":"t","name":"%b","input":{}}]}' % NOW.encode()
    last = (
        b'{ "x": 1e400, "content": [ {"type":"text","text":"\\u00e9"} ], "model":"m2", "id" : "msg_2" , "y":{"a":1,"a":2}}'
    )
    assert in_bodies(first, last) == (
        b'{ "x": 1e400, "content": [{"type":"text","text":"\\u00e9"}], "model":"m1", "id" : "msg_1" , "y":{"a":1,"a":2}}'
    )


def test_a_body_that_is_no_message_passes() -> None:
    error = b'{"type":"error", "error":{"message":"no"}}'
    assert in_bodies(TWO_CALLS.body, error) == error
    assert in_bodies(b'{"content":"odd"}') == b'{"content":"odd"}'
    with pytest.raises(Unreadable):
        in_bodies(b"<html>")


# --- usage ------------------------------------------------------------------------------------------------------------


def test_figures_are_running_totals_and_a_zero_at_the_end_erases_none() -> None:
    """wire.md A8: compatible servers send 0 there. Several deltas, of which none is there twice for the sum."""
    delta = event("message_delta", delta={"stop_reason": None}, usage={"output_tokens": 1, "input_tokens": 0, "x": None})
    stream = b"".join([*ANSWER.opening, delta, ANSWER.ending])
    message = accumulated(merged(TWO_CALLS.stream, stream))
    assert (message.usage.input_tokens, message.usage.output_tokens) == (400, 4)


def test_a_fallback_replaces_the_figures() -> None:
    """wire.md A8: another model took over, and the figures are its own."""
    seam = Said({"type": "fallback", "to": {"model": "m2"}}, [], "")
    usage = {"input_tokens": 5, "output_tokens": 2}
    stream = b"".join(
        [*Reply([seam], number=2).opening, event("message_delta", delta={}, usage=usage), event("message_stop")]
    )
    assert accumulated(merged(TWO_CALLS.stream, stream)).usage.input_tokens == 105


def test_without_any_figures_none_are_made_up() -> None:
    bare = event("message_start", message={}) + event("message_delta", delta={"stop_reason": "end_turn"})
    assert merged(bare, bare) == bare


# --- fuzz -------------------------------------------------------------------------------------------------------------

KINDS = [
    "message_start",
    "content_block_start",
    "content_block_delta",
    "content_block_stop",
    "message_delta",
    "message_stop",
]
BLOCKS = st.fixed_dictionaries(
    {},
    optional={
        "type": st.sampled_from(["text", "tool_use", "thinking", "x"]) | LEAVES,
        "name": st.sampled_from([NOW, "Read"]) | LEAVES,
        "id": LEAVES,
        "input": VALUES,
        "text": LEAVES,
        "citations": VALUES,
    },
)
DELTAS = st.fixed_dictionaries(
    {},
    optional={
        "type": st.sampled_from(["text_delta", "input_json_delta", "signature_delta", "citations_delta", "x"]) | LEAVES,
        "text": LEAVES,
        "partial_json": st.sampled_from(["{", "}", '"a":1']) | LEAVES,
        "citation": VALUES,
        "stop_reason": st.sampled_from(["tool_use", "max_tokens"]) | LEAVES,
    },
)
EVENTS = st.fixed_dictionaries(
    {"type": st.sampled_from([*KINDS, "error", "ping"]) | LEAVES},
    optional={
        "index": st.integers(0, 3) | LEAVES,
        "content_block": BLOCKS | LEAVES,
        "delta": DELTAS | LEAVES,
        "message": VALUES,
        "usage": st.dictionaries(st.sampled_from(["input_tokens", "output_tokens", "x"]), VALUES) | LEAVES,
    },
)


@given(st.lists(st.lists(EVENTS, max_size=12), min_size=1, max_size=3))
def test_no_stream_is_too_odd(responses: list[list[dict[str, Any]]]) -> None:
    """Nothing is raised, whole frames come out, and a turn that is read is one that can be sent back."""
    merging = merger()
    shown = b""
    for events in responses:
        shown += relayed_live(merging, events)
        for piece in merging.turn().pieces:
            assert isinstance(json.loads(piece.raw), dict)
    shown += merging.finish()
    decoder = SseDecoder()
    assert all(isinstance(json.loads(frame.data or b""), dict) for frame in decoder.feed(shown))
    assert decoder.at_boundary


def relayed_live(merging: TurnMerger, events: list[dict[str, Any]]) -> bytes:
    merging.begin()
    stream = b"".join(b"data: " + json.dumps(members).encode() + b"\n\n" for members in events)
    return b"".join(map(merging.read_event, SseDecoder().feed(stream)))


@given(
    st.lists(st.dictionaries(st.sampled_from(["id", "model", "content", "usage", "stop_reason"]), VALUES | st.lists(BLOCKS)))
)
def test_no_body_is_too_odd(messages: list[dict[str, Any]]) -> None:
    merging = merger()
    for message in messages:
        merging.begin()
        merging.read_body(json.dumps(message).encode())
        merging.turn()
        assert isinstance(json.loads(merging.finish()), dict)
