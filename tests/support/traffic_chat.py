"""OpenAI Chat Completions, and the servers that speak it in their own accent."""

import json
from typing import Any

from .recording import NOTHING_YET, UNKNOWN, Expectation, Recording, ToolCall, client_call, usage

STREAM = "text/event-stream; charset=utf-8"
GPT = "gpt-5.4"


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


# --- requests ---------------------------------------------------------------------------------------------------------


def _ask(prompt: str, stream: bool, model: str = GPT, include_usage: bool = True, extra: str = "") -> bytes:
    """A hand-written body with odd spacing, an unknown member and a number that no decoder gives back as it was."""
    options = ' "stream_options" :{"include_usage": true},' if stream and include_usage else ""
    flag = ' "stream" : true,' if stream else ""
    return (
        f'{{"model":"{model}",{flag}{options}\n\t"x_unknown":[1.50, null],{extra}\n'
        f'"messages":[{{"role":"system","content":"Be brief."}},\n'
        f'{{"role":"user","content":{json.dumps(prompt)}}}]}}'
    ).encode()


PARTS_REQUEST = (
    b'{"messages":[{"role":"developer","content":[{"type":"text","text":"Be brief."}]},'
    b'{"role":"user","content":"An earlier question"},{"role":"assistant","content":"An earlier answer"},'
    b'{"role":"user","content":[{"type":"text","text":"What is this?"},'
    b'{"type":"image_url","image_url":{"url":"data:image/png;base64,iVBORw0KGgo="}},'
    b'{"type":"text","text":"Answer in French."}]}],"model":"gpt-5.4","seed":1e3}'
)

TOOL_RESULT_REQUEST = (
    b'{"model":"gpt-5.4","stream":true,"stream_options":{"include_usage":true},"messages":['
    b'{"role":"user","content":"Weather in Paris and Rome?"},'
    b'{"role":"assistant","content":null,"tool_calls":['
    b'{"id":"call_paris","type":"function","function":{"name":"weather","arguments":"{\\"city\\": \\"Paris\\"}"}},'
    b'{"id":"call_rome","type":"function","function":{"name":"weather","arguments":"{\\"city\\":\\"Rome\\"}"}}]},'
    b'{"role":"tool","tool_call_id":"call_paris","content":"rain"},'
    b'{"role":"tool","tool_call_id":"call_rome","content":[{"type":"text","text":"sun"}]}]}'
)


# --- responses --------------------------------------------------------------------------------------------------------


def _choice(delta: dict[str, Any], finish: str | None = None, index: int = 0) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}


def _chunk(response_id: str, *choices: dict[str, Any], model: str = GPT, **members: Any) -> str:
    chunk = {
        "id": response_id,
        "object": "chat.completion.chunk",
        "created": 1795219200,
        "model": model,
        "service_tier": "default",
        "system_fingerprint": "fp_44709d6fcb",
        "choices": list(choices),
        **members,
    }
    return f"data: {_compact(chunk)}\n\n"


def _chunks(response_id: str, *deltas: dict[str, Any], finish: str = "stop", model: str = GPT, **members: Any) -> str:
    """A role chunk, the deltas, the finish chunk; all of one choice, with ``members`` on every chunk."""
    opening = {"role": "assistant", "content": "", "refusal": None}
    return "".join(
        [
            _chunk(response_id, _choice(opening), model=model, **members),
            *(_chunk(response_id, _choice(delta), model=model, **members) for delta in deltas),
            _chunk(response_id, _choice({}, finish), model=model, **members),
        ]
    )


_DONE = "data: [DONE]\n\n"


def _counts(prompt: int, completion: int, cached: int = 0, reasoning: int = 0) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached, "audio_tokens": 0},
        "completion_tokens_details": {
            "reasoning_tokens": reasoning,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }


def _usage_chunk(response_id: str, counts: dict[str, Any], model: str = GPT) -> str:
    return _chunk(response_id, model=model, usage=counts)


