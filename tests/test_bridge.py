"""`RequestBridge` as an ASGI application.

Truth: design.md section 3 (routes, statuses), the ASGI specification, wire.md A10 and B2 for the shape of errors. How it
mounts is tested in the real frameworks.
"""

import asyncio
import json
import sqlite3
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.routing import Mount

from aibridge import Actor, MemoryRecorder, Provider, RequestBridge, SqliteRecorder, as_actor
from aibridge.asgi import App, Receive, Scope, Send
from aibridge.errors import BridgeError, UpstreamError
from aibridge.events import Event, PassedThrough, Refused
from aibridge.limits import Limits
from aibridge.records import Record
from aibridge.upstream import MemoryResponse, MemoryUpstream, UpstreamRequest, UpstreamResponse
from aibridge.wire.observer import ResponseHead
from tests.serving import ALICE, Call, call, scope, serving, settings
from tests.support.provider import Gate, Reply, ScriptedProvider, Wait
from tests.support.rawclient import RawClient

MESSAGE = json.dumps({
    "id": "msg_1",
    "type": "message",
    "role": "assistant",
    "model": "claude",
    "content": [{"type": "text", "text": "hello"}],
    "stop_reason": "end_turn",
    "usage": {"input_tokens": 3, "output_tokens": 4},
}).encode()  # fmt: skip
REQUEST = b'{"model":"claude","max_tokens":9,"messages":[{"role":"user","content":"hi"}]}'
JSON = (b"content-type", b"application/json")


def memory_response(body: bytes) -> MemoryResponse:
    return MemoryResponse(ResponseHead(200, [JSON, (b"content-length", b"%d" % len(body))]), [body])


class Stage:
    """A bridge whose providers answer from memory."""

    def __init__(self, upstream: MemoryUpstream | None = None, **options: Any) -> None:
        self.upstream = upstream or MemoryUpstream(lambda _: memory_response(MESSAGE))
        self.recorder = MemoryRecorder()
        self.events: list[Event] = []
        self.bridge = RequestBridge(
            [Provider.anthropic(api_key="key"), Provider.openai(), Provider.anthropic("second", base_url="http://second")],
            self.recorder,
            observers=[self.events.append],
            upstream=self.upstream,
            **options,
        )


def assert_refused(answer: Call, kind: str, status: int, error_type: str) -> str:
    """An error of ours, in the provider's shape, that says how long it is. Answers with its message."""
    assert answer.status == status and answer.complete
    assert (b"content-length", b"%d" % len(answer.body)) in answer.headers and JSON in answer.headers
    said = answer.json()
    if kind == "anthropic":
        assert said == {"type": "error", "error": {"type": error_type, "message": said["error"]["message"]}}
    else:
        message = said["error"]["message"]
        assert said == {"error": {"type": error_type, "message": message, "param": None, "code": None}}
    message = said["error"]["message"]
    assert message.endswith(".")
    return str(message)


# ---- routes ----


async def test_an_intercepted_route() -> None:
    stage = Stage()
    answer = await call(stage.bridge, scope("POST", "/anthropic/v1/messages", [JSON], query=b"beta=true"), REQUEST)
    assert (answer.status, answer.body, answer.complete) == (200, MESSAGE, True)
    (request,) = stage.upstream.requests
    assert (request.method, request.url) == ("POST", "https://api.anthropic.com/v1/messages?beta=true")
    assert request.body == REQUEST and (b"x-api-key", b"key") in request.headers
    (interception,) = stage.recorder.interceptions
    assert (interception.initiator_id, interception.provider_name) == ("alice", "anthropic")


async def test_instances_of_a_kind() -> None:
    stage = Stage()
    await call(stage.bridge, scope("POST", "/second/v1/messages", [JSON]), REQUEST)
    assert stage.upstream.requests[0].url == "http://second/v1/messages"
    assert [(one.provider, one.provider_name) for one in stage.recorder.interceptions] == [("anthropic", "second")]


