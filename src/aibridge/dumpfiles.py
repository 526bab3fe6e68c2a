"""The format of traffic dumps: one file for each call of a provider, in WARC 1.1 (ISO 28500).

That is what HTTP traffic is archived in: each message stands there as it is, under a few lines that say what it is. People
read it with a pager, programs with any library for it. A dump has up to three records: the ``request``, the ``response``,
and ``metadata`` that says how the call ended. One without the last is of a call under way, or of a process that died.

Messages are as the gateway writes and reads them: names of fields in lower case, no reason phrase, bodies without their
transfer coding and in the content coding that they came in. Credentials are masked (`aibridge.masking`). A body with a
content coding is written when it has ended: it has to be decoded to see whether it holds one, and where it does, it stays
decoded. So is that of the request, which may bring credentials that only it knows of.
"""

import os
import re
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import BinaryIO, Final, Literal

import msgspec

from aibridge.errors import ProviderKind
from aibridge.httpclient import encoded, written_head
from aibridge.masking import Mask, MaskedStream, masked_fields, masked_request
from aibridge.providers import Provider
from aibridge.upstream import UpstreamRequest
from aibridge.wire.base import Headers
from aibridge.wire.coding import CodingError, Decoder, decoder
from aibridge.wire.credentials import credentials_in
from aibridge.wire.observer import ResponseHead

Outcome = Literal["complete", "broken off", "let go", "no response"]
"""Of a call: read to its end, broken off by the provider, given up by the gateway (mostly because its client had gone), or
nothing came."""

_BREAK: Final = b"\r\n"
_ROOM: Final = 120  # for what is only known at the end of a record
_MAX_DECODED: Final = 64 * 1024 * 1024  # a larger body is not searched to its end, so the rest is left out
_SLICE: Final = 256 * 1024
_CODED_SLICE: Final = 4096


class Begun(msgspec.Struct, frozen=True):
    """A request on its way to a provider."""

    call_id: str
    at: datetime
    provider: Provider
    request: UpstreamRequest


class Ended(msgspec.Struct, frozen=True):
    """How a call has ended. The sizes are of the bodies as they were sent, whether they were kept or not."""

    at: datetime
    outcome: Outcome
    error: str | None
    request_bytes: int
    response_bytes: int


class _Body:
    """A body on its way into the file. `held` bytes of it are kept in memory, `left_out` bytes nobody will see."""

    def __init__(self, mask: Mask) -> None:
        self.held = 0
        self.left_out = 0
        self.decoded = False
        self._stream = MaskedStream(mask)

    @property
    def masked(self) -> bool:
        return self._stream.hit

    def feed(self, piece: bytes) -> bytes:
        """The next piece has come. Answers with what can be written now."""
        return self._stream.feed(piece)

    def end(self, *, broken: bool) -> bytes:
        """There is no more of it; `broken`: though it goes on. Answers with the rest."""
        return self._stream.end(broken=broken)


class _CodedBody(_Body):
    """A body with a content coding, held until its end. One in a coding that we cannot read is left out."""

    def __init__(self, mask: Mask, coding: str, limit: int) -> None:
        super().__init__(mask)
        self._mask = mask
        self._coding = coding
        self._limit = limit
        self._pieces: list[bytes] = []
        self._damaged: int | None = None  # the piece in which it cannot be decoded any more
        self._size = 0  # decoded
        self._full = False
        self._decoder: Decoder | None = None
        try:
            self._decoder = decoder(coding)
        except CodingError:
            self._full = True

    def feed(self, piece: bytes) -> bytes:
        for start in range(0, len(piece), _CODED_SLICE):
            self._take(piece[start : start + _CODED_SLICE])
        return b""

    def end(self, *, broken: bool) -> bytes:
        if self._damaged is not None:  # some of that piece may still say something
            self._stream = MaskedStream(self._mask)
            for decoded in self.decodable():
                self._stream.feed(decoded)
        self._stream.end(broken=broken)
        self.decoded = self._stream.hit
        if self._stream.hit or self._damaged is None:
            data = self._clear(broken=broken) if self._stream.hit else b"".join(self._pieces)
        else:  # it is not what it says it is: shown as it came
            self._stream = MaskedStream(self._mask)
            data = self._stream.feed(b"".join(self._pieces)) + self._stream.end(broken=broken)
        self._pieces.clear()
        self.held = 0
        return data

    def _take(self, piece: bytes) -> None:
        if self._decoder is not None and not self._full:
            try:
                for decoded in self._decoder.feed(piece):
                    self._size += len(decoded)
                    self._stream.feed(decoded)
                self._full = self._size > _MAX_DECODED
            except CodingError:
                self._decoder, self._damaged = None, len(self._pieces)
        if self._full:
            self.left_out += len(piece)
        else:
            self._pieces.append(piece)
            self.held += len(piece)

    def decodable(self) -> Iterator[bytes]:
        """What of the body can be decoded, to the very byte where it is damaged: the same that others could."""
        with suppress(CodingError):
            decoding = decoder(self._coding)
            for piece in self._pieces[: self._damaged]:
                yield from decoding.feed(piece)
            for byte in b"" if self._damaged is None else self._pieces[self._damaged]:
                yield from decoding.feed(bytes([byte]))

    def _clear(self, *, broken: bool) -> bytes:
        """The body decoded and masked, as far as that is possible and within the limit."""
        stream, whole = MaskedStream(self._mask), bytearray()
        for decoded in self.decodable():
            whole += stream.feed(decoded)
        whole += stream.end(broken=broken)
        damaged = [] if self._damaged is None else self._pieces[self._damaged :]
        self.left_out += sum(map(len, damaged)) + max(len(whole) - self._limit, 0)
        return bytes(whole[: self._limit])


