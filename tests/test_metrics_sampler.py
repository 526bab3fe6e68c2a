"""What is looked at now and then, and what the metrics of several processes make of it.

Truth: issue 5 ("event-loop lag", "upstream connection pool", "recorder queue depth"); prometheus-client's documentation of
its multiprocess mode. How often it is looked at is our choice.
"""

import asyncio
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from aibridge import MemoryRecorder, Metrics
from aibridge.multiprocess import forget_gauges, registry_of_all
from aibridge.sampler import Sampler
from aibridge.upstream import Connections, MemoryResponse, MemoryUpstream
from aibridge.wire.observer import ResponseHead
from tests.support.crowd import until
from tests.support.provider import WAIT_SECONDS


class Recorder(MemoryRecorder):
    queued = 7
    spool_bytes = 9


class Upstream(MemoryUpstream):
    def __init__(self) -> None:
        super().__init__(lambda _: MemoryResponse(ResponseHead(200, [])))

    def connections(self) -> dict[str, Connections]:
        return {"here": Connections(idle=1, in_use=2, opened=3)}


class Toolbox:
    def connected(self) -> dict[str, bool]:
        return {"sums": True}


async def looked(registry: CollectorRegistry, times: int) -> None:
    async with asyncio.timeout(WAIT_SECONDS):
        while (registry.get_sample_value("event_loop_lag_seconds_count") or 0) < times:
            await asyncio.sleep(0.01)


async def test_it_looks_at_all_parts_at_once_and_then_again() -> None:
    registry = CollectorRegistry()
    ready = True
    sampler = Sampler(Metrics(registry), recorder=Recorder(), upstream=Upstream(), toolbox=Toolbox, ready=lambda: ready)
    async with sampler:
        await looked(registry, 1)
        found = {name: registry.get_sample_value(name) for name in ("recorder_queue_depth", "recorder_spool_bytes", "ready")}
        assert found == {"recorder_queue_depth": 7, "recorder_spool_bytes": 9, "ready": 1}
        states = [
            registry.get_sample_value("upstream_connections", {"host": "here", "state": state})
            for state in ("idle", "in_use")
        ]
        assert states == [1, 2]
        assert registry.get_sample_value("mcp_server_connected", {"server": "sums"}) == 1
        ready = False
        await looked(registry, 2)
        assert registry.get_sample_value("ready") == 0
        assert registry.get_sample_value("upstream_connections_opened_total", {"host": "here"}) == 3
    looks = registry.get_sample_value("event_loop_lag_seconds_count")
    await asyncio.sleep(0)
    assert registry.get_sample_value("event_loop_lag_seconds_count") == looks


async def test_parts_of_others_have_nothing_to_show() -> None:
    registry = CollectorRegistry()
    upstream = MemoryUpstream(lambda _: MemoryResponse(ResponseHead(200, [])))
    parts = {"recorder": MemoryRecorder(), "upstream": upstream}
    async with Sampler(Metrics(registry), **parts, toolbox=lambda: None, ready=lambda: True):
        await looked(registry, 1)
    assert registry.get_sample_value("ready") == 1
    assert registry.get_sample_value("recorder_queue_depth") == 0


async def test_what_raises_is_told_once_and_asked_again(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Upstream):
        asked = 0
        broken = True

        def connections(self) -> dict[str, Connections]:
            self.asked += 1
            if self.broken:
                raise RuntimeError("broken")
            return super().connections()

    registry, upstream = CollectorRegistry(), Broken()
    parts = {"recorder": MemoryRecorder(), "upstream": upstream}
    async with Sampler(Metrics(registry), **parts, toolbox=lambda: None, ready=lambda: True):
        await until(lambda: upstream.asked >= 2, "it does not ask again")
        assert caplog.text.count("RuntimeError: broken") == 1
        upstream.broken = False
        await looked(registry, 1)
        upstream.broken = True
        await until(lambda: caplog.text.count("RuntimeError: broken") == 2, "it is not told again")


