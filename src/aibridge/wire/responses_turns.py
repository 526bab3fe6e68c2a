"""The inner loop of injected tools in the Responses protocol. Facts from wire.md C1 to C5, D4 and D6.

Where the provider keeps the conversation, because the client named a `previous_response_id` or a `conversation`, a request
brings only what is new. Otherwise every request brings everything, also where the provider stores the response: what the
client sends is then enough to go on from.
"""

from collections.abc import Sequence
from typing import Final

import msgspec
from msgspec import Raw

from aibridge.tools import Call, Media, Outcome, Text, Tool, Toolset
from aibridge.wire.reading import members, parse_object, text
from aibridge.wire.responses_history import (
    Entry,
    Item,
    Kept,
    ResponsesDraft,
    conversation_of,
    input_array,
    is_present,
    kept_of,
    response_key,
)
from aibridge.wire.responses_merging import ResponsesMerger, member_bytes, without_elements, without_tools
from aibridge.wire.splicing import (
    json_string,
    separator,
    with_elements,
    with_member,
)
from aibridge.wire.turns import Answered, Draft, Memory, TurnFormat, TurnMerger, UsagePolicy

__all__ = ["ResponsesTurns", "response_key", "shown_items", "shown_response", "upstream_ids"]

_NOT_MADE: Final = Outcome.failed("The call was not made.")


class ResponsesTurns(TurnFormat):
    """The Responses protocol's side of the inner loop."""

    def read(self, body: bytes) -> ResponsesDraft:
        """Read a request as the client sent it."""
        return ResponsesDraft(body)

    def with_tools(self, body: bytes, toolset: Toolset) -> bytes:
        """The request with the tools at the end of its own."""
        if not len(toolset):
            return body
        tools = member_bytes(body, "tools")
        if tools is None or tools == b"null":
            tools = b"[]"
        return with_member(body, "tools", with_elements(tools, map(_tool, toolset.tools), separator(body)))

    def with_turn(self, body: bytes, answered: Answered, *, last: bool) -> bytes:
        """The request that goes on after a turn: with the results only, where the provider keeps the conversation."""
        top = parse_object(body)
        turn = answered.turn
        new = [_output(call, outcome) for call, outcome in _answers(answered)]
        array = b"[]"
        if text(top.get("previous_response_id")) is not None and turn.response_id is not None:
            body = with_member(body, "previous_response_id", json_string(turn.response_id))
        elif conversation_of(top) is None:
            array = input_array(body)
            new = [*(piece.raw for piece in turn.pieces), *new]
        body = with_member(body, "input", with_elements(array, new, separator(body)))
        choice = b'"none"' if last else _relaxed(top.get("tool_choice"), body)
        return body if choice is None else with_member(body, "tool_choice", choice)

    def merger(
        self,
        body: bytes,
        toolset: Toolset,
        usage: UsagePolicy,
        *,
        hides_usage: bool = False,  # noqa: ARG002  the protocol always reports it
    ) -> TurnMerger:
        """A fresh merger for the responses to a request."""
        return ResponsesMerger(body, toolset, usage)

    def memory(self, draft: Draft, toolset: Toolset, turns: Sequence[Answered]) -> Memory:
        """What to remember of the response to a request."""
        assert isinstance(draft, ResponsesDraft)  # noqa: S101  it is ours
        ids = tuple(answered.turn.response_id for answered in turns if answered.turn.response_id is not None)
        entries = [entry for answered in turns for entry in _entries(answered)]
        pending = [_output(call, outcome) for call, outcome in _pending(turns[-1])] if turns else []
        keys = [response_key(ids[0])] if ids else []
        if draft.conversation is not None:
            keys += draft.state_keys
        said = draft.said()
        keys += [key for entry in entries if not entry.hidden for key in said.add(Item.read(entry.raw))]
        last_id = ids[-1] if ids[:1] != ids[-1:] else None
        data = b""
        if pending or last_id is not None or any(entry.hidden for entry in entries):
            data = msgspec.msgpack.encode(Kept(ids, draft.previous, tuple(entries), tuple(pending)))
        return Memory(tuple(dict.fromkeys(keys)), toolset.digest, data, last_id)


def upstream_ids(memory: Memory) -> list[str]:
    """The ids of the provider's responses that the client knows as one: only the last where the others were dropped."""
    return list(kept_of(memory).ids) or ([] if memory.last_id is None else [memory.last_id])


