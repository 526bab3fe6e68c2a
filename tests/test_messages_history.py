"""What clients replay of Anthropic Messages, and what was hidden from them put back into it.

Truth: wire.md D6 for what clients replay and what must come back, A6 for what "unchanged" means, A3 and A6 for what
providers refuse; clients.md 4 for what clients do to their history. The client in these tests replays what the official SDK
accumulated. Where a piece that nobody knows is put is our choice.
"""

import json
import time
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given, strategies as st

from aibridge.tools import Call, Outcome, Text
from aibridge.wire.turns import Answered, Memory, Piece, Restored, Turn
from tests.support.facts import Json
from tests.support.turns_messages import (
    MARK,
    NEXT,
    NOW,
    QUESTION,
    TOOLSET,
    TURNS,
    ZONE,
    Client,
    Gateway,
    Reply,
    Said,
    asked,
    assistant,
    call,
    calls,
    compact,
    contents,
    extend_each_other,
    result,
    says,
    text,
    thinks,
    thought,
    user,
)

# --- ten turns --------------------------------------------------------------------------------------------------------

SEPARATORS = [(",", ":"), (", ", ": ")]


def exchange(number: int, kind: str, *, thinking: bool) -> list[Reply]:
    """The replies to one request of the conversation."""

    def thoughts(step: int) -> list[Said]:
        return [thinks(f"sig-{number}-{step}==", "" if step % 2 else "So… \u2028 \U0001f30d")] if thinking else []

    def reply(step: int, *blocks: Said, reason: str = "tool_use") -> Reply:
        return Reply([*thoughts(step), *blocks], reason, step)

    ours = [calls(f"toolu_ours_{number}_{step}", NOW, '{"n": 1E2, "e":"\\u00e9\\/"}') for step in range(4)]
    theirs = [calls(f"toolu_theirs_{number}_{step}", "Read", '{"path":"a"}') for step in range(2)]
    match kind:
        case "plain":
            return [reply(1, says(f"Answer {number}"), reason="end_turn")]
        case "one call":
            return [reply(1, ours[0]), reply(2, says(f" Answer {number}\n"), reason="end_turn")]
        case "three hops":
            second = reply(2, says(f"Looking {number}"), ours[2])
            return [reply(1, ours[0], ours[1]), second, reply(3, says(f"Answer {number}"), reason="end_turn")]
        case "empty text":
            return [reply(1, says(""), ours[0]), reply(2, says(f"Answer {number}"), says(""), reason="end_turn")]
        case "theirs":
            return [reply(1, says(f"Reading {number}"), theirs[0])]
        case "ours, then theirs":
            return [reply(1, ours[0]), reply(2, theirs[0])]
        case _:  # mixed
            return [reply(1, ours[0]), reply(2, ours[1], theirs[0], ours[2], theirs[1], ours[3])]


KINDS = [
    "plain",
    "one call",
    "mixed",
    "three hops",
    "theirs",
    "empty text",
    "ours, then theirs",
    "mixed",
    "one call",
    "plain",
]


def talk(client: Client, *, thinking: bool = True) -> None:
    results: list[Json] = []
    for number, kind in enumerate(KINDS):
        said = client.say([*results, text(f"Question {number}")], *exchange(number, kind, thinking=thinking))
        results = [result(block["id"]) for block in said if block["type"] == "tool_use"]


@pytest.mark.parametrize("separators", SEPARATORS, ids=["compact", "spaced"])
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "body"])
@pytest.mark.parametrize("thinking", [True, False], ids=["thinking", "plain"])
def test_ten_turns_extend_each_other(separators: tuple[str, str], stream: bool, thinking: bool) -> None:
    """The acceptance test: each provider request has the one before it as its beginning, byte for byte."""
    gateway = Gateway(stream)
    talk(Client(gateway, separators), thinking=thinking)
    assert len(gateway.sent) == sum(len(exchange(0, kind, thinking=True)) for kind in KINDS)
    extend_each_other(gateway.sent)
    for restored in gateway.restored[1:]:
        assert (restored.toolset, restored.lost, restored.unknown, restored.bound) == (TOOLSET.digest, 0, 0, False)
    assert gateway.restored[-1].restored == sum(kind not in ("plain", "theirs") for kind in KINDS[:-1])


def reordered(content: list[Json]) -> list[Json]:
    return [dict(reversed(block.items())) for block in content]


def tidied(content: list[Json]) -> list[Json]:
    """As Claude Code does: empty texts vanish, others are trimmed."""
    kept = [{**block, "text": block["text"].strip()} if block["type"] == "text" else block for block in content]
    return [block for block in kept if block.get("text") != ""]


def marked(content: list[Json]) -> list[Json]:
    return [{**block, "cache_control": MARK} if block["type"] in ("text", "tool_use") else block for block in content]


