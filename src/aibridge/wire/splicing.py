"""Edits of JSON text in place, so that every byte that is not edited stays as it was."""

import json
import re
from typing import Final

from aibridge.wire.reading import Unreadable

_decoder: Final = json.JSONDecoder(strict=False, parse_int=float)
_space: Final = re.compile(r"[ \t\r\n]*")


def member_span(body: bytes, name: str) -> tuple[int, int] | None:
    """Where the value of a top-level member lies in the body, so that it can be edited without a decode and re-encode.

    The last one where the key is repeated, as every JSON reader we know takes the last. Raises `Unreadable` when the
    body is not a JSON object.
    """
    found = [(start, end) for key, _, start, end in _top_level(body) if key == name]
    return found[-1] if found else None


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


def _top_level(body: bytes) -> list[tuple[str, int, int, int]]:
    """The members of an object: key, where the key begins, where the value begins and ends.

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
