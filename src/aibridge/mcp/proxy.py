"""The toolbox that consists of MCP servers."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import mcp_types
import msgspec

from aibridge.mcp.approvals import Approvals, MemoryApprovals
from aibridge.mcp.catalog import UNAPPROVED, Catalog, Entry, read
from aibridge.mcp.content import outcome_of
from aibridge.mcp.servers import Failed, Result, ServerConnection, State, Unavailable
from aibridge.mcp.settings import McpServer, check_name
from aibridge.tools import Outcome, Tool

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ToolState:
    """A tool that a server lists. `name` is what models are offered it under; None where they are not, `reason` says why.

    `is_changed`: its description or `schema`, which is JSON text, is not the approved one.
    """

    tool: str
    name: str | None
    reason: str | None
    is_changed: bool
    description: str
    schema: str


@dataclass(frozen=True, slots=True)
class ServerState:
    """How a server is. `where` and `reason`, which says why it is not connected, hold no secrets.

    The versions and the tools are those of the last connection.
    """

    name: str
    where: str
    state: State
    reason: str | None
    protocol_version: str | None
    server_name: str | None
    server_version: str | None
    tools: tuple[ToolState, ...]


class McpProxy:
    """Offers the tools of MCP servers and runs their calls. Implements `aibridge.toolbox.Toolbox`.

    Entering it waits until each server has listed its tools, has failed to, or its `start_timeout` is over. Connecting goes
    on in the background, also to a server that was lost. A server that is away keeps its tools: the set stays what it was,
    calls fail. Raises ValueError for servers whose names cannot be.
    """

    def __init__(self, servers: Mapping[str, McpServer], *, approvals: Approvals | None = None) -> None:
        for name in servers:
            check_name(name)
        self._approvals = MemoryApprovals() if approvals is None else approvals
        self._catalog = Catalog(servers)
        self._connections = {
            name: ServerConnection(name, server, self._listing(name)) for name, server in sorted(servers.items())
        }

    async def __aenter__(self) -> Self:
        for connection in self._connections.values():
            connection.start()
        waits = (connection.ready() for connection in self._connections.values())
        try:
            await asyncio.gather(*waits, return_exceptions=True)
        except asyncio.CancelledError:
            await self._close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._close()

    async def _close(self) -> None:
        await asyncio.gather(*(connection.close() for connection in self._connections.values()))

    def tools(self) -> Sequence[Tool]:
        """What is offered now, sorted by server and by the tools' own names."""
        return self._catalog.tools()

    async def call(self, tool: Tool, arguments: str) -> Outcome:
        """Run a call within the server's `call_timeout`; waiting for other calls of the server to end counts towards it."""
        connection = self._connections.get(tool.server)
        if connection is None:
            return Outcome.failed(f"There is no MCP server {tool.server!r} any more.")
        server = connection.server
        try:
            decoded = msgspec.json.decode(arguments, type=dict[str, Any])
        except msgspec.DecodeError:
            return Outcome.failed("The arguments are not a JSON object.")
        try:
            async with asyncio.timeout(server.call_timeout), connection.slots:
                result = await self._run(connection, tool, decoded)
        except TimeoutError:
            return Outcome.failed(
                f"The MCP server {tool.server!r} did not answer within {server.call_timeout:g} s. "
                "The call was given up; it may have had effects."
            )
        except (Unavailable, Failed) as error:
            return Outcome.failed(str(error))
        return outcome_of(result, server.max_result_bytes, server.masked)

    async def _run(self, connection: ServerConnection, tool: Tool, arguments: dict[str, Any]) -> Result:
        """The server's answer. Raises Unavailable or Failed."""
        if not self._catalog.knows(tool.server):  # this process has just started; another one has offered the tool
            await connection.ready()
        refusal = self._catalog.refusal(tool.server, tool.tool)
        if refusal is not None:
            raise Unavailable(refusal)
        return await connection.call(tool.tool, arguments)

    def connected(self) -> Mapping[str, bool]:
        """Which servers are connected."""
        return {name: connection.state == "connected" for name, connection in self._connections.items()}

    def states(self) -> list[ServerState]:
        """How the servers are, sorted by name."""
        return [self._state(connection) for connection in self._connections.values()]

    def _state(self, connection: ServerConnection) -> ServerState:
        return ServerState(
            name=connection.name,
            where=connection.server.where,
            state=connection.state,
            reason=connection.reason,
            protocol_version=connection.protocol_version,
            server_name=connection.identity.name if connection.identity else None,
            server_version=connection.identity.version if connection.identity else None,
            tools=tuple(_tool_state(entry) for entry in self._catalog.entries(connection.name)),
        )

    async def approve(self, server: str, tool: str | None = None) -> Sequence[str]:
        """Approve what a server's tool is defined as now, or all of them that pass its filters. Returns which those were.

        Raises whatever the approvals raise.
        """
        chosen = {
            (server, entry.tool): entry.digest
            for entry in self._catalog.entries(server)
            if entry.problem is None
            and (entry.tool == tool if tool is not None else entry.reason in (None, UNAPPROVED) or entry.is_changed)
        }
        await self._approvals.approve(chosen)
        self._catalog.approve(chosen)
        return [name for _, name in chosen]

    def _listing(self, server: str) -> Callable[[Sequence[mcp_types.Tool]], Awaitable[None]]:
        """What takes the tools that a server lists."""

        async def listed(tools: Sequence[mcp_types.Tool]) -> None:
            entries = await asyncio.to_thread(read, server, tools)
            new = self._catalog.update(server, entries, await self._approved())
            if new:
                await self._trust(server, new)
                self._catalog.update(server, entries, await self._approved())

        return listed

    async def _approved(self) -> Mapping[tuple[str, str], str] | None:
        try:
            return await self._approvals.approved()
        except Exception as error:  # noqa: BLE001  it may raise anything
            logger.warning("the approvals of MCP tools cannot be read: %s", type(error).__name__)
            return None

    async def _trust(self, server: str, new: Mapping[tuple[str, str], str]) -> None:
        """Approve what was seen for the first time."""
        try:
            await self._approvals.trust(new)
        except Exception as error:  # noqa: BLE001  likewise
            logger.warning("new tools of MCP server %s were not approved: %s", server, type(error).__name__)


def _tool_state(entry: Entry) -> ToolState:
    name = None if entry.reason else entry.name
    return ToolState(entry.tool, name, entry.reason, entry.is_changed, entry.description, entry.schema)
