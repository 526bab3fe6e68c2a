"""Chat Completions in the inner loop: tools, turns, and what was hidden put back.

Truth: wire.md B1, D3 to D6 and E; issue 3 (each provider request extends the one before it byte for byte). The client of the
conversations is OpenAI's Python SDK: what it accumulated is all that it sends.
"""

import json
import random
import re
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from aibridge.tools import Media, Outcome, Text, Toolset
from aibridge.wire import CHAT
from aibridge.wire.reading import Unreadable
from aibridge.wire.splicing import member_span
from aibridge.wire.turns import Answered, Memory, Piece, Turn
from tests.support.turns_chat import (
    DONE,
    OWN,
    TOOLS,
    Json,
    Loop,
    accumulated,
    answer,
    assert_each_extends_the_one_before,
    by_byte,
    call,
    called,
    chunk,
    conversation,
    event,
    hear,
    merger,
    messages_of,
    parsed,
    replayed,
    spoken,
    whole,
)

TURNS = CHAT.turns
HI: Json = {"role": "user", "content": "Hi"}
COMPACT, SPACED = (",", ":"), (", ", ": ")

TIME = call(0, "call_t1mEzO7q", "bmcp_s_time", '{"zone": "UTC"}')
LOOK = call(1, "call_look_1", "bmcp_s_look", "")
SHELL = call(1, "call_sh3LlQ7xA", "shell", '{"cmd": "ls"}')
LAST_LOOK = call(2, "call_l00Kd", "bmcp_s_look", "")
ANSWERED: Json = {"role": "tool", "tool_call_id": "call_sh3LlQ7xA", "content": "a.txt"}


def encoded(*messages: Json, separators: tuple[str, str] = COMPACT, **members: Any) -> bytes:
    body = {"model": "m", "stream": True, "messages": messages, "tools": [OWN]} | members
    return json.dumps(body, separators=separators).encode()


def objection(**members: Any) -> str | None:
    draft = TURNS.read(encoded(HI, **members))
    return "an aside" if draft.is_aside else draft.objection


def outcome_of(outcome: Outcome) -> Any:
    piece = b'{"role":"assistant","content":null}'
    turn = Turn((Piece(piece),), merged_calls())
    return messages_of(TURNS.with_turn(encoded(HI), Answered(turn, (outcome,)), last=False))[-1]


def merged_calls() -> Any:
    merging = merger()
    hear(merging, spoken(calls=[TIME]))
    return merging.turn().calls


# --- requests ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "members",
    [
        {"n": 2},
        {"functions": []},
        {"function_call": "auto"},
        {"prediction": {}},
        {"web_search_options": {}},
        {"audio": {}},
        {"modalities": ["text", "audio"]},
        {"tools": [], "response_format": {"type": "json_object"}},
        {"tools": None, "response_format": {"type": "json_schema"}},
        {"messages": None},
        {"messages": "Hi"},
    ],
)
def test_requests_that_get_no_tools(members: Json) -> None:
    assert objection(**members) is not None


@pytest.mark.parametrize(
    "members",
    [
        {},
        {"n": 1},
        {"n": None, "functions": None, "prediction": None, "modalities": ["text"]},
        {"response_format": {"type": "json_schema"}},
        {"tools": [], "response_format": {"type": "text"}},
    ],
)
def test_requests_that_get_tools(members: Json) -> None:
    assert objection(**members) is None


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b'\xef\xbb\xbf{"messages":[]}'])
def test_what_is_no_request_is_objected_to(body: bytes) -> None:
    draft = TURNS.read(body)
    assert draft.objection is not None
    assert draft.keys == ()


def test_the_names_of_the_clients_tools() -> None:
    tools = [OWN, {"type": "custom", "custom": {"name": "own"}}, {"type": "new"}, 1, {"type": "function", "function": {}}]
    assert TURNS.read(encoded(HI, tools=tools)).tool_names == {"shell", "own"}


