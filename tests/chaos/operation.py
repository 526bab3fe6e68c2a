"""A provider in trouble, with what can be switched on against it; and an operator's mistake."""

import asyncio
import re
import signal
from contextlib import nullcontext
from typing import Final

from tests.support.crowd import until
from tests.support.gateway import SESSION_HEADER
from tests.support.injected import Dialect
from tests.support.injected_dialects import DIALECTS
from tests.support.rawclient import Answer as Got, RawClient

from .asking import Stage, ask, observed, row_of, staged, well
from .clients import COMPLETE, Sight, new_session, refused
from .lies import UNHARMED
from .load import COMPLETE as ALL_COMPLETE, Books, gateway, goes_on, load
from .providers import KNOWN, NO_USAGE
from .rawprovider import Read, head
from .scenario import Chapter, Observed, Outcome, Scale, Scenario

THRESHOLD: Final = 3
ASKED: Final = 10
OVERLOADED: Final = b'{"error":{"type":"overloaded","message":"Too many."}}'

SHIELDED: Final = (
    f"{THRESHOLD} times the provider's own 503, then {refused(503)} and with `retry-after`, at once;"
    " complete as soon as it is well"
)


async def _storm(stage: Stage, _: Scale) -> Observed:
    """Every request is answered with 503, until the provider is well again."""
    found = {await _weathered(stage, dialect) for dialect in DIALECTS}
    return Observed(found.pop() if len(found) == 1 else Outcome(f"differs: {found}", "?", "?"))


async def _weathered(stage: Stage, dialect: Dialect) -> Outcome:
    stage.provider.script = lambda _: [
        Read.ALL,
        head("application/json", f"Content-Length: {len(OVERLOADED)}", status="503 Overloaded") + OVERLOADED,
    ]
    sessions = [new_session() for _ in range(ASKED)]
    seen = [await _ask(stage, dialect, session) for session in sessions]
    theirs = [one.head.status == 503 and one.body == OVERLOADED for one in seen]
    ours = [_words(dialect, one) == refused(503) and int(one.head.get("retry-after") or 0) > 0 for one in seen]
    stage.provider.script = well
    last = new_session()
    async with asyncio.timeout(30):
        while _words(dialect, await _ask(stage, dialect, last)) != COMPLETE:
            last = new_session()
    rows = {await row_of(stage.gateway, session) for session in sessions} | {await row_of(stage.gateway, last)}
    as_promised = theirs == [True] * THRESHOLD + [False] * (ASKED - THRESHOLD) and all(ours[THRESHOLD:])
    return Outcome(SHIELDED if as_promised else f"{seen}", " / ".join(sorted(map(str, rows), reverse=True)))


async def _ask(stage: Stage, dialect: Dialect, session: str) -> Got:
    headers = [("Content-Type", "application/json"), (SESSION_HEADER, session)]
    async with RawClient(stage.gateway.url) as client:
        return await client.request("POST", dialect.path, headers, dialect.asking())


def _words(dialect: Dialect, got: Got) -> str:
    return Sight(got.head.status, got.body, got.complete).words(dialect, stream=True)


async def _restarts(stage: Stage, _: Scale) -> Observed:
    """Nobody listens, until each request was tried again."""
    with stage.provider.away():
        asking = asyncio.create_task(ask(stage))
        async with asyncio.timeout(30):
            while await _retried(stage) < len(DIALECTS) * 2:
                await asyncio.sleep(0.02)
        stage.provider.script = well
    return await observed(stage, await asking)


async def _retried(stage: Stage) -> float:
    async with RawClient(stage.gateway.url) as client:
        text = (await client.request("GET", "/metrics")).body.decode()
    return sum(float(found) for found in re.findall(r"^aibridge_upstream_retries_total\{[^}]*\} (\S+)", text, re.MULTILINE))


async def _mistake(_: None, __: Scale) -> Observed:
    """An invalid file, and SIGHUP, under load."""
    with gateway() as server:
        async with load(server) as crowd:
            (server.folder / "aibridge.toml").write_text("[providers.anthropic]\nkind = 1\n")
            server.process.send_signal(signal.SIGHUP)
            await until(lambda: "the old configuration still holds" in server.output, "nothing is said of it")
            await goes_on(crowd)
        return Observed((await Books.of(crowd.seen, server, server.database)).outcome)


_BREAKER: Final = {
    f"AIBRIDGE_PROVIDERS__{name}__BREAKER__{key}": value
    for name in ("ANTHROPIC", "OPENAI")
    for key, value in {"ENABLED": "true", "THRESHOLD": f"{THRESHOLD}", "OPEN_SECONDS": "3"}.items()
}
_RETRIES: Final = {f"AIBRIDGE_PROVIDERS__{name}__RETRIES__ATTEMPTS": "10" for name in ("ANTHROPIC", "OPENAI")}

OVERLOAD: Final = Chapter(
    "A provider is overloaded, with a breaker",
    f"`providers.NAME.breaker` is on, with `threshold = {THRESHOLD}`; it is off by default. One client asks after another.",
    lambda: staged(**_BREAKER),
    [Scenario("503 for every request", Outcome(SHIELDED, f"{NO_USAGE} / {KNOWN}"), _storm)],
)

RETRYING: Final = Chapter(
    "A provider restarts, with retries",
    "`providers.NAME.retries` is on; it is off by default.",
    lambda: staged(**_RETRIES),
    [Scenario("nobody listens for a moment", UNHARMED, _restarts)],
)

OPERATION: Final = Chapter(
    "An operator's mistake",
    "Under load.",
    nullcontext,
    [Scenario("SIGHUP with an invalid file", Outcome(ALL_COMPLETE, "`completed`"), _mistake)],
)
