"""Chat Completions with injected tools: what a provider says, what the bridge makes of it, what a client does with that.

Streams are built as wire.md B2 has them. The client is OpenAI's Python SDK, its stream helper and its accumulator. `Loop`
stands for the engine: it does with a `TurnFormat` what the conversation does, without waiting for anything.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, Final

import httpx2
import openai
from openai.types.chat import ChatCompletion

from aibridge.tools import Call, Outcome, Text, Tool, Toolset
from aibridge.wire import CHAT
from aibridge.wire.splicing import member_span
from aibridge.wire.sse import SseDecoder
from aibridge.wire.turns import Answered, Memory, Restored, Turn, TurnMerger, UsagePolicy

Json = dict[str, Any]
Cut = Callable[[bytes], Iterable[bytes]]

DONE: Final = b"data: [DONE]\n\n"
TOOLS: Final = Toolset(
    Tool(f"bmcp_s_{name}", f"Does {name}.", '{"type": "object"}', "s", name, "memory:s") for name in ("time", "look")
)
OWN: Final = {"type": "function", "function": {"name": "shell", "parameters": {"type": "object"}}}


# --- a provider's side ------------------------------------------------------------------------------------------------


def event(data: Json | bytes) -> bytes:
    return b"data: %b\n\n" % (data if isinstance(data, bytes) else json.dumps(data).encode())


def chunk(delta: Json | None, finish: str | None = None, *, id: str = "chatcmpl-1", **members: Any) -> bytes:
    """A chunk; without a delta one that has no choices."""
    choices = [] if delta is None else [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}]
    envelope = {"id": id, "object": "chat.completion.chunk", "created": int(id[-1]), "model": f"m-{id[-1]}"}
    return event(envelope | {"choices": choices, "usage": None} | members)


def usage(prompt: int, completion: int) -> Json:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def call(index: int, id: str, name: str, arguments: str = "{}") -> list[Json]:
    """The fragments of a call: its start, and its arguments in two."""
    half = len(arguments) // 2
    return [
        {"index": index, "id": id, "type": "function", "function": {"name": name, "arguments": ""}},
        {"index": index, "function": {"arguments": arguments[:half]}},
        {"index": index, "function": {"arguments": arguments[half:]}},
    ]


def spoken(*words: str, calls: Sequence[Sequence[Json]] = (), hop: int = 1, finish: str | None = None, **more: Any) -> bytes:
    """A whole stream as OpenAI sends it: a role, text, calls, the end, the usage. `more` are other members of a delta."""
    id_ = f"chatcmpl-{hop}"
    chunks: list[Json] = [{"role": "assistant", "content": None if calls and not words else "", "refusal": None}]
    chunks += [{name: value} for name, value in more.items()]
    chunks += [{"content": word} for word in words]
    chunks += [{"tool_calls": [fragment]} for fragments in calls for fragment in fragments]
    reason = finish or ("tool_calls" if calls else "stop")
    return b"".join(
        [
            *(chunk(delta, id=id_) for delta in chunks),
            chunk({}, reason, id=id_),
            chunk(None, id=id_, usage=usage(10 * hop, hop)),
            DONE,
        ]
    )


def whole(message: Json, finish: str, hop: int = 1) -> bytes:
    """A response that is no stream."""
    choice = {"index": 0, "message": {"role": "assistant"} | message, "logprobs": None, "finish_reason": finish}
    body = {"id": f"chatcmpl-{hop}", "object": "chat.completion", "created": hop, "model": f"m-{hop}", "choices": [choice]}
    return json.dumps(body | {"usage": usage(10 * hop, hop)}).encode()


def called(id: str, name: str, arguments: str = "{}") -> Json:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


# --- a client's side --------------------------------------------------------------------------------------------------


def accumulated(stream: bytes) -> ChatCompletion:
    """What the SDK's stream helper makes of a response. Raises what it raises."""
    response = httpx2.Response(200, headers={"content-type": "text/event-stream"}, content=stream)
    with _client(response) as client, client.chat.completions.stream(model="m", messages=[]) as events:
        return events.until_done().get_final_completion()


def parsed(body: bytes) -> ChatCompletion:
    """What the SDK makes of a response that is no stream."""
    with _client(httpx2.Response(200, headers={"content-type": "application/json"}, content=body)) as client:
        return client.chat.completions.create(model="m", messages=[])


