"""Traffic dumps, read as somebody else's program would read them: with warcio, a library for web archives."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from warcio.archiveiterator import ArchiveIterator

from .provider import WAIT_SECONDS

_POLL_SECONDS: Final = 0.02


@dataclass(frozen=True, slots=True)
class Message:
    """An HTTP message of a dump: `start` is its first line, `fields` are its header fields."""

    start: bytes
    fields: list[tuple[bytes, bytes]]
    body: bytes
    record: Mapping[str, str]
    """The fields of the record that it is in."""

    @property
    def truncated(self) -> str | None:
        return self.record.get("WARC-Truncated")


@dataclass(frozen=True, slots=True)
class Dumped:
    """One dump. `facts` is how the call ended; empty for a call under way."""

    path: Path
    request: Message
    response: Message | None
    facts: Mapping[str, str]


def dumped(path: Path) -> Dumped:
    messages: dict[str, Message] = {}
    facts: dict[str, str] = {}
    with path.open("rb") as file:
        for record in ArchiveIterator(file, no_record_parse=True):
            block = record.raw_stream.read()
            assert len(block) == int(record.rec_headers.get_header("Content-Length")), "the length is that of the block"
            if record.rec_type == "metadata":
                facts = dict(line.split(": ", 1) for line in block.decode().splitlines())
            else:
                messages[record.rec_type] = _message(block, dict(record.rec_headers.headers))
    return Dumped(path, messages["request"], messages.get("response"), facts)


def _message(block: bytes, record: Mapping[str, str]) -> Message:
    head, _, body = block.partition(b"\r\n\r\n")
    start, *lines = head.split(b"\r\n")
    fields = [(name, value) for name, _, value in (line.partition(b": ") for line in lines)]
    return Message(start, fields, body, record)


def dumps_in(directory: Path) -> list[Path]:
    """The dumps in a directory, the oldest first."""
    return sorted(directory.glob("*.warc")) if directory.exists() else []


def finished(directory: Path, count: int) -> list[Dumped]:
    """That many dumps of calls that are over, as soon as the thread of another process, or of ours, has written them."""
    end = time.monotonic() + WAIT_SECONDS
    while time.monotonic() < end:
        found = dumps_in(directory)
        if len(found) >= count and all(b"\r\nWARC-Type: metadata\r\n" in path.read_bytes() for path in found):
            read = [dumped(path) for path in found]
            assert len(read) == count
            if all(one.facts for one in read):
                return read
        time.sleep(_POLL_SECONDS)
    raise TimeoutError(f"{count} dumps are not written")
