"""Which requests get tools, which calls are made, and where the loop ends: the rules, in the three protocols.

Truth: issue 3 and docs/mcp.md for our choices, wire.md A4, A7, B2, C1, D3 and D4 for the protocols' own; the official SDKs
for what a valid response is.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

import openai
import pytest

from aibridge.toolbox import Function
from tests.serving import Call
from tests.support.injected import Calls, Dialect, Says, Thinks, Turn, data_of, turn, usage_of
from tests.support.injected_dialects import CHAT, MESSAGES, RESPONSES, both_ways, each_dialect
from tests.support.injected_loop import (
    LOOK,
    SECRET,
    TOOLS,
    InnerLoop,
    assert_hidden,
    assert_provider_got,
    ledger_usage,
    looks,
    python_final,
    recorded,
    shown,
)
from tests.support.jssdk import JavaScript


class Counting:
    """A tool that is counted."""

    def __init__(self) -> None:
        self.runs = 0

    async def __call__(self, arguments: Mapping[str, Any]) -> str:
        self.runs += 1
        return f"found {arguments['for']}"


def counted() -> tuple[Counting, Mapping[str, Function]]:
    tool = Counting()
    return tool, {**TOOLS, "look": tool}


# --- where the loop ends ----------------------------------------------------------------------------------------------


@both_ways
@each_dialect
async def test_the_last_turn_may_not_call_tools(dialect: Dialect, stream: bool, js: JavaScript) -> None:
    """It is told so; a provider that calls all the same is not obeyed, and the client gets a valid answer."""
    turns = (turn(1, Says("Look. "), looks("one")), turn(2, Says("It may be 3."), looks("two")))
    tool, tools = counted()
    async with InnerLoop(dialect, *turns, tools=tools, max_turns=2) as loop:
        call = await loop.ask(dialect.asking(stream=stream))
    assert await loop.seen(call, js, stream=stream) == shown(dialect, turns, usage=usage_of(1, 2))
    if stream:
        dialect.assert_one_envelope(call.body)
    assert_hidden(call)
    assert tool.runs == 1 and len(loop.requests) == 2
    assert dialect.choice(loop.requests[1]) == dialect.choices["none"]
    assert_provider_got(dialect, loop.requests, turns)
    made, refused = loop.invocations
    assert made == recorded(turns[0].calls)[0]
    assert refused[:3] == recorded(turns[1].calls)[0][:3] and "may not call" in (refused[3] or "")
    assert loop.ended == [("completed", 200)]


@each_dialect
async def test_without_time_for_tools(dialect: Dialect) -> None:
    """No call is made, the model is told why and asked to answer without."""
    turns = (turn(1, looks("one"), looks("two")), turn(2, Says("I cannot say.")))
    tool, tools = counted()
    async with InnerLoop(dialect, *turns, tools=tools, max_seconds=0) as loop:
        call = await loop.ask(dialect.asking())
    assert dialect.seen(python_final(dialect, call, stream=True)) == shown(dialect, turns, usage=usage_of(1, 2))
    assert tool.runs == 0
    assert dialect.choice(loop.requests[1]) == dialect.choices["none"]
    assert loop.requests[1].count(b"time for tools") == 2
    assert ["time for tools" in (error or "") for *_, error in loop.invocations] == [True, True]


# --- calls that are not made ------------------------------------------------------------------------------------------


@both_ways
@each_dialect
async def test_a_call_that_was_cut_off_is_never_made(dialect: Dialect, stream: bool) -> None:
    """The model had no more tokens, so nobody knows what it was going to ask (wire.md A7). What it said stays."""
    arguments = f'{{"for": "{SECRET}' if stream or dialect is not MESSAGES else f'{{"for": "{SECRET}"}}'
    said = turn(1, Thinks("Hm.", "signature-1"), Says("So "), Calls(f"one_{SECRET}", LOOK, arguments), stop="length")
    tool, tools = counted()
    async with InnerLoop(dialect, said, tools=tools) as loop:
        call = await loop.ask(dialect.asking(stream=stream))
    assert seen_cut_off(dialect, call, stream=stream) == shown(dialect, [said], usage=usage_of(1), stop="length")
    assert_hidden(call)
    assert tool.runs == 0 and len(loop.requests) == 1
    assert loop.ended == [("completed", 200)]
    assert loop.usages == [ledger_usage(dialect, 1)]


def seen_cut_off(dialect: Dialect, call: Call, *, stream: bool) -> Any:
    """The helper for Responses has no final object for a response that is incomplete (clients.md 4): read its last event.
    The one for Chat raises, and has it in the error.
    """
    if dialect is RESPONSES and stream:
        return dialect.seen(data_of(call.body)[-1]["response"])
    if dialect is CHAT and stream:
        with pytest.raises(openai.LengthFinishReasonError) as error:
            python_final(dialect, call, stream=stream)
        return dialect.seen(error.value.completion.to_dict(mode="json"))
    return dialect.seen(python_final(dialect, call, stream=stream))


@both_ways
@each_dialect
@pytest.mark.parametrize("arguments", ['{"for": "s3cret', '"s3cret"', "[1]"])
async def test_arguments_that_are_no_object(dialect: Dialect, stream: bool, arguments: str, js: JavaScript) -> None:
    """The call is not made, the model is told so and goes on."""
    if dialect is MESSAGES and not stream and arguments.startswith("{"):  # a body can only have JSON there
        arguments = json.dumps(arguments)
    odd = Calls(f"odd_{SECRET}", LOOK, arguments)
    turns = (turn(1, odd, looks("one")), turn(2, Says("Never mind.")))
    tool, tools = counted()
    async with InnerLoop(dialect, *turns, tools=tools) as loop:
        call = await loop.ask(dialect.asking(stream=stream))
    assert await loop.seen(call, js, stream=stream) == shown(dialect, turns, usage=usage_of(1, 2))
    assert_hidden(call)
    assert tool.runs == 1
    refused, made = loop.invocations
    assert refused[:3] == ("look", arguments, odd.id) and "JSON object" in (refused[3] or "")
    assert made == recorded([looks("one")])[0]
    asked_again = json.loads(loop.requests[1])[dialect.array]
    assert "JSON object" in json.dumps(asked_again)
    if dialect is MESSAGES:  # which takes only objects
        assert asked_again[1]["content"][0]["input"] == {}
        assert asked_again[2]["content"][0]["is_error"] is True


@both_ways
@each_dialect
async def test_a_call_runs_once_for_each_id(dialect: Dialect, stream: bool) -> None:
    """Compatible servers repeat ids (wire.md D3). The provider gets a result for each call all the same."""
    turns = (turn(1, looks("one"), looks("one")), turn(2, Says("It is 3.")))
    tool, tools = counted()
    async with InnerLoop(dialect, *turns, tools=tools) as loop:
        await loop.ask(dialect.asking(stream=stream))
    assert tool.runs == 1
    assert loop.invocations == recorded([looks("one")])
    assert_provider_got(dialect, loop.requests, turns)


@each_dialect
@pytest.mark.parametrize("arguments", ["", "{}"])
async def test_a_call_without_arguments(dialect: Dialect, arguments: str) -> None:
    """An empty string means none (wire.md E)."""

    async def now(given: Mapping[str, Any]) -> str:
        return f"noon, {dict(given)}"

    turns = (turn(1, Calls("call_of_now", "bmcp_memory_now", arguments)), turn(2, Says("Noon.")))
    async with InnerLoop(dialect, *turns, tools={"now": now}) as loop:
        await loop.ask(dialect.asking())
    assert b"noon, {}" in loop.requests[1]
    assert loop.invocations == [("now", "{}", "call_of_now", None)]


# --- choices ----------------------------------------------------------------------------------------------------------


@both_ways
@each_dialect
@pytest.mark.parametrize(("choice", "then"), [("none", "none"), ("auto", "auto"), ("any", "auto"), ("mine", "auto")])
async def test_the_choice_of_tools(dialect: Dialect, stream: bool, choice: str, then: str) -> None:
    """The client's choice stands for the first turn; one that forces a call would never end (wire.md D4)."""
    turns = (turn(1, looks("one")), turn(2, looks("two")), turn(3, Says("It is 3.")))
    async with InnerLoop(dialect, *turns) as loop:
        await loop.ask(dialect.asking(stream=stream, tools=["mine"], tool_choice=dialect.choices[choice]))
    expected = [dialect.choices[name] for name in (choice, then, then)]
    assert [dialect.choice(body) for body in loop.requests] == expected
    tools = [json.loads(body)["tools"] for body in loop.requests]
    assert tools[0][0] == dialect.tool("mine", "Mine.")
    assert tools[0] == tools[1] == tools[2] and len(tools[0]) == 3


