"""Edits of JSON text: the bytes that are not edited stay, and the result means what was wanted.

Truth: RFC 8259; wire.md E (what a decode and re-encode would change); failures.md 5.
"""

import json
from typing import Any

import pytest
from hypothesis import given, strategies as st

from aibridge.wire import splicing
from aibridge.wire.reading import Unreadable
from aibridge.wire.splicing import (
    edited,
    element_spans,
    member_span,
    separator,
    with_elements,
    with_member,
    without_member,
    written_members,
)


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


# ---- arrays, and what is added ----


@pytest.mark.parametrize(
    ("array", "elements"),
    [
        (b"[]", []),
        (b" [ ] ", []),
        (b"[1]", [b"1"]),
        (b'[ {"a":1} ,\r\n[1, 2 ],"x,]" , 1.0E5]', [b'{"a":1}', b"[1, 2 ]", b'"x,]"', b"1.0E5"]),
        (b'["\\ud800","\\ud83d\\ude00",{"b":"\\udfff"}]', [b'"\\ud800"', b'"\\ud83d\\ude00"', b'{"b":"\\udfff"}']),
        ('["é", "🌍"]'.encode(), ['"é"'.encode(), '"🌍"'.encode()]),
    ],
)
def test_the_elements_of_an_array(array: bytes, elements: list[bytes]) -> None:
    assert [array[start:end] for start, end in element_spans(array)] == elements
    assert with_elements(array, []) == array
    added = with_elements(array, [b"7", b"8"], b", ")
    assert [added[start:end] for start, end in element_spans(added)] == [*elements, b"7", b"8"]
    assert added.startswith(array.rstrip()[:-1])


@pytest.mark.parametrize("text", [b"", b"{}", b"1", b"[", b"[1", b"[1 2]", b"[1,]", b"null", b"[]x"])
def test_what_is_no_array(text: bytes) -> None:
    with pytest.raises(Unreadable):
        element_spans(text)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@given(st.lists(json_values, max_size=5), st.lists(json_values, max_size=3), st.sampled_from([(",", ":"), (", ", ": ")]))
def test_an_array_with_more_elements_means_both_lists(old: list[Any], new: list[Any], separators: tuple[str, str]) -> None:
    array = json.dumps(old, separators=separators).encode()
    added = with_elements(array, [json.dumps(one).encode() for one in new], separators[0].encode())
    assert json.loads(added) == old + new


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"{}", b'{"x":7}'),
        (b" { } ", b' { "x":7} '),
        (b'{"a":1}', b'{"a":1,"x":7}'),
        (b'{"a": 1, "b": 2}', b'{"a": 1, "b": 2, "x":7}'),
        (b'{"x":1,"a":2}', b'{"x":7,"a":2}'),
        (b'{"x":1,"x":2}', b'{"x":1,"x":7}'),
    ],
)
def test_a_member_is_set_in_its_place_or_at_the_end(body: bytes, expected: bytes) -> None:
    assert with_member(body, "x", b"7") == expected


def test_several_edits() -> None:
    assert edited(b"0123456789", [(8, 9, b"-"), (1, 3, b"ab"), (3, 3, b"c"), (3, 3, b"d")]) == b"0abcd34567-9"
    assert edited(b"abc", []) == b"abc"


@pytest.mark.parametrize(
    ("body", "expected"),
    [(b"{}", b","), (b'{"a":1}', b","), (b'{"a":1,"b":2}', b","), (b'{"a": 1, "b": 2}', b", "), (b'{"a":1,\n "b":2}', b",")],
)
def test_what_a_writer_puts_between_members(body: bytes, expected: bytes) -> None:
    assert separator(body) == expected


# ---- two ways to the same places ----


@given(json_values, st.sampled_from([(",", ":"), (", ", ": "), (" ,\n", " :\t")]), st.sampled_from(["", " ", "\r\n"]))
def test_both_ways_to_find_members_find_the_same(value: Any, separators: tuple[str, str], around: str) -> None:
    body = (around + json.dumps({"a": value, "e": value, "z": [value]}, separators=separators) + around).encode()
    assert splicing._measured(body) == splicing._scanned(body) != []


@pytest.mark.parametrize(
    "body",
    [
        b'{"x":{"p":1,"y":2},"x":123456,"y":2}',  # the length of the last value leads into the first one
        b'{"x":1,"x":2}',
        b'{"x":"\x01"}',
        b'{"a":1}x',
        b'{"a":1',
        b'[{"a":1}]',
        b"",
    ],
)
def test_what_cannot_be_measured_is_scanned(body: bytes) -> None:
    assert splicing._measured(body) == []


@given(st.lists(st.tuples(st.sampled_from(["a", "b"]), json_values), max_size=5))
def test_repeated_keys_mislead_nobody(pairs: list[tuple[str, Any]]) -> None:
    body = ("{" + ",".join(f"{json.dumps(key)}:{json.dumps(value)}" for key, value in pairs) + "}").encode()
    assert splicing._measured(body) in ([], splicing._scanned(body))


# ---- members as they were written ----


@pytest.mark.parametrize(
    ("body", "members"),
    [
        (b'{"a":1e400,"b":"\\ud83d"}', {"a": b"1e400", "b": b'"\\ud83d"'}),
        (b'{"a": [1, 2] ,"a":{}}', {"a": b"{}"}),
        (b"{}", {}),
    ],
)
def test_members_are_read_as_they_were_written(body: bytes, members: dict[str, bytes]) -> None:
    assert {name: bytes(raw) for name, raw in written_members(body).items()} == members


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b'{"a":}', b'{"\xff":1', b"{" * 100_000])
def test_what_has_no_members_is_refused(body: bytes) -> None:
    with pytest.raises(Unreadable):
        written_members(body)


def test_a_name_that_is_no_text_harms_nobody() -> None:
    assert len(written_members(b'{"\xff":1}')) == 1
