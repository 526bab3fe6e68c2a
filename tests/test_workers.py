"""Several workers on one port, as ``aibridge serve --workers N`` starts them.

Truth: issue 4, "Many cores" (one listening port, metrics of all workers added up, one database); what becomes of the others
when one of the processes dies or is told to stop is our promise (docs/architecture.md).
"""

import asyncio
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from aibridge.httpserver import bound, shared
from aibridge.multiprocess import count_in_files, registry_of_all
from aibridge.process import CannotStart
from aibridge.supervisor import BackOff, metrics_directory
from tests.support.crowd import (
    CHAT_STREAM,
    MESSAGES_STREAM,
    Crowd,
    answer,
    ask,
    assert_nothing_is_missing,
    gated,
    ledger,
    until,
)
from tests.support.gateway import SESSION_HEADER, STOP_SECONDS, Gateway, Row, wait_until
from tests.support.provider import Gate, Received, Reply, ThreadedProvider
from tests.support.rawclient import RawClient
from tests.test_cli import process

WORKERS = 2
MODEL = b"some-model"
TRIES = 64  # connections, of which each worker gets about half


@contextmanager
def workers(
    provider: ThreadedProvider,
    *,
    grace: float = 10,
    worker_timeout: float = 60,
    toml: str = "",
    env: Mapping[str, str] | None = None,
) -> Iterator[Gateway]:
    env = {
        **(env or {}),
        "AIBRIDGE_SERVER__WORKERS": str(WORKERS),
        "AIBRIDGE_SERVER__SHUTDOWN_GRACE": str(grace),
        "AIBRIDGE_SERVER__WORKER_TIMEOUT": str(worker_timeout),
    }
    openai = f"{provider.url}/v1"
    with Gateway(anthropic_base_url=provider.url, openai_base_url=openai, env=env, toml=toml) as gateway:
        yield gateway
        assert "Traceback" not in gateway.output


@pytest.fixture
def provider() -> Iterator[ThreadedProvider]:
    with ThreadedProvider(answer) as provider:
        yield provider


def processes(gateway: Gateway) -> dict[int, int]:
    """The process of each worker, by the worker's number."""
    return {int(number): int(pid) for number, pid in re.findall(r"worker (\d+) is ready \(process (\d+)\)", gateway.output)}


async def scraped(gateway: Gateway) -> dict[str, float]:
    """What /metrics says, summed over labels. Each time on a new connection, so any worker may answer."""
    async with gateway_client(gateway) as client:
        text = (await client.request("GET", "/metrics")).body.decode()
    found: defaultdict[str, float] = defaultdict(float)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            assert "pid" not in sample.labels
            found[sample.name.removeprefix("aibridge_")] += sample.value
    return found


def gateway_client(gateway: Gateway) -> RawClient:
    return RawClient(gateway.url)


class Open:
    """A stream in its middle: the client has its first event, and the provider waits."""

    def __init__(self, gateway: Gateway, client: RawClient, session: str) -> None:
        self._gateway = gateway
        self._client = client
        self._session = session

    @property
    def row(self) -> Row:
        return self._gateway.ledger(self._session).interception

    @property
    def instance(self) -> str:
        """Which process serves it."""
        return str(self.row["instance"])

    async def ends(self) -> bool:
        """Whether it has its last event."""
        body, _ = await self._client.rest()
        return body.endswith(b'event: message_stop\ndata: {"type":"message_stop"}\n\n')


@asynccontextmanager
async def streams_of_all(gateway: Gateway) -> AsyncIterator[dict[str, list[Open]]]:
    """Streams on every worker, by instance."""
    found: dict[str, list[Open]] = {}
    async with AsyncExitStack() as clients:
        for number in range(TRIES):
            client = await clients.enter_async_context(gateway_client(gateway))
            path, body = MESSAGES_STREAM
            await client.send("POST", path, [(SESSION_HEADER, f"session-{number}")], body)
            assert (await client.head()).status == 200
            await client.until()
            stream = Open(gateway, client, f"session-{number}")
            found.setdefault(stream.instance, []).append(stream)
            if len(found) == WORKERS:
                break
        assert len(found) == WORKERS
        yield found


def waiting_for(gate: Gate, provider: ThreadedProvider) -> None:
    def handler(received: Received) -> Reply:
        return gated(received, gate)

    provider.handle(handler)


def refuses(gateway: Gateway) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", gateway.port)) != 0


# ---- serving ----


