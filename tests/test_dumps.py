"""Traffic dumps: what is in them.

Truth: issue 5 for what dumps are; WARC 1.1 for their format, read by warcio, which is not ours; RFC 9112 for the messages;
for the rest our choice (docs/operations.md). That what is wrapped is a port all the same, `tests/test_upstream.py` shows.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import pytest
from warcio.archiveiterator import ArchiveIterator

from aibridge import MemoryRecorder, Provider, RequestBridge
from aibridge.dumps import TrafficDumps
from aibridge.errors import UpstreamError
from aibridge.events import Event, Retried
from aibridge.httpclient import HttpUpstream
from aibridge.limits import Limits
from aibridge.retries import RetryRules
from aibridge.upstream import MemoryResponse, MemoryUpstream, UpstreamRequest, UpstreamResponse
from aibridge.wire.observer import ResponseHead
from tests import serving
from tests.support.dumps import (
    HIDDEN,
    KEY,
    PROVIDER,
    answering,
    call,
    dump_of,
    dumped,
    dumps_in,
    finished,
    pieces,
    reading,
    request,
    until,
)
from tests.support.provider import CUT, STALL, Gate, Reply, ScriptedProvider, Wait


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "dumps"


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


# ---- through a bridge ----

ANSWER = b'{"id":"msg_1","type":"message","content":[],"usage":{"input_tokens":1,"output_tokens":2}}'


async def test_each_attempt_has_a_dump_under_the_id_of_its_interception(folder: Path) -> None:
    """And a provider is dumped from when its configuration says so until it does not."""
    statuses = iter([200, 503, 200, 200])
    upstream = MemoryUpstream(lambda _: MemoryResponse(ResponseHead(next(statuses), []), [ANSWER]))
    retrying = RetryRules(attempts=1, statuses=frozenset({503}), max_delay=0.001)
    recorder, plain = MemoryRecorder(), Provider.anthropic()
    async with TrafficDumps(folder) as dumps, RequestBridge([plain], recorder, upstream=upstream, dumps=dumps) as bridge:
        for provider in (plain, replace(plain, dump=True, retries=retrying), plain):
            await bridge.reconfigure([provider], injection=None, limits=Limits())
            answer = await serving.call(bridge, serving.scope("POST", "/anthropic/v1/messages"), b'{"model":"m"}')
            assert answer.status == 200
    _, second, _ = [interception.id for interception in recorder.interceptions]
    first_try, second_try = [dumped(path) for path in dumps_in(folder)]
    assert first_try.request.record["Aibridge-Call"] == f"{second}-1-1" and first_try.response is not None
    assert second_try.request.record["Aibridge-Call"] == f"{second}-1-2" and second_try.response is not None
    assert (first_try.response.start, second_try.response.start) == (b"HTTP/1.1 503 ", b"HTTP/1.1 200 ")
    assert second_try.facts["outcome"] == "complete"


async def test_what_is_tried_again_is_dumped_with_its_error(folder: Path, provider: ScriptedProvider) -> None:
    """It is what one dumps for. The rest of it is read while the next attempt has to wait, which it would anyway."""
    gate = Gate()

    def see(event: Event) -> None:
        if isinstance(event, Retried):
            gate.set()

    refusal = Reply(503, [("Retry-After", "1")], [b'{"type":"error",', Wait(gate), b'"error":{}}'], "length")
    provider.replies(refusal, Reply.json(ANSWER))
    retrying = RetryRules(attempts=1, statuses=frozenset({503}))
    asked = replace(Provider.anthropic(base_url=provider.url), dump=True, retries=retrying)
    async with (
        TrafficDumps(folder) as dumps,
        RequestBridge([asked], MemoryRecorder(), dumps=dumps, observers=[see]) as bridge,
    ):
        answer = await serving.call(bridge, serving.scope("POST", "/anthropic/v1/messages"), b'{"model":"m"}')
        assert answer.status == 200
    first_try, _ = [dumped(path) for path in dumps_in(folder)]
    assert first_try.response is not None and first_try.response.truncated is None
    assert first_try.response.body == b'{"type":"error","error":{}}' and first_try.facts["outcome"] == "complete"
    assert provider.connections == 1, "it can be used again"
