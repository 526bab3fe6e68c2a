"""OpenAI Responses: what a request and a response say.

Truth: wire.md C1 to C5, D1 to D3; clients.md 3 for what Codex sends. Whole exchanges are in
``tests/test_traffic_core.py``, usage in ``tests/failures``.
"""

import json
from typing import Any

import pytest

from aibridge.wire import RESPONSES, RequestFacts, Thought, ToolCall
from tests.support.facts import Json, encode, of_body, of_stream


def facts(given: Any, **members: Any) -> RequestFacts:
    return RESPONSES.parse(encode({"model": "m", "input": given, **members})).facts


def message(role: str, *texts: str, **members: Any) -> Json:
    return {"role": role, "content": [{"type": "input_text", "text": value} for value in texts], **members}


def item(kind: str, **members: Any) -> Json:
    return {"type": kind, **members}


# --- requests ---------------------------------------------------------------------------------------------------------

DEVELOPER = message("developer", "You are Codex.", type="message")
ENVIRONMENT = message("user", "<environment_context/>", type="message")
PROMPT = message("user", "Run the tests", type="message")
CALL = item("function_call", id="fc_1", call_id="call_1", name="shell", arguments="{}")
OUTPUT = item("function_call_output", call_id="call_1", output="1 passed")


@pytest.mark.parametrize(
    ("given", "prompt", "call_id"),
    [
        ("Hi", "Hi", None),
        ("", "", None),
        ([message("user", "Hi")], "Hi", None),  # type may be omitted
        ([message("user", "Hi", "there", type="message")], "Hi\nthere", None),
        ([{"role": "user", "content": "Hi"}], "Hi", None),
        ([message("user", "Hi"), message("system", "x"), message("developer", "y")], "Hi", None),
        # Codex: what it tells of its surroundings comes first, the prompt last
        ([DEVELOPER, ENVIRONMENT, PROMPT], "Run the tests", None),
        ([DEVELOPER, ENVIRONMENT, PROMPT, item("reasoning"), CALL, OUTPUT], None, "call_1"),
        ([PROMPT, CALL, OUTPUT, item("custom_tool_call_output", call_id="call_2")], None, "call_2"),
        ([item("local_shell_call_output", id="lsh_1")], None, "lsh_1"),  # has no call_id (wire.md C2)
        ([PROMPT, CALL, OUTPUT, message("user", "And now?")], "And now?", None),
        # what the model said, or a request to compact, is no prompt, and it answers the one before
        ([PROMPT, CALL], None, None),
        ([PROMPT, item("reasoning")], None, None),
        ([PROMPT, {"role": "assistant", "content": [{"type": "output_text", "text": "Done."}]}], None, None),
        ([PROMPT, item("compaction_trigger")], None, None),
        ([PROMPT, item("mcp_approval_response", approval_request_id="a", approve=True)], None, None),
        # items that say nothing
        ([PROMPT, item("item_reference", id="x"), item("additional_tools"), item("x_new")], "Run the tests", None),
        ([item("compaction", encrypted_content="x"), PROMPT], "Run the tests", None),
        ([message("user")], "", None),
        ([], None, None),
        (None, None, None),
        (7, None, None),
        ([1, None, "x", {"role": 7}], None, None),
    ],
)
def test_prompt_and_continuation(given: Any, prompt: str | None, call_id: str | None) -> None:
    found = facts(given)
    assert (found.prompt, found.correlating_tool_call_id) == (prompt, call_id)


def test_codexs_session() -> None:
    assert facts("Hi", client_metadata={"session_id": "s"}).session_id == "s"
    assert facts("Hi", client_metadata=None).session_id is None


def test_a_request_without_a_model() -> None:
    """A prompt template may name it (wire.md C1)."""
    assert RESPONSES.parse(b'{"prompt":{"id":"p"},"stream":true}').facts == RequestFacts(stream=True)


# --- responses --------------------------------------------------------------------------------------------------------


def lifecycle(kind: str, **members: Any) -> Json:
    response = {"id": "resp_1", "model": "m-1", "status": kind, "output": [], **members}
    return {"type": f"response.{kind}", "response": response}


def done(index: int | None, value: Json) -> Json:
    return {"type": "response.output_item.done", "item": value} | ({} if index is None else {"output_index": index})


CREATED = {"type": "response.created", "response": {"id": "resp_1", "model": "m-1", "status": "in_progress", "output": []}}
COMPLETED = lifecycle("completed")


def test_an_envelope() -> None:
    found = of_stream(RESPONSES, CREATED, COMPLETED)
    assert (found.response_id, found.model, found.stop_reason) == ("resp_1", "m-1", "completed")
    assert (found.error, found.notes) == (None, ())
    cut = of_stream(RESPONSES, CREATED, cut=True)
    assert (cut.response_id, cut.stop_reason) == ("resp_1", "in_progress")


