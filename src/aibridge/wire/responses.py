"""OpenAI Responses: ``POST /v1/responses``. Facts from wire.md C1 to C5 and D1 to D3."""

import re
from typing import Any, ClassVar, Final

import msgspec
from msgspec import Raw

from aibridge.errors import ProviderKind, error_type
from aibridge.wire.base import (
    Completeness,
    RequestFacts,
    ResponseFacts,
    ResponseReader,
    Thought,
    ThoughtSource,
    ToolCall,
    Usage,
    WireFormat,
    error_text,
)
from aibridge.wire.chat import joined_text, without_cache
from aibridge.wire.chat_merging import DONE
from aibridge.wire.credentials import credentials_in
from aibridge.wire.reading import (
    NATURAL,
    STRING,
    Count,
    Members,
    Shape,
    integer,
    items,
    members,
    parse_object,
    source,
    text,
)
from aibridge.wire.responses_merging import is_client_run
from aibridge.wire.responses_turns import ResponsesTurns
from aibridge.wire.sse import ON_ONE_LINE
from aibridge.wire.turns import TurnFormat

# Where a call's arguments stand, in the order in which to look: text as it is, anything else as its JSON (wire.md C2).
_ARGUMENTS: Final = ("arguments", "input", "action", "operation", "code", "queries")

_CALL_DETAILS: Final = ("namespace", "server_label", "status")

# Tools that may come with credentials. The body is not searched for any without one of them.
_HOSTED: Final = frozenset({"mcp", "code_interpreter", "shell"})

_TERMINALS: Final = frozenset({"response.completed", "response.incomplete", "response.failed"})

_THOUGHT_DELTAS: Final[dict[str, ThoughtSource]] = {
    "response.reasoning_summary_text.delta": "reasoning_summary",
    "response.reasoning_text.delta": "reasoning",
}


class ResponsesFormat(WireFormat):
    """The Responses protocol."""

    name: ClassVar[str] = "responses"
    kind: ClassVar[ProviderKind] = "openai"
    turns: ClassVar[TurnFormat] = ResponsesTurns()

    def reader(self) -> "ResponsesReader":
        """A fresh reader for one upstream response."""
        return ResponsesReader()

    def _facts(self, body: bytes) -> RequestFacts:
        given = _REQUEST.parse(body)
        prompt, tool_call_id = _last_turn(given.input)
        return RequestFacts(
            model=given.model,
            stream=given.stream or False,
            prompt=prompt,
            correlating_tool_call_id=tool_call_id,
            session_id=None if given.client_metadata is None else given.client_metadata.session_id,
            secrets=credentials_in(self.kind, body) if any(tool.type in _HOSTED for tool in given.tools or ()) else (),
        )


RESPONSES: Final = ResponsesFormat()


class _ClientMetadata(msgspec.Struct, gc=False):
    session_id: str | None = None


class _Item(msgspec.Struct, gc=False):
    type: str | None = None
    role: str | None = None
    content: Raw = Raw()
    call_id: str | None = None
    id: str | None = None


class _Tool(msgspec.Struct, gc=False):
    type: str | None = None


class _Request(msgspec.Struct):
    model: str | None = None
    stream: bool | None = None
    input: str | list[Raw] | None = None  # of which only the last are looked into
    client_metadata: _ClientMetadata | None = None
    tools: list[_Tool] | None = None


_ITEM: Final = Shape(_Item)
_REQUEST: Final = Shape(_Request)


def _last_turn(given: str | list[Raw] | None) -> tuple[str | None, str | None]:
    """The prompt, or the id of the tool result that this request continues with (wire.md D2, D3).

    What the model said, and a request to compact, come after the prompt that they answer: no new prompt then.
    """
    if isinstance(given, str):
        return given, None
    for item in map(_ITEM.read, reversed(given or ())):
        kind = item.type or "message"
        if kind.endswith("_output"):
            return None, item.call_id or item.id
        if kind == "message":
            match item.role:
                case "user":
                    return joined_text(item.content, "input_text"), None
                case "assistant":
                    return None, None
        elif kind.endswith("_call") or kind in ("reasoning", "compaction_trigger", "mcp_approval_response"):
            return None, None
    return None, None


