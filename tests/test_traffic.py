"""The corpus is protocol, not fantasy: the vendors' own code reads it and agrees with what it expects.

Truth: the SDKs anthropic and openai, written against 2.12.0 and 3.54.0; their stream helpers for streams, their parsers
for blocking bodies. Each recording of a completed response is played straight from the scripted provider. Where a
recording says that the SDK fails or differs, that is proved as well, so that no excuse outlives its cause.
"""

import asyncio
import json
import ssl
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import anthropic
import openai
import pytest
from anthropic.types import Message
from openai.types.chat import ChatCompletion
from openai.types.responses import Response

from tests.support.provider import ScriptedProvider, at_random, bytewise, whole
from tests.support.recording import Recording
from tests.support.traffic import ALL, named

COMPLETED = [recording for recording in ALL if recording.expect.status == "completed"]
CUT_SHORT = [recording for recording in ALL if recording.cut]
COUNTERS = ("input_tokens", "output_tokens", "cache_read_input_tokens", "cache_write_input_tokens")

NO_CERTIFICATES = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
"""Loading the authorities' certificates takes a client longer than all the rest of a test, and loopback needs none."""


@dataclass(frozen=True)
class Seen:
    """What an SDK made of a response, in the corpus's terms."""

    response_id: str
    text: str
    usage: dict[str, int] | None
    tool_calls: list[tuple[str | None, str, Any]]
    thoughts: list[str]


def parsed(arguments: str | None) -> Any:
    """Arguments as an SDK would show them: parsed if they are JSON, else as they are."""
    try:
        return json.loads(arguments or "{}")
    except ValueError:
        return arguments


def counted(*counters: int | None) -> dict[str, int]:
    """The SDKs do not tell "never reported" from 0 everywhere, so the comparison does not either."""
    return {name: counter or 0 for name, counter in zip(COUNTERS, counters, strict=True)}


def expected(recording: Recording) -> Seen:
    expect = recording.expect
    (row,) = expect.usage
    counters = (
        row["input_tokens"],
        row["output_tokens"],
        row["cache_read_input_tokens"],
        row["cache_write_input_tokens"],
    )
    return Seen(
        expect.response_id or "",
        expect.text,
        None if row["completeness"] == "unknown" else counted(*counters),
        [(call["tool_call_id"], call["tool"], parsed(call["input"])) for call in expect.tool_calls],
        [content for _, content in expect.thoughts],
    )


def read_message(message: Message) -> Seen:
    thoughts: list[str] = []
    calls: list[tuple[str | None, str, Any]] = []
    text = ""
    for block in message.content:
        kind: str = block.type
        if kind in ("tool_use", "server_tool_use", "mcp_tool_use"):
            call = block.to_dict()  # the SDK has no class for an mcp_tool_use, but keeps its members
            calls.append((str(call["id"]), str(call["name"]), call["input"]))
        elif block.type == "text":
            text += block.text
        elif block.type == "thinking":
            thoughts.append(block.thinking)
        elif block.type == "redacted_thinking":
            thoughts.append("")
    usage: Any = message.usage
    counters = usage and counted(
        usage.input_tokens,
        usage.output_tokens,
        usage.cache_read_input_tokens,
        usage.cache_creation_input_tokens,
    )
    return Seen(message.id, text, counters, calls, thoughts)


def read_completion(completion: ChatCompletion) -> Seen:
    calls: list[tuple[str | None, str, Any]] = []
    thoughts: list[str] = []
    for choice in completion.choices:
        message = choice.message
        for call in message.tool_calls or ():
            if call.type == "function":
                calls.append((call.id, call.function.name, parsed(call.function.arguments)))
            else:
                calls.append((call.id, call.custom.name, call.custom.input))
        if message.function_call:
            calls.append((None, message.function_call.name, parsed(message.function_call.arguments)))
        extra = message.model_extra or {}
        if thought := extra.get("reasoning") or extra.get("reasoning_content"):
            thoughts.append(thought)
    counters = None
    if usage := completion.usage:
        details = usage.prompt_tokens_details
        # DeepSeek's own name, which the SDK keeps as an unknown member.
        read = (details and details.cached_tokens) or (usage.model_extra or {}).get("prompt_cache_hit_tokens") or 0
        written = (details and details.cache_write_tokens) or 0
        counters = counted(max(0, usage.prompt_tokens - read - written), usage.completion_tokens, read, written)
    return Seen(completion.id, completion.choices[0].message.content or "", counters, calls, thoughts)


