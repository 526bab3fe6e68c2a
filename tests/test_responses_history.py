"""What clients of the Responses protocol replay, and what comes back into it.

Truth: wire.md C5, D6; clients.md 3 for what clients do to what they replay. The client's history is what OpenAI's Python SDK
made of the merged responses, and nothing else.
"""

import json
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from aibridge.wire.responses_history import Item
from aibridge.wire.responses_turns import response_key
from aibridge.wire.turns import Answered, Memory, Piece, Turn
from tests.support.turns_responses import (
    HIDING,
    SECRET,
    TOOLSET,
    TURNS,
    Bridge,
    Json,
    Reply,
    answered,
    assert_extends,
    body,
    call,
    compact,
    kinds,
    message,
    ours,
    output_of,
    reasoning,
    replayed,
    result,
    understood,
    user,
)

# --- ten turns --------------------------------------------------------------------------------------------------------


def as_is(items: list[Json]) -> list[Json]:
    return items


def stripped(items: list[Json]) -> list[Json]:
    """Without ids and states, members in another order."""
    return [{name: item[name] for name in sorted(item, reverse=True) if name not in ("id", "status")} for item in items]


def as_strings(items: list[Json]) -> list[Json]:
    """Messages with one string for a content, trimmed."""
    return [
        {"role": "assistant", "content": f" {item['content'][0]['text'].strip()}\n"} if item["type"] == "message" else item
        for item in items
    ]


def rewritten(items: list[Json]) -> list[Json]:
    """Arguments whose JSON was written anew, as clients do that decode them."""
    return [
        item | {"arguments": json.dumps(json.loads(item["arguments"]))} if "arguments" in item else item for item in items
    ]


def thoughtless(items: list[Json]) -> list[Json]:
    return [item for item in items if item["type"] != "reasoning"]


Rewrite = Any


def script(number: int) -> list[Reply]:
    """The upstream responses of one turn of the user: plain, with calls of ours, mixed, three hops, by turns."""
    n = f"{number:02}_abcdef01"
    thought = reasoning(f"rs_a{n}")
    said = message(f"msg_{n}", f"Answer {number}.")
    match number % 4:
        case 0:
            return [Reply(f"resp_a{n}", [thought, said])]
        case 1:
            return [
                Reply(f"resp_a{n}", [thought, ours(f"fc_a{n}"), ours(f"fc_b{n}")]),
                Reply(f"resp_b{n}", [reasoning(f"rs_b{n}"), said]),
            ]
        case 2:
            mixed = [thought, ours(f"fc_a{n}"), call(f"fc_b{n}", "shell"), ours(f"fc_c{n}"), call(f"fc_d{n}", "shell")]
            return [Reply(f"resp_a{n}", mixed)]
    return [
        Reply(f"resp_a{n}", [thought, message(f"msg_c{n}", "I look.", phase="commentary"), ours(f"fc_a{n}")]),
        Reply(f"resp_b{n}", [ours(f"fc_b{n}", "now", "")]),
        Reply(f"resp_c{n}", [reasoning(f"rs_b{n}"), said]),
    ]


class Conversation:
    """A client that knows nothing but what it was shown."""

    def __init__(
        self, bridge: Bridge, rewrite: Rewrite = as_is, separators: tuple[str, str] = (",", ":"), **members: Any
    ) -> None:
        self.bridge = bridge
        self.rewrite = rewrite
        self.separators = separators
        self.members = {"model": "m", "store": False, "tools": [{"type": "web_search"}], **members}
        self.history: list[Json] = []

    def body(self) -> bytes:
        return json.dumps({**self.members, "input": self.history}, separators=self.separators).encode()

    def say(self, number: int) -> None:
        self.history.append(user(f"Question {number}"))
        self.go_on(script(number))
        if number % 4 == 2:
            n = f"{number:02}_abcdef01"
            self.history += [result(f"call_fc_b{n}"), result(f"call_fc_d{n}")]
            self.go_on(
                [Reply(f"resp_d{n}", [ours(f"fc_e{n}")]), Reply(f"resp_e{n}", [message(f"msg_{n}", f"Answer {number}.")])]
            )

    def go_on(self, replies: list[Reply]) -> None:
        out = self.bridge.ask(self.body(), *replies)
        self.history += self.rewrite(replayed(understood(out, stream=self.bridge.stream)))


