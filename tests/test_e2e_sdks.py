"""The official Anthropic and OpenAI Python SDKs as clients of the real server, and the rows that they leave.

Truth: the SDKs anthropic 2.12.0 and openai 3.54.0 themselves, which raise at what they do not understand; the corpus says
what they must have understood (``tests/test_traffic.py`` proves that they do, without a gateway between).
"""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import anthropic
import openai
import pytest
from openai.types.chat import ChatCompletionChunk

from tests.support.gateway import Rows, Scene, Stage
from tests.support.provider import Received, Reply, at_random
from tests.support.recording import Recording
from tests.support.sdks import ANTHROPIC_KEY, NO_CERTIFICATES, OPENAI_KEY, anthropic_client, openai_client
from tests.support.traffic import ALL, named
from tests.test_traffic import Seen, expected, read_completion, read_message, read_response

UNDERSTOOD = [
    recording
    for recording in ALL
    if recording.expect.status == "completed" and not (recording.sdk_fails or recording.sdk_differs)
]

# The SDK turns an item that it has no class for back into a dict, and pydantic warns that it fits no class.
with_unknown_items = pytest.mark.filterwarnings("ignore:Pydantic serializer warnings:UserWarning")

QUESTION: Any = [{"role": "user", "content": "What now?"}]
WEATHER: Any = {
    "name": "weather",
    "description": "Tells the weather",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
}


def usage_of(rows: Rows) -> list[dict[str, Any]]:
    names = ("input_tokens", "output_tokens", "cache_read_input_tokens", "cache_write_input_tokens", "completeness")
    return [{name: row[name] for name in names} for row in rows.token_usages]


def calls_of(rows: Rows) -> list[tuple[Any, Any, Any]]:
    return [(row["tool_call_id"], row["tool"], row["input"]) for row in rows.tool_usages]


def calls_in(recording: Recording) -> list[tuple[Any, Any, Any]]:
    return [(call["tool_call_id"], call["tool"], call["input"]) for call in recording.expect.tool_calls]


async def see(recording: Recording, scene: Scene) -> Seen:
    """What the vendor's SDK makes of a recording that reaches it through the gateway."""
    scene.reply(recording.reply(lambda body: at_random(body, seed=3)))
    if recording.format == "messages":
        async with anthropic_client(scene) as client:
            ask: Any = {"model": "claude-opus-5-5", "max_tokens": 64, "messages": QUESTION}
            if not recording.streams:
                return read_message(await client.messages.create(**ask))
            async with client.messages.stream(**ask) as events:
                return read_message(await events.get_final_message())
    async with openai_client(scene) as client:
        if recording.format == "responses":
            ask = {"model": "gpt-5.4-codex", "input": "What now?"}
            if not recording.streams:
                return read_response(await client.responses.create(**ask))
            async with client.responses.stream(**ask) as stream:
                return read_response(await stream.get_final_response())
        ask = {"model": "gpt-5.4", "messages": QUESTION}
        if not recording.streams:
            return read_completion(await client.chat.completions.create(**ask))
        async with client.chat.completions.stream(**ask, stream_options={"include_usage": True}) as chunks:
            return read_completion(await chunks.get_final_completion())


@with_unknown_items
@pytest.mark.parametrize("recording", UNDERSTOOD, ids=str)
async def test_the_sdk_understands_what_comes_through(recording: Recording, scene: Scene) -> None:
    assert await see(recording, scene) == expected(recording)
    rows = scene.ledger()
    assert rows.interception["status"] == "completed"
    assert rows.interception["client"] == ("anthropic-sdk" if recording.format == "messages" else "openai-sdk")
    assert rows.interception["streaming"] == recording.streams
    assert [row["prompt"] for row in rows.user_prompts] == ["What now?"]
    assert usage_of(rows) == list(recording.expect.usage)
    assert calls_of(rows) == calls_in(recording)


# --- Anthropic --------------------------------------------------------------------------------------------------------


async def test_anthropic_two_turns_with_parallel_tools(scene: Scene) -> None:
    """The second turn replays the first as the SDK parsed it, and its row points at the call that it answers."""
    first, second = named("messages-parallel-tools-stream"), named("messages-tool-result-stream")
    scene.reply(first.reply(), second.reply())
    async with anthropic_client(scene) as client:
        async with client.messages.stream(
            model="claude-opus-5-5", max_tokens=64, messages=QUESTION, tools=[WEATHER]
        ) as events:
            message = await events.get_final_message()
        results: Any = [
            {"type": "tool_result", "tool_use_id": block.id, "content": "rain"}
            for block in message.content
            if block.type == "tool_use"
        ]
        turn: Any = [*QUESTION, {"role": "assistant", "content": message.content}, {"role": "user", "content": results}]
        async with client.messages.stream(model="claude-opus-5-5", max_tokens=64, messages=turn, tools=[WEATHER]) as events:
            assert await events.get_final_text() == second.expect.text
    rows = scene.ledger()
    assert [row["status"] for row in rows.interceptions] == ["completed", "completed"]
    assert [row["correlating_tool_call_id"] for row in rows.interceptions] == [None, results[-1]["tool_use_id"]]
    assert calls_of(rows) == calls_in(first)
    assert usage_of(rows) == [*first.expect.usage, *second.expect.usage]
    assert [row["prompt"] for row in rows.user_prompts] == ["What now?"]


