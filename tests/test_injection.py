"""Which requests get which tools, and how calls are run.

Truth: the issue (pinned sets, requests that could not use tools, each id once, deadlines); wire.md A6 (a conversation's
thoughts are bound to its tools), D6 (a miss). Formats, histories and servers have tests of their own.
"""

import asyncio
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest

from aibridge.history import MemoryHistory
from aibridge.injection import Injection, Prepared
from aibridge.toolbox import MemoryToolbox
from aibridge.tools import Call, Outcome, Text, Tool, Toolset
from aibridge.wire import MESSAGES, RESPONSES
from aibridge.wire.turns import Answered, Memory, Piece, Turn
from tests.support.coding import ENCODERS, gzip

SCOPE = "alice/anthropic/messages"
SIGNATURE = "c2lnbmF0dXJl" * 4
SECONDS = 10


async def look(_: Mapping[str, Any]) -> str:
    """Looks."""
    return "found"


def injection(*names: str, history: Any = None, **rules: Any) -> Injection:
    return Injection(MemoryToolbox(dict.fromkeys(names or ("look",), look)), history or MemoryHistory(), **rules)


def body(*turns: Any, **members: Any) -> bytes:
    """A conversation: users say strings, the model says lists of blocks."""
    messages = [{"role": "user" if isinstance(turn, str) else "assistant", "content": turn} for turn in turns]
    return json.dumps({"model": "claude", "messages": messages, **members}).encode()


def thinking() -> dict[str, Any]:
    return {"type": "thinking", "thinking": "hm", "signature": SIGNATURE}


async def prepared(given: Injection, body: bytes, coding: str = "", scope: str = SCOPE) -> Prepared:
    return await given.prepare(MESSAGES.parse(body, coding), scope)


def offered(found: Prepared) -> list[str]:
    return [tool["name"] for tool in json.loads(found.request.body).get("tools", [])]


async def answered(given: Injection, body: bytes, *pieces: bytes) -> None:
    """The request got an answer, of which everything was shown."""
    found = await prepared(given, body)
    assert found.loop is not None
    turn = Answered(Turn(tuple(map(Piece, pieces))))
    memory = MESSAGES.turns.memory(found.loop.draft, found.loop.toolset, [turn])
    await given.remember(SCOPE, memory, found.loop.toolset)


# ---- which tools ----


async def test_a_request_gets_the_tools_that_there_are() -> None:
    found = await prepared(injection("b", "a"), body("hi", tools=[{"name": "mine", "input_schema": {}}]))
    assert offered(found) == ["mine", "bmcp_memory_a", "bmcp_memory_b"]
    assert found.loop is not None and found.request.has_tools and found.notes == ()
    assert found.request.facts.prompt == "hi"


async def test_a_client_keeps_the_name_of_its_tool() -> None:
    found = await prepared(injection("a"), body("hi", tools=[{"name": "bmcp_memory_a", "input_schema": {}}]))
    assert offered(found) == ["bmcp_memory_a", "bmcp_memory_a_2"]


async def test_without_tools_nothing_is_touched() -> None:
    given = Injection(MemoryToolbox({}), MemoryHistory())
    assert (await prepared(given, body("hi"))) == Prepared(MESSAGES.parse(body("hi")))


@pytest.mark.parametrize("coding", sorted(ENCODERS))
async def test_a_compressed_request_is_decoded(coding: str) -> None:
    found = await prepared(injection(), ENCODERS[coding](body("hi")), coding)
    assert offered(found) == ["bmcp_memory_look"] and found.request.coding == ""


@pytest.mark.parametrize(("sent", "coding"), [(b"no gzip", "gzip"), (gzip(b"x"), "rot13")])
async def test_a_request_that_cannot_be_decoded_goes_as_it_is(sent: bytes, coding: str) -> None:
    found = await prepared(injection(), sent, coding)
    assert (found.request.body, found.request.coding, found.loop) == (sent, coding, None)
    assert found.notes[0].startswith("no tools injected")


async def test_models_that_get_no_tools() -> None:
    given = injection(skip_models=[re.compile("haiku")])
    assert (await prepared(given, body("hi", model="claude-haiku-4-5"))).loop is None
    assert (await prepared(given, body("hi", model="claude-opus-5"))).loop is not None


# ---- the tools of a conversation ----


async def test_a_conversation_keeps_its_tools() -> None:
    history = MemoryHistory()
    await answered(injection("a", history=history), body("hi"), b'{"type":"text","text":"Hello!"}')
    later = injection("a", "b", history=history)  # another process, another listing
    goes_on = body("hi", [{"type": "text", "text": "Hello!"}], "and?")
    assert offered(await prepared(later, goes_on)) == ["bmcp_memory_a"]
    assert offered(await prepared(later, body("hi"))) == ["bmcp_memory_a", "bmcp_memory_b"]
    assert offered(await prepared(later, goes_on, scope="bob/anthropic/messages")) == ["bmcp_memory_a", "bmcp_memory_b"]


