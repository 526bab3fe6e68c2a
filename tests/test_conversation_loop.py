"""The inner loop, spoken through: which turn follows which, and what becomes of each mishap between and in them.

Truth: the loop of the issue and of design.md 2; wire.md A7 (truncated calls), D4 (a turn and its results), D5 (errors of
later turns in-band), D6 (what is kept). What the merged streams look like to the SDKs is in test_injection_sdks.py.
"""

import json
from typing import Any, Final

import pytest
from msgspec import structs

from aibridge.commands import Abort, Answers, CallTools, Command, End, Receive, Record, Relay, Remember, Respond, Send
from aibridge.errors import ClientDisconnected, Interrupted, RecordingFailed, UpstreamError, UpstreamTimeout, error_body
from aibridge.merger import Loop
from aibridge.tools import Call, Outcome, Text, Tool, Toolset
from aibridge.wire import MESSAGES, Request
from aibridge.wire.observer import ResponseHead
from tests.support.coding import ENCODERS
from tests.support.dialogue import Dialogue, head

LOOK: Final = Tool("bmcp_s_look", "Looks.", '{"type":"object"}', "s", "look", "https://h/mcp")
FOUND: Final = Outcome((Text("found"),))
STREAM: Final = head()
BODY: Final = head("application/json")
PING: Final = b'event: ping\ndata: {"type":"ping"}\n\n'
DOWN: Final = "The gateway is shutting down."


def start(stream: bool = True, **rules: Any) -> tuple[Request, Loop]:
    """A request with the tool in it, and its loop."""
    body = json.dumps({"model": "m", "stream": stream, "messages": [{"role": "user", "content": "hi"}]}).encode()
    request = MESSAGES.parse(body)
    loop = Loop(Toolset([LOOK]), MESSAGES.turns.read(body), **rules)
    return structs.replace(request, body=MESSAGES.turns.with_tools(body, loop.toolset), has_tools=True), loop


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def use(identity: str, name: str = LOOK.name) -> dict[str, Any]:
    return {"type": "tool_use", "id": identity, "name": name, "input": {"q": identity}}


def message(identity: str, *blocks: dict[str, Any], stop: str | None = None) -> bytes:
    """A message as a body."""
    stop = stop or ("tool_use" if any(block["type"] == "tool_use" for block in blocks) else "end_turn")
    usage = {"input_tokens": 10, "output_tokens": 1}
    return json.dumps(
        {"id": identity, "type": "message", "role": "assistant", "content": blocks, "stop_reason": stop, "usage": usage}
    ).encode()


def events(identity: str, *blocks: dict[str, Any], stop: str | None = None) -> bytes:
    """The same message as a stream, each block whole in its start."""
    whole = json.loads(message(identity, *blocks, stop=stop))
    said: list[dict[str, Any]] = [{"type": "message_start", "message": whole | {"content": [], "stop_reason": None}}]
    for index, block in enumerate(blocks):
        said.append({"type": "content_block_start", "index": index, "content_block": block})
        said.append({"type": "content_block_stop", "index": index})
    said.append({"type": "message_delta", "delta": {"stop_reason": whole["stop_reason"]}, "usage": {"output_tokens": 1}})
    said.append({"type": "message_stop"})
    return b"".join(f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode() for event in said)


def seen(stream: bytes) -> list[Any]:
    return [json.loads(line[6:]) for line in stream.decode().splitlines() if line.startswith("data: ")]


class Told(Dialogue):
    """A dialogue that keeps what the client is shown."""

    def __init__(self, stream: bool = True, **rules: Any) -> None:
        self.request, self.loop = start(stream, **rules)
        super().__init__(self.request, self.loop)
        self.shown = b""

    def __call__(self, expected: Command | type[Command], answer: Any = True) -> Any:
        command = super().__call__(expected, answer)
        if isinstance(command, Relay):
            self.shown += command.data
        return command

    def hears(self, response: ResponseHead, body: bytes, *, begins: bool = False) -> None:
        """A response of the provider, up to its record."""
        self(Send, response)
        if begins:
            self(Respond)
        self(Receive, body)
        self(Relay)
        if not response.is_stream(requested=False):
            self(Receive, b"")
        self(Record)

    def ends(self, status: Any, *, answer: Any = None) -> End:
        end: End = self(End, answer)
        assert end.status == status
        return end


