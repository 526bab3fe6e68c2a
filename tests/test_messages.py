"""Anthropic Messages: what a request and a response say.

Truth: wire.md A2, A3, A7 to A10, D1 to D3; clients.md 2 and 3 for what Claude Code sends. Whole exchanges are in
``tests/test_traffic_core.py``, usage in ``tests/failures``.
"""

from typing import Any

import pytest

from aibridge.errors import BadRequest
from aibridge.wire import MESSAGES, RequestFacts, Thought, ToolCall
from tests.support.coding import ENCODERS
from tests.support.facts import Json, encode, of_body, of_stream


def facts(*messages: Any, **members: Any) -> RequestFacts:
    return MESSAGES.parse(encode({"model": "m", "messages": list(messages), **members})).facts


def user(content: Any) -> Json:
    return {"role": "user", "content": content}


def text(value: Any) -> Json:
    return {"type": "text", "text": value}


def result(call_id: Any) -> Json:
    return {"type": "tool_result", "tool_use_id": call_id, "content": "ok"}


ASSISTANT: Json = {"role": "assistant", "content": [{"type": "tool_use", "id": "toolu_1", "name": "f", "input": {}}]}
IMAGE: Json = {"type": "image", "source": {"type": "url", "url": "https://example.test/a.png"}}


# --- requests ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("messages", "prompt", "call_id"),
    [
        ([user("Hi")], "Hi", None),
        ([user([text("Hi"), text("there")])], "Hi\nthere", None),
        ([user("Hi"), {"role": "assistant", "content": "Hello"}, user("Bye")], "Bye", None),
        # a continuation: results alone are no prompt, and the last of them is what it continues
        ([user("Hi"), ASSISTANT, user([result("toolu_1")])], None, "toolu_1"),
        ([user("Hi"), ASSISTANT, user([result("toolu_1"), result("toolu_2")])], None, "toolu_2"),
        ([user([result("")])], None, ""),  # ids are opaque, and empty ones occur (wire.md D3)
        ([user([result(None)])], None, None),
        # results first, then what the user adds
        ([user("Hi"), ASSISTANT, user([result("toolu_1"), text("And now?")])], "And now?", "toolu_1"),
        # Claude Code: a system message after the user's, reminders before the prompt (clients.md 3)
        ([user([text("<system-reminder>"), text("Hi")]), {"role": "system", "content": "x"}], "<system-reminder>\nHi", None),
        ([user([result("toolu_1")]), {"role": "system", "content": [text("x")]}], None, "toolu_1"),
        # a prefilled answer does not hide the question
        ([user("Hi"), {"role": "assistant", "content": "Hello, I"}], "Hi", None),
        # a prompt without words is a prompt
        ([user([IMAGE])], "", None),
        ([user("")], "", None),
        ([user([text("What is this?"), IMAGE])], "What is this?", None),
        # no prompt at all
        ([], None, None),
        ([{"role": "system", "content": "x"}], None, None),
        ([user([])], None, None),
        ([user(None)], None, None),
        # nothing of it fails what is nonsense
        (["Hi", 1, None, user([1, "x", None, text(7), {}])], "", None),
        ([{"role": 1, "content": "x"}], None, None),
    ],
)
def test_prompt_and_continuation(messages: list[Any], prompt: str | None, call_id: str | None) -> None:
    found = facts(*messages)
    assert (found.prompt, found.correlating_tool_call_id) == (prompt, call_id)


SESSION = "0e9a4b52-6a7e-4f0e-9d43-0a1b2c3d4e5f"


@pytest.mark.parametrize(
    ("user_id", "session_id"),
    [
        (f'{{"device_id":"d","account_uuid":"","session_id":"{SESSION}"}}', SESSION),
        (f"user_ab12_account_cd34_session_{SESSION}", SESSION),
        ('{"session_id":""}', None),
        ('{"session_id":7}', None),
        ('{"device_id":"d"}', None),
        ("user_ab12", None),
        ("", None),
        (None, None),
        (7, None),
        ({"session_id": "x"}, None),
    ],
)
def test_claude_codes_session(user_id: Any, session_id: str | None) -> None:
    assert facts(metadata={"user_id": user_id}).session_id == session_id


def test_no_session() -> None:
    assert facts().session_id is None
    assert facts(metadata=None).session_id is None