def test_incomplete() -> None:
    ended = lifecycle("incomplete", incomplete_details={"reason": "max_output_tokens"})
    found = of_stream(RESPONSES, CREATED, ended)
    assert (found.stop_reason, found.error) == ("max_output_tokens", None)


def test_a_done_marker_says_nothing() -> None:
    reader = RESPONSES.reader()
    reader.read_event(b"[DONE]")
    assert not reader.finished
    assert of_stream(RESPONSES, CREATED, COMPLETED, b"[DONE]").notes == ()


@pytest.mark.parametrize(
    ("value", "call"),
    [
        # the client runs these (wire.md C2): the key is call_id, which is not id
        (
            item("function_call", id="fc", call_id="call", name="f", arguments='{ "a":1e400'),
            ToolCall("call", "f", '{ "a":1e400'),
        ),
        (item("function_call", id="fc", call_id="call", name="f", arguments=""), ToolCall("call", "f", "")),
        (
            item("function_call", call_id="call", name="f", namespace="mcp__x", arguments="{}", status="completed"),
            ToolCall("call", "f", "{}", {"namespace": "mcp__x", "status": "completed"}),
        ),
        (
            item("custom_tool_call", id="ctc", call_id="call", name="p", input="*** é\n"),
            ToolCall("call", "p", "*** é\n", {"type": "custom_tool_call"}),
        ),
        (
            item("shell_call", id="sh", call_id="call", action={"commands": ["ls"]}),
            ToolCall("call", "shell", '{"commands": ["ls"]}', {"type": "shell_call"}),
        ),
        (
            item("apply_patch_call", id="ap", call_id="call", operation={"type": "delete_file"}),
            ToolCall("call", "apply_patch", '{"type": "delete_file"}', {"type": "apply_patch_call"}),
        ),
        (
            item("computer_call", id="cu", call_id="call", action={"type": "click"}),
            ToolCall("call", "computer", '{"type": "click"}', {"type": "computer_call"}),
        ),
        (item("local_shell_call", id="lsh", action={}), ToolCall("lsh", "local_shell", "{}", {"type": "local_shell_call"})),
        (
            item("tool_search_call", id="ts", call_id="call", execution="client", arguments={"q": 1}),
            ToolCall("call", "tool_search", '{"q": 1}', {"type": "tool_search_call"}),
        ),
        # the provider runs these: the key is id
        (
            item("tool_search_call", id="ts", call_id="call", execution="server"),
            ToolCall("ts", "tool_search", None, {"type": "tool_search_call", "run_by": "provider"}),
        ),
        (
            item("mcp_call", id="mcp", name="ask", server_label="docs", arguments="{}", output="x"),
            ToolCall("mcp", "ask", "{}", {"type": "mcp_call", "run_by": "provider", "server_label": "docs"}),
        ),
        (
            item("mcp_approval_request", id="mcpr", name="ask", server_label="docs", arguments="{}"),
            ToolCall("mcpr", "ask", "{}", {"type": "mcp_approval_request", "run_by": "provider", "server_label": "docs"}),
        ),
        (
            item("web_search_call", id="ws", action={"query": "x"}),
            ToolCall("ws", "web_search", '{"query": "x"}', {"type": "web_search_call", "run_by": "provider"}),
        ),
        (
            item("code_interpreter_call", id="ci", code="1\n"),
            ToolCall("ci", "code_interpreter", "1\n", {"type": "code_interpreter_call", "run_by": "provider"}),
        ),
        (
            item("code_interpreter_call", id="ci", code=None),
            ToolCall("ci", "code_interpreter", None, {"type": "code_interpreter_call", "run_by": "provider"}),
        ),
        (
            item("file_search_call", id="fs", queries=["x"]),
            ToolCall("fs", "file_search", '["x"]', {"type": "file_search_call", "run_by": "provider"}),
        ),
        (
            item("image_generation_call", id="ig", result="iVBO"),
            ToolCall("ig", "image_generation", None, {"type": "image_generation_call", "run_by": "provider"}),
        ),
        (
            item("program", id="pr", call_id="call", code="x()"),
            ToolCall("call", "program", "x()", {"type": "program", "run_by": "provider"}),
        ),
        # nobody has heard of it, but it says that it is a call
        (item("x_new_call", id="x"), ToolCall("x", "x_new", None, {"type": "x_new_call", "run_by": "provider"})),
        # no calls
        (item("mcp_list_tools", id="x"), None),
        (item("program_output", call_id="x"), None),
        (item("compaction", encrypted_content="x"), None),
        (item("x_new"), None),
        ({}, None),
    ],
)
def test_calls(value: Json, call: ToolCall | None) -> None:
    expected = () if call is None else (call,)
    assert of_stream(RESPONSES, CREATED, done(0, value), COMPLETED).tool_calls == expected
    assert of_body(RESPONSES, {"id": "resp_1", "output": [value]}).tool_calls == expected