def shown_response(body: bytes, memory: Memory, toolset: Toolset | None = None) -> bytes:
    """A response object that was asked for by its id, as the client knows it. Raises `aibridge.wire.reading.Unreadable`.

    `toolset` are the tools that its conversation was offered: the provider repeats them. The id of the response before it is
    the client's where something of this one was hidden.
    """
    if toolset is not None:
        body = without_tools(body, toolset)
    kept = kept_of(memory)
    if not kept.ids:
        return body
    shown = [entry.raw for entry in kept.entries if not entry.hidden]
    body = with_member(body, "id", json_string(kept.ids[0]))
    body = with_member(body, "output", b"[" + separator(body).join(shown) + b"]")
    if is_present(parse_object(body), "previous_response_id"):
        body = with_member(body, "previous_response_id", b"null" if kept.previous is None else json_string(kept.previous))
    return body


def shown_items(body: bytes, memory: Memory) -> bytes:
    """A list of a response's input items without hidden calls and results. Raises `aibridge.wire.reading.Unreadable`."""
    hidden = {_call_id(entry.raw) for entry in kept_of(memory).entries if entry.hidden}
    hidden |= {_call_id(raw) for raw in kept_of(memory).pending}
    data = member_bytes(body, "data")
    if data is None or not hidden:
        return body
    return with_member(body, "data", without_elements(data, lambda raw: _call_id(raw) in hidden))


def _call_id(raw: bytes) -> str | None:
    return text(members(raw).get("call_id")) or None


def _entries(answered: Answered) -> list[Entry]:
    """The items of a turn, then the results of its hidden calls, as `with_turn` puts them. Unanswered ones are forgotten."""
    answers = _answers(answered)
    calls = len(answers)
    entries: list[Entry] = []
    for piece in answered.turn.pieces:
        if piece.call is None:
            entries.append(Entry(piece.raw))
        elif calls:
            calls -= 1
            entries.append(Entry(piece.raw, hidden=True))
    return entries + [Entry(_output(call, outcome), hidden=True) for call, outcome in answers]


def _answers(answered: Answered) -> list[tuple[Call, Outcome]]:
    """By position: compatible servers give several calls one id (wire.md D3)."""
    return list(zip(answered.turn.calls, answered.outcomes, strict=False))


def _pending(answered: Answered) -> list[tuple[Call, Outcome]]:
    """What came of the calls of a turn that the provider keeps, and that no request went on from."""
    calls = [piece.call for piece in answered.turn.pieces if piece.call is not None]
    outcomes = [*answered.outcomes, *[_NOT_MADE] * len(calls)]
    return list(zip(calls, outcomes, strict=False))


def _output(call: Call, outcome: Outcome) -> bytes:
    """What came of a call as an item. Images are shown, of other media is told."""
    if any(isinstance(part, Media) and part.kind == "image" for part in outcome.content):
        value = b"[" + b",".join(map(_output_part, outcome.content)) + b"]"
    else:
        words = [part.text if isinstance(part, Text) else part.described for part in outcome.content]
        value = json_string("\n".join(word for word in words if word.strip()) or "(no output)")
    return b'{"type":"function_call_output","call_id":%b,"output":%b}' % (json_string(call.id), value)


def _output_part(part: Text | Media) -> bytes:
    if isinstance(part, Media) and part.kind == "image":
        return b'{"type":"input_image","image_url":%b}' % json_string(f"data:{part.media_type};base64,{part.data}")
    return b'{"type":"input_text","text":%b}' % json_string(part.text if isinstance(part, Text) else part.described)


def _tool(tool: Tool) -> bytes:
    """A tool as a model is offered it. Schemas of MCP servers are not strict, which is the default here (wire.md C1)."""
    words = (json_string(tool.name), json_string(tool.description), tool.schema.encode())
    return b'{"type":"function","name":%b,"description":%b,"parameters":%b,"strict":false}' % words


def _relaxed(choice: Raw | None, body: bytes) -> bytes | None:
    """The choice that forces no call any more; None where the client's does not."""
    if text(choice) == "required":
        return b'"auto"'
    chosen = members(choice)
    if not chosen:
        return None
    if text(chosen.get("type")) != "allowed_tools":
        return b'"auto"'
    if text(chosen.get("mode")) != "required":
        return None
    return with_member(member_bytes(body, "tool_choice") or b"", "mode", b'"auto"')
