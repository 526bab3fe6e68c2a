"""Reading JSON that somebody else wrote: whatever it is, nothing is raised, nothing is judged, little is decoded.

Truth: RFC 8259; wire.md E for what real encoders write and what other readers make of it; failures.md 5.
"""

import json
from typing import Any

import pytest
from hypothesis import given, strategies as st
from msgspec import Raw

from aibridge.wire.reading import (
    MAX_INTEGER,
    Unreadable,
    boolean,
    integer,
    is_null,
    is_object,
    items,
    members,
    parse_object,
    source,
    text,
)

DEEP = 100_000


def nested(depth: int) -> bytes:
    return b'{"a":' * depth + b"1" + b"}" * depth


# Of these some are let through all the same: `is_object` is the test of that.
ODD = [b'{"a":NaN}', b'{"\xff":1}', b'{"a":"\x01"}', nested(DEEP), b"\x00", b"\xff\xfe{\x00}\x00"]


@pytest.mark.parametrize(
    ("document", "raw"),
    [
        (b'{"a":1}', b"1"),
        (b' \t\r\n{ "a" :\n1\t} \n', b"1"),
        (b'{"a":0,"a":1}', b"1"),  # as every JSON reader we know: the last counts
        (b'{"\\u0061":1}', b"1"),
        (b'{"a":1e400}', b"1e400"),  # numbers stay text
        (b'{"a":-0.0e-7}', b"-0.0e-7"),
        (b'{"a":%s}' % (b"9" * 5000), b"9" * 5000),
        (b'{"a": { "b" : [ 1 , 2 ] } }', b'{ "b" : [ 1 , 2 ] }'),
        (b'{"a":"\\u0000\\/\\u00e9"}', b'"\\u0000\\/\\u00e9"'),
        ('{"é":0,"a":"ü"}'.encode(), '"ü"'.encode()),
        (b'{"a":"\xff"}', b'"\xff"'),
        (b'\xef\xbb\xbf{"a":1}', b"1"),  # RFC 8259 8.1 allows to skip a byte order mark
        (b'{"b":"\\ud800","a":1}', b"1"),  # a lone surrogate: JSON by 8.2, and Python writes it
        (b'{"\\udfff":1,"a":"\\ud83d\\ude00"}', b'"\\ud83d\\ude00"'),
    ],
)
def test_the_members_of_an_object(document: bytes, raw: bytes) -> None:
    assert bytes(parse_object(document)["a"]) == raw
    assert bytes(members(document)["a"]) == raw


@pytest.mark.parametrize(
    "document",
    [b"", b" ", b"null", b"[]", b'"a"', b"1", b"{", b'{"a":}', b'{"a":1,}', b'{"a":1}}', b"{'a':1}", b'{"a":01}', *ODD],
)
def test_what_is_not_an_object_that_we_can_read(document: bytes) -> None:
    with pytest.raises(Unreadable) as caught:
        parse_object(document)
    assert str(caught.value) == "not a JSON object"  # and quotes nothing of it
    assert members(document) == {}


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        (b"{}", True),
        (b'\xef\xbb\xbf {"a":1}', True),
        (b'{"a":NaN,"b":-Infinity}', True),  # Python's own encoder writes these
        (b'{"a":"\x01\n"}', True),
        (b'{"\xff":1}', True),
        (b'{"a":%s}' % (b"9" * 5000), True),
        (nested(DEEP), True),
        (b"[" * DEEP, False),
        (b"", False),
        (b"null", False),
        (b"[{}]", False),
        (b'"{}"', False),
        (b"{", False),
        (b'{"a":1} x', False),
        (b"model=x", False),
    ],
)
def test_what_is_forwarded_and_what_is_refused(document: bytes, expected: bool) -> None:
    """The provider judges a body, we only refuse what nobody could call a JSON object."""
    assert is_object(document) is expected


