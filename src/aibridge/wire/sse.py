"""Server-sent events, incrementally, on bytes.

The grammar is the WHATWG one (HTML Living Standard, 9.2.6 "Interpreting an event stream"): lines end in LF, CR or CRLF,
one byte order mark may lead, a line without a colon is a field without a value, one space after the colon is dropped,
``data`` lines are joined with LF, a blank line dispatches, a block without ``data`` is dispatched to nobody. Lines are
split on bytes: `str.splitlines` also breaks on U+2028, U+0085 and form feed, which JSON text may hold (wire.md E).

Nothing is lost: the `raw` of all frames, put together with `SseDecoder.rest`, is the input. That is what lets a stream be
edited by leaving out or replacing a frame and passing every other byte through.

Most of a stream is frames of one form, written by one program: they are recognised whole, by a regular expression, and only
the rest line by line. A *run* of frames that its reader need not see one by one is a single step, however long it is: that
is what makes a burst of events cheap.
"""

import re
from typing import Final

import msgspec

MAX_EVENT_BYTES: Final = 32 * 1024 * 1024
"""As large as a request body may be: one event can carry an image or a whole final response (wire.md C3)."""

_BOM: Final = b"\xef\xbb\xbf"

# Line ends between the tokens of a JSON text would end the `data` line.
ON_ONE_LINE: Final = bytes.maketrans(b"\r\n", b"  ")


# A block as programs write it, in a text without CR.
_USUAL: Final = re.compile(rb"(?:event: ?(.*+)\n)?+data: ?(.*+)\n\n")


class Frame(msgspec.Struct, frozen=True, gc=False):
    """One block of the stream, up to and including its blank line; a comment line between blocks is a frame of its own.

    `data` is None where there is nothing to dispatch: comments, blocks without ``data``, blocks over the size bound.
    `run`: it is not one block but a run of them, which nobody wanted to see one by one.
    """

    raw: bytes
    event: bytes = b""
    data: bytes | None = None
    oversized: bool = False
    run: bool = False

    def with_data(self, data: bytes) -> bytes:
        """The frame's bytes with other data. Data of several lines is put on one."""
        assert self.data is not None  # noqa: S101  there is nothing to replace in a comment
        one_line = data.translate(ON_ONE_LINE)
        if self.data in self.raw:
            return self.raw.replace(self.data, one_line)
        return (b"event: " + self.event + b"\n" if self.event else b"") + b"data: " + one_line + b"\n\n"


class SseDecoder:
    """Feed it chunks, get the frames that they completed. Never raises.

    `run` matches one or several whole blocks, up to and including the blank line, that need not be told apart.
    """

    def __init__(self, max_event_bytes: int = MAX_EVENT_BYTES, *, run: re.Pattern[bytes] | None = None) -> None:
        self.at_boundary = True
        """A new event can be written here without becoming part of an unfinished one."""
        self._limit = max_event_bytes
        self._match_run = None if run is None else run.match
        self._raw: list[bytes] = []  # lines of the frame under way, as they came
        self._line: list[bytes] = []  # pieces of the line under way
        self._size = 0  # bytes in both
        self._data: list[bytes] = []
        self._event = b""
        self._fields = False  # the frame under way has a line that is not a comment
        self._oversized = False
        self._mid_line = False  # the beginning of the line under way was let go of
        self._start = True
        self._after_cr = False

    @property
    def rest(self) -> bytes:
        """The bytes of the frame that is not complete yet."""
        return b"".join(self._raw) + b"".join(self._line)

    @property
    def oversized(self) -> bool:
        """The frame under way is over the size bound."""
        return self._oversized

    @property
    def pending(self) -> bytes | None:
        """The data of the frame under way as far as its lines are complete. Clients that read by line act on those."""
        return b"\n".join(self._data) if self._data and not self._oversized else None

    def feed(self, chunk: bytes) -> list[Frame]:
        """The frames that this chunk completes, in order."""
        frames: list[Frame] = []
        if b"\r" in chunk or len(chunk) > self._limit:
            self._split(chunk, frames)
            return frames
        start, end = 0, len(chunk)
        while start < end:
            if self.at_boundary and not self._start:  # a byte order mark may lead
                if self._match_run is not None and (run := self._match_run(chunk, start)) is not None:
                    frames.append(Frame(run.group(), run=True))
                    start = run.end()
                    continue
                if (block := _USUAL.match(chunk, start)) is not None:
                    frames.append(Frame(block.group(), block[1] or b"", block[2]))
                    start = block.end()
                    continue
            stop = chunk.find(b"\n\n", start) + 2
            if stop < 2:  # no other frame ends in this chunk
                stop = end
            self._split(chunk[start:stop], frames)
            start = stop
        return frames

    def _split(self, chunk: bytes, frames: list[Frame]) -> None:
        for line in chunk.splitlines(keepends=True):
            if self._after_cr:
                self._after_cr = False
                if line == b"\n":  # the second half of a CRLF that two chunks share
                    self._raw.append(line)
                    if len(self._raw) == 1:  # of which the first half has ended a frame
                        frames.append(Frame(self._flush()))
                    continue
            self._size += len(line)
            if line[-1:] in (b"\n", b"\r"):
                if self._line:
                    self._line.append(line)
                    line = b"".join(self._line)  # noqa: PLW2901  the whole line from here on
                    self._line.clear()
                self._after_cr = line.endswith(b"\r")
                self._take(line, frames)
            else:
                self._line.append(line)
            if self._size > self._limit:
                self._overflow(frames)
        self.at_boundary = not (self._fields or self._line or self._mid_line)

    def _take(self, line: bytes, frames: list[Frame]) -> None:
        self._raw.append(line)
        content = line.rstrip(b"\r\n")
        if self._start:
            self._start = False
            content = content.removeprefix(_BOM)
        if self._mid_line:
            self._mid_line = False
        elif not content:
            self._dispatch(frames)
        elif content[0] == 0x3A:  # a colon first: a comment
            if not self._fields:
                frames.append(Frame(self._flush()))
        else:
            self._fields = True
            name, _, value = content.partition(b":")
            if name == b"data":
                self._data.append(value.removeprefix(b" "))
            elif name == b"event":
                self._event = value.removeprefix(b" ")

    def _dispatch(self, frames: list[Frame]) -> None:
        data = b"\n".join(self._data) if self._data and not self._oversized else None
        frames.append(Frame(self._flush(), self._event, data, self._oversized))
        self._data.clear()
        self._event = b""
        self._fields = self._oversized = False

    def _overflow(self, frames: list[Frame]) -> None:
        """Let go of an event that is over the bound: its bytes pass, it will be reported without data."""
        self._oversized = self._fields = True
        self._mid_line = self._mid_line or bool(self._line)
        self._data.clear()
        frames.append(Frame(self.rest))
        self._raw.clear()
        self._line.clear()
        self._size = 0

    def _flush(self) -> bytes:
        raw = b"".join(self._raw)
        self._raw.clear()
        self._size = 0
        return raw
