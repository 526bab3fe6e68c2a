"""Row 1 of failures.md: a disconnect neither loses nor invents usage, and stops the provider.

Truth: the row (``client_disconnected``; what was reported is kept, the rest NULL, ``partial``; with ``drain``, exact),
design.md 4 (a disconnect cancels the provider call at once), wire.md A8 and B2 for when which figures are reported.
"""

import asyncio
import time
from collections.abc import Callable
from contextlib import AsyncExitStack

import pytest

from tests.support.gateway import Rows, Scene, Stage
from tests.support.provider import STALL, Reply, Wait, cut_after
from tests.support.rawclient import RawClient
from tests.support.recording import NOTHING_YET, UsageRow, usage
from tests.support.streams import events, lock_step, target
from tests.support.traffic import named

STREAMS = ["messages-text-stream", "chat-text-stream", "responses-text-stream"]
BLOCKING = ["messages-text-blocking", "chat-text-blocking", "responses-text-blocking"]

Leave = Callable[[RawClient], None]


def usages(rows: Rows) -> list[UsageRow]:
    return [
        UsageRow(
            input_tokens=row["input_tokens"],
            output_tokens=row["output_tokens"],
            cache_read_input_tokens=row["cache_read_input_tokens"],
            cache_write_input_tokens=row["cache_write_input_tokens"],
            completeness=row["completeness"],
        )
        for row in rows.token_usages
    ]


def check(scene: Scene, expected: tuple[UsageRow, ...], http_status: int | None = 200) -> Rows:
    rows = scene.ended()
    assert rows.interception["status"] == "client_disconnected"
    assert rows.interception["http_status"] == http_status
    assert usages(rows) == list(expected)
    assert len(rows.user_prompts) == 1
    return rows


async def go(client: RawClient, how: str) -> None:
    if how == "reset":
        client.die()
    else:
        await client.leave()


# What is known after that many events: of message_start, of message_delta, of the usage chunk.
KNOWN = [
    ("messages-text-stream", 0, NOTHING_YET),
    ("messages-text-stream", 1, usage(25, 1, 0, 0, "partial")),
    ("messages-text-stream", 3, usage(25, 1, 0, 0, "partial")),
    ("messages-text-stream", -1, usage(25, 15, 0, 0, "partial")),
    ("messages-parallel-tools-stream", 4, usage(472, 2, 0, 0, "partial")),
    ("chat-text-stream", 0, NOTHING_YET),
    ("chat-text-stream", 1, NOTHING_YET),
    ("chat-text-stream", 3, NOTHING_YET),
    ("chat-text-stream", -1, usage(19, 10, 0, None, "partial")),
    ("responses-text-stream", 0, NOTHING_YET),
    ("responses-text-stream", 1, NOTHING_YET),
    ("responses-text-stream", 4, NOTHING_YET),
    ("responses-text-stream", -1, NOTHING_YET),
]


@pytest.mark.parametrize("how", ["close", "reset"])
@pytest.mark.parametrize(("name", "count", "expected"), KNOWN, ids=lambda value: str(value) if value != "" else None)
async def test_client_killed_after_events(
    name: str, count: int, expected: tuple[UsageRow, ...], how: str, scene: Scene
) -> None:
    recording = named(name)
    pieces = events(recording.response)
    seen = pieces[:count]
    reply, gates = lock_step(recording, pieces)
    for gate in gates[: len(seen) - 1]:
        gate.set()
    if not seen:
        reply = Reply(200, reply.headers, [STALL])
    scene.reply(reply)
    async with scene.client() as client:
        await client.send("POST", target(recording), scene.lines(), recording.request)
        await client.head()
        assert await client.exactly(len(b"".join(seen))) == b"".join(seen)
        await go(client, how)
    exchange = await scene.exchange()
    await exchange.client_gone.wait()
    assert not exchange.sent_all
    check(scene, expected)


@pytest.mark.parametrize("name", [*STREAMS, *BLOCKING])
async def test_client_killed_before_the_provider_answers(name: str, scene: Scene) -> None:
    recording = named(name)
    scene.reply(Reply(before=[STALL]))
    async with scene.client() as client:
        await client.send("POST", target(recording), scene.lines(), recording.request)
        exchange = await scene.exchange()
    await exchange.client_gone.wait()
    check(scene, NOTHING_YET, http_status=None)


