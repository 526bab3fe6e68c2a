"""Anthropic Messages. Grammar: message_start, blocks by index, message_delta, message_stop; pings anywhere."""

import json
from typing import Any

from .recording import NOTHING_YET, UNKNOWN, Expectation, Recording, client_call, provider_call, usage

STREAM = "text/event-stream; charset=utf-8"
OPUS = "claude-opus-5-5"


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


# --- requests ---------------------------------------------------------------------------------------------------------


def _ask(prompt: str, stream: bool = True, model: str = OPUS, extra: str = "") -> bytes:
    """A hand-written body: odd spacing, an unknown member, a number that no decoder gives back as it was."""
    return (
        f'{{ "model" : "{model}",\n  "max_tokens":1024, "x_unknown": {{"a":1.0e2 , "a":2}},'
        f'{extra} "stream":{"true" if stream else "false"},\n  "messages": [ {{"role":"user","content":'
        f"{json.dumps(prompt, ensure_ascii=False)}}} ] }}\n"
    ).encode()


CLAUDE_CODE_REQUEST = (
    b'{"model":"claude-opus-5-5","messages":[{"role":"user","content":['
    b'{"type":"text","text":"<system-reminder>\\nThe date is 2026-11-21.\\n</system-reminder>\\n"},'
    b'{"type":"text","text":"Say hello, s\\u00e9bastien","cache_control":{"type":"ephemeral"}}]},'
    b'{"role":"system","content":"<total_tokens>500000 tokens left</total_tokens>","output_config":{"effort":"high"}}],'
    b'"system":[{"type":"text","text":"x-anthropic-billing-header: cc_version=2.1.330; cc_entrypoint=sdk-cli;"},'
    b'{"type":"text","text":"You are Claude Code.","cache_control":{"type":"ephemeral","ttl":"1h"}}],'
    b'"tools":[{"name":"Bash","description":"Runs a command","input_schema":{"type":"object","properties":'
    b'{"command":{"type":"string"}},"required":["command"],"additionalProperties":false}},'
    b'{"name":"WebFetch","description":"Fetches","input_schema":{"type":"object"},"defer_loading":true}],'
    b'"metadata":{"user_id":"{\\"device_id\\":\\"d1\\",\\"account_uuid\\":\\"\\",'
    b'\\"session_id\\":\\"0e9a4b52-6a7e-4f0e-9d43-0a1b2c3d4e5f\\"}"},"max_tokens":128000,'
    b'"thinking":{"type":"adaptive","display":"omitted"},'
    b'"context_management":{"edits":[{"type":"clear_thinking_20251015","keep":"all"}]},'
    b'"output_config":{"effort":"high"},"stream":true}'
)

TOOL_RESULT_REQUEST = (
    b'{"model":"claude-opus-5-5","max_tokens":4096,"stream":true,"messages":['
    b'{"role":"user","content":"What is in a.txt and b.txt?"},'
    b'{"role":"assistant","content":[{"type":"thinking","thinking":"","signature":"EqQBCkYIBxgCKkA="},'
    b'{"type":"tool_use","id":"toolu_01A","name":"Read","input":{"path" :"a.txt"}},'
    b'{"type":"tool_use","id":"toolu_01B","name":"Read","input":{"path":"b.txt","limit":1e2}}]},'
    b'{"role":"user","content":[{"type":"tool_result","tool_use_id":"toolu_01A","content":"alpha"},'
    b'{"type":"tool_result","tool_use_id":"toolu_01B","is_error":true,'
    b'"content":[{"type":"text","text":"no such file"}]}]}]}'
)


# --- responses --------------------------------------------------------------------------------------------------------


def _event(data: dict[str, Any], padding: str = "") -> str:
    return f"event: {data['type']}\ndata: {_compact(data)}{padding}\n\n"


def _start(response_id: str, counts: dict[str, Any] | None, model: str = OPUS, **members: Any) -> str:
    message: dict[str, Any] = {
        "model": model,
        "id": response_id,
        "type": "message",
        "role": "assistant",
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "stop_details": None,
    }
    if counts is not None:
        message["usage"] = counts
    # Anthropic pads events with spaces against traffic analysis.
    return _event({"type": "message_start", "message": message | members}, padding="      ")


