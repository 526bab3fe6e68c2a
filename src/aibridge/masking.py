"""Credentials in traffic: which parts of a request hold one, and how they are masked, there and wherever they are quoted.

Pure. A masked credential is as long as it was, each of its bytes an asterisk, so that declared lengths stay right.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Final
from urllib.parse import quote, unquote_to_bytes

import msgspec

from aibridge.wire.base import Headers
from aibridge.wire.credentials import SHORTEST

_MASK: Final = b"*"

# Clients decide how many credentials there are, and each is searched for. No real request has nearly so many, or so long
# ones: of one that does, nothing is shown. To look for so many in 5 MB takes two seconds.
_MOST_FORMS: Final = 512
_MOST_BYTES: Final = 256 * 1024

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
    return (*known, *(secret for secret in found if len(secret) >= SHORTEST))


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
    """Finds credentials in bytes, in each form in which servers quote them: as they are, in JSON, in a URL.

    Of what has more credentials than can be looked for it hides all.
    """

    def __init__(self, secrets: Iterable[str]) -> None:
        forms = _forms_of(secret for secret in secrets if len(secret) >= SHORTEST)
        self._hides_all = forms is None
        self._forms = forms or ()
        self.reach = max(map(len, self._forms), default=1) - 1
        """How many bytes behind one decide whether it belongs to a credential."""

    def __call__(self, data: bytes) -> bytes:
        """The bytes, all occurrences masked, also those that overlap."""
        if self._hides_all:
            return _MASK * len(data)
        found = list(_occurrences(data, self._forms))
        if not found:
            return data
        masked = bytearray(data)
        for start, end in found:
            masked[start:end] = _MASK * (end - start)
        return bytes(masked)

    def text(self, text: str) -> str:
        """Likewise for a text."""
        return self(text.encode(errors="replace")).decode(errors="replace")

    def begun_at_end_of(self, data: bytes) -> int:
        """How many bytes at the end begin a credential; 0 where they are so few that they give nothing away."""
        end = data[max(len(data) - self.reach, 0) :]
        begun = (
            start
            for form in self._forms
            for start in _starts(end, form[:SHORTEST])
            if form.startswith(memoryview(end)[start:])
        )
        return len(end) - min(begun, default=len(end))


def hidden(text: str, secrets: Iterable[str], instead: str) -> str:
    """The text with `instead` in place of each credential, in whatever form it is quoted."""
    forms = _forms_of(secrets)
    if forms is None:
        return instead
    data, shown, until = text.encode(errors="replace"), bytearray(), 0
    found = sorted(_occurrences(data, forms))
    for start, end in found:
        if start >= until:  # or else it overlaps the one before
            shown += data[until:start] + instead.encode()
        until = max(until, end)
    return (shown + data[until:]).decode(errors="replace") if found else text


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


def _forms_of(secrets: Iterable[str]) -> Collection[bytes] | None:
    """What to look for; None where that is too much."""
    forms: set[bytes] = set()
    size = 0
    for secret in filter(None, secrets):
        for form in _forms(secret):
            if form not in forms:
                forms.add(form)
                size += len(form)
        if len(forms) > _MOST_FORMS or size > _MOST_BYTES:
            return None
    return forms


def _forms(secret: str) -> Iterator[bytes]:
    secret = secret.encode(errors="replace").decode()  # what is no text is in no text
    for text in {secret.encode(), secret.encode("latin-1", "replace")}:
        yield text
        yield quote(text, safe="").encode()
    for in_json in _in_json(secret):
        yield in_json.encode()
        yield from (in_that.encode() for in_that in _in_json(in_json))


def _in_json(text: str) -> tuple[str, str]:
    """As most write it, and as PHP does."""
    in_json = msgspec.json.encode(text).decode()[1:-1]
    return in_json, in_json.replace("/", "\\/")


def _occurrences(data: bytes, forms: Iterable[bytes]) -> Iterator[tuple[int, int]]:
    """From where to where there is one, in no order. Of several that overlap only so many that nothing of them is left out:
    a text and a form of one letter would have as many as it is long.
    """
    for form in forms:
        length, at = len(form), data.find(form)
        while at >= 0:
            yield at, at + length
            overlapping = data.rfind(form, at + 1, at + 2 * length - 1)
            at = overlapping if overlapping >= 0 else data.find(form, at + length)


def _starts(data: bytes, form: bytes) -> Iterator[int]:
    at = data.find(form)
    while at >= 0:
        yield at
        at = data.find(form, at + 1)
