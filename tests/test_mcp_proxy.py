"""The proxy against real servers, in processes of their own.

Truth: the servers, which are of the official SDKs (Python, TypeScript) and fastmcp; clients.md 6; issue 3. What the proxy
says when something fails is our choice.
"""

import asyncio
import logging
import os
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, closing
from itertools import pairwise
from pathlib import Path
from typing import Any

import anyio
import mcp_types as types
import msgspec
import pytest

from aibridge.mcp.approvals import MemoryApprovals
from aibridge.mcp.proxy import McpProxy, ServerState
from aibridge.mcp.settings import McpServer
from aibridge.tools import Media, Outcome, Text, Tool, Toolset
from tests.support.claude_code import node, why_not
from tests.support.mcp_servers import SECRET, Process, command, everything, everything_server, server

PATIENCE = 20.0


@pytest.fixture(scope="module")
def modern() -> Iterator[Process]:
    with server("sdk", "http") as process:
        yield process


@pytest.fixture(scope="module")
def legacy() -> Iterator[Process]:
    with server("sdk", "http", "legacy") as process:
        yield process


@pytest.fixture(scope="module")
def sse() -> Iterator[Process]:
    with server("sdk", "sse") as process:
        yield process


@pytest.fixture(scope="module")
def plain() -> Iterator[Process]:
    """One that answers with JSON, when the call has ended, and not with an event stream."""
    with server("sdk", "http", "legacy", "json") as process:
        yield process


WAYS = ["modern", "legacy", "plain", "sse", "stdio"]


@pytest.fixture
def at(request: pytest.FixtureRequest) -> Callable[..., McpServer]:
    """Settings for the server on the SDK, reached in one of `WAYS`."""

    def settings(way: str, **more: Any) -> McpServer:
        if way == "stdio":
            return McpServer(command=tuple(command("sdk")), **more)
        process: Process = request.getfixturevalue(way)
        return McpServer(url=process.url, transport="sse" if way == "sse" else "http", **more)

    return settings


@asynccontextmanager
async def proxy(*servers: McpServer, **more: Any) -> AsyncIterator[McpProxy]:
    """A proxy for servers called a, b, ..."""
    async with McpProxy(dict(zip("abcdef", servers, strict=False)), **more) as found:
        yield found


def named(found: McpProxy, tool: str) -> Tool:
    return next(offered for offered in found.tools() if offered.tool == tool)


async def call(found: McpProxy, tool: str, **arguments: Any) -> Outcome:
    return await found.call(named(found, tool), msgspec.json.encode(arguments).decode())


def said(outcome: Outcome) -> str:
    assert not outcome.is_error, outcome
    (piece,) = outcome.content
    assert isinstance(piece, Text)
    return piece.text


async def until(condition: Callable[[], Any]) -> None:
    """What another process brings about."""
    async with asyncio.timeout(PATIENCE):
        while not condition():
            await asyncio.sleep(0.01)


def encoded(found: McpProxy) -> bytes:
    return Toolset(found.tools()).encoded


def state(found: McpProxy) -> ServerState:
    return found.states()[0]


# ---- what is answered ----


@pytest.mark.parametrize("way", WAYS)
async def test_every_kind_of_answer(at: Callable[..., McpServer], way: str) -> None:
    async with proxy(at(way, max_result_bytes=100_000)) as found:
        assert said(await call(found, "add", a=1, b=2)) == "3"
        assert await call(found, "fail") == Outcome((Text("It went wrong."),), is_error=True, error="It went wrong.")
        assert said(await call(found, "empty")) == "(no output)"
        assert said(await call(found, "structured")) == '{"n":1}'
        assert said(await call(found, "odd.name/with:chars")) == "called odd.name/with:chars"
        assert said(await call(found, "big", size=500_000)).endswith("[cut: 500000 bytes, of which 100000 are here]")
        kinds = [piece.kind if isinstance(piece, Media) else "text" for piece in (await call(found, "media")).content]
        assert kinds == ["text", "image", "audio", "text", "file", "text"]
        assert (await call(found, "ask")).is_error
        (about,) = found.states()
        assert (about.state, about.reason) == ("connected", None)
        assert found.connected() == {"a": True}
        assert (about.server_name, about.server_version) == ("sdk", "1.2.3")
        assert about.protocol_version == ("2025-11-25" if way in ("legacy", "plain") else "2026-07-28")
        assert {tool.tool: tool.reason for tool in about.tools}["either"] == "bad schema: providers refuse anyOf at its top"


