"""Several responses of the Responses protocol as one.

Truth: wire.md C3, D5 for the form of a stream; OpenAI's Python SDK as the client, whose stream helper raises at an id that
changes, an index that comes twice, an item that is never done (wire.md C3).
"""

import json
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from aibridge.tools import Toolset
from aibridge.wire.reading import Unreadable
from aibridge.wire.responses_merging import ResponsesMerger, without_elements
from aibridge.wire.sse import Frame, SseDecoder
from tests.support.turns_responses import (
    OURS,
    SPLITS,
    TOOLSET,
    Bridge,
    Json,
    Reply,
    Split,
    call,
    compact,
    item_events,
    message,
    ours,
    output_of,
    parsed,
    reasoning,
    seen,
    sse,
    understood,
    whole,
)

ASKED = compact(
    {"model": "m", "input": [{"role": "user", "content": "Hi"}], "store": False, "tools": [{"type": "web_search"}]}
)
PLAIN: list[Json] = [{"type": "web_search"}]

splits = pytest.mark.parametrize("split", SPLITS, ids=lambda split: split.__name__)


def fed(data: bytes, body: bytes = ASKED, toolset: Toolset = TOOLSET) -> bytes:
    """What one response becomes."""
    merger = ResponsesMerger(body, toolset, "sum")
    merger.begin()
    out = b"".join(map(merger.read_event, SseDecoder().feed(data)))
    return out + merger.finish()


def reading(*replies: Reply) -> ResponsesMerger:
    """A merger that has read these responses."""
    merger = ResponsesMerger(ASKED, TOOLSET, "sum")
    for reply in replies:
        merger.begin()
        for frame in SseDecoder().feed(reply.stream()):
            merger.read_event(frame)
    return merger


# --- nothing hidden ---------------------------------------------------------------------------------------------------


@splits
@pytest.mark.parametrize("status", ["completed", "incomplete", "failed", "error"])
@pytest.mark.parametrize("output", [True, False, None])
def test_a_response_that_hides_nothing_is_not_touched(split: Split, status: Any, output: bool | None) -> None:
    """Absent and empty outputs stay as they are: the SDK treats the two differently (wire.md C3)."""
    reply = Reply(
        "resp_1", [reasoning("rs_1"), message("msg_1", "Hi"), call("fc_1", "shell")], status, tools=PLAIN, output=output
    )
    data = b": hello\n\n" + reply.stream().replace(b"\n\n", b"\n\n: keep-alive\n\n") + b"data: [DONE]\n\n"
    merger = ResponsesMerger(ASKED, TOOLSET, "sum")
    merger.begin()
    decoder = SseDecoder()
    out = b"".join(merger.read_event(frame) for chunk in split(data) for frame in decoder.feed(chunk))
    assert len(out) < len(data)
    assert out + merger.finish() == data


@pytest.mark.parametrize("status", ["completed", "incomplete", "failed"])
def test_a_body_that_hides_nothing_is_not_touched(status: Any) -> None:
    reply = Reply("resp_1", [message("msg_1", "Hi"), call("fc_1", "shell")], status, tools=PLAIN)
    assert Bridge(stream=False).ask(ASKED, reply) == reply.body()


def test_the_echo_of_the_request_is_the_clients() -> None:
    """The response object repeats the tools and the response before (wire.md C1): as the client knows them."""
    asked = b'{"previous_response_id":"resp_public","input":"x","model":"m"}'
    reply = Reply("resp_2", [message("msg_1", "Hi")], previous="resp_upstream")
    out = fed(reply.stream(), asked)
    shown = [event["response"] for event in parsed(out) if "response" in event]
    assert [response["previous_response_id"] for response in shown] == ["resp_public"] * 3
    assert [response["tools"] for response in shown] == [PLAIN] * 3
    again = Reply("resp_2", [message("msg_1", "Hi")], previous="resp_public", tools=PLAIN)
    assert out == again.stream()


def test_an_echo_that_only_the_provider_makes() -> None:
    reply = Reply("resp_2", [message("msg_1", "Hi")], previous="resp_upstream", tools=PLAIN)
    assert parsed(fed(reply.stream()))[-1]["response"]["previous_response_id"] is None


