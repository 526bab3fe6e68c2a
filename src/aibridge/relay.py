"""The life of an intercepted request: read it, record its start, carry out what the conversation asks for.

The order in `Interceptor.handle` is the guarantee: nothing goes upstream before the start is recorded, and the client
sees the end of a response only after its records are durable (`aibridge.conversation`).
"""

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from aibridge.asgi import ClientConnection
from aibridge.clients import identify
from aibridge.conversation import Abort, Command, Conversation, End, Receive, Record, Relay, Respond, Send, converse
from aibridge.errors import BridgeError, ClientDisconnected, Interrupted
from aibridge.headers import UpstreamHeaders, to_client, to_upstream, without
from aibridge.identity import Actor
from aibridge.interruptible import Interruptible, Stopping
from aibridge.ledger import Entry, Ledger, new_id
from aibridge.providers import Provider, Route
from aibridge.records import Interception
from aibridge.upstream import Upstream, UpstreamRequest, UpstreamResponse
from aibridge.wire import Request, WireFormat
from aibridge.wire.base import Headers

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Interceptor:
    """Handles the requests of one intercepted route of one provider."""

    provider: Provider
    route: Route
    format: WireFormat
    upstream: Upstream
    ledger: Ledger
    max_body_bytes: int

    async def handle(self, client: ClientConnection, actor: Actor, *, stopping: Stopping) -> None:
        """Serve one request. Raises `BridgeError` where it is refused before anything was sent."""
        body = await client.body(self.max_body_bytes)
        request = self.format.parse(body, client.header(b"content-encoding"))
        if self.provider.ask_for_usage:
            request = self.format.asking_for_usage(request)
        headers = to_upstream(client.headers, self.provider.kind, self.provider.api_key)
        entry = Entry(self.ledger, self._interception(client, actor, request, headers), request.facts, headers.secrets)
        await entry.start()
        await _Exchange(self, client, entry, headers.fields).run(converse(request), stopping)

    def upstream_request(self, client: ClientConnection, fields: Headers, request: Request) -> UpstreamRequest:
        """What goes to the provider for a request of the conversation."""
        if request.hides_usage:  # what will be edited has to be readable
            fields = [*without(fields, b"accept-encoding"), (b"accept-encoding", b"identity")]
        url = self.provider.url(self.route.pattern, client.query)
        return UpstreamRequest(client.method, url, fields, request.body, self.provider.ca_file)

    def _interception(
        self, client: ClientConnection, actor: Actor, request: Request, headers: UpstreamHeaders
    ) -> Interception:
        sender = identify(client.headers)
        facts = request.facts
        metadata: dict[str, Any] = {**actor.metadata, **sender.agents}
        if facts.notes:
            metadata["notes"] = facts.notes
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

    def __init__(self, interceptor: Interceptor, client: ClientConnection, entry: Entry, fields: Headers) -> None:
        self._interceptor = interceptor
        self._client = client
        self._entry = entry
        self._fields = fields
        self._response: UpstreamResponse | None = None
        self._waits = Interruptible()
        self._listening = True
        self._aborted = False

    async def run(self, conversation: Conversation, stopping: Stopping) -> None:
        """Step through the conversation to its end, whatever happens on the way."""
        stopping.add(self._waits)
        watch = asyncio.create_task(self._watch())
        step: Callable[[Any], Command] = conversation.send
        result: Any = None
        try:
            while True:
                try:
                    command = step(result)
                except StopIteration:
                    break
                try:
                    step, result = conversation.send, await self._carry_out(command)
                except (BridgeError, ClientDisconnected, Interrupted) as event:
                    step, result = conversation.throw, event
            if self._client.started and not self._aborted:
                with suppress(ClientDisconnected):
                    await self._client.finish()
        except BaseException:
            self._entry.abandon()
            raise
        finally:
            watch.cancel()
            if self._response is not None:
                self._response.close()
            stopping.remove(self._waits)

    async def _carry_out(self, command: Command) -> Any:
        match command:
            case Receive():
                assert self._response is not None  # noqa: S101  Send comes before Receive
                chunk = await self._wait(self._response.read())
                if chunk:
                    self._entry.first_byte()
                return chunk
            case Relay(data):
                if data and self._listening:
                    await self._wait(self._client.relay(data))
                return self._listening
            case Send(request):
                sent = self._interceptor.upstream_request(self._client, self._fields, request)
                self._response = await self._wait(self._interceptor.upstream.send(sent))
                return self._response.head
            case Respond(status, headers):
                return await self._wait(self._client.respond(status, to_client(headers)))
            case Record(facts):
                return self._entry.record(facts)
            case End():
                return await self._entry.end(command)
            case Abort():
                logger.warning("a response of provider %s was broken off", self._interceptor.provider.name)
                self._aborted = True
                return None

    async def _wait(self, awaitable: Any) -> Any:
        try:
            return await self._waits.wait(awaitable)
        except asyncio.CancelledError:
            # The server has run out of patience. The task ends, as it was told to, but not before it has recorded what is
            # known and has told the client.
            raise Interrupted from None

    async def _watch(self) -> None:
        """Notice that the client has gone: stop the provider at once, or let it finish for the record."""
        await self._client.gone()
        self._listening = False
        if self._interceptor.provider.on_disconnect == "drain":
            await asyncio.sleep(self._interceptor.provider.drain_seconds)
        self._waits.interrupt(ClientDisconnected())
