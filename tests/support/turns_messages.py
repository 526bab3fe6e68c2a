"""Turns of Anthropic Messages: what a provider says in them, who merges them, and a client that knows only what it sees.

The streams are as wire.md A9 has them. `Gateway` is the engine's loop without the engine: a client's request, the provider's
replies, the calls between them. `Client` replays what the official SDK accumulated, and nothing else.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from typing import Any, Final

import anthropic
import httpx2

from aibridge.tools import Call, Outcome, Text, Tool, Toolset
from aibridge.wire import MESSAGES
from aibridge.wire.splicing import member_span
from aibridge.wire.sse import SseDecoder
from aibridge.wire.turns import Answered, Memory, Restored, TurnMerger, UsagePolicy

from .facts import Json

TURNS: Final = MESSAGES.turns


def tool(name: str = "bmcp_time_now", schema: str = '{"type":"object"}') -> Tool:
    return Tool(name, f"What {name} does", schema, "time", name.rpartition("_")[2], "memory:time")


TOOLSET: Final = Toolset([tool(), tool("bmcp_time_zone")])
NOW: Final = "bmcp_time_now"
ZONE: Final = "bmcp_time_zone"

PING: Final = b'event: ping\ndata: {"type": "ping"}\n\n'


# --- the provider -----------------------------------------------------------------------------------------------------


def compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def event(kind: str, **members: Any) -> bytes:
    return f"event: {kind}\ndata: {compact({'type': kind, **members})}\n\n".encode()


@dataclass(frozen=True)
class Said:
    """A block: how a stream brings it, and how a body has it, as JSON text."""

    start: Json
    deltas: Sequence[Json]
    whole: str

    def events(self, index: int) -> bytes:
        deltas = (event("content_block_delta", index=index, delta=delta) for delta in self.deltas)
        start = event("content_block_start", index=index, content_block=self.start)
        return b"".join([start, *deltas, event("content_block_stop", index=index)])


def _pieces(value: str, size: int) -> list[str]:
    return [value[start : start + size] for start in range(0, len(value), size)]


def says(words: str, size: int = 5) -> Said:
    deltas = [{"type": "text_delta", "text": piece} for piece in _pieces(words, size)]
    block = {"type": "text", "text": words}
    return Said({"type": "text", "text": ""}, deltas, compact(block))


def thinks(signature: str, words: str = "Hm.", size: int = 5) -> Said:
    """``thinking`` may be empty, and the signature comes as a whole (wire.md A3, A9)."""
    deltas = [{"type": "thinking_delta", "thinking": piece} for piece in _pieces(words, size)]
    signed = {"type": "signature_delta", "signature": signature}
    block = {"type": "thinking", "thinking": words, "signature": signature}
    return Said({"type": "thinking", "thinking": "", "signature": ""}, [*deltas, signed], compact(block))


def calls(id: str, name: str, arguments: str = "{}", size: int = 5) -> Said:
    """The arguments are JSON text. The first piece of them is empty (wire.md A9)."""
    deltas = [{"type": "input_json_delta", "partial_json": piece} for piece in ["", *_pieces(arguments, size)]]
    start: Json = {"type": "tool_use", "id": id, "name": name, "input": {}}
    return Said(start, deltas, compact(start).replace('"input":{}', f'"input":{arguments}'))


def usage(number: int) -> Json:
    """Figures of which it can be seen from where they are."""
    return {"input_tokens": 100 * number, "cache_read_input_tokens": 10 * number, "output_tokens": number}


@dataclass(frozen=True)
class Reply:
    """A response of the provider. ``number`` tells it from others: in its id, its model and its usage."""

    blocks: Sequence[Said]
    stop_reason: str = "end_turn"
    number: int = 1

    @property
    def stream(self) -> bytes:
        return b"".join([*self.opening, self.ending])

    @property
    def opening(self) -> list[bytes]:
        begun = {**usage(self.number), "output_tokens": 0, "service_tier": "standard"}
        message: Json = {
            "id": f"msg_{self.number}",
            "type": "message",
            "role": "assistant",
            "model": f"claude-{self.number}",
        }
        start = {**message, "content": [], "stop_reason": None, "stop_sequence": None, "usage": begun}
        blocks = [block.events(index) for index, block in enumerate(self.blocks)]
        return [event("message_start", message=start), PING, *blocks]

    @property
    def ending(self) -> bytes:
        delta = {"stop_reason": self.stop_reason, "stop_sequence": None}
        counts = {"output_tokens": self.number}
        return event("message_delta", delta=delta, usage=counts) + event("message_stop")

    @property
    def body(self) -> bytes:
        """Odd spacing, which nobody has to change."""
        content = " ,".join(block.whole for block in self.blocks)
        return (
            f'{{"id" : "msg_{self.number}", "type":"message","role":"assistant","model":"claude-{self.number}",'
            f'"content":[{content}],"stop_reason":"{self.stop_reason}","stop_sequence":null,'
            f'"usage":{compact(usage(self.number))}}}'
        ).encode()


ERROR: Final = event("error", error={"type": "overloaded_error", "message": "Overloaded"})


# --- merging ----------------------------------------------------------------------------------------------------------

Split = Callable[[bytes], Iterable[bytes]]


def whole(stream: bytes) -> list[bytes]:
    return [stream]


def feed(merger: TurnMerger, stream: bytes, split: Split = whole) -> bytes:
    """One response of the provider through the merger: what the client sees until its end."""
    merger.begin()
    decoder = SseDecoder()
    return b"".join(merger.read_event(frame) for chunk in split(stream) for frame in decoder.feed(chunk))


def merger(toolset: Toolset = TOOLSET, policy: UsagePolicy = "sum") -> TurnMerger:
    return TURNS.merger(b"{}", toolset, policy)


def merged(*streams: bytes, split: Split = whole, policy: UsagePolicy = "sum") -> bytes:
    """All that the client gets of several responses."""
    merging = merger(policy=policy)
    return b"".join(feed(merging, stream, split) for stream in streams) + merging.finish()


# --- the official SDK -------------------------------------------------------------------------------------------------


class _Canned(httpx2.BaseTransport):
    def __init__(self) -> None:
        self.response = httpx2.Response(500)

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        return self.response


_CANNED: Final = _Canned()


@cache
def _sdk() -> anthropic.Anthropic:
    http_client = anthropic.DefaultHttpxClient(transport=_CANNED)
    return anthropic.Anthropic(api_key="k", base_url="http://127.0.0.1", max_retries=0, http_client=http_client)


def accumulated(stream: bytes) -> anthropic.types.Message:
    """What the SDK's stream helper makes of a stream. Raises what it raises."""
    _CANNED.response = httpx2.Response(200, headers={"content-type": "text/event-stream"}, content=stream)
    with _sdk().messages.stream(model="m", max_tokens=1, messages=[]) as events:
        return events.get_final_message()


