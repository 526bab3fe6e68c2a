"""Which header fields go where.

Truth: RFC 9110 section 7.6.1 for hop-by-hop fields; wire.md A1 for credentials, E and design.md 1 for what must pass;
failures.md 5 and 12.
"""

import pytest
from hypothesis import given, strategies as st

from aibridge.headers import to_client, to_upstream, without
from aibridge.records import CredentialKind

Field = tuple[bytes, bytes]

KEY = "sk-ant-api03-configured-key-0001"
OLD = (b"anthropic-version", b"2023-06-01")
NEW = (b"anthropic-version", b"2026-10-21")
BEARER = (b"authorization", b"Bearer sk-client-bearer-00000001")
API_KEY = (b"x-api-key", b"sk-client-api-key-0000002")
AZURE = (b"api-key", b"azure-client-key-00000003")

HOP_BY_HOP = [
    b"connection",
    b"keep-alive",
    b"proxy-authenticate",
    b"proxy-authorization",
    b"proxy-connection",
    b"te",
    b"trailer",
    b"transfer-encoding",
    b"upgrade",
]


def credentials(fields: list[Field]) -> list[Field]:
    return [field for field in fields if field[0] in (b"authorization", b"x-api-key", b"api-key")]


# --- one credential ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("brought", [[], [BEARER], [API_KEY], [AZURE], [BEARER, API_KEY, AZURE], [API_KEY, API_KEY]])
@pytest.mark.parametrize(
    ("kind", "version", "expected"),
    [
        ("anthropic", [], (b"x-api-key", KEY.encode())),
        ("anthropic", [OLD], (b"x-api-key", KEY.encode())),
        ("anthropic", [NEW], (b"authorization", b"Bearer " + KEY.encode())),
        ("anthropic", [(b"anthropic-version", b"2027-01-01")], (b"authorization", b"Bearer " + KEY.encode())),
        ("openai", [], (b"authorization", b"Bearer " + KEY.encode())),
        ("openai", [OLD], (b"authorization", b"Bearer " + KEY.encode())),
    ],
)
def test_the_configured_key_replaces_whatever_the_client_brought(
    kind: str, version: list[Field], brought: list[Field], expected: Field
) -> None:
    """In the field that the client's version of the API has for it (wire.md A1)."""
    assert kind in ("anthropic", "openai")
    found = to_upstream([*version, *brought], "openai" if kind == "openai" else "anthropic", KEY)
    assert credentials(found.fields) == [expected]
    assert (found.credential_kind, found.credential_hint, found.secrets) == ("centralized", "...0001", (KEY,))


@pytest.mark.parametrize(
    ("fields", "sent"),
    [
        ([BEARER], BEARER),
        ([API_KEY], API_KEY),
        ([AZURE], AZURE),
        # never as another one: a bearer token need not be an API key, nor the other way round
        ([NEW, API_KEY], API_KEY),
        ([OLD, BEARER], BEARER),
        # Claude Code's key helper sends both
        ([BEARER, API_KEY], API_KEY),
        ([OLD, BEARER, API_KEY], API_KEY),
        ([NEW, BEARER, API_KEY], BEARER),
        ([NEW, API_KEY, BEARER], BEARER),
        # twice the same field (failures.md 12)
        ([API_KEY, (b"x-api-key", b"another")], API_KEY),
        # an empty one is none
        ([(b"x-api-key", b""), BEARER], BEARER),
        ([(b"x-api-key", b" \t"), (b"authorization", b"")], None),
        ([], None),
        # one that the client declared meant for this hop only
        ([(b"connection", b"x-api-key"), API_KEY], None),
    ],
)
def test_without_a_configured_key_one_credential_of_the_clients_passes(fields: list[Field], sent: Field | None) -> None:
    found = to_upstream(fields, "anthropic", None)
    assert credentials(found.fields) == ([] if sent is None else [sent])
    expected: CredentialKind | None = None if sent is None else "byok"
    assert found.credential_kind == expected
    assert (found.credential_hint is None) == (sent is None)


def test_for_openai_the_bearer_token_is_the_one() -> None:
    assert credentials(to_upstream([API_KEY, BEARER], "openai", None).fields) == [BEARER]


def test_every_credential_that_was_brought_is_a_secret() -> None:
    """Also the one that is not sent: it is as easily quoted in an error."""
    found = to_upstream([BEARER, API_KEY], "anthropic", None)
    assert set(found.secrets) == {"sk-client-bearer-00000001", "sk-client-api-key-0000002"}


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        (b"sk-ant-0123456789abcdef", "...cdef"),
        (b"Bearer sk-ant-0123456789abcdef", "...cdef"),
        (b"bearer   sk-ant-0123456789abcdef  ", "...cdef"),
        (b"0123456789abcdef", "...cdef"),
    ],
)
def test_the_hint_is_the_end_of_a_credential(value: bytes, hint: str) -> None:
    assert to_upstream([(b"authorization", value)], "anthropic", None).credential_hint == hint