def _block(index: int, block: dict[str, Any], *deltas: dict[str, Any]) -> str:
    return "".join(
        [
            _event({"type": "content_block_start", "index": index, "content_block": block}),
            *(_event({"type": "content_block_delta", "index": index, "delta": delta}) for delta in deltas),
            _event({"type": "content_block_stop", "index": index}),
        ]
    )


def _text(index: int, *pieces: str) -> str:
    return _block(index, {"type": "text", "text": ""}, *({"type": "text_delta", "text": piece} for piece in pieces))


def _thinking(index: int, signature: str, *pieces: str) -> str:
    return _block(
        index,
        {"type": "thinking", "thinking": "", "signature": ""},
        *({"type": "thinking_delta", "thinking": piece} for piece in pieces),
        {"type": "signature_delta", "signature": signature},
    )


def _tool(index: int, call_id: str, name: str, *pieces: str, kind: str = "tool_use") -> str:
    return _block(
        index,
        {"type": kind, "id": call_id, "name": name, "input": {}},
        *({"type": "input_json_delta", "partial_json": piece} for piece in pieces),
    )


def _delta(stop_reason: str, counts: dict[str, Any] | None, **members: Any) -> str:
    data: dict[str, Any] = {
        "type": "message_delta",
        "delta": {"stop_reason": stop_reason, "stop_sequence": None, **members},
    }
    if counts is not None:
        data["usage"] = counts
    return _event(data)


_PING = 'event: ping\ndata: {"type": "ping"}\n\n'
_STOP = _event({"type": "message_stop"}, padding="   ")


def _counts(input_tokens: int, output_tokens: int, read: int = 0, write: int = 0) -> dict[str, Any]:
    """The full usage object of message_start and of blocking bodies."""
    return {
        "input_tokens": input_tokens,
        "cache_creation_input_tokens": write,
        "cache_read_input_tokens": read,
        "cache_creation": {"ephemeral_5m_input_tokens": write, "ephemeral_1h_input_tokens": 0},
        "output_tokens": output_tokens,
        "service_tier": "standard",
        "inference_geo": "not_available",
    }


def _body(response_id: str, content: str, stop_reason: str, counts: str) -> bytes:
    """A blocking body; content and usage are given as JSON text so that they stay as written."""
    return (
        f'{{"model":"{OPUS}","id":"{response_id}","type":"message","role":"assistant","content":{content},'
        f'"stop_reason":"{stop_reason}","stop_sequence":null,"usage":{counts}}}'
    ).encode()


def _stream(
    name: str, response: str | bytes, expect: Expectation, request: bytes | None = None, **members: Any
) -> Recording:
    return Recording(
        name,
        "messages",
        request if request is not None else _ask(expect.prompt or ""),
        response if isinstance(response, bytes) else response.encode(),
        expect,
        content_type=STREAM,
        headers=[("request-id", f"req_{name}"), ("Cache-Control", "no-cache")],
        **members,
    )


def _blocking(name: str, response: bytes, expect: Expectation, **members: Any) -> Recording:
    return Recording(
        name,
        "messages",
        _ask(expect.prompt or "", stream=False),
        response,
        expect,
        headers=[("request-id", f"req_{name}")],
        **members,
    )


def _ended(response_id: str, prompt: str | None, stream: bool = True, **members: Any) -> Expectation:
    return Expectation("completed", 200, stream, OPUS, response_id, prompt, **members)


def _failed(response_id: str | None, prompt: str | None, stream: bool = True, **members: Any) -> Expectation:
    return Expectation("failed", 200, stream, OPUS, response_id, prompt, **members)


def _http_error(name: str, status: int, kind: str, message: str, headers: list[tuple[str, str]] | None = None) -> Recording:
    body = _compact({"type": "error", "error": {"type": kind, "message": message}, "request_id": f"req_{name}"})
    return Recording(
        name,
        "messages",
        _ask("Hi"),
        body.encode(),
        Expectation("failed", status, True, OPUS, None, "Hi"),
        status=status,
        headers=[("request-id", f"req_{name}"), *(headers or [])],
    )


