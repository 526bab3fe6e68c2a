"""The turns of Anthropic Messages: offering tools, and going on after calls.

Truth: wire.md A2 to A7 for what providers take, D4 for how a turn is appended. The words of results are our choice.
"""

import json
from dataclasses import replace
from typing import Any

import pytest

from aibridge.tools import Call, Media, Outcome, Text, Toolset
from aibridge.wire.reading import Unreadable
from aibridge.wire.turns import Answered, Piece, Turn
from tests.support.facts import Json
from tests.support.turns_messages import (
    NOW,
    QUESTION,
    TOOLSET,
    TURNS,
    asked,
    call,
    compact,
    contents,
    text,
    thought,
    tool,
)

# --- offering tools ---------------------------------------------------------------------------------------------------

ONE = Toolset([tool(schema='{ "type":"object", "x":1e400 }')])
OFFERED = b'{"name":"bmcp_time_now","description":"What bmcp_time_now does","input_schema":{ "type":"object", "x":1e400 }}'


@pytest.mark.parametrize(
    ("body", "offered"),
    [
        (b'{"model":"m"}', b'{"model":"m","tools":[%b]}'),
        (b'{"model": "m", "a": 1}', b'{"model": "m", "a": 1, "tools":[%b]}'),
        (b'{"tools":null,"model":"m"}', b'{"tools":[%b],"model":"m"}'),
        (b'{"tools":[ ],"model":"m"}', b'{"tools":[ %b],"model":"m"}'),
        (
            b'{"tools": [{"name": "Read", "cache_control": {"type": "ephemeral"}}], "tool_choice": {"type": "any"}}',
            b'{"tools": [{"name": "Read", "cache_control": {"type": "ephemeral"}}, %b], "tool_choice": {"type": "any"}}',
        ),
    ],
)
def test_tools_stand_after_the_clients_own(body: bytes, offered: bytes) -> None:
    """wire.md A5: its cache mark stays where it is, and with it what is cached."""
    assert TURNS.with_tools(body, ONE) == offered % OFFERED


def test_no_tools_change_nothing() -> None:
    assert TURNS.with_tools(b'{"model" : "m"}', Toolset([])) == b'{"model" : "m"}'


@pytest.mark.parametrize("body", [b"", b"[]", b'{"tools":7}', b'{"tools":{}}'])
def test_a_body_without_a_place_for_tools(body: bytes) -> None:
    with pytest.raises(Unreadable):
        TURNS.with_tools(body, ONE)


# --- reading requests -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"{}",
        b'{"messages":"x"}',
        b'{"messages":null}',
        asked(QUESTION, thread={"type": "continue"}),
        asked(QUESTION, output_config={"format": {"type": "json_schema"}}),
    ],
)
def test_requests_that_tools_would_do_no_good(body: bytes) -> None:
    """wire.md A2: the history is elsewhere; or it is a side call for structured output."""
    draft = TURNS.read(body)
    assert draft.objection is not None or draft.is_aside
    assert draft.body == body


@pytest.mark.parametrize(
    "members",
    [
        {},
        {"thread": None},
        {"max_tokens": 0},  # warms the cache for the requests that follow, which have tools
        {"output_config": {"effort": "high", "format": None}},
        {"output_config": {"format": {"type": "json_schema"}}, "tools": [{"name": "Read"}]},
    ],
)
def test_requests_that_may_get_tools(members: Json) -> None:
    draft = TURNS.read(asked(QUESTION, **members))
    assert draft.objection is None and not draft.is_aside


def test_the_names_that_are_taken() -> None:
    tools = [{"name": "Read"}, {"type": "web_search_20250305", "name": "web_search"}, {"type": "mcp_toolset"}, 7]
    assert TURNS.read(asked(QUESTION, tools=tools)).tool_names == {"Read", "web_search"}


# --- going on ---------------------------------------------------------------------------------------------------------


def answered(*outcomes: Outcome) -> Answered:
    tools = [Call(f"toolu_{number}", TOOLSET.tools[0], "{}") for number in range(len(outcomes))]
    pieces = [Piece(compact(call(made.id, NOW)).encode(), made) for made in tools]
    return Answered(Turn((Piece(b'{"type":"text","text":"\\u00e9"}'), *pieces), tuple(tools)), outcomes)


