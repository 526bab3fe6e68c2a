"""Row 18 of failures.md: a stream cut upstream must not look like success.

Truth: the row; wire.md rule 7 and A9, B2, C3 for the events that say so; clients.md 4 for what clients make of a clean end
without them (the Python SDKs take it for success). The judges are the official SDKs: each must raise.
"""

import json
import zlib
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from typing import Any

import anthropic
import openai
import pytest

from tests.support.gateway import Rows, Scene
from tests.support.provider import CUT, RESET, Cut, Reply, Step
from tests.support.rawclient import Answer
from tests.support.recording import NOTHING_YET, Recording, UsageRow, usage
from tests.support.sdks import anthropic_client, openai_client
from tests.support.streams import events, target
from tests.support.traffic import ALL, named

TEXT = ["messages-text-stream", "chat-text-stream", "responses-text-stream"]
BLOCKING = ["messages-text-blocking", "chat-text-blocking", "responses-text-blocking"]

HOW: dict[str, Cut | None] = {"closed": CUT, "reset": RESET, "ended": None}
"""How the provider's connection ends. ``ended``: cleanly, on HTTP's level, as if nothing were missing."""

QUESTION: Any = [{"role": "user", "content": "Say hello"}]


def cut_short(recording: Recording, seen: bytes, how: str) -> Reply:
    cut = HOW[how]
    steps: list[Step] = [seen] if cut is None else [seen, cut]
    return replace(recording.reply(), body=[step for step in steps if step])


