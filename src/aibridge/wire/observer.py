"""The observer: reads a copy of a response while it passes by, and can never harm it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Final

from aibridge.wire.base import Headers, ResponseFacts, ResponseReader, Usage
from aibridge.wire.coding import CodingError, Decoder, decoder
from aibridge.wire.sse import SseDecoder

MAX_BODY_BYTES: Final = 64 * 1024 * 1024
"""How much of a blocking response is kept to be read at its end. Beyond it the response passes and is not read."""

_MAX_NOTES: Final = 10
_MAX_LENGTH_DIGITS: Final = 18
_SUCCESS: Final = range(200, 300)
_BODILESS: Final = (204, 304)


@dataclass(frozen=True, slots=True)
class ResponseHead:
    """The head of an upstream response: HTTP status and header fields, names in lower case."""

    status: int
    headers: Headers

    def header(self, name: bytes) -> str:
        """The first value of a header field, or an empty string."""
        return next((value.decode("latin-1") for key, value in self.headers if key == name), "")

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
        self._reader = reader
        self._head = head
        self._sse = SseDecoder() if stream else None
        self._body: list[bytes] = []
        self._size = 0
        self._notes: list[str] = []
        self._torn = False  # the stream has ended inside an event
        self._missed = False  # an event was too large to be read, so it may have been the last one
        self._decoder: Decoder | None = None
        with self._noting():
            self._decoder = decoder(head.coding)

    @property
    def finished(self) -> bool:
        """The event that ends the stream has passed."""
        return self._reader.finished

    @property
    def error(self) -> str | None:
        """The provider's own words, where it has reported an error."""
        return self._reader.error

    @property
    def ends_at_eof(self) -> bool:
        """Whether the response is whole if the connection closes cleanly now."""
        return self._sse is None or self._decoder is None or self._missed or self._reader.ends_at_eof

    @property
    def at_boundary(self) -> bool:
        """Whether an event can be added to the stream here."""
        return self._sse is None or (self._sse.at_boundary and not self._torn)

    def feed(self, chunk: bytes) -> None:
        """Read the next bytes of the body."""
        if self._decoder is None:
            return
        with self._noting():
            try:
                for piece in self._decoder.feed(chunk):
                    self._take(piece)
            except CodingError:
                self._decoder = None
                raise

    def end(self) -> None:
        """The body has ended as it should: read what can only be read whole."""
        if self._sse is None and self._decoder is not None:
            body = b"".join(self._body)
            with self._noting():
                self._reader.read_body(body)
            self._body.clear()
        elif self._sse is not None and not (self.finished or self._sse.at_boundary):
            self._torn = True
            for frame in self._sse.feed(b"\n\n"):  # clients accept a last event without its blank line (wire.md E)
                self._read(frame.data)

    def facts(self, *, cut: bool) -> ResponseFacts:
        """What the response said. `cut`: it broke off, so that its figures are partial at best."""
        facts = self._reader.facts()
        usage = facts.usage or (Usage() if self._head.ok else None)
        completeness = "partial" if cut else facts.completeness
        return replace(facts, usage=usage, completeness=completeness, notes=(*facts.notes, *self._notes))

    def error_event(self, status: int, message: str) -> bytes:
        """An in-band error in the format's own form."""
        return self._reader.error_event(status, message)

    def _take(self, piece: bytes) -> None:
        if self._sse is not None:
            for frame in self._sse.feed(piece):
                if frame.oversized:
                    self._missed = True
                    self._note("event over the size bound")
                self._read(frame.data)
            pending = self._sse.pending
            if pending is not None and self._reader.is_last(pending):  # but for its blank line, which not all wait for
                self._read(pending)
            return
        self._size += len(piece)
        if self._size > MAX_BODY_BYTES:
            self._body.clear()
            raise CodingError("body over the size bound")
        self._body.append(piece)

    def _read(self, data: bytes | None) -> None:
        if data is not None:
            with self._noting():
                self._reader.read_event(data)

    @contextmanager
    def _noting(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # noqa: BLE001  looking at traffic never harms traffic
            ours = isinstance(error, CodingError)
            self._note(str(error) if ours else f"unreadable: {type(error).__name__}")

    def _note(self, note: str) -> None:
        if len(self._notes) < _MAX_NOTES:
            self._notes.append(f"response: {note}")