@pytest.mark.parametrize("separators", [(",", ":"), (", ", ": ")], ids=["compact", "spaced"])
@pytest.mark.parametrize("rewrite", [as_is, stripped, as_strings, rewritten])
@pytest.mark.parametrize("stream", [True, False])
def test_every_request_extends_the_one_before(rewrite: Rewrite, separators: tuple[str, str], stream: bool) -> None:
    """Ten turns with thoughts, our tools and the client's: byte for byte (wire.md D6), whatever clients make of them."""
    bridge = Bridge(stream=stream)
    conversation = Conversation(bridge, rewrite, separators)
    for number in range(10):
        conversation.say(number)
    assert len(bridge.requests) == 21
    assert_extends(bridge.requests)
    made, answers = (
        kinds(bridge.requests[-1]).count("function_call"),
        kinds(bridge.requests[-1]).count("function_call_output"),
    )
    assert made == answers == 20
    tools = {compact(json.loads(request)["tools"]) for request in bridge.requests}
    assert len(tools) == 1


def test_the_provider_sees_what_it_said() -> None:
    """What was hidden is in its place, and every item of a response that hid something is the provider's own."""
    bridge = Bridge()
    conversation = Conversation(bridge, stripped)
    for number in range(6):
        conversation.say(number)
    sent = json.loads(bridge.requests[-1])["input"]
    said = [item for number in (1, 2, 3) for reply in script(number) for item in reply.items]
    assert [item for item in sent if item in said] == said


def test_thoughts_that_the_client_drops_stay_dropped() -> None:
    bridge = Bridge()
    conversation = Conversation(bridge, thoughtless)
    for number in range(4):
        conversation.say(number)
    conversation.history.append(user("And?"))
    bridge.ask(conversation.body(), *script(0))
    sent = kinds(bridge.requests[-1])
    assert sent.count("reasoning") == 0
    assert sent.count("function_call") == sent.count("function_call_output")
    assert sent.count("function_call") == 9
    assert bridge.restored is not None
    assert (bridge.restored.restored, bridge.restored.unknown, bridge.restored.lost) == (4, 0, 0)


def one_answer(separator: str) -> Rewrite:
    """As a client does that keeps `Response.output_text`, or its own idea of it: all messages as one, at the end."""

    def rewrite(items: list[Json]) -> list[Json]:
        said = separator.join(item["content"][0]["text"].strip() for item in items if item["type"] == "message")
        others = [item for item in items if item["type"] not in ("message", "reasoning")]
        return [*([{"role": "assistant", "content": said}] if said else []), *others]

    return rewrite


@pytest.mark.parametrize("separator", ["", " ", "\n\n"])
@pytest.mark.parametrize("stream", [True, False])
def test_several_messages_that_the_client_keeps_as_one(separator: str, stream: bool) -> None:
    """What it stands for comes back in the provider's words, and what was hidden between."""
    bridge = Bridge(stream=stream)
    conversation = Conversation(bridge, one_answer(separator))
    for number in range(10):
        conversation.say(number)
    conversation.history.append(user("And?"))
    bridge.ask(conversation.body(), *script(0))
    assert bridge.restored is not None
    assert (bridge.restored.unknown, bridge.restored.lost) == (0, 0)
    sent = json.loads(bridge.requests[-1])["input"]
    said = [item for item in sent if "id" in item]
    assert said == [item for number in range(10) if number % 4 for item in said_in(number)]
    assert kinds(bridge.requests[-1]).count("function_call_output") == 20


