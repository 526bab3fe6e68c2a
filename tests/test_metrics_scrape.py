"""What /metrics says after a scripted conversation with a real gateway, number by number.

Truth: issue 5, point 1; design.md section 3 for the contract; the script for what has happened, and the ledger's own rows
for how many records there are. What the provider reports as usage is `tests.support.injected.usage_of`.
"""

import asyncio
import json
import re
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Final, get_args
from uuid import uuid4

import pytest

from aibridge import MemoryRecorder
from aibridge.records import Record
from aibridge.server import Server
from aibridge.upstream import MemoryResponse, MemoryUpstream, UpstreamRequest
from aibridge.wire.observer import ResponseHead
from tests.serving import call, scope, settings
from tests.support.gateway import USER, Scene, Stage, staged
from tests.support.injected import Calls, Says, Thinks, turn
from tests.support.injected_dialects import CHAT, MESSAGES
from tests.support.injected_servers import DONE, calls, play_in, toml
from tests.support.mcp_servers import Process, server
from tests.support.provider import WAIT_SECONDS, Gate, Reply, Wait
from tests.support.scrape import Scrape, scrape, until
from tests.test_metrics import ALL

TABLES: Final = ("token_usages", "user_prompts", "tool_usages", "model_thoughts")


@dataclass(frozen=True)
class Script:
    """Scrapes at moments of the script, by their names; how many records there were before the last of them."""

    at: Mapping[str, Scrape]
    records: int
    host: str

    @property
    def end(self) -> Scrape:
        """When all has happened that goes as it should."""
        return self.at["end"]


async def played(stage: Stage, tools: Process) -> Script:
    url, host = stage.gateway.url, f"127.0.0.1:{stage.provider.port}"
    at = {"start": await scrape(url)}
    with stage.scene() as scene:
        await play_in(scene, MESSAGES, [[calls("sums", "add", a=1, b=2), calls("sums", "fail")]])
        await hidden_turns_are_missed(scene)
        await the_provider_fails(scene)
        at["midway"] = await the_client_leaves(scene, host)
        await passed_through(scene)
        await the_client_has_a_tool(scene)
        at["end"] = await until(url, lambda found: found.value("upstream_connections", host=host, state="in_use") == 0)
    records = count(stage)
    with stage.scene(trouble="record lost: Interception") as scene:
        at["spooled"], at["replayed"] = await the_database_is_locked(scene)
        at["lost"], at["recovered"] = await the_spool_is_gone(scene)
        tools.kill()
        await play_in(scene, MESSAGES, [[calls("sums", "add", a=1, b=2)]])
        at["disconnected"] = await until(url, lambda found: found.value("mcp_server_connected", server="sums") == 0)
    return Script(at, records, host)


async def hidden_turns_are_missed(scene: Scene) -> None:
    """One that was remembered, and dropped by housekeeping; and one that we have never seen."""
    with closing(connected(scene)) as database:
        database.execute("UPDATE aibridge_hidden_turns SET data = NULL, size = 0")
    asked = {"role": "user", "content": f"I ask in {scene.tag}."}
    for said in (DONE, "I never said that."):
        await play_in(scene, MESSAGES, [], history=[asked, {"role": "assistant", "content": said}])


async def the_provider_fails(scene: Scene) -> None:
    scene.reply(Reply.json({"error": {"message": "No.", "type": "server_error"}}, 500))
    answer = await scene.post(CHAT.path, CHAT.request(stream=True, model="broken"))
    assert answer.head.status == 500


async def the_client_leaves(scene: Scene, host: str) -> Scrape:
    """In the middle of a stream, which was looked at before."""
    gate = Gate()
    body = MESSAGES.request(stream=True, model="long")
    first, *rest = MESSAGES.events(turn(1, Says("So many words")), json.loads(body))
    scene.reply(Reply.stream([first, Wait(gate), *rest]))
    async with scene.client() as client:
        await client.send("POST", MESSAGES.path, scene.lines(), body)
        assert (await client.head()).status == 200
        await client.until()
        found = await until(
            scene.gateway.url, lambda found: found.value("upstream_connections", host=host, state="in_use") == 1
        )
    await asyncio.to_thread(scene.ended, 5)
    return found


async def passed_through(scene: Scene) -> None:
    scene.reply(Reply.json({"data": []}))
    async with scene.client() as client:
        assert (await client.request("GET", "/anthropic/v1/models", scene.lines())).head.status == 200


