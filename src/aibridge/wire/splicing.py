"""Edits of JSON text in place, so that every byte that is not edited stays as it was."""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Final

import msgspec
from msgspec import Raw

from aibridge.wire.reading import Members, Unreadable, items, members

Edit = tuple[int, int, bytes]
"""Where what is replaced begins and ends, and what comes there."""

_object: Final = msgspec.json.Decoder(dict[str, Raw])
_decoder: Final = json.JSONDecoder(strict=False, parse_int=float)
_space: Final = re.compile(r"[ \t\r\n]*")
_bytes_space: Final = re.compile(rb"[ \t\r\n]*")
_key: Final = re.compile(rb'[ \t\r\n]*(?P<name>"(?:[^"\\]|\\.)*")[ \t\r\n]*:[ \t\r\n]*')


def member_span(body: bytes, name: str) -> tuple[int, int] | None:
    """Where the value of a top-level member lies in the body, so that it can be edited without a decode and re-encode.

    The last one where the key is repeated, as every JSON reader we know takes the last. Raises `Unreadable` when the
    body is not a JSON object.
    """
    found = [(start, end) for key, _, start, end in _top_level(body) if key == name]
    return found[-1] if found else None


def written_members(data: bytes) -> Members:
    """The members of a JSON object as they were written: nothing is mended, as `parse_object` mends what it must, so that
    half of a surrogate pair finds its other half. Raises `Unreadable`.
    """
    try:
        return _object.decode(data)
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return {key: Raw(data[start:end]) for key, _, start, end in _top_level(data)}


def inner_members(raw: bytes | Raw | None) -> Members:
    """The members of an object inside of another, as they were written; none for anything else."""
    try:
        return {} if raw is None else written_members(bytes(raw))
    except Unreadable:
        return {}


def without_member(body: bytes, name: str) -> bytes:
    """The body without a top-level member, however often its key is repeated. Raises `Unreadable` as `member_span` does."""
    found = _top_level(body)
    edited, position = b"", 0
    for index, (key, begin, _, end) in enumerate(found):
        if key != name:
            continue
        if index + 1 < len(found):  # up to the next member, and with it the comma between them
            edited += body[position:begin]
            position = found[index + 1][1]
        else:
            edited = (edited + body[position:begin]).rstrip(b" \t\r\n").removesuffix(b",")
            position = end
    return edited + body[position:]


def edited(body: bytes, edits: Iterable[Edit]) -> bytes:
    """The body with all the edits made. They must not overlap; those at one place are made in the order given."""
    pieces: list[bytes] = []
    position = 0
    for start, end, new in sorted(edits, key=lambda edit: edit[:2]):
        pieces += (body[position:start], new)
        position = end
    return b"".join((*pieces, body[position:]))


def with_member(body: bytes, name: str, value: bytes) -> bytes:
    """The object with a member of that value: in its place where there is one, else at the end. Raises `Unreadable`."""
    found = _top_level(body)
    for key, _, start, end in reversed(found):
        if key == name:
            return body[:start] + value + body[end:]
    end = body.rindex(b"}")
    return body[:end] + (_between(body, found) if found else b"") + b'"%b":%b' % (name.encode(), value) + body[end:]


def with_replaced(body: bytes, values: Mapping[str, bytes]) -> bytes:
    """The object with other values for members that it has; it gets no new ones. Raises `Unreadable`."""
    spans = {key: (start, end) for key, _, start, end in _top_level(body)}
    return edited(body, [(*spans[name], value) for name, value in values.items() if name in spans])


def element_spans(array: bytes) -> list[tuple[int, int]]:
    """Where the elements of an array lie in its text. Raises `Unreadable` for what is not the text of an array."""
    position = _array_space(array, 0)
    if array[position : position + 1] != b"[":
        raise Unreadable("not a JSON array")
    spans: list[tuple[int, int]] = []
    for element in items(array[position:]):  # of what is an array; mended where it must be, but never to another length
        start = _array_space(array, position + 1)
        end = start + len(bytes(element))
        position = _array_space(array, end)
        spans.append((start, end))
    if not spans and array[_array_space(array, position + 1) :].rstrip() != b"]":
        raise Unreadable("not a JSON array")
    return spans


