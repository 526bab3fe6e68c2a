"""The inner loop of the Responses protocol without an engine: a scripted provider, a bridge, and the official SDK as client.

The provider's streams have the form that wire.md C3 describes. The bridge does what `aibridge.wire.turns` says an engine
does, and no more.
"""

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Final, Literal

import httpx2
import openai
from openai.types.responses import Response

from aibridge.tools import Call, Outcome, Text, Tool, Toolset
from aibridge.wire.responses_turns import ResponsesTurns
from aibridge.wire.sse import SseDecoder
from aibridge.wire.turns import Answered, Memory, Piece, Restored, Turn, UsagePolicy

Json = dict[str, Any]
Split = Callable[[bytes], Iterator[bytes]]

TURNS: Final = ResponsesTurns()


def tool(name: str, schema: str = '{"type": "object", "x": 1e2}') -> Tool:
    return Tool(f"bmcp_s_{name}", f"Does {name}", schema, "s", name, "memory:s")


TOOLSET: Final = Toolset([tool("add"), tool("now")])
OURS: Final = [
    {
        "type": "function",
        "name": one.name,
        "description": one.description,
        "parameters": {"type": "object", "x": 1e2},
        "strict": False,
    }
    for one in TOOLSET.tools
]


# --- items ------------------------------------------------------------------------------------------------------------


def message(item_id: str, words: str, **more: Any) -> Json:
    part = {"type": "output_text", "text": words, "annotations": [], "logprobs": []}
    return {"id": item_id, "type": "message", "status": "completed", "role": "assistant", "content": [part], **more}


def reasoning(item_id: str, words: str = "Hm.") -> Json:
    summary = [{"type": "summary_text", "text": words}] if words else []
    return {"id": item_id, "type": "reasoning", "summary": summary, "encrypted_content": f"gAAAA{item_id}=="}


def call(item_id: str, name: str, arguments: str = '{"a": 1e2}', **more: Any) -> Json:
    made = {"id": item_id, "type": "function_call", "status": "completed", "arguments": arguments}
    return {**made, "call_id": f"call_{item_id}", "name": name, **more}


def ours(item_id: str, name: str = "add", arguments: str = '{"a": 1e2}', **more: Any) -> Json:
    return call(item_id, f"bmcp_s_{name}", arguments, **more)


def user(words: str) -> Json:
    return {"role": "user", "content": words}


def result(call_id: str, words: str = "done") -> Json:
    return {"type": "function_call_output", "call_id": call_id, "output": words}


def body(*given: Json, **members: Any) -> bytes:
    """A request as a client sends it whose history is its own."""
    return compact({"model": "m", "input": list(given), "store": False, **members})


# --- the provider -----------------------------------------------------------------------------------------------------


