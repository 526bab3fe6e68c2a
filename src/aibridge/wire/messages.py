"""Anthropic Messages: ``POST /v1/messages``. Facts from wire.md A2 to A10 and D1 to D3."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Final

import msgspec
from msgspec import Raw

from aibridge.errors import ProviderKind, error_body
from aibridge.wire.base import (
    Completeness,
    RequestFacts,
    ResponseFacts,
    ResponseReader,
    Thought,
    ToolCall,
    Usage,
    WireFormat,
    error_text,
)
from aibridge.wire.credentials import credentials_in
from aibridge.wire.messages_history import LEGACY_SESSION
from aibridge.wire.messages_merging import update_usage
from aibridge.wire.messages_turns import MessagesTurns
from aibridge.wire.reading import (
    MAX_INTEGER,
    NATURAL,
    STRING,
    Count,
    Members,
    Shape,
    integer,
    is_text,
    items,
    members,
    parse_object,
    source,
    text,
)
from aibridge.wire.turns import TurnFormat

# Members of a tool call that say who runs it and where (wire.md A3).
_CALL_DETAILS: Final = ("server_name", "toolset_name")


class MessagesFormat(WireFormat):
    """The Messages protocol."""

    name: ClassVar[str] = "messages"
    kind: ClassVar[ProviderKind] = "anthropic"
    turns: ClassVar[TurnFormat] = MessagesTurns()

    def reader(self) -> "MessagesReader":
        """A fresh reader for one upstream response."""
        return MessagesReader()

    def _facts(self, body: bytes) -> RequestFacts:
        given = _REQUEST.parse(body)
        prompt, tool_call_id = _last_user_turn(given.messages)
        return RequestFacts(
            model=given.model,
            stream=given.stream or False,
            prompt=prompt,
            correlating_tool_call_id=tool_call_id,
            session_id=None if given.metadata is None else _session_id(given.metadata.user_id),
            secrets=credentials_in(self.kind, bytes(given.mcp_servers)),
        )


MESSAGES: Final = MessagesFormat()


class _Message(msgspec.Struct, gc=False):
    role: str | None = None
    content: Raw = Raw()


class _Metadata(msgspec.Struct, gc=False):
    user_id: str | None = None


class _Request(msgspec.Struct):
    model: str | None = None
    stream: bool | None = None
    messages: list[Raw] = []  # of which only the last are looked into
    metadata: _Metadata | None = None
    mcp_servers: Raw = Raw()


class _Content(msgspec.Struct, gc=False):
    type: str | None = None
    text: Raw = Raw()
    tool_use_id: str | None = None


_REQUEST: Final = Shape(_Request)


class _Body(msgspec.Struct):
    id: str | None = None
    model: str | None = None
    stop_reason: str | None = None
    usage: Raw = Raw()
    content: list[Raw] = []
    error: Raw = Raw()


_MESSAGE: Final = Shape(_Message)
_BODY: Final = Shape(_Body)
_CONTENT: Final = Shape(_Content)


def _last_user_turn(messages: Sequence[Raw]) -> tuple[str | None, str | None]:
    """The newest user message's prompt, and the id of its last tool result.

    Claude Code puts a ``system`` message after the user's (clients.md 3). A message of tool results alone continues the
    turn and is no prompt (wire.md D2).
    """
    for message in map(_MESSAGE.read, reversed(messages)):
        if message.role != "user":
            continue
        if is_text(message.content):
            return text(message.content), None
        texts: list[str] = []
        tool_call_id: str | None = None
        only_results = True
        for block in _CONTENT.each(message.content):
            if block.type == "tool_result":
                tool_call_id = block.tool_use_id
                continue
            only_results = False
            if block.type == "text" and (part := text(block.text)) is not None:
                texts.append(part)
        return (None if only_results else "\n".join(texts)), tool_call_id
    return None, None


def _session_id(user_id: str | None) -> str | None:
    if user_id is None:
        return None
    if user_id.startswith("{") and (session := text(members(user_id.encode()).get("session_id"))):
        return session
    match = LEGACY_SESSION.search(user_id)
    return match.group(1) if match else None


class _Block:
    """A content block that the ledger wants: a thought or a tool call. Text blocks are not followed."""

    __slots__ = ("complete", "kind", "members", "pieces")

    def __init__(self, kind: str, block: Members) -> None:
        self.kind = kind
        self.members = block
        self.pieces: list[str] = []
        self.complete = False

    def thought(self) -> Thought:
        details: dict[str, Any] = {} if self.complete else {"incomplete": True}
        if self.kind == "redacted_thinking":
            return Thought("thinking", "", details | {"redacted": True})
        return Thought("thinking", (text(self.members.get("thinking")) or "") + "".join(self.pieces), details)

    def call(self) -> ToolCall:
        # The `input` of a started block is a placeholder; no delta at all means no arguments, unless a compatible server
        # sent them whole (wire.md A9).
        arguments = "".join(self.pieces) or source(self.members.get("input")) or "{}"
        details: dict[str, Any] = {} if self.kind == "tool_use" else {"run_by": "provider"}
        details |= {name: value for name in _CALL_DETAILS if (value := text(self.members.get(name)))}
        if (caller := text(members(self.members.get("caller")).get("type"))) is not None:
            details["caller"] = caller
        return ToolCall(text(self.members.get("id")), text(self.members.get("name")) or "", arguments, details)


class _Delta(msgspec.Struct, gc=False):
    type: str | None = None
    partial_json: str | None = None
    thinking: str | None = None


class _BlockDelta(msgspec.Struct):
    type: str | None = None
    index: Count | None = None
    delta: _Delta | None = None


_BLOCK_DELTA: Final = Shape(_BlockDelta)
_BLOCK_DELTA_PREFIX: Final = b'{"type":"content_block_delta",'


class MessagesReader(ResponseReader):
    """One Messages response."""

    # Text, of which the ledger wants nothing, and pings. Anthropic pads events with spaces.
    run: ClassVar[re.Pattern[bytes] | None] = re.compile(
        rb'(?:(?:event: content_block_delta\n)?+data: \{"type": ?+"content_block_delta", ?+"index": ?+%b, ?+"delta": ?+'
        rb'\{"type": ?+"text_delta", ?+"text": ?+%b\} *+\}\n\n|event: ping\ndata: \{"type": ?+"ping" *+\}\n\n)++'
        % (NATURAL, STRING)
    )

    def __init__(self) -> None:
        self._id: str | None = None
        self._model: str | None = None
        self._usage: dict[str, Raw] = {}
        self._usage_is_final = False
        self._fallback = False
        self._blocks: list[_Block] = []
        self._open: dict[int, _Block] = {}  # those among them that the stream is writing, by index
        self._stop_reason: str | None = None

    def read_event(self, data: bytes) -> None:
        """Take in the data of one server-sent event."""
        if data.startswith(_BLOCK_DELTA_PREFIX):  # most are
            self._read_delta(_BLOCK_DELTA.parse(data))
            return
        event = parse_object(data)
        match text(event.get("type")):
            case "content_block_delta":
                self._read_delta(_BLOCK_DELTA.parse(data))
            case "content_block_start":
                self._open_block(integer(event.get("index")) or 0, members(event.get("content_block")))
            case "content_block_stop":
                block = self._open.pop(integer(event.get("index")) or 0, None)
                if block is not None:
                    block.complete = True
            case "message_start":
                message = members(event.get("message"))
                self._read_message(text(message.get("id")), text(message.get("model")), members(message.get("usage")))
            case "message_delta":
                self._stop_reason = text(members(event.get("delta")).get("stop_reason")) or self._stop_reason
                if "usage" in event:
                    self._read_usage(members(event.get("usage")))
                    self._usage_is_final = True
            case "message_stop":
                self._finish()
            case "error":
                self.error = error_text(event.get("error")) or "error"
                self.finished = True

    def is_last(self, data: bytes) -> bool:
        """``message_stop``."""
        return text(members(data).get("type")) == "message_stop"

    def read_body(self, body: bytes) -> None:
        """Take in a whole JSON body."""
        message = _BODY.parse(body)
        self.error = error_text(message.error or None)
        self._read_message(message.id, message.model, members(message.usage))
        self._usage_is_final = True
        self._stop_reason = message.stop_reason
        for index, raw in enumerate(message.content):
            if _CONTENT.read(raw).type != "text":
                self._open_block(index, members(raw))
        self._finish()

    def facts(self) -> ResponseFacts:
        """What has been read so far. A thought that broke off is still a thought; a tool call that did was never made."""
        usage = _usage(self._usage) if self._usage else None
        completeness: Completeness
        if usage is None:
            completeness = "unknown"
        else:
            completeness = "complete" if self._usage_is_final else "partial"
        return ResponseFacts(
            response_id=self._id,
            model=self._model,
            usage=usage,
            completeness="partial" if self.error else completeness,
            tool_calls=tuple(block.call() for block in self._blocks if block.complete and _is_call(block.kind)),
            thoughts=tuple(block.thought() for block in self._blocks if not _is_call(block.kind)),
            stop_reason=self._stop_reason,
            error=self.error,
        )

    def error_event(self, status: int, message: str) -> bytes:
        """``event: error``, which both SDKs raise as a status error (wire.md A10)."""
        return b"event: error\ndata: " + error_body("anthropic", status, message) + b"\n\n"

    def _read_message(self, identity: str | None, model: str | None, usage: Members) -> None:
        self._id = identity or self._id
        self._model = model or self._model
        self._read_usage(usage)

    def _open_block(self, index: int, block: Members) -> None:
        kind = text(block.get("type")) or ""
        if kind == "fallback":  # another model took over: its figures replace those of the first (wire.md A8)
            self._fallback = True
            self._model = text(members(block.get("to")).get("model")) or self._model
        if _is_call(kind) or kind in ("thinking", "redacted_thinking"):
            self._open[index] = _Block(kind, block)
            self._blocks.append(self._open[index])

    def _finish(self) -> None:
        for block in self._blocks:  # also those that a compatible server did not stop
            block.complete = True
        self.finished = True

    def _read_delta(self, event: _BlockDelta) -> None:
        block, delta = self._open.get(event.index or 0), event.delta
        if block is None or delta is None:
            return
        if delta.type == "input_json_delta":
            block.pieces.append(delta.partial_json or "")
        elif delta.type == "thinking_delta":
            block.pieces.append(delta.thinking or "")

    def _read_usage(self, usage: Members) -> None:
        update_usage(self._usage, usage, fallback=self._fallback)


def _is_call(kind: str) -> bool:
    return kind.endswith("tool_use")  # tool_use, server_tool_use, mcp_tool_use


def _usage(usage: Mapping[str, Raw]) -> Usage:
    """Billed per entry of `iterations` where there are any: the top level leaves some out (wire.md A8)."""
    entries = [members(raw) for raw in items(usage.get("iterations"))]
    return Usage(
        input_tokens=_total(entries, usage, "input_tokens"),
        output_tokens=_total(entries, usage, "output_tokens"),
        cache_read_input_tokens=_total(entries, usage, "cache_read_input_tokens"),
        cache_write_input_tokens=_total(entries, usage, "cache_creation_input_tokens"),
        raw=msgspec.json.encode(usage),
    )


def _total(entries: list[Members], usage: Members, name: str) -> int | None:
    reported = [count for entry in entries if (count := integer(entry.get(name))) is not None]
    total = sum(reported)
    return total if reported and total <= MAX_INTEGER else integer(usage.get(name))