def parsed(body: bytes) -> anthropic.types.Message:
    """What the SDK makes of a body."""
    _CANNED.response = httpx2.Response(200, headers={"content-type": "application/json"}, content=body)
    return _sdk().messages.create(model="m", max_tokens=1, messages=[])


# --- the engine, without it -------------------------------------------------------------------------------------------


def outcome_of(call: Call) -> Outcome:
    return Outcome.failed(call.refusal) if call.refusal else Outcome((Text(f"What {call.id} said to {call.arguments}"),))


@dataclass
class Gateway:
    """What the engine does with a format's turns, for replies that are given. ``sent`` are the requests to the provider."""

    stream: bool = True
    sent: list[bytes] = field(default_factory=list)
    memories: dict[str, Memory] = field(default_factory=dict)
    restored: list[Restored] = field(default_factory=list)

    def ask(self, body: bytes, *replies: Reply, cut: bool = False) -> bytes:
        """What the client gets. ``cut``: the last reply breaks off before its end."""
        draft = TURNS.read(body)
        assert draft.objection is None
        self.restored.append(draft.restored({key: self.memories[key] for key in draft.keys if key in self.memories}))
        body = TURNS.with_tools(self.restored[-1].body, TOOLSET)
        merging = TURNS.merger(body, TOOLSET, "sum")
        shown = b""
        ended: list[Answered] = []
        for number, reply in enumerate(replies, 1):
            self.sent.append(body)
            if cut and number == len(replies):
                shown += feed(merging, b"".join(reply.opening)) + merging.error_event(502, "It broke off.")
                self._remember(TURNS.memory(draft, TOOLSET, ended))
                return shown
            if self.stream:
                shown += feed(merging, reply.stream)
            else:
                merging.begin()
                merging.read_body(reply.body)
            turn = merging.turn()
            ended.append(Answered(turn, tuple(map(outcome_of, turn.calls))))
            if number < len(replies):
                assert turn.calls and not turn.awaits_client
                body = TURNS.with_turn(body, ended[-1], last=False)
        self._remember(TURNS.memory(draft, TOOLSET, ended))
        return shown + merging.finish()

    def _remember(self, memory: Memory) -> None:
        self.memories |= dict.fromkeys(memory.keys, memory)


