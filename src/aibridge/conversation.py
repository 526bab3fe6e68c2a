"""One client request and its upstream turns: the engine, without I/O.

`converse` is a generator. It yields *commands* and is sent their results, so it reads from top to bottom like blocking
code, runs without an event loop in tests, and leaves clocks, sockets and ids to the shell (`aibridge.relay`):

    conversation = converse(request)
    command = next(conversation)             # Send(request)
    command = conversation.send(head)        # Respond(...), then Receive() ...
    command = conversation.throw(error)      # what went wrong while carrying out the last command

What may be thrown in: `UpstreamError` at Send and Receive, `ClientDisconnected` and `Interrupted` at Send, Receive, Respond
and Relay, `RecordingFailed` at End. Nothing else, and nothing comes out.

*Durable before done*: the bytes that make a response look complete to the client (its last event, the end of a declared
length, the end of the body) are yielded after `End`, and the shell carries out `End` by waiting until the records are
committed. If they cannot be, the client is told so in place of an end.
"""

from collections.abc import Generator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

from aibridge.errors import (
    BridgeError,
    ClientDisconnected,
    Interrupted,
    RecordingFailed,
    UpstreamError,
    UpstreamTimeout,
    error_body,
)
from aibridge.records import Status
from aibridge.wire.base import Headers, Request, ResponseFacts, ResponseFilter, Usage
from aibridge.wire.coding import CodingError, Decoder, decoder
from aibridge.wire.observer import Observer, ResponseHead


@dataclass(frozen=True, slots=True)
class Send:
    """Send the request to the provider. Answered with the `ResponseHead`."""

    request: Request


@dataclass(frozen=True, slots=True)
class Receive:
    """Wait for the next bytes of the provider's response. Answered with them, or with ``b""`` at its end."""


@dataclass(frozen=True, slots=True)
class Respond:
    """Begin the response to the client."""

    status: int
    headers: Headers


@dataclass(frozen=True, slots=True)
class Relay:
    """Pass bytes on to the client. Answered with whether it is still there: a response may be read on for the record."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Record:
    """Record what one upstream response said. Does not wait: records keep their order, and `End` waits for all."""

    facts: ResponseFacts


@dataclass(frozen=True, slots=True)
class End:
    """Record how the interception ended, and wait until all its records are durable."""

    status: Status
    http_status: int | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Abort:
    """Break off the response to the client, so that it cannot be mistaken for a complete one."""


Command = Send | Receive | Respond | Relay | Record | End | Abort
Conversation = Generator[Command, Any, None]

_CUT: Final = UpstreamError("The provider's response ended before it was complete.")
_SHUTDOWN: Final = UpstreamError("The gateway is shutting down.")
# The provider may have begun, and bill it: the figures are not known, but it is known that there are some.
_NOBODY_KNOWS: Final = ResponseFacts(usage=Usage(), completeness="partial")
_DROPPED_WHEN_EDITED: Final = (b"content-length", b"content-encoding")


def converse(request: Request) -> Conversation:
    """Carry one client request through. See the module's docstring for the protocol."""
    try:
        head = yield Send(request)
    except UpstreamError as error:
        yield Record(_NOBODY_KNOWS if isinstance(error, UpstreamTimeout) else ResponseFacts())
        unrecorded = yield from _end(End("failed", error.status, error.message))
        yield from _refuse(request, unrecorded or error)
        return
    except (ClientDisconnected, Interrupted) as event:
        yield Record(_NOBODY_KNOWS)
        unrecorded = yield from _end(End(_status_of(event)))
        if isinstance(event, Interrupted):
            yield from _refuse(request, unrecorded or _SHUTDOWN)
        return
    merger = Merger(request, head)
    end = yield from _relay(merger)
    yield Record(merger.facts)
    merger.failure = (yield from _end(end)) or merger.failure
    if end.status == "client_disconnected":
        return
    if merger.failure is not None:
        yield from _refuse(request, merger.failure) if merger.bodiless else _break_off(merger)
    elif merger.bodiless:  # then its beginning is its end
        yield from _last_words(merger.beginning)
    else:
        yield from _finish(merger)


