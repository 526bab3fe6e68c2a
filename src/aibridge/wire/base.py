"""What the three wire formats have in common: facts out, bytes untouched.

There is no universal message type. A format knows how to read its own requests and responses and answers with *facts*;
everything above works with those and with opaque bytes.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Final, Literal, Protocol

import msgspec
from msgspec import Raw

from aibridge.errors import BadRequest, ProviderKind
from aibridge.wire.coding import CodingError, decode
from aibridge.wire.reading import Unreadable, boolean, is_null, is_object, members, text
from aibridge.wire.sse import Frame
from aibridge.wire.turns import TurnFormat

MAX_DECODED_REQUEST_BYTES: Final = 64 * 1024 * 1024
"""How far a compressed request is decoded to be read: twice what providers take (clients.md 4)."""

Headers = Sequence[tuple[bytes, bytes]]
"""Header fields in the order they came; names in lower case, values as sent."""

Completeness = Literal["complete", "partial", "unknown"]
"""Of a usage: `complete`, the provider's final figures; `partial`, the response broke off and these are the figures until
then; `unknown`, the response ended and the provider reported none."""

ThoughtSource = Literal["thinking", "reasoning", "reasoning_summary", "commentary"]


class Usage(msgspec.Struct, frozen=True):
    """Tokens of one upstream response. A counter that was never reported is None, which is not 0.

    `input_tokens` excludes what was read from or written to a prompt cache, for every provider. `raw` is the JSON text of
    the provider's usage object.
    """

    input_tokens: int | None = None
    output_tokens: int | None = None
    cache_read_input_tokens: int | None = None
    cache_write_input_tokens: int | None = None
    raw: bytes | None = None


class ToolCall(msgspec.Struct, frozen=True):
    """A call that the model made. `input` is the raw text of its arguments, which need not be valid JSON."""

    id: str | None
    name: str
    input: str | None
    details: Mapping[str, Any] = {}


class Thought(msgspec.Struct, frozen=True):
    """Something the model thought aloud."""

    source: ThoughtSource
    content: str
    details: Mapping[str, Any] = {}


class RequestFacts(msgspec.Struct, frozen=True):
    """What a request body says.

    `prompt` is None where the request only continues a turn with tool results. `asks_for_usage`: whether its stream is to
    report usage; None where it says nothing about its stream. `secrets` are credentials for servers that the provider calls.
    """

    model: str | None = None
    stream: bool = False
    prompt: str | None = None
    correlating_tool_call_id: str | None = None
    session_id: str | None = None
    notes: tuple[str, ...] = ()
    asks_for_usage: bool | None = None
    secrets: tuple[str, ...] = ()


class ResponseFacts(msgspec.Struct, frozen=True):
    """What one upstream response said. `error` is the provider's own words, where it reported an error."""

    response_id: str | None = None
    model: str | None = None
    usage: Usage | None = None
    completeness: Completeness = "unknown"
    tool_calls: tuple[ToolCall, ...] = ()
    thoughts: tuple[Thought, ...] = ()
    stop_reason: str | None = None
    error: str | None = None
    notes: tuple[str, ...] = ()


class Request(msgspec.Struct, frozen=True):
    """A request, immutable. `body` is what goes to the provider: the client's own bytes unless an edit was spliced in."""

    format: "WireFormat"
    body: bytes
    facts: RequestFacts
    coding: str = ""
    """Content coding of `body`. A compressed body is forwarded as sent and never edited."""
    hides_usage: bool = False
    """The bridge asked for a usage chunk that the client did not ask for, and takes it out of the response."""
    has_tools: bool = False
    """The bridge added tools of its own, and takes their calls out of the response."""

    @property
    def sent(self) -> "Request":
        """What is left of it to know when the provider has it: a response may take an hour, and a body megabytes."""
        return msgspec.structs.replace(self, body=b"")

    @property
    def edits_response(self) -> bool:
        """The response cannot be passed on as it comes, so that it has to be readable."""
        return self.hides_usage or self.has_tools


