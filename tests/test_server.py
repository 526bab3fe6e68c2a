"""The server as ``aibridge serve`` runs it: on a socket, configured by `aibridge.server.http_server`.

Truth: RFC 9110 and 9112 for HTTP; design.md section 3 for the server's own routes; that memory is bounded whatever a client
sends is our promise.
"""

import asyncio
import gc
import json
import tracemalloc
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from aibridge import MemoryRecorder
from aibridge.server import Server
from tests.serving import call, scope, serving, settings
from tests.support.provider import WAIT_SECONDS, Gate, Reply, ScriptedProvider, Wait
from tests.support.rawclient import Answer, RawClient

CONVERSATIONS = "/openai/v1/conversations"
RESPONSES = "/openai/v1/responses"
MODELS = "/openai/v1/models"
CHAT = "/openai/v1/chat/completions"
LIMIT = 32 * 1024 * 1024


class Stage:
    def __init__(self, provider: ScriptedProvider, url: str, recorder: MemoryRecorder) -> None:
        self.provider = provider
        self.url = url
        self.recorder = recorder

    def client(self) -> RawClient:
        return RawClient(self.url)

    async def raw(self, data: bytes) -> bytes:
        """Everything that a connection answers to some bytes until the server closes it."""
        async with self.client() as client:
            with suppress(ConnectionError):
                await client.write(data)
            return await client.closed()


@asynccontextmanager
async def staged(**sections: Any) -> AsyncIterator[Stage]:
    async with ScriptedProvider() as provider:
        provider.handle(lambda received: Reply.json(received.body))
        configuration = settings(
            providers={"anthropic": {"base_url": provider.url}, "openai": {"base_url": provider.url + "/v1"}}, **sections
        )
        recorder = MemoryRecorder()
        async with serving(Server(configuration, recorder=recorder), configuration) as url:
            yield Stage(provider, url, recorder)


@pytest.fixture
async def stage() -> AsyncIterator[Stage]:
    async with staged() as stage:
        yield stage


@pytest.fixture(params=["asyncio", "uvloop"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, object]]:
    return "asyncio", {"use_uvloop": request.param == "uvloop"}


def error_of(answer: Answer) -> str:
    message = json.loads(answer.body)["error"]["message"]
    return str(message)


# ---- heads ----

HEAD = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n"
ENDLESS = {
    "one field": (HEAD + b"x-a: ", b"v" * 50_000),
    "many fields": (HEAD, b"x-a: v\r\n" * 5_000),
    "the target": (b"GET /", b"v" * 50_000),
    "the method": (b"", b"v" * 50_000),
    "blank lines": (b"\r\n", b"\r\n" * 25_000),
    "the name of a field": (HEAD, b"v" * 50_000),
    "a trailer": (
        b"POST /openai/v1/conversations HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nx: ",
        b"v" * 50_000,
    ),
    "many trailers": (
        b"POST /openai/v1/conversations HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n",
        b"x-a: v\r\n" * 5_000,
    ),
    "a chunk extension": (
        b"POST /openai/v1/conversations HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n1;x=",
        b"v" * 50_000,
    ),
}


@pytest.mark.parametrize("what", ENDLESS)
async def test_what_does_not_end_is_refused(stage: Stage, what: str) -> None:
    start, more = ENDLESS[what]
    async with stage.client() as client:
        gc.collect()
        tracemalloc.start()
        with suppress(ConnectionError):
            await client.write(start)
            for _ in range(400):
                await client.write(more)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 6_000_000, "of the 20 MB that were sent; fields of 8 bytes take a hundred in Python"
        answer = await client.answer()
        assert answer.head.status in (400, 431)
        assert error_of(answer)
        assert await client.closed() == b""
    async with stage.client() as client:
        assert (await client.request("GET", "/healthz")).head.status == 200


async def test_a_head_over_the_limit_is_refused_by_the_application(stage: Stage) -> None:
    async with stage.client() as client:
        headers = [("x-a", "v" * 60_000), ("x-b", "v" * 10_000)]
        answer = await client.request("GET", "/anthropic/v1/models", headers)
        assert answer.head.status == 431 and json.loads(answer.body)["type"] == "error"
        assert (await client.request("GET", MODELS, [("x-a", "v" * 60_000)])).head.status == 200


async def test_a_head_in_pieces(stage: Stage) -> None:
    async with stage.client() as client:
        for byte in b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nx-a: b\r\n\r\n":
            await client.write(bytes([byte]))
        assert (await client.answer()).head.status == 200


