"""Recorded provider traffic through the real server: identical bytes both ways, and exactly the rows it implies.

Truth: the corpus and its expectations (``tests/support/traffic.py``); for how a cut ends, wire.md rule 7 and A9, B2, C3,
and failures.md 18. A client that saw the end of a response finds its rows in the database without waiting (design.md 2,
durable before done), so the tests do not wait either.
"""

import asyncio
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from tests.support.gateway import USER, Rows, Scene, Stage
from tests.support.provider import at_random, bytewise, whole
from tests.support.rawclient import Answer
from tests.support.recording import Recording
from tests.support.traffic import ALL, named

Split = Callable[[bytes], Sequence[bytes]]

BYTEWISE = [
    named(name)
    for name in (
        "messages-text-stream",
        "messages-parallel-tools-stream",
        "messages-crlf-stream",
        "messages-cut-inside-a-character",
        "chat-text-stream",
        "chat-bom-stream",
        "chat-cut-inside-an-event",
        "responses-text-stream",
    )
]

HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding"}
USER_AGENT = "e2e/1.0 (" + "héllo".encode().decode("latin-1") + ")"

SAYS_IT_FAILED = rb'"type": ?"(error|response.failed)"|"error": ?\{'

ROUTES = {
    "messages": ("anthropic", "/v1/messages"),
    "chat": ("openai", "/v1/chat/completions"),
    "responses": ("openai", "/v1/responses"),
}


def request_headers(recording: Recording, scene: Scene) -> list[tuple[str, str]]:
    """As a client of that protocol sends them, with some that nobody has heard of, in an order and case of their own."""
    own = (
        [("x-api-key", "sk-ant-client"), ("Anthropic-Version", "2023-06-01"), ("anthropic-beta", "b-1,c-2, d-3")]
        if recording.format == "messages"
        else [("Authorization", "Bearer sk-client"), ("OpenAI-Organization", "org-1"), ("X-Codex-Turn-Metadata", '{"a":1}')]
    )
    return scene.lines(
        ("Accept", "application/json"),
        ("User-Agent", USER_AGENT),
        ("X-Unknown", "first"),
        *own,
        ("x-unknown", "second"),
        ("X-Stainless-Retry-Count", "0"),
    )


def end_to_end(headers: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(name.lower(), value) for name, value in headers if name.lower() not in HOP_BY_HOP]


async def play(recording: Recording, scene: Scene, split: Split) -> Answer:
    scene.reply(recording.reply(split))
    provider, _ = ROUTES[recording.format]
    return await scene.post(f"/{provider}{recording.path}?beta=true", recording.request, request_headers(recording, scene))


def check_upstream(recording: Recording, scene: Scene) -> None:
    """The provider has seen one request, and it was the client's."""
    assert len(scene.requests) == 1
    (received,) = scene.requests
    assert received.method == "POST"
    assert received.target == recording.path + "?beta=true"
    # Latin-1 is what both ends read and write: what is compared is bytes.
    got = [(name.decode().lower(), value.decode("latin-1")) for name, value in received.headers]
    theirs = [field for field in got if field[0] not in ("host", "content-length", "connection")]
    if asks_for_usage(recording):
        # The response will be edited, so it must not come compressed.
        theirs = [field for field in theirs if field != ("accept-encoding", "identity")]
        check_splice(recording.request, received.body)
    else:
        assert received.body == recording.request
    sent = end_to_end(request_headers(recording, scene))
    credentials = ("authorization", "x-api-key")
    assert [field for field in theirs if field[0] not in credentials] == [
        field for field in sent if field[0] not in credentials
    ]
    assert sorted(theirs) == sorted(sent)


def asks_for_usage(recording: Recording) -> bool:
    """Whether the one exception to verbatim relay applies: a Chat stream whose client did not ask for its usage."""
    body = json.loads(recording.request)
    wants = (body.get("stream_options") or {}).get("include_usage", False)
    return recording.format == "chat" and body.get("stream", False) and not wants