_PLAIN = """\
event: message_start
data: {"type":"message_start","message":{"model":"claude-opus-5-5","id":"msg_plain","type":"message",\
"role":"assistant","content":[],"stop_reason":null,"stop_sequence":null,"usage":{"input_tokens":25,"cache_creation_input_tokens":0,\
"cache_read_input_tokens":0,"cache_creation":{"ephemeral_5m_input_tokens":0,"ephemeral_1h_input_tokens":0},\
"output_tokens":1,"service_tier":"standard"}} }

event: content_block_start
data: {"type":"content_block_start","index":0,"content_block":{"type":"text","text":""}      }

event: ping
data: {"type": "ping"}

event: content_block_delta
data: {"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"Hello"}           }

event: content_block_delta
data: {"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":", wörld 🌍\u2028"} }

event: content_block_stop
data: {"type":"content_block_stop","index":0  }

event: message_delta
data: {"type":"message_delta","delta":{"stop_reason":"end_turn","stop_sequence":null},"usage":{"output_tokens":15} }

event: message_stop
data: {"type":"message_stop"    }

""".encode()
"""The simplest stream, by hand, with the spaces that Anthropic pads with; its framing variants carry the same."""


def _plain(prompt: str = "Say hello") -> Expectation:
    return _ended("msg_plain", prompt, usage=usage(25, 15, 0, 0), text="Hello, wörld 🌍\u2028")


# --- plain streams and their framings ---------------------------------------------------------------------------------

_FRAMINGS = (
    _stream("messages-text-stream", _PLAIN, _plain()),
    _stream(
        "messages-claude-code-request",
        _PLAIN,
        _ended(
            "msg_plain",
            "<system-reminder>\nThe date is 2026-11-21.\n</system-reminder>\n\nSay hello, sébastien",
            usage=usage(25, 15, 0, 0),
            text="Hello, wörld 🌍\u2028",
        ),
        CLAUDE_CODE_REQUEST,
    ),
    _stream("messages-crlf-stream", _PLAIN.replace(b"\n", b"\r\n"), _plain()),
    _stream("messages-cr-stream", _PLAIN.replace(b"\n", b"\r"), _plain()),
    _stream(
        "messages-bom-stream",
        b"\xef\xbb\xbf" + _PLAIN,
        _plain(),
        sdk_fails="it takes the byte order mark for part of the first field's name, and so loses message_start",
    ),
    _stream("messages-no-space-stream", _PLAIN.replace(b"data: ", b"data:").replace(b"event: ", b"event:"), _plain()),
    _stream(
        "messages-comments-stream",
        b": connected\n\n" + _PLAIN.replace(b"event: content", b": keep-alive\nid: 7\nretry: 10\nevent: content"),
        _plain(),
    ),
    _stream(
        "messages-split-data-stream",
        _PLAIN.replace(b',"index":0', b',\ndata: "index"\ndata::0'),
        _plain(),
    ),
    _stream("messages-no-final-blank-line", _PLAIN.rstrip(b"\n"), _plain()),
    _stream("messages-many-pings", _PLAIN.replace(b"event: content", _PING.encode() * 3 + b"event: content"), _plain()),
)

# --- thinking ---------------------------------------------------------------------------------------------------------

