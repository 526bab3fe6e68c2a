"""A gateway is replaced, restarted or given another configuration under load, and nobody's request fails.

Truth: issue 5, point 3: no failed request besides refused connections while nobody listens; none at all with sockets that
are handed over, or with two workers; nothing lost. Real processes, and clients that keep their connections beside such that
do not, with streams and without.
"""

import asyncio
import os
import random
import re
import signal
import socket
import sqlite3
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest

from tests.support.crowd import MESSAGES_STREAM, Regulars, ask, assert_nothing_is_missing, gated, ledger, until
from tests.support.gateway import STOP_SECONDS, Gateway, wait_until
from tests.support.provider import Gate, Received, Reply, ThreadedProvider

CLIENTS = 16
ROUNDS = 2


def unhurried(received: Received) -> Reply:
    """As `answer`; streams take up to half a second, so that some are under way at any instant."""
    gate = Gate()
    asyncio.get_running_loop().call_later(random.uniform(0, 0.5), gate.set)
    return gated(received, gate)


@pytest.fixture
def provider() -> Iterator[ThreadedProvider]:
    with ThreadedProvider(unhurried) as provider:
        yield provider


@contextmanager
def serving(
    provider: ThreadedProvider, database: Path, *, workers: int = 1, port: int = 0, sockets: tuple[socket.socket, ...] = ()
) -> Iterator[Gateway]:
    env = {
        "AIBRIDGE_DATABASE__URL": f"sqlite:///{database}",
        "AIBRIDGE_SERVER__SHUTDOWN_GRACE": "30",
        "AIBRIDGE_SERVER__WORKERS": str(workers),
    }
    urls = {"anthropic_base_url": provider.url, "openai_base_url": f"{provider.url}/v1"}
    with Gateway(**urls, env=env, port=port, handed_over=sockets) as gateway:
        yield gateway
        assert "Traceback" not in gateway.output and "not ended in time" not in gateway.output


def assert_everything_is_there(crowd: Regulars, database: Path, *gateways: Gateway) -> None:
    """No request has failed; each response is in the ledger, and each interception has ended, once."""
    assert not crowd.failures, f"{len(crowd.failures)} of {len(crowd.seen)}: {crowd.failures[:5]}"
    assert crowd.kept > CLIENTS, "connections were kept"
    assert_nothing_is_missing(crowd.seen, database)
    found = ledger(database)
    assert found.statuses == {"completed": len(crowd.seen)}
    assert found.counts == dict.fromkeys(("interceptions", "token_usages", "user_prompts"), len(crowd.seen))
    with closing(sqlite3.connect(database)) as connection:
        unended = connection.execute("SELECT count(*) FROM aibridge_interceptions WHERE ended_at IS NULL").fetchone()
        assert unended == (0,)
    ended = re.compile(r"interception ended interception_id=(\S+)")
    wait_until(lambda: sum(len(ended.findall(one.output)) for one in gateways) >= len(crowd.seen), "the log is not complete")
    assert len({end for one in gateways for end in ended.findall(one.output)}) == len(crowd.seen)
    assert sum(len(ended.findall(one.output)) for one in gateways) == len(crowd.seen)


def unused_port() -> int:
    """One that no client gets by accident while nobody listens on it: below those that the system gives out."""
    while True:
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port := random.randrange(20_000, 30_000)))
            except OSError:
                continue
            return port


def refuses(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) != 0


async def test_one_takes_the_place_of_another(provider: ThreadedProvider, tmp_path: Path) -> None:
    """The new one starts when the old one has closed its socket and lets its streams end. Connections are refused then."""
    port, database = unused_port(), tmp_path / "ledger.db"
    with ExitStack() as gateways:
        old = gateways.enter_context(serving(provider, database, port=port))
        async with Regulars(old.url)(CLIENTS) as crowd:
            await crowd.go_on(5 * CLIENTS)
            old.process.send_signal(signal.SIGTERM)
            await until(lambda: "shutting down" in old.output and refuses(port), "the socket is not closed")
            new = await asyncio.to_thread(gateways.enter_context, serving(provider, database, port=port))
            await crowd.go_on(5 * CLIENTS)
        assert old.process.wait(STOP_SECONDS) == -signal.SIGTERM
        assert crowd.refused > 0
        assert_everything_is_there(crowd, database, old, new)