def said_in(number: int) -> list[Json]:
    """Messages and calls of one turn of the user, in the provider's own words."""
    n = f"{number:02}_abcdef01"
    later = [ours(f"fc_e{n}"), message(f"msg_{n}", f"Answer {number}.")] if number % 4 == 2 else []
    return [item for reply in script(number) for item in reply.items if item["type"] != "reasoning"] + later


# --- what clients do to their history ---------------------------------------------------------------------------------


def restored(*history: Json, bridge: Bridge, **members: Any) -> list[Json]:
    """The input that the provider gets."""
    bridge.ask(body(*history, **members), Reply("resp_9_abcdef01", []))
    sent: list[Json] = json.loads(bridge.requests[-1])["input"]
    return sent


def hiding() -> tuple[Bridge, list[Json]]:
    """A bridge that has hidden a call, and the history of its client."""
    bridge = Bridge()
    return bridge, [user("2+2?"), *output_of(understood(bridge.ask(body(user("2+2?")), *HIDING))), user("And?")]


def test_what_was_hidden_comes_back() -> None:
    bridge, history = hiding()
    assert restored(*history, bridge=bridge) == [*history[:3], *SECRET, *history[3:]]
    assert bridge.restored is not None
    assert bridge.restored.toolset == TOOLSET.digest
    assert (bridge.restored.restored, bridge.restored.lost, bridge.restored.unknown) == (1, 0, 0)


@pytest.mark.parametrize("dropped", [1, 2, 3])
def test_what_the_client_drops_is_dropped(dropped: int) -> None:
    bridge, history = hiding()
    left = [item for number, item in enumerate(history) if number != dropped]
    place = left.index(history[2]) + 1 if dropped != 2 else left.index(history[1]) + 1
    assert restored(*left, bridge=bridge) == [*left[:place], *SECRET, *left[place:]]


def test_only_the_last_piece_is_left() -> None:
    bridge, history = hiding()
    assert restored(history[3], bridge=bridge) == [*SECRET, history[3]]


def test_only_the_first_piece_is_left() -> None:
    """As after a response that failed in a later hop."""
    bridge, history = hiding()
    assert restored(*history[:2], user("Again"), bridge=bridge) == [*history[:2], *SECRET, user("Again")]


def test_what_the_client_edits_is_edited() -> None:
    bridge, history = hiding()
    history[2] = message("msg_1_abcdef01", "I do not look.")
    assert restored(*history, bridge=bridge) == [*history[:3], *SECRET, *history[3:]]
    strange = message("msg_x_abcdef01", "I have said this.")
    bridge, history = hiding()
    assert restored(*history[:2], strange, *history[2:], bridge=bridge) == [
        *history[:2],
        strange,
        history[2],
        *SECRET,
        *history[3:],
    ]


def test_a_call_that_the_client_edits() -> None:
    bridge = Bridge()
    out = bridge.ask(body(user("x")), Reply("resp_1", [call("fc_1_abcdef01", "shell"), ours("fc_2_abcdef01")]))
    (made,) = output_of(understood(out))
    made |= {"arguments": '{"a": 2}'}
    sent = restored(user("x"), made, result("call_fc_1_abcdef01"), bridge=bridge)
    assert sent[1] == made
    assert [item.get("call_id") for item in sent] == [
        None,
        "call_fc_1_abcdef01",
        "call_fc_2_abcdef01",
        "call_fc_2_abcdef01",
        "call_fc_1_abcdef01",
    ]