async def test_large_answers_arrive(modern: Process, legacy: Process) -> None:
    for process in (modern, legacy):
        async with proxy(McpServer(url=process.url, max_result_bytes=4_000_000)) as found:
            assert said(await call(found, "big", size=3_000_000)) == "x" * 3_000_000


async def test_answers_that_are_far_too_large_are_not_read(modern: Process, legacy: Process, plain: Process) -> None:
    for process in (modern, legacy, plain):
        async with proxy(McpServer(url=process.url, max_result_bytes=1000)) as found:
            assert (await call(found, "big", size=3_000_000)).is_error
            assert said(await call(found, "add", a=1, b=2)) == "3"
            assert state(found).state == "connected"


@pytest.mark.parametrize("way", ["http", "stdio"])
async def test_a_server_on_fastmcp(way: str) -> None:
    if way == "stdio":
        await _check_fastmcp(McpServer(command=tuple(command("fastmcp")), start_timeout=30))
        return
    with server("fastmcp", "http") as process:
        await _check_fastmcp(McpServer(url=process.url))


async def _check_fastmcp(settings: McpServer) -> None:
    async with proxy(settings) as found:
        assert said(await call(found, "add", a=1, b=2)) == "3"
        assert said(await call(found, "cities")) == '["Bern","Oslo"]'
        assert said(await call(found, "weather", city="Bern")) == '{"city":"Bern","degrees":21}'
        assert "It went wrong." in str((await call(found, "fail")).error)
        (picture,) = (await call(found, "picture")).content
        assert isinstance(picture, Media)
        assert picture.media_type == "image/png"


async def test_the_time_server() -> None:
    settings = McpServer(command=(sys.executable, "-m", "mcp_server_time"), read_only=False, start_timeout=30)
    async with proxy(settings) as found:
        assert [tool.name for tool in found.tools()] == ["bmcp_a_convert_time", "bmcp_a_get_current_time"]
        answer = await call(found, "convert_time", time="10:00", source_timezone="UTC", target_timezone="Asia/Tokyo")
        assert '"+9.0h"' in said(answer)
        assert (await call(found, "get_current_time")).is_error  # it lacks an argument


def _why_no_everything() -> str:
    return why_not(node) or why_not(everything)


@pytest.mark.skipif(bool(_why_no_everything()), reason=_why_no_everything())
@pytest.mark.parametrize("way", ["http", "sse", "stdio"])
async def test_the_reference_server(way: str) -> None:
    if way == "stdio":
        await _check_everything(
            McpServer(command=(str(node()), str(everything()), "stdio"), call_timeout=2, start_timeout=30)
        )
        return
    with everything_server(way) as process:
        await _check_everything(McpServer(url=process.url, transport="sse" if way == "sse" else "http", call_timeout=2))


async def _check_everything(settings: McpServer) -> None:
    async with proxy(settings) as found:
        assert state(found).protocol_version == "2025-11-25"
        assert said(await call(found, "get-sum", a=1, b=2)) == "The sum of 1 and 2 is 3."
        assert [type(piece) for piece in (await call(found, "get-tiny-image")).content] == [Text, Media, Text]
        structured = msgspec.json.decode(said(await call(found, "get-structured-content", location="Chicago")))
        assert set(structured) == {"temperature", "conditions", "humidity"}
        links = await call(found, "get-resource-links", count=2)
        assert [piece.text[:15] for piece in links.content[1:] if isinstance(piece, Text)] == ["Resource demo:/"] * 2
        assert not (await call(found, "get-resource-reference", resourceType="Blob", resourceId=1)).is_error
        assert "Invalid" in str((await call(found, "get-sum", a="x")).error)
        begun = time.monotonic()
        late = await call(found, "trigger-long-running-operation", duration=60, steps=60)
        assert "did not answer within 2 s" in str(late.error)
        assert time.monotonic() - begun < 3
        assert said(await call(found, "echo", message="still there")) == "Echo: still there"


