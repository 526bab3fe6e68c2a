"""Several Chat Completions responses as one: what the client gets of them, and what the next request gets.

Truth: wire.md B2 to B4, D5, E; clients.md 4; the OpenAI SDK's stream helper, which accumulates what we relay. The JavaScript
SDK reads the same streams through the whole gateway elsewhere.
"""

import json
import random
from collections.abc import Iterable
from typing import Any

import openai
import pytest
from hypothesis import given, settings, strategies as st

from aibridge.wire.reading import Unreadable
from aibridge.wire.sse import SseDecoder
from tests.support.turns_chat import (
    DONE,
    Cut,
    Json,
    accumulated,
    at_once,
    by_byte,
    call,
    called,
    chunk,
    event,
    hear,
    merged,
    merged_bodies,
    merger,
    names,
    parsed,
    spoken,
    texts,
    usage,
    whole,
)


def at_random(stream: bytes) -> Iterable[bytes]:
    chance = random.Random(len(stream))
    while stream:
        size = chance.randint(1, 90)
        yield stream[:size]
        stream = stream[size:]


CUTS: list[Cut] = [at_once, by_byte, at_random]

TIME = call(0, "call_t1mEzO7q", "bmcp_s_time", '{"zone": "Europe/Paris"}')
TIME_TOO = call(1, "call_time_2", "bmcp_s_time", '{"zone": "\\u00e9"}')
SHELL = call(0, "call_sh3LlQ7xA", "shell", '{"cmd": "ls"}')
SHELL_LAST = call(2, "call_sh3LlQ7xA", "shell", '{"cmd": "ls"}')
ERROR: Json = {"error": {"message": "Overloaded", "type": "server_error", "param": None, "code": None}}


def chunks(stream: bytes) -> list[Any]:
    datas = [frame.data for frame in SseDecoder().feed(stream)]
    return [json.loads(data) for data in datas if data is not None and data != b"[DONE]"]


def turn_of(stream: bytes, **members: Any) -> Any:
    merging = merger(**members)
    hear(merging, stream)
    return merging.turn()


def message_of(*deltas: Json | bytes) -> Any:
    """The message that was put together from deltas, decoded."""
    turn = turn_of(b"".join(chunk(delta) if isinstance(delta, dict) else event(delta) for delta in deltas))
    return json.loads(turn.pieces[0].raw)


# --- nothing hidden ---------------------------------------------------------------------------------------------------


AS_IT_WAS = {
    "text": spoken("Hel", "lo"),
    "the client's calls": spoken("Hm.", calls=[SHELL]),
    "no done": spoken("Hello").removesuffix(DONE),
    "no end at all": chunk({"content": "Hello"}),
    "comments": b": a\n\n" + spoken("Hello") + b": b\n\n",
    "crlf": spoken("Hello").replace(b"\n", b"\r\n"),
    "azure": chunk(None, id="chatcmpl-0", prompt_filter_results=[]) + spoken("Hi") + chunk(None, moderation={}),
    "text at the end": chunk({"role": "assistant", "content": "Hi"}, "stop", usage=usage(1, 1)) + DONE,
    "more after the end": chunk({"content": "Hi"}, "stop") + chunk({"content": "!"}) + b": a\n\n" + DONE,
    "usage first": chunk(None, usage=usage(1, 0)) + spoken("Hi"),
    "an error": chunk({"content": "Hi"}) + event(ERROR),
    "an error in a chunk": chunk({"content": "Hi"}, "error", **ERROR) + DONE,
    "no json": b"data: {\n\ndata:\n\n" + spoken("Hi") + b"data: []\n\n",
    "not a chunk": event({"choices": None}) + event({"choices": [1]}) + event({"choices": [{"index": 1}]}) + event({}),
    "no index": event({"choices": [{"delta": {"tool_calls": [{"id": "a", "function": {"name": "shell"}}]}}]}),
    "a custom call": chunk({"tool_calls": [{"index": 0, "id": "a", "type": "custom", "custom": {"name": "c"}}]}),
    "a call of a new type": chunk({"tool_calls": [{"index": 0, "id": "a", "type": "new"}]}),
    "calls from 1": spoken(calls=[call(1, "call_1", "shell")]),
    "repeated roles": chunk({"role": "assistant"}) + chunk({"role": "assistant", "content": "x"}),
    "late name": chunk({"tool_calls": [{"index": 0, "id": "call_1", "function": {"arguments": "{"}}]})
    + b": a\n\n"
    + chunk({"tool_calls": [{"index": 0, "function": {"name": "shell", "arguments": "}"}}]}, "tool_calls"),
    "no name": chunk({"content": "x"})
    + chunk({"tool_calls": [{"index": 0, "function": {"arguments": "{}"}}]})
    + chunk({}, "tool_calls")
    + DONE,
    "surrogates": event(b'{"choices":[{"index":0,"delta":{"content":"\\ud83d"}}],"x":1e400}'),
}


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("stream", AS_IT_WAS.values(), ids=AS_IT_WAS.keys())
def test_one_response_with_nothing_hidden_is_not_changed(stream: bytes, cut: Cut) -> None:
    """Promise 1 of the design, with tools injected and not called."""
    assert merged(stream, cut=cut) == stream


