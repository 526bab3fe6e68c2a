"""What the inner loop needs of a protocol, beside what every request needs (`aibridge.wire.base`).

The client sees one response where the provider gave several, and sees nothing of the injected calls in them. A format's
`TurnFormat` knows how to

* offer tools: `TurnFormat.with_tools` splices them into a request;
* go on: `TurnFormat.with_turn` appends what the provider said, byte for byte, and what came of the calls in it;
* merge: a `TurnMerger` presents several upstream responses as one;
* remember and restore: a `Memory` of what was hidden, under keys for what clients replay; a `Draft` that is given memories
  back restores what was hidden, byte-identical, into a later request (wire.md D6).

Everything here works on JSON text that is edited in place, so that what is not edited stays as it was.
"""

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final, Literal

import msgspec

from aibridge.tools import Call, Outcome, Toolset
from aibridge.wire.sse import Frame

UsagePolicy = Literal["sum", "last"]
"""What a response of several turns reports to the client: `sum`, all tokens of all turns; `last`, the input of the last turn
and the summed output, which is what a client that measures its context wants. The ledger has each turn's own either way."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a turn in the provider's own JSON text: a content block, an output item, a whole Chat message.

    `call` is the call of an injected tool that it is, and hidden from the client for.
    """

    raw: bytes
    call: Call | None = None


@dataclass(frozen=True, slots=True)
class Turn:
    """What the provider said in one response that has ended.

    `calls` are those of injected tools, in their order. `awaits_client`: there are calls of the client's own tools among it.
    """

    pieces: tuple[Piece, ...]
    calls: tuple[Call, ...] = ()
    awaits_client: bool = False
    response_id: str | None = None


@dataclass(frozen=True, slots=True)
class Answered:
    """A turn and what came of its injected calls, in their order; nothing where they were not run."""

    turn: Turn
    outcomes: tuple[Outcome, ...] = ()


class Memory(msgspec.Struct, frozen=True):
    """One response that a client was given, as far as it was not shown it.

    `keys` stand for what the client will replay of it. `toolset` is the digest of the tools that its conversation was
    offered. `data` is the format's own: empty where nothing was hidden, None where it was and has been dropped since.
    `last_id` is the id under which the provider knows the end of the response, where that differs from the client's; it does
    not expire.
    """

    keys: tuple[str, ...]
    toolset: str
    data: bytes | None = b""
    last_id: str | None = None


@dataclass(frozen=True, slots=True)
class Restored:
    """A request body with what was hidden from the client put back.

    `toolset` is the digest of the tools that the conversation was offered so far; None where nothing of it is remembered.
    `restored` counts the responses that got something back. `lost` counts those whose hidden part is known to be gone: the
    provider gets the client's version of them then, without thoughts that it could not verify any more (wire.md A6).
    `unknown` counts turns of the model that nothing is remembered of: they were edited, or are from elsewhere.
    `bound`: among the unknown ones are thoughts that hold only for the tools that their conversation was offered.
    """

    body: bytes
    toolset: str | None = None
    restored: int = 0
    lost: int = 0
    unknown: int = 0
    bound: bool = False


class Draft(ABC):
    """A request as the client sent it, read for what it replays and what it could do with more tools."""

    body: bytes

    objection: str | None = None
    """Why calls of injected tools cannot be run for this request; None where they can."""

    is_aside: bool = False
    """The request is for structured output and has no tools of its own, as when a client wants a title: it gets tools only
    where its conversation has them already."""

    tool_names: frozenset[str] = frozenset()
    """The names that the client's own tools have."""

    keys: tuple[str, ...] = ()
    """What to recall memories by."""

    @abstractmethod
    def restored(self, found: Mapping[str, Memory]) -> Restored:
        """The request with what was hidden put back. `found` are memories under some of `keys`."""


