"""Web pages stay away from a server on loopback.

Truth: Fetch Metadata Request Headers (W3C) for Sec-Fetch-Site, RFC 6454 for Origin, RFC 9110 section 7.2 for Host. What is
refused is the product's promise: a web page must not be able to spend the local user's key.
"""

import pytest

from aibridge.errors import Forbidden
from aibridge.guard import LoopbackGuard

GUARD = LoopbackGuard(["127.0.0.1"])


def check(*fields: tuple[bytes, bytes], guard: LoopbackGuard = GUARD) -> bool:
    """Whether a request with these fields may come in."""
    try:
        guard.check(fields)
    except Forbidden:
        return False
    return True


@pytest.mark.parametrize(
    "host",
    [b"127.0.0.1", b"127.0.0.1:8080", b"localhost", b"LocalHost:1", b"[::1]", b"[::1]:8080", b"localhost:", b" localhost "],
)
def test_programs_on_this_machine(host: bytes) -> None:
    assert check((b"host", host), (b"authorization", b"Bearer x"))


@pytest.mark.parametrize(
    "host",
    [
        b"evil.example",
        b"evil.example:8080",  # DNS rebinding: its name resolves to 127.0.0.1 by now
        b"localhost.evil.example",
        b"127.0.0.1.evil.example",
        b"127.0.0.2",
        b"0.0.0.0:8080",
        b"192.168.1.7",
        b"[::2]",
        b"[::ffff:127.0.0.1]",
        b"",
        b":8080",
        b"[::1",
        b"::1",
        b"[localhost]",
        b"localhost:x",
        b"evil.example@localhost",
        b"localhost@evil.example",
        b"localhost/evil.example",
        b"localhost#evil.example",
        b"localhost,evil.example",
        b"localhost evil.example",
        b"localhost\x00",
        b"\xff",
    ],
)
def test_a_foreign_host(host: bytes) -> None:
    assert not check((b"host", host))


def test_exactly_one_host() -> None:
    assert not check()
    assert not check((b"host", b"localhost"), (b"host", b"localhost"))
    assert not check((b"host", b"localhost"), (b"host", b"evil.example"))


@pytest.mark.parametrize("site", [b"cross-site", b"same-site", b"CROSS-SITE", b"", b"odd"])
def test_a_page_of_another_site(site: bytes) -> None:
    """ "same-site" too: that is whatever else runs on this machine, on another port."""
    assert not check((b"host", b"localhost:8080"), (b"sec-fetch-site", site))


@pytest.mark.parametrize("site", [b"same-origin", b"none", b"None"])
def test_a_page_of_our_own_and_the_address_bar(site: bytes) -> None:
    assert check((b"host", b"localhost:8080"), (b"sec-fetch-site", site))


@pytest.mark.parametrize(
    "origin",
    [
        b"https://evil.example",
        b"null",  # a sandboxed frame, a file, a redirect
        b"http://localhost",
        b"http://localhost:8081",
        b"http://127.0.0.1:8080",
        b"http://localhost:8080.evil.example",
        b"localhost:8080",
        b"file://",
        b"chrome-extension://abcdef",
        b"",
    ],
)
def test_a_foreign_origin(origin: bytes) -> None:
    assert not check((b"host", b"localhost:8080"), (b"origin", origin))
    assert not check((b"host", b"localhost:8080"), (b"origin", origin), (b"sec-fetch-site", b"same-origin"))
    assert not check((b"host", b"localhost:8080"), (b"origin", b"http://localhost:8080"), (b"origin", origin))


@pytest.mark.parametrize(
    ("host", "origin"),
    [
        (b"localhost:8080", b"http://localhost:8080"),
        (b"localhost:8080", b"HTTP://LOCALHOST:8080"),
        (b"[::1]:8080", b"http://[::1]:8080"),
        (b"127.0.0.1", b"https://127.0.0.1"),
    ],
)
def test_our_own_origin(host: bytes, origin: bytes) -> None:
    assert check((b"host", host), (b"origin", origin), (b"sec-fetch-site", b"same-origin"))


def test_names_that_are_allowed_beside() -> None:
    guard = LoopbackGuard(["127.0.0.2", "Gateway.internal"])
    for host in (b"127.0.0.2:8080", b"gateway.internal", b"GATEWAY.internal:443", b"localhost"):
        assert check((b"host", host), guard=guard)
    assert check((b"host", b"gateway.internal"), (b"origin", b"https://gateway.internal"), guard=guard)
    assert not check((b"host", b"gateway.internal"), (b"origin", b"https://evil.example"), guard=guard)
    assert not check((b"host", b"x.gateway.internal"), guard=guard)