def test_it_is_live_until_what_ends_it() -> None:
    merging = merger()
    assert (
        hear(merging, b": a\n\n" + spoken("Hel", "lo")) == b": a\n\n" + spoken("Hel", "lo").partition(chunk({}, "stop"))[0]
    )


def test_an_oversized_frame_passes() -> None:
    merging = merger()
    merging.begin()
    frames = SseDecoder(max_event_bytes=20).feed(spoken("Hello"))
    assert b"".join(map(merging.read_event, frames)) + merging.finish() == spoken("Hello")


@pytest.mark.parametrize("cut", CUTS)
def test_usage_that_the_bridge_asked_for_is_hidden(cut: Cut) -> None:
    """failures.md 13, as `aibridge.wire.chat.UsageFilter` does it where nothing is injected."""
    shown = merged(spoken("Hi"), cut=cut, hides_usage=True)
    assert b'"usage"' not in shown
    assert shown.endswith(DONE)
    assert texts(accumulated(shown)) == "Hi"
    beside = chunk({}, "stop", usage=usage(1, 1))
    assert merged(beside, hides_usage=True) == beside
    assert merged(event(ERROR | {"usage": None}), hides_usage=True) == event(ERROR | {"usage": None})


# --- through the SDK --------------------------------------------------------------------------------------------------


def streams_of_three_hops() -> list[bytes]:
    return [
        spoken("One. ", calls=[TIME, TIME_TOO], reasoning_content="First "),
        spoken("Two. ", calls=[call(0, "call_look", "bmcp_s_look")], hop=2, reasoning_content="second"),
        spoken("Three.", hop=3),
    ]


@pytest.mark.parametrize("cut", CUTS)
def test_three_hops_are_one_response(cut: Cut) -> None:
    stream = merged(*streams_of_three_hops(), cut=cut)
    completion = accumulated(stream)
    assert texts(completion) == "One. Two. Three."
    assert names(completion) == []
    assert completion.choices[0].finish_reason == "stop"
    assert completion.usage is not None and completion.usage.to_dict() == usage(60, 6)
    assert completion.choices[0].message.to_dict()["reasoning_content"] == "First second"
    assert b"bmcp" not in stream and b"call_" not in stream and b"Paris" not in stream
    found = chunks(stream)
    assert {(chunk["id"], chunk["created"], chunk["model"]) for chunk in found} == {("chatcmpl-1", 1, "m-1")}
    assert [chunk["choices"][0]["delta"]["role"] for chunk in found if "role" in str(chunk)] == ["assistant"]
    assert [chunk["choices"][0]["finish_reason"] for chunk in found if chunk["choices"]][-2:] == [None, "stop"]
    assert stream.count(b"[DONE]") == 1 and stream.endswith(DONE)


def test_the_usage_of_the_last_hop() -> None:
    completion = accumulated(merged(*streams_of_three_hops(), policy="last"))
    assert completion.usage is not None and completion.usage.to_dict() == usage(30, 6)


def test_hidden_usage_stays_hidden_over_hops() -> None:
    assert b'"usage"' not in merged(*streams_of_three_hops(), hides_usage=True)


