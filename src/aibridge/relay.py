"""The life of an intercepted request: read it, record its start, carry out what the conversation asks for.

The order in `Interceptor.handle` is the guarantee: nothing goes upstream before the start is recorded, and the client
sees the end of a response only after its records are durable (`aibridge.conversation`).
"""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any, Final

from msgspec import structs

from aibridge.asgi import ClientConnection, Direct
from aibridge.calling import Caller, ProviderCall, Purpose, read_out
from aibridge.clients import identify
from aibridge.commands import (
    Abort,
    Answers,
    CallTools,
    Command,
    Conversation,
    End,
    Receive,
    Record,
    Relay,
    Remember,
    Respond,
    Send,
)
from aibridge.conversation import converse
from aibridge.errors import BridgeError, ClientDisconnected, Interrupted
from aibridge.headers import UpstreamHeaders, to_client, to_upstream, without
from aibridge.identity import Actor
from aibridge.injection import Injection, Prepared
from aibridge.interruptible import Interruptible, Stopping
from aibridge.keepalive import KeepAlive
from aibridge.ledger import Entry, Ledger, new_id
from aibridge.masking import secrets_of
from aibridge.providers import Provider, Route
from aibridge.records import Interception
from aibridge.tools import Call
from aibridge.upstream import UpstreamRequest, UpstreamResponse
from aibridge.wire import Request, WireFormat
from aibridge.wire.base import RequestFacts, ResponseFacts
from aibridge.wire.observer import ResponseHead

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Interceptor:
    """Handles the requests of one intercepted route of one provider."""

    route: Route
    format: WireFormat
    caller: Caller
    ledger: Ledger
    max_body_bytes: int
    injection: Injection | None = None

    @property
    def provider(self) -> Provider:
        """Who is called."""
        return self.caller.provider

    async def handle(self, client: ClientConnection, actor: Actor, *, stopping: Stopping) -> None:
        """Serve one request. Raises `BridgeError` where it is refused before anything was sent."""
        exchange, conversation = await self._begin(client, actor)
        await exchange.run(conversation, stopping)

    async def _begin(self, client: ClientConnection, actor: Actor) -> "tuple[_Exchange, Conversation]":
        """Read a request and record its start. What is read is let go of when the provider has it."""
        body = await client.body(self.max_body_bytes)
        sent = self.format.parse(body, client.header(b"content-encoding"))
        prepared, scope = Prepared(sent), ""
        if self.injection is not None:
            scope = scope_of(actor, self.provider, self.format)
            prepared = await self.injection.prepare(sent, scope)
        request = prepared.request
        if self.provider.ask_for_usage:
            request = self.format.asking_for_usage(request)
        headers = to_upstream(client.headers, self.provider.kind, self.provider.api_key)
        interception = self._interception(client, actor, request.facts, headers, prepared.notes)
        tracer = self.caller.tracer
        arrived = None if tracer is None else partial(tracer.arrived, interception.id, client.headers)
        secrets = partial(secrets_of, client.query, headers.fields, (*headers.secrets, *request.facts.secrets))
        entry = Entry(self.ledger, interception, request.facts, secrets, arrived)
        await entry.start()
        if prepared.lost or prepared.unknown:
            entry.history_missed(prepared.lost, prepared.unknown)
        fields = headers.fields if request.coding == sent.coding else without(headers.fields, b"content-encoding")
        exchange = _Exchange(self, client, entry, structs.replace(headers, fields=fields), scope)
        return exchange, converse(request, prepared.loop)

    def upstream_request(self, client: ClientConnection, headers: UpstreamHeaders, request: Request) -> UpstreamRequest:
        """What goes to the provider for a request of the conversation."""
        fields = headers.fields
        if request.edits_response:  # so it has to be readable
            fields = [*without(fields, b"accept-encoding"), (b"accept-encoding", b"identity")]
        url = self.provider.url(self.route.pattern, client.query)
        return UpstreamRequest(client.method, url, fields, request.body, self.provider.ca_file, headers.secrets)

    def _interception(
        self,
        client: ClientConnection,
        actor: Actor,
        facts: RequestFacts,
        headers: UpstreamHeaders,
        notes: tuple[str, ...],
    ) -> Interception:
        sender = identify(client.headers)
        metadata: dict[str, Any] = {**actor.metadata, **sender.agents}
        if facts.notes or notes:
            metadata["notes"] = (*facts.notes, *notes)
        return Interception(
            id=new_id(),
            initiator_id=actor.id,
            provider=self.provider.kind,
            provider_name=self.provider.name,
            model=facts.model,
            started_at=datetime.now(UTC),
            route=self.route.pattern,
            streaming=facts.stream,
            client=sender.name,
            client_session_id=sender.session_id or facts.session_id,
            user_agent=sender.user_agent,
            correlating_tool_call_id=facts.correlating_tool_call_id,
            credential_kind=headers.credential_kind,
            credential_hint=headers.credential_hint,
            metadata=metadata,
        )


