"""OpenAI Chat Completions: ``POST /v1/chat/completions``, and the many servers that speak it. Facts from wire.md B, D."""

import re
from collections.abc import Sequence
from typing import Any, ClassVar, Final

import msgspec
from msgspec import Raw

from aibridge.errors import ProviderKind, error_body
from aibridge.wire.base import (
    Completeness,
    Request,
    RequestFacts,
    ResponseFacts,
    ResponseFilter,
    ResponseReader,
    Thought,
    ToolCall,
    Usage,
    WireFormat,
    error_text,
)
from aibridge.wire.chat_merging import DONE
from aibridge.wire.chat_turns import ChatTurns
from aibridge.wire.reading import (
    NAME,
    NATURAL,
    STRING,
    Count,
    Shape,
    Unreadable,
    boolean,
    integer,
    is_null,
    is_text,
    members,
    text,
)
from aibridge.wire.splicing import member_span, without_member
from aibridge.wire.sse import Frame
from aibridge.wire.turns import TurnFormat

# No JSON to many servers, so a request that begins with one is not ours to edit.
_BOM: Final = b"\xef\xbb\xbf"


class ChatFormat(WireFormat):
    """The Chat Completions protocol."""

    name: ClassVar[str] = "chat"
    kind: ClassVar[ProviderKind] = "openai"
    turns: ClassVar[TurnFormat] = ChatTurns()

    def reader(self) -> "ChatReader":
        """A fresh reader for one upstream response."""
        return ChatReader()

    def asking_for_usage(self, request: Request) -> Request:
        """The request with ``stream_options.include_usage``, without which a stream reports none (wire.md B2).

        Unchanged where nothing is streamed, the client asked itself, or the body cannot be edited.
        """
        facts, body = request.facts, request.body
        if not facts.stream or facts.asks_for_usage or request.hides_usage or request.coding or body.startswith(_BOM):
            return request
        try:
            body = _with_stream_options(body) if facts.asks_for_usage is None else _with_include_usage(body)
        except Unreadable:
            return request
        return msgspec.structs.replace(request, body=body, hides_usage=True)

    def response_filter(self, request: Request) -> ResponseFilter | None:
        """What takes the usage chunk out again for a client that did not ask for it."""
        return UsageFilter() if request.hides_usage else None

    def _facts(self, body: bytes) -> RequestFacts:
        given = _REQUEST.parse(body)
        prompt, tool_call_id = _last_turn(given.messages)
        return RequestFacts(
            model=given.model,
            stream=given.stream or False,
            prompt=prompt,
            correlating_tool_call_id=tool_call_id,
            asks_for_usage=_asks_for_usage(given.stream_options),
        )


CHAT: Final = ChatFormat()


class _Message(msgspec.Struct, gc=False):
    role: str | None = None
    content: Raw = Raw()
    tool_call_id: str | None = None


class _Request(msgspec.Struct):
    model: str | None = None
    stream: bool | None = None
    messages: list[Raw] = []  # of which only the last are looked into
    stream_options: Raw = Raw()


_MESSAGE: Final = Shape(_Message)
_REQUEST: Final = Shape(_Request)


def _last_turn(messages: Sequence[Raw]) -> tuple[str | None, str | None]:
    """The prompt, or the id of the tool result that this request continues with (wire.md D2, D3)."""
    for message in map(_MESSAGE.read, reversed(messages)):
        match message.role:
            case "user":
                return joined_text(message.content, "text"), None
            case "tool":
                return None, message.tool_call_id
            case "assistant" | "function":
                return None, None
    return None, None


class _TextPart(msgspec.Struct, gc=False):
    type: str | None = None
    text: Raw = Raw()


_TEXT_PART: Final = Shape(_TextPart)


def joined_text(content: Raw, part_type: str) -> str:
    """The text of a message whose content is a string or a list of parts."""
    if is_text(content):
        return text(content) or ""
    return "\n".join(text(part.text) or "" for part in _TEXT_PART.each(content) if part.type == part_type)


