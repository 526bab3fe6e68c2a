"""Traffic dumps: what is not in them. Truth: design.md section 3, no secret is ever written to a dump; how is our choice."""

import asyncio
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from aibridge.upstream import Body, MemoryResponse, UpstreamRequest
from aibridge.wire.observer import ResponseHead
from tests.support.coding import ENCODERS, gzip, zstd
from tests.support.dumps import (
    HIDDEN,
    KEY,
    PROVIDER,
    Dumped,
    Uploading,
    answering,
    dump_of,
    pieces,
    request,
)

CODERS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    "identity": bytes,
    **ENCODERS,
    "gzip, br": lambda data: ENCODERS["br"](ENCODERS["gzip"](data)),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "dumps"


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


TOKEN = "oauth-token-of-an-mcp-server"
SERVERS = b'{"mcp_servers":[{"authorization_token":"' + TOKEN.encode() + b'"}],"pad":"' + b"x" * 100 + b'"}'


@pytest.mark.parametrize("coding", CODERS)
@pytest.mark.parametrize("streamed", [False, True])
async def test_a_credential_that_only_the_body_names(folder: Path, coding: str, streamed: bool) -> None:
    """It is for a server that the provider calls, and the provider may quote it: in its answer, in a header field."""
    coded = CODERS[coding](SERVERS)
    body: Body = pieces(*(coded[at : at + 7] for at in range(0, len(coded), 7))) if streamed else coded
    headers = [(b"content-encoding", coding.encode())] if coding else []
    upstream = Uploading(
        lambda _: MemoryResponse(ResponseHead(400, [(b"x-why", TOKEN.encode())]), [b"no such token: " + TOKEN.encode()])
    )
    dump = await dump_of(folder, upstream, request(body, *headers))
    assert dump.request.body == SERVERS.replace(TOKEN.encode(), b"*" * len(TOKEN))
    assert "masked" in dump.request.record["Aibridge-Body"]
    assert dump.response is not None and dump.response.body == b"no such token: " + b"*" * len(TOKEN)
    assert TOKEN.encode() not in dump.path.read_bytes()


@pytest.mark.parametrize("at", [10, len(TOKEN) - 1, len(TOKEN), len(TOKEN) + 10])
@pytest.mark.parametrize("streamed", [False, True])
async def test_a_body_that_is_cut_off_in_its_credential(folder: Path, at: int, streamed: bool) -> None:
    kept = SERVERS.index(TOKEN.encode()) + at
    body: Body = pieces(SERVERS[:50], SERVERS[50:]) if streamed else SERVERS
    upstream = Uploading(lambda _: MemoryResponse(ResponseHead(200, [])))
    dump = await dump_of(folder, upstream, request(body), max_dump_bytes=kept)
    assert dump.request.truncated == "length"
    assert dump.request.body == SERVERS[:kept].replace(TOKEN[:at].encode(), b"*" * min(at, len(TOKEN)))


async def test_a_coded_body_that_is_damaged_behind_its_credential(folder: Path) -> None:
    damaged = gzip(SERVERS)[:-8] + b"\0" * 8 + b"xyz"
    dump = await dump_of(folder, answering(), request(damaged, (b"content-encoding", b"gzip")))
    assert dump.request.body == SERVERS.replace(TOKEN.encode(), b"*" * len(TOKEN))


async def test_a_body_with_a_credential_that_is_not_in_its_coding(folder: Path) -> None:
    dump = await dump_of(folder, answering(), request(SERVERS, (b"content-encoding", b"gzip")))
    assert dump.request.body == SERVERS.replace(TOKEN.encode(), b"*" * len(TOKEN))


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
    coded = gzip(KEY.encode() + b" and more")
    damaged = coded[:-8] + b"\0" * 8 + b"xyz"  # gunzip prints what it has, and then complains of the checksum
    dump = await dump_of(folder, answering(damaged, headers=[(b"content-encoding", b"gzip")]), request())
    assert dump.response is not None and dump.response.body == HIDDEN + b" and more"
    assert dump.response.truncated == "unspecified" and dump.facts["unreadable-bytes-left-out"] == str(len(damaged))


async def test_a_decompression_bomb_is_bounded(folder: Path) -> None:
    bomb = gzip(bytes(80 * 1024 * 1024))
    dump = await dump_of(folder, answering(bomb, b"behind", headers=[(b"content-encoding", b"gzip")]), request())
    assert dump.response is not None and dump.response.truncated == "unspecified"
    assert bomb.startswith(dump.response.body)
    left_out = int(dump.facts["unreadable-bytes-left-out"])
    assert left_out > 10_000 and len(dump.response.body) + left_out == len(bomb) + len(b"behind")


async def test_a_bomb_with_a_secret_is_bounded(folder: Path) -> None:
    bomb = gzip(KEY.encode() + bytes(20 * 1024 * 1024))
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