async def test_all_workers_serve_and_count_as_one(provider: ThreadedProvider) -> None:
    with workers(provider) as gateway:
        assert f"listening on {gateway.url} ({WORKERS} workers)" in gateway.output
        assert len(set(processes(gateway).values())) == WORKERS
        sessions = [f"session-{number}" for number in range(TRIES)]
        async with asyncio.timeout(30):
            seen = await asyncio.gather(*(ask(gateway.url, MESSAGES_STREAM, [(SESSION_HEADER, one)]) for one in sessions))
        assert all(one.complete and one.status == 200 for one in seen)
        instances = {str(gateway.ledger(session).interception["instance"]) for session in sessions}
        assert len(instances) == WORKERS
        assert_nothing_is_missing(seen, gateway.database)
        for _ in range(8):
            found = await scraped(gateway)
            assert found["interceptions_total"] == found["interceptions_duration_seconds_count"] == TRIES
            assert found["prompts_total"] == TRIES and found["tokens_total"] == 12 * TRIES
            assert found["interceptions_inflight"] == 0


async def test_everything_is_in_the_one_database_under_load(provider: ThreadedProvider) -> None:
    with workers(provider) as gateway:
        crowd = Crowd(gateway.url)

        def enough() -> None:
            if len(crowd.complete) == 600:
                crowd.leave()

        crowd.on_complete = enough
        async with asyncio.timeout(60):
            await crowd.run(40)
        assert len(crowd.complete) == len(crowd.seen)
        assert_nothing_is_missing(crowd.complete, gateway.database)
        found = ledger(gateway.database)
        assert found.statuses == {"completed": len(crowd.seen)}
        assert found.counts == dict.fromkeys(("interceptions", "token_usages", "user_prompts"), len(crowd.seen))
        assert (await scraped(gateway))["interceptions_total"] == len(crowd.seen)
        assert "spool" not in gateway.output


async def test_the_metrics_of_the_processes(provider: ThreadedProvider) -> None:
    if not Path("/proc/self/stat").exists():
        pytest.skip("this system does not tell what a process uses")
    with workers(provider) as gateway:
        found = await scraped(gateway)
        resident = [_resident(pid) for pid in (gateway.process.pid, *processes(gateway).values())]
        assert found["process_resident_memory_bytes"] > 0.8 * sum(resident) > 1.5 * max(resident)
        assert found["process_open_fds"] > 10 and found["process_start_time_seconds"] > 1e9
        os.kill(processes(gateway)[1], signal.SIGKILL)
        wait_until(lambda: gateway.output.count("worker 1 is ready") == 2, "no worker has taken the place")
        assert (await scraped(gateway))["process_cpu_seconds_total"] >= found["process_cpu_seconds_total"]


def _resident(pid: int) -> int:
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def test_the_metrics_of_processes_that_have_gone(tmp_path: Path) -> None:
    registry = registry_of_all(tmp_path, 2**22 + 1)  # over the largest id there can be (proc(5), pid_max)
    assert isinstance(registry, CollectorRegistry)
    assert {family.name for family in registry.collect()} == {"python_info"}


def test_a_file_that_is_not_written_yet(tmp_path: Path) -> None:
    (tmp_path / "counter_1.db").touch()
    assert {family.name for family in registry_of_all(tmp_path, os.getpid()).collect()} >= {"python_info"}


def test_sockets_of_their_own_share_the_connections() -> None:
    if sys.platform != "linux":
        pytest.skip("only Linux spreads connections over sockets")
    groups = shared(bound("127.0.0.1", 0), 3)
    address = groups[0][0].getsockname()
    with ExitStack() as clients:
        for (listener,) in groups:
            assert clients.enter_context(listener).getsockname() == address
            listener.setblocking(False)
        for _ in range(TRIES):
            clients.enter_context(socket.create_connection(address))
        accepted = [sum(1 for _ in accepting(listener, clients)) for (listener,) in groups]
        assert sum(accepted) == TRIES and all(accepted)
        with pytest.raises(OSError, match="in use"):
            bound(*address)


