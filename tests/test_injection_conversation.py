"""Long conversations with injected tools and the client's own: nothing that was hidden is ever missed (issue 3, part 2).

Truth: wire.md A5, A6, C5, D4 and D6. The clients are the vendors' SDKs, and what they accumulated is all that is sent; the
provider answers only what is, entry by entry, the conversation as it was; the requests are compared as bytes, with a scanner
that is not the product's. The gateways are processes, two of them on one database, and the MCP server is one.
"""

import asyncio
import json
import re
import sqlite3
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, closing, contextmanager
from dataclasses import dataclass
from typing import Final

import pytest

from tests.support.conversations import (
    INJECTED,
    TOML,
    Client,
    Conversation,
    Hop,
    Round,
    Script,
    Speech,
    Tape,
    add,
    assert_constant,
    assert_extend_each_other,
    calls_in,
    change,
    fail,
    hidden_words,
    marks,
    member,
    weather,
)
from tests.support.conversations_chat import ChatClient, ChatSpeech
from tests.support.conversations_messages import MessagesClient, MessagesSpeech
from tests.support.conversations_responses import ResponsesClient, ResponsesSpeech
from tests.support.gateway import Gateway, Scene, Stage, staged, wait_until
from tests.support.provider import WAIT_SECONDS

TEN_ROUNDS: Final = (
    Round("1. Hello.", (Hop("Hello. What can I do?"),)),
    Round("2. Add.", (Hop("Let me see.", "It wants a sum.", (add(40001, 1),)), Hop("That was easy.", "Good."))),
    Round("3. Add twice.", (Hop(calls=(add(40002, 1), add(40003, 1))), Hop("Two sums.", "Both are there."))),
    Round(
        "4. Add, and then again.",
        (
            Hop("First this.", "One at a time.", (add(40004, 1),)),
            Hop("Then this.", "The next one.", (add(40005, 1),)),
            Hop("Now I know.", "Done."),
        ),
    ),
    Round(
        "5. Add, and what is the weather?",
        (
            Hop("Both at once.", "A sum and Oslo.", (add(40006, 1), weather("Oslo"))),
            Hop("Sun, and a sum.", "Here they are."),
        ),
    ),
    Round("6. And elsewhere?", (Hop("I ask.", "Bern.", (weather("Bern"),)), Hop("Sun, too."))),
    Round("7. Add without thinking.", (Hop("At once.", calls=(add(40007, 1),)), Hop("As you wish."))),
    Round("8. Fail.", (Hop(thought="It will go wrong.", calls=(fail(),)), Hop("That did not work.", "As I thought."))),
    Round(
        "9. All you can.",
        (
            Hop("A sum first.", "Slowly.", (add(40008, 1),)),
            Hop("Then all.", "Now quickly.", (weather("Rome"), add(40009, 1), weather("Kyiv"), add(40010, 1))),
            Hop("One more.", "Almost.", (add(40011, 1),)),
            Hop("It is sunny everywhere.", "What a day."),
        ),
    ),
    Round("10. Goodbye.", (Hop("Goodbye.", "It was long."),)),
)

ROUND_4: Final = 3
RESULTS_OF_ROUND_5: Final = 5
RESULTS_OF_ROUND_9: Final = 11
"""The numbers of the client's requests before which gateways end: twice while a turn waits for the client's results."""


@dataclass
class Part:
    """One conversation, and what came of it."""

    speech: Speech
    script: Script
    conversation: Conversation
    tape: Tape
    scene: Scene
    failure: Exception | None = None

    @property
    def bodies(self) -> list[bytes]:
        """What the provider has got."""
        return [received.body for received in self.scene.requests]


MAKERS: Final[dict[str, tuple[Callable[[], Speech], Callable[[str, Tape], Client]]]] = {
    "messages": (MessagesSpeech, MessagesClient),
    "chat": (ChatSpeech, ChatClient),
    "responses": (ResponsesSpeech, ResponsesClient),
    "stateful": (ResponsesSpeech, lambda session, tape: ResponsesClient(session, tape, stateful=True)),
}
PROTOCOLS: Final = tuple(MAKERS)


@asynccontextmanager
async def taking_part(stage: Stage, protocol: str, rounds: Sequence[Round]) -> AsyncIterator[Part]:
    make_speech, make_client = MAKERS[protocol]
    with stage.scene() as scene:
        tape = Tape()
        client = make_client(scene.tag, tape)
        scene.handler = script = Script(make_speech(), rounds)
        conversation = Conversation(client, [said.prompt for said in rounds])
        try:
            yield Part(script.speech, script, conversation, tape, scene)
        finally:
            await client.close()


@contextmanager
def beside(stage: Stage) -> Iterator[Gateway]:
    """Another gateway on the same database, before the same provider."""
    url = stage.provider.url
    env = {"AIBRIDGE_DATABASE__URL": f"sqlite:///{stage.gateway.database}"}
    toml = TOML.replace("{provider}", url)
    with Gateway(anthropic_base_url=url, openai_base_url=f"{url}/v1", toml=toml, env=env) as gateway:
        yield gateway