@pytest.mark.parametrize("rewrite", [reordered, tidied, marked], ids=lambda rewrite: rewrite.__name__)
@pytest.mark.parametrize("separators", SEPARATORS, ids=["compact", "spaced"])
def test_what_clients_do_to_their_history_does_no_harm(
    rewrite: Callable[[list[Json]], list[Json]], separators: tuple[str, str]
) -> None:
    gateway = Gateway()
    talk(Client(gateway, separators, rewrite=rewrite))
    extend_each_other(gateway.sent)


@pytest.mark.parametrize("kind", ["one call", "three hops"])
def test_history_that_is_rewritten_differently_each_time_does_no_harm(kind: str) -> None:
    """A string for one text block, marks that come and go, other spacing: the provider gets its own bytes each time."""
    gateway = Gateway()
    client = Client(gateway, marks=False)
    client.say("Question", *exchange(0, kind, thinking=False))
    sent = gateway.sent[-1]
    for _ in range(2):
        for rewrite in (reordered, tidied, marked, list, as_string):
            again = Client(gateway, marks=False, messages=[client.messages[0], {"role": "assistant"}])
            again.messages[1]["content"] = rewrite(client.messages[1]["content"])
            again.say("Question", Reply([says("Fine.")]))
            extend_each_other([sent, gateway.sent[-1]])


def as_string(content: list[Json]) -> Any:
    """One text block as a string."""
    return content[0]["text"] if len(content) == 1 else content


@pytest.mark.parametrize("separators", SEPARATORS, ids=["compact", "spaced"])
def test_the_mark_of_the_client_is_carried_over(separators: tuple[str, str]) -> None:
    gateway = Gateway()
    client = Client(gateway, separators, marks=False, rewrite=marked)
    client.say("One", *exchange(0, "mixed", thinking=True))
    assert client.body().count(b'"cache_control"') == 2
    client.say([result("toolu_theirs_0_0"), result("toolu_theirs_0_1")], Reply([says("Fine.")]))
    messages = json.loads(gateway.sent[-1])["messages"]
    have_one = [block["id"] for message in messages for block in message["content"] if block.get("cache_control") == MARK]
    assert have_one == ["toolu_theirs_0_0", "toolu_theirs_0_1"]


# --- what clients change ----------------------------------------------------------------------------------------------

FIRST = [thinks("sig-1"), says("Let me see."), calls("toolu_ours", NOW)]
SECOND = [thinks("sig-2"), says("It is noon.")]


def replayed(*content: Any, then: Json | None = None, replies: list[Reply] | None = None) -> Restored:
    """A conversation of one hidden call, of which the client replays this."""
    gateway = Gateway()
    gateway.ask(asked(QUESTION), *(replies or [Reply(FIRST, "tool_use"), Reply(SECOND)]))
    body = asked(QUESTION, assistant(*content), *([] if then is None else [then]))
    gateway.ask(body, Reply([says("Fine.")]))
    return gateway.restored[-1]


HIDDEN = ("user", ["tool_result toolu_ours"])


@pytest.mark.parametrize(
    ("content", "restored"),
    [
        # as it was
        (
            [thought("sig-1"), text("Let me see."), thought("sig-2"), text("It is noon.")],
            [
                ("assistant", ["thinking sig-1", "text Let me see.", "tool_use toolu_ours"]),
                HIDDEN,
                ("assistant", ["thinking sig-2", "text It is noon."]),
            ],
        ),
        # thoughts dropped
        (
            [text("Let me see."), text("It is noon.")],
            [("assistant", ["text Let me see.", "tool_use toolu_ours"]), HIDDEN, ("assistant", ["text It is noon."])],
        ),
        # a text edited: it stays where it was, and as the client wants it
        (
            [thought("sig-1"), text("Let me think."), thought("sig-2"), text("It is one.")],
            [
                ("assistant", ["thinking sig-1", "text Let me think.", "tool_use toolu_ours"]),
                HIDDEN,
                ("assistant", ["thinking sig-2", "text It is one."]),
            ],
        ),
        # pieces left out stay out
        (
            [thought("sig-1"), thought("sig-2"), text("It is noon.")],
            [
                ("assistant", ["thinking sig-1", "tool_use toolu_ours"]),
                HIDDEN,
                ("assistant", ["thinking sig-2", "text It is noon."]),
            ],
        ),
        ([thought("sig-2")], [("assistant", ["tool_use toolu_ours"]), HIDDEN]),
        # more than there was: it comes late
        (
            [thought("sig-1"), {"type": "song"}, thought("sig-2"), text("It is noon."), text("More."), text(" ")],
            [
                ("assistant", ["thinking sig-1", "tool_use toolu_ours"]),
                HIDDEN,
                ("assistant", ["song", "thinking sig-2", "text It is noon.", "text More."]),
            ],
        ),
    ],
)
def test_the_clients_version_wins(content: list[Json], restored: list[Any]) -> None:
    found = replayed(*content, then=NEXT)
    assert contents(found.body) == [("user", ["text What time is it?"]), *restored, ("user", ["text And now?"])]
    assert (found.restored, found.unknown, found.lost) == (1, 0, 0)


