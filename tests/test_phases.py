"""The time that each phase of a request may take, limits, breakers and retries: the whole server, as it is configured.

Truth: issue 5 ("per-phase timeouts, stream idle timeout; each answers with the right status (429 with `retry-after`, 503,
413, 408, 504) in the provider's error shape").
"""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import pytest

from aibridge import MemoryRecorder
from aibridge.server import Server
from tests.serving import serving, settings
from tests.support.provider import CUT, STALL, WAIT_SECONDS, Gate, Reply, ScriptedProvider, Wait
from tests.support.rawclient import Answer, RawClient

SOON = 0.3
"""A timeout that has to strike: nothing comes before it."""
MESSAGES = "/anthropic/v1/messages"
TYPES = {
    MESSAGES: {408: "invalid_request_error", 429: "rate_limit_error", 503: "api_error", 504: "timeout_error"},
    "/openai/v1/chat/completions": {
        408: "invalid_request_error",
        429: "rate_limit_error",
        503: "server_error",
        504: "server_error",
    },
    "/openai/v1/responses": {
        408: "invalid_request_error",
        429: "rate_limit_error",
        503: "server_error",
        504: "server_error",
    },
}
ROUTES = pytest.mark.parametrize("path", TYPES)
START = b'event: message_start\ndata: {"type":"message_start","message":{"id":"msg_1","usage":{"input_tokens":3}}}\n\n'


class Stage:
    def __init__(self, provider: ScriptedProvider, recorder: MemoryRecorder, url: str) -> None:
        self.provider = provider
        self.recorder = recorder
        self.url = url

    async def ask(self, path: str = MESSAGES, model: str = "m") -> Answer:
        async with RawClient(self.url) as client:
            return await client.request("POST", path, (), json.dumps({"model": model}).encode())

    async def ended(self) -> Any:
        """How the one interception ended."""
        async with asyncio.timeout(WAIT_SECONDS):
            while not self.recorder.ended:
                await asyncio.sleep(0.005)
        (ended,) = self.recorder.ended
        return ended


@asynccontextmanager
async def staged(of_provider: Mapping[str, Any] = {}, **sections: Any) -> AsyncIterator[Stage]:
    async with ScriptedProvider() as provider:
        configuration = settings(
            providers={
                "anthropic": {"base_url": provider.url, **of_provider},
                "openai": {"base_url": provider.url + "/v1", **of_provider},
            },
            **sections,
        )
        recorder = MemoryRecorder()
        server = Server(configuration, recorder=recorder)
        async with serving(server, configuration, server.kind_of) as url:
            yield Stage(provider, recorder, url)


def assert_refused(path: str, answer: Answer, status: int) -> None:
    assert answer.head.status == status and answer.complete
    said = json.loads(answer.body)
    assert said["error"]["type"] == TYPES[path][status]
    assert ("type" in said) == (path == MESSAGES), "the shape"
    retry_after = answer.head.get("retry-after")
    assert (retry_after is not None and int(retry_after) >= 1) == (status in (429, 503))


# ---- times ----


