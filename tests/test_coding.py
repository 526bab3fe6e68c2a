"""Content codings: what they decode to, whatever comes, within a bound.

Truth: RFC 1950 to 1952, 7932, 8878 and RFC 9110 section 8.4, by way of the libraries that encode here; failures.md 9.
"""

import time
import tracemalloc
import zlib
from collections import deque
from collections.abc import Callable

import brotli
import pytest
from hypothesis import given, settings, strategies as st

from aibridge.wire.coding import CodingError, decode, decoder
from tests.support.coding import ENCODERS, gzip, raw_deflate, zstd

TEXT = b'data: {"a":"' + bytes(range(256)) * 3 + b'"}\n\n' + b"data: [DONE]\n\n"
SPLIT = TEXT[:100], TEXT[100:]

# A frame that carries no content (RFC 8878 section 3.1.2).
SKIPPABLE = b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd"


def flushed(encode: Callable[[bytes], bytes], flush: Callable[[], bytes], finish: Callable[[], bytes]) -> bytes:
    """As servers compress event streams: each event is flushed, so that it can be read when it comes."""
    return b"".join([encode(SPLIT[0]), flush(), encode(SPLIT[1]), flush(), finish()])


def flushed_gzip() -> bytes:
    encoder = zlib.compressobj(wbits=zlib.MAX_WBITS | 16)
    return flushed(encoder.compress, lambda: encoder.flush(zlib.Z_SYNC_FLUSH), encoder.flush)


def flushed_brotli() -> bytes:
    encoder = brotli.Compressor()
    return flushed(encoder.process, encoder.flush, encoder.finish)


def flushed_zstd() -> bytes:
    encoder = zstd.ZstdCompressor()
    return flushed(encoder.compress, lambda: encoder.flush(encoder.FLUSH_BLOCK), encoder.flush)


ENCODED = [
    ("", TEXT),
    ("identity", TEXT),
    ("gzip", gzip(TEXT)),
    ("x-gzip", gzip(TEXT)),
    (" GZIP ", gzip(TEXT)),
    ("gzip", gzip(SPLIT[0]) + gzip(b"") + gzip(SPLIT[1])),  # several members are one body (RFC 1952 section 2.2)
    ("gzip", flushed_gzip()),
    ("deflate", zlib.compress(TEXT)),
    ("deflate", zlib.compress(TEXT, 0)),
    ("deflate", raw_deflate(TEXT)),
    ("br", brotli.compress(TEXT)),
    ("br", flushed_brotli()),
    ("zstd", zstd.compress(TEXT)),
    ("zstd", SKIPPABLE + zstd.compress(SPLIT[0]) + SKIPPABLE + zstd.compress(SPLIT[1])),
    ("zstd", flushed_zstd()),
]


@pytest.mark.parametrize(("coding", "body"), ENCODED)
def test_split_at_every_byte(coding: str, body: bytes) -> None:
    assert decode(coding, body) == TEXT
    for at in range(len(body) + 1):
        split = decoder(coding)
        assert b"".join([*split.feed(body[:at]), *split.feed(b""), *split.feed(body[at:])]) == TEXT
    byte_by_byte = decoder(coding)
    assert b"".join(piece for at in range(len(body)) for piece in byte_by_byte.feed(body[at : at + 1])) == TEXT


@pytest.mark.parametrize(
    ("coding", "encoded"), [("gzip", flushed_gzip()), ("br", flushed_brotli()), ("zstd", flushed_zstd())]
)
def test_what_was_flushed_is_read_at_once(coding: str, encoded: bytes) -> None:
    """Otherwise the end of a stream would be noticed too late to be held back."""
    without_trailer = next(
        at for at in range(len(encoded)) if b"".join(decoder(coding).feed(encoded[: at + 1])).endswith(SPLIT[1])
    )
    assert without_trailer < len(encoded) - 1


@settings(max_examples=50)
@given(st.binary(max_size=200_000), st.sampled_from(sorted(ENCODERS)))
def test_everything_comes_back(body: bytes, coding: str) -> None:
    assert decode(coding, ENCODERS[coding](body)) == body


@pytest.mark.parametrize("size", [65_535, 65_536, 65_537, 131_072, 300_000])
@pytest.mark.parametrize("coding", ENCODERS)
def test_sizes_around_that_of_a_piece(coding: str, size: int) -> None:
    body = b"a" * size
    pieces = list(decoder(coding).feed(ENCODERS[coding](body)))
    assert b"".join(pieces) == body
    assert all(len(piece) < 2 * 65_536 for piece in pieces)


