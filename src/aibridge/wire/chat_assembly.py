"""What a Chat Completions response says, kept in the provider's own bytes, because the next request repeats them.

A message that was streamed is put together here as the provider would have sent it whole: from the JSON text of its
fragments, not from their values. Only the first choice counts: nothing is injected into a request for several. Facts from
wire.md B2, B3, E.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from msgspec import Raw

from aibridge.tools import Call, Tool, Toolset
from aibridge.wire.reading import (
    Members,
    boolean,
    integer,
    is_whole_object,
    members,
    source,
    text,
)
from aibridge.wire.splicing import (
    edited,
    element_spans,
    inner_elements,
    inner_members,
    member_span,
    with_member,
    without_member,
)

# How a response ends that is not whole. No call in it is run, not even one that seems to be.
_CUT_SHORT: Final = frozenset({"length", "content_filter", "error"})

# The strings inside calls and reasoning details that come in pieces. All others (id, name, type, signature) come once.
_GROWING: Final = frozenset({"arguments", "input", "text", "summary", "data"})


# --- JSON in the sender's bytes ---------------------------------------------------------------------------------------


def exact_items(raw: Raw | None) -> list[Raw]:
    """The elements of a JSON array, or none, in bytes that no reading has mended."""
    return [Raw(element) for element in inner_elements(raw)]


def with_list(data: bytes, name: str, elements: Sequence[bytes]) -> bytes:
    """The object with a member that lists these; without it where there are none. Raises `Unreadable`."""
    return with_member(data, name, b"[%b]" % b",".join(elements)) if elements else without_member(data, name)


def joined(raws: Iterable[bytes]) -> bytes:
    """One JSON value of several: strings and lists are continued, of other values the last counts, null says nothing.

    Strings are joined as they are written: a pair of surrogates may be divided between two of them.
    """
    said = [raw for raw in raws if raw != b"null"]
    if len(said) < 2:
        return said[0] if said else b"null"
    if all(raw.startswith(b'"') for raw in said):
        return b'"%b"' % b"".join(raw[1:-1] for raw in said)
    if all(raw.startswith(b"[") for raw in said):
        return b"[%b]" % b",".join(bytes(element) for raw in said for element in exact_items(Raw(raw)))
    return said[-1]


def _assembled(fragments: Iterable[bytes]) -> bytes:
    """An object that came in fragments: a call, its function, a reasoning detail."""
    given: dict[str, list[bytes]] = {}
    for fragment in fragments:
        for name, raw in inner_members(fragment).items():
            given.setdefault(name, []).append(bytes(raw))
    return _object({name: _combined(name, raws) for name, raws in given.items()})


def _combined(name: str, raws: list[bytes]) -> bytes:
    if name in {"function", "custom"}:
        return _assembled(raws)
    return joined(raws) if name in _GROWING else next(filter(says, raws), raws[-1])


def _object(values: Mapping[str, bytes]) -> bytes:
    return b"{%b}" % b",".join(b"%b:%b" % (json.dumps(name).encode(), value) for name, value in values.items())


def says(raw: bytes | Raw) -> bool:
    """Whether a value is anything. An empty repetition says nothing (wire.md B2)."""
    return bytes(raw) not in {b"null", b'""', b"[]", b"{}"}


# --- what is in a response --------------------------------------------------------------------------------------------


def injected_tool(call: Members, toolset: Toolset) -> Tool | None:
    """The injected tool that an entry of ``tool_calls`` asks for; None where the call is one of the client's own."""
    if text(call.get("type")) not in {None, "", "function"}:
        return None
    return toolset.get(text(members(call.get("function")).get("name")))


def arguments_of(given: Raw | None) -> str:
    """The arguments of a call. Some servers write an object where a string belongs: then its JSON text."""
    said = text(given)
    return (source(given) or "") if said is None else said


def call_of(entry: Members, tool: Tool) -> Call:
    """The call that an entry of ``tool_calls`` makes of an injected tool."""
    arguments = arguments_of(members(entry.get("function")).get("arguments"))
    arguments = arguments if arguments.strip() else "{}"  # wire.md E
    refusal = None if is_whole_object(arguments) else "The tool was not called: its arguments are not a whole JSON object."
    return Call(text(entry.get("id")) or "", tool, arguments, refusal)


def is_error(error: Raw | None) -> bool:
    """Whether an ``error`` member is one. Compatible servers send null, false or nothing beside a good answer."""
    return error is not None and says(error) and boolean(error) is not False


def choice_of(top: Members) -> Members:
    """The first of the choices. Its index may be missing."""
    choices = map(inner_members, exact_items(top.get("choices")))
    return next((choice for choice in choices if not integer(choice.get("index"))), {})


def with_choice(data: bytes, edit: Callable[[bytes], bytes]) -> bytes:
    """A chunk or a body with its first choice edited. There is one."""
    at, end = member_span(data, "choices") or (0, 0)
    spans = element_spans(data[at:end])
    start, stop = next(
        (at + start, at + stop) for start, stop in spans if not integer(members(data[at + start : at + stop]).get("index"))
    )
    return edited(data, [(start, stop, edit(data[start:stop]))])


def plainly_ended(choice: bytes) -> bytes:
    """The choice, ended as if calls that nobody sees had not ended it."""
    if text(members(choice).get("finish_reason")) not in {"tool_calls", "function_call"}:
        return choice
    return with_member(choice, "finish_reason", b'"stop"')