async def test_an_aside_gets_tools_only_where_its_conversation_has_them() -> None:
    """A title is no use for tools; a structured answer in a conversation must see the same tools and history as the rest."""
    given = injection("a")
    wanted: dict[str, Any] = {"output_config": {"format": {"type": "json_schema", "schema": {}}}}
    assert (await prepared(given, body("hi", **wanted))).loop is None
    assert offered(await prepared(given, body("hi", **wanted, tools=[{"name": "mine"}]))) == ["mine", "bmcp_memory_a"]
    await answered(given, body("hi"), json.dumps(thinking()).encode(), b'{"type":"text","text":"Hello!"}')
    goes_on = body("hi", [thinking(), {"type": "text", "text": "Hello!"}], "and?", **wanted)
    assert offered(await prepared(given, goes_on)) == ["bmcp_memory_a"]


async def test_what_was_hidden_comes_back_even_where_no_tools_can_be_called() -> None:
    given = injection("a")
    found = await given.prepare(RESPONSES.parse(b'{"model":"gpt","input":"hi"}'), SCOPE)
    assert found.loop is not None
    first, last = (Turn((Piece(b"{}"),), response_id=identity) for identity in ("resp_1a2b3c4d", "resp_5e6f7a8b"))
    call_ = Call("call_9z8y7x", found.loop.toolset.tools[0], "{}")
    turns = [Answered(replace(first, calls=(call_,)), (Outcome.failed("no"),)), Answered(last)]
    memory = RESPONSES.turns.memory(found.loop.draft, found.loop.toolset, turns)
    await given.remember(SCOPE, memory, found.loop.toolset)
    sent = b'{"model":"gpt","input":"and?","background":true,"previous_response_id":"resp_1a2b3c4d"}'
    for coding in ("", "gzip"):
        found = await given.prepare(RESPONSES.parse(ENCODERS[coding](sent) if coding else sent, coding), SCOPE)
        assert (found.loop, found.request.coding) == (None, "")
        assert json.loads(found.request.body)["previous_response_id"] == "resp_5e6f7a8b"


async def test_a_conversation_that_began_elsewhere_keeps_its_thoughts() -> None:
    sent = body("hi", [thinking(), {"type": "text", "text": "Hello!"}], "and?")
    found = await prepared(injection(), sent)
    assert (found.request.body, found.loop) == (sent, None)
    assert found.unknown == 1
    assert found.notes == (
        "no tools injected: its thoughts are bound to the tools that it had elsewhere",
        "1 turns of the model are not known",
    )


async def test_a_history_that_its_client_wrote_gets_tools() -> None:
    found = await prepared(injection(), body("hi", [{"type": "text", "text": "Hello!"}], "and?"))
    assert offered(found) == ["bmcp_memory_look"]
    assert (found.unknown, found.notes) == (1, ("1 turns of the model are not known",))


async def test_what_is_not_known_of_a_conversation_is_noted() -> None:
    given = injection()
    await answered(given, body("hi"), b'{"type":"text","text":"Hello!"}')
    edited = [{"type": "text", "text": "Hello!"}], [{"type": "text", "text": "Oh?"}]
    found = await prepared(given, body("hi", edited[0], "and?", edited[1], "and then?"))
    assert (found.unknown, found.notes) == (1, ("1 turns of the model are not known",))


async def test_a_large_request_is_read_beside_the_event_loop() -> None:
    found = await prepared(injection(), body("hi" * 600_000))
    assert offered(found) == ["bmcp_memory_look"]


async def test_a_conversation_keeps_its_tools_whatever_names_its_client_takes_later() -> None:
    """The set is the same, under other names."""
    history = MemoryHistory()
    hello = [{"type": "text", "text": "Hello!"}]
    await answered(injection("a", history=history), body("hi"), b'{"type":"text","text":"Hello!"}')
    own = {"tools": [{"name": "bmcp_memory_a", "input_schema": {}}]}
    await answered(injection("a", "b", history=history), body("hi", hello, "and?", **own), b'{"type":"text","text":"So."}')
    found = await prepared(
        injection("a", "b", history=history), body("hi", hello, "and?", [{"type": "text", "text": "So."}], "ok")
    )
    assert offered(found) == ["bmcp_memory_a"]
    assert len(history.toolsets) == 1


async def test_the_tool_sets_at_hand_are_bounded() -> None:
    history = MemoryHistory()
    given = injection("a", history=history)
    for number in range(100):
        hello = f"Hello {number}!"
        other = injection(f"tool{number}", history=history)
        await answered(other, body("hi"), json.dumps({"type": "text", "text": hello}).encode())
        assert offered(await prepared(given, body("hi", [{"type": "text", "text": hello}], "and?"))) == [
            f"bmcp_memory_tool{number}"
        ]
    assert len(given._toolsets) <= 64


async def test_a_skipped_model_in_a_conversation_that_has_tools_keeps_them() -> None:
    given = injection(skip_models=[re.compile("haiku")])
    await answered(given, body("hi"), b'{"type":"text","text":"Hello!"}')
    found = await prepared(given, body("hi", [{"type": "text", "text": "Hello!"}], "and?", model="claude-haiku"))
    assert offered(found) == ["bmcp_memory_look"]


