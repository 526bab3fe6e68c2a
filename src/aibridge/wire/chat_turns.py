"""What the inner loop needs of Chat Completions: tools, turns, and what was hidden. Facts from wire.md B1, B3, D3 to D6, E.

A turn is one message. What a response hid is remembered as the messages that the provider saw in place of the one that
the client got: all or none of them come back, because a client repeats its message as a whole.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec
from msgspec import Raw

from aibridge.tools import Outcome, Text, Tool, Toolset
from aibridge.wire.chat_assembly import (
    arguments_of,
    exact_items,
    injected_tool,
    with_list,
)
from aibridge.wire.chat_merging import ChatMerger
from aibridge.wire.reading import Members, Unreadable, integer, is_null, items, members, text
from aibridge.wire.splicing import (
    Edit,
    edited,
    element_spans,
    inner_members,
    member_span,
    separator,
    with_elements,
    with_member,
)
from aibridge.wire.turns import (
    Answered,
    Draft,
    Memory,
    Prefix,
    Restored,
    TurnFormat,
    UsagePolicy,
    is_strong,
    key_of,
)

_STRUCTURED: Final = frozenset({"json_object", "json_schema"})

# Who the client says its end user is: a service account talks for many people.
_END_USER: Final = ("user", "safety_identifier")


class _Hidden(msgspec.Struct, frozen=True, array_like=True):
    """What stands in the conversation in place of the message that the client repeats.

    `after` is the key of the conversation before it. `parked` has a place for each call of the last message, where some are
    the client's: the result, or None where the client gives it. Not `whole`: the response broke off after its hidden turns,
    and what the client has of it goes on.
    """

    messages: tuple[bytes, ...]
    after: str
    parked: tuple[bytes | None, ...] = ()
    whole: bool = True


@dataclass(frozen=True, slots=True)
class _Asked:
    """A call as a message has it: `raw` is its JSON text, `meaning` its arguments in one form."""

    id: str
    name: str
    meaning: str
    raw: bytes


@dataclass(frozen=True, slots=True)
class _Replayed:
    """A message of the model in a request: its place, what it says, and the keys under which memories of it may be.

    `begun` is the key of the conversation before it, and of a response that broke off: nobody knows how far the client
    followed it.
    """

    position: int
    said: str
    calls: tuple[_Asked, ...]
    key: str
    begun: str
    bound: bool


# --- reading messages -------------------------------------------------------------------------------------------------


def _text(content: Raw | None) -> str:
    """The text of a message. A string and a list with that text are the same; null, absent and empty, too."""
    plain = text(content)
    if plain is not None:
        return plain
    return "".join(text(part.get("text")) or "" for part in map(members, items(content)))


def _asked(entries: Sequence[Raw]) -> tuple[_Asked, ...]:
    found = []
    for raw in entries:
        entry = members(raw)
        what = members(entry.get("custom" if "custom" in entry else "function"))
        meaning = _meaning(arguments_of(what.get("input" if "custom" in entry else "arguments")))
        found.append(_Asked(text(entry.get("id")) or "", text(what.get("name")) or "", meaning, bytes(raw)))
    return tuple(found)


def _meaning(arguments: str) -> str:
    """Arguments in one form: clients that decode and encode them change spaces, order and numbers."""
    try:
        return json.dumps(json.loads(arguments or "{}", parse_int=float), sort_keys=True)
    except (ValueError, RecursionError):
        return arguments


def _key(before: Prefix, said: str, calls: Sequence[_Asked]) -> str:
    """What a message will be known by: the ids of its calls, if a provider gives them only once, else all that was said."""
    if calls and all(is_strong(call.id) for call in calls):
        return key_of("calls", json.dumps([call.id for call in calls]))
    return before.key("assistant", said, *(word for call in calls for word in (call.name, call.meaning)))


def _is_given(value: Raw | None) -> bool:
    return value is not None and not is_null(value)


def _objection(top: Members) -> str | None:
    """Why a request cannot have more tools (wire.md B1, B2)."""
    if (integer(top.get("n")) or 1) > 1:
        return "several choices are asked for"
    for name in ("functions", "function_call", "prediction", "web_search_options", "audio"):
        if _is_given(top.get(name)):
            return f"{name} is asked for"
    if "audio" in map(text, items(top.get("modalities"))):
        return "audio is asked for"
    return None


# --- requests ---------------------------------------------------------------------------------------------------------


class ChatDraft(Draft):
    """A Chat Completions request as the client sent it. `said` is the digest of whom it is for and of its conversation.

    System and developer messages are not in the digest: clients keep them up to date (the date, open files). Nor are the
    arguments and results of calls, which clients clear when they are old.
    """

    def __init__(self, body: bytes) -> None:
        self.body = body
        self.said = Prefix()
        self._replayed: list[_Replayed] = []
        self._messages: list[Members] = []
        self._spans: list[tuple[int, int]] = []
        top = members(body)
        self.said.add(*(text(top.get(name)) or "" for name in _END_USER))
        tools = items(top.get("tools"))
        kinds = (tool.get("function") or tool.get("custom") for tool in map(members, tools))
        self.tool_names = frozenset(name for kind in kinds if (name := text(members(kind).get("name"))) is not None)
        try:
            self._read_messages()
        except Unreadable:
            self.objection = "there are no messages"
        else:
            self.objection = _objection(top)
        self.is_aside = not tools and text(members(top.get("response_format")).get("type")) in _STRUCTURED
        self.keys = tuple(key for replayed in self._replayed for key in (replayed.key, replayed.begun))

    def _read_messages(self) -> None:
        start, end = _messages_span(self.body)
        array = self.body[start:end]
        self._spans = [(start + first, start + last) for first, last in element_spans(array)]
        self._messages = [inner_members(self.body[slice(*span)]) for span in self._spans]
        for position, message in enumerate(self._messages):
            role, said = text(message.get("role")) or "", _text(message.get("content"))
            if role == "assistant":
                calls = _asked(exact_items(message.get("tool_calls")))
                key, begun = _key(self.said, said, calls), self.said.key()
                self._replayed.append(_Replayed(position, said, calls, key, begun, _is_bound(message)))
                self.said.add(role, said, *(call.id if is_strong(call.id) else call.name for call in calls))
            elif role == "tool":
                asked = text(message.get("tool_call_id")) or ""
                self.said.add(role, asked if is_strong(asked) else "")
            elif role not in {"system", "developer"}:
                self.said.add(role, said)

    def restored(self, found: Mapping[str, Memory]) -> Restored:
        """The request with what was hidden put back. Raises `Unreadable` where there are no messages."""
        edits: list[Edit] = []
        toolset, restored, lost, unknown, bound = None, 0, 0, 0, False
        between = separator(self.body)
        for replayed in self._replayed:
            memory = found.get(replayed.key) or found.get(replayed.begun)
            if memory is not None:
                toolset = memory.toolset
            hidden = None if memory is None else _decoded(memory.data)
            if memory is None or (hidden is not None and not _matches(hidden, replayed)):
                unknown += 1
                bound = bound or replayed.bound
            elif hidden is not None:
                edits += self._edits(replayed, hidden, between)
                restored += 1
            elif memory.data != b"":
                lost += 1
        return Restored(edited(self.body, edits), toolset, restored, lost, unknown, bound)

    def _edits(self, replayed: _Replayed, hidden: _Hidden, between: bytes) -> Iterator[Edit]:
        """What puts the hidden messages in the place of one, and parked results among the client's own."""
        start, end = self._spans[replayed.position]
        messages = _with_edited_calls(hidden, replayed)
        if not hidden.whole:
            messages += _rest(self.body[start:end], replayed, _said(hidden.messages))
        given = self._results_after(replayed.position)
        asked = iter(replayed.calls)
        place: int | None = None
        for result in hidden.parked:
            if result is not None and place is None:
                messages.append(result)
            elif result is not None and place is not None:
                yield place, place, between + result
            elif (call := next(asked, None)) is not None:
                places = given.get(call.id)
                place = places.pop(0) if places else place
        yield start, end, between.join(messages)

    def _results_after(self, position: int) -> dict[str, list[int]]:
        """Where the client's results that directly follow a message end, by the ids of their calls."""
        given: dict[str, list[int]] = {}
        for message, span in zip(self._messages[position + 1 :], self._spans[position + 1 :], strict=True):
            if text(message.get("role")) != "tool":
                break
            given.setdefault(text(message.get("tool_call_id")) or "", []).append(span[1])
        return given