@pytest.mark.parametrize("coding", ["deflate64", "compress", "x-gzip;q=1", "\xe9"])
def test_an_unknown_coding(coding: str) -> None:
    with pytest.raises(CodingError, match=f"^unknown content coding of {len(coding)} characters$"):
        decoder(coding)


@pytest.mark.parametrize("body", [b"not at all encoded", b"\x00" * 50, b"\xff" * 50], ids=["text", "zeros", "ones"])
@pytest.mark.parametrize("coding", ENCODERS)
def test_what_is_not_so_encoded(coding: str, body: bytes) -> None:
    with pytest.raises(CodingError) as caught:
        decode(coding, ENCODERS[coding](b"good") * (coding == "gzip") + body)
    assert str(caught.value) in ("error", "ZstdError")  # no content is quoted


@pytest.mark.parametrize("coding", ENCODERS)
def test_corrupt(coding: str) -> None:
    """Every byte changed in turn: it decodes, to whatever, or is corrupt; nothing else."""
    body = ENCODERS[coding](TEXT)
    failed = 0
    for at in range(len(body)):
        try:
            decode(coding, body[:at] + bytes([body[at] ^ 0x55]) + body[at + 1 :])
        except CodingError:
            failed += 1
    assert failed > 0


@pytest.mark.parametrize("coding", ENCODERS)
def test_truncated(coding: str) -> None:
    """What has come is good as far as it goes: whether a body is complete is for others to say."""
    body = ENCODERS[coding](TEXT)
    for at in range(len(body)):
        assert TEXT.startswith(decode(coding, body[:at]))


BOMB = 300 * 1024 * 1024


def bomb(coding: str) -> bytes:
    piece = bytes(1024 * 1024)
    pieces = BOMB // len(piece)
    match coding:
        case "zstd":
            return zstd.compress(piece) * pieces
        case "br":
            brotlied = brotli.Compressor(quality=1)
            return b"".join([*(brotlied.process(piece) for _ in range(pieces)), brotlied.finish()])
        case _:
            zlibbed = zlib.compressobj(1, wbits=31 if coding == "gzip" else 15)
            return b"".join([*(zlibbed.compress(piece) for _ in range(pieces)), zlibbed.flush()])


@pytest.mark.parametrize("coding", ENCODERS)
def test_a_bomb_costs_a_little_time_and_hardly_any_memory(coding: str) -> None:
    body = bomb(coding)
    assert len(body) < 2 * 1024 * 1024
    begun = time.process_time()
    with pytest.raises(CodingError, match="more than the bound"):
        deque(decoder(coding).feed(body), maxlen=0)
    assert time.process_time() - begun < 5.0  # half a second where this was written
    tracemalloc.start()
    try:
        with pytest.raises(CodingError, match="more than the bound"):
            deque(decoder(coding, limit=8 * 1024 * 1024).feed(body), maxlen=0)
        assert tracemalloc.get_traced_memory()[1] < 4 * 1024 * 1024
    finally:
        tracemalloc.stop()


def test_the_bound_is_on_all_chunks_together() -> None:
    bounded = decoder("gzip", limit=10)
    assert b"".join(bounded.feed(gzip(b"12345"))) == b"12345"
    assert b"".join(bounded.feed(gzip(b"67890"))) == b"67890"
    with pytest.raises(CodingError, match="more than the bound"):
        list(bounded.feed(gzip(b"1")))


def test_a_large_body_in_one_piece_takes_time_in_proportion() -> None:
    """A client's request comes whole: no decoder may copy what is left of it for every piece that it puts out."""
    body = zlib.compress(bytes(range(256)) * 2**16, 0)
    begun = time.process_time()
    assert len(decode("deflate", body)) == 2**24
    assert time.process_time() - begun < 1.0  # 25 ms where this was written; ten times that if copied


@pytest.mark.parametrize("size", [1, 7, 100_000])
def test_codings_in_a_row(size: int) -> None:
    """Listed in the order in which they were applied (RFC 9110 section 8.4)."""
    body = bytes(range(256)) * 1000
    encoded = brotli.compress(gzip(body))
    found = decoder("gzip, br")
    pieces = [piece for at in range(0, len(encoded), size) for piece in found.feed(encoded[at : at + size])]
    assert b"".join(pieces) == body


def test_one_unknown_coding_among_several_is_enough() -> None:
    with pytest.raises(CodingError, match="unknown content coding of 8 characters"):
        decoder("gzip, compress")