@pytest.mark.skipif(bool(_why_no_everything()), reason=_why_no_everything())
async def test_the_reference_server_forgets_its_sessions() -> None:
    """It says so with a 400 (clients.md 6)."""
    with everything_server("http") as process:
        async with proxy(McpServer(url=process.url)) as found:
            process.restart()
            assert said(await call(found, "echo", message="again")) == "Echo: again"


# ---- the same bytes ----


@pytest.mark.parametrize("kind", ["modern", "legacy"])
async def test_the_tools_are_the_same_however_they_are_listed(kind: str) -> None:
    seen = set()
    with server("sdk", "http", *(["legacy"] if kind == "legacy" else [])) as process:
        for _ in range(2):
            for _ in range(8):
                async with proxy(McpServer(url=process.url), McpServer(url=process.url, allow=("a",))) as found:
                    seen.add(encoded(found).replace(str(process.port).encode(), b"PORT"))
            process.restart()
    assert len(seen) == 1


# ---- what goes wrong ----


@pytest.mark.parametrize("way", WAYS)
async def test_a_call_that_is_never_answered_fails_in_time_and_ends_at_the_server(
    at: Callable[..., McpServer], way: str
) -> None:
    async with proxy(at(way, call_timeout=0.5)) as found:
        begun = time.monotonic()
        never = await call(found, "never")
        assert 0.4 < time.monotonic() - begun < 2
        assert never == Outcome.failed(
            "The MCP server 'a' did not answer within 0.5 s. The call was given up; it may have had effects."
        )
        await _until_idle(found)


@pytest.mark.parametrize("way", WAYS)
async def test_a_call_whose_client_has_gone_ends_at_the_server(at: Callable[..., McpServer], way: str) -> None:
    async with proxy(at(way)) as found:
        calling = asyncio.create_task(call(found, "never"))
        async with asyncio.timeout(PATIENCE):
            while not said(await call(found, "running")).startswith("1 "):
                await asyncio.sleep(0.01)
        calling.cancel()
        begun = time.monotonic()
        with pytest.raises(asyncio.CancelledError):
            await calling
        assert time.monotonic() - begun < 0.5
        await _until_idle(found)


async def _until_idle(found: McpProxy) -> None:
    async with asyncio.timeout(PATIENCE):
        while not said(await call(found, "running")).startswith("0 "):
            await asyncio.sleep(0.01)


async def test_so_many_calls_at_once_and_no_more() -> None:
    with server("sdk", "http") as process:
        async with proxy(McpServer(url=process.url, max_concurrent_calls=3)) as found:
            answers = await asyncio.gather(*(call(found, "slow", seconds=0.05) for _ in range(20)))
            assert {said(answer) for answer in answers} == {"done"}
            assert said(await call(found, "running")) == "0 3"


async def test_waiting_for_other_calls_counts(at: Callable[..., McpServer]) -> None:
    async with proxy(at("modern", max_concurrent_calls=1, call_timeout=0.5)) as found:
        begun = time.monotonic()
        first, second = await asyncio.gather(call(found, "never"), call(found, "add", a=1, b=2))
        assert time.monotonic() - begun < 2
        assert first.is_error and second.is_error


@pytest.mark.parametrize("kind", ["modern", "legacy", "sse"])
async def test_a_server_that_was_restarted_is_called_again(kind: str) -> None:
    """Its sessions are gone: 404 (Python), the end of the event stream (SSE), nothing at all (2026-07-28)."""
    options = ["legacy"] if kind == "legacy" else []
    with server("sdk", "sse" if kind == "sse" else "http", *options) as process:
        settings = McpServer(url=process.url, transport="sse" if kind == "sse" else "http")
        async with proxy(settings) as found:
            before = encoded(found)
            process.restart()
            assert said(await call(found, "add", a=1, b=2)) == "3"
            assert encoded(found) == before
            assert state(found).state == "connected"