def read_response(response: Response) -> Seen:
    calls: list[tuple[str | None, str, Any]] = []
    thoughts: list[str] = []
    for item in response.output:
        match item.type:
            case "function_call":
                calls.append((item.call_id, item.name, parsed(item.arguments)))
            case "custom_tool_call":
                calls.append((item.call_id, item.name, item.input))
            case "web_search_call":
                calls.append((item.id, "web_search", item.action.to_dict()))
            case "mcp_call":
                calls.append((item.id, item.name, parsed(item.arguments)))
            case "code_interpreter_call":
                calls.append((item.id, "code_interpreter", item.code))
            case "file_search_call":
                calls.append((item.id, "file_search", item.queries))
            case "image_generation_call":
                calls.append((item.id, "image_generation", {}))
            case "reasoning":
                thoughts += [part.text for part in (*item.summary, *(item.content or ()))]
            case "message" if item.phase == "commentary":
                thoughts.append("".join(part.text for part in item.content if part.type == "output_text"))
            case _:
                pass
    counters = None
    if usage := response.usage:
        details: Any = usage.input_tokens_details
        read = getattr(details, "cached_tokens", None) or 0
        written = getattr(details, "cache_write_tokens", None) or 0
        counters = counted(max(0, usage.input_tokens - read - written), usage.output_tokens, read, written)
    return Seen(response.id, response.output_text, counters, calls, thoughts)


async def see_messages(url: str, stream: bool) -> Seen:
    http_client = anthropic.DefaultAsyncHttpxClient(verify=NO_CERTIFICATES)
    async with anthropic.AsyncAnthropic(base_url=url, api_key="k", max_retries=0, http_client=http_client) as client:
        arguments: Any = {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "x"}]}
        if not stream:
            return read_message(await client.messages.create(**arguments))
        async with client.messages.stream(**arguments) as events:
            return read_message(await events.get_final_message())


async def see_openai(url: str, stream: bool, format: str) -> Seen:
    http_client = openai.DefaultAsyncHttpxClient(verify=NO_CERTIFICATES)
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="k", max_retries=0, http_client=http_client) as client:
        if format == "responses":
            if not stream:
                return read_response(await client.responses.create(model="m", input="x"))
            async with client.responses.stream(model="m", input="x") as events:
                return read_response(await events.get_final_response())
        arguments: Any = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
        if not stream:
            return read_completion(await client.chat.completions.create(**arguments))
        async with client.chat.completions.stream(**arguments) as chunks:
            return read_completion(await chunks.get_final_completion())


async def see(recording: Recording, split: Callable[[bytes], Sequence[bytes]] = whole) -> Seen:
    async with playing(recording, split) as provider:
        if recording.format == "messages":
            return await see_messages(provider.url, recording.streams)
        return await see_openai(provider.url, recording.streams, recording.format)


@asynccontextmanager
async def playing(
    recording: Recording, split: Callable[[bytes], Sequence[bytes]] = whole
) -> AsyncIterator[ScriptedProvider]:
    async with ScriptedProvider() as provider:
        provider.reply(recording.reply(split))
        yield provider


# The SDK turns an item that it has no class for back into a dict, and pydantic warns that it fits no class.
@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings:UserWarning")
@pytest.mark.parametrize("recording", COMPLETED, ids=str)
async def test_the_vendors_sdk_agrees(recording: Recording) -> None:
    if recording.sdk_fails:
        with pytest.raises(Exception):  # noqa: B017, PT011  the point is that it fails, not how
            await see(recording)
    elif recording.sdk_differs:
        assert await see(recording) != expected(recording)
    else:
        assert await see(recording) == expected(recording)


@pytest.mark.parametrize("name", ["messages-text-stream", "chat-text-stream", "responses-text-stream"])
async def test_the_sdk_does_not_see_how_the_bytes_were_split(name: str) -> None:
    recording = named(name)
    assert await see(recording, bytewise) == expected(recording)
    assert await see(recording, lambda body: at_random(body, seed=11)) == expected(recording)


@pytest.mark.parametrize("recording", CUT_SHORT, ids=str)
async def test_a_cut_recording_dies_on_the_wire(recording: Recording) -> None:
    async with playing(recording) as provider:
        reader, writer = await asyncio.open_connection("127.0.0.1", provider.port)
        writer.write(b"POST / HTTP/1.1\r\n\r\n")
        async with asyncio.timeout(10):
            head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        writer.close()
    if recording.streams:
        assert b"chunked" in head
        assert not body.endswith(b"0\r\n\r\n")
    else:
        assert f"Content-Length: {len(body) + 64}".encode() in head


@pytest.mark.parametrize("recording", ALL, ids=str)
def test_the_corpus_is_well_formed(recording: Recording) -> None:
    expect = recording.expect
    request = json.loads(recording.request)
    assert request["model"] == expect.model
    assert request.get("stream", False) == expect.stream
    assert expect.http_status == recording.status
    assert len(expect.usage) == (recording.status == 200)
    assert (expect.prompt is None) == (expect.correlating_tool_call_id is not None)
    for row in expect.usage:
        assert (row["completeness"] == "partial") == (expect.status == "failed")
    if not recording.streams and not recording.cut:
        assert isinstance(json.loads(recording.response), dict)


def test_names_are_unique() -> None:
    assert len({recording.name for recording in ALL}) == len(ALL)
