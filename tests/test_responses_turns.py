"""The inner loop in the Responses protocol: what is offered, how it goes on, and what the provider keeps itself.

Truth: wire.md C1, C5, D4; OpenAI's Python SDK as the client of what comes out.
"""

import json
from typing import Any

import msgspec
import pytest

from aibridge.tools import Media, Outcome, Text, Toolset
from aibridge.wire import RESPONSES
from aibridge.wire.reading import Unreadable
from aibridge.wire.responses_turns import response_key, shown_items, shown_response, upstream_ids
from aibridge.wire.turns import Answered, Memory, Piece, Turn
from tests.support.turns_responses import (
    HIDING,
    OURS,
    SECRET,
    TOOLSET,
    TURNS,
    Bridge,
    Json,
    Reply,
    answered,
    body,
    call,
    compact,
    message,
    ours,
    output_of,
    reasoning,
    result,
    tool,
    understood,
    user,
)


def output_for(outcome: Outcome) -> Any:
    sent = TURNS.with_turn(body(user("x")), answered(ours("fc_1"), outcome=outcome), last=False)
    return json.loads(sent)["input"][-1]["output"]


# --- what is injected, and where not ----------------------------------------------------------------------------------


def test_the_format_has_its_turns() -> None:
    assert type(RESPONSES.turns) is type(TURNS)


def test_tools_come_after_the_clients() -> None:
    given = b'{"model":"m", "tools" : [ {"type":"web_search" } ] ,"input":"x"}'
    sent = TURNS.with_tools(given, TOOLSET)
    first = b'{"type":"function","name":"bmcp_s_add","description":"Does add",'
    first += b'"parameters":{"type": "object", "x": 1e2},"strict":false}'
    tools = b", ".join([b'{"type":"web_search" } ', first, first.replace(b"add", b"now")])
    assert sent == b'{"model":"m", "tools" : [ ' + tools + b'] ,"input":"x"}'


@pytest.mark.parametrize("given", [b'{"input":"x"}', b'{"input":"x","tools":null}', b'{"input":"x","tools":[]}'])
def test_tools_for_a_client_without_any(given: bytes) -> None:
    assert json.loads(TURNS.with_tools(given, TOOLSET)) == {"input": "x", "tools": OURS}
    assert TURNS.with_tools(given, Toolset(())) == given


def test_what_cannot_take_tools() -> None:
    with pytest.raises(Unreadable):
        TURNS.with_tools(b'{"input":"x","tools":7}', TOOLSET)
    with pytest.raises(Unreadable):
        TURNS.read(b"[]")


FORMAT = {"format": {"type": "json_schema", "name": "n", "schema": {}}}


@pytest.mark.parametrize(
    ("request_", "objects"),
    [
        ({"input": "Hi"}, False),
        ({"input": [user("Hi")]}, False),
        ({"input": [], "previous_response_id": "resp_1"}, False),
        ({"conversation": "conv_1"}, False),
        ({"conversation": {"id": "conv_1"}}, False),
        ({"prompt": {"id": "p"}}, False),
        ({"input": "Hi", "background": False, "text": {"format": {"type": "text"}}}, False),
        ({"input": "Hi", "text": FORMAT, "tools": [{"type": "web_search"}]}, False),
        ({"input": [{"type": "compaction_trigger"}, user("Hi")]}, False),
        ({}, True),
        ({"input": ""}, True),
        ({"input": 7}, True),
        ({"input": [], "prompt": None, "conversation": None, "previous_response_id": None}, True),
        ({"input": "Hi", "background": True}, True),
        ({"input": [user("Hi"), {"type": "compaction_trigger"}]}, True),
        ({"input": "Hi", "text": FORMAT}, True),
        ({"input": "Hi", "text": {"format": {"type": "json_object"}}, "tools": []}, True),
    ],
)
def test_where_no_tools_are_injected(request_: Json, objects: bool) -> None:
    draft = TURNS.read(compact(request_))
    assert (draft.objection is not None or draft.is_aside) is objects


def test_the_names_of_the_clients_tools() -> None:
    tools = [{"type": "function", "name": "a"}, {"type": "web_search"}, {"type": "namespace", "name": "b", "tools": []}]
    later = {"type": "additional_tools", "tools": [{"type": "function", "name": "c"}]}
    assert TURNS.read(body(user("x"), later, tools=tools)).tool_names == {"a", "b", "c"}