def test_a_prefill_stays_the_last_word() -> None:
    """The client's message ends the request, and the model goes on from there (wire.md A2)."""
    found = replayed(thought("sig-1"), text("Let me see."), thought("sig-2"), text("It is"))
    assert contents(found.body)[-1] == ("assistant", ["thinking sig-2", "text It is"])


def test_without_anything_unique_the_words_so_far_are_the_key() -> None:
    replies = [Reply([calls("toolu_ours", NOW)], "tool_use"), Reply([says("It is noon.")])]
    found = replayed(text("It is noon.\n"), then=NEXT, replies=replies)
    assert contents(found.body)[1:3] == [("assistant", ["tool_use toolu_ours"]), HIDDEN]
    assert b'"It is noon."' in found.body
    edited = replayed(text("It is one."), then=NEXT, replies=replies)
    assert (edited.restored, edited.unknown, edited.bound) == (0, 1, False)
    other = Gateway()
    other.ask(asked(user(text("Something else"))), *replies)
    draft = TURNS.read(asked(QUESTION, assistant(text("It is noon.")), NEXT))
    assert not set(draft.keys) & set(other.memories)


def test_the_newest_attempt_is_the_one_that_counts() -> None:
    """A response that failed after a hidden call leaves a memory; the retry that worked said more."""
    gateway = Gateway()
    gateway.ask(asked(QUESTION), Reply([calls("toolu_one", NOW)], "tool_use"), Reply([says("It")]), cut=True)
    gateway.ask(asked(QUESTION), Reply([calls("toolu_two", NOW)], "tool_use"), Reply([says("It is noon.")]))
    gateway.ask(asked(QUESTION, assistant(text("It is noon.")), NEXT), Reply([says("Fine.")]))
    assert contents(gateway.sent[-1])[1] == ("assistant", ["tool_use toolu_two"])


@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize("partial", [[], [text("It i")], [{"type": "thinking", "thinking": "H", "signature": ""}]])
def test_a_response_that_failed_later_on(thinking: bool, partial: list[Json]) -> None:
    """wire.md D6: the client keeps what it saw, and the next request has the call and its result all the same."""
    first = FIRST if thinking else FIRST[1:]
    shown = [thought("sig-1"), text("Let me see.")] if thinking else [text("Let me see.")]
    gateway = Gateway()
    gateway.ask(asked(QUESTION), Reply(first, "tool_use"), Reply(SECOND), cut=True)
    gateway.ask(asked(QUESTION, assistant(*shown, *partial), NEXT), Reply([says("Fine.")]))
    extend_each_other(gateway.sent)
    told = contents(gateway.sent[-1])
    assert told[2] == HIDDEN
    assert told[3:-1] == ([("assistant", ["text It i"])] if partial == [text("It i")] else [])


def test_a_call_that_nobody_ran_is_forgotten() -> None:
    """At the limit of hops. What is left of its turn are thoughts, which nobody takes at the end of a turn."""
    gateway = Gateway()
    gateway.ask(asked(QUESTION), Reply([thinks("sig-1"), calls("toolu_ours", NOW, "[]")], "max_tokens"))
    gateway.ask(asked(QUESTION, assistant(thought("sig-1")), NEXT), Reply([says("Fine.")]))
    assert contents(gateway.sent[-1]) == [("user", ["text What time is it?"]), ("user", ["text And now?"])]
    assert gateway.restored[-1].restored == 1
    gateway.ask(asked(QUESTION, assistant(thought("sig-1"))), Reply([says("Fine.")]))
    assert gateway.sent[-1] == TURNS.with_tools(asked(QUESTION, assistant(thought("sig-1"))), TOOLSET)


def test_messages_that_a_client_split_or_joined() -> None:
    """Neighbours of one role are one message to the provider (wire.md A2)."""
    gateway = Gateway()
    gateway.ask(asked(QUESTION), Reply(FIRST, "tool_use"), Reply(SECOND))
    whole = [thought("sig-1"), text("Let me see."), thought("sig-2"), text("It is noon.")]
    bodies = [
        asked(QUESTION, assistant(*whole), NEXT),
        asked(QUESTION, assistant(whole[0]), assistant(*whole[1:3]), assistant(whole[3]), NEXT),
        asked(QUESTION, assistant(*whole[:2]), assistant(*whole[2:]), NEXT),
    ]
    told = [contents(TURNS.read(body).restored(gateway.memories).body) for body in bodies]
    assert told[0] == told[2]
    assert [words for _, words in told[1]].count(["tool_result toolu_ours"]) == 1
    # two responses in a message, as after `pause_turn`
    more = Reply([thinks("sig-3"), calls("toolu_more", NOW)], "tool_use")
    gateway.ask(asked(QUESTION, assistant(*whole)), more, Reply([says("Done.")]))
    joined = TURNS.read(asked(QUESTION, assistant(*whole, thought("sig-3"), text("Done.")), NEXT)).restored(gateway.memories)
    assert contents(joined.body)[3:6] == [
        ("assistant", ["thinking sig-2", "text It is noon."]),
        ("assistant", ["thinking sig-3", "tool_use toolu_more"]),
        ("user", ["tool_result toolu_more"]),
    ]
    assert joined.restored == 2