def compact(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def usage(count: int) -> Json:
    details = {"cached_tokens": count, "cache_write_tokens": 0}
    return {
        "input_tokens": 10 * count,
        "input_tokens_details": details,
        "output_tokens": count,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 11 * count,
    }


@dataclass
class Reply:
    """One upstream response."""

    id: str
    items: list[Json]
    status: Literal["completed", "incomplete", "failed", "error", "cut"] = "completed"
    previous: str | None = None
    tools: list[Json] = field(default_factory=lambda: [{"type": "web_search"}, *OURS])
    output: bool | None = True  # None: absent, False: empty

    def response(self, status: str | None = None) -> Json:
        """The response object as it is when the response has ended, or `status`."""
        ended = status is None
        state = status or self.status
        response: Json = {
            "id": self.id,
            "object": "response",
            "created_at": 1795219200 + len(self.id),
            "status": state,
            "error": {"code": "server_error", "message": "Oh no"} if state == "failed" else None,
            "incomplete_details": {"reason": "max_output_tokens"} if state == "incomplete" else None,
            "model": f"m-{self.id}",
            "output": self.items if ended and self.output else [],
            "parallel_tool_calls": True,
            "previous_response_id": self.previous,
            "tool_choice": "auto",
            "tools": self.tools,
            "usage": usage(len(self.items)) if ended else None,
            "temperature": 1.0,
        }
        if ended and self.output is None:
            del response["output"]
        return response

    def body(self) -> bytes:
        return json.dumps(self.response(), indent=1).encode()

    def events(self) -> list[Json]:
        events: list[Json] = [
            {"type": "response.created", "response": self.response("in_progress")},
            {"type": "response.in_progress", "response": self.response("in_progress")},
        ]
        for index, item in enumerate(self.items):
            events += item_events(index, item)
        if self.status == "error":
            events.append({"type": "error", "code": "server_error", "message": "Oh no", "param": None})
        elif self.status != "cut":
            events.append({"type": f"response.{self.status}", "response": self.response()})
        return [{"type": event.pop("type"), "sequence_number": number, **event} for number, event in enumerate(events)]

    def stream(self) -> bytes:
        return b"".join(map(sse, self.events()))


def sse(event: Json) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (event["type"].encode(), compact(event))


def item_events(index: int, item: Json) -> list[Json]:
    place = {"output_index": index, "item_id": item.get("id", "")}
    events: list[Json] = []
    bare = {"content": [], "summary": [], "arguments": "", "input": "", "encrypted_content": "part"}
    opened = {name: bare.get(name, value) for name, value in item.items()}
    if item["type"] == "message":
        part = item["content"][0]
        at = place | {"content_index": 0}
        events.append({"type": "response.content_part.added", **at, "part": part | {"text": ""}})
        events += [
            {"type": "response.output_text.delta", **at, "delta": half, "logprobs": []} for half in halves(part["text"])
        ]
        events.append({"type": "response.output_text.done", **at, "text": part["text"], "logprobs": []})
        events.append({"type": "response.content_part.done", **at, "part": part})
    if item["type"] == "reasoning":
        for number, part in enumerate(item["summary"]):
            at = place | {"summary_index": number}
            events.append({"type": "response.reasoning_summary_part.added", **at, "part": part | {"text": ""}})
            events.append({"type": "response.reasoning_summary_text.delta", **at, "delta": part["text"]})
            events.append({"type": "response.reasoning_summary_text.done", **at, "text": part["text"]})
            events.append({"type": "response.reasoning_summary_part.done", **at, "part": part})
    if item["type"] == "function_call":
        kind = "response.function_call_arguments"
        events += [{"type": f"{kind}.delta", **place, "delta": half} for half in halves(item["arguments"])]
        events.append({"type": f"{kind}.done", **place, "name": item.get("name"), "arguments": item["arguments"]})
    added = {"type": "response.output_item.added", "output_index": index, "item": opened}
    return [added, *events, {"type": "response.output_item.done", "output_index": index, "item": item}]


def halves(words: str) -> list[str]:
    middle = len(words) // 2
    return [half for half in (words[:middle], words[middle:]) if half]


# --- how bytes come ---------------------------------------------------------------------------------------------------


def whole(data: bytes) -> Iterator[bytes]:
    yield data


def every_byte(data: bytes) -> Iterator[bytes]:
    for position in range(len(data)):
        yield data[position : position + 1]


def at_random(data: bytes, seed: int = 5) -> Iterator[bytes]:
    chance = random.Random(seed)
    position = 0
    while position < len(data):
        size = chance.randint(1, 60)
        yield data[position : position + size]
        position += size


SPLITS: Final[list[Split]] = [whole, every_byte, at_random]


# --- the bridge -------------------------------------------------------------------------------------------------------


def answer(made: Call) -> Outcome:
    return Outcome.failed(made.refusal) if made.refusal else Outcome((Text(f"Résult of {made.id} \u2028"),))


@dataclass
class Bridge:
    """One bridge with a history, and what it sent to the provider."""

    stream: bool = True
    split: Split = whole
    policy: UsagePolicy = "sum"
    memories: dict[str, Memory] = field(default_factory=dict)
    requests: list[bytes] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    restored: Restored | None = None

    def ask(self, body: bytes, *replies: Reply | bytes, max_turns: int = 32) -> bytes:
        """What the client gets for a request; a reply that is bytes is an HTTP error's body."""
        draft = TURNS.read(body)
        assert draft.objection is None
        self.restored = draft.restored({key: self.memories[key] for key in draft.keys if key in self.memories})
        toolset = TOOLSET.avoiding(draft.tool_names)
        sent = TURNS.with_tools(self.restored.body, toolset)
        merger = TURNS.merger(draft.body, toolset, self.policy)
        answered: list[Answered] = []
        out, ended = b"", False
        for number, reply in enumerate(replies, 1):
            self.requests.append(sent)
            if isinstance(reply, bytes):
                out += merger.error_event(500, "HTTP 500", reply)
                break
            merger.begin()
            if self.stream:
                decoder = SseDecoder()
                for chunk in self.split(reply.stream()):
                    for frame in decoder.feed(chunk):
                        out += merger.read_event(frame)
                if reply.status == "cut":
                    out += merger.error_event(502, "The response was cut.")
                    break
            else:
                merger.read_body(reply.body())
            turn = merger.turn()
            if reply.status in ("failed", "error"):
                ended = True
                break
            self.turns.append(turn)
            last = number == max_turns
            answered.append(Answered(turn, () if last else tuple(map(answer, turn.calls))))
            if last or not turn.calls or turn.awaits_client:
                ended = True
                break
            sent = TURNS.with_turn(sent, answered[-1], last=number + 1 == max_turns)
        if answered:
            memory = TURNS.memory(draft, toolset, answered)
            self.memories |= dict.fromkeys(memory.keys, memory)
        return out + merger.finish() if ended else out


# --- the client -------------------------------------------------------------------------------------------------------


def sdk(data: bytes, *, stream: bool = True) -> openai.OpenAI:
    """OpenAI's SDK, whose every request is answered with these bytes."""
    kind = "text/event-stream" if stream else "application/json"

    def respond(_: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(200, content=data, headers={"content-type": kind})

    transport = httpx2.MockTransport(respond)
    return openai.OpenAI(
        api_key="k",
        base_url="http://127.0.0.1:9/v1",
        max_retries=0,
        http_client=openai.DefaultHttpxClient(transport=transport),
    )


def understood(data: bytes, *, stream: bool = True) -> Response:
    """What the SDK makes of a response: its stream helper raises at what is not one consistent response (wire.md C3)."""
    with sdk(data, stream=stream) as client:
        if not stream:
            return client.responses.create(model="m", input="x")
        with client.responses.stream(model="m", input="x") as events:
            return events.get_final_response()


def seen(data: bytes) -> list[Any]:
    """The events of a stream as the SDK's helper gives them."""
    with sdk(data) as client, client.responses.stream(model="m", input="x") as events:
        return list(events)


def parsed(data: bytes) -> list[Json]:
    """The data of a stream's events, which must all be whole."""
    assert data.endswith(b"\n\n")
    lines = [line for line in data.split(b"\n") if line.startswith(b"data: ")]
    return [json.loads(line.removeprefix(b"data: ")) for line in lines]


def replayed(response: Response) -> list[Json]:
    """The output as the SDK's users replay it: with what the SDK's helper has added."""
    return [item.to_dict(mode="json") for item in response.output]


def output_of(response: Response) -> list[Json]:
    """The output without what the SDK's helper adds."""
    output: list[Json] = json.loads(json.dumps(replayed(response)), object_hook=_without_parsed)
    return output


def _without_parsed(value: Json) -> Json:
    return {name: member for name, member in value.items() if name not in ("parsed", "parsed_arguments")}


def input_text(body: bytes) -> bytes:
    """The elements of a request's input, as they stand there: without the bracket that ends them."""
    array = input_of(body)
    return array[:-1]


def input_of(body: bytes) -> bytes:
    text = body.decode()
    start = text.index('"input":') + len('"input":')
    start += text[start] == " "
    _, end = json.JSONDecoder().raw_decode(text, start)
    return text[start:end].encode()


def kinds(body: bytes) -> list[str]:
    """The types of the items in a request's input."""
    return [item.get("type") or item["role"] for item in json.loads(body)["input"]]


def assert_extends(requests: Sequence[bytes]) -> None:
    """Each request says all that the one before it said, byte for byte (wire.md D6)."""
    for before, after in pairwise(requests):
        assert input_text(after).startswith(input_text(before))


# --- what tests share -------------------------------------------------------------------------------------------------

FOUR = Outcome((Text("4"),))


def answered(*items: Json, outcome: Outcome = FOUR, response_id: str | None = "resp_1") -> Answered:
    """A turn in which the calls of ours were answered."""
    pieces = []
    for item in items:
        made = Call(item["call_id"], TOOLSET.tools[0], "{}") if str(item.get("name")).startswith("bmcp_") else None
        pieces.append(Piece(compact(item), made))
    calls = tuple(piece.call for piece in pieces if piece.call)
    return Answered(Turn(tuple(pieces), calls, response_id=response_id), (outcome,) * len(calls))


HIDING = (
    Reply("resp_1_abcdef01", [reasoning("rs_1_abcdef01"), message("msg_1_abcdef01", "I look."), ours("fc_1_abcdef01")]),
    Reply("resp_2_abcdef01", [message("msg_2_abcdef01", "It is 4.")]),
)

SECRET: list[Json] = [HIDING[0].items[2], result("call_fc_1_abcdef01", "Résult of call_fc_1_abcdef01 \u2028")]
