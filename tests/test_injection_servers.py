"""Real MCP servers behind the whole gateway: whatever they do, the client gets a valid response in time (issue 3, part 3).

Truth: the servers, which are of the official SDKs (Python, TypeScript), fastmcp and mcp-server-time; the vendors' Python and
JavaScript SDKs as clients; wire.md B3, C2 and D4 for the forms of results. How a failure is worded is our choice. The
gateway is a process, and so is each server.
"""

import asyncio
import base64
import json
import re
import socket
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest

from tests.support.claude_code import node, why_not
from tests.support.conversations import member
from tests.support.gateway import Stage, staged
from tests.support.injected import Dialect, Json
from tests.support.injected_dialects import CHAT, DIALECTS, MESSAGES, each_dialect
from tests.support.injected_servers import (
    DONE,
    Model,
    calls,
    name_of,
    offered,
    play,
    play_in,
    result,
    toml,
    until_offered,
)
from tests.support.jssdk import JavaScript
from tests.support.mcp_servers import PIXEL, SECRET, SOUND, Process, command, everything, everything_server, server
from tests.support.provider import WAIT_SECONDS, Gate

# The servers and the gateway are started once: in one worker.
pytestmark = pytest.mark.xdist_group("mcp-servers")

NO_NODE: Final = why_not(node) or why_not(everything)
needs_node = pytest.mark.skipif(bool(NO_NODE), reason=NO_NODE)

WAYS: Final = ("modern", "legacy", "sse", "stdio")
"""The server on the SDK: at 2026-07-28, at what was before, over the SSE transport, and on standard streams."""

MORTAL: Final = ("mortal-modern", "mortal-legacy", "mortal-sse")
"""Such servers again, for tests that end them."""

LIMITS: Final[Mapping[str, Json]] = {
    "hasty": {"call_timeout": 1.5, "allow": ["^(add|never|slow|ask)$"]},
    "mortal": {"max_result_bytes": 1000},
    "crowd": {"max_concurrent_calls": 4},
    "every": {"call_timeout": 1.5},
}
"""By the first word of a server's name."""

PATIENT: Final[Json] = {"start_timeout": 30, "env": {"PYTHONPATH": str(Path(__file__).parent.parent)}}


def each_with_a_dialect(*ways: str) -> pytest.MarkDecorator:
    """The first way with every dialect, each other one with one of them: ways and dialects know nothing of each other."""
    pairs = [(ways[0], dialect) for dialect in DIALECTS]
    pairs += [(way, DIALECTS[number % 3]) for number, way in enumerate(ways[1:])]
    return pytest.mark.parametrize(("way", "dialect"), pairs, ids=str)


class World(NamedTuple):
    """A stage with all servers, and those of them that are processes of ours."""

    stage: Stage
    processes: Mapping[str, Process]


def options(way: str) -> tuple[str, ...]:
    """How the server of a way is run."""
    return ("sse",) if way.endswith("sse") else ("http", *(["legacy"] if way.endswith("legacy") else []))


def at(process: Process, **more: Any) -> Json:
    """Settings for a server over HTTP."""
    return {"url": process.url, **({"transport": "sse"} if process.url.endswith("/sse") else {}), **more}


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with ExitStack() as stack:
        kinds: dict[str, tuple[str, ...]] = {way: ("sdk", *options(way)) for way in (*WAYS[:3], *MORTAL)}
        kinds |= {"crowd-http": ("sdk", "http"), "changing": ("sdk", "http"), "fast-http": ("fastmcp", "http")}
        processes = {name: stack.enter_context(server(*kind)) for name, kind in kinds.items()}
        servers: dict[str, Json] = {f"hasty-{way}": at(processes[way]) for way in WAYS[:3]}
        for name in ("stdio", "hasty-stdio", "mortal-stdio", "crowd-stdio"):
            servers[name] = {"command": command("sdk"), **PATIENT}
        servers["fast-stdio"] = {"command": command("fastmcp"), **PATIENT}
        servers["time"] = {"command": [sys.executable, "-m", "mcp_server_time"], **PATIENT}
        if not NO_NODE:
            processes |= {f"every-{way}": stack.enter_context(everything_server(way)) for way in ("http", "sse")}
            servers["every-stdio"] = {"command": [str(node()), str(everything()), "stdio"], "start_timeout": 30}
        servers |= {name: at(process) for name, process in processes.items()}
        limited = {name: given | LIMITS.get(name.partition("-")[0], {}) for name, given in servers.items()}
        yield World(stack.enter_context(staged(toml(limited))), processes)