def test_a_part_of_which_nothing_was_hidden_stays_as_it_is_beside_one_of_which_something_was() -> None:
    gateway = Gateway()
    gateway.ask(asked(QUESTION), Reply([thinks("sig-0"), says("Wait.")], "pause_turn"))
    gateway.ask(asked(QUESTION, assistant(thought("sig-0"), text("Wait."))), Reply(FIRST, "tool_use"), Reply(SECOND))
    body = asked(QUESTION, assistant(thought("sig-0"), text("Wait."), thought("sig-1"), text("Let me see.")), NEXT)
    assert contents(TURNS.read(body).restored(gateway.memories).body)[1:3] == [
        ("assistant", ["thinking sig-0", "text Wait."]),
        ("assistant", ["thinking sig-1", "text Let me see.", "tool_use toolu_ours"]),
    ]


# --- mixed turns ------------------------------------------------------------------------------------------------------

MIXED = Reply(
    [
        calls("ours_000", NOW),
        calls("theirs_1", "Read"),
        calls("ours_222", ZONE),
        calls("theirs_3", "Read"),
        calls("ours_444", NOW),
    ],
    "tool_use",
)
PLACES = [
    "tool_result ours_000",
    "tool_result theirs_1",
    "tool_result ours_222",
    "tool_result theirs_3",
    "tool_result ours_444",
]


def after_mixed(*messages: Json) -> list[tuple[str, Any]]:
    gateway = Gateway()
    gateway.ask(asked(QUESTION), MIXED)
    gateway.ask(asked(QUESTION, *messages), Reply([says("Fine.")]))
    return contents(gateway.sent[-1])[1:]


THEIRS = assistant(call("theirs_1"), call("theirs_3"))
SYSTEM: Json = {"role": "system", "content": "x"}
TURN = (
    "assistant",
    ["tool_use ours_000", "tool_use theirs_1", "tool_use ours_222", "tool_use theirs_3", "tool_use ours_444"],
)


@pytest.mark.parametrize(
    ("message", "results"),
    [
        (user(result("theirs_1"), result("theirs_3")), PLACES),
        (user(result("theirs_1"), result("theirs_3"), text("So?")), [*PLACES, "text So?"]),
        (user(result("theirs_3"), result("theirs_1")), [PLACES[0], PLACES[3], *PLACES[1:3], PLACES[4]]),
        (user(result("theirs_3")), [PLACES[0], PLACES[2], PLACES[3], PLACES[4]]),
        (user(), [PLACES[0], PLACES[2], PLACES[4]]),
        ({"role": "user", "content": "Stop."}, [PLACES[0], PLACES[2], PLACES[4], "text Stop."]),
    ],
)
def test_parked_results_stand_where_their_calls_do(message: Json, results: list[str]) -> None:
    """wire.md A3: all results in the next message, ahead of anything else."""
    told = after_mixed(THEIRS, message)
    assert told[0] == TURN
    assert sorted(told[1][1]) == sorted(results)
    assert told[1] == ("user", results)


def test_parked_results_go_past_what_the_system_says() -> None:
    """A role in the middle of conversations (wire.md A2); the results of a turn stay together all the same."""
    told = after_mixed(THEIRS, SYSTEM, SYSTEM, user(result("theirs_1"), result("theirs_3")))
    assert told == [TURN, ("system", "x"), ("system", "x"), ("user", PLACES)]


@pytest.mark.parametrize("messages", [[], [SYSTEM]])
def test_parked_results_without_a_message_to_join(messages: list[Json]) -> None:
    told = after_mixed(THEIRS, *messages)
    assert told[:2] == [TURN, ("user", [PLACES[0], PLACES[2], PLACES[4]])]


def test_parked_results_beside_content_that_nobody_understands() -> None:
    gateway = Gateway()
    gateway.ask(asked(QUESTION), MIXED)
    restored = TURNS.read(asked(QUESTION, THEIRS, {"role": "user", "content": 7})).restored(gateway.memories)
    assert restored.body.endswith(b',{"role":"user","content":7}]}')


# --- turns that come back in several messages -------------------------------------------------------------------------


def drawn(number: int) -> str:
    """An id that no provider gives twice."""
    return f"toolu_01AbCdEf{number}"


def in_pairs(*groups: list[Json]) -> list[Json]:
    """What a client does that keeps each call with its result."""
    ids = [[block["id"] for block in group if block["type"] == "tool_use"] for group in groups]
    return [
        message
        for group, own in zip(groups, ids, strict=True)
        for message in (assistant(*group), user(*map(result, own), text("Go on.")))
    ]