UNKNOWN = [
    ("GET", "/anthropic/v1/messages"),
    ("PUT", "/anthropic/v1/messages"),
    ("OPTIONS", "/anthropic/v1/messages"),
    ("POST", "/anthropic/v1/messages/"),
    ("POST", "/anthropic/v1/messages/batches"),
    ("POST", "/anthropic/V1/messages"),
    ("GET", "/anthropic/v1/organizations/api_keys"),
    ("POST", "/anthropic/v1/files"),
    ("POST", "/anthropic/v1/chat/completions"),
    ("POST", "/anthropic//v1/messages"),
    ("GET", "/anthropic/v1/models/.."),
    ("GET", "/anthropic/v1/models/%2e%2e"),
    ("GET", "/anthropic/v1/models/a%2f..%2fb"),
    ("GET", "/openai/v1/responses/a%2fb"),
    ("GET", "/anthropic/v1/models/a/b"),
    ("GET", "/anthropic/api/event_logging/../../v1/organizations"),
    ("GET", "/anthropic"),
    ("GET", "/anthropic/"),
    ("POST", "/openai/v1/messages"),
    ("POST", "/openai/v1/embeddings"),
    ("GET", "/openai/v1/responses/%2e%2e/organization/admin_api_keys"),
    ("GET", "/openai/v1/responses/..%2forganization"),
    ("GET", "/openai/v1/organization/admin_api_keys"),
    ("CONNECT", "/openai/v1/models"),
    ("GET", "/nobody/v1/models"),
    ("GET", "/"),
    ("GET", "/openai%2fv1/models"),
]


@pytest.mark.parametrize(("method", "path"), UNKNOWN)
async def test_unknown_routes_are_not_forwarded(method: str, path: str) -> None:
    stage = Stage()
    kind = "anthropic" if path.startswith("/anthropic") else "openai"
    expected = "not_found_error" if kind == "anthropic" else "invalid_request_error"
    assert_refused(await call(stage.bridge, scope(method, path), REQUEST), kind, 404, expected)
    assert not stage.upstream.requests and not stage.recorder.interceptions
    name = path.split("/")[1]
    configured = name if name in ("anthropic", "openai") else ""
    assert stage.events == [Refused(configured, "alice", "route", "127.0.0.1", "There is no such route on this gateway.")]


@pytest.mark.parametrize("path", ["", "*", "x", "//", "/\xff"])
async def test_odd_paths(path: str) -> None:
    stage = Stage()
    odd = scope("OPTIONS", "/") | {"path": path, "raw_path": path.encode("latin-1")}
    assert_refused(await call(stage.bridge, odd), "openai", 404, "invalid_request_error")
    del odd["raw_path"]  # not every server has it
    assert_refused(await call(stage.bridge, odd), "openai", 404, "invalid_request_error")


async def test_a_head_request_that_is_refused_has_no_body() -> None:
    answer = await call(Stage().bridge, scope("HEAD", "/anthropic/v1/unknown"))
    assert (answer.status, answer.body, answer.complete) == (404, b"", True)
    assert dict(answer.headers)[b"content-length"] != b"0"


# ---- refusals ----


@pytest.mark.parametrize("path", ["/anthropic/v1/messages", "/anthropic/v1/models", "/anthropic/v1/unknown"])
async def test_no_actor_no_service(path: str) -> None:
    stage = Stage()
    for method in ("GET", "POST"):
        answer = await call(stage.bridge, scope(method, path), REQUEST, actor=None)
        assert_refused(answer, "anthropic", 401, "authentication_error")
    assert not stage.upstream.requests and not stage.recorder.interceptions
    why = "no actor in the scope of the request"
    assert stage.events == [Refused("anthropic", "", "identity", "127.0.0.1", why)] * 2


async def test_what_is_no_actor_is_none() -> None:
    stage = Stage()
    answer = await call(stage.bridge, scope("POST", "/openai/v1/responses") | {"aibridge.actor": "alice"}, actor=None)
    assert_refused(answer, "openai", 401, "authentication_error")


