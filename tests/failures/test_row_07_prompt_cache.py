"""Row 7 of failures.md: prompt caches destroyed by tools and keys in another order.

Truth: the row; wire.md A5 (prefix order, at most four marks, tools at the end so that the client's mark stays where it is).
What servers and restarts do to the order is in test_injection_stable.py, conversations in test_injection_conversation.py.
"""

import json
from collections.abc import Mapping
from typing import Any

from aibridge import Injection, MemoryHistory, MemoryRecorder, MemoryToolbox, Provider, RequestBridge
from aibridge.upstream import MemoryResponse, MemoryUpstream, UpstreamRequest
from aibridge.wire.observer import ResponseHead
from tests.serving import call, scope

MARK = {"type": "ephemeral", "ttl": "1h"}
OWN = [{"name": "Bash", "input_schema": {}}, {"name": "Read", "input_schema": {}, "cache_control": MARK}]
REQUEST: dict[str, Any] = {
    "z_unknown": {"b": 1, "a": 2},
    "model": "claude",
    "tools": OWN,
    "system": [{"type": "text", "text": "Be kind.", "cache_control": MARK}],
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "one", "cache_control": MARK}]},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": [{"type": "text", "text": "three", "cache_control": MARK}]},
    ],
    "max_tokens": 9,
}


async def look(_: Mapping[str, Any]) -> str:
    return "found"


def answer(_: UpstreamRequest) -> MemoryResponse:
    body = b'{"id":"msg_1","type":"message","role":"assistant","content":[],"stop_reason":"end_turn"}'
    return MemoryResponse(ResponseHead(200, [(b"content-type", b"application/json")]), [body])


async def sent(*names: str) -> bytes:
    upstream = MemoryUpstream(answer)
    injection = Injection(MemoryToolbox(dict.fromkeys(names, look)), MemoryHistory())
    async with RequestBridge([Provider.anthropic()], MemoryRecorder(), upstream=upstream, injection=injection) as bridge:
        await call(bridge, scope("POST", "/anthropic/v1/messages"), json.dumps(REQUEST).encode())
    body = upstream.requests[0].body
    assert isinstance(body, bytes)
    return body


async def test_the_order_in_which_tools_are_known_changes_nothing() -> None:
    assert await sent("b", "a", "c") == await sent("c", "b", "a")


async def test_all_that_the_client_sent_stays_where_it_was() -> None:
    body = await sent("b", "a")
    before, own, after = json.dumps(REQUEST).encode().partition(json.dumps(OWN).encode())
    assert body.startswith(before + own.removesuffix(b"]") + b", ")
    assert body.endswith(b"]" + after)
    names = [tool["name"] for tool in json.loads(body)["tools"]]
    assert names == ["Bash", "Read", "bmcp_memory_a", "bmcp_memory_b"]


async def test_no_mark_is_added_or_moved() -> None:
    assert (await sent("b", "a")).count(b"cache_control") == json.dumps(REQUEST).count("cache_control") == 4
