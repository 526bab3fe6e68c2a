"""Row 11 of failures.md: an agent's request is large. 32 MB by default, configurable; above it 413 in the provider's shape.

Truth: the row; wire.md A10 for the shape (``request_too_large``); clients.md 4 (Claude Code reads the 413).
"""

import json
from collections.abc import Iterator

import pytest

from tests.support.gateway import Scene, Stage, staged
from tests.support.provider import Reply
from tests.support.rawclient import Answer

DEFAULT_LIMIT = 32 * 1024 * 1024
SMALL_LIMIT = 5000

ROUTES = ["/anthropic/v1/messages", "/openai/v1/chat/completions", "/openai/v1/responses"]
PASSED = ["/anthropic/v1/messages/count_tokens", "/openai/v1/conversations"]


def sized(size: int) -> bytes:
    """A request of exactly that many bytes."""
    empty = b'{"model":"m-large","x":""}'
    return empty[:-2] + b"y" * (size - len(empty)) + empty[-2:]


def check_refused(answer: Answer, route: str) -> None:
    assert answer.head.status == 413
    body = json.loads(answer.body)
    if "anthropic" in route:
        assert (body["type"], body["error"]["type"]) == ("error", "request_too_large")
    else:
        assert body["error"]["type"] == "invalid_request_error"
    assert body["error"]["message"]


# From one TCP segment to many reads of the server's buffer, and to both sides of it.
SIZES = [1, 60, 130, 200, 256, 300, 385, 400, 500, 512, 640, 700, 1000, 1024, 1500, 2000, 5000]


@pytest.mark.parametrize("kilobytes", SIZES)
async def test_an_ordinary_agents_request_passes(kilobytes: int, scene: Scene) -> None:
    """Of any size, on a connection that is used again: its size says nothing about its head's."""
    body = sized(kilobytes * 1024)
    scene.handler = lambda _: Reply.json(b"{}")
    async with scene.client() as client:
        for _ in range(3):
            answer = await client.request("POST", ROUTES[0], scene.lines(), body)
            assert (answer.head.status, answer.body) == (200, b"{}")
    assert [received.body == body for received in scene.requests] == [True] * 3


@pytest.mark.parametrize("route", [ROUTES[0], PASSED[0]])
async def test_the_default_limit_itself_passes(route: str, scene: Scene) -> None:
    body = sized(DEFAULT_LIMIT)
    scene.reply(Reply.json(b"{}"))
    answer = await scene.post(route, body)
    assert answer.head.status == 200
    assert scene.requests[0].body == body


@pytest.mark.parametrize("route", [*ROUTES, *PASSED])
async def test_a_larger_one_is_refused_before_it_is_sent(route: str, scene: Scene) -> None:
    """Its declared length is enough."""
    async with scene.client() as client:
        await client.send("POST", route, scene.lines(("Content-Length", str(DEFAULT_LIMIT + 1))))
        check_refused(await client.answer(), route)
    assert scene.requests == []
    assert scene.ledger().interceptions == []


@pytest.fixture(scope="module")
def small() -> Iterator[Stage]:
    """A gateway with a limit of its own."""
    with staged(toml=f"[limits]\nmax_body_bytes = {SMALL_LIMIT}\n") as stage:
        yield stage


@pytest.mark.parametrize("route", [*ROUTES, *PASSED])
async def test_a_configured_limit(route: str, small: Stage) -> None:
    with small.scene() as scene:
        scene.reply(Reply.json(b"{}"))
        assert (await scene.post(route, sized(SMALL_LIMIT))).head.status == 200
        check_refused(await scene.post(route, sized(SMALL_LIMIT + 1)), route)
        assert len(scene.requests) == 1


@pytest.mark.parametrize("route", ROUTES)
async def test_a_chunked_request_is_counted(route: str, small: Stage) -> None:
    """It declares no length. It is refused when it is over the limit, not when it ends."""
    with small.scene() as scene:
        async with scene.client() as client:
            await client.send("POST", route, scene.lines(("Transfer-Encoding", "chunked")))
            await client.write(b"%x\r\n%b\r\n" % (SMALL_LIMIT, sized(SMALL_LIMIT)))
            await client.write(b"1\r\n!\r\n")
            check_refused(await client.answer(), route)
        assert scene.requests == []
        assert scene.ledger().interceptions == []


@pytest.mark.parametrize("route", PASSED)
async def test_a_chunked_upload_is_counted(route: str, small: Stage) -> None:
    """On a passthrough route it is under way to the provider by then: that never gets the end of it."""
    with small.scene() as scene:
        async with scene.client() as client:
            await client.send("POST", route, scene.lines(("Transfer-Encoding", "chunked")))
            await client.write(b"%x\r\n%b\r\n" % (SMALL_LIMIT, sized(SMALL_LIMIT)))
            await client.write(b"1\r\n!\r\n")
            check_refused(await client.answer(), route)
        assert scene.requests == []