_THINKING = (
    _stream(
        "messages-thinking-stream",
        _start("msg_think", _counts(52, 3))
        + _PING
        + _thinking(0, "EqQBCgIYAhIkc2ln", "27 times ", "453 is\n", "12231.")
        + _text(1, "27 * 453 = ", "12,231")
        + _delta("end_turn", _counts(52, 94) | {"output_tokens_details": {"thinking_tokens": 61}})
        + _STOP,
        _ended(
            "msg_think",
            "What is 27 * 453?",
            usage=usage(52, 94, 0, 0),
            thoughts=[("thinking", "27 times 453 is\n12231.")],
            text="27 * 453 = 12,231",
        ),
    ),
    _blocking(
        "messages-thinking-blocking",
        _body(
            "msg_thinkb",
            '[{"type":"thinking","thinking":"First, \\u2028 look.","signature":"EqQB"},'
            '{"type":"thinking","thinking":"","signature":"EqQC"},{"type":"text","text":"Done."}]',
            "end_turn",
            '{"input_tokens":30,"cache_creation_input_tokens":null,"cache_read_input_tokens":null,"output_tokens":12}',
        ),
        _ended(
            "msg_thinkb",
            "Think twice",
            stream=False,
            usage=usage(30, 12),
            thoughts=[("thinking", "First, \u2028 look."), ("thinking", "")],
            text="Done.",
        ),
    ),
    _stream(
        "messages-redacted-thinking-stream",
        _start("msg_redacted", _counts(40, 2))
        + _block(0, {"type": "redacted_thinking", "data": "EmwKAhgBEgy3va3pzix/LafPsn4a"})
        + _thinking(1, "EqQBr", "Still here.")
        + _text(2, "Fine.")
        + _delta("end_turn", {"output_tokens": 33})
        + _STOP,
        _ended(
            "msg_redacted",
            "Trigger redaction",
            usage=usage(40, 33, 0, 0),
            thoughts=[("thinking", ""), ("thinking", "Still here.")],
            text="Fine.",
        ),
    ),
    _stream(
        "messages-omitted-thinking-stream",
        _start("msg_omitted", _counts(410, 1, read=1800))
        + _thinking(0, "EuYBCkQYAiJA")
        + _tool(1, "toolu_omit", "Bash", "", '{"comm', 'and": "ls -l"', "}")
        + _delta("tool_use", {"output_tokens": 71})
        + _STOP,
        _ended(
            "msg_omitted",
            "List the files",
            usage=usage(410, 71, 1800, 0),
            tool_calls=[client_call("toolu_omit", "Bash", '{"command": "ls -l"}')],
            thoughts=[("thinking", "")],
        ),
    ),
)

# --- tools ------------------------------------------------------------------------------------------------------------

_SEARCH_RESULTS = {
    "type": "web_search_tool_result",
    "tool_use_id": "srvtoolu_01",
    "content": [
        {
            "type": "web_search_result",
            "title": "Weather",
            "url": "https://example.test/nyc",
            "encrypted_content": "EqgfCioIARgBIiQ3YTAw",
            "page_age": None,
        }
    ],
}

