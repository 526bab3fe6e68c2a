"""Row 15 of failures.md: a WebSocket upgrade is refused at once, with 426, so that the client falls back to HTTP.

Truth: the row; clients.md 4 (426 makes Codex and Copilot fall back immediately, 404 costs Codex seven attempts, with 400 or
503 it fails); wire.md C6; RFC 6455 4.1 for the handshake, RFC 9110 15.5.22 for the Upgrade field in the answer.
"""

import json

import pytest

from tests.support.gateway import Scene
from tests.support.streams import target
from tests.support.traffic import named

HANDSHAKE = [
    ("Connection", "Upgrade"),
    ("Upgrade", "websocket"),
    ("Sec-WebSocket-Version", "13"),
    ("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ=="),
    ("Sec-WebSocket-Extensions", "permessage-deflate; client_max_window_bits"),
    ("Authorization", "Bearer sk-client"),
    ("OpenAI-Beta", "responses_websockets=2026-02-06"),
    ("originator", "codex_exec"),
]

ROUTES = [
    "/openai/v1/responses",
    "/openai/v1/responses?model=gpt-5.4",
    "/openai/v1/realtime",
    "/anthropic/v1/messages",
    "/x",
]


@pytest.mark.parametrize("route", ROUTES)
async def test_an_upgrade_is_refused_at_once(route: str, scene: Scene) -> None:
    """Whatever the route: nobody is asked, nothing is recorded, and nothing is left hanging."""
    async with scene.client() as client:
        await client.send("GET", route, scene.lines(*HANDSHAKE))
        answer = await client.answer()
    assert (answer.head.status, answer.complete) == (426, True)
    assert answer.head.get("upgrade") is not None
    body = json.loads(answer.body)
    assert body["error"]["message"]
    assert body.get("type") == ("error" if "anthropic" in route else None)
    assert scene.requests == []
    assert scene.ledger().interceptions == []


@pytest.mark.parametrize("connection", ["upgrade", "keep-alive, Upgrade", "Upgrade, HTTP2-Settings"])
@pytest.mark.parametrize("upgrade", ["websocket", "WebSocket", "WEBSOCKET"])
async def test_however_it_is_spelled(connection: str, upgrade: str, scene: Scene) -> None:
    async with scene.client() as client:
        headers = [("Connection", connection), ("Upgrade", upgrade), *HANDSHAKE[2:]]
        answer = await client.request("GET", "/openai/v1/responses", scene.lines(*headers))
    assert answer.head.status == 426


async def test_the_client_falls_back_to_http(scene: Scene) -> None:
    """What Codex does next, on a connection of its own."""
    recording = named("responses-text-stream")
    async with scene.client() as client:
        assert (await client.request("GET", "/openai/v1/responses", scene.lines(*HANDSHAKE))).head.status == 426
    scene.reply(recording.reply())
    answer = await scene.post(target(recording), recording.request)
    assert (answer.body, answer.complete) == (recording.response, True)


async def test_frames_sent_in_advance_are_refused_too(scene: Scene) -> None:
    """RFC 6455 4.1 has a client wait for the answer. One that does not is not left hanging either."""
    masked = bytes(a ^ b for a, b in zip(b"hello", b"\x01\x02\x03\x04\x01", strict=True))
    async with scene.client() as client:
        await client.send("GET", "/openai/v1/responses", scene.lines(*HANDSHAKE))
        await client.write(b"\x81\x85\x01\x02\x03\x04" + masked)
        answer = await client.answer()
    assert answer.head.status in (400, 426)
    assert answer.complete
    assert scene.requests == []