# --- going on ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "first"),
    [
        (b'{"input":[{"role":"user"} ],"model":"m"}', b'[{"role":"user"} ,'),
        (b'{"input":"a\\u0020\\"b","model":"m"}', b'[{"role":"user","content":"a\\u0020\\"b"},'),
        (b'{"input": "ab", "model": "m"}', b'[{"role": "user", "content": "ab"}, '),
        (b'{"input":[],"model":"m"}', b"["),
        (b'{"input":null,"model":"m"}', b"["),
        (b'{"model":"m","prompt":{"id":"p"}}', b"["),
    ],
)
def test_a_turn_is_appended_as_it_came(before: bytes, first: bytes) -> None:
    """All items in their order, with the thoughts, then the results (wire.md D4)."""
    raw = rb'{"type":"reasoning" , "x":1e400,"y":"\ud800"}'
    made = answered(ours("fc_1"), ours("fc_2"))
    turn = Answered(Turn((Piece(raw), *made.turn.pieces), made.turn.calls), made.outcomes)
    sent = TURNS.with_turn(before, turn, last=False)
    between = b", " if b", " in before else b","
    outputs = [b'{"type":"function_call_output","call_id":"call_fc_%d","output":"4"}' % number for number in (1, 2)]
    new = [raw, *(piece.raw for piece in made.turn.pieces), *outputs]
    assert first + between.join(new) + b"]" in sent


def test_only_the_results_go_to_a_provider_that_keeps_the_conversation() -> None:
    made = answered(reasoning("rs_1"), ours("fc_1"))
    sent = json.loads(TURNS.with_turn(body(user("x"), previous_response_id="resp_0"), made, last=False))
    assert (sent["previous_response_id"], sent["input"]) == ("resp_1", [result("call_fc_1", "4")])
    sent = json.loads(TURNS.with_turn(body(user("x"), conversation={"id": "conv_1"}), made, last=False))
    assert sent["input"] == [result("call_fc_1", "4")]
    assert "previous_response_id" not in sent


def test_a_response_without_an_id_cannot_be_gone_on_from() -> None:
    made = answered(ours("fc_1"), response_id=None)
    sent = json.loads(TURNS.with_turn(body(user("x"), previous_response_id="resp_0"), made, last=False))
    assert sent["previous_response_id"] == "resp_0"
    assert sent["input"] == [user("x"), ours("fc_1"), result("call_fc_1", "4")]


ALLOWED: Json = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "shell"}]}


@pytest.mark.parametrize(
    ("choice", "relaxed"),
    [
        ("auto", "auto"),
        ("none", "none"),
        ("required", "auto"),
        ({"type": "function", "name": "shell"}, "auto"),
        ({"type": "web_search"}, "auto"),
        (ALLOWED, ALLOWED),
        (ALLOWED | {"mode": "required"}, ALLOWED),
        (None, None),
    ],
)
def test_forced_choices_are_relaxed(choice: Any, relaxed: Any) -> None:
    """Or the loop would never end (wire.md D4)."""
    made = answered(ours("fc_1"))
    assert json.loads(TURNS.with_turn(body(user("x"), tool_choice=choice), made, last=False))["tool_choice"] == relaxed
    assert json.loads(TURNS.with_turn(body(user("x"), tool_choice=choice), made, last=True))["tool_choice"] == "none"
    assert "tool_choice" not in json.loads(TURNS.with_turn(body(user("x")), made, last=False))


def test_results() -> None:
    image, sound = Media("image", "image/png", "AAAA"), Media("audio", "audio/wav", "AAAA")
    assert output_for(Outcome((Text("a"), Text(" "), Text("é\u2028\ud800")))) == "a\né\u2028?"
    assert output_for(Outcome(())) == "(no output)"
    assert output_for(Outcome((Text(" \n"),))) == "(no output)"
    assert output_for(Outcome.failed("Broken")) == "Broken"
    assert output_for(Outcome((Text("a"), sound))) == "a\n[audio: audio/wav, 3 bytes; not shown]"
    assert output_for(Outcome((Text("a"), image, sound))) == [
        {"type": "input_text", "text": "a"},
        {"type": "input_image", "image_url": "data:image/png;base64,AAAA"},
        {"type": "input_text", "text": "[audio: audio/wav, 3 bytes; not shown]"},
    ]


def test_two_calls_with_one_id_get_an_answer_each() -> None:
    one = ours("fc_1")
    turn = answered(one, one).turn
    made = Answered(turn, (Outcome((Text("1"),)), Outcome((Text("2"),))))
    sent = json.loads(TURNS.with_turn(body(user("x")), made, last=False))
    assert [item["output"] for item in sent["input"][-2:]] == ["1", "2"]