_TOOLS = (
    _stream(
        "messages-parallel-tools-stream",
        _start("msg_parallel", _counts(472, 2))
        + _text(0, "I'll check ", "three things.")
        + _tool(1, "toolu_01", "get_weather", "", '{"location":', ' "San Fra', 'ncisco", "n": 1.0e2}')
        + _tool(2, "toolu_02", "get_time")
        + _tool(3, "toolu_03", "get_weather", '{"location":"Zürich \\ud83c\\udf0d"}')
        + _delta("tool_use", {"output_tokens": 89})
        + _STOP,
        _ended(
            "msg_parallel",
            "Weather and time?",
            usage=usage(472, 89, 0, 0),
            tool_calls=[
                client_call("toolu_01", "get_weather", '{"location": "San Francisco", "n": 1.0e2}'),
                client_call("toolu_02", "get_time", "{}"),
                client_call("toolu_03", "get_weather", '{"location":"Zürich \\ud83c\\udf0d"}'),
            ],
            text="I'll check three things.",
        ),
    ),
    _blocking(
        "messages-tools-blocking",
        _body(
            "msg_toolsb",
            '[{"type":"text","text":"Looking."}, {"type":"tool_use","id":"toolu_b1","name":"Read",'
            '"input": {"path" : "a.py",  "limit": 1e2, "limit":100000000000000000001} },'
            '{"type":"tool_use","input":{},"caller":{"type":"direct"},"name":"Now","id":"toolu_b2"}]',
            "tool_use",
            _compact(_counts(300, 41)),
        ),
        _ended(
            "msg_toolsb",
            "Read a.py",
            stream=False,
            usage=usage(300, 41, 0, 0),
            tool_calls=[
                client_call("toolu_b1", "Read", '{"path" : "a.py",  "limit": 1e2, "limit":100000000000000000001}'),
                client_call("toolu_b2", "Now", "{}"),
            ],
            text="Looking.",
        ),
    ),
    _stream(
        "messages-tool-result-stream",
        _start("msg_result", _counts(612, 1, read=1500, write=88))
        + _text(0, "alpha, and b.txt is missing.")
        + _delta("end_turn", {"output_tokens": 17})
        + _STOP,
        _ended(
            "msg_result",
            None,
            correlating_tool_call_id="toolu_01B",
            usage=usage(612, 17, 1500, 88),
            text="alpha, and b.txt is missing.",
        ),
        TOOL_RESULT_REQUEST,
    ),
    _stream(
        "messages-server-tool-stream",
        _start("msg_search", _counts(2679, 3))
        + _text(0, "I'll search.")
        + _tool(1, "srvtoolu_01", "web_search", "", '{"query"', ': "weather NYC"}', kind="server_tool_use")
        + _block(2, _SEARCH_RESULTS)
        + _block(
            3,
            {"type": "text", "text": "", "citations": []},
            {
                "type": "citations_delta",
                "citation": {
                    "type": "web_search_result_location",
                    "cited_text": "Sunny",
                    "url": "https://example.test/nyc",
                    "title": "Weather",
                    "encrypted_index": "Eo8BCioIAhgB",
                },
            },
            {"type": "text_delta", "text": " Sunny."},
        )
        + _delta(
            "end_turn",
            {
                "input_tokens": 10682,
                "cache_creation_input_tokens": 0,
                "cache_read_input_tokens": 0,
                "output_tokens": 510,
                "server_tool_use": {"web_search_requests": 1},
            },
        )
        + _STOP,
        _ended(
            "msg_search",
            "Weather in NYC?",
            usage=usage(10682, 510, 0, 0),
            tool_calls=[provider_call("srvtoolu_01", "web_search", '{"query": "weather NYC"}')],
            text="I'll search. Sunny.",
        ),
    ),
    _blocking(
        "messages-provider-tools-blocking",
        _body(
            "msg_mcpb",
            '[{"type":"server_tool_use","id":"srvtoolu_02","name":"code_execution","input":{"code":"1+1"}},'
            '{"type":"code_execution_tool_result","tool_use_id":"srvtoolu_02","content":{"type":"code_execution_result",'
            '"stdout":"2\\n","stderr":"","return_code":0,"content":[]}},'
            '{"type":"mcp_tool_use","id":"mcptoolu_01","name":"echo","server_name":"demo","input":{ "x": "y" }},'
            '{"type":"mcp_tool_result","tool_use_id":"mcptoolu_01","is_error":false,"content":[{"type":"text",'
            '"text":"y"}]},{"type":"tool_use","id":"toolu_m","name":"Read","input":{"p":1}}]',
            "tool_use",
            _compact(_counts(900, 80, write=12)),
        ),
        _ended(
            "msg_mcpb",
            "Compute and echo",
            stream=False,
            usage=usage(900, 80, 0, 12),
            tool_calls=[
                provider_call("srvtoolu_02", "code_execution", '{"code":"1+1"}'),
                provider_call("mcptoolu_01", "echo", '{ "x": "y" }'),
                client_call("toolu_m", "Read", '{"p":1}'),
            ],
        ),
    ),
    _stream(
        "messages-max-tokens-stream",
        _start("msg_max", _counts(33, 1))
        + _tool(0, "toolu_max", "Write", "", '{"path": "/tmp/x", "content": "abc')
        + _delta("max_tokens", {"output_tokens": 1024})
        + _STOP,
        _ended(
            "msg_max",
            "Write a novel",
            usage=usage(33, 1024, 0, 0),
            tool_calls=[client_call("toolu_max", "Write", '{"path": "/tmp/x", "content": "abc')],
        ),
        sdk_differs="it shows as much of the broken-off arguments as parses",
    ),
)

# --- usage ------------------------------------------------------------------------------------------------------------

_TEXT = _text(0, "Yes.")

