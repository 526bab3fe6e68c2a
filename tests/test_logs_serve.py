"""The log of ``aibridge serve``, as those who run it read it: from a pipe, from the first byte to the last.

Truth: issue 5 (a line when an interception starts, one when it ends; nothing secret); json of the standard library says what
is JSON; the ledger says what has become of each interception.
"""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.crowd import ANY, MESSAGES, MESSAGES_STREAM, answer, ask, gated
from tests.support.gateway import SESSION_HEADER, START_SECONDS, STOP_SECONDS, Gateway, staged, wait_until
from tests.support.injected_dialects import MESSAGES as MESSAGES_DIALECT
from tests.support.injected_servers import calls, play, toml
from tests.support.provider import Gate, Received, Reply, ThreadedProvider
from tests.support.rawclient import RawClient
from tests.test_cli import process

KEY = "sk-ant-configured-5d0d7c1e"
OWN_KEY = "sk-proj-brought-91f3ab77"
MCP_KEY = "mcp-token-0a1b2c3d"
PROMPT = "How many?"  # of the crowd's requests
HOSTILE = 'evil\n{"level":"info"}\x1b]0;title\x07\u2028\x9b31m' + "x" * 5000

TOML = f"""
[providers.anthropic]
api_key = "{KEY}"
[providers.absent]
kind = "openai"
base_url = "http://127.0.0.1:9/v1"
[mcp.servers.gone]
url = "http://127.0.0.1:9/mcp"
headers = {{ Authorization = "Bearer {MCP_KEY}" }}
start_timeout = 0.1
[mcp.servers.odd]
command = [{json.dumps(sys.executable)}, "-c", "import sys; sys.exit('\\\\x1b[2J odd')"]
start_timeout = 0.1
"""


def behave(received: Received) -> Reply:
    """Of the provider: it fails where the model says so, and quotes the key."""
    if b"unhappy" in received.body:
        return Reply.json({"error": {"message": f"{KEY} is not valid: {HOSTILE}"}}, 500)
    return answer(received)


@contextmanager
def logging_gateway(format: str, workers: int) -> Iterator[tuple[Gateway, ThreadedProvider]]:
    env = {
        "AIBRIDGE_LOG__FORMAT": format,
        "AIBRIDGE_LOG__LEVEL": "debug",
        "AIBRIDGE_SERVER__WORKERS": str(workers),
    }
    with (
        ThreadedProvider(behave) as provider,
        Gateway(anthropic_base_url=provider.url, openai_base_url=f"{provider.url}/v1", env=env, toml=TOML) as gateway,
    ):
        yield gateway, provider


def of_model(request: tuple[str, bytes], model: str) -> tuple[str, bytes]:
    path, body = request
    return path, json.dumps(json.loads(body) | {"model": model}).encode()


async def traffic(gateway: Gateway, provider: ThreadedProvider) -> int:
    """All kinds of ends. Answers how many interceptions there were."""
    own = [("authorization", f"Bearer {OWN_KEY}"), (SESSION_HEADER, "session-1")]
    requests = [
        *ANY * 4,
        of_model(MESSAGES, "unhappy"),
        of_model(MESSAGES_STREAM, HOSTILE),
        of_model(("/absent/v1/chat/completions", MESSAGES[1]), "m"),
    ]
    async with asyncio.timeout(60):
        await asyncio.gather(*(ask(gateway.url, request, own) for request in requests))
        async with RawClient(gateway.url) as client:
            assert (await client.request("GET", "/anthropic/v1/nowhere")).head.status == 404
            assert (await client.request("POST", MESSAGES[0], own, b"{")).head.status == 400
        gate = Gate()
        provider.handle(lambda received: gated(received, gate))
        async with RawClient(gateway.url) as client:
            await client.send("POST", MESSAGES_STREAM[0], own, MESSAGES_STREAM[1])
            await client.head()
            await client.until()
        gateway.ledger("session-1")
        wait_until(lambda: unended(gateway) == 0, "the client who left is not noticed")
        gate.set()
    return len(requests) + 1


