"""The observer: reads a copy of a response while it passes by, and can never harm it.

Most events of a stream say nothing that the ledger wants. A reader tells by `ResponseReader.run` which those are, and they
are passed over in one step; of what they say only the newest counts, so it is read when something depends on it.
"""

from collections.abc import Sequence
from typing import Final

import msgspec

from aibridge.wire.base import Headers, ResponseFacts, ResponseReader, Usage
from aibridge.wire.coding import CodingError, Decoder, decoder
from aibridge.wire.sse import Frame, SseDecoder

MAX_BODY_BYTES: Final = 64 * 1024 * 1024
"""How much of a blocking response is kept to be read at its end. Beyond it the response passes and is not read."""

_MAX_NOTES: Final = 10
_MAX_LENGTH_DIGITS: Final = 18
_SUCCESS: Final = range(200, 300)
_BODILESS: Final = (204, 304)


class ResponseHead(msgspec.Struct):
    """The head of an upstream response: HTTP status and header fields, names in lower case. Never changed."""

    status: int
    headers: Headers
    _first: dict[bytes, bytes] = {}

    def __post_init__(self) -> None:
        """Make ready for looking fields up."""
        self._first = dict(reversed(self.headers))

    def header(self, name: bytes) -> str:
        """The first value of a header field, or an empty string."""
        value = self._first.get(name)
        return "" if value is None else value.decode("latin-1")

    @property
    def ok(self) -> bool:
        """Whether the provider accepted the request."""
        return self.status in _SUCCESS

    @property
    def bodiless(self) -> bool:
        """The head is the whole response (RFC 9112 section 6.3)."""
        return self.status in _BODILESS or self.content_length == 0

    @property
    def coding(self) -> str:
        """The content coding of the body, empty where there is none."""
        coding = self.header(b"content-encoding").strip().lower()
        return "" if coding == "identity" else coding

    @property
    def content_length(self) -> int | None:
        """The declared length of the body in bytes."""
        value = self.header(b"content-length").strip()
        return int(value) if value.isascii() and value.isdigit() and len(value) <= _MAX_LENGTH_DIGITS else None

    def is_stream(self, *, requested: bool) -> bool:
        """Whether the body is a stream of events: it says so, or one was requested and it does not say otherwise."""
        kind = self.header(b"content-type").partition(";")[0].strip().lower()
        return kind == "text/event-stream" or (requested and self.ok and not kind.endswith("json"))