def all_prefixes(name: str) -> list[int]:
    """Lengths of what has come before a cut: nothing, whole events, and events and a half."""
    lengths = [0]
    for piece in events(named(name).response)[:-1]:
        lengths += [lengths[-1] + 10, lengths[-1] + len(piece) // 2, lengths[-1] + len(piece)]
    return lengths


def known(recording: Recording, seen: bytes) -> tuple[UsageRow, ...]:
    """The figures that have come by then. Anthropic's totals come twice, the others' at the end."""
    whole = b"".join(event for event in events(recording.response) if event in seen)
    if recording.format == "messages" and b"message_delta" in whole:
        return usage(25, 15, 0, 0, "partial")
    if recording.format == "messages" and b"message_start" in whole:
        return usage(25, 1, 0, 0, "partial")
    if recording.format == "chat" and b'"usage":{' in whole:
        return usage(19, 10, 0, None, "partial")
    return NOTHING_YET


def check_rows(rows: Rows, expected: tuple[UsageRow, ...]) -> None:
    row = rows.interception
    assert (row["status"], row["http_status"]) == ("failed", 200)
    assert row["error"]
    (counters,) = expected
    assert {name: rows.token_usage[name] for name in counters} == counters


def check_said(recording: Recording, seen: bytes, answer: Answer) -> None:
    """One event more, whole and by itself; then the response ends as its framing promised, for nobody to retry blindly."""
    assert answer.complete
    assert answer.body.startswith(seen)
    *_, last = events(answer.body)
    assert answer.body[len(seen) :].lstrip(b"\n") == last
    fields = dict(line.split(b": ", 1) for line in last.strip().split(b"\n"))
    data = json.loads(fields[b"data"])
    match recording.format:
        case "messages":
            assert fields[b"event"] == b"error"
            assert (data["type"], data["error"]["type"]) == ("error", "api_error")
        case "chat":
            assert data["error"]["message"]
        case "responses":
            assert data["type"] == fields[b"event"].decode()
            assert isinstance(data["sequence_number"], int)
            if len(seen) < len(events(recording.response)[0]):  # there is no response yet that could be called failed
                assert (data["type"], bool(data["message"])) == ("error", True)
                return
            assert data["type"] == "response.failed"
            assert data["response"]["status"] == "failed"
            assert data["response"]["error"]["message"]


def may_end(name: str, at: int) -> bool:
    """A Chat stream may end cleanly when its choices have finished: [DONE] is optional (wire.md B2)."""
    return name.startswith("chat") and b'"finish_reason":"stop"' in named(name).response[:at]


CUTS = [
    (name, at, how) for name in TEXT for at in all_prefixes(name) for how in HOW if how != "ended" or not may_end(name, at)
]


@pytest.mark.parametrize(("name", "at", "how"), CUTS)
async def test_a_cut_anywhere_is_said_in_band(name: str, at: int, how: str, scene: Scene) -> None:
    recording = named(name)
    seen = recording.response[:at]
    scene.reply(cut_short(recording, seen, how))
    answer = await scene.post(target(recording), recording.request)
    check_rows(scene.ledger(), known(recording, seen))
    check_said(recording, seen, answer)
    assert len(scene.requests) == 1


async def test_the_providers_numbers_go_on(scene: Scene) -> None:
    """Our event is numbered after the last that came, and speaks of the same response (wire.md C3)."""
    recording = named("responses-text-stream")
    seen = events(recording.response)[:4]
    scene.reply(cut_short(recording, b"".join(seen), "closed"))
    answer = await scene.post(target(recording), recording.request)
    numbered = [json.loads(event.split(b"data: ", 1)[1]) for event in events(answer.body)]
    assert [data["sequence_number"] for data in numbered] == list(range(5))
    assert numbered[-1]["response"]["id"] == numbered[0]["response"]["id"]


CUT_RECORDINGS = [recording for recording in ALL if recording.streams and recording.cut]


@pytest.mark.parametrize("recording", CUT_RECORDINGS, ids=str)
async def test_what_was_whole_by_then_is_recorded(recording: Recording, scene: Scene) -> None:
    scene.reply(recording.reply())
    await scene.post(target(recording), recording.request)
    rows = scene.ledger()
    check_rows(rows, tuple(recording.expect.usage))
    if "tool_calls" not in recording.expect.undecided:
        assert [row["tool"] for row in rows.tool_usages] == [call["tool"] for call in recording.expect.tool_calls]


# --- where nothing can be added ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["closed", "reset"])
@pytest.mark.parametrize("framing", ["length", "chunked"])
@pytest.mark.parametrize("name", BLOCKING)
async def test_a_blocking_body_breaks_off_for_the_client_too(name: str, framing: str, how: str, scene: Scene) -> None:
    recording = named(name)
    half = len(recording.response) // 2
    cut = HOW[how]
    assert cut is not None
    steps: list[Step] = [recording.response[:half], cut, recording.response[half:]]
    headers = recording.reply().headers
    scene.reply(Reply(200, headers, steps, "length") if framing == "length" else Reply(200, headers, steps))
    answer = await scene.post(target(recording), recording.request)
    assert (answer.body, answer.complete) == (recording.response[:half], False)
    check_rows(scene.ledger(), NOTHING_YET)


async def test_a_compressed_stream_breaks_off_for_the_client_too(scene: Scene) -> None:
    """No event of ours can stand in the provider's compressed stream."""
    recording = named("messages-text-stream")
    coder = zlib.compressobj(wbits=31)
    begun = coder.compress(events(recording.response)[0]) + coder.flush(zlib.Z_SYNC_FLUSH)
    scene.reply(Reply(200, [*recording.reply().headers, ("Content-Encoding", "gzip")], [begun, CUT]))
    answer = await scene.post(target(recording), recording.request)
    assert (answer.body, answer.complete) == (begun, False)
    check_rows(scene.ledger(), usage(25, 1, 0, 0, "partial"))


async def test_a_stream_of_declared_length_breaks_off_for_the_client_too(scene: Scene) -> None:
    recording = named("messages-text-stream")
    first, *rest = events(recording.response)
    scene.reply(Reply(200, recording.reply().headers, [first, CUT, *rest], "length"))
    answer = await scene.post(target(recording), recording.request)
    assert (answer.body, answer.complete) == (first, False)
    check_rows(scene.ledger(), usage(25, 1, 0, 0, "partial"))


# --- the judges -------------------------------------------------------------------------------------------------------


def between_events(name: str) -> list[int]:
    """Before anything, after one event, and before the last."""
    pieces = events(named(name).response)
    return [0, len(pieces[0]), len(b"".join(pieces[:-1]))]


def inside_an_event(name: str) -> list[int]:
    """In the beginning of an event, and in the middle of its data: no client can read the rest of that one."""
    pieces = events(named(name).response)
    return [len(pieces[0]) + 10, len(pieces[0]) + len(pieces[1]) - 30]


async def read_messages(scene: Scene, helper: bool) -> None:
    ask: Any = {"model": "claude-opus-5-5", "max_tokens": 64, "messages": QUESTION}
    async with anthropic_client(scene) as client:
        if helper:
            async with client.messages.stream(**ask) as stream:
                await stream.get_final_message()
        else:
            async for _ in await client.messages.create(**ask, stream=True):
                pass


async def read_chat(scene: Scene, helper: bool, asks: bool = True) -> None:
    ask: Any = {"model": "gpt-5.4", "messages": QUESTION}
    if asks:
        ask["stream_options"] = {"include_usage": True}
    async with openai_client(scene) as client:
        if helper:
            async with client.chat.completions.stream(**ask) as stream:
                await stream.get_final_completion()
        else:
            async for _ in await client.chat.completions.create(**ask, stream=True):
                pass


async def read_responses(scene: Scene) -> None:
    async with openai_client(scene) as client, client.responses.stream(model="gpt-5.4-codex", input="Hi") as stream:
        await stream.get_final_response()


@pytest.mark.parametrize("helper", [True, False], ids=["stream()", "create()"])
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("at", between_events("messages-text-stream"))
async def test_the_anthropic_sdk_raises(at: int, how: str, helper: bool, scene: Scene) -> None:
    recording = named("messages-text-stream")
    scene.reply(cut_short(recording, recording.response[:at], how))
    with pytest.raises(anthropic.APIStatusError):
        await read_messages(scene, helper)
    assert scene.ledger().interception["status"] == "failed"


@pytest.mark.parametrize("asks", [True, False], ids=["asks for usage", "does not"])
@pytest.mark.parametrize("helper", [True, False], ids=["stream()", "create()"])
@pytest.mark.parametrize(
    ("at", "how"), [(at, how) for name, at, how in CUTS if at in between_events(TEXT[1]) and name == TEXT[1]]
)
async def test_the_openai_sdk_raises_for_chat(at: int, how: str, helper: bool, asks: bool, scene: Scene) -> None:
    recording = named("chat-text-stream")
    scene.reply(cut_short(recording, recording.response[:at], how))
    with pytest.raises(openai.APIError):
        await read_chat(scene, helper, asks)
    assert scene.ledger().interception["status"] == "failed"


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("at", between_events("responses-text-stream"))
async def test_the_openai_sdk_raises_for_responses(at: int, how: str, scene: Scene) -> None:
    """Its helper raises; without the helper the last event says it, for that is how this protocol reports a failure."""
    recording = named("responses-text-stream")
    scene.reply(*[cut_short(recording, recording.response[:at], how)] * 2)
    with pytest.raises((openai.APIError, RuntimeError)):
        await read_responses(scene)
    async with openai_client(scene) as client:
        stream = await client.responses.create(model="gpt-5.4-codex", input="Hi", stream=True)
        kinds = [event.type async for event in stream]
    assert kinds[-1] == ("response.failed" if at else "error")
    assert [row["status"] for row in scene.ledger().interceptions] == ["failed", "failed"]


HALVES = [(name, at) for name in TEXT for at in inside_an_event(name)]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize(("name", "at"), HALVES)
async def test_the_sdks_raise_inside_an_event(name: str, at: int, how: str, scene: Scene) -> None:
    """With whatever they raise at half an event: it cannot be taken back, and some stumble over it before our own."""
    recording = named(name)
    scene.reply(cut_short(recording, recording.response[:at], how))
    readers = {"messages": partial(read_messages, helper=True), "chat": partial(read_chat, helper=True)}
    read = readers.get(recording.format, read_responses)
    with pytest.raises((anthropic.APIError, openai.APIError, RuntimeError, json.JSONDecodeError)):
        await read(scene)
    assert scene.ledger().interception["status"] == "failed"


@pytest.mark.parametrize("name", BLOCKING)
async def test_the_sdks_raise_for_a_blocking_body(name: str, scene: Scene) -> None:
    recording = named(name)
    half = len(recording.response) // 2
    headers = recording.reply().headers
    scene.reply(Reply(200, headers, [recording.response[:half], CUT, recording.response[half:]], "length"))
    async with anthropic_client(scene) as claude, openai_client(scene) as client:
        calls: dict[str, Callable[[], Awaitable[object]]] = {
            "messages": lambda: claude.messages.create(model="claude-opus-5-5", max_tokens=64, messages=QUESTION),
            "chat": lambda: client.chat.completions.create(model="gpt-5.4", messages=QUESTION),
            "responses": lambda: client.responses.create(model="gpt-5.4", input="Say hello"),
        }
        with pytest.raises((anthropic.APIConnectionError, openai.APIConnectionError)):
            await calls[recording.format]()
    assert scene.ledger().interception["status"] == "failed"
