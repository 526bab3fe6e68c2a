"""What the relay does when something else does what it should not.

Truth: design.md section 2 (every interception that was started is ended, whatever happens) and the ASGI specification, by
which a server may raise OSError from `send` once the client has gone (HTTP, version 2.4).
"""

import asyncio
from collections.abc import Callable, MutableMapping
from typing import Any

import pytest

from aibridge import Actor, MemoryRecorder, Provider, RequestBridge, as_actor
from aibridge.upstream import MemoryResponse, MemoryUpstream, UpstreamRequest, UpstreamResponse
from aibridge.wire.observer import ResponseHead

BODY = b'{"model":"m","messages":[{"role":"user","content":"hi"}]}'
ANSWER = b'{"id":"msg_1","type":"message","content":[],"usage":{"input_tokens":1,"output_tokens":2}}'
SECONDS = 10

Send = Callable[[MutableMapping[str, Any]], Any]


def answer(_: UpstreamRequest) -> UpstreamResponse:
    return MemoryResponse(ResponseHead(200, [(b"content-type", b"application/json")]), [ANSWER])


class Stage:
    """A bridge in memory, and one request of a client that stays until the end."""

    def __init__(self, answer: Callable[[UpstreamRequest], UpstreamResponse] = answer) -> None:
        self.recorder = MemoryRecorder()
        self.upstream = MemoryUpstream(answer)
        self.bridge = RequestBridge([Provider.anthropic(), Provider.openai()], self.recorder, upstream=self.upstream)
        self.sent: list[MutableMapping[str, Any]] = []

    async def ask(
        self,
        path: str = "/anthropic/v1/messages",
        *,
        send: Send | None = None,
        method: str = "POST",
        headers: list[tuple[bytes, bytes]] | None = None,
        body: bytes = BODY,
    ) -> None:
        messages = [{"type": "http.request", "body": body, "more_body": False}]
        scope = {"type": "http", "method": method, "path": path, "headers": headers or [], "query_string": b""}

        async def receive() -> MutableMapping[str, Any]:
            if not messages:
                await asyncio.Event().wait()
            return messages.pop()

        async def keep(message: MutableMapping[str, Any]) -> None:
            self.sent.append(message)

        async with asyncio.timeout(SECONDS):
            await self.bridge(as_actor(scope, Actor("ada")), receive, send or keep)

    @property
    def status(self) -> str:
        """How the one interception ended."""
        (begun,) = self.recorder.interceptions
        (ended,) = self.recorder.ended
        assert ended.interception_id == begun.id
        assert len(self.recorder.token_usages) == 1
        return ended.status


@pytest.mark.parametrize("fails_at", ["http.response.start", "http.response.body"])
async def test_a_server_that_raises_when_the_client_has_gone(fails_at: str) -> None:
    stage = Stage()

    async def send(message: MutableMapping[str, Any]) -> None:
        if message["type"] == fails_at:
            raise BrokenPipeError

    await stage.ask(send=send)
    assert stage.status == "client_disconnected"


async def test_a_client_that_has_gone_when_it_is_refused() -> None:
    async def send(message: MutableMapping[str, Any]) -> None:
        raise BrokenPipeError(message["type"])

    await Stage().ask(send=send, body=b"[]")


async def test_a_task_that_is_cancelled_while_the_response_begins() -> None:
    stage = Stage()
    begun, never = asyncio.Event(), asyncio.Event()

    async def send(message: MutableMapping[str, Any]) -> None:
        begun.set()
        await never.wait()

    task = asyncio.create_task(stage.ask(send=send))
    async with asyncio.timeout(SECONDS):
        await begun.wait()
        task.cancel()
        await asyncio.sleep(0)
        never.set()
        await asyncio.wait([task])
    assert stage.status == "interrupted"


async def test_an_upstream_that_raises_what_it_should_not() -> None:
    def fail(_: UpstreamRequest) -> UpstreamResponse:
        raise ZeroDivisionError

    stage = Stage(fail)
    with pytest.raises(ZeroDivisionError):
        await stage.ask()
    async with asyncio.timeout(SECONDS):
        while not stage.recorder.ended:  # nobody waits for it
            await asyncio.sleep(0)
    assert stage.status == "failed"


@pytest.mark.parametrize("status", [204, 304])
async def test_a_length_without_a_body(status: int) -> None:
    """Of a 304 it is the length of the body that the client has (RFC 9110 section 8.6); servers would wait for it."""
    stage = Stage(lambda _: MemoryResponse(ResponseHead(status, [(b"content-length", b"5"), (b"etag", b"x")])))
    await stage.ask("/openai/v1/models", method="GET", body=b"")
    assert stage.sent[0]["status"] == status
    assert stage.sent[0]["headers"] == [(b"etag", b"x")]


async def test_a_declared_length_beyond_all_bounds() -> None:
    stage = Stage()
    await stage.ask(headers=[(b"content-length", b"9" * 5000)])
    assert stage.sent[0]["status"] == 413
    assert stage.recorder.interceptions == []


async def test_what_is_sent_is_what_the_conversation_says() -> None:
    """With the usage option spliced in, and without a coding that could not be edited."""
    stage = Stage(lambda _: MemoryResponse(ResponseHead(200, [(b"content-type", b"text/event-stream")])))
    body = b'{"stream":true}'
    await stage.ask("/openai/v1/chat/completions", headers=[(b"accept-encoding", b"br")], body=body)
    (sent,) = stage.upstream.requests
    assert sent.body == b'{"stream":true,"stream_options":{"include_usage":true}}'
    assert sent.headers == [(b"accept-encoding", b"identity")]
    assert sent.url == "https://api.openai.com/v1/chat/completions"