def _content(*pieces: str) -> list[dict[str, Any]]:
    return [{"content": piece} for piece in pieces]


def _call(index: int, call_id: str, name: str, *pieces: str) -> list[dict[str, Any]]:
    """The deltas of one function call: the first names it, the others carry arguments only."""
    first = {"index": index, "id": call_id, "type": "function", "function": {"name": name, "arguments": ""}}
    rest = [{"index": index, "function": {"arguments": piece}} for piece in pieces]
    return [{"tool_calls": [delta]} for delta in (first, *rest)]


def _body(response_id: str, message: str, finish: str, counts: str, model: str = GPT) -> bytes:
    """A blocking body; the message and the usage are given as JSON text so that they stay as written."""
    return (
        f'{{\n  "id": "{response_id}",\n  "object": "chat.completion",\n  "created": 1795219200,\n'
        f'  "model": "{model}",\n  "choices": [\n    {{\n      "index": 0,\n      "message": {message},\n'
        f'      "logprobs": null,\n      "finish_reason": "{finish}"\n    }}\n  ],\n  "usage": {counts},\n'
        f'  "system_fingerprint": null\n}}\n'
    ).encode()


def _expect(
    response_id: str | None,
    prompt: str | None,
    stream: bool = True,
    model: str = GPT,
    failed: bool = False,
    **members: Any,
) -> Expectation:
    return Expectation("failed" if failed else "completed", 200, stream, model, response_id, prompt, **members)


def _stream(
    name: str, response: str | bytes, expect: Expectation, request: bytes | None = None, **members: Any
) -> Recording:
    return Recording(
        name,
        "chat",
        request or _ask(expect.prompt or "", True, expect.model),
        response if isinstance(response, bytes) else response.encode(),
        expect,
        content_type=STREAM,
        headers=[("x-request-id", f"req_{name}"), ("openai-processing-ms", "310")],
        **members,
    )


def _blocking(name: str, response: bytes, expect: Expectation, request: bytes | None = None, **members: Any) -> Recording:
    return Recording(
        name,
        "chat",
        request or _ask(expect.prompt or "", False, expect.model),
        response,
        expect,
        headers=[("x-request-id", f"req_{name}")],
        **members,
    )


def _http_error(name: str, status: int, error: dict[str, Any], headers: list[tuple[str, str]] | None = None) -> Recording:
    return Recording(
        name,
        "chat",
        _ask("Hi", True),
        (json.dumps({"error": error}, indent=4) + "\n").encode(),
        Expectation("failed", status, True, GPT, None, "Hi"),
        status=status,
        headers=[("x-request-id", f"req_{name}"), *(headers or [])],
    )


# --- text and usage ---------------------------------------------------------------------------------------------------

_HELLO = _chunks("chatcmpl-hello", *_content("Hel", "lo, wörld 🌍\u2028"), usage=None)
_HELLO_DONE = _HELLO + _usage_chunk("chatcmpl-hello", _counts(19, 10)) + _DONE
_HELLO_EXPECT = _expect("chatcmpl-hello", "Say hello", usage=usage(19, 10, 0), text="Hello, wörld 🌍\u2028")