class _RequestBody(_Body):
    """The body of a request, held until its end. `read_as` says as what it is written then."""

    def __init__(self, mask: Mask, read_as: Callable[[bytes], _Body]) -> None:
        super().__init__(mask)
        self._read_as = read_as
        self._pieces: list[bytes] = []
        self._body: _Body | None = None

    @property
    def masked(self) -> bool:
        return self._body is not None and self._body.masked

    def feed(self, piece: bytes) -> bytes:
        self._pieces.append(piece)
        self.held += len(piece)
        return b""

    def end(self, *, broken: bool) -> bytes:
        body = self._body = self._read_as(b"".join(self._pieces))
        data = b"".join(map(body.feed, self._pieces)) + body.end(broken=broken)
        self._pieces.clear()
        self.held, self.left_out, self.decoded = 0, body.left_out, body.decoded
        return data


class _Record:
    """A record under way in a file. Its length, and what else is only known at its end, is written then."""

    def __init__(self, file: "_Appended", fields: Mapping[str, str], head: bytes, body: _Body) -> None:
        self._file = file
        self._length = len(head)
        self._gathered: list[bytes] = []
        self._gathered_bytes = 0
        self.body = body
        lines = [b"WARC/1.1", *(f"{name}: {value}".encode() for name, value in fields.items()), b""]
        file.append(_BREAK.join(lines))
        self._room = file.size
        file.append(b" " * _ROOM + _BREAK + _BREAK + head)

    @property
    def held(self) -> int:
        """Bytes that are kept in memory."""
        return self._gathered_bytes + self.body.held

    def gather(self, piece: bytes) -> None:
        """The next piece of the body. Small ones are written together."""
        self._gathered.append(piece)
        self._gathered_bytes += len(piece)
        if len(piece) >= _SLICE:
            self.flush()

    def flush(self) -> None:
        """Write what has gathered. In slices: while one is searched, the interpreter's lock is held."""
        data = b"".join(self._gathered)
        self._gathered.clear()
        self._gathered_bytes = 0
        for start in range(0, len(data), _SLICE):
            self._append(self.body.feed(data[start : start + _SLICE]))

    def end(self, truncated: str | None) -> None:
        """There is no more; `truncated` is WARC's word for why, where it should go on."""
        self.flush()
        self._append(self.body.end(broken=truncated is not None))
        self._file.append(_BREAK + _BREAK)
        lines = [f"Content-Length: {self._length}"]
        if truncated or self.body.left_out:
            lines.append(f"WARC-Truncated: {truncated or 'unspecified'}")
        states = [word for word, is_so in (("decoded", self.body.decoded), ("masked", self.body.masked)) if is_so]
        if states:
            lines.append(f"Aibridge-Body: {', '.join(states)}")
        self._file.put(self._room, _BREAK.join(line.encode() for line in lines).ljust(_ROOM))

    def _append(self, data: bytes) -> None:
        self._length += len(data)
        self._file.append(data)