async def test_an_endless_head_behind_a_stream_spoils_no_response(stage: Stage) -> None:
    gate = Gate()
    stage.provider.handle(lambda _: Reply.stream([b"data: 1\n\n", Wait(gate), b"data: 2\n\n"]))
    async with stage.client() as client:
        await client.send("GET", "/openai/v1/responses/resp_1?stream=true")
        assert (await client.head()).status == 200
        assert await client.until() == b"data: 1\n\n"
        with suppress(ConnectionError):
            await client.write(HEAD)
            for _ in range(400):
                await client.write(b"v" * 50_000)
        gate.set()
        assert await client.rest() == (b"data: 2\n\n", True)
        assert (await client.answer()).head.status == 431, "in its turn"
        assert await client.closed() == b""


POST = b"POST /openai/v1/responses HTTP/1.1\r\nHost: localhost\r\n"
NOT_HTTP = {
    "garbage": b"garbage\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "version": b"GET /healthz HTTP/9.9\r\nHost: localhost\r\n\r\n",
    "no colon": HEAD + b"no colon\r\n\r\n",
    "NUL": HEAD + b"x: a\x00b\r\n\r\n",
    "CONNECT": b"CONNECT api.openai.com:443 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "two framings": POST + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "two lengths": POST + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
    "negative length": POST + b"Content-Length: -1\r\n\r\n",
    "broken chunk": POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
}


@pytest.mark.parametrize("data", NOT_HTTP.values(), ids=NOT_HTTP)
async def test_what_is_not_http_is_refused(stage: Stage, data: bytes) -> None:
    # Two framings in one head are how requests are smuggled (RFC 9112 section 6.3, item 3).
    assert (await stage.raw(data)).startswith(b"HTTP/1.1 400 Bad Request\r\n")
    assert not stage.provider.requests