@pytest.mark.parametrize("name", BLOCKING)
async def test_client_killed_inside_a_blocking_body(name: str, scene: Scene) -> None:
    recording = named(name)
    reply = recording.reply()
    half = len(recording.response) // 2
    scene.reply(Reply(200, reply.headers, [recording.response[:half], STALL, recording.response[half:]], "length"))
    async with scene.client() as client:
        await client.send("POST", target(recording), scene.lines(), recording.request)
        await client.head()
        assert await client.exactly(half) == recording.response[:half]
    await (await scene.exchange()).client_gone.wait()
    check(scene, NOTHING_YET)


@pytest.mark.parametrize(
    "name", ["messages-cut-inside-a-tool-call", "chat-cut-inside-a-tool-call", "responses-cut-inside-a-tool-call"]
)
async def test_client_killed_inside_a_tool_call(name: str, scene: Scene) -> None:
    """A call whose arguments the model has not finished was never made; one that is whole was."""
    recording = named(name)
    scene.reply(Reply.stream([recording.response, STALL]))
    async with scene.client() as client:
        await client.send("POST", target(recording), scene.lines(), recording.request)
        await client.head()
        await client.exactly(len(recording.response))
    await (await scene.exchange()).client_gone.wait()
    rows = check(scene, tuple(recording.expect.usage))
    ids = [call["tool_call_id"] for call in recording.expect.tool_calls]
    assert [call["tool_call_id"] for call in rows.tool_usages] == ids
    assert [thought["content"] for thought in rows.model_thoughts] == [content for _, content in recording.expect.thoughts]


@pytest.mark.parametrize("name", STREAMS)
async def test_client_that_leaves_with_the_last_event_has_seen_it_all(name: str, scene: Scene) -> None:
    """The response was complete, so it is recorded as complete, and nothing about it is partial."""
    recording = named(name)
    reply, gates = lock_step(recording, [recording.response])
    scene.reply(reply)
    async with scene.client() as client:
        await client.send("POST", target(recording), scene.lines(), recording.request)
        await client.head()
        assert await client.exactly(len(recording.response)) == recording.response
    rows = scene.ledger()
    assert rows.interception["status"] == "completed"
    assert usages(rows) == list(recording.expect.usage)
    gates[-1].set()
    await (await scene.exchange()).finished.wait()
    assert usages(scene.ledger()) == list(recording.expect.usage)


async def test_client_killed_inside_its_request(scene: Scene) -> None:
    """Nothing was asked yet: nothing goes upstream, and nothing is in the ledger."""
    recording = named("messages-text-stream")
    async with scene.client() as client:
        headers = scene.lines(("Content-Length", str(len(recording.request))))
        await client.send("POST", target(recording), headers, recording.request[:-1])
        client.die()
    scene.reply(recording.reply())
    answer = await scene.post(target(recording), recording.request)
    assert answer.complete
    assert len(scene.requests) == 1
    assert scene.ledger().interception["status"] == "completed"


# --- drain ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*STREAMS, "messages-parallel-tools-stream", "messages-thinking-stream"])
async def test_drain_reads_on_for_exact_usage(name: str, scene: Scene) -> None:
    recording = named(name)
    first, *rest = events(recording.response)
    reply, (gate, end) = lock_step(recording, [first, b"".join(rest)])
    end.set()
    scene.reply(reply)
    async with scene.client() as client:
        await client.send("POST", target(recording, "drained"), scene.lines(), recording.request)
        await client.head()
        await client.exactly(len(first))
    await scene.noticed()
    assert not scene.exchanges[0].client_gone.is_set()
    gate.set()
    exchange = await scene.exchange()
    await exchange.finished.wait()
    assert exchange.sent_all
    rows = check(scene, tuple(recording.expect.usage))
    assert [call["input"] for call in rows.tool_usages] == [call["input"] for call in recording.expect.tool_calls]
    assert [row["content"] for row in rows.model_thoughts] == [content for _, content in recording.expect.thoughts]


