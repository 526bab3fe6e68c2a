"""Several responses of the Responses protocol as one. Facts from wire.md C2, C3 and D5; what breaks clients: clients.md 4.

The parts of an item are recognised by their `output_index`: compatible hosts give every event another item id (wire.md C3).
The client's stream has indexes and sequence numbers of its own from where it first differs from the provider's. Before that,
and for one response that hides nothing, frames are passed on as they came.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Final

import msgspec

from aibridge.errors import error_type
from aibridge.tools import Call, Tool, Toolset
from aibridge.wire.reading import (
    Members,
    Unreadable,
    integer,
    is_whole_object,
    members,
    parse_object,
    source,
    text,
)
from aibridge.wire.splicing import (
    Edit,
    edited,
    element_spans,
    member_span,
    separator,
    with_member,
    with_replaced,
    written_members,
)
from aibridge.wire.sse import ON_ONE_LINE, Frame
from aibridge.wire.turns import Piece, Turn, TurnMerger, UsagePolicy
from aibridge.wire.usage import merged_usage

# Calls that the client runs and answers with an item of type `<call>_output` (wire.md C2). All others the provider runs.
_CLIENT_CALLS: Final = frozenset(
    {"function_call", "custom_tool_call", "computer_call", "shell_call", "apply_patch_call", "local_shell_call"}
)

_STARTS: Final = frozenset({"response.created", "response.queued", "response.in_progress"})
_ENDS: Final = frozenset({"response.completed", "response.incomplete", "response.failed", "error"})
_ADDED: Final = "response.output_item.added"
_DONE: Final = "response.output_item.done"
_ARGUMENTS: Final = "response.function_call_arguments."

# A response that ended like this may have broken off within a call.
_BROKEN: Final = frozenset({"incomplete", "failed", "cancelled"})

# What every turn's response says of itself, and the client is told once.
_CONSTANT: Final = ("id", "created_at", "model", "tool_choice")

_NOT_AN_OBJECT: Final = "The arguments are not a complete JSON object, so the call was not made. Try again."
_BROKE_OFF: Final = "The call broke off before it was complete, so it was not made. Try again."


def is_client_run(item: Members) -> bool:
    """Whether an output item is a call that the client runs, unless it is one of ours."""
    kind = text(item.get("type"))
    return kind in _CLIENT_CALLS or (kind == "tool_search_call" and text(item.get("execution")) == "client")


def member_bytes(body: bytes, name: str) -> bytes | None:
    """The text of a top-level member as it stands there, which a mended reading of it would not be. Raises `Unreadable`."""
    raw = written_members(body).get(name)
    return None if raw is None else bytes(raw)


def object_bytes(body: bytes, name: str) -> bytes | None:
    """The text of a top-level member that is an object, None for another. Raises `Unreadable` if it cannot be edited."""
    span = member_span(body, name)
    found = b"" if span is None else body[slice(*span)]
    return found if found.startswith(b"{") and separator(found) else None


def elements(array: bytes | None) -> list[bytes]:
    """The texts of an array's elements as they stand there; none at all for what is no array."""
    if array is None or not array.startswith(b"["):
        return []
    return [array[start:end] for start, end in element_spans(array)]


def without_elements(array: bytes, unwanted: Callable[[bytes], bool]) -> bytes:
    """The array without some of its elements; what stays, and what is between, stays as it is. Raises `Unreadable`."""
    spans = element_spans(array)
    kept = [index for index, (start, end) in enumerate(spans) if not unwanted(array[start:end])]
    if len(kept) == len(spans):
        return array
    tail = kept[-1] + 1 if kept else 0  # from here on nothing is kept
    edits: list[Edit] = [(spans[tail - 1][1] if tail else spans[0][0], spans[-1][1], b"")] if tail < len(spans) else []
    edits += [(spans[index][0], spans[index + 1][0], b"") for index in range(tail) if index not in kept]
    return edited(array, edits)


