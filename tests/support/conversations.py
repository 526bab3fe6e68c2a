"""A long conversation with tools of both sides: what is said in it, the provider's part, and the client's.

- A *Round* is what a user says and all that the model says to it, in *Hops*: one response of the provider each. A hop may
  call tools, the client's own (`weather`) and injected ones (`add`, `fail`: of `sums_server`).
- A *Script* plays the provider's part, and is strict: it answers only if what it hears is the conversation as it would be
  had nothing been hidden from anybody, with every turn as it was said and every result in its place. A provider that binds
  its thoughts to what was before them, as current ones do (wire.md A6, C5), asks for no less.
- A *Client* plays the client's part with a vendor's SDK: what the SDK has accumulated goes into the history as it is, and
  the history is all that is sent. A *Conversation* is a client that says what the rounds have it say.

The protocols' own parts are in the modules beside this one: ``conversations_messages``, ``_chat`` and ``_responses``.
"""

import json
import re
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count, pairwise
from typing import Any, Final

import httpx2

from .facts import Json
from .injected_servers import SUMS
from .provider import Received, Reply, at_random
from .sdks import NO_CERTIFICATES

TOML: Final = f"""
[mcp.servers.sums]
command = {json.dumps(SUMS)}

[providers.stateful]
kind = "openai"
base_url = "{{provider}}/v1"
"""
"""Has a gateway inject the tools of a server of ours. ``{provider}`` stands for the provider's origin.

The provider ``stateful`` is for conversations that would else share call ids with others of their protocol.
"""

INJECTED: Final = "bmcp_sums_"


# --- what is said -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """A call of a tool. `arguments` is JSON text, in a spelling that only its writer has. `result` is what comes of it."""

    id: str
    name: str
    arguments: str
    result: str
    fails: bool = False

    @property
    def injected(self) -> bool:
        return self.name.startswith(INJECTED)


def add(a: int, b: int) -> Call:
    return Call(f"call_hidden_add_{a}", f"{INJECTED}add", f'{{"a":  {a},"b" :{b}}}', str(a + b))


def fail() -> Call:
    return Call("call_hidden_fail", f"{INJECTED}fail", "{}", "It went wrong.", fails=True)


def change() -> Call:
    """The server has other tools from then on."""
    return Call("call_hidden_change", f"{INJECTED}change", "{}", "changed")


def weather(city: str) -> Call:
    return Call(f"call_shown_{city}", "weather", f'{{"city" : "{city}"}}', weather_in(city))


def weather_in(city: str) -> str:
    """The client's tool."""
    return f"Sunny in {city}."


WEATHER: Final[Json] = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}


@dataclass(frozen=True)
class Hop:
    """One response of the provider: a thought, then words, then calls, as far as there are any."""

    words: str = ""
    thought: str = ""
    calls: tuple[Call, ...] = ()


@dataclass(frozen=True)
class Round:
    """What a user says, and what the model says to it."""

    prompt: str
    hops: tuple[Hop, ...]

    @property
    def requests(self) -> int:
        """How many requests the client has to make: a first one, and one after each hop that asks it for something."""
        return 1 + sum(any(not call.injected for call in hop.calls) for hop in self.hops)


def calls_in(rounds: Sequence[Round]) -> list[Call]:
    return [call for said in rounds for hop in said.hops for call in hop.calls]


def hidden_words(rounds: Sequence[Round]) -> list[bytes]:
    """What a client must never get to see: ids, names and results of injected calls."""
    hidden = [call for call in calls_in(rounds) if call.injected]
    return [INJECTED.encode(), b"call_hidden", *(call.result.encode() for call in hidden)]


# --- the provider -----------------------------------------------------------------------------------------------------

Entry = tuple[str, Any]
"""A piece of a conversation: ``("user", words)``, ``("model", turn)`` or ``("results", {call id: result})``."""


class Speech(ABC):
    """A provider's protocol. `conversation` is the member of a request that holds it, `constants` are what stays."""

    conversation: str
    constants: tuple[str, ...]

    @abstractmethod
    def said(self, hop: Hop, number: int) -> Any:
        """How a hop stands in later requests, in the form in which `heard` has it."""

    @abstractmethod
    def heard(self, body: Json) -> list[Entry]:
        """The whole conversation of a request. Results that are there twice, or that nobody asked for, raise."""

    @abstractmethod
    def reply(self, hop: Hop, number: int, body: Json) -> Reply:
        """The hop as a response, a stream where one is asked for."""

    def result(self, call: Call) -> Any:
        """How the result of a call is told, in the form in which `heard` has it."""
        return call.result


class Script:
    """The provider's part in a conversation. With `strict` off, what was said before the last prompt is its client's.

    `complaints` are about requests that it has refused. Its ids and signatures are like those of no other script.
    """

    def __init__(self, speech: Speech, rounds: Sequence[Round]) -> None:
        self.speech = speech
        self.strict = True
        self.complaints: list[str] = []
        self._entries: list[Entry] = []
        self._hops: dict[int, Hop] = {}
        self._first = next(_FIRSTS)
        for said in rounds:
            self._entries.append(("user", said.prompt))
            for hop in said.hops:
                place = len(self._entries)
                self._hops[place] = hop
                self._entries.append(("model", speech.said(hop, self._first + place)))
                if hop.calls:
                    self._entries.append(("results", {call.id: speech.result(call) for call in hop.calls}))

    def __call__(self, received: Received) -> Reply:
        try:
            return self._reply(received.json())
        except AssertionError as error:
            self.complaints.append(str(error))
            return Reply.json({"error": {"message": "This is not what was said."}}, 400)

    def _reply(self, body: Json) -> Reply:
        heard = self.speech.heard(body)
        asked = max(place for place, (kind, _) in enumerate(heard) if kind == "user")
        place = self._entries.index(heard[asked]) + len(heard) - asked
        if self.strict:
            for number, (is_there, expected) in enumerate(zip(heard, self._entries, strict=False)):
                assert is_there == expected, f"entry {number} is {is_there}, and not {expected}"
            assert len(heard) == place, f"{len(heard)} entries, and not {place}"
        return self.speech.reply(self._hops[place], self._first + place, body)