@pytest.mark.parametrize("tools", [OURS, [*OURS, *PLAIN], [OURS[0], *PLAIN, OURS[1]], [*PLAIN, *PLAIN, *OURS], [], None])
def test_taking_the_tools_out(tools: list[Json] | None) -> None:
    reply = Reply("resp_1", [], tools=tools)  # type: ignore[arg-type]
    left = [one for one in tools if one not in OURS] if tools is not None else None
    expected = Reply("resp_1", [], tools=left)  # type: ignore[arg-type]
    assert fed(reply.stream()) == expected.stream()


def test_what_stays_of_an_array_stays_as_it_is() -> None:
    array = b'[ 1e2 ,\t"a",2 , "b" ,  "a" , "a" ]'
    assert without_elements(array, lambda raw: raw == b'"a"') == b'[ 1e2 ,\t2 , "b" ]'
    assert without_elements(b'["a" , 1]', lambda raw: raw == b'"a"') == b"[1]"
    assert without_elements(b'[ "a" ]', lambda raw: raw == b'"a"') == b"[  ]"


# --- several turns ----------------------------------------------------------------------------------------------------

THREE_HOPS = (
    Reply("resp_1", [reasoning("rs_1"), ours("fc_1"), ours("fc_2")]),
    Reply("resp_22", [reasoning("rs_2"), message("msg_1", "Wait.", phase="commentary"), ours("fc_3", "now", "")]),
    Reply("resp_333", [message("msg_2", "Done, wörld \u2028.")]),
)
VISIBLE = [THREE_HOPS[0].items[0], *THREE_HOPS[1].items[:2], THREE_HOPS[2].items[0]]


@splits
def test_three_hops_are_one_stream(split: Split) -> None:
    bridge = Bridge(split=split)
    out = bridge.ask(ASKED, *THREE_HOPS)
    response = understood(out)
    assert output_of(response) == VISIBLE
    assert (response.id, response.model, response.created_at) == ("resp_1", "m-resp_1", 1795219206)
    assert response.usage is not None
    assert (response.usage.input_tokens, response.usage.output_tokens, response.usage.total_tokens) == (70, 7, 77)
    events = parsed(out)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    indexes = [event["output_index"] for event in events if event["type"] == "response.output_item.added"]
    assert indexes == [0, 1, 2, 3]
    assert [event["type"] for event in events if "response" in event] == [
        "response.created",
        "response.in_progress",
        "response.completed",
    ]
    assert b"bmcp_" not in out
    assert b"fc_1" not in out
    assert b"resp_22" not in out
    assert [[one.id for one in turn.calls] for turn in bridge.turns] == [["call_fc_1", "call_fc_2"], ["call_fc_3"], []]
    assert [turn.response_id for turn in bridge.turns] == ["resp_1", "resp_22", "resp_333"]
    assert bridge.turns[1].calls[0].arguments == "{}"


def test_what_is_visible_is_shown_at_once() -> None:
    """Only what ends a response is held."""
    merger = ResponsesMerger(ASKED, TOOLSET, "sum")
    for reply in THREE_HOPS:
        merger.begin()
        for frame in SseDecoder().feed(reply.stream()):
            out = merger.read_event(frame)
            event = json.loads(frame.data or b"")
            item = event.get("item") or {}
            swallowed = event["type"] == "response.completed" or "bmcp_" in str(item.get("name"))
            swallowed |= event["type"].startswith("response.function_call_arguments")
            swallowed |= reply is not THREE_HOPS[0] and event["type"] in ("response.created", "response.in_progress")
            assert bool(out) is not swallowed


def test_the_last_policy() -> None:
    response = understood(Bridge(policy="last").ask(ASKED, *THREE_HOPS))
    assert response.usage is not None
    assert (response.usage.input_tokens, response.usage.output_tokens, response.usage.total_tokens) == (10, 7, 17)