@pytest.mark.parametrize(("value", "stream"), [(True, True), (False, False), (None, False), ("true", False), (1, False)])
def test_stream(value: Any, stream: bool) -> None:
    assert facts(stream=value).stream is stream


def test_model() -> None:
    assert facts().model == "m"
    assert facts(model=None).model is None
    assert facts(model=7).model is None


def test_an_odd_body_is_read_and_left_as_it_is() -> None:
    body = (
        b' {"max_tokens":1e3,"model":"first","model":"m","x":[1e400,-0.0],"messages":[{"role":"user","content":'
        b'[{"type":"text","text":"Hi \\u0000 \\ud800 \\ud83c\\udf0d"}]}],"stream":true,"temperature":NaN_}'
    )
    readable = body.replace(b',"temperature":NaN_', b"")
    request = MESSAGES.parse(readable)
    assert request.body is readable
    assert request.facts == RequestFacts("m", stream=True, prompt="Hi \0 \ufffd 🌍")
    with pytest.raises(BadRequest):
        MESSAGES.parse(body)


@pytest.mark.parametrize("body", [b"", b"[]", b"null", b'"x"', b"{", b"model=m", b'{"model":"m"} {}'])
def test_what_is_no_request(body: bytes) -> None:
    with pytest.raises(BadRequest, match=r"^The request body must be a JSON object\.$"):
        MESSAGES.parse(body)


@pytest.mark.parametrize("body", [b'{"model":"m","x":NaN}', b'{"model":"m","x":"\x01"}'])
def test_what_is_for_the_provider_to_judge(body: bytes) -> None:
    """A body that some reader takes for JSON is forwarded; the ledger says that it was not read."""
    request = MESSAGES.parse(body)
    assert request.body == body
    assert request.facts == RequestFacts(notes=("request not read: not a JSON object",))


def test_a_member_whose_name_is_not_unicode_is_none_of_ours() -> None:
    assert MESSAGES.parse(b'{"\xff":1,"model":"m"}').facts == RequestFacts("m")


@pytest.mark.parametrize("coding", ENCODERS)
def test_a_compressed_request_is_read_and_forwarded_as_sent(coding: str) -> None:
    body = ENCODERS[coding](encode({"model": "m", "messages": [user("Hi")]}))
    request = MESSAGES.parse(body, coding)
    assert request.body == body
    assert request.coding == coding
    assert request.facts == RequestFacts("m", prompt="Hi")


@pytest.mark.parametrize("coding", ["gzip", "made-up"])
def test_a_compressed_request_that_cannot_be_read(coding: str) -> None:
    request = MESSAGES.parse(b"whatever", coding)
    assert request.body == b"whatever"
    (note,) = request.facts.notes
    assert note.startswith("request not read: ")
    assert "whatever" not in note


def test_a_compressed_request_that_is_no_object() -> None:
    with pytest.raises(BadRequest):
        MESSAGES.parse(ENCODERS["zstd"](b"[]"), "zstd")


def test_only_chat_has_to_ask_for_usage() -> None:
    request = MESSAGES.parse(b'{"stream":true}')
    assert MESSAGES.asking_for_usage(request) is request
    assert MESSAGES.response_filter(request) is None


# --- responses --------------------------------------------------------------------------------------------------------

START: Json = {"type": "message_start", "message": {"id": "msg_1", "model": "m-1", "content": []}}
STOP: Json = {"type": "message_stop"}


def opened(index: int, block: Json) -> Json:
    return {"type": "content_block_start", "index": index, "content_block": block}


def delta(index: int, kind: str, **members: Any) -> Json:
    return {"type": "content_block_delta", "index": index, "delta": {"type": kind, **members}}


def closed(index: int) -> Json:
    return {"type": "content_block_stop", "index": index}


def tool(call_id: str, name: str = "f", kind: str = "tool_use", **members: Any) -> Json:
    return {"type": kind, "id": call_id, "name": name, "input": {}, **members}


def test_an_envelope() -> None:
    ended = {"type": "message_delta", "delta": {"stop_reason": "end_turn"}}
    later = {"type": "message_delta", "delta": {"stop_reason": None}}
    found = of_stream(MESSAGES, START, ended, later, STOP)
    assert (found.response_id, found.model, found.stop_reason) == ("msg_1", "m-1", "end_turn")
    assert (found.error, found.notes) == (None, ())


