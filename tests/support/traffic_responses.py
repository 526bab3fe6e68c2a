"""OpenAI Responses. Every event has a type and a sequence number; the response object rides on the lifecycle events."""

import json
from typing import Any

from .recording import NOTHING_YET, UNKNOWN, Expectation, Recording, client_call, provider_call, usage

STREAM = "text/event-stream; charset=utf-8"
CODEX = "gpt-5.4-codex"


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


# --- requests ---------------------------------------------------------------------------------------------------------


def _ask(prompt: str, stream: bool) -> bytes:
    """As Codex asks: the developer's and the environment's words first, the prompt last; then our odd members."""
    return (
        f'{{"model":"{CODEX}","input":[{{"type":"message","role":"developer","content":[{{"type":"input_text",'
        f'"text":"You are Codex."}}]}},{{"type":"message","role":"user","content":[{{"type":"input_text",'
        f'"text":"<environment_context>\\n</environment_context>"}}]}},{{"role":"user","content":[{{"type":'
        f'"input_text" , "text":{json.dumps(prompt)}}}]}}],"tools":[{{"type":"function","name":"shell","strict":false,'
        f'"parameters":{{"type":"object"}}}},{{"type":"web_search"}},{{"type":"namespace","name":"mcp__x","tools":[]}}],'
        f'"store":false,"include":["reasoning.encrypted_content"],"stream":{"true" if stream else "false"},'
        f'"prompt_cache_key":"0199","x_unknown":{{"n":1.10}}}}'
    ).encode()


STRING_REQUEST = b'{ "input" : "Tell me a \\u0022story\\"" ,"model":"gpt-5.4-codex", "max_output_tokens": 1e3 }'

STATEFUL_REQUEST = (
    b'{"model":"gpt-5.4-codex","previous_response_id":"resp_earlier","stream":true,"input":['
    b'{"type":"function_call_output","call_id":"call_1","output":"ok"},'
    b'{"type":"function_call_output","call_id":"call_2","output":[{"type":"input_text","text":"fine"}]}]}'
)

STATELESS_REQUEST = (
    b'{"model":"gpt-5.4-codex","store":false,"stream":true,"input":['
    b'{"type":"message","role":"user","content":[{"type":"input_text","text":"Run the tests"}]},'
    b'{"type":"reasoning","id":"rs_old","summary":[],"encrypted_content":"gAAAAA=="},'
    b'{"type":"function_call","id":"fc_old","call_id":"call_old","name":"shell","arguments":"{\\"c\\": 1}"},'
    b'{"type":"function_call_output","call_id":"call_old","output":"1 passed"},'
    b'{"type":"custom_tool_call","call_id":"call_patch","name":"apply_patch","input":"*** Begin"},'
    b'{"type":"custom_tool_call_output","call_id":"call_patch","output":"Done"}]}'
)


# --- items ------------------------------------------------------------------------------------------------------------

Item = dict[str, Any]


def _message(item_id: str, text: str, **members: Any) -> Item:
    part = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
    return {"id": item_id, "type": "message", "status": "completed", "role": "assistant", **members, "content": [part]}


def _reasoning(item_id: str, *summaries: str, **members: Any) -> Item:
    parts = [{"type": "summary_text", "text": text} for text in summaries]
    return {"id": item_id, "type": "reasoning", "summary": parts, "encrypted_content": "gAAAAABpIfull", **members}


def _function(item_id: str, call_id: str, name: str, arguments: str) -> Item:
    return {
        "id": item_id,
        "type": "function_call",
        "status": "completed",
        "arguments": arguments,
        "call_id": call_id,
        "name": name,
    }


def _custom(item_id: str, call_id: str, name: str, text: str) -> Item:
    return {
        "id": item_id,
        "type": "custom_tool_call",
        "status": "completed",
        "call_id": call_id,
        "name": name,
        "input": text,
    }