def unended(gateway: Gateway) -> int:
    return sum(row["ended_at"] is None for row in gateway.ledger("session-1").interceptions)


@pytest.mark.parametrize("workers", [1, 2])
async def test_every_line_is_json_from_the_start_to_the_end(workers: int) -> None:
    with logging_gateway("json", workers) as (gateway, provider):
        count = await traffic(gateway, provider)
        gateway.stop()
        rows = {row["id"]: row for row in gateway.ledger("session-1").interceptions}
        tokens = {row["interception_id"]: row for row in gateway.ledger("session-1").token_usages}
        output = gateway.output
    assert output.endswith("\n") and all(line.isprintable() for line in output[:-1].split("\n"))
    lines: list[dict[str, Any]] = [json.loads(line) for line in output.splitlines()]
    assert all({"time", "level", "logger", "message"} <= set(line) for line in lines)
    assert max(map(len, output.splitlines())) < 16_384
    serving = {line.get("worker") for line in lines if line["logger"] == "aibridge.process"}
    assert serving == ({None} if workers == 1 else {1, 2})
    assert any(line["message"].startswith("MCP server gone: not connected") for line in lines)

    started = {line["interception_id"]: line for line in lines if line["message"] == "interception started"}
    ended = {line["interception_id"]: line for line in lines if line["message"] == "interception ended"}
    assert sum(line["message"].startswith("interception ") for line in lines) == 2 * count
    assert set(started) == set(ended) == set(rows) and len(rows) == count
    for one, line in ended.items():
        row = rows[one]
        assert started[one].items() <= (line | {key: started[one][key] for key in ("time", "level", "message")}).items()
        assert (line["status"], line.get("http_status")) == (row["status"], row["http_status"])
        assert (line["actor"], line["provider"], line["route"], line["session"]) == (
            row["initiator_id"],
            row["provider_name"],
            row["route"],
            "session-1",
        )
        assert line["streaming"] == bool(row["streaming"]) and line["duration_ms"] > 0 and line["commit_ms"] >= 0
        assert (line["hops"], line["attempts"], line["injected_tool_calls"], line["other_tool_calls"]) == (1, 1, 0, 0)
        assert line.get("time_to_first_byte_ms") == row["time_to_first_byte_ms"]
        for name in ("input_tokens", "output_tokens"):
            assert line.get(name) == (tokens[one][name] if one in tokens else None)
    statuses = [line["status"] for line in ended.values()]
    assert {status: statuses.count(status) for status in set(statuses)} == {
        "completed": count - 3,
        "failed": 2,
        "client_disconnected": 1,
    }
    nothing_secret(output)


def nothing_secret(output: str) -> None:
    for secret in (KEY, OWN_KEY, MCP_KEY, PROMPT):
        assert secret not in output
    assert "word word" not in output, "of the answers"


async def test_the_console() -> None:
    with logging_gateway("console", 2) as (gateway, provider):
        count = await traffic(gateway, provider)
        gateway.stop()
        output = gateway.output
    begin = re.compile(
        r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} (DEBUG|INFO|WARNING) +aibridge\.\w+(\.\w+)*( \[worker [12]\])?: \S"
    )
    for line in output.splitlines():
        assert line.isprintable() and begin.match(line), line
    for what in ("started", "ended"):
        assert len(re.findall(rf" aibridge\.events \[worker [12]\]: interception {what} interception_id=", output)) == count
    assert len(re.findall(r" interception ended .* status=failed .*error=", output)) >= 1
    nothing_secret(output)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_what_keeps_it_from_starting_is_json_too(tmp_path: Path, workers: str) -> None:
    (tmp_path / "file").touch()
    env = {
        "AIBRIDGE_DATABASE__URL": "sqlite:///file/a.db",
        "AIBRIDGE_LOG__FORMAT": "json",
        "AIBRIDGE_SERVER__WORKERS": workers,
        "TMPDIR": str(tmp_path),
    }
    done = process("serve", "--port", "0", folder=tmp_path, env=env)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 3 and sum("cannot start" in line["message"] for line in lines) == 1
    assert "Traceback" not in done.stdout