async def the_client_has_a_tool(scene: Scene) -> None:
    """In a blocking request of curl, whose model thinks before it calls it."""
    body = MESSAGES.request(stream=False, tools=["Read"])
    said = turn(3, Thinks("Hm.", "c2ln"), Calls("call_1", "Read", "{}"))
    scene.reply(Reply.json(MESSAGES.body(said, json.loads(body))))
    answer = await scene.post(MESSAGES.path, body, [("User-Agent", "curl/8.5.0")])
    assert answer.head.status == 200


async def the_database_is_locked(scene: Scene) -> tuple[Scrape, Scrape]:
    """So a request is recorded in the spool. What it says of it then, and when the lock has ended."""
    with closing(connected(scene)) as database:
        database.execute("BEGIN IMMEDIATE")
        await asked(scene, 200)
        spooled = await until(scene.gateway.url, lambda found: found.value("recorder_spool_bytes") != 0)
    return spooled, await until(scene.gateway.url, lambda found: found.value("recorder_spool_bytes") == 0)


async def the_spool_is_gone(scene: Scene) -> tuple[Scrape, Scrape]:
    """As well as the database is locked, so a request is refused. What it says of it then, and when both are there again."""
    spool = scene.gateway.database.with_name("aibridge.db-spool")
    with closing(connected(scene)) as database:
        database.execute("BEGIN IMMEDIATE")
        spool.rename(spool.with_suffix(".away"))
        spool.touch()
        await asked(scene, 503)
        lost = await until(scene.gateway.url, lambda found: found.value("ready") == 0)
        spool.unlink()
        spool.with_suffix(".away").rename(spool)
    return lost, await until(scene.gateway.url, lambda found: found.value("ready") == 1)


async def asked(scene: Scene, status: int) -> None:
    body = MESSAGES.request(stream=False, model="late")
    if status == 200:
        scene.reply(Reply.json(MESSAGES.body(turn(1, Says("Yes.")), json.loads(body))))
    assert (await scene.post(MESSAGES.path, body)).head.status == status


def connected(scene: Scene) -> sqlite3.Connection:
    return sqlite3.connect(scene.gateway.database, timeout=WAIT_SECONDS, isolation_level=None)


def count(stage: Stage) -> int:
    """How many records are in the ledger: an interception has two, its start and its end."""
    with closing(sqlite3.connect(f"file:{stage.gateway.database}?mode=ro", uri=True, timeout=WAIT_SECONDS)) as database:
        ((begun, ended),) = database.execute("SELECT count(*), count(ended_at) FROM aibridge_interceptions")
        others = [database.execute(f"SELECT count(*) FROM aibridge_{table}").fetchone()[0] for table in TABLES]
    return int(begun + ended + sum(others))


@pytest.fixture(scope="module")
def script() -> Iterator[Script]:
    with server("sdk", "http") as tools, staged(toml({"sums": {"url": tools.url}}, skip_models=["^late$"])) as stage:
        yield asyncio.run(played(stage, tools))


# ---- the contract ----

MODEL: Final = "anthropic", "m"
SDK: Final = USER, "anthropic-sdk"
ROUTE: Final = "/v1/messages"


def test_interceptions(script: Script) -> None:
    by = ALL["interceptions_total"]
    assert script.end.all("interceptions_total", *by) == {
        (*MODEL, "completed", ROUTE, "POST", *SDK): 3,
        (*MODEL, "completed", ROUTE, "POST", USER, "curl"): 1,
        ("anthropic", "long", "client_disconnected", ROUTE, "POST", USER, ""): 1,
        ("openai", "broken", "failed", "/v1/chat/completions", "POST", USER, ""): 1,
    }
    assert script.at["start"].all("interceptions_total", *by) == {}


def test_interceptions_under_way(script: Script) -> None:
    chat = "openai", "broken", "/v1/chat/completions"
    settled = {(*MODEL, ROUTE): 0, chat: 0}
    by = ALL["interceptions_inflight"]
    assert script.at["midway"].all("interceptions_inflight", *by) == settled | {("anthropic", "long", ROUTE): 1}
    assert script.end.all("interceptions_inflight", *by) == settled | {("anthropic", "long", ROUTE): 0}


def test_durations(script: Script) -> None:
    by = ALL["interceptions_duration_seconds"]
    counts = {MODEL: 4, ("anthropic", "long"): 1, ("openai", "broken"): 1}
    assert script.end.all("interceptions_duration_seconds_count", *by) == counts
    assert all(0 < seconds < WAIT_SECONDS for seconds in script.end.all("interceptions_duration_seconds_sum", *by).values())
    assert script.end.all("interceptions_time_to_first_byte_seconds_count", *by) == counts, "the refusal had a body, too"
    waited = script.end.all("interceptions_time_to_first_byte_seconds_sum", *by)
    lasted = script.end.all("interceptions_duration_seconds_sum", *by)
    assert all(0 < waited[labels] < lasted[labels] for labels in counts)


