"""``aibridge mcp``: what the configured MCP servers offer, and what comes of calling it; without a gateway around it."""

from collections.abc import Iterator, Mapping, Sequence

from aibridge.config import Settings
from aibridge.mcp.proxy import McpProxy, ServerState, ToolState
from aibridge.mcp.settings import McpServer, printable
from aibridge.recording import SqliteApprovals
from aibridge.tools import Outcome, Text
from aibridge.wire.reading import is_object


class NoSuchTool(Exception):
    """The configuration or the server has no such server or tool. The message names those that there are."""


async def listed(settings: Settings, *, verbose: bool = False) -> tuple[list[str], bool]:
    """Each server with its tools, line by line, and whether all servers are connected. `verbose`: with their definitions."""
    async with _proxy(settings, settings.mcp_servers()) as proxy:
        states = proxy.states()
    lines = [line for state in states for line in _described(state, verbose=verbose)]
    return lines or ["No MCP servers are configured."], all(state.state == "connected" for state in states)


async def called(settings: Settings, server: str, tool: str, arguments: str) -> Outcome:
    """Call a tool by its own name. Raises `NoSuchTool`, and ValueError where the arguments are no JSON object."""
    if not is_object(arguments.encode()):
        raise ValueError("the arguments must be a JSON object")
    async with _proxy(settings, _one(settings, server)) as proxy:
        found = next((offered for offered in proxy.tools() if offered.tool == tool), None)
        if found is None:
            raise NoSuchTool("\n".join(_described(proxy.states()[0])))
        return await proxy.call(found, arguments)


async def approved(settings: Settings, server: str, tool: str | None) -> Sequence[str]:
    """Approve the definitions that a server's tools have now, or one tool's; the names of those. Raises `NoSuchTool`."""
    async with McpProxy(_one(settings, server), approvals=SqliteApprovals(settings.database.path)) as proxy:
        names = await proxy.approve(server, tool)
        if not names:
            raise NoSuchTool("\n".join(_described(proxy.states()[0])))
        return [printable(name) for name in names]


def said(outcome: Outcome) -> str:
    """An outcome as text."""
    pieces = (piece.text if isinstance(piece, Text) else piece.described for piece in outcome.content)
    return "\n".join(_readable(piece) for piece in pieces)


def _proxy(settings: Settings, servers: Mapping[str, McpServer]) -> McpProxy:
    """With what was approved. Looking at tools approves none."""
    return McpProxy(servers, approvals=SqliteApprovals(settings.database.path, read_only=True))


def _one(settings: Settings, server: str) -> dict[str, McpServer]:
    servers = settings.mcp_servers()
    if server not in servers:
        raise NoSuchTool(f"there is no MCP server {server!r}; configured: {', '.join(servers) or 'none'}")
    return {server: servers[server]}


def _described(state: ServerState, *, verbose: bool = False) -> Iterator[str]:
    about = " ".join(filter(None, (state.server_name, state.server_version, state.protocol_version)))
    reason = f": {state.reason}" if state.reason else ""
    yield printable(f"{state.name}  {state.where}  {state.state}{reason}" + (f"  ({about})" if about else ""))
    for tool in state.tools:
        changed = "  [changed since it was approved]" if tool.is_changed else ""
        if tool.name is None:
            yield printable(f"  -  {tool.tool}: {tool.reason}{changed}")
        else:
            yield printable(f"  +  {tool.tool}: {tool.name}{changed}")
        if verbose:
            yield from _definition(tool)


def _definition(tool: ToolState) -> Iterator[str]:
    """What models are told of a tool."""
    yield from (f"       {line}" for line in _readable(tool.description).splitlines())
    if tool.schema:
        yield f"       {printable(tool.schema)}"


def _readable(text: str) -> str:
    """Text of several lines."""
    return printable(text, keep="\n\t")