OURS = [
    '{"type":"function","function":{"name":"bmcp_s_time","description":"Does time.","parameters":{"type": "object"}}}',
    '{"type":"function","function":{"name":"bmcp_s_look","description":"Does look.","parameters":{"type": "object"}}}',
]


@pytest.mark.parametrize(
    ("body", "offered", "between"),
    [
        ('{"model":"m","tools":[ {"x":1e400} ]}', '{"model":"m","tools":[ {"x":1e400} ,OURS]}', ","),
        ('{"model":"m", "tools":[{}]}', '{"model":"m", "tools":[{}, OURS]}', ", "),
        ('{"model":"m","tools":[]}', '{"model":"m","tools":[OURS]}', ","),
        ('{"model":"m","tools":null,"x":1}', '{"model":"m","tools":[OURS],"x":1}', ","),
        ('{"model":"m"}', '{"model":"m","tools":[OURS]}', ","),
    ],
)
def test_tools_stand_at_the_end(body: str, offered: str, between: str) -> None:
    """wire.md A4, E: a fixed place, the schema as the server wrote it, and nothing else changed."""
    assert TURNS.with_tools(body.encode(), TOOLS).decode() == offered.replace("OURS", between.join(OURS))


def test_no_tools_change_nothing() -> None:
    assert TURNS.with_tools(b'{"tools":1}', Toolset(())) == b'{"tools":1}'


def test_tools_that_are_no_array_are_not_edited() -> None:
    with pytest.raises(Unreadable):
        TURNS.with_tools(b'{"tools":1}', TOOLS)


# --- going on ---------------------------------------------------------------------------------------------------------


def test_a_turn_is_appended() -> None:
    message = b'{ "role":"assistant","content":null,"x":1e400 }'
    answered = answer(Turn((Piece(message),), merged_calls()))
    result = b'{"role":"tool","tool_call_id":"call_t1mEzO7q","content":"time done: {\\"zone\\": \\"UTC\\"}"}'
    for body, between in ((b'{"model":"m","messages":[{}]}', b","), (b'{"model":"m", "messages":[{}]}', b", ")):
        assert TURNS.with_turn(body, answered, last=False) == body.replace(b"{}", between.join([b"{}", message, result]))
    with pytest.raises(Unreadable):
        TURNS.with_turn(b"{}", answered, last=False)


@pytest.mark.parametrize(
    ("outcome", "content"),
    [
        (Outcome((Text("a"), Text("é\n"))), "a\né\n"),
        (Outcome(()), "(no output)"),
        (Outcome((Text(" "),)), "(no output)"),
        (Outcome.failed("It broke."), "Error: It broke."),
        (Outcome((Media("image", "image/png", "AAAA", "a.png"),)), "[image a.png: image/png, 3 bytes; not shown]"),
    ],
)
def test_what_the_model_reads_of_an_outcome(outcome: Outcome, content: str) -> None:
    assert outcome_of(outcome) == {"role": "tool", "tool_call_id": "call_t1mEzO7q", "content": content}


ALLOWED: Json = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [OWN]}}