# --- what is answered -------------------------------------------------------------------------------------------------


@each_with_a_dialect(*WAYS)
async def test_every_kind_of_result(world: World, way: str, dialect: Dialect) -> None:
    """In one turn, so at once; each is told in the form that the protocol has for it."""
    add, fail = calls(way, "add", a=1, b=2), calls(way, "fail")
    empty, structured, media = calls(way, "empty"), calls(way, "structured"), calls(way, "media")
    again = calls(way, "add", a=3, b=4)
    played = await play(world.stage, dialect, (add, fail, empty, structured, media, again), stream=way != "legacy")
    assert played.succeeded(add, "3") and played.succeeded(again, "7")
    assert played.succeeded(empty, "(no output)") and played.succeeded(structured, '{"n":1}')
    assert played.results[fail.id] == result(dialect, "It went wrong.", failed=True)
    assert played.error(fail) == "It went wrong."
    assert played.results[media.id] == media_in(dialect)


def media_in(dialect: Dialect) -> Any:
    """What the server's tool `media` answers. Chat takes text only, and nobody takes sound (wire.md A4, B3, C2)."""
    kinds = "All kinds:", f"[audio: audio/wav, {len(base64.b64decode(SOUND))} bytes; not shown]", "A note."
    archive, link = (
        "[file file:///a.zip: application/zip, 4 bytes; not shown]",
        "Resource docs://manual (manual): How it works.",
    )
    if dialect is CHAT:
        picture = f"[image: image/png, {len(base64.b64decode(PIXEL))} bytes; not shown]"
        return "\n".join((kinds[0], picture, *kinds[1:], archive, link))
    if dialect is MESSAGES:
        source = {"type": "base64", "media_type": "image/png", "data": PIXEL}
        texts = [{"type": "text", "text": words} for words in (*kinds, archive, link)]
        return [texts[0], {"type": "image", "source": source}, *texts[1:]], False
    texts = [{"type": "input_text", "text": words} for words in (*kinds, archive, link)]
    return [texts[0], {"type": "input_image", "image_url": f"data:image/png;base64,{PIXEL}"}, *texts[1:]]


@each_dialect
async def test_names_that_no_provider_takes(world: World, dialect: Dialect) -> None:
    """They are offered under others, each its own, and called by their own (clients.md 6)."""
    own = ["odd.name/with:chars", "odd_name/with:chars", "long" + "-and-longer" * 8]
    tools = await offered(world.stage, dialect)
    of_server = [tool for tool in tools if name_of(tool).startswith("bmcp_modern_")]
    about = {tool.get("function", tool)["description"]: name_of(tool) for tool in of_server}
    made = [calls("modern", about[f"The tool {name}."].removeprefix("bmcp_modern_")) for name in own]
    played = await play(world.stage, dialect, made)
    assert all(played.succeeded(call, f"called {name}") for call, name in zip(made, own, strict=True))
    assert {row["tool"] for row in played.rows.tool_usages} == {*own}


@each_with_a_dialect("http", "stdio")
async def test_a_server_on_fastmcp(world: World, way: str, dialect: Dialect) -> None:
    fast = f"fast-{way}"
    add, cities, fail = calls(fast, "add", a=1, b=2), calls(fast, "cities"), calls(fast, "fail")
    weather, picture = calls(fast, "weather", city="Bern"), calls(fast, "picture")
    played = await play(world.stage, dialect, (add, cities), (fail, weather, picture))
    assert played.succeeded(add, "3") and played.succeeded(cities, '["Bern","Oslo"]')
    assert played.succeeded(weather, '{"city":"Bern","degrees":21}')
    assert "It went wrong." in played.error(fail)
    assert has_picture(dialect, played.results[picture.id])


def has_picture(dialect: Dialect, told: Any) -> bool:
    if dialect is CHAT:
        return re.search(r"\[image: image/png, \d+ bytes; not shown\]", told) is not None
    parts = told[0] if dialect is MESSAGES else told
    return {"image", "input_image"} & {part["type"] for part in parts} != set()


@each_dialect
async def test_the_time_server(world: World, dialect: Dialect) -> None:
    there = calls("time", "convert_time", time="10:00", source_timezone="UTC", target_timezone="Asia/Tokyo")
    lacking = calls("time", "get_current_time")
    played = await play(world.stage, dialect, (there, lacking))
    assert "+9.0h" in json.dumps(played.results[there.id])
    assert played.error(lacking)


