"""Who is behind a request. Truth: design.md section 2 (Identity); who is believed is our choice."""

import getpass
from typing import Any

import pytest

from aibridge.errors import NotAuthenticated
from aibridge.identity import NOBODY, Actor, LocalUser, TrustedProxy, actor_of, as_actor


def scope(*fields: tuple[bytes, bytes], client: Any = ("127.0.0.1", 5)) -> dict[str, Any]:
    return {"type": "http", "headers": list(fields), "client": client}


async def actor(proxy: TrustedProxy, *fields: tuple[bytes, bytes], client: Any = ("127.0.0.1", 5)) -> str | None:
    """Whom the proxy names; None where it is refused, or names nobody."""
    try:
        found = await proxy.authenticate(scope(*fields, client=client))
    except NotAuthenticated:
        return None
    return None if found is None else found.id


def test_an_actor_in_a_scope() -> None:
    before = scope((b"a", b"b"))
    after = as_actor(before, Actor("alice", {"team": "x"}))
    assert actor_of(before) is None and actor_of(after) == Actor("alice", {"team": "x"})
    assert actor_of({"aibridge.actor": "alice"}) is None, "somebody else's idea of an actor"
    with pytest.raises(ValueError, match="id"):
        Actor("")


async def test_the_local_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOGNAME", "alice")
    user = LocalUser()
    found = await user.authenticate(scope((b"x-user", b"mallory"), client=None))
    assert found == Actor("alice") and user.consumes == frozenset()
    assert await LocalUser("bob").authenticate(scope()) == Actor("bob")


@pytest.mark.parametrize("error", [OSError, KeyError])
async def test_a_user_without_a_name(monkeypatch: pytest.MonkeyPatch, error: type[Exception]) -> None:
    def nobody() -> str:
        raise error

    monkeypatch.setattr(getpass, "getuser", nobody)
    assert await LocalUser().authenticate(scope()) == Actor("local")


@pytest.mark.parametrize(
    ("client", "believed"),
    [
        (("127.0.0.1", 5), True),
        (("127.9.9.9", 5), True),
        (("::1", 5), True),
        (("::ffff:127.0.0.1", 5), True),  # how a socket for both families shows IPv4
        (("10.0.0.1", 5), False),
        (("::ffff:10.0.0.1", 5), False),
        (("fe80::1%eth0", 5), False),
        (("testclient", 5), False),
        (("", 0), False),
        (("/run/x.sock", 0), False),
        ((), False),
        (None, False),
    ],
)
async def test_only_trusted_networks_are_believed(client: Any, believed: bool) -> None:
    proxy = TrustedProxy("X-User")
    assert await actor(proxy, (b"x-user", b"alice"), client=client) == ("alice" if believed else None)


@pytest.mark.parametrize(
    ("client", "believed"),
    [("10.1.2.3", True), ("fd00::9", True), ("11.0.0.1", False), ("127.0.0.1", False), ("::1", False)],
)
async def test_networks_of_ones_own(client: str, believed: bool) -> None:
    proxy = TrustedProxy("x-user", ["10.0.0.0/8", "fd00::/8"])
    assert await actor(proxy, (b"x-user", b"alice"), client=(client, 5)) == ("alice" if believed else None)


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ([(b"x-user", b"alice")], "alice"),
        ([(b"x-user", b"  alice@example.com\t")], "alice@example.com"),
        ([(b"x-user", "Zoë".encode())], "Zoë"),
        ([], None),
        ([(b"x-user", b"")], None),
        ([(b"x-user", b"  ")], None),
        ([(b"x-user", b"alice"), (b"x-user", b"mallory")], None),  # which of them has the proxy written?
        ([(b"x-user", b"alice"), (b"x-user", b"alice")], None),
        ([(b"x_user", b"alice")], None),
        ([(b"x-users", b"alice")], None),
    ],
)
async def test_the_header_of_a_trusted_proxy(fields: list[tuple[bytes, bytes]], found: str | None) -> None:
    proxy = TrustedProxy("X-User")
    assert await actor(proxy, *fields) == found
    assert proxy.consumes == {b"x-user"}, "whatever comes of it, it does not go to a provider"


MALLORY = (b"x-user", b"mallory")


@pytest.mark.parametrize(
    ("fields", "client", "why"),
    [
        ([MALLORY], "10.0.0.1", "the header x-user came from a peer that is not a trusted proxy"),
        ([MALLORY, MALLORY], "10.0.0.1", "the header x-user came from a peer that is not a trusted proxy"),
        ([(b"x-user", b" ")], "127.0.0.1", "the header x-user came without a value"),
        ([MALLORY, MALLORY], "127.0.0.1", "the header x-user came more than once"),
    ],
)
async def test_what_is_wrong_with_an_identity(fields: list[tuple[bytes, bytes]], client: str, why: str) -> None:
    """For the log: which condition failed, and never what the header says. A header that is missing says nothing."""
    with pytest.raises(NotAuthenticated) as refused:
        await TrustedProxy("X-User").authenticate(scope(*fields, client=(client, 5)))
    assert (refused.value.message, refused.value.detail) == (NOBODY, why), "the client learns no more"
    assert await TrustedProxy("X-User").authenticate(scope(client=(client, 5))) is None
