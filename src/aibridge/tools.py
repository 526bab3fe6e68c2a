"""Injected tools as everybody sees them: what a model is offered, what a call asks for, what came of it.

The types know neither MCP nor a provider's protocol: `aibridge.mcp` makes them from what servers list, the wire formats turn
them into what their provider accepts.
"""

import hashlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import msgspec

MediaKind = Literal["image", "audio", "file"]


class Tool(msgspec.Struct, frozen=True):
    """A tool that the bridge offers to models and runs itself.

    `name` is what the model sees: unique, ``[A-Za-z0-9_-]{1,64}``. `tool` is the server's own name for it. `schema` is the
    JSON Schema of the arguments, as JSON text. `server_url` says where it runs, for the ledger.
    """

    name: str
    description: str
    schema: str
    server: str
    tool: str
    server_url: str


class Toolset:
    """The tools that a conversation is offered, for as long as it lives, in the order in which the model sees them.

    A changed set would invalidate the prompt cache, and on current Claude models the thoughts so far (wire.md A6).
    """

    def __init__(self, tools: Iterable[Tool], origin: "Toolset | None" = None) -> None:
        self.tools = tuple(tools)
        self._by_name: Mapping[str, Tool] = {tool.name: tool for tool in self.tools}
        self._origin = origin

    def __len__(self) -> int:
        return len(self.tools)

    def get(self, name: str | None) -> Tool | None:
        """The tool of that name, if it is one of these."""
        return None if name is None else self._by_name.get(name)

    @cached_property
    def encoded(self) -> bytes:
        """The set as JSON, from which `decode` makes it again: under the names that it had before any client's."""
        return msgspec.json.encode(self.tools) if self._origin is None else self._origin.encoded

    @cached_property
    def digest(self) -> str:
        """What identifies the set: equal for sets with the same tools in the same order."""
        return hashlib.sha256(self.encoded).hexdigest()

    @classmethod
    def decode(cls, encoded: bytes) -> "Toolset":
        """The set that was encoded. Raises `msgspec.DecodeError`."""
        return cls(msgspec.json.decode(encoded, type=tuple[Tool, ...]))

    def avoiding(self, taken: Collection[str]) -> "Toolset":
        """The set with other names for those that the client's own tools have: a number is put behind them."""
        if not any(tool.name in taken for tool in self.tools):
            return self
        used = {*taken}
        tools: list[Tool] = []
        for tool in self.tools:
            name, number = tool.name, 2
            while name in used:
                name = f"{tool.name[: MAX_NAME - 1 - len(str(number))]}_{number}"
                number += 1
            used.add(name)
            tools.append(tool if name == tool.name else msgspec.structs.replace(tool, name=name))
        return Toolset(tools, origin=self)


MAX_NAME = 64
"""The longest tool name that every provider takes (clients.md 6)."""


@dataclass(frozen=True, slots=True)
class Call:
    """A call that a model made of an injected tool.

    `arguments` is the text of a JSON object. `refusal` says why the call must not be run: what is not whole is not executed.
    """

    id: str
    tool: Tool
    arguments: str
    refusal: str | None = None


@dataclass(frozen=True, slots=True)
class Text:
    """A piece of a result that is text."""

    text: str


@dataclass(frozen=True, slots=True)
class Media:
    """A piece of a result that is not text. `data` is base64, `name` a file name or URI where the server gave one."""

    kind: MediaKind
    media_type: str
    data: str
    name: str | None = None

    @property
    def described(self) -> str:
        """What stands for it where a provider takes text only."""
        size = len(self.data.rstrip("=")) * 3 // 4
        return f"[{self.kind} {self.name or ''}: {self.media_type}, {size} bytes; not shown]".replace(" :", ":")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a call. It is never empty for the model: a tool that said nothing says so.

    `is_error`: the tool, or the way to it, failed, and `content` tells the model. `error` tells the ledger.
    """

    content: tuple[Text | Media, ...]
    is_error: bool = False
    error: str | None = None

    @classmethod
    def failed(cls, message: str) -> "Outcome":
        """The call failed, or was not made."""
        return cls((Text(message),), is_error=True, error=message)