def test_a_turn_that_comes_back_in_pairs_gets_its_hidden_part_once() -> None:
    """All results of a turn in the message after it (wire.md A3): what was hidden goes where the turn begins."""
    hop = Reply([says("Hm."), calls("toolu_hop", NOW)], "tool_use")
    mixed = Reply([calls(drawn(1), "Read"), calls("toolu_ours", NOW), calls(drawn(2), "Read"), calls("toolu_more", NOW)])
    gateway = Gateway()
    gateway.ask(asked(QUESTION), hop, mixed)
    messages = in_pairs([text("Hm."), call(drawn(1))], [text("New."), call(drawn(2))])
    restored = TURNS.read(asked(QUESTION, *messages)).restored(gateway.memories)
    assert (restored.restored, restored.lost, restored.unknown) == (1, 0, 0)
    assert contents(restored.body)[1:] == [
        ("assistant", ["text Hm.", "tool_use toolu_hop"]),
        ("user", ["tool_result toolu_hop"]),
        ("assistant", [f"tool_use {drawn(1)}", "tool_use toolu_ours", "tool_use toolu_more"]),
        ("user", [f"tool_result {drawn(1)}", "tool_result toolu_ours", "tool_result toolu_more", "text Go on."]),
        ("assistant", ["text New.", f"tool_use {drawn(2)}"]),
        ("user", [f"tool_result {drawn(2)}", "text Go on."]),
    ]


def test_what_broke_off_between_two_messages_of_a_response() -> None:
    gateway = Gateway()
    gateway.ask(asked(QUESTION), Reply(FIRST, "tool_use"), Reply(SECOND))
    body = asked(QUESTION, assistant(thought("sig-1"), text("Hm?")), NEXT, assistant(thought("sig-2"), text("It is")), NEXT)
    assert contents(TURNS.read(body).restored(gateway.memories).body)[1:] == [
        ("assistant", ["thinking sig-1", "tool_use toolu_ours"]),
        HIDDEN,
        ("assistant", ["text Hm?"]),
        ("user", ["text And now?"]),
        ("assistant", ["thinking sig-2", "text It is"]),
        ("user", ["text And now?"]),
    ]


def test_an_answer_that_the_client_says_twice() -> None:
    gateway = Gateway()
    gateway.ask(asked(QUESTION), Reply(FIRST, "tool_use"), Reply(SECOND))
    said = assistant(thought("sig-1"), text("Let me see."), thought("sig-2"), text("It is noon."))
    told = contents(TURNS.read(asked(QUESTION, said, NEXT, said, NEXT)).restored(gateway.memories).body)
    assert told.count(HIDDEN) == 1
    assert told[5:] == [("assistant", [*told[1][1][:2], *told[3][1]]), ("user", ["text And now?"])]


def assert_all_are_answered(body: bytes) -> None:
    """wire.md A3: the calls of a turn and the results that the message after it begins with. Neighbours of one role are
    one message (A2).
    """
    joined: list[tuple[str, list[str]]] = [("user", [])]
    for role, told in contents(body):
        if role == joined[-1][0]:
            joined[-1][1].extend(told)
        else:
            joined.append((role, told))
    for (role, told), (_, answer) in zip(joined, [*joined[1:], ("user", [])], strict=True):
        made = [words.split()[1] for words in told if role == "assistant" and words.startswith("tool_use")]
        results = [words.split()[1] for words in answer if words.startswith("tool_result")]
        if role == "assistant":
            assert sorted(made) == sorted(results)
            assert all(words.startswith("tool_result") for words in answer[: len(results)])


@given(
    st.lists(st.lists(st.sampled_from(["text", "ours"]), max_size=3), max_size=3),
    st.lists(st.sampled_from(["text", "ours", "theirs", "theirs, and a new message"]), max_size=8),
)
def test_however_a_turn_is_split_all_comes_back_once(hops: list[list[str]], mixed: list[str]) -> None:
    replies: list[Reply] = []
    groups: list[list[Json]] = [[]]
    for number, kinds in enumerate([*([*kinds, "ours"] for kinds in hops), [*mixed, "theirs"]]):
        blocks: list[Said] = []
        for place, kind in enumerate(kinds):
            name = drawn(10 * number + place)
            if kind == "text":
                blocks.append(says(f"Text {name}"))
                groups[-1].append(text(f"Text {name}"))
            elif kind == "ours":
                blocks.append(calls(name, NOW))
            else:
                blocks.append(calls(name, "Read"))
                groups[-1].append(call(name))
                groups += [[]] if "new" in kind else []
        replies.append(Reply(blocks, "tool_use"))
    gateway = Gateway()
    gateway.ask(asked(QUESTION), *replies)
    restored = TURNS.read(asked(QUESTION, *in_pairs(*groups))).restored(gateway.memories).body
    assert_all_are_answered(restored)
    told = [words for role, said in contents(restored) for words in said if role == "assistant"]
    assert sorted(told) == sorted(
        f"{block['type']} {block.get('id') or block['text']}"
        for reply in replies
        for block in (json.loads(said.whole) for said in reply.blocks)
    )