@pytest.mark.parametrize("cut", CUTS)
def test_a_mixed_turn_shows_the_clients_calls_only(cut: Cut) -> None:
    """A tool index that starts at 1 crashes both SDKs (wire.md B2)."""
    stream = merged(spoken("Hm.", calls=[TIME, TIME_TOO, SHELL_LAST, call(3, "call_4", "shell")]), cut=cut)
    completion = accumulated(stream)
    assert names(completion) == ["shell", "shell"]
    assert completion.choices[0].finish_reason == "tool_calls"
    calls = completion.choices[0].message.tool_calls or []
    assert [entry.id for entry in calls] == ["call_sh3LlQ7xA", "call_4"]
    assert b"bmcp" not in stream


@pytest.mark.parametrize("cut", CUTS)
def test_an_error_in_the_second_hop_reaches_the_client(cut: Cut) -> None:
    stream = merged(spoken("One.", calls=[TIME]), chunk({"content": "T"}, id="chatcmpl-2") + event(ERROR), cut=cut)
    assert b'"One."' in stream and b'"T"' in stream
    with pytest.raises(openai.APIError, match="Overloaded"):
        accumulated(stream)


def test_a_failed_response_has_no_calls() -> None:
    failed = chunk({"tool_calls": TIME}) + chunk({"content": "x"}, "error", **ERROR) + DONE
    assert turn_of(failed).calls == ()
    assert b"bmcp" not in merged(failed) and merged(failed).endswith(DONE)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "The gateway says so."),
        (b"<html>", "The gateway says so."),
        (b'{"error":null}', "The gateway says so."),
        (json.dumps(ERROR, indent=1).encode(), "Overloaded"),
    ],
)
def test_an_error_of_the_bridge_ends_the_stream(body: bytes, message: str) -> None:
    merging = merger()
    relayed = hear(merging, spoken("One.", calls=[TIME]))
    with pytest.raises(openai.APIError, match=message):
        accumulated(relayed + merging.keep_alive + merging.error_event(502, "The gateway says so.", body))


def test_keep_alives_say_nothing() -> None:
    merging = merger()
    stream = hear(merging, spoken("One.", calls=[TIME])) + merging.keep_alive + hear(merging, spoken("Two.", hop=2))
    assert texts(accumulated(stream + merging.finish())) == "One.Two."


# --- what ends a response ---------------------------------------------------------------------------------------------


def test_what_comes_with_the_end_is_not_lost() -> None:
    """Gemini and Ollama send text, a whole call and the finish reason in one chunk."""
    one = chunk({"role": "assistant", "content": "One.", "tool_calls": [TIME[0]]}, "tool_calls", usage=usage(1, 1)) + DONE
    merging = merger()
    assert chunks(hear(merging, one))[0]["choices"][0] == {
        "index": 0,
        "delta": {"role": "assistant", "content": "One."},
        "logprobs": None,
        "finish_reason": None,
    }
    assert [entry.id for entry in merging.turn().calls] == ["call_t1mEzO7q"]
    completion = accumulated(merged(one, spoken("Two.", hop=2)))
    assert texts(completion) == "One.Two."
    assert completion.usage is not None and completion.usage.to_dict() == usage(21, 3)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
def test_calls_that_nobody_ran_do_not_end_it(cut: Cut, newline: bytes) -> None:
    stream = merged(spoken("One.", calls=[TIME]).replace(b"\n", newline), cut=cut)
    assert accumulated(stream).choices[0].finish_reason == "stop"
    assert stream == merged(spoken("One.", calls=[TIME]).replace(b"\n", newline))


@pytest.mark.parametrize("reason", ["length", "content_filter"])
def test_a_response_that_was_cut_short_has_no_calls(reason: str) -> None:
    stream = spoken("One.", calls=[TIME], finish=reason)
    assert turn_of(stream).calls == ()
    assert not turn_of(stream).awaits_client
    assert chunks(merged(stream))[-2]["choices"][0]["finish_reason"] == reason


def test_calls_run_where_no_reason_is_given() -> None:
    stream = b"".join(chunk({"tool_calls": [fragment]}) for fragment in TIME) + DONE
    assert [entry.arguments for entry in turn_of(stream).calls] == ['{"zone": "Europe/Paris"}']
    assert merged(stream) == DONE


def test_what_follows_a_hidden_call_is_not_held() -> None:
    merging = merger()
    assert hear(merging, spoken(calls=[TIME]) + b": a\n\n" + chunk(None, moderation={})).endswith(
        b": a\n\n" + chunk(None, moderation={})
    )