async def test_turns_and_tools_are_counted() -> None:
    """Of a response that was made of three turns of the model, with tools of a real MCP server."""
    command = [sys.executable, "-m", "tests.support.sums_server"]
    sums = {"command": command, "start_timeout": 30, "env": {"PYTHONPATH": str(Path(__file__).parent.parent)}}
    with staged(toml({"sums": sums}), {"AIBRIDGE_LOG__FORMAT": "json"}) as stage:
        add = [calls("sums", "add", a=number, b=1) for number in range(3)]
        played = await play(stage, MESSAGES_DIALECT, add[:2], add[2:])
        stage.gateway.stop()
        lines = [json.loads(line) for line in stage.gateway.output.splitlines()]
    (end,) = (line for line in lines if line["message"] == "interception ended")
    assert (end["hops"], end["attempts"], end["injected_tool_calls"], end["other_tool_calls"]) == (3, 3, 3, 0)
    rows = played.rows.token_usages
    assert len(rows) == 3 and end["output_tokens"] == sum(row["output_tokens"] for row in rows)


class Unread:
    """A gateway whose log nobody reads until somebody wants to."""

    def __init__(self, folder: Path, provider: ThreadedProvider) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "aibridge", "serve", "--port", "0"],
            cwd=folder,
            env={
                "PATH": os.environ.get("PATH", os.defpath),
                "HOME": str(folder),
                "LOGNAME": "user",
                "ANTHROPIC_BASE_URL": provider.url,
                "AIBRIDGE_LOG__FORMAT": "json",
            },
            stderr=subprocess.PIPE,
        )
        assert self.process.stderr is not None
        self._pipe = self.process.stderr
        timer = threading.Timer(START_SECONDS, self.process.kill)
        timer.start()
        found = re.search(rb"http://127\.0\.0\.1:\d+", self._pipe.readline())
        timer.cancel()
        assert found is not None
        self.url = found[0].decode()

    def rest(self) -> list[dict[str, Any]]:
        """All that is in the log, to its end."""
        timer = threading.Timer(STOP_SECONDS, self.process.kill)
        timer.start()
        lines = self._pipe.read().splitlines()
        timer.cancel()
        self.process.wait(STOP_SECONDS)
        self._pipe.close()
        return [json.loads(line) for line in lines]


async def test_nobody_reads_the_log(tmp_path: Path) -> None:
    """A pipe takes 64 KB (pipe(7)), a hundred requests or so. All are served, and a late reader gets every line."""
    with ThreadedProvider(answer) as provider:
        gateway = Unread(tmp_path, provider)
        long = "m" * 190
        headers = [(SESSION_HEADER, "s" * 190)]
        async with asyncio.timeout(60):
            for _ in range(10):
                seen = await asyncio.gather(*(ask(gateway.url, of_model(MESSAGES, long), headers) for _ in range(20)))
                assert all(one.complete for one in seen)
        gateway.process.send_signal(signal.SIGTERM)
        lines = await asyncio.to_thread(gateway.rest)
    assert gateway.process.returncode == -signal.SIGTERM
    assert [line["message"] for line in lines].count("interception ended") == 200
    assert sum(len(json.dumps(line)) for line in lines) > 2 * 65536


async def test_nobody_ever_reads_the_log(tmp_path: Path) -> None:
    """It stops all the same."""
    with ThreadedProvider(answer) as provider:
        gateway = Unread(tmp_path, provider)
        async with asyncio.timeout(60):
            for _ in range(10):
                await asyncio.gather(*(ask(gateway.url, of_model(MESSAGES, "m" * 190)) for _ in range(20)))
        gateway.process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(gateway.process.wait, STOP_SECONDS) == -signal.SIGTERM
        gateway.rest()