# --- requests that are left alone -------------------------------------------------------------------------------------

SCHEMA: Final = {"type": "json_schema", "json_schema": {"name": "title", "schema": {"type": "object"}}}
OBJECTIONS: Final[list[tuple[Dialect, dict[str, Any]]]] = [
    (MESSAGES, {"thread": {"type": "continue", "id": "thread_1"}}),
    (MESSAGES, {"output_config": {"format": {"type": "json_schema", "schema": {"type": "object"}}}}),
    (CHAT, {"n": 2}),
    (CHAT, {"functions": [{"name": "old", "parameters": {"type": "object"}}]}),
    (CHAT, {"function_call": "auto"}),
    (CHAT, {"response_format": SCHEMA}),
    (CHAT, {"response_format": {"type": "json_object"}}),
    (CHAT, {"modalities": ["text", "audio"], "audio": {"voice": "ash", "format": "wav"}}),
    (RESPONSES, {"background": True}),
    (RESPONSES, {"text": {"format": {"type": "json_schema", "name": "title", "schema": {"type": "object"}}}}),
]
TURN: Final[Turn] = turn(1, Thinks("Hm.", "signature-1"), Says("It is 3."), Calls("call_of_mine", "mine", '{"x":  1e2}'))


async def assert_untouched(loop: InnerLoop, body: bytes, headers: Sequence[tuple[bytes, bytes]] = ()) -> None:
    async with loop:
        call = await loop.ask(body, headers)
    assert loop.requests == [body]
    assert call.body == loop.sent and call.complete
    assert loop.ended == [("completed", 200)]