# --- calls that the client edits --------------------------------------------------------------------------------------

WROTE = '{"text":"BIG","n":1,"e":[1E2,{"a":null,"b":true}]}'


@pytest.mark.parametrize(
    ("name", "arguments", "same"),
    [
        ("Write", WROTE, True),
        ("Write", '{ "e": [100, {"b": true, "a": null}], "n": 1.0, "text": "\\u0042IG" }', True),
        ("Write", WROTE.replace("BIG", "[cleared]"), False),
        ("Write", WROTE.replace("true", "1"), False),
        ("Write", "{}", False),
        ("Write", '{"text":"\udcff"}', False),  # a byte that is no UTF-8
        ("Edit", WROTE, False),
    ],
    ids=ascii,
)
def test_a_call_that_the_client_edited_stays_as_the_client_has_it(name: str, arguments: str, same: bool) -> None:
    """As those do that clear old calls to save context. JSON written anew says the same (wire.md A6, E), and hidden calls
    come back in any case.
    """
    gateway = Gateway()
    gateway.ask(asked(QUESTION), Reply(FIRST, "tool_use"), Reply([calls(drawn(1), "Write", WROTE)], "tool_use"))
    replayed_call = calls(drawn(1), name, arguments).whole.replace(f'"name":"{name}"', f'"name" : "{name}"')
    body = asked(QUESTION, assistant(thought("sig-1"), "CALL"), user(result(drawn(1))))
    there = replayed_call.encode("utf-8", "surrogateescape")
    body = body.replace(b'"CALL"', there)
    restored = TURNS.read(body).restored(gateway.memories).body
    written = calls(drawn(1), "Write", WROTE).whole
    assert (written.encode() if same else there) in restored
    assert restored.count(b'"tool_use"') == 2 and b'"toolu_ours"' in restored


# --- texts that the client joins --------------------------------------------------------------------------------------

HOPS = [
    Reply([says("Let me look. "), calls("toolu_one", NOW)], "tool_use"),
    Reply([says("\nStill looking."), calls("toolu_two", NOW)], "tool_use"),
    Reply([says("It is noon.")]),
]


@pytest.mark.parametrize("between", ["", " ", "\n", "\n\n"])
@pytest.mark.parametrize("marked", [False, True])
def test_an_answer_that_is_kept_as_one_string(between: str, marked: bool) -> None:
    """wire.md D6: visible text is the last resort, and many clients keep no more of an answer."""
    gateway = Gateway()
    gateway.ask(asked(QUESTION), *HOPS)
    said: Any = between.join(["Let me look. ", "\nStill looking.", "It is noon."])
    said = [{**text(said), "cache_control": MARK}] if marked else said
    gateway.ask(asked(QUESTION, {"role": "assistant", "content": said}, NEXT), Reply([says("Fine.")]))
    extend_each_other(gateway.sent)
    assert gateway.sent[-1].count(b"cache_control") == marked
    assert gateway.restored[-1].restored == 1


@pytest.mark.parametrize("words", ["Let me look. It is noon.", "Let me look. Still looking. It is noon. Or so.", "Let me"])
def test_an_answer_in_one_string_that_is_another(words: str) -> None:
    gateway = Gateway()
    gateway.ask(asked(QUESTION), *HOPS)
    restored = TURNS.read(asked(QUESTION, assistant(text(words)), NEXT)).restored(gateway.memories)
    assert (restored.restored, restored.unknown) == (0, 1)


def test_only_texts_that_are_next_are_joined() -> None:
    """Beside a call that is known: what is no text of the response is the client's own."""
    gateway = Gateway()
    gateway.ask(asked(QUESTION), *HOPS[:2], Reply([says("I read it."), calls(drawn(1), "Read")], "tool_use"))
    for words in ("Let me look.Still looking.I read it.", "Let me look. Still"):
        body = asked(QUESTION, assistant(text(words), call(drawn(1))), user(result(drawn(1))))
        told = contents(TURNS.read(body).restored(gateway.memories).body)
        assert told[1] == ("assistant", ["text Let me look." if "read" in words else f"text {words}", "tool_use toolu_one"])
        assert told[-2] == ("assistant", ["text I read it."] * ("read" in words) + [f"tool_use {drawn(1)}"])


# --- for whom -------------------------------------------------------------------------------------------------------------

LEGACY = "user_%s_account_0b5c9a3e-7d7e-4b0e-9a52-0d1f6f7c1a11_session_%s-7d7e-4b0e-9a52-0d1f6f7c1a11"


