"""Credentials are found, and masked byte for byte.

Truth: design.md section 3 (no secret in a dump); which names mean a credential is our choice, from what the vendors' SDKs
and the gateways before them send.
"""

import json
from collections.abc import Sequence
from itertools import pairwise
from urllib.parse import quote

import pytest
from hypothesis import given, strategies as st

from aibridge.masking import Mask, MaskedStream, _occurrences, hidden, is_credential, masked_fields, masked_request
from tests.support.provider import at_random, bytewise

KEY = 'sk-ant-api03-"Qm/9+x_Z=='
HIDDEN = b"*" * len(KEY)


# ---- by their names ----


@pytest.mark.parametrize(
    "name",
    [
        "authorization",
        "Authorization",
        "x-api-key",
        "api-key",
        "X-Goog-Api-Key",
        "ocp-apim-subscription-key",
        "cookie",
        "set-cookie",
        "proxy-authorization",
        "proxy-authenticate",
        "x-amz-security-token",
        "cf-access-client-secret",
        "cf-access-jwt-assertion",
        "helicone-auth",
        "key",
        "api_key",
        "access_token",
        "sig",
        "password",
    ],
)
def test_what_holds_a_credential(name: str) -> None:
    assert is_credential(name.encode())


@pytest.mark.parametrize(
    "name",
    [
        "anthropic-version",
        "anthropic-ratelimit-input-tokens-remaining",
        "x-ratelimit-remaining-tokens",
        "idempotency-key",
        "openai-organization",
        "x-session-id",
        "x-author",
        "authority",
        "beta",
        "max_tokens",
        "monkey",
    ],
)
def test_what_holds_none(name: str) -> None:
    assert not is_credential(name.encode())


def test_a_request() -> None:
    fields = [
        (b"x-api-key", b"abc"),
        (b"authorization", b"Bearer " + KEY.encode()),
        (b"x-copy", b"<" + KEY.encode() + b">"),
        (b"cookie", b"a=1; b=2"),
        (b"x-api-key", b""),
        (b"accept", b"*/*"),
    ]
    masked = masked_request("http://h/v1?beta=true&api%2Dkey=%41bcdefgh&x", fields, ("another-one",))
    assert masked.url == "http://h/v1?beta=true&api%2Dkey=**********&x"
    assert masked.headers == [
        (b"x-api-key", b"***"),
        (b"authorization", b"Bearer " + HIDDEN),
        (b"x-copy", b"<" + HIDDEN + b">"),
        (b"cookie", b"********"),
        (b"x-api-key", b""),
        (b"accept", b"*/*"),
    ]
    assert masked.names == ("?api%2Dkey", "x-api-key", "authorization", "x-copy", "cookie")
    assert set(masked.secrets) == {"another-one", "%41bcdefgh", "Abcdefgh", KEY}  # as written, and as meant


def test_a_secret_in_the_path() -> None:
    assert masked_request(f"http://h/{KEY}/v1", [], (KEY,)).url == f"http://h/{HIDDEN.decode()}/v1"


def test_of_a_proxy_authorization_the_scheme_stays() -> None:
    fields = masked_fields([(b"proxy-authorization", b"Basic dTpw"), (b"set-cookie", b"a b")], Mask(()))
    assert fields == [(b"proxy-authorization", b"Basic ****"), (b"set-cookie", b"***")]


# ---- wherever they are quoted ----


QUOTED = [
    KEY,
    json.dumps(KEY),
    json.dumps(KEY).replace("/", "\\/"),  # as PHP writes it
    json.dumps(json.dumps(KEY)),
    json.dumps(json.dumps(KEY)).replace("/", "\\/"),
    json.dumps(json.dumps(KEY).replace("/", "\\/")).replace("/", "\\/"),
    f"https://h/?a={quote(KEY, safe='')}&b",
]


@pytest.mark.parametrize("quoted", QUOTED)
def test_a_quoted_credential(quoted: str) -> None:
    data = f"before {quoted} after".encode()
    masked = Mask([KEY])(data)
    assert b"sk" not in masked and b"Qm" not in masked and b"Z" not in masked and len(masked) == len(data)
    assert masked.startswith(b"before ") and masked.endswith(b" after")


@pytest.mark.parametrize("quoted", QUOTED)
def test_a_quoted_credential_in_a_text(quoted: str) -> None:
    shown = hidden(f"before {quoted} after", ["", KEY], "[credential]")
    assert shown.startswith("before ") and shown.count("[credential]") == 1 and shown.endswith(" after")
    assert "sk" not in shown and "Qm" not in shown and "Z" not in shown


def test_what_stands_in_place_of_a_credential_is_not_looked_into() -> None:
    assert hidden("a credential, *** too", ["credential", "***"], "[credential]") == "a [credential], [credential] too"


def test_of_credentials_that_overlap_nothing_is_left_in_a_text() -> None:
    assert hidden(".abcdefghijkl.", ["abcdefgh", "efghijkl"], "*") == ".*."
    assert hidden("bad key sk-abcdefgh-TAIL", ["sk-abcdefgh", "sk-abcdefgh-TAIL"], "*") == "bad key *"


def test_a_text_of_one_letter_is_searched_in_steps() -> None:
    """Clients choose the credential, and the text that is quoted: each of its letters may begin an occurrence."""
    steps = list(_occurrences(b"a" * 100_000, [b"a" * 1000]))
    assert len(steps) <= 2 * 100 + 1
    assert min(steps)[0] == 0 and max(steps)[1] == 100_000
    assert all(following <= end for (_, end), (following, _) in pairwise(sorted(steps)))


