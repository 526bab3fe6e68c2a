"""What is offered of what the servers list: filtered, named, in a fixed order, byte for byte the same however it was listed.

A name that models take is made from the server's and the tool's own. Where that loses something, two tools may end up with
the same name: a digest of their own names is then put behind it, which depends on nothing else, so that names stay.
"""

import hashlib
import json
import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Final

import mcp_types
from jsonschema import Draft202012Validator

from aibridge.mcp.settings import McpServer
from aibridge.tools import MAX_NAME, Tool

logger = logging.getLogger(__name__)

_PREFIX: Final = "bmcp"
_NOT_IN_NAMES: Final = re.compile(r"[^A-Za-z0-9_-]")
_DIGEST_LENGTH: Final = 8
_MAX_DEFINITION: Final = 65_536  # bytes of a tool's names, description and schema
_MAX_LOGGED: Final = 1_000

# OpenAI refuses a request for a tool whose schema has one of these at its top, Anthropic for some of them.
_NOT_AT_TOP: Final = ("allOf", "anyOf", "enum", "not", "oneOf")

# Anthropic refuses a request for a tool with another key among its properties, or whose schema does not hold to this draft,
# which is MCP's, too. Formats are not checked: a pattern need not be one of Python's.
_PROPERTY: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_SCHEMAS: Final = Draft202012Validator(Draft202012Validator.META_SCHEMA)