def _asks_for_usage(stream_options: Raw) -> bool | None:
    return boolean(members(stream_options).get("include_usage")) or False if stream_options else None


def _with_stream_options(body: bytes) -> bytes:
    end = body.rindex(b"}")
    view = memoryview(body)
    return b"".join((view[:end], b',"stream_options":{"include_usage":true}', view[end:]))


def _with_include_usage(body: bytes) -> bytes:
    span = member_span(body, "stream_options")  # a walk through the whole body: only where there is something to edit in it
    assert span is not None  # noqa: S101  it was just read
    start, end = span
    options = body[start:end]
    if options == b"null":
        return body[:start] + b'{"include_usage":true}' + body[end:]
    wanted = member_span(options, "include_usage")
    if wanted is not None:
        edited = options[: wanted[0]] + b"true" + options[wanted[1] :]
    else:
        comma = b"" if options[1:].lstrip().startswith(b"}") else b","
        edited = b'{"include_usage":true' + comma + options[1:]
    return body[:start] + edited + body[end:]


# A member at the end of an object needs no search: OpenAI's own place for it.
_LAST_USAGE: Final = b',"usage":null}'


class UsageFilter:
    """Takes the usage out of a stream again that carries it only because the bridge asked (failures.md 13).

    The extra chunk has empty ``choices`` and crashes clients that do not expect it; the other chunks carry
    ``"usage": null``. A usage beside real choices stays: the server sends it unasked.
    """

    def __init__(self) -> None:
        self._hid = False  # the last frame was taken out

    def feed(self, frames: Sequence[Frame]) -> bytes:
        """What the client may see of these frames, in its order."""
        return b"".join([self._shown(frame) for frame in frames])

    def _shown(self, frame: Frame) -> bytes:
        if self._hid and frame.raw == b"\n":  # the late half of the line end that the frame before it had
            return b""
        if frame.run:  # with quotes that are not escaped, so these are members and nothing else
            shown = frame.raw.replace(b'],"usage":null', b"]")
        else:
            shown = _without_usage(frame)
        self._hid = not shown
        return shown


def _without_usage(frame: Frame) -> bytes:
    data = frame.data
    if data is None or b'"usage"' not in data:
        return frame.raw
    chunk = members(data)
    usage, choices = chunk.get("usage"), chunk.get("choices")
    if usage is None or choices is None or error_text(chunk.get("error")) is not None:
        return frame.raw
    if not is_null(usage):
        return b"" if bytes(choices).translate(None, b" \t\r\n") == b"[]" else frame.raw
    if data.endswith(_LAST_USAGE) and data.count(b'"usage"') == 1:
        return frame.raw.replace(data, data[: -len(_LAST_USAGE)] + b"}")
    try:
        return frame.raw.replace(data, without_member(data, "usage"))
    except Unreadable:
        return frame.raw


class _Function(msgspec.Struct, gc=False):
    name: str | None = None
    arguments: str | None = None


class _Custom(msgspec.Struct, gc=False):
    name: str | None = None
    input: str | None = None


class _CallPart(msgspec.Struct):
    index: Count | None = None
    id: str | None = None
    function: _Function | None = None
    custom: _Custom | None = None


class _Detail(msgspec.Struct, gc=False):
    text: str | None = None
    summary: str | None = None


class _Part(msgspec.Struct):
    """A delta or a whole message: what the ledger wants of them has the same members."""

    tool_calls: list[_CallPart] | None = None
    function_call: _Function | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    reasoning_details: list[_Detail] | None = None


class _Answer(msgspec.Struct):
    index: Count | None = None
    delta: _Part | None = None
    message: _Part | None = None
    finish_reason: str | None = None


class _Chunk(msgspec.Struct):
    id: str | None = None
    model: str | None = None
    choices: list[_Answer] | None = None
    usage: Raw = Raw()
    error: Raw = Raw()


_CHUNK: Final = Shape(_Chunk)