def reasoning(*summaries: str, content: list[str] | None = None) -> Json:
    raw = {} if content is None else {"content": [{"type": "reasoning_text", "text": value} for value in content]}
    return {
        "type": "reasoning",
        "id": "rs",
        "summary": [{"type": "summary_text", "text": value} for value in summaries],
    } | raw


@pytest.mark.parametrize(
    ("value", "thoughts"),
    [
        (reasoning("a", "b"), [("reasoning_summary", "a"), ("reasoning_summary", "b")]),
        (reasoning("a", content=["b", ""]), [("reasoning_summary", "a"), ("reasoning", "b"), ("reasoning", "")]),
        (reasoning(), []),  # encrypted
        (item("reasoning", summary=None, content=[1, {}]), [("reasoning", ""), ("reasoning", "")]),
        (
            item("message", phase="commentary", content=[{"type": "output_text", "text": "First I look."}]),
            [("commentary", "First I look.")],
        ),
        (item("message", phase="final_answer", content=[{"type": "output_text", "text": "Done."}]), []),
        (item("message", content=[{"type": "output_text", "text": "Done."}]), []),
    ],
)
def test_thoughts(value: Json, thoughts: list[tuple[str, str]]) -> None:
    for found in (of_stream(RESPONSES, CREATED, done(0, value), COMPLETED), of_body(RESPONSES, {"output": [value]})):
        assert [(thought.source, thought.content) for thought in found.thoughts] == thoughts
        assert all(not thought.details for thought in found.thoughts)


FUNCTION = item("function_call", id="fc", call_id="call", name="f", arguments="{}")


def test_the_last_event_need_not_repeat_the_items() -> None:
    """``output`` may be empty or absent (wire.md C3)."""
    absent = lifecycle("completed")
    del absent["response"]["output"]
    for last in (COMPLETED, absent, lifecycle("completed", output=[FUNCTION]), lifecycle("completed", output=None)):
        found = of_stream(RESPONSES, CREATED, done(0, FUNCTION), last)
        assert [call.id for call in found.tool_calls] == ["call"]


def test_items_that_only_the_last_event_has() -> None:
    other = FUNCTION | {"call_id": "other"}
    delta = {"type": "response.reasoning_summary_text.delta", "output_index": 0, "summary_index": 0, "delta": "a"}
    found = of_stream(
        RESPONSES, CREATED, delta, done(1, FUNCTION), lifecycle("completed", output=[reasoning("a"), FUNCTION, other])
    )
    assert [call.id for call in found.tool_calls] == ["call", "other"]
    assert found.thoughts == (Thought("reasoning_summary", "a"),)


def test_items_are_not_counted_twice_where_indexes_have_gaps() -> None:
    found = of_stream(RESPONSES, CREATED, done(3, FUNCTION), lifecycle("completed", output=[FUNCTION]))
    assert len(found.tool_calls) == 1


def test_items_of_an_event_before_the_last_are_not_final() -> None:
    """A lifecycle event may show an item that is still being written."""
    begun = lifecycle("in_progress", output=[FUNCTION | {"arguments": ""}])
    assert of_stream(RESPONSES, CREATED, begun, cut=True).tool_calls == ()
    (call,) = of_stream(RESPONSES, CREATED, begun, lifecycle("completed", output=[FUNCTION])).tool_calls
    assert call.input == "{}"


def test_items_without_an_index() -> None:
    found = of_stream(RESPONSES, CREATED, done(None, FUNCTION), done(None, FUNCTION | {"call_id": "two"}), COMPLETED)
    assert [call.id for call in found.tool_calls] == ["call", "two"]


def thought(kind: str, index: int, part: int, delta: Any) -> Json:
    name = "summary_index" if kind == "reasoning_summary_text" else "content_index"
    return {"type": f"response.{kind}.delta", "output_index": index, name: part, "delta": delta}


