"""Calls that are dumped, and their dumps, read as somebody else's program would: with warcio, a library for web archives."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from warcio.archiveiterator import ArchiveIterator

from aibridge.dumps import TrafficDumps
from aibridge.errors import UpstreamError
from aibridge.providers import Provider
from aibridge.upstream import Body, MemoryResponse, MemoryUpstream, Upstream, UpstreamRequest, UpstreamResponse
from aibridge.wire.observer import ResponseHead

from .provider import WAIT_SECONDS

KEY: Final = "sk-ant-api03-secret-0123456789"
HIDDEN: Final = b"*" * len(KEY)
PROVIDER: Final = Provider("anthropic", "anthropic", "http://provider.test/base", dump=True)

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


# ---- calls ----


def request(
    body: Body = b'{"model":"m"}', *headers: tuple[bytes, bytes], url: str = "/v1/messages", id: str = ""
) -> UpstreamRequest:
    fields = [(b"content-type", b"application/json"), *headers, (b"x-api-key", KEY.encode())]
    return UpstreamRequest("POST", PROVIDER.base_url + url, fields, body, secrets=(KEY,), call_id=id)


def answering(
    *pieces: bytes | UpstreamError, status: int = 200, headers: Sequence[tuple[bytes, bytes]] = ()
) -> MemoryUpstream:
    return MemoryUpstream(lambda _: MemoryResponse(ResponseHead(status, headers), pieces))


async def call(upstream: Upstream, sent: UpstreamRequest) -> bytes:
    """One call, read to its end."""
    response = await upstream.send(sent)
    try:
        return b"".join([piece async for piece in reading(response)])
    finally:
        response.close()


async def reading(response: UpstreamResponse) -> AsyncIterator[bytes]:
    while piece := await response.read():
        yield piece


async def pieces(*given: bytes) -> AsyncIterator[bytes]:
    for piece in given:
        yield piece


async def dump_of(folder: Path, upstream: Upstream, sent: UpstreamRequest, **bounds: int) -> Dumped:
    """The dump of one call, whatever comes of it."""
    async with TrafficDumps(folder, **bounds) as dumps:
        with suppress(UpstreamError):
            await call(dumps.upstream(PROVIDER, upstream), sent)
    (found,) = dumps_in(folder)
    return dumped(found)


class Uploading(MemoryUpstream):
    """Takes the whole body before it answers."""

    async def send(self, request: UpstreamRequest) -> UpstreamResponse:
        if not isinstance(request.body, bytes):
            async for _ in request.body:
                pass
        return await super().send(request)


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what the thread does."""
    async with asyncio.timeout(WAIT_SECONDS):
        while not condition():  # a thread's files set no event
            await asyncio.sleep(0.01)