def streams(number: int) -> bool:
    """Whether the request of that number asks for a stream: two do, two do not. Gateways take turns at each one."""
    return number % 4 < 2


# --- ten rounds -------------------------------------------------------------------------------------------------------


async def play(stage: Stage, other: Gateway, parts: Sequence[Part]) -> None:
    """Ten rounds in all protocols side by side, with two gateways by turns that end in every way on the way."""

    async def step(part: Part, number: int) -> None:
        gateway = (stage.gateway, other)[number % 2]
        if part.failure is None:
            try:
                await part.conversation.step(gateway.url, stream=streams(number))
            except Exception as error:  # noqa: BLE001  each protocol's own test tells of it
                part.failure = error

    for number in range(sum(said.requests for said in TEN_ROUNDS)):
        if number == ROUND_4:
            stage.gateway.stop()
            stage.gateway.start()
        if number == RESULTS_OF_ROUND_5:  # what waits for them was hidden by the process that dies
            stage.gateway.kill()
            stage.gateway.start()
        if number == RESULTS_OF_ROUND_9:
            other.stop()
            stage.gateway.kill()
            other.start()
        await asyncio.gather(*(step(part, number) for part in parts))
        if number == RESULTS_OF_ROUND_9:
            stage.gateway.start()


@pytest.fixture(scope="module")
def gateways() -> Iterator[tuple[Stage, Gateway]]:
    with staged(TOML) as stage, beside(stage) as other:
        yield stage, other


@pytest.fixture(scope="module")
def played(gateways: tuple[Stage, Gateway]) -> dict[str, Part]:
    """The ten rounds, played once."""
    stage, other = gateways

    async def playing() -> dict[str, Part]:
        async with AsyncExitStack() as stack:
            parts = {name: await stack.enter_async_context(taking_part(stage, name, TEN_ROUNDS)) for name in PROTOCOLS}
            await play(stage, other, [*parts.values()])
            return parts

    return asyncio.run(playing())


@pytest.fixture(params=PROTOCOLS)
def part(played: dict[str, Part], request: pytest.FixtureRequest) -> Part:
    found: Part = played[request.param]
    return found


def test_the_provider_hears_the_whole_conversation(part: Part) -> None:
    """All that it said and every result, in its place, whatever the client has seen of it and whoever has died since."""
    assert not part.script.complaints
    assert part.failure is None
    assert len(part.bodies) == sum(len(said.hops) for said in TEN_ROUNDS)


def test_each_request_extends_the_one_before(played: dict[str, Part], part: Part) -> None:
    """Byte for byte, cache marks aside, with the same tools and instructions before it."""
    assert_constant(part.bodies, part.speech.constants)
    assert INJECTED.encode() in member(part.bodies[0], "tools")
    if part is played["stateful"]:  # the provider remembers: each of its responses is gone on from by the next request
        previous = [json.loads(body).get("previous_response_id") for body in part.bodies]
        assert isinstance(part.speech, ResponsesSpeech)
        begun = sum(len(said.hops) for said in TEN_ROUNDS[:1])
        assert previous == [*[None] * begun, *[*part.speech.kept][: len(previous) - begun]]
    else:
        assert_extend_each_other(part.bodies, part.speech.conversation)


def test_there_are_never_more_than_four_cache_marks(played: dict[str, Part]) -> None:
    """As many as the client has set (wire.md A5)."""
    counts = [marks(body) for body in played["messages"].bodies]
    assert set(counts[1:]) == {4}
    assert counts[0] == 3


def test_the_client_sees_nothing_that_is_hidden(part: Part) -> None:
    assert all(b"call_shown_" + city in part.tape.heard for city in (b"Oslo", b"Bern", b"Rome", b"Kyiv"))
    assert [words for words in hidden_words(TEN_ROUNDS) if words in part.tape.heard] == []


def test_the_ledger_has_every_turn_and_every_call(part: Part) -> None:
    rows = part.scene.ledger()
    assert [row["status"] for row in rows.interceptions] == ["completed"] * sum(said.requests for said in TEN_ROUNDS)
    assert not any("notes" in row["metadata"] for row in rows.interceptions)
    assert [row["prompt"] for row in rows.user_prompts] == [said.prompt for said in TEN_ROUNDS]
    assert len(rows.token_usages) == sum(len(said.hops) for said in TEN_ROUNDS)
    assert {row["completeness"] for row in rows.token_usages} == {"complete"}
    found = {row["tool_call_id"]: row for row in rows.tool_usages}
    assert len(found) == len(rows.tool_usages) == len(calls_in(TEN_ROUNDS))
    for call in calls_in(TEN_ROUNDS):
        row = found[call.id]
        assert (row["tool"], row["injected"]) == (call.name.removeprefix(INJECTED), int(call.injected))
        assert json.loads(row["input"]) == json.loads(call.arguments)
        assert (row["invocation_error"] is not None) == call.fails
        assert bool(row["server_url"]) == call.injected


# --- what is hidden is gone -------------------------------------------------------------------------------------------