def _client(response: httpx2.Response) -> openai.OpenAI:
    transport = httpx2.MockTransport(lambda _: response)
    http_client = openai.DefaultHttpxClient(transport=transport)
    return openai.OpenAI(base_url="http://127.0.0.1/v1", api_key="k", max_retries=0, http_client=http_client)


def replayed(completion: ChatCompletion) -> Json:
    """The message as applications put it into their history."""
    message: Json = completion.choices[0].message.to_dict(mode="json", exclude_none=True)
    for entry in message.get("tool_calls", []):
        entry.pop("index", None)
        entry["function"].pop("parsed_arguments", None)
    message.pop("parsed", None)
    return message


def texts(completion: ChatCompletion) -> str | None:
    return completion.choices[0].message.content


def names(completion: ChatCompletion) -> list[str]:
    calls = completion.choices[0].message.tool_calls or []
    return [entry.function.name for entry in calls if entry.type == "function"]


# --- the bridge between them ------------------------------------------------------------------------------------------


def at_once(stream: bytes) -> Iterable[bytes]:
    return [stream]


def by_byte(stream: bytes) -> Iterable[bytes]:
    return (stream[at : at + 1] for at in range(len(stream)))


def merger(policy: UsagePolicy = "sum", *, hides_usage: bool = False) -> TurnMerger:
    return CHAT.turns.merger(b"{}", TOOLS, policy, hides_usage=hides_usage)


def hear(merging: TurnMerger, stream: bytes, cut: Cut = at_once) -> bytes:
    """One response of the provider, up to its end."""
    merging.begin()
    decoder = SseDecoder()
    return b"".join(merging.read_event(frame) for piece in cut(stream) for frame in decoder.feed(piece))


def merged(*streams: bytes, cut: Cut = at_once, policy: UsagePolicy = "sum", hides_usage: bool = False) -> bytes:
    """What the client gets where all these are the responses of one loop."""
    merging = merger(policy, hides_usage=hides_usage)
    relayed = b""
    for stream in streams:
        relayed += hear(merging, stream, cut)
        merging.turn()
    return relayed + merging.finish()


def merged_bodies(*bodies: bytes, policy: UsagePolicy = "sum") -> bytes:
    merging = merger(policy)
    for body in bodies:
        merging.begin()
        merging.read_body(body)
        merging.turn()
    return merging.finish()


def done(call: Call) -> Outcome:
    return Outcome((Text(f"{call.tool.tool} done: {call.arguments}"),))


class Loop:
    """The bridge, with a provider that replies with what it is given. `requests` is all that the provider got."""

    def __init__(self) -> None:
        self.requests: list[bytes] = []
        self.memories: dict[str, Memory] = {}
        self.restored: Restored | None = None

    def ask(self, body: bytes, replies: Sequence[bytes], *, cut: Cut = at_once) -> bytes:
        """What the client gets for a request."""
        draft = CHAT.turns.read(body)
        assert draft.objection is None
        self.restored = draft.restored({key: self.memories[key] for key in draft.keys if key in self.memories})
        body = CHAT.turns.with_tools(self.restored.body, TOOLS)
        merging, relayed, ended = merger(), b"", list[Answered]()
        for reply in replies:
            self.requests.append(body)
            if reply.startswith(b"{"):
                merging.begin()
                merging.read_body(reply)
            else:
                relayed += hear(merging, reply, cut)
            if b'"error"' in reply:
                break
            answered = answer(merging.turn())
            ended.append(answered)
            if not answered.turn.calls or answered.turn.awaits_client:
                break
            body = CHAT.turns.with_turn(body, answered, last=False)
        memory = CHAT.turns.memory(draft, TOOLS, ended)
        self.memories |= dict.fromkeys(memory.keys, memory)
        return relayed + merging.finish()

    def forget(self) -> None:
        """The hidden parts have been dropped for their age."""
        self.memories = {
            key: Memory(memory.keys, memory.toolset, None if memory.data else b"") for key, memory in self.memories.items()
        }


def answer(turn: Turn) -> Answered:
    return Answered(turn, tuple(map(done, turn.calls)))


def conversation(body: bytes) -> bytes:
    """The conversation array of a request, without the bracket that ends it."""
    span = member_span(body, "messages")
    assert span is not None
    return body[slice(*span)].removesuffix(b"]")


def assert_each_extends_the_one_before(requests: Sequence[bytes]) -> None:
    for earlier, later in pairwise(map(conversation, requests)):
        assert later[: len(earlier)] == earlier


def messages_of(body: bytes) -> list[Mapping[str, Any]]:
    found: list[Mapping[str, Any]] = json.loads(body)["messages"]
    return found
