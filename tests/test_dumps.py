"""Traffic dumps: what is in them, what is not, and that making them harms nothing.

Truth: issue 5 for what dumps are; WARC 1.1 for their format, read by warcio, which is not ours; RFC 9112 for the messages;
for the rest our choice (docs/operations.md). That what is wrapped is a port all the same, `tests/test_upstream.py` shows.
"""

import asyncio
import gzip
import logging
import os
import threading
import time
import zlib
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import brotli
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from warcio.archiveiterator import ArchiveIterator

from aibridge import dumps as dumps_module
from aibridge.dumpfolder import DumpFolder
from aibridge.dumps import TrafficDumps
from aibridge.errors import UpstreamError
from aibridge.httpclient import HttpUpstream
from aibridge.providers import Provider
from aibridge.upstream import Body, MemoryResponse, MemoryUpstream, Upstream, UpstreamRequest, UpstreamResponse
from aibridge.wire.coding import zstd
from aibridge.wire.observer import ResponseHead
from tests.support.dumps import Dumped, dumped, dumps_in, finished
from tests.support.provider import CUT, STALL, WAIT_SECONDS, Gate, Reply, ScriptedProvider

KEY = "sk-ant-api03-secret-0123456789"
HIDDEN = b"*" * len(KEY)
PROVIDER = Provider("anthropic", "anthropic", "http://provider.test/base", dump=True)

CODERS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    "identity": bytes,
    "gzip": gzip.compress,
    "deflate": zlib.compress,
    "br": brotli.compress,
    "zstd": zstd.compress,
    "gzip, br": lambda data: brotli.compress(gzip.compress(data)),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "dumps"


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


# ---- what is in a dump ----


async def test_a_call(folder: Path) -> None:
    upstream = answering(b"data: 1\n\n", b"data: 2\n\n", headers=[(b"content-type", b"text/event-stream"), (b"x-b", b"2")])
    dump = await dump_of(folder, upstream, request(id="0192-1-1"))
    assert dump.request.start == b"POST /base/v1/messages HTTP/1.1"
    assert dump.request.fields == [
        (b"Host", b"provider.test"),
        (b"content-type", b"application/json"),
        (b"x-api-key", HIDDEN),
        (b"content-length", b"13"),
    ]
    assert dump.request.body == b'{"model":"m"}'
    assert dump.response is not None
    assert dump.response.start == b"HTTP/1.1 200 "  # RFC 9112 section 4: the space stands there without a reason, too
    assert dump.response.fields == [(b"content-type", b"text/event-stream"), (b"x-b", b"2")]
    assert dump.response.body == b"data: 1\n\ndata: 2\n\n"
    assert dump.request.truncated is dump.response.truncated is None
    assert dump.facts == {"outcome": "complete", "request-bytes": "13", "response-bytes": "18"}
    record = dump.request.record
    assert record["Aibridge-Provider"] == "anthropic" and record["Aibridge-Call"] == "0192-1-1"
    assert record["Aibridge-Masked"] == "x-api-key"
    assert record["WARC-Target-URI"] == "http://provider.test/base/v1/messages"
    assert dump.response.record["WARC-Concurrent-To"] == record["WARC-Record-ID"]
    assert dump.response.record["WARC-Date"] >= record["WARC-Date"]


async def test_the_name_of_a_dump_sorts_by_time_and_has_the_call_in_it(folder: Path) -> None:
    async with TrafficDumps(folder) as dumps:
        upstream = dumps.upstream(PROVIDER, answering())
        for name in ("b-1-1", "a-1-1", "../../x y", ""):
            await call(upstream, request(id=name))
    names = [path.name for path in dumps_in(folder)]
    assert ["Z-anthropic-" + name.partition("Z-anthropic-")[2] for name in names][:3] == [
        "Z-anthropic-b-1-1.warc",
        "Z-anthropic-a-1-1.warc",
        "Z-anthropic-.._.._x_y.warc",
    ]
    assert len(names) == len(list(folder.iterdir())) == 4, "a call without an id gets one"


