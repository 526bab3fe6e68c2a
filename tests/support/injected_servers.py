"""A gateway with real MCP servers, between the vendors' Python SDKs and a provider that calls the servers' tools.

- A *Model* plays the provider: it calls tools by the names that it is offered, hop by hop, and then says that it is done.
- ``play`` has one client ask one question, and judges what must hold whatever becomes of the calls: the client gets a whole
  response with nothing of the calls in it, the provider gets one result for each, the ledger has a row for each.
"""

import asyncio
import json
import re
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from .gateway import Rows, Scene, Stage
from .injected import Calls, Dialect, Json, Says, Seen, Turn, turn
from .provider import Received, Reply
from .sdks import anthropic_client, openai_client

DONE: Final = "I am done."
PATIENCE: Final = 20.0
"""Seconds within which a client has its response in any case: no clock of ours is that slow."""

SUMS: Final = [sys.executable, str(Path(__file__).with_name("sums_server.py"))]
"""The command of a server that does sums."""

_SLOW: Final = """
import os, pathlib, runpy, time
here = pathlib.Path({folder!r})
(here / f"started-{{os.getpid()}}").touch()
while not (here / "go").exists():
    time.sleep(0.01)
runpy.run_path({sums!r}, run_name="__main__")
"""


def slow_sums(folder: Path) -> list[str]:
    """The command of one that makes a file ``started-PID`` in a folder, and goes on when there is a file ``go``."""
    return [sys.executable, "-c", _SLOW.format(folder=str(folder), sums=SUMS[1])]


_NAME: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")

Hop = Sequence[Calls]
Event = Callable[[], object]


def toml(servers: Mapping[str, Mapping[str, Any]], **rules: Any) -> str:
    """A configuration with MCP servers, and with rules of ``[mcp]``."""
    sections = {"mcp": rules} | {f"mcp.servers.{name}": values for name, values in servers.items()}
    return "\n".join(
        f"[{section}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in _flat(values))
        for section, values in sections.items()
    )