class _Appended:
    """A file that grows."""

    def __init__(self, file: int) -> None:
        self._file = file
        self.size = 0

    def append(self, data: bytes) -> None:
        self.put(self.size, data)
        self.size += len(data)

    def put(self, offset: int, data: bytes) -> None:
        view = memoryview(data)
        while view:
            written = os.pwrite(self._file, view, offset)
            offset, view = offset + written, view[written:]


class DumpFile:
    """Writes the dump of one call into `file`, a descriptor that stays the caller's. All methods may raise OSError.

    They are told what happens, in order: the request, its body, its end, the response's head and body, the call's end. What
    comes of a body is in the file after `flush`. `limit` bounds each body. Raises ValueError or KeyError for a request that
    cannot be sent.
    """

    def __init__(self, file: int, begun: Begun, limit: int) -> None:
        request = begun.request
        self._limit = limit
        masked = masked_request(encoded(request.url), request.headers, request.secrets)
        self._secrets = masked.secrets
        self._mask = Mask(self._secrets)
        self._kind = begun.provider.kind
        self._url = masked.url
        head = self._mask(written_head(msgspec.structs.replace(request, url=masked.url, headers=masked.headers)))
        self._file = _Appended(file)
        self._id = uuid.uuid4()
        fields = {
            "WARC-Type": "request",
            "WARC-Record-ID": f"<{self._id.urn}>",
            "WARC-Date": _date(begun.at),
            "WARC-Target-URI": self._url,
            "Content-Type": "application/http;msgtype=request",
            "Aibridge-Call": begun.call_id,
            "Aibridge-Provider": begun.provider.name,
            "Aibridge-Kind": begun.provider.kind,
            "Aibridge-Base-URL": self._mask.text(encoded(begun.provider.base_url)),
        }
        if masked.names:
            fields["Aibridge-Masked"] = ", ".join(masked.names)
        coding = next((value.decode("latin-1") for name, value in request.headers if name == b"content-encoding"), "")
        body = _RequestBody(self._mask, partial(self._request_body, coding))
        self._record: _Record | None = _Record(self._file, fields, head, body)
        self._left_out = 0

    @property
    def held(self) -> int:
        """Bytes that are kept in memory."""
        return 0 if self._record is None else self._record.held

    def body(self, piece: bytes) -> None:
        """The next piece of the body, of the request or of the response."""
        if self._record is not None:
            self._record.gather(piece)

    def end_body(self, truncated: str | None) -> None:
        """Of the body under way there is no more. `truncated` is WARC's word for why, where it should go on."""
        if self._record is not None:
            self._record.end(truncated)
            self._left_out += self._record.body.left_out
            self._record = None

    def respond(self, at: datetime, head: ResponseHead) -> None:
        """The head of the response has come. What was not sent of the request by then is left out."""
        self.end_body("unspecified")
        fields = self._related("response", at) | {"Content-Type": "application/http;msgtype=response"}
        lines = [b"HTTP/1.1 %d " % head.status]
        lines += (b"%b: %b" % field for field in masked_fields(head.headers, self._mask))
        shown = self._mask(_BREAK.join([*lines, b"", b""]))
        self._record = _Record(self._file, fields, shown, self._body(head.coding))

    def end(self, ended: Ended, lost: int) -> None:
        """The call has ended. `lost` bytes could not be kept, because the writer was behind."""
        self.end_body("unspecified")
        facts: dict[str, str | int] = {"outcome": ended.outcome}
        if ended.error is not None:
            facts["error"] = self._mask.text(" ".join(ended.error.split()))
        facts |= {"request-bytes": ended.request_bytes, "response-bytes": ended.response_bytes}
        if self._left_out:
            facts["unreadable-bytes-left-out"] = self._left_out
        if lost:
            facts["bytes-lost-because-the-writer-was-behind"] = lost
        block = "".join(f"{name}: {value}\r\n" for name, value in facts.items()).encode()
        fields = self._related("metadata", ended.at) | {"Content-Type": "application/warc-fields"}
        _Record(self._file, fields, block, _Body(self._mask)).end(None)

    def flush(self) -> None:
        """Write what has gathered of a body."""
        if self._record is not None:
            self._record.flush()

    def _request_body(self, coding: str, data: bytes) -> _Body:
        """The body of the request, whose credentials are masked from now on."""
        found = credentials_in(self._kind, data)
        body = self._body(coding)
        if isinstance(body, _CodedBody):
            body.feed(data)
            found += credentials_in(self._kind, b"".join(body.decodable()))
        self._mask = Mask((*self._secrets, *found))
        return self._body(coding)

    def _body(self, coding: str) -> _Body:
        coding = coding.strip().lower()
        return _Body(self._mask) if coding in ("", "identity") else _CodedBody(self._mask, coding, self._limit)

    def _related(self, kind: str, at: datetime) -> dict[str, str]:
        return {
            "WARC-Type": kind,
            "WARC-Record-ID": f"<{uuid.uuid4().urn}>",
            "WARC-Date": _date(at),
            "WARC-Target-URI": self._url,
            "WARC-Concurrent-To": f"<{self._id.urn}>",
        }