@pytest.mark.parametrize(
    ("said", "replayed", "is_same"),
    [
        ('{"a": 1e2}', '{"a":100.0}', True),
        ('{"a": 1e2}', '{"a":101.0}', False),
        ('{"a": ', '{"a": ', True),  # a model's arguments need not be JSON; nobody can write them anew then
        ('{"a": ', '{"a":', False),
        ("[" * 5000, "[" * 5000, True),
    ],
    ids=["written anew", "edited", "broken off", "broken off and edited", "too deep"],
)
def test_a_call_that_the_client_does_not_edit(said: str, replayed: str, is_same: bool) -> None:
    """Goes back in the provider's words, with what the client has dropped."""
    bridge = Bridge()
    out = bridge.ask(body(user("x")), Reply("resp_1", [call("fc_1_abcdef01", "shell", said), ours("fc_2_abcdef01")]))
    (made,) = output_of(understood(out))
    made |= {"arguments": replayed}
    del made["status"]
    sent = restored(user("x"), made, result("call_fc_1_abcdef01"), bridge=bridge)
    assert sent[1] == (call("fc_1_abcdef01", "shell", said) if is_same else made)


def test_pieces_that_come_twice() -> None:
    bridge, history = hiding()
    sent = restored(*history, *history[1:], bridge=bridge)
    assert sent == [*history[:3], *SECRET, *history[3:], *history[1:]]


def test_references_stay_and_have_their_place() -> None:
    bridge, history = hiding()
    references = [{"type": "item_reference", "id": item["id"]} for item in history[1:4]]
    assert restored(history[0], *references, bridge=bridge) == [history[0], *references[:2], *SECRET, references[2]]


def test_a_mixed_turn_gets_its_results_together() -> None:
    """Also from a client that puts each result behind its call."""
    bridge = Bridge()
    items = [
        ours("fc_1_abcdef01"),
        call("fc_2_abcdef01", "shell"),
        ours("fc_3_abcdef01"),
        {**call("fc_4_abcdef01", "shell"), "type": "function_call"},
    ]
    shown = output_of(understood(bridge.ask(body(user("x")), Reply("resp_1", items))))
    outputs = [result("call_fc_2_abcdef01"), result("call_fc_4_abcdef01")]
    hidden = [result(f"call_fc_{n}_abcdef01", f"Résult of call_fc_{n}_abcdef01 \u2028") for n in (1, 3)]
    assert restored(user("x"), *shown, *outputs, bridge=bridge) == [user("x"), *items, *hidden, *outputs]
    between = restored(user("x"), shown[0], outputs[0], shown[1], outputs[1], bridge=bridge)
    assert between == [user("x"), *items[:3], outputs[0], items[3], *hidden, outputs[1]]


def test_calls_whose_ids_come_again() -> None:
    """Compatible servers count from ``call_0`` in every response (wire.md D3): their place tells them apart."""
    bridge = Bridge()
    history = [user("One")]
    for number in range(2):
        items = [
            {**ours("x", arguments=f'{{"n":{number}}}'), "id": "", "call_id": "call_1"},
            {**call("y", "shell"), "id": "", "call_id": "call_0"},
        ]
        reply = Reply(f"r{number}", items)
        shown = output_of(understood(bridge.ask(body(*history), reply)))
        history += [*shown, result("call_0"), user("Two")]
    sent = restored(*history, bridge=bridge)
    arguments = [item["arguments"] for item in sent if str(item.get("name")).startswith("bmcp_")]
    assert arguments == ['{"n":0}', '{"n":1}']


def test_a_piece_without_a_key_belongs_to_its_neighbours() -> None:
    bridge = Bridge()
    items = [{**call("y", "shell"), "id": "", "call_id": "call_0"}, ours("fc_1_abcdef01"), message("msg_1_abcdef01", "So.")]
    shown = output_of(understood(bridge.ask(body(user("One")), Reply("r", items))))
    sent = restored(user("Something else"), *shown, result("call_0"), bridge=bridge)
    assert [item.get("call_id") for item in sent] == [
        None,
        "call_0",
        "call_fc_1_abcdef01",
        None,
        "call_fc_1_abcdef01",
        "call_0",
    ]