@pytest.mark.parametrize("output", [False, None])
def test_an_output_that_only_its_own_events_tell(output: bool | None) -> None:
    replies = [Reply(reply.id, reply.items, output=output) for reply in THREE_HOPS]
    assert output_of(understood(Bridge().ask(ASKED, *replies))) == VISIBLE


def test_three_hops_are_one_body() -> None:
    out = Bridge(stream=False).ask(ASKED, *THREE_HOPS)
    response = understood(out, stream=False)
    assert output_of(response) == VISIBLE
    assert (response.id, response.model, response.created_at) == ("resp_1", "m-resp_1", 1795219206)
    assert response.usage is not None and response.usage.total_tokens == 77
    assert json.loads(out)["tools"] == PLAIN
    assert b"bmcp_" not in out


def test_items_are_shown_byte_for_byte() -> None:
    """Floats, escapes and repeated keys survive (wire.md E)."""
    odd = rb'{"type":"reasoning","id":"rs_1" ,"x":1e400,"y":"\ud800 \/","y":100000000000000000000.0}'
    first = b'{"id":"resp_1","status":"completed","output":[' + odd + b',{"type":"function_call","name":"bmcp_s_add",'
    first += b'"call_id":"call_12345678"}],"usage":{"input_tokens":1}}'
    merger = ResponsesMerger(ASKED, TOOLSET, "sum")
    merger.begin()
    merger.read_body(first)
    turn = merger.turn()
    assert turn.pieces[0].raw == odd
    assert turn.calls[0].arguments == "{}"
    merger.begin()
    merger.read_body(b'{"id":"resp_2" , "output":[]}')
    assert merger.finish() == b'{"id":"resp_1" , "output":[' + odd + b'],"usage":{"input_tokens":1}}'


@splits
def test_a_mixed_turn(split: Split) -> None:
    reply = Reply("resp_1", [reasoning("rs_1"), ours("fc_1"), call("fc_2", "shell"), ours("fc_3"), call("fc_4", "shell")])
    bridge = Bridge(split=split)
    out = bridge.ask(ASKED, reply)
    assert output_of(understood(out)) == [reply.items[0], reply.items[2], reply.items[4]]
    (turn,) = bridge.turns
    assert turn.awaits_client
    assert [one.id for one in turn.calls] == ["call_fc_1", "call_fc_3"]
    assert [piece.call is not None for piece in turn.pieces] == [False, True, False, True, False]
    indexes = {event["output_index"] for event in parsed(out) if "output_index" in event}
    assert indexes == {0, 1, 2}


@pytest.mark.parametrize(
    ("item", "awaits"),
    [
        (call("fc_1", "shell"), True),
        (call("fc_1", "bmcp_s_add", namespace="mine"), True),
        (call("fc_1", "bmcp_s_add", namespace=None), False),
        ({"type": "custom_tool_call", "id": "x", "call_id": "c", "name": "bmcp_s_add", "input": ""}, True),
        ({"type": "tool_search_call", "id": "x", "execution": "client"}, True),
        ({"type": "tool_search_call", "id": "x", "execution": "server"}, False),
        ({"type": "mcp_approval_request", "id": "x", "name": "n"}, True),
        ({"type": "web_search_call", "id": "x"}, False),
        (message("msg_1", "Hi"), False),
    ],
)
def test_whose_call_it_is(item: Json, awaits: bool) -> None:
    assert reading(Reply("resp_1", [item])).turn().awaits_client is awaits


def test_calls_that_nobody_runs_end_the_response() -> None:
    """The turn limit: what is left of the last turn is the answer."""
    out = Bridge().ask(ASKED, Reply("resp_1", [message("msg_1", "Let me see."), ours("fc_1")]), max_turns=1)
    response = understood(out)
    assert output_of(response) == [message("msg_1", "Let me see.")]
    assert response.status == "completed"


# --- what is not whole ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "refused"),
    [('{"a": 1e400}', False), (" ", False), ('{"a": ', True), ("[]", True), ("null", True), ("x", True)],
)
def test_arguments_that_are_no_object_are_refused(arguments: str, refused: bool) -> None:
    (made,) = reading(Reply("resp_1", [ours("fc_1", arguments=arguments)])).turn().calls
    assert (made.refusal is not None) is refused
    assert made.arguments == (arguments if arguments.strip() else "{}")


