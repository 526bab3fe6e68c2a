"""The turns of Anthropic Messages: offering tools, and going on after calls. Facts from wire.md A4 to A7 and D4."""

from collections.abc import Iterator, Sequence
from typing import Final

import msgspec

from aibridge.tools import Media, Outcome, Text, Tool, Toolset
from aibridge.wire.messages_history import Block, Kept, MessagesDraft, assistant_message, written_message
from aibridge.wire.messages_merging import MessagesMerger
from aibridge.wire.reading import Members, Unreadable, members, parse_object, text
from aibridge.wire.splicing import (
    edited,
    json_string,
    member_span,
    separator,
    with_elements,
    with_member,
)
from aibridge.wire.turns import Answered, Draft, Memory, TurnFormat, TurnMerger, UsagePolicy

_IMAGES: Final = frozenset({"image/jpeg", "image/png", "image/gif", "image/webp"})


class MessagesTurns(TurnFormat):
    """The inner loop's side of the Messages protocol."""

    def read(self, body: bytes) -> MessagesDraft:
        """Read a request as the client sent it."""
        return MessagesDraft(body)

    def with_tools(self, body: bytes, toolset: Toolset) -> bytes:
        """The tools after the client's own, so that its cache mark on its last one stays where it is (wire.md A5)."""
        if not toolset:
            return body
        span = member_span(body, "tools")
        own = b"[]" if span is None or body[slice(*span)] == b"null" else body[slice(*span)]
        return with_member(body, "tools", with_elements(own, map(_offered, toolset.tools), separator(body)))

    def with_turn(self, body: bytes, answered: Answered, *, last: bool) -> bytes:
        """The conversation with the provider's message and one of ours with the results (wire.md D4)."""
        turn = _kept(answered)
        results = [piece.result for piece in turn if piece.result is not None]
        new = [*assistant_message(piece.raw for piece in turn), written_message("user", results)]
        span = member_span(body, "messages")
        if span is None:
            raise Unreadable("no messages")
        messages = with_elements(body[slice(*span)], new, separator(body))
        choice = _relaxed(members(parse_object(body).get("tool_choice")), last=last)
        body = edited(body, [(*span, messages)])
        return body if choice is None else with_member(body, "tool_choice", choice)

    def merger(self, body: bytes, toolset: Toolset, usage: UsagePolicy, *, hides_usage: bool = False) -> TurnMerger:  # noqa: ARG002
        """A fresh merger. Usage never has to be asked for in this protocol, and so not to be hidden."""
        return MessagesMerger(toolset, usage)

    def memory(self, draft: Draft, toolset: Toolset, turns: Sequence[Answered]) -> Memory:
        """What was hidden, under what is never said twice in what was shown, and under what was said until then."""
        assert isinstance(draft, MessagesDraft)  # noqa: S101  it is one that `read` made
        shown = [Block.read(piece.raw) for answered in turns for piece in answered.turn.pieces if piece.call is None]
        hides = any(piece.call is not None for answered in turns for piece in answered.turn.pieces)
        strong = [block.key for block in shown if block.key is not None]
        keys = dict.fromkeys([*strong, draft.said.key("assistant", (block.word for block in shown))])
        kept = [_kept(answered) for answered in turns]
        return Memory(tuple(keys), toolset.digest, msgspec.msgpack.encode(kept) if hides else b"")


def _kept(answered: Answered) -> list[Kept]:
    """The pieces of a turn without the hidden calls that nobody answered."""
    outcomes = iter(answered.outcomes)
    kept: list[Kept] = []
    for piece in answered.turn.pieces:
        if piece.call is None:
            kept.append(Kept(piece.raw))
        elif (outcome := next(outcomes, None)) is not None:
            kept.append(Kept(piece.raw, _result(piece.call.id, outcome)))
    return kept


def _offered(tool: Tool) -> bytes:
    parts = (json_string(tool.name), json_string(tool.description), tool.schema.encode())
    return b'{"name":%b,"description":%b,"input_schema":%b}' % parts


def _result(call_id: str, outcome: Outcome) -> bytes:
    """The same bytes for the same outcome, today and when it is put back."""
    content = [block for part in outcome.content for block in _shown(part)] or list(_shown(Text("(no output)")))
    failed = b',"is_error":true' if outcome.is_error else b""
    return b'{"type":"tool_result","tool_use_id":%b,"content":[%b]%b}' % (json_string(call_id), b",".join(content), failed)


def _shown(part: Text | Media) -> Iterator[bytes]:
    """What the protocol has for a part of a result; for text without words nothing, as it is refused."""
    match part:
        case Media(media_type=media_type, data=data) if part.kind == "image" and media_type in _IMAGES:
            yield _media("image", media_type, data)
        case Media(media_type="application/pdf", data=data):
            yield _media("document", "application/pdf", data)
        case Media():
            yield from _shown(Text(part.described))
        case Text(text=words) if words.strip():
            yield b'{"type":"text","text":%b}' % json_string(words)


def _media(kind: str, media_type: str, data: str) -> bytes:
    parts = (kind.encode(), media_type.encode(), json_string(data))
    return b'{"type":"%b","source":{"type":"base64","media_type":"%b","data":%b}}' % parts


def _relaxed(choice: Members, *, last: bool) -> bytes | None:
    """The choice of tools after a turn; None where the client's stays. A forced one would never end (wire.md D4)."""
    if last:
        return b'{"type":"none"}'
    if text(choice.get("type")) not in ("any", "tool"):
        return None
    parallel = choice.get("disable_parallel_tool_use")
    return b'{"type":"auto"%b}' % (b"" if parallel is None else b',"disable_parallel_tool_use":%b' % bytes(parallel))