@pytest.mark.parametrize("kind", ["modern", "legacy", "sse"])
async def test_a_server_that_is_away_keeps_its_tools(kind: str) -> None:
    options = ["legacy"] if kind == "legacy" else []
    with server("sdk", "sse" if kind == "sse" else "http", *options) as process:
        settings = McpServer(url=process.url, transport="sse" if kind == "sse" else "http")
        async with proxy(settings) as found:
            before = encoded(found)
            process.kill()
            failed = await call(found, "add", a=1, b=2)
            assert "it cannot be reached" in str(failed.error)
            assert (state(found).state, encoded(found)) == ("failed", before)
            process.start()
            assert said(await call(found, "add", a=1, b=2)) == "3"  # without waiting for the back-off to end
            assert encoded(found) == before


@pytest.mark.parametrize("kind", ["http", "sse", "stdio"])
async def test_a_server_that_dies_in_a_call_is_not_asked_again(kind: str) -> None:
    """It may have run the call."""
    if kind == "stdio":
        async with proxy(McpServer(command=tuple(command("sdk")), start_timeout=30)) as found:
            dead = await call(found, "die")
            assert "the connection was lost" in str(dead.error)
            assert said(await call(found, "add", a=1, b=2)) == "3"
            assert state(found).state == "connected"
        return
    with server("sdk", kind) as process:
        async with proxy(McpServer(url=process.url, transport="sse" if kind == "sse" else "http")) as found:
            begun = time.monotonic()
            dead = await call(found, "die")
            assert dead.is_error and "failed the call" in str(dead.error)
            assert time.monotonic() - begun < 5


async def test_broken_servers_block_nobody(at: Callable[..., McpServer]) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as silent, closing(socket.create_server(("127.0.0.1", 0))) as other:
        silent_url = f"http://127.0.0.1:{silent.getsockname()[1]}/mcp"
        refusing = other.getsockname()[1]
        other.close()
        begun = time.monotonic()
        async with proxy(
            at("modern"),
            McpServer(url=silent_url, start_timeout=0.5),
            McpServer(url=f"http://127.0.0.1:{refusing}/mcp"),
            McpServer(command=("no-such-program",)),
            McpServer(command=("sh", "-c", "echo 'No module named x' >&2; exit 1")),
            McpServer(url=silent_url, transport="sse", start_timeout=0.5),
        ) as found:
            assert time.monotonic() - begun < 5
            assert said(await call(found, "add", a=1, b=2)) == "3"
            about = {each.name: (each.state, each.reason) for each in found.states()}
            assert about["a"] == ("connected", None)
            assert about["b"] == about["f"] == ("connecting", None)
            assert about["c"][0] == "failed" and "cannot be reached" in str(about["c"][1])
            assert about["d"] == ("failed", "the program was not found")
            assert about["e"] == ("failed", "it has exited with status 1 (it said: No module named x)")
            stale = msgspec.structs.replace(named(found, "add"), server="b")
            assert str((await found.call(stale, "{}")).error).startswith("The MCP server 'b' is not connected: ")
        assert time.monotonic() - begun < 15


async def test_entering_can_be_given_up(tmp_path: Path) -> None:
    """Nothing of what was started stays, and it does not take as long as a start may."""
    told = tmp_path / "pid"
    script = f"import os, pathlib, time; pathlib.Path({str(told)!r}).write_text(str(os.getpid())); time.sleep(600)"
    silent = McpServer(command=(sys.executable, "-c", script), start_timeout=600)
    entering = asyncio.create_task(McpProxy({"a": silent}).__aenter__())
    await until(lambda: told.exists() and told.read_text())
    begun = time.monotonic()
    entering.cancel()
    with pytest.raises(asyncio.CancelledError):
        await entering
    assert time.monotonic() - begun < 8
    assert not [task for task in asyncio.all_tasks() if task.get_name().startswith("MCP server")]
    with pytest.raises(ProcessLookupError):
        os.kill(int(told.read_text()), 0)


async def test_a_server_that_comes_late_is_connected_in_the_background() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as reserved:
        process = server("sdk", "http", port=reserved.getsockname()[1])
    async with proxy(McpServer(url=process.url)) as found:
        assert (found.tools(), state(found).state) == ((), "failed")
        with process:
            await until(found.tools)
            assert said(await call(found, "add", a=1, b=2)) == "3"


