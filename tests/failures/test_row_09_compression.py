"""Row 9 of failures.md: compressed bodies go through as sent, and are read all the same.

Truth: the row's matrix; design.md 4 (compressed bodies go through as sent; the observer decodes a copy, with a bound);
wire.md E and clients.md 2 (Codex sends zstd requests; who advertises which coding). The coders are the reference
libraries', used here to encode; every body that the client gets is compared as it was encoded.
"""

import gzip
import json
import sys
import zlib
from collections.abc import Callable, Sequence
from typing import Final, Protocol

import brotli
import pytest

from tests.support.gateway import Scene
from tests.support.provider import Gate, Reply, Step, Wait
from tests.support.recording import Recording
from tests.support.streams import events, target
from tests.support.traffic import named

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd


class Encoder(Protocol):
    def piece(self, data: bytes) -> bytes:
        """Bytes that decode to all the data so far, so that nobody has to wait for the next piece."""

    def end(self) -> bytes: ...


class Gzip:
    def __init__(self, wbits: int = zlib.MAX_WBITS | 16) -> None:
        self._inner = zlib.compressobj(wbits=wbits)

    def piece(self, data: bytes) -> bytes:
        return self._inner.compress(data) + self._inner.flush(zlib.Z_SYNC_FLUSH)

    def end(self) -> bytes:
        return self._inner.flush()


class Deflate(Gzip):
    def __init__(self) -> None:
        super().__init__(zlib.MAX_WBITS)


class Brotli:
    def __init__(self) -> None:
        self._inner = brotli.Compressor()

    def piece(self, data: bytes) -> bytes:
        return bytes(self._inner.process(data) + self._inner.flush())

    def end(self) -> bytes:
        return bytes(self._inner.finish())


class Zstd:
    def __init__(self) -> None:
        self._inner = zstd.ZstdCompressor()

    def piece(self, data: bytes) -> bytes:
        return self._inner.compress(data, mode=zstd.ZstdCompressor.FLUSH_BLOCK)

    def end(self) -> bytes:
        return self._inner.flush()


class Identity:
    def piece(self, data: bytes) -> bytes:
        return data

    def end(self) -> bytes:
        return b""


CODERS: Final[dict[str, Callable[[], Encoder]]] = {
    "identity": Identity,
    "gzip": Gzip,
    "deflate": Deflate,
    "br": Brotli,
    "zstd": Zstd,
}
STREAMS = ["messages-parallel-tools-stream", "chat-text-stream", "responses-agentic-stream"]
BLOCKING = ["messages-tools-blocking", "chat-tools-blocking", "responses-agentic-blocking"]
ERRORS = ["messages-error-400", "chat-error-400", "responses-error-400"]

ACCEPT: Final = "gzip, deflate, br, zstd"


def encode(coding: str, data: bytes) -> bytes:
    coder = CODERS[coding]()
    return coder.piece(data) + coder.end()


def coded(recording: Recording, coding: str, steps: Sequence[Step], framing: str) -> Reply:
    headers = [("Content-Type", recording.content_type), ("Content-Encoding", coding), ("Vary", "Accept-Encoding")]
    return Reply(recording.status, headers, steps, "chunked" if framing == "chunked" else "length")


def check_recorded(recording: Recording, scene: Scene) -> None:
    rows = scene.ledger()
    assert rows.interception["status"] == recording.expect.status
    assert rows.interception["http_status"] == recording.status
    assert "notes" not in rows.interception["metadata"]
    recorded = [
        {name: row[name] for name in expected}
        for row, expected in zip(rows.token_usages, recording.expect.usage, strict=True)
    ]
    assert recorded == list(recording.expect.usage)
    assert all("notes" not in row["metadata"] for row in rows.token_usages)
    assert [row["input"] for row in rows.tool_usages] == [call["input"] for call in recording.expect.tool_calls]


