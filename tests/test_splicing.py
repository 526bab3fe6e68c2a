"""Edits of JSON text: the bytes that are not edited stay, and the result means what was wanted.

Truth: RFC 8259; wire.md E (what a decode and re-encode would change); failures.md 5.
"""

import json
from typing import Any

import pytest
from hypothesis import given, strategies as st

from aibridge.wire.reading import Unreadable
from aibridge.wire.splicing import member_span, without_member


@pytest.mark.parametrize(
    ("body", "value"),
    [
        (b'{"x":1}', b"1"),
        (b'{"a":1,"x":[1, 2],"b":{}}', b"[1, 2]"),
        (b' \r\n{ "a" : {"x":0} ,\t"x"\n:\r"v" , "b":1 } ', b'"v"'),
        (b'{"x":1,"x":2}', b"2"),  # the last counts
        (b'{"\\u0078":1}', b"1"),
        (b'{"x":1e400,"a":1E400}', b"1e400"),
        (b'{"a":"\\u0000","x":"\\u0000"}', b'"\\u0000"'),
        (b'{"a":"\\ud800","x":"\\udfff"}', b'"\\udfff"'),
        (b'{"a":"\xff\xfe","x":"\xff"}', b'"\xff"'),
        ('{"é":"🌍","x":"ü"}'.encode(), '"ü"'.encode()),
        (b'{"a":NaN,"x":-Infinity}', b"-Infinity"),
        (b'{"a":"\x01\t\n","x":"\x00"}', b'"\x00"'),
        (b'{"a":%s,"x":1}' % (b"9" * 5000), b"1"),
        (b'{"a":"\\"x\\":2,","x":1}', b"1"),
        (b'{"a":%s,"x":1}' % (b"[" * 100 + b"]" * 100), b"1"),
        (b'{"x":null}', b"null"),
        (b'{"a":1}', None),
        (b"{}", None),
        (b"{ }", None),
        (b'{"X":1," x":1}', None),
    ],
)
def test_where_a_member_is(body: bytes, value: bytes | None) -> None:
    span = member_span(body, "x")
    assert (None if span is None else body[slice(*span)]) == value


NOT_OBJECTS = [
    b"",
    b" ",
    b"null",
    b"[]",
    b'"x"',
    b"{",
    b'{"x"',
    b'{"x":',
    b'{"x":1',
    b'{"x":1,',
    b'{"x" 1}',
    b'{"x":1 "y":1}',
]


@pytest.mark.parametrize("body", [*NOT_OBJECTS, b'\xef\xbb\xbf{"x":1}', b'{"a":%s}' % (b"[" * 100_000), b"{x:1}"])
def test_what_cannot_be_edited(body: bytes) -> None:
    with pytest.raises(Unreadable):
        member_span(body, "x")
    with pytest.raises(Unreadable):
        without_member(body, "x")


@pytest.mark.parametrize(
    ("body", "without"),
    [
        (b'{"x":1}', b"{}"),
        (b'{ "x" : 1 }', b"{ }"),
        (b'{"x":1,"a":2}', b'{"a":2}'),
        (b'{"a":1 , "x":1 , "b":2}', b'{"a":1 , "b":2}'),
        (b'{"a":1 , "x":1\n}', b'{"a":1 \n}'),
        (b'{"x":1,"x":2}', b"{}"),
        (b'{"x":1,"a":1,"x":2}', b'{"a":1}'),
        (b'{"a":1,"x":1,"x":2,"b":1}', b'{"a":1,"b":1}'),
        (b'{"a":{"x":1},"b":"x"}', b'{"a":{"x":1},"b":"x"}'),
        (b'{"\\u0078":1,"a":"\\"x\\":1"}', b'{"a":"\\"x\\":1"}'),
        (b"{}", b"{}"),
    ],
)
def test_taking_a_member_out(body: bytes, without: bytes) -> None:
    assert without_member(body, "x") == without


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("axé"), inner, max_size=3),
    max_leaves=6,
)
MEMBERS = st.lists(st.tuples(st.sampled_from(["a", "x", "é", ""]), VALUES), max_size=6)


@given(MEMBERS, st.sampled_from([" ", "\n\t", ""]), st.booleans())
def test_edits_mean_what_was_wanted(members: list[tuple[str, Any]], space: str, ascii_only: bool) -> None:
    """With repeated keys, odd spaces and anything for a value."""

    def written(chosen: list[tuple[str, Any]]) -> bytes:
        pairs = [
            f"{space}{json.dumps(name, ensure_ascii=ascii_only)}{space}:{space}{json.dumps(value, ensure_ascii=ascii_only)}"
            for name, value in chosen
        ]
        return ("{" + f"{space},".join(pairs) + space + "}").encode("utf-8", "surrogatepass")

    def read(text: bytes) -> list[tuple[str, str]]:
        pairs: list[tuple[str, Any]] = json.loads(text.decode("utf-8", "surrogatepass"), object_pairs_hook=list)
        return [(name, repr(value)) for name, value in pairs]

    body = written(members)
    assert read(without_member(body, "x")) == read(written([member for member in members if member[0] != "x"]))
    span = member_span(body, "x")
    values = [value for name, value in members if name == "x"]
    if span is None:
        assert values == []
    else:
        found = body[slice(*span)].decode("utf-8", "surrogatepass")
        assert found == json.dumps(values[-1], ensure_ascii=ascii_only)