async def test_an_address_where_no_server_is(modern: Process) -> None:
    async with proxy(McpServer(url=modern.url + "x"), McpServer(url=modern.url + "x", transport="sse")) as found:
        assert [each.reason for each in found.states()] == ["HTTP 404 Not Found"] * 2
        assert found.connected() == {"a": False, "b": False}


@pytest.mark.parametrize(
    ("way", "reason"),
    [("endless", "its list of tools does not end"), ("broken", "its list of tools does not hold to MCP (tools)")],
)
async def test_a_list_that_cannot_be_read(way: str, reason: str) -> None:
    async with proxy(McpServer(command=tuple(command("raw", way)), start_timeout=30)) as found:
        assert (state(found).state, state(found).reason) == ("failed", reason)


async def test_what_no_sdk_would_answer() -> None:
    async with proxy(
        McpServer(command=tuple(command("raw", "odd")), start_timeout=30),
        McpServer(command=tuple(command("raw", "no-tools")), start_timeout=30),
        McpServer(command=tuple(command("raw", "flood")), start_timeout=30, max_result_bytes=1000),
    ) as found:
        first, second, third = found.states()
        assert {tool.tool: tool.reason is None for tool in first.tools} == {"good": True, "bad": False, "worse": False}
        assert (second.state, second.tools) == ("connected", ())
        assert "no tool result" in str((await call(found, "good")).error)
        flooding = next(tool for tool in found.tools() if tool.server == "c")
        assert "too large" in str((await found.call(flooding, "{}")).error)
        assert third.state == "connected"


async def test_what_cannot_be_called_is_refused(at: Callable[..., McpServer]) -> None:
    async with proxy(at("modern")) as found:
        add = named(found, "add")
        for arguments in ("", "[]", "{", "1"):
            assert await found.call(add, arguments) == Outcome.failed("The arguments are not a JSON object.")
        gone = msgspec.structs.replace(add, tool="subtract")
        assert "has no tool 'subtract' any more" in str((await found.call(gone, "{}")).error)
        elsewhere = msgspec.structs.replace(add, server="z")
        assert await found.call(elsewhere, "{}") == Outcome.failed("There is no MCP server 'z' any more.")
    async with proxy(at("modern", deny=("add",))) as other:
        assert "is not offered any more: denied by 'add'" in str((await other.call(add, '{"a":1,"b":2}')).error)
    assert "is not connected" in str((await found.call(add, '{"a":1,"b":2}')).error)  # it was left


async def test_closing_ends_calls(at: Callable[..., McpServer]) -> None:
    async with proxy(at("modern")) as found:
        calling = asyncio.create_task(call(found, "never"))
        await asyncio.sleep(0)
        async with asyncio.timeout(PATIENCE):
            while not said(await call(found, "running")).startswith("1 "):
                await asyncio.sleep(0.01)
    assert (await calling).is_error


# ---- what changes ----


@pytest.mark.parametrize("kind", ["modern", "legacy", "stdio"])
async def test_a_changed_list_is_listed_again(kind: str) -> None:
    """Told on a subscription from 2026-07-28 on, before that on the session's own stream."""
    if kind == "stdio":
        await _check_change(McpServer(command=tuple(command("sdk")), start_timeout=30))
        return
    with server("sdk", "http", *(["legacy"] if kind == "legacy" else [])) as process:
        await _check_change(McpServer(url=process.url))


async def _check_change(settings: McpServer) -> None:
    async with proxy(settings) as found:
        vanishing = named(found, "disappearing")
        await call(found, "change")
        await until(lambda: any(tool.tool == "appearing" for tool in found.tools()))
        assert "has no tool 'disappearing' any more" in str((await found.call(vanishing, "{}")).error)
        assert named(found, "add").description == "Another description."


async def test_the_list_is_read_again_now_and_then() -> None:
    with server("fastmcp", "http") as process:
        async with proxy(McpServer(url=process.url, refresh_seconds=0.2)) as found:
            await call(found, "grow")
            await until(lambda: any(tool.tool == "grown" for tool in found.tools()))