_USAGE = (
    _blocking(
        "messages-text-blocking",
        b'{ "id":"msg_blocking", "type" : "message",\n "role":"assistant","model":"claude-opus-5-5","content":[\n'
        b'   {"type":"text","text":"Y\\u0065s \\/ no.","x_new":null}\n ],"stop_reason":"end_turn","stop_sequence":null,'
        b'"usage":{"input_tokens":2095,"cache_creation_input_tokens":156,"cache_read_input_tokens":20001,'
        b'"cache_creation":{"ephemeral_5m_input_tokens":100,"ephemeral_1h_input_tokens":56},"output_tokens":503,'
        b'"service_tier":"priority","x_future":{"tokens":7}},"container":null}\n',
        _ended("msg_blocking", "Yes?", stream=False, usage=usage(2095, 503, 20001, 156), text="Yes / no."),
    ),
    _stream(
        "messages-cache-split-stream",
        _start(
            "msg_split",
            _counts(4, 1, read=18000, write=700)
            | {"cache_creation": {"ephemeral_5m_input_tokens": 200, "ephemeral_1h_input_tokens": 500}},
        )
        + _TEXT
        + _delta("end_turn", {"input_tokens": 4, "cache_creation_input_tokens": 700, "output_tokens": 9})
        + _STOP,
        _ended("msg_split", "Cache this", usage=usage(4, 9, 18000, 700), text="Yes."),
    ),
    _stream(
        "messages-two-deltas-stream",
        _start("msg_two", _counts(10, 1))
        + _TEXT
        + _delta("end_turn", {"output_tokens": 5})
        + _delta("end_turn", {"output_tokens": 61})
        + _STOP,
        _ended("msg_two", "Twice", usage=usage(10, 61, 0, 0), text="Yes."),
    ),
    _stream(
        "messages-usage-only-in-delta-stream",
        _start("msg_late", {"input_tokens": 0, "output_tokens": 0})
        + _TEXT
        + _delta(
            "end_turn",
            {"input_tokens": 77, "cache_read_input_tokens": 640, "cache_creation_input_tokens": 3, "output_tokens": 8},
        )
        + _STOP,
        _ended("msg_late", "Late figures", usage=usage(77, 8, 640, 3), text="Yes."),
    ),
    _stream(
        "messages-zero-input-in-delta-stream",
        _start("msg_zero", _counts(1234, 1, read=50))
        + _TEXT
        + _delta("end_turn", {"input_tokens": 0, "output_tokens": 8})
        + _STOP,
        _ended("msg_zero", "Zero", usage=usage(1234, 8, 50, 0), text="Yes."),
        sdk_differs="a compatible server's zero in the delta erases the SDK's input_tokens",
    ),
    _stream(
        "messages-null-in-delta-stream",
        _start("msg_null", _counts(21, 1, read=5, write=6))
        + _TEXT
        + _delta(
            "end_turn",
            {
                "input_tokens": None,
                "cache_read_input_tokens": None,
                "cache_creation_input_tokens": None,
                "output_tokens": 8,
            },
        )
        + _STOP,
        _ended("msg_null", "Null", usage=usage(21, 8, 5, 6), text="Yes."),
    ),
    _stream(
        "messages-delta-without-usage-stream",
        _start("msg_nousagedelta", _counts(21, 1))
        + _TEXT
        + _delta("end_turn", {"output_tokens": 8})
        + _event({"type": "message_delta", "delta": {"stop_reason": "end_turn", "stop_sequence": None}, "usage": None})
        + _STOP,
        _ended("msg_nousagedelta", "A null usage", usage=usage(21, 8, 0, 0), text="Yes."),
        sdk_fails="it reads the totals of every message_delta, and this one has none",
    ),
    _stream(
        "messages-iterations-stream",
        _start("msg_iter", _counts(45, 1))
        + _TEXT
        + _delta(
            "end_turn",
            {
                "input_tokens": 45,
                "cache_creation_input_tokens": 0,
                "cache_read_input_tokens": 0,
                "output_tokens": 1234,
                "iterations": [
                    {
                        "type": "compaction",
                        "input_tokens": 180000,
                        "cache_creation_input_tokens": 10,
                        "cache_read_input_tokens": 20,
                        "cache_creation": {"ephemeral_5m_input_tokens": 10, "ephemeral_1h_input_tokens": 0},
                        "output_tokens": 3500,
                    },
                    {
                        "type": "message",
                        "model": None,
                        "input_tokens": 45,
                        "cache_creation_input_tokens": 0,
                        "cache_read_input_tokens": 0,
                        "output_tokens": 1234,
                    },
                ],
            },
        )
        + _STOP,
        _ended("msg_iter", "Go on", usage=usage(180045, 4734, 20, 10), text="Yes."),
        sdk_differs="it shows the top level, which leaves out what compaction cost",
    ),
    _blocking(
        "messages-iterations-blocking",
        _body(
            "msg_iterb",
            '[{"type":"compaction","content":"Summary.","encrypted_content":"Eo8B"},{"type":"text","text":"Yes."}]',
            "end_turn",
            '{"input_tokens":5,"cache_creation_input_tokens":0,"cache_read_input_tokens":0,"output_tokens":6,'
            '"iterations":[{"type":"fallback_message","model":"claude-opus-5-5","input_tokens":7,'
            '"cache_creation_input_tokens":0,"cache_read_input_tokens":1,"output_tokens":2},{"type":"message",'
            '"model":"claude-sonnet-5-5","input_tokens":5,"cache_creation_input_tokens":0,"cache_read_input_tokens":0,'
            '"output_tokens":6}]}',
        ),
        _ended("msg_iterb", "Fall back", stream=False, usage=usage(12, 8, 1, 0), text="Yes."),
        sdk_differs="it shows the top level, which speaks for the model that answered only",
    ),
    _stream(
        "messages-empty-iterations-stream",
        _start("msg_noiter", _counts(9, 1)) + _TEXT + _delta("end_turn", {"output_tokens": 4, "iterations": []}) + _STOP,
        _ended("msg_noiter", "Once", usage=usage(9, 4, 0, 0), text="Yes."),
    ),
    _stream(
        "messages-no-usage-stream",
        _start("msg_nousage", None) + _TEXT + _delta("end_turn", None) + _STOP,
        _ended("msg_nousage", "Free of charge", usage=UNKNOWN, text="Yes."),
        sdk_fails="it needs usage in both message_start and message_delta",
    ),
    _blocking(
        "messages-no-usage-blocking",
        b'{"id":"msg_nousageb","type":"message","role":"assistant","model":"claude-opus-5-5",'
        b'"content":[{"type":"text","text":"Yes."}],"stop_reason":"end_turn"}',
        _ended("msg_nousageb", "Free of charge", stream=False, usage=UNKNOWN, text="Yes."),
    ),
)