def test_usage_on_every_chunk_grows_over_hops() -> None:
    """vLLM's continuous usage: a running total (wire.md B2)."""
    second = chunk({"role": "assistant", "content": ""}, id="chatcmpl-2", usage=usage(20, 0)) + chunk(
        {"content": "Two."}, "stop", id="chatcmpl-2", usage=usage(20, 2)
    )
    found = chunks(merged(spoken("One.", calls=[TIME]), second))
    assert [chunk["usage"] for chunk in found if chunk.get("usage")] == [usage(30, 1), usage(30, 3)]


# --- calls ------------------------------------------------------------------------------------------------------------


def test_two_calls_of_one_tool() -> None:
    calls = turn_of(spoken(calls=[TIME, TIME_TOO])).calls
    assert [(entry.id, entry.tool.tool, entry.arguments, entry.refusal) for entry in calls] == [
        ("call_t1mEzO7q", "time", '{"zone": "Europe/Paris"}', None),
        ("call_time_2", "time", '{"zone": "\\u00e9"}', None),
    ]


@pytest.mark.parametrize(
    ("arguments", "read", "refused"),
    [
        ("", "{}", False),
        (" ", "{}", False),
        ('{"a": 1e400}', '{"a": 1e400}', False),
        ('{"a": ', '{"a": ', True),
        ("[]", "[]", True),
        ("null", "null", True),
        ('{"a": \\x}', '{"a": \\x}', True),
    ],
)
def test_arguments(arguments: str, read: str, refused: bool) -> None:
    (found,) = turn_of(spoken(calls=[call(0, "call_1", "bmcp_s_time", arguments)])).calls
    assert (found.arguments, found.refusal is not None) == (read, refused)


@pytest.mark.parametrize(("arguments", "read"), [({"a": 1.0}, '{"a": 1.0}'), (None, "{}")])
def test_arguments_of_odd_servers(arguments: Any, read: str) -> None:
    merging = merger()
    merging.begin()
    function = {"name": "bmcp_s_time", "arguments": arguments}
    merging.read_body(whole({"content": None, "tool_calls": [{"function": function}]}, "tool_calls"))
    (found,) = merging.turn().calls
    assert (found.id, found.arguments) == ("", read)


@pytest.mark.parametrize("cut", CUTS)
def test_a_name_that_comes_late(cut: Cut) -> None:
    late = [
        {"index": 0, "id": "call_1", "type": "function", "function": {"arguments": ""}},
        {"index": 0, "function": {"name": "", "arguments": '{"a"'}},
        {"index": 0, "function": {"name": "bmcp_s_time", "arguments": ":1}"}},
    ]
    stream = spoken("One.", calls=[late])
    assert [(entry.tool.tool, entry.arguments) for entry in turn_of(stream).calls] == [("time", '{"a":1}')]
    assert b"call_1" not in merged(stream, cut=cut)


@pytest.mark.parametrize("index", [{"index": 0}, {}])
def test_servers_that_do_not_number_calls(index: Json) -> None:
    first, second = (
        index | {"id": f"call_{number}", "type": "function", "function": {"name": "bmcp_s_time", "arguments": "{}"}}
        for number in (1, 2)
    )
    turn = turn_of(spoken(calls=[[first], [second]]))
    assert [entry.id for entry in turn.calls] == ["call_1", "call_2"]
    if not index:
        chunk_of_both = chunk({"tool_calls": [first, second]}, "tool_calls")
        assert [entry.id for entry in turn_of(chunk_of_both).calls] == ["call_1", "call_2"]


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("id_", ["", "call_1"])
def test_servers_that_give_every_call_one_index_and_one_id(id_: str, cut: Cut) -> None:
    """Compatible servers: whole calls, told apart by nothing else. Ids may be empty or repeated (wire.md D3)."""
    whole_calls = [
        [{"index": 0, "id": id_, "type": "function", "function": {"name": name, "arguments": arguments}}]
        for name, arguments in (("bmcp_s_time", '{"a":1}'), ("bmcp_s_time", '{"a":2}'), ("shell", " {}\n"), ("shell", "{}"))
    ]
    stream = spoken(calls=whole_calls)
    assert [entry.arguments for entry in turn_of(stream).calls] == ['{"a":1}', '{"a":2}']
    completion = accumulated(merged(stream, cut=cut))
    functions = [entry.function for entry in completion.choices[0].message.tool_calls or [] if entry.type == "function"]
    assert [(own.name, own.arguments) for own in functions] == [("shell", " {}\n"), ("shell", "{}")]