# --- responses --------------------------------------------------------------------------------------------------------


def _counts(input_tokens: int, output: int, cached: int = 0, written: int | None = 0, reasoning: int = 0) -> Item:
    details = {"cached_tokens": cached} | ({} if written is None else {"cache_write_tokens": written})
    return {
        "input_tokens": input_tokens,
        "input_tokens_details": details,
        "output_tokens": output,
        "output_tokens_details": {"reasoning_tokens": reasoning},
        "total_tokens": input_tokens + output,
    }


def _response(response_id: str, status: str, output: list[Item] | None, counts: Item | None, **members: Any) -> Item:
    response = {
        "id": response_id,
        "object": "response",
        "created_at": 1795219200,
        "status": status,
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": None,
        "model": CODEX,
        "output": output,
        "parallel_tool_calls": True,
        "previous_response_id": None,
        "reasoning": {"effort": "medium", "summary": "auto"},
        "store": False,
        "text": {"format": {"type": "text"}, "verbosity": "medium"},
        "tool_choice": "auto",
        "tools": [],
        "truncation": "disabled",
        "usage": counts,
        "metadata": {},
        **members,
    }
    return response if output is not None else {key: value for key, value in response.items() if key != "output"}


class _Script:
    """Writes the events of one response, numbering them."""

    def __init__(self, response_id: str) -> None:
        self.response_id = response_id
        self.events: list[str] = []
        self.items: list[Item] = []
        self.emit("response.created", response=_response(response_id, "in_progress", [], None))
        self.emit("response.in_progress", response=_response(response_id, "in_progress", [], None))

    def emit(self, kind: str, **members: Any) -> None:
        data = {"type": kind, "sequence_number": len(self.events), **members}
        self.events.append(f"event: {kind}\ndata: {_compact(data)}\n\n")

    def add(self, item: Item, *between: tuple[str, Item]) -> None:
        """The item's added event (bare of its content), its own events, its done event."""
        index = len(self.items)
        self.items.append(item)
        place = {"output_index": index, "item_id": item["id"]}
        bare = {"content": [], "summary": [], "arguments": "", "input": "", "encrypted_content": "gAAAAABpIpart"}
        opened = {key: bare.get(key, value) for key, value in item.items()}
        self.emit(
            "response.output_item.added",
            output_index=index,
            item=opened | ({"status": "in_progress"} if "status" in item else {}),
        )
        for kind, members in between or self._usual(item):
            self.emit(kind, **place, **members)
        self.emit("response.output_item.done", output_index=index, item=item)

    def _usual(self, item: Item) -> list[tuple[str, Item]]:
        match item["type"]:
            case "message":
                return _message_events(item["content"][0]["text"])
            case "reasoning":
                return _reasoning_events(item)
            case "function_call":
                return _halves("response.function_call_arguments", "arguments", item["arguments"])
            case "custom_tool_call":
                return _halves("response.custom_tool_call_input", "input", item["input"])
            case "mcp_call":
                moves = _halves("response.mcp_call_arguments", "arguments", item["arguments"])
                return [("response.mcp_call.in_progress", {}), *moves, ("response.mcp_call.completed", {})]
            case "code_interpreter_call":
                return _halves("response.code_interpreter_call_code", "code", item["code"])
            case "web_search_call" | "file_search_call":
                return [(f"response.{item['type']}.{state}", {}) for state in ("in_progress", "searching", "completed")]
            case _:
                return []

    def end(self, status: str, counts: Item | None, output: list[Item] | None, **members: Any) -> None:
        self.emit(f"response.{status}", response=_response(self.response_id, status, output, counts, **members))

    def done(self, counts: Item | None) -> str:
        self.end("completed", counts, self.items)
        return self.text()

    def text(self) -> str:
        return "".join(self.events)