async def test_another_library_reads_it(folder: Path) -> None:
    """Messages, too: what a program has to know of the format stands in the standard."""
    headers = [(b"content-type", b"application/json"), (b"transfer-encoding", b"chunked")]
    dump = await dump_of(folder, answering(b'{"a":', b"1}", headers=headers), request())
    with dump.path.open("rb") as file:
        kinds = []
        for record in ArchiveIterator(file):
            kinds.append((record.rec_type, record.content_stream().read()))
            if record.rec_type == "response":
                assert record.http_headers.get_statuscode() == "200"
                assert record.http_headers.get_header("Content-Type") == "application/json"
    assert [kind for kind, _ in kinds] == ["request", "response", "metadata"]
    assert kinds[0][1] == b'{"model":"m"}' and kinds[1][1] == b'{"a":1}'


SENT: dict[str, Callable[[str], UpstreamRequest]] = {
    "bytes": lambda url: UpstreamRequest("POST", url + "/v1/messages?beta=true", [(b"x-a", b"1"), (b"x-a", b"\xe9")], b"{}"),
    "empty": lambda url: UpstreamRequest("POST", url + "/v1/x", []),
    "get": lambda url: UpstreamRequest("GET", url + "/v1/models?a=%zz\xc3\xa9", [(b"accept", b"*/*")]),
    "large": lambda url: UpstreamRequest("POST", url, [(b"x-empty", b"")], bytes(range(256)) * 8000 + b"end"),
    "length": lambda url: UpstreamRequest("PUT", url + "/v1", [(b"content-length", b"6")], pieces(b"one", b"two")),
    "chunked": lambda url: UpstreamRequest("POST", url + "/v1", [(b"x-a", b"1")], pieces(b"one", b"", b"two")),
}


