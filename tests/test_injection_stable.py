"""The same request, however often it is made: the provider gets the same bytes. Without servers it gets the client's.

Truth: issue 3, parts 5 and 6; wire.md A5 and A6 for what a byte costs. The servers list in random order, in pages, with the
keys of their schemas shuffled, and are restarted while requests go on; the gateways are processes.
"""

import asyncio
import json
import random
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

import pytest

from tests.support.conversations import elements, marks, member
from tests.support.gateway import SESSION_HEADER, Scene, Stage, staged
from tests.support.injected import Calls, Dialect, Json, Says, turn
from tests.support.injected_dialects import DIALECTS, MESSAGES, both_ways, each_dialect
from tests.support.injected_servers import DONE, name_of, reply, results_in, toml
from tests.support.mcp_servers import Process, command, server
from tests.support.provider import Received, Reply
from tests.support.rawclient import Answer

ROUNDS: Final = 10
AT_ONCE: Final = 10
"""A hundred times, for each protocol."""

CALL: Final = Calls("call_0a1b2c3d4e5f", "bmcp_local_add", '{"a":  1, "b":2}')
AND_THEN: Final = "And then?"
MARK: Final = {"cache_control": {"type": "ephemeral"}}


class Model:
    """Plays the provider: calls a tool, and with the result at hand is done. It says the same each time."""

    def __init__(self, dialect: Dialect) -> None:
        self._dialect = dialect

    def __call__(self, received: Received) -> Reply:
        asked = received.json()
        said = turn(2, Says(DONE)) if results_in(self._dialect, asked) else turn(1, CALL)
        return reply(self._dialect, said, asked)


def first_request(dialect: Dialect) -> bytes:
    """A question of a client that marks what may be cached, and has tools, one of them under a name of ours."""
    tools = [dialect.tool("mine", "Müsli."), dialect.tool("bmcp_modern_add", "My own.")]
    asked = json.loads(dialect.request()) | {"tools": tools}
    if dialect is MESSAGES:
        words = [{"type": "text", "text": "What is it?"} | MARK]
        marked = {"messages": [{"role": "user", "content": words}], "tools": [tools[0], tools[1] | MARK]}
        asked |= marked | {"system": [{"type": "text", "text": "You help."} | MARK]}
    return json.dumps(asked, ensure_ascii=False).encode()


def next_request(dialect: Dialect) -> bytes:
    """The client goes on with what it was shown of the answer. What it was not shown is put back."""
    asked = json.loads(first_request(dialect))
    asked[dialect.array] += [{"role": "assistant", "content": DONE}, {"role": "user", "content": AND_THEN}]
    return json.dumps(asked, indent=1).encode()


def told_apart(requests: list[Received]) -> dict[str, set[Any]]:
    """What a provider got, each thing once: first requests, those with the result, and those that go on."""
    found: dict[str, set[Any]] = {"first": set(), "with the result": set(), "next": set()}
    for received in requests:
        later = "next" if AND_THEN.encode() in received.body else "with the result"
        kind = later if CALL.id.encode() in received.body else "first"
        found[kind].add((received.method, received.target, received.headers, received.body))
    return found


@contextmanager
def servers() -> Iterator[tuple[dict[str, Process], dict[str, Json]]]:
    """Servers that are processes of ours, and settings for those and for more, which the gateway starts."""
    with ExitStack() as stack:
        kinds = {"modern": ("sdk", "http"), "legacy": ("sdk", "http", "legacy"), "sse": ("sdk", "sse")}
        kinds["fast"] = ("fastmcp", "http")
        processes = {name: stack.enter_context(server(*kind)) for name, kind in kinds.items()}
        often: Json = {"refresh_seconds": 0.05, "start_timeout": 30}
        settings: dict[str, Json] = {name: {"url": process.url, **often} for name, process in processes.items()}
        settings["sse"]["transport"] = "sse"
        env = {"PYTHONPATH": str(Path(__file__).parent.parent)}
        settings["local"] = {"command": command("sdk"), "env": env, **often}
        yield processes, settings


@contextmanager
def staging(settings: Mapping[str, Json]) -> Iterator[tuple[Stage, dict[Dialect, Scene]]]:
    """A gateway with servers, written down in any order, and a scene for each protocol."""
    with ExitStack() as stack:
        stage = stack.enter_context(staged(toml(dict(random.sample(sorted(settings.items()), len(settings))))))
        scenes = {dialect: stack.enter_context(stage.scene()) for dialect in DIALECTS}
        for dialect, scene in scenes.items():
            scene.handler = Model(dialect)
        yield stage, scenes


async def ask(scenes: Mapping[Dialect, Scene], times: int) -> None:
    """So many first requests of each protocol, all at once, and then one that goes on."""

    async def check(scene: Scene, dialect: Dialect, body: bytes) -> None:
        answer = await scene.post(dialect.path, body)
        assert (answer.head.status, answer.complete) == (200, True)

    first = [(scene, dialect, first_request(dialect)) for dialect, scene in scenes.items()]
    await asyncio.gather(*(check(*one) for one in first * times))
    await asyncio.gather(*(check(scene, dialect, next_request(dialect)) for dialect, scene in scenes.items()))