def without_tools(response: bytes, toolset: Toolset) -> bytes:
    """A response object, which repeats the request's tools, without those that were injected. Raises `Unreadable`."""
    tools = member_bytes(response, "tools")
    if tools is None or not tools.startswith(b"["):
        return response

    def injected(raw: bytes) -> bool:
        tool = members(raw)
        return text(tool.get("type")) == "function" and toolset.get(text(tool.get("name"))) is not None

    return with_member(response, "tools", without_elements(tools, injected))


@dataclass
class _Hop:
    """What one upstream response has said so far. Items are known by the provider's `output_index`."""

    number: int
    base: int  # the client's index for the provider's 0
    places: dict[int, int | None] = field(default_factory=dict)  # the client's indexes; None for what it does not see
    items: dict[int, bytes] = field(default_factory=dict)  # that are done
    ids: dict[str, int] = field(default_factory=dict)
    waiting: dict[int, list[tuple[Members, Frame]]] = field(default_factory=dict)  # for what tells whose call it is
    identity: str | None = None  # of the response that has ended
    response: bytes | None = None  # what the client may see of the object with which it ended
    whole: bool = False  # it ended as it should
    end: tuple[Members, Frame] | None = None
    rest: list[bytes] = field(default_factory=list)  # what came after the end

    def index_of(self, kind: str, event: Members, item: Members) -> int | None:
        """Which item an event is about: where the server does not say, the one with that id, or a new one.

        Arguments of nobody are a hidden call's where there is one, or else the newest item's: better too little is shown.
        """
        index = integer(event.get("output_index"))
        identity = text(event.get("item_id")) or text(item.get("id"))
        if index is None:
            index = self.ids.get(identity or "")
        if index is None:
            newest = max((*self.places, *self.waiting), default=-1)
            if kind.startswith(_ARGUMENTS):
                return next((hidden for hidden, place in self.places.items() if place is None), newest)
            index = newest + 1 if kind in (_ADDED, _DONE) else None
        if index is not None and identity:
            self.ids.setdefault(identity, index)
        return index

    def knows(self, item: Members) -> bool:
        """Whether the item came in an event of its own."""
        identity = text(item.get("call_id")) or text(item.get("id"))
        known = (members(raw) for raw in self.items.values())
        return identity is not None and any(identity in (text(it.get("call_id")), text(it.get("id"))) for it in known)