def test_tokens(script: Script) -> None:
    """The two turns of the first question, the one turn of two others, and the third that the blocking request got.

    The client that left had seen the start of its answer, which tells the input.
    """
    assert script.end.all("tokens_total", *ALL["tokens_total"]) == {
        (*MODEL, "input", *SDK): 100 + 200 + 100 + 100,
        (*MODEL, "cache_read", *SDK): 10 + 20 + 10 + 10,
        (*MODEL, "output", *SDK): 1 + 2 + 1 + 1,
        (*MODEL, "input", USER, "curl"): 300,
        (*MODEL, "cache_read", USER, "curl"): 30,
        (*MODEL, "output", USER, "curl"): 3,
        ("anthropic", "long", "input", USER, ""): 100,
        ("anthropic", "long", "cache_read", USER, ""): 10,
        ("anthropic", "long", "output", USER, ""): 1,
    }


def test_prompts(script: Script) -> None:
    assert script.end.all("prompts_total", *ALL["prompts_total"]) == {
        (*MODEL, *SDK): 3,
        (*MODEL, USER, "curl"): 1,
        ("anthropic", "long", USER, ""): 1,
        ("openai", "broken", USER, ""): 1,
    }


def test_tools(script: Script) -> None:
    by = ALL["injected_tool_invocations_total"]
    assert script.end.all("injected_tool_invocations_total", *by) == {(*MODEL, "sums", name): 1 for name in ("add", "fail")}
    by = ALL["non_injected_tool_selections_total"]
    assert script.end.all("non_injected_tool_selections_total", *by) == {(*MODEL, "Read"): 1}


def test_passthrough(script: Script) -> None:
    assert script.end.all("passthrough_total", *ALL["passthrough_total"]) == {("anthropic", "/v1/models", "GET"): 1}


# ---- providers ----


def test_calls(script: Script) -> None:
    """Of the seven of Anthropic's, two are turns of one interception and one was passed through."""
    by = ALL["upstream_responses_total"]
    assert script.end.all("upstream_responses_total", *by) == {("anthropic", "2xx"): 7, ("openai", "5xx"): 1}
    assert script.at["midway"].all("upstream_calls_inflight", "provider") == {("anthropic",): 1, ("openai",): 0}
    assert script.end.all("upstream_calls_inflight", "provider") == {("anthropic",): 0, ("openai",): 0}


# ---- injected tools ----


def test_calls_of_mcp_servers(script: Script) -> None:
    assert script.end.value("mcp_call_duration_seconds_count", server="sums") == 2
    assert script.end.value("mcp_call_failures_total", server="sums") == 1
    seconds = script.end.value("mcp_call_duration_seconds_sum", server="sums")
    assert seconds is not None and 0 < seconds < WAIT_SECONDS


def test_mcp_servers(script: Script) -> None:
    assert script.end.all("mcp_server_connected", "server") == {("sums",): 1}
    assert script.at["disconnected"].all("mcp_server_connected", "server") == {("sums",): 0}
    assert script.at["disconnected"].value("mcp_call_failures_total", server="sums") == 2


def test_missed_turns(script: Script) -> None:
    by = ALL["hidden_turns_missed_total"]
    assert script.end.all("hidden_turns_missed_total", *by) == {("anthropic", "lost"): 1, ("anthropic", "unknown"): 1}


# ---- the ledger ----


def test_records(script: Script) -> None:
    def counted(moment: str) -> list[float | None]:
        names = ("records_written_total", "records_spooled_total", "records_replayed_total")
        return [script.at[moment].value(name) for name in names]

    assert counted("start") == [0, 0, 0]
    assert counted("end") == [script.records, 0, 0]
    assert counted("spooled") == [script.records, 4, 0], "a start, and a prompt, a usage and an end"
    assert counted("replayed") == [script.records, 4, 4]
    none = {(kind,): 0 for kind in (*(kind.__name__ for kind in get_args(Record)), "")}
    assert script.at["start"].all("records_lost_total", "kind") == none, "a rate needs the 0 before the 1"
    assert script.at["replayed"].all("records_lost_total", "kind") == none
    assert script.at["recovered"].all("records_lost_total", "kind") == none | {("Interception",): 1}


