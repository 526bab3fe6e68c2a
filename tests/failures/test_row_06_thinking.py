"""Row 6 of failures.md: thinking signatures corrupted; any difference fails.

Truth: the row; wire.md A6 (blocks are returned byte-identical, in place, in order, empty ones too), A9 (how a stream adds
up) and E (what a decode and re-encode would change). Expected bytes are written down here, not computed.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import pytest

from aibridge import Injection, MemoryHistory, MemoryRecorder, MemoryToolbox, Provider, RequestBridge
from aibridge.upstream import MemoryResponse, MemoryUpstream, UpstreamRequest
from aibridge.wire.observer import ResponseHead
from tests.serving import call, scope
from tests.support.provider import at_random, bytewise

E_ACUTE = "é".encode()  # beside the same letter as an escape

# A turn with everything that a model of our own would lose: an empty thought, a redacted one, a block that nobody knows,
# numbers and escapes in forms of their own, members in any order.
BLOCKS = [
    rb'{"type":"thinking","thinking":"","signature":"c2ln\/bmF0dXJlLW9uZQ=="}',
    rb'{"data":"cmVkYWN0ZWQ=","type":"redacted_thinking"}',
    rb'{"type":"from_the_future","amount":1e2,"big":12345678901234567890123,"nested":{"b":null,"a":[1.0,-0]}}',
    rb'{"signature":"dHdv","type":"thinking","thinking":"\u00e9 \ud83d\ude00 ~ \ud800"}',
    rb'{"type":"text","text":"So \"much\" \/ \t."}',
    rb'{"type":"tool_use","id":"toolu_01A2b3C4","name":"bmcp_memory_look","input":{"x":1.50,"\u0079":1e400,"z":[]}}',
]

# The same, as a stream that writes the strings and the arguments bit by bit.
STREAMED: list[tuple[bytes, list[bytes]]] = [
    (
        rb'{"type":"thinking","thinking":"","signature":""}',
        [rb'{"type":"signature_delta","signature":"c2ln\/bmF0dXJlLW9uZQ=="}'],
    ),
    (BLOCKS[1], []),
    (BLOCKS[2], []),
    (
        rb'{"signature":"","type":"thinking","thinking":""}',
        [
            rb'{"type":"thinking_delta","thinking":"\u00e9 \ud83d"}',
            rb'{"type":"thinking_delta","thinking":"\ude00 ~"}'.replace(b"~", E_ACUTE),
            rb'{"type":"thinking_delta","thinking":" \ud800"}',
            rb'{"type":"signature_delta","signature":"dHdv"}',
        ],
    ),
    (
        rb'{"type":"text","text":""}',
        [rb'{"type":"text_delta","text":"So \"much"}', rb'{"type":"text_delta","text":"\" \/ \t."}'],
    ),
    (
        rb'{"type":"tool_use","id":"toolu_01A2b3C4","name":"bmcp_memory_look","input":{}}',
        [
            rb'{"type":"input_json_delta","partial_json":""}',
            rb'{"type":"input_json_delta","partial_json":"{\"x\":1.50,\"\\u00"}',
            rb'{"type":"input_json_delta","partial_json":"79\":1e400,\"z\":[]}"}',
        ],
    ),
]
BLOCKS[3] = BLOCKS[3].replace(b"~", E_ACUTE)

ASKED = b'{"model":"m","max_tokens":9,"stream":%s,"messages":[{"role":"user","content":"hi"}]}'
ANSWER = rb'{"id":"msg_2","type":"message","role":"assistant","content":[],"stop_reason":"end_turn"}'


async def look(_: Mapping[str, Any]) -> str:
    return "found"


def event(kind: bytes, members: bytes) -> bytes:
    return b'event: %b\ndata: {"type":"%b"%b}\n\n' % (kind, kind, members)


def stream(blocks: list[tuple[bytes, list[bytes]]], stop: bytes) -> bytes:
    said = [event(b"message_start", b',"message":{"id":"msg_1","type":"message","role":"assistant","content":[]}')]
    for index, (block, deltas) in enumerate(blocks):
        said.append(event(b"content_block_start", b',"index":%d,"content_block":%b' % (index, block)))
        said += (event(b"content_block_delta", b',"index":%d,"delta":%b' % (index, delta)) for delta in deltas)
        said.append(event(b"content_block_stop", b',"index":%d' % index))
    said.append(event(b"message_delta", b',"delta":{"stop_reason":"%b"},"usage":{"output_tokens":1}' % stop))
    return b"".join((*said, event(b"message_stop", b"")))


async def second_request(content_type: bytes, turns: list[bytes], asked: bytes, split: Any) -> bytes:
    """What the provider gets after it has said the first turn."""

    def answer(_: UpstreamRequest) -> MemoryResponse:
        return MemoryResponse(ResponseHead(200, [(b"content-type", content_type)]), split(turns.pop(0)))

    upstream = MemoryUpstream(answer)
    injection = Injection(MemoryToolbox({"look": look}), MemoryHistory())
    async with RequestBridge([Provider.anthropic()], MemoryRecorder(), upstream=upstream, injection=injection) as bridge:
        told = await call(bridge, scope("POST", "/anthropic/v1/messages"), asked)
    assert told.status == 200 and turns == []
    body = upstream.requests[1].body
    assert isinstance(body, bytes)
    return body


TURN = b'{"role":"assistant","content":[' + b",".join(BLOCKS) + b"]}"


@pytest.mark.parametrize("split", [lambda body: [body], bytewise, partial(at_random, seed=6)])
async def test_a_streamed_turn_goes_back_as_it_was_said(split: Any) -> None:
    turns = [stream(STREAMED, b"tool_use"), stream([(rb'{"type":"text","text":"."}', [])], b"end_turn")]
    sent = await second_request(b"text/event-stream", turns, ASKED % b"true", split)
    assert TURN in sent


async def test_a_whole_turn_goes_back_as_it_was_said() -> None:
    content = b"[" + b" ,\n".join(BLOCKS) + b"]"
    body = b'{"id":"msg_1","type":"message","role":"assistant","content":%b,"stop_reason":"tool_use"}' % content
    assert TURN in await second_request(b"application/json", [body, ANSWER], ASKED % b"false", lambda body: [body])