def test_what_is_known_to_be_lost() -> None:
    bridge, history = hiding()
    bridge.memories = {key: Memory(memory.keys, memory.toolset, None) for key, memory in bridge.memories.items()}
    assert restored(*history, bridge=bridge) == history
    assert bridge.restored is not None
    assert (bridge.restored.restored, bridge.restored.lost, bridge.restored.unknown) == (0, 1, 0)
    assert bridge.restored.toolset == TOOLSET.digest


def test_what_nobody_remembers() -> None:
    bridge, history = hiding()
    bridge.memories = {}
    assert restored(*history, bridge=bridge) == history
    assert bridge.restored is not None
    assert (bridge.restored.toolset, bridge.restored.unknown, bridge.restored.bound) == (None, 1, False)


def test_what_another_version_remembers() -> None:
    bridge, history = hiding()
    bridge.memories = {key: Memory(memory.keys, memory.toolset, b"\xc1") for key, memory in bridge.memories.items()}
    assert restored(*history, bridge=bridge) == history


def test_the_body_is_untouched_where_nothing_was_hidden() -> None:
    bridge = Bridge()
    shown = output_of(understood(bridge.ask(body(user("Hi")), Reply("resp_1", [message("msg_1_abcdef01", "Ho")]))))
    memory = bridge.memories[response_key("resp_1")]
    assert (memory.data, memory.toolset) == (b"", TOOLSET.digest)
    asked = json.dumps({"input": [user("Hi"), *shown, user("And?")]}, indent=1).encode()
    bridge.ask(asked, Reply("resp_2", []))
    assert bridge.restored is not None
    assert bridge.restored.body is asked
    assert bridge.restored.toolset == TOOLSET.digest


def test_a_question_that_was_a_string() -> None:
    """A client with a string for an input has a message of it in its history later."""
    bridge = Bridge()
    out = bridge.ask(
        compact({"input": "Hi ", "store": False}), Reply("r", [ours("fc_1_abcdef01")]), Reply("s", [message("m", "Ho")])
    )
    (said,) = output_of(understood(out))
    sent = restored({"role": "user", "content": [{"type": "input_text", "text": "Hi"}]}, said, user("And?"), bridge=bridge)
    assert [item.get("type") for item in sent] == [None, "function_call", "function_call_output", "message", None]


@pytest.mark.parametrize(
    "content",
    [
        "Ho",
        " Ho\n",
        [{"type": "output_text", "text": "Ho"}],
        [{"type": "refusal", "refusal": "Ho"}, {"type": "output_text", "text": ""}],
    ],
)
def test_words_are_the_same_however_they_are_written(content: Any) -> None:
    bridge = Bridge()
    bridge.ask(body(user("Hi")), Reply("r", [ours("fc_1_abcdef01")]), Reply("s", [message("m", "Ho")]))
    sent = restored(user("Hi"), {"role": "assistant", "content": content}, bridge=bridge)
    assert sent[1:] == [
        ours("fc_1_abcdef01"),
        result("call_fc_1_abcdef01", "Résult of call_fc_1_abcdef01 \u2028"),
        message("m", "Ho"),
    ]


def joined(words: str) -> Json:
    return {"role": "assistant", "content": words}


@pytest.mark.parametrize("words", ["I look.It is 4.", "I look. It is 4.", " I look.\n\nIt\tis 4."])
def test_messages_that_are_joined(words: str) -> None:
    bridge, history = hiding()
    sent = restored(history[0], joined(words), history[-1], bridge=bridge)
    assert sent == [history[0], history[2], *SECRET, history[3], history[-1]]
    assert bridge.restored is not None
    assert (bridge.restored.restored, bridge.restored.unknown) == (1, 0)


