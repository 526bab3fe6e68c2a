"""Several responses of Anthropic Messages as one. Facts from wire.md A7 to A10, D5 and E."""

from typing import ClassVar, Final

import msgspec
from msgspec import Raw

from aibridge.errors import error_body
from aibridge.tools import Call, Toolset
from aibridge.wire.reading import (
    Members,
    Unreadable,
    integer,
    is_null,
    is_whole_object,
    source,
    text,
)
from aibridge.wire.splicing import (
    inner_elements,
    inner_members,
    with_member,
    written_members,
)
from aibridge.wire.sse import Frame
from aibridge.wire.turns import Piece, Turn, TurnMerger, UsagePolicy
from aibridge.wire.usage import merged_usage

# Stop reasons of a turn that was not finished: a call in it may be truncated, and its author did not wait for an answer
# (wire.md A7).
_UNFINISHED: Final = frozenset({"max_tokens", "model_context_window_exceeded", "refusal", "pause_turn", "compaction"})

_ENDING: Final = frozenset({"message_delta", "message_stop", "error"})

# What a later `message_delta` must not wipe: compatible servers send 0 there (wire.md A8, failures.md 2).
_PROMPT_COUNTERS: Final = frozenset({"input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens"})

_NO_OBJECT: Final = "The arguments were not a whole JSON object, so the call was not made."


def update_usage(known: dict[str, Raw], usage: Members, *, fallback: bool) -> None:
    """Take further figures of a response into those that are known.

    Every figure is a running total of the message: overwrite, never add; null and absent keep what was known (wire.md A8).
    `fallback`: another model took over, and its figures replace those of the first.
    """
    for name, raw in usage.items():
        if is_null(raw):
            continue
        if name in _PROMPT_COUNTERS and not fallback:
            before = integer(known.get(name))
            if before is not None and before > (integer(raw) or 0):
                continue
        known[name] = raw


class _Block:
    """A content block: the text that it began with, or was whole with, and what the deltas of a stream added to it.

    Strings are joined as they are written, escapes and all, so that what goes back to the provider is what it sent.
    `index` is what the client knows it by, None where it is hidden.
    """

    def __init__(self, raw: bytes, toolset: Toolset) -> None:
        self.raw = raw if raw.startswith(b"{") else b"{}"
        self.index: int | None = None
        self._members = inner_members(raw)
        self.kind = text(self._members.get("type")) or ""
        self.tool = toolset.get(text(self._members.get("name"))) if self.kind == "tool_use" else None
        self._added: dict[str, list[bytes]] = {}
        self._replaced: dict[str, bytes] = {}
        self._citations: list[bytes] = []

    def read_delta(self, delta: Members) -> None:
        """How each kind adds up: wire.md A9. Of kinds that nobody knows yet, strings grow as text does."""
        given = {name: bytes(raw) for name, raw in delta.items() if name != "type"}
        match text(delta.get("type")):
            case "input_json_delta":
                self._add("input", given.get("partial_json", b""))
            case "signature_delta" | "compaction_delta":
                self._replaced |= given
            case "citations_delta":
                self._citations += [raw for name, raw in given.items() if name == "citation"]
            case _:
                for name, raw in given.items():
                    self._add(name, raw)

    def _add(self, name: str, string: bytes) -> None:
        if string.startswith(b'"'):
            self._added.setdefault(name, []).append(string[1:-1])

    def whole(self) -> bytes:
        """The block with all that was added to it, its members in the order in which it began."""
        new = dict(self._replaced)
        for name, parts in self._added.items():
            begun = bytes(self._members.get(name, b""))
            new[name] = b'"%b%b"' % (begun[1:-1] if begun.startswith(b'"') else b"", b"".join(parts))
        if self._citations:
            new["citations"] = b"[%b]" % b",".join([*inner_elements(self._members.get("citations")), *self._citations])
        has_input = new.pop("input", None) is None and is_whole_object(source(self._members.get("input")) or "")
        raw = self.raw
        for name, value in new.items():
            raw = with_member(raw, name, value)
        if has_input or not self.kind.endswith("tool_use"):
            return raw
        arguments = self._arguments()  # put in last: whatever is in them, nobody has to find a way through it
        return with_member(raw, "input", arguments.encode() if is_whole_object(arguments) else b"{}")

    def call(self) -> Call | None:
        """The call of an injected tool that it is."""
        if self.tool is None:
            return None
        arguments = self._arguments()
        refusal = None if is_whole_object(arguments) else _NO_OBJECT
        return Call(text(self._members.get("id")) or "", self.tool, arguments, refusal)

    def _arguments(self) -> str:
        """What was streamed of them; else what the block began with, which for none is a placeholder (wire.md A9)."""
        streamed = b"".join(self._added.get("input", ()))
        if not streamed:
            return source(self._members.get("input")) or "{}"
        return text(Raw(b'"%b"' % streamed)) or ""


