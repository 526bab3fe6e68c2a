"""Credentials in traffic: which parts of a request hold one, and how they are masked, there and wherever they are quoted.

Pure. A masked credential is as long as it was, each of its bytes an asterisk, so that declared lengths stay right.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Final
from urllib.parse import quote, unquote_to_bytes

import msgspec

from aibridge.wire.base import Headers

_MASK: Final = b"*"

# What is shorter keeps no secret: it is a placeholder such as "none", which hiding would spoil the text around it.
_SHORTEST: Final = 8

# Names of header fields and of query parameters: those of the two kinds of provider, of others like them (`x-goog-api-key`,
# `ocp-apim-subscription-key`), and of what stands before them (`cf-access-client-secret`, `x-amz-security-token`). Not
# `idempotency-key`, nor `anthropic-ratelimit-tokens-remaining`.
_CREDENTIAL: Final = re.compile(
    rb"""^proxy- | ^key$ | cookie | authorization | secret | passw | credential
    | (?:api|access|account|subscription|private)[-_]?key
    | (?:^|[-_]) (?:auth|jwt|token|sig|signature) (?:$|[-_])""",
    re.IGNORECASE | re.VERBOSE,
)


class MaskedRequest(msgspec.Struct, frozen=True):
    """A request's URL and header fields without credentials. `secrets` were in them, `names` says where."""

    url: str
    headers: Headers
    secrets: tuple[str, ...]
    names: tuple[str, ...]


def masked_request(url: str, headers: Headers, secrets: Sequence[str] = ()) -> MaskedRequest:
    """Mask what fields and parameters of a credential's name hold, and `secrets` wherever they are. `url` is in ASCII."""
    path, mark, query = url.partition("?")
    found, names = secrets_of(query, headers, secrets), []
    parameters = [parameter.partition("=") for parameter in query.split("&")]
    for index, (parameter, equals, text) in enumerate(parameters):
        if text and is_credential(unquote_to_bytes(parameter)):
            names.append(f"?{parameter}")
            parameters[index] = (parameter, equals, "*" * len(text))
    mask = Mask(found)
    fields = masked_fields(headers, mask)
    changed = (name for (name, value), (_, shown) in zip(headers, fields, strict=True) if value != shown)
    names += (name.decode("latin-1") for name in changed)
    shown_url = path + mark + "&".join("".join(parameter) for parameter in parameters)
    return MaskedRequest(mask.text(shown_url), fields, found, tuple(names))


def secrets_of(query: str, headers: Headers, known: Sequence[str] = ()) -> tuple[str, ...]:
    """The credentials of a request: those that are `known`, and what parameters and fields of a credential's name hold.

    As they are written, and as they are meant. What is too short keeps no secret.
    """
    found: list[str] = []
    for parameter, _, text in (parameter.partition("=") for parameter in query.split("&")):
        if is_credential(unquote_to_bytes(parameter)):
            found += (text, unquote_to_bytes(text).decode("latin-1"))
    found += (value.split()[-1].decode("latin-1") for name, value in headers if value.strip() and is_credential(name))
    return (*known, *(secret for secret in found if len(secret) >= _SHORTEST))


def is_credential(name: bytes) -> bool:
    """Whether a header field or a query parameter of that name holds a credential."""
    return _CREDENTIAL.search(name) is not None


def masked_fields(headers: Headers, mask: "Mask") -> Headers:
    """Header fields without credentials: those of a credential's name keep only their scheme."""
    return [(name, _masked_value(name, value) if is_credential(name) else mask(value)) for name, value in headers]


def _masked_value(name: bytes, value: bytes) -> bytes:
    scheme, space, credential = value.partition(b" ")
    if space and name.lower().endswith(b"authorization"):
        return scheme + space + _MASK * len(credential)
    return _MASK * len(value)


class Mask:
    """Finds credentials in bytes, in each form in which servers quote them: as they are, in JSON, in a URL."""

    def __init__(self, secrets: Iterable[str]) -> None:
        self._forms = sorted({form for secret in secrets if len(secret) >= _SHORTEST for form in _forms(secret)})
        self.reach = max(map(len, self._forms), default=1) - 1
        """How many bytes behind one decide whether it belongs to a credential."""

    def __call__(self, data: bytes) -> bytes:
        """The bytes, all occurrences masked, also those that overlap."""
        found = [(at, len(form)) for form in self._forms for at in _occurrences(data, form)]
        if not found:
            return data
        masked = bytearray(data)
        for at, length in found:
            masked[at : at + length] = _MASK * length
        return bytes(masked)

    def text(self, text: str) -> str:
        """Likewise for a text."""
        return self(text.encode()).decode(errors="replace")

    def begun_at_end_of(self, data: bytes) -> int:
        """How many bytes at the end begin a credential; 0 where they are so few that they give nothing away."""
        lengths = range(min(self.reach, len(data)), _SHORTEST - 1, -1)
        ends = (length for length in lengths for form in self._forms if form.startswith(data[-length:]))
        return next(ends, 0)


class MaskedStream:
    """Masks what comes in pieces; a credential may stand in several. `hit`: there was one."""

    def __init__(self, mask: Mask) -> None:
        self.hit = False
        self._mask = mask
        self._data = b""  # what may still turn out to belong to a credential, and before it as much that was given away
        self._given = 0  # so much of that

    def feed(self, piece: bytes) -> bytes:
        """The next piece has come. Answers with what no later one can change."""
        self._data += piece
        return self._give(max(len(self._data) - self._mask.reach, self._given))

    def end(self, *, broken: bool = False) -> bytes:
        """There is no more. Answers with the rest. `broken`: it should go on, so what begins a credential is masked, too."""
        begun = self._mask.begun_at_end_of(self._data) if broken else 0
        rest = self._give(len(self._data))
        self.hit = self.hit or begun > 0
        return rest[: len(rest) - begun] + _MASK * begun

    def _give(self, until: int) -> bytes:
        masked = self._mask(self._data)
        self.hit = self.hit or masked is not self._data
        given = masked[self._given : until]
        forget = max(until - self._mask.reach, 0)
        self._data, self._given = self._data[forget:], until - forget
        return given


def _forms(secret: str) -> Iterator[bytes]:
    texts = {secret.encode(), secret.encode("latin-1", "replace")}
    for text in texts:
        yield text
        yield quote(text, safe="").encode()
    in_json = msgspec.json.encode(secret)[1:-1]
    yield in_json
    yield in_json.replace(b"/", b"\\/")


def _occurrences(data: bytes, form: bytes) -> Iterator[int]:
    at = data.find(form)
    while at >= 0:
        yield at
        at = data.find(form, at + 1)
