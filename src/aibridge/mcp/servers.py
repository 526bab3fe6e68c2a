"""The connection to one server: made, kept, made again.

One task owns it from start to end, because the SDK's sessions must be left in the task that entered them. Calls run in tasks
of their own. The owner is told what happens by events; nobody cancels it, so that a command is always ended in order.
"""

import asyncio
import logging
import math
import random
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from importlib.metadata import version
from typing import Any, Final, Literal, TypeAlias

import anyio
from mcp import Client, MCPError
from mcp.client.subscriptions import SubscriptionLost
from mcp_types import (
    CONNECTION_CLOSED,
    HEADER_MISMATCH,
    METHOD_NOT_FOUND,
    CallToolRequest,
    CallToolRequestParams,
    CallToolResult,
    Implementation,
    InputRequiredResult,
    PaginatedRequestParams,
    Tool,
    ToolListChangedNotification,
)
from pydantic import TypeAdapter, ValidationError

from aibridge.mcp.settings import McpServer, printable
from aibridge.mcp.transports import Exchange, cause, describe, exchange, transport

logger = logging.getLogger(__name__)

State: TypeAlias = Literal["connected", "connecting", "failed"]
Result: TypeAlias = CallToolResult | InputRequiredResult

_RESULT: Final[TypeAdapter[Result]] = TypeAdapter(CallToolResult | InputRequiredResult)

# A first start may download the server; what waits for it has the shorter `start_timeout`.
_ATTEMPT_SECONDS: Final = 60.0
_BACK_OFF: Final = (0.5, 60.0)  # seconds: the first, and the longest
_STABLE_SECONDS: Final = 30.0  # a connection that lasted as long has not failed
_BURST_SECONDS: Final = 0.2  # changes of the list come in bursts
_CALM_SECONDS: Final = 5.0  # between two of them that are looked at, and twice as long each time if they go on
_LAST_WORDS_SECONDS: Final = 20.0
_MAX_PAGES: Final = 100
_LINES_LOGGED: Final = 200  # of each run of a command


class Unavailable(Exception):
    """The server could not be asked; it cannot have run the call. The message says why, without secrets."""


class Failed(Exception):
    """The call has failed, and may have been run. The message says why, without secrets."""