_TEXT = (
    _stream("chat-text-stream", _HELLO_DONE, _HELLO_EXPECT),
    _stream("chat-crlf-stream", _HELLO_DONE.replace("\n", "\r\n"), _HELLO_EXPECT),
    _stream("chat-no-space-stream", _HELLO_DONE.replace("data: ", "data:"), _HELLO_EXPECT),
    _stream(
        "chat-bom-stream",
        b"\xef\xbb\xbf" + _HELLO_DONE.encode(),
        _HELLO_EXPECT,
    ),
    _stream("chat-comments-stream", _HELLO_DONE.replace("data: ", ": keep-alive\n\ndata: "), _HELLO_EXPECT),
    _stream("chat-missing-done-stream", _HELLO_DONE.removesuffix(_DONE), _HELLO_EXPECT),
    _stream("chat-no-final-blank-line", _HELLO_DONE.rstrip("\n"), _HELLO_EXPECT),
    _stream(
        "chat-usage-not-asked-stream",
        _chunks("chatcmpl-unasked", *_content("Yes.")) + _DONE,
        _expect("chatcmpl-unasked", "Unasked", usage=UNKNOWN, text="Yes."),
        _ask("Unasked", True, include_usage=False),
    ),
    _stream(
        "chat-usage-on-finish-stream",
        _chunk("chatcmpl-fin", _choice({"role": "assistant", "content": "Yes."}))
        + _chunk("chatcmpl-fin", _choice({}, "stop"), usage=_counts(40, 2, cached=32))
        + _DONE,
        _expect("chatcmpl-fin", "Finish", usage=usage(8, 2, 32), text="Yes."),
    ),
    _stream(
        "chat-usage-on-every-chunk-stream",
        "".join(
            _chunk("chatcmpl-each", _choice({"content": piece}, finish), usage=_counts(11, tokens))
            for piece, finish, tokens in (("A", None, 1), ("B", None, 2), ("C", "stop", 3))
        )
        + _usage_chunk("chatcmpl-each", _counts(11, 3))
        + _DONE,
        _expect("chatcmpl-each", "Each", usage=usage(11, 3, 0), text="ABC"),
    ),
    _stream(
        "chat-azure-stream",
        _chunk("", model="", prompt_filter_results=[{"prompt_index": 0, "content_filter_results": {}}])
        + _chunks("chatcmpl-azure", *_content("Yes."))
        + _usage_chunk("chatcmpl-azure", _counts(9, 3))
        + _DONE,
        _expect("chatcmpl-azure", "Azure", usage=usage(9, 3, 0), text="Yes."),
        sdk_differs="it keeps the empty id of the opening chunk",
    ),
    _stream(
        "chat-cache-write-stream",
        _chunks("chatcmpl-write", *_content("Yes."))
        + _usage_chunk(
            "chatcmpl-write",
            _counts(2000, 7) | {"prompt_tokens_details": {"cached_tokens": 1500, "cache_write_tokens": 400}},
        )
        + _DONE,
        _expect("chatcmpl-write", "Write a cache", usage=usage(100, 7, 1500, 400), text="Yes."),
    ),
    _blocking(
        "chat-clamp-blocking",
        _body(
            "chatcmpl-clamp",
            '{"role":"assistant","content":"Yes."}',
            "stop",
            '{"prompt_tokens":1000,"completion_tokens":1,"total_tokens":1001,'
            '"prompt_tokens_details":{"cached_tokens":900,"cache_write_tokens":200}}',
        ),
        _expect("chatcmpl-clamp", "Clamp", stream=False, usage=usage(0, 1, 900, 200), text="Yes."),
    ),
    _blocking(
        "chat-text-blocking",
        _body(
            "chatcmpl-block",
            '{"role":"assistant","content":"C\\u0027est un chat.","refusal":null,"annotations":[],"x_new":1}',
            "stop",
            _compact(_counts(1117, 46, cached=1024)),
        ),
        _expect(
            "chatcmpl-block",
            "What is this?\nAnswer in French.",
            stream=False,
            usage=usage(93, 46, 1024),
            text="C'est un chat.",
        ),
        PARTS_REQUEST,
    ),
    _blocking(
        "chat-null-details-blocking",
        _body(
            "chatcmpl-vllm",
            '{"role":"assistant","content":"Yes.","reasoning_content":null,"tool_calls":[]}',
            "stop",
            '{"prompt_tokens":14,"total_tokens":17,"completion_tokens":3,"prompt_tokens_details":null}',
            model="Qwen/Qwen3-32B",
        ),
        _expect("chatcmpl-vllm", "Local?", stream=False, model="Qwen/Qwen3-32B", usage=usage(14, 3), text="Yes."),
    ),
    _blocking(
        "chat-no-usage-blocking",
        b'{"id":"chatcmpl-nousage","object":"chat.completion","created":1,"model":"gpt-5.4","choices":'
        b'[{"index":0,"message":{"role":"assistant","content":"Yes."},"finish_reason":"stop"}]}',
        _expect("chatcmpl-nousage", "Free of charge", stream=False, usage=UNKNOWN, text="Yes."),
    ),
    _stream(
        "chat-length-stream",
        _chunks("chatcmpl-len", *_content("Once upon"), finish="length")
        + _usage_chunk("chatcmpl-len", _counts(12, 2))
        + _DONE,
        _expect("chatcmpl-len", "A story", usage=usage(12, 2, 0), text="Once upon"),
        sdk_fails="its helper raises when the length limit ended the answer",
    ),
    _stream(
        "chat-refusal-stream",
        _chunks("chatcmpl-refuse", {"refusal": "I can't"}, {"refusal": " do that."})
        + _usage_chunk("chatcmpl-refuse", _counts(30, 6))
        + _DONE,
        _expect("chatcmpl-refuse", "Do evil", usage=usage(30, 6, 0)),
    ),
    _stream(
        "chat-two-choices-stream",
        _chunk("chatcmpl-two", _choice({"role": "assistant", "content": "H"}))
        + _chunk("chatcmpl-two", _choice({"role": "assistant", "content": "Sh"}, index=1))
        + _chunk("chatcmpl-two", _choice({"content": "e"}), _choice({"content": "e"}, index=1))
        + _chunk("chatcmpl-two", _choice({}, "stop", index=1))
        + _chunk("chatcmpl-two", _choice({"tool_calls": _call(0, "call_two", "go", "{}")[0]["tool_calls"]}))
        + _chunk("chatcmpl-two", _choice(_call(0, "", "go", "{}")[1]))
        + _chunk("chatcmpl-two", _choice({}, "tool_calls"))
        + _usage_chunk("chatcmpl-two", _counts(15, 8))
        + _DONE,
        _expect(
            "chatcmpl-two",
            "Two of you",
            usage=usage(15, 8, 0),
            tool_calls=[client_call("call_two", "go", "{}")],
            text="He",
        ),
        _ask("Two of you", True, extra='"n":2,'),
    ),
)