async def test_the_same_request_a_hundred_times() -> None:
    """A server is restarted in each round, the gateway is killed once. Another one, with no database yet, does the same."""
    with servers() as (processes, settings):
        with staging(settings) as (stage, scenes):
            gateway = stage.gateway
            for number in range(ROUNDS):
                if number == ROUNDS // 2:
                    gateway.kill()
                    await asyncio.to_thread(gateway.start)
                process = [*processes.values()][number % len(processes)]
                await asyncio.gather(asyncio.to_thread(process.restart), ask(scenes, AT_ONCE))
            found = {dialect: told_apart(scene.requests) for dialect, scene in scenes.items()}
        with staging(settings) as (_, others):
            await ask(others, 1)
            elsewhere = {dialect: told_apart(scene.requests) for dialect, scene in others.items()}
    for dialect, scene in scenes.items():
        assert len(scene.requests) == ROUNDS * (2 * AT_ONCE + 1)
        for kind, requests in found[dialect].items():
            assert len(requests) == 1, kind
            ((*_, there),) = requests
            ((*_, body),) = elsewhere[dialect][kind]
            assert body == there
        check_tools(dialect, *(body for requests in found[dialect].values() for *_, body in requests))


def check_tools(dialect: Dialect, first: bytes, second: bytes, later: bytes) -> None:
    """All servers' tools are there, behind the client's, which are as they were; so are its marks (wire.md A5)."""
    asked = first_request(dialect)
    own = elements(member(asked, "tools"))
    tools = elements(member(first, "tools"))
    assert tools[: len(own)] == own
    names = [name_of(json.loads(tool)) for tool in tools[len(own) :]]
    assert len(names) == len({*names})
    of = [name.split("_")[1] for name in names]
    assert of == sorted(of) and {*of} == {"fast", "legacy", "local", "modern", "sse"}
    assert "bmcp_modern_add" not in names and "bmcp_modern_add_2" in names
    assert sum(name.startswith("bmcp_modern_odd_name_with_chars_") for name in names) == 2
    assert member(second, "tools") == member(first, "tools")
    assert json.loads(member(later, "tools")) == json.loads(member(first, "tools"))
    assert {marks(body) for body in (first, second, later)} == {marks(asked)} == {3 if dialect is MESSAGES else 0}


# --- without servers --------------------------------------------------------------------------------------------------


TELLS_IMPORTS: Final = {"PYTHONPROFILEIMPORTTIME": "1"}


@pytest.fixture(scope="module")
def stages() -> Iterator[tuple[Stage, Stage]]:
    """A gateway whose configuration says nothing of MCP, and one with rules, but no servers."""
    rules = 'max_turns = 3\nusage = "last"\nkeep_alive_seconds = 0.01\nskip_models = ["x"]\n'
    with (
        staged("", TELLS_IMPORTS) as absent,
        staged(f"[mcp]\n{rules}[mcp.servers]\n", TELLS_IMPORTS) as empty,
    ):
        yield absent, empty


async def relayed(stage: Stage, dialect: Dialect, *, stream: bool) -> tuple[Received, Answer]:
    """What a provider and a client get of a request with odd spaces and of its answer."""
    asked = json.loads(dialect.asking(stream=stream)) | {"tools": [dialect.tool("mine", "Müsli.")]}
    said = turn(1, Says("Look"), Calls("call_1a2b3c4d5e6f", "mine", '{"a":  1}'))
    with stage.scene() as scene:
        scene.reply(reply(dialect, said, asked))
        body = json.dumps(asked, indent=3, ensure_ascii=False).encode()
        answer = await scene.post(
            dialect.path, body, [("Accept-Encoding", "br"), ("X-Odd", "é"), ("authorization", "Bearer k")]
        )
        (received,) = scene.requests
    sent = b"".join(dialect.events(said, asked)) if stream else dialect.body(said, asked)
    assert (received.body, answer.body, answer.complete) == (body, sent, True)
    return received, answer


@both_ways
@each_dialect
async def test_without_servers_nothing_is_changed(stages: tuple[Stage, Stage], dialect: Dialect, stream: bool) -> None:
    """Body and head, on both sides, byte for byte: the same with rules for no servers, and with nothing said of MCP."""
    (received, answer), (again, other) = [await relayed(stage, dialect, stream=stream) for stage in stages]
    assert (received.method, received.target) == (again.method, again.target)
    assert without_places(received) == without_places(again)
    assert answer == other


def without_places(received: Received) -> list[tuple[bytes, bytes]]:
    """The head, without which provider and which scene it was."""
    places = {b"host", SESSION_HEADER.encode()}
    return [(name, b"" if name.lower() in places else value) for name, value in received.headers]


SDK: Final = {"mcp", "mcp_types", "aibridge.mcp.proxy"}


def imported(stage: Stage) -> set[str]:
    """What a running gateway has imported: Python says it in its output, when it is asked to."""
    lines = stage.gateway.output.splitlines()
    return {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")}


async def test_the_sdk_of_mcp_is_loaded_only_for_servers(stages: tuple[Stage, Stage]) -> None:
    """It takes most of a second, and memory."""
    for stage in stages:
        for dialect in DIALECTS:
            await relayed(stage, dialect, stream=True)
        assert "aibridge.server" in imported(stage) and not SDK & imported(stage)
    servers = {"raw": {"command": command("raw", "odd"), "start_timeout": 30}}
    with staged(toml(servers), TELLS_IMPORTS) as stage:
        assert imported(stage) >= SDK