MARK: Final = {"type": "ephemeral"}


@dataclass
class Client:
    """A client that replays what the SDK gave it, and moves its cache mark to the newest message, as clients do."""

    gateway: Gateway
    separators: tuple[str, str] = (",", ":")
    marks: bool = True
    rewrite: Callable[[list[Json]], list[Json]] = lambda content: content
    messages: list[Json] = field(default_factory=list)

    def body(self) -> bytes:
        messages = [dict(message) for message in self.messages]
        if self.marks:
            *rest, last = messages[-1]["content"]
            messages[-1]["content"] = [*rest, {**last, "cache_control": MARK}]
        asked = {"model": "m", "max_tokens": 9, "tools": [{"name": "Read"}], "messages": messages}
        return json.dumps(asked, separators=self.separators).encode()

    def say(self, content: str | list[Json], *replies: Reply) -> list[Json]:
        """Say something, get the answer and take it into the conversation."""
        blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
        self.messages.append({"role": "user", "content": blocks})
        answer = self.gateway.ask(self.body(), *replies)
        message = accumulated(answer) if self.gateway.stream else parsed(answer)
        said = [block.to_dict() for block in message.content]
        self.messages.append({"role": "assistant", "content": self.rewrite(said)})
        return said


def conversation(body: bytes) -> bytes:
    """The messages of a request without cache marks, and without what closes their array."""
    span = member_span(body, "messages")
    assert span is not None
    return re.sub(rb',\s*"cache_control":\s*\{[^}]*\}', b"", body[slice(*span)]).rstrip(b"]")


def extend_each_other(bodies: Sequence[bytes]) -> None:
    """The acceptance test of hidden turns: no request changes what the one before it said (wire.md A6)."""
    for before, after in pairwise(bodies):
        assert conversation(after).startswith(conversation(before)), (conversation(before), conversation(after))


def contents(body: bytes) -> list[tuple[str, Any]]:
    """The messages of a request: role, and the types and words of its blocks."""
    told: list[tuple[str, Any]] = []
    for message in json.loads(body)["messages"]:
        content = message["content"]
        told.append((message["role"], content if isinstance(content, str) else [_told(block) for block in content]))
    return told


def _told(block: Mapping[str, Any]) -> str:
    value = block.get("signature") or block.get("text") or block.get("id") or block.get("tool_use_id") or ""
    return f"{block['type']} {value}".strip()


# --- requests, by hand -------------------------------------------------------------------------------------------------


def asked(*messages: Any, **members: Any) -> bytes:
    return compact({"model": "m", "messages": list(messages), **members}).encode()


def user(*content: Any) -> Json:
    return {"role": "user", "content": list(content)}


def assistant(*content: Any) -> Json:
    return {"role": "assistant", "content": list(content)}


def text(words: str) -> Json:
    return {"type": "text", "text": words}


def thought(signature: str) -> Json:
    return {"type": "thinking", "thinking": "Hm.", "signature": signature}


def call(id: str, name: str = "Read") -> Json:
    return {"type": "tool_use", "id": id, "name": name, "input": {}}


def result(id: str, words: str = "theirs") -> Json:
    return {"type": "tool_result", "tool_use_id": id, "content": words}


QUESTION: Final = user(text("What time is it?"))

NEXT: Final = user(text("And now?"))