class TimedApprovals(MemoryApprovals):
    """Approvals that note when they are asked for, which is with each listing, and take their time to write the second."""

    def __init__(self, seconds: float = 0.0) -> None:
        super().__init__()
        self.asked: list[float] = []
        self.seconds = seconds

    async def approved(self) -> Mapping[tuple[str, str], str]:
        self.asked.append(time.monotonic())
        return await super().approved()

    async def trust(self, digests: Mapping[tuple[str, str], str]) -> None:
        if self.digests:
            await asyncio.sleep(self.seconds)
        await super().trust(digests)


async def test_a_server_that_always_says_that_its_tools_have_changed_has_to_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aibridge.mcp.servers._CALM_SECONDS", 0.2)
    approvals = TimedApprovals()
    settings = McpServer(command=tuple(command("raw", "storm")), start_timeout=30, refresh_seconds=0.8)
    async with proxy(settings, approvals=approvals) as found:
        await until(lambda: len(approvals.digests) >= 6)
        assert len(found.tools()) == 1
    listings = approvals.asked[::2]  # each has a new tool, so they are asked for again after it was trusted
    pauses = [late - early for early, late in pairwise(listings)]
    assert pauses[0] < 0.2 + 1, "the first is looked at soon"
    assert all(pause >= least for pause, least in zip(pauses[1:], (0.2, 0.4, 0.8, 0.8), strict=False)), pauses


async def test_our_own_database_is_no_fault_of_the_server(at: Callable[..., McpServer]) -> None:
    """It may take longer than a server may for its list: calls under way go on."""
    with server("sdk", "http") as process:
        async with proxy(McpServer(url=process.url, start_timeout=0.5), approvals=TimedApprovals(seconds=1.0)) as found:
            slow = asyncio.create_task(call(found, "slow", seconds=2))
            await call(found, "change")
            assert said(await slow) == "done"
            assert state(found).state == "connected"
            assert any(tool.tool == "appearing" for tool in found.tools())


async def test_an_approval_beside_a_running_proxy_takes_effect() -> None:
    with server("sdk", "http") as process:
        approvals = MemoryApprovals()
        settings = McpServer(url=process.url, on_change="withhold", refresh_seconds=0.2)
        async with proxy(settings, approvals=approvals) as found:
            await call(found, "change")
            await until(lambda: all(tool.tool != "add" for tool in found.tools()))
            async with proxy(settings, approvals=approvals) as other:
                assert await other.approve("a", "add") == ["add"]
            await until(lambda: any(tool.tool == "add" for tool in found.tools()))


async def test_two_that_see_a_tool_first_agree() -> None:
    """Whoever has approved it first is right, also where the other one has looked before."""

    class Late(MemoryApprovals):
        async def approved(self) -> Mapping[tuple[str, str], str]:
            found = await super().approved()
            await asyncio.sleep(0.05)
            return found

    approvals = Late()
    first, second = (McpProxy({"a": McpServer(url="http://h/", on_change="withhold")}, approvals=approvals) for _ in "12")
    listed = [[types.Tool(name="t", description=said, input_schema={"type": "object"})] for said in ("Good.", "Evil.")]
    await asyncio.gather(first._listing("a")(listed[0]), second._listing("a")(listed[1]))
    offered = [tool.description for each in (first, second) for tool in each.tools()]
    assert len(offered) == len(approvals.digests) == 1


async def test_a_changed_tool_is_withheld_until_it_is_approved() -> None:
    with server("sdk", "http") as process:
        approvals = MemoryApprovals()
        async with proxy(McpServer(url=process.url, on_change="withhold"), approvals=approvals) as found:
            add = named(found, "add")
            first = approvals.digests["a", "add"]
            await call(found, "change")
            await until(lambda: all(tool.tool != "add" for tool in found.tools()))
            changed = next(tool for tool in state(found).tools if tool.is_changed)
            assert (changed.tool, changed.name, changed.reason) == ("add", None, "changed since it was approved")
            assert "changed since it was approved" in str((await found.call(add, '{"a":1,"b":2}')).error)
        async with proxy(McpServer(url=process.url, on_change="withhold"), approvals=approvals) as found:
            assert all(tool.tool != "add" for tool in found.tools())
            assert await found.approve("a", "no such tool") == []
            assert await found.approve("a", "add") == ["add"]
            assert approvals.digests["a", "add"] != first
            assert said(await call(found, "add", a=1, b=2)) == "3"
            assert "either" not in await found.approve("a")