@needs_node
@each_with_a_dialect("http", "sse", "stdio")
async def test_the_reference_server(world: World, way: str, dialect: Dialect) -> None:
    every = f"every-{way}"
    echo, adds, wrong = calls(every, "echo", message="hi"), calls(every, "get-sum", a=1, b=2), calls(every, "get-sum", a="x")
    picture, structured = calls(every, "get-tiny-image"), calls(every, "get-structured-content", location="Chicago")
    links = calls(every, "get-resource-links", count=2)
    blob = calls(every, "get-resource-reference", resourceType="Blob", resourceId=1)
    played = await play(world.stage, dialect, (echo, adds, wrong, picture), (structured, links, blob), stream=way != "sse")
    assert played.succeeded(echo, "Echo: hi") and played.succeeded(adds, "The sum of 1 and 2 is 3.")
    assert "Invalid" in played.error(wrong)
    assert has_picture(dialect, played.results[picture.id])
    assert '\\"humidity\\"' in json.dumps(played.results[structured.id])
    assert json.dumps(played.results[links.id]).count("Resource demo:/") == 2
    assert "not shown" in json.dumps(played.results[blob.id])


@each_dialect
async def test_a_client_in_javascript(world: World, dialect: Dialect, js: JavaScript) -> None:
    add, fail = calls("modern", "add", a=1, b=2), calls("stdio", "fail")
    with world.stage.scene() as scene:
        for stream in (True, False):
            scene.handler = model = Model(dialect, [(add,), (fail,)])
            base = scene.gateway.anthropic if dialect is MESSAGES else scene.gateway.openai
            seen = dialect.seen(await js.ask(dialect.format, base, stream=stream, headers=scene.headers))
            assert (seen.id, seen.said, seen.stop) == (dialect.id_of(1), (("text", DONE),), "end")
            assert model.results[add.id] == result(dialect, "3")
            assert model.results[fail.id] == result(dialect, "It went wrong.", failed=True)


# --- what goes wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
async def test_tools_that_take_too_long(world: World, way: str) -> None:
    """None of them takes more than its time, none harms another, and the server goes on."""
    hasty = f"hasty-{way}"

    async def check(dialect: Dialect) -> None:
        never, slow, asks = calls(hasty, "never"), calls(hasty, "slow", seconds=60), calls(hasty, "ask")
        add, after = calls(hasty, "add", a=1, b=2), calls(hasty, "add", a=3, b=4)
        played = await play(world.stage, dialect, (never, slow, asks, add), (after,), stream=way != "sse")
        assert 1.5 <= played.seconds < 10
        for call in (never, slow):
            assert played.error(call).startswith(f"The MCP server '{hasty}' did not answer within 1.5 s.")
        assert played.error(asks)
        assert played.succeeded(add, "3") and played.succeeded(after, "7")

    await asyncio.gather(*map(check, DIALECTS))


@each_with_a_dialect(*MORTAL, "mortal-stdio")
async def test_results_that_are_huge(world: World, way: str, dialect: Dialect) -> None:
    """What is too large is cut, and not even read where it is far too large."""
    long, huge = calls(way, "big", size=5000), calls(way, "big", size=2_000_000)
    other, after = calls("modern", "add", a=1, b=2), calls(way, "add", a=3, b=4)
    played = await play(world.stage, dialect, (long,), (huge, other), (after,))
    assert played.seconds < 10
    assert played.succeeded(long, "x" * 1000 + "\n[cut: 5000 bytes, of which 1000 are here]")
    assert "x" * 1000 not in played.error(huge)
    assert played.succeeded(other, "3") and played.succeeded(after, "7")


@needs_node
@pytest.mark.parametrize("way", ["http", "sse", "stdio"])
async def test_the_reference_server_is_slow(world: World, way: str) -> None:
    """It never answers a call that was cancelled (clients.md 6)."""
    every = f"every-{way}"
    late = calls(every, "trigger-long-running-operation", duration=60, steps=60)
    echo, after = calls(every, "echo", message="hi"), calls(every, "echo", message="still there")
    played = await play(world.stage, MESSAGES, (late, echo), (after,))
    assert played.seconds < 10
    assert "did not answer within 1.5 s" in played.error(late)
    assert played.succeeded(echo, "Echo: hi") and played.succeeded(after, "Echo: still there")