class ServerConnection:
    """Keeps a server connected and its tools known. `listed` gets the tools whenever they were listed."""

    def __init__(self, name: str, server: McpServer, listed: Callable[[Sequence[Tool]], Awaitable[None]]) -> None:
        self.name = name
        self.server = server
        self.slots = asyncio.Semaphore(server.max_concurrent_calls)
        self.protocol_version: str | None = None
        self.identity: Implementation | None = None
        self._listed = listed
        self._client: Client | None = None
        self._reason: str | None = None
        self._task: asyncio.Task[None] | None = None
        self._calls: set[asyncio.Task[Any]] = set()
        self._scope: anyio.CancelScope  # of the attempt, and of the connection
        self._settled = asyncio.Event()  # an attempt has succeeded, or failed
        self._changed = asyncio.Event()  # the server says that its tools have
        self._ended = asyncio.Event()  # the connection is of no use any more
        self._impatience = asyncio.Event()  # somebody waits for the next attempt
        self._lost: str | None = None
        self._established = False  # the present connection, or the last one
        self._closing = False
        self._last_line = ""

    @property
    def state(self) -> State:
        if self._client is not None:
            return "connected"
        return "connecting" if self._reason is None else "failed"

    @property
    def reason(self) -> str | None:
        """Why it is not connected, where an attempt has failed."""
        return None if self._client is not None else self._reason

    def start(self) -> None:
        """Begin to connect."""
        self._scope = anyio.CancelScope()
        self._task = asyncio.create_task(self._run(), name=f"MCP server {self.name}")

    async def close(self) -> None:
        """End the connection and all calls."""
        self._closing = True
        self._impatience.set()
        self._end("the bridge stops")
        for call in self._calls:
            call.cancel()
        if self._task is not None:
            _, late = await asyncio.wait({self._task, *self._calls}, timeout=_LAST_WORDS_SECONDS)
            for task in late:
                task.cancel()

    async def ready(self) -> Client:
        """The session with the server. Waits for an attempt to connect, and has one made at once. Raises Unavailable."""
        if self._client is None and self._task is not None and not self._closing:
            self._settled.clear()
            self._impatience.set()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._settled.wait(), self.server.start_timeout)
        if self._client is None:
            raise Unavailable(f"The MCP server {self.name!r} is not connected: {self._reason or 'it has not answered yet'}.")
        return self._client

    async def call(self, tool: str, arguments: dict[str, Any]) -> Result:
        """Call a tool, a second time where the server cannot have run the first. Raises Unavailable or Failed.

        Being cancelled, it leaves at once; the server is told behind its back.
        """
        try:
            return await self._call(await self.ready(), tool, arguments)
        except Unavailable:
            return await self._call(await self.ready(), tool, arguments)

    async def _call(self, client: Client, tool: str, arguments: dict[str, Any]) -> Result:
        task = asyncio.create_task(self._exchange(client, tool, arguments))
        self._calls.add(task)
        task.add_done_callback(self._forget)
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError:
            task.cancel()
            raise
        if task.cancelled():
            raise Failed(f"The MCP server {self.name!r} is being closed.")
        return task.result()

    def _forget(self, task: asyncio.Task[Result]) -> None:
        """A call has ended. Its caller may be gone: asyncio would log an error that nobody has asked for."""
        self._calls.discard(task)
        if not task.cancelled():
            task.exception()

    async def _exchange(self, client: Client, tool: str, arguments: dict[str, Any]) -> Result:
        """One request of a call.

        The SDK's own `call_tool` would refuse results that do not hold to the tool's output schema. The model can make more
        of them than of an error.
        """
        way = Exchange(is_sent=self.server.url is None)  # what is written to a command cannot be told from what it has read
        exchange.set(way)
        request = CallToolRequest(params=CallToolRequestParams(name=tool, arguments=arguments))
        try:
            return await client.session.send_request(request, _RESULT)
        except ValidationError as error:
            raise Failed(f"The MCP server {self.name!r} gave an answer that is no tool result.") from error
        except Exception as error:
            reason = describe(error)
            if isinstance(error, MCPError) and error.code == CONNECTION_CLOSED:
                reason = "the connection was lost" if self._lost is None else f"the connection was lost: {self._lost}"
                way.not_run = way.not_run or (None if way.is_sent else reason)
            if isinstance(error, MCPError) and error.code == HEADER_MISMATCH:
                way.not_run = reason  # it has changed the tool's schema, which is listed again with the next connection
            if way.not_run is None:
                raise Failed(f"The MCP server {self.name!r} failed the call: {self.server.masked(reason)}") from error
            self._end(way.not_run, client)
            reason = self.server.masked(way.not_run)
            raise Unavailable(f"The MCP server {self.name!r} could not be asked: {reason}") from error
        finally:
            way.end()

    async def _run(self) -> None:
        """Connect, for as long as the bridge runs."""
        failures = 0
        while not self._closing:
            started = anyio.current_time()
            reason = self.server.masked(await self._connect())
            if self._closing:
                return
            failures = 0 if anyio.current_time() - started >= _STABLE_SECONDS else failures + 1
            if reason != self._reason:
                logger.warning("MCP server %s: not connected: %s", self.name, reason)
            self._reason = reason
            if not self._established:
                self._impatience.clear()
                self._settled.set()
            first, longest = _BACK_OFF
            delay = min(longest, first * 2 ** min(failures, 10)) * random.uniform(0.5, 1)  # noqa: S311  not a secret
            with suppress(TimeoutError):
                await asyncio.wait_for(self._impatience.wait(), delay)

    async def _connect(self) -> str:
        """One connection, from its start to its end. Returns why it has ended."""
        self._established = False
        self._lost = None
        self._last_line = ""
        self._changed.clear()
        self._ended.clear()
        try:
            with anyio.CancelScope(deadline=anyio.current_time() + _ATTEMPT_SECONDS) as self._scope:
                if self._closing:
                    return ""
                async with Client(
                    transport(self.server, self._end, self._log_line()),
                    client_info=Implementation(name="aibridge", version=version("aibridge")),
                    message_handler=self._notice,
                    cache=None,
                ) as client:
                    tools = await self._list(client)
                    self._scope.deadline = math.inf
                    await self._listed(tools)
                    self._connected(client)
                    await self._keep(client)
        except Exception as error:  # noqa: BLE001  whatever the SDK and the server do, the next attempt may go well
            return self._because(error)
        finally:
            self._client = None
        return self._because(TimeoutError("it did not answer in time"))

    def _because(self, error: Exception) -> str:
        """Why a connection has ended, and what a command said last. That it was closed is no reason."""
        first = cause(error)
        says_nothing = isinstance(first, TimeoutError) or (isinstance(first, MCPError) and first.code == CONNECTION_CLOSED)
        reason = (self._lost if says_nothing else None) or describe(first)
        return f"{reason} (it said: {self._last_line})" if self._last_line else reason

    def _connected(self, client: Client) -> None:
        self.protocol_version = client.protocol_version
        self.identity = client.server_info
        if self._reason is not None:
            logger.info("MCP server %s: connected", self.name)
        self._reason = None
        self._client = client
        self._established = True
        self._impatience.clear()
        self._settled.set()

    def _end(self, reason: str, client: Client | None = None) -> None:
        """The connection is of no use any more: that of `client`, if it is still this one."""
        if self._lost is not None or (client is not None and client is not self._client):
            return
        self._lost = reason
        if self._client is None:
            self._scope.cancel()
        self._client = None
        self._ended.set()

    async def _keep(self, client: Client) -> None:
        """Keep the list of tools up to date, until the connection ends."""
        async with anyio.create_task_group() as tasks:
            tools = client.server_capabilities.tools
            if client.session.discover_result is not None and tools is not None and tools.list_changed:
                tasks.start_soon(self._subscribe, client)
            tasks.start_soon(self._refresh, client)
            await self._ended.wait()
            tasks.cancel_scope.cancel()

    async def _refresh(self, client: Client) -> None:
        """List the tools now and then, and soon after they have changed. A server that says so all the time has to wait."""
        pause = 0.0
        while True:
            due = anyio.current_time() + self.server.refresh_seconds
            await anyio.sleep(min(pause, self.server.refresh_seconds))
            pause = max(_CALM_SECONDS, 2 * pause if self._changed.is_set() else 0)
            with anyio.CancelScope(deadline=due):
                await self._changed.wait()
            await anyio.sleep(_BURST_SECONDS)
            self._changed.clear()
            with anyio.fail_after(self.server.start_timeout):
                tools = await self._list(client)
            await self._listed(tools)

    async def _subscribe(self, client: Client) -> None:
        """From 2026-07-28 on, changes are told to those who listen. A stream that was cut may have lost some."""
        delay, longest = _BACK_OFF
        while True:
            try:
                async with client.listen(tools_list_changed=True) as events:
                    async for _ in events:
                        self._changed.set()
                return
            except SubscriptionLost:
                self._changed.set()
                await anyio.sleep(delay)
                delay = min(longest, delay * 2)
            except (MCPError, TimeoutError):
                return  # it does not let us; the timer will do

    async def _notice(self, message: object) -> None:
        if isinstance(message, ToolListChangedNotification):
            self._changed.set()

    async def _list(self, client: Client) -> Sequence[Tool]:
        tools: list[Tool] = []
        cursor: str | None = None
        for _ in range(_MAX_PAGES):
            try:
                page = await client.session.list_tools(params=PaginatedRequestParams(cursor=cursor) if cursor else None)
            except MCPError as error:
                if error.code != METHOD_NOT_FOUND:
                    raise
                break  # a server need not have tools
            except ValidationError as error:
                where = ".".join(map(str, error.errors()[0]["loc"]))
                raise ValueError(f"its list of tools does not hold to MCP ({where})") from error
            tools += page.tools
            cursor = page.next_cursor
            if not cursor:
                break
        else:
            raise ValueError("its list of tools does not end")
        return tools

    def _log_line(self) -> Callable[[str], None]:
        """What takes the lines that a command writes on its standard error."""
        count = 0

        def log(line: str) -> None:
            nonlocal count
            count += 1
            line = printable(line)
            self._last_line = line or self._last_line
            if count <= _LINES_LOGGED:
                logger.debug("MCP server %s says: %s", self.name, self.server.masked(line))
            elif count == _LINES_LOGGED + 1:
                logger.debug("MCP server %s goes on to say more", self.name)

        return log