def _halves(kind: str, member: str, text: str) -> list[tuple[str, Item]]:
    middle = len(text) // 2
    deltas = [(f"{kind}.delta", {"delta": piece}) for piece in (text[:middle], text[middle:]) if piece]
    return [*deltas, (f"{kind}.done", {member: text})]


def _message_events(text: str) -> list[tuple[str, Item]]:
    part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
    deltas = [
        (kind, members | {"content_index": 0, "logprobs": []})
        for kind, members in _halves("response.output_text", "text", text)
    ]
    return [
        ("response.content_part.added", {"content_index": 0, "part": part}),
        *deltas,
        ("response.content_part.done", {"content_index": 0, "part": part | {"text": text}}),
    ]


def _reasoning_events(item: Item) -> list[tuple[str, Item]]:
    events: list[tuple[str, Item]] = []
    for index, part in enumerate(item["summary"]):
        place = {"summary_index": index}
        events.append(("response.reasoning_summary_part.added", place | {"part": part | {"text": ""}}))
        halves = _halves("response.reasoning_summary_text", "text", part["text"])
        events += [(kind, place | members) for kind, members in halves]
        events.append(("response.reasoning_summary_part.done", place | {"part": part}))
    for index, part in enumerate(item.get("content", ())):
        halves = _halves("response.reasoning_text", "text", part["text"])
        events += [(kind, members | {"content_index": index}) for kind, members in halves]
    return events


def _expect(
    response_id: str | None, prompt: str | None, stream: bool = True, failed: bool = False, **members: Any
) -> Expectation:
    return Expectation("failed" if failed else "completed", 200, stream, CODEX, response_id, prompt, **members)


def _stream(
    name: str, response: str | bytes, expect: Expectation, request: bytes | None = None, **members: Any
) -> Recording:
    return Recording(
        name,
        "responses",
        request or _ask(expect.prompt or "", True),
        response if isinstance(response, bytes) else response.encode(),
        expect,
        content_type=STREAM,
        headers=[("x-request-id", f"req_{name}"), ("openai-version", "2020-10-01")],
        **members,
    )


def _blocking(name: str, response: bytes, expect: Expectation, request: bytes | None = None, **members: Any) -> Recording:
    return Recording(
        name,
        "responses",
        request or _ask(expect.prompt or "", False),
        response,
        expect,
        headers=[("x-request-id", f"req_{name}")],
        **members,
    )


def _http_error(name: str, status: int, error: Item, headers: list[tuple[str, str]] | None = None) -> Recording:
    return Recording(
        name,
        "responses",
        _ask("Hi", True),
        json.dumps({"error": error}, indent=2).encode(),
        Expectation("failed", status, True, CODEX, None, "Hi"),
        status=status,
        headers=[("x-request-id", f"req_{name}"), *(headers or [])],
    )


# --- text, thoughts, client tools -------------------------------------------------------------------------------------


def _hello() -> str:
    script = _Script("resp_hello")
    script.add(_message("msg_hello", "Hello, wörld 🌍\u2028", phase="final_answer"))
    return script.done(_counts(37, 11))


_HELLO_EXPECT = _expect("resp_hello", "Say hello", usage=usage(37, 11, 0, 0), text="Hello, wörld 🌍\u2028")


def _agentic() -> str:
    script = _Script("resp_agentic")
    script.add(_reasoning("rs_1", "**Looking**\n\nI should look.", "**Acting**"))
    script.add(_function("fc_1", "call_fc1", "shell", '{"command": ["ls", "-l"], "n": 1.0e2}'))
    script.add(_function("fc_2", "call_fc2", "now", ""))
    script.add(_custom("ctc_1", "call_ctc1", "apply_patch", '*** Begin Patch\n"x"\n*** End Patch'))
    return script.done(_counts(3500, 140, cached=3072, reasoning=64))


def _commentary() -> str:
    script = _Script("resp_comment")
    script.add(_reasoning("rs_2"))
    script.add(_message("msg_c1", "I am looking at the tests first.", phase="commentary"))
    script.add(_function("fc_3", "call_fc3", "shell", "{}"))
    return script.done(_counts(900, 60, cached=100, written=300))


