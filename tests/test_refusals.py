"""Refusals of the gateway's own, of a real one: the client is told, /metrics counts each once, and the log says why.

Truth: issue 5 ("each answers with the right status ... in the provider's error shape"); docs/metrics.md for the reasons, our
choice. What is refused by the HTTP server and what by the application behind it is one list to whoever operates it.
"""

import asyncio
import json
import resource
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any, Final, NamedTuple, get_args

import pytest

from aibridge.errors import RefusalReason
from tests.support.gateway import Scene, Stage, staged
from tests.support.provider import Gate, Reply, Wait
from tests.support.scrape import Scrape, scrape
from tests.test_metrics import ALL

TOML: Final = """
[server]
request_timeout = 0.5
[limits]
max_body_bytes = 1000
max_header_bytes = 4000
max_concurrent = 2
max_concurrent_per_actor = 1
requests_per_minute = 10
[identity]
header = "X-User"
"""
MESSAGES: Final = "/anthropic/v1/messages"
MODELS: Final = "/openai/v1/models"
BODY: Final = b'{"model":"m","messages":[{"role":"user","content":"hi"}]}'
SECRET: Final = "mallory-1c9e"
OK: Final = Reply.json({"data": []})

Said = list[int]
"""The statuses that a client got."""


async def ask(scene: Scene, method: str, path: str, *headers: tuple[str, str], body: bytes | None = None) -> Said:
    async with scene.client() as client:
        return [(await client.request(method, path, scene.lines(*headers), body)).head.status]


async def write(scene: Scene, data: bytes) -> Said:
    """Bytes as they are, from somebody who then waits."""
    async with scene.client() as client:
        with suppress(ConnectionError):
            await client.write(data)
        return [(await client.answer()).head.status]


def of(user: str) -> tuple[str, str]:
    return "X-User", user


async def sends_nonsense(scene: Scene) -> Said:
    return await write(scene, b"nonsense\r\n\r\n") + await ask(scene, "POST", MESSAGES, of("ada"), body=b"[")


async def is_nobody(scene: Scene) -> Said:
    twice = [of(SECRET), of("x")]
    return [*await ask(scene, "POST", MESSAGES, body=BODY), *await ask(scene, "POST", MESSAGES, *twice, body=BODY)]


async def names_another_host(scene: Scene) -> Said:
    return await ask(scene, "GET", MODELS, of("ada"), ("Host", "evil.example"))


async def asks_for_what_is_not_there(scene: Scene) -> Said:
    return [*await ask(scene, "GET", "/anthropic/v1/nowhere", of("ada")), *await ask(scene, "GET", "/x", of("ada"))]


async def is_slow(scene: Scene) -> Said:
    head = f"POST {MESSAGES} HTTP/1.1\r\nHost: localhost\r\nX-User: ada\r\nContent-Length: 10\r\n\r\n".encode()
    return [*await write(scene, head[:-2]), *await write(scene, head + b"{")]


async def sends_a_large_body(scene: Scene) -> Said:
    sent = await ask(scene, "POST", MESSAGES, of("ada"), body=bytes(1001))
    return sent + await ask(scene, "POST", "/openai/v1/conversations", of("ada"), body=bytes(1001))


async def wants_a_websocket(scene: Scene) -> Said:
    return await ask(scene, "GET", "/openai/v1/responses", of("ada"), ("Upgrade", "websocket"), ("Connection", "Upgrade"))


async def sends_a_large_head(scene: Scene) -> Said:
    endless = f"GET {MODELS} HTTP/1.1\r\nHost: localhost\r\nX-Filler: ".encode() + b"x" * 2_000_000  # takes many reads
    return [*await ask(scene, "GET", MODELS, of("ada"), ("X-Filler", "x" * 5000)), *await write(scene, endless)]


async def sends_too_many(scene: Scene) -> Said:
    said = await asyncio.gather(*(ask(scene, "GET", MODELS, of("hasty")) for _ in range(12)))
    return [status for (status,) in said if status != 200]


@asynccontextmanager
async def under_way(scene: Scene, *users: str) -> AsyncIterator[None]:
    """While these users have one request each at the provider."""
    gate, begun = Gate(), len(scene.requests)
    scene.handler = lambda _: Reply(OK.status, OK.headers, OK.body, OK.framing, before=[Wait(gate)])
    running = [asyncio.create_task(ask(scene, "POST", MESSAGES, of(user), body=BODY)) for user in users]
    await scene.exchange(begun + len(users) - 1)
    yield
    gate.set()
    assert await asyncio.gather(*running) == [[200]] * len(users)
    scene.handler = lambda _: OK


async def has_too_many_under_way(scene: Scene) -> Said:
    async with under_way(scene, "busy"):
        return await ask(scene, "POST", MESSAGES, of("busy"), body=BODY)


async def meets_too_many(scene: Scene) -> Said:
    async with under_way(scene, "one", "two"):
        return await ask(scene, "POST", "/openai/v1/responses", of("three"), body=BODY)


@contextmanager
def unwritable_files(pid: int) -> Iterator[None]:
    """As with a full disk, for one process (getrlimit(2), EFBIG): permissions do not bind root, who runs many a test."""
    before = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, before[1]))
    yield
    resource.prlimit(pid, resource.RLIMIT_FSIZE, before)


async def meets_a_full_disk(scene: Scene) -> Said:
    with unwritable_files(scene.gateway.process.pid):
        async with scene.client() as client:
            answers = [await client.request("POST", MESSAGES, scene.lines(of("grace")), BODY) for _ in range(2)]
    assert all(int(answer.head.get("retry-after") or 0) > 0 for answer in answers)
    return [answer.head.status for answer in answers]


