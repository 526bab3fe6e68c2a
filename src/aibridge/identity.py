"""Who is behind a request.

The bridge needs an `Actor` in the request's scope and refuses a request without one. Whoever runs the bridge puts it there
with `as_actor`: a middleware of a host application, or the server with an `Authenticator`.
"""

import getpass
import ipaddress
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from aibridge.asgi import Scope, peer_of
from aibridge.errors import NotAuthenticated
from aibridge.wire.base import Headers

SCOPE_KEY: Final = "aibridge.actor"
NOBODY: Final = "Nobody is known to be behind this request."
"""What a client is told that is refused for that."""


@dataclass(frozen=True, slots=True)
class Actor:
    """A person or a service that requests are attributed to. `metadata` is kept with every interception."""

    id: str
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.id:
            raise ValueError("an actor needs an id that is not empty")


def as_actor(scope: Scope, actor: Actor) -> dict[str, Any]:
    """A copy of an ASGI scope in which `actor` is behind the request: ``await bridge(as_actor(scope, actor), ...)``."""
    return {**scope, SCOPE_KEY: actor}


def actor_of(scope: Scope) -> Actor | None:
    """The actor of a scope, if there is one."""
    actor = scope.get(SCOPE_KEY)
    return actor if isinstance(actor, Actor) else None


class Authenticator(Protocol):
    """Finds the actor behind a request.

    `consumes` names the request headers (lower case) that carry identity for the bridge: they never go to a provider.
    """

    consumes: frozenset[bytes]

    async def authenticate(self, scope: Scope) -> Actor | None:
        """The actor, or None where the request carries nothing that this authenticator knows.

        Raises `aibridge.errors.NotAuthenticated` where it does and it is not valid.
        """


class LocalUser:
    """Everybody who can reach the socket is the user that runs the process: for a bridge that is bound to loopback."""

    consumes: frozenset[bytes] = frozenset()

    def __init__(self, name: str | None = None) -> None:
        self._actor = Actor(name or _login_name())

    async def authenticate(self, scope: Scope) -> Actor | None:  # noqa: ARG002  it does not matter what was sent
        """The local user."""
        return self._actor


class TrustedProxy:
    """A proxy in front has authenticated the user and names it in a header.

    Only connections from `networks` (CIDR notation) are believed; anybody else could write the header too.
    """

    def __init__(self, header: str, networks: Sequence[str] = ("127.0.0.0/8", "::1/128")) -> None:
        self._header = header.lower().encode("latin-1")
        self._networks = [ipaddress.ip_network(network) for network in networks]
        self.consumes = frozenset({self._header})

    async def authenticate(self, scope: Scope) -> Actor | None:
        """The user that the header names. Raises `NotAuthenticated` unless a trusted proxy sent it, once, with a value."""
        headers: Headers = scope.get("headers", ())
        values = [value.decode("utf-8", "replace").strip() for name, value in headers if name == self._header]
        if not values:
            return None
        if not self._trusts(peer_of(scope)):
            raise self._invalid("from a peer that is not a trusted proxy")
        if len(values) > 1:
            raise self._invalid("more than once")
        if not values[0]:
            raise self._invalid("without a value")
        return Actor(values[0])

    def _invalid(self, how: str) -> NotAuthenticated:
        return NotAuthenticated(NOBODY, detail=f"the header {self._header.decode('latin-1')} came {how}")

    def _trusts(self, peer: str) -> bool:
        try:
            address = ipaddress.ip_address(peer.partition("%")[0])
        except ValueError:  # a Unix domain socket, or a test's client
            return False
        if isinstance(address, ipaddress.IPv6Address):
            address = address.ipv4_mapped or address
        return any(address in network for network in self._networks)


def _login_name() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user without a name; KeyError before Python 3.13
        return "local"
