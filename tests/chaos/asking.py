"""What a fault of a provider costs: asked by each kind of client, in each protocol, streamed and whole."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from tests.support.crowd import lost, until
from tests.support.gateway import Gateway, Row
from tests.support.injected import Dialect
from tests.support.injected_dialects import DIALECTS

from .clients import COMPLETE, Sdks, look, new_session
from .rawprovider import Answer, RawProvider, Read, Script, Step, answer
from .scenario import NOTHING, Observed, Outcome

QUESTION: Final = "What is it?"

Sent = Callable[[Answer], bytes]


@dataclass(slots=True)
class Stage:
    """`read` is how much of the gateway's output was looked at."""

    gateway: Gateway
    provider: RawProvider
    read: int = 0


@contextmanager
def staged(**env: str) -> Iterator[Stage]:
    with (
        RawProvider() as provider,
        Gateway(anthropic_base_url=provider.url, openai_base_url=f"{provider.url}/v1", env=env) as gateway,
    ):
        yield Stage(gateway, provider)


# ---- what was observed of a fault ----


@dataclass(frozen=True, slots=True)
class Tried:
    """One request of each kind of client, in one protocol, and what the ledger has of each."""

    dialect: Dialect
    stream: bool
    seen: str
    sdk: str
    ledgers: tuple[str, ...]
    missing: int


async def observe(
    stage: Stage, *scripts: Script, prompt: str = QUESTION, sent: Sent | None = None, sdks: bool = True
) -> Observed:
    """Bring faults about, of which one outcome is promised. See `ask` and `observed`."""
    tried: list[Tried] = []
    for script in scripts:
        stage.provider.script = script
        tried += await ask(stage, prompt, sent=sent, sdks=sdks)
    return await observed(stage, tried)


async def ask(stage: Stage, prompt: str = QUESTION, *, sent: Sent | None = None, sdks: bool = True) -> list[Tried]:
    """Ask in each protocol, streamed and whole, as a client that reads bytes and, with `sdks`, with the official SDK.

    `sent` gives the body that the provider sends, where that is no answer of the protocol to that question.
    """
    async with Sdks(stage.gateway) as clients:
        return await asyncio.gather(
            *(
                _try(stage, clients if sdks else None, dialect, prompt, sent, stream=stream)
                for stream in (True, False)
                for dialect in DIALECTS
            )
        )


async def observed(stage: Stage, tried: Sequence[Tried]) -> Observed:
    """What came of the questions. Checks that the gateway is well afterwards."""
    stage.provider.script = well
    healthy = await look(stage.gateway, DIALECTS[0], DIALECTS[0].asking(), new_session())
    assert healthy.words(DIALECTS[0], stream=True) == COMPLETE
    if stage.provider.failures:
        raise ExceptionGroup("the scripts of the provider", stage.provider.failures)
    await until(lambda: stage.provider.open == 0, "the gateway does not let go of connections to the provider")
    said, stage.read = stage.gateway.output[stage.read :], len(stage.gateway.output)
    assert "Traceback" not in said, said
    assert not await lost(stage.gateway.url)
    missing = sum(one.missing for one in tried)
    outcome = Outcome(
        by_way(tried, lambda one: one.seen),
        by_way(tried, lambda one: " or ".join(sorted(set(one.ledgers)))),
        f"{missing} records" if missing else NOTHING,
    )
    sdks = by_way(tried, lambda one: one.sdk)
    return Observed(outcome, sdks and f"SDKs: {sdks}")


def well(said: Callable[[], Answer]) -> Iterator[Step]:
    """A good provider."""
    yield Read.ALL
    yield said().whole


async def _try(stage: Stage, sdks: Sdks | None, dialect: Dialect, prompt: str, sent: Sent | None, *, stream: bool) -> Tried:
    question = [{"role": "user", "content": prompt}]
    body = dialect.asking(stream=stream, **{dialect.array: question})
    sessions = [new_session() for _ in range(2 if sdks else 1)]
    sight = await look(stage.gateway, dialect, body, sessions[0])
    sdk = "" if sdks is None else await sdks.try_it(dialect, body, sessions[1])
    seen = sight.words(dialect, stream=stream, sent=sent and sent(answer(dialect, stream=stream)))
    if sdk == "completes" and seen != COMPLETE:
        seen += ", which the SDK takes for complete"
    found = [await row_of(stage.gateway, session) for session in sessions]
    missing = sum(row is None for row in found)
    return Tried(dialect, stream, seen, sdk, tuple(row for row in found if row is not None), missing)


async def row_of(gateway: Gateway, session: str) -> str | None:
    """What the ledger says of a request: how it ended and what is known of its usage. None where something is missing."""
    try:
        await until(lambda: _ended(gateway.ledger(session).interceptions), "the interception does not end")
    except TimeoutError:
        return None
    rows = gateway.ledger(session)
    if len(rows.user_prompts) != 1:
        return None
    usage = f"usage {rows.token_usage['completeness']}" if rows.token_usages else "no usage"
    return f"`{rows.interception['status']}`, {usage}"


def _ended(interceptions: Sequence[Row]) -> bool:
    return len(interceptions) == 1 and interceptions[0]["ended_at"] is not None


def by_way(tried: Sequence[Tried], words: Callable[[Tried], str]) -> str:
    """One wording for all where there is one; else by stream and whole, and by protocol within."""
    if len(all_words := {words(one) for one in tried}) == 1:
        return all_words.pop()
    return "; ".join(
        f"{'streams' if stream else 'whole'}: {_by_protocol([one for one in tried if one.stream is stream], words)}"
        for stream in (True, False)
    )


def _by_protocol(tried: Sequence[Tried], words: Callable[[Tried], str]) -> str:
    if len(all_words := {words(one) for one in tried}) == 1:
        return all_words.pop()
    said: dict[str, list[str]] = {}
    for one in tried:
        said.setdefault(words(one), []).append(one.dialect.format.capitalize())
    return " / ".join(f"{what} ({', '.join(dict.fromkeys(who))})" for what, who in said.items())