FOUR_ROUNDS: Final = (
    Round("1. Add.", (Hop("Let me see.", "A sum.", (add(40021, 1),)), Hop("Here it is.", "Simple."))),
    Round("2. Thanks.", (Hop("You are welcome.", "Polite."),)),
    Round("3. Add again.", (Hop("Let me see again.", "Another sum.", (add(40022, 1),)), Hop("Here, too.", "Simple again."))),
    Round("4. Goodbye.", (Hop("Goodbye.", "It was short."),)),
)

LOSSES: Final = {
    # As housekeeping does it, and as somebody does who empties tables.
    "lost": ("UPDATE aibridge_hidden_turns SET data = NULL, size = 0",),
    "unknown": ("DELETE FROM aibridge_hidden_turns", "DELETE FROM aibridge_hidden_turn_keys"),
}


def missed(gateway: Gateway, provider: str, reason: str) -> float:
    with urllib.request.urlopen(f"{gateway.url}/metrics", timeout=WAIT_SECONDS) as response:
        metrics = response.read().decode()
    labels = re.escape(f'{{provider="{provider}",reason="{reason}"}}')
    found = re.search(rf"^aibridge_hidden_turns_missed_total{labels} (\S+)$", metrics, re.MULTILINE)
    return 0.0 if found is None else float(found[1])


@pytest.mark.parametrize("reason", LOSSES)
@pytest.mark.parametrize("protocol", PROTOCOLS)
async def test_a_conversation_goes_on_without_what_is_lost(
    gateways: tuple[Stage, Gateway], protocol: str, reason: str
) -> None:
    """The provider gets what the client has; thoughts that cannot be verified any more are left out (wire.md D6)."""
    stage, _ = gateways
    provider = {"messages": "anthropic", "stateful": "stateful"}.get(protocol, "openai")
    async with taking_part(stage, protocol, FOUR_ROUNDS) as part:
        await part.conversation.step(stage.gateway.url, stream=True)
        with closing(sqlite3.connect(stage.gateway.database, timeout=WAIT_SECONDS)) as database, database:
            for statement in LOSSES[reason]:
                database.execute(statement)
        before = missed(stage.gateway, provider, reason)
        part.script.strict = False
        await part.conversation.step(stage.gateway.url, stream=True)
        assert missed(stage.gateway, provider, reason) == before + 1
        answered, noted = part.scene.ledger().interceptions
        assert "notes" not in answered["metadata"]
        assert noted["status"] == "completed"
        notes = noted["metadata"]["notes"]
        if (protocol, reason) == ("messages", "unknown"):  # it may have begun anywhere, with other tools
            assert INJECTED.encode() not in part.bodies[-1]
            assert len(notes) == 2 and "bound to the tools that it had elsewhere" in notes[0]
            return
        assert member(part.bodies[-1], "tools") == member(part.bodies[0], "tools")
        assert b'"signature"' not in part.bodies[-1]
        assert len(notes) == 1 and re.search("1 (responses are lost|turns of the model are not known)", notes[0])

        await part.conversation.step(stage.gateway.url, stream=True)
        await part.conversation.step(stage.gateway.url, stream=True)
        if protocol != "stateful":  # what is said from then on is remembered
            assert b"call_hidden_add_40022" in part.bodies[-1]
            assert b"call_hidden_add_40021" not in part.bodies[-1]


# --- the server has other tools ---------------------------------------------------------------------------------------

CHANGING: Final = (
    Round("1. Hello.", (Hop("Hello."),)),
    Round("2. Change.", (Hop("It changes.", "Will it?", (change(),)), Hop("It has changed.", "Yes."))),
    Round("3. Add.", (Hop("Let me see.", "Still there?", (add(40031, 1),)), Hop("Still there.", "So it is."))),
)

CHANGED: Final = "the definition of 'add' is not the approved one"
"""What the gateway logs when it has seen the change."""


async def test_a_conversation_keeps_its_tools_when_the_server_changes_them() -> None:
    """New conversations get the new ones; a changed set would cost the old ones their cache and their thoughts (A5, A6)."""
    with staged(TOML) as stage:
        url = stage.gateway.url
        async with AsyncExitStack() as stack:
            old = [await stack.enter_async_context(taking_part(stage, name, CHANGING)) for name in PROTOCOLS]
            for part in old:
                await part.conversation.step(url, stream=True)
            for part in old:
                await part.conversation.step(url, stream=False)
            await asyncio.to_thread(wait_until, lambda: CHANGED in stage.gateway.output, "the gateway does not notice")
            for part in old:
                await part.conversation.step(url, stream=True)
                assert not part.script.complaints
                assert_constant(part.bodies, part.speech.constants)
                assert b"bmcp_sums_disappearing" in part.bodies[-1] and b"bmcp_sums_appearing" not in part.bodies[-1]
            for name in PROTOCOLS:
                new = await stack.enter_async_context(taking_part(stage, name, CHANGING))
                await new.conversation.step(url, stream=True)
                assert b"bmcp_sums_appearing" in new.bodies[0] and b"bmcp_sums_disappearing" not in new.bodies[0]
                assert b"Adds otherwise." in new.bodies[0]