@pytest.mark.parametrize("id_", ["", "call_1"])
@pytest.mark.parametrize("last", ["", " "])
def test_servers_that_repeat_a_name_in_every_fragment(id_: str, last: str) -> None:
    """Braces in a string, and a last fragment that adds nothing, begin no other call."""
    pieces = ['{"a":"', "{}", "{}", '}"', "}", last]
    function = {"name": "bmcp_s_time"}
    fragments = [{"index": 0, "id": id_, "function": function | {"arguments": piece}} for piece in pieces]
    (found,) = turn_of(spoken(calls=[fragments])).calls
    assert json.loads(found.arguments) == {"a": "{}{}}"}


def test_repeated_ids_and_names_are_one_call() -> None:
    again = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "bmcp_s_time", "arguments": "{"}}
    end = {"index": 0, "id": "", "type": "", "function": {"name": "", "arguments": "}"}}
    turn = turn_of(spoken(calls=[[again, end]]))
    assert [entry.id for entry in turn.calls] == ["call_1"]
    assert json.loads(turn.pieces[0].raw)["tool_calls"] == [called("call_1", "bmcp_s_time")]


# --- the message that the next request repeats ------------------------------------------------------------------------


def test_the_message_is_put_together() -> None:
    """wire.md B3, D4: reasoning comes back as it was received, whatever the dialect."""
    thought = {"type": "reasoning.text", "text": "Let ", "index": 0, "format": "x"}
    message = message_of(
        {"role": "assistant", "content": "", "refusal": None, "reasoning": "Let "},
        {"reasoning_details": [thought], "reasoning": "me."},
        {"reasoning_details": [{"type": "reasoning.text", "text": "me.", "signature": "S", "index": 0}]},
        {"reasoning_details": [{"type": "reasoning.encrypted", "data": "E", "index": 1}, {"text": "no index"}]},
        {"content": "Hi", "x_list": [1], "x_number": 1.0},
        {"content": "!", "x_list": [2.0], "x_number": 2.0, "tool_calls": TIME},
        b'{"choices":[{"delta":{"content":"\\ud83d"}}]}',
        b'{"choices":[{"delta":{"content":"\\ude00"}}]}',
    )
    assert list(message) == ["role", "content", "tool_calls", "reasoning_details", "reasoning", "x_list", "x_number"]
    assert message == {
        "role": "assistant",
        "content": "Hi!😀",
        "tool_calls": [called("call_t1mEzO7q", "bmcp_s_time", '{"zone": "Europe/Paris"}')],
        "reasoning_details": [
            thought | {"text": "Let me.", "signature": "S"},
            {"type": "reasoning.encrypted", "data": "E", "index": 1},
            {"text": "no index"},
        ],
        "reasoning": "Let me.",
        "x_list": [1, 2.0],
        "x_number": 2.0,
    }


def test_a_message_without_text() -> None:
    assert message_of({"tool_calls": TIME})["content"] is None
    extra = {"google": {"thought_signature": "S"}}
    first = TIME[0] | {"extra_content": extra}
    assert message_of({"tool_calls": [first, *TIME[1:]]})["tool_calls"][0]["extra_content"] == extra


@given(st.lists(st.text(), min_size=1), st.lists(st.text(), min_size=1), st.booleans())
@settings(deadline=None)
def test_fragments_are_joined(words: list[str], arguments: list[str], ascii_only: bool) -> None:
    """The decoded whole is the whole of the decoded. Surrogates are not drawn here: the pair above is one."""
    fragments = [{"index": 0, "function": {"arguments": piece}} for piece in arguments]
    deltas: list[Json] = [{"content": word} for word in words]
    deltas += [{"tool_calls": [TIME[0]]}, *({"tool_calls": [fragment]} for fragment in fragments)]
    stream = b"".join(
        event(json.dumps({"choices": [{"index": 0, "delta": delta}]}, ensure_ascii=ascii_only).encode()) for delta in deltas
    )
    message = json.loads(turn_of(stream).pieces[0].raw)
    assert message["content"] == "".join(words)
    assert message["tool_calls"][0]["function"]["arguments"] == "".join(arguments)


