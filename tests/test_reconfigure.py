"""A bridge that gets another configuration while it serves.

Truth: issue 5 ("Configuration reload on SIGHUP (providers, keys, MCP, limits) without dropping a stream; an invalid file
keeps the old one"). That parts which two configurations share stay open is our choice.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Self

import pytest

from aibridge import MemoryRecorder, Provider, RequestBridge, as_actor
from aibridge.history import MemoryHistory
from aibridge.injection import Injection
from aibridge.limits import MAX_BODY_BYTES, Limits
from aibridge.toolbox import MemoryToolbox
from tests.serving import ALICE, Call, scope
from tests.support.provider import WAIT_SECONDS, Gate, Reply, ScriptedProvider, Wait

PATH = "/anthropic/v1/messages"
REQUEST = b'{"model":"m","stream":true,"messages":[{"role":"user","content":"hi"}]}'
STOP = b'event: message_stop\ndata: {"type":"message_stop"}\n\n'
START = b'event: message_start\ndata: {"type":"message_start","message":{"id":"msg_1","usage":{"input_tokens":1}}}\n\n'


class Part:
    """Notes in a journal when it is opened and closed."""

    def __init__(self, name: str, journal: list[str], failing: str = "") -> None:
        self._name = name
        self._journal = journal
        self._failing = failing

    async def __aenter__(self) -> Self:
        await asyncio.sleep(0)
        if self._failing == "opening":
            raise OSError("cannot be opened")
        self._journal.append(f"{self._name} opened")
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.sleep(0)
        self._journal.append(f"{self._name} closed")
        if self._failing == "closing":
            raise OSError("cannot be closed")


class OpenHistory(Part, MemoryHistory):
    def __init__(self, *given: Any) -> None:
        Part.__init__(self, *given)
        MemoryHistory.__init__(self)


class OpenToolbox(Part, MemoryToolbox):
    def __init__(self, *given: Any) -> None:
        Part.__init__(self, *given)
        MemoryToolbox.__init__(self, {})


class Stage:
    def __init__(self, provider: ScriptedProvider) -> None:
        self.provider = provider
        self.recorder = MemoryRecorder()
        self.journal: list[str] = []
        self.bridge = RequestBridge([self.named("anthropic")], self.recorder, injection=self.injection("old"))

    def named(self, name: str, **given: Any) -> Provider:
        return Provider(name, "anthropic", self.provider.url, **given)

    def injection(self, name: str, failing: str = "") -> Injection:
        history = OpenHistory(f"{name} history", self.journal)
        return Injection(OpenToolbox(f"{name} toolbox", self.journal, failing), history)

    def ask(self, path: str = PATH) -> Call:
        return Call(self.bridge, as_actor(scope("POST", path), ALICE), [REQUEST])

    async def noted(self, *entries: str) -> None:
        async with asyncio.timeout(WAIT_SECONDS):
            while self.journal != [*entries]:
                await asyncio.sleep(0)


OPENED = ("old history opened", "old toolbox opened")


@pytest.fixture
async def stage() -> AsyncIterator[Stage]:
    async with staged() as found:
        yield found


@asynccontextmanager
async def staged() -> AsyncIterator[Stage]:
    async with ScriptedProvider() as provider:
        found = Stage(provider)
        async with found.bridge:
            yield found


async def test_a_stream_under_way_ends_with_the_configuration_that_it_began_with(stage: Stage) -> None:
    gate = Gate()
    stage.provider.replies(Reply.stream([START, Wait(gate), STOP]), Reply.stream([START, STOP]))
    under_way = stage.ask()
    await under_way.started.wait()

    new = stage.named("other", api_key="new")
    await stage.bridge.reconfigure([new], injection=stage.injection("new"), limits=Limits())
    assert (await stage.ask().over()).status == 404
    assert (await stage.ask("/other/v1/messages").over()).body == START + STOP
    assert dict(stage.provider.requests[1].headers)[b"x-api-key"] == b"new"
    assert stage.journal == [*OPENED, "new history opened", "new toolbox opened"], "the old one is in use"

    gate.set()
    assert (await under_way.over()).body == START + STOP
    await stage.noted(*OPENED, "new history opened", "new toolbox opened", "old toolbox closed", "old history closed")
    assert [one.status for one in stage.recorder.ended] == ["completed", "completed"]


async def test_limits_are_replaced(stage: Stage) -> None:
    stage.provider.reply(Reply.stream([START, STOP]))
    await stage.bridge.reconfigure([stage.named("anthropic")], injection=None, limits=Limits(max_body_bytes=10))
    assert (await stage.ask().over()).status == 413
    await stage.bridge.reconfigure([stage.named("anthropic")], injection=None, limits=Limits())
    assert (await stage.ask().over()).status == 200


async def test_without_requests_the_old_parts_are_closed_at_once(stage: Stage) -> None:
    await stage.bridge.reconfigure([], injection=None, limits=Limits())
    await stage.noted(*OPENED, "old toolbox closed", "old history closed")


async def test_a_request_that_is_only_being_read_keeps_its_configuration(stage: Stage) -> None:
    stage.provider.reply(Reply.stream([START, STOP]))
    slow = stage.ask()
    body = slow._messages.get_nowait()
    async with asyncio.timeout(WAIT_SECONDS):
        while not stage.bridge._current._requests:
            await asyncio.sleep(0)
    await stage.bridge.reconfigure([], injection=None, limits=Limits(max_body_bytes=1))
    assert stage.journal == [*OPENED]
    slow._messages.put_nowait(body)
    assert (await slow.over()).body == START + STOP
    await stage.noted(*OPENED, "old toolbox closed", "old history closed")


async def test_a_request_is_refused_in_the_shape_of_the_provider_that_it_was_for(stage: Stage) -> None:
    """Also where there is no such provider any more when it turns out to be too large."""
    slow = stage.ask()
    slow._messages.get_nowait()
    async with asyncio.timeout(WAIT_SECONDS):
        while not stage.bridge._current._requests:
            await asyncio.sleep(0)
    await stage.bridge.reconfigure([], injection=None, limits=Limits())
    slow._messages.put_nowait({"type": "http.request", "body": bytes(MAX_BODY_BYTES + 1)})
    refused = await slow.over()
    assert (refused.status, json.loads(refused.body)["type"]) == (413, "error"), "OpenAI's have no type at the top"


async def test_parts_that_both_have_stay_open() -> None:
    async with staged() as stage:
        old = stage.injection("shared")
        await stage.bridge.reconfigure([], injection=old, limits=Limits())
        changed = Injection(old.toolbox, stage.injection("another").history, max_turns=1)
        await stage.bridge.reconfigure([], injection=changed, limits=Limits())
        shared = ["shared history opened", "shared toolbox opened", "another history opened"]
        gone = ["old toolbox closed", "old history closed", "shared history closed"]
        async with asyncio.timeout(WAIT_SECONDS):
            while len(stage.journal) < len([*OPENED, *shared, *gone]):
                await asyncio.sleep(0)
        assert sorted(stage.journal) == sorted([*OPENED, *shared, *gone])
    assert stage.journal[-2:] == ["shared toolbox closed", "another history closed"]


async def test_what_cannot_be_opened_changes_nothing(stage: Stage) -> None:
    stage.provider.reply(Reply.stream([START, STOP]))
    with pytest.raises(OSError, match="cannot be opened"):
        await stage.bridge.reconfigure([], injection=stage.injection("new", "opening"), limits=Limits(max_body_bytes=1))
    assert stage.journal == [*OPENED, "new history opened", "new history closed"]
    with pytest.raises(ValueError, match="two providers"):
        await stage.bridge.reconfigure([stage.named("a"), stage.named("a")], injection=None, limits=Limits())
    assert (await stage.ask().over()).status == 200


async def test_a_change_that_is_given_up_changes_nothing(stage: Stage) -> None:
    changing = asyncio.create_task(stage.bridge.reconfigure([], injection=stage.injection("new"), limits=Limits()))
    async with asyncio.timeout(WAIT_SECONDS):
        while "new history opened" not in stage.journal:
            await asyncio.sleep(0)
        changing.cancel()
        await asyncio.wait([changing])
    assert changing.cancelled()
    assert stage.journal == [*OPENED, "new history opened", "new history closed"]
    stage.provider.reply(Reply.stream([START, STOP]))
    assert (await stage.ask().over()).status == 200


async def test_what_cannot_be_closed_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async with staged() as stage:
        await stage.bridge.reconfigure([], injection=stage.injection("bad", "closing"), limits=Limits())
        await stage.bridge.reconfigure([], injection=None, limits=Limits())
        async with asyncio.timeout(WAIT_SECONDS):
            while "bad history closed" not in stage.journal:
                await asyncio.sleep(0)
    assert "could not be closed" in caplog.text


async def test_leaving_ends_all_generations() -> None:
    async with staged() as stage:
        replies = [Reply.stream([START, Wait(Gate())]) for _ in range(2)]
        stage.provider.replies(*replies)
        calls = [stage.ask()]
        await calls[0].started.wait()
        await stage.bridge.reconfigure([stage.named("new")], injection=stage.injection("new"), limits=Limits())
        calls.append(stage.ask("/new/v1/messages"))
        await calls[1].started.wait()
    for one in calls:
        await one.over()
    assert [one.status for one in stage.recorder.ended] == ["interrupted", "interrupted"]
    assert {entry for entry in stage.journal if entry.endswith("closed")} == {
        "old history closed", "old toolbox closed", "new history closed", "new toolbox closed",
    }  # fmt: skip
    assert len(stage.journal) == 8, "each once"