@pytest.mark.parametrize("target", [b"*", b"http://localhost/openai/v1/unknown", b"//", b"/openai%2Fv1/models"])
async def test_odd_targets(stage: Stage, target: bytes) -> None:
    async with stage.client() as client:
        await client.write(b"OPTIONS " + target + b" HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert (await client.answer()).head.status == 404


async def test_no_header_tells_what_serves(stage: Stage) -> None:
    async with stage.client() as client:
        head = (await client.request("GET", "/healthz")).head
    assert not head.all("server") and not head.all("date"), "those are the provider's to send"


# ---- bodies ----


@pytest.mark.parametrize("framing", ["length", "chunked"])
async def test_bodies_of_every_size(stage: Stage, framing: str) -> None:
    """One connection for all of them; large reads end anywhere."""
    async with stage.client() as client:
        for size in (0, 1, 60_000, 131_073, 200_000, 256_001, 262_143, 300_000, 500_007, 1_000_000, 5_000_000):
            if framing == "length":
                answer = await client.request("POST", CONVERSATIONS, body=bytes(size))
            else:
                chunked = b"%x\r\n%b\r\n0\r\n\r\n" % (size, bytes(size)) if size else b"0\r\n\r\n"
                answer = await client.request("POST", CONVERSATIONS, [("Transfer-Encoding", "chunked")], chunked)
            assert (answer.head.status, len(answer.body)) == (200, size)


@pytest.mark.parametrize("path", [RESPONSES, CONVERSATIONS], ids=["intercepted", "passthrough"])
@pytest.mark.parametrize("framing", ["length", "chunked"])
async def test_a_body_over_the_limit_gets_a_readable_answer(stage: Stage, path: str, framing: str) -> None:
    """Also for a client that writes its whole request before it reads, and it may go on with the connection."""
    body = bytes(LIMIT + 1024 * 1024)
    async with stage.client() as client:
        for _ in range(2):
            if framing == "length":
                await client.send("POST", path, [], body)
            else:
                await client.send("POST", path, [("Transfer-Encoding", "chunked")])
                await client.write(b"%x\r\n" % len(body))
                await client.write(body)
                await client.write(b"\r\n0\r\n\r\n")
            answer = await client.answer()
            assert answer.head.status == 413 and answer.complete
            assert str(LIMIT) in error_of(answer)
        assert (await client.request("GET", "/healthz")).head.status == 200
    assert not stage.provider.requests and not stage.recorder.interceptions


async def test_the_limit_itself_passes() -> None:
    async with staged(limits={"max_body_bytes": 1_000_000}) as stage, stage.client() as client:
        assert (await client.request("POST", CONVERSATIONS, [], bytes(1_000_000))).head.status == 200
        assert (await client.request("POST", CONVERSATIONS, [], bytes(1_000_001))).head.status == 413


async def test_expect_100_continue(stage: Stage) -> None:
    async with stage.client() as client:
        await client.send("POST", CONVERSATIONS, [("Expect", "100-continue"), ("Content-Length", "3")])
        assert (await client.head()).status == 100
        await client.write(b"abc")
        assert (await client.answer()).body == b"abc"
    assert stage.provider.requests[0].header("expect") == []


async def test_expect_100_continue_of_a_request_that_is_refused(stage: Stage) -> None:
    """The body is not asked for (RFC 9110 section 10.1.1)."""
    async with stage.client() as client:
        await client.send("POST", RESPONSES, [("Expect", "100-continue"), ("Content-Length", str(LIMIT + 1))])
        assert (await client.answer()).head.status == 413
        assert await client.closed() == b"", "what came next could be the body or a request"


async def test_trailers_are_no_header_fields(stage: Stage) -> None:
    # RFC 9110 section 6.5.1. In one piece with the head, and after it.
    head = b"POST /openai/v1/conversations HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    tail = b"3\r\nabc\r\n0\r\nAuthorization: Bearer smuggled\r\nx-trailer: 1\r\n\r\n"
    async with stage.client() as client:
        await client.write(head + tail)
        assert (await client.answer()).body == b"abc"
        await client.write(head)
        await client.write(tail)
        assert (await client.answer()).body == b"abc"
        assert (await client.request("GET", MODELS, [("x-after", "1")])).head.status == 200
    for received in stage.provider.requests[:2]:
        assert not received.header("authorization") and not received.header("x-trailer")
    assert stage.provider.requests[2].header("x-after") == ["1"]


# ---- connections ----


async def test_keep_alive(stage: Stage) -> None:
    async with stage.client() as client:
        for _ in range(3):
            assert (await client.request("GET", "/healthz")).body == b'{"status":"ok"}'
            assert (await client.request("POST", CONVERSATIONS, [], b"abc")).body == b"abc"
        answer = await client.request("GET", "/healthz", [("Connection", "close")])
        assert answer.head.get("connection") == "close"
        assert await client.closed() == b""


async def test_pipelining(stage: Stage) -> None:
    post = b"POST /openai/v1/conversations HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\n\r\n"
    async with stage.client() as client:
        await client.write(post + b"one" + HEAD + b"\r\n" + post + b"two" + post + b"thr")
        bodies = [(await client.answer()).body for _ in range(4)]
    assert bodies == [b"one", b'{"status":"ok"}', b"two", b"thr"]


async def test_many_upgrades_in_one_read(stage: Stage) -> None:
    """Each changes the parser under way; 70 kB of them once went deeper than Python can follow."""
    upgrade = HEAD + b"Connection: Upgrade\r\nUpgrade: h2c\r\n\r\n"
    async with stage.client() as client:
        await client.write(upgrade * 800)
        for _ in range(800):
            assert (await client.answer()).body == b'{"status":"ok"}'


class Recovering(MemoryRecorder):
    problem: str | None = "neither database nor spool take records"


async def test_ready_when_requests_can_be_recorded() -> None:
    recorder = Recovering()
    server = Server(settings(), recorder=recorder)
    answer = await call(server, scope("GET", "/readyz"))
    assert answer.status == 503
    assert json.loads(answer.body) == {"ready": False, "reasons": ["neither database nor spool take records"]}
    recorder.problem = None
    answer = await call(server, scope("GET", "/readyz"))
    assert (answer.status, json.loads(answer.body)) == (200, {"ready": True, "reasons": []})
    assert (await call(Server(settings(), recorder=MemoryRecorder()), scope("GET", "/readyz"))).status == 200


async def test_http_1_0(stage: Stage) -> None:
    answer = await stage.raw(b"GET /healthz HTTP/1.0\r\nHost: localhost\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n") and answer.endswith(b'\r\n\r\n{"status":"ok"}')
    body = b"POST /openai/v1/conversations HTTP/1.0\r\nHost: localhost\r\nContent-Length: 3\r\n\r\nabc"
    assert (await stage.raw(body)).endswith(b"\r\n\r\nabc")


async def test_a_client_that_closes_its_side_has_gone(stage: Stage) -> None:
    """As for nginx: whether it still reads cannot be told, and the provider's work costs money."""
    gate = Gate()
    stage.provider.handle(lambda _: Reply.stream([b"data: 1\n\n", Wait(gate)]))
    async with stage.client() as client:
        await client.send("GET", "/openai/v1/responses/resp_1?stream=true")
        await client.head()
        await client.until()
        client._writer.write_eof()
        await stage.provider.exchanges[0].client_gone.wait()
        _, complete = await client.rest()
        assert not complete


async def test_a_slow_client_slows_the_provider(stage: Stage) -> None:
    """Through both sides: what the client does not read stays with the provider."""
    total = 60_000_000
    stage.provider.handle(lambda _: Reply(body=[bytes(100_000)] * (total // 100_000), framing="length"))
    async with stage.client() as client:
        await client.send("GET", MODELS)
        await client.head()
        exchange = await stage.provider.exchange()
        client._writer.transport.pause_reading()  # type: ignore[attr-defined]
        done, _ = await asyncio.wait([asyncio.create_task(exchange.finished.wait())], timeout=0.5)
        assert not done and not exchange.sent_all
        client._writer.transport.resume_reading()  # type: ignore[attr-defined]
        body, complete = await client.rest()
        assert len(body) == total and complete


# ---- upgrades ----

WEBSOCKET = [
    ("Connection", "Upgrade"),
    ("Upgrade", "websocket"),
    ("Sec-WebSocket-Version", "13"),
    ("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ=="),
]


async def test_websocket_is_refused_at_once(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    async with stage.client() as client:
        for _ in range(2):
            answer = await client.request("GET", RESPONSES, WEBSOCKET)
            assert answer.head.status == 426 and answer.head.get("upgrade") == "HTTP/1.1"
        assert (await client.request("POST", CONVERSATIONS, [], b"abc")).body == b"abc", "the connection goes on"
    assert "websocket" not in caplog.text.lower(), "nobody has to install anything"


@pytest.mark.parametrize("framing", ["length", "chunked"])
@pytest.mark.parametrize("split", ["whole", "head and body", "bytewise"])
async def test_a_body_behind_a_request_for_an_upgrade(stage: Stage, framing: str, split: str) -> None:
    # As Java's HttpClient sends it by default. RFC 9110 section 7.8: a server may ignore the upgrade.
    head = b"POST /openai/v1/conversations HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade, HTTP2-Settings\r\n"
    head += b"Upgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n"
    body = b"GET /openai/v1/smuggled HTTP/1.1\r\nHost: localhost\r\n\r\n"  # what a parser must not take for a request
    if framing == "length":
        head, sent = head + b"Content-Length: %d\r\n\r\n" % len(body), body
    else:
        head += b"Transfer-Encoding: chunked\r\n\r\n"
        sent = b"%x\r\n%b\r\n1\r\n!\r\n0\r\n\r\n" % (len(body), body)
        body += b"!"
    pieces: Sequence[bytes] = {
        "whole": [head + sent + HEAD + b"\r\n"],
        "head and body": [head, sent, HEAD + b"\r\n"],
        "bytewise": [bytes([byte]) for byte in head + sent + HEAD + b"\r\n"],
    }[split]
    async with stage.client() as client:
        for piece in pieces:
            await client.write(piece)
        answer = await client.answer()
        assert (answer.head.status, answer.body) == (200, body)
        assert (await client.answer()).body == b'{"status":"ok"}'
    (received,) = stage.provider.requests
    assert received.body == body and not received.header("upgrade") and not received.header("http2-settings")


# ---- who may come in ----


@pytest.mark.parametrize("path", ["/healthz", "/metrics", "/anthropic/v1/models", "/openai/v1/unknown"])
async def test_web_pages_stay_out(stage: Stage, path: str) -> None:
    async with stage.client() as client:
        for headers in (
            [("Host", "evil.example")],
            [("Origin", "https://evil.example")],
            [("Origin", "null")],
            [("Sec-Fetch-Site", "cross-site")],
        ):
            answer = await client.request("GET", path, headers)
            assert answer.head.status == 403
            shape = "type" if path.startswith("/anthropic") else "error"
            assert shape in json.loads(answer.body)
    assert not stage.provider.requests


async def test_allowed_hosts() -> None:
    async with staged(server={"allowed_hosts": ["gateway.internal"]}) as stage, stage.client() as client:
        assert (await client.request("GET", MODELS, [("Host", "gateway.internal")])).head.status == 200
        assert (await client.request("GET", MODELS, [("Host", "other.internal")])).head.status == 403


async def test_the_local_user(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    async with stage.client() as client:
        await client.request("POST", CHAT, [], b'{"model":"m"}')
    (interception,) = stage.recorder.interceptions
    assert interception.initiator_id


async def test_a_trusted_proxy_names_the_user() -> None:
    async with staged(identity={"header": "X-Forwarded-User"}) as stage, stage.client() as client:
        answer = await client.request("POST", CHAT, [("X-Forwarded-User", "alice")], b'{"model":"m"}')
        assert answer.head.status == 200
        for headers in ([], [("X-Forwarded-User", "a"), ("X-Forwarded-User", "b")], [("X-Forwarded-User", "")]):
            answer = await client.request("POST", "/anthropic/v1/messages", headers, b'{"model":"m"}')
            assert (answer.head.status, json.loads(answer.body)["error"]["type"]) == (401, "authentication_error")
        assert (await client.request("GET", "/healthz")).head.status == 200
    assert [one.initiator_id for one in stage.recorder.interceptions] == ["alice"]
    (received,) = stage.provider.requests
    assert received.header("x-forwarded-user") == [], "it is for us, and never goes upstream"


async def test_a_proxy_that_is_not_trusted() -> None:
    identity = {"header": "X-Forwarded-User", "trusted_proxies": ["10.0.0.0/8"]}
    async with staged(identity=identity) as stage, stage.client() as client:
        answer = await client.request("GET", MODELS, [("X-Forwarded-User", "alice")])
        assert answer.head.status == 401
    assert not stage.provider.requests


# ---- the server's own routes ----


@pytest.mark.parametrize("path", ["/healthz", "/metrics"])
async def test_own_routes_answer_head_requests(stage: Stage, path: str) -> None:
    async with stage.client() as client:
        await client.send("HEAD", path)
        head = await client.head()
        assert head.status == 200 and int(head.get("content-length") or 0) > 0
        client._ended = True
        assert (await client.request("GET", "/healthz")).body == b'{"status":"ok"}'


async def test_metrics_of_real_requests(stage: Stage) -> None:
    answered = {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "model": "gpt-x-2026",
        "choices": [{
            "index": 0,
            "finish_reason": "tool_calls",
            "message": {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": "c", "type": "function", "function": {"name": "look", "arguments": "{}"}}],
            },
        }],
        "usage": {"prompt_tokens": 10, "completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": 4}},
    }  # fmt: skip
    stage.provider.handle(lambda received: Reply.json(answered if received.method == "POST" else {}))
    async with stage.client() as client:
        request = json.dumps({"model": "gpt-x", "messages": [{"role": "user", "content": "hi"}]}).encode()
        await client.request("POST", CHAT, [("User-Agent", "OpenAI/Python 3.54.0")], request)
        await client.request("GET", MODELS + "/gpt-x")
        scraped = await client.request("GET", "/metrics")
    assert (scraped.head.get("content-type") or "").startswith("text/plain")
    samples = {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(scraped.body.decode())
        for sample in family.samples
        if sample.name.startswith("aibridge_") and "_bucket" not in sample.name
    }
    (interception,) = stage.recorder.interceptions
    model, who = (
        {"provider": "openai", "model": "gpt-x"},
        {"initiator_id": interception.initiator_id, "client": "openai-sdk"},
    )

    def value(metric: str, /, **labels: str) -> float | None:
        return samples.get((f"aibridge_{metric}", *sorted(labels.items())))

    route = "/v1/chat/completions"
    assert value("interceptions_total", **model, **who, status="completed", route=route, method="POST") == 1
    assert value("interceptions_inflight", **model, route=route) == 0
    assert value("interceptions_duration_seconds_count", **model) == 1
    tokens = {kind: value("tokens_total", **model, **who, type=kind) for kind in ("input", "output", "cache_read")}
    assert tokens == {"input": 6, "output": 5, "cache_read": 4}
    assert value("prompts_total", **model, **who) == 1
    assert value("non_injected_tool_selections_total", **model, name="look") == 1
    assert value("passthrough_total", provider="openai", route="/v1/models/{id}", method="GET") == 1


async def test_many_at_once(stage: Stage) -> None:
    gate = Gate()
    stage.provider.handle(lambda received: Reply.stream([b"data: %b\n\n" % received.body, Wait(gate), b"data: end\n\n"]))

    async def one(index: int) -> bytes:
        async with stage.client() as client:
            await client.send("POST", CONVERSATIONS, [], b"%d" % index)
            await client.head()
            first = await client.until()
            opened.append(index)
            if len(opened) == 100:
                gate.set()
            rest, complete = await client.rest()
            assert complete
            return first + rest

    opened: list[int] = []
    async with asyncio.timeout(3 * WAIT_SECONDS):
        answers = await asyncio.gather(*(one(index) for index in range(100)))
    assert answers == [b"data: %d\n\ndata: end\n\n" % index for index in range(100)]