def _open_model() -> str:
    script = _Script("resp_open")
    content = [{"type": "reasoning_text", "text": "Raw "}, {"type": "reasoning_text", "text": "thought."}]
    script.add(_reasoning("rs_3", content=content))
    script.add(_message("msg_o", "Done."))
    return script.done(_counts(50, 20, written=None))


def _unknown() -> str:
    script = _Script("resp_unknown")
    script.emit("response.x_progress", percent=50)
    script.add({"id": "xx_1", "type": "x_hologram", "status": "completed", "layers": [1]})
    script.emit("keepalive")
    script.add(_message("msg_u", "Yes.", x_new=None))
    return script.done(_counts(5, 6) | {"x_new_tokens": 1})


_TEXT = (
    _stream("responses-text-stream", _hello(), _HELLO_EXPECT),
    _stream("responses-crlf-stream", _hello().replace("\n", "\r\n"), _HELLO_EXPECT),
    _stream("responses-comments-stream", ": ok\n\n" + _hello().replace("event: ", ": keep-alive\n\nevent: "), _HELLO_EXPECT),
    _stream(
        "responses-unnamed-events-stream",
        "".join(f"{line}\n" for line in _hello().split("\n")[:-1] if not line.startswith("event:")),
        _HELLO_EXPECT,
    ),
    _stream("responses-done-marker-stream", _hello() + "data: [DONE]\n\n", _HELLO_EXPECT),
    _blocking(
        "responses-text-blocking",
        json.dumps(
            _response("resp_block", "completed", [_message("msg_b", 'A "story".')], _counts(12, 7)), indent=2
        ).encode(),
        _expect("resp_block", 'Tell me a "story"', stream=False, usage=usage(12, 7, 0, 0), text='A "story".'),
        STRING_REQUEST,
    ),
    _stream(
        "responses-agentic-stream",
        _agentic(),
        _expect(
            "resp_agentic",
            "Look and act",
            usage=usage(428, 140, 3072, 0),
            tool_calls=[
                client_call("call_fc1", "shell", '{"command": ["ls", "-l"], "n": 1.0e2}'),
                client_call("call_fc2", "now", ""),
                client_call("call_ctc1", "apply_patch", '*** Begin Patch\n"x"\n*** End Patch'),
            ],
            thoughts=[("reasoning_summary", "**Looking**\n\nI should look."), ("reasoning_summary", "**Acting**")],
        ),
    ),
    _blocking(
        "responses-agentic-blocking",
        _compact(
            _response(
                "resp_agentb",
                "completed",
                [
                    _reasoning("rs_b", "Hm."),
                    _message("msg_cb", "Just a moment.", phase="commentary"),
                    _function("fc_b", "call_fcb", "shell", '{ "c" : "\\ud83d" }'),
                    _custom("ctc_b", "call_ctcb", "apply_patch", "*** é\n"),
                ],
                _counts(100, 30, cached=90, written=20),
            )
        ).encode(),
        _expect(
            "resp_agentb",
            "Look and act",
            stream=False,
            usage=usage(0, 30, 90, 20),
            tool_calls=[
                client_call("call_fcb", "shell", '{ "c" : "\\ud83d" }'),
                client_call("call_ctcb", "apply_patch", "*** é\n"),
            ],
            thoughts=[("reasoning_summary", "Hm."), ("commentary", "Just a moment.")],
            text="Just a moment.",
        ),
    ),
    _stream(
        "responses-commentary-stream",
        _commentary(),
        _expect(
            "resp_comment",
            "Fix the tests",
            usage=usage(500, 60, 100, 300),
            tool_calls=[client_call("call_fc3", "shell", "{}")],
            thoughts=[("commentary", "I am looking at the tests first.")],
            text="I am looking at the tests first.",
        ),
    ),
    _stream(
        "responses-reasoning-content-stream",
        _open_model(),
        _expect(
            "resp_open",
            "Think aloud",
            usage=usage(50, 20, 0),
            thoughts=[("reasoning", "Raw "), ("reasoning", "thought.")],
            text="Done.",
        ),
    ),
    _stream(
        "responses-unknown-everything-stream",
        _unknown(),
        _expect("resp_unknown", "Surprise me", usage=usage(5, 6, 0, 0), text="Yes."),
    ),
    _stream(
        "responses-stateful-continuation-stream",
        _hello(),
        _expect(
            "resp_hello",
            None,
            correlating_tool_call_id="call_2",
            usage=usage(37, 11, 0, 0),
            text="Hello, wörld 🌍\u2028",
        ),
        STATEFUL_REQUEST,
    ),
    _stream(
        "responses-stateless-continuation-stream",
        _hello(),
        _expect(
            "resp_hello",
            None,
            correlating_tool_call_id="call_patch",
            usage=usage(37, 11, 0, 0),
            text="Hello, wörld 🌍\u2028",
        ),
        STATELESS_REQUEST,
    ),
)

