"""Keeps web pages away from a server on loopback.

Whoever can reach the socket is taken for the local user, and a browser on this machine can: a page could post to
``http://127.0.0.1:8080`` (cross-site request forgery), or make its own host name resolve here and read the answers too
(DNS rebinding). The Host header tells the second, Origin and Sec-Fetch-Site the first (Fetch Metadata, W3C). Programs
send neither of the latter.
"""

import re
from collections.abc import Iterable
from typing import Final

from aibridge.errors import Forbidden
from aibridge.wire.base import Headers

_TELLING: Final = frozenset({b"host", b"origin", b"sec-fetch-site"})
_LOOPBACK: Final = frozenset({"localhost", "127.0.0.1", "::1"})

_HOST: Final = re.compile(r"(?:(?P<name>[a-z0-9._-]+)|\[(?P<address>[0-9a-f:.]+)\])(?::[0-9]*)?")

# From this very server, or typed by the user. "same-site" would be any other port of this machine.
_OWN_FETCHES: Final = frozenset({"same-origin", "none"})


class LoopbackGuard:
    """Checks the headers of requests to a server on loopback. `names` are host names that are served beside loopback's."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = _LOOPBACK | {name.lower() for name in names}

    def check(self, headers: Headers) -> None:
        """Raises `Forbidden` for a request with a foreign Host, or one that a foreign web page has made."""
        telling = [field for field in headers if field[0] in _TELLING]
        hosts = [_decoded(value) for name, value in telling if name == b"host"]
        if len(hosts) != 1 or _host_name(hosts[0]) not in self._names:
            raise Forbidden("The Host header does not name this server.")
        for name, value in telling:
            if name == b"sec-fetch-site" and _decoded(value) not in _OWN_FETCHES:
                raise Forbidden("Web pages of other origins may not use this server.")
            if name == b"origin" and _decoded(value) not in (f"http://{hosts[0]}", f"https://{hosts[0]}"):
                raise Forbidden("Web pages of other origins may not use this server.")


def _decoded(value: bytes) -> str:
    return value.decode("latin-1").strip().lower()


def _host_name(host: str) -> str:
    found = _HOST.fullmatch(host)
    return (found["name"] or found["address"]) if found else ""
