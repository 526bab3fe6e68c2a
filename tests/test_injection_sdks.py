"""Injected tools, judged by those who read the answers: the official SDKs' stream helpers and accumulators.

Truth: the SDKs (Python anthropic 2.12.0 and openai 3.54.0; JavaScript, `tests.support.jssdk`), which refuse repeated starts,
holes and changed ids; wire.md D4 and D5 for what the provider must get and what the client must. The turns are written once
for the three protocols (`tests.support.injected`), and the whole engine runs (`tests.support.injected_loop`).
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from itertools import pairwise
from typing import Any, Final

import pytest
from hypothesis import given, settings, strategies as st

from tests.serving import Call
from tests.support.coding import ENCODERS
from tests.support.injected import QUESTION, Calls, Dialect, Says, Thinks, Turn, data_of, turn, usage_of
from tests.support.injected_dialects import CHAT, RESPONSES, both_ways, each_dialect
from tests.support.injected_loop import (
    LOOK,
    InnerLoop,
    Split,
    answer_to,
    assert_as_written,
    assert_hidden,
    assert_provider_got,
    fails,
    ledger_usage,
    looks,
    python_final,
    recorded,
    shown,
)
from tests.support.jssdk import JavaScript
from tests.support.provider import Gate, at_random, bytewise, whole
from tests.support.streams import events

THREE_HOPS: Final = (
    turn(1, Thinks("Let me see.", "signature-1"), Says("Looking it up. "), looks("one"), looks("two")),
    turn(2, Thinks("Hm, not yet.", "signature-2"), fails("three")),
    turn(3, Thinks("So that is it.", "signature-3"), Says("It is 3 \U0001f600.")),
)


def every_64_bytes(body: bytes, first: int) -> list[bytes]:
    edges = [0, *range(first, len(body), 64), len(body)]
    return [body[start:end] for start, end in pairwise(edges) if start < end]


def ending_lines_in(end: bytes, split: Split, body: bytes) -> Iterable[bytes]:
    return split(body.replace(b"\n", end))


# --- three hops -------------------------------------------------------------------------------------------------------


@both_ways
@each_dialect
@pytest.mark.parametrize("policy", ["sum", "last"])
async def test_three_hops_are_one_response(dialect: Dialect, stream: bool, policy: str, js: JavaScript) -> None:
    async with InnerLoop(dialect, *THREE_HOPS, usage=policy) as loop:
        call = await loop.ask(dialect.asking(stream=stream))
    assert call.status == 200 and call.complete
    assert (b"x-hop", b"1") in call.headers
    read, cached, written = usage_of(1, 2, 3)
    usage = (read, cached, written) if policy == "sum" else (*usage_of(3)[:2], written)
    assert await loop.seen(call, js, stream=stream) == shown(dialect, THREE_HOPS, usage=usage)
    if stream:
        dialect.assert_one_envelope(call.body)
    assert_hidden(call)
    assert len(loop.requests) == 3
    assert_provider_got(dialect, loop.requests, THREE_HOPS)


@both_ways
@each_dialect
async def test_the_ledger_has_every_hop(dialect: Dialect, stream: bool) -> None:
    """A usage for each response, an invocation for each call (issue 3), thoughts of all turns, one end."""
    async with InnerLoop(dialect, *THREE_HOPS) as loop:
        await loop.ask(dialect.request(stream=stream))
    assert loop.ended == [("completed", 200)]
    assert loop.usages == [ledger_usage(dialect, number) for number in (1, 2, 3)]
    assert loop.invocations == recorded(call for hop in THREE_HOPS for call in hop.calls)
    assert loop.client_calls == []
    assert [row.provider_response_id for row in loop.recorder.tool_usages] == [dialect.id_of(hop) for hop in (1, 1, 2)]
    assert [row.prompt for row in loop.recorder.prompts] == ["What is it?"]
    thoughts = [said.words for hop in THREE_HOPS for said in hop.said if isinstance(said, Thinks)]
    assert [row.content for row in loop.recorder.thoughts] == thoughts


@both_ways
@each_dialect
async def test_how_the_bytes_come_does_not_matter(dialect: Dialect, stream: bool) -> None:
    async def ask(split: Any) -> tuple[bytes, list[bytes]]:
        async with InnerLoop(dialect, *THREE_HOPS, split=split) as loop:
            call = await loop.ask(dialect.asking(stream=stream))
        assert dialect.seen(python_final(dialect, call, stream=stream)) == expected
        return call.body, loop.requests

    expected = shown(dialect, THREE_HOPS, usage=usage_of(1, 2, 3))
    once = await ask(whole)
    for split in (bytewise, *(partial(at_random, seed=seed) for seed in range(12))):
        assert await ask(split) == once


@each_dialect
async def test_a_stream_may_be_divided_at_every_byte(dialect: Dialect) -> None:
    """In whatever piece it stands, each byte is once the last of one."""
    bodies = set[bytes]()
    for first in range(64):
        async with InnerLoop(dialect, *THREE_HOPS, split=partial(every_64_bytes, first=first)) as loop:
            bodies.add((await loop.ask(dialect.asking())).body)
    assert len(bodies) == 1


@each_dialect
@pytest.mark.parametrize("end", [b"\r\n", b"\r"], ids=["CRLF", "CR"])
async def test_lines_may_end_in_other_ways(dialect: Dialect, end: bytes) -> None:
    """Server-sent events may have any of three line ends (wire.md E)."""
    for split in (whole, bytewise):
        async with InnerLoop(dialect, *THREE_HOPS, split=partial(ending_lines_in, end, split)) as loop:
            call = await loop.ask(dialect.asking())
        seen = dialect.seen(python_final(dialect, call, stream=True))
        assert seen == shown(dialect, THREE_HOPS, usage=usage_of(1, 2, 3))
        assert_provider_got(dialect, loop.requests, THREE_HOPS)


async def test_a_later_response_may_begin_with_a_byte_order_mark() -> None:
    """Some compatible servers send one. In the midst of a stream it would make the line after it unknown to clients."""
    answers = iter([b"", b"\xef\xbb\xbf"])

    def marked(body: bytes) -> list[bytes]:  # a server that begins to speak in its first chunk
        return [next(answers) + body.replace(b'"content":""', b'"content":"So: "')]

    async with InnerLoop(CHAT, turn(1, Says("Look. "), looks("one")), turn(2, Says("Fine.")), split=marked) as loop:
        call = await loop.ask(CHAT.asking())
    seen = CHAT.seen(python_final(CHAT, call, stream=True))
    assert seen.said == (("text", "So: Look. So: Fine."),)


# --- turns of any shape -----------------------------------------------------------------------------------------------

_words = st.text(st.characters(codec="utf-8"), max_size=12).filter(lambda words: "s3cret" not in words)


@st.composite
def conversations(draw: st.DrawFn) -> list[Turn]:
    """Up to four turns: all but the last call injected tools; the last one may call the client's, and ours beside them."""
    ids = iter(range(100))
    thinks = st.builds(lambda words: Thinks(words, f"signature-{next(ids)}"), _words)
    speech = st.lists(thinks | st.builds(Says, _words), max_size=3)
    hidden = st.builds(lambda call: call(f"hidden-{next(ids)}"), st.sampled_from([looks, fails]))
    own = st.builds(lambda: Calls(f"call-of-client-{next(ids)}", "mine", '{"x": 1}'))
    count = draw(st.integers(0, 3))
    turns = [
        turn(number + 1, *draw(speech), *draw(st.lists(hidden, min_size=1, max_size=3)), *draw(speech))
        for number in range(count)
    ]
    calls = draw(st.lists(hidden | own, max_size=4))
    calls = calls if any(call.tool == "mine" for call in calls) else []
    return [*turns, turn(count + 1, *draw(speech), Says("So."), *calls)]