@both_ways
@pytest.mark.parametrize(("dialect", "more"), OBJECTIONS)
async def test_a_request_that_could_not_use_tools_stays_as_it_is(
    dialect: Dialect, more: dict[str, Any], stream: bool
) -> None:
    """And so does its response: no byte is another (issue 3)."""
    await assert_untouched(InnerLoop(dialect, TURN), dialect.asking(stream=stream, **more))


@both_ways
@each_dialect
async def test_structured_output_with_tools_of_its_own_gets_ours(dialect: Dialect, stream: bool) -> None:
    forms: dict[str, dict[str, Any]] = {
        "messages": {"output_config": {"format": {"type": "json_schema", "schema": {"type": "object"}}}},
        "chat": {"response_format": SCHEMA},
        "responses": {"text": {"format": {"type": "json_object"}}},
    }
    async with InnerLoop(dialect, turn(1, looks("one")), turn(2, Says("{}"))) as loop:
        await loop.ask(dialect.asking(stream=stream, tools=["mine"], **forms[dialect.format]))
    assert loop.invocations == recorded([looks("one")])


@both_ways
@each_dialect
async def test_a_model_that_gets_no_tools(dialect: Dialect, stream: bool) -> None:
    loop = InnerLoop(dialect, TURN, skip_models=[re.compile("^m$")])
    await assert_untouched(loop, dialect.asking(stream=stream))


@both_ways
@each_dialect
async def test_without_injected_tools(dialect: Dialect, stream: bool) -> None:
    """Off by default, and then nothing is read, added or changed."""
    await assert_untouched(InnerLoop(dialect, TURN, tools=None), dialect.asking(stream=stream))


@each_dialect
async def test_a_request_that_nobody_can_decode(dialect: Dialect) -> None:
    """It is for the provider to judge, and the ledger knows why it got no tools."""
    loop = InnerLoop(dialect, TURN)
    await assert_untouched(loop, dialect.asking(), [(b"content-encoding", b"rot13")])
    assert (b"content-encoding", b"rot13") in list(loop.upstream.requests[0].headers)
    (start,) = loop.recorder.interceptions
    assert any(note.startswith("no tools injected") for note in start.metadata["notes"])


@each_dialect
async def test_without_any_tool_to_offer(dialect: Dialect) -> None:
    await assert_untouched(InnerLoop(dialect, TURN, tools={}), dialect.asking())


@both_ways
@each_dialect
async def test_a_response_without_injected_calls_is_as_the_provider_sent_it(dialect: Dialect, stream: bool) -> None:
    """Only what has to be changed is: in a response object of Responses the tools, which it repeats."""
    async with InnerLoop(dialect, TURN) as loop:
        call = await loop.ask(dialect.asking(stream=stream, tools=["mine"]))
    if dialect is RESPONSES:
        asked = json.loads(dialect.asking(stream=stream, tools=["mine"]))
        if stream:
            own = [json.loads(event.removeprefix(b"data: ")) for event in dialect.events(TURN, asked)]
            assert data_of(call.body) == own
        else:
            assert json.loads(call.body) == json.loads(dialect.body(TURN, asked))
    else:
        assert call.body == loop.sent
    assert [row.injected for row in loop.recorder.tool_usages] == [False]