async def test_a_tool_set_that_is_not_known_any_more() -> None:
    history = MemoryHistory()
    await answered(injection("a", history=history), body("hi"), json.dumps(thinking()).encode())
    for broken in ({}, dict.fromkeys(history.toolsets, b"oops")):
        history.toolsets = broken
        found = await prepared(injection("b", history=history), body("hi", [thinking()], "and?"))
        assert offered(found) == ["bmcp_memory_b"]


class Broken:
    """A history that fails."""

    async def recall(self, scope: str, keys: Sequence[str]) -> Mapping[str, Memory]:
        raise OSError

    async def remember(self, scope: str, memory: Memory, toolset: bytes) -> None:
        raise OSError

    async def recall_toolset(self, digest: str) -> bytes | None:
        raise OSError


async def test_a_history_that_fails_stops_nobody(caplog: pytest.LogCaptureFixture) -> None:
    given = injection(history=Broken())
    await answered(given, body("hi", [{"type": "text", "text": "Hello!"}], "and?"), b'{"type":"text","text":"So."}')
    said = [record.message for record in caplog.records]
    assert len(said) == 2 and all("could not be" in line for line in said)


# ---- running calls ----


class Reports(list[tuple[str, Outcome]]):
    def __call__(self, call: Call, outcome: Outcome, duration_ms: float) -> None:
        assert duration_ms >= 0
        self.append((call.id, outcome))


class Box:
    """A toolbox of one tool whose calls are told apart by their arguments."""

    def __init__(self) -> None:
        self.running: set[str] = set()
        self.go = asyncio.Event()
        self.all_there = asyncio.Event()
        self.expected = 1

    def tools(self) -> Sequence[Tool]:
        return [TOOL]

    async def call(self, tool: Tool, arguments: str) -> Outcome:
        if arguments == "raise":
            raise RuntimeError("secret")
        self.running.add(arguments)
        if len(self.running) == self.expected:
            self.all_there.set()
        await self.go.wait()
        return Outcome((Text(arguments),))


TOOL = Tool("bmcp_s_t", "", "{}", "s", "t", "u")


def call(identity: str, arguments: str = "{}", refusal: str | None = None) -> Call:
    return Call(identity, TOOL, arguments, refusal)


async def test_calls_run_at_once_and_answer_in_their_order() -> None:
    box, reports = Box(), Reports()
    box.expected = 3
    given = Injection(box, MemoryHistory())
    running = asyncio.create_task(
        given.call([call("a", "1"), call("b", "2"), call("c", "3")], seconds_left=SECONDS, report=reports)
    )
    async with asyncio.timeout(SECONDS):
        await box.all_there.wait()
        box.go.set()
        answers = await running
    assert [outcome.content for outcome in answers.outcomes] == [(Text("1"),), (Text("2"),), (Text("3"),)]
    assert not answers.out_of_time and sorted(identity for identity, _ in reports) == ["a", "b", "c"]


async def test_a_call_runs_once_but_an_id_alone_makes_no_call() -> None:
    """wire.md D3: compatible servers repeat ids, or have none."""
    box, reports = Box(), Reports()
    box.go.set()
    calls = [call("a", "1"), call("a", "1"), call("a", "2"), call("", "3"), call("", "3")]
    answers = await Injection(box, MemoryHistory()).call(calls, seconds_left=SECONDS, report=reports)
    assert [outcome.content for outcome in answers.outcomes] == [(Text(said),) for said in ("1", "1", "2", "3", "3")]
    assert len(reports) == 4


async def test_what_must_not_run_does_not() -> None:
    box, reports = Box(), Reports()
    answers = await Injection(box, MemoryHistory()).call([call("a", "1", "broken")], seconds_left=SECONDS, report=reports)
    assert answers.outcomes == (Outcome.failed("broken"),)
    assert not box.running and reports == [("a", Outcome.failed("broken"))]


async def test_a_call_that_takes_too_long() -> None:
    box, reports = Box(), Reports()
    answers = await Injection(box, MemoryHistory()).call([call("a")], seconds_left=-1, report=reports)
    assert answers.out_of_time and answers.outcomes[0].is_error and len(reports) == 1


async def test_a_toolbox_that_fails(caplog: pytest.LogCaptureFixture) -> None:
    reports = Reports()
    answers = await Injection(Box(), MemoryHistory()).call([call("a", "raise")], seconds_left=SECONDS, report=reports)
    assert answers.outcomes == (Outcome.failed("The tool could not be called (RuntimeError)."),)
    assert "the toolbox failed" in caplog.text


async def test_a_call_that_nobody_waits_for_is_cancelled_and_reported() -> None:
    box, reports = Box(), Reports()
    running = asyncio.create_task(Injection(box, MemoryHistory()).call([call("a")], seconds_left=SECONDS, report=reports))
    async with asyncio.timeout(SECONDS):
        await box.all_there.wait()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
    assert [identity for identity, _ in reports] == ["a"] and reports[0][1].is_error


def test_sets_are_told_apart_by_more_than_their_names() -> None:
    assert Toolset([TOOL]).digest != Toolset([Tool("bmcp_s_t", "other", "{}", "s", "t", "u")]).digest
