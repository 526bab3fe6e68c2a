"""The official JavaScript SDKs as judges: they read whole streams as the ledger does, and it is known how broken ones end.

Truth: the SDKs @anthropic-ai/sdk and openai themselves, of the versions in tests/clients/package.json. Other tests let them
judge our merged streams; here it is shown what their verdict is worth. wire.md D5 and clients.md 4 are checked by it; what
was new on 2026-11-22 is marked so.
"""

import asyncio
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import pytest
from anthropic.types import Message
from openai.types.chat import ChatCompletion
from openai.types.responses import Response

from tests.support import jssdk
from tests.support.claude_code import why_not
from tests.support.jssdk import JavaScript, Refused
from tests.support.provider import STALL, Reply, ScriptedProvider, at_random, bytewise
from tests.support.recording import Format, Recording
from tests.support.streams import events
from tests.support.traffic import ALL, named
from tests.test_traffic import Seen, expected, read_completion, read_message, read_response

COMPLETED = [recording for recording in ALL if recording.expect.status == "completed"]

FAILS: Final = {
    "messages-no-final-blank-line": "it drops an event that no blank line ends, and with it message_stop",
    "messages-delta-without-usage-stream": "it takes usage for granted",
    "messages-no-usage-stream": "it takes usage for granted",
    "chat-usage-on-every-chunk-stream": "it wants a role in some delta, and there is none",
    "responses-reasoning-content-stream": "it wants a content_part.added ahead of the first reasoning_text.delta",
    "responses-unknown-everything-stream": "it refuses an event of a type that it does not know",
}
DIFFERS: Final = {
    "messages-tools-blocking": "its numbers are doubles",
    "messages-max-tokens-stream": "it parses arguments that broke off as far as they go",
    "messages-zero-input-in-delta-stream": "a zero erases what message_start said",
    "messages-iterations-stream": "it takes the totals and not the iterations",
    "messages-iterations-blocking": "it takes the totals and not the iterations",
    "chat-reasoning-content-stream": "of a member that it does not know it keeps the last piece",
    "chat-openrouter-stream": "of a member that it does not know it keeps the last piece",
    "chat-both-reasoning-names-stream": "of a member that it does not know it keeps the last piece",
    "responses-empty-terminal-output-stream": "it trusts an empty output in the last event (wire.md C3)",
}

READ: Final[dict[Format, Callable[[dict[str, Any]], Seen]]] = {
    "messages": lambda final: read_message(Message.construct(**final)),
    "chat": lambda final: read_completion(ChatCompletion.construct(**final)),
    "responses": lambda final: read_response(Response.construct(**final)),
}
"""The final objects have the same members in both languages, so the Python SDKs' types read the JavaScript SDKs' too."""

MESSAGES: Final = events(named("messages-parallel-tools-stream").response)
CHAT: Final = events(named("chat-parallel-tools-stream").response)
RESPONSES: Final = events(named("responses-agentic-stream").response)


# --- whole streams ----------------------------------------------------------------------------------------------------


async def see(js: JavaScript, recording: Recording, chunks: Sequence[bytes]) -> Seen:
    final = await js.read(recording.format, chunks, stream=recording.streams)
    return READ[recording.format](final)


@pytest.mark.parametrize("recording", COMPLETED, ids=str)
async def test_the_sdk_agrees(js: JavaScript, recording: Recording) -> None:
    if recording.name in FAILS:
        with pytest.raises(Refused):
            await see(js, recording, [recording.response])
    elif recording.name in DIFFERS:
        assert await see(js, recording, [recording.response]) != expected(recording)
    else:
        assert await see(js, recording, [recording.response]) == expected(recording)


@pytest.mark.parametrize(
    "name", ["messages-parallel-tools-stream", "chat-parallel-tools-stream", "responses-agentic-stream"]
)
async def test_the_sdk_does_not_see_how_the_bytes_were_split(js: JavaScript, name: str) -> None:
    recording = named(name)
    splits = [bytewise(recording.response), *(at_random(recording.response, seed) for seed in range(100))]
    seen = await asyncio.gather(*(see(js, recording, split) for split in splits))
    assert seen == [expected(recording)] * len(splits)


@pytest.mark.parametrize(
    "name",
    [
        "messages-thinking-stream",
        "messages-text-blocking",
        "chat-text-stream",
        "chat-text-blocking",
        "responses-text-stream",
        "responses-text-blocking",
    ],
)
async def test_the_sdk_asks_a_server(js: JavaScript, name: str) -> None:
    """Over the network too, with parameters and headers of the test's."""
    recording = named(name)
    params = json.loads(recording.request)
    params.pop("stream", None)
    async with ScriptedProvider() as provider:
        provider.reply(recording.reply(lambda body: at_random(body, seed=5)))
        base_url = provider.url if recording.format == "messages" else f"{provider.url}/v1"
        final = await js.ask(recording.format, base_url, params, stream=recording.streams, headers={"x-scene": "1"})
    (received,) = provider.requests
    assert READ[recording.format](final) == expected(recording)
    assert (received.path, received.header("x-scene")) == (recording.path, ["1"])
    assert received.header("user-agent")[0].startswith(("Anthropic/JS", "OpenAI/JS"))
    assert received.json() == params | ({"stream": True} if recording.streams else {})