@pytest.mark.parametrize("raw", [b"null", b"1", b"true", b'"a"', b"[1]", b'{"a":1}', b"x", b"", b'"\xff"', b'["\\ud800"]'])
def test_a_value_of_another_type_is_nothing(raw: bytes) -> None:
    """Compatible servers send null for a list, text for a number: that must not fail what else there is to read."""
    value = Raw(raw)
    readers: dict[str, Any] = {"text": text, "integer": integer, "boolean": boolean, "items": items, "members": members}
    typed = {b"1": "integer", b"true": "boolean", b'"a"': "text", b"[1]": "items", b'{"a":1}': "members"}
    found = [name for name, reader in readers.items() if reader(value) not in (None, [], {})]
    assert found == ([typed[raw]] if raw in typed else ["items"] if raw.startswith(b"[") else [])


def test_what_is_absent() -> None:
    assert (text(None), integer(None), boolean(None), source(None)) == (None, None, None, None)
    assert (items(None), members(None)) == ([], {})


@pytest.mark.parametrize(
    ("raw", "value"),
    [
        (b'""', ""),  # not the same as absent
        (b'"\\u0000"', "\0"),
        (b'"\\ud83c\\udf0d"', "🌍"),
        (b'"a\\ud83cb"', "a\ufffdb"),
        (b'"\\udf0d\\ud83c"', "\ufffd\ufffd"),
        (b'"\\ud83c\\ud83c\\udf0d"', "\ufffd🌍"),
        (b'"\\\\ud83c \\ud83c"', "\\ud83c \ufffd"),  # an escaped backslash starts no escape
        ('"\u2028\x7f"'.encode(), "\u2028\x7f"),
    ],
)
def test_text(raw: bytes, value: str) -> None:
    assert text(Raw(raw)) == value


@pytest.mark.parametrize(
    ("raw", "value"),
    [
        (b"0", 0),
        (b"-0", 0),
        (b"9223372036854775807", MAX_INTEGER),
        (b"9223372036854775808", None),  # more than a database can hold
        (b"9" * 5000, None),
        (b"-1", None),  # no count is negative
        (b"1.0", None),
        (b"1e3", None),
        (b'"1"', None),
        (b"true", None),
    ],
)
def test_counts(raw: bytes, value: int | None) -> None:
    assert integer(Raw(raw)) == value


def test_source() -> None:
    assert source(Raw(b'{ "a" : 1.0e2 }')) == '{ "a" : 1.0e2 }'
    assert source(Raw(b'"\xff"')) == '"\ufffd"'
    assert source(Raw(b"null")) is None
    assert is_null(Raw(b"null"))
    assert not is_null(Raw(b'"null"'))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(st.text(), JSON, max_size=5), st.booleans())
def test_what_python_writes_is_read(document: dict[str, Any], ascii_only: bool) -> None:
    body = json.dumps(document, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass" if ascii_only else "replace")
    found = parse_object(body)
    assert is_object(body)
    if ascii_only:
        assert {name: json.loads(bytes(raw)) for name, raw in found.items()} == json.loads(body)


@given(st.binary(max_size=60))
def test_nothing_but_unreadable_is_raised(data: bytes) -> None:
    is_object(data)
    raw = Raw(data)
    assert isinstance(members(raw), dict)
    assert isinstance(items(raw), list)
    assert isinstance(text(raw), str | None)
    assert isinstance(integer(raw), int | None)
    assert isinstance(boolean(raw), bool | None)
    assert isinstance(source(raw), str | None)


# --- long strings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "written",
    [b"", b"plain", "\u00e9\u2028\U0001f30d".encode(), b"\\n\\u00e9", b'\\"', b"\\ud800", b"\xff", b"\xed\xa0\x80"],
    ids=repr,
)
def test_a_long_string_is_read_as_a_short_one(written: bytes) -> None:
    """It takes another way, which must lead to the same place (RFC 8259 section 7)."""
    filling = "x" * 2000
    short, long = (text(parse_object(b'{"a":"%b%b"}' % (some, written))["a"]) for some in (b"", filling.encode()))
    assert long == (None if short is None else filling + short)


@pytest.mark.parametrize(
    "data", [b"[" + b"1," * 1000 + b"1]", b'"' + b"x" * 2000, b"1" * 2000], ids=["list", "open", "number"]
)
def test_what_is_long_and_no_string(data: bytes) -> None:
    assert text(Raw(data)) is None