class _ThoughtDelta(msgspec.Struct, gc=False):
    type: str | None = None
    sequence_number: Count | None = None
    output_index: Count | None = None
    summary_index: Count | None = None
    content_index: Count | None = None
    delta: str | None = None


_THOUGHT_DELTA: Final = Shape(_ThoughtDelta)
_THOUGHT_DELTA_PREFIX: Final = b'{"type":"response.reasoning_'

# What an output item is made of on the way. The ledger reads the item when it is done.
_PIECES: Final = (
    rb"response\.(?:output_text|function_call_arguments|custom_tool_call_input|refusal|mcp_call_arguments"
    rb"|code_interpreter_call_code)\.delta"
)


class ResponsesReader(ResponseReader):
    """One Responses response."""

    # Pieces of items, of which the ledger wants no more than their number. Within a run all is the same but that, the
    # piece and the padding, so later events need only be compared.
    run: ClassVar[re.Pattern[bytes] | None] = re.compile(
        rb'(event: (%b)\ndata: \{"type":"\2","sequence_number":)%b'
        rb'((?:,"item_id":%b|,"(?:output|content)_index":%b)*+,"delta":)%b((?:,"(?:output|content)_index":%b|,"logprobs":\[\])*+)'
        rb'(?:,"obfuscation":%b)?+\}\n\n(?:\1%b\3%b\4(?:,"obfuscation":%b)?+\}\n\n)*+'
        % (_PIECES, NATURAL, STRING, NATURAL, STRING, NATURAL, STRING, NATURAL, STRING, STRING)
    )

    def __init__(self) -> None:
        self._response: dict[str, Raw] = {}  # the newest lifecycle event's object
        self._id: str | None = None
        self._model: str | None = None
        self._usage: Raw | None = None
        self._items: dict[int, Members] = {}  # finished output items, by output_index
        self._thinking: dict[tuple[int, int, ThoughtSource], list[str]] = {}  # thoughts of items not finished
        self._sequence_number = -1
        self._stop_reason: str | None = None

    def read_event(self, data: bytes) -> None:
        """Take in the data of one server-sent event."""
        if data.strip() == DONE:  # tolerated by every client, says nothing (wire.md C3)
            return
        if data.startswith(_THOUGHT_DELTA_PREFIX):
            delta = _THOUGHT_DELTA.parse(data)
            if delta.type in _THOUGHT_DELTAS:
                self._count(delta.sequence_number)
                self._read_thought(delta, _THOUGHT_DELTAS[delta.type])
                return
        event = parse_object(data)
        kind = text(event.get("type")) or ""
        self._count(integer(event.get("sequence_number")))
        if kind in _THOUGHT_DELTAS:
            self._read_thought(_THOUGHT_DELTA.parse(data), _THOUGHT_DELTAS[kind])
        elif kind == "response.output_item.done":
            self._read_item(integer(event.get("output_index")), members(event.get("item")))
        elif kind == "error":
            self._fail(error_text(event.get("error")) or _flat_error(event))
        elif kind in _TERMINALS or "response" in event:
            self._read_response(members(event.get("response")), ended=kind in _TERMINALS)
            if kind == "response.failed" and self.error is None:
                self._fail("failed")

    def is_last(self, data: bytes) -> bool:
        """``response.completed`` or another event that carries the final response."""
        return text(members(data).get("type")) in _TERMINALS

    def read_body(self, body: bytes) -> None:
        """Take in a whole JSON body."""
        self._read_response(parse_object(body), ended=True)

    def facts(self) -> ResponseFacts:
        """What has been read so far. A thought that broke off is still a thought; a tool call that did was never made."""
        finished = [item for _, item in sorted(self._items.items())]
        thoughts = [thought for item in finished for thought in _thoughts(item)]
        for (_, _, kind), pieces in sorted(self._thinking.items()):
            thoughts.append(Thought(kind, "".join(pieces), {"incomplete": True}))
        usage = _usage(self._usage)
        completeness: Completeness = "unknown" if usage is None else "complete"
        return ResponseFacts(
            response_id=self._id,
            model=self._model,
            usage=usage,
            completeness="partial" if self.error else completeness,
            tool_calls=tuple(call for item in finished if (call := _call(item)) is not None),
            thoughts=tuple(thoughts),
            stop_reason=self._stop_reason,
            error=self.error,
        )

    def error_event(self, status: int, message: str) -> bytes:
        """``response.failed`` for the response under way, as every client knows it; a bare error where none has begun."""
        kind = "response.failed" if self._response else "error"
        error = {"code": error_type("openai", status), "message": message}
        event: dict[str, Any] = {"type": kind, "sequence_number": self._sequence_number + 1}
        if self._response:
            event["response"] = self._response | {"status": "failed", "error": error}
        else:
            event |= error | {"param": None}
        data = msgspec.json.encode(event).translate(ON_ONE_LINE)
        return b"event: " + kind.encode() + b"\ndata: " + data + b"\n\n"

    def _read_response(self, response: Members, *, ended: bool) -> None:
        self._response = dict(response) or self._response
        self._id = text(response.get("id")) or self._id
        self._model = text(response.get("model")) or self._model
        if "usage" in response and members(response["usage"]):
            self._usage = response["usage"]
        reason = text(members(response.get("incomplete_details")).get("reason"))
        status = text(response.get("status"))
        self._stop_reason = reason or status or self._stop_reason
        error = error_text(response.get("error"))
        if error is not None or status == "failed":
            self._fail(error or "failed")
        if not ended:
            return
        self.finished = True
        # A final `output` may be missing or empty: items count from their own events, and from here only where some of
        # those were not sent (wire.md C3).
        output = items(response.get("output"))
        if len(output) > len(self._items):
            for index, raw in enumerate(output):
                if index not in self._items:
                    self._read_item(index, members(raw))

    def _read_item(self, index: int | None, item: Members) -> None:
        index = len(self._items) if index is None else index
        self._items[index] = item
        self._thinking = {key: pieces for key, pieces in self._thinking.items() if key[0] != index}

    def _count(self, number: int | None) -> None:
        self._sequence_number = self._sequence_number + 1 if number is None else number

    def _read_thought(self, event: _ThoughtDelta, kind: ThoughtSource) -> None:
        part = event.summary_index if kind == "reasoning_summary" else event.content_index
        self._thinking.setdefault((event.output_index or 0, part or 0, kind), []).append(event.delta or "")

    def _fail(self, error: str) -> None:
        self.error = error
        self.finished = True


