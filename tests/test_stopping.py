"""How the gateway ends: what ``/readyz`` says, who is let in for how long, and what becomes of streams.

Truth: issue 5 (health, lifecycle); RFC 9112 section 9.6 for ``connection: close``; the vendors' SDKs for what a client makes
of an error in a stream. With real processes.
"""

import asyncio
import json
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import anthropic
import openai
import pytest

from tests.support.crowd import MESSAGES, MESSAGES_STREAM, answer, ask, assert_nothing_is_missing, gated, ledger, until
from tests.support.gateway import SESSION_HEADER, STOP_SECONDS, Gateway, Stage, staged, wait_until
from tests.support.injected import Calls, Dialect, Says, turn
from tests.support.injected_dialects import CHAT, MESSAGES as MESSAGES_DIALECT, each_dialect
from tests.support.injected_servers import SUMS, reply, results_in, slow_sums, toml
from tests.support.provider import Gate, Received, Reply, ThreadedProvider, Wait
from tests.support.rawclient import RawClient
from tests.support.sdks import anthropic_client, openai_client
from tests.test_rolling import unused_port


@contextmanager
def serving(provider: ThreadedProvider, **server: object) -> Iterator[Gateway]:
    env = {f"AIBRIDGE_SERVER__{name.upper()}": str(value) for name, value in server.items()}
    with Gateway(anthropic_base_url=provider.url, openai_base_url=f"{provider.url}/v1", env=env) as gateway:
        yield gateway
        assert "Traceback" not in gateway.output and "ERROR" not in gateway.output


# ---- health ----


@pytest.mark.parametrize("workers", [1, 2])
async def test_a_gateway_that_ends_is_alive_and_not_ready(workers: int) -> None:
    """For as long as it lets clients in, a load balancer gets to know; the second signal ends that, too."""
    with ThreadedProvider(answer) as provider, serving(provider, workers=workers, drain_delay=600) as gateway:
        async with RawClient(gateway.url) as client:
            ready = await client.request("GET", "/readyz")
            assert (ready.head.status, json.loads(ready.body)) == (200, {"ready": True, "reasons": []})
            gateway.process.send_signal(signal.SIGTERM)
            await until(lambda: "clients are let in for another 600 seconds" in gateway.output, "it does not drain")
            ready = await client.request("GET", "/readyz")
            assert ready.head.status == 503
            assert json.loads(ready.body) == {"ready": False, "reasons": ["the server is shutting down"]}
            assert ready.head.get("connection") == "close"
        for _ in range(8):
            async with RawClient(gateway.url) as client:
                assert (await client.request("GET", "/healthz")).head.status == 200
            assert (await ask(gateway.url, MESSAGES_STREAM)).complete
        gateway.process.send_signal(signal.SIGTERM)
        assert gateway.process.wait(STOP_SECONDS) == -signal.SIGTERM
        assert ledger(gateway.database).statuses == {"completed": 8}


async def test_the_grace_begins_behind_the_delay() -> None:
    gate = Gate()
    with (
        ThreadedProvider(lambda received: gated(received, gate)) as provider,
        serving(provider, drain_delay=0.5, shutdown_grace=60) as gateway,
    ):
        stream = asyncio.create_task(ask(gateway.url, MESSAGES_STREAM))
        await until(lambda: len(provider.exchanges) == 1, "the stream has not begun")
        gateway.process.send_signal(signal.SIGTERM)
        await until(lambda: "shutting down: waiting" in gateway.output, "it does not stop")
        gate.set()
        assert (await stream).complete
        assert gateway.process.wait(STOP_SECONDS) == -signal.SIGTERM


@pytest.mark.parametrize("workers", [1, 2])
async def test_who_comes_while_it_starts_waits(tmp_path: Path, workers: int) -> None:
    """What takes its time here is an MCP server. Nobody is refused: the socket listens."""
    port = unused_port()
    servers = toml({"slow": {"command": slow_sums(tmp_path), "start_timeout": 60}})
    gateway = Gateway(port=port, toml=servers, env={"AIBRIDGE_SERVER__WORKERS": str(workers)})
    starting = asyncio.create_task(asyncio.to_thread(gateway.__enter__))
    try:
        await until(lambda: any(tmp_path.glob("started-*")), "the server is not started")
        async with RawClient(f"http://127.0.0.1:{port}") as client:
            await client.send("GET", "/healthz")
            assert "listening on" not in gateway.output
            (tmp_path / "go").touch()
            assert (await client.answer()).head.status == 200
    finally:
        (tmp_path / "go").touch()
        await starting
        gateway.__exit__(None, None, None)