@each_with_a_dialect(*MORTAL, "mortal-stdio")
async def test_a_server_that_dies_in_a_call(world: World, way: str, dialect: Dialect) -> None:
    """The call is not made again, for it may have been run. Another server's goes on; later the server is back."""
    die, other, gone = calls(way, "die"), calls("modern", "add", a=1, b=2), calls(way, "add", a=3, b=4)
    back = calls(way, "add", a=5, b=6)
    restart: Callable[[], object] = world.processes[way].restart if way in world.processes else lambda: None
    played = await play(world.stage, dialect, (die, other), (gone,), (back,), before={2: restart})
    assert played.seconds < 10
    assert "the connection was lost" in played.error(die) or "failed the call" in played.error(die)
    assert played.succeeded(other, "3") and played.succeeded(back, "11")
    if way == "mortal-stdio":  # it is the gateway that starts it again
        assert played.succeeded(gone, "7")
    else:  # its address refuses, or what was open to it was not closed yet
        assert "cannot be reached" in played.error(gone) or "connection was lost" in played.error(gone)


@each_with_a_dialect(*MORTAL)
async def test_a_server_that_forgets_its_sessions(world: World, way: str, dialect: Dialect) -> None:
    """Nobody notices a restart between two hops: the server says 404 (clients.md 6), or a stream ends."""
    first, second = calls(way, "add", a=1, b=2), calls(way, "add", a=3, b=4)
    played = await play(world.stage, dialect, (first,), (second,), before={1: world.processes[way].restart})
    assert played.succeeded(first, "3") and played.succeeded(second, "7")


@needs_node
async def test_the_reference_server_forgets_its_sessions(world: World) -> None:
    """It says so with a 400 (clients.md 6)."""
    first, second = calls("every-http", "echo", message="one"), calls("every-http", "echo", message="two")
    played = await play(world.stage, MESSAGES, (first,), (second,), before={1: world.processes["every-http"].restart})
    assert played.succeeded(first, "Echo: one") and played.succeeded(second, "Echo: two")


async def test_a_tool_that_disappears(world: World) -> None:
    """Whoever was offered it may call it, and is told; new conversations are offered what there is then."""
    seen, changed = [Gate() for _ in range(3)], Gate()
    gone = [calls("changing", "disappearing") for _ in DIALECTS]
    adds = [calls("changing", "add", a=1, b=2) for _ in DIALECTS]

    def waiting(number: int) -> Callable[[], None]:
        def wait() -> None:
            seen[number].set()
            changed.wait_blocking()

        return wait

    running = [
        asyncio.create_task(play(world.stage, dialect, (gone[number], adds[number]), before={0: waiting(number)}))
        for number, dialect in enumerate(DIALECTS)
    ]
    for gate in seen:
        await gate.wait()
    change = calls("changing", "change")
    assert (await play(world.stage, MESSAGES, (change,))).succeeded(change, "changed")
    await until_offered(world.stage, MESSAGES, "bmcp_changing_appearing")
    changed.set()
    for played, call, add in zip(await asyncio.gather(*running), gone, adds, strict=True):
        assert played.error(call) == "The MCP server 'changing' has no tool 'disappearing' any more."
        assert played.succeeded(add, "3")
    names = [name_of(tool) for tool in await offered(world.stage, CHAT)]
    assert "bmcp_changing_appearing" in names and "bmcp_changing_disappearing" not in names


# --- many clients -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("crowd", ["crowd-http", "crowd-stdio"])
async def test_thirty_clients_at_once(world: World, crowd: str) -> None:
    """The server runs four calls at once, as configured, and never more."""
    dialects = [DIALECTS[number % 3] for number in range(30)]
    slow = [calls(crowd, "slow", seconds=0.05) for _ in dialects]
    adds = [calls(crowd, "add", a=number, b=1) for number in range(30)]
    everybody = (
        play(world.stage, dialect, (slow[number], adds[number]), stream=number % 2 == 0)
        for number, dialect in enumerate(dialects)
    )
    for number, played in enumerate(await asyncio.gather(*everybody)):
        assert played.succeeded(slow[number], "done") and played.succeeded(adds[number], str(number + 1))
    running = calls(crowd, "running")
    assert (await play(world.stage, MESSAGES, (running,))).succeeded(running, "0 4")


