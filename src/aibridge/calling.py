"""Calling a provider: all that stands between a request that is ready and the port that sends it (`aibridge.upstream`).

`Caller.call` reads from top to bottom: the breaker is asked, observers are told, the request is sent, and sent again where
the rules say so. Whatever happens, each `CallBegan` is followed by one `CallAnswered` and one `CallEnded`.
"""

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, Protocol

import msgspec
from msgspec import structs

from aibridge.breakers import BreakerKey, Breakers, Permit
from aibridge.errors import BreakerOpen, BridgeError, Unreachable, Unsendable, UpstreamError
from aibridge.events import GIVEN_UP, BreakerRejected, CallAnswered, CallBegan, CallEnded, Event, Observer, Retried, notify
from aibridge.ledger import new_id
from aibridge.providers import Provider
from aibridge.retries import retry_after
from aibridge.upstream import Upstream, UpstreamRequest, UpstreamResponse
from aibridge.wire.base import Headers
from aibridge.wire.observer import ResponseHead

logger = logging.getLogger(__name__)

_MAX_REST: Final = 64 * 1024


class Tracer(Protocol):
    """An observer that also carries trace context through: from the client's header fields to the provider's.

    On passthrough routes it is not asked: the client's own fields go through.
    """

    def __call__(self, event: Event) -> None:
        """See an event."""

    def arrived(self, interception_id: str, headers: Headers) -> None:
        """The client's header fields. The interception's start is told next, and its end some day."""

    def outgoing(self, interception_id: str, headers: Headers) -> Headers:
        """The header fields for the call whose `CallBegan` was told just now."""


class Dumps(Protocol):
    """Keeps what goes to providers and comes from them, as it is on the wire."""

    def upstream(self, provider: Provider, upstream: Upstream) -> Upstream:
        """What calls a provider: `upstream` itself, or something around it that keeps what it sees."""


class Purpose(msgspec.Struct, frozen=True):
    """What a provider is called for. `hop` counts the turns of an interception. On passthrough routes there is none, its id
    is empty, and there is no model.
    """

    route: str
    interception_id: str = ""
    model: str | None = None
    hop: int = 1


class ProviderCall:
    """A response of a provider under way, whose end is told once."""

    __slots__ = ("_caller", "_interception_id", "_is_over", "response")

    def __init__(self, caller: "Caller", response: UpstreamResponse, interception_id: str) -> None:
        self.response = response
        self._caller = caller
        self._interception_id = interception_id
        self._is_over = False

    def over(self) -> None:
        """Nothing of interest comes any more."""
        if not self._is_over:
            self._is_over = True
            notify(self._caller.observers, CallEnded(self._interception_id, self._caller.provider.name))

    def close(self) -> None:
        """Let go of the response."""
        self.response.close()
        self.over()


