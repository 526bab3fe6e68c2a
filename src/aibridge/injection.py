"""Tools of the bridge's own in other people's requests: which ones, put back what was hidden, run what is called.

`Injection.prepare` makes a client's request one that offers the tools. A conversation is offered the same tools for as long
as it lives, and gets back what its client was never shown (wire.md A6, D6): both are found in the `History` by what the
client replays.
"""

import asyncio
import logging
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from aibridge.commands import Answers
from aibridge.history import History
from aibridge.merger import Loop
from aibridge.toolbox import Toolbox
from aibridge.tools import Call, Outcome, Toolset
from aibridge.wire import Request
from aibridge.wire.base import MAX_DECODED_REQUEST_BYTES
from aibridge.wire.coding import CodingError, decode
from aibridge.wire.reading import Unreadable
from aibridge.wire.turns import Draft, Memory, Restored, UsagePolicy

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request as it goes to the provider first. Without a `loop` nothing was injected, and its bytes are the client's.

    `lost` and `unknown` count what could not be put back (`aibridge.wire.turns.Restored`); `notes` say so to the ledger.
    """

    request: Request
    loop: Loop | None = None
    lost: int = 0
    unknown: int = 0
    notes: tuple[str, ...] = ()


Report = Callable[[Call, Outcome, float], None]
"""Is told of a call, what came of it, and after how many milliseconds."""


@dataclass(frozen=True)
class Injection:
    """The tools of a `Toolbox` for the requests of all clients, and the rules for them.

    `usage` is what responses report (`UsagePolicy`). `max_turns` bounds the requests to the provider for one of a client,
    `max_seconds` the time after which no more tools are called in it; then the model is asked to answer without.
    `keep_alive_seconds` is how long a client's stream may be silent. A model whose name `skip_models` matches gets no tools.
    """

    toolbox: Toolbox
    history: History
    usage: UsagePolicy = "sum"
    max_turns: int = 32
    max_seconds: float = 600.0
    keep_alive_seconds: float = 15.0
    skip_models: Sequence[re.Pattern[str]] = ()
    _toolsets: dict[str, Toolset] = field(default_factory=dict, init=False, repr=False, compare=False)

    async def prepare(self, request: Request, scope: str) -> Prepared:
        """The request with tools, and with what was hidden from its client put back.

        `scope` keeps conversations of different people apart. Never fails: what cannot be injected into goes as it is.
        """
        model = request.facts.model or ""
        if any(pattern.search(model) for pattern in self.skip_models):
            return Prepared(request)
        try:
            body = decode(request.coding, request.body, MAX_DECODED_REQUEST_BYTES)
            draft = request.format.turns.read(body)
            restored = draft.restored(await self._recall(scope, draft.keys))
            if draft.objection is not None or (draft.is_aside and restored.toolset is None):
                return _without_tools(request, restored)
            toolset = await self._toolset(restored, draft)
            if not toolset:
                return _without_tools(request, restored)
            body = request.format.turns.with_tools(restored.body, toolset)
        except (CodingError, Unreadable) as error:
            return Prepared(request, notes=(f"no tools injected: {error}",))
        loop = Loop(toolset, draft, self.usage, self.max_turns)
        return Prepared(
            replace(request, body=body, coding="", has_tools=True), loop, restored.lost, restored.unknown, _notes(restored)
        )

    async def call(self, calls: Sequence[Call], *, seconds_left: float, report: Report) -> Answers:
        """Run calls, all at once, each id once. `report` is told of each when it ends, also of those that are cancelled."""
        runs: dict[str, asyncio.Task[Outcome]] = {}
        deadline = time.monotonic() + seconds_left
        answers: list[asyncio.Task[Outcome]] = []
        async with asyncio.TaskGroup() as group:
            for call in calls:
                task = runs.get(call.id)
                if task is None:
                    task = group.create_task(self._run(call, deadline, report))
                    if call.id:
                        runs[call.id] = task
                answers.append(task)
        return Answers(tuple(task.result() for task in answers), out_of_time=time.monotonic() >= deadline)

    async def remember(self, scope: str, memory: Memory) -> None:
        """Keep what a client was not shown. Without it the conversation goes on, but what was hidden is lost."""
        try:
            await self.history.remember(scope, memory)
        except Exception:
            logger.exception("the hidden part of a response could not be kept")

    async def recall_one(self, scope: str, key: str) -> Memory | None:
        """What is remembered under a key."""
        return (await self._recall(scope, [key])).get(key)

    async def toolset_of(self, memory: Memory) -> Toolset | None:
        """The tools that the conversation of a response is offered."""
        return await self._pinned(memory.toolset)

    async def _run(self, call: Call, deadline: float, report: Report) -> Outcome:
        started = time.monotonic()
        outcome = Outcome.failed("The call was cancelled, because nobody waits for its result any more.")
        try:
            outcome = await self._outcome(call, deadline)
        finally:
            report(call, outcome, round((time.monotonic() - started) * 1000, 3))
        return outcome

    async def _outcome(self, call: Call, deadline: float) -> Outcome:
        if call.refusal is not None:
            return Outcome.failed(call.refusal)
        if time.monotonic() >= deadline:  # not even begun: what is broken off may have had its effect
            return Outcome.failed(_OUT_OF_TIME)
        try:
            async with asyncio.timeout_at(asyncio.get_running_loop().time() + deadline - time.monotonic()):
                return await self.toolbox.call(call.tool, call.arguments)
        except TimeoutError:
            return Outcome.failed(_OUT_OF_TIME)
        except Exception as error:
            logger.exception("the toolbox failed at tool %s of server %s", call.tool.tool, call.tool.server)
            return Outcome.failed(f"The tool could not be called ({type(error).__name__}).")

    async def _recall(self, scope: str, keys: Sequence[str]) -> Mapping[str, Memory]:
        if not keys:
            return {}
        try:
            return await self.history.recall(scope, keys)
        except Exception:
            logger.exception("the hidden parts of a conversation could not be recalled")
            return {}

    async def _toolset(self, restored: Restored, draft: Draft) -> Toolset:
        """The tools that the conversation has been offered so far, or else those that there are."""
        if restored.toolset is not None and (pinned := await self._pinned(restored.toolset)) is not None:
            return pinned.avoiding(draft.tool_names)
        if restored.bound:  # its thoughts hold for the tools that it had elsewhere
            return Toolset(())
        offered = Toolset(self.toolbox.tools())
        current = offered.avoiding(draft.tool_names)
        if current.digest != offered.digest:
            logger.info("a client has tools with the names of injected ones; those got a number")
        if current and current.digest not in self._toolsets:
            try:
                await self.history.remember_toolset(current.digest, current.encoded)
            except Exception:
                logger.exception("a tool set could not be kept")
            self._toolsets[current.digest] = current
        return current

    async def _pinned(self, digest: str) -> Toolset | None:
        if digest not in self._toolsets:
            try:
                encoded = await self.history.recall_toolset(digest)
                if encoded is None:
                    return None
                self._toolsets[digest] = Toolset.decode(encoded)
            except Exception:
                logger.exception("a tool set could not be recalled")
                return None
        return self._toolsets[digest]


_OUT_OF_TIME: Final = "The time for tools in this turn is used up, so the call was given up."
_FOREIGN: Final = ("no tools injected: the conversation began elsewhere",)


def _without_tools(request: Request, restored: Restored) -> Prepared:
    """The request as it goes without tools: as it is, unless something of its conversation was put back."""
    if restored.restored:
        request = replace(request, body=restored.body, coding="")
    return Prepared(request, unknown=restored.unknown, notes=_FOREIGN) if restored.bound else Prepared(request)


def _notes(restored: Restored) -> tuple[str, ...]:
    """What the ledger should know of a history that could not be put together again."""
    lost = (f"hidden parts of {restored.lost} responses are lost",) if restored.lost else ()
    unknown = (f"{restored.unknown} turns of the model are not known",) if restored.unknown else ()
    return lost + unknown