def test_arguments_that_are_an_object_of_their_own() -> None:
    """As compatible servers send them."""
    item = ours("fc_1") | {"arguments": {"a": 1}}
    merger = ResponsesMerger(ASKED, TOOLSET, "sum")
    merger.begin()
    merger.read_body(compact({"output": [item]}))
    assert merger.turn().calls[0].arguments == '{"a":1}'


def test_a_call_that_broke_off_in_a_whole_response() -> None:
    (made,) = reading(Reply("resp_1", [ours("fc_1", status="incomplete")])).turn().calls
    assert made.refusal is not None


def test_a_call_without_a_call_id() -> None:
    item = ours("fc_1")
    del item["call_id"]
    assert [one.id for one in reading(Reply("resp_1", [item])).turn().calls] == ["fc_1"]


@pytest.mark.parametrize("status", ["incomplete", "failed", "error"])
def test_no_call_is_made_in_a_response_that_broke_off(status: Any) -> None:
    reply = Reply("resp_1", [message("msg_1", "So"), ours("fc_1")], status)
    merger = reading(reply)
    assert merger.turn().calls == ()
    assert b"bmcp_" not in merger.finish()


def test_an_incomplete_body() -> None:
    merger = ResponsesMerger(ASKED, TOOLSET, "sum")
    merger.begin()
    merger.read_body(Reply("resp_1", [message("msg_1", "So"), ours("fc_1")], "incomplete").body())
    assert merger.turn().calls == ()
    response = understood(merger.finish(), stream=False)
    assert (response.status, output_of(response)) == ("incomplete", [message("msg_1", "So")])


# --- errors -----------------------------------------------------------------------------------------------------------

ONE_HOP = Reply("resp_1", [reasoning("rs_1"), ours("fc_1")])


@splits
@pytest.mark.parametrize("status", ["failed", "incomplete"])
def test_the_second_response_does_not_end_well(split: Split, status: Any) -> None:
    out = Bridge(split=split).ask(ASKED, ONE_HOP, Reply("resp_2", [message("msg_1", "Hi")], status))
    last = seen(out)[-1]
    assert last.type == f"response.{status}"
    assert last.response.id == "resp_1"
    assert [item.id for item in last.response.output] == ["rs_1", "msg_1"]
    assert last.response.usage.input_tokens == 30


@splits
def test_an_error_event_in_the_first_response(split: Split) -> None:
    reply = Reply("resp_1", [ours("fc_1")], "error")
    out = Bridge(split=split).ask(ASKED, reply)
    assert parsed(out)[-1] == {
        "type": "error",
        "sequence_number": 2,
        "code": "server_error",
        "message": "Oh no",
        "param": None,
    }
    assert len(parsed(out)) == 3


def test_an_error_event_in_the_second_response() -> None:
    events = parsed(Bridge().ask(ASKED, ONE_HOP, Reply("resp_2", [], "error")))
    assert events[-1]["type"] == "error"
    assert events[-1]["sequence_number"] == events[-2]["sequence_number"] + 1


@pytest.mark.parametrize(
    ("body", "error"),
    [
        (b'{"error":{"type":"rate_limited","code":null,"message":"Slow down"}}', ("rate_limited", "Slow down")),
        (b'{"error":{"type":"x","code":"quota","message":"No"}}', ("quota", "No")),
        (b"<html>", ("server_error", "HTTP 500")),
    ],
)
def test_the_provider_refuses_to_go_on(body: bytes, error: tuple[str, str]) -> None:
    last = seen(Bridge().ask(ASKED, ONE_HOP, body))[-1]
    assert last.type == "response.failed"
    assert (last.response.id, last.response.status) == ("resp_1", "failed")
    assert (last.response.error.code, last.response.error.message) == error
    assert [item.id for item in last.response.output] == ["rs_1"]
    assert last.response.usage.input_tokens == 20


