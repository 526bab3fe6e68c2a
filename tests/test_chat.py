"""OpenAI Chat Completions: what a request and a response say, and the one edit that the bridge makes.

Truth: wire.md B1 to B4, D1 to D3; failures.md 13. Whole exchanges are in ``tests/test_traffic_core.py``, the edited stream
in ``tests/test_conversation.py``, usage in ``tests/failures``.
"""

import json
from typing import Any

import pytest
from hypothesis import given, strategies as st

from aibridge.wire import CHAT, RequestFacts, Thought, ToolCall
from tests.support.coding import gzip
from tests.support.facts import Json, encode, of_body, of_stream


def facts(*messages: Any, **members: Any) -> RequestFacts:
    return CHAT.parse(encode({"model": "m", "messages": list(messages), **members})).facts


def said(role: str, content: Any, **members: Any) -> Json:
    return {"role": role, "content": content, **members}


IMAGE: Json = {"type": "image_url", "image_url": {"url": "https://example.test/a.png"}}
CALLED = said("assistant", None, tool_calls=[{"id": "call_1", "type": "function", "function": {"name": "f"}}])


# --- requests ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("messages", "prompt", "call_id"),
    [
        ([said("system", "x"), said("user", "Hi")], "Hi", None),
        ([said("user", [{"type": "text", "text": "Hi"}, IMAGE, {"type": "text", "text": "there"}])], "Hi\nthere", None),
        ([said("user", "Hi"), said("developer", "x"), said("system", "y")], "Hi", None),
        # continuations (wire.md D2)
        ([said("user", "Hi"), CALLED, said("tool", "ok", tool_call_id="call_1")], None, "call_1"),
        ([CALLED, said("tool", "ok", tool_call_id="call_1"), said("tool", "ok", tool_call_id="call_2")], None, "call_2"),
        ([said("user", "Hi"), said("function", "ok", name="f")], None, None),
        ([said("user", "Hi"), said("assistant", "Hello")], None, None),
        ([said("user", "Hi"), CALLED, said("tool", "ok", tool_call_id="call_1"), said("user", "And?")], "And?", None),
        ([said("tool", "ok", tool_call_id=None)], None, None),
        ([said("user", [IMAGE])], "", None),
        ([said("user", None)], "", None),
        ([], None, None),
        ([1, None, "user", said("x_new", "x")], None, None),
        (
            [said("user", [1, None, {"type": "text"}, {"type": "text", "text": 1}, {"type": "text", "text": "Hi"}])],
            "\n\nHi",
            None,
        ),
    ],
)
def test_prompt_and_continuation(messages: list[Any], prompt: str | None, call_id: str | None) -> None:
    found = facts(*messages)
    assert (found.prompt, found.correlating_tool_call_id) == (prompt, call_id)


def test_model_and_stream() -> None:
    assert facts(stream=True) == RequestFacts("m", stream=True)
    assert facts(stream=None, model=[]) == RequestFacts()


@pytest.mark.parametrize(
    ("body", "edited"),
    [
        (b'{"stream":true}', b'{"stream":true,"stream_options":{"include_usage":true}}'),
        (
            b' { "stream" : true ,\n "a":1e400 } \n',
            b' { "stream" : true ,\n "a":1e400 ,"stream_options":{"include_usage":true}} \n',
        ),
        (b'{"stream":true,"stream_options":null}', b'{"stream":true,"stream_options":{"include_usage":true}}'),
        (b'{"stream":true,"stream_options":{}}', b'{"stream":true,"stream_options":{"include_usage":true}}'),
        (b'{"stream":true,"stream_options":{ \n}}', b'{"stream":true,"stream_options":{"include_usage":true \n}}'),
        (
            b'{"stream_options":{ "x": 1.0 },"stream":true}',
            b'{"stream_options":{"include_usage":true, "x": 1.0 },"stream":true}',
        ),
        (
            b'{"stream_options":{"\xff":1},"stream":true}',
            b'{"stream_options":{"include_usage":true,"\xff":1},"stream":true}',
        ),
        (
            b'{"stream_options":{"include_usage":false },"stream":true}',
            b'{"stream_options":{"include_usage":true },"stream":true}',
        ),
        (
            b'{"stream_options":{"include_usage":null},"stream":true}',
            b'{"stream_options":{"include_usage":true},"stream":true}',
        ),
        # the last of repeated keys is the one that readers take
        (
            b'{"stream":true,"stream_options":{"include_usage":true},"stream_options":{}}',
            b'{"stream":true,"stream_options":{"include_usage":true},"stream_options":{"include_usage":true}}',
        ),
        (
            b'{"stream":true,"x":"\\ud800 \\u0000 \\"}"}',
            b'{"stream":true,"x":"\\ud800 \\u0000 \\"}","stream_options":{"include_usage":true}}',
        ),
        ('{"stream":true,"é":"ü"}'.encode(), '{"stream":true,"é":"ü","stream_options":{"include_usage":true}}'.encode()),
    ],
)
def test_asking_for_usage(body: bytes, edited: bytes) -> None:
    """One splice; every other byte stays (failures.md 5)."""
    request = CHAT.asking_for_usage(CHAT.parse(body))
    assert request.body == edited
    assert request.hides_usage
    assert CHAT.response_filter(request) is not None
    assert CHAT.asking_for_usage(request).body == edited


