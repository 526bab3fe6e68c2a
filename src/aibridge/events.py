"""What happens, as frozen values that every observer sees: records, and what is no record.

Observers are peers: metrics, logs and traces are consumers of these, and know nothing of one another. An event says what has
happened in plain facts, never quotes content, and is told in the event loop, at once.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Final, Literal

import msgspec

from aibridge.breakers import BreakerState
from aibridge.errors import RefusalReason
from aibridge.records import Interception, Record

logger = logging.getLogger(__name__)

Destination = Literal["database", "spool"]
"""Where records are made durable."""


class RecordLost(msgspec.Struct, frozen=True):
    """A record could not be kept anywhere. `kind` is the name of its type; both are empty where it cannot even be read."""

    interception_id: str
    kind: str

    @classmethod
    def of(cls, record: Record | None) -> "RecordLost":
        """The loss of a record; of None where it cannot be read."""
        if record is None:
            return cls("", "")
        return cls(record.id if isinstance(record, Interception) else record.interception_id, type(record).__name__)


class RecordsWritten(msgspec.Struct, frozen=True):
    """The recorder has made records durable, with one commit or one write to the spool that took so many `seconds`."""

    records: int
    seconds: float
    to: Destination


class RecordsReplayed(msgspec.Struct, frozen=True):
    """Records that were in the spool have come into the database."""

    records: int


class PassedThrough(msgspec.Struct, frozen=True):
    """A request on a passthrough route was answered."""

    provider_name: str
    route: str
    method: str
    http_status: int


class HistoryMissed(msgspec.Struct, frozen=True):
    """What a client was not shown in earlier responses could not be put back into its request.

    `lost` responses are known to have had a hidden part, which is gone; of `unknown` turns of the model nothing is known.
    """

    interception_id: str
    lost: int
    unknown: int


class CallBegan(msgspec.Struct, frozen=True):
    """A request goes to a provider. It is followed by `CallAnswered`, and that by `CallEnded`, whatever happens.

    `hop` counts the turns of the interception, `attempt` the requests for one turn, both from 1. On passthrough routes
    `interception_id` is empty.
    """

    interception_id: str
    provider_name: str
    route: str
    model: str | None
    url: str
    hop: int
    attempt: int


GIVEN_UP: Final = "The call was given up."
"""Why a call has no answer that nobody waits for any more: its client has gone, or the gateway stops."""


class CallAnswered(msgspec.Struct, frozen=True):
    """The head of the provider's response has come after so many `seconds`; or none has, and `error` says why."""

    interception_id: str
    provider_name: str
    http_status: int | None
    error: str | None
    seconds: float


class CallEnded(msgspec.Struct, frozen=True):
    """The provider's response was read to its end, or let go of; or there was none."""

    interception_id: str
    provider_name: str


class Retried(msgspec.Struct, frozen=True):
    """A request to a provider will be tried again in `seconds`. `reason` is ``connection`` or the status, as ``503``."""

    interception_id: str
    provider_name: str
    reason: str
    seconds: float


class BreakerChanged(msgspec.Struct, frozen=True):
    """The circuit breaker of one provider, route and model is in another state."""

    provider_name: str
    route: str
    model: str | None
    state: BreakerState


class BreakerRejected(msgspec.Struct, frozen=True):
    """An open circuit breaker has kept a request from its provider."""

    provider_name: str
    route: str
    model: str | None


class Refused(msgspec.Struct, frozen=True):
    """A request was not let in, so no provider has got it whole. Those that a circuit breaker keeps are not among them.

    `provider_name` and `initiator_id` are empty where the request is for no provider, and where nobody is known to be behind
    it. `peer` is the address that it came from, empty where it has none. `detail` says in our words what was wrong.
    """

    provider_name: str
    initiator_id: str
    reason: RefusalReason
    peer: str = ""
    detail: str = ""


class Committed(msgspec.Struct, frozen=True):
    """All records of an interception are durable, and its end was held back so many `seconds` for that. The next event is
    that it has ended.
    """

    interception_id: str
    seconds: float


Event = (
    Record
    | RecordLost
    | RecordsWritten
    | RecordsReplayed
    | PassedThrough
    | HistoryMissed
    | CallBegan
    | CallAnswered
    | CallEnded
    | Retried
    | BreakerChanged
    | BreakerRejected
    | Refused
    | Committed
)
Observer = Callable[[Event], None]
"""Sees everything that happens, in order: start and end of an interception when they are durable, or it is known that they
will not be, anything else right away.

What it raises is logged and goes no further."""


def notify(observers: Sequence[Observer], event: Event) -> None:
    """Tell every observer."""
    for observer in observers:
        try:
            observer(event)
        except Exception:
            logger.exception("an observer failed")
