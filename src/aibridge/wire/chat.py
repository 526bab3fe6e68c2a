"""OpenAI Chat Completions: ``POST /v1/chat/completions``, and the many servers that speak it. Facts from wire.md B, D."""

from dataclasses import replace
from typing import Any, ClassVar, Final

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
    Members,
    Unreadable,
    boolean,
    integer,
    is_null,
    items,
    members,
    parse_object,
    text,
)
from aibridge.wire.splicing import member_span, without_member
from aibridge.wire.sse import Frame, SseDecoder
from aibridge.wire.turns import TurnFormat


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
        if not request.facts.stream or request.coding:
            return request
        try:
            body = _with_include_usage(request.body)
        except Unreadable:
            return request
        return request if body == request.body else replace(request, body=body, hides_usage=True)

    def response_filter(self, request: Request) -> ResponseFilter | None:
        """What takes the usage chunk out again for a client that did not ask for it."""
        return UsageFilter() if request.hides_usage else None

    def _facts(self, top: Members) -> RequestFacts:
        prompt, tool_call_id = _last_turn(items(top.get("messages")))
        return RequestFacts(
            model=text(top.get("model")),
            stream=boolean(top.get("stream")) or False,
            prompt=prompt,
            correlating_tool_call_id=tool_call_id,
        )


CHAT: Final = ChatFormat()


def _last_turn(messages: list[Raw]) -> tuple[str | None, str | None]:
    """The prompt, or the id of the tool result that this request continues with (wire.md D2, D3)."""
    for raw in reversed(messages):
        message = members(raw)
        match text(message.get("role")):
            case "user":
                return joined_text(message.get("content"), "text"), None
            case "tool":
                return None, text(message.get("tool_call_id"))
            case "assistant" | "function":
                return None, None
    return None, None


def joined_text(content: Raw | None, part_type: str) -> str:
    """The text of a message whose content is a string or a list of parts."""
    plain = text(content)
    if plain is not None:
        return plain
    parts = (members(raw) for raw in items(content))
    return "\n".join(text(part.get("text")) or "" for part in parts if text(part.get("type")) == part_type)


def _with_include_usage(body: bytes) -> bytes:
    if body.startswith(b"\xef\xbb\xbf"):  # a byte order mark: no JSON to many servers, so not ours to edit
        return body
    given = parse_object(body).get("stream_options")
    if given is None:
        end = body.rindex(b"}")
        return body[:end] + b',"stream_options":{"include_usage":true}' + body[end:]
    if boolean(members(given).get("include_usage")):
        return body
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


class UsageFilter:
    """Takes the usage out of a stream again that carries it only because the bridge asked (failures.md 13).

    The extra chunk has empty ``choices`` and crashes clients that do not expect it; the other chunks carry
    ``"usage": null``. A usage beside real choices stays: the server sends it unasked.
    """

    def __init__(self) -> None:
        self._decoder = SseDecoder()
        self._hid = False  # the last frame was taken out

    def feed(self, chunk: bytes) -> bytes:
        """What the client may see of the stream so far, in whole frames."""
        return b"".join(map(self._shown, self._decoder.feed(chunk)))

    def rest(self) -> bytes:
        """What of a frame the end of the stream left without its blank line, which clients read all the same."""
        rest = self._decoder.rest
        return b"".join(_without_usage(replace(frame, raw=rest)) for frame in self._decoder.feed(b"\n\n")[:1])

    def _shown(self, frame: Frame) -> bytes:
        if self._hid and frame.raw == b"\n":  # the late half of the line end that the frame before it had
            return b""
        shown = _without_usage(frame)
        self._hid = not shown
        return shown


def _without_usage(frame: Frame) -> bytes:
    if frame.data is None or b'"usage"' not in frame.data:
        return frame.raw
    chunk = members(frame.data)
    usage, choices = chunk.get("usage"), chunk.get("choices")
    if usage is None or choices is None or error_text(chunk.get("error")) is not None:
        return frame.raw
    if not is_null(usage):
        return b"" if bytes(choices).translate(None, b" \t\r\n") == b"[]" else frame.raw
    try:
        return frame.raw.replace(frame.data, without_member(frame.data, "usage"))
    except Unreadable:
        return frame.raw


class _Call:
    """A tool call, put together from its fragments."""

    __slots__ = ("custom", "id", "name", "pieces")

    def __init__(self) -> None:
        self.id: str | None = None
        self.name = ""
        self.custom = False
        self.pieces: list[str] = []

    def read(self, call: Members) -> None:
        """`id` and `name` come once; an empty repetition says nothing (wire.md B2)."""
        self.id = self.id or text(call.get("id")) or self.id
        if "custom" in call:
            self.custom = True
            function, arguments = members(call.get("custom")), "input"
        else:
            function, arguments = members(call.get("function")), "arguments"
        self.name = self.name or text(function.get("name")) or ""
        self.pieces.append(text(function.get(arguments)) or "")

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

    def read(self, message: Members) -> None:
        """Take in a delta or a whole message: their members are the same."""
        for position, call in enumerate(map(members, items(message.get("tool_calls")))):
            index = integer(call.get("index"))
            self.calls.setdefault(position if index is None else index, _Call()).read(call)
        if "function_call" in message and not is_null(message["function_call"]):
            self.legacy = self.legacy or _Call()
            self.legacy.read({"function": message["function_call"]})
        self.reasoning_content.append(text(message.get("reasoning_content")) or "")
        self.reasoning.append(text(message.get("reasoning")) or "")
        for detail in map(members, items(message.get("reasoning_details"))):
            self.details.append(text(detail.get("text")) or text(detail.get("summary")) or "")

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


class ChatReader(ResponseReader):
    """One Chat Completions response."""

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
        if data.strip() == DONE:
            self.finished = True
            return
        self._read(parse_object(data), "delta")

    def is_last(self, data: bytes) -> bool:
        """``[DONE]``."""
        return data.strip() == DONE

    def read_body(self, body: bytes) -> None:
        """Take in a whole JSON body."""
        self._read(parse_object(body), "message")
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

    def _read(self, chunk: Members, message: str) -> None:
        self._id = text(chunk.get("id")) or self._id
        self._model = text(chunk.get("model")) or self._model
        choices = items(chunk.get("choices"))
        for position, choice in enumerate(map(members, choices)):
            index = integer(choice.get("index"))
            state = self._choices.setdefault(position if index is None else index, _Choice())
            state.read(members(choice.get(message)))
            if (reason := text(choice.get("finish_reason"))) is not None:
                state.finished = True
                self._stop_reason = reason
        if "usage" in chunk and members(chunk["usage"]):  # a running total where every chunk has one: the last counts
            self._usage = chunk["usage"]
            self._usage_chunk = not choices
        if (error := error_text(chunk.get("error"))) is not None:
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