@pytest.mark.parametrize("coding", CODERS)
@pytest.mark.parametrize("name", STREAMS)
async def test_streams(name: str, coding: str, scene: Scene) -> None:
    """Each event is its own piece of the coded stream, and arrives before the next is sent."""
    recording = named(name)
    coder = CODERS[coding]()
    pieces = [coder.piece(event) for event in events(recording.response)]
    gates = [Gate() for _ in pieces]
    steps: list[Step] = []
    for piece, gate in zip(pieces, gates, strict=True):
        steps += [piece, Wait(gate)]
    end = coder.end()
    scene.reply(coded(recording, coding, [*steps, end], "chunked"))
    async with scene.client() as client:
        headers = scene.lines(("Accept-Encoding", ACCEPT))
        await client.send("POST", target(recording), headers, recording.request)
        head = await client.head()
        assert head.get("content-encoding") == coding
        for piece, gate in zip(pieces, gates, strict=True):
            assert await client.exactly(len(piece)) == piece
            gate.set()
        assert await client.rest() == (end, True)
    assert scene.requests[0].header("accept-encoding") == [ACCEPT]
    check_recorded(recording, scene)


@pytest.mark.parametrize("framing", ["length", "chunked"])
@pytest.mark.parametrize("coding", CODERS)
@pytest.mark.parametrize("name", [*BLOCKING, *ERRORS])
async def test_bodies(name: str, coding: str, framing: str, scene: Scene) -> None:
    """Status 200 and 400: an error is not decoded either, and the ledger has its words."""
    recording = named(name)
    body = encode(coding, recording.response)
    third = len(body) // 3
    scene.reply(coded(recording, coding, [body[:third], body[third : 2 * third], body[2 * third :]], framing))
    answer = await scene.post(target(recording), recording.request, [("Accept-Encoding", ACCEPT)])
    assert answer.head.status == recording.status
    assert answer.head.get("content-encoding") == coding
    assert answer.head.get("content-length") == (str(len(body)) if framing == "length" else None)
    assert (answer.body, answer.complete) == (body, True)
    check_recorded(recording, scene)
    if recording.status == 400:
        said = json.loads(recording.response)["error"]
        assert said["message"] in scene.ledger().interception["error"]


@pytest.mark.parametrize("coding", ["gzip", "br", "zstd", "deflate"])
@pytest.mark.parametrize("name", [STREAMS[0], BLOCKING[1], STREAMS[2]])
async def test_compressed_requests_are_read_and_forwarded_as_sent(name: str, coding: str, scene: Scene) -> None:
    recording = named(name)
    body = encode(coding, recording.request)
    scene.reply(recording.reply())
    answer = await scene.post(target(recording), body, [("Content-Encoding", coding)])
    assert answer.body == recording.response
    (received,) = scene.requests
    assert received.body == body
    assert received.header("content-encoding") == [coding]
    rows = scene.ledger()
    assert rows.interception["model"] == recording.expect.model
    assert rows.interception["streaming"] == recording.expect.stream
    assert [row["prompt"] for row in rows.user_prompts] == [recording.expect.prompt]
    check_recorded(recording, scene)


async def test_a_compressed_chat_stream_keeps_what_its_client_asked_for(scene: Scene) -> None:
    """A compressed request is not edited, so its stream reports no usage, and none is taken out."""
    recording = named("chat-usage-not-asked-stream")
    body = encode("zstd", recording.request)
    scene.reply(recording.reply())
    answer = await scene.post(target(recording), body, [("Content-Encoding", "zstd")])
    assert answer.body == recording.response
    assert scene.requests[0].body == body
    assert scene.ledger().token_usage["completeness"] == "unknown"


@pytest.mark.parametrize("coding", CODERS)
async def test_a_stream_that_must_be_edited_is_not_asked_for_compressed(coding: str, scene: Scene) -> None:
    """The one that hides its usage. A provider that compresses it nevertheless is decoded, and the header goes with it."""
    recording = named("chat-text-stream")
    request = recording.request.replace(b'"stream_options" :{"include_usage": true},', b"")
    scene.reply(coded(recording, coding, [encode(coding, recording.response)], "chunked"))
    answer = await scene.post(target(recording), request, [("Accept-Encoding", ACCEPT)])
    assert scene.requests[0].header("accept-encoding") == ["identity"]
    assert answer.complete
    assert answer.head.get("content-encoding") in (None, "identity")
    assert b'"usage"' not in answer.body
    assert answer.body.endswith(b"data: [DONE]\n\n")
    assert scene.ledger().token_usage["output_tokens"] == 10