class BrokenApprovals:
    """Approvals whose database is gone, or full."""

    def __init__(self, *, readable: bool) -> None:
        self._readable = readable

    async def approved(self) -> Mapping[tuple[str, str], str]:
        if self._readable:
            return {}
        raise OSError("gone")

    async def trust(self, digests: Mapping[tuple[str, str], str]) -> None:
        raise OSError("full")

    async def approve(self, digests: Mapping[tuple[str, str], str]) -> None:
        raise OSError("full")


@pytest.mark.parametrize("readable", [True, False])
async def test_approvals_that_fail_are_told(
    at: Callable[..., McpServer], readable: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async with proxy(at("modern"), approvals=BrokenApprovals(readable=readable)) as found:
        assert said(await call(found, "add", a=1, b=2)) == "3"
    assert ("were not approved: OSError" if readable else "cannot be read: OSError") in caplog.text


# ---- what nobody is to see ----


@pytest.mark.parametrize("options", [(), ("legacy",)])
async def test_secrets_reach_the_server_and_nobody_else(options: tuple[str, ...], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with server("sdk", "http", "guarded", *options) as process:
        url = process.url.replace("http://", f"http://me:{SECRET}@") + f"?key={SECRET}"
        seen: list[Any] = []
        async with proxy(McpServer(url=url, headers={"X-API-Key": SECRET})) as found:
            assert said(await call(found, "add", a=1, b=2)) == "3"
            seen += [found.states(), found.tools()]
            process.kill()
            seen += [await call(found, "add", a=1, b=2), found.states()]
        process.start()
        async with proxy(McpServer(url=url, headers={"X-API-Key": "something-else"})) as found:
            seen.append(found.states())
            assert state(found).reason == "HTTP 401 Unauthorized"
    assert SECRET not in repr(seen)
    assert SECRET not in caplog.text


async def test_a_failure_is_recorded_without_secrets() -> None:
    """The model gets what the tool says."""
    settings = McpServer(command=tuple(command("raw", "secret")), env={"THE_KEY": SECRET}, start_timeout=30)
    async with proxy(settings) as found:
        failed = await call(found, "good")
        assert failed.is_error and str(failed.error).startswith("401 for ***")
        assert failed.content == (Text(f"401 for {SECRET}\x1b[2J\n\tthe end"),)


async def test_the_end_of_a_session_is_no_error_in_the_log(modern: Process, caplog: pytest.LogCaptureFixture) -> None:
    """What the SDK logs when something arrives for a session that is closed, and what it should."""
    async with proxy(McpServer(url=modern.url)):
        pass
    sdk = logging.getLogger("mcp.client.streamable_http")
    caplog.clear()
    for error in (anyio.BrokenResourceError(), anyio.ClosedResourceError(), ValueError("not JSON")):
        sdk.error("Error parsing SSE message", exc_info=error)
    sdk.error("Unexpected content type")
    assert [record.exc_info and record.exc_info[0] for record in caplog.records] == [ValueError, None]


async def test_a_commands_words_are_logged_without_secrets(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="aibridge")
    settings = McpServer(command=tuple(command("sdk")), env={"THE_KEY": SECRET}, start_timeout=30)
    async with proxy(settings) as found:
        assert "THE_KEY" in said(await call(found, "environment"))
        assert "AIBRIDGE" not in said(await call(found, "environment"))
        await call(found, "say", what=f"my key is {SECRET}")
        await until(lambda: "says: my key is ***" in caplog.text)
        await call(found, "say", what="\n".join(str(number) for number in range(1000)))
        await until(lambda: "goes on to say more" in caplog.text)
        await call(found, "say", what=f"last words: {SECRET}")
        await call(found, "die")
        await until(lambda: "not connected" in caplog.text)
    assert SECRET not in caplog.text
    assert len(caplog.records) < 300