def test_two_turns_are_one_stream() -> None:
    told = Told()
    assert told(Send, STREAM).request is told.request
    begins = told(Respond)
    assert begins == Respond(200, [(b"content-type", b"text/event-stream")], PING)
    told(Receive, events("msg_1", text("One."), use("a"), use("b")))
    told(Relay)
    assert told(Record).facts.tool_calls == (), "the bridge's own calls are recorded when they are run"
    asked = told(CallTools, Answers((FOUND, Outcome.failed("no"))))
    assert asked == CallTools("msg_1", (Call("a", LOOK, '{"q": "a"}'), Call("b", LOOK, '{"q": "b"}')))
    again = json.loads(told(Send, STREAM).request.body)["messages"]
    assert [one["role"] for one in again] == ["user", "assistant", "user"]
    assert [one.get("is_error", False) for one in again[2]["content"]] == [False, True]
    told(Receive, events("msg_2", text("Two.")))
    told(Relay)
    told(Record)
    assert told(Remember).memory.toolset == told.loop.toolset.digest
    told.ends("completed")
    told(Relay)
    told(Receive, b"event: late\n\n")
    told(Relay)
    told(Receive, b"")
    assert told.is_over()
    kinds = [event["type"] for event in seen(told.shown)]
    block = ["content_block_start", "content_block_stop"]
    assert kinds == ["message_start", *block, *block, "message_delta", "message_stop"]
    assert LOOK.name.encode() not in told.shown and b"late" not in told.shown


def test_two_turns_are_one_body() -> None:
    told = Told(stream=False)
    told.hears(BODY, message("msg_1", text("One."), use("a")))
    told(CallTools, Answers((FOUND,)))
    told.hears(BODY, message("msg_2", text("Two.")))
    told(Remember)
    told.ends("completed")
    begins = told(Respond)
    shown = told(Relay).data
    assert told.is_over()
    assert begins.headers == [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(shown))]
    found = json.loads(shown)
    assert found["id"] == "msg_1" and found["content"] == [text("One."), text("Two.")]


def test_without_a_call_nothing_is_different() -> None:
    body = events("msg_1", text("One."))
    told = Told()
    told.hears(STREAM, body, begins=True)
    assert told(Remember).memory.data == b""
    told.ends("completed")
    told(Relay)
    told(Receive, b"")
    assert told.is_over() and told.shown == body


def test_a_mixed_turn_ends_the_response() -> None:
    told = Told()
    told.hears(STREAM, events("msg_1", use("a"), use("mine", "bash")), begins=True)
    told(CallTools, Answers((FOUND,)))
    assert told(Remember).memory.data
    told.ends("completed")
    told(Relay)
    assert [event["content_block"]["id"] for event in seen(told.shown) if "content_block" in event] == ["mine"]


@pytest.mark.parametrize("limit", ["turns", "time"])
def test_the_last_turn_is_told_not_to_call_and_its_calls_are_not_made(limit: str) -> None:
    told = Told(max_turns=2) if limit == "turns" else Told()
    told.hears(STREAM, events("msg_1", use("a")), begins=True)
    told(CallTools, Answers((FOUND,), out_of_time=limit == "time"))
    assert json.loads(told(Send, STREAM).request.body)["tool_choice"] == {"type": "none"}
    told(Receive, events("msg_2", text("So."), use("b")))
    told(Relay)
    told(Record)
    (call,) = told(CallTools, Answers((Outcome.failed("no"),))).calls
    assert call.id == "b" and call.refusal
    told(Remember)
    told.ends("completed")
    told(Relay)
    assert seen(told.shown)[-2]["delta"]["stop_reason"] == "end_turn"


def test_a_single_turn() -> None:
    told = Told(max_turns=1)
    told.hears(STREAM, events("msg_1", use("a")), begins=True)
    assert told(CallTools, Answers((Outcome.failed("no"),))).calls[0].refusal
    told(Remember)
    told.ends("completed")


# ---- what goes wrong ----


def after_one_turn(stream: bool = True) -> Told:
    told = Told(stream)
    if stream:
        told.hears(STREAM, events("msg_1", text("One."), use("a")), begins=True)
    else:
        told.hears(BODY, message("msg_1", text("One."), use("a")))
    told(CallTools, Answers((FOUND,)))
    return told


