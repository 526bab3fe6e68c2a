"""Providers are data: any number of named servers of two kinds.

A kind says which routes there are, which of them are intercepted in which wire format, and how errors look. What is not
in the table is not forwarded: a provider key must not reach routes that nobody thought of.
"""

import re
from dataclasses import dataclass, field
from typing import Final, Literal
from urllib.parse import unquote, urlsplit

from aibridge.breakers import BreakerRules
from aibridge.errors import ProviderKind
from aibridge.retries import RetryRules
from aibridge.wire import CHAT, MESSAGES, RESPONSES, WireFormat

OnDisconnect = Literal["cancel", "drain"]
"""When the client goes before the end: stop the provider's work at once, or read on for exact usage."""

_NAME: Final = re.compile(r"[a-z0-9](?:[a-z0-9_-]{0,62}[a-z0-9])?")

RESERVED_NAMES: Final = frozenset({"api", "healthz", "metrics", "readyz", "ui"})
"""First path segments of the server's own routes."""

_DOTS: Final = frozenset({".", ".."})
_NO_RETRIES: Final = RetryRules()


@dataclass(frozen=True, slots=True)
class Route:
    """An allow-listed route below a provider's name. `pattern` has ``{id}`` for one segment, ``*`` at its end for any.

    `format` is how an intercepted route is read; None passes the route through. `about` says of a passthrough route that its
    requests are about conversations in that format.
    """

    pattern: str
    methods: frozenset[str]
    format: WireFormat | None = None
    about: WireFormat | None = None

    def matches(self, method: str, path: str) -> bool:
        """Whether a request is for this route. `path` is percent-encoded, below the provider's name."""
        if method not in self.methods:
            return False
        if self.format is not None or not ("{" in self.pattern or self.pattern.endswith("*")):
            return path == self.pattern
        wanted, found = self.pattern.split("/"), path.split("/")
        if wanted[-1] == "*":
            wanted, found, rest = wanted[:-1], found[: len(wanted) - 1], found[len(wanted) - 1 :]
            if not rest or not all(map(_plain_segment, rest)):
                return False
        return len(wanted) == len(found) and all(
            _plain_id(there) if here == "{id}" else here == there for here, there in zip(wanted, found, strict=True)
        )


def _plain_segment(segment: str) -> bool:
    """Whether a segment stays one segment, whatever a server behind us decodes: no dots to climb, no hidden slash."""
    plain = unquote(segment)
    return bool(plain) and plain not in _DOTS and "/" not in plain and "\\" not in plain and "%" not in plain


def _plain_id(segment: str) -> bool:
    """Likewise for an id, which may hold slashes as long as they are encoded: ``meta-llama%2FLlama-3.1-8B``."""
    return all(map(_plain_segment, segment.replace("%2f", "%2F").split("%2F")))


_READ: Final = frozenset({"GET", "HEAD"})
_WRITE: Final = frozenset({"POST"})
_ANY: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"})

_ROUTES: Final[dict[ProviderKind, tuple[Route, ...]]] = {
    "anthropic": (
        Route("/v1/messages", _WRITE, MESSAGES),
        Route("/v1/messages/count_tokens", _WRITE, about=MESSAGES),
        Route("/v1/models", _READ),
        Route("/v1/models/{id}", _READ),
        Route("/api/event_logging/*", _ANY),
    ),
    "openai": (
        Route("/v1/chat/completions", _WRITE, CHAT),
        Route("/v1/responses", _WRITE, RESPONSES),
        Route("/v1/responses/*", _ANY, about=RESPONSES),
        Route("/v1/models", _READ),
        Route("/v1/models/{id}", _READ),
        Route("/v1/conversations", _ANY),
        Route("/v1/conversations/*", _ANY),
    ),
}


def check_name(name: str) -> None:
    """Raises ValueError for a name that no provider can have: it is the first segment of its routes."""
    if not _NAME.fullmatch(name) or name in RESERVED_NAMES:
        reserved = ", ".join(sorted(RESERVED_NAMES))
        raise ValueError(
            f"provider name {name!r}: up to 64 lower-case letters, digits, '-' and '_', and not one of {reserved}"
        )


def check_base_url(url: str) -> None:
    """Raises ValueError for a base URL that requests cannot be sent to. The message does not quote it."""
    wrong = "must be an http:// or https:// URL without a query"
    try:
        parts = urlsplit(url)
        _ = parts.port  # raises where it is none
    except ValueError:
        raise ValueError(wrong) from None
    odd = any(character.isspace() or not character.isprintable() for character in url)
    problems = []
    if odd or parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        problems.append(wrong)
    if not (parts.hostname or "").isascii():
        problems.append("must name its host in ASCII (an international name in its xn-- form)")
    if parts.username or parts.password:
        problems.append("must not hold credentials; use api_key")
    if problems:
        raise ValueError("; ".join(problems))


@dataclass(frozen=True, slots=True)
class Provider:
    """A server that speaks a provider's protocol, under a name of its own.

    `base_url` is what a client's own base URL would be: for `openai` it includes ``/v1``. Without an `api_key` the client's
    credential goes upstream. `ca_file` is a PEM file with certificates to trust beside the system's. `ask_for_usage`: add
    ``stream_options.include_usage`` to streamed Chat requests, for the ledger; some old servers refuse the option.
    `drain_seconds` bounds how long a response is read on for after the client has gone. `breaker` says when the provider is
    given a rest, `retries` when a request is sent again: never, by default. `dump` is for debugging: where there are traffic
    dumps (`aibridge.dumps`), its traffic is in them.

    Raises ValueError for a name or URL that cannot be.
    """

    name: str
    kind: ProviderKind
    base_url: str
    api_key: str | None = field(default=None, repr=False)
    on_disconnect: OnDisconnect = "cancel"
    drain_seconds: float = 300.0
    ask_for_usage: bool = True
    ca_file: str | None = None
    breaker: BreakerRules | None = None
    retries: RetryRules = _NO_RETRIES
    dump: bool = False

    def __post_init__(self) -> None:
        check_name(self.name)
        try:
            check_base_url(self.base_url)
        except ValueError as error:
            raise ValueError(f"provider {self.name!r}: base_url {error}") from None

    @classmethod
    def anthropic(
        cls, name: str = "anthropic", *, base_url: str = "https://api.anthropic.com", api_key: str | None = None
    ) -> "Provider":
        """Anthropic, or another server that speaks Messages. `base_url` ends before ``/v1``."""
        return cls(name, "anthropic", base_url, api_key)

    @classmethod
    def openai(
        cls, name: str = "openai", *, base_url: str = "https://api.openai.com/v1", api_key: str | None = None
    ) -> "Provider":
        """OpenAI, or another server that speaks Chat Completions or Responses. `base_url` includes ``/v1``."""
        return cls(name, "openai", base_url, api_key)

    @property
    def routes(self) -> tuple[Route, ...]:
        """The allow-listed routes."""
        return _ROUTES[self.kind]

    def route(self, method: str, path: str) -> Route | None:
        """The allow-listed route of a request, if there is one. `path` is percent-encoded, below the provider's name."""
        return next((route for route in self.routes if route.matches(method, path)), None)

    def url(self, path: str, query: str) -> str:
        """Where a request goes. `path` and `query` are passed on as they are encoded."""
        if self.kind == "openai":
            path = path.removeprefix("/v1")
        return self.base_url.rstrip("/") + path + (f"?{query}" if query else "")