@pytest.mark.parametrize("name", BLOCKING)
async def test_drain_of_a_blocking_response(name: str, scene: Scene) -> None:
    recording = named(name)
    reply, (gate,) = lock_step(recording, [b" "])
    scene.reply(Reply(200, reply.headers, [*reply.body[1:], recording.response], "length"))
    async with scene.client() as client:
        await client.send("POST", target(recording, "drained"), scene.lines(), recording.request)
        await client.head()
    await scene.noticed()
    gate.set()
    exchange = await scene.exchange()
    await exchange.finished.wait()
    assert exchange.sent_all
    check(scene, tuple(recording.expect.usage))


async def test_drain_of_a_response_that_then_breaks_off(scene: Scene) -> None:
    """Two things went wrong; the client left first, and the figures are partial because of the second."""
    recording = named("messages-cut-before-stop")
    first, *rest = events(recording.response)
    reply, (gate, _) = lock_step(recording, [first, b""])
    scene.reply(Reply(200, reply.headers, [first, Wait(gate), *cut_after(b"".join(rest), len(b"".join(rest)))]))
    async with scene.client() as client:
        await client.send("POST", target(recording, "drained"), scene.lines(), recording.request)
        await client.head()
        await client.exactly(len(first))
    await scene.noticed()
    gate.set()
    rows = scene.ended()
    assert rows.interception["status"] in ("client_disconnected", "failed")
    assert usages(rows) == list(recording.expect.usage)


# --- many at once -----------------------------------------------------------------------------------------------------

DROPS = 30


async def test_thirty_drops_at_once(stage: Stage) -> None:
    """Each is recorded once, each reaches its provider, and a stream beside them does not notice."""
    recording = named("messages-text-stream")
    pieces = events(recording.response)
    with stage.scene() as lasting, stage.scene() as dropping:
        reply, gates = lock_step(recording, pieces)
        lasting.reply(reply)
        dropping.handler = lambda _: Reply.stream([*pieces[:3], STALL])
        async with lasting.client() as listener, AsyncExitStack() as stack:
            await listener.send("POST", target(recording), lasting.lines(), recording.request)
            await listener.head()
            assert await listener.exactly(len(pieces[0])) == pieces[0]
            clients = [await stack.enter_async_context(dropping.client()) for _ in range(DROPS)]
            for client in clients:
                await client.send("POST", target(recording), dropping.lines(), recording.request)
            for client in clients:
                await client.head()
                await client.exactly(len(b"".join(pieces[:3])))
            for client in clients:
                client.die()
            for before, gate, piece in zip(pieces, gates, [*pieces[1:], b""], strict=True):
                assert before
                gate.set()
                assert await listener.exactly(len(piece)) == piece
            assert await listener.rest() == (b"", True)
        for exchange in dropping.exchanges:
            await exchange.client_gone.wait()
        rows = dropping.ended(DROPS)
        assert [row["status"] for row in rows.interceptions] == ["client_disconnected"] * DROPS
        assert usages(rows) == [*usage(25, 1, 0, 0, "partial")] * DROPS
        assert lasting.ledger().interception["status"] == "completed"


LOOP_LAG_SECONDS = 0.05
ATTEMPTS = 5


async def test_thirty_drops_leave_the_loop_free(stage: Stage) -> None:
    """The server answers a trivial request within 50 ms while thirty clients drop: at least once in five attempts, for on
    a machine under load it is the machine that is late."""
    recording = named("messages-text-stream")
    pieces = events(recording.response)
    slowest: list[float] = []
    for _ in range(ATTEMPTS):
        with stage.scene() as scene:
            scene.handler = lambda _: Reply.stream([*pieces[:3], STALL])
            async with AsyncExitStack() as stack:
                clients = [await stack.enter_async_context(scene.client()) for _ in range(DROPS)]
                probe = await stack.enter_async_context(scene.client())
                for client in clients:
                    await client.send("POST", target(recording), scene.lines(), recording.request)
                for client in clients:
                    await client.head()
                over = asyncio.create_task(asyncio.to_thread(scene.ended, DROPS))
                for client in clients:
                    client.die()
                took = []
                while not over.done():
                    begin = time.monotonic()
                    assert (await probe.request("GET", "/healthz")).head.status == 200
                    took.append(time.monotonic() - begin)
                    await asyncio.sleep(0)
                await over
        slowest.append(max(took))
        if slowest[-1] < LOOP_LAG_SECONDS:
            return
    pytest.fail(f"the slowest answers took {slowest} s")
