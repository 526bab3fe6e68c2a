"""Commands end in order, and nothing of them stays. Truth: MCP 2025-11-25 (lifecycle, shutdown), POSIX process groups."""

import asyncio
import os
import sys
from pathlib import Path

import anyio
import pytest
from mcp.shared.message import SessionMessage
from mcp_types import JSONRPCNotification

from aibridge.mcp.stdio import stdio_client

PATIENCE = 20.0


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nobody reaps the orphans of a group, it is waited for to the end."""
    monkeypatch.setattr("aibridge.mcp.stdio._GRACE_SECONDS", 0.3)


def is_running(pid: int) -> bool:
    """Whether a process is there, and not only waits to be reaped by who has inherited it."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"


class Said:
    """What a command says on standard error, and why its connection was lost."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.lost: list[str] = []
        self.changed = asyncio.Event()

    def line(self, line: str) -> None:
        self.lines.append(line)
        self.changed.set()

    def reason(self, reason: str) -> None:
        self.lost.append(reason)
        self.changed.set()

    async def wait(self) -> None:
        async with asyncio.timeout(PATIENCE):
            await self.changed.wait()
            self.changed.clear()


async def run(script: str, said: Said, *, limit: int = 65_536) -> None:
    """Run a shell script until it says something or is lost, then end it."""
    async with asyncio.timeout(PATIENCE):
        async with stdio_client(["sh", "-c", script], {}, limit, said.reason, said.line):
            await said.wait()


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("exit 3", "it has exited with status 3"),
        ("kill -9 $$", "it was ended by signal 9"),
        ("exec 1>&-; sleep 30", "its output has ended"),
        ("head -c 300000 /dev/zero; cat", "it has sent a message that is too large"),
    ],
)
async def test_why_it_was_lost(script: str, reason: str) -> None:
    said = Said()
    await run(script, said)
    assert said.lost == [reason]


@pytest.mark.parametrize("end", ["exit 1", "cat", "trap '' TERM; echo ready >&2; while :; do sleep 1; done"])
async def test_nothing_of_it_stays(end: str) -> None:
    """A child that the command has left running, with the command dead, well, or deaf."""
    said = Said()
    await run(f"sleep 300 & echo $$ $! >&2; {end}", said)
    command, child = map(int, said.lines[0].split())
    assert not is_running(command)
    assert not is_running(child)


async def test_nothing_stays_of_one_that_is_cancelled() -> None:
    said = Said()
    with anyio.move_on_after(PATIENCE) as scope:
        async with stdio_client(["sh", "-c", "echo $$ >&2; cat"], {}, 1000, said.reason, said.line):
            await said.wait()
            scope.cancel()
            await anyio.sleep_forever()
    assert not is_running(int(said.lines[0]))


async def test_a_program_that_is_not_there() -> None:
    with pytest.raises(FileNotFoundError):
        async with stdio_client(["no-such-program"], {}, 1000, Said().reason, Said().line):
            pass


async def test_its_environment_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the SDK passes on by default, and what is configured; not what the gateway has."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-not-for-servers")
    said = Said()
    script = "import os, sys; sys.stderr.write(' '.join(sorted(os.environ)) + '\\n'); sys.stdin.read()"
    async with stdio_client([sys.executable, "-c", script], {"MINE": "1"}, 1000, said.reason, said.line):
        await said.wait()
    names = set(said.lines[0].split())
    assert "MINE" in names
    assert names <= {"MINE", "HOME", "LOGNAME", "PATH", "SHELL", "TERM", "USER", "LC_CTYPE"}


async def test_messages_go_both_ways_and_noise_is_skipped() -> None:
    said = Said()
    async with (
        asyncio.timeout(PATIENCE),
        stdio_client(["sh", "-c", "echo hello; echo; exec cat"], {}, 65_536, said.reason, said.line) as (read, write),
    ):
        sent = SessionMessage(JSONRPCNotification(jsonrpc="2.0", method="notifications/x", params={"é": "\n"}))
        await write.send(sent)
        received = await read.receive()
        assert isinstance(received, SessionMessage)
        assert received.message == sent.message


async def test_lines_on_standard_error_are_cut() -> None:
    said = Said()
    await run("head -c 100000 /dev/zero | tr '\\0' x >&2; echo >&2; cat", said)
    assert said.lines[0] == "x" * 500