@given(st.data())
@settings(deadline=None, max_examples=50)
def test_cuts_make_no_difference(data: st.DataObject) -> None:
    stream = streams_of_three_hops()[0]
    places = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=20)))
    cut = [stream[start:end] for start, end in zip([0, *places], [*places, len(stream)], strict=True)]
    assert merged(stream, cut=lambda _: cut) == merged(stream)


def test_reasoning_details_are_numbered_on() -> None:
    """The SDK glues entries with the same number together (wire.md D5)."""
    detail = [{"index": 0, "type": "reasoning.text", "text": "a"}]
    second = spoken("Two.", hop=2, reasoning_details=[*detail, {"text": "b"}])
    found = chunks(merged(spoken("One.", calls=[TIME], reasoning_details=detail), second))
    shown = [
        entry for chunk in found for choice in chunk["choices"] for entry in choice["delta"].get("reasoning_details", [])
    ]
    assert shown == [*detail, detail[0] | {"index": 1}, {"text": "b"}]


# --- bodies -----------------------------------------------------------------------------------------------------------


def test_one_body_with_nothing_hidden_is_not_changed() -> None:
    for body in (
        b' {"x":1e400}',
        b'{"choices":[]}',
        whole({"content": "Hi", "tool_calls": [called("c", "shell")]}, "tool_calls"),
    ):
        assert merged_bodies(body) == body


def test_three_bodies_are_one() -> None:
    body = merged_bodies(
        whole({"content": "One. ", "reasoning": "a", "tool_calls": [called("call_1", "bmcp_s_time")]}, "tool_calls"),
        whole({"content": None, "x": [1.0], "tool_calls": [called("call_2", "bmcp_s_time")]}, "tool_calls", 2),
        whole({"content": "Three.", "reasoning": "b", "x": [2], "refusal": None}, "stop", 3),
    )
    completion = parsed(body)
    assert (completion.id, completion.created, completion.model) == ("chatcmpl-1", 1, "m-1")
    assert completion.choices[0].finish_reason == "stop"
    assert completion.usage is not None and completion.usage.to_dict() == usage(60, 6)
    message = json.loads(body)["choices"][0]["message"]
    assert message == {"role": "assistant", "content": "One. Three.", "reasoning": "ab", "x": [1.0, 2], "refusal": None}
    assert b"1.0" in body and b"bmcp" not in body


def test_a_mixed_body() -> None:
    ours, theirs = called("call_1", "bmcp_s_time"), called("call_2", "shell")
    body = whole({"content": None, "tool_calls": [ours, theirs]}, "tool_calls")
    completion = parsed(merged_bodies(body))
    assert names(completion) == ["shell"]
    assert completion.choices[0].finish_reason == "tool_calls"


def test_a_body_whose_calls_nobody_ran() -> None:
    completion = parsed(
        merged_bodies(whole({"content": "Hm.", "tool_calls": [called("call_1", "bmcp_s_time")]}, "tool_calls"))
    )
    assert (texts(completion), names(completion), completion.choices[0].finish_reason) == ("Hm.", [], "stop")


def test_a_message_in_a_body_is_a_piece_as_it_is() -> None:
    calls = b'[{"id":"a","function":\n{"name":"bmcp_s_time"}}]'
    message = b'{ "role":"assistant" ,"content":"\\ud800\\/", "x":1e400,"x":2, "tool_calls":%b}' % calls
    merging = merger()
    merging.begin()
    merging.read_body(b'{"id":"chatcmpl-1","choices":[{"message": %b}]}' % message)
    turn = merging.turn()
    assert [piece.raw for piece in turn.pieces] == [message]
    assert (turn.response_id, turn.calls[0].arguments) == ("chatcmpl-1", "{}")


def test_a_body_without_a_message() -> None:
    merging = merger()
    merging.begin()
    merging.read_body(whole({"content": "One.", "tool_calls": [called("call_1", "bmcp_s_time")]}, "tool_calls"))
    merging.begin()
    merging.read_body(json.dumps(ERROR).encode())
    assert merging.turn().pieces == ()
    assert json.loads(merging.finish())["error"] == ERROR["error"]


@pytest.mark.parametrize("body", [b"", b"[]", b"<html>"])
def test_what_is_no_object_is_unreadable(body: bytes) -> None:
    merging = merger()
    merging.begin()
    with pytest.raises(Unreadable):
        merging.read_body(body)