def test_a_body() -> None:
    body = {"id": "msg_1", "model": "m-1", "content": [text("x")], "stop_reason": "end_turn", "error": None}
    found = of_body(MESSAGES, body)
    assert (found.response_id, found.model, found.stop_reason, found.error) == ("msg_1", "m-1", "end_turn", None)


def test_the_model_that_took_over() -> None:
    """The last fallback block names who answered (wire.md D1)."""
    block = {"type": "fallback", "from": {"model": "m-1"}, "to": {"model": "m-2"}}
    assert of_stream(MESSAGES, START, opened(0, block), closed(0), STOP).model == "m-2"
    assert of_body(MESSAGES, {"model": "m-1", "content": [block]}).model == "m-2"


@pytest.mark.parametrize(
    ("pieces", "given", "arguments"),
    [
        (["", '{"a"', ": 1.0e2 }"], {}, '{"a": 1.0e2 }'),  # as text, as it was sent
        ([], {}, "{}"),  # no fragment at all: no arguments
        ([""], {}, "{}"),
        ([], {"a": 1}, '{"a": 1}'),  # whole in the start, as a compatible server may
        (['{"b":2}'], {"a": 1}, '{"b":2}'),  # the start is a placeholder otherwise
        (['{"a": "trunc'], {}, '{"a": "trunc'),  # after max_tokens
        (['{"a":"\\ud800\\u0000"}'], {}, '{"a":"\\ud800\\u0000"}'),
    ],
)
def test_the_arguments_of_a_streamed_call(pieces: list[str], given: Json, arguments: str) -> None:
    deltas = [delta(0, "input_json_delta", partial_json=piece) for piece in pieces]
    found = of_stream(MESSAGES, START, opened(0, tool("toolu_1") | {"input": given}), *deltas, closed(0), STOP)
    assert found.tool_calls == (ToolCall("toolu_1", "f", arguments),)


def test_the_arguments_of_a_blocking_call() -> None:
    body = b'{"content":[{"type":"tool_use","id":"t","name":"f","input":{ "a" : 1.0e2,"a":1E400 }},{"type":"tool_use"}]}'
    assert of_body(MESSAGES, body).tool_calls == (ToolCall("t", "f", '{ "a" : 1.0e2,"a":1E400 }'), ToolCall(None, "", "{}"))


def test_who_runs_a_call() -> None:
    """Told by the block's type, never by the tool's (wire.md A4)."""
    found = of_body(
        MESSAGES,
        {
            "content": [
                tool("toolu_1"),
                tool("srvtoolu_1", kind="server_tool_use"),
                tool("mcptoolu_1", kind="mcp_tool_use", server_name="docs"),
                tool(
                    "toolu_2", toolset_name="computer", caller={"type": "code_execution_20260120", "tool_id": "srvtoolu_1"}
                ),
                {"type": "web_search_tool_result", "tool_use_id": "srvtoolu_1", "content": []},
            ]
        },
    )
    assert [(call.id, call.details) for call in found.tool_calls] == [
        ("toolu_1", {}),
        ("srvtoolu_1", {"run_by": "provider"}),
        ("mcptoolu_1", {"run_by": "provider", "server_name": "docs"}),
        ("toolu_2", {"toolset_name": "computer", "caller": "code_execution_20260120"}),
    ]


def test_blocks_are_told_apart_by_index() -> None:
    found = of_stream(
        MESSAGES,
        START,
        opened(0, tool("toolu_1")),
        opened(1, tool("toolu_2")),
        delta(1, "input_json_delta", partial_json="[2]"),
        delta(0, "input_json_delta", partial_json="[1]"),
        delta(7, "input_json_delta", partial_json="[7]"),
        closed(1),
        closed(0),
        closed(7),
        STOP,
    )
    assert [(call.id, call.input) for call in found.tool_calls] == [("toolu_1", "[1]"), ("toolu_2", "[2]")]


def test_an_index_that_a_provider_uses_again() -> None:
    """Failures.md 17, from the receiving end: another gateway's second stream must not glue its calls to the first's."""
    blocks = [
        [opened(0, tool(call)), delta(0, "input_json_delta", partial_json=f"[{call}]"), closed(0)] for call in ("1", "2")
    ]
    found = of_stream(MESSAGES, START, *blocks[0], *blocks[1], STOP)
    assert [(call.id, call.input) for call in found.tool_calls] == [("1", "[1]"), ("2", "[2]")]