def _messages_span(body: bytes) -> tuple[int, int]:
    span = member_span(body, "messages")
    if span is None:
        raise Unreadable("no messages")
    return span


def _is_bound(message: Members) -> bool:
    """Whether there are signed thoughts in it: a Claude model behind another protocol (wire.md A6, B3)."""
    details = map(members, items(message.get("reasoning_details")))
    return any(text(detail.get("signature")) for detail in details)


def _decoded(data: bytes | None) -> _Hidden | None:
    """What was hidden, if anything was and it can be read."""
    try:
        return msgspec.msgpack.decode(data, type=_Hidden) if data else None
    except msgspec.MsgspecError:
        return None


def _said(messages: Sequence[bytes]) -> str:
    """What the client saw of messages: results are not the model's words."""
    found = map(members, messages)
    return "".join(_text(message.get("content")) for message in found if text(message.get("role")) != "tool").strip()


def _calls_of(message: bytes) -> tuple[_Asked, ...]:
    return _asked(exact_items(inner_members(message).get("tool_calls")))


def _own_calls(hidden: _Hidden) -> list[_Asked]:
    """The calls of the client's tools: they are in the last message."""
    calls = _calls_of(hidden.messages[-1]) if hidden.parked else ()
    return [call for call, result in zip(calls, hidden.parked, strict=False) if result is None]