# --- what nobody has heard of, and refusals ---------------------------------------------------------------------------

_OPEN_SETS = (
    _stream(
        "messages-unknown-everything-stream",
        _start("msg_unknown", _counts(18, 1) | {"x_new_tokens": 5}, x_extra={"deep": [1, None]})
        + _event({"type": "x_progress", "percent": 50})
        + _block(0, {"type": "x_hologram", "layers": 3}, {"type": "x_layer_delta", "layer": "abc"})
        + _block(
            1,
            {"type": "text", "text": "", "x_tone": "warm"},
            {"type": "x_style_delta", "style": "bold"},
            {"type": "text_delta", "text": "Yes.", "x_confidence": 0.9},
        )
        + _delta("x_new_reason", {"output_tokens": 12, "x_new_tokens": 6}, x_more=True)
        + _STOP,
        _ended("msg_unknown", "Surprise me", usage=usage(18, 12, 0, 0), text="Yes."),
    ),
    _stream(
        "messages-refusal-stream",
        _start("msg_refusal", _counts(61, 1))
        + _delta(
            "refusal",
            {"output_tokens": 1},
            stop_details={"type": "refusal", "category": "cyber", "explanation": "No."},
        )
        + _STOP,
        _ended("msg_refusal", "Write malware", usage=usage(61, 1, 0, 0)),
    ),
    _stream(
        "messages-odd-tool-text-stream",
        _start("msg_odd", _counts(18, 1))
        + _tool(0, "toolu_odd", "Eval", '{"a":1E400,"a":', '"\\ud800\\u0000","b":-0,"c":"\\/"}')
        + _delta("tool_use", {"output_tokens": 12})
        + _STOP,
        _ended(
            "msg_odd",
            "Be odd",
            usage=usage(18, 12, 0, 0),
            tool_calls=[client_call("toolu_odd", "Eval", '{"a":1E400,"a":"\\ud800\\u0000","b":-0,"c":"\\/"}')],
        ),
        sdk_fails="its JSON parser refuses a lone surrogate",
    ),
)