@pytest.mark.parametrize("kind", SENT)
async def test_a_request_stands_there_as_it_went_out(folder: Path, kind: str) -> None:
    received = bytearray()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while not (b"\r\n\r\n" in received and received.endswith(ends[kind])):
            received.extend(await reader.read(65536))
        writer.write(b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n")
        await writer.drain()
        writer.close()

    ends = {"bytes": b"{}", "empty": b"", "get": b"", "large": b"end", "length": b"onetwo", "chunked": b"0\r\n\r\n"}
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        client = HttpUpstream()
        dump = await dump_of(folder, client, SENT[kind](f"http://127.0.0.1:{port}"))
        await client.aclose()
    head, _, body = bytes(received).partition(b"\r\n\r\n")
    start, *fields = head.split(b"\r\n")
    assert dump.request.start == start
    assert [b"%b: %b" % field for field in dump.request.fields] == fields
    assert dump.request.body == (b"onetwo" if kind == "chunked" else body), "a transfer coding is taken off"


async def test_a_request_that_cannot_be_sent_leaves_no_dump(folder: Path) -> None:
    async with TrafficDumps(folder) as dumps:
        upstream = dumps.upstream(PROVIDER, HttpUpstream())
        for sent in (request(b"", (b"x", b"a\r\nb: c")), request(url=" \n"), UpstreamRequest("GET", "ftp://h/", [])):
            with pytest.raises(UpstreamError):
                await upstream.send(sent)
        await upstream.aclose()
    assert list(folder.iterdir()) == []


# ---- how a call ended ----


@pytest.fixture
async def provider() -> AsyncIterator[ScriptedProvider]:
    async with ScriptedProvider() as provider:
        yield provider


async def test_a_response_that_breaks_off(folder: Path, provider: ScriptedProvider) -> None:
    provider.reply(Reply.stream([b"data: 1\n\n", CUT]))
    client = HttpUpstream()
    dump = await dump_of(folder, client, UpstreamRequest("POST", provider.url, [], b"{}"))
    await client.aclose()
    assert dump.response is not None and dump.response.body == b"data: 1\n\n" and dump.response.truncated == "disconnect"
    assert dump.facts["outcome"] == "broken off" and "closed the connection" in dump.facts["error"]


async def test_no_response(folder: Path) -> None:
    def refuse(_: UpstreamRequest) -> UpstreamResponse:
        raise UpstreamError(f"it was\nrefused to {KEY}")

    dump = await dump_of(folder, MemoryUpstream(refuse), request())
    assert dump.response is None and dump.request.body == b'{"model":"m"}' and dump.request.truncated is None
    assert dump.facts["outcome"] == "no response" and dump.facts["error"] == f"it was refused to {HIDDEN.decode()}"


async def test_an_upload_that_breaks_off(folder: Path) -> None:
    class Consuming(MemoryUpstream):
        async def send(self, request: UpstreamRequest) -> UpstreamResponse:
            assert not isinstance(request.body, bytes)
            async for _ in request.body:
                raise UpstreamError("the client has gone")
            raise AssertionError

    dump = await dump_of(folder, Consuming(lambda _: MemoryResponse(ResponseHead(200, []))), request(pieces(b"one", b"two")))
    assert dump.request.body == b"one" and dump.request.truncated == "unspecified"
    assert dump.facts["outcome"] == "no response" and dump.facts["request-bytes"] == "3"


async def test_an_answer_before_the_request_was_all_sent(folder: Path) -> None:
    """What is sent after it is none of the response."""
    first, more = Gate(), Gate()

    class Early(MemoryUpstream):
        async def send(self, request: UpstreamRequest) -> UpstreamResponse:
            body = request.body
            assert not isinstance(body, bytes)

            async def upload() -> None:
                async for _ in body:
                    first.set()
                    await more.wait()

            self.upload = asyncio.create_task(upload())
            await first.wait()
            return MemoryResponse(ResponseHead(401, []), [b"no", b"!"])

    upstream = Early(lambda _: MemoryResponse(ResponseHead(200, [])))
    async with TrafficDumps(folder) as dumps:
        response = await dumps.upstream(PROVIDER, upstream).send(request(pieces(b"one", b"two")))
        assert await response.read() == b"no"
        more.set()
        await upstream.upload
        assert [piece async for piece in reading(response)] == [b"!"]
    (dump,) = finished(folder, 1)
    assert dump.request.body == b"one" and dump.request.truncated == "unspecified"
    assert dump.response is not None and dump.response.body == b"no!" and dump.response.truncated is None
    assert dump.facts == {"outcome": "complete", "request-bytes": "6", "response-bytes": "3"}


async def test_a_response_that_is_let_go(folder: Path) -> None:
    async with TrafficDumps(folder) as dumps:
        response = await dumps.upstream(PROVIDER, answering(b"one", b"two")).send(request())
        assert await response.read() == b"one"
        response.close()
        response.close()
    (dump,) = finished(folder, 1)
    assert dump.response is not None and dump.response.body == b"one" and dump.response.truncated == "unspecified"
    assert dump.facts["outcome"] == "let go"


@pytest.mark.parametrize(("status", "length", "body"), [(204, None, b""), (200, b"0", b""), (200, b"3", b"one")])
async def test_a_response_that_nobody_needs_to_read_further_is_complete(
    folder: Path, status: int, length: bytes | None, body: bytes
) -> None:
    headers = [] if length is None else [(b"content-length", length)]
    async with TrafficDumps(folder) as dumps:
        response = await dumps.upstream(PROVIDER, answering(*filter(None, [body]), status=status, headers=headers)).send(
            request()
        )
        if body:
            await response.read()
        response.close()
    (dump,) = finished(folder, 1)
    assert dump.facts["outcome"] == "complete" and dump.response is not None and dump.response.truncated is None


async def test_a_call_that_is_cancelled(folder: Path, provider: ScriptedProvider) -> None:
    provider.reply(Reply(before=[STALL]))
    client = HttpUpstream()
    async with TrafficDumps(folder) as dumps:
        sending = asyncio.create_task(
            dumps.upstream(PROVIDER, client).send(UpstreamRequest("POST", provider.url, [], b"{}"))
        )
        await provider.exchange()
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending
    await client.aclose()
    (dump,) = finished(folder, 1)
    assert dump.facts["outcome"] == "let go" and dump.response is None


async def test_what_flows_is_dumped_too(folder: Path) -> None:
    async with TrafficDumps(folder) as dumps:
        upstream = dumps.upstream(PROVIDER, answering(b"one", b"two", b"three"))
        response = await upstream.send(request())
        taken: list[bytes] = []

        def take(piece: bytes) -> bool:
            taken.append(piece)
            return piece == b"two"

        assert not await response.flow(take)
        assert await response.flow(take)
    (dump,) = finished(folder, 1)
    assert dump.response is not None and dump.response.body == b"onetwothree" and dump.facts["outcome"] == "complete"


async def test_a_call_under_way_can_be_looked_at(folder: Path) -> None:
    """What an operator wants to see of a stream that hangs."""
    async with TrafficDumps(folder) as dumps:
        response = await dumps.upstream(PROVIDER, answering(b"x" * 10_000, b"y" * 10_000)).send(request())
        await response.read()
        await until(lambda: any(b"x" * 9_000 in path.read_bytes() for path in dumps_in(folder)))
        (path,) = dumps_in(folder)
        assert b'{"model":"m"}' in path.read_bytes() and b"outcome" not in path.read_bytes()
        response.close()


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what the thread does."""
    async with asyncio.timeout(WAIT_SECONDS):
        while not condition():  # a thread's files set no event
            await asyncio.sleep(0.01)


# ---- secrets ----


@pytest.mark.parametrize("coding", CODERS)
async def test_a_provider_that_quotes_the_key(folder: Path, coding: str) -> None:
    said = b'{"error":"key ' + KEY.encode() + b' is invalid"}'
    coded = CODERS[coding](said)
    headers = [(b"content-encoding", coding.encode())] if coding else []
    cookie = (b"set-cookie", b"__cf_bm=abcdef")
    dump = await dump_of(folder, answering(coded[:5], coded[5:], status=401, headers=[*headers, cookie]), request())
    assert dump.response is not None
    assert dump.response.body == said.replace(KEY.encode(), HIDDEN)
    assert dump.response.fields == [*headers, (b"set-cookie", b"**************")]
    decoded = coding not in ("", "identity")
    assert dump.response.record["Aibridge-Body"] == ("decoded, masked" if decoded else "masked")
    assert dump.facts["response-bytes"] == str(len(coded))
    assert KEY.encode() not in dump.path.read_bytes()


@pytest.mark.parametrize("coding", CODERS)
async def test_a_coded_body_without_a_secret_stays_as_it_came(folder: Path, coding: str) -> None:
    coded = CODERS[coding](b"nothing to hide" * 100)
    headers = [(b"content-encoding", coding.encode())]
    dump = await dump_of(folder, answering(coded[:9], coded[9:], headers=headers), request(coded, *headers))
    assert dump.response is not None and dump.response.body == coded and dump.request.body == coded
    assert "Aibridge-Body" not in dump.response.record


async def test_a_coded_request_with_a_secret(folder: Path) -> None:
    """Codex compresses what it sends (wire.md); a prompt may have a key in it."""
    coded = zstd.compress(b"my key is " + KEY.encode())
    dump = await dump_of(folder, answering(), request(coded, (b"content-encoding", b"zstd")))
    assert dump.request.body == b"my key is " + HIDDEN and dump.request.record["Aibridge-Body"] == "decoded, masked"


async def test_a_body_in_an_unknown_coding_is_left_out(folder: Path) -> None:
    dump = await dump_of(folder, answering(b"anything", headers=[(b"content-encoding", b"rot13")]), request())
    assert dump.response is not None and dump.response.body == b"" and dump.response.truncated == "unspecified"
    assert dump.facts["unreadable-bytes-left-out"] == "8"


async def test_a_body_that_is_not_in_its_coding_is_shown_as_it_came(folder: Path) -> None:
    said = b"<html>no gzip, but " + KEY.encode()
    dump = await dump_of(folder, answering(said[:25], said[25:], headers=[(b"content-encoding", b"gzip")]), request())
    assert dump.response is not None and dump.response.body == said.replace(KEY.encode(), HIDDEN)
    assert dump.response.record["Aibridge-Body"] == "masked"


async def test_a_coded_body_with_a_secret_that_is_damaged_behind_it(folder: Path) -> None:
    coded = gzip.compress(KEY.encode() + b" and more")
    damaged = coded[:-8] + b"\0" * 8 + b"xyz"  # gunzip prints what it has, and then complains of the checksum
    dump = await dump_of(folder, answering(damaged, headers=[(b"content-encoding", b"gzip")]), request())
    assert dump.response is not None and dump.response.body == HIDDEN + b" and more"
    assert dump.response.truncated == "unspecified" and dump.facts["unreadable-bytes-left-out"] == str(len(damaged))


async def test_a_decompression_bomb_is_bounded(folder: Path) -> None:
    bomb = gzip.compress(bytes(80 * 1024 * 1024))
    dump = await dump_of(folder, answering(bomb, b"behind", headers=[(b"content-encoding", b"gzip")]), request())
    assert dump.response is not None and dump.response.truncated == "unspecified"
    assert bomb.startswith(dump.response.body)
    left_out = int(dump.facts["unreadable-bytes-left-out"])
    assert left_out > 10_000 and len(dump.response.body) + left_out == len(bomb) + len(b"behind")


async def test_a_bomb_with_a_secret_is_bounded(folder: Path) -> None:
    bomb = gzip.compress(KEY.encode() + bytes(20 * 1024 * 1024))
    upstream = answering(bomb, headers=[(b"content-encoding", b"gzip")])
    dump = await dump_of(folder, upstream, request(), max_dump_bytes=1_000_000)
    assert dump.response is not None and dump.response.body == HIDDEN + bytes(1_000_000 - len(KEY))
    assert dump.response.truncated == "unspecified"


async def test_a_key_that_only_the_header_names(folder: Path) -> None:
    """Without being told of secrets: a passed-through request, a client's own."""
    sent = UpstreamRequest("POST", PROVIDER.base_url + "/x?api-key=" + KEY, [(b"cookie", KEY.encode())], b"<" + KEY.encode())
    dump = await dump_of(folder, answering(KEY.encode()), sent)
    assert KEY.encode() not in dump.path.read_bytes()


PLAIN = st.binary(max_size=40).filter(lambda data: b"*" not in data)


@st.composite
def messages(draw: st.DrawFn) -> tuple[str, bytes, list[bytes]]:
    """A coding, what is said in it, and the pieces in which that comes."""
    parts = draw(
        st.lists(st.one_of(PLAIN, st.sampled_from([KEY.encode(), KEY[:12].encode(), KEY[12:].encode()])), max_size=6)
    )
    coding = draw(st.sampled_from(list(CODERS)))
    said = b"".join(parts)
    coded = CODERS[coding](said)
    edges = sorted({0, len(coded), *draw(st.lists(st.integers(0, len(coded)), max_size=8))})
    return coding, said, [coded[start:end] for start, end in pairwise(edges)]


@given(messages(), messages(), st.booleans())
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_is_said_no_secret_is_in_the_file(
    tmp_path_factory: pytest.TempPathFactory,
    sent: tuple[str, bytes, list[bytes]],
    answered: tuple[str, bytes, list[bytes]],
    streamed: bool,
) -> None:
    """And all else is, byte for byte: decoded only where there was something to hide."""

    async def converse() -> Dumped:
        coding, _, parts = sent
        body: Body = pieces(*parts) if streamed else b"".join(parts)
        outgoing = request(body, (b"content-encoding", coding.encode()))
        upstream = Uploading(
            lambda _: MemoryResponse(ResponseHead(200, [(b"content-encoding", answered[0].encode())]), answered[2])
        )
        return await dump_of(tmp_path_factory.mktemp("property") / "dumps", upstream, outgoing)

    dump = asyncio.run(converse())
    assert dump.response is not None
    assert KEY.encode() not in dump.path.read_bytes()
    for message, (coding, said, parts) in ((dump.request, sent), (dump.response, answered)):
        hidden = KEY.encode() in said
        plain = coding in ("", "identity")
        assert message.body == (said.replace(KEY.encode(), HIDDEN) if hidden or plain else b"".join(parts))
        assert message.truncated is None
        states = (["decoded"] if not plain else []) + ["masked"] if hidden else []
        assert message.record.get("Aibridge-Body", "") == ", ".join(states)


class Uploading(MemoryUpstream):
    """Takes the whole body before it answers."""

    async def send(self, request: UpstreamRequest) -> UpstreamResponse:
        if not isinstance(request.body, bytes):
            async for _ in request.body:
                pass
        return await super().send(request)


# ---- files ----


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o7777


async def test_files_are_private(folder: Path) -> None:
    before = os.umask(0)
    try:
        dump = await dump_of(folder, answering(), request())
    finally:
        os.umask(before)
    assert mode(folder) == 0o700 and mode(dump.path) == 0o600


async def refused(folder: Path, caplog: pytest.LogCaptureFixture) -> str:
    """What the log says of dumps that cannot be made; traffic goes on."""
    async with TrafficDumps(folder) as dumps:
        upstream = dumps.upstream(PROVIDER, answering(b"one", b"two"))
        for _ in range(3):
            assert await call(upstream, request()) == b"onetwo"
    (said,) = [record for record in caplog.records if "cannot be dumped" in record.getMessage()]
    assert said.levelno == logging.WARNING and said.exc_info is None
    return said.getMessage()


async def test_a_directory_that_others_can_read_is_refused(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder.mkdir()
    folder.chmod(0o755)
    assert "mode 700" in await refused(folder, caplog)
    assert mode(folder) == 0o755 and list(folder.iterdir()) == [], "it may be any directory, so it is left as it is"


async def test_a_link_is_not_followed(tmp_path: Path, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    folder.symlink_to(elsewhere)
    await refused(folder, caplog)
    assert list(elsewhere.iterdir()) == []


def test_a_file_that_is_there_is_not_written_to(tmp_path: Path, folder: Path) -> None:
    from datetime import UTC, datetime

    dumps = DumpFolder(folder, 1000, 60)
    at = datetime.now(UTC)
    name, file = dumps.create(at, "anthropic", "x")
    os.close(file)
    with pytest.raises(FileExistsError):
        dumps.create(at, "anthropic", "x")
    (folder / name).unlink()
    (folder / name).symlink_to(tmp_path / "target")
    with pytest.raises(FileExistsError):
        dumps.create(at, "anthropic", "x")
    assert not (tmp_path / "target").exists()


# ---- bounds ----


@pytest.mark.parametrize("streamed", [False, True])
async def test_one_dump_is_bounded(folder: Path, streamed: bool) -> None:
    body: Body = pieces(b"a" * 40, b"b" * 40) if streamed else b"a" * 40 + b"b" * 40
    upstream = Uploading(lambda _: MemoryResponse(ResponseHead(200, []), [b"c" * 15, b"d" * 15, b"e" * 15]))
    dump = await dump_of(folder, upstream, request(body), max_dump_bytes=100)
    assert dump.request.body == b"a" * 40 + b"b" * 40 and dump.request.truncated is None
    assert dump.response is not None and dump.response.body == b"c" * 15 + b"d" * 5
    assert dump.response.truncated == "length"
    assert dump.facts == {"outcome": "complete", "request-bytes": "80", "response-bytes": "45"}


async def test_a_request_that_is_cut(folder: Path) -> None:
    dump = await dump_of(folder, answering(b"x"), request(b"a" * 80), max_dump_bytes=50)
    assert dump.request.body == b"a" * 50 and dump.request.truncated == "length"
    assert dump.response is not None and dump.response.body == b"" and dump.response.truncated == "length"
    assert dump.facts["request-bytes"] == "80" and dump.facts["response-bytes"] == "1"


async def test_a_cut_does_not_show_a_part_of_a_secret(folder: Path) -> None:
    dump = await dump_of(folder, answering(b"x" * 10 + KEY.encode()), request(b""), max_dump_bytes=25)
    assert dump.response is not None and dump.response.body == b"x" * 10 + b"*" * 15


async def test_all_dumps_are_bounded_and_the_oldest_go(folder: Path) -> None:
    async with TrafficDumps(folder, max_bytes=100_000) as dumps:
        upstream = dumps.upstream(PROVIDER, answering())
        for index in range(20):
            await call(upstream, request(b"a" * 20_000, id=f"call-{index:02}"))
            await until(lambda count=index: any(f"call-{count:02}" in path.name for path in dumps_in(folder)))  # type: ignore[misc]
    left = dumps_in(folder)
    assert 2 < len(left) < 6 and sum(path.stat().st_size for path in left) <= 100_000
    assert [path.stem[-7:] for path in left] == [f"call-{index:02}" for index in range(20 - len(left), 20)]


async def test_old_dumps_go_and_nothing_else(folder: Path) -> None:
    """Also when nobody dumps any more: what is left of earlier dumps is looked after."""
    await dump_of(folder, answering(), request())
    (dump,) = dumps_in(folder)
    others = [folder / "notes.txt", folder / "mine.warc", folder / "20261122T101112.000000Z-x.warc.bak"]
    for path in others:
        path.touch()
    for path in [dump, *others]:
        os.utime(path, (time.time() - 7200,) * 2)
    async with TrafficDumps(folder, max_hours=3):
        pass
    assert dump.exists()
    async with TrafficDumps(folder, max_hours=1):
        pass
    assert sorted(folder.iterdir()) == sorted(others)


async def test_processes_share_a_directory(folder: Path) -> None:
    async with TrafficDumps(folder, max_bytes=60_000) as one, TrafficDumps(folder, max_bytes=60_000) as other:
        both = [dumps.upstream(PROVIDER, answering()) for dumps in (one, other)]
        for index in range(10):
            for which, upstream in enumerate(both):
                await call(upstream, request(b"a" * 10_000, id=f"{index}-{which}"))
    left = dumps_in(folder)
    assert left and sum(path.stat().st_size for path in left) <= 60_000
    assert all(dumped(path).facts["outcome"] == "complete" for path in left)


# ---- harm ----


async def test_a_provider_without_dumps_is_left_alone(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    upstream = answering()
    async with TrafficDumps(folder) as dumps:
        assert dumps.upstream(Provider.anthropic(), upstream) is upstream
    assert not folder.exists() and not caplog.records
    assert not any(thread.name == "aibridge-dumps" for thread in threading.enumerate())


async def test_who_dumps_is_warned(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    TrafficDumps(folder).upstream(PROVIDER, answering())
    (said,) = caplog.messages
    assert "anthropic" in said and str(folder) in said and "in clear" in said


async def test_trouble_with_the_disk_is_told_and_passes(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dumps_module, "_QUIET_SECONDS", 0)
    folder.write_text("a file")
    async with TrafficDumps(folder) as dumps:
        upstream = dumps.upstream(PROVIDER, answering(b"one"))
        assert await call(upstream, request()) == b"one"
        await until(lambda: "(2 so far)" in caplog.text)  # that it cannot be tidied is the first
        folder.unlink()
        assert await call(upstream, request()) == b"one"
    assert len(dumps_in(folder)) == 1 and "3 so far" not in caplog.text


async def test_without_a_thread_there_are_no_dumps(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cannot(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", cannot)
    upstream = TrafficDumps(folder).upstream(PROVIDER, answering(b"one"))
    assert await call(upstream, request()) == b"one" == await call(upstream, request())
    assert caplog.text.count("can't start new thread") == 1 and not folder.exists()


async def test_a_mistake_of_ours_costs_a_dump_and_is_told(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mistaken(*_: object) -> None:
        raise ZeroDivisionError

    async with TrafficDumps(folder) as dumps:
        upstream = dumps.upstream(PROVIDER, answering(b"one"))
        with monkeypatch.context() as patch:
            patch.setattr("aibridge.dumpfiles.masked_fields", mistaken)
            assert await call(upstream, request()) == b"one"
            await until(lambda: "ZeroDivisionError" in caplog.text)
        assert await call(upstream, request()) == b"one"
    assert len(dumps_in(folder)) == 1 and "Traceback" in caplog.text


async def test_a_full_disk_leaves_no_half_dump(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = os.pwrite

    def full(file: int, data: bytes, offset: int) -> int:
        if offset > 2000:
            raise OSError(28, os.strerror(28))
        return written(file, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    async with TrafficDumps(folder) as dumps:
        assert (
            await call(dumps.upstream(PROVIDER, answering(b"a" * 5000, b"b" * 5000)), request()) == b"a" * 5000 + b"b" * 5000
        )
    assert list(folder.iterdir()) == [] and "No space left" in caplog.text


async def test_a_disk_that_hangs_stops_nobody(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rest of what does not fit in memory is left out, and the dump says so; later calls have none."""
    stuck, create = threading.Event(), DumpFolder.create

    def hang(*arguments: object) -> tuple[str, int]:
        assert stuck.wait(WAIT_SECONDS)
        return create(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(DumpFolder, "create", hang)
    monkeypatch.setattr(dumps_module, "_MAX_WAITING", 100_000)
    async with TrafficDumps(folder) as dumps:
        upstream = dumps.upstream(PROVIDER, answering(*[b"x" * 10_000] * 20))
        for _ in range(3):
            assert len(await call(upstream, request())) == 200_000
        stuck.set()
    found = [dumped(path) for path in dumps_in(folder)]
    assert sum(len(one.response.body) for one in found if one.response) < 100_000
    for one in found:
        assert one.response is not None and one.response.truncated == "unspecified"
        assert one.facts["bytes-lost-because-the-writer-was-behind"] == str(200_000 - len(one.response.body))
        assert one.facts["response-bytes"] == "200000" and one.facts["outcome"] == "complete"
    assert len(found[0].response.body if found[0].response else b"") > 50_000
    assert caplog.text.count("faster than it is written") == 1


async def test_held_bodies_count_as_waiting(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compressed streams are held until their end: many of them must not fill the memory."""
    monkeypatch.setattr(dumps_module, "_MAX_WAITING", 190_000)
    coded = gzip.compress(os.urandom(60_000))
    provider = answering(coded[:50_000], coded[50_000:], headers=[(b"content-encoding", b"gzip")])
    async with TrafficDumps(folder) as dumps:
        upstream = dumps.upstream(PROVIDER, provider)
        responses = [await upstream.send(request(id=str(index))) for index in range(4)]
        for response in responses:
            await until(lambda: not dumps._writer._queue)
            await response.read()
        for response in responses:
            assert [piece async for piece in reading(response)] == [coded[50_000:]]
        await until(lambda: not dumps._writer._queue)
        await call(upstream, request(id="later"))
    found = [dumped(path) for path in dumps_in(folder)]
    assert [one.facts["outcome"] for one in found] == ["complete"] * 5
    whole = [one.response is not None and one.response.truncated is None for one in found]
    assert whole == [True, True, True, False, True]
