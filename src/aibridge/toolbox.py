"""Where injected tools come from: the `Toolbox` protocol, and the implementation that runs Python functions."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Protocol

import msgspec

from aibridge.tools import Outcome, Text, Tool


class Toolbox(Protocol):
    """Offers tools and runs them. One that is an async context manager is entered and left together with the bridge."""

    def tools(self) -> Sequence[Tool]:
        """What new conversations are offered now. The same tools always come in the same order, byte for byte."""

    async def call(self, tool: Tool, arguments: str) -> Outcome:
        """Run a tool that was offered, perhaps long ago, perhaps by another process: one that is gone or no longer allowed
        has failed. `arguments` is the text of a JSON object.

        Ends in bounded time, can be cancelled, and raises nothing else: whatever goes wrong is an outcome.
        """


Function = Callable[[Mapping[str, Any]], Awaitable[Outcome | str]]
"""Gets the decoded arguments. What it raises is an outcome, too."""


class MemoryToolbox:
    """Tools that are Python functions, by their own names, as if a server `server` had them."""

    def __init__(
        self, functions: Mapping[str, Function], *, server: str = "memory", schemas: Mapping[str, str] | None = None
    ) -> None:
        self._functions = dict(functions)
        self._server = server
        self._schemas = schemas or {}

    def tools(self) -> Sequence[Tool]:
        """One tool for each function, sorted by name, described by its docstring."""
        return [
            Tool(
                name=f"bmcp_{self._server}_{name}",
                description=(function.__doc__ or name).strip(),
                schema=self._schemas.get(name, '{"type":"object"}'),
                server=self._server,
                tool=name,
                server_url=f"memory:{self._server}",
            )
            for name, function in sorted(self._functions.items())
        ]

    async def call(self, tool: Tool, arguments: str) -> Outcome:
        """Run the function."""
        function = self._functions.get(tool.tool)
        if function is None:
            return Outcome.failed(f"There is no tool {tool.tool!r} any more.")
        try:
            result = await function(msgspec.json.decode(arguments))
        except Exception as error:  # noqa: BLE001  a tool may raise anything
            return Outcome.failed(f"{type(error).__name__}: {error}")
        return result if isinstance(result, Outcome) else Outcome((Text(result),))