# ---- streams ----


class HoldsBack:
    """A provider that calls a tool of the server `sums`, and whose next turn waits in its middle."""

    def __init__(self, dialect: Dialect) -> None:
        self._dialect = dialect
        self.gate = Gate()
        self.call = Calls("call_1", "bmcp_sums_add", '{"a": 1, "b": 2}')

    def __call__(self, received: Received) -> Reply:
        asked = received.json()
        if not results_in(self._dialect, asked):
            return reply(self._dialect, turn(1, Says("I look."), self.call), asked)
        events = list(self._dialect.events(turn(2, Says("It is three.")), asked))
        middle = len(events) // 2
        return Reply.stream([*events[:middle], Wait(self.gate), *events[middle:]])


@each_dialect
@pytest.mark.parametrize("injected", [False, True])
async def test_what_a_client_is_told_when_the_grace_is_over(dialect: Dialect, injected: bool) -> None:
    """The protocol's own error event, and the ledger has what is known; the MCP server's process has ended, too."""
    servers = toml({"sums": {"command": SUMS, "start_timeout": 30}}) if injected else ""
    with staged(servers, env={"AIBRIDGE_SERVER__SHUTDOWN_GRACE": "0.2"}) as stage, stage.scene() as scene:
        held = HoldsBack(dialect)
        scene.handler = held if injected else lambda received: Reply.stream(_half(dialect, received, held.gate))
        async with scene.client() as client:
            await client.send("POST", dialect.path, scene.lines(), dialect.request())
            assert (await client.head()).status == 200
            await scene.exchange(1 if injected else 0)
            children = _children(stage.gateway.process.pid)
            assert bool(children) is injected
            stage.gateway.process.send_signal(signal.SIGTERM)
            body, complete = await client.rest()
        assert complete, "the response ends in order: what it says is in it"
        last = json.loads(body.rstrip().rpartition(b"data: ")[2])
        if dialect is MESSAGES_DIALECT:
            assert last["type"] == "error" and "shutting down" in last["error"]["message"]
        elif dialect is CHAT:
            assert "shutting down" in last["error"]["message"]
        else:
            assert last["type"] == "response.failed" and "shutting down" in last["response"]["error"]["message"]
        assert stage.gateway.process.wait(STOP_SECONDS) == -signal.SIGTERM
        rows = scene.ledger()
        assert (rows.interception["status"], rows.interception["http_status"]) == ("interrupted", 200)
        assert [row["completeness"] for row in rows.token_usages] == (["complete", "partial"] if injected else ["partial"])
        assert [row["invocation_error"] for row in rows.tool_usages] == ([None] if injected else [])
        assert not any(map(_runs, children))