@dataclass(slots=True)
class Part:
    """A call that comes in fragments. `index` is the provider's number for it, `shown` the client's."""

    index: int
    fragments: list[bytes] = field(default_factory=list)
    id: str = ""
    name: str = ""
    arguments: list[str] = field(default_factory=list)
    is_function: bool = True
    tool: Tool | None = None
    shown: int | None = None

    def is_followed_by(self, id: str, name: str, arguments: str) -> bool:
        """Whether a fragment begins another call at the same index: it has a name, and another id or arguments anew."""
        if not (self.name and name):
            return False
        if id and id != self.id:
            return True
        # In one call's arguments `}` stands right before `{` in a string only, and then what came so far is not whole.
        is_seam = bool(self.arguments) and self.arguments[-1].rstrip().endswith("}") and arguments.lstrip().startswith("{")
        return is_seam and is_whole_object("".join(self.arguments))


class ChatResponse:
    """What one response says, as far as the next request and the rest of the client's response depend on it."""

    def __init__(self, toolset: Toolset) -> None:
        self._toolset = toolset
        self._said: dict[str, list[bytes]] = {}  # the members of the message but its calls, in the order they came
        self._parts: list[Part] = []
        self._at: dict[int, Part] = {}
        self._next = 0  # the number of the next call that the client sees
        self.id: str | None = None
        self.usage: bytes | None = None
        self.failed = False
        self.finish_reason: str | None = None

    @property
    def hides(self) -> bool:
        """Whether something in it is not shown to the client."""
        return any(part.tool is not None for part in self._parts)

    @property
    def shows_calls(self) -> bool:
        return any(part.tool is None for part in self._parts)

    @property
    def undecided(self) -> bool:
        """Whether it is not known yet whose a call is: its name comes after its beginning."""
        return any(part.is_function and not part.name for part in self._parts)

    @property
    def cut_short(self) -> bool:
        return self.failed or self.finish_reason in _CUT_SHORT

    @property
    def details(self) -> int:
        """How many numbers its reasoning details take up."""
        indexes = (integer(members(raw).get("index")) for raw in self._said.get("reasoning_details", ()))
        return max((index + 1 for index in indexes if index is not None), default=0)

    def read(self, top: Members, name: str) -> tuple[Members, list[Part]]:
        """Take in a chunk or a body, whose choice has the message under `name`: the choice, and the call of each entry."""
        self.id = text(top.get("id")) or self.id
        self.failed = self.failed or is_error(top.get("error"))
        if members(top.get("usage")):  # a running total where every chunk has one: the last counts
            self.usage = bytes(top["usage"])
        choice = choice_of(top)
        self.finish_reason = text(choice.get("finish_reason")) or self.finish_reason
        message = inner_members(choice.get(name))
        for member, raw in message.items():
            if member == "reasoning_details":
                self._said.setdefault(member, []).extend(map(bytes, exact_items(raw)))
            elif member != "tool_calls":
                self._said.setdefault(member, []).append(bytes(raw))
        calls = exact_items(message.get("tool_calls"))
        return choice, [self._part(bytes(raw), position) for position, raw in enumerate(calls)]

    def _part(self, raw: bytes, position: int) -> Part:
        """The call that a fragment belongs to, with the fragment in it.

        The index says which (wire.md B2). Compatible servers leave it out, or give every call the same, some without an id.
        """
        written, fragment = without_member(raw, "index"), members(raw)
        function = members(fragment.get("function"))
        id_, name = text(fragment.get("id")) or "", text(function.get("name")) or ""
        index = integer(fragment.get("index"))
        index = position if index is None else index
        arguments = arguments_of(function.get("arguments"))
        part = self._at.get(index)
        if part is None or part.is_followed_by(id_, name, arguments):
            part = self._at[index] = Part(index)
            self._parts.append(part)
        part.fragments.append(written)
        part.arguments += [arguments] if arguments.strip() else []
        part.id, part.name = part.id or id_, part.name or name
        part.is_function = part.is_function and text(fragment.get("type")) in {None, "", "function"}
        part.is_function = part.is_function and "custom" not in fragment
        part.tool = self._toolset.get(part.name) if part.is_function else None
        return part

    def number(self, part: Part) -> int | None:
        """The number that the client sees of a call: the provider's own where nothing is hidden. None of a hidden one."""
        if part.tool is None and part.shown is None:
            part.shown = self._next if self.hides else part.index
            self._next = part.shown + 1
        return part.shown

    def message(self) -> bytes:
        """The message that was streamed, as the provider would have sent it whole."""
        said = dict(self._said)
        role = next(filter(says, said.pop("role", [])), b'"assistant"')
        values = {"role": role, "content": joined(said.pop("content", []))}
        if self._parts:
            values["tool_calls"] = b"[%b]" % b",".join(_assembled(part.fragments) for part in self._parts)
        if details := said.pop("reasoning_details", []):
            values["reasoning_details"] = b"[%b]" % b",".join(map(_assembled, _by_index(details)))
        values |= {name: value for name, raws in said.items() if (value := joined(raws)) != b"null"}
        return _object(values)


def _by_index(details: list[bytes]) -> list[list[bytes]]:
    """The fragments of each reasoning detail. One without a number is whole."""
    found: dict[int, list[bytes]] = {}
    for position, raw in enumerate(details):
        index = integer(members(raw).get("index"))
        found.setdefault(-1 - position if index is None else index, []).append(raw)
    return list(found.values())