@each_dialect
async def test_a_client_that_leaves(world: World, dialect: Dialect) -> None:
    """What runs for it ends at the server, and the ledger has it."""

    async def until_running(count: int) -> None:
        async with asyncio.timeout(WAIT_SECONDS):
            while True:
                played = await play(world.stage, dialect, (running := calls("crowd-http", "running"),))
                if re.search(rf"\b{count} \d", json.dumps(played.results[running.id])):
                    return

    never = calls("crowd-http", "never")
    with world.stage.scene() as scene:
        scene.handler = Model(dialect, [(never,)])
        async with scene.client() as client:
            await client.send("POST", dialect.path, scene.lines(), dialect.request())
            await until_running(1)
        rows = await asyncio.to_thread(scene.ended)
        assert rows.interception["status"] == "client_disconnected"
        (row,) = rows.tool_usages
        assert row["tool_call_id"] == never.id and "cancelled" in row["invocation_error"]
        assert len(scene.exchanges) == 1
    await until_running(0)


# --- servers that are not there ---------------------------------------------------------------------------------------


async def test_servers_that_are_down_at_the_start() -> None:
    """Each in a way of its own. When `start_timeout` is over the gateway serves without them, and has said why."""
    with ExitStack() as stack:
        silent = stack.enter_context(closing(socket.create_server(("127.0.0.1", 0))))
        nowhere = f"http://127.0.0.1:{silent.getsockname()[1]}"
        good = stack.enter_context(server("sdk", "http"))
        servers: Mapping[str, Json] = {
            "good": at(good),
            "silent": {"url": f"{nowhere}/mcp", "start_timeout": 0.5},
            "silent-sse": {"url": f"{nowhere}/sse", "transport": "sse", "start_timeout": 0.5},
            "silent-stdio": {"command": ["sleep", "600"], "start_timeout": 0.5},
            "refusing": {"url": "{refused}/mcp"},
            "elsewhere": {"url": good.url + "x"},
            "unknown": {"command": ["no-such-program"]},
            "exits": {"command": ["sh", "-c", "echo 'No module named x' >&2; exit 1"]},
            "odd": {"command": command("raw", "broken")},
        }
        begun = time.monotonic()
        stage = stack.enter_context(staged(toml(servers)))
        assert time.monotonic() - begun < WAIT_SECONDS
        for dialect in DIALECTS:
            add = calls("good", "add", a=1, b=2)
            assert (await play(stage, dialect, (add,))).succeeded(add, "3")
        names = [name_of(tool) for tool in await offered(stage, MESSAGES)]
        assert {name.split("_")[1] for name in names} == {"good"}
        said = stage.gateway.output
        for name, why in {
            "refusing": "it cannot be reached",
            "elsewhere": "HTTP 404",
            "unknown": "the program was not found",
            "exits": "it has exited with status 1 (it said: No module named x)",
            "odd": "its list of tools does not hold to MCP",
        }.items():
            assert re.search(rf"MCP server {name}: not connected: {re.escape(why)}", said)
        begun = time.monotonic()
        stage.gateway.stop()
        assert time.monotonic() - begun < WAIT_SECONDS


async def test_a_server_that_comes_up_later(world: World) -> None:
    """A conversation that knows its tools may call them at once; others are offered them as soon as it is there."""
    with ExitStack() as stack:
        late = stack.enter_context(server("sdk", "http"))
        servers = {"late": at(late, start_timeout=1.0), "good": at(world.processes["modern"])}
        stage = stack.enter_context(staged(toml(servers)))
        scenes = [(dialect, stack.enter_context(stage.scene())) for dialect in DIALECTS]
        for dialect, scene in scenes:
            before = calls("late", "add", a=1, b=2)
            assert (await play_in(scene, dialect, [(before,)])).succeeded(before, "3")

        await asyncio.to_thread(late.kill)
        await asyncio.to_thread(stage.gateway.stop)
        await asyncio.to_thread(stage.gateway.start)
        assert not any("_late_" in name_of(tool) for tool in await offered(stage, MESSAGES))
        for dialect, scene in scenes:
            said = [{"role": "user", "content": f"I ask in {scene.tag}."}, {"role": "assistant", "content": DONE}]
            away, good = calls("late", "add", a=3, b=4), calls("good", "add", a=5, b=6)
            back = calls("late", "add", a=7, b=8)
            played = await play_in(scene, dialect, [(away, good), (back,)], history=said, before={1: late.restart})
            assert len({member(received.body, "tools") for received in scene.requests}) == 1
            assert "it cannot be reached" in played.error(away)
            assert played.succeeded(good, "11") and played.succeeded(back, "15")
            await until_offered(stage, dialect, "bmcp_late_add")
            await asyncio.to_thread(late.kill)