async def test_anthropic_thinking_arrives_signed_and_is_recorded(scene: Scene) -> None:
    recording = named("messages-thinking-stream")
    scene.reply(recording.reply())
    async with (
        anthropic_client(scene) as client,
        client.messages.stream(model="claude-opus-5-5", max_tokens=64, messages=QUESTION) as events,
    ):
        message = await events.get_final_message()
    (block,) = (block for block in message.content if block.type == "thinking")
    assert block.signature
    rows = scene.ledger()
    assert [(row["metadata"]["source"], row["content"]) for row in rows.model_thoughts] == [("thinking", block.thinking)]


async def test_anthropic_events_one_by_one(scene: Scene) -> None:
    """``create(stream=True)``, which hands out the events as they come."""
    recording = named("messages-text-stream")
    scene.reply(recording.reply())
    async with anthropic_client(scene) as client:
        stream = await client.messages.create(model="claude-opus-5-5", max_tokens=64, messages=QUESTION, stream=True)
        kinds = [event.type async for event in stream]
    assert (kinds[0], kinds[-1]) == ("message_start", "message_stop")
    assert usage_of(scene.ledger()) == list(recording.expect.usage)


async def test_anthropic_passthrough_routes(scene: Scene) -> None:
    """Token counts and models reach the SDK and leave no row: nothing was generated."""
    model = {"type": "model", "id": "claude-opus-5-5", "display_name": "Opus", "created_at": "2026-01-01T00:00:00Z"}
    page = {"data": [model], "has_more": False, "first_id": model["id"], "last_id": model["id"]}

    def handler(received: Received) -> Reply:
        match received.method, received.path:
            case "POST", "/v1/messages/count_tokens":
                return Reply.json({"input_tokens": 42})
            case "GET", "/v1/models":
                return Reply.json(page, headers=[("request-id", "req_models")])
            case "GET", "/v1/models/claude-opus-5-5":
                return Reply.json(model)
        raise AssertionError(received.target)

    scene.handler = handler
    async with anthropic_client(scene) as client:
        count = await client.messages.count_tokens(model="claude-opus-5-5", messages=QUESTION)
        assert count.input_tokens == 42
        listed = [found async for found in client.models.list(limit=1000)]
        assert [found.id for found in listed] == ["claude-opus-5-5"]
        assert (await client.models.retrieve("claude-opus-5-5")).display_name == "Opus"
    assert scene.requests[1].query == "limit=1000"
    for received in scene.requests:
        assert received.header("authorization") == [f"Bearer {ANTHROPIC_KEY}"]
        assert received.header("x-api-key") == []
    assert scene.ledger().interceptions == []


@pytest.mark.parametrize(
    ("status", "kind", "raised"),
    [
        (400, "invalid_request_error", anthropic.BadRequestError),
        (401, "authentication_error", anthropic.AuthenticationError),
        (429, "rate_limit_error", anthropic.RateLimitError),
        (529, "overloaded_error", anthropic.APIStatusError),
    ],
)
@pytest.mark.parametrize("stream", [False, True], ids=["blocking", "stream"])
async def test_anthropic_errors(
    status: int, kind: str, raised: type[anthropic.APIStatusError], stream: bool, scene: Scene
) -> None:
    body = {"type": "error", "error": {"type": kind, "message": "So it is."}, "request_id": "req_1"}
    scene.reply(Reply.json(body, status, [("request-id", "req_1"), ("retry-after", "17")]))
    async with anthropic_client(scene) as client:
        with pytest.raises(raised) as caught:
            await client.messages.create(model="claude-opus-5-5", max_tokens=64, messages=QUESTION, stream=stream)
    assert caught.value.status_code == status
    assert caught.value.body == body
    assert caught.value.request_id == "req_1"
    assert caught.value.response.headers["retry-after"] == "17"
    assert len(scene.requests) == 1
    rows = scene.ledger()
    assert (rows.interception["status"], rows.interception["http_status"]) == ("failed", status)
    assert rows.interception["error"] == f"{kind}: So it is."
    assert usage_of(rows) == []