@pytest.mark.parametrize(
    ("first", "then", "same"),
    [
        ("ann", "ann", True),
        ("ann", "bob", False),
        ("ann", None, False),
        (None, None, True),
        ('{"device_id":"d","session_id":"1"}', '{"session_id":"2", "device_id":"d"}', True),
        ('{"device_id":"d","session_id":"1"}', '{"device_id":"e","session_id":"1"}', False),
        (LEGACY % ("ann", "00000000"), LEGACY % ("ann", "11111111"), True),
        (LEGACY % ("ann", "00000000"), LEGACY % ("bob", "00000000"), False),
    ],
)
def test_the_same_words_of_somebody_else_are_another_conversation(first: str | None, then: str | None, same: bool) -> None:
    """One key may serve many people; who they are is in `metadata.user_id` (wire.md A2). Its session is another one when
    Claude Code resumes a conversation (clients.md 2).
    """
    for_whom = [{} if user_id is None else {"metadata": {"user_id": user_id}} for user_id in (first, then)]
    gateway = Gateway()
    gateway.ask(asked(QUESTION, **for_whom[0]), *HOPS)
    said = assistant(text("Let me look."), text("Still looking."), text("It is noon."))
    restored = TURNS.read(asked(QUESTION, said, NEXT, **for_whom[1])).restored(gateway.memories)
    assert (restored.restored, restored.unknown) == ((1, 0) if same else (0, 1))


def test_a_client_that_makes_much_up_costs_what_it_sends() -> None:
    """Each of its pieces against each of the response's would be nine seconds, and longer for longer responses."""
    hops = [
        Reply([*(says(f"{hop}-{place}") for place in range(60)), calls(f"toolu_{hop}", NOW)], "tool_use")
        for hop in range(30)
    ]
    gateway = Gateway(stream=False)
    gateway.ask(asked(QUESTION), *hops, Reply([calls(drawn(1), "Read")], "tool_use"))
    made_up = [text(f"u{number}") for number in range(20_000)]
    draft = TURNS.read(asked(QUESTION, assistant(*made_up, call(drawn(1))), NEXT))
    begun = time.process_time()
    assert draft.restored(gateway.memories).restored == 1
    assert time.process_time() - begun < 3.0  # a tenth of that where this was written


# --- what is not remembered -------------------------------------------------------------------------------------------


def test_turns_that_nothing_is_known_of() -> None:
    draft = TURNS.read(asked(QUESTION, assistant(text("Hm.")), user(text("So?")), assistant(thought("sig-x")), NEXT))
    assert draft.restored({}) == Restored(draft.body, unknown=2, bound=True)
    draft = TURNS.read(asked(QUESTION, {"role": "assistant", "content": "Hm."}, NEXT))
    assert draft.restored({}) == Restored(draft.body, unknown=1)


def test_every_response_is_remembered_for_the_tools_that_it_was_offered() -> None:
    """Even with nothing hidden: a changed set of tools would invalidate its thoughts (wire.md A6)."""
    gateway = Gateway()
    gateway.ask(asked(QUESTION), Reply(SECOND))
    (memory,) = {memory.keys: memory for memory in gateway.memories.values()}.values()
    assert (memory.toolset, memory.data) == (TOOLSET.digest, b"")
    draft = TURNS.read(asked(QUESTION, assistant(thought("sig-2"), text("It is noon.")), NEXT))
    assert draft.restored(gateway.memories) == Restored(draft.body, toolset=TOOLSET.digest)


@pytest.mark.parametrize("data", [None, b"nonsense"])
def test_what_is_lost_takes_all_thoughts_with_it(data: bytes | None) -> None:
    """wire.md A6: dropping all of them stays valid, and those after the gap could not be verified any more."""
    gateway = Gateway()
    client = Client(gateway)
    client.say("One", Reply(FIRST, "tool_use"), Reply(SECOND))
    client.say("Two", Reply([thinks("sig-3")], "max_tokens"))
    client.say(
        "Three", Reply([thinks("sig-4"), calls("toolu_more", NOW)], "tool_use"), Reply([thinks("sig-5"), says("Done.")])
    )
    first, *_ = gateway.memories.values()
    gone = msgspec.structs.replace(first, data=data)
    memories = {key: gone if memory == first else memory for key, memory in gateway.memories.items()}
    body = asked(*client.messages, NEXT)
    restored = TURNS.read(body).restored(memories)
    assert (restored.lost, restored.restored, restored.unknown) == (1, 1, 0)
    assert contents(restored.body) == [
        ("user", ["text One"]),
        ("assistant", ["text Let me see.", "text It is noon."]),
        ("user", ["text Two"]),
        ("user", ["text Three"]),
        ("assistant", ["tool_use toolu_more"]),
        ("user", ["tool_result toolu_more"]),
        ("assistant", ["text Done."]),
        ("user", ["text And now?"]),
    ]


@pytest.mark.parametrize(
    "message",
    [
        7,
        None,
        {},
        {"role": "assistant"},
        {"role": 1, "content": 2},
        {"role": "assistant", "content": [1, None, "x", {"type": 1}]},
    ],
)
def test_nonsense_is_the_providers_to_judge(message: Any) -> None:
    draft = TURNS.read(asked(message, QUESTION))
    assert draft.objection is None
    assert draft.restored({}).body == draft.body