# --- tools ------------------------------------------------------------------------------------------------------------

_PARALLEL: list[ToolCall] = [
    client_call("call_a", "weather", '{"city": "São Paulo"}'),
    client_call("call_b", "now", ""),
    client_call("call_c", "weather", '{"city":"\\ud83c\\udf0d", "n":1.0e2}'),
]

_TOOLS = (
    _stream(
        "chat-parallel-tools-stream",
        _chunks(
            "chatcmpl-par",
            *_call(0, "call_a", "weather", '{"ci', 'ty": "São', ' Paulo"}'),
            *_call(1, "call_b", "now"),
            *_call(2, "call_c", "weather", '{"city":"\\ud83c\\udf0d", "n":1.0e2}'),
            finish="tool_calls",
        )
        + _usage_chunk("chatcmpl-par", _counts(82, 51))
        + _DONE,
        _expect("chatcmpl-par", "Weather and time", usage=usage(82, 51, 0), tool_calls=_PARALLEL),
    ),
    _stream(
        "chat-empty-repeats-stream",
        _chunks(
            "chatcmpl-rep",
            *_call(0, "call_r", "weather"),
            {"tool_calls": [{"index": 0, "id": "", "function": {"name": "", "arguments": '{"a"'}}]},
            {"tool_calls": [{"index": 0, "id": None, "function": {"name": None, "arguments": ":1}"}}]},
            finish="tool_calls",
        )
        + _usage_chunk("chatcmpl-rep", _counts(5, 6))
        + _DONE,
        _expect("chatcmpl-rep", "Repeat", usage=usage(5, 6, 0), tool_calls=[client_call("call_r", "weather", '{"a":1}')]),
    ),
    _blocking(
        "chat-tools-blocking",
        _body(
            "chatcmpl-toolsb",
            '{"role":"assistant","content":null,"tool_calls":[{"id":"call_1","type":"function","function":'
            '{"name":"edit","arguments":"{ \\"path\\" : \\"a\\\\\\\\b\\", \\"n\\":1e400"}},{"function":{"arguments":"",'
            '"name":"now"},"type":"function","id":"call_2"}],"refusal":null}',
            "tool_calls",
            _compact(_counts(70, 20)),
        ),
        _expect(
            "chatcmpl-toolsb",
            "Edit",
            stream=False,
            usage=usage(70, 20, 0),
            tool_calls=[
                client_call("call_1", "edit", '{ "path" : "a\\\\b", "n":1e400'),
                client_call("call_2", "now", ""),
            ],
        ),
    ),
    _stream(
        "chat-tool-result-stream",
        _chunks("chatcmpl-res", *_content("Rain; sun."), usage=None)
        + _usage_chunk("chatcmpl-res", _counts(140, 5, cached=128))
        + _DONE,
        _expect("chatcmpl-res", None, correlating_tool_call_id="call_rome", usage=usage(12, 5, 128), text="Rain; sun."),
        TOOL_RESULT_REQUEST,
    ),
    _stream(
        "chat-legacy-function-stream",
        _chunks(
            "chatcmpl-legacy",
            {"function_call": {"name": "weather", "arguments": ""}},
            {"function_call": {"arguments": '{"city"'}},
            {"function_call": {"arguments": ':"Oslo"}'}},
            finish="function_call",
        )
        + _usage_chunk("chatcmpl-legacy", _counts(44, 9))
        + _DONE,
        _expect(
            "chatcmpl-legacy",
            "Legacy",
            usage=usage(44, 9, 0),
            tool_calls=[client_call(None, "weather", '{"city":"Oslo"}')],
        ),
    ),
    _blocking(
        "chat-legacy-function-blocking",
        _body(
            "chatcmpl-legacyb",
            '{"role":"assistant","content":null,"function_call":{"name":"weather","arguments":"{\\n}"}}',
            "function_call",
            _compact(_counts(44, 9)),
        ),
        _expect(
            "chatcmpl-legacyb",
            "Legacy",
            stream=False,
            usage=usage(44, 9, 0),
            tool_calls=[client_call(None, "weather", "{\n}")],
        ),
    ),
    _stream(
        "chat-custom-tool-stream",
        _chunks(
            "chatcmpl-custom",
            {"tool_calls": [{"index": 0, "id": "call_x", "type": "custom", "custom": {"name": "patch", "input": ""}}]},
            {"tool_calls": [{"index": 0, "custom": {"input": "*** Begin"}}]},
            {"tool_calls": [{"index": 0, "custom": {"input": ' "Patch"\n'}}]},
            finish="tool_calls",
        )
        + _usage_chunk("chatcmpl-custom", _counts(90, 15))
        + _DONE,
        _expect(
            "chatcmpl-custom",
            "Patch it",
            usage=usage(90, 15, 0),
            tool_calls=[client_call("call_x", "patch", '*** Begin "Patch"\n')],
        ),
        sdk_fails="its chunk types do not know custom tools",
    ),
    _blocking(
        "chat-custom-tool-blocking",
        _body(
            "chatcmpl-customb",
            '{"role":"assistant","content":null,"tool_calls":[{"id":"call_y","type":"custom","custom":'
            '{"name":"patch","input":"*** \\"x\\"\\n"}}]}',
            "tool_calls",
            _compact(_counts(90, 15)),
        ),
        _expect(
            "chatcmpl-customb",
            "Patch it",
            stream=False,
            usage=usage(90, 15, 0),
            tool_calls=[client_call("call_y", "patch", '*** "x"\n')],
        ),
    ),
)