async def test_an_event_loop_that_was_held_up_is_late() -> None:
    registry = CollectorRegistry()
    parts = {"recorder": MemoryRecorder(), "upstream": Upstream()}
    async with Sampler(Metrics(registry), **parts, toolbox=lambda: None, ready=lambda: True):
        await looked(registry, 1)
        time.sleep(0.5)
        await looked(registry, 2)
    assert registry.get_sample_value("event_loop_lag_seconds_sum") >= 0.2  # type: ignore[operator]
    under_100_ms = registry.get_sample_value("event_loop_lag_seconds_bucket", {"le": "0.1"})
    assert under_100_ms == registry.get_sample_value("event_loop_lag_seconds_count") - 1  # type: ignore[operator]


# ---- several workers ----

WORKER = """
import sys
from pathlib import Path
from prometheus_client import CollectorRegistry
from aibridge.events import *
from aibridge.metrics import Metrics, Sample
from aibridge.multiprocess import count_in_files
from aibridge.upstream import Connections

count_in_files(Path(sys.argv[1]), int(sys.argv[2]))
metrics = Metrics(CollectorRegistry())
"""


def work(directory: Path, number: int, what: str) -> None:
    """Let a worker count, in a process of its own, and die."""
    subprocess.run([sys.executable, "-c", WORKER + what, str(directory), str(number)], check=True, timeout=WAIT_SECONDS)


@pytest.fixture
def value(tmp_path: Path) -> Callable[..., float | None]:
    """What all workers together say."""

    def value(metric: str, /, **labels: str) -> float | None:
        return registry_of_all(tmp_path, 2**22 + 1).get_sample_value(metric, labels)

    return value


SHOWS = """
servers = {{"sums": {connected}, "git": True}}
metrics.show(Sample({lag}, {ready}, {{"here": Connections({idle}, 2, 5)}}, {queued}, 10, servers))
metrics(BreakerChanged("a", "/v1/messages", "m", "{state}"))
metrics(CallBegan("i", "a", "/v1/messages", "m", "http://a", 1, 1))
metrics(RecordsWritten(3, 0.001, "database"))
"""


def test_workers_are_one(tmp_path: Path, value: Callable[..., float | None]) -> None:
    one = SHOWS.format(lag=0.2, ready=True, idle=1, queued=4, connected=True, state="half_open")
    two = SHOWS.format(lag=0.1, ready=False, idle=3, queued=1, connected=False, state="open")
    work(tmp_path, 1, one)
    work(tmp_path, 2, two)
    place = {"provider": "a", "route": "/v1/messages", "model": "m"}

    def gauges() -> dict[str, float | None]:
        return {
            "idle": value("upstream_connections", host="here", state="idle"),
            "queued": value("recorder_queue_depth"),
            "spool": value("recorder_spool_bytes"),
            "calls": value("upstream_calls_inflight", provider="a"),
            "breaker": value("breaker_state", **place),
            "ready": value("ready"),
            "sums": value("mcp_server_connected", server="sums"),
            "git": value("mcp_server_connected", server="git"),
        }

    def counters() -> list[float | None]:
        return [
            value("records_written_total"),
            value("event_loop_lag_seconds_count"),
            value("recorder_write_seconds_count", to="database"),
            value("upstream_connections_opened_total", host="here"),
            value("breaker_trips_total", **place),
        ]

    both = {"idle": 4, "queued": 5, "spool": 20, "calls": 2, "breaker": 1, "ready": 0, "sums": 0, "git": 1}
    assert gauges() == both
    assert counters() == [6, 2, 2, 10, 1]

    forget_gauges(tmp_path, 2)
    alone = {"idle": 1, "queued": 4, "spool": 10, "calls": 1, "breaker": 0.5, "ready": 1, "sums": 1, "git": 1}
    assert gauges() == alone
    assert counters() == [6, 2, 2, 10, 1]

    work(tmp_path, 2, two)
    assert gauges() == both, "the one that takes its place begins with nothing under way"
    assert counters() == [9, 3, 3, 15, 2]


def test_a_server_that_is_not_configured_any_more(tmp_path: Path, value: Callable[..., float | None]) -> None:
    shown = 'metrics.show(Sample(0, True, {{}}, 0, 0, {{"sums": False}}))\nmetrics.show(Sample(0, True, {{}}, 0, 0, {{}}))'
    for number in (1, 2):
        work(tmp_path, number, shown.format())
    assert str(value("mcp_server_connected", server="sums")) == "nan"
