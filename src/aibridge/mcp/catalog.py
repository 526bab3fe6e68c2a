"""What is offered of what the servers list: filtered, named, in a fixed order, byte for byte the same however it was listed.

A name that models take is made from the server's and the tool's own. Where that loses something, two tools may end up with
the same name: a digest of their own names is then put behind it, which depends on nothing else, so that names stay.
"""

import hashlib
import json
import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import mcp_types

from aibridge.mcp.settings import McpServer
from aibridge.tools import MAX_NAME, Tool

logger = logging.getLogger(__name__)

_PREFIX: Final = "bmcp"
_NOT_IN_NAMES: Final = re.compile(r"[^A-Za-z0-9_-]")
_DIGEST_LENGTH: Final = 8

# OpenAI refuses a request for a tool whose schema has one of these at its top, Anthropic for some of them.
_NOT_AT_TOP: Final = ("allOf", "anyOf", "enum", "not", "oneOf")


@dataclass(frozen=True, slots=True)
class Entry:
    """One tool of a server's list.

    `name` is what the model sees, `reason` why it does not. `digest` identifies the definition; `is_changed` says that it is
    not the approved one any more.
    """

    server: str
    tool: str
    description: str
    schema: str
    digest: str
    is_read_only: bool
    problem: str | None = None
    name: str = ""
    reason: str | None = None
    is_changed: bool = False


class Catalog:
    """The tools of all servers."""

    def __init__(self, servers: Mapping[str, McpServer]) -> None:
        self._servers = dict(servers)
        self._listed: dict[str, Sequence[Entry]] = {}
        self._approved: dict[tuple[str, str], str] = {}
        self._entries: dict[tuple[str, str], Entry] = {}
        self._tools: tuple[Tool, ...] = ()
        self._logged: set[str] = set()

    def tools(self) -> tuple[Tool, ...]:
        """What is offered, sorted by server and by the tools' own names."""
        return self._tools

    def knows(self, server: str) -> bool:
        """Whether a server's tools were listed."""
        return server in self._listed

    def entries(self, server: str) -> list[Entry]:
        """All that a server lists, sorted."""
        return [entry for entry in self._entries.values() if entry.server == server]

    def refusal(self, server: str, tool: str) -> str | None:
        """Why a tool must not be called, which may have been offered once."""
        entry = self._entries.get((server, tool))
        if entry is None:
            return f"The MCP server {server!r} has no tool {tool!r} any more."
        if entry.reason is not None:
            return f"The tool {tool!r} of the MCP server {server!r} is not offered any more: {entry.reason}."
        return None

    def update(
        self, server: str, listed: Iterable[mcp_types.Tool], approved: Mapping[tuple[str, str], str] | None
    ) -> list[Entry]:
        """A server has listed its tools. `approved` are the approved digests; None where they cannot be had.

        Returns the tools that are seen for the first time and trusted: their digests are to be approved.
        """
        if approved is not None:
            self._approved = dict(approved)
        self._listed[server] = self._distinct(server, listed)
        self._rebuild()
        if approved is None:
            return []
        new = [
            entry
            for entry in self.entries(server)
            if entry.reason in (None, _UNAPPROVED) and (server, entry.tool) not in self._approved
        ]
        for entry in new:
            self._approved[server, entry.tool] = entry.digest
        if new:
            self._rebuild()
        return new

    def approve(self, entry: Entry) -> None:
        """A definition was approved."""
        self._approved[entry.server, entry.tool] = entry.digest
        self._rebuild()

    def _distinct(self, server: str, listed: Iterable[mcp_types.Tool]) -> Sequence[Entry]:
        """The listed tools, sorted by name, each name once: of several the same one whatever their order."""
        found: dict[str, Entry] = {}
        for entry in sorted((_entry(server, tool) for tool in listed), key=lambda e: (e.tool, e.digest)):
            if entry.tool in found:
                self._log_once(f"MCP server {server} lists the tool {entry.tool!r} more than once")
            found.setdefault(entry.tool, entry)
        return list(found.values())

    def _rebuild(self) -> None:
        listed = [entry for server in sorted(self._listed) for entry in self._listed[server]]
        names = self._names(listed)
        judged = [self._judged(replace(entry, name=names[entry.server, entry.tool])) for entry in listed]
        self._entries = {(entry.server, entry.tool): entry for entry in judged}
        self._tools = tuple(self._offered(entry) for entry in judged if entry.reason is None)

    def _offered(self, entry: Entry) -> Tool:
        where = self._servers[entry.server].where
        return Tool(entry.name, entry.description, entry.schema, entry.server, entry.tool, where)

    def _judged(self, entry: Entry) -> Entry:
        """The entry with whether it has changed, and why it is not offered."""
        server = self._servers[entry.server]
        approved = self._approved.get((entry.server, entry.tool))
        is_changed = approved is not None and approved != entry.digest
        denying = next((pattern for pattern in server.deny if re.search(pattern, entry.tool)), None)
        allowing = next((pattern for pattern in server.allow if re.search(pattern, entry.tool)), None)
        reason = None
        if entry.problem is not None:
            reason = entry.problem
            self._log_once(f"MCP server {entry.server}: the tool {entry.tool!r} is left out: {reason}")
        elif denying is not None:
            reason = f"denied by {denying!r}"
            if allowing is not None:
                self._log_once(
                    f"MCP server {entry.server}: {entry.tool!r} is allowed by {allowing!r} and {reason}; deny wins"
                )
        elif server.allow and allowing is None:
            reason = "not allowed"
        elif server.read_only and not entry.is_read_only:
            reason = "not read-only"
        elif is_changed:
            found = f"the definition of {entry.tool!r} is not the approved one (now {entry.digest[:12]})"
            self._log_once(f"MCP server {entry.server}: {found}")
            reason = "changed since it was approved" if server.on_change == "withhold" else None
        elif approved is None and server.on_change == "withhold":
            reason = _UNAPPROVED
        return replace(entry, reason=reason, is_changed=is_changed)

    def _names(self, entries: Iterable[Entry]) -> dict[tuple[str, str], str]:
        """The name of each tool. One that needed no change keeps it, whatever the others are called."""
        own = {(entry.server, entry.tool): f"{_PREFIX}_{entry.server}_{entry.tool}" for entry in entries}
        encoded = {key: _encoded(name) for key, name in own.items()}
        meeting = Counter(encoded.values())
        taken = {encoded[key] for key in own if encoded[key] == own[key] or meeting[encoded[key]] == 1}
        names: dict[tuple[str, str], str] = {}
        for key, name in sorted(own.items()):
            names[key] = encoded[key]
            if meeting[encoded[key]] > 1 and encoded[key] != name:
                names[key] = _told_apart(name, taken)
                taken.add(names[key])
                self._log_once(f"MCP server {key[0]}: the tool {key[1]!r} is called {names[key]}: another's name is like it")
        return names

    def _log_once(self, message: str) -> None:
        if message not in self._logged:
            self._logged.add(message)
            logger.warning("%s", message)


