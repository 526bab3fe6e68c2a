"""What providers may do to a body before they send it, by the name that they give it in ``content-encoding``."""

import sys
import zlib
from collections.abc import Callable, Mapping
from typing import Final

import brotli

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

__all__ = ["ENCODERS", "brotli", "gzip", "raw_deflate", "zstd"]


def gzip(body: bytes) -> bytes:
    return zlib.compress(body, wbits=zlib.MAX_WBITS | 16)


def raw_deflate(body: bytes) -> bytes:
    """What some servers call deflate: the bare algorithm, without zlib's header and checksum."""
    return zlib.compress(body, wbits=-zlib.MAX_WBITS)


ENCODERS: Final[Mapping[str, Callable[[bytes], bytes]]] = {
    "gzip": gzip,
    "deflate": zlib.compress,
    "br": brotli.compress,
    "zstd": zstd.compress,
}