def _date(at: datetime) -> str:
    return at.strftime("%Y-%m-%dT%H:%M:%S.%fZ")


# ---- reading ----


class Unusable(ValueError):
    """A file is not a dump, or not of a whole request. The message says why."""


class DumpedRequest(msgspec.Struct, frozen=True):
    """The request of a dump, credentials masked: `masked` names the header fields and query parameters that held one.

    `path` is what stands behind the provider's base URL. Of a `body_masked` a part was a credential. `headers` are without
    Host and Content-Length; a body without a length was sent `chunked`.
    """

    provider: str
    kind: ProviderKind
    base_url: str
    method: str
    path: str
    headers: Headers
    body: bytes
    masked: Sequence[str]
    body_masked: bool
    chunked: bool


def read_request(path: Path) -> DumpedRequest:
    """The request of a dump. Raises `Unusable`, also for one of which a part is missing; OSError."""
    with path.open("rb") as file:
        fields = _read_fields(file)
        if fields.get("warc-type") != "request" or not fields.keys() >= _NEEDED:
            raise Unusable("it is not a traffic dump of aibridge")
        if not _LENGTH.fullmatch(fields.get("content-length", "")):
            raise Unusable("its request was never written to the end: it may be under way still, or the process has died")
        if why := fields.get("warc-truncated"):
            raise Unusable(f"its request was cut ({_CUTS.get(why, why)})")
        length = int(fields["content-length"])
        if os.fstat(file.fileno()).st_size - file.tell() < length:
            raise Unusable("the file ends inside of its request")
        head, _, body = file.read(length).partition(_BREAK + _BREAK)
    start, *lines = head.split(_BREAK)
    method = _START.fullmatch(start)
    if method is None:
        raise Unusable("it does not hold an HTTP request")
    given = [(name, value) for name, _, value in (line.partition(b": ") for line in lines)]
    states = fields.get("aibridge-body", "")
    ours = {b"host", b"content-length", b"transfer-encoding"} | ({b"content-encoding"} if "decoded" in states else set())
    base_url = fields["aibridge-base-url"]
    return DumpedRequest(
        provider=fields["aibridge-provider"],
        kind="anthropic" if fields["aibridge-kind"] == "anthropic" else "openai",
        base_url=base_url,
        method=method[1].decode("ascii"),
        path=fields["warc-target-uri"].removeprefix(base_url.rstrip("/")),
        headers=[field for field in given if field[0].lower() not in ours],
        body=body,
        masked=[name for name in fields.get("aibridge-masked", "").split(", ") if name],
        body_masked="masked" in states,
        chunked=any(name == b"transfer-encoding" for name, _ in given),
    )


_NEEDED: Final = {"aibridge-provider", "aibridge-kind", "aibridge-base-url", "warc-target-uri"}
_LENGTH: Final = re.compile(r"[0-9]{1,15}")
_START: Final = re.compile(rb"([A-Za-z]+) [^ ]+ HTTP/1\.1")
_CUTS: Final = {"length": "it is over dumps.max_dump_bytes", "unspecified": "it was not all sent, or not all kept"}


def _read_fields(file: BinaryIO) -> dict[str, str]:
    """The fields of a record's head; none where there is no record."""
    if file.readline(64).rstrip() != b"WARC/1.1":
        return {}
    fields: dict[str, str] = {}
    while (line := file.readline(65536)) not in (_BREAK, b""):
        name, _, value = line.decode(errors="replace").partition(":")
        fields[name.strip().lower()] = value.strip()
    return fields