async def test_anthropic_error_in_mid_stream(scene: Scene) -> None:
    recording = named("messages-error-mid-stream")
    scene.reply(recording.reply())
    async with anthropic_client(scene) as client:
        with pytest.raises(anthropic.APIStatusError, match="Overloaded"):
            async with client.messages.stream(model="claude-opus-5-5", max_tokens=64, messages=QUESTION) as events:
                await events.until_done()
    rows = scene.ledger()
    assert rows.interception["status"] == "failed"
    assert usage_of(rows) == list(recording.expect.usage)


async def test_anthropic_many_at_once(stage: Stage) -> None:
    recordings = [recording for recording in UNDERSTOOD if recording.format == "messages"]

    async def one(recording: Recording) -> None:
        with stage.scene() as scene:
            assert await see(recording, scene) == expected(recording)
            assert usage_of(scene.ledger()) == list(recording.expect.usage)

    async with asyncio.TaskGroup() as group:
        for recording in recordings:
            group.create_task(one(recording))


def test_anthropic_without_asyncio(scene: Scene) -> None:
    recording = named("messages-text-stream")
    scene.reply(recording.reply())
    with (
        anthropic.Anthropic(
            base_url=scene.gateway.anthropic,
            api_key=ANTHROPIC_KEY,
            max_retries=0,
            default_headers=scene.headers,
            http_client=anthropic.DefaultHttpxClient(verify=NO_CERTIFICATES),
        ) as client,
        client.messages.stream(model="claude-opus-5-5", max_tokens=64, messages=QUESTION) as events,
    ):
        assert events.get_final_text() == recording.expect.text
    assert usage_of(scene.ledger()) == list(recording.expect.usage)


# --- OpenAI: Chat -----------------------------------------------------------------------------------------------------


async def chat_chunks(scene: Scene, **options: Any) -> list[ChatCompletionChunk]:
    async with openai_client(scene) as client:
        stream = await client.chat.completions.create(model="gpt-5.4", messages=QUESTION, stream=True, **options)
        return [chunk async for chunk in stream]


async def test_chat_stream_with_usage(scene: Scene) -> None:
    recording = named("chat-text-stream")
    scene.reply(recording.reply())
    chunks = await chat_chunks(scene, stream_options={"include_usage": True})
    assert chunks[-1].usage is not None
    assert chunks[-1].choices == []
    assert usage_of(scene.ledger()) == list(recording.expect.usage)


async def test_chat_stream_without_usage(scene: Scene) -> None:
    """The client gets what it asked for, and the ledger has the figures all the same."""
    recording = named("chat-text-stream")
    scene.reply(recording.reply())
    chunks = await chat_chunks(scene)
    assert all(chunk.choices for chunk in chunks)
    assert all("usage" not in chunk.model_fields_set for chunk in chunks)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == recording.expect.text
    assert scene.requests[0].json()["stream_options"] == {"include_usage": True}
    assert usage_of(scene.ledger()) == list(recording.expect.usage)


async def test_chat_two_turns_with_parallel_tools(scene: Scene) -> None:
    first, second = named("chat-parallel-tools-stream"), named("chat-tool-result-stream")
    scene.reply(first.reply(), second.reply())
    async with openai_client(scene) as client:
        async with client.chat.completions.stream(model="gpt-5.4", messages=QUESTION) as events:
            message = (await events.get_final_completion()).choices[0].message
        calls = message.tool_calls or []
        results: Any = [{"role": "tool", "tool_call_id": call.id, "content": "rain"} for call in calls]
        turn: Any = [*QUESTION, message.to_dict(), *results]
        async with client.chat.completions.stream(model="gpt-5.4", messages=turn) as events:
            assert (await events.get_final_completion()).choices[0].message.content == second.expect.text
    rows = scene.ledger()
    assert [row["correlating_tool_call_id"] for row in rows.interceptions] == [None, calls[-1].id]
    assert calls_of(rows) == calls_in(first)
    assert usage_of(rows) == [*first.expect.usage, *second.expect.usage]
    assert [row["prompt"] for row in rows.user_prompts] == ["What now?"]


# --- OpenAI: Responses ------------------------------------------------------------------------------------------------


async def test_responses_events_one_by_one(scene: Scene) -> None:
    recording = named("responses-agentic-stream")
    scene.reply(recording.reply())
    async with openai_client(scene) as client:
        stream = await client.responses.create(model="gpt-5.4-codex", input="What now?", stream=True)
        kinds = [event.type async for event in stream]
    assert (kinds[0], kinds[-1]) == ("response.created", "response.completed")
    rows = scene.ledger()
    assert usage_of(rows) == list(recording.expect.usage)
    assert calls_of(rows) == calls_in(recording)
    thoughts = [(row["metadata"]["source"], row["content"]) for row in rows.model_thoughts]
    assert thoughts == list(recording.expect.thoughts)