@pytest.mark.parametrize("format", ["messages", "chat", "responses"])
async def test_an_error_of_http_has_its_status(js: JavaScript, format: Format) -> None:
    async with ScriptedProvider() as provider:
        provider.reply(Reply.json({"error": {"type": "overloaded_error", "message": "Overloaded"}}, 529))
        with pytest.raises(Refused, match="Overloaded") as refused:
            await js.ask(format, provider.url)
    assert refused.value.status == 529
    assert len(provider.requests) == 1


# --- broken streams ---------------------------------------------------------------------------------------------------


def swapped(stream: Sequence[bytes], *swaps: tuple[str, str]) -> list[bytes]:
    """Every event with one text after the other put in the place of another."""
    events = list(stream)
    for old, new in swaps:
        assert any(old.encode() in event for event in events), old
        events = [event.replace(old.encode(), new.encode()) for event in events]
    return events


def without(stream: Sequence[bytes], *places: int) -> list[bytes]:
    return [event for place, event in enumerate(stream) if place not in places]


def sse(type: str, **members: Any) -> bytes:
    return f"event: {type}\ndata: {json.dumps({'type': type, **members})}\n\n".encode()


def with_output(change: Callable[[list[Any]], object]) -> list[bytes]:
    """The Responses stream, its last event with another output."""
    response = json.loads(RESPONSES[-1].split(b"data: ", 1)[1])["response"]
    change(response["output"])
    return [*RESPONSES[:-1], sse("response.completed", response=response)]


def test_the_streams_are_as_the_table_takes_them() -> None:
    assert b'"content_block_start","index":1' in MESSAGES[5]
    assert b'"role":"assistant"' in CHAT[0]
    assert b'"finish_reason":"tool_calls"' in CHAT[8]
    assert b'"response.output_item.added"' in RESPONSES[14]
    assert b'"response.function_call_arguments.delta"' in RESPONSES[15]
    assert b'"response.output_item.done"' in RESPONSES[18]


HOLE: Final = tuple((f'"index":{index}', f'"index":{index + 1}') for index in (3, 2, 1))
OUTPUT_HOLE: Final = tuple((f'"output_index":{index}', f'"output_index":{index + 1}') for index in (3, 2, 1))

REFUSED: Final[dict[str, tuple[Format, list[bytes], str]]] = {
    "a second message_start": ("messages", [*MESSAGES[:5], *MESSAGES], "got message_start before"),
    "no message_stop": ("messages", MESSAGES[:-1], "ended without producing a Message"),
    "events without names": ("messages", [event.split(b"\n", 1)[1] for event in MESSAGES], "without sending any chunks"),
    "an error event in Messages": (
        "messages",
        [*MESSAGES[:5], sse("error", error={"type": "overloaded_error", "message": "Overloaded"})],
        "Overloaded",
    ),
    "a first tool index of 1": (
        "chat",
        swapped(CHAT, *((f'"tool_calls":[{{"index":{i}', f'"tool_calls":[{{"index":{i + 1}') for i in (2, 1, 0))),
        "of undefined",
    ),
    "no role": ("chat", CHAT[1:], "missing role for choice 0"),  # new on 2026-11-22
    "no finish_reason": ("chat", without(CHAT, 8), "missing finish_reason for choice 0"),
    "an error object in Chat": ("chat", [*CHAT[:4], b'data: {"error": {"message": "Boom"}}\n\n'], "Boom"),
    "another response id at the end": (
        "responses",
        [*RESPONSES[:-1], *swapped(RESPONSES[-1:], ("resp_agentic", "resp_other"))],
        "identity changed",
    ),
    "a second response.created with another id": (
        "responses",
        [*RESPONSES[:19], *swapped(RESPONSES[:1], ("resp_agentic", "resp_other")), *RESPONSES[19:]],
        "identity changed",
    ),
    "an output_index twice": (
        "responses",
        swapped(RESPONSES, ('"output_index":1', '"output_index":0')),
        "Duplicate response output index 0",
    ),
    "another item id when it is done": (
        "responses",
        [*RESPONSES[:18], *swapped(RESPONSES[18:19], ("fc_1", "fc_9")), *RESPONSES[19:]],
        "expected output item id 'fc_1'",
    ),
    "another item id in a delta": (
        "responses",
        [*RESPONSES[:15], *swapped(RESPONSES[15:16], ("fc_1", "fc_9")), *RESPONSES[16:]],
        "expected item_id 'fc_1'",
    ),
    "another item id in the final output": (
        "responses",
        with_output(lambda output: output[1].update(id="fc_9")),
        "expected output item id 'fc_1'",
    ),
    "deltas of an item that was not added": ("responses", without(RESPONSES, 14), "missing output at index 1"),
    "an item that is neither done nor in the final output": (
        "responses",
        without(with_output(lambda output: output.pop(1)), 18),
        "unfinished output items",
    ),
    "an unknown event": ("responses", [*RESPONSES[:3], sse("response.x_progress"), *RESPONSES[3:]], "Unhandled"),
    "an event ahead of response.created": ("responses", [sse("keepalive"), *RESPONSES], "expected 'response.created'"),
    "an error event in Responses": ("responses", [*RESPONSES[:4], sse("error", message="Boom", code=None)], "Boom"),
}