def _flat(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Values that TOML writes as JSON does: tables are none."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from ((f"{key}.{name}", inner) for name, inner in value.items())
        else:
            yield key, value


def calls(server: str, tool: str, **arguments: Any) -> Calls:
    """A call of a tool whose name needs no change."""
    return Calls(f"call_{uuid.uuid4().hex}", f"bmcp_{server}_{tool}", json.dumps(arguments))


def name_of(tool: Json) -> str:
    """The name of a tool as a request offers it."""
    found: str = tool.get("function", tool)["name"]
    return found


class Model:
    """Plays the provider in a dialect. `before` are events that happen before a hop is said: before the first of them, 0."""

    def __init__(self, dialect: Dialect, hops: Iterable[Hop], before: Mapping[int, Event] | None = None) -> None:
        self.dialect = dialect
        self.results: dict[str, Any] = {}
        """What came of calls, by their ids, in the protocol's own form: see `result`."""
        said = [*(turn(number, *hop) for number, hop in enumerate(hops, 1))]
        self._turns = [*said, turn(len(said) + 1, Says(DONE))]
        self._before = before or {}
        self._asked = 0

    async def __call__(self, received: Received) -> Reply:
        asked = received.json()
        said = self._turns[self._asked]
        offered = [name_of(tool) for tool in asked["tools"]]
        assert len(offered) == len(set(offered)) and all(map(_NAME.fullmatch, offered)), offered
        assert {call.tool for call in said.calls} <= {*offered}, f"{said.calls} are not among {offered}"
        if self._asked:
            self._take_in(asked, self._turns[self._asked - 1])
        if self._asked in self._before:
            await asyncio.to_thread(self._before[self._asked])
        self._asked += 1
        return reply(self.dialect, said, asked)

    def _take_in(self, asked: Json, before: Turn) -> None:
        """Each call of the turn before is answered once, in its order (wire.md D4)."""
        found = results_in(self.dialect, asked)[-len(before.calls) :]
        assert [call_id for call_id, _ in found] == [call.id for call in before.calls]
        self.results.update(found)


def reply(dialect: Dialect, said: Turn, asked: Json) -> Reply:
    """A turn as a response, a stream where one is asked for."""
    if asked.get("stream"):
        return Reply.stream(list(dialect.events(said, asked)))
    return Reply.json(dialect.body(said, asked))


def results_in(dialect: Dialect, asked: Json) -> list[tuple[str, Any]]:
    """The results in a request, in their order, in the form of `result`."""
    found: list[tuple[str, Any]] = []
    for entry in asked[dialect.array]:
        if dialect.format == "messages":
            blocks = entry["content"] if isinstance(entry["content"], list) else []
            results = [block for block in blocks if block["type"] == "tool_result"]
            found += [(one["tool_use_id"], (one["content"], one.get("is_error", False))) for one in results]
        elif dialect.format == "chat" and entry["role"] == "tool":
            found.append((entry["tool_call_id"], entry["content"]))
        elif dialect.format == "responses" and entry.get("type") == "function_call_output":
            found.append((entry["call_id"], entry["output"]))
    return found


def result(dialect: Dialect, words: str, *, failed: bool = False) -> Any:
    """A result that is text, as a request has it: only Messages can say that it is a failure (wire.md D4)."""
    if dialect.format == "messages":
        return [{"type": "text", "text": words}], failed
    return f"Error: {words}" if failed and dialect.format == "chat" else words


@dataclass(frozen=True, slots=True)
class Played:
    """What became of a question. `results` are what the provider got, by call id; `rows` are all of the scene."""

    dialect: Dialect
    seen: Seen
    results: Mapping[str, Any]
    rows: Rows
    seconds: float

    def error(self, call: Calls) -> str:
        """Why a call failed: what the ledger has. The model was told the same, and more at most."""
        (row,) = (row for row in self.rows.tool_usages if row["tool_call_id"] == call.id)
        error: str = row["invocation_error"]
        assert error
        assert json.dumps(error)[1:-1] in json.dumps(self.results[call.id])
        if self.dialect.format == "messages":
            assert self.results[call.id][1] is True
        return error

    def succeeded(self, call: Calls, words: str) -> bool:
        """Whether it did, with these words for a result and no error in the ledger."""
        (row,) = (row for row in self.rows.tool_usages if row["tool_call_id"] == call.id)
        return row["invocation_error"] is None and self.results[call.id] == result(self.dialect, words)


async def play(
    stage: Stage, dialect: Dialect, *hops: Hop, stream: bool = True, before: Mapping[int, Event] | None = None
) -> Played:
    """A question of one client of its own, until it is answered."""
    with stage.scene() as scene:
        return await play_in(scene, dialect, hops, stream=stream, before=before)


async def play_in(
    scene: Scene,
    dialect: Dialect,
    hops: Iterable[Hop],
    *,
    stream: bool = True,
    history: Sequence[Json] = (),
    before: Mapping[int, Event] | None = None,
) -> Played:
    """A question at the end of a conversation, until it is answered."""
    hops = list(hops)
    scene.handler = model = Model(dialect, hops, before)
    asked_before = len(scene.exchanges)
    begun = time.monotonic()
    async with asyncio.timeout(PATIENCE):
        seen = await ask(scene, dialect, [*history, {"role": "user", "content": f"I ask in {scene.tag}."}], stream=stream)
    seconds = time.monotonic() - begun
    assert seen.said == (("text", DONE),) and seen.stop == "end" and seen.id == dialect.id_of(1)
    assert len(scene.exchanges) - asked_before == len(hops) + 1
    rows = scene.ledger()
    assert (rows.interceptions[-1]["status"], rows.interceptions[-1]["http_status"]) == ("completed", 200)
    made = {call.id: call for hop in hops for call in hop}
    found = [row for row in rows.tool_usages if row["tool_call_id"] in made]
    assert sorted(row["tool_call_id"] for row in found) == sorted(made)
    for row in found:
        call = made[row["tool_call_id"]]
        assert row["injected"] and row["server_url"] and row["metadata"]["duration_ms"] >= 0
        assert call.tool.startswith(f"bmcp_{row['metadata']['server']}_") and row["input"] == call.arguments
    return Played(dialect, seen, model.results, rows, seconds)


async def ask(scene: Scene, dialect: Dialect, conversation: Sequence[Json], *, stream: bool = True) -> Seen:
    """What the vendor's SDK has of the response in the end."""
    request: Any = {"model": "m", dialect.array: list(conversation)}
    if dialect.format == "messages":
        async with anthropic_client(scene) as vendor:
            return dialect.seen((await _final(vendor.messages, request | {"max_tokens": 64}, stream=stream)).to_dict())
    async with openai_client(scene) as openai:
        api: Any = openai.chat.completions if dialect.format == "chat" else openai.responses
        return dialect.seen((await _final(api, request, stream=stream)).to_dict())


async def _final(api: Any, request: Json, *, stream: bool) -> Any:
    if not stream:
        return await api.create(**request)
    async with api.stream(**request) as events:
        for name in ("get_final_message", "get_final_completion", "get_final_response"):
            if hasattr(events, name):
                return await getattr(events, name)()
    raise AssertionError("no such SDK")


async def offered(stage: Stage, dialect: Dialect) -> list[Json]:
    """The tools that a new conversation gets now."""
    with stage.scene() as scene:
        await play_in(scene, dialect, [])
        tools: list[Json] = scene.requests[0].json()["tools"]
        return tools


async def until_offered(stage: Stage, dialect: Dialect, name: str) -> None:
    """Return when new conversations get the tool of that name, which another process brings about."""
    async with asyncio.timeout(PATIENCE):
        while name not in map(name_of, await offered(stage, dialect)):
            await asyncio.sleep(0.02)
