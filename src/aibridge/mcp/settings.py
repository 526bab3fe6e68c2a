"""What is said of an MCP server: where it is, what of it is offered, and its limits."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final, Literal
from urllib.parse import parse_qsl, urlsplit

from aibridge.masking import hidden

# No underscore: in `bmcp_<server>_<tool>` the second one ends the server's name, so that two servers' tools never meet.
# No longer than this: a tool's own name needs room among the 64 characters.
_NAME: Final = re.compile(r"[a-z0-9][a-z0-9-]{0,31}")

_HEADER_NAME: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110 section 5.6.2
_HEADER_VALUE: Final = re.compile(r"[\t\x20-\x7e\x80-\xff]*")

_POSITIVE: Final = (
    "start_timeout",
    "call_timeout",
    "max_concurrent_calls",
    "max_result_bytes",
    "refresh_seconds",
    "max_tools",
)

_HIDDEN: Final = "***"
_SHORTEST_SECRET: Final = 4  # what is shorter keeps no secret, and hiding every "1" would leave nothing to read
_USERINFO: Final = re.compile(r"(?<=://)[^/@\s]+(?=@)")
_SECRET_OPTION: Final = re.compile(
    r"(?P<option>-.*(?:key|token|secret|passw|credential|auth)[^=]*)(?P<value>=.*)?", re.IGNORECASE
)


@dataclass(frozen=True)
class McpServer:
    """One MCP server. It has either a `url` (streamable HTTP, or SSE with that `transport`) or a `command` (stdio).

    `headers` go with every HTTP request, `env` is added to the minimal environment of the command; both count as secrets,
    and so do the user and the query of the URL. `allow` and `deny` are regular expressions, searched in a tool's own name:
    deny wins, and where there is an allow list, what does not match is out. `read_only` keeps only tools that the server
    annotates as read-only. `on_change` says what happens to a tool whose description or schema is not the approved one any
    more: it is reported, or withheld until it is approved.

    Seconds: `start_timeout` is how long the start of the bridge, or a call, waits for a connection; `call_timeout` is all
    that a call may take; the tools are listed again every `refresh_seconds`. `max_result_bytes` bounds what of a result is
    kept, `max_tools` how many tools are offered. Raises ValueError for what cannot be.
    """

    url: str | None = field(default=None, repr=False)
    command: tuple[str, ...] = field(default=(), repr=False)
    transport: Literal["http", "sse"] = "http"
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    allow: tuple[str, ...] = ()
    deny: tuple[str, ...] = ()
    read_only: bool = False
    on_change: Literal["report", "withhold"] = "report"
    start_timeout: float = 10.0
    call_timeout: float = 60.0
    max_concurrent_calls: int = 8
    max_result_bytes: int = 1_000_000
    refresh_seconds: float = 300.0
    max_tools: int = 200

    def __post_init__(self) -> None:
        if (self.url is None) == (not self.command):
            raise ValueError("an MCP server needs either a url or a command")
        if self.url is None:
            _check_command(self)
        else:
            _check_url(self, self.url)
        for pattern in (*self.allow, *self.deny):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error
        for name in _POSITIVE:
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be more than 0")

    @cached_property
    def where(self) -> str:
        """Where it runs, for people and for the ledger: the URL or the command line, without secrets."""
        if self.url is not None:
            parts = urlsplit(self.url)
            return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()
        return " ".join(self.shown_command)

    @cached_property
    def shown_command(self) -> tuple[str, ...]:
        """The command without secrets."""
        shown: list[str] = []
        hide_next = False
        for argument in self.command:
            option = _SECRET_OPTION.fullmatch(argument)
            if hide_next and not argument.startswith("-"):
                shown.append(_HIDDEN)
            elif option and option["value"]:
                shown.append(f"{option['option']}={_HIDDEN}")
            else:
                shown.append(self.masked(argument))
            hide_next = option is not None and option["value"] is None
        return tuple(shown)

    def masked(self, text: str) -> str:
        """The text without any of this server's secrets."""
        return _USERINFO.sub(_HIDDEN, hidden(text, self._secrets, _HIDDEN))

    @cached_property
    def _secrets(self) -> frozenset[str]:
        parts = urlsplit(self.url or "")
        found = {*self.env.values(), *(value for _, value in parse_qsl(parts.query)), parts.query}
        found |= {part for part in (parts.username, parts.password) if part}
        for value in self.headers.values():
            found |= {value, value.rpartition(" ")[2]}  # the credential without its scheme, too
        return frozenset(secret for secret in found if len(secret) >= _SHORTEST_SECRET)


def printable(text: str, keep: str = "") -> str:
    """What somebody else says, fit for a terminal or a log: all but `keep` that cannot be seen is escaped."""
    return "".join(each if each.isprintable() or each in keep else each.encode("unicode_escape").decode() for each in text)


def check_name(name: str) -> None:
    """Raises ValueError where a server cannot have that name."""
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"{name!r} cannot be the name of an MCP server: "
            "it takes at most 32 lower-case letters, digits and hyphens, and no hyphen first"
        )


def _check_command(server: McpServer) -> None:
    if server.transport != "http" or server.headers:
        raise ValueError("transport and headers are for MCP servers with a url")
    if not server.command[0] or any("\0" in argument for argument in server.command):
        raise ValueError("the command of an MCP server must name a program, and hold no NUL")


def _check_url(server: McpServer, url: str) -> None:
    if server.env:
        raise ValueError("env is for MCP servers with a command")
    if server.transport not in ("http", "sse"):
        raise ValueError('the transport of an MCP server is "http" or "sse"')
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise ValueError("the url of an MCP server must be a whole http:// or https:// address")
    for name, value in server.headers.items():
        if not _HEADER_NAME.fullmatch(name) or not _HEADER_VALUE.fullmatch(value):
            raise ValueError(f"{name!r} cannot be sent as an HTTP header")