# --- reasoning dialects -----------------------------------------------------------------------------------------------

_DEEPSEEK_COUNTS = {
    "prompt_tokens": 300,
    "completion_tokens": 60,
    "total_tokens": 360,
    "completion_tokens_details": {"reasoning_tokens": 41},
    "prompt_cache_hit_tokens": 256,
    "prompt_cache_miss_tokens": 44,
}

_ROUTED = "deepseek/deepseek-v4"


def _routed(response_id: str, delta: dict[str, Any], finish: str | None = None, **members: Any) -> str:
    return _chunk(response_id, _choice(delta, finish) | {"native_finish_reason": finish}, model=_ROUTED, **members)


def _detail(text: str) -> dict[str, Any]:
    """OpenRouter says everything twice: the text, and the details that a client must send back."""
    detail = {"type": "reasoning.text", "text": text, "format": "unknown", "index": 0}
    return {"role": "assistant", "content": "", "reasoning": text, "reasoning_details": [detail]}


_REASONING = (
    _stream(
        "chat-reasoning-content-stream",
        _chunks(
            "chatcmpl-deep",
            {"content": None, "reasoning_content": "Let me "},
            {"content": None, "reasoning_content": "think."},
            {"content": "42", "reasoning_content": None},
            model="deepseek-reasoner",
        )
        + _usage_chunk("chatcmpl-deep", _DEEPSEEK_COUNTS, model="deepseek-reasoner")
        + _DONE,
        _expect(
            "chatcmpl-deep",
            "The answer?",
            model="deepseek-reasoner",
            usage=usage(44, 60, 256),
            thoughts=[("reasoning", "Let me think.")],
            text="42",
        ),
    ),
    _blocking(
        "chat-reasoning-content-blocking",
        _body(
            "chatcmpl-deepb",
            '{"role":"assistant","content":"42","reasoning_content":"Think.\\nHard."}',
            "stop",
            _compact(_DEEPSEEK_COUNTS | {"prompt_tokens_details": {"cached_tokens": 256}}),
            model="deepseek-reasoner",
        ),
        _expect(
            "chatcmpl-deepb",
            "The answer?",
            stream=False,
            model="deepseek-reasoner",
            usage=usage(44, 60, 256),
            thoughts=[("reasoning", "Think.\nHard.")],
            text="42",
        ),
    ),
    _stream(
        "chat-openrouter-stream",
        ": OPENROUTER PROCESSING\n\n" * 2
        + _routed("gen-17", _detail("First "), provider="DeepInfra")
        + _routed("gen-17", _detail("this."), provider="DeepInfra")
        + ": OPENROUTER PROCESSING\n\n"
        + _routed("gen-17", {"role": "assistant", "content": "Done."})
        + _routed("gen-17", {"role": "assistant", "content": ""}, "stop")
        + _chunk(
            "gen-17",
            _choice({"role": "assistant", "content": ""}) | {"native_finish_reason": None},
            model=_ROUTED,
            usage=_counts(21, 14, reasoning=9) | {"cost": 0.00014, "is_byok": False},
        )
        + _DONE,
        _expect(
            "gen-17",
            "Route me",
            model=_ROUTED,
            usage=usage(21, 14, 0),
            thoughts=[("reasoning", "First this.")],
            text="Done.",
        ),
    ),
    _stream(
        "chat-both-reasoning-names-stream",
        _chunks(
            "chatcmpl-both",
            {"reasoning": "One ", "reasoning_content": "One "},
            {"reasoning": "thought.", "reasoning_content": "thought."},
            *_content("Done."),
        )
        + _usage_chunk("chatcmpl-both", _counts(10, 5))
        + _DONE,
        _expect("chatcmpl-both", "Both", usage=usage(10, 5, 0), thoughts=[("reasoning", "One thought.")], text="Done."),
    ),
    _stream(
        "chat-reasoning-and-tools-stream",
        _chunks(
            "chatcmpl-rt",
            {"reasoning": "I need a tool."},
            *_call(0, "call_rt", "now", "{}"),
            finish="tool_calls",
        )
        + _usage_chunk("chatcmpl-rt", _counts(10, 5))
        + _DONE,
        _expect(
            "chatcmpl-rt",
            "Reason",
            usage=usage(10, 5, 0),
            tool_calls=[client_call("call_rt", "now", "{}")],
            thoughts=[("reasoning", "I need a tool.")],
        ),
    ),
)

