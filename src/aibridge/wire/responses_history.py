"""A conversation of the Responses protocol as its client replays it, with what was hidden from it put back.

`input` is flat: what the model said stands between what the client said and the results of calls. An item that a client
replays is recognised by its id, its call id or its encrypted content, and a message also by its words in their place,
because clients drop ids. Facts from wire.md C1, C2, C5 and D6.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec
from msgspec import Raw

from aibridge.wire.reading import Members, boolean, is_null, items, members, parse_object, text
from aibridge.wire.responses_merging import elements, member_bytes
from aibridge.wire.splicing import (
    Edit,
    edited,
    element_spans,
    json_string,
    member_span,
    separator,
    with_elements,
    with_member,
)
from aibridge.wire.turns import Draft, Memory, Prefix, Restored, is_strong, key_of

# Output items that are no calls by their name (wire.md C2).
_BY_THE_MODEL: Final = frozenset({"reasoning", "compaction", "mcp_list_tools", "mcp_approval_request", "program"})

_STRUCTURED: Final = frozenset({"json_schema", "json_object"})


class Entry(msgspec.Struct, frozen=True, array_like=True):
    """An item of a response as the provider sent it, or the result of a hidden call."""

    raw: bytes
    hidden: bool = False


class Kept(msgspec.Struct, frozen=True, array_like=True):
    """What is kept of a response that the client was not shown all of.

    `ids` are the provider's, of all its turns. `previous` is what the client named as the response before. `pending` are
    results of the last turn's calls, which the provider has not got.
    """

    ids: tuple[str, ...] = ()
    previous: str | None = None
    entries: tuple[Entry, ...] = ()
    pending: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class Item:
    """An item of the conversation. `said` is the same for what clients write in other ways but do not change."""

    kind: str
    role: str | None
    marks: Mapping[str, str]
    said: Any

    @classmethod
    def read(cls, raw: bytes) -> "Item":
        item = members(raw)
        kind = text(item.get("type")) or "message"
        names = (("item", "id"), ("call", "call_id"), ("encrypted", "encrypted_content"))
        marks = {mark: value for mark, name in names if (value := text(item.get(name)))}
        return cls(kind, text(item.get("role")), marks, _said(kind, item))

    @property
    def by_model(self) -> bool:
        if self.kind == "message":
            return self.role == "assistant"
        return self.kind.endswith("_call") or self.kind in _BY_THE_MODEL

    @property
    def keys(self) -> list[str]:
        """What stands for it wherever it is: what is given only once."""
        return [key_of(mark, value) for mark, value in self.marks.items() if mark == "encrypted" or is_strong(value)]

    @property
    def traces(self) -> Sequence[object]:
        """What it may be recognised by: items that are the same have one of these in common."""
        said = (self.kind, self.said if self.kind == "message" else None)
        return (*self.marks.items(), said) if self.said else (*self.marks.items(),)

    def is_same(self, stored: "Item") -> bool:
        """Whether a client means a remembered item by this one."""
        if self.kind == "item_reference":
            return "item" in self.marks and self.marks["item"] == stored.marks.get("item")
        if self.kind != stored.kind or self.marks.get("call") != stored.marks.get("call"):
            return False
        if self.marks.items() & stored.marks.items():
            return True
        return bool(self.said) and self.said == stored.said

    def is_edited(self, stored: "Item") -> bool:
        """Whether the client wants something else said in its place, or only refers to it."""
        return self.kind == "item_reference" or self.said != stored.said


class Said:
    """What a conversation has said so far, as far as every client repeats it. `start` tells it from others.

    What the model says at a stretch counts as one: clients keep several messages as one string.
    """

    def __init__(self, start: Sequence[str]) -> None:
        self._prefix = Prefix()
        self._prefix.add(*start)
        self._stretch = hashlib.sha256()

    def add(self, item: Item) -> list[str]:
        """An item comes next: all that stands for it. A message has no call id, and clients drop its own."""
        if item.kind == "message" and item.role == "assistant":
            self._stretch.update(item.said.encode("utf-8", "surrogatepass"))
            return [*item.keys, self._prefix.key("assistant", self._stretch.hexdigest())] if item.said else item.keys
        if item.kind == "message" and item.role == "user" and item.said:
            words = ("user", item.said)
        elif item.kind.endswith("_call"):
            words = (item.kind, item.marks.get("call", ""))
        else:
            return item.keys
        self._prefix.add("assistant", self._stretch.hexdigest())
        self._stretch = hashlib.sha256()
        weak = [] if item.role == "user" or is_strong(item.marks.get("call")) else [self._prefix.key(*words)]
        self._prefix.add(*words)
        return [*item.keys, *weak]


def _said(kind: str, item: Members) -> Any:
    match kind:
        case "message":
            return _message_text(item.get("content"))
        case "function_call":
            return text(item.get("name")), _decoded(text(item.get("arguments")) or "{}")
        case "custom_tool_call":
            return text(item.get("name")), text(item.get("input"))
    return None


def _message_text(content: Raw | None) -> str:
    """The words of a message, whose content may be one string, without white space: clients trim, and join."""
    words = text(content)
    if words is None:
        parts = [members(part) for part in items(content)]
        words = "".join(text(part.get("text")) or text(part.get("refusal")) or "" for part in parts)
    return "".join(words.split())


def _decoded(arguments: str) -> Any:
    """What arguments say: clients write their JSON anew."""
    try:
        return msgspec.json.decode(arguments)
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return arguments


class ResponsesDraft(Draft):
    """A request as the client sent it. Raises `aibridge.wire.reading.Unreadable` when it is not a JSON object."""

    def __init__(self, body: bytes) -> None:
        top = parse_object(body)
        self.body = body
        self.previous = text(top.get("previous_response_id"))
        self.conversation = conversation_of(top)
        given = member_bytes(body, "input")
        self.items = [Item.read(raw) for raw in elements(input_array(body))]
        # One actor may be a service that speaks for many people, who say the same to it.
        person = [text(top.get(name)) or "" for name in ("user", "safety_identifier")]
        self._start = (*person, self.previous or self.conversation or "")
        said = Said(self._start)
        self.item_keys = [said.add(item) for item in self.items]
        self.keys = tuple(dict.fromkeys((*self.state_keys, *(key for keys in self.item_keys for key in keys))))
        added = [tool for raw in elements(given) for tool in items(members(raw).get("tools"))]
        tools = [members(tool) for tool in (*items(top.get("tools")), *added)]
        self.tool_names = frozenset(name for tool in tools if (name := text(tool.get("name"))))
        self.objection = self._objection(top)
        form = text(members(members(top.get("text")).get("format")).get("type"))
        self.is_aside = form in _STRUCTURED and not tools

    @property
    def state_keys(self) -> list[str]:
        """What stands for the conversation that the provider keeps."""
        if self.previous is not None:
            return [response_key(self.previous)]
        return [] if self.conversation is None else [key_of("conversation", self.conversation)]

    def said(self) -> Said:
        """All that was said before a response to the request."""
        said = Said(self._start)
        for item in self.items:
            said.add(item)
        return said

    def restored(self, found: Mapping[str, Memory]) -> Restored:
        """The request with what was hidden put back. Raises `aibridge.wire.reading.Unreadable`."""
        toolset = next((found[key].toolset for key in reversed(self.keys) if key in found), None)
        if self.state_keys:
            memory = found.get(self.state_keys[0])
            return self._continued(memory, toolset)
        walks = {memory: _Walk(memory) for memory in dict.fromkeys(found.values())}
        owners, unknown = self._owners(found)
        matches = [
            None if owner is None else walks[owner].take(item) for item, owner in zip(self.items, owners, strict=True)
        ]
        for walk in walks.values():
            walk.end()
        body = self._with_input(matches)
        return Restored(
            body,
            toolset,
            restored=sum(walk.hides and walk.last is not None for walk in walks.values()),
            lost=sum(memory.data is None for memory in walks),
            unknown=unknown,
        )

    def _objection(self, top: Members) -> str | None:
        said = self.items and text(top.get("input")) != ""
        if not (said or self.state_keys or is_present(top, "prompt")):
            return "no input"
        if boolean(top.get("background")):
            return "runs in the background"
        if self.items and self.items[-1].kind == "compaction_trigger":
            return "asks to compact"
        return None

    def _continued(self, memory: Memory | None, toolset: str | None) -> Restored:
        """The request goes on from what the provider keeps, under the id that the provider knows."""
        pending = kept_of(memory).pending
        body = self.body
        if self.previous is not None and memory is not None and memory.last_id is not None:
            body = with_member(body, "previous_response_id", json_string(memory.last_id))
        if pending:
            rest = elements(input_array(body))
            body = with_member(body, "input", with_elements(b"[]", (*pending, *rest), separator(body)))
        return Restored(
            body,
            toolset,
            restored=int(body != self.body),
            lost=int(memory is not None and memory.data is None),
            unknown=int(memory is None and self.previous is not None),
        )

    def _owners(self, found: Mapping[str, Memory]) -> tuple[list[Memory | None], int]:
        """Whose response each item is part of, and how many runs of the model's items are nobody's.

        What has no key of its own belongs to what stands beside it in its run.
        """
        owners = [next((found[key] for key in keys if key in found), None) for keys in self.item_keys]
        unknown = 0
        run: list[int] = []
        for index in range(len(self.items) + 1):
            if index < len(self.items) and self.items[index].by_model:
                run.append(index)
                continue
            known = [owners[place] for place in run if owners[place] is not None]
            unknown += bool(run) and not known
            owner = known[0] if known else None
            for place in run:
                owner = owners[place] = owners[place] or owner
            run = []
        return owners, unknown

    def _with_input(self, matches: "Sequence[_Match | None]") -> bytes:
        span = member_span(self.body, "input")
        if span is None or not any(matches):
            return self.body
        between = separator(self.body)
        given = self.body[slice(*span)]
        edits: list[Edit] = []
        for match, (start, end) in zip(matches, element_spans(given), strict=True):
            if match is not None:
                there = match.stored or [given[start:end]]
                edits.append((start, end, between.join((*match.before, *there, *match.after))))
        return edited(self.body, [(*span, edited(given, edits))])


@dataclass(slots=True)
class _Match:
    """What comes in the place of an item of the client; `stored` is empty where its own text stays."""

    stored: list[bytes]
    before: list[bytes]
    after: list[bytes] = field(default_factory=list)


class _Walk:
    """Goes along the items of one response while the client's are gone along: what they match, and what is hidden between.

    What the client dropped is passed over, what was hidden never is.
    """

    def __init__(self, memory: Memory) -> None:
        self._entries = kept_of(memory).entries
        self._items = [Item.read(entry.raw) for entry in self._entries]
        self._position = 0
        self._messages: list[int] = []  # where they stand
        self._places: dict[object, list[int]] = {}  # where that stands which may be recognised by something
        for place, item in enumerate(self._items):
            if item.kind == "message":
                self._messages.append(place)
            for trace in () if self._entries[place].hidden else item.traces:
                self._places.setdefault(trace, []).append(place)
        self.hides = any(entry.hidden for entry in self._entries)
        self.last: _Match | None = None

    def take(self, item: Item) -> _Match | None:
        """What comes in the place of an item, where it is one of the response's that are still to come, or several."""
        places = {place for trace in item.traces for place in self._coming(self._places.get(trace, ()))}
        place = min((place for place in places if item.is_same(self._items[place])), default=None)
        if place is not None:
            return self._match([] if item.is_edited(self._items[place]) else [place], place, place)
        joined = self._joined(item)
        if not joined:
            return None
        first, last = joined[0], joined[-1]
        return self._match([at for at in range(first, last + 1) if at in joined or self._entries[at].hidden], first, last)

    def end(self) -> None:
        """The client said nothing more of the response: what is left of the hidden follows what it said last."""
        if self.last is not None:
            self.last.after += self._hidden(len(self._entries))

    def _match(self, stored: list[int], first: int, last: int) -> _Match:
        before = self._hidden(first)
        self._position = last + 1
        self.last = _Match([self._entries[place].raw for place in stored], before)
        self.last.after = self._hidden(self._next_shown())
        return self.last

    def _joined(self, item: Item) -> list[int]:
        """The next messages, where this one says what all of them say."""
        joined: list[int] = []
        length = 0
        for place in self._coming(self._messages) if item.kind == "message" and item.said else ():
            said = self._items[place].said
            if not item.said.startswith(said, length):
                break
            joined.append(place)
            length += len(said)
            if length == len(item.said):
                return joined
        return []

    def _coming(self, places: Iterable[int]) -> Iterator[int]:
        return (place for place in places if place >= self._position)

    def _hidden(self, end: int) -> list[bytes]:
        found = [entry.raw for entry in self._entries[self._position : end] if entry.hidden]
        self._position = max(self._position, end)
        return found

    def _next_shown(self) -> int:
        rest = range(self._position, len(self._entries))
        return next((index for index in rest if not self._entries[index].hidden), len(self._entries))


def kept_of(memory: Memory | None) -> Kept:
    if memory is None or not memory.data:
        return Kept()
    try:
        return msgspec.msgpack.decode(memory.data, type=Kept)
    except msgspec.MsgspecError:  # another version of the bridge wrote it
        return Kept()


def input_array(body: bytes) -> bytes:
    """The input as an array. One that is a string is what the user says."""
    given = member_bytes(body, "input")
    if given is None or not given.startswith((b"[", b'"')):
        return b"[]"
    if given.startswith(b"["):
        return given
    form = b'[{"role": "user", "content": %b}]' if separator(body) == b", " else b'[{"role":"user","content":%b}]'
    return form % given


def conversation_of(top: Members) -> str | None:
    """The conversation that the provider keeps: an id, or an object with one (wire.md C1)."""
    given = top.get("conversation")
    return text(given) or text(members(given).get("id"))


def is_present(top: Members, name: str) -> bool:
    return name in top and not is_null(top[name])


def response_key(public_id: str) -> str:
    """What a response is remembered by whose id a client names."""
    return key_of("response", public_id)
