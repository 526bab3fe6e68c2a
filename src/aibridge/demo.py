"""``aibridge demo``: the whole gateway, with a provider from memory, so that it can be seen without a key.

The server, the client's HTTP and the ledger are the real ones; only the provider's answers are scripted.
"""

import json
import sqlite3
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any, Final

from aibridge.config import Settings
from aibridge.httpclient import HttpUpstream
from aibridge.httpserver import bound
from aibridge.server import Server, http_server
from aibridge.settings import DatabaseSettings, ServerSettings
from aibridge.upstream import MemoryResponse, MemoryUpstream, UpstreamRequest
from aibridge.wire.observer import ResponseHead
from aibridge.wire.sse import SseDecoder

_QUESTION: Final = "What should I wear in Lisbon today?"
_MODEL: Final = "claude-demo"
_WEATHER: Final = "18 degrees, windy"

_TABLES: Final = {
    "interceptions": "SELECT initiator_id, provider, model, client, client_session_id AS session, status,"
    " http_status AS http, correlating_tool_call_id AS continues FROM aibridge_interceptions ORDER BY id",
    "token usages": "SELECT provider_response_id AS response, input_tokens AS input, output_tokens AS output,"
    " cache_read_input_tokens AS cache_read, cache_write_input_tokens AS cache_write, completeness"
    " FROM aibridge_token_usages ORDER BY id",
    "prompts": "SELECT provider_response_id AS response, prompt FROM aibridge_user_prompts ORDER BY id",
    "tool usages": "SELECT tool_call_id, tool, input, injected FROM aibridge_tool_usages ORDER BY id",
    "thoughts": "SELECT content, json_extract(metadata, '$.source') AS source FROM aibridge_model_thoughts ORDER BY id",
}


async def play(database: Path | None = None) -> list[str]:
    """Play the conversation and answer with what there is to see, line by line. `database`: where the ledger is kept."""
    with tempfile.TemporaryDirectory() as folder:
        path = (database or Path(folder) / "demo.db").absolute()
        lines = []
        async with _gateway(path) as url:
            lines += [f"The gateway runs at {url}, its provider is a script.", "", f"user       {_QUESTION}"]
            messages: list[Any] = [{"role": "user", "content": _QUESTION}]
            turn = await _turn(url, messages)
            lines += [f"{kind:<10} {text}" for kind, text in _spoken(turn)]
            result = {"type": "tool_result", "tool_use_id": turn[-1]["id"], "content": _WEATHER}
            messages += [{"role": "assistant", "content": turn}, {"role": "user", "content": [result]}]
            lines.append(f"{'result':<10} {_WEATHER}")
            lines += [f"{kind:<10} {text}" for kind, text in _spoken(await _turn(url, messages))]
        lines += ["", "What the ledger says about it:"]
        with closing(sqlite3.connect(path)) as ledger:
            for title, query in _TABLES.items():
                lines += ["", title, *_table(ledger.execute(query))]
    return lines


_CLIENT: Final = [
    (b"content-type", b"application/json"),
    (b"user-agent", b"claude-cli/2.1.330 (demo)"),
    (b"x-claude-code-session-id", b"demo-session"),
]


@asynccontextmanager
async def _gateway(database: Path) -> AsyncIterator[str]:
    """The server on a free port of loopback, in this event loop."""
    settings = Settings(server=ServerSettings(port=0), database=DatabaseSettings(url=f"sqlite:///{database}"))
    (listener,) = bound("127.0.0.1", 0)
    async with Server(settings, upstream=MemoryUpstream(_provider)) as server:
        http = http_server(server, settings, server.kind_of, server.refused)
        await http.start([listener])
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            await http.stop(settings.server.shutdown_grace)


