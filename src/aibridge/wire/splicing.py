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
    body is not a JSON object. Latin-1 maps each byte to one character, so positions in the text are positions in the bytes.
    """
    document = body.decode("latin-1")
    found: tuple[int, int] | None = None
    try:
        position = _expect("{", document, _after_space(document, 0))
        while document[position] != "}":
            key, position = _decoder.raw_decode(document, position)
            start = _expect(":", document, _after_space(document, position))
            _, end = _decoder.raw_decode(document, start)
            if key == name:
                found = start, end
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