def test_one_socket_for_all_where_that_is_better(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    (listener,) = bound("127.0.0.1", 0)
    with listener:
        assert shared([listener], 3) == [[listener]] * 3
        with socket.create_connection(listener.getsockname()):
            pass


def accepting(listener: socket.socket, until: ExitStack) -> Iterator[socket.socket]:
    """What waits to be accepted."""
    with suppress(BlockingIOError):
        while True:
            yield until.enter_context(listener.accept()[0])


# ---- a worker dies ----


async def test_a_worker_that_dies_is_replaced(provider: ThreadedProvider) -> None:
    gate = Gate()
    with workers(provider) as gateway:
        for _ in range(10):
            assert (await ask(gateway.url, CHAT_STREAM)).complete
        waiting_for(gate, provider)
        async with streams_of_all(gateway) as streams:
            before = await scraped(gateway)
            assert before["interceptions_total"] == 10
            assert before["interceptions_inflight"] == sum(map(len, streams.values()))
            assert before["upstream_calls_inflight"] == before["interceptions_inflight"]
            killed = processes(gateway)[1]
            os.kill(killed, signal.SIGKILL)

            def replaced() -> bool:
                return processes(gateway)[1] != killed

            answered = 0
            async with asyncio.timeout(30):
                while not replaced() or answered < 10:
                    async with gateway_client(gateway) as client:  # raises where the connection is refused
                        assert (await client.request("GET", "/healthz")).head.status == 200
                    answered += 1
            (dead,) = [instance for instance, open_ in streams.items() if open_[0].row["status"] != "in_progress"]
            for stream in streams.pop(dead):
                assert not await stream.ends()
                assert stream.row["status"] == "interrupted"
                assert stream.row["error"] == "the process ended before this was recorded"
            (alive,) = streams.values()
            assert {stream.row["status"] for stream in alive} == {"in_progress"}
            after = await scraped(gateway)
            assert after["interceptions_total"] == 10 and after["tokens_total"] == before["tokens_total"]
            assert after["interceptions_inflight"] == after["upstream_calls_inflight"] == len(alive)
            gate.set()
            assert all([await stream.ends() for stream in alive])
            assert {stream.row["status"] for stream in alive} == {"completed"}
        assert f"worker 1 (process {killed}) ended by signal 9; it is replaced" in gateway.output
        for _ in range(10):
            assert (await ask(gateway.url, CHAT_STREAM)).complete
        assert (await scraped(gateway))["interceptions_total"] == 20 + len(alive)
        assert len(list(gateway.folder.glob("aibridge-*/counter_*.db"))) == WORKERS


async def test_a_worker_that_is_told_to_stop_lets_its_streams_end(provider: ThreadedProvider) -> None:
    gate = Gate()
    waiting_for(gate, provider)
    with workers(provider) as gateway:
        async with streams_of_all(gateway) as streams:
            os.kill(processes(gateway)[2], signal.SIGTERM)
            await until(lambda: "[worker 2]: shutting down" in gateway.output, "worker 2 does not stop")
            assert not refuses(gateway)
            gate.set()
            assert all([await stream.ends() for open_ in streams.values() for stream in open_])
            await until(lambda: gateway.output.count("worker 2 is ready") == 2, "no worker has taken the place")
        (line,) = (line for line in gateway.output.splitlines() if "ended with status 0; it is replaced" in line)
        assert " INFO " in line, "it is how the gateway is restarted without a failed request, and nobody need look"


async def test_a_worker_that_hangs_is_replaced(provider: ThreadedProvider) -> None:
    """A regular expression that takes for ever keeps its event loop: it says so, is ended, and the other one serves on.

    A command that it has started, and that does not end with it, has nothing of its that would keep this from being seen.
    """
    toml = "[mcp]\nskip_models = ['^(a+)+$']\n[mcp.servers.mute]\ncommand = ['sleep', '600']\nstart_timeout = 0.1\n"
    with workers(provider, toml=toml, worker_timeout=3) as gateway:
        before = processes(gateway)
        commands = [int(pid) for worker in before.values() for pid in children(worker)]
        assert len(commands) == WORKERS
        hangs = asyncio.create_task(
            ask(gateway.url, (MESSAGES_STREAM[0], MESSAGES_STREAM[1].replace(MODEL, b"a" * 40 + b"b")))
        )
        await until(lambda: "it hangs" in gateway.output, "nobody notices")
        await until(lambda: gateway.output.count("is ready") == WORKERS + 1, "no worker has taken the place")
        assert (await hangs).status is None
        (hung,) = [number for number, pid in processes(gateway).items() if pid != before[number]]
        assert f"worker {hung} has not answered for 3 seconds, it hangs" in gateway.output
        assert f"worker {hung} (process {before[hung]}) ended by signal 6; it is replaced" in gateway.output
        assert re.search(r'most recent call first.*File ".*injection\.py"', gateway.output, re.DOTALL), (
            "it says where it hung"
        )
        assert (await ask(gateway.url, MESSAGES_STREAM)).complete
        assert ledger(gateway.database).statuses == {"completed": 1}, "it hung before anything was begun"
        for pid in commands:
            assert inherited(pid) <= 3
            os.kill(pid, signal.SIGKILL)


def children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def inherited(pid: int) -> int:
    """How many files, pipes and sockets a process has."""
    return len({link.readlink() for link in Path(f"/proc/{pid}/fd").iterdir()})


async def test_a_worker_that_stands_still_is_killed(provider: ThreadedProvider) -> None:
    """One that is stopped takes no signal but SIGKILL. The one that works is not disturbed."""
    with workers(provider, worker_timeout=3) as gateway:
        before = processes(gateway)
        os.kill(before[1], signal.SIGSTOP)
        await until(lambda: gateway.output.count("worker 1 is ready") == 2, "no worker has taken the place")
        assert f"worker 1 (process {before[1]}) ended by signal 9" in gateway.output
        assert processes(gateway)[2] == before[2]
        for _ in range(8):
            assert (await ask(gateway.url, MESSAGES_STREAM)).complete


async def test_one_that_stands_still_does_not_keep_the_others_from_ending(provider: ThreadedProvider) -> None:
    """With the second signal it has fifteen seconds: nobody waits until it would be taken for hung."""
    with workers(provider, worker_timeout=600) as gateway:
        os.kill(processes(gateway)[1], signal.SIGSTOP)
        gateway.process.send_signal(signal.SIGTERM)
        await until(lambda: "[worker 2]: shutting down" in gateway.output, "nobody stops")
        gateway.process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(gateway.process.wait, 15 + STOP_SECONDS) == -signal.SIGTERM
        assert "has not ended in time" in gateway.output


def test_the_pause_before_a_replacement() -> None:
    back_off = BackOff()
    assert [back_off.after(1) for _ in range(7)] == [0, 0.5, 1, 2, 4, 8, 10]
    assert [back_off.after(seconds) for seconds in (60, 1, 1)] == [0, 0.5, 1]


# ---- stopping ----


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("to", ["supervisor", "all"])
async def test_streams_may_end(provider: ThreadedProvider, number: signal.Signals, to: str) -> None:
    """A terminal sends SIGINT to all processes of its foreground group, and systemd SIGTERM to all of a service
    (systemd.kill(5), KillMode=control-group): that is one order to stop, not two.
    """
    gate = Gate()
    waiting_for(gate, provider)
    with workers(provider) as gateway:
        metrics = [path for path in gateway.folder.glob("aibridge-*") if path.is_dir()]
        assert [stat.S_IMODE(path.stat().st_mode) for path in metrics] == [0o700]
        async with streams_of_all(gateway) as streams:
            others = list(processes(gateway).values()) if to == "all" else []
            for pid in (*others, gateway.process.pid):
                os.kill(pid, number)
            await until(lambda: refuses(gateway), "connections are still accepted")
            await until(lambda: gateway.output.count("shutting down") == WORKERS, "not all workers stop")
            for pid in others:
                os.kill(pid, number)
            gate.set()
            assert all([await stream.ends() for open_ in streams.values() for stream in open_])
        assert gateway.process.wait(STOP_SECONDS) == -number
        assert ledger(gateway.database).statuses == {"completed": sum(map(len, streams.values()))}
        assert "replaced" not in gateway.output and "ERROR" not in gateway.output
        assert not any(path.exists() for path in metrics)


async def test_a_second_signal_hurries(provider: ThreadedProvider) -> None:
    gate = Gate()
    waiting_for(gate, provider)
    with workers(provider, grace=60) as gateway:
        async with streams_of_all(gateway) as streams:
            gateway.process.send_signal(signal.SIGTERM)
            await until(lambda: gateway.output.count("shutting down") == WORKERS, "not all workers stop")
            gateway.process.send_signal(signal.SIGTERM)
            assert not any([await stream.ends() for open_ in streams.values() for stream in open_])
        assert gateway.process.wait(STOP_SECONDS) == -signal.SIGTERM
        assert ledger(gateway.database).statuses == {"interrupted": sum(map(len, streams.values()))}


async def test_workers_do_not_outlive_the_supervisor(provider: ThreadedProvider) -> None:
    gate = Gate()
    waiting_for(gate, provider)
    with workers(provider) as gateway:
        async with streams_of_all(gateway) as streams:
            gateway.kill()
            await until(lambda: gateway.output.count("shutting down") == WORKERS, "not all workers stop")
            await until(lambda: refuses(gateway), "connections are still accepted")
            gate.set()
            assert all([await stream.ends() for open_ in streams.values() for stream in open_])
        spool = gateway.database.with_name("aibridge.db-spool")
        await until(lambda: not list(spool.glob("*.jsonl")), "not all workers have closed the database")
        assert ledger(gateway.database).statuses == {"completed": sum(map(len, streams.values()))}


# ---- starting ----


def test_one_worker_needs_no_supervisor() -> None:
    with Gateway(env={"AIBRIDGE_SERVER__WORKERS": "1"}) as gateway:
        assert "worker" not in gateway.output and not list(gateway.folder.glob("aibridge-*"))


@pytest.mark.parametrize("taken_by", ["a socket", "workers"])
def test_a_port_that_is_taken(tmp_path: Path, provider: ThreadedProvider, taken_by: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other, workers(provider) as gateway:
        port = gateway.port if taken_by == "workers" else other.getsockname()[1]
        done = process("serve", "--workers", "2", "--port", str(port), folder=tmp_path)
    assert done.returncode == 3
    assert done.stdout.count("address already in use") == 1 and "Traceback" not in done.stdout


def test_a_database_that_cannot_be_opened(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    env = {"AIBRIDGE_DATABASE__URL": "sqlite:///file/a.db", "TMPDIR": str(tmp_path)}
    done = process("serve", "--workers", "3", "--port", "0", folder=tmp_path, env=env)
    assert done.returncode == 3
    assert done.stdout.count("cannot start") == 1 and "file" in done.stdout and "Traceback" not in done.stdout
    assert not list(tmp_path.glob("aibridge-*"))


def test_no_place_for_the_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(CannotStart, match="nowhere"), metrics_directory():
        pass


def test_there_is_room_for_metrics_before_they_are_counted(tmp_path: Path) -> None:
    """On a full disk a write into a hole of a file that is mapped ends the process (mmap(2), SIGBUS): there are no holes."""
    script = """
import sys; from pathlib import Path; from aibridge.multiprocess import count_in_files
count_in_files(Path(sys.argv[1]), 1)
from prometheus_client import CollectorRegistry; from aibridge.metrics import Metrics
Metrics(CollectorRegistry())
"""
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, timeout=60)
    files = list(tmp_path.glob("*.db"))
    assert files and all(path.stat().st_blocks * 512 >= path.stat().st_size > 0 for path in files)


MANY_SERIES = """
import resource, sys
from pathlib import Path
from msgspec import structs
from prometheus_client import CollectorRegistry
from aibridge.metrics import Metrics
from aibridge.multiprocess import count_in_files
from tests.support.records import ended, start

count_in_files(Path(sys.argv[1]), 1)
metrics = Metrics(CollectorRegistry())
if limit := int(sys.argv[2]):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
for number in range(int(sys.argv[3])):
    actor = f"{number % 5000:064}"
    begun = structs.replace(start(), id=str(number), initiator_id=actor, model="m" * (1 + number // 5000))
    metrics(begun)
    metrics(structs.replace(ended(), interception_id=begun.id))
"""


def count_many(directory: Path, limit: int, interceptions: int) -> str:
    """Have a worker count so many interceptions of different actors, with files of up to `limit` bytes, or any for 0."""
    line = [sys.executable, "-c", MANY_SERIES, str(directory), str(limit), str(interceptions)]
    root = Path(__file__).parents[1]
    done = subprocess.run(line, cwd=root, capture_output=True, text=True, check=True, timeout=60)
    return done.stderr


def ended_in(directory: Path) -> float:
    """How many interceptions have ended, as a scrape says."""
    metrics = registry_of_all(directory, 2**22 + 1).collect()
    return sum(sample.value for metric in metrics for sample in metric.samples if sample.name == "interceptions_total")


def test_files_of_metrics_grow_without_holes(tmp_path: Path) -> None:
    assert count_many(tmp_path, 0, 10_000) == ""
    counter = (tmp_path / "counter_1.db").stat()
    assert counter.st_size >= 4 << 20 and counter.st_blocks * 512 >= counter.st_size
    assert ended_in(tmp_path) == 10_000
    count_many(tmp_path, 0, 10_000)  # the worker that takes its place
    assert ended_in(tmp_path) == 20_000


def test_files_of_metrics_that_cannot_grow(tmp_path: Path) -> None:
    """As on a full disk. What there was is counted on, and no request gets to know of it (a failing observer is logged)."""
    said = count_many(tmp_path, 2 << 20, 10_000)
    assert said.count("\n") == 1 and "not shown from now on" in said
    counter = (tmp_path / "counter_1.db").stat()
    assert counter.st_size == 2 << 20 and counter.st_blocks * 512 >= counter.st_size
    assert 4_000 < ended_in(tmp_path) < 10_000


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no device that is always full")
def test_no_room_for_metrics(tmp_path: Path) -> None:
    (tmp_path / "counter_1.db").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        count_in_files(tmp_path, 1)
