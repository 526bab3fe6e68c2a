"""What a conversation asks of the shell. Each command says what it is answered with; the shell may throw instead
(`aibridge.conversation`).
"""

from collections.abc import Generator
from typing import Any

from msgspec import Struct

from aibridge.records import Status
from aibridge.tools import Call, Outcome, Toolset
from aibridge.wire.base import Headers, Request, ResponseFacts
from aibridge.wire.turns import Memory


class Send(Struct, frozen=True):
    """Send the request to the provider. Answered with the `ResponseHead`."""

    request: Request


class Receive(Struct, frozen=True):
    """Wait for the next bytes of the provider's response. Answered with them, or with ``b""`` at its end."""


class Respond(Struct, frozen=True):
    """Begin the response to the client.

    `keep_alive` may be written between any two relays when nothing else was for a while; where it is empty, the provider
    keeps its stream alive itself.
    """

    status: int
    headers: Headers
    keep_alive: bytes = b""


class Relay(Struct, frozen=True):
    """Pass bytes on to the client. Answered with whether it is still there: a response may be read on for the record."""

    data: bytes


class Record(Struct, frozen=True):
    """Record what one upstream response said. Does not wait: records keep their order, and `End` waits for all."""

    facts: ResponseFacts


class Answers(Struct, frozen=True):
    """What came of calls, in their order. `out_of_time`: the time that the whole request may take with tools is used up."""

    outcomes: tuple[Outcome, ...]
    out_of_time: bool = False


class CallTools(Struct, frozen=True):
    """Run calls of injected tools, all at once, and record each. Answered with `Answers`."""

    response_id: str | None
    calls: tuple[Call, ...]


class Remember(Struct, frozen=True):
    """Keep what the client was not shown, and the tools that it was offered, for the next request of its conversation."""

    memory: Memory
    toolset: Toolset


class End(Struct, frozen=True):
    """Record how the interception ended, and wait until all its records are durable."""

    status: Status
    http_status: int | None = None
    error: str | None = None


class Abort(Struct, frozen=True):
    """Break off the response to the client, so that it cannot be mistaken for a complete one."""


Command = Send | Receive | Respond | Relay | Record | CallTools | Remember | End | Abort
Conversation = Generator[Command, Any, None]