@pytest.mark.parametrize("error", [UpstreamError("no route"), UpstreamTimeout("too slow")])
def test_a_second_request_that_gets_no_answer(error: UpstreamError) -> None:
    told = after_one_turn()
    told(Send, error)
    told(Record)
    assert told(Remember).memory.data, "the first turn is kept: the client may go on from it"
    assert told.ends("failed") == End("failed", 200, error.message)
    told(Relay)
    assert told.is_over()
    assert seen(told.shown)[-1]["error"]["message"] == error.message


def test_a_second_request_that_gets_no_answer_where_nothing_was_said() -> None:
    told = after_one_turn(stream=False)
    told(Send, UpstreamError("no route"))
    told(Record)
    told(Remember)
    assert told.ends("failed") == End("failed", 502, "no route")
    assert told(Respond).status == 502
    assert told(Relay).data == error_body("anthropic", 502, "no route")
    assert told.is_over()


def test_a_second_request_that_is_refused_in_a_stream() -> None:
    told = after_one_turn()
    told(Send, head("application/json", 529))
    body = b'{"type":"error","error":{"type":"overloaded_error","message":"Overloaded"},"request_id":"req_2"}'
    told(Receive, body)
    told(Relay)
    told(Receive, b"")
    assert told(Record).facts.usage is None
    told(Remember)
    assert told.ends("failed") == End("failed", 200, "overloaded_error: Overloaded")
    told(Relay)
    assert seen(told.shown)[-1] == json.loads(body)


def test_a_second_request_that_is_refused_without_words() -> None:
    told = after_one_turn()
    told(Send, head("text/html", 503))
    told(Receive, b"")
    told(Record)
    told(Remember)
    told.ends("failed")
    told(Relay)
    assert seen(told.shown)[-1]["type"] == "error"


def test_a_second_request_that_is_refused_goes_to_the_client_as_it_is_where_nothing_was_said() -> None:
    told = after_one_turn(stream=False)
    told(Send, head("application/json", 429, retry_after="7"))
    begins = told(Respond)
    assert (begins.status, dict(begins.headers)[b"retry-after"]) == (429, b"7")
    told(Receive, b'{"type":"error","error":{"type":"rate_limit_error","message":"slow"}}')
    told(Relay)
    told(Receive, b"")
    told(Record)
    told(Remember)
    assert told.ends("failed") == End("failed", 429, "rate_limit_error: slow")


def test_a_second_response_that_breaks_off() -> None:
    told = after_one_turn()
    told(Send, STREAM)
    told(Receive, events("msg_2", text("Two."))[:-60])
    told(Relay)
    told(Receive, b"")
    assert told(Record).facts.completeness == "partial"
    told(Remember)
    told.ends("failed")
    told(Relay)
    assert seen(told.shown)[-1]["type"] == "error"


def test_a_second_body_that_breaks_off() -> None:
    told = after_one_turn(stream=False)
    told(Send, BODY)
    told(Receive, UpstreamError("broke off"))
    told(Record)
    told(Remember)
    assert told.ends("failed").http_status == 502
    assert told(Respond).status == 502


@pytest.mark.parametrize(("stream", "second"), [(True, BODY), (False, STREAM)])
def test_a_provider_that_answers_one_way_and_then_the_other(stream: bool, second: ResponseHead) -> None:
    told = after_one_turn(stream)
    told(Send, second)
    told(Record)
    told(Remember)
    assert told.ends("failed").error == "The provider answered one request with a stream and one without."
    told(Relay if stream else Respond)


@pytest.mark.parametrize("event", [ClientDisconnected(), Interrupted()])
def test_nobody_waits_for_the_tools(event: Exception) -> None:
    told = Told()
    told.hears(STREAM, events("msg_1", use("a")), begins=True)
    told(CallTools, event)
    assert told(Remember).memory.toolset == told.loop.toolset.digest, "what the client has is bound to the tools"
    if isinstance(event, ClientDisconnected):
        told.ends("client_disconnected")
    else:
        told.ends("interrupted")
        told(Relay)
        assert seen(told.shown)[-1]["error"]["message"] == DOWN
    assert told.is_over()