# --- tools that the provider runs -------------------------------------------------------------------------------------

_HOSTED_ITEMS: list[Item] = [
    {
        "id": "mcpl_1",
        "type": "mcp_list_tools",
        "server_label": "docs",
        "tools": [{"name": "ask", "input_schema": {"type": "object"}, "annotations": None, "description": None}],
    },
    {
        "id": "ws_1",
        "type": "web_search_call",
        "status": "completed",
        "action": {"type": "search", "query": "aibridge é ledger", "queries": ["aibridge é ledger"]},
    },
    {
        "id": "mcp_1",
        "type": "mcp_call",
        "status": "completed",
        "approval_request_id": None,
        "arguments": '{"q": "ledger"}',
        "error": None,
        "name": "ask",
        "output": "An account book",
        "server_label": "docs",
    },
    {
        "id": "ci_1",
        "type": "code_interpreter_call",
        "status": "completed",
        "code": 'print("1" + "1")\n',
        "container_id": "cntr_1",
        "outputs": None,
    },
    {"id": "fs_1", "type": "file_search_call", "status": "completed", "queries": ["a \u2028 b", "c"], "results": None},
    {"id": "ig_1", "type": "image_generation_call", "status": "completed", "result": "iVBORw0KGgo="},
    _message("msg_h", "Done."),
]

_HOSTED_CALLS = [
    provider_call("ws_1", "web_search", '{"type":"search","query":"aibridge é ledger","queries":["aibridge é ledger"]}'),
    provider_call("mcp_1", "ask", '{"q": "ledger"}'),
    provider_call("ci_1", "code_interpreter", 'print("1" + "1")\n'),
    provider_call("fs_1", "file_search", '["a \u2028 b","c"]'),
    provider_call("ig_1", "image_generation", None),
]


def _hosted() -> str:
    script = _Script("resp_hosted")
    for item in _HOSTED_ITEMS:
        script.add(item)
    return script.done(_counts(8000, 250, cached=4000))