def test_the_recorder(script: Script) -> None:
    assert script.end.value("recorder_queue_depth") == script.end.value("recorder_spool_bytes") == 0
    assert script.at["spooled"].value("recorder_spool_bytes") > 0  # type: ignore[operator]
    writes = script.at["replayed"].all("recorder_write_seconds_count", "to")
    assert 6 * 2 <= writes["database",] <= script.records, "each interception waits for its start and its end"
    assert 2 <= writes["spool",] <= 4
    assert all(seconds > 0 for seconds in script.at["replayed"].all("recorder_write_seconds_sum", "to").values())


def test_commits(script: Script) -> None:
    assert script.end.value("interceptions_commit_seconds_count") == 6
    assert 0 < script.end.value("interceptions_commit_seconds_sum") < WAIT_SECONDS  # type: ignore[operator]


def test_readiness(script: Script) -> None:
    moments = ("end", "spooled", "lost", "recovered")
    assert [script.at[moment].value("ready") for moment in moments] == [1, 1, 0, 1]


# ---- connections, and the process ----


def test_connections(script: Script) -> None:
    def connections(moment: str) -> dict[str, float]:
        found = script.at[moment].all("upstream_connections", "host", "state")
        assert {host for host, _ in found} == {script.host}
        return {state: number for (_, state), number in found.items()}

    assert script.at["start"].all("upstream_connections", "host", "state") == {}
    assert connections("midway") == {"idle": 0, "in_use": 1}
    assert connections("end") == {"idle": 1, "in_use": 0}
    opened = script.end.all("upstream_connections_opened_total", "host")
    assert opened == {(script.host,): 2}, "the first one was dropped with the client that left"


def test_the_event_loop(script: Script) -> None:
    looks = [script.at[moment].value("event_loop_lag_seconds_count") for moment in ("start", "end", "recovered")]
    assert 0 < looks[0] < looks[1] < looks[2]  # type: ignore[operator]
    assert script.end.value("event_loop_lag_seconds_sum") >= 0  # type: ignore[operator]


# ---- whatever clients send ----

ODD: Final = ("", "x" * 500, "two\nlines", '"}')


async def test_ten_thousand_random_models_leave_a_bounded_number_of_series() -> None:
    """And as many tools, programs, paths and methods, of a few people: through a real bridge, in the server.

    What is not random comes in turn, so that all of it has come with all of the rest by the first time we look.
    """
    number = 0

    def any_name() -> str:
        return ODD[number % 4] if number // 112 % 5 == 0 else f"name-{uuid4().hex}"

    def answer(request: UpstreamRequest) -> MemoryResponse:
        called = {"id": "c", "type": "function", "function": {"name": any_name(), "arguments": "{}"}}
        choice = {"index": 0, "message": {"role": "assistant", "tool_calls": [called]}, "finish_reason": "tool_calls"}
        said = {"id": "i", "model": any_name(), "choices": [choice], "usage": {"prompt_tokens": 5, "completion_tokens": 7}}
        status = (200, 200, 404, 529)[number // 28 % 4]
        head = ResponseHead(status, [(b"content-type", b"application/json")])
        return MemoryResponse(head, [json.dumps(said).encode()])

    server = Server(settings(identity={"header": "x-user"}), recorder=MemoryRecorder(), upstream=MemoryUpstream(answer))

    async def ask() -> None:
        program = (any_name().replace("\n", " "), f"claude-cli/{number}", "codex", "curl/8")[number // 7 % 4]
        fields = [(b"x-user", b"user-%d" % (number % 7)), (b"user-agent", program.encode())]
        if number % 10 == 0:
            method = ("GET", "DELETE", f"M{number}")[number % 3]
            path = (f"/openai/v1/models/{number}", f"/openai/v1/responses/{number}", f"/{number}")[number % 7 % 3]
            await call(server, scope(method, path, fields))
        else:
            body = {"model": any_name(), "messages": [{"role": "user", "content": "hi"}]}
            await call(server, scope("POST", CHAT.path, fields), json.dumps(body).encode())

    async def lines() -> dict[str, float]:
        text = (await call(server, scope("GET", "/metrics"))).body.decode()
        found = (line.rpartition(" ") for line in text.splitlines() if line.startswith("aibridge_"))
        return {series: float(value) for series, _, value in found}

    looks = []
    async with server:
        for number in range(10_000):
            await ask()
            if number in (5_000, 7_500, 9_999):
                looks.append(await lines())
    assert looks[0].keys() == looks[1].keys() == looks[2].keys()
    assert len(looks[0]) < 15_000
    ended = [(series, value) for series, value in looks[2].items() if series.startswith("aibridge_interceptions_total{")]
    assert sum(value for _, value in ended) == 9_000, "nothing is left out"
    models = {match[1] for series, _ in ended if (match := re.search(r'[{,]model="([^"]*)"', series))}
    assert len(models) == 201 and "other" in models