@splits
def test_a_stream_that_is_cut(split: Split) -> None:
    out = Bridge(split=split).ask(ASKED, ONE_HOP, Reply("resp_2", [message("msg_1", "Hi")], "cut"))
    events = seen(out)
    assert events[-1].type == "response.failed"
    assert [item.id for item in events[-1].response.output] == ["rs_1", "msg_1"]
    numbers = [event["sequence_number"] for event in parsed(out)]
    assert numbers == list(range(len(numbers)))


def test_a_stream_that_is_cut_before_it_began() -> None:
    merger = ResponsesMerger(ASKED, TOOLSET, "sum")
    merger.begin()
    (event,) = parsed(merger.error_event(502, "Cut."))
    assert event == {"type": "error", "sequence_number": 0, "code": "server_error", "message": "Cut.", "param": None}
    assert merger.finish() == b""


# --- odd servers ------------------------------------------------------------------------------------------------------


def test_unknown_events_pass() -> None:
    events = Reply("resp_1", [message("msg_1", "Hi")], tools=PLAIN).events()
    events[3:3] = [{"type": "keepalive"}, {"type": "response.x", "percent": 1}, {"type": "response.y", "item_id": "zz"}]
    data = b"".join(map(sse, events))
    assert fed(data) == data


def test_oversized_frames_pass() -> None:
    merger = reading()
    merger.begin()
    assert merger.read_event(Frame(b"data: xxx", oversized=True)) == b"data: xxx"


def test_what_is_no_event_is_reported() -> None:
    merger = reading()
    merger.begin()
    with pytest.raises(Unreadable):
        merger.read_event(Frame(b"data: [DONE]\n\n", data=b"[DONE]"))
    with pytest.raises(Unreadable):
        merger.read_body(b"<html>")


def test_garbled_text_hides_nothing() -> None:
    data = ONE_HOP.stream().replace(b'"1e', b'"1e').replace(b'"delta":"{', b'"delta":"\xff{')
    assert b"\xff" in data
    assert b"\xff" not in fed(data)


def test_rotating_item_ids_pass() -> None:
    """Compatible hosts give each event another item id (wire.md C3)."""
    events = Reply("resp_1", [ours("fc_1"), message("msg_1", "Hi")]).events()
    for number, event in enumerate(events):
        for place in (event, event.get("item", {})):
            for name in {"item_id", "id"} & place.keys():
                place[name] = f"rotating_{number}"
    out = fed(b"".join(map(sse, [json.loads(compact(event)) for event in events])))
    assert b"bmcp" not in out and b"1e2" not in out
    assert {event["output_index"] for event in parsed(out) if "output_index" in event} == {0}


@splits
@pytest.mark.parametrize("name", ["bmcp_s_add", "shell"])
def test_rotating_item_ids_and_no_indexes(split: Split, name: str) -> None:
    """Nothing tells whose the arguments are, but that they are nobody's whom the client may know."""
    events = Reply("resp_1", [call("fc_1", "first"), call("fc_2", name)], tools=PLAIN).events()
    for number, event in enumerate(events):
        event.pop("output_index", None)
        if "item_id" in event:
            event["item_id"] = f"rotating_{number}"
    data = b"".join(map(sse, events))
    merger = ResponsesMerger(ASKED, TOOLSET, "sum")
    merger.begin()
    decoder = SseDecoder()
    out = b"".join(merger.read_event(frame) for chunk in split(data) for frame in decoder.feed(chunk)) + merger.finish()
    if name == "shell":
        assert out == data
        return
    assert [event["type"].rpartition(".")[2] for event in parsed(out)] == [
        *("created", "in_progress", "added", "delta", "delta", "done", "done", "completed"),
    ]
    assert b"fc_2" not in out
    assert [one.id for one in merger.turn().calls] == ["call_fc_2"]


def test_arguments_that_come_before_all_items() -> None:
    """They wait for what tells whose they are; nothing does."""
    begin, *events, end = [event for event in ONE_HOP.events() if event["type"] != "response.in_progress"]
    early = {"type": "response.function_call_arguments.delta", "item_id": "rotating", "delta": '{"a": 1e2}'}
    out = fed(b"".join(map(sse, [begin, early, *events, end])))
    assert b"1e2" not in out


