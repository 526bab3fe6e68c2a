"""What the client gets to see of what the provider sends.

A `Merger` presents one upstream response or several as one. With nothing injected that is the verbatim one: bytes through,
an observer reads a copy. In the inner loop of injected tools the wire format merges (`aibridge.wire.turns`).
"""

from dataclasses import dataclass
from typing import Final, Protocol

import msgspec

from aibridge.commands import Relay, Respond
from aibridge.errors import BridgeError, UpstreamError
from aibridge.tools import Toolset
from aibridge.wire.base import Request, ResponseFacts, ResponseFilter, ToolCall
from aibridge.wire.coding import CodingError, decoder
from aibridge.wire.observer import MAX_BODY_BYTES, Observer, ResponseHead
from aibridge.wire.reading import Unreadable
from aibridge.wire.sse import Frame, SseDecoder
from aibridge.wire.turns import Draft, Turn, UsagePolicy

_CUT: Final = UpstreamError("The provider's response ended before it was complete.")
_BOM: Final = b"\xef\xbb\xbf"
_OF_OTHERS: Final = frozenset({"namespace", "type", "run_by"})
_DROPPED_WHEN_EDITED: Final = (b"content-length", b"content-encoding")


@dataclass(frozen=True, slots=True)
class Loop:
    """The inner loop of one request: the tools that were injected into it, and how far it may go.

    `draft` is the request as the client sent it. `max_turns` bounds how often the provider is asked, at least once.
    """

    toolset: Toolset
    draft: Draft
    usage: UsagePolicy = "sum"
    max_turns: int = 32


class Merger(Protocol):
    """Presents what the provider sends to the client.

    For each upstream response: `begin`, `feed` until it is `finished` or over, `end`. What completes the client's response
    is held back from `feed` until `finish`, or `whole` where the response was never begun.
    """

    failure: BridgeError | None
    """Why the response cannot be completed."""

    @property
    def started(self) -> bool:
        """The client's response has begun."""

    @property
    def status(self) -> int | None:
        """The HTTP status that the client gets, as far as it is known."""

    @property
    def bodiless(self) -> bool:
        """The head is the whole upstream response."""

    @property
    def finished(self) -> bool:
        """The event that ends the upstream stream has come."""

    @property
    def owes(self) -> bool:
        """The client was told of a length, and has not got as much."""

    @property
    def error(self) -> str | None:
        """Why the interception failed: our failure, or the provider's own words."""

    @property
    def facts(self) -> ResponseFacts:
        """What the upstream response said, without the calls of injected tools: those are recorded when they are run."""

    def begin(self, head: ResponseHead) -> Respond | None:
        """An upstream response begins: how the client's response does, if it does now. Raises `UpstreamError`."""

    def feed(self, chunk: bytes) -> bytes:
        """What the client may see now. Raises `UpstreamError` when the response cannot be understood but has to be."""

    def end(self) -> None:
        """The upstream response has ended, or its last event has come. Raises `UpstreamError` if that is too early."""

    def finish(self) -> bytes:
        """What was held back. From here on nothing is."""

    def rest(self) -> bytes:
        """What an edited stream has left at its end."""

    def whole(self) -> tuple[Respond | Relay, ...]:
        """The whole response, where it was not begun before its end."""

    def error_event(self) -> bytes | None:
        """The failure as an event of the stream; None where there is no room for one."""


