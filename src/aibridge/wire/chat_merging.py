"""Several Chat Completions responses presented as one. Facts from wire.md B2, B4, D5."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Final

from msgspec import Raw

from aibridge.errors import error_body
from aibridge.tools import Toolset
from aibridge.wire.chat_assembly import (
    ChatResponse,
    Part,
    call_of,
    choice_of,
    exact_items,
    injected_tool,
    is_error,
    joined,
    plainly_ended,
    says,
    with_choice,
    with_list,
)
from aibridge.wire.reading import Members, integer, is_null, members, text
from aibridge.wire.splicing import (
    inner_members,
    with_member,
    without_member,
    written_members,
)
from aibridge.wire.sse import Frame
from aibridge.wire.turns import Piece, Turn, TurnMerger, UsagePolicy
from aibridge.wire.usage import merged_usage

DONE: Final = b"[DONE]"

# What a response is called. The client hears it from the first one only (wire.md D5).
_ENVELOPE: Final = ("id", "created", "model")

_LATE: Final = b"\n"  # the half of a line end that comes after its frame where two chunks share it


@dataclass(frozen=True, slots=True)
class _Chunk:
    """A frame and what it says: nothing, where it is a comment or cannot be read. `ends`: it belongs to the end."""

    frame: Frame
    top: Members = field(default_factory=dict)
    delta: bytes = b"{}"
    parts: Sequence[Part] = ()
    finishes: bool = False
    ends: bool = False

    @property
    def only_usage(self) -> bool:
        """Whether it is the chunk that is there for its usage alone: its list of choices is empty (wire.md B2)."""
        usage, choices = self.top.get("usage"), self.top.get("choices")
        return usage is not None and not is_null(usage) and choices is not None and not exact_items(choices)


class ChatMerger(TurnMerger):
    """The merger of Chat Completions.

    A frame is read as it comes. It is shown when it is known whose the calls in it are, which is at once unless a server
    names a call after its beginning.
    """

    keep_alive: ClassVar[bytes] = b": keep-alive\n\n"

    def __init__(self, toolset: Toolset, policy: UsagePolicy, *, hides_usage: bool) -> None:
        self._toolset = toolset
        self._policy = policy
        self._hides_usage = hides_usage
        self._hop = 0
        self._response = ChatResponse(toolset)
        self._envelope: dict[str, bytes] = {}
        self._usages: list[bytes] = []  # of the responses before this one
        self._details = 0  # the numbers that their reasoning details have taken
        self._role_shown = False
        self._waiting: list[_Chunk] = []
        self._held: list[bytes] = []
        self._into = (True, False)  # whether of the last frame anything was relayed, and held
        self._bodies: list[bytes] = []
        self._messages: list[bytes] = []  # of the bodies

    def begin(self) -> None:
        """A response begins. What was held of the one before it did not end the client's."""
        if self._response.usage is not None:
            self._usages.append(self._response.usage)
        self._details += self._response.details
        self._response = ChatResponse(self._toolset)
        self._hop += 1
        self._held.clear()

    def read_event(self, frame: Frame) -> bytes:
        """Take in a frame: what the client may see now. What cannot be read passes."""
        self._waiting.append(self._read(frame))
        return b"" if self._response.undecided else self._release()

    def read_body(self, body: bytes) -> None:
        """Take in a response that is no stream. Raises `Unreadable` when it is not a JSON object."""
        top = written_members(body)
        choice, _ = self._response.read(top, "message")
        self._keep_envelope(top)
        self._bodies.append(body)
        self._messages.append(bytes(choice.get("message", b"")))

    def turn(self) -> Turn:
        """The turn of the response that has ended. Its message is one piece."""
        self._settle()
        message = self._messages[-1] if self._bodies else self._response.message()
        calls = [members(raw) for raw in exact_items(members(message).get("tool_calls"))]
        ours = [(call, tool) for call in calls if (tool := injected_tool(call, self._toolset)) is not None]
        return Turn(
            pieces=(Piece(message),) if message else (),
            calls=() if self._response.cut_short else tuple(call_of(call, tool) for call, tool in ours),
            awaits_client=len(calls) > len(ours),
            response_id=self._response.id,
        )

    def finish(self) -> bytes:
        """What ends the client's response."""
        if self._bodies:
            return self._merged_body()
        self._settle()
        return b"".join(self._held)

    def error_event(self, status: int, message: str, body: bytes = b"") -> bytes:
        """An object with an ``error``, at which both SDKs raise (wire.md B2)."""
        error = body if is_error(members(body).get("error")) else error_body("openai", status, message)
        return b"data: " + error.replace(b"\r", b" ").replace(b"\n", b" ") + b"\n\n"

    def _keep_envelope(self, top: Members) -> None:
        """The first response gives it. Azure's begins with empty strings."""
        if self._hop == 1:
            self._envelope |= {name: bytes(top[name]) for name in _ENVELOPE if name in top and says(top[name])}

    # --- streams ---

    def _read(self, frame: Frame) -> _Chunk:
        if frame.data is None:
            return _Chunk(frame)
        if frame.data.strip() == DONE:
            return _Chunk(frame, ends=True)
        top = inner_members(frame.data)
        choice, parts = self._response.read(top, "delta")
        self._keep_envelope(top)
        finishes = bool(text(choice.get("finish_reason")))
        return _Chunk(frame, top, bytes(choice.get("delta", b"")), parts, finishes, ends=finishes or self._response.failed)

    def _settle(self) -> None:
        """The response has ended: a call whose name never came is not one of ours."""
        place = len(self._held)
        self._held.insert(place, self._release())

    def _release(self) -> bytes:
        released = b"".join(map(self._placed, self._waiting))
        self._waiting.clear()
        return released

    def _placed(self, chunk: _Chunk) -> bytes:
        """What of a frame is relayed now; what ends the response is held.

        Where nothing is hidden what follows the end is held, too, so that the stream stays as it was. Where something is,
        the turn goes on, so what comes in one chunk with the end is relayed without it.
        """
        frame, hides = chunk.frame, self._response.hides
        if frame.raw == _LATE:
            relayed, held = (frame.raw if into else b"" for into in self._into)
        elif chunk.finishes and hides and not self._response.failed:
            relayed, held = self._divided(frame, self._shown(chunk))
        else:
            shown = frame.raw
            if chunk.top and (data := self._shown(chunk)) != frame.data:
                shown = data and frame.with_data(data)
            holds = chunk.ends or (hides and chunk.only_usage) or (not hides and bool(self._held))
            relayed, held = (b"", shown) if holds else (shown, b"")
        self._into = bool(relayed), bool(held)
        if held:
            self._held.append(held)
        return relayed

    def _divided(self, frame: Frame, data: bytes) -> tuple[bytes, bytes]:
        """A chunk with a finish reason as two: all but that, if there is anything, and that."""
        relayed = b""
        if any(map(says, members(choice_of(members(data)).get("delta")).values())):
            goes_on = with_choice(data, lambda choice: with_member(choice, "finish_reason", b"null"))
            relayed = frame.with_data(without_member(goes_on, "usage"))
        return relayed, frame.with_data(with_choice(data, self._ended))

    def _ended(self, choice: bytes) -> bytes:
        choice = with_member(choice, "delta", b"{}")
        return choice if self._response.shows_calls else plainly_ended(choice)

    def _shown(self, chunk: _Chunk) -> bytes:
        """The data of a chunk as the client may see it; empty where nothing is left of it."""
        data = self._with_envelope(self._with_delta(chunk), chunk.top)
        usage = chunk.top.get("usage")
        if usage is None or is_error(chunk.top.get("error")):
            return data
        if self._hides_usage and chunk.only_usage:
            return b""
        if self._hides_usage and is_null(usage) and "choices" in chunk.top:
            return data and without_member(data, "usage")
        return data and self._with_usage(data, usage)

    def _with_envelope(self, data: bytes, top: Members) -> bytes:
        """With the first response's id, time and model where there are any."""
        for name, raw in self._envelope.items() if data and self._hop > 1 else ():
            if name in top and bytes(top[name]) != raw:
                data = with_member(data, name, raw)
        return data

    def _with_usage(self, data: bytes, usage: Raw | bytes) -> bytes:
        if not self._usages or not members(usage):
            return data
        return with_member(data, "usage", merged_usage([*self._usages, bytes(usage)], self._policy))

    def _with_delta(self, chunk: _Chunk) -> bytes:
        """Without hidden calls and a second role; empty where that leaves a chunk that says nothing."""
        assert chunk.frame.data is not None  # noqa: S101  it has members
        data, delta, lists = chunk.frame.data, chunk.delta, self._renumbered(chunk)
        has_role = "role" in members(delta)
        drops_role = has_role and self._role_shown and self._hop > 1
        self._role_shown = self._role_shown or has_role
        if not drops_role and not lists:
            return data
        if drops_role:
            delta = without_member(delta, "role")
        for name, elements in lists.items():
            delta = with_list(delta, name, elements)
        if not chunk.ends and not members(chunk.top.get("usage")) and not any(map(says, members(delta).values())):
            return b""
        return with_choice(data, lambda choice: with_member(choice, "delta", delta))

    def _renumbered(self, chunk: _Chunk) -> dict[str, list[bytes]]:
        """The lists of a delta that are others for the client: gaps and repetitions in them break SDKs (wire.md D5)."""
        lists, delta = dict[str, list[bytes]](), inner_members(chunk.delta)
        numbers = [self._response.number(part) for part in chunk.parts]
        if numbers != [part.index for part in chunk.parts]:
            lists["tool_calls"] = [
                with_member(bytes(raw), "index", b"%d" % number)
                for raw, number in zip(exact_items(delta["tool_calls"]), numbers, strict=True)
                if number is not None
            ]
        details = [bytes(raw) for raw in exact_items(delta.get("reasoning_details"))]
        if self._details and details:
            lists["reasoning_details"] = [
                raw
                if (index := integer(members(raw).get("index"))) is None
                else with_member(raw, "index", b"%d" % (self._details + index))
                for raw in details
            ]
        return lists

    # --- bodies ---

    def _merged_body(self) -> bytes:
        """The last body, with what those before it showed; a single one with nothing hidden as it is."""
        body = self._bodies[-1]
        if len(self._bodies) == 1 and not self._response.hides:
            return body
        for name, raw in self._envelope.items():
            body = with_member(body, name, raw)
        if self._response.usage is not None:
            body = self._with_usage(body, self._response.usage)
        return with_choice(body, self._merged_choice) if self._messages[-1] else body

    def _merged_choice(self, choice: bytes) -> bytes:
        message, given = self._messages[-1], dict[str, list[bytes]]()
        for said in self._messages:
            for name, raw in inner_members(said).items():
                given.setdefault(name, []).append(bytes(raw))
        given.pop("role", None)
        calls = exact_items(inner_members(message).get("tool_calls")) if given.pop("tool_calls", None) else []
        visible = [bytes(raw) for raw in calls if injected_tool(members(raw), self._toolset) is None]
        if len(visible) < len(calls):
            message = with_list(message, "tool_calls", visible)
        for name, raws in given.items():
            if len(raws) > 1 or name not in members(message):
                message = with_member(message, name, joined(raws))
        choice = with_member(choice, "message", message)
        return choice if visible else plainly_ended(choice)