def error_text(error: Raw | None) -> str | None:
    """The words of an ``error`` member, an object with a type or code and a message, or a string: a code, a colon, the rest.

    None where there is no error: compatible servers send null, false or an empty string beside a good answer.
    """
    if error is None or is_null(error) or boolean(error) is False:
        return None
    if (plain := text(error)) is not None:
        return f"error: {plain}" if plain else None
    parts = members(error)
    said = f"{text(parts.get('type')) or text(parts.get('code')) or 'error'}: {text(parts.get('message')) or ''}"
    return said if error_code(said) is not None else f"error: {said}"


def error_code(error: str) -> str | None:
    """The code in words of a provider, as `error_text` has put them; None in those of our own. What follows the code may
    quote what the provider was sent.
    """
    found = _ERROR_CODE.match(error)
    return None if found is None else found[0]


_ERROR_CODE: Final = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,63}(?=: )")


class ResponseReader(ABC):
    """Reads one upstream response, event by event or as one body. Not thread-safe, used once.

    Reading may raise `aibridge.wire.reading.Unreadable` for an event or body that is not a JSON object; state stays valid.
    """

    finished: bool = False
    """The event that ends the response has been read: a client that has it considers the response complete."""

    error: str | None = None
    """The provider's own words, where it has reported an error."""

    run: ClassVar[re.Pattern[bytes] | None] = None
    """Matches a run of whole frames, up to and including a blank line, of which only the last has to be read, and that not
    at once: each of them says all that was said by those before it. None where every event has to be read."""

    @property
    def ends_at_eof(self) -> bool:
        """Whether the connection may close here without the response being cut."""
        return self.finished

    @abstractmethod
    def read_event(self, data: bytes) -> None:
        """Take in the data of one server-sent event."""

    @abstractmethod
    def is_last(self, data: bytes) -> bool:
        """Whether this is the data of the event with which a stream is complete. Never raises."""

    @abstractmethod
    def read_body(self, body: bytes) -> None:
        """Take in a whole JSON body."""

    @abstractmethod
    def facts(self) -> ResponseFacts:
        """What has been read so far. `completeness` speaks for a response that ended; the caller knows if it was cut."""

    @abstractmethod
    def error_event(self, status: int, message: str) -> bytes:
        """An in-band error that ends the stream in the way the format's clients understand, as bytes of the stream."""


class ResponseFilter(Protocol):
    """Takes something out of a stream that is there only because the bridge asked for it."""

    def feed(self, frames: Sequence[Frame]) -> bytes:
        """What the client may see of these frames, in its order."""


class WireFormat(ABC):
    """One provider protocol."""

    name: ClassVar[str]
    kind: ClassVar[ProviderKind]
    turns: ClassVar[TurnFormat]
    """What the inner loop of injected tools needs of the protocol."""

    def parse(self, body: bytes, coding: str = "") -> Request:
        """Read a request body, of which `coding` is the content coding.

        Raises `aibridge.errors.BadRequest` when it is not a JSON object, and only then: a body that cannot be decoded or
        understood is for the provider to judge.
        """
        try:
            plain = decode(coding, body, MAX_DECODED_REQUEST_BYTES) if coding else body
        except CodingError as error:
            return Request(self, body, RequestFacts(notes=(f"request not read: {error}",)), coding)
        try:
            facts = self._facts(plain)
        except Unreadable as error:
            if not is_object(plain):
                raise BadRequest("The request body must be a JSON object.") from None
            facts = RequestFacts(notes=(f"request not read: {error}",))
        return Request(self, body, facts, coding)

    def asking_for_usage(self, request: Request) -> Request:
        """The same request, made to report its token usage where the protocol does so only on demand."""
        return request

    def response_filter(self, request: Request) -> ResponseFilter | None:  # noqa: ARG002  for those that need one
        """What hides from the client that `asking_for_usage` asked, or None where nothing has to be hidden."""
        return None

    @abstractmethod
    def reader(self) -> ResponseReader:
        """A fresh reader for one upstream response."""

    @abstractmethod
    def _facts(self, body: bytes) -> RequestFacts:
        """The facts of a request. Raises `aibridge.wire.reading.Unreadable` when the body is not a JSON object."""