@pytest.mark.parametrize("value", [b"Bearer hunter2", b"hunter2", b"Bearer", b"\xa0", b"Bearer \xe9", b"\x85\x1c x"])
def test_of_a_short_credential_nothing_is_told(value: bytes) -> None:
    """Not a digest either, which would confirm a guess."""
    assert to_upstream([(b"authorization", value)], "anthropic", None).credential_hint == "..."


@given(st.binary(min_size=1, max_size=60))
def test_a_hint_gives_little_away_of_anything(value: bytes) -> None:
    found = to_upstream([(b"x-api-key", value)], "anthropic", None)
    if found.credential_hint is not None:
        (secret,) = found.secrets
        shown = found.credential_hint.removeprefix("...")
        assert not shown or (len(shown) == 4 and len(secret) >= 16)


# --- what passes ------------------------------------------------------------------------------------------------------

PASSED = [
    (b"anthropic-version", b"2023-06-01"),
    (b"anthropic-beta", b"a-2025-01-01,b, c"),
    (b"anthropic-beta", b"d"),
    (b"anthropic-dangerous-direct-browser-access", b"true"),
    (b"anthropic-workspace-id", b"w"),
    (b"openai-organization", b"o"),
    (b"openai-project", b"p"),
    (b"openai-beta", b"responses_websockets=2026-02-06"),
    (b"x-codex-turn-metadata", b'{"turn_id":"t"}'),
    (b"x-codex-turn-state", b"s"),
    (b"x-claude-code-session-id", b"s"),
    (b"x-stainless-retry-count", b"0"),
    (b"x-app", b"cli"),
    (b"user-agent", b"claude-cli/2.1.330 (external, cli)"),
    (b"accept", b"application/json"),
    (b"accept-encoding", b"gzip, deflate, br, zstd"),
    (b"content-type", b"application/json"),
    (b"content-encoding", b"zstd"),
    (b"x-unknown", b"caf\xe9 \xff"),
    (b"x-unknown", b""),
    (b"idempotency-key", b"i"),
]


def test_everything_else_passes_in_its_order() -> None:
    assert to_upstream(PASSED, "anthropic", None).fields == PASSED
    assert to_upstream(PASSED, "openai", None).fields == PASSED
    assert to_client(PASSED) == PASSED


@pytest.mark.parametrize("name", HOP_BY_HOP)
def test_hop_by_hop_fields_stop_here(name: bytes) -> None:
    fields = [(b"a", b"1"), (name, b"x"), (b"b", b"2")]
    assert to_upstream(fields, "anthropic", None).fields == [(b"a", b"1"), (b"b", b"2")]
    assert to_client(fields) == [(b"a", b"1"), (b"b", b"2")]


@pytest.mark.parametrize("name", [b"host", b"content-length", b"expect", b"cookie", b"http2-settings"])
def test_what_is_between_the_client_and_us_stops_here(name: bytes) -> None:
    assert to_upstream([(name, b"x")], "anthropic", None).fields == []


def test_fields_that_connection_names_stop_here() -> None:
    fields = [(b"x-a", b"1"), (b"connection", b"close, X-A ,x-b"), (b"x-b", b"2"), (b"connection", b"x-c"), (b"x-c", b"3")]
    assert to_upstream([*fields, (b"x-d", b"4")], "anthropic", None).fields == [(b"x-d", b"4")]
    assert to_client([*fields, (b"x-d", b"4")]) == [(b"x-d", b"4")]


def test_what_the_provider_says_goes_to_the_client() -> None:
    """Its length, coding and cookies, too: the body is its own (wire.md A1)."""
    fields = [
        (b"content-length", b"10"),
        (b"content-encoding", b"br"),
        (b"set-cookie", b"a=1"),
        (b"set-cookie", b"b=2"),
        (b"request-id", b"r"),
        (b"retry-after", b"7"),
        (b"anthropic-ratelimit-requests-remaining", b"0"),
        (b"x-ratelimit-reset-tokens", b"1s"),
        (b"x-should-retry", b"true"),
    ]
    assert to_client(fields) == fields


def test_without() -> None:
    assert without([(b"a", b"1"), (b"b", b"2"), (b"a", b"3")], b"a") == [(b"b", b"2")]


NAMES = st.sampled_from([b"connection", b"x-api-key", b"authorization", b"api-key", b"anthropic-version", b"te", b"x"])


@given(st.lists(st.tuples(NAMES, st.binary(max_size=30))), st.none() | st.just(KEY))
def test_never_more_than_one_credential(fields: list[Field], api_key: str | None) -> None:
    found = to_upstream(fields, "anthropic", api_key)
    assert len(credentials(found.fields)) <= 1
    if api_key is not None:
        assert all(KEY.encode() in value for _, value in credentials(found.fields))