@pytest.mark.parametrize("value", [b"websocket", b"WebSocket"])
@pytest.mark.parametrize("actor", [ALICE, None])
async def test_a_websocket_upgrade_over_http(value: bytes, actor: Actor | None) -> None:
    stage = Stage()
    headers = [(b"connection", b"Upgrade"), (b"upgrade", value), (b"sec-websocket-version", b"13")]
    answer = await call(stage.bridge, scope("GET", "/openai/v1/responses", headers), actor=actor)
    assert_refused(answer, "openai", 426, "invalid_request_error")
    assert (b"upgrade", b"HTTP/1.1") in answer.headers  # RFC 9110 section 15.5.22
    assert not stage.upstream.requests


async def test_other_upgrades_are_ignored() -> None:
    # RFC 9110 section 7.8. Java's HttpClient asks for h2c on each first request.
    stage = Stage()
    headers = [(b"connection", b"Upgrade, HTTP2-Settings"), (b"upgrade", b"h2c"), (b"http2-settings", b"AAMA"), JSON]
    assert (await call(stage.bridge, scope("POST", "/anthropic/v1/messages", headers), REQUEST)).status == 200
    sent = {name for name, _ in stage.upstream.requests[0].headers}
    assert not sent & {b"connection", b"upgrade", b"http2-settings"}


NO_WEBSOCKET = Refused("openai", "", "upgrade", "127.0.0.1", "WebSocket is not supported here. Use HTTP.")


async def test_a_websocket_scope_where_the_server_can_answer() -> None:
    # ASGI's WebSocket Denial Response extension.
    offered: dict[str, Any] = {"type": "websocket", "extensions": {"websocket.http.response": {}}}
    websocket = scope("GET", "/openai/v1/responses") | offered
    stage = Stage()
    sent = (await call(stage.bridge, websocket)).sent
    assert [message["type"] for message in sent] == ["websocket.http.response.start", "websocket.http.response.body"]
    assert stage.events == [NO_WEBSOCKET]
    assert sent[0]["status"] == 426 and not sent[1].get("more_body", False)


async def test_a_websocket_scope_where_it_cannot() -> None:
    stage = Stage()
    sent = (await call(stage.bridge, scope("GET", "/openai/v1/responses") | {"type": "websocket"})).sent
    assert [message["type"] for message in sent] == ["websocket.close"]
    assert stage.events == [NO_WEBSOCKET]


async def test_the_header_limit() -> None:
    stage = Stage(limits=Limits(max_header_bytes=1000))
    host = len(b"host127.0.0.1")
    exact = [(b"x-a", b"v" * (1000 - 3 - host))]
    over = [(b"x-a", b"v" * 300), (b"x-b", b"v" * (1001 - 300 - 6 - host))]
    assert (await call(stage.bridge, scope("GET", "/anthropic/v1/models", exact))).status == 200
    answer = await call(stage.bridge, scope("GET", "/anthropic/v1/models", over))
    assert "1000 bytes" in assert_refused(answer, "anthropic", 431, "invalid_request_error")


class ReadingUpstream(MemoryUpstream):
    """Reads a streamed body to its end, as one with sockets does."""

    async def send(self, request: UpstreamRequest) -> UpstreamResponse:
        try:
            if not isinstance(request.body, bytes):
                async for _ in request.body:
                    pass
        except BridgeError as error:
            raise UpstreamError("the body broke off") from error
        return await super().send(request)


@pytest.mark.parametrize("path", ["/anthropic/v1/messages", "/anthropic/v1/messages/count_tokens"])
@pytest.mark.parametrize("declared", [True, False], ids=["with its length", "without"])
async def test_the_body_limit(path: str, declared: bool) -> None:
    stage = Stage(upstream=ReadingUpstream(lambda _: memory_response(MESSAGE)), limits=Limits(max_body_bytes=len(REQUEST)))
    answers = []
    for body in (REQUEST, REQUEST + b" "):
        length = (b"content-length", b"%d" % len(body)) if declared else (b"transfer-encoding", b"chunked")
        answers.append(await call(stage.bridge, scope("POST", path, [JSON, length]), body[:10], body[10:]))
    assert answers[0].status == 200
    assert str(len(REQUEST)) in assert_refused(answers[1], "anthropic", 413, "request_too_large")
    assert len(stage.upstream.requests) == 1


