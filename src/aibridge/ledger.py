"""Turns the facts of one interception into records: gives them ids and times, and hands them on in order.

Records go to the recorder, which makes them durable, and then to the observers, which count and trace: the same frozen
values for all, so that no two of them can disagree.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

import msgspec
import uuid_utils

from aibridge.conversation import End
from aibridge.errors import RecordingFailed
from aibridge.recording.base import Recorder
from aibridge.records import (
    Interception,
    InterceptionEnded,
    ModelThought,
    PromptUsage,
    Record,
    TokenUsage,
    ToolUsage,
)
from aibridge.wire.base import RequestFacts, ResponseFacts

logger = logging.getLogger(__name__)

WhenUnrecordable = Literal["refuse", "continue"]
"""What to do when not even the spool takes a record: serve nobody, or carry on and count what is lost."""


class RecordLost(msgspec.Struct, frozen=True):
    """A record could not be kept anywhere. `kind` is the name of its type."""

    interception_id: str
    kind: str


class PassedThrough(msgspec.Struct, frozen=True):
    """A request on a passthrough route was answered."""

    provider_name: str
    route: str
    method: str
    http_status: int


Event = Record | RecordLost | PassedThrough
Observer = Callable[[Event], None]
"""Sees everything that happens, right away and in order. What it raises is logged and goes no further."""


def new_id() -> str:
    """A UUID of version 7: sorts by time, so that rows of one day lie together (RFC 9562 section 5.7)."""
    return str(uuid_utils.uuid7())


def notify(observers: Sequence[Observer], event: Event) -> None:
    """Tell every observer."""
    for observer in observers:
        try:
            observer(event)
        except Exception:
            logger.exception("an observer failed")


@dataclass(frozen=True, slots=True)
class Ledger:
    """Where records go."""

    recorder: Recorder
    observers: Sequence[Observer] = ()
    when_unrecordable: WhenUnrecordable = "refuse"


class Entry:
    """The ledger's entry for one interception."""

    def __init__(
        self, ledger: Ledger, interception: Interception, request: RequestFacts, secrets: Sequence[str] = ()
    ) -> None:
        self._ledger = ledger
        self._interception = interception
        self._request = request
        self._secrets = secrets
        self._started = time.monotonic()
        self._first_byte: float | None = None
        self._prompt_recorded = False
        self._pending: list[tuple[Record, Awaitable[None]]] = []

    async def start(self) -> None:
        """Record the start. Raises `RecordingFailed` when that cannot be done and the policy is to refuse."""
        self._put(self._interception)
        await self._settle()

    def first_byte(self) -> None:
        """The provider's first body byte has come."""
        if self._first_byte is None:
            self._first_byte = time.monotonic()

    def record(self, facts: ResponseFacts) -> None:
        """Record what one upstream response said, and with the first what the user had asked."""
        about: dict[str, Any] = {
            "interception_id": self._interception.id,
            "created_at": datetime.now(UTC),
            "provider_response_id": facts.response_id,
        }
        if not self._prompt_recorded and self._request.prompt is not None:
            self._put(PromptUsage(id=new_id(), prompt=self._request.prompt, **about))
        self._prompt_recorded = True
        if facts.usage is not None:
            said = {"model": facts.model, "stop_reason": facts.stop_reason, "notes": facts.notes}
            metadata: dict[str, Any] = {key: value for key, value in said.items() if value}
            if facts.usage.raw is not None:
                metadata["usage"] = msgspec.Raw(facts.usage.raw)
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

    async def end(self, end: End) -> None:
        """Record how the interception ended and wait until every record of it is durable.

        Raises `RecordingFailed` when one was lost and the policy is to refuse.
        """
        waited = None if self._first_byte is None else round((self._first_byte - self._started) * 1000, 3)
        self._put(
            InterceptionEnded(
                interception_id=self._interception.id,
                ended_at=datetime.now(UTC),
                status=end.status,
                http_status=end.http_status,
                error=self._without_secrets(end.error),
                time_to_first_byte_ms=waited,
            )
        )
        await self._settle()

    def _put(self, record: Record) -> None:
        awaitable = _write(self._ledger.recorder, record)
        if awaitable is not None:
            self._pending.append((record, awaitable))
        notify(self._ledger.observers, record)

    async def _settle(self) -> None:
        """Wait for all records that were handed over.

        Cancelling the wait must not cancel the writing: futures go on by themselves, coroutines go on in a task.
        """
        pending, self._pending = self._pending, []
        if all(asyncio.isfuture(awaitable) for _, awaitable in pending):
            lost = await self._written(pending)
        else:
            lost = await asyncio.shield(asyncio.ensure_future(self._written(pending)))
        if lost and self._ledger.when_unrecordable == "refuse":
            raise RecordingFailed("The request cannot be recorded at the moment, so it is not served.")

    async def _written(self, pending: Sequence[tuple[Record, Awaitable[None]]]) -> int:
        lost = 0
        for record, awaitable in pending:
            try:
                await awaitable
            except Exception as error:  # noqa: BLE001  a recorder may raise anything; what it raises means lost
                lost += 1
                kind = type(record).__name__
                logger.error("record lost: %s of interception %s: %s", kind, self._interception.id, error)  # noqa: TRY400
                notify(self._ledger.observers, RecordLost(self._interception.id, kind))
        return lost

    def _without_secrets(self, error: str | None) -> str | None:
        """Providers quote credentials in their errors; ours must not be among them."""
        for secret in self._secrets:
            error = error and error.replace(secret, "[credential]")
        return error and error[:_MAX_ERROR]


_MAX_ERROR = 2000


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
