"""What the HTTP server reads from a client, and what it never takes for a request.

Truth: RFC 9112 (section numbers below) and RFC 9110; h11, an independent parser, as the oracle of a property. Where the RFC
leaves a choice, ours is to refuse: what two readers can read in two ways is how requests are smuggled (section 11.2).
"""

import asyncio
from collections.abc import Iterator, Sequence
from typing import Any

import h11
import pytest
from hypothesis import given, strategies as st

from aibridge.asgi import Receive, Scope, Send
from aibridge.httpprotocol import HttpProtocol, Serving
from tests.support.site import CHUNKED, GET, HOST, NEXT, POST, Echo, serving, statuses, whole_body


@pytest.fixture(params=["asyncio", "uvloop"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, object]]:
    return "asyncio", {"use_uvloop": request.param == "uvloop"}


# ---- what is refused ----

LAST = b"\r\n0\r\n\r\n"
CODED = POST + CHUNKED + b"\r\n"

REFUSED = {
    # 6.1: a coding that is not understood; what is not chunked in the end has no end
    "coding xchunked": POST + b"Transfer-Encoding: xchunked\r\n" + LAST,
    "coding identity": POST + b"Transfer-Encoding: identity\r\n" + LAST,
    "coding chunked, identity": POST + b"Transfer-Encoding: chunked, identity\r\n" + LAST,
    "coding identity, chunked": POST + b"Transfer-Encoding: identity, chunked\r\n" + LAST,
    "coding gzip, chunked": POST + b"Transfer-Encoding: gzip, chunked\r\n" + LAST,
    "coding gzip and chunked": POST + b"Transfer-Encoding: gzip\r\n" + CHUNKED + LAST,
    "coding chunked and identity": POST + CHUNKED + b"Transfer-Encoding: identity\r\n" + LAST,
    "coding chunked twice": POST + CHUNKED + CHUNKED + LAST,
    "coding chunked twice, oddly": POST + b"Transfer-Encoding: chunked\t\r\n" + CHUNKED + LAST,
    "coding chunked, chunked": POST + b"Transfer-Encoding: chunked, chunked\r\n" + LAST,
    "coding ,chunked": POST + b"Transfer-Encoding: ,chunked\r\n" + LAST,
    "coding chunked;a": POST + b"Transfer-Encoding: chunked;a=b\r\n" + LAST,
    "coding in quotes": POST + b'Transfer-Encoding: "chunked"\r\n' + LAST,
    "coding behind VT": POST + b"Transfer-Encoding: \x0bchunked\r\n" + LAST,
    "coding empty": POST + b"Transfer-Encoding:\r\n" + LAST,
    "coding of an upgrade": POST + b"Connection: Upgrade\r\nUpgrade: x\r\nTransfer-Encoding: xchunked\r\n" + LAST,
    "coding in 1.0": b"POST / HTTP/1.0\r\n" + CHUNKED + LAST,
    "coding in 1.0, kept alive": b"POST / HTTP/1.0\r\nConnection: keep-alive\r\n" + CHUNKED + LAST,
    # 6.3: two framings, in every order
    "length and coding": POST + b"Content-Length: 5\r\n" + CHUNKED + LAST,
    "coding and length": POST + CHUNKED + b"Content-Length: 5\r\n" + LAST,
    "length and odd coding": POST + b"Content-Length: 0\r\nTransfer-Encoding: xchunked\r\n" + LAST,
    "length in a trailer": CODED + b"0\r\nContent-Length: 5\r\n\r\n",
    "equal lengths": POST + b"Content-Length: 3\r\nContent-Length: 3\r\n\r\nabc",
    "different lengths": POST + b"Content-Length: 3\r\nContent-Length: 30\r\n\r\nabc",
    **{
        f"length {value!r}": POST + b"Content-Length: " + value + b"\r\n\r\nabc"
        for value in (b"+3", b"-3", b"0x3", b"3,3", b"3, 3", b"3 3", b"", b"3;a", b"1_0", b"\xb3", b"3\x00", b"9" * 20)
    },
    # 5.2 and 2.2: folded lines, bare LF and CR
    "folded coding": POST + b"Transfer-Encoding:\r\n chunked\r\n" + LAST,
    "folded length": POST + b"Content-Length: 3\r\n 4\r\n\r\nabc",
    "folded field": GET + b"a: b\r\n c\r\n\r\n",
    "space before the first field": b"GET / HTTP/1.1\r\n Host: h\r\n\r\n",
    "LF only": b"GET / HTTP/1.1\nHost: h\n\n",
    "LF in the head": GET + b"a: b\n\r\n",
    "LF at its end": GET + b"\n",
    "CR only": b"GET / HTTP/1.1\rHost: h\r\r",
    "CR in a value": GET + b"a: b\rc: d\r\n\r\n",
    # 5.1: names
    "space before the colon": POST + b"Content-Length : 3\r\n\r\nabc",
    "no name": GET + b": b\r\n\r\n",
    "no colon": GET + b"a\r\n\r\n",
    "NUL in a name": GET + b"a\x00: b\r\n\r\n",
    "no token": GET + b"a(b): c\r\n\r\n",
    "beyond ASCII": GET + b"a\xe9: c\r\n\r\n",
    # RFC 9110 section 5.5: values
    "NUL in a value": GET + b"a: b\x00c\r\n\r\n",
    "control byte in a value": GET + b"a: b\x01\r\n\r\n",
    "DEL in a value": GET + b"a: b\x7f\r\n\r\n",
    # 3.2: Host
    "no host": b"GET / HTTP/1.1\r\n\r\n",
    "two hosts": GET + HOST + b"\r\n",
    "two hosts in 1.0": b"GET / HTTP/1.0\r\n" + HOST + HOST + b"\r\n",
    # 3: the request line, and its target (3.2)
    "fragment": b"GET /a#b HTTP/1.1\r\n" + HOST + b"\r\n",
    "fragment of a URL": b"GET http://h/a#b HTTP/1.1\r\n" + HOST + b"\r\n",
    "no path": b"GET a HTTP/1.1\r\n" + HOST + b"\r\n",
    "tunnel": b"CONNECT / HTTP/1.1\r\n" + HOST + b"\r\n",  # RFC 9110 section 9.3.6
    "authority": b"CONNECT h:443 HTTP/1.1\r\n" + HOST + b"\r\n",
    "target beyond ASCII": b"GET /\xc3\xa9 HTTP/1.1\r\n" + HOST + b"\r\n",
    "control byte in the target": b"GET /\x01 HTTP/1.1\r\n" + HOST + b"\r\n",
    "tab": b"GET\t/ HTTP/1.1\r\n" + HOST + b"\r\n",
    "method in lower case": b"get / HTTP/1.1\r\n" + HOST + b"\r\n",
    "HTTP/0.9": b"GET /\r\n\r\n",
    "HTTP/0.9, as it never was": b"GET / HTTP/0.9\r\n" + HOST + b"\r\n",
    "HTTP/1.2": b"GET / HTTP/1.2\r\n" + HOST + b"\r\n",
    "HTTP/2.0": b"GET / HTTP/2.0\r\n" + HOST + b"\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    # 7.1: chunks
    **{
        f"chunk {chunk!r}": CODED + chunk + LAST
        for chunk in (
            *(b"+3\r\nabc", b"-3\r\nabc", b"0x3\r\nabc", b"3 \r\nabc", b" 3\r\nabc", b"g\r\nabc", b"\r\nabc"),
            *(b"3\nabc", b"3\rX\nabc", b"3\r\nabc\n", b"3\r\nabcd", b"3;a\nabc", b'3;a="b\r\nc"\r\nabc', b"3;\r\nabc"),
            *(b"1" + b"0" * 15 + b"3\r\nabc", b"0\n\nX", b"0\r\n\rX", b"0\r\na: b\n\r\n", b"0\r\n a: b\r\n\r\n"),
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("bytewise", [False, True], ids=["whole", "bytewise"])
async def test_what_could_be_read_in_two_ways_is_refused(bytewise: bool) -> None:
    """Once, with the connection; and what follows is no request, nor is the first one."""
    app = Echo()
    async with serving(app) as site:
        for what, data in REFUSED.items():
            sent = data + NEXT
            answered = await site.raw(*(sent[i : i + 1] for i in range(len(sent))) if bytewise else [sent])
            assert statuses(answered) == [400], what
            assert b"\r\nconnection: close\r\n" in answered, what
            assert not [seen for seen in app.seen if seen.complete], what
            app.seen.clear()


async def test_a_request_that_is_refused_as_it_comes_is_not_begun() -> None:
    """Its head was whole, and its body broken, in one read."""
    app = Echo()
    async with serving(app) as site:
        assert statuses(await site.raw(CODED + b"zz" + LAST)) == [400]
    assert app.seen == []


async def test_a_refusal_of_a_head_request_has_no_body() -> None:
    # RFC 9110 section 9.3.2.
    async def fail(scope: Scope, receive: Receive, send: Send) -> None:
        await whole_body(receive)
        raise ZeroDivisionError

    async with serving(fail) as site:
        answered = await site.raw(b"HEAD / HTTP/1.1\r\n" + HOST + CHUNKED + b"\r\n", b"zz\r\n")
        assert statuses(answered) == [400] and answered.endswith(b"\r\n\r\n")
        answered = await site.raw(b"HEAD / HTTP/1.1\r\n" + HOST + b"\r\n")
        assert statuses(answered) == [500] and answered.endswith(b"\r\n\r\n")


ACCEPTED: dict[str, tuple[bytes, bytes, bytes]] = {
    "odd casing": (POST + b"tRANSFER-eNCODING: cHUNKED\r\n\r\n3\r\nabc\r\n0\r\n\r\n", b"/", b"abc"),
    "leading zeros": (POST + b"Content-Length: 0003\r\n\r\nabc", b"/", b"abc"),
    "space around a length": (POST + b"Content-Length: \t 3 \r\n\r\nabc", b"/", b"abc"),
    "space behind a coding": (POST + b"Transfer-Encoding: chunked \r\n\r\n0\r\n\r\n", b"/", b""),
    "extensions": (CODED + b'3;a=b;c="d"\r\nabc\r\n0;e\r\n\r\n', b"/", b"abc"),
    "zeros before a size": (CODED + b"0" * 30 + b"3\r\nabc\r\n000\r\n\r\n", b"/", b"abc"),
    "trailers": (CODED + b"3\r\nabc\r\n0\r\nHost: evil\r\nExpect: 100-continue\r\n\r\n", b"/", b"abc"),
    "blank lines before": (b"\r\n\r\n" + GET + b"\r\n", b"/", b""),  # 2.2
    "bytes beyond ASCII in a value": (GET + b"a: \xe9\xff\r\n\r\n", b"/", b""),
    "two slashes": (b"GET //h/a HTTP/1.1\r\n" + HOST + b"\r\n", b"//h/a", b""),
    "a URL": (b"GET http://other/a?b HTTP/1.1\r\n" + HOST + b"\r\n", b"/a?b", b""),  # 3.2.2
    "a URL without a path": (b"GET http://other HTTP/1.1\r\n" + HOST + b"\r\n", b"/", b""),
    "asterisk": (b"OPTIONS * HTTP/1.1\r\n" + HOST + b"\r\n", b"*", b""),
    "encoded": (b"GET /%2F%00/../%zz?%23=? HTTP/1.1\r\n" + HOST + b"\r\n", b"/%2F%00/../%zz?%23=?", b""),
}


@pytest.mark.parametrize("what", ACCEPTED)
async def test_what_is_odd_and_plain(what: str) -> None:
    data, target, body = ACCEPTED[what]
    app = Echo()
    async with serving(app) as site, site.client() as client:
        await client.write(data + NEXT)
        assert (await client.answer()).head.status == 200
        assert (await client.answer()).body == b"/next "
    assert (app.seen[0].target, app.seen[0].body) == (target, body)
    assert [name for name, _ in app.seen[0].headers].count(b"host") == 1


# ---- the oracle ----


class Wire(asyncio.Transport):
    """A transport without a network. What it is told to read, it gives to its protocol while that wants it."""

    def __init__(self, protocol: HttpProtocol) -> None:
        super().__init__()
        self.protocol = protocol
        self.written = bytearray()
        self.reading = True
        self.ended = False

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default

    def write(self, data: Any) -> None:
        assert not self.ended, "nothing is written behind the end"
        self.written += data

    def write_eof(self) -> None:
        self.ended = True

    def close(self) -> None:
        self.ended = True

    abort = close

    def get_write_buffer_size(self) -> int:
        return 0

    def is_closing(self) -> bool:
        return self.ended

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True


async def spoken(app: Echo, pieces: Sequence[bytes]) -> bytes:
    """What the protocol answers to a connection's bytes, read in these pieces."""
    serving = Serving(app, 65_536, 60, 60, 300, lambda _: "openai")
    wire = Wire(HttpProtocol(serving))
    wire.protocol.connection_made(wire)
    left = list(pieces)
    while left or serving.tasks:
        if left and wire.reading:
            wire.protocol.data_received(left.pop(0))
        if left and wire.ended:
            break
        await asyncio.sleep(0)
        if not left and all(not wire.protocol._waiting and task_waits(serving) for _ in serving.tasks):
            break
    written = bytes(wire.written)
    wire.protocol.connection_lost(None)
    while serving.tasks:
        await asyncio.sleep(0)
    return written


def task_waits(serving: Serving) -> bool:
    """The call under way waits for a body that will not come."""
    (protocol,) = serving.connections
    exchange = protocol._exchange
    return exchange is not None and exchange.more_body and not exchange._pieces and exchange._news is not None


def by_h11(data: bytes) -> Iterator[tuple[str, bytes, list[tuple[bytes, bytes]], bytes]]:
    """The requests that h11 reads, as far as it understands them."""
    lasts = True
    while lasts:
        connection = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 20)
        connection.receive_data(data.lstrip(b"\r\n"))  # it does not ignore blank lines before a request (section 2.2)
        try:
            request = connection.next_event()
            if type(request) is not h11.Request:
                return
            body = bytearray()
            while type(event := connection.next_event()) is h11.Data:
                body += event.data
        except h11.RemoteProtocolError:
            return
        if type(event) is not h11.EndOfMessage:
            return
        headers = [(bytes(name), bytes(value)) for name, value in request.headers]
        yield request.method.decode(), bytes(request.target), headers, bytes(body)
        connection.send(h11.Response(status_code=404, headers=[(b"content-length", b"0")]))
        connection.send(h11.EndOfMessage())
        lasts = connection.our_state is h11.DONE
        data, _ = connection.trailing_data


def as_h11(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """It tells the transfer coding in lower case."""
    return [(name, value.lower() if name == b"transfer-encoding" else value) for name, value in headers]


def answers(data: bytes, methods: Sequence[str]) -> list[tuple[int, bytes]]:
    """The responses that h11's client reads."""
    connection = h11.Connection(h11.CLIENT)
    connection.receive_data(data.removesuffix(b"HTTP/1.1 100 Continue\r\n\r\n"))  # of a body that never came
    connection.receive_data(b"")
    found = []
    for method in methods:
        connection.send(h11.Request(method=method, target=b"/", headers=[(b"host", b"h")]))
        connection.send(h11.EndOfMessage())
        while type(response := connection.next_event()) is h11.InformationalResponse:
            pass
        assert type(response) is h11.Response
        body = bytearray()
        while type(event := connection.next_event()) is h11.Data:
            body += event.data
        assert type(event) is h11.EndOfMessage
        found.append((response.status_code, bytes(body)))
        if connection.our_state is h11.MUST_CLOSE or connection.their_state is not h11.DONE:
            break
        connection.start_next_cycle()
    assert connection.trailing_data[0] == b"", "no response without a request"
    return found


FIELDS = st.sampled_from([
    *(b"a: b", b"A:b", b"a:", b"a: b \t", b"x-y_z: \xff", b"Expect: 100-continue", b"Upgrade: h2c", b"Connection: upgrade"),
    *(b"Connection: close", b"Connection: keep-alive", b"Connection: Upgrade, close", b"Host: g", b"Content-Length: 2"),
    *(b"Content-Length: 0", b"content-length: 02", b"Content-Length: 9", b"Content-Length: +2", b"Content-Length: 2, 2"),
    *(b"Transfer-Encoding: chunked", b"transfer-encoding: CHUNKED", b"Transfer-Encoding: gzip, chunked"),
    *(b"Transfer-Encoding: identity", b"Transfer-Encoding : chunked", b"Transfer-Encoding: chunked\t", b" folded"),
])  # fmt: skip
LINES = st.sampled_from([
    *(b"GET /a HTTP/1.1", b"POST /b?c HTTP/1.1", b"PUT /d HTTP/1.1", b"HEAD /e HTTP/1.1", b"POST /f HTTP/1.0"),
    *(b"DELETE //g HTTP/1.1", b"OPTIONS * HTTP/1.1", b"CONNECT /h HTTP/1.1", b"GET /i#j HTTP/1.1", b"GET /k HTTP/2.0"),
])  # fmt: skip
BODIES = st.sampled_from([
    *(b"", b"", b"ok", b"GET /smuggled HTTP/1.1\r\nHost: h\r\n\r\n", b"0\r\n\r\n", b"2\r\nok\r\n0\r\n\r\n"),
    *(b"2;a=b\r\nok\r\n0\r\na: b\r\n\r\n", b"02\r\nok\r\n00\r\n\r\n", b"2\r\nok", b"x\r\n", b"2\nok\r\n0\r\n\r\n", b"\r\n"),
])  # fmt: skip
ENDS = st.sampled_from([b"\r\n"] * 20 + [b"\n", b"\r"])


@st.composite
def requests(draw: st.DrawFn) -> bytes:
    lines = [draw(LINES), *draw(st.sampled_from([[b"Host: h"]] * 9 + [[]])), *draw(st.lists(FIELDS, max_size=4))]
    return b"".join(line + draw(ENDS) for line in [*lines, b""]) + draw(BODIES)


@st.composite
def conversations(draw: st.DrawFn) -> list[bytes]:
    """What a client sends, in pieces as they are read."""
    sent = b"".join(draw(st.lists(requests(), min_size=1, max_size=4)))
    cuts = sorted(draw(st.sets(st.integers(1, len(sent) - 1), max_size=6)))
    return [sent[i:j] for i, j in zip([0, *cuts], [*cuts, len(sent)], strict=True)]


@pytest.mark.parametrize("anyio_backend", [("asyncio", {"use_uvloop": False})], ids=["asyncio"])
@given(conversations())
async def test_the_application_sees_what_was_sent(pieces: list[bytes]) -> None:
    """No request that h11 does not find there as well, however the reads fall; each answered in its turn, and no other."""
    sent = b"".join(pieces)
    app = Echo()
    async with asyncio.timeout(10):
        written = await spoken(app, pieces)
    seen = [(one.method, one.target, as_h11(one.headers), one.body) for one in app.seen if one.complete]
    assert seen == list(by_h11(sent))[: len(seen)]
    whole = Echo()
    again = await spoken(whole, [sent])
    assert [one for one in whole.seen if one.complete] == [one for one in app.seen if one.complete]
    final = [status for status in statuses(written) if status != 100]  # which depends on whether the body was there
    assert [status for status in statuses(again) if status != 100] == final
    refused = "HEAD" if written.endswith(b"\r\n\r\n") else "GET"
    found = answers(written, [*(one[0] for one in seen), refused][: len(final)])
    assert [status for status, _ in found[: len(seen)]] == [200] * len(seen)
    assert all(status == 400 for status, _ in found[len(seen) :]) and len(found) <= len(seen) + 1
