"""Credentials in the body of a request: what the protocols have for the servers that a provider calls by itself.

Anthropic has ``authorization_token`` in ``mcp_servers``; OpenAI has ``authorization`` and ``headers`` in tools of type
``mcp``, and ``domain_secrets`` in the network policy of a container (types of the vendors'
SDKs: ``BetaRequestMCPServerURLDefinition``, ``Mcp``, ``ContainerNetworkPolicyAllowlist``).

They are found by their names, wherever those stand: so also in a body that is cut off, and on routes whose bodies nobody
else reads. But not inside of a string, as in a prompt or in the arguments of a call: each quote there has a backslash
before it.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Final

from msgspec import Raw

from aibridge.errors import ProviderKind
from aibridge.wire.reading import text

SHORTEST: Final = 8
"""What is shorter keeps no secret: it is a placeholder such as "none", which hiding would spoil the text around it."""

# Clients decide how many there are. So many are more than are ever looked for (`aibridge.masking`).
_MOST: Final = 1000

_NAMES: Final[Mapping[ProviderKind, re.Pattern[bytes]]] = {
    "anthropic": re.compile(rb'"(authorization_token)"'),
    "openai": re.compile(rb'"(authorization|headers|domain_secrets)"'),
}

# While a pattern is searched, the interpreter's lock is held.
_SLICE: Final = 256 * 1024
_LONGEST_NAME: Final = 32

# Up to the end of the string, or of what there is of it.
_INSIDE: Final = rb'[^"\\]*+(?:\\.[^"\\]*+)*+'
_COLON: Final = rb"\s*+:\s*+"
_STRING: Final = re.compile(_COLON + rb'"(' + _INSIDE + rb")", re.DOTALL)
_OBJECT: Final = re.compile(_COLON + rb'\{(?:[^"}]++|"' + _INSIDE + rb'"?)*+', re.DOTALL)
_ARRAY: Final = re.compile(_COLON + rb'\[(?:[^"\]]++|"' + _INSIDE + rb'"?)*+', re.DOTALL)
_VALUES: Final = {b"headers": _OBJECT, b"domain_secrets": _ARRAY}

# A string, and the one that it names, if it does. No string is looked at twice.
_MEMBER: Final = re.compile(rb'"(' + _INSIDE + rb')"?(?:' + _COLON + rb'"(' + _INSIDE + rb')"?)?', re.DOTALL)

# Header fields that are about the message, and what a schema says of such fields.
_NO_SECRETS: Final = frozenset({b"accept", b"content-type", b"user-agent", b"mcp-protocol-version", b"description"})
_SCHEMA: Final = (b"type", b"object")


def credentials_in(kind: ProviderKind, body: bytes) -> tuple[str, ...]:
    """The credentials in a request's body, or in a part of it: as they are written, as they are meant, without their scheme.

    What is too short keeps no secret. Of very many not all are found. Never raises.
    """
    found: dict[str, None] = {}
    for written in _values(kind, body):
        for value in (written.decode(errors="replace"), text(Raw(b'"%b"' % written)) or ""):
            found |= dict.fromkeys(each for each in (value, value.rpartition(" ")[2]) if len(each) >= SHORTEST)
        if len(found) > _MOST:
            break
    return tuple(found)


def _values(kind: ProviderKind, body: bytes) -> Iterator[bytes]:
    """The strings that are credentials, without their quotes. One pass, whatever there is in a body."""
    at = 0
    for _ in range(_MOST):
        named = _next_name(_NAMES[kind], body, at)
        if named is None:
            return
        value = _VALUES.get(named[1], _STRING).match(body, named.end())
        at = (value or named).end()
        if value is not None:
            yield from _credentials(named[1], value)


def _next_name(names: re.Pattern[bytes], body: bytes, at: int) -> re.Match[bytes] | None:
    slices = (names.search(body, start, start + _SLICE + _LONGEST_NAME) for start in range(at, len(body), _SLICE))
    return next(filter(None, slices), None)


def _credentials(name: bytes, value: re.Match[bytes]) -> Sequence[bytes]:
    """What is a credential in the value of a member of that name."""
    if name not in _VALUES:
        return [value[1]]
    members = [member.groups(b"") for member in islice(_MEMBER.finditer(value[0]), _MOST)]
    if name == b"domain_secrets":
        return [inner for field, inner in members if field == b"value"]
    if _SCHEMA in members:  # of a tool that takes header fields
        return []
    return [inner for field, inner in members if field.lower() not in _NO_SECRETS]
