"""What one recorded exchange is, and what an honest ledger says about it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict

from .provider import CUT, Reply, Step, whole

Format = Literal["messages", "chat", "responses"]
Completeness = Literal["complete", "partial", "unknown"]


class UsageRow(TypedDict):
    """Tokens of one upstream response; None is "never reported", which is not 0."""

    input_tokens: int | None
    output_tokens: int | None
    cache_read_input_tokens: int | None
    cache_write_input_tokens: int | None
    completeness: Completeness


class ToolCall(TypedDict):
    """``input`` is the argument text exactly as the provider sent it; None where a call has no arguments at all."""

    tool_call_id: str | None
    tool: str
    input: str | None
    run_by: Literal["client", "provider"]


def usage(
    input_tokens: int | None = None,
    output_tokens: int | None = None,
    cache_read: int | None = None,
    cache_write: int | None = None,
    completeness: Completeness = "complete",
) -> tuple[UsageRow, ...]:
    return (
        UsageRow(
            input_tokens=input_tokens,
            output_tokens=output_tokens,
            cache_read_input_tokens=cache_read,
            cache_write_input_tokens=cache_write,
            completeness=completeness,
        ),
    )


UNKNOWN = usage(completeness="unknown")
NOTHING_YET = usage(completeness="partial")


def client_call(tool_call_id: str | None, tool: str, arguments: str | None) -> ToolCall:
    return ToolCall(tool_call_id=tool_call_id, tool=tool, input=arguments, run_by="client")


def provider_call(tool_call_id: str | None, tool: str, arguments: str | None) -> ToolCall:
    return ToolCall(tool_call_id=tool_call_id, tool=tool, input=arguments, run_by="provider")


@dataclass(frozen=True, slots=True)
class Expectation:
    """What the ledger must contain after the exchange, in plain data.

    ``text`` is no part of the ledger: it is the visible answer, for whoever compares what a client got. ``undecided``
    names the members that the rules leave open for this recording, so that no test pins an accident: a call or thought
    that broke off half-way.
    """

    status: Literal["completed", "failed"]
    http_status: int
    stream: bool
    model: str
    response_id: str | None
    prompt: str | None
    correlating_tool_call_id: str | None = None
    usage: Sequence[UsageRow] = ()
    tool_calls: Sequence[ToolCall] = ()
    thoughts: Sequence[tuple[str, str]] = ()
    text: str = ""
    undecided: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Recording:
    """One exchange, byte for byte.

    ``cut``: the connection dies after ``response``, without the terminal chunk or short of the declared length. A
    recording with ``cut=False`` ends cleanly on HTTP's level even where the protocol's terminal event is missing.

    ``sdk_fails`` and ``sdk_differs`` say in words why the vendor's Python SDK refuses the stream, or makes something
    else of it than the ledger must; ``tests/test_traffic.py`` proves each of them.
    """

    name: str
    format: Format
    request: bytes
    response: bytes
    expect: Expectation
    status: int = 200
    content_type: str = "application/json"
    headers: Sequence[tuple[str, str]] = ()
    cut: bool = False
    sdk_fails: str = ""
    sdk_differs: str = ""

    @property
    def path(self) -> str:
        """The provider's own path, which is also what a client appends to its base URL."""
        return {"messages": "/v1/messages", "chat": "/v1/chat/completions", "responses": "/v1/responses"}[self.format]

    @property
    def streams(self) -> bool:
        return self.content_type.startswith("text/event-stream")

    def reply(self, split: Callable[[bytes], Sequence[bytes]] = whole) -> Reply:
        """The exchange's response for a scripted provider, its body split as ``split`` says."""
        headers = [("Content-Type", self.content_type), *self.headers]
        steps: list[Step] = list(split(self.response))
        if self.cut:
            # What stands behind the cut is never written, and makes a declared length the longer one.
            steps += [CUT, b" " * 64]
        return Reply(self.status, headers, steps, "chunked" if self.streams else "length")

    def __str__(self) -> str:
        return self.name
