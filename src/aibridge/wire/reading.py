"""Tolerant, lazy reading of JSON that somebody else wrote.

Traffic is read for the ledger, never to judge it. So nothing here decodes more than was asked for, nothing fails because
a member has an unexpected type, and what is kept of a value is its *raw text*: ``1e400``, duplicate keys, escapes and
number formats survive because they are never turned into Python values and back (wire.md E).

An object is read one level at a time, as ``dict[str, Raw]``; the leaf readers (`text`, `integer`, `boolean`) answer
None for a value that is not of that type. Where a lot is read, a `Shape` says all that is wanted at once.
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Final, Generic, TypeVar, get_args, get_origin

import msgspec
from msgspec import Raw

# What msgspec raises for data that is not of the wanted type, not UTF-8, or nested too deeply.
_NOT_THAT: Final = (msgspec.MsgspecError, UnicodeError, RecursionError)

MAX_INTEGER: Final = 2**63 - 1
"""The largest integer that SQLite and PostgreSQL can hold. A counter beyond it is not a count."""

Count = Annotated[int, msgspec.Meta(ge=0, le=MAX_INTEGER)]
"""The type of what `integer` reads."""

STRING: Final = rb'"[^"\\\x00-\x1f]*+(?:\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})[^"\\\x00-\x1f]*+)*+"'
"""A regular expression for a JSON string on one line, to its end: nothing that follows can be inside it."""

NAME: Final = rb'"[ !#-\[\]-~]++"'
"""A regular expression for a JSON string that is not empty and has nothing in it to decode."""

NATURAL: Final = rb"(?:0|[1-9][0-9]{0,14}+)"
"""A regular expression for a JSON integer that is a `Count`."""

# An escaped backslash is matched first, so that the backslash of `\\ud800` is never mistaken for the start of an escape.
_SURROGATES: Final = re.compile(
    rb"\\\\|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|\\u[dD][89a-fA-F][0-9a-fA-F]{2}"
)

_object: Final = msgspec.json.Decoder(dict[str, Raw])
_array: Final = msgspec.json.Decoder(list[Raw])
_string: Final = msgspec.json.Decoder(str)
_integer: Final = msgspec.json.Decoder(int)
_number: Final = msgspec.json.Decoder(int | float)
_boolean: Final = msgspec.json.Decoder(bool)

# From here on it pays to look first whether a string has anything to decode.
_LONG: Final = 1000

_QUOTE: Final = ord('"')

T = TypeVar("T")
S = TypeVar("S", bound=msgspec.Struct)

Members = Mapping[str, Raw]
"""The members of one JSON object, each still the text that the sender wrote."""


class Unreadable(ValueError):
    """The data is not a JSON object. The message never quotes the data."""


def parse_object(data: bytes | Raw) -> Members:
    """The members of a JSON object.

    Raises `Unreadable`, and nothing else, when the data is not a JSON object. A lone surrogate escape, which JSON allows
    (RFC 8259 section 8.2) and UTF-8 cannot carry, is read as U+FFFD; a byte order mark is skipped.
    """
    found = _decoded(_object, data)
    if found is None:
        raise Unreadable("not a JSON object")
    return found


def is_object(data: bytes) -> bool:
    """Whether somebody could call this a JSON object: the test that decides between forwarding and refusing.

    More lenient than `parse_object`: what Python's own encoder emits (NaN), control characters in strings, integers of
    any length and any depth are for the provider to judge.
    """
    try:
        found = json.loads(data.decode("utf-8-sig", "replace"), strict=False, parse_int=float)
    except RecursionError:  # deeper than Python can follow, so at least it begins like one
        return data.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{")
    except ValueError:
        return False
    return isinstance(found, dict)


def is_whole_object(arguments: str) -> bool:
    """Whether the arguments of a call are the text of a JSON object, to its end, for everybody who may have to read it."""
    try:
        parse_object(arguments.encode())
    except Unreadable:
        return False
    return not arguments.startswith("\ufeff")  # which only we forgive


def members(raw: bytes | Raw | None) -> Members:
    """The members of a JSON object, or none at all for anything else."""
    found = None if raw is None else _decoded(_object, raw)
    return found or {}


def items(raw: bytes | Raw | None) -> list[Raw]:
    """The elements of a JSON array, or none at all for anything else."""
    return [] if raw is None else _decoded(_array, raw) or []


def text(raw: Raw | None) -> str | None:
    """A JSON string's value, or None for anything else."""
    if raw is None:
        return None
    if len(raw) > _LONG and is_text(raw) and (plain := _plain_text(bytes(raw))) is not None:
        return plain
    return _decoded(_string, raw)