_HOSTED = (
    _stream(
        "responses-hosted-tools-stream",
        _hosted(),
        _expect(
            "resp_hosted",
            "Use everything",
            usage=usage(4000, 250, 4000, 0),
            tool_calls=_HOSTED_CALLS,
            text="Done.",
        ),
    ),
    _blocking(
        "responses-hosted-tools-blocking",
        b'{"id":"resp_hostedb","object":"response","created_at":1795219200,"status":"completed","model":"gpt-5.4-codex",'
        b'"output":[{"id":"ws_b","type":"web_search_call","status":"completed","action":{ "url" : "https://example.test/a",'
        b' "type":"open_page" }},{"id":"fs_b","type":"file_search_call","status":"completed","queries":[ "x" ,'
        b'"\\u0079" ],"results":null},{"type":"mcp_call","id":"mcp_b","server_label":"docs","name":"ask",'
        b'"arguments":"{\\"q\\":\\n1}",'
        b'"output":null,"error":{"type":"mcp_tool_execution_error","content":[]}},{"id":"msg_hb","type":"message",'
        b'"role":"assistant","status":"completed","content":[{"type":"output_text","text":"Done.","annotations":[]}]}],'
        b'"parallel_tool_calls":true,"tool_choice":"auto","tools":[],"usage":{"input_tokens":10,"output_tokens":4,'
        b'"total_tokens":14}}',
        _expect(
            "resp_hostedb",
            "Use some",
            stream=False,
            usage=usage(10, 4),
            tool_calls=[
                provider_call("ws_b", "web_search", '{ "url" : "https://example.test/a", "type":"open_page" }'),
                provider_call("fs_b", "file_search", '[ "x" ,"\\u0079" ]'),
                provider_call("mcp_b", "ask", '{"q":\n1}'),
            ],
            text="Done.",
        ),
    ),
)

# --- odd ends ---------------------------------------------------------------------------------------------------------


def _ending(output: list[Item] | None) -> str:
    """Everything stands in output_item.done; the terminal event repeats nothing."""
    script = _Script("resp_end")
    script.add(_reasoning("rs_e", "Hm."))
    script.add(_function("fc_e", "call_e", "shell", '{"a":1}'))
    script.add(_message("msg_e", "Done."))
    script.end("completed", _counts(20, 9), output)
    return script.text()


_END_PARTS: dict[str, Any] = {
    "usage": usage(20, 9, 0, 0),
    "tool_calls": [client_call("call_e", "shell", '{"a":1}')],
    "thoughts": [("reasoning_summary", "Hm.")],
    "text": "Done.",
}


def _incomplete() -> str:
    script = _Script("resp_inc")
    script.add(_message("msg_i", "Once upon"))
    script.end("incomplete", _counts(20, 16), script.items, incomplete_details={"reason": "max_output_tokens"})
    return script.text()


def _no_usage() -> str:
    script = _Script("resp_nousage")
    script.add(_message("msg_n", "Yes."))
    return script.done(None)


_ENDS = (
    _stream(
        "responses-empty-terminal-output-stream",
        _ending([]),
        _expect("resp_end", "End oddly", **_END_PARTS),
        sdk_differs="it trusts the explicit empty list, and so gives back no items at all",
    ),
    _stream("responses-absent-terminal-output-stream", _ending(None), _expect("resp_end", "End oddly", **_END_PARTS)),
    _stream(
        "responses-incomplete-stream",
        _incomplete(),
        _expect("resp_inc", "A story", usage=usage(20, 16, 0, 0), text="Once upon"),
        sdk_fails="its helper knows one good end only, response.completed",
    ),
    _blocking(
        "responses-incomplete-blocking",
        _compact(
            _response(
                "resp_incb",
                "incomplete",
                [_message("msg_ib", "Once upon")],
                _counts(20, 16, cached=4),
                incomplete_details={"reason": "content_filter"},
            )
        ).encode(),
        _expect("resp_incb", "A story", stream=False, usage=usage(16, 16, 4, 0), text="Once upon"),
    ),
    _stream(
        "responses-no-usage-stream",
        _no_usage(),
        _expect("resp_nousage", "Free of charge", usage=UNKNOWN, text="Yes."),
    ),
)

# --- failures ---------------------------------------------------------------------------------------------------------

_FAULT: Item = {"code": "server_error", "message": "The model melted."}


def _far(kind: str = "", **members: Any) -> str:
    """A stream that got as far as a whole call, and then perhaps an event of that kind."""
    script = _Script("resp_far")
    script.add(_reasoning("rs_f", "Hm."))
    script.add(_function("fc_f", "call_f", "shell", '{"a":1}'))
    if kind:
        script.emit(kind, **members)
    return script.text()


