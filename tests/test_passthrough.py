"""Allow-listed routes are reverse-proxied untouched.

Truth: design.md sections 3 and 4 (transparent, one credential, errors unmodified), RFC 9110 section 7.6 for what a proxy
removes. A scripted provider on one side, an ASGI call on the other; what a real server adds is in test_server.py.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from aibridge import MemoryRecorder, Provider, RequestBridge, as_actor
from aibridge.events import CallAnswered, CallBegan, CallEnded, Event, PassedThrough
from aibridge.httpclient import HttpUpstream
from aibridge.limits import Limits
from tests.serving import ALICE, Call, Fields, call, scope, serving, settings
from tests.support.provider import CUT, STALL, Gate, Reply, ScriptedProvider, Wait
from tests.support.rawclient import RawClient

COUNT = "/anthropic/v1/messages/count_tokens"
MODELS = "/openai/v1/models"


class Stage:
    def __init__(self, provider: ScriptedProvider, **options: Any) -> None:
        self.provider = provider
        self.recorder = MemoryRecorder()
        self.events: list[Event] = []
        providers = [
            Provider.anthropic(base_url=provider.url, api_key="central"),
            Provider.openai(base_url=provider.url + "/v1"),
        ]
        self.bridge = RequestBridge(providers, self.recorder, observers=[self.events.append], **options)

    @property
    def answers(self) -> list[PassedThrough]:
        """What is counted."""
        return [event for event in self.events if isinstance(event, PassedThrough)]

    def begin(self, method: str, path: str, headers: Fields = (), *pieces: bytes) -> Call:
        return Call(self.bridge, as_actor(scope(method, path, headers), ALICE), pieces)

    async def call(self, method: str, path: str, headers: Fields = (), *pieces: bytes, query: bytes = b"") -> Call:
        return await call(self.bridge, scope(method, path, headers, query=query), *pieces)


@asynccontextmanager
async def staged(**options: Any) -> AsyncIterator[Stage]:
    async with ScriptedProvider() as provider:
        stage = Stage(provider, **options)
        async with stage.bridge:
            yield stage


@pytest.fixture
async def stage() -> AsyncIterator[Stage]:
    async with staged() as stage:
        yield stage


ROUTES = [
    ("GET", "/anthropic/v1/models", "/v1/models"),
    ("HEAD", "/anthropic/v1/models", "/v1/models"),
    ("GET", "/anthropic/v1/models/claude-x%2D1", "/v1/models/claude-x%2D1"),
    ("POST", "/anthropic/v1/messages/count_tokens", "/v1/messages/count_tokens"),
    ("POST", "/anthropic/api/event_logging/batch", "/api/event_logging/batch"),
    ("GET", "/openai/v1/models", "/v1/models"),
    ("GET", "/openai/v1/models/a:b@c", "/v1/models/a:b@c"),
    ("DELETE", "/openai/v1/responses/resp_1", "/v1/responses/resp_1"),
    ("GET", "/openai/v1/responses/resp_1/input_items", "/v1/responses/resp_1/input_items"),
    ("POST", "/openai/v1/responses/compact", "/v1/responses/compact"),
    ("POST", "/openai/v1/conversations", "/v1/conversations"),
    ("PATCH", "/openai/v1/conversations/c/items/i", "/v1/conversations/c/items/i"),
]


@pytest.mark.parametrize(("method", "path", "target"), ROUTES)
async def test_routes(stage: Stage, method: str, path: str, target: str) -> None:
    stage.provider.reply(Reply(204))
    answer = await stage.call(method, path, query=b"limit=1000&a=%2F&a")
    assert (answer.status, answer.complete) == (204, True)
    (received,) = stage.provider.requests
    assert (received.method, received.target) == (method, f"{target}?limit=1000&a=%2F&a")
    assert not stage.recorder.interceptions


async def test_request_headers(stage: Stage) -> None:
    stage.provider.replies(Reply(204), Reply(204))
    kept = [
        (b"anthropic-version", b"2023-06-01"),
        (b"anthropic-beta", b"a,b"),
        (b"anthropic-beta", b"c"),
        (b"user-agent", b"x/1"),
        (b"accept-encoding", b"gzip, br"),
        (b"x-odd", b"\xc3\xa9"),
    ]
    dropped = [
        (b"authorization", b"Bearer mine"),
        (b"x-api-key", b"mine"),
        (b"cookie", b"session=1"),
        (b"connection", b"keep-alive, x-hop"),
        (b"keep-alive", b"timeout=5"),
        (b"x-hop", b"1"),
        (b"te", b"trailers"),
        (b"proxy-authorization", b"Basic eA=="),
        (b"expect", b"100-continue"),
    ]
    await stage.call("POST", COUNT, [*kept, *dropped, (b"content-length", b"2")], b"{}")
    await stage.call("GET", MODELS, [*kept, *dropped])
    host = (b"Host", f"127.0.0.1:{stage.provider.port}".encode())
    first, second = (list(received.headers) for received in stage.provider.requests)
    assert first == [host, *kept, (b"x-api-key", b"central"), (b"content-length", b"2")]
    assert second == [host, *kept, (b"authorization", b"Bearer mine")]


async def test_the_response_is_relayed(stage: Stage) -> None:
    headers = [
        ("Content-Type", "application/json"),
        ("request-id", "req_1"),
        ("retry-after", "7"),
        ("anthropic-ratelimit-requests-remaining", "0"),
        ("x-twice", "1"),
        ("x-twice", "2"),
        ("x-latin", "\xe9"),
        ("Set-Cookie", "a=b"),
        ("Content-Encoding", "gzip"),
    ]
    hop = [("Connection", "x-hop"), ("Keep-Alive", "timeout=5"), ("x-hop", "1"), ("Proxy-Authenticate", "Basic")]
    stage.provider.reply(Reply(429, [*headers, *hop], [b"\x1f\x8bnot ", b"gzip"], "length"))
    answer = await stage.call("POST", COUNT, [], b"{}")
    assert (answer.status, answer.body, answer.complete) == (429, b"\x1f\x8bnot gzip", True)
    expected = [(name.lower().encode(), value.encode("latin-1")) for name, value in headers]
    assert answer.headers == [*expected, (b"content-length", b"10")]


@pytest.mark.parametrize("status", [301, 307, 308])
async def test_redirects_are_the_clients_business(stage: Stage, status: int) -> None:
    stage.provider.reply(Reply(status, [("Location", "http://127.0.0.1:9/x")]))
    answer = await stage.call("GET", MODELS)
    assert answer.status == status and (b"location", b"http://127.0.0.1:9/x") in answer.headers
    assert len(stage.provider.requests) == 1


async def test_head(stage: Stage) -> None:
    stage.provider.reply(Reply(200, [("Content-Length", "1234")]))
    answer = await stage.call("HEAD", MODELS)
    assert (answer.status, answer.body, answer.complete) == (200, b"", True)
    assert (b"content-length", b"1234") in answer.headers


@pytest.mark.parametrize("size", [0, 1, 70_000, 5_000_000])
@pytest.mark.parametrize("declared", [True, False], ids=["length", "chunked"])
async def test_uploads(stage: Stage, size: int, declared: bool) -> None:
    stage.provider.reply(Reply(204))
    body = bytes(size)
    framing = (b"content-length", b"%d" % size) if declared else (b"transfer-encoding", b"chunked")
    await stage.call("POST", COUNT, [framing], body[: size // 2], body[size // 2 :])
    (received,) = stage.provider.requests
    assert received.body == body
    if declared:
        assert received.header("content-length") == [str(size)] and not received.header("transfer-encoding")
    else:
        assert received.header("transfer-encoding") == ["chunked"] and not received.header("content-length")


async def test_an_upload_is_streamed(stage: Stage) -> None:
    """The provider has the first part while the client still holds the second."""
    first_part_there, answer_seen = Gate(), Gate()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        assert await reader.readexactly(5) == b"first"
        first_part_there.set()
        assert await reader.readexactly(6) == b"second"
        writer.write(b"HTTP/1.1 204 No Content\r\n\r\n")
        await answer_seen.wait()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with RequestBridge([Provider.openai(base_url=url + "/v1")], MemoryRecorder()) as bridge:
            headers = [(b"content-length", b"11")]
            upload = Call(bridge, as_actor(scope("POST", "/openai/v1/conversations", headers), ALICE), [b"", b""])
            upload._messages = asyncio.Queue()
            upload._messages.put_nowait({"type": "http.request", "body": b"first", "more_body": True})
            await first_part_there.wait()
            upload._messages.put_nowait({"type": "http.request", "body": b"second", "more_body": False})
            assert (await upload.over()).status == 204
            answer_seen.set()


async def test_a_response_is_streamed(stage: Stage) -> None:
    gate = Gate()
    stage.provider.reply(Reply.stream([b"data: 1\n\n", Wait(gate), b"data: 2\n\n"]))
    async with serving(identified(stage.bridge), settings()) as url, RawClient(url) as client:
        await client.send("GET", "/openai/v1/responses/resp_1?stream=true")
        assert (await client.head()).status == 200
        assert await client.until() == b"data: 1\n\n"
        gate.set()
        assert await client.rest() == (b"data: 2\n\n", True)


# ---- what goes wrong ----


async def test_nobody_answers() -> None:
    async with ScriptedProvider() as gone:
        pass
    async with RequestBridge([Provider.openai(base_url=gone.url + "/v1")], MemoryRecorder()) as bridge:
        answer = await call(bridge, scope("GET", MODELS))
    assert answer.status == 502 and answer.json()["error"]["type"] == "server_error"


async def test_no_answer_in_time() -> None:
    async with staged(upstream=HttpUpstream(idle_timeout=0.2)) as stage:
        stage.provider.reply(Reply(before=[STALL]))
        answer = await stage.call("POST", COUNT, [], b"{}")
        assert answer.status == 504 and answer.json()["error"]["type"] == "timeout_error"
        assert not stage.answers


@pytest.mark.parametrize("framing", ["length", "chunked"])
async def test_a_cut_response_does_not_look_complete(stage: Stage, framing: Any) -> None:
    stage.provider.replies(*[Reply(body=[b"one", CUT, b"two"], framing=framing)] * 2)
    answer = await stage.call("GET", MODELS)
    assert (answer.status, answer.body, answer.complete) == (200, b"one", False)
    async with serving(identified(stage.bridge), settings()) as url, RawClient(url) as client:
        got = await client.request("GET", MODELS)
        assert (got.body, got.complete) == (b"one", False), "a server makes of that a connection that breaks off"


@pytest.mark.parametrize("body", [b"", b"{}"], ids=["no body", "a body"])
async def test_the_client_leaves_before_the_answer(stage: Stage, body: bytes) -> None:
    stage.provider.reply(Reply(before=[STALL]))
    headers = [(b"content-length", b"2")] if body else []
    leaving = stage.begin("POST" if body else "GET", COUNT if body else MODELS, headers, body)
    exchange = await stage.provider.exchange()
    leaving.leave()
    await leaving.over()
    await exchange.client_gone.wait()
    assert not leaving.sent and not stage.answers


async def test_the_client_leaves_within_the_answer(stage: Stage) -> None:
    stage.provider.reply(Reply(body=[b"one", STALL]))
    leaving = stage.begin("GET", MODELS)
    await leaving.started.wait()
    leaving.leave()
    await leaving.over()
    await (await stage.provider.exchange()).client_gone.wait()
    assert not leaving.complete


async def test_the_client_leaves_within_the_upload(stage: Stage) -> None:
    leaving = stage.begin("POST", COUNT, [(b"content-length", b"10")], b"some", b"never")
    leaving._messages.get_nowait()
    leaving._messages.get_nowait()
    leaving._messages.put_nowait({"type": "http.request", "body": b"some", "more_body": True})
    leaving.leave()
    await leaving.over()
    assert not leaving.sent and not stage.provider.requests, "half a request is none"


@pytest.mark.parametrize("declared", [True, False], ids=["length", "chunked"])
async def test_an_upload_over_the_limit(declared: bool) -> None:
    async with staged(limits=Limits(max_body_bytes=100)) as stage:
        framing = (b"content-length", b"101") if declared else (b"transfer-encoding", b"chunked")
        answer = await stage.call("POST", COUNT, [framing], bytes(60), bytes(41))
        assert answer.status == 413 and answer.json()["error"]["type"] == "request_too_large"
        assert not stage.provider.requests and not stage.answers


async def test_an_upload_over_the_limit_after_an_early_answer() -> None:
    """The provider has answered before it read the body, as it may (RFC 9112 section 9.5): there is one response."""
    answered = Gate()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nearly")
        await reader.read(-1)
        writer.close()
        answered.set()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        providers = [Provider.openai(base_url=url + "/v1")]
        async with RequestBridge(providers, MemoryRecorder(), limits=Limits(max_body_bytes=100)) as bridge:
            headers = [(b"transfer-encoding", b"chunked")]
            upload = Call(bridge, as_actor(scope("POST", "/openai/v1/conversations", headers), ALICE))
            upload._messages = asyncio.Queue()
            upload._messages.put_nowait({"type": "http.request", "body": bytes(60), "more_body": True})
            await upload.started.wait()
            upload._messages.put_nowait({"type": "http.request", "body": bytes(60), "more_body": True})
            await upload.over()
        await answered.wait()
    assert (upload.status, upload.body, upload.complete) == (200, b"early", False)


async def test_a_slow_client_slows_the_provider(stage: Stage) -> None:
    total, piece = 40_000_000, bytes(100_000)
    stage.provider.reply(Reply(body=[piece] * (total // len(piece)), framing="length"))
    slow = stage.begin("GET", MODELS)
    slow.reading = Gate()
    exchange = await stage.provider.exchange()
    done, _ = await asyncio.wait([asyncio.create_task(exchange.finished.wait())], timeout=0.5)
    assert not done and not exchange.sent_all, "the provider waits"
    slow.reading.set()
    await slow.over()
    assert len(slow.body) == total and slow.complete


# ---- what is counted ----


async def test_every_answer_is_counted(stage: Stage) -> None:
    stage.provider.replies(Reply(200), Reply(404), Reply(529), Reply(200))
    await stage.call("GET", "/anthropic/v1/models/a")
    await stage.call("GET", "/anthropic/v1/models/b")
    await stage.call("POST", COUNT, [], b"{}")
    await stage.call("DELETE", "/openai/v1/responses/resp_1")
    assert stage.answers == [
        PassedThrough("anthropic", "/v1/models/{id}", "GET", 200),
        PassedThrough("anthropic", "/v1/models/{id}", "GET", 404),
        PassedThrough("anthropic", "/v1/messages/count_tokens", "POST", 529),
        PassedThrough("openai", "/v1/responses/*", "DELETE", 200),
    ]


async def test_the_call_is_told_from_beginning_to_end(stage: Stage) -> None:
    """A client may have put a key into its query, which nobody needs to know."""
    stage.provider.reply(Reply(404))
    await stage.call("GET", "/anthropic/v1/models/a", query=b"key=sk-1")
    began, answered, passed, ended = stage.events
    url = f"{stage.provider.url}/v1/models/a"
    assert began == CallBegan("", "anthropic", "/v1/models/{id}", None, url, hop=1, attempt=1)
    assert isinstance(answered, CallAnswered) and (answered.http_status, answered.error) == (404, None)
    assert isinstance(passed, PassedThrough) and ended == CallEnded("", "anthropic")


async def test_a_call_without_an_answer_is_told_to_its_end(stage: Stage) -> None:
    stage.provider.reply(Reply(before=[CUT]))
    assert (await stage.call("GET", "/anthropic/v1/models/a")).status == 502
    began, answered, ended = stage.events
    assert isinstance(began, CallBegan) and isinstance(ended, CallEnded)
    assert isinstance(answered, CallAnswered) and answered.http_status is None
    assert answered.error == "The provider gave no answer: it closed the connection."


def identified(app: Any) -> Any:
    async def with_actor(scope: Any, receive: Any, send: Any) -> None:
        await app(as_actor(scope, ALICE), receive, send)

    return with_actor
