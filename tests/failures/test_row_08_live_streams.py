"""Row 8 of failures.md: streams are live. What the provider has sent, the client has, before the provider sends more.

Truth: the row; wire.md rules 1 and 8, E (SSE framing). No clock decides: provider and client take turns, and each piece
must have arrived before the next one is sent. A gateway that holds anything back, waiting for more, never gets more.

What is held, on purpose, is the end: the piece with the last event waits for the records (design.md 2), not for the
provider.
"""

from collections.abc import Callable, Sequence

import pytest

from tests.support.gateway import Scene, staged
from tests.support.provider import Gate, Reply, Step, Wait, at_random, bytewise
from tests.support.rawclient import RawClient
from tests.support.recording import Recording
from tests.support.streams import events, lock_step, target
from tests.support.traffic import ALL, named

TEXT = ["messages-text-stream", "chat-text-stream", "responses-text-stream"]

LIVE = [
    recording
    for recording in ALL
    if recording.streams and recording.expect.status == "completed" and b"\r" not in recording.response
]


def halves(body: bytes) -> list[bytes]:
    """Each event in two pieces, broken where it hurts: inside its data."""
    return [half for event in events(body) for half in (event[: len(event) * 2 // 3], event[len(event) * 2 // 3 :])]


def lines(body: bytes) -> list[bytes]:
    return body.splitlines(keepends=True)


async def take_turns(recording: Recording, pieces: Sequence[bytes], scene: Scene, request: bytes | None = None) -> None:
    """Play the pieces; read each before the next is sent, and the end before the provider ends the body."""
    reply, gates = lock_step(recording, pieces)
    scene.reply(reply)
    async with scene.client() as client:
        await client.send("POST", target(recording), scene.lines(), request or recording.request)
        assert (await client.head()).status == 200
        await read_turns(client, pieces, gates)
        assert await client.rest() == (b"", True)


async def read_turns(client: RawClient, pieces: Sequence[bytes], gates: Sequence[Gate]) -> None:
    for piece, gate in zip(pieces, gates, strict=True):
        assert await client.exactly(len(piece)) == piece
        gate.set()


@pytest.mark.parametrize("split", [events, halves, lines, lambda body: at_random(body, seed=8, pieces=40)])
@pytest.mark.parametrize("name", TEXT)
async def test_each_piece_arrives_before_the_next_is_sent(
    name: str, split: Callable[[bytes], list[bytes]], scene: Scene
) -> None:
    """Up to the piece with the last event. Pieces after that (the blank line that the last event lacks) go with it."""
    recording = named(name)
    pieces = split(recording.response)
    if split is not events:
        *pieces, last, end = pieces
        pieces.append(last + end)
    await take_turns(recording, pieces, scene)
    assert scene.ledger().interception["status"] == "completed"


@pytest.mark.parametrize("recording", LIVE, ids=str)
async def test_each_event_arrives_before_the_next_is_sent(recording: Recording, scene: Scene) -> None:
    """The last event comes when its records are durable, whatever the provider does with the connection then."""
    pieces = recording.response.split(b"\n\n")
    await take_turns(recording, [*(piece + b"\n\n" for piece in pieces[:-2]), b"\n\n".join(pieces[-2:])], scene)


@pytest.mark.parametrize("name", TEXT)
async def test_byte_by_byte(name: str, scene: Scene) -> None:
    """One byte at a time, so also inside characters, and each of them at once."""
    recording = named(name)
    *first, last = events(recording.response)
    await take_turns(recording, [*bytewise(b"".join(first[-2:])), last], scene)


COMMENTS = [b": keep-alive\n\n", b":\n\n", b": OPENROUTER PROCESSING\n\n", b": a\n: b\n", b"\n", b": half of a comm"]
PING = b'event: ping\ndata: {"type": "ping"}\n\n'


@pytest.mark.parametrize("name", TEXT)
@pytest.mark.parametrize("when", ["before the first event", "between events"])
async def test_comments_and_pings_arrive_at_once(name: str, when: str, scene: Scene) -> None:
    """They are there to be seen while nothing else is to be seen."""
    recording = named(name)
    pieces = events(recording.response)
    alive = [*COMMENTS, b"ent\n\n", PING]
    at = 0 if when == "before the first event" else 2
    await take_turns(recording, [*pieces[:at], *alive, *pieces[at:]], scene)
    rows = scene.ledger()
    assert rows.interception["status"] == "completed"
    assert rows.token_usage["output_tokens"] == recording.expect.usage[0]["output_tokens"]


async def test_the_head_arrives_before_any_event(scene: Scene) -> None:
    recording = named("messages-text-stream")
    gate = Gate()
    scene.reply(Reply.stream([Wait(gate), recording.response]))
    async with scene.client() as client:
        await client.send("POST", target(recording), scene.lines(), recording.request)
        assert (await client.head()).status == 200
        gate.set()
        assert await client.rest() == (recording.response, True)


@pytest.mark.parametrize("name", TEXT)
async def test_what_follows_the_last_event_arrives_too(name: str, scene: Scene) -> None:
    recording = named(name)
    after = [b": bye\n\n", b'event: x_after\ndata: {"x":1}\n\n', b": really\n\n"]
    await take_turns(recording, [recording.response, *after], scene)
    assert scene.ledger().interception["status"] == "completed"


@pytest.mark.parametrize("name", ["chat-text-stream", "chat-parallel-tools-stream"])
async def test_a_chat_stream_whose_usage_is_hidden_is_live_event_by_event(name: str, scene: Scene) -> None:
    """The one stream that is edited: whole events only, but each of those at once; the events about usage are left out."""
    recording = named(name)
    *pieces, extra, done = events(recording.response)
    assert b'"usage":{' in extra
    request = recording.request.replace(b'"stream_options" :{"include_usage": true},', b"")
    assert request != recording.request
    gates = [Gate() for _ in pieces]
    steps: list[Step] = []
    for piece, gate in zip(pieces, gates, strict=True):
        steps += [piece[:9], piece[9:], b": still here\n\n", Wait(gate)]
    scene.reply(Reply.stream([*steps, extra, done]))
    async with scene.client() as client:
        await client.send("POST", target(recording), scene.lines(), request)
        await client.head()
        for piece, gate in zip(pieces, gates, strict=True):
            seen = piece.replace(b',"usage":null', b"") + b": still here\n\n"
            assert await client.exactly(len(seen)) == seen
            gate.set()
        assert await client.rest() == (done, True)


async def test_a_passthrough_stream_is_live(scene: Scene) -> None:
    """A stored response may be streamed again (wire.md C1): nothing reads that, and nothing holds it."""
    pieces = [b"event: a\n", b"data: 1", b"\n\n", b": hm\n\n"]
    gates = [Gate() for _ in pieces]
    steps: list[Step] = []
    for piece, gate in zip(pieces, gates, strict=True):
        steps += [piece, Wait(gate)]
    scene.reply(Reply.stream(steps))
    async with scene.client() as client:
        await client.send("GET", "/openai/v1/responses/resp_1?stream=true", scene.lines())
        await client.head()
        await read_turns(client, pieces, gates)
        assert await client.rest() == (b"", True)


async def test_a_blocking_body_is_not_held_either(scene: Scene) -> None:
    """Some servers send white space while they think, so that nobody gives up on them."""
    recording = named("messages-text-blocking")
    pieces = [b" ", b"\n", b"  ", recording.response]
    gates = [Gate() for _ in pieces]
    steps: list[Step] = []
    for piece, gate in zip(pieces, gates, strict=True):
        steps += [Wait(gate), piece]
    scene.reply(Reply(200, [("Content-Type", "application/json")], steps, "length"))
    async with scene.client() as client:
        await client.send("POST", target(recording), scene.lines(), recording.request)
        await client.head()
        for piece, gate in zip(pieces, gates, strict=True):
            gate.set()
            assert await client.exactly(len(piece)) == piece
    assert scene.ledger().token_usage["output_tokens"] == recording.expect.usage[0]["output_tokens"]


SLOW_MEGABYTES = 128
MEMORY_MEGABYTES = 24


async def test_a_slow_client_holds_the_provider_and_not_the_memory() -> None:
    """What a client does not take stays with the provider: the server holds little of it, however long it waits."""
    recording = named("messages-text-stream")
    *first, last = events(recording.response)
    comment = b": " + b"x" * (1 << 20) + b"\n\n"
    with staged() as stage, stage.scene() as scene:
        scene.reply(recording.reply())
        await scene.post(target(recording), recording.request)
        before = scene.gateway.memory()
        scene.reply(Reply.stream([*first, *[comment] * SLOW_MEGABYTES, last]))
        async with scene.client() as client:
            await client.send("POST", target(recording), scene.lines(), recording.request)
            await client.head()
            await scene.noticed()
            exchange = await scene.exchange(1)
            assert not exchange.sent_all
            body, complete = await client.rest()
        assert complete
        assert len(body) == len(recording.response) + SLOW_MEGABYTES * len(comment)
        assert scene.gateway.memory() - before < MEMORY_MEGABYTES << 20


async def test_one_silent_stream_does_not_hold_the_others(scene: Scene) -> None:
    recording = named("messages-text-stream")
    pieces = events(recording.response)
    reply, gates = lock_step(recording, pieces)
    scene.reply(reply)
    async with scene.client() as silent:
        await silent.send("POST", target(recording), scene.lines(), recording.request)
        await silent.head()
        await silent.exactly(len(pieces[0]))
        for _ in range(3):
            scene.reply(recording.reply())
            assert (await scene.post(target(recording), recording.request)).body == recording.response
        for gate in gates:
            gate.set()
        assert await silent.rest() == (b"".join(pieces[1:]), True)