async def test_the_time_of_a_request_is_bounded(world: World) -> None:
    """Whatever the servers' own limits: at `max_seconds` calls are given up, and the model answers without."""
    servers = {"modern": at(world.processes["modern"]), "sse": at(world.processes["sse"])}
    with staged(toml(servers, max_seconds=1.5, keep_alive_seconds=0.2)) as stage:

        async def check(dialect: Dialect, *, stream: bool) -> None:
            never, slow, add = calls("modern", "never"), calls("sse", "slow", seconds=60), calls("sse", "add", a=1, b=2)
            with stage.scene() as scene:
                played = await play_in(scene, dialect, [(never, slow, add)], stream=stream)
                assert 1.5 <= played.seconds < 10
                assert played.succeeded(add, "3")
                assert "time for tools" in played.error(never) and "time for tools" in played.error(slow)
                assert dialect.choice(scene.requests[-1].body) == dialect.choices["none"]

        await asyncio.gather(*(check(dialect, stream=stream) for dialect in DIALECTS for stream in (True, False)))


# --- secrets ----------------------------------------------------------------------------------------------------------

TOLD: Final = "the-other-secret-8c1f"


@contextmanager
def guarded() -> Iterator[tuple[Stage, Process]]:
    """A stage with a server that wants a secret in all places where one can be, one that is told another, and a command."""
    with server("sdk", "http", "guarded") as process:
        url = process.url.replace("http://", f"http://me:{SECRET}@") + f"?key={SECRET}"
        wrong = process.url.replace("http://", f"http://me:{TOLD}@") + f"?key={TOLD}"
        configuration = f"""
            [mcp.servers.guarded]
            url = "{url}"
            headers = {{ X-API-Key = {{ env = "THE_KEY" }} }}
            [mcp.servers.refused]
            url = "{wrong}"
            headers = {{ Authorization = "Bearer {TOLD}" }}
            [mcp.servers.local]
            command = {json.dumps(command("sdk"))}
            env.TOKEN = {{ env = "THE_KEY" }}
            env.PYTHONPATH = {json.dumps(PATIENT["env"]["PYTHONPATH"])}
            start_timeout = 30
        """
        with staged(configuration, env={"THE_KEY": SECRET}) as stage:
            yield stage, process


async def test_secrets_of_servers_reach_nobody_else() -> None:
    """Not when all is well, and not when it is not: no log, no record, no metric, no provider."""
    with guarded() as (stage, process):
        places: dict[str, bytes] = {}
        for dialect in DIALECTS:
            first, second = calls("guarded", "add", a=1, b=2), calls("local", "add", a=3, b=4)
            away, environment = calls("guarded", "add", a=5, b=6), calls("local", "environment")
            with stage.scene() as scene:
                played = await play_in(scene, dialect, [(first, second), (away, environment)], before={1: process.kill})
            assert played.succeeded(first, "3") and played.succeeded(second, "7")
            assert played.error(away)
            assert "TOKEN" in json.dumps(played.results[environment.id])
            urls = {row["server_url"] for row in played.rows.tool_usages if row["metadata"]["server"] == "guarded"}
            assert urls == {process.url}
            for number, received in enumerate(scene.requests):
                places[f"{dialect} {number}"] = b"\n".join(
                    (received.target.encode(), *chain(*received.headers), received.body)
                )
            await asyncio.to_thread(process.start)
        dies = calls("local", "die")
        assert (await play(stage, MESSAGES, (dies,))).error(dies)
        assert "MCP server refused: not connected: HTTP 401" in stage.gateway.output
        with urllib.request.urlopen(f"{stage.gateway.url}/metrics", timeout=WAIT_SECONDS) as response:
            places["metrics"] = response.read()
        assert re.search(rb'injected_tool_invocations_total{[^}]*server="guarded"', places["metrics"])
        assert "HTTP Request" not in stage.gateway.output  # nor what the SDK would say of sessions
        places |= {"log": stage.gateway.output.encode(), "ledger": stage.gateway.dump()}
        for secret in (SECRET, TOLD, base64.b64encode(f"me:{SECRET}".encode()).decode()):
            assert [name for name, text in places.items() if secret.encode() in text] == []
