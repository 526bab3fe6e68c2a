"""Which header fields go where: hop-by-hop fields stop here, the client's credential is replaced, all others pass.

Pure. Names are in lower case, as ASGI delivers them.
"""

from collections.abc import Set as AbstractSet
from typing import Final

import msgspec

from aibridge.errors import ProviderKind
from aibridge.records import CredentialKind
from aibridge.wire.base import Headers

# RFC 9110 section 7.6.1, and the fields that older software sends in the same role.
_HOP_BY_HOP: Final = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    }
)

# Set anew for the upstream connection, or meant for this server alone: a cookie belongs to the host it was set by.
_OURS: Final = frozenset({b"host", b"content-length", b"expect", b"cookie", b"http2-settings"})

_NOT_SENT: Final = _HOP_BY_HOP | _OURS

# The usual values of the connection field, which name no other.
_NO_NAMES: Final = frozenset({b"keep-alive", b"close", b"Keep-Alive"})

CREDENTIAL_FIELDS: Final = frozenset({b"authorization", b"x-api-key", b"api-key"})
"""In which clients send what providers are to know them by; the last is Azure's."""

# From this version on Anthropic's clients send every credential as a bearer token, before it API keys had a header of
# their own (wire.md A1).
_BEARER_SINCE: Final = b"2026-10-21"

_HINT_LENGTH: Final = 4
_SHORTEST_HINTED: Final = 16


class UpstreamHeaders(msgspec.Struct, frozen=True):
    """The header fields of an upstream request, and whose credential is among them.

    `secrets` are the credentials in it, so that they can be kept out of the ledger.
    """

    fields: list[tuple[bytes, bytes]]
    credential_kind: CredentialKind | None
    credential_hint: str | None
    secrets: tuple[str, ...]


def to_upstream(headers: Headers, kind: ProviderKind, api_key: str | None) -> UpstreamHeaders:
    """What goes to the provider. Exactly one credential does: the configured key, or without one what the client brought."""
    passed = _without_all(headers, _NOT_SENT)
    sent = [field for field in passed if field[0] not in CREDENTIAL_FIELDS]
    brought = [field for field in passed if field[0] in CREDENTIAL_FIELDS and field[1].strip()]
    field_name = _credential_field(headers, kind)
    if api_key is not None:
        value = api_key.encode()
        sent.append((field_name, value if field_name == b"x-api-key" else b"Bearer " + value))
        return UpstreamHeaders(sent, "centralized", _hint(api_key), (api_key,))
    if not brought:
        return UpstreamHeaders(sent, None, None, ())
    chosen = next((field for field in brought if field[0] == field_name), brought[0])
    secrets = tuple(_credential(value) for _, value in brought)
    return UpstreamHeaders([*sent, chosen], "byok", _hint(_credential(chosen[1])), secrets)


def to_client(headers: Headers) -> list[tuple[bytes, bytes]]:
    """What goes back to the client: everything but the hop-by-hop fields."""
    return _without_all(headers, _HOP_BY_HOP)


def without(headers: Headers, name: bytes) -> list[tuple[bytes, bytes]]:
    """The header fields except those of one name."""
    return [field for field in headers if field[0] != name]


def _without_all(headers: Headers, dropped: AbstractSet[bytes]) -> list[tuple[bytes, bytes]]:
    """The header fields except those of some names and those that the sender calls hop-by-hop (RFC 9110 section 7.6.1)."""
    for name, value in headers:
        if name == b"connection" and value not in _NO_NAMES:
            dropped = dropped | {option.strip() for option in value.lower().split(b",")}
    return [field for field in headers if field[0] not in dropped]


def _credential_field(headers: Headers, kind: ProviderKind) -> bytes:
    if kind == "openai":
        return b"authorization"
    for name, value in headers:
        if name == b"anthropic-version":
            return b"authorization" if value >= _BEARER_SINCE else b"x-api-key"
    return b"x-api-key"


def _credential(value: bytes) -> str:
    """The credential itself, without the name of its scheme."""
    return value.split()[-1].decode("latin-1")


def _hint(credential: str) -> str:
    """A form of a credential that tells two apart and gives nothing away: its end, and of a short one nothing at all."""
    if len(credential) >= _SHORTEST_HINTED:
        return "..." + credential[-_HINT_LENGTH:]
    return "..."