@dataclass(frozen=True, slots=True)
class Caller:
    """Calls one provider. `is_dumped`: its requests get ids to be kept under."""

    provider: Provider
    upstream: Upstream
    observers: Sequence[Observer]
    breakers: Breakers
    tracer: Tracer | None = None
    is_dumped: bool = False

    async def call(
        self,
        request: UpstreamRequest,
        purpose: Purpose,
        back_off: Callable[[float], Awaitable[None]] = asyncio.sleep,
        sent: Callable[[int], object] = lambda _: None,
    ) -> ProviderCall:
        """Send a request and wait for the response's head, again where the provider's rules for retries say so.

        `back_off` waits, in seconds, before each further attempt; it may raise instead. `sent` is told of each attempt; they
        count from 1. Raises `UpstreamError` and what `back_off` does. Safe to cancel.
        """
        attempt = 1
        failure: Unreachable | None = None
        while True:
            refused: ProviderCall | None = None
            try:
                permit = self._admitted(purpose)
                sent(attempt)
                call = await self._attempt(request, purpose, attempt, permit)
            except BreakerOpen:  # meanwhile; what there is to say of the provider is better
                if failure is None:
                    raise
                raise failure from None
            except Unreachable as error:
                failure = error
                seconds = self._delay(request, purpose, attempt)
                if seconds is None:
                    raise
                reason = "connection"
            else:
                head = call.response.head
                if head.status not in self.provider.retries.statuses:
                    return call
                seconds = self._delay(request, purpose, attempt, _retry_after(head))
                if seconds is None:
                    return call
                failure, refused, reason = None, call, str(head.status)
                call.over()
            notify(self.observers, Retried(purpose.interception_id, self.provider.name, reason, seconds))
            await (back_off(seconds) if refused is None else _meanwhile_read_out(refused, back_off(seconds)))
            attempt += 1

    async def _attempt(
        self, request: UpstreamRequest, purpose: Purpose, attempt: int, permit: Permit | None
    ) -> ProviderCall:
        identity, name = purpose.interception_id, self.provider.name
        url = request.url.partition("?")[0]  # a query may hold a key
        notify(self.observers, CallBegan(identity, name, purpose.route, purpose.model, url, purpose.hop, attempt))
        request = self._marked(request, purpose, attempt)
        started = time.monotonic()
        try:
            response = await self.upstream.send(request)
        except BaseException as error:
            said = error.message if isinstance(error, BridgeError) else GIVEN_UP
            now = time.monotonic()
            notify(self.observers, CallAnswered(identity, name, None, said, now - started))
            notify(self.observers, CallEnded(identity, name))
            if permit is not None:
                _judge(permit, error, now)
            raise
        now = time.monotonic()
        head = response.head
        notify(self.observers, CallAnswered(identity, name, head.status, None, now - started))
        if permit is not None:
            permit.answered(head.status, now, _retry_after(head))
        return ProviderCall(self, response, identity)

    def _admitted(self, purpose: Purpose) -> Permit | None:
        """The breaker's leave, where there is a breaker. Raises `BreakerOpen`."""
        rules = self.provider.breaker
        if rules is None:
            return None
        key = self._key(purpose)
        try:
            return self.breakers.admit(key, rules, time.monotonic())
        except BreakerOpen:
            notify(self.observers, BreakerRejected(*key))
            raise

    def _marked(self, request: UpstreamRequest, purpose: Purpose, attempt: int) -> UpstreamRequest:
        """The request with what traces and dumps know it by."""
        if self.is_dumped:
            identity = f"{purpose.interception_id}-{purpose.hop}-{attempt}" if purpose.interception_id else new_id()
            request = structs.replace(request, call_id=identity)
        if self.tracer is not None and purpose.interception_id:
            try:
                headers = self.tracer.outgoing(purpose.interception_id, request.headers)
            except Exception:
                logger.exception("the tracer failed")
            else:
                request = structs.replace(request, headers=headers)
        return request

    def _delay(self, request: UpstreamRequest, purpose: Purpose, attempt: int, asked: float | None = None) -> float | None:
        """In how many seconds the request is sent again; None where it is not. What was streamed has gone by."""
        if not isinstance(request.body, bytes):
            return None
        seconds = self.provider.retries.delay(attempt, random.random(), asked)  # noqa: S311  no secret depends on it
        if seconds is not None and self.provider.breaker is not None and not self.breakers.is_closed(self._key(purpose)):
            return None  # what there is to say of the provider is better than what the breaker would
        return seconds

    def _key(self, purpose: Purpose) -> BreakerKey:
        return BreakerKey(self.provider.name, purpose.route, purpose.model)


async def read_out(response: UpstreamResponse) -> None:
    """Read what is left of a response that nobody wants any more, if it is short: then its connection can be used again, and
    a dump of it is whole.
    """
    left = _MAX_REST
    with suppress(UpstreamError):
        while left > 0 and (piece := await response.read()):
            left -= len(piece)


async def _meanwhile_read_out(call: ProviderCall, waiting: Awaitable[None]) -> None:
    """Read a refusal, which is mostly there already, while something else is waited for, and not for longer."""
    reading = asyncio.ensure_future(read_out(call.response))
    try:
        await waiting
    finally:
        reading.cancel()
        call.close()


def _judge(permit: Permit, error: BaseException, now: float) -> None:
    if isinstance(error, UpstreamError) and not isinstance(error, Unsendable):
        permit.failed(now)
    else:
        permit.release()


def _retry_after(head: ResponseHead) -> float | None:
    field = head.header(b"retry-after")
    return retry_after(field, time.time()) if field else None
