"""An MCP server on standard streams, for long conversations: it adds, fails, and offers other tools once it is told to.

On the `mcp` SDK's low-level classes. Run as a program of its own; what it lists comes in another order each time.
"""

import asyncio
import random
from typing import Any

import mcp_types as types
from mcp.server import Server
from mcp.server.context import ServerRequestContext
from mcp.server.stdio import stdio_server
from mcp.server.subscriptions import InMemorySubscriptionBus, ListenHandler
from mcp.shared.subscriptions import ToolsListChanged

NUMBERS = {"a": {"type": "integer"}, "b": {"type": "integer"}}

bus = InMemorySubscriptionBus()
descriptions = {"add": "Adds.", "fail": "Fails.", "change": "Changes the tools.", "disappearing": "Goes away."}


async def list_tools(
    context: ServerRequestContext[Any], params: types.PaginatedRequestParams | None
) -> types.ListToolsResult:
    listed = random.sample(sorted(descriptions.items()), len(descriptions))
    schema = {"type": "object", "properties": NUMBERS}
    return types.ListToolsResult(
        tools=[types.Tool(name=name, description=about, input_schema=schema) for name, about in listed]
    )


async def call_tool(context: ServerRequestContext[Any], params: types.CallToolRequestParams) -> types.CallToolResult:
    match params.name, params.arguments:
        case "add", {"a": int(a), "b": int(b)}:
            return _result(str(a + b))
        case "change", _:
            descriptions.pop("disappearing", None)
            descriptions.update(add="Adds otherwise.", appearing="Is new.")
            await bus.publish(ToolsListChanged())
            return _result("changed")
        case _:
            return _result("It went wrong.", is_error=True)


def _result(words: str, *, is_error: bool = False) -> types.CallToolResult:
    return types.CallToolResult(content=[types.TextContent(text=words)], is_error=is_error)


async def main() -> None:
    server: Server[Any] = Server(
        "sums", on_list_tools=list_tools, on_call_tool=call_tool, on_subscriptions_listen=ListenHandler(bus)
    )
    async with stdio_server() as (read, write):
        await server.run(read, write, server.create_initialization_options())


if __name__ == "__main__":
    asyncio.run(main())