@pytest.mark.parametrize(
    "body",
    [
        b'{"stream":true,"stream_options":{"include_usage":true}}',
        b'{"stream":true,"stream_options":{"include_usage":false,"include_usage":true}}',
        b'{"stream":false}',  # only set when a stream is asked for
        b"{}",
        b'{"stream":true,"stream_options":[]}',  # for the provider to refuse
        b'{"stream":true,"stream_options":"x"}',
        b'\xef\xbb\xbf{"stream":true}',
    ],
)
def test_what_is_not_edited(body: bytes) -> None:
    request = CHAT.parse(body)
    assert CHAT.asking_for_usage(request) is request
    assert CHAT.response_filter(request) is None


def test_a_compressed_request_is_not_edited() -> None:
    request = CHAT.parse(gzip(b'{"stream":true}'), "gzip")
    assert request.facts.stream
    assert CHAT.asking_for_usage(request) is request


VALUES = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
OPTIONS = st.none() | st.dictionaries(st.sampled_from(["include_usage", "include_obfuscation", "é"]), VALUES, max_size=3)


@given(
    st.dictionaries(st.sampled_from(["a", "é", "messages"]), VALUES),
    st.just({}) | st.fixed_dictionaries({"stream_options": OPTIONS}),
)
def test_an_edited_request_says_what_it_said_before(document: Json, options: Json) -> None:
    members = document | {"stream": True} | options
    request = CHAT.asking_for_usage(CHAT.parse(json.dumps(members).encode()))
    wanted = (members.get("stream_options") or {}) | {"include_usage": True}
    assert json.loads(request.body) == members | {"stream_options": wanted}


# --- responses --------------------------------------------------------------------------------------------------------


def chunk(delta: Json, finish: str | None = None, index: Any = 0, **members: Any) -> Json:
    return {"id": "c_1", "model": "m-1", "choices": [{"index": index, "delta": delta, "finish_reason": finish}], **members}


def body(message: Json, **members: Any) -> Json:
    return {"id": "c_1", "model": "m-1", "choices": [{"index": 0, "message": message, "finish_reason": "stop"}], **members}


