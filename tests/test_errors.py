"""The shapes of our own errors, pinned: clients act on them.

Truth: wire.md A10 and B2 for shape and type; RFC 9110 for status codes; our own choice which failure has which status.
"""

import json
from typing import get_args

import pytest

from aibridge import errors
from aibridge.errors import BridgeError, ProviderKind, RefusalReason, error_body, error_type


def test_anthropics_shape() -> None:
    assert json.loads(error_body("anthropic", 404, 'No "such" route.')) == {
        "type": "error",
        "error": {"type": "not_found_error", "message": 'No "such" route.'},
    }


def test_openais_shape() -> None:
    assert json.loads(error_body("openai", 404, "No such rüte.")) == {
        "error": {"type": "invalid_request_error", "message": "No such rüte.", "param": None, "code": None},
    }


@pytest.mark.parametrize(
    ("status", "anthropic", "openai"),
    [
        (400, "invalid_request_error", "invalid_request_error"),
        (401, "authentication_error", "authentication_error"),
        (402, "billing_error", "invalid_request_error"),
        (403, "permission_error", "permission_error"),
        (404, "not_found_error", "invalid_request_error"),
        (409, "conflict_error", "invalid_request_error"),
        (413, "request_too_large", "invalid_request_error"),
        (426, "invalid_request_error", "invalid_request_error"),
        (429, "rate_limit_error", "rate_limit_error"),
        (431, "invalid_request_error", "invalid_request_error"),
        (500, "api_error", "server_error"),
        (502, "api_error", "server_error"),
        (503, "api_error", "server_error"),
        (504, "timeout_error", "server_error"),
        (529, "overloaded_error", "server_error"),
    ],
)
def test_types(status: int, anthropic: str, openai: str) -> None:
    types: dict[ProviderKind, str] = {"anthropic": anthropic, "openai": openai}
    for kind, expected in types.items():
        assert error_type(kind, status) == expected
        assert json.loads(error_body(kind, status, ""))["error"]["type"] == expected


STATUSES = {
    "BridgeError": 500,
    "BadRequest": 400,
    "NotAuthenticated": 401,
    "Forbidden": 403,
    "UnknownRoute": 404,
    "RequestTimeout": 408,
    "BodyTooLarge": 413,
    "UpgradeRefused": 426,
    "HeadersTooLarge": 431,
    "RecordingFailed": 503,
    "UpstreamError": 502,
    "UpstreamTimeout": 504,
    "TooManyRequests": 429,
    "TooManyUnderWay": 429,
    "Overloaded": 503,
    "Unreachable": 502,
    "ConnectTimeout": 504,
    "Unsendable": 502,
    "Unfinished": 502,
    "BreakerOpen": 503,
}


def test_every_error_has_its_status() -> None:
    found = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, BridgeError)]
    assert {error.__name__: error.status for error in found} == STATUSES


REASONS = {
    "BadRequest": "request",
    "NotAuthenticated": "identity",
    "Forbidden": "origin",
    "UnknownRoute": "route",
    "RequestTimeout": "timeout",
    "BodyTooLarge": "body",
    "UpgradeRefused": "upgrade",
    "TooManyRequests": "rate",
    "TooManyUnderWay": "actor_concurrency",
    "Overloaded": "concurrency",
    "HeadersTooLarge": "head",
    "RecordingFailed": "recording",
}


def test_every_refusal_has_its_reason() -> None:
    """Our choice. What has none is about a provider that was asked, or about the gateway itself."""
    found = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, BridgeError)]
    assert {error.__name__: error.reason for error in found if error.reason is not None} == REASONS
    assert set(REASONS.values()) == set(get_args(RefusalReason))


def test_an_error_carries_its_words_and_fields() -> None:
    error = BridgeError("Why.", [(b"retry-after", b"1")])
    assert (str(error), error.message, error.headers) == ("Why.", "Why.", ((b"retry-after", b"1"),))
    assert BridgeError("Why.").headers == ()
    assert (BridgeError("Why.").detail, BridgeError("Why.", detail="How.").detail) == ("Why.", "How.")
