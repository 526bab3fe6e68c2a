"""Row 10 of failures.md: errors reach the client as they are, and nothing is retried here.

Truth: the row; wire.md A10, B2, C3 for the shapes; clients.md 4 for what clients do with them (they retry by themselves);
design.md 4: the bridge's own errors have the provider's shape, a connection that died idle in the pool may be replaced.
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from tests.support.gateway import Rows, Scene, Stage, staged
from tests.support.provider import CUT, RESET, STALL, Reply, Step
from tests.support.rawclient import Answer
from tests.support.recording import Format, Recording
from tests.support.streams import events, target
from tests.support.traffic import ALL, named

STREAMS: list[tuple[Format, str]] = [
    ("messages", "messages-text-stream"),
    ("chat", "chat-text-stream"),
    ("responses", "responses-text-stream"),
]
BLOCKING = ["messages-text-blocking", "chat-text-blocking", "responses-text-blocking"]
EVERY = [*(name for _, name in STREAMS), *BLOCKING]

LIMITS = [
    ("retry-after", "17"),
    ("retry-after-ms", "16500"),
    ("x-should-retry", "false"),
    ("request-id", "req_011CSHoEeqs5C35K2UUqR7Fy"),
    ("x-request-id", "req_aa"),
    ("anthropic-ratelimit-unified-status", "rejected"),
    ("anthropic-ratelimit-requests-remaining", "0"),
    ("anthropic-ratelimit-requests-reset", "2026-11-21T12:00:00Z"),
    ("x-ratelimit-limit-tokens", "30000"),
    ("x-ratelimit-reset-tokens", "6ms"),
]

BODIES = {
    "json": ("application/json", b'{"type":"error",  "error":{"type":"x_new_error","message":"N\\u00e3o \xc3\xa9"}}\n'),
    "nested": ("application/json; charset=utf-8", b'{"error":{"message":"No.","type":null,"param":null,"code":429}}'),
    "string": ("application/json", b'{"error":"model not loaded"}'),
    "detail": ("application/json", b'{"detail":[{"loc":["body"],"msg":"no"}]}'),
    "html": ("text/html", b"<html><h1>502 Bad Gateway</h1>\r\n<hr>nginx</html>\r\n"),
    "text": ("text/plain", b"upstream connect error"),
    "empty": ("application/json", b""),
}


def check_ours(recording: Recording, answer: Answer, status: int) -> None:
    """An error of the gateway's own, before anything was relayed: in the provider's shape."""
    assert (answer.head.status, answer.complete) == (status, True)
    assert answer.head.get("content-type") == "application/json"
    body = json.loads(answer.body)
    error = body["error"]
    assert error["message"]
    if recording.format == "messages":
        assert body["type"] == "error"
        assert error["type"] == {502: "api_error", 504: "timeout_error"}[status]
    else:
        assert set(error) == {"message", "type", "param", "code"}
        assert error["type"] == "server_error"


def check_failed(rows: Rows, http_status: int | None) -> None:
    row = rows.interception
    assert (row["status"], row["http_status"]) == ("failed", http_status)
    assert row["error"]
    assert len(rows.user_prompts) == 1


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("status", [400, 401, 403, 404, 408, 409, 413, 422, 429, 500, 502, 503, 504, 529])
async def test_status_body_and_headers_are_unchanged(status: int, body: str, scene: Scene) -> None:
    """Whatever the protocol, whatever was asked for: nothing is renamed or wrapped, and there is one attempt."""
    content_type, content = BODIES[body]
    recordings = [named(name) for name in EVERY]
    for recording in recordings:
        headers = [("Content-Type", content_type), *LIMITS]
        scene.reply(Reply(status, headers, [content] if content else [], "length"))
        answer = await scene.post(target(recording), recording.request)
        assert answer.head.status == status
        assert (answer.body, answer.complete) == (content, True)
        assert list(answer.head.headers) == [
            *((name.lower(), value) for name, value in headers),
            ("content-length", str(len(content))),
        ]
    assert len(scene.requests) == len(recordings)
    rows = scene.ledger()
    assert [row["status"] for row in rows.interceptions] == ["failed"] * len(recordings)
    assert [row["http_status"] for row in rows.interceptions] == [status] * len(recordings)
    assert all(row["error"] for row in rows.interceptions)
    assert rows.token_usages == []


async def test_the_providers_own_words_are_recorded(scene: Scene) -> None:
    recording = named("messages-error-429")
    scene.reply(recording.reply())
    await scene.post(target(recording), recording.request)
    said = json.loads(recording.response)["error"]
    assert scene.ledger().interception["error"] == f"{said['type']}: {said['message']}"


@pytest.mark.parametrize("status", [301, 302, 307, 308])
async def test_redirects_are_the_clients_to_follow(status: int, scene: Scene) -> None:
    """The key must not go where a provider points."""
    recording = named(BLOCKING[0])
    scene.reply(Reply(status, [("Location", f"{scene.stage.provider.url}/elsewhere")], [], "length"))
    answer = await scene.post(target(recording), recording.request)
    assert answer.head.status == status
    assert answer.head.get("location") == f"{scene.stage.provider.url}/elsewhere"
    assert len(scene.requests) == 1


MID_STREAM = [
    recording
    for recording in ALL
    if recording.streams and not recording.cut and recording.expect.status == "failed" and "eof" not in recording.name
]


@pytest.mark.parametrize("recording", MID_STREAM, ids=str)
async def test_an_error_in_mid_stream_passes_and_is_recorded(recording: Recording, scene: Scene) -> None:
    """It is the provider's, in the protocol's form: nothing is added to it. The record says failed, and why."""
    scene.reply(recording.reply(events))
    answer = await scene.post(target(recording), recording.request)
    assert (answer.body, answer.complete) == (recording.response, True)
    rows = scene.ledger()
    check_failed(rows, 200)
    assert rows.token_usage["completeness"] == "partial"
    assert len(scene.requests) == 1


# --- no answer --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
async def test_connection_refused(name: str, scene: Scene) -> None:
    recording = named(name)
    answer = await scene.post(target(recording, "absent"), recording.request)
    check_ours(recording, answer, 502)
    check_failed(scene.ledger(), 502)
    assert scene.ledger().token_usages == []


@pytest.mark.parametrize("route", ["/absent/v1/models", "/absent-openai/v1/models"])
async def test_connection_refused_on_a_passthrough_route(route: str, scene: Scene) -> None:
    async with scene.client() as client:
        answer = await client.request("GET", route, scene.lines())
    recording = named("messages-text-blocking" if route.startswith("/absent/") else "chat-text-blocking")
    check_ours(recording, answer, 502)


NO_ANSWERS: dict[str, Sequence[Step]] = {
    "closed": [CUT],
    "reset": [RESET],
    "half a status line": [b"HTTP/1.1 20", CUT],
    "half a head": [b"HTTP/1.1 200 OK\r\nContent-Type: te", CUT],
    "not HTTP": [b"220 smtp.example.com ESMTP\r\n", CUT],
    "no status": [b"HTTP/1.1 abc OK\r\n\r\n", CUT],
}


@pytest.mark.parametrize("what", NO_ANSWERS, ids=lambda what: what.replace(" ", "-"))
@pytest.mark.parametrize("name", ["messages-text-stream", "chat-text-blocking"])
async def test_a_connection_dropped_without_an_answer(name: str, what: str, scene: Scene) -> None:
    """The provider may have begun to work on it, so it is not sent again."""
    recording = named(name)
    scene.reply(Reply(before=NO_ANSWERS[what]))
    answer = await scene.post(target(recording), recording.request)
    check_ours(recording, answer, 502)
    check_failed(scene.ledger(), 502)
    assert len(scene.requests) == 1


@pytest.mark.parametrize("framing", ["chunked", "length"])
async def test_a_connection_that_died_idle_is_replaced(framing: Any, scene: Scene) -> None:
    """The provider closes an idle connection, as all of them do: the next request goes out on another one, once."""
    recording = named("messages-text-blocking")
    body = Reply(200, [("Content-Type", "application/json")], [recording.response], framing)
    for turn in range(3):
        # Without "Connection: close" ahead of it: that would have been fair warning.
        scene.reply(Reply(200, [*body.headers, ("Connection", "keep-alive")], body.body, framing, close=True))
        answer = await scene.post(target(recording), recording.request)
        assert (answer.head.status, answer.body) == (200, recording.response)
        await (await scene.exchange(turn)).finished.wait()
        await scene.noticed()
    assert len(scene.requests) == 3
    assert [row["status"] for row in scene.ledger().interceptions] == ["completed"] * 3


async def test_interim_responses_are_skipped(scene: Scene) -> None:
    recording = named("messages-text-stream")
    reply = recording.reply()
    early = [b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"]
    scene.reply(Reply(200, reply.headers, reply.body, reply.framing, before=early))
    answer = await scene.post(target(recording), recording.request)
    assert (answer.head.status, answer.body) == (200, recording.response)


# --- silence ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def impatient() -> Iterator[Stage]:
    """A gateway that gives a provider up after a short silence."""
    with staged(env={"AIBRIDGE_UPSTREAM__IDLE_TIMEOUT": "0.3", "AIBRIDGE_UPSTREAM__CONNECT_TIMEOUT": "5"}) as stage:
        yield stage


@pytest.mark.parametrize("name", EVERY)
async def test_no_answer_in_time(name: str, impatient: Stage) -> None:
    recording = named(name)
    with impatient.scene() as scene:
        scene.reply(Reply(before=[STALL]))
        answer = await scene.post(target(recording), recording.request)
        check_ours(recording, answer, 504)
        check_failed(scene.ledger(), 504)
        await (await scene.exchange()).client_gone.wait()
        assert len(scene.requests) == 1


@pytest.mark.parametrize(("format", "name"), STREAMS)
@pytest.mark.parametrize("inside", [False, True], ids=["between events", "inside an event"])
async def test_silence_in_mid_stream(format: Format, name: str, inside: bool, impatient: Stage) -> None:
    """The status is out already: the client is told in-band, and what is known is kept as partial."""
    recording = named(name)
    pieces = events(recording.response)
    begun = pieces[0] + (pieces[1][:20] if inside else b"")
    with impatient.scene() as scene:
        scene.reply(Reply.stream([begun, STALL]))
        answer = await scene.post(target(recording), recording.request)
        assert answer.complete
        assert answer.body.startswith(begun)
        last = events(answer.body)[-1]
        data = json.loads(last.split(b"data: ", 1)[1])
        if format == "messages":
            assert last.startswith(b"event: error\n")
            assert (data["type"], data["error"]["type"]) == ("error", "timeout_error")
        elif format == "chat":
            assert data["error"]["message"]
        else:
            assert (data["type"], data["response"]["status"]) == ("response.failed", "failed")
        rows = scene.ledger()
        check_failed(rows, 200)
        assert rows.token_usage["completeness"] == "partial"
        assert rows.token_usage["input_tokens"] == (25 if format == "messages" else None)
        await (await scene.exchange()).client_gone.wait()


@pytest.mark.parametrize("name", BLOCKING)
async def test_silence_in_mid_body(name: str, impatient: Stage) -> None:
    """There is no place for an error in a body that has begun: the connection breaks off, nobody takes it for whole."""
    recording = named(name)
    with impatient.scene() as scene:
        scene.reply(
            Reply(200, recording.reply().headers, [recording.response[:40], STALL, recording.response[40:]], "length")
        )
        answer = await scene.post(target(recording), recording.request)
        assert (answer.body, answer.complete) == (recording.response[:40], False)
        rows = scene.ledger()
        check_failed(rows, 200)
        assert rows.token_usage["completeness"] == "partial"


async def test_pings_keep_a_slow_stream_alive(impatient: Stage) -> None:
    """Bytes are what is waited for, of whatever kind: here more of them in all than one silence may last."""
    recording = named("messages-text-stream")
    with impatient.scene() as scene:
        scene.reply(Reply.stream([*[b": still here\n\n"] * 20, recording.response]))
        answer = await scene.post(target(recording), recording.request)
        assert answer.complete
        assert scene.ledger().interception["status"] == "completed"