class Case(NamedTuple):
    """Who is refused, how, and what the first line of the log is to say of it. `counts` are those of each provider."""

    reason: RefusalReason
    client: Callable[[Scene], Awaitable[Said]]
    status: int
    counts: Mapping[str, int]
    actor: str | None
    detail: str


CASES: Final[Sequence[Case]] = [
    Case("request", sends_nonsense, 400, {"": 1, "anthropic": 1}, None, "This is not HTTP."),
    Case("identity", is_nobody, 401, {"anthropic": 2}, None, "no header x-user"),
    Case("origin", names_another_host, 403, {"openai": 1}, None, "The Host header does not name this server."),
    Case(
        "route", asks_for_what_is_not_there, 404, {"anthropic": 1, "": 1}, "ada", "There is no such route on this gateway."
    ),
    Case("timeout", is_slow, 408, {"anthropic": 2}, None, "The request did not come in time."),
    Case(
        "body", sends_a_large_body, 413, {"anthropic": 1, "openai": 1}, "ada", "The request body is larger than 1000 bytes."
    ),
    Case("upgrade", wants_a_websocket, 426, {"openai": 1}, "ada", "WebSocket is not supported here. Use HTTP."),
    Case("rate", sends_too_many, 429, {"openai": 2}, "hasty", "You have sent too many requests"),
    Case("head", sends_a_large_head, 431, {"openai": 2}, "ada", "The request headers are larger than 4000 bytes."),
    Case("actor_concurrency", has_too_many_under_way, 429, {"anthropic": 1}, "busy", "You have too many requests under way"),
    Case("concurrency", meets_too_many, 503, {"openai": 1}, "three", "This gateway has as many requests under way"),
    Case("recording", meets_a_full_disk, 503, {"anthropic": 2}, "grace", "The request cannot be recorded at the moment"),
]


class Played(NamedTuple):
    said: Mapping[RefusalReason, Said]
    after: Scrape
    asked: Sequence[Any]
    output: str

    def lines(self, reason: str) -> list[Mapping[str, Any]]:
        return [line for line in refusals(self.output) if line["reason"] == reason]


def refusals(output: str) -> list[Mapping[str, Any]]:
    lines = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    return [line for line in lines if line["message"] == "a request is refused"]


async def play(stage: Stage) -> Played:
    with stage.scene() as scene:
        scene.handler = lambda _: OK
        said = {case.reason: await case.client(scene) for case in CASES}
        after = await scrape(stage.gateway.url)
        asked = [received.target for received in scene.requests]
    stage.gateway.stop()
    return Played(said, after, asked, stage.gateway.output)


@pytest.fixture(scope="module")
def played() -> Iterator[Played]:
    if sys.platform != "linux":
        pytest.skip("only Linux changes the limits of another process")
    with staged(TOML, {"AIBRIDGE_LOG__FORMAT": "json"}) as stage:
        yield asyncio.run(play(stage))


def test_there_is_a_case_for_each_reason() -> None:
    assert sorted(case.reason for case in CASES) == sorted(get_args(RefusalReason))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.reason)
def test_a_refusal(played: Played, case: Case) -> None:
    assert played.said[case.reason] == [case.status] * sum(case.counts.values())
    first, *more = played.lines(case.reason)
    assert first.get("actor") == case.actor and first["detail"].startswith(case.detail) and first["count"] == 1
    assert first["level"] == ("info" if case.reason == "upgrade" else "warning")
    counted: Counter[str] = Counter()
    for line in (first, *more):
        assert line["peer"] == "127.0.0.1"
        counted[line.get("provider", "")] += line["count"]
    if case.reason == "recording" and len(more) == 0:
        counted["anthropic"] += 1  # the log is a file, too, and had no room for the first line
    assert counted == case.counts, "all of them are in the log, at its end at the latest"


def test_each_refusal_is_counted_once(played: Played) -> None:
    found = played.after.all("refusals_total", *ALL["refusals_total"])
    assert found == {(provider, case.reason): count for case in CASES for provider, count in case.counts.items()}


def test_what_is_refused_does_not_reach_the_provider(played: Played) -> None:
    assert Counter(played.asked) == {"/v1/models": 10, "/v1/messages": 3}, "but those that others had to wait for"


def test_the_log_does_not_say_who_somebody_pretends_to_be(played: Played) -> None:
    assert [line["detail"] for line in played.lines("identity")] == [
        "no header x-user",
        "the header x-user came more than once",
    ]
    assert SECRET not in played.output


def test_a_proxy_that_nobody_has_named() -> None:
    """Everybody is locked out: the log says which address is not trusted, in few lines."""

    async def everybody(stage: Stage) -> Scrape:
        with stage.scene() as scene:
            for _ in range(50):
                assert await ask(scene, "POST", MESSAGES, of(SECRET), body=BODY) == [401]
            return await scrape(stage.gateway.url)

    identity = '[identity]\nheader = "X-User"\ntrusted_proxies = ["10.0.0.0/8"]'
    with staged(identity, {"AIBRIDGE_LOG__FORMAT": "json"}) as stage:
        after = asyncio.run(everybody(stage))
        assert after.all("refusals_total", *ALL["refusals_total"]) == {("anthropic", "identity"): 50}
        stage.gateway.stop()
        lines = refusals(stage.gateway.output)
        assert SECRET not in stage.gateway.output
    assert sum(line["count"] for line in lines) == 50 and lines[0]["count"] == 1
    assert len(lines) <= 10, "one in ten seconds"
    why = "the header x-user came from a peer that is not a trusted proxy"
    assert {(line["detail"], line["peer"], line.get("actor")) for line in lines} == {(why, "127.0.0.1", None)}