# --- failures ---------------------------------------------------------------------------------------------------------

_OVERLOADED = _event({"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}})
_FAR = _start("msg_far", _counts(70, 1, read=900)) + _thinking(0, "EqQf", "Hm.") + _tool(1, "toolu_f", "Read", '{"a":1}')
_HALF_TEXT = _event({"type": "content_block_start", "index": 2, "content_block": {"type": "text", "text": ""}})

_FAR_PARTS: dict[str, Any] = {
    "usage": usage(70, 1, 900, 0, "partial"),
    "tool_calls": [client_call("toolu_f", "Read", '{"a":1}')],
    "thoughts": [("thinking", "Hm.")],
}

_FAILURES = (
    _stream("messages-error-mid-stream", _FAR + _OVERLOADED, _failed("msg_far", "Go far", **_FAR_PARTS)),
    _stream("messages-error-first", _OVERLOADED, _failed(None, "Fail at once", usage=NOTHING_YET)),
    _stream(
        "messages-cut-after-start",
        _start("msg_cut0", _counts(25, 1)),
        _failed("msg_cut0", "Cut", usage=usage(25, 1, 0, 0, "partial")),
        cut=True,
    ),
    _stream("messages-cut-before-start", b"event: message_start\nda", _failed(None, "Cut", usage=NOTHING_YET), cut=True),
    _stream("messages-cut-between-blocks", _FAR, _failed("msg_far", "Go far", **_FAR_PARTS), cut=True),
    _stream(
        "messages-cut-inside-a-character",
        (_FAR + _HALF_TEXT).encode()
        + b'event: content_block_delta\ndata: {"type":"content_block_delta","index":2,"delta":{"type":"text_delta",'
        b'"text":"\xf0\x9f\x8c',
        _failed("msg_far", "Go far", **_FAR_PARTS),
        cut=True,
    ),
    _stream(
        "messages-cut-inside-a-tool-call",
        _FAR
        + _event(
            {
                "type": "content_block_start",
                "index": 2,
                "content_block": {"type": "tool_use", "id": "toolu_h", "name": "Read", "input": {}},
            }
        )
        + _event({"type": "content_block_delta", "index": 2, "delta": {"type": "input_json_delta", "partial_json": '{"pa'}}),
        _failed("msg_far", "Go far", undecided=frozenset({"tool_calls"}), **_FAR_PARTS),
        cut=True,
    ),
    _stream(
        "messages-cut-before-stop",
        _FAR + _delta("tool_use", {"output_tokens": 44}),
        _failed("msg_far", "Go far", **_FAR_PARTS | {"usage": usage(70, 44, 900, 0, "partial")}),
        cut=True,
    ),
    _stream("messages-eof-without-stop", _FAR, _failed("msg_far", "Go far", **_FAR_PARTS)),
    _blocking(
        "messages-cut-blocking",
        b'{"type":"message","role":"assistant","content":[{"type":"te',
        _failed(None, "Cut", stream=False, usage=NOTHING_YET),
        cut=True,
    ),
    _http_error("messages-error-400", 400, "invalid_request_error", "messages: at least one message is required"),
    _http_error("messages-error-401", 401, "authentication_error", "invalid x-api-key", [("x-should-retry", "false")]),
    _http_error(
        "messages-error-429",
        429,
        "rate_limit_error",
        "This request would exceed your organization's rate limit (Größe)",
        [("retry-after", "7"), ("anthropic-ratelimit-requests-remaining", "0"), ("x-should-retry", "true")],
    ),
    _http_error("messages-error-529", 529, "overloaded_error", "Overloaded"),
)

MESSAGES: tuple[Recording, ...] = (*_FRAMINGS, *_THINKING, *_TOOLS, *_USAGE, *_OPEN_SETS, *_FAILURES)