class Observer:
    """Reads one response. Whatever the bytes are, nothing is raised: what cannot be read becomes a note without content."""

    def __init__(self, reader: ResponseReader, head: ResponseHead, *, stream: bool) -> None:
        self.finished = False
        """The event that ends the stream has passed."""
        self.undecodable: CodingError | None = None
        """Why the body cannot be read any more."""
        self._reader = reader
        self._head = head
        self._sse = SseDecoder(run=reader.run) if stream else None
        self._run = b""  # the last run of frames, of which the last is still to be read
        self._torn: Frame | None = None  # the event inside of which the stream has ended
        self._body: list[bytes] = []
        self._size = 0
        self._notes: list[str] = []
        self._missed = False  # an event was too large to be read, so it may have been the last one
        self._decoder: Decoder | None = None
        if head.coding:
            try:
                self._decoder = decoder(head.coding)
            except CodingError as error:
                self._give_up(error)

    @property
    def error(self) -> str | None:
        """The provider's own words, where it has reported an error."""
        return self._reader.error

    @property
    def ends_at_eof(self) -> bool:
        """Whether the response is whole if the connection closes cleanly now."""
        self._catch_up()
        return self._sse is None or self.undecodable is not None or self._missed or self._reader.ends_at_eof

    @property
    def at_boundary(self) -> bool:
        """Whether an event can be added to the stream here."""
        return self._sse is None or (self._sse.at_boundary and self._torn is None)

    def feed(self, chunk: bytes) -> Sequence[Frame]:
        """Read the next bytes of the body. Answers with the frames of a stream that they complete."""
        if self.undecodable is not None:
            return ()
        if self._decoder is None:
            return self._take(chunk)
        frames: list[Frame] = []
        try:
            for piece in self._decoder.feed(chunk):
                frames += self._take(piece)
                if self._sse is not None and self._sse.oversized:  # a bomb would take seconds to be taken apart
                    raise CodingError("event over the size bound")
        except Exception as error:  # noqa: BLE001  looking at traffic never harms traffic
            self._give_up(error if isinstance(error, CodingError) else CodingError(type(error).__name__))
        return frames

    def end(self) -> None:
        """The body has ended as it should: read what can only be read whole."""
        if self._sse is None and self.undecodable is None:
            body = self._body[0] if len(self._body) == 1 else b"".join(self._body)
            self._body.clear()
            try:
                self._reader.read_body(body)
            except Exception as error:  # noqa: BLE001  looking at traffic never harms traffic
                self._note_failure(error)
            self.finished = self._reader.finished
        elif self._sse is not None and not (self.finished or self._sse.at_boundary):
            self._torn = _unfinished(self._sse)
            self._read(self._torn.data)  # clients accept a last event without its blank line (wire.md E)

    def leftover(self) -> Sequence[Frame]:
        """What of a frame the end of the stream left without its blank line, which clients read all the same."""
        if self._torn is not None:
            return (self._torn,)
        return () if self._sse is None else (_unfinished(self._sse),)

    def facts(self, *, cut: bool) -> ResponseFacts:
        """What the response said. `cut`: it broke off, so that its figures are partial at best."""
        self._catch_up()
        facts = self._reader.facts()
        usage = facts.usage or (Usage() if self._head.ok else None)
        completeness = "partial" if cut else facts.completeness
        if usage is facts.usage and completeness == facts.completeness and not self._notes:
            return facts
        return msgspec.structs.replace(facts, usage=usage, completeness=completeness, notes=(*facts.notes, *self._notes))

    def error_event(self, status: int, message: str) -> bytes:
        """An in-band error in the format's own form."""
        self._catch_up()
        return self._reader.error_event(status, message)

    def _take(self, piece: bytes) -> Sequence[Frame]:
        sse = self._sse
        if sse is None:
            self._keep(piece)
            return ()
        frames = sse.feed(piece)
        for frame in frames:
            if frame.run:
                self._run = frame.raw
            elif frame.data is not None:
                self._read(frame.data)
            elif frame.oversized:
                self._missed = True
                self._note("event over the size bound")
        if not sse.at_boundary:
            pending = sse.pending
            if pending is not None and self._reader.is_last(pending):  # but for its blank line, which not all wait for
                self._read(pending)
        return frames

    def _keep(self, piece: bytes) -> None:
        self._size += len(piece)
        if self._size > MAX_BODY_BYTES:
            self._body.clear()
            self._give_up(CodingError("body over the size bound"))
        else:
            self._body.append(piece)

    def _read(self, data: bytes | None) -> None:
        if data is None:
            return
        if self._run:
            self._catch_up()
        try:
            self._reader.read_event(data)
        except Exception as error:  # noqa: BLE001  looking at traffic never harms traffic
            self._note_failure(error)
        self.finished = self._reader.finished

    def _catch_up(self) -> None:
        """Read the last of the frames that were passed over."""
        run, self._run = self._run, b""
        if run:
            last = run[:-2].rpartition(b"\n\n")[2]
            self._read(last.partition(b"data: ")[2])

    def _give_up(self, error: CodingError) -> None:
        self.undecodable = error
        self._note(str(error))

    def _note_failure(self, error: Exception) -> None:
        self._note(f"unreadable: {type(error).__name__}")

    def _note(self, note: str) -> None:
        if len(self._notes) < _MAX_NOTES:
            self._notes.append(f"response: {note}")


def _unfinished(sse: SseDecoder) -> Frame:
    """The frame under way, with the bytes that came of it."""
    rest = sse.rest
    return msgspec.structs.replace(sse.feed(b"\n\n")[0], raw=rest)  # one line end may have been there