# --- failures ---------------------------------------------------------------------------------------------------------

_BEGUN = _chunk("chatcmpl-cut", _choice({"role": "assistant", "content": "", "refusal": None})) + _chunk(
    "chatcmpl-cut", _choice({"content": "Once"})
)
_SERVER_ERROR = {
    "error": {"message": "The server had an error", "type": "server_error", "param": None, "code": None},
}


def _broken(prompt: str = "A story", **members: Any) -> Expectation:
    return _expect("chatcmpl-cut", prompt, failed=True, **({"usage": NOTHING_YET} | members))


_FAILURES = (
    _stream("chat-error-mid-stream", _BEGUN + f"data: {_compact(_SERVER_ERROR)}\n\n", _broken()),
    _stream(
        "chat-error-then-done-stream",
        f"data: {_compact(_SERVER_ERROR)}\n\n" + _DONE,
        _expect(None, "A story", failed=True, usage=NOTHING_YET),
    ),
    _stream(
        "chat-openrouter-error-chunk",
        _BEGUN
        + _chunk(
            "chatcmpl-cut",
            _choice({"content": ""}, "error"),
            error={"code": 502, "message": "Provider disconnected", "metadata": {"provider_name": "X"}},
        )
        + _DONE,
        _broken(),
    ),
    _stream(
        "chat-error-after-usage-stream",
        _chunk("chatcmpl-cut", _choice({"content": "A"}), usage=_counts(11, 1)) + f"data: {_compact(_SERVER_ERROR)}\n\n",
        _broken(usage=usage(11, 1, 0, None, "partial")),
    ),
    _stream("chat-cut-mid-text", _BEGUN, _broken(), cut=True),
    _stream("chat-cut-inside-an-event", _BEGUN.encode()[:-20], _broken(), cut=True),
    _stream("chat-cut-before-anything", b"", _expect(None, "A story", failed=True, usage=NOTHING_YET), cut=True),
    _stream(
        "chat-cut-inside-a-tool-call",
        _BEGUN + "".join(_chunk("chatcmpl-cut", _choice(delta)) for delta in _call(0, "call_cut", "now", '{"a')),
        _broken(undecided=frozenset({"tool_calls"})),
        cut=True,
    ),
    _stream("chat-cut-before-usage", _BEGUN + _chunk("chatcmpl-cut", _choice({}, "stop")), _broken(), cut=True),
    _stream("chat-eof-without-finish", _BEGUN, _broken()),
    _blocking(
        "chat-cut-blocking",
        b'{"object":"chat.com',
        _expect(None, "Cut", stream=False, failed=True, usage=NOTHING_YET),
        cut=True,
    ),
    _http_error(
        "chat-error-400",
        400,
        {
            "message": "Unsupported value: 'temperature' does not support 0 with this model.",
            "type": "invalid_request_error",
            "param": "temperature",
            "code": "unsupported_value",
        },
    ),
    _http_error(
        "chat-error-401",
        401,
        {"message": "Incorrect API key", "type": "invalid_request_error", "param": None, "code": "invalid_api_key"},
    ),
    _http_error(
        "chat-error-429",
        429,
        {"message": "Rate limit reached", "type": "tokens", "param": None, "code": "rate_limit_exceeded"},
        [("retry-after", "3"), ("retry-after-ms", "2700"), ("x-ratelimit-remaining-tokens", "0")],
    ),
)

CHAT: tuple[Recording, ...] = (*_TEXT, *_TOOLS, *_REASONING, *_FAILURES)