@pytest.mark.parametrize(
    ("choice", "relaxed"),
    [
        ("auto", "auto"),
        ("none", "none"),
        ("required", "auto"),
        ({"type": "function", "function": {"name": "shell"}}, "auto"),
        ({"type": "custom", "custom": {"name": "x"}}, "auto"),
        (ALLOWED, ALLOWED),
        ({"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [OWN]}}, ALLOWED),
        (None, None),
    ],
)
def test_a_forced_choice_is_relaxed(choice: Any, relaxed: Any) -> None:
    """Or the loop never ends (wire.md D4)."""
    answered = answer(Turn((Piece(b"{}"),)))
    body = encoded(HI, tool_choice=choice)
    assert json.loads(TURNS.with_turn(body, answered, last=False))["tool_choice"] == relaxed
    assert json.loads(TURNS.with_turn(body, answered, last=True))["tool_choice"] == "none"


def test_no_choice_among_no_tools() -> None:
    """OpenAI refuses a ``tool_choice`` without ``tools``."""
    answered = answer(Turn((Piece(b"{}"),)))
    assert b"tool_choice" not in TURNS.with_turn(b'{"messages":[]}', answered, last=True)
    assert b"tool_choice" not in TURNS.with_turn(encoded(HI), answered, last=False)


# --- conversations ----------------------------------------------------------------------------------------------------


def numbered(turn: int, fragments: list[Json], index: int) -> list[Json]:
    """The same call with an id of its own."""
    text = re.sub(r'"(call_\w+)"', rf'"\1_{turn}"', json.dumps(fragments))
    return [fragment | {"index": index} for fragment in json.loads(text)]


def replies(turn: int) -> list[bytes]:
    """What the provider says in a turn. They differ from turn to turn, and repeat."""
    time, look = numbered(turn, TIME, 0), numbered(turn, LOOK, 1)
    shell, last_look = numbered(turn, SHELL, 1), numbered(turn, LAST_LOOK, 2)
    thought: Json = {"reasoning_content": f"Hm {turn}. "}
    match turn % 4:
        case 0:  # nothing hidden
            return [spoken(f"Plain {turn}.", **thought)]
        case 1:  # two calls in one turn, then text
            return [spoken(f"Let me see {turn}. ", calls=[time, look], **thought), spoken("Done", " 😀.", hop=2)]
        case 2:  # three hops, and a first one without a word
            again = numbered(turn, LAST_LOOK, 0)
            return [spoken(calls=[time]), spoken("And ", calls=[again], hop=2, **thought), spoken(f"so {turn}.", hop=3)]
        case _:  # ours first, then a turn with ours and the client's
            mixed = [numbered(turn, LOOK, 0), shell, last_look]
            return [spoken(calls=[time]), spoken("Both. ", calls=mixed, hop=2, **thought)]


def as_sent(message: Json) -> Json:
    return message


def as_parts(message: Json) -> Json:
    """Clients that write every text as a list of parts."""
    content = message.get("content")
    return message | {"content": [{"type": "text", "text": content}]} if isinstance(content, str) else message


def without_reasoning(message: Json) -> Json:
    return {name: value for name, value in message.items() if name != "reasoning_content"}


def trimmed(message: Json) -> Json:
    """Clients that trim text and decode the arguments of calls."""
    said = message | {"content": (message.get("content") or "").strip()}
    for entry in said.get("tool_calls", []):
        entry["function"]["arguments"] = json.dumps(json.loads(entry["function"]["arguments"]), separators=COMPACT)
    return said


def talk(loop: Loop, rewritten: Any = as_sent, separators: tuple[str, str] = COMPACT, turns: int = 10) -> list[Json]:
    """A conversation with an application that keeps its own history: what the SDK accumulated, rewritten."""
    history: list[Json] = [{"role": "system", "content": "Be kind."}]
    for turn in range(turns):
        history.append({"role": "user", "content": f"Question {turn}"})
        script = replies(turn)
        message = replayed(accumulated(loop.ask(encoded(*history, separators=separators), script)))
        history.append(rewritten(message))
        if turn % 4 == 3:
            ids = [entry["id"] for entry in message["tool_calls"]]
            history += [{"role": "tool", "tool_call_id": asked, "content": f"result of {asked}"} for asked in ids]
            message = replayed(accumulated(loop.ask(encoded(*history, separators=separators), [spoken(f"Ended {turn}.")])))
            history.append(rewritten(message))
    return history


@pytest.mark.parametrize("separators", [COMPACT, SPACED], ids=["compact", "spaced"])
@pytest.mark.parametrize("rewritten", [as_sent, as_parts, without_reasoning, trimmed])
def test_each_request_extends_the_one_before(rewritten: Any, separators: tuple[str, str]) -> None:
    """The acceptance test of issue 3, for clients that repeat what they were shown in their own words."""
    loop = Loop()
    history = talk(loop, rewritten, separators)
    assert "bmcp" not in json.dumps(history)
    assert_each_extends_the_one_before(loop.requests)
    seen = messages_of(loop.requests[-1])
    assert sum(message["role"] == "tool" for message in seen) == 18
    for position, message in enumerate(seen):  # every call is answered right after it (wire.md D4)
        ids = [entry["id"] for entry in message.get("tool_calls", [])]
        assert [after.get("tool_call_id") for after in seen[position + 1 :]][: len(ids)] == ids
    assert loop.restored is not None
    assert (loop.restored.toolset, loop.restored.lost, loop.restored.unknown) == (TOOLS.digest, 0, 0)
    assert loop.restored.restored == 6


def test_bodies_that_are_no_streams() -> None:
    loop = Loop()
    first = whole({"content": "A. ", "reasoning": "x", "tool_calls": [called("call_t1mEzO7q", "bmcp_s_time")]}, "tool_calls")
    message = replayed(parsed(loop.ask(encoded(HI), [first, whole({"content": "B."}, "stop", 2)])))
    assert message["content"] == "A. B."
    loop.ask(encoded(HI, message, HI), [whole({"content": "C."}, "stop")])
    assert_each_extends_the_one_before(loop.requests)
    assert messages_of(loop.requests[-1])[1]["reasoning"] == "x"


def test_bytes_survive() -> None:
    """wire.md E: what no decode and encode would keep."""
    loop = Loop()
    odd = b'{"choices":[{"index":0,"delta":{"role":"assistant","content":"\\u00e9\\/\\ud800","x":1E400}}]}'
    stream = event(odd) + b"".join(chunk({"tool_calls": [fragment]}) for fragment in TIME) + chunk({}, "tool_calls") + DONE
    loop.ask(encoded(HI), [stream, spoken("B.", hop=2)], cut=by_byte)
    loop.ask(encoded(HI, {"role": "assistant", "content": "é/\ud800B."}, HI), [spoken("C.")])
    assert_each_extends_the_one_before(loop.requests)
    assert b'"content":"\\u00e9\\/\\ud800"' in loop.requests[-1] and b'"x":1E400' in loop.requests[-1]


def mixed_turn(loop: Loop) -> Json:
    return replayed(accumulated(loop.ask(encoded(HI), [spoken("Hm.", calls=[TIME, SHELL, LAST_LOOK])])))


def test_parked_results_stand_where_their_calls_do() -> None:
    loop = Loop()
    message = mixed_turn(loop)
    assert [entry["id"] for entry in message["tool_calls"]] == ["call_sh3LlQ7xA"]
    loop.ask(encoded(HI, message, ANSWERED), [spoken("Done.")])
    said, *results = messages_of(loop.requests[-1])[1:]
    ids = ["call_t1mEzO7q", "call_sh3LlQ7xA", "call_l00Kd"]
    assert [entry["id"] for entry in said["tool_calls"]] == [result["tool_call_id"] for result in results] == ids
    assert results[1] == ANSWERED


def test_parked_results_without_the_clients() -> None:
    """A client that was stopped before it had its result."""
    loop = Loop()
    loop.ask(encoded(HI, mixed_turn(loop), HI), [spoken("Done.")])
    found = messages_of(loop.requests[-1])
    assert [message.get("tool_call_id") for message in found[2:]] == ["call_t1mEzO7q", "call_l00Kd", None]


def test_text_beside_calls_that_a_client_leaves_out() -> None:
    loop = Loop()
    message = mixed_turn(loop) | {"content": None}
    loop.ask(encoded(HI, message, ANSWERED), [spoken("Done.")])
    assert messages_of(loop.requests[-1])[1]["content"] == "Hm."


def test_calls_without_ids_are_known_by_what_was_said() -> None:
    """Compatible servers: `call_0` in every turn (wire.md D3). Arguments may have been decoded in between."""
    loop = Loop()
    script = [
        spoken("A. ", calls=[call(0, "call_0", "bmcp_s_time")]),
        spoken("B.", calls=[call(0, "call_0", "shell", '{"a":1}')]),
    ]
    message = replayed(accumulated(loop.ask(encoded(HI), script)))
    message["tool_calls"][0]["function"]["arguments"] = '{ "a": 1.0 }'
    loop.ask(encoded(HI, message, ANSWERED | {"tool_call_id": "call_0"}), [spoken("C.")])
    assert_each_extends_the_one_before(loop.requests)
    message["tool_calls"][0]["function"]["arguments"] = "{"
    assert TURNS.read(encoded(HI, message)).keys  # even those that are no JSON
    custom = {"id": "c", "type": "custom", "custom": {"name": "x", "input": "y"}}
    other = TURNS.read(encoded(HI, {"role": "assistant", "tool_calls": [custom]}))
    assert other.keys[0] != TURNS.read(encoded(HI, {"role": "assistant", "tool_calls": []})).keys[0]


@pytest.mark.parametrize("name", ["user", "safety_identifier"])
def test_what_one_end_user_was_not_shown_another_does_not_get(name: str) -> None:
    """A service account talks for many people, who may say the same (wire.md B1)."""
    loop = Loop()
    script = [spoken("A. ", calls=[TIME]), spoken("B.", hop=2)]
    users: dict[str, Json] = {"ann": {name: "ann"}, "bob": {name: "bob"}, "nobody": {}}
    message = replayed(accumulated(loop.ask(encoded(HI, **users["ann"]), script)))
    drafts = {who: TURNS.read(encoded(HI, message, HI, **user)) for who, user in users.items()}
    found = {who: draft.restored(loop.memories).restored for who, draft in drafts.items()}
    assert found == {"ann": 1, "bob": 0, "nobody": 0}


SAME_ID = [
    called("call_sh3LlQ7xA", "shell", '{"cmd": "rm"}'),
    called("call_sh3LlQ7xA", "bash", '{"cmd": "ls"}'),
]


@pytest.mark.parametrize("other", SAME_ID, ids=["arguments", "name"])
def test_an_id_that_a_server_gave_twice(other: Json) -> None:
    """Ids are not globally unique (wire.md D3): in another conversation nothing comes back for an id alone."""
    loop = Loop()
    mixed_turn(loop)
    body = encoded(HI | {"content": "Ho"}, {"role": "assistant", "content": None, "tool_calls": [other]}, ANSWERED)
    restored = TURNS.read(body).restored(loop.memories)
    assert (restored.body, restored.restored, restored.unknown) == (body, 0, 1)


# --- what the client changed, and what is gone ------------------------------------------------------------------------


def hidden_turn(loop: Loop) -> Json:
    return replayed(accumulated(loop.ask(encoded(HI), [spoken("A. ", calls=[TIME]), spoken("B.", hop=2)])))


@pytest.mark.parametrize(
    "change", [{"content": "A. C."}, {"content": None}, {"tool_calls": [called("call_x9YzW4pk", "shell")]}]
)
def test_the_clients_version_wins_where_it_edited(change: Json) -> None:
    loop = Loop()
    body = encoded(HI, hidden_turn(loop) | change, HI)
    restored = TURNS.read(body).restored(loop.memories)
    assert (restored.body, restored.restored, restored.unknown) == (body, 0, 1)


def test_an_edited_mixed_turn() -> None:
    loop = Loop()
    body = encoded(HI, mixed_turn(loop) | {"content": "Hm?"}, ANSWERED)
    restored = TURNS.read(body).restored(loop.memories)
    assert (restored.body, restored.restored, restored.unknown) == (body, 0, 1)
    assert restored.toolset == TOOLS.digest


def test_arguments_that_a_client_cleared() -> None:
    """The client's version of its own call counts, in the provider's message with the hidden calls around it."""
    loop = Loop()
    message = mixed_turn(loop)
    loop.ask(encoded(HI, message, ANSWERED), [spoken("Done.")])
    message["tool_calls"][0]["function"]["arguments"] = '{"cmd": "[cleared]"}'
    loop.ask(encoded(HI, message, ANSWERED), [spoken("Done.")])
    full, cleared = (messages_of(request)[1:] for request in loop.requests[-2:])
    before, own, after = cleared[0]["tool_calls"]
    assert own == called("call_sh3LlQ7xA", "shell", '{"cmd": "[cleared]"}')
    assert {**cleared[0], "tool_calls": [before, full[0]["tool_calls"][1], after]} == full[0]
    assert cleared[1:] == full[1:]
    assert loop.restored is not None and (loop.restored.restored, loop.restored.unknown) == (1, 0)


@pytest.mark.parametrize("id_", ["call_sh3LlQ7xA", "call_0"])
def test_what_a_client_clears_before_it_does_not_count(id_: str) -> None:
    """Clients clear the results of old calls, and what the calls wrote, to keep a conversation small."""
    loop = Loop()
    asked = called(id_, "shell", '{"cmd": "cat a"}')
    call_, result = {"role": "assistant", "tool_calls": [asked]}, {"role": "tool", "tool_call_id": id_, "content": "a" * 99}
    script = [spoken("A. ", calls=[TIME]), spoken("B.", hop=2)]
    message = replayed(accumulated(loop.ask(encoded(HI, call_, result), script)))
    cleared = {"role": "assistant", "tool_calls": [called(id_, "shell", "{}")]}
    loop.ask(encoded(HI, cleared, result | {"content": "[cleared]"}, message, HI), [spoken("C.")])
    assert loop.restored is not None and (loop.restored.restored, loop.restored.unknown) == (1, 1)
    assert [entry["role"] for entry in messages_of(loop.requests[-1])[3:6]] == ["assistant", "tool", "assistant"]


def test_an_edit_before_it_makes_another_conversation() -> None:
    """The last resort is the text with all that was said before (wire.md D6)."""
    loop = Loop()
    message = hidden_turn(loop)
    assert TURNS.read(encoded(HI | {"content": "Ho"}, message)).restored(loop.memories).unknown == 1
    kept_up_to_date = {"role": "developer", "content": "It is noon."}
    assert TURNS.read(encoded(kept_up_to_date, HI, message)).restored(loop.memories).restored == 1


def test_what_was_dropped_is_lost() -> None:
    loop = Loop()
    talk(loop, turns=4)
    loop.forget()
    history = talk(Loop(), turns=4)
    restored = TURNS.read(encoded(*history)).restored(loop.memories)
    assert restored.body == encoded(*history)
    assert (restored.restored, restored.lost, restored.unknown, restored.toolset) == (0, 3, 0, TOOLS.digest)


def test_what_cannot_be_read_is_lost() -> None:
    loop = Loop()
    message = hidden_turn(loop)
    broken = {key: Memory(memory.keys, "t", b"\xc1") for key, memory in loop.memories.items()}
    restored = TURNS.read(encoded(HI, message)).restored(broken)
    assert (restored.lost, restored.toolset) == (1, "t")


def test_nothing_remembered() -> None:
    signed = [{"type": "reasoning.text", "text": "x", "signature": "S"}]
    body = encoded(HI, {"role": "assistant", "content": "A"}, {"role": "assistant", "reasoning_details": signed})
    restored = TURNS.read(body).restored({})
    assert (restored.body, restored.toolset, restored.unknown, restored.bound) == (body, None, 2, True)
    assert not TURNS.read(encoded(HI, {"role": "assistant", "content": "A"})).restored({}).bound


def test_a_response_with_nothing_hidden_is_remembered_for_its_tools() -> None:
    loop = Loop()
    message = replayed(accumulated(loop.ask(encoded(HI), [spoken("A.")])))
    (memory,) = loop.memories.values()
    assert (memory.data, memory.toolset) == (b"", TOOLS.digest)
    restored = TURNS.read(encoded(HI, message)).restored(loop.memories)
    assert (restored.restored, restored.unknown, restored.toolset) == (0, 0, TOOLS.digest)


def test_nothing_ended() -> None:
    assert TURNS.memory(TURNS.read(encoded(HI)), TOOLS, []) == Memory((), TOOLS.digest)
    no_message = TURNS.memory(TURNS.read(encoded(HI)), TOOLS, [Answered(Turn(()))])
    assert no_message.data == b""


def test_calls_without_an_outcome_are_forgotten() -> None:
    """No provider takes a call that nobody answered."""
    loop = Loop()
    cut_short = spoken("B.", calls=[call(0, "call_x9YzW4pk", "bmcp_s_time", '{"a')], hop=2, finish="length")
    message = hidden_message(loop, [spoken("A. ", calls=[TIME]), cut_short])
    assert message["content"] == "A. B."
    loop.ask(encoded(HI, message, HI), [spoken("C.")])
    said = messages_of(loop.requests[-1])
    assert [len(entry.get("tool_calls", [])) for entry in said] == [0, 1, 0, 0, 0]
    assert said[3] == {"role": "assistant", "content": "B."}


def test_a_last_turn_of_which_nothing_is_left() -> None:
    loop = Loop()
    message = hidden_message(loop, [spoken("A. ", calls=[TIME]), spoken(calls=[TIME], hop=2, finish="length")])
    loop.ask(encoded(HI, message, HI), [spoken("C.")])
    assert [entry["role"] for entry in messages_of(loop.requests[-1])] == ["user", "assistant", "tool", "user"]
    assert_each_extends_the_one_before([loop.requests[1], loop.requests[-1]])


def hidden_message(loop: Loop, script: list[bytes]) -> Json:
    """What applications keep that put deltas together themselves: the SDK's helper raises on `length`."""
    merged = loop.ask(encoded(HI), script)
    deltas = [json.loads(line[6:]) for line in merged.splitlines() if line.startswith(b"data: {")]
    words = [choice["delta"].get("content") or "" for data in deltas for choice in data.get("choices", [])]
    return {"role": "assistant", "content": "".join(words)}


def test_a_refusal_is_what_is_left() -> None:
    loop = Loop()
    refused = chunk({"role": "assistant", "content": None, "refusal": "No."}, "stop", id="chatcmpl-2") + DONE
    message = replayed(accumulated(loop.ask(encoded(HI), [spoken("A.", calls=[TIME]), refused])))
    loop.ask(encoded(HI, message, HI), [spoken("C.")])
    assert messages_of(loop.requests[-1])[3] == {"role": "assistant", "content": None, "refusal": "No."}


# --- responses that broke off -----------------------------------------------------------------------------------------


BROKEN = chunk({"role": "assistant", "content": "The answ"}, id="chatcmpl-2") + event({"error": {"message": "x"}})


@pytest.mark.parametrize(
    ("kept", "rest"),
    [("A. The answ", "The answ"), ("A. ", None), (" A. The", "The"), ([{"type": "text", "text": "A. The"}], "The")],
)
def test_what_a_client_kept_of_a_response_that_broke_off(kept: Any, rest: str | None) -> None:
    """The ended turns come back, and what the client has of the rest follows them."""
    loop = Loop()
    assert hidden_message(loop, [spoken("A. ", calls=[TIME]), BROKEN])["content"] == "A. The answ"
    loop.ask(encoded(HI, {"role": "assistant", "content": kept}, HI), [spoken("C.")])
    said = messages_of(loop.requests[-1])
    assert [entry["role"] for entry in said][:3] == ["user", "assistant", "tool"]
    assert [(entry.get("content") or "").strip() for entry in said[3:]] == [*([rest] if rest else []), "Hi"]
    ended, later = loop.requests[1:]
    assert conversation(later).startswith(conversation(ended))


def test_a_response_that_broke_off_before_a_word() -> None:
    loop = Loop()
    hidden_message(loop, [spoken(calls=[TIME]), BROKEN])
    partial = {"role": "assistant", "content": "The answ"}
    loop.ask(encoded(HI, partial, HI), [spoken("C.")])
    assert [entry["role"] for entry in messages_of(loop.requests[-1])] == ["user", "assistant", "tool", "assistant", "user"]


def test_a_response_that_broke_off_and_was_asked_for_again() -> None:
    loop = Loop()
    hidden_message(loop, [spoken("A. ", calls=[TIME]), BROKEN])
    message = replayed(accumulated(loop.ask(encoded(HI), [spoken("Fine.")])))
    assert TURNS.read(encoded(HI, message)).restored(loop.memories).restored == 0
    assert TURNS.read(encoded(HI, message)).restored(loop.memories).unknown == 0


def test_a_first_response_that_failed_leaves_nothing() -> None:
    loop = Loop()
    loop.ask(encoded(HI), [event({"error": {"message": "x"}})])
    assert loop.memories == {}


# --- properties -------------------------------------------------------------------------------------------------------

WORDS = st.text(st.characters(codec="utf-8", exclude_characters="\ufffd"), max_size=20)


@given(WORDS, WORDS, st.booleans(), st.sampled_from([COMPACT, SPACED]))
@settings(deadline=None, max_examples=60)
def test_any_text_is_put_back(first: str, second: str, ascii_only: bool, separators: tuple[str, str]) -> None:
    loop = Loop()
    deltas: list[Json] = [{"role": "assistant", "content": first}, *({"tool_calls": [piece]} for piece in TIME)]
    said = [{"choices": [{"index": 0, "delta": delta}]} for delta in deltas]
    stream = b"".join(event(json.dumps(data, ensure_ascii=ascii_only).encode()) for data in said)
    loop.ask(encoded(HI, separators=separators), [stream, spoken(second, hop=2)])
    message = {"role": "assistant", "content": first + second}
    loop.ask(encoded(HI, message, HI, separators=separators), [spoken("C.")])
    assert_each_extends_the_one_before(loop.requests)
    assert messages_of(loop.requests[-1])[1]["content"] == first


@given(st.binary(max_size=200))
def test_reading_never_raises(body: bytes) -> None:
    draft = TURNS.read(body)
    assert draft.objection is not None


LEAVES = st.sampled_from([None, True, 1, 1.5, "", "call_1", "Hm.", "assistant", "tool", "user"])
JSON = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(LEAVES.map(str), inner, max_size=2))
ENTRIES = st.fixed_dictionaries({}, optional={"id": JSON, "function": JSON, "custom": JSON})
MESSAGES = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(["assistant", "tool", "user", "system", None]),
        "content": JSON,
        "tool_calls": st.lists(ENTRIES, max_size=2) | JSON,
        "tool_call_id": JSON,
        "reasoning_details": JSON,
    },
)


