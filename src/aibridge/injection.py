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
from dataclasses import dataclass, field
from typing import Final, ParamSpec, TypeVar

import msgspec

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

P = ParamSpec("P")
T = TypeVar("T")


class Prepared(msgspec.Struct, frozen=True):
    """A request as it goes to the provider first. Without a `loop` nothing was injected, and its bytes are the client's.

    `lost` and `unknown` count what could not be put back (`aibridge.wire.turns.Restored`); `notes` say so to the ledger, and
    why there are no tools.
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
        try:
            body = decode(request.coding, request.body, MAX_DECODED_REQUEST_BYTES)
            draft = await _work(body, request.format.turns.read, body)
            found = await self._recall(scope, draft.keys[-_MAX_KEYS:])
            restored = await _work(body, draft.restored, found)
            toolset, why_not = await self._toolset(request, draft, restored)
            ready = restored.body
            if toolset:
                ready = await _work(body, request.format.turns.with_tools, ready, toolset)
        except (CodingError, Unreadable) as error:
            return Prepared(request, notes=(f"no tools injected: {error}",))
        if ready != body:
            request = msgspec.structs.replace(request, body=ready, coding="", has_tools=bool(toolset))
        return Prepared(
            request,
            Loop(toolset, draft, self.usage, self.max_turns) if toolset else None,
            restored.lost,
            restored.unknown,
            _notes(why_not, restored),
        )

    async def call(self, calls: Sequence[Call], *, seconds_left: float, report: Report) -> Answers:
        """Run calls, all at once, and one that is there twice once: compatible servers repeat ids, but for other calls.

        `report` is told of each when it ends, also of those that are cancelled.
        """
        runs: dict[Call, asyncio.Task[Outcome]] = {}
        deadline = time.monotonic() + seconds_left
        answers: list[asyncio.Task[Outcome]] = []
        async with asyncio.TaskGroup() as group:
            for call in calls:
                if call not in runs or not call.id:
                    runs[call] = group.create_task(self._run(call, deadline, report))
                answers.append(runs[call])
        return Answers(tuple(task.result() for task in answers), out_of_time=time.monotonic() >= deadline)

    async def remember(self, scope: str, memory: Memory, toolset: Toolset) -> None:
        """Keep what a client was not shown. Without it the conversation goes on, but what was hidden is lost."""
        try:
            await self.history.remember(scope, memory, toolset.encoded)
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

    async def _toolset(self, request: Request, draft: Draft, restored: Restored) -> tuple[Toolset, str | None]:
        """The tools that the conversation has been offered so far, or else those that there are; and why none, where it is
        worth a note.
        """
        if draft.objection is not None:
            return _NONE, draft.objection
        if restored.toolset is not None and (pinned := await self._pinned(restored.toolset)) is not None:
            return pinned.avoiding(draft.tool_names), None
        if restored.bound:
            return _NONE, "its thoughts are bound to the tools that it had elsewhere"
        if draft.is_aside or any(pattern.search(request.facts.model or "") for pattern in self.skip_models):
            return _NONE, None
        offered = Toolset(self.toolbox.tools())
        chosen = offered.avoiding(draft.tool_names)
        if chosen is not offered:
            logger.info("a client has tools with the names of injected ones; those got a number")
        return chosen, None

    async def _pinned(self, digest: str) -> Toolset | None:
        found = self._toolsets.get(digest)
        if found is None:
            try:
                encoded = await self.history.recall_toolset(digest)
                found = None if encoded is None else Toolset.decode(encoded)
            except Exception:
                logger.exception("a tool set could not be recalled")
            if found is not None:
                if len(self._toolsets) >= _MAX_TOOLSETS:
                    self._toolsets.clear()
                self._toolsets[digest] = found
        return found


_NONE: Final = Toolset(())
_LARGE: Final = 1024 * 1024
_MAX_KEYS: Final = 4096  # of the newest turns
_MAX_TOOLSETS: Final = 64  # that are at hand without a look into the history
_OUT_OF_TIME: Final = "The time for tools in this turn is used up, so the call was given up."


async def _work(body: bytes, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Do something with a body. A large one takes up to seconds, in which the event loop goes on."""
    if len(body) < _LARGE:
        return function(*args, **kwargs)
    return await asyncio.to_thread(function, *args, **kwargs)


def _notes(why_not: str | None, restored: Restored) -> tuple[str, ...]:
    """What the ledger should know: why there are no tools, and of a history that could not be put together again."""
    notes = [] if why_not is None else [f"no tools injected: {why_not}"]
    if restored.lost:
        notes.append(f"hidden parts of {restored.lost} responses are lost")
    if restored.unknown:
        notes.append(f"{restored.unknown} turns of the model are not known")
    return tuple(notes)