def _failed_stream(counts: Item | None) -> str:
    return _far("response.failed", response=_response("resp_far", "failed", [], counts, error=_FAULT))


_FAR_PARTS: dict[str, Any] = {
    "failed": True,
    "usage": NOTHING_YET,
    "tool_calls": [client_call("call_f", "shell", '{"a":1}')],
    "thoughts": [("reasoning_summary", "Hm.")],
}
_FAR_EXPECT = _expect("resp_far", "Go far", **_FAR_PARTS)


def _begun_call() -> str:
    script = _Script("resp_far")
    script.add(_reasoning("rs_f", "Hm."))
    script.add(_function("fc_f", "call_f", "shell", '{"a":1}'))
    script.emit("response.output_item.added", output_index=2, item=_function("fc_g", "call_g", "shell", ""))
    script.emit("response.function_call_arguments.delta", output_index=2, item_id="fc_g", delta='{"b')
    return script.text()


_FAILURES = (
    _stream("responses-failed-stream", _failed_stream(None), _FAR_EXPECT),
    _stream(
        "responses-failed-with-usage-stream",
        _failed_stream(_counts(100, 5, cached=60)),
        _expect("resp_far", "Go far", **_FAR_PARTS | {"usage": usage(40, 5, 60, 0, "partial")}),
    ),
    _blocking(
        "responses-failed-blocking",
        _compact(_response("resp_failb", "failed", [], None, error=_FAULT)).encode(),
        _expect("resp_failb", "Fail", stream=False, failed=True, usage=NOTHING_YET),
    ),
    _stream("responses-error-flat-stream", _far("error", **_FAULT, param=None), _FAR_EXPECT),
    _stream("responses-error-nested-stream", _far("error", error=_FAULT | {"type": "server_error"}), _FAR_EXPECT),
    _stream(
        "responses-error-first-stream",
        b'event: error\ndata: {"type":"error","code":"rate_limit_exceeded","message":"Slow down","param":null,'
        b'"sequence_number":0}\n\n',
        _expect(None, "Fail at once", failed=True, usage=NOTHING_YET),
    ),
    _stream(
        "responses-cut-after-created",
        _Script("resp_cut").text(),
        _expect("resp_cut", "Cut", failed=True, usage=NOTHING_YET),
        cut=True,
    ),
    _stream("responses-cut-between-items", _far(), _FAR_EXPECT, cut=True),
    _stream(
        "responses-cut-inside-an-event",
        (_far() + _hello()).encode()[: len(_far().encode()) + 40],
        _FAR_EXPECT,
        cut=True,
    ),
    _stream(
        "responses-cut-inside-a-tool-call",
        _begun_call(),
        _expect("resp_far", "Go far", undecided=frozenset({"tool_calls"}), **_FAR_PARTS),
        cut=True,
    ),
    _stream("responses-eof-without-end", _far(), _FAR_EXPECT),
    _blocking(
        "responses-cut-blocking",
        b'{"object":"respo',
        _expect(None, "Cut", stream=False, failed=True, usage=NOTHING_YET),
        cut=True,
    ),
    _http_error(
        "responses-error-400",
        400,
        {
            "message": "No tool output found for function call call_1.",
            "type": "invalid_request_error",
            "param": "input",
            "code": None,
        },
    ),
    _http_error(
        "responses-error-429",
        429,
        {"message": "Rate limit reached", "type": "tokens", "param": None, "code": "rate_limit_exceeded"},
        [("retry-after", "12"), ("x-ratelimit-remaining-requests", "0")],
    ),
    _http_error(
        "responses-error-500",
        500,
        {"message": "Internal error", "type": "server_error", "param": None, "code": "server_error"},
    ),
)

RESPONSES: tuple[Recording, ...] = (*_TEXT, *_HOSTED, *_ENDS, *_FAILURES)