def _relay(merger: "Merger") -> Generator[Command, Any, End]:
    """Relay the response up to its end, which is held back. Answers how the interception ended."""
    listening = True
    try:
        if not merger.bodiless:
            yield merger.beginning
        while not merger.bodiless and (chunk := (yield Receive())):
            listening = yield Relay(merger.feed(chunk))
            if merger.finished:
                break
        merger.end()
    except UpstreamError as error:
        merger.failure = error
    except (ClientDisconnected, Interrupted) as event:
        merger.failure = _SHUTDOWN
        return End(_status_of(event), merger.status)
    if not listening:
        return End("client_disconnected", merger.status)
    if merger.error is not None:
        return End("failed", merger.status, merger.error)
    return End("completed", merger.status)


def _finish(merger: "Merger") -> Conversation:
    """Let go of what ends the response, and pass on what follows the last event until the provider closes."""
    with suppress(UpstreamError, ClientDisconnected, Interrupted):  # the response was complete, and is recorded as such
        yield Relay(merger.finish())
        while chunk := (yield Receive()):
            yield Relay(merger.feed(chunk))
        if rest := merger.rest():
            yield Relay(rest)


def _end(end: End) -> Generator[Command, Any, RecordingFailed | None]:
    try:
        yield end
    except RecordingFailed as error:
        return error
    return None


def _status_of(event: ClientDisconnected | Interrupted) -> Status:
    return "interrupted" if isinstance(event, Interrupted) else "client_disconnected"


def _refuse(request: Request, error: BridgeError) -> Conversation:
    """Answer with an error of our own, before anything was relayed."""
    body = error_body(request.format.kind, error.status, error.message)
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    yield from _last_words(Respond(error.status, headers), Relay(body))


def _break_off(merger: "Merger") -> Conversation:
    """End a response that is not complete: in the protocol's own way where one can be, never silently (failures.md 18)."""
    event = merger.error_event()
    if event is None:
        yield Abort()
    else:
        yield from _last_words(Relay(event))


def _last_words(*commands: Command) -> Conversation:
    try:
        for command in commands:  # noqa: UP028  a tuple takes no answers
            yield command
    except (ClientDisconnected, Interrupted):
        yield Abort()


class Merger:
    """Presents the upstream response to the client, verbatim, and observes it.

    `feed` answers with what the client may see now. From the chunk on that completes the response, bytes are held until
    `finish`. `failure` is why the response cannot be completed.
    """

    def __init__(self, request: Request, head: ResponseHead) -> None:
        self.status = head.status
        self.bodiless = head.bodiless
        self._stream = head.is_stream(requested=request.facts.stream)
        self._observer = Observer(request.format.reader(), head, stream=self._stream)
        self._filter, self._decoder = _editing(request, head) if self._stream and head.ok else (None, None)
        self._left = head.content_length
        self._coding = head.coding
        self._success = head.ok
        self._held: list[bytes] | None = []
        self._whole_events = True  # what was passed on before bytes were held ended between two events
        self.failure: BridgeError | None = None
        edited = self._filter is not None
        headers = [field for field in head.headers if not (edited and field[0] in _DROPPED_WHEN_EDITED)]
        self.beginning = Respond(head.status, headers)

    @property
    def finished(self) -> bool:
        """The event that ends the stream has come."""
        return self._stream and self._observer.finished

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
        between_events = self._observer.at_boundary
        self._observer.feed(chunk)
        if self._left is not None:
            self._left -= len(chunk)
        if self._filter is not None:
            chunk = self._filter.feed(self._plain(chunk))
        if self._held is not None and (self.finished or (self._left is not None and self._left <= 0)):
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
        return b"" if self._filter is None else self._filter.rest()

    def error_event(self) -> bytes | None:
        """The failure as an event of the stream; None where there is no room for one."""
        if self.failure is None or not self._stream or self._left is not None or (self._coding and not self._filter):
            return None
        event = self._observer.error_event(self.failure.status, self.failure.message)
        if self._filter is not None or (self._whole_events if self._held else self._observer.at_boundary):
            return event
        self._observer.end()
        return None if self.finished else b"\n\n" + event  # a blank line ends the event under way, but not the stream

    def _plain(self, chunk: bytes) -> bytes:
        if self._decoder is None:
            return chunk
        try:
            return b"".join(self._decoder.feed(chunk))
        except CodingError as error:
            raise UpstreamError(f"The provider's response cannot be decoded: {error}.") from None


def _editing(request: Request, head: ResponseHead) -> tuple[ResponseFilter | None, Decoder | None]:
    """What edits the response, and what has to decode it before; neither where a provider compressed it beyond us."""
    edit = request.format.response_filter(request)
    if edit is None or not head.coding:
        return edit, None
    try:
        return edit, decoder(head.coding)
    except CodingError:
        return None, None