async def test_responses_continued_with_tool_results(scene: Scene) -> None:
    first, second = named("responses-agentic-stream"), named("responses-text-stream")
    scene.reply(first.reply(), second.reply())
    async with openai_client(scene) as client:
        async with client.responses.stream(model="gpt-5.4-codex", input="What now?") as events:
            response = await events.get_final_response()
        call_id = next(item.call_id for item in response.output if item.type == "function_call")
        async with client.responses.stream(
            model="gpt-5.4-codex",
            previous_response_id=response.id,
            input=[{"type": "function_call_output", "call_id": call_id, "output": "fine"}],
        ) as events:
            assert (await events.get_final_response()).output_text == second.expect.text
    rows = scene.ledger()
    assert [row["correlating_tool_call_id"] for row in rows.interceptions] == [None, call_id]
    assert [row["prompt"] for row in rows.user_prompts] == ["What now?"]


async def test_openai_passthrough_routes(scene: Scene) -> None:
    stored = json.loads(named("responses-text-blocking").response)
    model = {"id": "gpt-5.4", "object": "model", "created": 1, "owned_by": "openai"}
    path = f"/v1/responses/{stored['id']}"

    def handler(received: Received) -> Reply:
        match received.method, received.path:
            case "GET", "/v1/models":
                return Reply.json({"object": "list", "data": [model]})
            case "GET", "/v1/models/gpt-5.4":
                return Reply.json(model)
            case ("GET", found) | ("POST", found) if found in (path, f"{path}/cancel"):
                return Reply.json(stored)
            case "GET", found if found == f"{path}/input_items":
                return Reply.json({"object": "list", "data": [], "has_more": False, "first_id": "", "last_id": ""})
            case "DELETE", found if found == path:
                return Reply(204)
            case "POST", "/v1/conversations":
                return Reply.json({"id": "conv_1", "object": "conversation", "created_at": 1, "metadata": {}})
        raise AssertionError(received.target)

    scene.handler = handler
    async with openai_client(scene) as client:
        assert [found.id async for found in client.models.list()] == ["gpt-5.4"]
        assert (await client.models.retrieve("gpt-5.4")).owned_by == "openai"
        assert (await client.responses.retrieve(stored["id"])).id == stored["id"]
        assert (await client.responses.cancel(stored["id"])).id == stored["id"]
        assert [item async for item in client.responses.input_items.list(stored["id"])] == []
        await client.responses.delete(stored["id"])
        assert (await client.conversations.create()).id == "conv_1"
    assert all(received.header("authorization") == [f"Bearer {OPENAI_KEY}"] for received in scene.requests)
    assert scene.ledger().interceptions == []


@pytest.mark.parametrize("route", ["chat", "responses"])
@pytest.mark.parametrize(
    ("status", "raised"),
    [
        (400, openai.BadRequestError),
        (401, openai.AuthenticationError),
        (429, openai.RateLimitError),
        (500, openai.InternalServerError),
        (529, openai.InternalServerError),
    ],
)
@pytest.mark.parametrize("stream", [False, True], ids=["blocking", "stream"])
async def test_openai_errors(
    route: str, status: int, raised: type[openai.APIStatusError], stream: bool, scene: Scene
) -> None:
    error = {"message": "So it is.", "type": "some_error", "param": None, "code": "some_code"}
    scene.reply(Reply.json({"error": error}, status, [("x-request-id", "req_1"), ("retry-after-ms", "1700")]))
    async with openai_client(scene) as client:
        calls: dict[str, Callable[[], Awaitable[object]]] = {
            "chat": lambda: client.chat.completions.create(model="gpt-5.4", messages=QUESTION, stream=stream),
            "responses": lambda: client.responses.create(model="gpt-5.4", input="What now?", stream=stream),
        }
        with pytest.raises(raised) as caught:
            await calls[route]()
    assert caught.value.status_code == status
    assert caught.value.body == error
    assert caught.value.request_id == "req_1"
    assert caught.value.response.headers["retry-after-ms"] == "1700"
    assert len(scene.requests) == 1
    rows = scene.ledger()
    assert (rows.interception["status"], rows.interception["http_status"]) == ("failed", status)
    assert usage_of(rows) == []


@with_unknown_items
async def test_openai_many_at_once(stage: Stage) -> None:
    recordings = [recording for recording in UNDERSTOOD if recording.format != "messages"]

    async def one(recording: Recording) -> None:
        with stage.scene() as scene:
            assert (await see(recording, scene)).response_id == recording.expect.response_id
            assert usage_of(scene.ledger()) == list(recording.expect.usage)

    async with asyncio.TaskGroup() as group:
        for recording in recordings:
            group.create_task(one(recording))