@pytest.mark.parametrize("words", ["I look.It is 5.", "I look.It is", "I look.It is 4.No", "It is 4.I look.", ""])
def test_messages_that_are_joined_and_edited(words: str) -> None:
    """They are somebody else's where nothing else tells whose they are, and what the client wrote where something does."""
    bridge, history = hiding()
    assert restored(history[0], joined(words), history[-1], bridge=bridge) == [history[0], joined(words), history[-1]]
    thought = history[1]
    sent = restored(history[0], thought, joined(words), history[-1], bridge=bridge)
    assert sent == [history[0], thought, *SECRET, joined(words), history[-1]]


def test_joined_messages_and_what_is_between_them() -> None:
    bridge = Bridge()
    first = [message("msg_1", "One."), reasoning("rs_1"), message("msg_2", "Two."), ours("fc_1_abcdef01")]
    second = [message("msg_3", "Three."), call("fc_2_abcdef01", "shell")]
    shown = output_of(understood(bridge.ask(body(user("x")), Reply("r", first), Reply("s", second))))
    output = result("call_fc_2_abcdef01")
    both = restored(user("x"), joined("One. Two. Three."), shown[-1], output, bridge=bridge)
    assert both == [user("x"), first[0], first[2], *SECRET, *second, output]
    two = restored(user("x"), joined("One. Two."), joined("Three."), shown[-1], output, bridge=bridge)
    assert two == both


def test_a_service_that_speaks_for_many() -> None:
    """Who the end user is tells apart those who say the same (wire.md C1: `user` and `safety_identifier`)."""
    for member in ("user", "safety_identifier"):
        bridge = Bridge()
        for name in ("ada", "bob"):
            asked = body(user("What have I?"), **{member: name})
            bridge.ask(
                asked, Reply("r", [ours("fc_1", arguments=json.dumps({"of": name}))]), Reply("s", [message("m", "So.")])
            )
        for name in ("ada", "bob"):
            sent = restored(user("What have I?"), joined("So."), user("How much?"), bridge=bridge, **{member: name})
            assert sent[1]["arguments"] == json.dumps({"of": name})
        history = [user("What have I?"), joined("So."), user("How much?")]
        assert restored(*history, bridge=bridge) == history
        assert restored(*history, bridge=bridge, **{member: "eve"}) == history


def test_many_items_that_nobody_knows() -> None:
    """Matching does not take the product of what is remembered and what is replayed."""
    bridge = Bridge()
    hops = [
        Reply(f"r{n}", [*(message("", f"{n} {m}") for m in range(15)), ours(f"fc_{n}", arguments="{}")], output=None)
        for n in range(31)
    ]
    bridge.ask(body(user("x")), *hops, Reply("end", [call("fc_end_abcdef01", "shell")]))
    strangers = [joined(f"No {number}") for number in range(20000)]
    asked = body(user("x"), *strangers, call("fc_end_abcdef01", "shell"), result("call_fc_end_abcdef01"))
    compared = 0
    same = Item.is_same

    def counting(self: Item, stored: Item) -> bool:
        nonlocal compared
        compared += 1
        return same(self, stored)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Item, "is_same", counting)
        bridge.ask(asked, Reply("r", []))
    assert compared < 100
    assert bridge.restored is not None
    assert bridge.restored.restored == 1


def test_other_words_in_another_place() -> None:
    bridge = Bridge()
    bridge.ask(body(user("Hi")), Reply("r", [ours("fc_1_abcdef01")]), Reply("s", [message("m", "Ho")]))
    for history in ([user("Hi"), message("", "No")], [user("Hu"), message("", "Ho")]):
        assert restored(*history, bridge=bridge) == history


def test_a_custom_tool_that_is_the_clients() -> None:
    bridge = Bridge()
    custom = {
        "type": "custom_tool_call",
        "id": "ctc_1_abcdef01",
        "status": "completed",
        "call_id": "call_ctc_1",
        "name": "patch",
        "input": "x",
    }
    shown = output_of(understood(bridge.ask(body(user("x")), Reply("r", [ours("fc_1_abcdef01"), custom]))))
    output = {"type": "custom_tool_call_output", "call_id": "call_ctc_1", "output": "y"}
    sent = restored(user("x"), *stripped(shown), output, bridge=bridge)
    assert sent == [
        user("x"),
        ours("fc_1_abcdef01"),
        custom,
        result("call_fc_1_abcdef01", "Résult of call_fc_1_abcdef01 \u2028"),
        output,
    ]
    edited = stripped(shown)[0] | {"input": "z"}
    assert restored(user("x"), edited, output, bridge=bridge)[2] == edited


