"""Turns the facts of one interception into records: gives them ids and times, and hands them on in order.

Records go to the recorder, which makes them durable, and to the observers, which count and trace: the same frozen values for
all, so that no two of them can disagree. Of the end observers are told when it is durable, since that is when it is true: an
interception whose records are lost, and whose client gets an error in place of the end, has failed.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import partial
from typing import Any, Final, Literal

import msgspec
import uuid_utils

from aibridge.commands import End
from aibridge.errors import RecordingFailed, retry_after_field
from aibridge.events import Committed, HistoryMissed, Observer, RecordLost, notify
from aibridge.masking import hidden
from aibridge.recording.base import Recorder, RecordsLost
from aibridge.records import (
    Interception,
    InterceptionEnded,
    ModelThought,
    PromptUsage,
    Record,
    TokenUsage,
    ToolUsage,
)
from aibridge.tools import Call, Outcome
from aibridge.wire.base import RequestFacts, ResponseFacts, Usage

logger = logging.getLogger(__name__)

WhenUnrecordable = Literal["refuse", "continue"]
"""What to do when not even the spool takes a record: serve nobody, or carry on and count what is lost."""


def new_id() -> str:
    """A UUID of version 7: sorts by time, so that rows of one day lie together (RFC 9562 section 5.7)."""
    return str(uuid_utils.uuid7())


@dataclass(frozen=True, slots=True)
class Ledger:
    """Where records go."""

    recorder: Recorder
    observers: Sequence[Observer] = ()
    when_unrecordable: WhenUnrecordable = "refuse"
    together: Callable[[Sequence[Record]], Awaitable[None]] | None = field(init=False, repr=False, compare=False)
    """The recorder's ``record_together``, where that speaks for its other methods."""
    _tasks: set[asyncio.Task[None]] = field(default_factory=set, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Have the recorder tell the observers what it does."""
        object.__setattr__(self, "together", _together(self.recorder))
        report_to = getattr(self.recorder, "report_to", None)
        if report_to is not None:
            report_to(partial(notify, self.observers))

    @property
    def refuses(self) -> bool:
        """Whether nothing may begin, because no record of it would be kept."""
        return self.when_unrecordable == "refuse" and getattr(self.recorder, "failing", False)

    def carry_out(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Do something to its end, whatever becomes of who asked for it."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def settled(self, seconds: float) -> None:
        """Wait for what is being carried out, such as records for which nobody waits, so many seconds at most."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=seconds)


def _together(recorder: Recorder) -> Callable[[Sequence[Record]], Awaitable[None]] | None:
    """Not where a subclass has methods of its own for single records, or a wrapper passes this one on: they would be gone
    round, and may be there to keep something out of the ledger.
    """
    own = [vars(kind) for kind in type(recorder).__mro__]
    depth = next((depth for depth, names in enumerate(own) if "record_together" in names), 0)
    if "record_together" not in own[depth] or any(name.startswith("record_") for names in own[:depth] for name in names):
        return None
    together: Callable[[Sequence[Record]], Awaitable[None]] | None = getattr(recorder, "record_together", None)
    return together


class Entry:
    """The ledger's entry for one interception.

    `secrets` answers with the credentials of the request; it is asked where there is an error, which may quote them.
    `arrived` is called right before observers are told of the start.
    """

    def __init__(
        self,
        ledger: Ledger,
        interception: Interception,
        request: RequestFacts,
        secrets: Callable[[], Sequence[str]] = tuple,
        arrived: Callable[[], None] | None = None,
    ) -> None:
        self.interception = interception
        self._attempts = 0
        self._ledger = ledger
        self._arrived = arrived
        self._request = request
        self._secrets = secrets
        self._started = time.monotonic()
        self._first_byte: float | None = None
        self._answered = False  # an upstream response was recorded
        self._unwritten: list[Record] = []
        self._pending: list[asyncio.Future[None]] = []
        self._lost = False
        self._ended = False

    async def start(self) -> None:
        """Record the start. Raises `RecordingFailed` when that cannot be done and the policy is to refuse."""
        if self._ledger.refuses:  # the start alone may find room, and the provider would be asked for nothing
            raise _unrecordable(_NOT_SERVED)
        self._unwritten.append(self.interception)
        self._hand_over()
        try:
            await self._settle(_NOT_SERVED)
        except asyncio.CancelledError:
            _ = self._ledger.carry_out(self._give_up())
            raise
        self._tell_start()

    async def _give_up(self) -> None:
        """Nobody waits for the start any more, but it will be recorded: then it must have an end."""
        with suppress(RecordingFailed):
            await self._settle(_NOT_SERVED)
            self._tell_start()
            await self.end(End("interrupted"))

    def _tell_start(self) -> None:
        if self._arrived is not None:
            try:
                self._arrived()
            except Exception:
                logger.exception("an observer failed")
        notify(self._ledger.observers, self.interception)

    def sent(self, attempts: int) -> None:
        """How often the request of the turn under way was sent."""
        self._attempts = attempts

    def first_byte(self) -> None:
        """The provider's first body byte has come."""
        if self._first_byte is None:
            self._first_byte = time.monotonic()

    def record(self, facts: ResponseFacts) -> None:
        """Record what one upstream response said, and with the first what the user had asked."""
        about: dict[str, Any] = {
            "interception_id": self.interception.id,
            "created_at": self._now(),
            "provider_response_id": facts.response_id,
        }
        if not self._answered and self._request.prompt is not None:
            self._put(PromptUsage(id=new_id(), prompt=self._request.prompt, **about))
        self._answered = True
        if facts.usage is not None:
            metadata: dict[str, Any] = {}
            if facts.model:
                metadata["model"] = facts.model
            if facts.stop_reason:
                metadata["stop_reason"] = facts.stop_reason
            if facts.notes or self._attempts > 1:
                metadata["notes"] = (*facts.notes, *self._tries())
            if facts.usage.raw is not None:
                metadata["usage"] = msgspec.Raw(_unicode(facts.usage.raw))
            self._put(
                TokenUsage(
                    id=new_id(),
                    completeness=facts.completeness,
                    input_tokens=facts.usage.input_tokens,
                    output_tokens=facts.usage.output_tokens,
                    cache_read_input_tokens=facts.usage.cache_read_input_tokens,
                    cache_write_input_tokens=facts.usage.cache_write_input_tokens,
                    metadata=metadata,
                    **about,
                )
            )
        for call in facts.tool_calls:
            self._put(
                ToolUsage(
                    id=new_id(),
                    tool=call.name,
                    input=call.input,
                    tool_call_id=call.id,
                    metadata=call.details,
                    **about,
                )
            )
        del about["provider_response_id"]
        for thought in facts.thoughts:
            metadata = {"source": thought.source, **thought.details}
            if facts.response_id is not None:
                metadata["provider_response_id"] = facts.response_id
            self._put(ModelThought(id=new_id(), content=thought.content, metadata=metadata, **about))

    def record_invocation(self, response_id: str | None, call: Call, outcome: Outcome, duration_ms: float) -> None:
        """Record a call of an injected tool, and what came of it."""
        self._put(
            ToolUsage(
                id=new_id(),
                interception_id=self.interception.id,
                created_at=self._now(),
                provider_response_id=response_id,
                tool=call.tool.tool,
                input=call.arguments,
                tool_call_id=call.id,
                server_url=call.tool.server_url,
                injected=True,
                invocation_error=None if outcome.error is None else self._without_secrets(outcome.error),
                metadata={"server": call.tool.server, "duration_ms": duration_ms},
            )
        )

    def history_missed(self, lost: int, unknown: int) -> None:
        """Tell that something could not be put back into the request."""
        notify(self._ledger.observers, HistoryMissed(self.interception.id, lost, unknown))

    async def end(self, end: End, *, begun: bool = False) -> None:
        """Record how the interception ended and wait until every record of it is durable.

        `begun`: the client has the head of its response. Raises `RecordingFailed` when one was lost and the policy is to
        refuse.
        """
        ended = self._put_end(end)
        self._hand_over()
        started = time.monotonic()
        try:
            await self._settle(_NOT_ENDED)
            if not self._lost:
                notify(self._ledger.observers, Committed(self.interception.id, time.monotonic() - started))
        except RecordingFailed as error:
            if end.status != "client_disconnected":  # else it gets this error in place of the end
                status = end.http_status if begun else error.status
                ended = msgspec.structs.replace(ended, status="failed", http_status=status, error=error.message)
            raise
        finally:
            notify(self._ledger.observers, ended)

    def abandon(self) -> None:
        """Whoever was to end the interception has failed: it must not stay open. Does not wait, and not end it twice."""
        if not self._ended:
            if not self._answered:
                self.record(ResponseFacts(usage=Usage(), completeness="partial"))
            notify(self._ledger.observers, self._put_end(End("failed", error="the gateway failed")))

    def _now(self) -> datetime:
        """The time, by a clock that has not been set since the start: nothing ends before it began."""
        return self.interception.started_at + timedelta(seconds=time.monotonic() - self._started)

    def _put_end(self, end: End) -> InterceptionEnded:
        self._ended = True
        waited = None if self._first_byte is None else round((self._first_byte - self._started) * 1000, 3)
        ended = InterceptionEnded(
            interception_id=self.interception.id,
            ended_at=self._now(),
            status=end.status,
            http_status=end.http_status,
            error=None if end.error is None else " ".join((self._without_secrets(end.error), *self._tries())),
            time_to_first_byte_ms=waited,
        )
        self._queue(ended)
        return ended

    def _tries(self) -> tuple[str, ...]:
        """That the request had to be sent more than once."""
        return (f"({self._attempts} attempts)",) if self._attempts > 1 else ()

    def _put(self, record: Record) -> None:
        self._queue(record)
        notify(self._ledger.observers, record)

    def _queue(self, record: Record) -> None:
        if not self._unwritten:  # what comes with it, and mostly that is all there is, is handed over with it
            asyncio.get_running_loop().call_soon(self._hand_over)
        self._unwritten.append(record)

    def _hand_over(self) -> None:
        """Give records to the recorder. Their writing goes on by itself, and a loss is counted, whoever waits for it."""
        if self._unwritten:
            records, self._unwritten = self._unwritten, []
            if self._ledger.together is not None:
                self._await(records, partial(self._ledger.together, records))
                return
            for record in records:
                self._await((record,), partial(_write, self._ledger.recorder, record))

    def _await(self, records: Sequence[Record], write: Callable[[], Awaitable[None] | None]) -> None:
        try:
            awaitable = write()
        except Exception as error:  # noqa: BLE001  a recorder may raise anything; what it raises means lost
            self._lose(records, error)
            return
        if awaitable is None:
            return
        if not isinstance(awaitable, asyncio.Future):
            before = self._pending[-1] if self._pending else None
            awaitable = self._ledger.carry_out(_after(before, awaitable))
        awaitable.add_done_callback(partial(self._written, records))
        self._pending.append(awaitable)

    async def _settle(self, refusal: str) -> None:
        """Wait for all records that were handed over. Cancelling the wait does not cancel the writing.

        Raises `RecordingFailed`, which says the `refusal`, when one was lost and the policy is to refuse.
        """
        for future in self._pending:
            await _finished(future)
            self._lost = self._lost or future.cancelled() or future.exception() is not None
        self._pending.clear()
        if self._lost and self._ledger.when_unrecordable == "refuse":
            raise _unrecordable(refusal)

    def _written(self, records: Sequence[Record], future: asyncio.Future[None]) -> None:
        error = asyncio.CancelledError() if future.cancelled() else future.exception()
        if error is not None:
            self._lose(records, error)

    def _lose(self, records: Sequence[Record], error: BaseException) -> None:
        reasons = error.lost if isinstance(error, RecordsLost) else dict.fromkeys(range(len(records)), error)
        for index, reason in reasons.items():
            # A foreign error may quote what it could not store.
            said = str(reason) if isinstance(reason, str | RecordingFailed) else type(reason).__name__
            name = type(records[index]).__name__
            logger.error("record lost: %s of interception %s: %s", name, self.interception.id, said)
            self._lost = True
            notify(self._ledger.observers, RecordLost.of(records[index]))

    def _without_secrets(self, error: str) -> str:
        """Providers quote credentials in their errors; ours must not be among them."""
        return hidden(error, self._secrets(), "[credential]")[:_MAX_ERROR]


_MAX_ERROR: Final = 2000
_NOT_SERVED: Final = "The request cannot be recorded at the moment, so it is not served."
_NOT_ENDED: Final = "The response cannot be recorded at the moment, so it is not brought to its end."
_SOON_SECONDS: Final = 5.0  # whether the database can be written is tried each second; a disk that is full needs somebody


def _unrecordable(refusal: str) -> RecordingFailed:
    return RecordingFailed(refusal, [retry_after_field(_SOON_SECONDS)])


def _unicode(text: bytes) -> bytes:
    """A provider's JSON as text that a database takes. It is read without a look at what its strings hold."""
    return text.decode(errors="replace").encode()


async def _finished(future: asyncio.Future[None]) -> None:
    """Wait for somebody else's future, whose end is not ours to cause: `asyncio.wait` for one, at a tenth of its cost."""
    if not future.done():
        over = asyncio.get_running_loop().create_future()

        def tell(_: asyncio.Future[None]) -> None:
            if not over.done():
                over.set_result(None)

        future.add_done_callback(tell)
        await over


async def _after(before: asyncio.Future[None] | None, awaitable: Awaitable[None]) -> None:
    if before is not None:
        await _finished(before)
    await awaitable


def _write(recorder: Recorder, record: Record) -> Awaitable[None] | None:
    match record:
        case Interception():
            return recorder.record_interception(record)
        case InterceptionEnded():
            return recorder.record_interception_ended(record)
        case TokenUsage():
            return recorder.record_token_usage(record)
        case PromptUsage():
            return recorder.record_prompt_usage(record)
        case ToolUsage():
            return recorder.record_tool_usage(record)
        case ModelThought():
            record_thought = getattr(recorder, "record_model_thought", None)
            return None if record_thought is None else record_thought(record)
