"""What spans are called and what they say, by OpenTelemetry's semantic conventions. Pure, and without OpenTelemetry.

Source: the conventions for generative AI (open-telemetry/semantic-conventions-genai, November 2026) and for HTTP (1.44).
Names of our own begin with ``aibridge.``. What clients choose is shortened, so that it cannot fill a span.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Final
from urllib.parse import urlsplit

import msgspec

from aibridge.events import CallAnswered, CallBegan
from aibridge.records import Interception, InterceptionEnded, TokenUsage, ToolUsage
from aibridge.wire.base import error_code

Attributes = dict[str, str | int | float | bool | Sequence[str]]

FIRST_ERROR: Final = 400
"""From this HTTP status on a call has failed."""

_CLIENT_ERRORS: Final = range(FIRST_ERROR, 500)
_MAX_NAME: Final = 256
_MAX_CONTENT: Final = 16_384
_DEFAULT_PORTS: Final = {"http": 80, "https": 443}
_OPENAI_APIS: Final = {"/v1/chat/completions": "chat_completions", "/v1/responses": "responses"}


def interception_name(interception: Interception) -> str:
    """By the conventions for HTTP servers: the method and the route."""
    return f"POST {_path(interception)}"


def of_interception(interception: Interception) -> Attributes:
    """What an interception's span says from its start on.

    Usage and models are left to the calls below it: who adds up the tokens of all spans must not count them twice.
    """
    path = _path(interception)
    return _given(
        {
            "http.request.method": "POST",
            "http.route": path,
            "url.path": path,
            "user.id": shortened(interception.initiator_id),
            "user_agent.original": shortened(interception.user_agent),
            "gen_ai.conversation.id": shortened(interception.client_session_id),
            "aibridge.interception.id": interception.id,
            "aibridge.provider": interception.provider_name,
            "aibridge.client": shortened(interception.client),
        }
    )


def of_outcome(outcome: InterceptionEnded) -> Attributes:
    """What an interception's span says at its end."""
    return _given(
        {
            "http.response.status_code": outcome.http_status,
            "aibridge.status": outcome.status,
            "error.type": None if _is_refusal(outcome) else failure(outcome),
        }
    )


def has_failed(outcome: InterceptionEnded) -> bool:
    """Whether the span of a server is an error: not where the client asked for something wrong, or left."""
    return outcome.status == "interrupted" or (outcome.status == "failed" and not _is_refusal(outcome))


def failure(outcome: InterceptionEnded) -> str | None:
    """The ``error.type`` of an interception: the HTTP status where that says it, else why the response has no end."""
    if outcome.status == "failed" and (outcome.http_status or 0) >= FIRST_ERROR:
        return str(outcome.http_status)
    return cut(outcome)


def cut(outcome: InterceptionEnded) -> str | None:
    """Why the response of a provider has no end: its own code for that, ``broken_off``, or what became of the client."""
    if outcome.status != "failed":
        return None if outcome.status == "completed" else outcome.status
    return error_code(outcome.error or "") or "broken_off"


def call_failure(head: CallAnswered | None, outcome: InterceptionEnded | None) -> str | None:
    """The ``error.type`` of a request to the provider. `outcome` is that of the interception, if the response to this
    request was its last and has no end.
    """
    if head is not None and (head.http_status or 0) >= FIRST_ERROR:
        return str(head.http_status)
    if head is not None and head.http_status is None and (outcome is None or outcome.status == "failed"):
        return "no_response"
    return None if outcome is None else cut(outcome)


def call_name(call: CallBegan) -> str:
    """The operation and the model. All intercepted routes are chats to the conventions."""
    return f"chat {shortened(call.model)}" if call.model else "chat"


def of_call(interception: Interception, call: CallBegan) -> Attributes:
    """What the span of a request to the provider says from its start on."""
    address, port = _server(call.url.partition("?")[0])
    return _given(
        {
            "gen_ai.operation.name": "chat",
            "gen_ai.provider.name": interception.provider,
            "gen_ai.request.model": shortened(call.model),
            "gen_ai.request.stream": interception.streaming or None,
            "gen_ai.conversation.id": shortened(interception.client_session_id),
            "server.address": address,
            "server.port": port,
            "openai.api.type": _OPENAI_APIS.get(interception.route) if interception.provider == "openai" else None,
            "http.request.resend_count": call.attempt - 1 or None,
            "aibridge.hop": call.hop,
        }
    )