async def test_a_body_that_the_client_does_not_finish() -> None:
    stage = Stage()
    unfinished = Call(stage.bridge, as_actor(scope("POST", "/anthropic/v1/messages", [JSON]), ALICE), [b'{"model":', b"x"])
    unfinished._messages.get_nowait()
    unfinished._messages.get_nowait()
    unfinished._messages.put_nowait({"type": "http.request", "body": b'{"mod', "more_body": True})
    unfinished.leave()
    await unfinished.over()
    assert not unfinished.sent and not stage.upstream.requests and not stage.recorder.interceptions


def test_names_are_unique() -> None:
    with pytest.raises(ValueError, match="two providers are named 'openai'"):
        RequestBridge([Provider.openai(), Provider("openai", "anthropic", "http://x")], MemoryRecorder())


# ---- mounting ----

Wrapped = Callable[[App], App]


def knowing(app: App) -> App:
    """A middleware as a host application would have it."""

    async def identified(scope: Scope, receive: Receive, send: Send) -> None:
        known = any(name == b"x-token" for name, _ in scope.get("headers", ()))
        await app(as_actor(scope, Actor("bob")) if known else scope, receive, send)

    return identified


def in_starlette(app: App, prefix: str) -> Any:
    return Starlette(routes=[Mount(prefix, app=app)])


def in_fastapi(app: App, prefix: str) -> Any:
    host = FastAPI()
    host.mount(prefix, app)
    return host


@pytest.mark.parametrize("host", [in_starlette, in_fastapi])
@pytest.mark.parametrize("prefix", ["/ai", "/deep/er", "/anthropic"])
async def test_mounted_in_a_framework(host: Callable[[App, str], Any], prefix: str) -> None:
    stage = Stage()
    app = host(knowing(stage.bridge), prefix)
    headers = [("x-token", "t"), ("content-type", "application/json")]
    async with serving(app, settings()) as url, RawClient(url) as client:
        answer = await client.request("POST", f"{prefix}/anthropic/v1/messages?a=b", headers, REQUEST)
        assert (answer.head.status, answer.body) == (200, MESSAGE)
        answer = await client.request("GET", f"{prefix}/anthropic/v1/models/a%20b%2Ec?x=%2F", headers)
        assert answer.head.status == 200
        answer = await client.request("POST", f"{prefix}/anthropic/v1/messages", headers[1:], REQUEST)
        assert (answer.head.status, json.loads(answer.body)["type"]) == (401, "error")
        answer = await client.request("GET", f"{prefix}/anthropic/v1/unknown", headers)
        assert (answer.head.status, json.loads(answer.body)["type"]) == (404, "error")
    assert [request.url for request in stage.upstream.requests] == [
        "https://api.anthropic.com/v1/messages?a=b",
        "https://api.anthropic.com/v1/models/a%20b%2Ec?x=%2F",
    ]
    assert [one.initiator_id for one in stage.recorder.interceptions] == ["bob"]


async def test_a_root_path_that_the_server_adds() -> None:
    stage = Stage()
    mounted = scope("POST", "/anthropic/v1/messages", [JSON], root_path="/prefix")
    assert (await call(stage.bridge, mounted, REQUEST)).status == 200
    mounted = scope("GET", "/anthropic/v1/models/a%2Db", root_path="/prefix")
    assert (await call(stage.bridge, mounted)).status == 200
    assert [request.url for request in stage.upstream.requests] == [
        "https://api.anthropic.com/v1/messages",
        "https://api.anthropic.com/v1/models/a%2Db",
    ]


# ---- life ----


async def lifespan(app: App, script: Callable[[], Awaitable[None]]) -> list[Mapping[str, Any]]:
    """Start the application as a server does, run the script, stop it."""
    inbox: asyncio.Queue[Any] = asyncio.Queue()
    sent: list[Mapping[str, Any]] = []
    answered = Gate()

    async def send(message: Any) -> None:
        sent.append(message)
        answered.set()

    inbox.put_nowait({"type": "lifespan.startup"})

    async def run() -> None:
        await app({"type": "lifespan", "asgi": {"version": "3.0"}}, inbox.get, send)

    running = asyncio.create_task(run())
    await answered.wait()
    if sent[0]["type"] == "lifespan.startup.complete":
        await script()
        inbox.put_nowait({"type": "lifespan.shutdown"})
    async with asyncio.timeout(10):
        await running
    return sent


