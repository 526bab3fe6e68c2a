"""MCP servers that lie: what they do is told to the model as a failure, and the client gets an ordinary answer."""

import asyncio
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Final

from tests.support.gateway import Stage, staged
from tests.support.injected import Calls, Dialect
from tests.support.injected_dialects import DIALECTS
from tests.support.injected_servers import Played, calls, offered, play, toml

from .liar import TOOL
from .scenario import NOTHING, Chapter, Observed, Outcome, Scale, Scenario

CALL_SECONDS: Final = 1.5
"""For servers that do not answer in time."""

MOST_TOOLS: Final = 201
"""By default 200 of a server's are offered; the honest one has one."""

ANSWERED: Final = "an ordinary answer"
TOLD: Final = "`completed`, `invocation_error`"
RUN: Final = "`completed`, no error"
FIRST_RUN: Final = "`completed`, the first call without, the second with `invocation_error`"


_LATE: Final = ("wrong-id", "silent", "babbles", "late")


def server(way: str, much: int = 0, **more: Any) -> dict[str, Any]:
    """The settings of a liar."""
    liar = Path(__file__).with_name("liar.py")
    return {
        "command": [sys.executable, str(liar), way, f"{much}"],
        "call_timeout": CALL_SECONDS if way in _LATE else 20,
        "start_timeout": 60,
        **more,
    }


async def _one_call(way: str, stage: Stage, _: Scale) -> Observed:
    """Each protocol calls the tool once; the server has a life of its own for each."""
    return _observed(await _play_all(stage, lambda dialect: [[calls(f"{way}-{dialect}", TOOL)]]))


async def _two_calls(way: str, stage: Stage, _: Scale) -> Observed:
    """One after the other: what comes after the lie?"""
    return _observed(
        await _play_all(stage, lambda dialect: [[calls(f"{way}-{dialect}", TOOL)], [calls(f"{way}-{dialect}", TOOL)]])
    )


async def _much(way: str, much: Callable[[Scale], int], called: str, _: None, scale: Scale) -> Observed:
    """With a gateway of its own, which has an honest server, too."""
    liars = {way: server(way, much(scale), start_timeout=5), "honest": server("honest")}
    with staged(toml(liars)) as stage:
        names = await offered(stage, DIALECTS[0])
        if len(names) > MOST_TOOLS:
            return Observed(Outcome(f"{len(names)} tools in each request", "?", "?"))
        return _observed(await _play_all(stage, lambda _: [[calls(called, TOOL)]]))


async def _play_all(stage: Stage, hops: Callable[[Dialect], list[list[Calls]]]) -> list[tuple[Played, list[Calls]]]:
    """Ask in all protocols at once. `play` makes sure that the client has a whole answer with nothing of tools in it."""

    async def one(dialect: Dialect, *, stream: bool) -> tuple[Played, list[Calls]]:
        said = hops(dialect)
        return await play(stage, dialect, *said, stream=stream), [call for hop in said for call in hop]

    return await asyncio.gather(*(one(dialect, stream=number != 1) for number, dialect in enumerate(DIALECTS)))


def _observed(played: list[tuple[Played, list[Calls]]]) -> Observed:
    errors = [[_error(one, call) for call in made] for one, made in played]
    failed = {tuple(error is not None for error in of_one) for of_one in errors}
    ledger = {(True,): TOLD, (False,): RUN, (False, True): FIRST_RUN, (True, True): TOLD}
    said = ledger.get(failed.pop(), "?") if len(failed) == 1 else f"differs: {errors}"
    told = next((error for of_one in errors for error in of_one if error), "")
    return Observed(Outcome(ANSWERED, said, NOTHING), told and f"the model is told: {told[:150]}")


def _error(played: Played, call: Calls) -> str | None:
    """Why a call failed, which the model was told, too; None where it did not."""
    (row,) = (row for row in played.rows.tool_usages if row["tool_call_id"] == call.id)
    return None if row["invocation_error"] is None else played.error(call)


_WAYS: Final[Mapping[str, tuple[str, str]]] = {
    "denies": ("lists a tool, and does not know it when it is called", TOLD),
    "wrong-id": ("answers with the id of another call", TOLD),
    "silent": ("never answers", TOLD),
    "closes": ("ends in the middle of a call", TOLD),
    "babbles": ("writes what is no message, and a result that is none", TOLD),
    "twice": ("answers twice, differently", RUN),
}


@contextmanager
def _liars() -> Iterator[Stage]:
    ways = [*_WAYS, "late", "changes"]
    with staged(toml({f"{way}-{dialect}": server(way) for way in ways for dialect in DIALECTS})) as stage:
        yield stage


LIARS: Final = Chapter(
    "An MCP server lies",
    "The tool is called in the inner loop. Calls may take a second and a half here.",
    _liars,
    [
        *(Scenario(what, Outcome(ANSWERED, ledger), partial(_one_call, way)) for way, (what, ledger) in _WAYS.items()),
        Scenario("answers when the call has timed out", Outcome(ANSWERED, TOLD), partial(_two_calls, "late")),
        Scenario("changes its tools between two calls", Outcome(ANSWERED, FIRST_RUN), partial(_two_calls, "changes")),
    ],
)

EXCESSIVE: Final = Chapter(
    "An MCP server says too much",
    "There is an honest server beside it, whose tool can be called all the same.",
    nullcontext,
    [
        Scenario(
            "lists a million tools", Outcome(ANSWERED, RUN), partial(_much, "million", lambda scale: scale.tools, "honest")
        ),
        Scenario("lists schemas that are bombs", Outcome(ANSWERED, RUN), partial(_much, "bombs", lambda _: 1000, "bombs")),
        Scenario(
            "lists a schema a million levels deep",
            Outcome(ANSWERED, RUN),
            partial(_much, "abyss", lambda scale: scale.tools, "honest"),
        ),
        Scenario(
            "a result of 50 MB", Outcome(ANSWERED, TOLD), partial(_much, "huge", lambda scale: scale.megabytes, "huge")
        ),
    ],
)