def check_splice(sent: bytes, received: bytes) -> None:
    """The option was added, and every byte of the client's is still there, in its place."""
    before, after = json.loads(sent), json.loads(received)
    options = after.pop("stream_options")
    assert options == {**(before.pop("stream_options", None) or {}), "include_usage": True}
    assert after == before
    assert list(after) == list(before)
    inserted = len(received) - len(sent)
    at = next((i for i, (a, b) in enumerate(zip(sent, received, strict=False)) if a != b), len(sent))
    # The insertion may begin with what follows it, so its place is any from which the rest is the same.
    assert any(received[:i] + received[i + inserted :] == sent for i in range(at + 1))


def check_answer(recording: Recording, answer: Answer) -> None:
    """The client has seen the provider's bytes, and an end that says how it ended."""
    assert answer.head.status == recording.status
    received = end_to_end(answer.head.headers)
    sent = end_to_end([("Content-Type", recording.content_type), *recording.headers])
    if recording.streams:
        assert received == sent
    else:
        length = len(recording.response) + (64 if recording.cut else 0)
        assert received == [*sent, ("content-length", str(length))]
    if recording.expect.status == "completed" or recording.status != 200 or ends_itself(recording):
        assert answer.complete
        assert answer.body == recording.response
    elif not recording.streams:
        assert not answer.complete
        assert answer.body == recording.response
    else:
        assert answer.complete
        assert answer.body.startswith(recording.response)
        check_error(recording, answer.body[len(recording.response) :])


def ends_itself(recording: Recording) -> bool:
    """The provider has said in the stream that it failed."""
    return not recording.cut and re.search(SAYS_IT_FAILED, recording.response) is not None


def check_error(recording: Recording, added: bytes) -> None:
    """What was added to a stream that broke off: one event, in the protocol's own words, that no client can overlook."""
    gap, *lines = added.lstrip(b"\r\n"), *added.strip(b"\r\n").split(b"\n")
    assert gap.endswith(b"\n\n")
    fields = dict(line.split(b": ", 1) for line in lines)
    data: dict[str, Any] = json.loads(fields.pop(b"data"))
    match recording.format:
        case "messages":
            assert fields == {b"event": b"error"}
            assert data["type"] == "error"
            assert data["error"]["type"] == "api_error"
            assert data["error"]["message"]
        case "chat":
            assert fields == {}
            assert data["error"]["type"] == "server_error"
            assert data["error"]["message"]
        case "responses":
            assert fields == {b"event": b"response.failed"}
            assert data["type"] == "response.failed"
            assert data["response"]["status"] == "failed"
            assert data["response"]["error"]["message"]


def check_rows(recording: Recording, scene: Scene, rows: Rows) -> None:
    """Exactly what the traffic implies, and nothing else."""
    expect = recording.expect
    provider, route = ROUTES[recording.format]
    row = rows.interception
    assert {
        "initiator_id": row["initiator_id"],
        "provider": row["provider"],
        "provider_name": row["provider_name"],
        "route": row["route"],
        "model": row["model"],
        "streaming": bool(row["streaming"]),
        "status": row["status"],
        "http_status": row["http_status"],
        "client_session_id": row["client_session_id"],
        "correlating_tool_call_id": row["correlating_tool_call_id"],
        "credential_kind": row["credential_kind"],
    } == {
        "initiator_id": USER,
        "provider": provider,
        "provider_name": provider,
        "route": route,
        "model": expect.model,
        "streaming": expect.stream,
        "status": expect.status,
        "http_status": expect.http_status,
        "client_session_id": scene.tag,
        "correlating_tool_call_id": expect.correlating_tool_call_id,
        "credential_kind": "byok",
    }
    assert row["user_agent"]
    assert row["started_at"] <= row["ended_at"]
    assert bool(row["error"]) == (expect.status == "failed")
    assert row["metadata"] == {}

    prompts = [(prompt["prompt"], prompt["provider_response_id"]) for prompt in rows.user_prompts]
    assert prompts == ([] if expect.prompt is None else [(expect.prompt, expect.response_id)])

    if "usage" not in expect.undecided:
        counters = list(expect.usage[0]) if expect.usage else []
        assert [{name: usage[name] for name in counters} for usage in rows.token_usages] == list(expect.usage)
        for usage in rows.token_usages:
            assert usage["provider_response_id"] == expect.response_id
            reported = any(usage[name] is not None for name in counters if name != "completeness")
            assert ("usage" in usage["metadata"]) == reported

    if "tool_calls" not in expect.undecided:
        calls = [
            {
                "tool_call_id": call["tool_call_id"],
                "tool": call["tool"],
                "input": call["input"],
                "run_by": call["metadata"].get("run_by", "client"),
            }
            for call in rows.tool_usages
        ]
        assert calls == list(expect.tool_calls)
    for call in rows.tool_usages:
        assert call["provider_response_id"] == expect.response_id
        assert not call["injected"]
        assert call["server_url"] is call["invocation_error"] is None

    if "thoughts" not in expect.undecided:
        thoughts = [(thought["metadata"]["source"], thought["content"]) for thought in rows.model_thoughts]
        assert thoughts == list(expect.thoughts)