@pytest.mark.parametrize("workers", [1, 2])
async def test_a_restart_behind_a_socket_that_stays(provider: ThreadedProvider, tmp_path: Path, workers: int) -> None:
    """As systemd holds it (systemd.socket(5)): who comes in between waits in its queue, and nobody is refused."""
    database = tmp_path / "ledger.db"
    with (
        socket.create_server(("127.0.0.1", 0), backlog=1000) as listener,
        serving(provider, database, workers=workers, sockets=(listener,)) as gateway,
    ):
        async with Regulars(gateway.url)(CLIENTS) as crowd:
            for _ in range(ROUNDS):
                await crowd.go_on(5 * CLIENTS)
                gateway.process.send_signal(signal.SIGTERM)
                assert await asyncio.to_thread(gateway.process.wait, STOP_SECONDS) == -signal.SIGTERM
                await asyncio.to_thread(gateway.start)
            await crowd.go_on(5 * CLIENTS)
        assert crowd.refused == 0
        assert_everything_is_there(crowd, database, gateway)


async def test_workers_are_restarted_one_by_one(provider: ThreadedProvider, tmp_path: Path) -> None:
    database = tmp_path / "ledger.db"
    with serving(provider, database, workers=2) as gateway:
        async with Regulars(gateway.url)(CLIENTS) as crowd:
            for number in (1, 2) * ROUNDS:
                await crowd.go_on(3 * CLIENTS)
                await restarted(gateway, number)
            await crowd.go_on(3 * CLIENTS)
        assert crowd.refused == 0
        assert_everything_is_there(crowd, database, gateway)


async def restarted(gateway: Gateway, worker: int) -> None:
    """Tell a worker to stop, and wait until another one has taken its place."""
    ready = re.compile(rf"worker {worker} is ready \(process (\d+)")
    before = ready.findall(gateway.output)
    os.kill(int(before[-1]), signal.SIGTERM)
    await until(lambda: len(ready.findall(gateway.output)) > len(before), "no worker has taken the place", 60)


@pytest.mark.parametrize("workers", [1, 2])
async def test_all_of_them_stop(provider: ThreadedProvider, tmp_path: Path, workers: int) -> None:
    """Without a next one: whoever got a connection gets a response, and then connections are refused."""
    database = tmp_path / "ledger.db"
    with serving(provider, database, workers=workers) as gateway:
        async with Regulars(gateway.url)(CLIENTS) as crowd:
            await crowd.go_on(5 * CLIENTS)
            gateway.process.send_signal(signal.SIGTERM)
            assert await asyncio.to_thread(gateway.process.wait, STOP_SECONDS) == -signal.SIGTERM
        assert crowd.refused > 0
        assert_everything_is_there(crowd, database, gateway)


@pytest.mark.parametrize("workers", [1, 2])
async def test_the_configuration_is_reloaded(provider: ThreadedProvider, tmp_path: Path, workers: int) -> None:
    """Also to one that cannot be used. Streams that were under way at the first change end after the last one."""
    database, gate = tmp_path / "ledger.db", Gate()
    with serving(provider, database, workers=workers) as gateway:
        provider.handle(lambda received: gated(received, gate))
        streams = [asyncio.create_task(ask(gateway.url, MESSAGES_STREAM)) for _ in range(4)]
        await until(lambda: len(provider.exchanges) == len(streams), "the streams have not begun")
        provider.handle(unhurried)
        async with Regulars(gateway.url)(CLIENTS) as crowd:
            for key in ("sk-1", "sk-2", "sk-3"):
                valid = f'[providers.anthropic]\nbase_url = "{provider.url}"\napi_key = "{key}"'
                await reloaded(gateway, valid, "the configuration was reloaded")
                await reloaded(gateway, "[providers.anthropic]\nnonsense = 1", "the old configuration still holds")
                await crowd.go_on(3 * CLIENTS)
                messages = [one for one in provider.requests[-CLIENTS:] if one.path.endswith("/messages")]
                assert messages and all(one.header("x-api-key") == [key] for one in messages)
        gate.set()
        ended = await asyncio.gather(*streams)
        assert all(one.complete for one in ended)
        crowd.seen += ended
        assert crowd.refused == 0
        assert "providers.anthropic.nonsense: there is no such setting" in gateway.output
        assert_everything_is_there(crowd, database, gateway)


async def reloaded(gateway: Gateway, toml: str, says: str) -> None:
    """Have the gateway read that file, and wait until it says so."""
    before = gateway.output.count(says)
    gateway.configure(toml)
    gateway.process.send_signal(signal.SIGHUP)
    await until(lambda: gateway.output.count(says) > before, f"it does not say {says!r}")