@pytest.mark.parametrize("item", [{}, {"id": "fc_1", "name": "bmcp_s_add"}, None])
def test_an_item_that_does_not_say_what_it_is(item: Any) -> None:
    """It waits until it is done."""
    begin, others, added, *events = Reply("resp_1", [ours("fc_1")]).events()
    out = fed(b"".join(map(sse, [begin, others, added | {"item": item}, *events])))
    assert [event["type"] for event in parsed(out)] == ["response.created", "response.in_progress", "response.completed"]
    assert b"fc_1" not in out


def test_an_item_that_turns_out_to_be_a_call_of_ours() -> None:
    begin, others, added, *events = Reply("resp_1", [ours("fc_1")]).events()
    wrong = added | {"item": added["item"] | {"name": "shell"}}
    merger = ResponsesMerger(ASKED, TOOLSET, "sum")
    merger.begin()
    out = b"".join(
        merger.read_event(frame) for frame in SseDecoder().feed(b"".join(map(sse, [begin, others, wrong, *events])))
    )
    assert "response.output_item.done" not in [event["type"] for event in parsed(out)]
    assert parsed(merger.finish())[-1]["response"]["output"] == []
    assert [one.id for one in merger.turn().calls] == ["call_fc_1"]


@pytest.mark.parametrize("response", [None, False, "x", [], 1])
@pytest.mark.parametrize("kind", ["error", "response.failed", "response.incomplete", "response.completed"])
def test_an_end_without_a_response(kind: str, response: Any) -> None:
    """As if the member was not there: the event goes as it is, in its place in the stream."""
    events = Reply("resp_1", [message("msg_1", "Hi"), call("fc_1", "shell")], tools=PLAIN).events()
    data = b"".join(map(sse, [*events[:-1], events[-1] | {"type": kind, "response": response}]))
    assert fed(data) == data
    merger = reading(THREE_HOPS[0])
    merger.begin()
    for frame in SseDecoder().feed(data):
        merger.read_event(frame)
    assert merger.turn().calls == ()
    assert merger.turn().response_id is None
    (last,) = parsed(merger.finish())
    assert (last["type"], last["response"]) == (kind, response)


def test_an_end_that_cannot_be_edited_is_no_end() -> None:
    """It is read or it is not: nothing is raised when it is too late to pass it on."""
    merger = reading(THREE_HOPS[0])
    merger.begin()
    (frame,) = SseDecoder().feed(sse(Reply("resp_2", []).events()[-1]).replace(b'"output":[]', b'"output":[}'))
    with pytest.raises(Unreadable):
        merger.read_event(frame)
    assert merger.finish() == b""
    assert merger.turn().calls == ()


def test_events_without_numbers() -> None:
    """Neither sequence numbers nor output indexes: the item ids tell what belongs together."""
    events = Reply("resp_1", [ours("fc_1"), message("msg_1", "Hi")]).events()
    for event in events:
        event.pop("sequence_number")
        event.pop("output_index", None)
    out = fed(b"".join(map(sse, events)))
    kinds = [event["type"] for event in parsed(out)]
    assert kinds == [
        "response.created",
        "response.in_progress",
        *(e["type"] for e in item_events(0, message("m", "Hi"))),
        "response.completed",
    ]
    assert not any("sequence_number" in event or "output_index" in event for event in parsed(out))


@pytest.mark.parametrize("name", ["bmcp_s_add", "shell"])
def test_a_call_that_is_named_only_when_it_is_done(name: str) -> None:
    item = call("fc_1", name)
    events = item_events(0, item)
    events[0]["item"] = {**events[0]["item"], "name": ""}
    begin, end = Reply("resp_1", [item], tools=PLAIN).events()[:2], Reply("resp_1", [item], tools=PLAIN).events()[-1]
    data = b"".join(map(sse, [*begin, *events, end]))
    out = fed(data)
    if name == "shell":
        assert out == data
    else:
        assert [event["type"] for event in parsed(out)] == ["response.created", "response.in_progress", "response.completed"]
        assert b"fc_1" not in out