@pytest.mark.parametrize("event", [ClientDisconnected(), Interrupted()])
def test_nobody_waits_for_the_second_answer(event: Exception) -> None:
    told = after_one_turn()
    told(Send, event)
    told(Record)
    told(Remember)
    told.ends("client_disconnected" if isinstance(event, ClientDisconnected) else "interrupted")
    if isinstance(event, Interrupted):
        told(Relay)
    assert told.is_over()


def test_a_call_of_another_tool_of_that_name_is_recorded() -> None:
    told = Told()
    elsewhere = {"type": "server_tool_use", "id": "srvtoolu_1", "name": LOOK.name, "input": {}}
    told(Send, STREAM)
    told(Respond)
    told(Receive, events("msg_1", elsewhere, use("a")))
    told(Relay)
    assert [call.id for call in told(Record).facts.tool_calls] == ["srvtoolu_1"]


def test_a_client_that_is_gone_does_not_have_tools_run() -> None:
    told = Told()
    told(Send, STREAM)
    told(Respond)
    told(Receive, events("msg_1", use("a")))
    told(Relay, False)
    told(Record)
    told(Remember, Interrupted())
    told.ends("client_disconnected")
    assert told.is_over()


def test_a_response_that_cannot_be_recorded_does_not_end_well() -> None:
    told = after_one_turn()
    told.hears(STREAM, events("msg_2", text("Two.")))
    told(Remember)
    told.ends("completed", answer=RecordingFailed("cannot"))
    told(Relay)
    assert [event["type"] for event in seen(told.shown)][-2:] == ["content_block_stop", "error"]


def test_a_client_that_goes_before_it_has_its_body() -> None:
    told = Told(stream=False)
    told.hears(BODY, message("msg_1", text("One.")))
    told(Remember)
    told.ends("completed")
    told(Respond, ClientDisconnected())
    told(Abort)
    assert told.is_over()


# ---- what has to be read ----


@pytest.mark.parametrize("coding", sorted(ENCODERS))
def test_a_compressed_response_is_decoded(coding: str) -> None:
    told = Told()
    told(Send, head(content_encoding=coding, content_length="7"))
    assert told(Respond).headers == [(b"content-type", b"text/event-stream")]
    told(Receive, ENCODERS[coding](events("msg_1", text("One."))))
    told(Relay)
    told(Record)
    told(Remember)
    told.ends("completed")
    told(Relay)
    assert told.shown == events("msg_1", text("One."))


def test_a_coding_that_nobody_knows() -> None:
    told = Told()
    told(Send, head(content_encoding="rot13"))
    told(Record)
    assert told.ends("failed").error is not None
    assert told(Respond).status == 502


def test_a_compressed_response_that_is_none() -> None:
    told = Told()
    told(Send, head(content_encoding="gzip"))
    told(Respond)
    told(Receive, b"no gzip")
    told(Record)
    told(Remember)
    told.ends("failed")
    told(Relay)
    assert seen(told.shown)[-1]["type"] == "error"


@pytest.mark.parametrize("body", [b"", b"oops", b"[1]"])
def test_a_body_that_nobody_can_read_passes(body: bytes) -> None:
    told = Told(stream=False)
    told(Send, BODY)
    told(Receive, body)
    if body:
        told(Relay)
        told(Receive, b"")
    told(Record)
    told(Remember)
    told.ends("completed")
    told(Respond)
    assert told(Relay).data == body


def test_a_body_that_nobody_can_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aibridge.merger.MAX_BODY_BYTES", 10)
    told = Told(stream=False)
    told(Send, BODY)
    told(Receive, b"x" * 11)
    told(Record)
    assert told.ends("failed").error == "The provider's response is too large."


def test_an_event_that_nobody_can_read_passes() -> None:
    odd = b"data: {no json\n\n"
    told = Told()
    told.hears(STREAM, odd + events("msg_1", text("One.")), begins=True)
    assert told.shown.startswith(odd)


def test_a_last_event_without_its_blank_line() -> None:
    told = Told()
    told.hears(STREAM, events("msg_1", text("One."))[:-1], begins=True)
    told(Remember)
    told.ends("completed")
    told(Relay)
    assert seen(told.shown)[-1] == {"type": "message_stop"} and told.shown.endswith(b"\n\n")