class _Call:
    """A tool call, put together from its fragments."""

    __slots__ = ("custom", "id", "name", "pieces")

    def __init__(self) -> None:
        self.id: str | None = None
        self.name = ""
        self.custom = False
        self.pieces: list[str] = []

    def read(self, call: _CallPart) -> None:
        """`id` and `name` come once; an empty repetition says nothing (wire.md B2)."""
        self.id = self.id or call.id or self.id
        if call.custom is not None:
            self.custom = True
            self.name = self.name or call.custom.name or ""
            self.pieces.append(call.custom.input or "")
        elif call.function is not None:
            self.read_function(call.function)

    def read_function(self, function: _Function) -> None:
        self.name = self.name or function.name or ""
        self.pieces.append(function.arguments or "")

    def call(self) -> ToolCall:
        return ToolCall(self.id, self.name, "".join(self.pieces), {"type": "custom"} if self.custom else {})


class _Choice:
    """One of the `n` answers."""

    __slots__ = ("calls", "details", "finished", "legacy", "reasoning", "reasoning_content")

    def __init__(self) -> None:
        self.calls: dict[int, _Call] = {}
        self.legacy: _Call | None = None
        self.reasoning_content: list[str] = []
        self.reasoning: list[str] = []
        self.details: list[str] = []
        self.finished = False

    def read(self, part: _Part) -> None:
        for position, call in enumerate(part.tool_calls or ()):
            index = position if call.index is None else call.index
            if index not in self.calls:
                self.calls[index] = _Call()
            self.calls[index].read(call)
        if part.function_call is not None:
            self.legacy = self.legacy or _Call()
            self.legacy.read_function(part.function_call)
        if part.reasoning_content:
            self.reasoning_content.append(part.reasoning_content)
        if part.reasoning:
            self.reasoning.append(part.reasoning)
        for detail in part.reasoning_details or ():
            self.details.append(detail.text or detail.summary or "")

    def tool_calls(self, *, ended: bool) -> list[ToolCall]:
        """The calls whose arguments are whole: all of an ended choice, else those that another one has followed."""
        indexes = sorted(self.calls)
        calls = [self.calls[index].call() for index in (indexes if ended else indexes[:-1])]
        if self.legacy is not None and ended:
            calls.append(self.legacy.call())
        return calls

    def thought(self, *, ended: bool) -> Thought | None:
        """Dialects say the same thing twice: take the first that has text, not the sum (wire.md B3)."""
        dialects = (self.reasoning_content, self.reasoning, self.details)
        content = next(filter(None, ("".join(pieces) for pieces in dialects)), None)
        if content is None:
            return None
        details: dict[str, Any] = {} if ended else {"incomplete": True}
        return Thought("reasoning", content, details)


_BESIDE: Final = rb'(?:,"(?:object|created|provider|service_tier|system_fingerprint)":(?:%b|%b|null))*+' % (NAME, NATURAL)
_TEXT: Final = rb'"content":%b' % STRING
_PADDING: Final = rb'(?:,"obfuscation":%b)?+\}\n\n' % NAME