_UNAPPROVED: Final = "not approved, and approvals cannot be read"


def _entry(server: str, tool: mcp_types.Tool) -> Entry:
    schema, problem = _schema(tool.input_schema)
    return Entry(
        server=server,
        tool=tool.name,
        description=tool.description or tool.title or tool.name,
        schema=schema,
        digest=hashlib.sha256(_canonical([tool.description, tool.input_schema]).encode()).hexdigest(),
        is_read_only=tool.annotations is not None and tool.annotations.read_only_hint is True,
        problem=problem if tool.name else "bad name: it is empty",
    )


def _schema(schema: dict[str, Any]) -> tuple[str, str | None]:
    """The schema as providers take it, and what is wrong with it."""
    if schema.get("type") != "object":
        return "", "bad schema: the arguments of a tool must be an object"
    at_top = [keyword for keyword in _NOT_AT_TOP if keyword in schema]
    if at_top:
        return "", f"bad schema: providers refuse {at_top[0]} at its top"
    # OpenAI refuses an object without properties, which is what tools without arguments have.
    return _canonical({"properties": {}, **schema}), None


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def _encoded(name: str) -> str:
    replaced = _NOT_IN_NAMES.sub("_", name)
    return replaced if len(replaced) <= MAX_NAME else _with_digest(replaced, name, _DIGEST_LENGTH)


def _told_apart(name: str, taken: set[str]) -> str:
    """The name with as much of a digest behind it as makes it unique."""
    replaced = _NOT_IN_NAMES.sub("_", name)
    lengths = range(_DIGEST_LENGTH, MAX_NAME // 2)
    return next(found for length in lengths if (found := _with_digest(replaced, name, length)) not in taken)


def _with_digest(replaced: str, name: str, length: int) -> str:
    digest = hashlib.sha256(name.encode()).hexdigest()[:length]
    return f"{replaced[: MAX_NAME - 1 - length]}_{digest}"