async def _turn(url: str, messages: list[Any]) -> list[dict[str, Any]]:
    """One request of a client that streams: the content blocks of the answer."""
    body = {"model": _MODEL, "max_tokens": 1000, "stream": True, "messages": messages}
    client, decoder, blocks = HttpUpstream(), SseDecoder(), list[dict[str, Any]]()
    response = await client.send(UpstreamRequest("POST", f"{url}/anthropic/v1/messages", _CLIENT, json.dumps(body).encode()))
    while chunk := await response.read():
        for frame in decoder.feed(chunk):
            event = json.loads(frame.data or b"{}")
            if event.get("type") == "content_block_start":
                blocks.append(event["content_block"])
            elif event.get("type") == "content_block_delta":
                _apply(blocks[-1], event["delta"])
    await client.aclose()
    return blocks


def _apply(block: dict[str, Any], delta: Mapping[str, Any]) -> None:
    match delta["type"]:
        case "input_json_delta":
            block["input"] = json.loads(delta["partial_json"])
        case "signature_delta":
            block["signature"] = delta["signature"]
        case "text_delta" | "thinking_delta" as kind:
            name = kind.removesuffix("_delta")
            block[name] += delta[name]


def _spoken(blocks: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    for block in blocks:
        match block["type"]:
            case "thinking":
                yield "thinking", block["thinking"]
            case "tool_use":
                yield "tool call", f"{block['name']} {json.dumps(block['input'])}"
            case "text":
                yield "assistant", block["text"]


def _provider(request: UpstreamRequest) -> MemoryResponse:
    """The scripted provider: first it thinks and calls a tool, after the tool's result it answers."""
    assert isinstance(request.body, bytes)  # noqa: S101  intercepted requests are sent whole
    if b"tool_result" in request.body:
        events = _message(
            "msg_demo_2",
            {"input_tokens": 12, "cache_read_input_tokens": 310, "output_tokens": 21},
            [({"type": "text", "text": ""}, {"type": "text_delta", "text": "Something against the wind, nothing warm."})],
            "end_turn",
        )
    else:
        thought = {"type": "thinking_delta", "thinking": "That depends on the weather. I should look it up."}
        arguments = {"type": "input_json_delta", "partial_json": '{"city": "Lisbon"}'}
        events = _message(
            "msg_demo_1",
            {"input_tokens": 40, "cache_creation_input_tokens": 270, "output_tokens": 58},
            [
                ({"type": "thinking", "thinking": "", "signature": ""}, thought),
                ({"type": "tool_use", "id": "toolu_demo", "name": "get_weather", "input": {}}, arguments),
            ],
            "tool_use",
        )
    head = ResponseHead(200, [(b"content-type", b"text/event-stream"), (b"request-id", b"req_demo")])
    return MemoryResponse(head, map(_encoded, events))


def _message(
    identity: str, usage: dict[str, int], blocks: list[tuple[dict[str, Any], dict[str, Any]]], stop_reason: str
) -> Iterator[dict[str, Any]]:
    """The events of a Messages stream (wire.md A9)."""
    message = {"id": identity, "type": "message", "role": "assistant", "model": _MODEL, "content": []}
    yield {"type": "message_start", "message": message | {"usage": usage | {"output_tokens": 1}}}
    for index, (block, delta) in enumerate(blocks):
        yield {"type": "content_block_start", "index": index, "content_block": block}
        yield {"type": "content_block_delta", "index": index, "delta": delta}
        yield {"type": "content_block_stop", "index": index}
    yield {"type": "message_delta", "delta": {"stop_reason": stop_reason}, "usage": usage}
    yield {"type": "message_stop"}


def _encoded(event: dict[str, Any]) -> bytes:
    return f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode()


def _table(cursor: sqlite3.Cursor) -> Iterator[str]:
    """The rows of a query in columns, NULL as a dash."""
    names = [column[0] for column in cursor.description]
    rows = [["-" if value is None else str(value) for value in row] for row in cursor]
    widths = [max(map(len, column)) for column in zip(names, *rows, strict=True)]
    for row in (names, ["-" * width for width in widths], *rows):
        yield "  " + "  ".join(value.ljust(width) for value, width in zip(row, widths, strict=True)).rstrip()