def _half(dialect: Dialect, received: Received, gate: Gate) -> list[Any]:
    events = list(dialect.events(turn(1, Says("It is three.")), received.json()))
    return [*events[: len(events) // 2], Wait(gate), *events[len(events) // 2 :]]


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _runs(pid: int) -> bool:
    """Whether there is such a process, and it is not only its remains (proc(5), state Z)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture
def short() -> Iterator[Stage]:
    with staged(env={"AIBRIDGE_SERVER__SHUTDOWN_GRACE": "0.2"}) as stage:
        yield stage


async def test_what_the_sdks_make_of_it(short: Stage) -> None:
    gate = Gate()
    with short.scene() as scene:
        scene.handler = lambda received: gated(received, gate)
        question: Any = {"model": "m", "messages": [{"role": "user", "content": "?"}]}
        async with anthropic_client(scene) as claude, openai_client(scene) as gpt:
            async with claude.messages.stream(max_tokens=9, **question) as message:
                chat: Any = await gpt.chat.completions.create(stream=True, **question)
                await scene.exchange(1)
                short.gateway.process.send_signal(signal.SIGTERM)
                with pytest.raises(anthropic.APIStatusError, match="shutting down"):
                    await message.get_final_message()
            with pytest.raises(openai.APIError, match="shutting down"):
                async for _ in chat:
                    pass


async def test_blocking_requests_may_end_too_or_are_told(short: Stage) -> None:
    gate = Gate()
    with short.scene() as scene:
        scene.reply(Reply(before=[Wait(gate)]))
        async with scene.client() as client:
            await client.send("POST", "/anthropic/v1/messages", scene.lines(), MESSAGES[1])
            await scene.exchange(0)
            short.gateway.process.send_signal(signal.SIGTERM)
            told = await client.answer()
        assert told.complete and json.loads(told.body)["type"] == "error" and b"shutting down" in told.body
        assert told.head.status == 502 and told.head.get("connection") == "close"


async def test_requests_that_are_no_interceptions_are_told_too(short: Stage) -> None:
    """One that is only being read, and one of a passthrough route: it is not that something had failed."""
    with short.scene() as scene:
        scene.reply(Reply(before=[Wait(Gate())]))
        async with scene.client() as reading, scene.client() as passing:
            await reading.send("POST", "/anthropic/v1/messages", [*scene.lines(), ("Content-Length", "9")])
            await passing.send("GET", "/anthropic/v1/models", scene.lines())
            await scene.exchange(0)
            short.gateway.process.send_signal(signal.SIGTERM)
            for client in (reading, passing):
                told = await client.answer()
                assert told.head.status == 502 and told.head.get("connection") == "close"
                assert b"shutting down" in told.body


async def test_a_client_that_is_between_two_requests() -> None:
    """It has not heard of the end, asks again, is answered and told to come no more."""
    with ThreadedProvider(answer) as provider, serving(provider, shutdown_grace=10) as gateway:
        path, body = MESSAGES
        headers = [("Content-Type", "application/json"), (SESSION_HEADER, "between")]
        async with RawClient(gateway.url) as client:
            first = await client.request("POST", path, headers, body)
            assert first.head.get("connection") is None
            gateway.process.send_signal(signal.SIGTERM)
            await until(lambda: "shutting down" in gateway.output, "it does not stop")
            second = await client.request("POST", path, headers, body)
            assert second.head.get("connection") == "close" and second.complete
            assert await client.closed() == b""
        assert gateway.process.wait(STOP_SECONDS) == -signal.SIGTERM
        assert [row["status"] for row in gateway.ledger("between").interceptions] == ["completed"] * 2


async def test_who_has_connected_by_then_is_served() -> None:
    """In the queue of the socket, where a close would reset it: the event loop stands still meanwhile."""
    with ThreadedProvider(answer) as provider, serving(provider, shutdown_grace=10) as gateway:
        gateway.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, gateway.process.pid, os.WSTOPPED)
        crowd = [asyncio.create_task(ask(gateway.url, MESSAGES_STREAM)) for _ in range(20)]
        await until(lambda: _waiting_in(gateway.port) == 20, "they have not connected")
        gateway.process.send_signal(signal.SIGTERM)
        gateway.process.send_signal(signal.SIGCONT)
        seen = await asyncio.gather(*crowd)
        assert all(one.complete and one.status == 200 for one in seen)
        assert gateway.process.wait(STOP_SECONDS) == -signal.SIGTERM
        assert_nothing_is_missing(seen, gateway.database)


def _waiting_in(port: int) -> int:
    """How many wait in the queue of a socket (proc(5), ``/proc/net/tcp``: of one that listens, it is the receive queue)."""
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(int(line[4].partition(":")[2], 16) for line in lines if line[1].endswith(f":{port:04X}") and line[3] == "0A")


# ---- what does not end ----

_HANGS: Final = """
import asyncio, time
from pathlib import Path
from aibridge import process
from aibridge.httpclient import HttpUpstream
from aibridge.server import Server

async def hangs(_):
    Path({begun!r}).touch()
    while True:  # whoever cancels it
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            pass

async def leaves_a_thread(_):
    asyncio.get_running_loop().run_in_executor(None, time.sleep, 3600)  # the end of an event loop waits for its threads

"""


def _amend(folder: Path, amendment: str) -> dict[str, str]:
    """The environment of a gateway in which something hangs. Python runs `sitecustomize` first (site)."""
    (folder / "sitecustomize.py").write_text(_HANGS.format(begun=str(folder / "begun")) + amendment)
    return {"PYTHONPATH": str(folder)}


@contextmanager
def hanging(folder: Path, amended: str, **server: object) -> Iterator[Gateway]:
    """A gateway that closes its connections to providers for ever."""
    env = {f"AIBRIDGE_SERVER__{name.upper()}": str(value) for name, value in server.items()}
    with Gateway(env=env | _amend(folder, f"HttpUpstream.aclose = hangs\n{amended}")) as gateway:
        yield gateway
        assert re.search(r"does not come to its end and is ended; it waits for: .* > hangs > sleep", gateway.output)
        assert "Traceback" not in gateway.output


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_second_signal_ends_what_hangs(tmp_path: Path, number: signal.Signals) -> None:
    """Nobody waits for ever who has asked twice; the process says what hung, and still ends by the first signal."""
    with hanging(tmp_path, "process.Orders.patience = 0.5") as gateway:
        gateway.process.send_signal(number)
        wait_until(lambda: "shutting down" in gateway.output, "it does not stop")
        gateway.process.send_signal(signal.SIGTERM)
        assert gateway.process.wait(STOP_SECONDS) == -number


@pytest.mark.parametrize("workers", [1, 2])
def test_what_cannot_be_closed_does_not_hold_up_the_end_for_ever(tmp_path: Path, workers: int) -> None:
    with hanging(tmp_path, "process._CLOSING_SECONDS = 0.5", workers=workers) as gateway:
        gateway.process.send_signal(signal.SIGTERM)
        assert gateway.process.wait(STOP_SECONDS) == -signal.SIGTERM
        assert gateway.output.count("does not come to its end") == workers


@pytest.mark.parametrize("workers", [1, 2])
def test_nor_does_a_start_that_cannot_be_broken_off(tmp_path: Path, workers: int) -> None:
    amended = _amend(tmp_path, "Server.__aenter__ = hangs\nprocess._CLOSING_SECONDS = 0.5")
    environment = {"PATH": os.environ["PATH"], "AIBRIDGE_SERVER__WORKERS": str(workers)} | amended
    command = [sys.executable, "-m", "aibridge", "serve", "--port", "0"]
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            wait_until((tmp_path / "begun").exists, "it does not start")
            process.send_signal(signal.SIGTERM)
            _, said = process.communicate(timeout=STOP_SECONDS)
        finally:
            process.kill()
    assert process.returncode == -signal.SIGTERM
    assert "does not come to its end and is ended" in said and "hangs > sleep" in said


@pytest.mark.parametrize("workers", [1, 2])
def test_nor_does_a_thread(tmp_path: Path, workers: int) -> None:
    amended = _amend(tmp_path, "HttpUpstream.aclose = leaves_a_thread\nprocess._CLOSING_SECONDS = 0.5")
    with Gateway(env={"AIBRIDGE_SERVER__WORKERS": str(workers)} | amended) as gateway:
        gateway.process.send_signal(signal.SIGTERM)
        assert gateway.process.wait(STOP_SECONDS) == -signal.SIGTERM
        assert gateway.output.count("does not come to its end") == workers


# ---- a terminal ----

_IN_TERMINAL: Final = """
import fcntl, os, sys, termios
os.setsid()
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.executable, [sys.executable, "-m", "aibridge", "serve", "--port", "0"])
"""


def test_a_window_that_is_closed_ends_the_gateway(tmp_path: Path) -> None:
    """The kernel sends SIGHUP then (tty(4), termios(3) on the closing of a terminal), which else means to reload."""
    ours, theirs = pty.openpty()
    output = (tmp_path / "output").open("wb")
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "LOGNAME": "user"}
    process = subprocess.Popen(
        [sys.executable, "-c", _IN_TERMINAL], cwd=tmp_path, env=environment, stdin=theirs, stdout=output, stderr=output
    )
    try:
        os.close(theirs)
        log = tmp_path / "output"
        wait_until(lambda: "listening on" in log.read_text(), "it does not start", 30)
        process.send_signal(signal.SIGHUP)
        wait_until(lambda: "the configuration was reloaded" in log.read_text(), "it does not reload")
        os.close(ours)
        assert process.wait(STOP_SECONDS) == -signal.SIGHUP
        assert "shutting down" in log.read_text()
    finally:
        output.close()
        if process.poll() is None:
            process.kill()
            process.wait()