def _matches(hidden: _Hidden, replayed: _Replayed) -> bool:
    """Whether the client repeats what it was shown. Many leave out the text beside calls; some clear old arguments.

    Servers may repeat ids that look like no others (wire.md D3), so other arguments count as edited only where the
    conversation before them is the same.
    """
    shown, said = _said(hidden.messages), replayed.said.strip()
    if not hidden.whole:
        return said.startswith(shown)
    own = _own_calls(hidden)
    if [(call.id, call.name) for call in own] != [(call.id, call.name) for call in replayed.calls]:
        return False
    same = [call.meaning for call in own] == [call.meaning for call in replayed.calls]
    return (same or hidden.after == replayed.begun) and (said == shown or (not said and bool(own)))


def _with_edited_calls(hidden: _Hidden, replayed: _Replayed) -> list[bytes]:
    """The hidden messages, with the client's version of each call whose arguments it has edited."""
    if not hidden.parked:
        return [*hidden.messages]
    *before, last = hidden.messages
    calls, own = _calls_of(last), iter(replayed.calls)
    kept = tuple(
        call if result is not None or (theirs := next(own)).meaning == call.meaning else theirs
        for call, result in zip(calls, hidden.parked, strict=False)
    )
    return [*before, last if kept == calls else with_list(last, "tool_calls", [call.raw for call in kept])]


def _rest(message: bytes, replayed: _Replayed, shown: str) -> list[bytes]:
    """The client's message without what the hidden turns before it have shown; nothing where that was all."""
    if not shown:
        return [message]
    rest = replayed.said.strip().removeprefix(shown)
    return [with_member(message, "content", _string(rest))] if rest or replayed.calls else []


# --- the format -------------------------------------------------------------------------------------------------------