def of_usage(usage: TokenUsage) -> Attributes:
    """What the span of a request to the provider says about its response.

    To the conventions cached tokens are part of the input. Our ledger counts them apart, for every provider.
    """
    uncached, read, written = usage.input_tokens, usage.cache_read_input_tokens, usage.cache_write_input_tokens
    reason = usage.metadata.get("stop_reason")
    return _given(
        {
            "gen_ai.response.id": shortened(usage.provider_response_id),
            "gen_ai.response.model": shortened(usage.metadata.get("model")),
            "gen_ai.response.finish_reasons": reason and (shortened(reason),),
            "gen_ai.usage.input_tokens": None if uncached is None else uncached + (read or 0) + (written or 0),
            "gen_ai.usage.cache_read.input_tokens": read,
            "gen_ai.usage.cache_write.input_tokens": written,
            "gen_ai.usage.output_tokens": usage.output_tokens,
            "aibridge.usage.completeness": usage.completeness,
        }
    )


def tool_name(usage: ToolUsage) -> str:
    """By the conventions for tools that are run."""
    return f"execute_tool {shortened(usage.tool)}"


def of_tool(usage: ToolUsage, *, content: bool) -> Attributes:
    """What the span of a call of an injected tool says. `content`: with what the model passed to it."""
    return _given(
        {
            "gen_ai.operation.name": "execute_tool",
            "gen_ai.tool.name": shortened(usage.tool),
            "gen_ai.tool.type": "extension",  # "executed on the agent-side"
            "gen_ai.tool.call.id": shortened(usage.tool_call_id),
            "gen_ai.tool.call.arguments": truncated(usage.input) if content else None,
            "aibridge.tool.server": shortened(usage.metadata.get("server")),
            "error.type": None if usage.invocation_error is None else "tool_error",
        }
    )


def question(prompt: str) -> Mapping[str, Any]:
    """A prompt as a message."""
    return {"role": "user", "parts": [{"type": "text", "content": truncated(prompt)}]}


def thought(content: str) -> Mapping[str, Any]:
    """A thought as part of the model's message."""
    return {"type": "reasoning", "content": truncated(content)}


def tool_call(usage: ToolUsage) -> Mapping[str, Any]:
    """A call that the client is to make, as part of the model's message."""
    return {"type": "tool_call", "id": usage.tool_call_id, "name": usage.tool, "arguments": truncated(usage.input)}


def answer(parts: Sequence[Mapping[str, Any]], finish_reason: str) -> Mapping[str, Any]:
    """What the ledger knows of the model's message."""
    return {"role": "assistant", "parts": parts, "finish_reason": finish_reason}


def encoded(*messages: Mapping[str, Any]) -> str:
    """Messages as the JSON text that a span takes for them."""
    return msgspec.json.encode(messages).decode()


def shortened(text: str | None) -> str | None:
    """What a client or a provider chose, for a name or an attribute."""
    return text and text[:_MAX_NAME]


def truncated(content: str | None) -> str | None:
    """Content, up to a length that a receiver takes."""
    return content if content is None or len(content) <= _MAX_CONTENT else content[:_MAX_CONTENT] + "..."


def _is_refusal(outcome: InterceptionEnded) -> bool:
    return outcome.status == "failed" and outcome.http_status in _CLIENT_ERRORS


def _path(interception: Interception) -> str:
    return f"/{interception.provider_name}{interception.route}"


@lru_cache(256)
def _server(url: str) -> tuple[str | None, int | None]:
    parts = urlsplit(url)
    return parts.hostname, parts.port or _DEFAULT_PORTS.get(parts.scheme)


def _given(attributes: Mapping[str, Any]) -> Attributes:
    """What is known of them."""
    return {name: value for name, value in attributes.items() if value is not None}