class ChatReader(ResponseReader):
    """One Chat Completions response."""

    # Text of the first choice. The ledger wants no more of a chunk than its id, its model and that there is such a choice.
    # Within a run all is the same but the text and the padding, so later chunks need only be compared.
    run: ClassVar[re.Pattern[bytes] | None] = re.compile(
        rb'data: (\{"id":%b%b,"model":%b%b,"choices":\[\{"index":0,"delta":\{(?:"role":"assistant",)?+)%b'
        rb'((?:,"[a-z_]++":null)*+\}(?:,"(?:finish_reason|logprobs|native_finish_reason|stop_reason|token_ids)":null)*+\}\]'
        rb'(?:,"usage":null)?+%b)%b(?:data: \1%b\2%b)*+'
        % (NAME, _BESIDE, NAME, _BESIDE, _TEXT, _BESIDE, _PADDING, _TEXT, _PADDING)
    )

    def __init__(self) -> None:
        self._id: str | None = None
        self._model: str | None = None
        self._usage: Raw | None = None
        self._usage_chunk = False
        self._choices: dict[int, _Choice] = {}
        self._stop_reason: str | None = None

    @property
    def ends_at_eof(self) -> bool:
        """``[DONE]`` may be missing: a stream whose choices have all finished has ended (wire.md B2)."""
        choices = self._choices.values()
        return self.finished or self._usage_chunk or (bool(choices) and all(choice.finished for choice in choices))

    def read_event(self, data: bytes) -> None:
        """Take in the data of one server-sent event."""
        if self.is_last(data):
            self.finished = True
            return
        self._read(_CHUNK.parse(data))

    def is_last(self, data: bytes) -> bool:
        """``[DONE]``."""
        return data.strip() == DONE

    def read_body(self, body: bytes) -> None:
        """Take in a whole JSON body."""
        self._read(_CHUNK.parse(body), whole=True)
        for choice in self._choices.values():
            choice.finished = True
        self.finished = True

    def facts(self) -> ResponseFacts:
        """What has been read so far. A thought that broke off is still a thought; a tool call that did was never made."""
        ended = self.finished and self.error is None
        choices = [(choice, ended or choice.finished) for _, choice in sorted(self._choices.items())]
        usage = chat_usage(self._usage)
        completeness: Completeness = "unknown" if usage is None else "complete"
        return ResponseFacts(
            response_id=self._id,
            model=self._model,
            usage=usage,
            completeness="partial" if self.error else completeness,
            tool_calls=tuple(call for choice, ended in choices for call in choice.tool_calls(ended=ended)),
            thoughts=tuple(thought for choice, ended in choices if (thought := choice.thought(ended=ended))),
            stop_reason=self._stop_reason,
            error=self.error,
        )

    def error_event(self, status: int, message: str) -> bytes:
        """A chunk with an ``error``, at which both SDKs raise (wire.md B2)."""
        return b"data: " + error_body("openai", status, message) + b"\n\n"

    def _read(self, chunk: _Chunk, *, whole: bool = False) -> None:
        self._id = chunk.id or self._id
        self._model = chunk.model or self._model
        choices = chunk.choices or ()
        for position, answer in enumerate(choices):
            index = position if answer.index is None else answer.index
            choice = self._choices.get(index)
            if choice is None:
                choice = self._choices[index] = _Choice()
            if (part := answer.message if whole else answer.delta) is not None:
                choice.read(part)
            if answer.finish_reason is not None:
                choice.finished = True
                self._stop_reason = answer.finish_reason
        if chunk.usage and members(chunk.usage):  # a running total where every chunk has one: the last counts
            self._usage = chunk.usage
            self._usage_chunk = not choices
        if chunk.error and (error := error_text(chunk.error)) is not None:
            self.error = error
            self.finished = True


def chat_usage(raw: Raw | None) -> Usage | None:
    """A Chat ``usage`` object, normalised: OpenAI's prompt tokens include what a cache read or wrote (wire.md B4)."""
    usage = members(raw)
    if raw is None or not usage:
        return None
    details = members(usage.get("prompt_tokens_details"))
    read = integer(details.get("cached_tokens"))
    if read is None:  # DeepSeek
        read = integer(usage.get("prompt_cache_hit_tokens"))
    write = integer(details.get("cache_write_tokens"))
    return Usage(
        input_tokens=without_cache(integer(usage.get("prompt_tokens")), read, write),
        output_tokens=integer(usage.get("completion_tokens")),
        cache_read_input_tokens=read,
        cache_write_input_tokens=write,
        raw=bytes(raw),
    )


def without_cache(total: int | None, read: int | None, write: int | None) -> int | None:
    """Input tokens that no cache was involved in; never negative, whatever the provider reports."""
    return None if total is None else max(0, total - (read or 0) - (write or 0))