@dataclass(frozen=True, slots=True)
class Entry:
    """One tool of a server's list.

    `name` is what the model sees, `reason` why it does not. `digest` identifies the definition: the description and the
    schema as models are offered them. `is_changed` says that it is not the approved one any more. `problem` is what keeps
    the tool out whatever the settings are.
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
        self, server: str, listed: Iterable[Entry], approved: Mapping[tuple[str, str], str] | None
    ) -> Mapping[tuple[str, str], str]:
        """A server has listed its tools. `approved` are the approved digests; None where they cannot be had.

        Returns the digests of tools that are seen for the first time, and would be offered: they may be trusted.
        """
        if approved is not None:
            self._approved = dict(approved)
        self._listed[server] = self._distinct(server, listed)
        self._rebuild()
        return {
            (server, entry.tool): entry.digest
            for entry in self.entries(server)
            if entry.reason in (None, UNAPPROVED) and (server, entry.tool) not in self._approved
        }

    def approve(self, approved: Mapping[tuple[str, str], str]) -> None:
        """Definitions were approved."""
        self._approved.update(approved)
        self._rebuild()

    def _distinct(self, server: str, listed: Iterable[Entry]) -> Sequence[Entry]:
        """The listed tools, sorted by name, each name once: of several the same one whatever their order."""
        found: dict[str, Entry] = {}
        for entry in sorted(listed, key=lambda entry: (entry.tool, entry.digest, entry.is_read_only)):
            if entry.tool in found:
                self._log_once(f"MCP server {server} lists the tool {entry.tool!r} more than once")
            found.setdefault(entry.tool, entry)
        return list(found.values())

    def _rebuild(self) -> None:
        listed = [entry for server in sorted(self._listed) for entry in self._listed[server]]
        names = self._names(listed)
        judged = list(self._judged(replace(entry, name=names[entry.server, entry.tool]) for entry in listed))
        self._entries = {(entry.server, entry.tool): entry for entry in judged}
        self._tools = tuple(self._offered(entry) for entry in judged if entry.reason is None)

    def _offered(self, entry: Entry) -> Tool:
        where = self._servers[entry.server].where
        return Tool(entry.name, entry.description, entry.schema, entry.server, entry.tool, where)

    def _judged(self, entries: Iterable[Entry]) -> Iterator[Entry]:
        """The entries with whether they have changed, and why they are not offered."""
        chosen: Counter[str] = Counter()
        for entry in entries:
            approved = self._approved.get((entry.server, entry.tool))
            is_changed = approved is not None and approved != entry.digest
            reason = self._left_out(entry)
            if reason is None:
                chosen[entry.server] += 1
                reason = self._too_many(entry.server, chosen[entry.server])
            if reason is None:
                reason = self._withheld(entry, is_new=approved is None, is_changed=is_changed)
            yield replace(entry, reason=reason, is_changed=is_changed)

    def _left_out(self, entry: Entry) -> str | None:
        """Why a tool is not among those that the settings choose."""
        server = self._servers[entry.server]
        denying = next((pattern for pattern in server.deny if re.search(pattern, entry.tool)), None)
        allowing = next((pattern for pattern in server.allow if re.search(pattern, entry.tool)), None)
        if entry.problem is not None:
            self._log_once(f"MCP server {entry.server}: the tool {entry.tool[:100]!r} is left out: {entry.problem}")
            return entry.problem
        if denying is not None:
            reason = f"denied by {denying!r}"
            if allowing is not None:
                self._log_once(
                    f"MCP server {entry.server}: {entry.tool!r} is allowed by {allowing!r} and {reason}; deny wins"
                )
            return reason
        if server.allow and allowing is None:
            return "not allowed"
        return "not read-only" if server.read_only and not entry.is_read_only else None

    def _too_many(self, server: str, count: int) -> str | None:
        most = self._servers[server].max_tools
        if count <= most:
            return None
        self._log_once(f"MCP server {server}: it has more than {most} tools (max_tools); those behind them are left out")
        return f"the server has more than {most} tools"

    def _withheld(self, entry: Entry, *, is_new: bool, is_changed: bool) -> str | None:
        """Why a tool waits for its approval."""
        withholds = self._servers[entry.server].on_change == "withhold"
        if is_changed:
            found = f"the definition of {entry.tool!r} is not the approved one (now {entry.digest[:12]})"
            self._log_once(f"MCP server {entry.server}: {found}")
            return "changed since it was approved" if withholds else None
        return UNAPPROVED if is_new and withholds else None

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
        if message in self._logged:
            return
        if len(self._logged) >= _MAX_LOGGED:
            self._logged.clear()  # rather say something twice than grow with what a server thinks up, or be silenced by it
        self._logged.add(message)
        logger.warning("%s", message)


UNAPPROVED: Final = "not approved yet"


def read(server: str, listed: Iterable[mcp_types.Tool]) -> Sequence[Entry]:
    """What a server lists, with what is wrong with it. Takes a while for large schemas that are new."""
    return [_entry(server, tool) for tool in listed]


def _entry(server: str, tool: mcp_types.Tool) -> Entry:
    description = tool.description or tool.title or tool.name
    # OpenAI refuses an object without properties, which is what tools without arguments have.
    definition = [description, {"properties": {}, **tool.input_schema}]
    schema, problem = "", None
    try:
        encoded = _canonical(definition)
    except ValueError:
        encoded, problem = repr(definition), "bad schema: it holds a number that JSON does not have"
    if not tool.name:
        problem = "bad name: it is empty"
    elif (size := len((tool.name + encoded).encode())) > _MAX_DEFINITION:
        problem, description = f"bad definition: {size} bytes are too many", ""
    elif problem is None:
        schema = _canonical(definition[1])
        problem = _fault(schema)
    digest = hashlib.sha256(encoded.encode()).hexdigest()
    is_read_only = tool.annotations is not None and tool.annotations.read_only_hint is True
    return Entry(server, tool.name, description, schema, digest, is_read_only, problem)


@lru_cache(maxsize=1024)  # to look at one takes milliseconds, and servers list the same ones again and again
def _fault(encoded: str) -> str | None:
    """Why a provider would refuse a schema, and with it each request that offers its tool."""
    schema: dict[str, Any] = json.loads(encoded)
    if schema.get("type") != "object":
        return "bad schema: the arguments of a tool must be an object"
    at_top = [keyword for keyword in _NOT_AT_TOP if keyword in schema]
    if at_top:
        return f"bad schema: providers refuse {at_top[0]} at its top"
    try:
        error = next(_SCHEMAS.iter_errors(schema), None)
    except RecursionError:
        return "bad schema: it is nested too deeply"
    if error is not None:
        return f"bad schema: it is not JSON Schema 2020-12 at {error.json_path[:100]}"
    odd = next((name for name in schema["properties"] if not _PROPERTY.fullmatch(name)), None)
    return None if odd is None else f"bad schema: providers refuse an argument called {odd[:100]!r}"


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


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