class ChatTurns(TurnFormat):
    """The inner loop in Chat Completions."""

    def read(self, body: bytes) -> ChatDraft:
        """Read a request as the client sent it."""
        return ChatDraft(body)

    def with_tools(self, body: bytes, toolset: Toolset) -> bytes:
        """The request with the tools at the end of its own. Raises `Unreadable` where ``tools`` is no array."""
        if not toolset.tools:
            return body
        span, between = member_span(body, "tools"), separator(body)
        there = b"[]" if span is None or body[slice(*span)] == b"null" else body[slice(*span)]
        return with_member(body, "tools", with_elements(there, map(_function, toolset.tools), between))

    def with_turn(self, body: bytes, answered: Answered, *, last: bool) -> bytes:
        """The request that goes on after a turn. Raises `Unreadable` where there are no messages."""
        span = _messages_span(body)
        new = [*(piece.raw for piece in answered.turn.pieces), *_results(answered)]
        body = edited(body, [(*span, with_elements(body[slice(*span)], new, separator(body)))])
        if last:
            return with_member(body, "tool_choice", b'"none"') if member_span(body, "tools") else body
        choice = member_span(body, "tool_choice")
        return body if choice is None else edited(body, [(*choice, _relaxed(body[slice(*choice)]))])

    def merger(
        self,
        body: bytes,  # noqa: ARG002  the responses say all that the merger needs
        toolset: Toolset,
        usage: UsagePolicy,
        *,
        hides_usage: bool = False,
    ) -> ChatMerger:
        """A fresh merger for the responses to a request."""
        return ChatMerger(toolset, usage, hides_usage=hides_usage)

    def memory(self, draft: Draft, toolset: Toolset, turns: Sequence[Answered]) -> Memory:
        """What to remember of the response to a request that `read` has read."""
        assert isinstance(draft, ChatDraft)  # noqa: S101  drafts and formats come in pairs
        messages: list[bytes] = []
        parked: tuple[bytes | None, ...] = ()
        said, calls = "", tuple[_Asked, ...]()
        for answered in turns:
            message, own, results = _repeated(answered, toolset)
            words, refusal = (members(message).get(name) for name in ("content", "refusal"))
            said += _text(words)
            calls += own
            if _text(words).strip() or text(refusal) or own or results:
                messages.append(message)
            if own:
                parked = results
            else:
                messages += filter(None, results)
        broke_off = bool(turns) and bool(turns[-1].outcomes) and not turns[-1].turn.awaits_client
        key = draft.said.key() if broke_off else _key(draft.said, said, calls)
        hidden = _Hidden(tuple(messages), draft.said.key(), parked, whole=not broke_off)
        hides = any(answered.outcomes for answered in turns)
        return Memory((key,) if turns else (), toolset.digest, msgspec.msgpack.encode(hidden) if hides else b"")


def _repeated(answered: Answered, toolset: Toolset) -> tuple[bytes, tuple[_Asked, ...], tuple[bytes | None, ...]]:
    """A turn as later requests repeat it: its message, the client's calls in it, and the result of each call or None.

    Where injected calls were not run they are not in it.
    """
    message = b"".join(piece.raw for piece in answered.turn.pieces)
    calls = exact_items(inner_members(message).get("tool_calls"))
    own = [call for call in calls if injected_tool(members(call), toolset) is None]
    if not answered.outcomes:
        if len(own) < len(calls):
            message = with_list(message, "tool_calls", [bytes(call) for call in own])
        return message, _asked(own), (None,) * len(own)
    results = iter(_results(answered))
    is_own = [injected_tool(members(call), toolset) is None for call in calls]
    return message, _asked(own), tuple(None if own_call else next(results, None) for own_call in is_own)


def _results(answered: Answered) -> list[bytes]:
    """The messages with what came of the calls of a turn. Only text is taken in them."""
    return [
        b'{"role":"tool","tool_call_id":%b,"content":%b}' % (_string(call.id), _string(_outcome_text(outcome)))
        for call, outcome in zip(answered.turn.calls, answered.outcomes, strict=False)
    ]


def _outcome_text(outcome: Outcome) -> str:
    parts = (part.text if isinstance(part, Text) else part.described for part in outcome.content)
    said = "\n".join(parts)
    said = said if said.strip() else "(no output)"
    return f"Error: {said}" if outcome.is_error else said


def _function(tool: Tool) -> bytes:
    return b'{"type":"function","function":{"name":%b,"description":%b,"parameters":%b}}' % (
        _string(tool.name),
        _string(tool.description),
        tool.schema.encode(),
    )


def _relaxed(choice: bytes) -> bytes:
    """A choice of tools that forces none. What the client has not allowed stays so."""
    given = members(choice)
    kind = text(given.get("type")) or text(Raw(choice))
    if kind in {"required", "function", "custom"}:
        return b'"auto"'
    allowed = given.get("allowed_tools")
    if allowed is not None and text(members(allowed).get("mode")) == "required":
        return with_member(choice, "allowed_tools", with_member(bytes(allowed), "mode", b'"auto"'))
    return choice


def _string(value: str) -> bytes:
    """A JSON string in ASCII, which nothing on the way can break (wire.md E)."""
    return json.dumps(value).encode()