def call(index: int | None, call_id: Any = None, name: Any = None, arguments: Any = None) -> Json:
    place = {} if index is None else {"index": index}
    return {"tool_calls": [{**place, "id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}]}


DONE = b"[DONE]"


def test_an_envelope() -> None:
    opening = {"id": "", "model": "", "choices": [], "prompt_filter_results": []}  # Azure
    found = of_stream(CHAT, opening, chunk({"content": "Hi"}), chunk({}, "stop"), DONE)
    assert (found.response_id, found.model, found.stop_reason) == ("c_1", "m-1", "stop")
    assert (found.error, found.notes) == (None, ())
    assert of_body(CHAT, body({"content": "Hi"})).stop_reason == "stop"


def test_the_fragments_of_a_call() -> None:
    """Index is the key; id and name come once, their empty repetition says nothing (wire.md B2)."""
    found = of_stream(
        CHAT,
        chunk(call(0, "call_1", "f", "")),
        chunk(call(1, "call_2", "g", None)),
        chunk(call(0, "", "", '{"a"')),
        chunk(call(0, None, None, ": 1.0e2}")),
        chunk(call(0, "call_1", "f", "")),
        chunk({}, "tool_calls"),
        DONE,
    )
    assert found.tool_calls == (ToolCall("call_1", "f", '{"a": 1.0e2}'), ToolCall("call_2", "g", ""))


def test_calls_without_an_index() -> None:
    """In a body they never have one; in a chunk some servers leave it out. Then their place tells them apart."""
    calls = [{"id": f"call_{n}", "function": {"name": "f", "arguments": str(n)}} for n in (1, 2)]
    expected = (ToolCall("call_1", "f", "1"), ToolCall("call_2", "f", "2"))
    assert of_body(CHAT, body({"tool_calls": calls})).tool_calls == expected
    assert of_stream(CHAT, chunk({"tool_calls": calls}), chunk({}, "tool_calls"), DONE).tool_calls == expected


def test_custom_tools_and_the_legacy_function_call() -> None:
    custom = {"tool_calls": [{"index": 0, "id": "call_1", "type": "custom", "custom": {"name": "p", "input": "*** "}}]}
    found = of_stream(
        CHAT,
        chunk(custom),
        chunk({"tool_calls": [{"index": 0, "custom": {"input": "Begin"}}], "function_call": None}),
        chunk({"function_call": {"name": "f", "arguments": "{"}}),
        chunk({"function_call": {"arguments": "}"}}),
        chunk({}, "tool_calls"),
        DONE,
    )
    assert found.tool_calls == (ToolCall("call_1", "p", "*** Begin", {"type": "custom"}), ToolCall(None, "f", "{}"))


def test_choices_are_told_apart() -> None:
    found = of_stream(
        CHAT,
        chunk(call(0, "call_b", "f", "{}"), index=1),
        chunk(call(0, "call_a", "f", "{}")),
        chunk({"reasoning_content": "B"}, index=1),
        chunk({"reasoning_content": "A"}, index=None),
        chunk({}, "tool_calls", index=1),
        chunk({}, "tool_calls"),
        DONE,
    )
    assert [found_call.id for found_call in found.tool_calls] == ["call_a", "call_b"]
    assert [thought.content for thought in found.thoughts] == ["A", "B"]


@pytest.mark.parametrize(
    ("deltas", "thought"),
    [
        ([{"reasoning_content": "Let me "}, {"reasoning_content": "see."}], "Let me see."),
        ([{"reasoning": "Let me "}, {"reasoning": "see."}], "Let me see."),
        ([{"reasoning": "Hm.", "reasoning_content": "Hm."}], "Hm."),  # twice the same: not the sum (wire.md B3)
        ([{"reasoning": "Hm.", "reasoning_details": [{"type": "reasoning.text", "text": "Hm."}]}], "Hm."),
        (
            [{"reasoning_details": [{"type": "reasoning.summary", "summary": "In short"}, {"type": "reasoning.encrypted"}]}],
            "In short",
        ),
        ([{"reasoning_content": None, "reasoning": ""}], None),
        ([{"reasoning_content": 7, "reasoning_details": "x"}], None),
        ([{"content": "Hi"}], None),
    ],
)
def test_thoughts(deltas: list[Json], thought: str | None) -> None:
    expected = () if thought is None else (Thought("reasoning", thought),)
    assert of_stream(CHAT, *map(chunk, deltas), chunk({}, "stop"), DONE).thoughts == expected
    if len(deltas) == 1:
        assert of_body(CHAT, body(deltas[0])).thoughts == expected


def test_what_broke_off() -> None:
    """A thought is one all the same. A call is whole when another has followed, the last one never."""
    events = [
        chunk({"reasoning": "Let"}),
        chunk(call(0, "call_1", "f", "{}")),
        chunk(call(1, "call_2", "f", "{")),
        chunk({"function_call": {"name": "g"}}),
    ]
    found = of_stream(CHAT, *events, cut=True)
    assert [found_call.id for found_call in found.tool_calls] == ["call_1"]
    assert found.thoughts == (Thought("reasoning", "Let", {"incomplete": True}),)
    finished = of_stream(CHAT, *events, chunk({}, "tool_calls"), cut=True)
    assert [found_call.id for found_call in finished.tool_calls] == ["call_1", "call_2", None]
    assert finished.thoughts == (Thought("reasoning", "Let"),)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        ({"message": "No.", "type": "server_error", "param": None, "code": None}, "server_error: No."),
        ({"message": "No.", "type": None, "code": "overloaded"}, "overloaded: No."),
        ({"message": "No.", "code": 502}, "error: No."),  # OpenRouter
        ("No.", "error: No."),
        ({}, "error: "),
        (None, None),
        (False, None),
        ("", None),
    ],
)
def test_the_words_of_an_error(error: Any, words: str | None) -> None:
    """A truthy ``error`` raises in both SDKs, even beside choices (wire.md B2)."""
    found = of_stream(CHAT, chunk({"content": "Hi"}, error=error), DONE)
    assert (found.error, found.completeness) == (words, "partial" if words else "unknown")
    assert of_body(CHAT, {"error": error}, status=400).error == words


def test_a_call_in_a_stream_that_ended_with_an_error_is_not_counted_unless_its_choice_had_finished() -> None:
    assert of_stream(CHAT, chunk(call(0, "call_1", "f", "{")), {"error": "No."}, DONE).tool_calls == ()
    assert len(of_stream(CHAT, chunk(call(0, "c", "f", "{}"), "tool_calls"), {"error": "No."}, DONE).tool_calls) == 1


@pytest.mark.parametrize("event", [b" [DONE] ", b"[DONE]"])
def test_done(event: bytes) -> None:
    reader = CHAT.reader()
    reader.read_event(event)
    assert reader.finished


@pytest.mark.parametrize(
    "event",
    [
        {},
        {"choices": None},
        {"choices": [1, None, {}]},
        {"choices": {}},
        {"usage": None},
        {"usage": 7},
        {"usage": {}},
        chunk({"tool_calls": [1, None, {}, {"function": 1}, {"custom": None}]}, index=9),
        {"object": "keepalive"},
    ],
)
def test_nonsense_is_passed_over(event: Json) -> None:
    found = of_stream(CHAT, event, chunk(call(0, "call_1", "f", "{}")), event, chunk({}, "stop"), event, DONE)
    assert (found.response_id, found.tool_calls[0].id, found.notes) == ("c_1", "call_1", ())


def test_a_key_may_be_spelt_with_escapes() -> None:
    body = rb'{"stream":true,"stream\u005foptions":{"a":1}}'
    edited = CHAT.asking_for_usage(CHAT.parse(body))
    assert edited.body == rb'{"stream":true,"stream\u005foptions":{"include_usage":true,"a":1}}'
    assert edited.hides_usage
