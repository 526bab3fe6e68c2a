"""What goes wrong after the first turn, when the client already has a part of the answer or waits for all of it.

Truth: wire.md rule 7 and A10, B2, C3 for how a stream says so; the official SDKs, which have to raise; design.md 4: the
provider's own errors reach the client as they are wherever nothing was said before.
"""

import asyncio
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

import anthropic
import openai
import pytest

from aibridge import Provider
from aibridge.errors import UpstreamError, UpstreamTimeout
from aibridge.providers import OnDisconnect
from tests.serving import Call
from tests.support.injected import Breaks, Dialect, Failure, Refuses, Says, Thinks, Turn, Unreachable, data_of, turn
from tests.support.injected_dialects import CHAT, MESSAGES, RESPONSES, both_ways, each_dialect
from tests.support.injected_loop import InnerLoop, assert_hidden, ledger_usage, looks, python_final, recorded
from tests.support.jssdk import JavaScript, Refused
from tests.support.provider import Gate

FIRST: Final = turn(1, Thinks("Let me see.", "signature-1"), Says("Look"), looks("one"), looks("two"))
SECOND: Final = turn(2, Says("Fine"), looks("three"), looks("four"))

BROKE_OFF: Final = UpstreamError("The provider's response broke off.")
FAILURES: Final[Mapping[str, Turn | Failure]] = {
    "429": Refuses(429),
    "529": Refuses(529),
    "unreachable": Unreachable(UpstreamError("The provider could not be reached.")),
    "timeout": Unreachable(UpstreamTimeout("The provider took too long.")),
    "cut": Breaks(SECOND, BROKE_OFF),
    "closed": Breaks(SECOND),
    "error event": replace(SECOND, fails=True),
}
WORDS: Final = {
    "429": "Too much of it",
    "529": "Too much of it",
    "unreachable": "could not be reached",
    "timeout": "took too long",
    "cut": "broke off",
    "closed": "ended before it was complete",
    "error event": "Overloaded",
}


def raised(dialect: Dialect, call: Call, *, stream: bool = True) -> Exception:
    """What the Python SDK raises."""
    with pytest.raises((anthropic.APIError, openai.APIError, RuntimeError)) as error:
        python_final(dialect, call, stream=stream)
    return error.value


@each_dialect
@pytest.mark.parametrize("failure", FAILURES)
async def test_a_stream_that_fails_in_hop_two(dialect: Dialect, failure: str, js: JavaScript) -> None:
    """The client has 200 and the first turn already, so the error is in the stream, in words of who knows."""
    async with InnerLoop(dialect, FIRST, FAILURES[failure]) as loop:
        call = await loop.ask(dialect.request())
    assert call.status == 200 and call.complete
    error = raised(dialect, call)
    if dialect is not RESPONSES:  # of `response.failed` its helper says only that there was no other end
        assert WORDS[failure] in str(error)
    if dialect is RESPONSES:
        final = await js.read("responses", [call.body])
        assert final["status"] == "failed" and WORDS[failure] in final["error"]["message"]
    else:
        with pytest.raises(Refused, match=WORDS[failure]):
            await js.read(dialect.format, [call.body])
    assert b'"Look"' in call.body
    assert_hidden(call)
    assert_ends_once(dialect, call)
    assert loop.ended == [("failed", 200)]
    assert WORDS[failure] in (loop.recorder.ended[0].error or "")
    assert loop.invocations == recorded(FIRST.calls)


def assert_ends_once(dialect: Dialect, call: Call) -> None:
    """The error is the last event, and nothing before it says that the response is complete."""
    *before, last = data_of(call.body)
    kinds = [event.get("type", "chunk") for event in before]
    if dialect is MESSAGES:
        assert last["type"] == "error" and not {"message_delta", "message_stop"} & set(kinds)
    elif dialect is CHAT:
        assert last["error"] and b"[DONE]" not in call.body
        assert not any(choice["finish_reason"] for chunk in before for choice in chunk["choices"])
    else:
        assert last["type"] == "response.failed" and last["response"]["id"] == RESPONSES.id_of(1)
        assert [event["sequence_number"] for event in (*before, last)] == list(range(len(before) + 1))