class VerbatimMerger:
    """Presents one upstream response as it is, and observes it."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._held: list[bytes] | None = []
        self._whole_events = True  # what was passed on before bytes were held ended between two events
        self.failure: BridgeError | None = None
        self.started = False
        self.bodiless = False
        self.status: int | None = None

    def begin(self, head: ResponseHead) -> Respond | None:
        """Answers with the provider's head; later, where it is all there is."""
        self.status = head.status
        self.bodiless = head.bodiless
        self.started = not self.bodiless
        self._success = head.ok
        self._coding = head.coding
        self._left = head.content_length
        self._stream = head.is_stream(requested=self._request.facts.stream)
        self._observer = Observer(self._request.format.reader(), head, stream=self._stream)
        self._filter: ResponseFilter | None = None
        if self._stream and self._success and self._observer.undecodable is None:  # else it was compressed beyond us
            self._filter = self._request.format.response_filter(self._request)
        headers = head.headers
        if self._filter is not None:
            headers = [field for field in headers if field[0] not in _DROPPED_WHEN_EDITED]
        self._beginning = Respond(head.status, headers)
        return self._beginning if self.started else None

    @property
    def finished(self) -> bool:
        """The event that ends the stream has come."""
        return self._stream and self._observer.finished

    @property
    def owes(self) -> bool:
        """The declared length is longer than what has come."""
        return self._filter is None and self._left is not None and self._left > 0

    @property
    def error(self) -> str | None:
        """Why the interception failed: our failure, or the provider's own words."""
        if self.failure is not None:
            return self.failure.message
        said = self._observer.error
        return said if self._success or said is not None else f"HTTP {self.status}"

    @property
    def facts(self) -> ResponseFacts:
        """What the response said."""
        return self._observer.facts(cut=self.failure is not None)

    def feed(self, chunk: bytes) -> bytes:
        """What the client may see now. Raises `UpstreamError` when the response has to be edited and cannot be decoded."""
        observer = self._observer
        between_events = observer.at_boundary
        frames = observer.feed(chunk)
        if self._left is not None:
            self._left -= len(chunk)
        if self._filter is not None:
            if observer.undecodable is not None:
                raise _undecodable(observer.undecodable)
            chunk = self._filter.feed(frames)
        if self._held is not None and ((observer.finished and self._stream) or (self._left is not None and self._left <= 0)):
            if not self._held:
                self._whole_events = between_events
            self._held.append(chunk)
            return b""
        return chunk

    def end(self) -> None:
        """The provider has ended its response, or its last event has come. Raises `UpstreamError` if that is too early."""
        self._observer.end()
        if self._success and not self._observer.ends_at_eof:
            raise _CUT

    def finish(self) -> bytes:
        """What was held back. From here on nothing is."""
        held = b"".join(self._held or ())
        self._held = None
        return held

    def rest(self) -> bytes:
        """What an edited stream has left at its end."""
        return b"" if self._filter is None else self._filter.feed(self._observer.leftover())

    def whole(self) -> tuple[Respond | Relay, ...]:
        """The head of a response without a body."""
        return (self._beginning,)

    def error_event(self) -> bytes | None:
        """The failure as an event of the stream; None where there is no room for one."""
        if self.failure is None or not self._stream or self._left is not None or (self._coding and not self._filter):
            return None
        event = self._observer.error_event(self.failure.status, self.failure.message)
        if self._filter is not None or (self._whole_events if self._held else self._observer.at_boundary):
            return event
        self._observer.end()
        return None if self.finished else b"\n\n" + event  # a blank line ends the event under way, but not the stream


