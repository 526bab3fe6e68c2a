"""What a conversation asks of the shell. Each command says what it is answered with; the shell may throw instead
(`aibridge.conversation`).
"""

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

from aibridge.records import Status
from aibridge.tools import Call, Outcome, Toolset
from aibridge.wire.base import Headers, Request, ResponseFacts
from aibridge.wire.turns import Memory


@dataclass(frozen=True, slots=True)
class Send:
    """Send the request to the provider. Answered with the `ResponseHead`."""

    request: Request


@dataclass(frozen=True, slots=True)
class Receive:
    """Wait for the next bytes of the provider's response. Answered with them, or with ``b""`` at its end."""


@dataclass(frozen=True, slots=True)
class Respond:
    """Begin the response to the client.

    `keep_alive` may be written between any two relays when nothing else was for a while; where it is empty, the provider
    keeps its stream alive itself.
    """

    status: int
    headers: Headers
    keep_alive: bytes = b""


@dataclass(frozen=True, slots=True)
class Relay:
    """Pass bytes on to the client. Answered with whether it is still there: a response may be read on for the record."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Record:
    """Record what one upstream response said. Does not wait: records keep their order, and `End` waits for all."""

    facts: ResponseFacts


@dataclass(frozen=True, slots=True)
class Answers:
    """What came of calls, in their order. `out_of_time`: the time that the whole request may take with tools is used up."""

    outcomes: tuple[Outcome, ...]
    out_of_time: bool = False


@dataclass(frozen=True, slots=True)
class CallTools:
    """Run calls of injected tools, all at once, and record each. Answered with `Answers`."""

    response_id: str | None
    calls: tuple[Call, ...]


@dataclass(frozen=True, slots=True)
class Remember:
    """Keep what the client was not shown, and the tools that it was offered, for the next request of its conversation."""

    memory: Memory
    toolset: Toolset


@dataclass(frozen=True, slots=True)
class End:
    """Record how the interception ended, and wait until all its records are durable."""

    status: Status
    http_status: int | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Abort:
    """Break off the response to the client, so that it cannot be mistaken for a complete one."""


Command = Send | Receive | Respond | Relay | Record | CallTools | Remember | End | Abort
Conversation = Generator[Command, Any, None]