class ResponsesMerger(TurnMerger):
    """Presents the responses of several turns as one.

    `body` is the request as the client sent it: its `previous_response_id` is the one that the client knows.
    """

    keep_alive: ClassVar[bytes] = b": keep-alive\n\n"

    def __init__(self, body: bytes, toolset: Toolset, usage: UsagePolicy) -> None:
        self._toolset = toolset
        self._policy: UsagePolicy = usage
        self._previous = member_bytes(body, "previous_response_id") or b"null"
        self._hop = _Hop(0, 0)
        self._first: dict[str, bytes] = {}  # what the first response said of itself
        self._begun: bytes | None = None  # the response object as the client saw it last
        self._items: dict[int, bytes | None] = {}  # by the client's index, what it sees; None until an item is done
        self._usages: list[bytes] = []
        self._sequence = -1
        self._differs = False  # the client's response is not the provider's any more

    def begin(self) -> None:
        """A response of the provider begins; the one before it has ended."""
        self._hop = _Hop(self._hop.number + 1, max(self._items, default=-1) + 1)
        self._differs = self._differs or self._hop.number > 1

    def read_event(self, frame: Frame) -> bytes:
        """Take in a frame of the stream: what the client may see now. Raises `Unreadable`."""
        hop = self._hop
        if hop.end is not None:
            hop.rest.append(frame.raw)
            return b""
        if frame.data is None:
            return frame.raw
        event = _parsed(frame.data)
        kind = text(event.get("type")) or ""
        if kind in _ENDS:
            self._end(object_bytes(frame.data, "response"), whole=kind == "response.completed")
            hop.end = (event, frame)
            return b""
        if members(event.get("response")):
            return self._lifecycle(kind, event, frame)
        if not event.keys() & {"output_index", "item_id", "item"}:
            return self._show(event, frame)
        return self._part(kind, event, frame)

    def read_body(self, body: bytes) -> None:
        """Take in a response that is no stream. Raises `Unreadable`."""
        response = _parsed(body)
        self._keep_first(response, body)
        self._end(body, whole=True)

    def turn(self) -> Turn:
        """The turn of the response that has ended. Nothing is called in one that broke off."""
        found = [(raw, members(raw)) for _, raw in sorted(self._hop.items.items())]
        pieces = tuple(Piece(raw, self._call(item)) for raw, item in found)
        return Turn(
            pieces,
            tuple(piece.call for piece in pieces if piece.call is not None) if self._hop.whole else (),
            any(
                piece.call is None and (is_client_run(item) or text(item.get("type")) == "mcp_approval_request")
                for piece, (_, item) in zip(pieces, found, strict=True)
            ),
            self._hop.identity,
        )

    def finish(self) -> bytes:
        """What ends the client's response: the last events of its stream, or the whole body."""
        hop = self._hop
        response = None if hop.response is None else self._merged(hop.response)
        if hop.end is None:
            return response or b""
        return self._show(*hop.end, response=response) + b"".join(hop.rest)

    def error_event(self, status: int, message: str, body: bytes = b"") -> bytes:
        """``response.failed`` for the response under way, as every client knows it; a bare error where none has begun."""
        said = members(members(body).get("error"))
        code = text(said.get("code")) or text(said.get("type")) or error_type("openai", status)
        error = {"code": code, "message": text(said.get("message")) or message}
        self._sequence += 1
        if self._begun is None:
            kind = "error"
            data = msgspec.json.encode({"type": kind, "sequence_number": self._sequence, **error, "param": None})
        else:
            kind = "response.failed"
            self._differs = True
            failed = with_member(self._merged(self._begun), "status", b'"failed"')
            failed = with_member(failed, "error", msgspec.json.encode(error))
            data = b'{"type":"%b","sequence_number":%d,"response":%b}' % (kind.encode(), self._sequence, failed)
        return b"event: " + kind.encode() + b"\ndata: " + data.translate(ON_ONE_LINE) + b"\n\n"

    def _lifecycle(self, kind: str, event: Members, frame: Frame) -> bytes:
        """A response begins once, whatever the number of turns."""
        if kind in _STARTS and self._hop.number > 1:
            return b""
        raw = object_bytes(frame.data or b"", "response") or b""
        self._keep_first(members(event["response"]), raw)
        shown = self._echoed(raw)
        if kind in _STARTS:
            self._begun = shown
        return self._show(event, frame, response=shown)

    def _part(self, kind: str, event: Members, frame: Frame) -> bytes:
        """Something of an item, which is shown unless it is a call of ours."""
        hop = self._hop
        item = members(event.get("item"))
        index = hop.index_of(kind, event, item)
        if index is None:
            return self._show(event, frame)
        done = member_bytes(frame.data or b"", "item") if kind == _DONE else None
        if done is not None:
            hop.items[index] = done
        if index not in hop.places:
            if done is None and (index in hop.waiting or kind.startswith(_ARGUMENTS) or _is_open(item)):
                hop.waiting.setdefault(index, []).append((event, frame))
                return b""
            self._place(index, item)
        waiting = hop.waiting.pop(index, [])
        place = hop.places[index]
        if place is None or self._tool(item) is not None:
            self._differs = True
            return b""
        if done is not None:
            self._items[place] = done
        return b"".join(self._show(*shown, place=place) for shown in (*waiting, (event, frame)))

    def _place(self, index: int, item: Members) -> None:
        """Give an item of the provider its place among those that the client sees, or none."""
        hop = self._hop
        if self._tool(item) is not None:
            hop.places[index] = None
            self._differs = True
            return
        place = hop.base + index - list(hop.places.values()).count(None)
        while place in self._items:  # items were not begun in their order
            place += 1
        hop.places[index] = place
        self._items[place] = None

    def _show(self, event: Members, frame: Frame, *, place: int | None = None, response: bytes | None = None) -> bytes:
        """The frame as the client may see it, with the members replaced that have to be."""
        new: dict[str, bytes] = {}
        number = integer(event.get("sequence_number"))
        self._sequence = self._sequence + 1 if number is None or self._differs else number
        if number is not None and number != self._sequence:
            new["sequence_number"] = b"%d" % self._sequence
        if place is not None and integer(event.get("output_index")) not in (None, place):
            new["output_index"] = b"%d" % place
        if response is not None and response != member_bytes(frame.data or b"", "response"):
            new["response"] = response
        return frame.with_data(with_replaced(frame.data or b"", new)) if new else frame.raw

    def _end(self, response: bytes | None, *, whole: bool) -> None:
        """The response has ended. Items that came in no event of their own are in the last one (wire.md C3)."""
        if response is None:
            return
        hop = self._hop
        output = [(index, raw, members(raw)) for index, raw in enumerate(elements(member_bytes(response, "output")))]
        hop.response = self._echoed(response)
        end = members(response)
        hop.identity = text(end.get("id"))
        hop.whole = whole and text(end.get("status")) not in _BROKEN
        if members(end.get("usage")):
            self._usages.append(member_bytes(response, "usage") or b"")
        self._differs = self._differs or any(self._tool(item) is not None for _, _, item in output)
        # Which are new is asked before any is taken in: two of them may have the same call id (wire.md D3).
        for index, raw, item in [one for one in output if one[0] not in hop.items and not hop.knows(one[2])]:
            hop.items[index] = raw
            if index not in hop.places:
                self._place(index, item)
            if (place := hop.places[index]) is not None:
                self._items[place] = raw

    def _keep_first(self, response: Members, raw: bytes) -> None:
        if not self._first:
            self._first = {name: member_bytes(raw, name) or b"" for name in _CONSTANT if name in response}

    def _echoed(self, response: bytes) -> bytes:
        """A response object that repeats the client's request, not ours, and is one over all turns."""
        response = without_tools(response, self._toolset)
        found = members(response)
        if "previous_response_id" in found and _differ(member_bytes(response, "previous_response_id"), self._previous):
            response = with_member(response, "previous_response_id", self._previous)
        if self._hop.number > 1:
            for name, value in self._first.items():
                response = with_member(response, name, value)
        return response

    def _merged(self, response: bytes) -> bytes:
        """The response object with what all turns said; a single one that hides nothing says it itself."""
        if not self._differs:
            return response
        shown = [raw for _, raw in sorted(self._items.items()) if raw is not None]
        response = with_member(response, "output", b"[" + separator(response).join(shown) + b"]")
        if self._usages:
            response = with_member(response, "usage", merged_usage(self._usages, self._policy))
        return response

    def _tool(self, item: Members) -> Tool | None:
        """The injected tool that an item calls. A tool of the client's may have the same name in a namespace."""
        if text(item.get("type")) != "function_call" or text(item.get("namespace")):
            return None
        return self._toolset.get(text(item.get("name")))

    def _call(self, item: Members) -> Call | None:
        tool = self._tool(item)
        if tool is None:
            return None
        given = item.get("arguments")
        arguments = text(given)
        if arguments is None:  # compatible servers send an object
            arguments = source(given) or ""
        refusal = None
        if text(item.get("status")) == "incomplete":
            refusal = _BROKE_OFF
        elif not arguments.strip():
            arguments = "{}"
        elif not is_whole_object(arguments):
            refusal = _NOT_AN_OBJECT
        return Call(text(item.get("call_id")) or text(item.get("id")) or "", tool, arguments, refusal)


def _parsed(data: bytes) -> Members:
    """The members of an event or a body, also where text in it is not UTF-8: nothing hidden may pass for being garbled."""
    try:
        return parse_object(data)
    except Unreadable:
        return parse_object(data.decode("utf-8", "replace").encode())


def _is_open(item: Members) -> bool:
    """Whether it may still turn out to be a call of ours."""
    kind = text(item.get("type"))
    return kind is None or (kind == "function_call" and not text(item.get("name")))


def _differ(one: bytes | None, other: bytes) -> bool:
    """Whether two texts are of different strings, or one of a string and one of none."""
    return text(msgspec.Raw(one or b"null")) != text(msgspec.Raw(other))