@ROUTES
async def test_a_request_that_does_not_come(path: str) -> None:
    async with staged(server={"request_timeout": SOON}) as stage, RawClient(stage.url) as client:
        await client.write(f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n".encode() + b'{"mo')
        assert_refused(path, await client.answer(), 408)
    assert not stage.recorder.interceptions


async def test_a_connection_without_a_request() -> None:
    async with staged(server={"keep_alive_timeout": SOON}) as stage, RawClient(stage.url) as client:
        assert await client.closed() == b""


@ROUTES
async def test_a_provider_that_does_not_answer(path: str) -> None:
    async with staged(upstream={"first_byte_timeout": SOON}) as stage:
        stage.provider.reply(Reply(before=[STALL]))
        assert_refused(path, await stage.ask(path), 504)
        await (await stage.provider.exchange()).client_gone.wait()
        ended = await stage.ended()
    assert (ended.status, ended.http_status) == ("failed", 504)
    (usage,) = stage.recorder.token_usages
    assert usage.completeness == "partial" and usage.input_tokens is None, "it may have begun, and bill that"


async def test_a_provider_that_cannot_be_connected_to_in_time() -> None:
    """It has not seen the request, so there is nothing to be billed."""
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts nobody, so there is no TLS
        url = f"https://127.0.0.1:{silent.getsockname()[1]}"
        async with staged({"base_url": url}, upstream={"connect_timeout": SOON}) as stage:
            assert_refused(MESSAGES, await stage.ask(), 504)
    assert not stage.recorder.token_usages


async def test_a_provider_that_falls_silent_within_its_answer() -> None:
    async with staged(upstream={"idle_timeout": SOON}) as stage:
        stage.provider.reply(Reply.stream([START, STALL]))
        answer = await stage.ask()
        assert answer.head.status == 200 and answer.body.startswith(START + b"event: error\n")
        assert b"timeout_error" in answer.body
        assert (await stage.ended()).status == "failed"


@pytest.mark.parametrize("on_disconnect", ["cancel", "drain"])
async def test_a_client_that_reads_nothing(on_disconnect: str) -> None:
    ended = Gate()
    piece = b"event: ping\ndata: " + b"x" * 100_000 + b"\n\n"
    async with staged({"on_disconnect": on_disconnect}, server={"write_timeout": SOON}) as stage:
        stage.provider.reply(Reply.stream([START, *[piece] * 300, Wait(ended)]))
        async with RawClient(stage.url) as client:
            client._writer.transport.pause_reading()  # type: ignore[attr-defined]
            body = b'{"model":"m","stream":true}'
            head = f"POST {MESSAGES} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
            await client.write(head.encode() + body)
            exchange = await stage.provider.exchange()
            if on_disconnect == "cancel":
                await exchange.client_gone.wait()
            else:
                ended.set()
                await exchange.finished.wait()
            assert (await stage.ended()).status == "client_disconnected"
            assert not stage.recorder.token_usages or stage.recorder.token_usages[0].input_tokens == 3


# ---- limits, breakers, retries ----


@ROUTES
async def test_limits(path: str) -> None:
    gate = Gate()
    async with staged(limits={"max_concurrent_per_actor": 1}) as stage:
        stage.provider.replies(Reply(before=[Wait(gate)]), Reply())
        first = asyncio.create_task(stage.ask(path))
        await stage.provider.exchange()
        assert_refused(path, await stage.ask(path), 429)
        gate.set()
        assert (await first).head.status == 200
    async with staged(limits={"requests_per_minute": 1}) as stage:
        stage.provider.replies(Reply(), Reply())
        assert (await stage.ask(path)).head.status == 200
        assert_refused(path, await stage.ask(path), 429)
    async with staged(limits={"max_concurrent": 1}) as stage:
        stage.provider.reply(Reply(before=[STALL]))
        first = asyncio.create_task(stage.ask(path))
        await stage.provider.exchange()
        assert_refused(path, await stage.ask(path), 503)
        first.cancel()


@ROUTES
async def test_a_breaker(path: str) -> None:
    async with staged({"breaker": {"enabled": True, "threshold": 2}}) as stage:
        stage.provider.replies(Reply(503), Reply(before=[CUT]), Reply(200))
        assert [(await stage.ask(path)).head.status for _ in range(2)] == [503, 502]
        assert_refused(path, await stage.ask(path), 503)
        assert (await stage.ask(path, "another")).head.status == 200
        assert len(stage.provider.requests) == 3
    assert [(ended.status, ended.http_status) for ended in stage.recorder.ended] == [
        *(("failed", 503), ("failed", 502), ("failed", 503), ("completed", 200))
    ]


async def test_a_retry() -> None:
    async with staged({"retries": {"attempts": 1, "statuses": [529], "max_delay": 0.01}}) as stage:
        stage.provider.replies(Reply(529), Reply.json(b'{"id":"msg_1","usage":{"input_tokens":1,"output_tokens":1}}'))
        assert (await stage.ask()).head.status == 200
        first, second = stage.provider.requests
        assert (first.body, first.headers) == (second.body, second.headers)
    assert len(stage.recorder.interceptions) == len(stage.recorder.token_usages) == 1