def test_nothing_to_remember() -> None:
    assert TURNS.memory(TURNS.read(body(user("x"))), TOOLSET, []) == Memory((), TOOLSET.digest)


def test_a_tool_with_a_name_of_the_clients() -> None:
    """The engine renames ours: what it calls them is then what is hidden."""
    taken = [{"type": "function", "name": "bmcp_s_add", "parameters": {}}]
    bridge = Bridge()
    items = [call("fc_1_abcdef01", "bmcp_s_add"), call("fc_2_abcdef01", "bmcp_s_add_2")]
    shown = output_of(understood(bridge.ask(body(user("x"), tools=taken), Reply("resp_1", items))))
    assert shown == items[:1]
    assert json.loads(bridge.requests[0])["tools"][1]["name"] == "bmcp_s_add_2"
    assert tool("add").name == "bmcp_s_add"


# --- where the provider keeps the conversation ------------------------------------------------------------------------


def test_the_provider_is_told_its_own_id() -> None:
    bridge = Bridge()
    asked = compact({"input": "x", "model": "m"})  # stored by default (wire.md C1)
    bridge.ask(asked, *HIDING)
    memory = bridge.memories[response_key("resp_1_abcdef01")]
    assert (memory.last_id, upstream_ids(memory)) == ("resp_2_abcdef01", ["resp_1_abcdef01", "resp_2_abcdef01"])
    again = compact({"previous_response_id": "resp_1_abcdef01", "input": [user("And?")]})
    out = bridge.ask(
        again,
        Reply("resp_3_abcdef01", [ours("fc_2_abcdef01")], previous="resp_2_abcdef01"),
        Reply("resp_4_abcdef01", [message("msg_3", "Ho")], previous="resp_3_abcdef01"),
    )
    sent = [json.loads(request) for request in bridge.requests[-2:]]
    assert [request["previous_response_id"] for request in sent] == ["resp_2_abcdef01", "resp_3_abcdef01"]
    assert sent[0]["input"] == [user("And?")]
    assert [item["call_id"] for item in sent[1]["input"]] == ["call_fc_2_abcdef01"]
    response = understood(out)
    assert (response.id, response.previous_response_id) == ("resp_3_abcdef01", "resp_1_abcdef01")
    assert bridge.restored is not None
    assert (bridge.restored.restored, bridge.restored.toolset) == (1, TOOLSET.digest)


@pytest.mark.parametrize("given", [[result("call_fc_2_abcdef01")], "Forget it", None])
def test_results_that_the_provider_has_not_got(given: Any) -> None:
    """After a mixed turn: ours go first, then the client's."""
    bridge = Bridge()
    bridge.ask(
        compact({"input": "x", "model": "m"}), Reply("resp_1", [ours("fc_1_abcdef01"), call("fc_2_abcdef01", "shell")])
    )
    request = {"previous_response_id": "resp_1"} | ({} if given is None else {"input": given})
    bridge.ask(compact(request), Reply("resp_2", []))
    rest = [user(given)] if isinstance(given, str) else given or []
    sent = json.loads(bridge.requests[-1])
    assert sent["input"] == [result("call_fc_1_abcdef01", "Résult of call_fc_1_abcdef01 \u2028"), *rest]
    assert sent["previous_response_id"] == "resp_1"


def test_calls_that_were_not_made_are_answered_to_a_provider_that_keeps_them() -> None:
    bridge = Bridge()
    bridge.ask(compact({"input": "x", "model": "m"}), Reply("resp_1", [ours("fc_1_abcdef01")]), max_turns=1)
    bridge.ask(compact({"previous_response_id": "resp_1", "input": [user("And?")]}), Reply("resp_2", []))
    assert json.loads(bridge.requests[-1])["input"] == [result("call_fc_1_abcdef01", "The call was not made."), user("And?")]


def test_a_conversation_of_the_provider() -> None:
    """It is remembered by its id: for its tools, and for results that it has not got."""
    bridge = Bridge()
    bridge.ask(
        compact({"conversation": "conv_1", "input": "x"}),
        Reply("resp_1", [ours("fc_1_abcdef01"), call("fc_2_abcdef01", "shell")]),
    )
    bridge.ask(
        compact({"conversation": {"id": "conv_1"}, "input": [result("call_fc_2_abcdef01")]}),
        Reply("resp_2", [message("m", "Ho")]),
    )
    sent = json.loads(bridge.requests[-1])
    assert [item["call_id"] for item in sent["input"]] == ["call_fc_1_abcdef01", "call_fc_2_abcdef01"]
    bridge.ask(compact({"conversation": "conv_1", "input": [user("And?")]}), Reply("resp_3", []))
    assert json.loads(bridge.requests[-1])["input"] == [user("And?")]
    assert bridge.restored is not None
    assert (bridge.restored.toolset, bridge.restored.unknown) == (TOOLSET.digest, 0)


