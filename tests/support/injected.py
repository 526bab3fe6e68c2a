"""Turns of a provider in the three protocols, for tests of the inner loop: what is said in them is written once.

- A *turn* is one response of the provider; it *says* thoughts, texts and calls of tools, in their order.
- A *dialect* is a protocol: how a client asks, how the provider says a turn, streamed or whole, what the request that goes
  on after a turn must have more, and what an official SDK's final object `Seen`, that is, brought into one form, says.
- A *failure* is what comes in the place of a turn: a refusal, a broken stream, an error in it, or nothing at all.

Streams have the form that wire.md A9, B2 and C3 describe. Every turn has a number, and everything in it that a merged
response has only once (id, model, usage) can be told from it. `tests.support.injected_loop` lets the engine loose on them.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Final, Literal

from aibridge.errors import UpstreamError

from .recording import Format

Json = dict[str, Any]
Stop = Literal["end", "calls", "length"]

QUESTION: Final = {"role": "user", "content": "What is it?"}


# --- what a provider says ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Thinks:
    """A thought. The signature is Anthropic's; for Responses it is the encrypted content, Chat has none."""

    words: str
    signature: str = ""


@dataclass(frozen=True, slots=True)
class Says:
    words: str


@dataclass(frozen=True, slots=True)
class Calls:
    """A call of a tool. `arguments` is JSON text."""

    id: str
    tool: str
    arguments: str = "{}"


Said = Thinks | Says | Calls


@dataclass(frozen=True, slots=True)
class Turn:
    """`fails`: an error comes in the stream's place of an end."""

    number: int
    said: tuple[Said, ...]
    stop: Stop
    fails: bool = False

    @property
    def calls(self) -> tuple[Calls, ...]:
        return tuple(one for one in self.said if isinstance(one, Calls))


def turn(number: int, *said: Said, stop: Stop | None = None) -> Turn:
    """A turn that ends as it would by what is said in it, unless told otherwise."""
    return Turn(number, said, stop or ("calls" if any(isinstance(one, Calls) for one in said) else "end"))


@dataclass(frozen=True, slots=True)
class Refuses:
    """The provider answers with an HTTP error."""

    status: int
    message: str = "Too much of it"
    headers: tuple[tuple[bytes, bytes], ...] = ((b"retry-after", b"7"), (b"request-id", b"req_2"))


@dataclass(frozen=True, slots=True)
class Breaks:
    """The turn's response ends within its last event; without a `reason` as if it were complete."""

    turn: Turn
    reason: UpstreamError | None = None


@dataclass(frozen=True, slots=True)
class Unreachable:
    reason: UpstreamError


Failure = Refuses | Breaks | Unreachable


@dataclass(frozen=True, slots=True)
class Seen:
    """What a client made of a response. `usage`: what went in, what of it was cached (in Messages beside it), what came out.

    Members of `said` are ("thought", words, signature), ("text", words), ("call", id, tool, decoded arguments).
    """

    id: str
    model: str
    said: tuple[tuple[Any, ...], ...]
    stop: Stop
    usage: tuple[int, int, int] | None

    def without_thoughts(self) -> "Seen":
        return replace(self, said=tuple(one for one in self.said if one[0] != "thought"))


def usage_of(*numbers: int) -> tuple[int, int, int]:
    """The usage of turns, summed."""
    return 100 * sum(numbers), 10 * sum(numbers), sum(numbers)


# --- how it is said ---------------------------------------------------------------------------------------------------


class Dialect(ABC):
    """A protocol."""

    format: ClassVar[Format]
    path: ClassVar[str]
    array: ClassVar[str]
    """The member of a request that has the conversation."""

    choices: ClassVar[Mapping[str, Any]]
    """``tool_choice``, by what it says."""

    def __str__(self) -> str:
        return self.format

    def request(
        self, conversation: Sequence[Json] = (QUESTION,), *, stream: bool = True, tools: Iterable[str] = (), **more: Any
    ) -> bytes:
        """What a client asks. Its own tools have these names; `more` are other members, or other values for those."""
        asked: Json = {
            "model": "m",
            self.array: list(conversation),
            **self._obligatory,
            **({"stream": True} if stream else {}),
            **more,
        }
        if offered := [self.tool(name, "Mine.") for name in tools]:
            asked["tools"] = offered
        return json.dumps(asked).encode()

    def asking(self, *, stream: bool = True, **more: Any) -> bytes:
        """The same question, of a client that wants to know its usage."""
        return self.request(stream=stream, **(self._wants_usage if stream else {}), **more)

    _obligatory: ClassVar[Json] = {}
    _wants_usage: ClassVar[Json] = {}

    @abstractmethod
    def id_of(self, number: int) -> str:
        """The id of a turn."""

    @abstractmethod
    def tool(self, name: str, description: str) -> Json:
        """A tool as a request offers it."""

    @abstractmethod
    def events(self, turn: Turn, asked: Json) -> Iterator[bytes]:
        """The stream of a turn."""

    @abstractmethod
    def body(self, turn: Turn, asked: Json) -> bytes:
        """The same, whole."""

    def error(self, message: str) -> bytes:
        """The body of an error."""
        return json.dumps({"error": {"message": message, "type": "server_error", "param": None, "code": None}}).encode()

    @abstractmethod
    def appended(self, turn: Turn, results: Iterable[tuple[str, str, bool]]) -> list[Json]:
        """What the next request has more: the turn, and results as (call id, text, whether the call failed)."""

    @abstractmethod
    def seen(self, final: Json) -> Seen:
        """An SDK's final object in one form."""

    def shown(self, said: Iterable[Said]) -> tuple[tuple[Any, ...], ...]:
        """What a client must see of what is said to it."""
        return tuple(
            ("thought", one.words, one.signature)
            if isinstance(one, Thinks)
            else ("text", one.words)
            if isinstance(one, Says)
            else ("call", one.id, one.tool, json.loads(one.arguments))
            for one in said
        )

    @abstractmethod
    def replayed(self, final: Json, results: Mapping[str, str]) -> list[Json]:
        """What a client adds to the conversation: the answer as its SDK has it, and what came of the calls in it."""

    @abstractmethod
    def assert_one_envelope(self, stream: bytes) -> None:
        """One start, one end, ids constant, indexes dense and increasing (wire.md, rule 6)."""

    def choice(self, body: bytes) -> Any:
        return json.loads(body).get("tool_choice")

    def said_until(self, body: bytes) -> bytes:
        """The conversation of a request as it stands there, without the bracket that ends it."""
        text = body.decode()
        start = text.index(f'"{self.array}":') + len(self.array) + 3
        start += text[start] == " "
        _, end = json.JSONDecoder().raw_decode(text, start)
        return text[start:end].removesuffix("]").encode()


def pieces(words: str, size: int = 4) -> list[str]:
    return [words[start : start + size] for start in range(0, len(words), size)]


def sse(data: Json, name: str | None = None) -> bytes:
    event = "" if name is None else f"event: {name}\n"
    return f"{event}data: {json.dumps(data, separators=(',', ':'))}\n\n".encode()


def data_of(stream: bytes) -> list[Json]:
    """The data of a stream of whole events with one line of it each. Reads what we made without a parser of ours."""
    assert stream.endswith(b"\n\n")
    lines = [line.removeprefix(b"data: ") for line in stream.split(b"\n") if line.startswith(b"data: ")]
    return [json.loads(line) for line in lines if line != b"[DONE]"]