def inner_elements(raw: bytes | Raw | None) -> list[bytes]:
    """The elements of an array inside of something, as they were written; none for anything else."""
    array = b"" if raw is None else bytes(raw)
    try:
        return [array[start:end] for start, end in element_spans(array)]
    except Unreadable:
        return []


def with_elements(array: bytes, new: Iterable[bytes], between: bytes = b",") -> bytes:
    """The array with more elements at its end. `between` comes before each but a first one. Raises `Unreadable`."""
    there = bool(element_spans(array))
    end = array.rindex(b"]")
    added = between.join(new)
    return array[:end] + (between if there and added else b"") + added + array[end:]


def json_string(words: str) -> bytes:
    """A string as JSON. A lone surrogate, which UTF-8 cannot carry, becomes a question mark."""
    return msgspec.json.encode(words.encode("utf-8", "replace").decode())


def separator(body: bytes) -> bytes:
    """What the writer of an object puts between two members, and so between two elements: a comma, with or without a space.

    Raises `Unreadable` as `member_span` does.
    """
    return _between(body, _top_level(body))


def _between(body: bytes, found: list[tuple[str, int, int, int]]) -> bytes:
    return b", " if len(found) > 1 and body[found[0][3] : found[1][1]] == b", " else b","


def _array_space(array: bytes, position: int) -> int:
    match = _bytes_space.match(array, position)
    return match.end() if match else position


def _top_level(body: bytes) -> list[tuple[str, int, int, int]]:
    """The members of an object: key, where the key begins, where the value begins and ends. Raises `Unreadable`."""
    return _measured(body) or _scanned(body)


def _measured(body: bytes) -> list[tuple[str, int, int, int]]:
    """The same at a fraction of the cost, by the lengths of the values as msgspec finds them; none where that is not sure.

    It knows one value of a key that is repeated. Going by a wrong length misses a key, or leads into a value and out of its
    end, which is not the end of the body.
    """
    values = members(body)
    found: list[tuple[str, int, int, int]] = []
    position = _array_space(body, 0) + 1
    try:
        while (key := _key.match(body, position)) is not None:
            name: str = json.loads(key["name"])
            end = key.end() + len(bytes(values[name]))
            found.append((name, key.start("name"), key.end(), end))
            position = _array_space(body, end)
            if body[position : position + 1] != b",":
                break
            position += 1
    except (KeyError, ValueError):
        return []
    starts = body[_array_space(body, 0) :][:1] == b"{"
    ends = body[position:].rstrip(b" \t\r\n") == b"}" and {name for name, *_ in found} == values.keys()
    return found if starts and ends and len(found) == len(values) else []


def _scanned(body: bytes) -> list[tuple[str, int, int, int]]:
    """Whatever JSON it is, repeated keys and all.

    Latin-1 maps each byte to one character, so positions in the text are positions in the bytes.
    """
    document = body.decode("latin-1")
    found: list[tuple[str, int, int, int]] = []
    try:
        position = _expect("{", document, _after_space(document, 0))
        while document[position] != "}":
            key, end = _decoder.raw_decode(document, position)
            start = _expect(":", document, _after_space(document, end))
            _, end = _decoder.raw_decode(document, start)
            found.append((key, position, start, end))
            position = _after_space(document, end)
            if document[position] != "}":
                position = _expect(",", document, position)
    except (ValueError, IndexError, RecursionError) as error:
        raise Unreadable(type(error).__name__) from None
    return found


def _after_space(document: str, position: int) -> int:
    match = _space.match(document, position)
    return match.end() if match else position


def _expect(mark: str, document: str, position: int) -> int:
    """Past a mark and the space after it."""
    if document[position] != mark:
        raise ValueError(mark)
    return _after_space(document, position + 1)
