"""What clients see: one that reads bytes, and the vendors' official SDKs."""

import json
import ssl
import uuid
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any, Final, Self

import anthropic
import openai

from tests.support.gateway import SESSION_HEADER, Gateway
from tests.support.injected import Dialect
from tests.support.rawclient import RawClient

PATIENCE: Final = 60.0
"""Seconds that a client waits: none of the faults is to take as long, on a slow machine either."""

KEY: Final = "sk-of-a-client-of-the-fault-suite"

COMPLETE: Final = "200, complete"
BROKEN_OFF: Final = "200, broken off"
ERROR_EVENT: Final = "200, and an error event at the end"
NO_ANSWER: Final = "no answer"
VERBATIM: Final = "200, just what the provider sent"


def refused(status: int) -> str:
    """An error of the gateway's own before the response has begun."""
    return f"{status} in the provider's error shape"


@dataclass(frozen=True, slots=True)
class Sight:
    """What a client got of a response. `whole`: it ended as its framing promised. `status` is None where none came."""

    status: int | None
    body: bytes
    whole: bool

    def words(self, dialect: Dialect, *, stream: bool, sent: bytes | None = None) -> str:
        """The same in a few words. `sent` is what the provider has sent, where that is no answer of the protocol."""
        if self.status is None:
            return NO_ANSWER
        if sent is not None and self.whole and self.body == sent:
            return VERBATIM if self.status == 200 else f"{self.status}, just what the provider sent"
        if self.status != 200:
            return refused(self.status) if _is_error(dialect, self.body) else f"{self.status} of an unknown shape"
        if not stream and self.whole and _is_json(self.body):
            return COMPLETE
        *_, last = self.body.rstrip().split(b"\n\n")
        data = last.partition(b"data: ")[2]
        if stream and data.startswith(_LAST_EVENTS):
            return COMPLETE
        if _is_error(dialect, data):
            return ERROR_EVENT
        return BROKEN_OFF if not self.whole else "200, cut short as if it were whole"


_LAST_EVENTS: Final = (b'{"type":"message_stop"', b"[DONE]", b'{"type":"response.completed"')


def _is_json(body: bytes) -> bool:
    try:
        return isinstance(json.loads(body), dict)
    except ValueError:
        return False


def _is_error(dialect: Dialect, data: bytes) -> bool:
    """Whether it is an error as the protocol says it: of a body, or of an event (wire.md A10, B2, C3)."""
    if not _is_json(data):
        return False
    said: dict[str, Any] = json.loads(data)
    if dialect.format == "messages":
        return said.get("type") == "error" and {"type", "message"} <= set(said["error"])
    if said.get("type") == "response.failed":
        return bool(said["response"]["error"]["message"])
    return bool((said.get("error") or {}).get("message")) or (said.get("type") == "error" and "message" in said)


async def look(gateway: Gateway, dialect: Dialect, body: bytes, session: str) -> Sight:
    """Send a request on a connection of its own and read all that comes."""
    status, received, whole = None, b"", False
    headers = [("Content-Type", "application/json"), (SESSION_HEADER, session)]
    try:
        async with RawClient(gateway.url, PATIENCE) as client:
            await client.send("POST", dialect.path, headers, body)
            status = (await client.head()).status
            received, whole = await client.rest()
    except (OSError, EOFError):
        pass  # the connection did not come to a response
    return Sight(status, received, whole)


class Sdks:
    """The official SDKs as clients of a gateway, without retries: ``async with Sdks(gateway) as sdks``."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        certificates = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # of none: loading them takes longer than all the rest
        self._anthropic = await self._stack.enter_async_context(
            anthropic.AsyncAnthropic(
                base_url=self._gateway.anthropic,
                api_key=KEY,
                max_retries=0,
                timeout=PATIENCE,
                http_client=anthropic.DefaultAsyncHttpxClient(verify=certificates),
            )
        )
        self._openai = await self._stack.enter_async_context(
            openai.AsyncOpenAI(
                base_url=self._gateway.openai,
                api_key=KEY,
                max_retries=0,
                timeout=PATIENCE,
                http_client=openai.DefaultAsyncHttpxClient(verify=certificates),
            )
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def try_it(self, dialect: Dialect, body: bytes, session: str) -> str:
        """Ask with the SDK. Answers ``completes``, or the name of what it raises, or what it makes of the response."""
        asked = json.loads(body)
        stream = asked.get("stream") is True
        try:
            response = await self._create(dialect)(**asked, extra_headers={SESSION_HEADER: session})
            if not stream:
                return "completes" if getattr(response, "id", None) else f"a {type(response).__name__} without an id"
            events = [event async for event in response]
        except (anthropic.APIError, openai.APIError) as error:
            return type(error).__name__
        except Exception as error:  # noqa: BLE001  SDKs let some of their HTTP client's errors through
            return f"{type(error).__module__.partition('.')[0]}.{type(error).__name__}"
        if not events:
            return "no events"
        if dialect.format == "chat":
            return "completes" if not events[-1].choices else "ends without an end"
        last: str = events[-1].type
        return "completes" if last in ("message_stop", "response.completed") else f"event {last}"

    def _create(self, dialect: Dialect) -> Callable[..., Awaitable[Any]]:
        if dialect.format == "messages":
            return self._anthropic.messages.create
        chat: Any = self._openai.chat.completions.create
        return chat if dialect.format == "chat" else self._openai.responses.create


def new_session() -> str:
    return f"chaos-{uuid.uuid4()}"