def test_what_is_no_unicode_is_no_reason_to_fail() -> None:
    """Standard error of a command may be anything, and so may a variable of the environment."""
    assert hidden("a \ud800 b", ["a secret"], "*") == "a \ud800 b"
    assert hidden("a secret \ud800", ["a secret", "\udcff"], "*").startswith("* ")


@pytest.mark.parametrize("secrets", [[f"{number:08}" for number in range(4000)], ["x" * 300_000]], ids=["many", "long"])
def test_of_what_has_too_many_credentials_to_look_for_nothing_is_shown(secrets: list[str]) -> None:
    """Clients decide how many there are: they must not decide what it costs to look for them."""
    mask = Mask(secrets)
    assert (
        mask(b"whatever") == b"********" and mask.text("whatever") == "********" and mask.begun_at_end_of(b"whatever") == 0
    )
    stream = MaskedStream(mask)
    assert stream.feed(b"what") + stream.feed(b"ever") + stream.end(broken=True) == b"********" and stream.hit
    assert hidden("whatever", secrets, "[credential]") == "[credential]"


def test_as_many_credentials_as_anybody_has_are_looked_for() -> None:
    secrets = [f"credential-{number:03}" for number in range(100)]
    assert Mask(secrets)(b"a " + secrets[-1].encode()) == b"a " + b"*" * 14
    assert hidden(f"a {secrets[-1]}", secrets, "*") == "a *"


def test_beyond_ascii() -> None:
    """Header values are bytes, which the gateway takes for latin-1; a configured key is written as UTF-8."""
    for encoding in ("latin-1", "utf-8"):
        assert Mask(["clé-très-secrète"])("clé-très-secrète".encode(encoding)).strip(b"*") == b""


def test_placeholders_are_no_credentials() -> None:
    # "none" or "dummy" is what people give a local server that wants a key: hiding it would spoil every text.
    assert Mask(["none", "1234567"])(b"none 1234567") == b"none 1234567"


def test_overlapping_credentials_are_all_masked() -> None:
    assert Mask(["abcdefgh", "efghijkl"])(b".abcdefghijkl.") == b".************."
    assert Mask(["ababababab"])(b"-ababababababab-") == b"-**************-"


# ---- in pieces ----

SECRETS = st.lists(st.text("ab-", min_size=8, max_size=12), min_size=1, max_size=3, unique=True)


def expected(data: bytes, secrets: Sequence[str]) -> bytes:
    """Every byte that stands in an occurrence of a secret is masked, and no other: written to be obvious."""
    hidden: set[int] = set()
    for at in range(len(data)):
        for secret in secrets:
            if data[at:].startswith(secret.encode()):
                hidden |= set(range(at, at + len(secret)))
    return bytes(ord("*") if at in hidden else byte for at, byte in enumerate(data))


@st.composite
def traffic(draw: st.DrawFn) -> tuple[list[str], list[bytes]]:
    """Secrets, and pieces of a body that holds some of them, wherever they may be split."""
    secrets = draw(SECRETS)
    parts = draw(st.lists(st.one_of(st.sampled_from(secrets), st.text("ab-c", max_size=9)), max_size=8))
    body = "".join(parts).encode()
    edges = sorted({0, len(body), *draw(st.lists(st.integers(0, len(body)), max_size=12))})
    return secrets, [body[start:end] for start, end in pairwise(edges)]


@given(traffic())
def test_whatever_the_pieces(given_traffic: tuple[list[str], list[bytes]]) -> None:
    secrets, pieces = given_traffic
    body = b"".join(pieces)
    stream = MaskedStream(Mask(secrets))
    masked = b"".join(stream.feed(piece) for piece in pieces) + stream.end()
    assert masked == expected(body, secrets)
    assert not any(secret.encode() in masked for secret in secrets)
    assert stream.hit == (masked != body)


@given(traffic(), st.data())
def test_what_breaks_off_does_not_end_in_most_of_a_credential(
    given_traffic: tuple[list[str], list[bytes]], data: st.DataObject
) -> None:
    secrets, pieces = given_traffic
    begun = data.draw(st.sampled_from(secrets))[: data.draw(st.integers(0, 12))].encode()
    stream = MaskedStream(Mask(secrets))
    masked = b"".join(stream.feed(piece) for piece in [*pieces, begun]) + stream.end(broken=True)
    assert len(masked) == len(b"".join(pieces) + begun)
    for secret in secrets:
        assert secret.encode() not in masked
        assert not any(masked.endswith(secret[:length].encode()) for length in range(8, len(secret)))


BODY = b"x" * 300 + KEY.encode() + b"y" * 300


@pytest.mark.parametrize("pieces", [bytewise(BODY), at_random(BODY, 1), [BODY]], ids=["bytes", "pieces", "whole"])
def test_what_is_settled_is_given_away_at_once(pieces: list[bytes]) -> None:
    """Who looks at a dump of a stream that hangs sees all but the last few bytes."""
    stream = MaskedStream(Mask([KEY]))
    shown = b"".join(map(stream.feed, pieces))
    assert shown == (b"x" * 300 + HIDDEN + b"y" * 300)[: len(shown)]
    assert len(shown) > len(BODY) - 3 * len(KEY)  # encoded it would be longer


def test_without_secrets_nothing_is_kept_back() -> None:
    stream = MaskedStream(Mask([]))
    assert stream.feed(b"abc") == b"abc" and stream.end(broken=True) == b"" and not stream.hit