def test_what_is_repeated_is_no_key() -> None:
    """Ids such as ``call_0`` and empty ones (wire.md D3)."""
    draft = TURNS.read(asked(QUESTION, assistant(call("call_0"), call(""), text("a")), user(result("call_0"))))
    assert all(key.startswith("said:") for key in draft.keys)
    draft = TURNS.read(asked(QUESTION, assistant(call("toolu_01AbCdEf9"), {"type": "redacted_thinking", "data": "Zm9v"})))
    assert [key.partition(":")[0] for key in draft.keys] == ["id", "data"]


# --- what is remembered -----------------------------------------------------------------------------------------------


@given(st.binary(min_size=1, max_size=30), st.text(max_size=10))
def test_a_memory_gives_back_every_byte(inside: bytes, words: str) -> None:
    """Even those that are no UTF-8, and escapes of half a character."""
    raw = b'{"type":"tool_use","id":"toolu_ours","name":"x","input":{"a":"\\ud800","b":"%b"}}' % inside.hex().encode()
    raw = raw.replace(b'"x"', b'"\xff\xfe"')
    made = Call("toolu_ours", TOOLSET.tools[0], "{}")
    shown = Piece(compact(thought("sig-1")).encode())
    turn = Answered(Turn((shown, Piece(raw, made)), (made,)), (Outcome((Text(words),)),))
    draft = TURNS.read(asked(QUESTION))
    memory = msgspec.json.decode(msgspec.json.encode(TURNS.memory(draft, TOOLSET, [turn])), type=Memory)
    body = TURNS.read(asked(QUESTION, assistant(thought("sig-1")), NEXT)).restored(dict.fromkeys(memory.keys, memory)).body
    went_on = TURNS.with_turn(asked(QUESTION), turn, last=False)
    assert body.startswith(went_on[: -len(b"]}")])


@given(st.text(), st.booleans(), st.sampled_from(SEPARATORS))
def test_whatever_stands_around_it(words: str, ascii_only: bool, separators: tuple[str, str]) -> None:
    """Escapes, half characters, anything that JSON lets a client write: hidden parts find their place, the rest stays."""
    replies = [Reply(FIRST, "tool_use"), Reply(SECOND)]

    def request(*messages: Json) -> bytes:
        body = {"model": words, "messages": [{"role": "user", "content": words + "%SURROGATE%"}, *messages]}
        written = json.dumps(body, ensure_ascii=ascii_only, separators=separators).replace("%SURROGATE%", "\\ud83d")
        return written.encode()

    gateway = Gateway()
    gateway.ask(request(), *replies)
    gateway.ask(request(assistant(thought("sig-1"), text("Let me see.")), NEXT), Reply([says("Fine.")]))
    extend_each_other(gateway.sent)
    assert contents(gateway.sent[-1])[2] == HIDDEN


def test_a_restarted_gateway_goes_on_where_the_other_one_was() -> None:
    """Nothing of a conversation is in the process: the memories are all."""
    gateway = Gateway()
    client = Client(gateway)
    client.say("One", Reply(FIRST, "tool_use"), Reply(SECOND))
    client.gateway = Gateway(memories=dict(gateway.memories))
    client.say("Two", Reply([says("Fine.")]))
    extend_each_other([*gateway.sent, *client.gateway.sent])


LEAVES = st.none() | st.integers() | st.text(max_size=3)
REPLAYED = st.sampled_from(
    [
        thought("sig-1"),
        thought("sig-2"),
        text("Let me see."),
        text("It is noon."),
        text(""),
        call("theirs_1"),
        call("theirs_3"),
    ]
)
MESSAGES = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system"])},
    optional={"content": LEAVES | st.lists(REPLAYED | LEAVES | st.just(result("theirs_1")), max_size=5)},
)


@given(st.lists(MESSAGES | LEAVES, max_size=6), st.booleans())
def test_no_history_is_too_odd(messages: list[Any], forgotten: bool) -> None:
    """What comes out is a request, and without memories the one that came in; what the client says next is still there."""
    gateway = Gateway()
    gateway.ask(asked(QUESTION), Reply(FIRST, "tool_use"), Reply(SECOND))
    gateway.ask(asked(QUESTION), MIXED)
    memories = {
        key: msgspec.structs.replace(memory, data=None) if forgotten else memory for key, memory in gateway.memories.items()
    }
    draft = TURNS.read(asked(QUESTION, *messages, {"role": "user", "content": "The end"}))
    assert draft.restored({}).body == draft.body
    restored = draft.restored(memories)
    assert "The end" in str(json.loads(restored.body)["messages"][-1]["content"])
    assert restored.body.count(b'"id":"toolu_ours"') <= 1 >= restored.body.count(b'"tool_use_id":"toolu_ours"')
    if not restored.lost and not restored.restored:
        assert restored.body == draft.body