class LoopMerger:
    """Presents the responses of several turns as one: a stream at once, anything else when all is said.

    The head is that of the first response; those of later ones have no place in the client's (wire.md A1).
    """

    bodiless = False
    owes = False  # the length of a stream is not told, that of anything else is its own

    def __init__(self, request: Request, loop: Loop) -> None:
        self._request = request
        self._toolset = loop.toolset
        hides_usage = request.hides_usage
        self._merger = request.format.turns.merger(loop.draft.body, loop.toolset, loop.usage, hides_usage=hides_usage)
        self._first: ResponseHead | None = None
        self._stream = False
        self._refused = False  # a later request was: its answer is an error and no turn
        self._body: list[bytes] = []
        self._late = b""  # what only the end of a response completed
        self._goes_on = False  # it is not the first response that is under way
        self._verbatim: bytes | None = None  # a body that nobody can read, and so nobody can merge
        self._finished = False
        self.failure: BridgeError | None = None

    @property
    def started(self) -> bool:
        """A stream that has begun."""
        return self._first is not None and self._stream

    @property
    def status(self) -> int | None:
        """That of the first response."""
        return None if self._first is None else self._first.status

    @property
    def finished(self) -> bool:
        """The event that ends the upstream stream has come."""
        return self._stream and self._observer.finished

    @property
    def error(self) -> str | None:
        """Why the interception failed: our failure, or the provider's own words."""
        return self._observer.error if self.failure is None else self.failure.message

    @property
    def facts(self) -> ResponseFacts:
        """What the upstream response said, without the calls of injected tools."""
        facts = self._observer.facts(cut=self.failure is not None)
        return msgspec.structs.replace(facts, tool_calls=tuple(call for call in facts.tool_calls if not self._is_ours(call)))

    def begin(self, head: ResponseHead) -> Respond | None:
        """A further upstream response begins. Raises `UpstreamError` where it cannot be read."""
        stream = head.is_stream(requested=self._request.facts.stream)
        self._observer = Observer(self._request.format.reader(), head, stream=stream)
        self._sse = SseDecoder()
        self._body, self._size = [], 0
        self._refused = not head.ok
        try:
            self._decoder = decoder(head.coding) if head.coding else None
        except CodingError as error:
            raise _undecodable(error) from None
        if self._refused:
            return None
        self._merger.begin()
        if self._first is not None:
            self._goes_on = True
            if stream != self._stream:
                raise UpstreamError("The provider answered one request with a stream and one without.")
            return None
        self._first, self._stream = head, stream
        headers = [field for field in head.headers if field[0] not in _DROPPED_WHEN_EDITED]
        self._beginning = Respond(head.status, headers, self._merger.keep_alive if stream else b"")
        return self._beginning if stream else None

    def feed(self, chunk: bytes) -> bytes:
        """What the client may see now: whole frames. Raises `UpstreamError` when the response cannot be decoded."""
        if self._finished:
            return b""
        self._observer.feed(chunk)
        try:
            plain = chunk if self._decoder is None else b"".join(self._decoder.feed(chunk))
        except CodingError as error:
            raise _undecodable(error) from None
        if self._stream and not self._refused:
            return self._taken_late() + b"".join(map(self._show, self._sse.feed(plain)))
        self._body.append(plain)
        self._size += len(plain)
        if self._size > MAX_BODY_BYTES:
            raise UpstreamError("The provider's response is too large.")
        return b""

    def end(self) -> None:
        """The upstream response has ended, or its last event has come. Raises `UpstreamError` if that is too early."""
        self._observer.end()
        if self._refused:
            raise UpstreamError(self._observer.error or "The provider refused to go on.")
        if not self._observer.ends_at_eof:
            raise _CUT
        if not self._stream:
            body = b"".join(self._body)
            try:
                self._merger.read_body(body)
            except Unreadable:
                self._verbatim = body
        elif not self._sse.at_boundary:  # clients accept a last event without its blank line (wire.md E)
            self._late = self._show(self._sse.feed(b"\n\n")[0])  # one line end may have been there

    def turn(self) -> Turn:
        """What the provider said in the response that has ended."""
        return self._merger.turn() if self._verbatim is None else Turn(())

    def finish(self) -> bytes:
        """What ends the merged response. What the provider says after that is nobody's."""
        self._finished = True
        return self._taken_late() + self._merger.finish() if self._verbatim is None else self._verbatim

    def rest(self) -> bytes:
        """Nothing: only whole frames were passed on."""
        return b""

    def whole(self) -> tuple[Respond | Relay, ...]:
        """The head of the first response with the merged body."""
        body = self.finish()
        length = (b"content-length", b"%d" % len(body))
        return Respond(self._beginning.status, [*self._beginning.headers, length]), Relay(body)

    def error_event(self) -> bytes | None:
        """The failure as an event of the stream, with the provider's words where it refused a later request."""
        assert self.failure is not None  # noqa: S101  that is what it is called for
        body = b"".join(self._body) if self._refused else b""
        return self._taken_late() + self._merger.error_event(self.failure.status, self.failure.message, body)

    def _taken_late(self) -> bytes:
        late, self._late = self._late, b""
        return late

    def _is_ours(self, call: ToolCall) -> bool:
        """A call in a namespace, of a custom tool, or that the provider runs itself, is of another tool of that name."""
        return self._toolset.get(call.name) is not None and not _OF_OTHERS & call.details.keys()

    def _show(self, frame: Frame) -> bytes:
        try:
            shown = self._merger.read_event(frame)
        except Unreadable:
            shown = frame.raw
        return shown.removeprefix(_BOM) if self._goes_on else shown  # only what begins a stream may have one


def _undecodable(error: CodingError) -> UpstreamError:
    return UpstreamError(f"The provider's response cannot be decoded: {error}.")