class _Exchange:
    """Carries out the commands of one conversation."""

    def __init__(
        self, interceptor: Interceptor, client: ClientConnection, entry: Entry, headers: UpstreamHeaders, scope: str
    ) -> None:
        self._interceptor = interceptor
        self._client = client
        self._entry = entry
        self._headers = headers
        self._scope = scope
        self._started = time.monotonic()
        self._call: ProviderCall | None = None
        self._hop = 0
        self._write = client.relay
        self._keep_alive: KeepAlive | None = None
        self._waits = Interruptible()
        self._listening = True
        self._reading = True  # from the provider: not calling tools, nor waiting to ask it again
        self._aborted = False
        self._heard = False  # from the provider
        self._patience: asyncio.TimerHandle | None = None  # with a provider that nobody listens to

    async def run(self, conversation: Conversation, stopping: Stopping) -> None:
        """Step through the conversation to its end, whatever happens on the way."""
        stopping.add(self._waits)
        forget = self._client.when_gone(self._client_has_gone)
        command = _step(conversation.send, None)
        try:
            while command is not None:
                try:
                    if type(command) is Receive and self._client.direct is not None and self._keep_alive is None:
                        command = await self._flow(conversation, self._client.direct)
                        continue
                    result = await self._carry_out(command)
                except (BridgeError, ClientDisconnected, Interrupted) as event:
                    command = _step(conversation.throw, event)
                else:
                    command = _step(conversation.send, result)
            if self._client.started and not self._aborted:
                with suppress(ClientDisconnected):
                    await self._client.finish()
        except BaseException:
            self._entry.abandon()
            raise
        finally:
            forget()
            if self._patience is not None:
                self._patience.cancel()
            self._keep_alive_with(b"")
            if self._call is not None:
                self._call.close()
            stopping.remove(self._waits)

    async def _flow(self, conversation: Conversation, client: Direct) -> Command | None:
        """Carry out a `Receive`, and every `Relay` and `Receive` that follows. Answers with the next other command.

        The conversation is stepped as bytes come, in the callback that brings them. To wake this task for each event of a
        stream would cost half as much as all the rest (docs/performance.md).
        """
        assert self._call is not None  # noqa: S101  Send comes before Receive
        command: Command | None = _RECEIVE
        step = conversation.send

        def take(chunk: bytes) -> bool:
            nonlocal command
            if not self._heard:
                self._heard = True
                self._entry.first_byte()
            behind = False
            try:
                command = step(chunk)
                while type(command) is Relay:
                    if command.data and self._listening:
                        behind = client.write(command.data)
                    command = step(self._listening)
            except StopIteration:
                command = None
            return behind or type(command) is not Receive

        try:
            if await self._wait(self._call.response.flow(take)):
                return _step(conversation.send, b"")
            if type(command) is Receive:
                await self._wait(client.caught_up())
        except (ClientDisconnected, Interrupted) as event:
            if type(command) is Receive:
                raise
            self._waits.postpone(event)  # the conversation has got further by then
        return command

    async def _carry_out(self, command: Command) -> Any:  # noqa: PLR0911  a case for each command
        match command:
            case Receive():
                assert self._call is not None  # noqa: S101  Send comes before Receive
                chunk = await self._wait(self._call.response.read())
                if chunk and not self._heard:
                    self._heard = True
                    self._entry.first_byte()
                return chunk
            case Relay(data):
                if data and self._listening:
                    await self._relay(data)
                return self._listening
            case Send(request):
                return await self._send(request)
            case Respond(status, headers):
                self._keep_alive_with(command.keep_alive)
                return await self._wait(self._client.respond(status, to_client(headers)))
            case Record(facts):
                return self._record(facts)
            case CallTools(response_id, calls):
                return await self._wait(self._call_tools(response_id, calls))
            case Remember(memory, toolset):
                keeping = self._interceptor.ledger.carry_out(self._tools.remember(self._scope, memory, toolset))
                return await self._wait(asyncio.shield(keeping))
            case End():
                await self._entry.end(command, begun=self._client.started)
                self._keep_alive_with(b"")
                return None
            case Abort():
                logger.warning("a response of provider %s was broken off", self._interceptor.provider.name)
                self._aborted = True
                return None

    async def _relay(self, data: bytes) -> None:
        """Write to the client. Where that need not wait, nothing that is to end the next wait keeps the bytes back."""
        direct = self._client.direct
        if direct is None or self._keep_alive is not None:
            await self._wait(self._write(data))
        elif direct.write(data):
            await self._wait(direct.caught_up())

    def _record(self, facts: ResponseFacts) -> None:
        self._entry.record(facts)
        if self._call is not None:
            self._call.over()

    @property
    def _tools(self) -> Injection:
        assert self._interceptor.injection is not None  # noqa: S101  without it nothing was injected
        return self._interceptor.injection

    def _keep_alive_with(self, data: bytes) -> None:
        """Keep the client's stream alive with that, or no more."""
        if self._keep_alive is not None:
            self._keep_alive.stop()
            self._keep_alive, self._write = None, self._client.relay
        if data:
            self._keep_alive = KeepAlive(self._client.relay, data, self._tools.keep_alive_seconds)
            self._write = self._keep_alive.write

    async def _send(self, request: Request) -> ResponseHead:
        if self._call is not None:  # all was said in it; read to its end, its connection can be used again
            _ = self._interceptor.ledger.carry_out(_read_out(self._call.response))
            self._call = None
        self._hop += 1
        self._entry.sent(0)
        interception = self._entry.interception
        purpose = Purpose(interception.route, interception.id, interception.model, self._hop)
        sent = self._interceptor.upstream_request(self._client, self._headers, request)
        try:
            self._call = await self._wait(self._interceptor.caller.call(sent, purpose, self._back_off, self._entry.sent))
        except (ClientDisconnected, Interrupted) as event:
            event.refused = not self._reading  # then it was waiting to ask again
            raise
        return self._call.response.head

    async def _back_off(self, seconds: float) -> None:
        """Wait before the request is sent again. There is nothing to read on for: nothing was accepted."""
        self._reading = False
        if not self._listening:
            raise ClientDisconnected
        await asyncio.sleep(seconds)
        self._reading = True

    async def _call_tools(self, response_id: str | None, calls: Sequence[Call]) -> Answers:
        if not self._listening:  # a response may be read on for the record, but nothing new is begun
            raise ClientDisconnected
        self._reading = False
        answers = await self._tools.call(
            calls,
            seconds_left=self._started + self._tools.max_seconds - time.monotonic(),
            report=partial(self._entry.record_invocation, response_id),
        )
        self._reading = True
        return answers

    async def _wait(self, awaitable: Any) -> Any:
        try:
            return await self._waits.wait(awaitable)
        except asyncio.CancelledError:
            # The server has run out of patience. The task ends, as it was told to, but not before it has recorded what is
            # known and has told the client.
            raise Interrupted from None

    def _client_has_gone(self) -> None:
        """Stop the provider at once, or let it finish for the record."""
        self._listening = False
        provider = self._interceptor.provider
        if provider.on_disconnect == "drain" and self._reading:
            loop = asyncio.get_running_loop()
            self._patience = loop.call_later(provider.drain_seconds, self._waits.interrupt, ClientDisconnected())
        else:
            self._waits.interrupt(ClientDisconnected())


def _step(step: Callable[[Any], Command], result: Any) -> Command | None:
    """The conversation's next command; None at its end."""
    try:
        return step(result)
    except StopIteration:
        return None


def scope_of(actor: Actor, provider: Provider, wire_format: WireFormat) -> str:
    """Within what a conversation's hidden part is looked for: nobody else's, nobody else's provider's."""
    return f"{actor.id}/{provider.name}/{wire_format.name}"


_LAST_BYTES_SECONDS: Final = 1.0
_RECEIVE: Final = Receive()


async def _read_out(response: UpstreamResponse) -> None:
    """Read what follows the last event, if it comes at once, and let go."""
    try:
        with suppress(TimeoutError):
            async with asyncio.timeout(_LAST_BYTES_SECONDS):
                await read_out(response)
    finally:
        response.close()