class _Response:
    """One response of the provider, as far as it has come."""

    def __init__(self) -> None:
        self.message: Members = {}
        self.blocks: list[_Block] = []
        self.open: dict[int, _Block] = {}  # by the provider's index
        self.usage: dict[str, Raw] = {}
        self.stop_reason: str | None = None
        self.whole = True  # all of it could be read, and the provider did not give up on it
        self.held: list[Frame] = []  # what ends it
        self.body: bytes | None = None

    def read_start(self, message: Members) -> None:
        self.message = message
        self.stop_reason = text(message.get("stop_reason"))
        self.read_usage(message)

    def read_usage(self, holder: Members) -> None:
        update_usage(
            self.usage, inner_members(holder.get("usage")), fallback=any(block.kind == "fallback" for block in self.blocks)
        )

    @property
    def hides(self) -> bool:
        """There are injected calls in it."""
        return any(block.tool is not None for block in self.blocks)

    @property
    def awaits_client(self) -> bool:
        return any(block.kind == "tool_use" and block.tool is None for block in self.blocks)


class MessagesMerger(TurnMerger):
    """Presents several responses as one message.

    The first ``message_start`` is the message's; those of later responses are swallowed. Blocks are numbered on, without
    those that are hidden: a gap or a number that is used twice makes clients fail, or glue texts together (wire.md D5).
    Until something is hidden the provider's own numbers stay, however odd.
    """

    keep_alive: ClassVar[bytes] = b'event: ping\ndata: {"type":"ping"}\n\n'

    def __init__(self, toolset: Toolset, usage: UsagePolicy) -> None:
        self._toolset = toolset
        self._policy: UsagePolicy = usage
        self._responses: list[_Response] = []
        self._started = False
        self._next = 0  # the index of the next block that the client sees
        self._verbatim = True

    @property
    def _now(self) -> _Response:
        return self._responses[-1]

    def begin(self) -> None:
        """A response begins. What the one before it ended with is never shown."""
        self._verbatim = not self._responses
        self._responses.append(_Response())

    def read_event(self, frame: Frame) -> bytes:
        """What the client may see now. Raises `Unreadable`; a response of which something cannot be read calls nothing."""
        now = self._now
        if frame.data is None:
            now.whole = now.whole and not frame.oversized
            return self._hold(frame) if now.held else frame.raw
        try:
            event = written_members(frame.data)
        except Unreadable:
            now.whole = False
            raise
        kind = text(event.get("type")) or ""
        if kind.startswith("content_block"):
            early, now.held = now.held, []  # it was no end
            return b"".join(map(self._shown, early)) + self._read_block(kind, event, frame)
        match kind:
            case "message_start":
                now.read_start(inner_members(event.get("message")))
                is_first, self._started = self._verbatim or not self._started, True
                return frame.raw if is_first else b""
            case "message_delta":
                now.stop_reason = text(inner_members(event.get("delta")).get("stop_reason")) or now.stop_reason
                now.read_usage(event)
            case "error":
                now.whole = False
        return self._hold(frame) if now.held or kind in _ENDING else frame.raw

    def _hold(self, frame: Frame) -> bytes:
        self._now.held.append(frame)
        return b""

    def _read_block(self, kind: str, event: Members, frame: Frame) -> bytes:
        assert frame.data is not None  # noqa: S101  it was just read
        index = integer(event.get("index")) or 0
        if kind == "content_block_start":
            self._open_block(index, bytes(event.get("content_block", b"")))
        block = self._now.open.get(index)
        if block is None:
            return frame.raw if self._verbatim else b""
        if kind == "content_block_delta":
            block.read_delta(inner_members(event.get("delta")))
        if block.index is None:
            return b""
        if block.index == index:
            return frame.raw
        return frame.with_data(with_member(frame.data, "index", b"%d" % block.index))

    def _open_block(self, index: int, raw: bytes) -> None:
        block = _Block(raw, self._toolset)
        self._now.blocks.append(block)
        self._now.open[index] = block
        if block.tool is not None:
            self._verbatim = False
            return
        block.index = index if self._verbatim else self._next
        self._next = max(self._next, block.index + 1)

    def read_body(self, body: bytes) -> None:
        """Take in a message as a whole. Raises `Unreadable`."""
        now = self._now
        now.body = body
        now.read_start(written_members(body))
        now.blocks = [_Block(raw, self._toolset) for raw in inner_elements(now.message.get("content"))]

    def turn(self) -> Turn:
        """The turn of the response that has ended. One that was not finished calls nothing: its calls are forgotten."""
        now = self._now
        pieces = tuple(Piece(block.whole(), block.call()) for block in now.blocks)
        finished = now.whole and now.stop_reason not in _UNFINISHED
        calls = tuple(piece.call for piece in pieces if piece.call is not None and finished)
        return Turn(pieces, calls, now.awaits_client, text(now.message.get("id")))

    def finish(self) -> bytes:
        """The last events, or the body, with the usage of all responses."""
        if self._now.body is not None:
            return self._merged(self._now.body)
        return b"".join(map(self._shown, self._now.held))

    def error_event(self, status: int, message: str, body: bytes = b"") -> bytes:
        """``event: error``, which clients raise (wire.md A10)."""
        error = body if "error" in inner_members(body) else error_body("anthropic", status, message)
        return b"event: error\ndata: " + b" ".join(error.splitlines()) + b"\n\n"

    @property
    def _stop_reason(self) -> bytes | None:
        """What the client is told in place of ``tool_use``, where there are only calls that it must not see."""
        now = self._now
        return b'"end_turn"' if now.hides and not now.awaits_client and now.stop_reason == "tool_use" else None

    @property
    def _usage(self) -> bytes | None:
        """What the client is told of the tokens of several responses."""
        usages = [msgspec.json.encode(response.usage) for response in self._responses if response.usage]
        return merged_usage(usages, self._policy) if len(self._responses) > 1 and usages else None

    def _shown(self, frame: Frame) -> bytes:
        """A frame that was held, as the client gets it."""
        event = {} if frame.data is None else written_members(frame.data)
        if frame.data is None or text(event.get("type")) != "message_delta":
            return frame.raw
        data, delta = frame.data, event.get("delta")
        if (usage := self._usage) is not None:
            data = with_member(data, "usage", usage)
        if (reason := self._stop_reason) is not None and text(inner_members(delta).get("stop_reason")) == "tool_use":
            data = with_member(data, "delta", with_member(bytes(delta or b""), "stop_reason", reason))
        return frame.raw if data == frame.data else frame.with_data(data)

    def _merged(self, body: bytes) -> bytes:
        """The last body with what all of them say; one that is no message, or the only one, as it is."""
        first, now = self._responses[0], self._now
        several = len(self._responses) > 1
        if "content" not in now.message or not (several or now.hides):
            return body
        shown = (block.raw for response in self._responses for block in response.blocks if block.tool is None)
        new: dict[str, bytes | None] = {"content": b"[%b]" % b",".join(shown), "stop_reason": self._stop_reason}
        if several:
            new |= {name: bytes(first.message[name]) for name in ("id", "model") if name in first.message}
            new["usage"] = self._usage
        for name, value in new.items():
            if value is not None:
                body = with_member(body, name, value)
        return body
