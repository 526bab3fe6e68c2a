"""What the server listens on. Truth: RFC 5737 for addresses that are nobody's; that nothing else answers is our promise."""

import asyncio
import socket

import pytest

from aibridge.asgi import Receive, Scope, Send
from aibridge.httpprotocol import HttpProtocol, Serving
from aibridge.httpserver import bound, listen
from aibridge.process import CannotStart, _listen
from tests.support.provider import WAIT_SECONDS


def addresses(monkeypatch: pytest.MonkeyPatch, *found: tuple[int, str]) -> None:
    """Have a host name mean these addresses."""
    answer = [(family, socket.SOCK_STREAM, 0, "", (address, 0)) for family, address in found]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: answer)


def test_an_address_that_the_machine_does_not_have_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    addresses(monkeypatch, (socket.AF_INET, "203.0.113.1"), (socket.AF_INET, "127.0.0.1"))  # RFC 5737: nobody's
    (listener,) = bound("name", 0)
    with listener:
        assert listener.getsockname()[0] == "127.0.0.1"


def test_an_address_that_is_taken_is_not_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients that try it first would talk to somebody else."""
    addresses(monkeypatch, (socket.AF_INET, "127.0.0.1"), (socket.AF_INET, "127.0.0.2"))
    with socket.create_server(("127.0.0.2", 0)) as taken, pytest.raises(OSError, match="in use"):
        bound("name", taken.getsockname()[1])


def test_a_host_without_addresses_that_can_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    addresses(monkeypatch, (socket.AF_INET, "203.0.113.1"))
    with pytest.raises(OSError, match="address"):
        bound("name", 0)


def test_somebody_else_is_faster_to_listen() -> None:
    """Both have bound the address, which SO_REUSEADDR allows for as long as nobody listens (socket(7))."""
    (ours,) = bound("127.0.0.1", 0)
    (theirs,) = bound(*ours.getsockname())
    with ours, theirs:
        listen([theirs])
        with pytest.raises(CannotStart, match=r"cannot listen on http://127\.0\.0\.1:\d+: .*in use"):
            _listen([ours])


async def nothing(scope: Scope, receive: Receive, send: Send) -> None:
    raise AssertionError("nobody asked")


async def test_who_connects_while_the_server_stops_does_not_hold_it_up() -> None:
    serving = Serving(nothing, 1000, 75.0, 60.0, 300.0, lambda _: "openai", stopping=True)
    (listener,) = bound("127.0.0.1", 0)
    server = await asyncio.get_running_loop().create_server(lambda: HttpProtocol(serving), sock=listener)
    async with asyncio.timeout(WAIT_SECONDS):
        reader, writer = await asyncio.open_connection(*listener.getsockname())
        assert await reader.read() == b""
    writer.close()
    server.close()