def is_text(raw: Raw) -> bool:
    """Whether it is a JSON string, as far as its beginning tells."""
    return len(raw) > 0 and memoryview(raw)[0] == _QUOTE


def _plain_text(data: bytes) -> str | None:
    """The value of a JSON string without escapes, ten times as fast; None where it has some."""
    if b"\\" in data or data[-1:] != b'"':
        return None
    try:
        return str(memoryview(data)[1:-1], "utf-8")
    except UnicodeDecodeError:
        return None


def integer(raw: Raw | None) -> int | None:
    """A count: a JSON integer from 0 to 2**63 - 1, or None for anything else."""
    value = None if raw is None else _decoded(_integer, raw)
    return value if value is not None and 0 <= value <= MAX_INTEGER else None


def number(raw: Raw | None) -> int | float | None:
    """A JSON number's value, such as a cost, or None for anything else."""
    return None if raw is None else _decoded(_number, raw)


def boolean(raw: Raw | None) -> bool | None:
    """A JSON boolean's value, or None for anything else."""
    return None if raw is None else _decoded(_boolean, raw)


def source(raw: Raw | None) -> str | None:
    """The JSON text itself, or None where the member is absent or null."""
    if raw is None or is_null(raw):
        return None
    return bytes(raw).decode("utf-8", "replace")


def is_null(raw: Raw) -> bool:
    """Whether the member is present and null, which is not the same as absent."""
    return bytes(raw) == b"null"


class Shape(Generic[S]):
    """What is wanted of a JSON object, as a `msgspec.Struct` all of whose members have defaults.

    A member of another type than the struct's counts as absent, an element of a list likewise as empty, so the tolerance
    is that of the other readers; but where everything is as expected, it is one pass over the text. A member may be a
    string, a `Count`, a boolean, another such struct, a list of those or of `Raw`, or a union of some with a list last, all
    with ``| None`` where null may be met; or `Raw`, which is empty where it is absent.
    """

    def __init__(self, struct: type[S]) -> None:
        self._struct = struct
        self._decode = msgspec.json.Decoder(struct).decode
        self._decode_list = msgspec.json.Decoder(list[struct]).decode  # type: ignore[valid-type]
        self._readers = {field.name: _reader(field.type) for field in msgspec.structs.fields(struct)}

    def parse(self, data: bytes) -> S:
        """What a JSON object says. Raises `Unreadable`, and nothing else, when the data is not one."""
        try:
            return self._decode(data)
        except _NOT_THAT:
            return self._of(parse_object(data))

    def read(self, raw: Raw) -> S:
        """What a member says, where it is a JSON object."""
        try:
            return self._decode(raw)
        except _NOT_THAT:
            return self._of(members(raw))

    def each(self, raw: Raw) -> list[S]:
        """What the elements of an array say, or none at all for anything else."""
        try:
            return self._decode_list(raw)
        except _NOT_THAT:
            return [self.read(one) for one in items(raw)]

    def _of(self, given: Members) -> S:
        values = {name: read(given[name]) for name, read in self._readers.items() if name in given}
        return self._struct(**{name: value for name, value in values.items() if value is not None})


def _reader(wanted: Any) -> Callable[[Raw], Any]:
    """What reads a member of a type."""
    if wanted in _LEAVES:
        return _LEAVES[wanted]
    if _NULL in get_args(wanted):  # a union
        readers = [_reader(one) for one in get_args(wanted) if one is not _NULL]
        return lambda raw: next((value for read in readers if (value := read(raw)) is not None), None)
    if wanted == list[Raw]:
        return items
    if get_origin(wanted) is list:
        return Shape(get_args(wanted)[0]).each
    return Shape(wanted).read


_NULL: Final = type(None)
_LEAVES: Final[dict[Any, Callable[[Raw], Any]]] = {str: text, Count: integer, bool: boolean, Raw: lambda raw: raw}


def _decoded(decoder: "msgspec.json.Decoder[T]", data: bytes | Raw) -> T | None:
    try:
        return decoder.decode(data)
    except msgspec.ValidationError:  # of another type: there is nothing to mend
        return None
    except _NOT_THAT:
        pass
    mended = _mend(bytes(data))
    if mended is None:
        return None
    try:
        return decoder.decode(mended)
    except _NOT_THAT:
        return None


def _mend(data: bytes) -> bytes | None:
    """The data with what msgspec is stricter about than JSON replaced; None where there is nothing to replace."""
    mended = _SURROGATES.sub(_mend_escape, data.removeprefix(b"\xef\xbb\xbf"))
    return None if mended == data else mended


def _mend_escape(match: re.Match[bytes]) -> bytes:
    escape = match.group()
    return rb"\ufffd" if len(escape) == len(rb"\ud800") else escape