async def test_the_lifespan_opens_and_closes_the_recorder(tmp_path: Path) -> None:
    stage = Stage()
    bridge = RequestBridge([Provider.anthropic()], SqliteRecorder(tmp_path / "a.db"), upstream=stage.upstream)

    async def script() -> None:
        assert (tmp_path / "a.db").exists(), "there from the start, so that a mistake shows then"
        await call(bridge, scope("POST", "/anthropic/v1/messages", [JSON]), REQUEST)

    sent = await lifespan(bridge, script)
    assert [message["type"] for message in sent] == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
    assert rows(tmp_path / "a.db") == [("alice", "completed")]


async def test_a_recorder_that_cannot_open_fails_the_start(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    bridge = RequestBridge([Provider.anthropic()], SqliteRecorder(tmp_path / "file" / "a.db"))

    async def never() -> None:
        raise AssertionError

    (message,) = await lifespan(bridge, never)
    assert message["type"] == "lifespan.startup.failed" and message["message"]
    assert "cannot start" in caplog.text


async def test_without_lifespan_the_recorder_opens_by_itself(tmp_path: Path) -> None:
    """As in Starlette and FastAPI, which do not forward the lifespan to what they mount."""
    stage = Stage()
    recorder = SqliteRecorder(tmp_path / "a.db")
    bridge = RequestBridge([Provider.anthropic()], recorder, upstream=stage.upstream)
    answers = await asyncio.gather(
        *(call(bridge, scope("POST", "/anthropic/v1/messages", [JSON]), REQUEST) for _ in range(5))
    )
    assert [answer.status for answer in answers] == [200] * 5
    assert rows(tmp_path / "a.db") == [("alice", "completed")] * 5
    await recorder.__aexit__(None, None, None)


async def test_leaving_ends_what_is_under_way(tmp_path: Path) -> None:
    async with ScriptedProvider() as provider:
        provider.reply(Reply.stream([b"event: message_start\n", Wait(Gate())]))
        recorder = SqliteRecorder(tmp_path / "a.db")
        async with RequestBridge([Provider.anthropic(base_url=provider.url)], recorder) as bridge:
            streaming = Call(bridge, as_actor(scope("POST", "/anthropic/v1/messages", [JSON]), ALICE), [REQUEST])
            await streaming.started.wait()
        await streaming.over()
        await (await provider.exchange()).client_gone.wait()
    assert rows(tmp_path / "a.db") == [("alice", "interrupted")]


async def test_the_recorder_is_left_behind_the_last_record() -> None:
    """Also where nobody waits for it: the server has run out of patience with a request whose start was not durable yet."""
    journal: list[str] = []
    asked, durable = asyncio.Event(), asyncio.Event()

    class Slow(MemoryRecorder):
        async def __aenter__(self) -> None:
            pass

        async def __aexit__(self, *_: object) -> None:
            journal.append("left")

        async def record_together(self, records: Sequence[Record]) -> None:
            asked.set()
            await durable.wait()
            journal.extend(type(record).__name__ for record in records)

    async with RequestBridge([Provider.anthropic()], Slow()) as bridge:
        request = Call(bridge, as_actor(scope("POST", "/anthropic/v1/messages", [JSON]), ALICE), [REQUEST])
        await asked.wait()
        await request.abandon()
        asyncio.get_running_loop().call_later(0.05, durable.set)
    assert journal == ["Interception", "InterceptionEnded", "left"]


async def test_passthrough_is_observed() -> None:
    stage = Stage()
    await call(stage.bridge, scope("GET", "/anthropic/v1/models/claude"))
    assert PassedThrough("anthropic", "/v1/models/{id}", "GET", 200) in stage.events


def rows(path: Path) -> list[tuple[str, str]]:
    with closing(sqlite3.connect(path)) as database:
        return database.execute("SELECT initiator_id, status FROM aibridge_interceptions").fetchall()