def resulting(*content: Text | Media, is_error: bool = False) -> Any:
    """The result as the provider gets it."""
    body = TURNS.with_turn(asked(QUESTION), answered(Outcome(content, is_error)), last=False)
    return json.loads(body)["messages"][-1]["content"][0]


@pytest.mark.parametrize("space", [b"", b" "])
def test_a_turn_is_appended_as_it_came(space: bytes) -> None:
    body = b'{"model":"m",%b"messages":[{"role":"user","content":"Hi" } ],"x":1e400}' % space
    outcomes = (Outcome((Text("noon"),)), Outcome.failed("no"))
    assert TURNS.with_turn(body, answered(*outcomes), last=False) == (
        b'{"model":"m",%b"messages":[{"role":"user","content":"Hi" } ,%b'
        b'{"role":"assistant","content":[{"type":"text","text":"\\u00e9"},'
        b'{"type":"tool_use","id":"toolu_0","name":"bmcp_time_now","input":{}},'
        b'{"type":"tool_use","id":"toolu_1","name":"bmcp_time_now","input":{}}]},%b'
        b'{"role":"user","content":[{"type":"tool_result","tool_use_id":"toolu_0","content":[{"type":"text","text":"noon"}]},'
        b'{"type":"tool_result","tool_use_id":"toolu_1","content":[{"type":"text","text":"no"}],"is_error":true}]}],"x":1e400}'
    ) % (space, space, space)


def test_what_results_are_made_of() -> None:
    """wire.md A3: text, images of four types, documents; and text without words is refused."""
    png = Media("image", "image/png", "iVBO")
    pdf = Media("file", "application/pdf", "JVBE", "a.pdf")
    source = {"type": "base64", "media_type": "image/png", "data": "iVBO"}
    assert resulting(Text("a"), png, Text(" \n"), is_error=True) == {
        "type": "tool_result",
        "tool_use_id": "toolu_0",
        "content": [text("a"), {"type": "image", "source": source}],
        "is_error": True,
    }
    document = {"type": "base64", "media_type": "application/pdf", "data": "JVBE"}
    assert resulting(pdf)["content"] == [{"type": "document", "source": document}]
    tiff = Media("image", "image/tiff", "AAAA")
    song = Media("audio", "audio/wav", "AAAA", "a.wav")
    assert resulting(tiff, song)["content"] == [text(tiff.described), text(song.described)]
    assert resulting()["content"] == resulting(Text(""))["content"] == [text("(no output)")]
    assert resulting(Text("\ud800 \U0001f30d"))["content"] == [text("? \U0001f30d")]


def test_what_the_provider_would_refuse_of_its_own_turn_is_left_out() -> None:
    """wire.md A6: thoughts at the end. Text without words likewise."""
    turn = answered(Outcome((Text("noon"),)))
    pieces = (Piece(b'{"type":"text","text":" "}'), *turn.turn.pieces, Piece(compact(thought("s")).encode()))
    body = TURNS.with_turn(asked(QUESTION), replace(turn, turn=replace(turn.turn, pieces=pieces)), last=False)
    assert contents(body)[1] == ("assistant", ["text é", "tool_use toolu_0"])


@pytest.mark.parametrize(
    ("choice", "relaxed"),
    [
        (None, None),
        ({"type": "auto", "x": 1}, {"type": "auto", "x": 1}),
        ({"type": "none"}, {"type": "none"}),
        ({"type": "any"}, {"type": "auto"}),
        ({"type": "tool", "name": "Read"}, {"type": "auto"}),
        (
            {"type": "any", "disable_parallel_tool_use": True},
            {"type": "auto", "disable_parallel_tool_use": True},
        ),
    ],
)
def test_a_forced_choice_is_relaxed(choice: Json | None, relaxed: Json | None) -> None:
    """Or the loop would never end (wire.md D4)."""
    body = asked(QUESTION) if choice is None else asked(QUESTION, tool_choice=choice)
    outcome = answered(Outcome((Text("noon"),)))
    assert json.loads(TURNS.with_turn(body, outcome, last=False)).get("tool_choice") == relaxed
    assert json.loads(TURNS.with_turn(body, outcome, last=True))["tool_choice"] == {"type": "none"}


@pytest.mark.parametrize("body", [b"", b"{}", b'{"messages":7}'])
def test_a_body_without_a_place_for_a_turn(body: bytes) -> None:
    with pytest.raises(Unreadable):
        TURNS.with_turn(body, answered(Outcome((Text("noon"),))), last=False)