def test_a_response_that_failed_in_its_second_hop() -> None:
    bridge = Bridge()
    bridge.ask(body(user("x")), HIDING[0], b'{"error":{"message":"No"}}')
    sent = restored(user("x"), *HIDING[0].items[:2], user("Again"), bridge=bridge)
    assert sent == [user("x"), *HIDING[0].items[:2], *SECRET, user("Again")]


def test_a_call_without_an_outcome_is_forgotten() -> None:
    bridge = Bridge()
    shown = output_of(understood(bridge.ask(body(user("x")), HIDING[0], max_turns=1)))
    history = [user("x"), *shown, user("And?")]
    assert restored(*history, bridge=bridge) == history


def test_memories_keep_every_byte() -> None:
    raw = (
        rb'{"type":"message","id":"msg_1_abcdef01","role":"assistant","content":"\ud800 \/ 1e400","x":1e400,"x":"'
        b'\xff"}'
    )
    made = answered(ours("fc_1_abcdef01"))
    turn = Answered(Turn((*made.turn.pieces, Piece(raw)), made.turn.calls, response_id="resp_1"), made.outcomes)
    memory = TURNS.memory(TURNS.read(body(user("x"))), TOOLSET, [turn])
    draft = TURNS.read(body(user("x"), {"type": "item_reference", "id": "msg_1_abcdef01"}))
    assert draft.restored({key: memory for key in memory.keys if key in draft.keys}).restored == 1
    again = b'{"input":[{"role":"assistant","id":"msg_1_abcdef01","content":"\\ud800 / 1e400"}]}'
    draft = TURNS.read(again)
    assert raw in draft.restored({key: memory for key in memory.keys if key in draft.keys}).body


# --- properties -------------------------------------------------------------------------------------------------------

words = st.text(st.characters(codec="utf-8"), max_size=12)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["text", "ours", "theirs", "thought"]), words), min_size=1, max_size=5),
    st.booleans(),
    st.booleans(),
)
def test_whatever_was_said_comes_back(said: list[tuple[str, str]], ensure_ascii: bool, spaced: bool) -> None:
    """A mixed turn or a plain one, replayed by a client that writes JSON in its own way."""
    make: dict[str, Any] = {
        "text": message,
        "thought": reasoning,
        "ours": lambda item_id, words: ours(item_id, arguments=json.dumps({"a": words})),
        "theirs": lambda item_id, words: call(item_id, "shell", json.dumps({"b": words}, ensure_ascii=False)),
    }
    items = [make[kind](f"it_{number}_abcdef01", words) for number, (kind, words) in enumerate(said)]
    last = Reply("resp_2", [message("msg_last_abcdef01", "Done.")])
    bridge = Bridge()
    shown = output_of(understood(bridge.ask(body(user("x")), Reply("resp_1", items), last)))
    separators = (", ", ": ") if spaced else (",", ":")
    history = [user("x"), *shown, user("And?")]
    bridge.ask(json.dumps({"model": "m", "input": history}, separators=separators, ensure_ascii=ensure_ascii).encode(), last)
    sent = json.loads(bridge.requests[-1])["input"]
    read = [*items, *last.items] if len(bridge.requests) == 3 else items
    hidden = [item["call_id"] for item in items if str(item.get("name")).startswith("bmcp_")]
    if shown:
        assert [item for item in sent if item.get("type") not in (None, "function_call_output")] == read
        assert [item["call_id"] for item in sent if item.get("type") == "function_call_output"] == hidden