# --- anything ---------------------------------------------------------------------------------------------------------

MEMBERS = ["index", "delta", "message", "tool_calls", "function", "name", "id", "type", "custom", "arguments", "content"]
MEMBERS += ["role", "finish_reason", "usage", "choices", "error", "model", "reasoning_details", "text"]
LEAVES = st.sampled_from([None, True, 0, 1, 2, -1, 1.5, "", "a", "bmcp_s_time", "function", "custom", "stop", "tool_calls"])
JSON = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(MEMBERS), inner, max_size=5),
    max_leaves=12,
)
CALLS = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "index": st.integers(0, 2) | st.none(),
            "id": st.sampled_from(["", "call_1", "call_2"]),
            "type": st.sampled_from(["function", "", None, "custom"]),
            "function": st.fixed_dictionaries(
                {},
                optional={
                    "name": st.sampled_from(["", "bmcp_s_time", "shell"]),
                    "arguments": st.sampled_from(["", "{}", "{"]) | JSON,
                },
            ),
        },
    ),
    max_size=3,
)
DELTAS = st.fixed_dictionaries(
    {}, optional={"role": JSON, "content": JSON, "tool_calls": CALLS | JSON, "reasoning_details": JSON}
)
CHOICES = st.lists(
    st.fixed_dictionaries(
        {}, optional={"index": st.integers(0, 1), "delta": DELTAS, "message": DELTAS, "finish_reason": LEAVES}
    ),
    max_size=2,
)
CHUNKS = st.fixed_dictionaries({}, optional={"id": LEAVES, "choices": CHOICES | JSON, "usage": JSON, "error": JSON}) | JSON


@given(st.lists(st.lists(CHUNKS, max_size=5), max_size=3), st.booleans())
@settings(deadline=None, max_examples=100)
def test_no_stream_raises_anything_else(hops: list[list[Any]], hides_usage: bool) -> None:
    merging = merger(hides_usage=hides_usage)
    for hop in hops:
        merging.begin()
        for data in hop:
            try:
                merging.read_event(SseDecoder().feed(event(json.dumps(data).encode()))[0])
            except Unreadable:
                continue
        merging.turn()
    merging.finish()


@given(st.lists(CHUNKS.filter(lambda body: isinstance(body, dict)), min_size=1, max_size=3))
@settings(deadline=None, max_examples=100)
def test_no_body_raises_anything_else(bodies: list[Any]) -> None:
    merging = merger()
    for body in bodies:
        merging.begin()
        try:
            merging.read_body(json.dumps(body).encode())
        except Unreadable:
            return
        merging.turn()
    json.loads(merging.finish())


@given(st.lists(st.sampled_from(["time", "shell", "look"]), max_size=5), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=100)
def test_calls_of_any_order_are_told_apart(called_tools: list[str], chance: random.Random) -> None:
    """Fragments of several calls interleave; each comes in its own order. Nothing of ours is in the stream."""
    names_of = ["shell" if tool == "shell" else f"bmcp_s_{tool}" for tool in called_tools]
    secrets = [f'{{"secret": "{tool}-{position}"}}' for position, tool in enumerate(called_tools)]
    left = [call(i, f"call_{i}", name, secret) for i, (name, secret) in enumerate(zip(names_of, secrets, strict=True))]
    deltas = [{"tool_calls": [fragments.pop(0)]} for fragments in left]
    while any(left):
        deltas.append({"tool_calls": [chance.choice([fragments for fragments in left if fragments]).pop(0)]})
    stream = b"".join(map(chunk, deltas)) + chunk({}, "tool_calls" if called_tools else "stop") + DONE
    turn = turn_of(stream)
    assert [entry.arguments for entry in turn.calls] == [
        secret for secret, name in zip(secrets, names_of, strict=True) if name != "shell"
    ]
    shown = merged(chunk({"role": "assistant", "content": ""}) + stream)
    assert b"bmcp" not in shown and b"time-" not in shown and b"look-" not in shown
    entries = accumulated(shown).choices[0].message.tool_calls or []
    assert [entry.function.arguments for entry in entries if entry.type == "function"] == [
        secret for secret, name in zip(secrets, names_of, strict=True) if name == "shell"
    ]