@pytest.mark.parametrize("name", REFUSED)
async def test_the_sdk_refuses(js: JavaScript, name: str) -> None:
    protocol, stream, message = REFUSED[name]
    with pytest.raises(Refused) as refused:
        await js.read(protocol, stream)
    assert message in refused.value.message
    assert refused.value.status is None


SAME: Final[dict[str, tuple[Format, list[bytes]]]] = {
    "pings anywhere": ("messages", [b"".join((sse("ping"), event)) for event in MESSAGES]),
    "comments in Chat": ("chat", [b": keep-alive\n\n" + event for event in CHAT]),
    "comments in Responses": ("responses", [b": keep-alive\n\n" + event for event in RESPONSES]),
    # wire.md D5 says of an earlier version that a second finish_reason loses the usage; 7.57 keeps it.
    "finish_reason twice": ("chat", [*CHAT[:8], *CHAT[8:9] * 2, *CHAT[9:]]),
    "holes between output indexes": ("responses", swapped(RESPONSES, *OUTPUT_HOLE)),
    "a second response.created with the same id": ("responses", [*RESPONSES[:19], RESPONSES[0], *RESPONSES[19:]]),
    "the same sequence numbers again": ("responses", swapped(RESPONSES, ('"sequence_number":2', '"sequence_number":1'))),
}


@pytest.mark.parametrize("name", SAME)
async def test_the_sdk_does_not_mind(js: JavaScript, name: str) -> None:
    protocol, stream = SAME[name]
    usual = {"messages": MESSAGES, "chat": CHAT, "responses": RESPONSES}[protocol]
    assert await js.read(protocol, stream) == await js.read(protocol, usual)


# What the SDK takes for whole without a word. No verdict of its own finds this: a test must look at the final object.


async def test_a_hole_between_block_indexes_loses_the_arguments(js: JavaScript) -> None:
    """The Python SDK raises an IndexError here. New on 2026-11-22."""
    whole = await js.read("messages", MESSAGES)
    holed = await js.read("messages", swapped(MESSAGES, *HOLE))
    assert [block.get("input") for block in whole["content"]] != [None, {}, {}, {}]
    assert [block.get("input") for block in holed["content"]] == [None, {}, {}, {}]


async def test_a_tool_index_used_again_glues_arguments_together(js: JavaScript) -> None:
    again = [*CHAT[:9], *CHAT[2:5], *CHAT[8:]]
    (choice,) = (await js.read("chat", again))["choices"]
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"city": "São Paulo"}' * 2


async def test_an_item_that_only_the_final_output_has_is_shown(js: JavaScript) -> None:
    """So a hidden call that is left there is not hidden. New on 2026-11-22."""
    call = {"id": "fc_x", "type": "function_call", "call_id": "call_x", "name": "x", "arguments": "{}"}
    final = await js.read("responses", with_output(lambda output: output.append(call)))
    assert [item["id"] for item in final["output"]] == ["rs_1", "fc_1", "fc_2", "ctc_1", "fc_x"]


async def test_a_responses_stream_without_its_end_is_taken_for_whole(js: JavaScript) -> None:
    final = await js.read("responses", RESPONSES[:-1])
    assert final["status"] == "in_progress"


# --- the judge itself -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("js")  # which skips where there are no judges
async def test_a_judge_that_dies_says_so() -> None:
    async with ScriptedProvider(lambda _: Reply.stream([STALL])) as provider:
        with JavaScript() as mortal:
            verdict = asyncio.ensure_future(mortal.ask("chat", provider.url))
            await provider.exchange()
            mortal._process.kill()
            with pytest.raises(RuntimeError, match="has ended"):
                await verdict


def test_what_is_missing_is_said_in_plain_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(jssdk, "node", lambda: tmp_path / "node")
    monkeypatch.setattr(jssdk, "MODULES", tmp_path)
    assert why_not(jssdk.program) == "the npm package @anthropic-ai/sdk is not installed: run `npm install` in tests/clients"