def test_a_call_that_broke_off_was_never_made() -> None:
    events = [START, opened(0, tool("1")), closed(0), opened(1, tool("2")), delta(1, "input_json_delta", partial_json="{")]
    assert [call.id for call in of_stream(MESSAGES, *events, cut=True).tool_calls] == ["1"]


def test_a_call_that_was_not_closed_counts_once_the_message_is_complete() -> None:
    """SDKs hand it to the client without waiting for ``content_block_stop``."""
    found = of_stream(MESSAGES, START, opened(0, tool("1")), opened(1, {"type": "thinking", "thinking": "Hm."}), STOP)
    assert [call.id for call in found.tool_calls] == ["1"]
    assert found.thoughts == (Thought("thinking", "Hm."),)


def test_thoughts() -> None:
    """An empty one and a redacted one are thoughts, too (wire.md A3, D1). Signatures are nobody's business."""
    found = of_stream(
        MESSAGES,
        START,
        opened(0, {"type": "thinking", "thinking": "", "signature": ""}),
        delta(0, "thinking_delta", thinking="Let me "),
        delta(0, "thinking_delta", thinking="see.", estimated_tokens=3),
        delta(0, "signature_delta", signature="EqQB"),
        closed(0),
        opened(1, {"type": "redacted_thinking", "data": "Emwk"}),
        closed(1),
        opened(2, {"type": "thinking", "thinking": "", "signature": "EqQC"}),
        closed(2),
        opened(3, text("")),
        delta(3, "text_delta", text="Hello"),
        closed(3),
        STOP,
    )
    assert found.thoughts == (
        Thought("thinking", "Let me see."),
        Thought("thinking", "", {"redacted": True}),
        Thought("thinking", ""),
    )


def test_a_thought_that_broke_off_is_a_thought() -> None:
    events = [START, opened(0, {"type": "thinking", "thinking": ""}), delta(0, "thinking_delta", thinking="Let")]
    assert of_stream(MESSAGES, *events, cut=True).thoughts == (Thought("thinking", "Let", {"incomplete": True}),)


ERROR: Json = {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}, "request_id": "req_1"}


@pytest.mark.parametrize(
    ("body", "error"),
    [
        (ERROR, "overloaded_error: Overloaded"),
        ({"error": "model not found"}, "error: model not found"),  # compatible servers
        ({"error": {"message": "No."}}, "error: No."),
        ({"error": {}}, "error: "),
        ({"error": None}, None),
        ({"error": False}, None),
        ({"error": ""}, None),
        ({"detail": "?"}, None),
    ],
)
def test_the_words_of_an_error(body: Json, error: str | None) -> None:
    found = of_body(MESSAGES, body, status=500)
    assert (found.error, found.usage) == (error, None)


def test_an_error_in_the_stream() -> None:
    found = of_stream(MESSAGES, START, opened(0, tool("1")), ERROR)
    assert (found.error, found.completeness, found.tool_calls) == ("overloaded_error: Overloaded", "partial", ())
    assert of_stream(MESSAGES, {"type": "error"}).error == "error"


@pytest.mark.parametrize("event", [b"", b"[]", b"{", b"not json"])
def test_an_event_that_cannot_be_read_is_noted_and_quotes_nothing(event: bytes) -> None:
    found = of_stream(MESSAGES, START, event, STOP)
    assert found.response_id == "msg_1"
    assert found.notes == ("response: unreadable: Unreadable",)


def test_notes_are_few() -> None:
    assert len(of_stream(MESSAGES, *[b"x"] * 1000).notes) == 10


@pytest.mark.parametrize(
    "event",
    [
        {},
        {"type": None},
        {"type": "x_new", "index": 0},
        {"type": "message_start"},
        {"type": "message_start", "message": None},
        {"type": "message_delta"},
        {"type": "message_delta", "delta": None, "usage": None},
        {"type": "content_block_start"},
        {"type": "content_block_start", "index": "0", "content_block": []},
        {"type": "content_block_delta", "index": None},
        {"type": "content_block_delta", "index": 0, "delta": "x"},
        {"type": "content_block_stop"},
        {"type": "ping"},
    ],
)
def test_nonsense_is_passed_over(event: Json) -> None:
    found = of_stream(MESSAGES, event, START, event, opened(1, tool("1")), event, STOP)
    assert (found.response_id, [call.id for call in found.tool_calls], found.notes) == ("msg_1", ["1"], ())