@each_dialect
@pytest.mark.parametrize("failure", ["429", "529"])
async def test_a_refusal_goes_to_a_client_that_waits_as_it_is(dialect: Dialect, failure: str, js: JavaScript) -> None:
    """Clients act on status, headers and wording (wire.md rule 9): those are the provider's own."""
    refusal = FAILURES[failure]
    assert isinstance(refusal, Refuses)
    async with InnerLoop(dialect, FIRST, refusal) as loop:
        call = await loop.ask(dialect.request(stream=False))
    assert (call.status, call.body) == (refusal.status, dialect.error(refusal.message))
    assert set(refusal.headers) <= set(call.headers)
    error = raised(dialect, call, stream=False)
    assert isinstance(error, (anthropic.APIStatusError, openai.APIStatusError))
    assert error.status_code == refusal.status
    headers = {"content-type": "application/json"}
    with pytest.raises(Refused) as refused:
        await js.read(dialect.format, [call.body], stream=False, status=call.status, headers=headers)
    assert refused.value.status == refusal.status
    assert loop.ended == [("failed", refusal.status)]
    assert loop.usages == [ledger_usage(dialect, 1)]


@each_dialect
@pytest.mark.parametrize(("failure", "status"), [("unreachable", 502), ("timeout", 504), ("cut", 502)])
async def test_a_client_that_waits_gets_an_error_of_ours(dialect: Dialect, failure: str, status: int) -> None:
    async with InnerLoop(dialect, FIRST, FAILURES[failure]) as loop:
        call = await loop.ask(dialect.request(stream=False))
    assert call.status == status and call.complete
    error = raised(dialect, call, stream=False)
    assert isinstance(error, (anthropic.APIStatusError, openai.APIStatusError))
    assert error.status_code == status and WORDS[failure] in error.message
    assert_hidden(call)
    assert [end[0] for end in loop.ended] == ["failed"]


@each_dialect
@pytest.mark.parametrize(
    ("failure", "second"),
    [("429", None), ("unreachable", None), ("timeout", "partial"), ("cut", "partial"), ("closed", "partial")],
)
async def test_what_the_ledger_knows_of_the_hop_that_failed(dialect: Dialect, failure: str, second: str | None) -> None:
    """No row for a request that was not accepted; a partial one for what broke off, or may have begun (design.md 3)."""
    async with InnerLoop(dialect, FIRST, FAILURES[failure]) as loop:
        await loop.ask(dialect.request())
    assert loop.usages[0] == ledger_usage(dialect, 1)
    assert [usage[4] for usage in loop.usages[1:]] == ([] if second is None else [second])


@each_dialect
async def test_the_first_hop_is_refused(dialect: Dialect) -> None:
    """As without injected tools: nothing was said yet."""
    refusal = Refuses(429)
    async with InnerLoop(dialect, refusal) as loop:
        call = await loop.ask(dialect.request())
    assert (call.status, call.body) == (429, dialect.error(refusal.message))
    assert set(refusal.headers) <= set(call.headers)
    assert loop.ended == [("failed", 429)] and loop.usages == []


# --- the client goes --------------------------------------------------------------------------------------------------


class Waiting:
    """A tool that is under way until somebody opens the gate."""

    def __init__(self) -> None:
        self.entered = Gate()
        self.go = Gate()
        self.cancelled = 0

    async def __call__(self, arguments: Mapping[str, Any]) -> str:
        self.entered.set()
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return f"found {arguments['for']}"


@pytest.mark.parametrize("on_disconnect", ["cancel", "drain"])
@both_ways
@each_dialect
async def test_a_client_that_leaves_while_tools_run(dialect: Dialect, stream: bool, on_disconnect: OnDisconnect) -> None:
    """The calls are cancelled and recorded, and nothing more is asked of the provider (design.md 4): also where a response
    that was begun would be read on.
    """
    make = Provider.anthropic if dialect is MESSAGES else Provider.openai
    provider = replace(make(), on_disconnect=on_disconnect)
    tool = Waiting()
    async with InnerLoop(dialect, FIRST, tools={"look": tool}, provider=provider) as loop:
        call = loop.begin(dialect.request(stream=stream))
        await tool.entered.wait()
        call.leave()
        await call.over()
    assert tool.cancelled == 2 and len(loop.requests) == 1
    assert loop.ended == [("client_disconnected", 200)]
    assert {id_ for _, _, id_, _ in loop.invocations} == {one.id for one in FIRST.calls}
    assert all("cancelled" in (error or "") for _, _, _, error in loop.invocations)
    assert loop.usages == [ledger_usage(dialect, 1)]


async def test_the_gateway_stops_while_tools_run() -> None:
    """A client that reads a stream is told, and the calls are recorded as cancelled."""
    tool = Waiting()
    async with InnerLoop(MESSAGES, FIRST, tools={"look": tool}) as loop:
        call = loop.begin(MESSAGES.request())
        await tool.entered.wait()
    await call.over()
    assert loop.ended == [("interrupted", 200)]
    assert json.loads(call.body.split(b"data: ")[-1])["error"]["message"] == "The gateway is shutting down."
    assert tool.cancelled == 2
