"""Content codings, decoded incrementally and within a bound.

Compressed responses go to the client as the provider sent them; what is decoded here is the observer's copy. A few bytes
can decode to gigabytes, so the output is produced piece by piece and stops at a bound.
"""

import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from importlib import import_module
from typing import Final, Protocol

import brotli

zstd: Final = import_module("compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd")

MAX_DECODED_BYTES: Final = 256 * 1024 * 1024
"""Per response. Longer than any real answer; short of it a bomb costs about a second of CPU, not the machine."""

_PIECE: Final = 64 * 1024


class CodingError(ValueError):
    """The data cannot be decoded: corrupt, of an unknown coding, or over the bound."""


class Decoder(Protocol):
    """Turns encoded bytes into decoded pieces. Raises `CodingError`."""

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        """The pieces that this chunk decodes to."""


def decoder(coding: str, limit: int = MAX_DECODED_BYTES) -> Decoder:
    """A decoder for the value of a ``content-encoding`` header. Raises `CodingError` for one that is not known."""
    name = coding.strip().lower()
    if "," in name:  # applied in the order in which they are listed (RFC 9110 section 8.4)
        return _Chain([decoder(one, limit) for one in reversed(name.split(","))])
    if name in ("", "identity"):
        return _Identity()
    if name in ("gzip", "x-gzip"):
        return _Bounded(_Zlib(zlib.MAX_WBITS | 16), limit)
    if name == "deflate":
        return _Bounded(_Deflate(), limit)
    if name == "br":
        return _Bounded(_Brotli(), limit)
    if name == "zstd":
        return _Bounded(_Zstd(), limit)
    raise CodingError(f"unknown content coding of {len(name)} characters")


def decode(coding: str, data: bytes, limit: int = MAX_DECODED_BYTES) -> bytes:
    """A whole body, decoded. Raises `CodingError`."""
    return b"".join(decoder(coding, limit).feed(data))


class _Identity:
    def feed(self, chunk: bytes) -> Iterator[bytes]:
        yield chunk


class _Chain:
    def __init__(self, decoders: Sequence[Decoder]) -> None:
        self._decoders = decoders

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        pieces: Iterable[bytes] = (chunk,)
        for inner in self._decoders:
            pieces = _decoded(inner, pieces)
        yield from pieces


def _decoded(inner: Decoder, pieces: Iterable[bytes]) -> Iterator[bytes]:
    for piece in pieces:
        yield from inner.feed(piece)


class _Bounded:
    def __init__(self, inner: Decoder, limit: int) -> None:
        self._inner = inner
        self._left = limit

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        try:
            for start in range(0, len(chunk), _PIECE):  # in slices: decoders copy what they have not used yet
                for piece in self._inner.feed(chunk[start : start + _PIECE]):
                    self._left -= len(piece)
                    if self._left < 0:
                        raise CodingError("decodes to more than the bound")
                    yield piece
        except (zlib.error, brotli.error, zstd.ZstdError, EOFError) as error:
            raise CodingError(type(error).__name__) from None


class _Zlib:
    """gzip, zlib or raw deflate, by `wbits`; several gzip members in a row are one body (RFC 1952 section 2.2)."""

    def __init__(self, wbits: int) -> None:
        self._wbits = wbits
        self._inner = zlib.decompressobj(wbits)

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        piece = b""
        while chunk or len(piece) == _PIECE:  # a full piece: there may be more inside
            if self._inner.eof:
                self._inner = zlib.decompressobj(self._wbits)
            if piece := self._inner.decompress(chunk, _PIECE):
                yield piece
            chunk = self._inner.unused_data if self._inner.eof else self._inner.unconsumed_tail


class _Deflate:
    """``deflate`` means zlib (RFC 9110 section 8.4.1.2), but some servers send the bare algorithm: the first byte tells."""

    def __init__(self) -> None:
        self._inner: _Zlib | None = None

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        if chunk and self._inner is None:
            zlib_header = chunk[0] & 0x0F == zlib.DEFLATED
            self._inner = _Zlib(zlib.MAX_WBITS if zlib_header else -zlib.MAX_WBITS)
        if self._inner is not None:
            yield from self._inner.feed(chunk)


class _Brotli:
    def __init__(self) -> None:
        self._inner = brotli.Decompressor()

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        piece = self._inner.process(chunk, output_buffer_limit=_PIECE)
        while piece:
            yield piece
            # `can_accept_more_data` says yes while there is still output inside, so ask for it.
            piece = self._inner.process(b"", output_buffer_limit=_PIECE)


class _Zstd:
    """Several frames in a row are one body (RFC 8878 section 3.1)."""

    def __init__(self) -> None:
        self._inner = zstd.ZstdDecompressor()

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        while chunk or not (self._inner.needs_input or self._inner.eof):
            if self._inner.eof:
                self._inner = zstd.ZstdDecompressor()
            if piece := self._inner.decompress(chunk, max_length=_PIECE):
                yield piece
            chunk = self._inner.unused_data if self._inner.eof else b""