_FIRSTS: Final = count(1000, 1000)


def streamed(stream: bytes, number: int) -> Reply:
    """A stream, split somewhere."""
    return Reply.stream(at_random(stream, seed=number, pieces=8))


def only_once(results: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Results by the ids of their calls."""
    found = dict(results)
    assert len(found) == len(results), f"a call is answered twice: {results}"
    return found


# --- the client -------------------------------------------------------------------------------------------------------


class Tape(httpx2.AsyncHTTPTransport):
    """A client's connections, and all bytes that came on them: an SDK does not show what it does not know."""

    def __init__(self) -> None:
        super().__init__(verify=NO_CERTIFICATES)
        self.heard = bytearray()

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        response = await super().handle_async_request(request)
        assert isinstance(response.stream, httpx2.AsyncByteStream)
        response.stream = _Taped(response.stream, self.heard)
        self.heard += repr(response.headers.raw).encode()
        return response


class _Taped(httpx2.AsyncByteStream):
    def __init__(self, stream: httpx2.AsyncByteStream, heard: bytearray) -> None:
        self._stream = stream
        self._heard = heard

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for chunk in self._stream:
            self._heard += chunk
            yield chunk

    async def aclose(self) -> None:
        await self._stream.aclose()


@dataclass(frozen=True)
class Asked:
    """A call of the client's own tool, as the SDK gives it."""

    id: str
    name: str
    arguments: Mapping[str, Any]


class Client(ABC):
    """A client that has nothing but its own history."""

    @abstractmethod
    def say(self, prompt: str) -> None:
        """The user says something."""

    @abstractmethod
    def answer(self, results: Sequence[tuple[Asked, str]]) -> None:
        """The client's tools were run."""

    @abstractmethod
    async def ask(self, url: str, *, stream: bool) -> list[Asked]:
        """Send the history to the gateway at ``url``, take in the response, and answer what it asks the client to run."""

    @abstractmethod
    async def close(self) -> None:
        """Close all connections."""


@dataclass
class Conversation:
    """A client that says what the rounds have it say."""

    client: Client
    prompts: list[str]
    _asked: list[Asked] = field(default_factory=list)

    async def step(self, url: str, *, stream: bool) -> None:
        """The next request, with the results of the client's tools, or with the next prompt."""
        if self._asked:
            self.client.answer([(asked, weather_in(asked.arguments["city"])) for asked in self._asked])
        else:
            self.client.say(self.prompts.pop(0))
        self._asked = await self.client.ask(url, stream=stream)
        assert {asked.name for asked in self._asked} <= {"weather"}


# --- the judges -------------------------------------------------------------------------------------------------------


def member(body: bytes, name: str) -> bytes:
    """The text of a member of a JSON object, as it stands there; empty where it has none. Not with the product's scanner."""
    decoder, text = json.JSONDecoder(), body.decode()
    place = _after(text, text.index("{") + 1)
    while text[place] != "}":
        key, end = decoder.raw_decode(text, place)
        place = _after(text, end)
        _, end = decoder.raw_decode(text, place)
        if key == name:
            return text[place:end].encode()
        place = _after(text, end)
    return b""


def elements(array: bytes) -> list[bytes]:
    """The texts of the elements of a JSON array, as they stand there."""
    decoder, text, found = json.JSONDecoder(), array.decode(), []
    place = _after(text, 1)
    while text[place] != "]":
        _, end = decoder.raw_decode(text, place)
        found.append(text[place:end].encode())
        place = _after(text, end)
    return found


def _after(text: str, place: int) -> int:
    """Where the next token begins, after what separates it."""
    while text[place] in " \t\r\n,:":
        place += 1
    return place


_MARK: Final = re.compile(rb',\s*"cache_control":\s*\{[^{}]*\}')


def without_marks(text: bytes) -> bytes:
    """JSON text without cache marks, which clients move (wire.md A5)."""
    return _MARK.sub(b"", text)


def marks(body: bytes) -> int:
    return len(_MARK.findall(body))


def assert_extend_each_other(requests: Sequence[bytes], conversation: str) -> None:
    """Each request says all that the one before it said, byte for byte, cache marks aside (wire.md A6)."""
    for before, after in pairwise(without_marks(member(body, conversation)) for body in requests):
        said = before.rstrip(b"]")
        assert after.startswith(said), f"{after[: len(said)]!r} is not {said!r}"
        assert len(after) > len(before)


def assert_constant(requests: Sequence[bytes], names: Sequence[str]) -> None:
    """What stands before the conversation is the same in all requests, byte for byte, cache marks aside."""
    for name in names:
        found = {without_marks(member(body, name)) for body in requests}
        assert len(found) == 1, f"{name}: {found}"