def test_what_broke_off() -> None:
    """A thought is one all the same, in the order of the items; a call that was not done was never made."""
    found = of_stream(
        RESPONSES,
        CREATED,
        thought("reasoning_summary_text", 0, 0, "a"),
        done(0, reasoning("a")),
        {"type": "response.output_item.added", "output_index": 1, "item": FUNCTION},
        {"type": "response.function_call_arguments.delta", "output_index": 1, "delta": "{"},
        thought("reasoning_text", 2, 0, "raw "),
        thought("reasoning_summary_text", 2, 1, "c"),
        thought("reasoning_summary_text", 2, 0, "b"),
        thought("reasoning_text", 2, 0, "thought"),
        thought("reasoning_text", 2, 0, None),
        cut=True,
    )
    assert found.tool_calls == ()
    assert [(each.source, each.content, each.details) for each in found.thoughts] == [
        ("reasoning_summary", "a", {}),
        ("reasoning", "raw thought", {"incomplete": True}),
        ("reasoning_summary", "b", {"incomplete": True}),
        ("reasoning_summary", "c", {"incomplete": True}),
    ]


FAULT = {"code": "server_error", "message": "It melted."}


@pytest.mark.parametrize(
    ("event", "error"),
    [
        ({"type": "error", **FAULT, "param": None}, "server_error: It melted."),  # flat: HTTP
        ({"type": "error", "error": FAULT | {"type": "x"}}, "x: It melted."),  # nested: WebSocket
        ({"type": "error"}, "error: "),
        (lifecycle("failed", error=FAULT), "server_error: It melted."),
        (lifecycle("failed", error=None), "failed"),
        ({"type": "response.failed"}, "failed"),
        ({"type": "response.failed", "response": None}, "failed"),
        ({"type": "response.failed", "response": {"status": "in_progress"}}, "failed"),
    ],
)
def test_errors_in_a_stream(event: Json, error: str) -> None:
    found = of_stream(RESPONSES, CREATED, event)
    assert (found.error, found.completeness) == (error, "partial")


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ({"error": {"message": "No.", "type": "invalid_request_error"}}, "invalid_request_error: No."),
        ({"id": "resp_1", "status": "failed", "error": FAULT}, "server_error: It melted."),
        ({"id": "resp_1", "status": "failed", "error": None}, "failed"),
        ({"id": "resp_1", "status": "completed", "error": None}, None),
        ({"id": "resp_1", "status": "queued"}, None),  # background
    ],
)
def test_errors_in_a_body(body: Json, error: str | None) -> None:
    assert of_body(RESPONSES, body).error == error


def failed_event(*events: Json | bytes) -> Json:
    reader = RESPONSES.reader()
    for event in events:
        reader.read_event(encode(event))
    lines = reader.error_event(502, "Cut.").split(b"\n")
    assert len(lines) == 4
    assert lines[0].startswith(b"event: ")
    assert lines[2:] == [b"", b""]
    event = json.loads(lines[1].removeprefix(b"data: "))
    assert event["type"] == lines[0].removeprefix(b"event: ").decode()
    return dict(event)


def test_our_own_error_is_numbered_on() -> None:
    assert failed_event()["sequence_number"] == 0
    assert failed_event(CREATED | {"sequence_number": 41})["sequence_number"] == 42
    assert failed_event(CREATED, {"type": "x"}, {"type": "y"})["sequence_number"] == 3  # for servers that do not number


def test_our_own_error_keeps_what_the_provider_said_of_the_response() -> None:
    event = failed_event(
        b'{"type":"response.created","response":{"id":"resp_1","x":{"n":1.10,"s":"\\ud83c\\udf0d"},"error":null}}'
    )
    assert event["response"] == {
        "id": "resp_1",
        "x": {"n": 1.10, "s": "🌍"},
        "status": "failed",
        "error": {"code": "server_error", "message": "Cut."},
    }


def test_our_own_error_after_an_event_that_says_nothing_of_the_response() -> None:
    assert failed_event(CREATED, {"type": "response.in_progress", "response": None})["type"] == "response.failed"


def test_our_own_error_stays_on_one_line() -> None:
    """Data on several lines is joined with line feeds, which would end the line that it is written to."""
    event = failed_event(b'{"type":"response.created",\n"response":{"id":"resp_1","x":{\r\n"y":[1,\r2]}}}')
    assert event["response"]["x"] == {"y": [1, 2]}


@pytest.mark.parametrize(
    "event",
    [
        {},
        {"type": 7},
        {"type": "keepalive"},
        {"type": "response.x_progress", "response": None},
        {"type": "response.output_item.done", "output_index": 5},
        {"type": "response.reasoning_text.delta", "output_index": 5, "delta": ""},
        {"type": "response.output_text.delta", "delta": "x"},
    ],
)
def test_nonsense_is_passed_over(event: Json) -> None:
    found = of_stream(RESPONSES, event, CREATED, event, done(0, FUNCTION), event, COMPLETED)
    assert (found.response_id, found.tool_calls[0].id, found.notes) == ("resp_1", "call", ())