def test_a_response_of_before_that_nobody_remembers() -> None:
    bridge = Bridge()
    asked = compact({"previous_response_id": "resp_x", "input": [user("And?")]})
    bridge.ask(asked, Reply("resp_2", []))
    assert bridge.restored is not None
    assert (bridge.restored.body, bridge.restored.unknown) == (asked, 1)
    bridge.memories[response_key("resp_x")] = Memory((response_key("resp_x"),), "digest", None)
    draft = TURNS.read(asked)
    found = draft.restored(bridge.memories)
    assert (found.lost, found.unknown, found.toolset) == (1, 0, "digest")


def test_the_providers_own_id_does_not_expire() -> None:
    """The data of a memory is dropped for its age; the provider keeps the conversation, and knows it by its own id."""
    bridge = Bridge()
    bridge.ask(compact({"input": "x", "model": "m"}), *HIDING)
    bridge.memories = {key: msgspec.structs.replace(memory, data=None) for key, memory in bridge.memories.items()}
    bridge.ask(compact({"previous_response_id": "resp_1_abcdef01", "input": [user("And?")]}), Reply("resp_3", []))
    sent = json.loads(bridge.requests[-1])
    assert (sent["previous_response_id"], sent["input"]) == ("resp_2_abcdef01", [user("And?")])
    assert bridge.restored is not None
    assert (bridge.restored.restored, bridge.restored.lost) == (1, 1)
    assert upstream_ids(bridge.memories[response_key("resp_1_abcdef01")]) == ["resp_2_abcdef01"]


# --- responses that are asked for by their id -------------------------------------------------------------------------


def test_a_response_as_the_client_knows_it() -> None:
    bridge = Bridge(stream=False)
    bridge.ask(compact({"input": "x", "model": "m"}), *HIDING)
    asked = compact({"previous_response_id": "resp_1_abcdef01", "input": [user("And?")]})
    last = Reply("resp_4_abcdef01", [message("msg_4", "Ho")], previous="resp_3_abcdef01")
    shown = bridge.ask(
        asked, Reply("resp_3_abcdef01", [reasoning("rs_2"), ours("fc_2_abcdef01")], previous="resp_2_abcdef01"), last
    )
    memory = bridge.memories[response_key("resp_3_abcdef01")]
    expected = json.loads(shown)
    got = json.loads(shown_response(last.body(), memory, TOOLSET))
    for name in ("id", "output", "previous_response_id", "tools", "status"):
        assert got[name] == expected[name]
    assert json.loads(shown_response(last.body(), memory))["id"] == "resp_3_abcdef01"


def test_a_first_response_has_none_before_it() -> None:
    bridge = Bridge(stream=False)
    bridge.ask(compact({"input": "x", "model": "m"}), *HIDING)
    memory = bridge.memories[response_key("resp_1_abcdef01")]
    for previous in ("resp_1_abcdef01", None):
        got = json.loads(shown_response(Reply("resp_2_abcdef01", [], previous=previous).body(), memory))
        assert got["previous_response_id"] is None


def test_a_response_that_hid_nothing_is_as_it_is() -> None:
    memory = Memory(("k",), "digest")
    given = Reply("resp_1", [message("m", "Ho")]).body()
    assert shown_response(given, memory) == given
    assert (memory.last_id, upstream_ids(memory)) == (None, [])
    assert shown_items(b'{"data":[1]}', memory) == b'{"data":[1]}'


def test_input_items_without_what_was_hidden() -> None:
    bridge = Bridge()
    bridge.ask(compact({"input": "x", "model": "m"}), *HIDING)
    memory = bridge.memories[response_key("resp_1_abcdef01")]
    data = [user("x"), *HIDING[0].items[:2], *SECRET, {"type": "x", "call_id": ""}]
    got = json.loads(shown_items(compact({"object": "list", "data": data, "has_more": False}), memory))
    assert got == {"object": "list", "data": [*data[:3], data[-1]], "has_more": False}
    assert shown_items(b'{"error":1}', memory) == b'{"error":1}'