def test_arguments_of_a_call_that_was_not_added() -> None:
    events = [event for event in ONE_HOP.events() if event["type"] != "response.output_item.added"]
    assert b"bmcp_" not in fed(b"".join(map(sse, events)))


def test_items_that_only_the_end_tells() -> None:
    """Servers that send no events for items (wire.md C3)."""
    events = Reply("resp_1", [message("msg_1", "Hi"), ours("fc_1")]).events()
    merger = ResponsesMerger(ASKED, TOOLSET, "sum")
    merger.begin()
    for event in (*events[:2], events[-1]):
        (frame,) = SseDecoder().feed(sse(event))
        merger.read_event(frame)
    assert [one.id for one in merger.turn().calls] == ["call_fc_1"]
    (last,) = parsed(merger.finish())
    assert last["response"]["output"] == [message("msg_1", "Hi")]


def test_items_with_holes_between_are_not_told_twice() -> None:
    item = message("msg_1", "Hi")
    begin, end = Reply("resp_1", [item]).events()[:2], Reply("resp_1", [item, ours("fc_1")]).events()[-1]
    out = fed(b"".join(map(sse, [*begin, *item_events(1, item), end])))
    assert parsed(out)[-1]["response"]["output"] == [item]


def test_an_item_that_is_done_without_being_there() -> None:
    events = [{"type": "response.output_item.done", "output_index": 0}]
    merger = ResponsesMerger(ASKED, TOOLSET, "sum")
    merger.begin()
    merger.read_event(SseDecoder().feed(sse(events[0]))[0])
    assert merger.turn().pieces == ()


def test_items_that_are_begun_out_of_order() -> None:
    """Indexes stay unique, which is what the SDK asks for."""
    begin, end = Reply("resp_1", []).events()[:2], Reply("resp_1", []).events()[-1]
    middle = [*item_events(1, message("msg_1", "a")), *item_events(0, ours("fc_1")), *item_events(2, message("msg_2", "b"))]
    out = fed(b"".join(map(sse, [*begin, *middle, end])))
    assert [item["id"] for item in output_of(understood(out))] == ["msg_1", "msg_2"]


# --- properties -------------------------------------------------------------------------------------------------------

words = st.text(max_size=12)
kinds = st.sampled_from(["text", "thought", "ours", "theirs"])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.tuples(kinds, words), max_size=4), min_size=1, max_size=4), st.randoms(use_true_random=False))
def test_whatever_is_said_however_it_is_split(turns: list[list[tuple[str, str]]], chance: Any) -> None:
    """The client sees all that is not a call of ours, in order, byte for byte, and nothing else."""
    make: dict[str, Any] = {
        "text": message,
        "thought": reasoning,
        "ours": lambda item_id, said: ours(item_id, "add", json.dumps({"a": said})),
        "theirs": lambda item_id, said: call(item_id, "shell", said),
    }
    replies = [
        Reply(f"resp_{number}", [make[kind](f"it_{number}_{place}", said) for place, (kind, said) in enumerate(items)])
        for number, items in enumerate(turns)
    ]

    def split(data: bytes) -> Any:
        position = 0
        while position < len(data):
            end = position + chance.randint(1, 200)
            yield data[position:end]
            position = end

    streaming, blocking, at_once = Bridge(split=split), Bridge(stream=False), Bridge(split=whole)
    out = streaming.ask(ASKED, *replies)
    assert out == at_once.ask(ASKED, *replies)
    assert streaming.turns == at_once.turns
    body = blocking.ask(ASKED, *replies)
    assert list(map(json.loads, streaming.requests)) == list(map(json.loads, blocking.requests))
    read = replies[: len(streaming.turns)]
    visible = [item for reply in read for item in reply.items if not str(item.get("name")).startswith("bmcp_")]
    last = streaming.turns[-1]
    if last.awaits_client or not last.calls:  # else the script ended before the loop did
        assert output_of(understood(out)) == visible
        assert output_of(understood(body, stream=False)) == visible