def _flat_error(event: Members) -> str:
    """The bare ``error`` event of the HTTP transport has its members at the top (wire.md C3)."""
    return f"{text(event.get('code')) or 'error'}: {text(event.get('message')) or ''}"


def _call(item: Members) -> ToolCall | None:
    kind = text(item.get("type")) or ""
    client_run = is_client_run(item)
    if not kind.endswith("_call") and kind not in ("mcp_approval_request", "program"):
        return None
    identity = (text(item.get("call_id")) if client_run or kind == "program" else None) or text(item.get("id"))
    arguments = next((item[name] for name in _ARGUMENTS if name in item), None)
    plain = text(arguments)
    details: dict[str, Any] = {"type": kind} if kind != "function_call" else {}
    if not client_run:
        details["run_by"] = "provider"
    details |= {name: value for name in _CALL_DETAILS if (value := text(item.get(name)))}
    return ToolCall(
        identity,
        text(item.get("name")) or kind.removesuffix("_call"),
        source(arguments) if plain is None else plain,
        details,
    )


def _thoughts(item: Members) -> list[Thought]:
    match text(item.get("type")):
        case "reasoning":
            return [
                *(Thought("reasoning_summary", _part_text(part)) for part in items(item.get("summary"))),
                *(Thought("reasoning", _part_text(part)) for part in items(item.get("content"))),
            ]
        case "message" if text(item.get("phase")) == "commentary":
            return [Thought("commentary", joined_text(item.get("content", Raw()), "output_text"))]
    return []


def _part_text(part: Raw) -> str:
    return text(members(part).get("text")) or ""


def _usage(raw: Raw | None) -> Usage | None:
    """OpenAI's input tokens include what a cache read or wrote (wire.md C4)."""
    usage = members(raw)
    if raw is None or not usage:
        return None
    details = members(usage.get("input_tokens_details"))
    read, write = integer(details.get("cached_tokens")), integer(details.get("cache_write_tokens"))
    return Usage(
        input_tokens=without_cache(integer(usage.get("input_tokens")), read, write),
        output_tokens=integer(usage.get("output_tokens")),
        cache_read_input_tokens=read,
        cache_write_input_tokens=write,
        raw=bytes(raw),
    )