@pytest.mark.parametrize("coding", ["compress", "x-of-tomorrow", "gzip, br"])
@pytest.mark.parametrize("name", [STREAMS[0], BLOCKING[0]])
async def test_what_cannot_be_decoded_passes(name: str, coding: str, scene: Scene) -> None:
    """It is no failure that we cannot read it: nothing is invented, and a note says why nothing is known."""
    recording = named(name)
    body = b"\x1f\x9d" + bytes(range(256))
    scene.reply(coded(recording, coding, [body[:50], body[50:]], "length"))
    answer = await scene.post(target(recording), recording.request)
    assert (answer.body, answer.complete) == (body, True)
    assert answer.head.get("content-encoding") == coding
    rows = scene.ledger()
    assert rows.interception["status"] == "completed"
    assert rows.token_usage["completeness"] == "unknown"
    assert rows.token_usage["metadata"]["notes"]


@pytest.mark.parametrize("coding", ["gzip", "br", "zstd"])
async def test_a_corrupt_body_passes(coding: str, scene: Scene) -> None:
    recording = named(BLOCKING[0])
    body = encode(coding, recording.response)
    body = body[: len(body) // 2] + b"\xff" * 40 + body[len(body) // 2 :]
    scene.reply(coded(recording, coding, [body], "length"))
    answer = await scene.post(target(recording), recording.request)
    assert (answer.body, answer.complete) == (body, True)
    rows = scene.ledger()
    assert rows.interception["status"] == "completed"
    assert rows.token_usage["metadata"]["notes"]


@pytest.mark.parametrize("coding", ["gzip", "br", "zstd"])
async def test_a_corrupt_request_is_the_providers_to_judge(coding: str, scene: Scene) -> None:
    recording = named("messages-error-400")
    scene.reply(recording.reply())
    answer = await scene.post(target(recording), b"\xff" * 40, [("Content-Encoding", coding)])
    assert (answer.head.status, answer.body) == (400, recording.response)
    assert scene.requests[0].body == b"\xff" * 40
    assert scene.ledger().interception["metadata"]["notes"]


# --- bombs ------------------------------------------------------------------------------------------------------------

BOMB_BYTES: Final = 3 << 30
MEMORY_BYTES: Final = 1 << 30


def bomb(coding: str, beginning: bytes) -> bytes:
    """Three gigabytes of spaces after the beginning, in a few kilobytes or megabytes."""
    piece = b" " * (1 << 24)
    if coding == "gzip":  # members in a row are one body (RFC 1952 2.2): no need to compress them one by one
        return gzip.compress(beginning, mtime=0) + gzip.compress(piece, mtime=0) * (BOMB_BYTES // len(piece))
    if coding == "zstd":  # and so are frames (RFC 8878 3.1)
        return zstd.compress(beginning) + zstd.compress(piece) * (BOMB_BYTES // len(piece))
    coder = brotli.Compressor(quality=1, lgwin=24)
    pieces = [coder.process(beginning), *(coder.process(piece) for _ in range(BOMB_BYTES // 8 // len(piece)))]
    return b"".join([*pieces, coder.finish()])


@pytest.mark.parametrize("coding", ["gzip", "br", "zstd"])
@pytest.mark.parametrize("name", [STREAMS[0], BLOCKING[0]])
async def test_a_bomb_in_a_response_is_bounded(name: str, coding: str, scene: Scene) -> None:
    """It passes, for the client to cope with; here neither memory nor the ledger suffers."""
    recording = named(name)
    body = bomb(coding, b": " if recording.streams else b'{"id":"msg_bomb","x":"')
    scene.reply(coded(recording, coding, [body], "length"))
    answer = await scene.post(target(recording), recording.request)
    assert (answer.body, answer.complete) == (body, True)
    rows = scene.ledger()
    assert rows.token_usage["input_tokens"] is None
    assert rows.token_usage["metadata"]["notes"]
    assert scene.gateway.memory() < MEMORY_BYTES


@pytest.mark.parametrize("coding", ["gzip", "br", "zstd"])
async def test_a_bomb_in_a_request_is_bounded(coding: str, scene: Scene) -> None:
    recording = named("messages-error-400")
    body = bomb(coding, b'{"model":"m","x":"')
    scene.reply(recording.reply())
    answer = await scene.post(target(recording), body, [("Content-Encoding", coding)])
    assert answer.head.status == 400
    assert scene.requests[0].body == body
    assert scene.ledger().interception["metadata"]["notes"]
    assert scene.gateway.memory() < MEMORY_BYTES