async def check(recording: Recording, scene: Scene, split: Split) -> None:
    answer = await play(recording, scene, split)
    rows = scene.ledger()
    check_upstream(recording, scene)
    check_answer(recording, answer)
    check_rows(recording, scene, rows)


@pytest.mark.parametrize("recording", ALL, ids=str)
async def test_recording(recording: Recording, scene: Scene) -> None:
    await check(recording, scene, whole)


@pytest.mark.parametrize("recording", ALL, ids=str)
async def test_recording_split_at_random(recording: Recording, scene: Scene) -> None:
    await check(recording, scene, lambda body: at_random(body, seed=len(recording.name)))


@pytest.mark.parametrize("recording", BYTEWISE, ids=str)
async def test_recording_byte_by_byte(recording: Recording, scene: Scene) -> None:
    await check(recording, scene, bytewise)


async def test_all_recordings_at_once(stage: Stage) -> None:
    """Their rows do not mix, and neither do their bytes."""

    async def one(recording: Recording) -> None:
        with stage.scene() as scene:
            await check(recording, scene, lambda body: at_random(body, seed=5, pieces=4))

    async with asyncio.TaskGroup() as group:
        for recording in ALL:
            group.create_task(one(recording))


async def test_one_connection_carries_many_requests(stage: Stage) -> None:
    """Keep-alive on both sides: responses that ended leave the connection usable, for whatever comes next."""
    recordings = [recording for recording in ALL if recording.expect.status == "completed"][:20]
    before = stage.provider.connections
    with stage.scene() as scene:
        async with scene.client() as client:
            for recording in recordings:
                scene.reply(recording.reply())
                provider, _ = ROUTES[recording.format]
                headers = request_headers(recording, scene)
                answer = await client.request("POST", f"/{provider}{recording.path}", headers, recording.request)
                check_answer(recording, answer)
        assert stage.provider.connections <= before + 1
        assert len(scene.ledger().interceptions) == len(recordings)


def test_the_corpus_has_what_the_criterion_names() -> None:
    """Messages, Chat, Responses; streaming and blocking; errors, cuts, thinking, parallel tools, cached tokens."""
    for protocol in ROUTES:
        recordings = [recording for recording in ALL if recording.format == protocol]
        expectations = [recording.expect for recording in recordings]
        assert {expect.stream for expect in expectations} == {True, False}
        assert any(recording.status == 429 for recording in recordings)
        assert {recording.streams for recording in recordings if recording.cut} == {True, False}
        assert any(expect.thoughts for expect in expectations)
        assert any(len(expect.tool_calls) > 1 for expect in expectations)
        assert any(usage["cache_read_input_tokens"] for expect in expectations for usage in expect.usage)