@each_dialect
@settings(max_examples=40, deadline=None)
@given(turns=conversations(), stream=st.booleans(), seed=st.integers(0, 1000))
async def test_turns_of_any_shape(dialect: Dialect, js: JavaScript, turns: list[Turn], stream: bool, seed: int) -> None:
    async with InnerLoop(dialect, *turns, split=partial(at_random, seed=seed)) as loop:
        call = await loop.ask(dialect.asking(stream=stream, tools=["mine"]))
    usage = usage_of(*(hop.number for hop in turns))
    assert await loop.seen(call, js, stream=stream) == shown(dialect, turns, usage=usage, stop=turns[-1].stop)
    if stream:
        dialect.assert_one_envelope(call.body)
    assert_hidden(call)
    assert_provider_got(dialect, loop.requests, turns)
    assert sorted(loop.invocations) == sorted(recorded(one for hop in turns for one in hop.calls if one.tool != "mine"))


# --- the client's own calls -------------------------------------------------------------------------------------------

MINE: Final = Calls("call-of-the-client", "mine", '{"x": 1}')
MIXED: Final = turn(1, Thinks("Both.", "signature-1"), Says("One moment. "), looks("one"), MINE, looks("two"))
ANSWERED: Final = turn(2, Says("Done."))


def results_in(dialect: Dialect, said: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """The results at the end of a conversation: call ids and words."""
    if dialect is RESPONSES:
        return [(item["call_id"], item["output"]) for item in said if item["type"] == "function_call_output"]
    if dialect is CHAT:
        return [(message["tool_call_id"], message["content"]) for message in said if message["role"] == "tool"]
    words = [block["content"] for block in said[-1]["content"]]
    texts = [content if isinstance(content, str) else content[0]["text"] for content in words]
    return list(zip((block["tool_use_id"] for block in said[-1]["content"]), texts, strict=True))


@both_ways
@each_dialect
async def test_a_mixed_turn(dialect: Dialect, stream: bool, js: JavaScript) -> None:
    """Ours are run, the client gets its own, and with its result all go back to where they were (issue 3)."""
    async with InnerLoop(dialect, MIXED, ANSWERED) as loop:
        first = await loop.ask(dialect.asking(stream=stream, tools=["mine"]))
        assert await loop.seen(first, js, stream=stream) == shown(dialect, [MIXED], usage=usage_of(1), stop="calls")
        if stream:
            dialect.assert_one_envelope(first.body)
        said = dialect.replayed(python_final(dialect, first, stream=stream), {MINE.id: "mine is done"})
        second = await loop.ask(dialect.request([QUESTION, *said], stream=stream, tools=["mine"]))
    assert_hidden(first)
    assert_hidden(second)
    assert dialect.said_until(loop.requests[1]).startswith(dialect.said_until(loop.requests[0]))
    appended = json.loads(loop.requests[1])[dialect.array][1:]
    by_model = [message for message in dialect.appended(MIXED, ()) if message.get("role") != "user"]
    assert appended[: len(by_model)] == by_model
    assert_as_written(loop.requests[1], MIXED.calls)
    results = [(MINE.id, "mine is done") if call is MINE else answer_to(call)[:2] for call in MIXED.calls]
    if dialect is RESPONSES:  # which knows a result by its call, wherever it stands
        results.sort(key=lambda result: result[0] == MINE.id)
    assert results_in(dialect, appended) == results
    assert loop.ended == [("completed", 200)] * 2
    assert loop.invocations == recorded(call for call in MIXED.calls if call is not MINE)
    assert [(row.tool, row.tool_call_id, row.server_url) for row in loop.client_calls] == [("mine", MINE.id, None)]


async def test_a_mixed_turn_of_a_conversation_that_the_provider_keeps(js: JavaScript) -> None:
    """The client names the response, and brings its own result only (wire.md C1, D5)."""
    async with InnerLoop(RESPONSES, turn(7, looks("zero")), MIXED, ANSWERED) as loop:
        first = await loop.ask(RESPONSES.request(tools=["mine"]))
        seen = await loop.seen(first, js, stream=True)
        assert seen.id == RESPONSES.id_of(7)
        result = {"type": "function_call_output", "call_id": MINE.id, "output": "mine is done"}
        second = await loop.ask(RESPONSES.request([result], tools=["mine"], previous_response_id=seen.id))
    sent = json.loads(loop.requests[2])
    assert sent["previous_response_id"] == RESPONSES.id_of(1)
    assert {item["call_id"] for item in sent["input"]} == {call.id for call in MIXED.calls}
    assert {event["response"]["previous_response_id"] for event in data_of(second.body) if "response" in event} == {seen.id}


@each_dialect
async def test_a_client_whose_tool_has_the_name_of_ours(dialect: Dialect, js: JavaScript) -> None:
    """Its tool keeps the name, ours gets another one."""
    own = Calls("call-of-the-client", LOOK, '{"for": "me"}')
    ours = Calls("call-of-ours", f"{LOOK}_2", '{"for": "us"}')
    async with InnerLoop(dialect, turn(1, ours), turn(2, own)) as loop:
        call = await loop.ask(dialect.asking(tools=[LOOK]))
    names = [tool.get("name") or tool["function"]["name"] for tool in json.loads(loop.requests[0])["tools"]]
    assert names == [LOOK, "bmcp_memory_fail", f"{LOOK}_2"]
    seen = await loop.seen(call, js, stream=True)
    assert (seen.said, seen.stop) == (dialect.shown([own]), "calls")
    assert loop.invocations == [("look", ours.arguments, ours.id, None)]
    assert [row.tool for row in loop.client_calls] == [LOOK]


# --- live -------------------------------------------------------------------------------------------------------------


@each_dialect
async def test_what_the_client_may_see_it_sees_at_once(dialect: Dialect) -> None:
    """Each event before the hidden call is with the client before the next one comes from the provider."""
    calls: list[Call] = []
    sent: list[bytes] = []
    received: list[int] = []

    def one_by_one(body: bytes) -> Iterator[bytes]:
        for event in events(body):
            sent.append(event)
            received.append(len(calls[0].body))
            yield event

    hidden = looks("one")
    said = turn(1, Thinks("Let me see.", "signature-1"), Says("Looking it up. "), hidden)
    async with InnerLoop(dialect, said, ANSWERED, split=one_by_one) as loop:
        calls.append(loop.begin(dialect.asking()))
        await calls[0].over()
    visible = next(number for number, event in enumerate(sent) if hidden.id.encode() in event)
    assert visible > 5
    assert all(before < after for before, after in pairwise(received[: visible + 1]))


@each_dialect
async def test_the_client_reads_on_while_tools_run(dialect: Dialect, js: JavaScript) -> None:
    """And it hears that its stream is alive, in its protocol's way (wire.md D5)."""
    entered, go = Gate(), Gate()
    alive = {"messages": b'event: ping\ndata: {"type":"ping"}\n\n'}.get(dialect.format, b": keep-alive\n\n")
    heard: list[bytes] = []

    async def wait(arguments: Mapping[str, Any]) -> str:
        entered.set()
        await go.wait()
        return f"found {arguments['for']}"

    def watch(piece: bytes) -> None:
        if entered.is_set() and piece == alive:
            heard.append(piece)
        if len(heard) == 3:
            go.set()

    turns = (turn(1, Says("Look"), looks("one")), ANSWERED)
    async with InnerLoop(dialect, *turns, tools={"look": wait}, keep_alive_seconds=0.01) as loop:
        call = loop.begin(dialect.asking(), watch=watch)
        await entered.wait()
        assert b'"Look"' in call.body and not call.complete and len(loop.requests) == 1
        await call.over()
    assert len(heard) >= 3
    assert await loop.seen(call, js, stream=True) == shown(dialect, turns, usage=usage_of(1, 2))
    assert_hidden(call)


@both_ways
@each_dialect
async def test_the_calls_of_a_turn_run_at_the_same_time(dialect: Dialect, stream: bool) -> None:
    """Each waits for the other; the results are in the order of the calls."""
    gates = {"s3cret one": Gate(), "s3cret two": Gate()}

    async def meet(arguments: Mapping[str, Any]) -> str:
        gates[arguments["for"]].set()
        for gate in gates.values():
            await gate.wait()
        return f"found {arguments['for']}"

    turns = (turn(1, looks("one"), looks("two")), ANSWERED)
    async with InnerLoop(dialect, *turns, tools={"look": meet}) as loop:
        await loop.ask(dialect.asking(stream=stream))
    assert_provider_got(dialect, loop.requests, turns)
    assert loop.ended == [("completed", 200)]


# --- compressed, and without usage ------------------------------------------------------------------------------------


@both_ways
@each_dialect
@pytest.mark.parametrize("coding", ["gzip", "zstd"])
async def test_compressed_both_ways(dialect: Dialect, stream: bool, coding: str) -> None:
    """Requests are decoded to be edited (Codex compresses them, wire.md C6); so are responses of who compresses unasked."""
    async with InnerLoop(dialect, *THREE_HOPS, coding=coding) as loop:
        body = ENCODERS[coding](dialect.asking(stream=stream))
        call = await loop.ask(body, [(b"content-encoding", coding.encode()), (b"accept-encoding", b"gzip, zstd")])
    for sent in loop.upstream.requests:
        headers = dict(sent.headers)
        assert headers[b"accept-encoding"] == b"identity" and b"content-encoding" not in headers
    assert_provider_got(dialect, loop.requests, THREE_HOPS)
    assert b"content-encoding" not in dict(call.headers)
    seen = dialect.seen(python_final(dialect, call, stream=stream))
    assert seen == shown(dialect, THREE_HOPS, usage=usage_of(1, 2, 3))


@pytest.mark.parametrize("asks", [{}, {"stream_options": {"include_usage": False}}, {"stream_options": None}])
async def test_a_chat_stream_whose_client_did_not_ask_for_usage(asks: dict[str, Any], js: JavaScript) -> None:
    """The ledger has it all the same, and the client nothing of it (wire.md B2)."""
    async with InnerLoop(CHAT, *THREE_HOPS) as loop:
        call = await loop.ask(CHAT.request(**asks))
    assert await loop.seen(call, js, stream=True) == shown(CHAT, THREE_HOPS, usage=None)
    assert b"usage" not in call.body
    CHAT.assert_one_envelope(call.body)
    assert loop.usages == [ledger_usage(CHAT, number) for number in (1, 2, 3)]
    assert all(json.loads(body)["stream_options"]["include_usage"] for body in loop.requests)


async def test_a_response_repeats_what_its_client_asked(js: JavaScript) -> None:
    """OpenAI's response objects have the request's tools and choice in them: the client's, not those of some turn."""
    async with InnerLoop(RESPONSES, *THREE_HOPS) as loop:
        call = await loop.ask(RESPONSES.request(tools=["mine"], tool_choice="required"))
    own = [RESPONSES.tool("mine", "Mine.")]
    echoed = [event["response"] for event in data_of(call.body) if "response" in event]
    assert [(response["tools"], response["tool_choice"]) for response in echoed] == [(own, "required")] * 3


@both_ways
async def test_input_that_is_a_string(stream: bool) -> None:
    """It becomes a message when something has to follow it (wire.md C1)."""
    async with InnerLoop(RESPONSES, *THREE_HOPS) as loop:
        await loop.ask(RESPONSES.request(stream=stream, input="What is it?"))
    assert json.loads(loop.requests[0])["input"] == "What is it?"
    assert json.loads(loop.requests[1])["input"][0] == QUESTION
    assert_provider_got(RESPONSES, loop.requests[1:], THREE_HOPS[1:])