@given(st.lists(MESSAGES | JSON, max_size=5), st.sampled_from([[TIME, SHELL, LAST_LOOK], [TIME], []]), st.booleans())
@settings(deadline=None, max_examples=100)
def test_restoring_never_raises(messages: list[Any], calls: list[list[Json]], broken: bool) -> None:
    """Whatever a client sends, and whatever is remembered under its keys, it stays JSON with at least as many messages."""
    loop = Loop()
    loop.ask(encoded(HI), [spoken("Hm.", calls=calls), *([] if broken else [spoken("B.", hop=2)])])
    (memory,) = loop.memories.values()
    draft = TURNS.read(encoded(*messages))
    assert draft.objection is None
    restored = draft.restored(dict.fromkeys(draft.keys, memory))
    assert len(messages_of(restored.body)) >= len(messages)
    TURNS.memory(draft, TOOLS, [])


def test_the_same_request_gets_the_same_bytes() -> None:
    """Whatever the order of keys in what was found."""
    loop = Loop()
    history = talk(loop)
    keys = list(loop.memories)
    random.Random(1).shuffle(keys)
    bodies = {
        TURNS.read(encoded(*history)).restored(found).body
        for found in (loop.memories, {key: loop.memories[key] for key in keys})
    }
    assert len(bodies) == 1
    (body,) = bodies
    assert member_span(body, "messages") is not None
