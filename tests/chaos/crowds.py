"""Many clients that go at once, in the middle of their streams."""

import asyncio
import re
import sqlite3
import time
from contextlib import AsyncExitStack, closing, nullcontext
from pathlib import Path
from typing import Final

from tests.support.crowd import CHAT_STREAM, MESSAGES_STREAM, Request, answer, ask, gated, ledger, lost, until
from tests.support.gateway import Gateway
from tests.support.provider import Gate, Received, Reply, ThreadedProvider
from tests.support.rawclient import RawClient

from .scenario import NOTHING, Chapter, Observed, Outcome, Scale, Scenario

ROUNDS: Final = 3
ROOM: Final = 20 * 2**20
"""Bytes by which a process may be larger after the last round than after the first: for the allocator to place things."""

LEFT: Final = "nothing, they have left; the provider's connections are closed at once"
ONCE: Final = "each once `client_disconnected`, usage partial"


async def _dropped(_: None, scale: Scale) -> Observed:
    """Rounds of clients that go. The gateway must come back to what it was: once each in the ledger, nothing held."""
    go = Gate()
    memory: list[int] = []

    def answered(received: Received) -> Reply:
        return answer(received) if go.is_set() else gated(received, go)

    with (
        ThreadedProvider(answered) as provider,
        Gateway(anthropic_base_url=provider.url, openai_base_url=f"{provider.url}/v1") as server,
    ):
        waits: list[float] = []
        for _round in range(ROUNDS):
            waits += await _come_and_go(server, scale.clients)
            await until(lambda: all(one.finished.is_set() for one in provider.exchanges), "the provider goes on", 60)
            await until(lambda: not ledger(server.database).statuses["in_progress"], "not all have ended", 60)
            memory.append(_resident(server))
        closed = sum(one.client_gone.is_set() for one in provider.exchanges)
        go.set()
        healthy = await ask(server.url, MESSAGES_STREAM)
        assert healthy.complete
        gone = ROUNDS * scale.clients
        client = LEFT if closed == gone and not await _in_flight(server) else f"{closed} connections closed of {gone}"
        missing = NOTHING if not await lost(server.url) else "records"
        if (grown := memory[-1] - memory[0]) > ROOM:
            missing += f", but {grown // 2**20} MB of memory"
        said = ONCE if _each_once(server.database, gone) else f"{ledger(server.database)}"
        beside = f"another client waited {max(waits) * 1000:.0f} ms at most for its answer meanwhile"
        return Observed(Outcome(client, said, missing), beside)


async def _come_and_go(server: Gateway, count: int) -> list[float]:
    """That many clients begin a stream each and are gone together. Answers how long another one waited meanwhile."""
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(RawClient(server.url)) for _ in range(count)]
        await asyncio.gather(*(_begin(client, (MESSAGES_STREAM, CHAT_STREAM)[n % 2]) for n, client in enumerate(clients)))
        other = await stack.enter_async_context(RawClient(server.url))
        for client in clients:
            client.die()
        return [await _wait_for(other) for _ in range(20)]


async def _begin(client: RawClient, request: Request) -> None:
    """Ask, and read what comes before the gate."""
    path, body = request
    await client.send("POST", path, [("Content-Type", "application/json")], body)
    assert (await client.head()).status == 200
    await client.until()


async def _wait_for(client: RawClient) -> float:
    begun = time.monotonic()
    await client.request("GET", "/healthz")
    return time.monotonic() - begun


def _each_once(database: Path, count: int) -> bool:
    found = ledger(database)
    with closing(sqlite3.connect(database)) as opened:
        partial = opened.execute(
            "SELECT count(DISTINCT interception_id) FROM aibridge_token_usages WHERE completeness = 'partial'"
        ).fetchone()[0]
    statuses = +(found.statuses)
    del statuses["completed"]
    return statuses == {"client_disconnected": count} and partial == count and found.counts["token_usages"] == count + 1


async def _in_flight(server: Gateway) -> float:
    async with RawClient(server.url) as client:
        text = (await client.request("GET", "/metrics")).body.decode()
    return sum(float(found) for found in re.findall(r"^aibridge_interceptions_inflight\{[^}]*\} (\S+)", text, re.MULTILINE))


def _resident(server: Gateway) -> int:
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{server.process.pid}/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


CROWDS: Final = Chapter(
    "Clients go",
    "By RST, with their streams half read, three times over.",
    nullcontext,
    [Scenario("500 clients are gone at once", Outcome(LEFT, ONCE), _dropped)],
)
