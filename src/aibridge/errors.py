"""What goes wrong, and how each kind of provider says so.

Every refusal of the bridge's own has the provider's error shape, because clients act on it (wire.md A10, B2). Errors of
the provider itself never pass through here: they are relayed as they came.
"""

import math
from collections.abc import Sequence
from typing import ClassVar, Final, Literal

import msgspec

ProviderKind = Literal["anthropic", "openai"]

RefusalReason = Literal[
    "request",
    "identity",
    "origin",
    "route",
    "timeout",
    "body",
    "upgrade",
    "rate",
    "actor_concurrency",
    "concurrency",
    "head",
    "recording",
]
"""Why the bridge did not let a request in: a label of metrics, so these are all."""


class BridgeError(Exception):
    """The bridge cannot or will not do what was asked. `status` is the HTTP status that says so.

    `detail` says for whoever runs the bridge what was wrong. Like `message`, it quotes nothing that the client has sent.
    """

    status: ClassVar[int] = 500
    reason: ClassVar[RefusalReason | None] = None
    """Where this is a refusal, before a provider was asked: which one."""

    def __init__(self, message: str, headers: Sequence[tuple[bytes, bytes]] = (), *, detail: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.headers = tuple(headers)
        self.detail = detail or message


class BadRequest(BridgeError):
    """The request is not one that a provider could understand."""

    status = 400
    reason = "request"


class NotAuthenticated(BridgeError):
    """Nobody is known to be behind the request, or the credential for the bridge is invalid."""

    status = 401
    reason = "identity"


class Forbidden(BridgeError):
    """The request comes from where requests must not come from, such as a foreign web page."""

    status = 403
    reason = "origin"


class UnknownRoute(BridgeError):
    """No provider route is known at that path: nothing is forwarded that was not allow-listed."""

    status = 404
    reason = "route"


class RequestTimeout(BridgeError):
    """The client was too slow to send its request."""

    status = 408
    reason = "timeout"


class BodyTooLarge(BridgeError):
    """The request body is over the configured limit."""

    status = 413
    reason = "body"


class UpgradeRefused(BridgeError):
    """A WebSocket upgrade. 426 makes Codex and Copilot fall back to HTTP at once (clients.md 4)."""

    status = 426
    reason = "upgrade"


class TooManyRequests(BridgeError):
    """Whoever is behind the request sends too many."""

    status = 429
    reason = "rate"


class TooManyUnderWay(BridgeError):
    """Whoever is behind the request has too many under way."""

    status = 429
    reason = "actor_concurrency"


class HeadersTooLarge(BridgeError):
    """The request head is over the configured limit."""

    status = 431
    reason = "head"


class RecordingFailed(BridgeError):
    """The ledger cannot be written, so the request is not served (fail closed)."""

    status = 503
    reason = "recording"


class Overloaded(BridgeError):
    """The bridge has as many requests under way as it is configured to take."""

    status = 503
    reason = "concurrency"


class UpstreamError(BridgeError):
    """The provider could not be reached, or its response broke off."""

    status = 502


class UpstreamTimeout(UpstreamError):
    """The provider took longer than configured to accept the connection, to take the request or to send the next byte."""

    status = 504


class Unreachable(UpstreamError):
    """There was no connection on which all of the request could be sent: the provider cannot have accepted it."""


class ConnectTimeout(Unreachable, UpstreamTimeout):
    """The connection took longer than configured."""


class Unsendable(UpstreamError):
    """The request cannot be sent as it is, or its body broke off. That says nothing about the provider."""


class Unfinished(Unreachable, Unsendable):
    """The provider closed the connection before all of the request was sent, perhaps because of what is in it."""


class BreakerOpen(UpstreamError):
    """The provider has failed before and is given a rest, so it was not asked (`aibridge.breakers`)."""

    status = 503


SHUTDOWN: Final = UpstreamError("The gateway is shutting down.")
"""What clients are told whose responses cannot end in time."""


class Departure(Exception):
    """Nobody waits for the response any more: an event of the conversation, not an error."""

    refused = False
    """The provider has refused the request of this turn, which was to be sent again: there is nothing that it could bill."""


class ClientDisconnected(Departure):
    """The client is gone: an event of the conversation, not an error."""


class Interrupted(Departure):
    """The process is shutting down and its grace period is over: an event, not an error."""


# wire.md A10: status and type go together.
_ANTHROPIC_TYPES: Final = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
    529: "overloaded_error",
}
_OPENAI_TYPES: Final = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_CLIENT_ERRORS: Final = range(400, 500)


def error_type(kind: ProviderKind, status: int) -> str:
    """The provider's word for an HTTP status."""
    if kind == "anthropic":
        fallback = "invalid_request_error" if status in _CLIENT_ERRORS else "api_error"
        return _ANTHROPIC_TYPES.get(status, fallback)
    fallback = "invalid_request_error" if status in _CLIENT_ERRORS else "server_error"
    return _OPENAI_TYPES.get(status, fallback)


def error_body(kind: ProviderKind, status: int, message: str) -> bytes:
    """An error as a JSON body in the provider's shape."""
    error: dict[str, str | None] = {"type": error_type(kind, status), "message": message}
    if kind == "anthropic":
        return msgspec.json.encode({"type": "error", "error": error})
    return msgspec.json.encode({"error": error | {"param": None, "code": None}})


def retry_after_field(seconds: float) -> tuple[bytes, bytes]:
    """The header field that asks a client to come back in so many seconds: in whole ones, and not at once."""
    return b"retry-after", b"%d" % max(1, math.ceil(seconds))