class TurnMerger(ABC):
    """Presents the responses of several turns as one. The provider's errors end a stream like any other event.

    Streams are read with `read_event`, whole bodies with `read_body`. Both may raise `aibridge.wire.reading.Unreadable`; an
    event that cannot be read is relayed as it is.
    """

    keep_alive: ClassVar[bytes]
    """What may be written between two events of the stream to show that it is alive."""

    @abstractmethod
    def begin(self) -> None:
        """A response of the provider begins; the one before it has ended."""

    @abstractmethod
    def read_event(self, frame: Frame) -> bytes:
        """Take in a frame of the stream, comments too: what the client may see now. What ends a response is held."""

    @abstractmethod
    def read_body(self, body: bytes) -> None:
        """Take in a response that is no stream."""

    @abstractmethod
    def turn(self) -> Turn:
        """The turn of the response that has ended."""

    @abstractmethod
    def finish(self) -> bytes:
        """What ends the client's response: the last events of its stream, or the whole body.

        Injected calls of the last turn are not going to be run; where no others are left, it does not end with calls.
        """

    @abstractmethod
    def error_event(self, status: int, message: str, body: bytes = b"") -> bytes:
        """An error that ends the client's stream, in the form that its clients understand.

        `body` is the provider's own error body where it had one; its words are passed on.
        """


class TurnFormat(ABC):
    """The protocol's side of the inner loop. All bodies are JSON text without a content coding.

    Where a body has no place for what is to be spliced in, methods raise `aibridge.wire.reading.Unreadable`.
    """

    @abstractmethod
    def read(self, body: bytes) -> Draft:
        """Read a request as the client sent it."""

    @abstractmethod
    def with_tools(self, body: bytes, toolset: Toolset) -> bytes:
        """The request with the tools at the end of its own; whatever the client's own marks and choices, they stay."""

    @abstractmethod
    def with_turn(self, body: bytes, answered: Answered, *, last: bool) -> bytes:
        """The request that goes on after a turn. A choice that forced a tool is relaxed, so that the loop can end.

        `last`: the model is not to call anything any more.
        """

    @abstractmethod
    def merger(self, body: bytes, toolset: Toolset, usage: UsagePolicy, *, hides_usage: bool = False) -> TurnMerger:
        """A fresh merger for the responses to a request, of which `body` is what the client sent.

        `hides_usage` as in `aibridge.wire.base.Request`.
        """

    @abstractmethod
    def memory(self, draft: Draft, toolset: Toolset, turns: Sequence[Answered]) -> Memory:
        """What to remember of the response to a request; `turns` are all that have ended, in their order.

        A call without an outcome is forgotten: no provider takes a call that nobody answered.
        """


# A token of an id that is drawn and not counted: long, or a part of a UUID, or of letters in both cases and digits. Names of
# tools, which may be part of an id too, are words.
_DRAWN: Final = re.compile(
    r"(?=[^\W_]*\d)[^\W_]{20,}|(?=[0-9a-f]*\d)[0-9a-f]{8,}|(?=[^\W_]*\d)(?=[^\W_]*[a-z])(?=[^\W_]*[A-Z])[^\W_]{8,}"
)


def is_strong(identity: str | None) -> bool:
    """Whether an id is one that a provider gives only once.

    Compatible servers count, in each conversation anew (``call_0``, ``functions.NAME:0``), or have no ids (wire.md D3).
    """
    return identity is not None and _DRAWN.search(identity) is not None


class Prefix:
    """What a conversation has said so far, as far as every client repeats it: a running digest."""

    __slots__ = ("_hash",)

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, *words: str) -> None:
        """Something was said. Space around words does not count: clients trim it."""
        for word in words:
            said = word.strip().encode("utf-8", "surrogatepass")
            self._hash.update(b"%d:" % len(said) + said)

    def key(self, *words: str) -> str:
        """What stands for something that is said now, after all that was added before."""
        copy = Prefix()
        copy._hash = self._hash.copy()
        copy.add(*words)
        return f"said:{copy._hash.hexdigest()[:40]}"


def key_of(kind: str, value: str) -> str:
    """What stands for something that is never said twice: a signature, an id, encrypted content."""
    return f"{kind}:{hashlib.sha256(value.encode('utf-8', 'surrogatepass')).hexdigest()[:40]}"
