"""Anything at all through the core: nothing is raised that is not announced, and no byte gets lost.

Truth: our own contracts (``aibridge.conversation``: what may be thrown in, and that nothing comes out;
``aibridge.wire.observer``: nothing is raised; ``WireFormat.parse``: `BadRequest` only), and wire.md rule 1 for the bytes.

``AIBRIDGE_FUZZ_EXAMPLES`` requests and exchanges are tried over the three formats, streamed and blocking: a few with the
other tests, twenty thousand with ``make fuzz``. They are garbage made of the protocols' own words, recordings of the
corpus with bytes flipped, left out, repeated or put in, and plain noise; whole or split, compressed, wrongly compressed,
cut, with the client gone, the process stopping or the ledger failing at any point. The same with injected tools, whose calls
are among what is garbled: values in events replaced, left out or of another type, events lost, repeated or exchanged.
"""

import itertools
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, Final

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from msgspec import structs

from aibridge.commands import Abort, Answers, CallTools, Command, End, Receive, Record, Relay, Remember, Respond, Send
from aibridge.conversation import converse
from aibridge.errors import BadRequest, ClientDisconnected, Interrupted, RecordingFailed, UpstreamError
from aibridge.merger import Loop
from aibridge.tools import Outcome, Text, Tool, Toolset
from aibridge.wire import CHAT, Request, ResponseFacts, WireFormat
from aibridge.wire.coding import CodingError, decode
from aibridge.wire.observer import Observer, ResponseHead
from aibridge.wire.reading import MAX_INTEGER
from aibridge.wire.sse import SseDecoder
from tests.support.coding import ENCODERS
from tests.support.dialogue import FORMATS
from tests.support.injected import QUESTION, Calls, Dialect, Says, Thinks, turn
from tests.support.injected_dialects import both_ways, each_dialect
from tests.support.traffic import ALL

EXAMPLES: Final = int(os.environ.get("AIBRIDGE_FUZZ_EXAMPLES", "600"))
CASES: Final = [(form, stream) for form in FORMATS for stream in (True, False)]
TESTS: Final = 2 * len(CASES) + 2 * len(FORMATS) + 1

FUZZ: Final = settings(max_examples=max(1, EXAMPLES // TESTS), deadline=None, suppress_health_check=list(HealthCheck))


# --- bodies -----------------------------------------------------------------------------------------------------------


def words_of(form: str) -> tuple[list[str], list[str]]:
    """The names and the short strings that the corpus uses in a format."""
    names: set[str] = set()
    strings: set[str] = set()

    def collect(value: Any) -> None:
        if isinstance(value, dict):
            names.update(value)
            for member in value.values():
                collect(member)
        elif isinstance(value, list):
            for member in value:
                collect(member)
        elif isinstance(value, str) and len(value) < 50:
            strings.add(value)

    for recording in ALL:
        if recording.format == form:
            datas = [recording.request, *(frame.data or b"" for frame in SseDecoder().feed(recording.response))]
            for data in datas:
                try:
                    collect(json.loads(data.decode("utf-8", "replace")))
                except ValueError:
                    continue
    return sorted(names), sorted(strings)


NUMBERS: Final = [0, 1, 2, -1, 5, 61, 1.5, 2**31, MAX_INTEGER, 2**63, 10**400, float("nan"), float("inf")]
ODD: Final = [None, True, False, "", "\0", "\ud800", "\u2028", "🌍"]


class Garbage:
    """JSON of a format's own words, wherever they belong. From a seed: Hypothesis would take longer to make it up."""

    def __init__(self, form: str) -> None:
        self._names, self._strings = words_of(form)

    def __call__(self, seed: int) -> bytes:
        return json.dumps(self._members(Random(seed), 3)).encode()

    def _members(self, random: Random, depth: int) -> dict[str, Any]:
        return {random.choice(self._names): self._value(random, depth) for _ in range(random.randrange(6))}

    def _value(self, random: Random, depth: int) -> Any:
        match random.randrange(9):
            case 0 | 1 if depth:
                return self._members(random, depth - 1)
            case 2 if depth:
                return [self._value(random, depth - 1) for _ in range(random.randrange(4))]
            case 3 | 4:
                return random.choice(NUMBERS)
            case 5:
                return random.choice(ODD)
            case _:
                return random.choice(self._strings)


GARBAGE: Final = {form: st.integers(0, 2**32).map(Garbage(form)) for form in FORMATS}

FRAMING: Final = [
    b"",
    b"\n",
    b"\r",
    b"\r\n\r",
    b"\n\n",
    b":",
    b"data:",
    b"data: [DONE]\n\n",
    b"event: error\n",
    b"\xef\xbb\xbf",
]
PIECES: Final = [
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b'"',
    b"\\",
    b"\\ud800",
    b"null",
    b"true",
    b"{}",
    b"[]",
    b"1e400",
    b"-1",
    b"\xff",
]
LARGE: Final = [b"9" * 5000, b"[" * 2000]
MEMBERS: Final = [b'"usage":null,', b'"error":1,', b'"index":-1,', b'"type":"error",']
TOKENS: Final = st.sampled_from([*FRAMING, *PIECES, *LARGE, *MEMBERS])
EDITS: Final = st.lists(
    st.tuples(st.sampled_from(["flip", "drop", "repeat", "insert"]), st.floats(0, 1), TOKENS), max_size=4
)


def mutated(body: bytes, edits: Sequence[tuple[str, float, bytes]]) -> bytes:
    for edit, place, token in edits:
        at = int(place * len(body))
        some = len(token) * 8 + 1
        match edit:
            case "flip":
                body = body[:at] + bytes(byte ^ 0x15 for byte in body[at : at + 1]) + body[at + 1 :]
            case "drop":
                body = body[:at] + body[at + some :]
            case "repeat":
                body = body[: at + some] + body[at:]
            case "insert":
                body = body[:at] + token + body[at:]
    return body


def framed(events: Sequence[bytes]) -> bytes:
    return b"".join(b"data: " + event + b"\n\n" for event in events)


def bodies(form: str, stream: bool) -> st.SearchStrategy[bytes]:
    recorded = [recording.response for recording in ALL if recording.format == form and recording.streams is stream]
    made_up = st.lists(GARBAGE[form], max_size=6).map(framed) if stream else GARBAGE[form]
    return made_up | st.builds(mutated, st.sampled_from(recorded), EDITS) | st.binary(max_size=200)


TOOL: Final = Tool("bmcp_memory_look", "Looks.", '{"type":"object"}', "memory", "look", "memory:memory")
TURNS: Final = [
    turn(1, Thinks("Hm.", "sig"), Says("I look."), Calls("call_a", TOOL.name, '{"for": 1}'), Calls("call_b", TOOL.name)),
    turn(2, Says("Once more."), Calls("call_c", TOOL.name), Calls("call_d", "mine", '{"x": []}')),
    turn(3, Says("So.")),
]


class Garbled:
    """What a provider says in turns with calls of an injected tool, garbled; from a seed, as `Garbage`."""

    def __init__(self, dialect: Dialect, stream: bool) -> None:
        self._dialect = dialect
        self._stream = stream

    def __call__(self, seed: int) -> bytes:
        random = Random(seed)
        asked = {"stream": self._stream, "stream_options": {"include_usage": True}}
        said = random.choice(TURNS)
        events = list(self._dialect.events(said, asked)) if self._stream else [self._dialect.body(said, asked)]
        for _ in range(random.randrange(4)):
            at, other = random.randrange(len(events)), random.randrange(len(events))
            match random.randrange(10):
                case 0:
                    events.insert(other, events[at])
                case 1:
                    events[at], events[other] = events[other], events[at]
                case 2:
                    events[at] = b""
                case _:
                    events[at] = self._with_another_value(random, events[at])
        return b"".join(events)

    def _with_another_value(self, random: Random, event: bytes) -> bytes:
        before, mark, data = event.rpartition(b"data: ")
        try:
            value = json.loads(data)
        except ValueError:  # nothing, or [DONE]
            return event
        parents = [parent for parent in self._inside(value) if parent]
        if not parents:
            return event
        parent = random.choice(parents)
        place = random.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))
        if random.randrange(3):
            parent[place] = random.choice([*ODD, *NUMBERS, [], {}, [None], {"a": 1}, "x"])
        else:
            del parent[place]
        return before + mark + json.dumps(value).encode() + b"\n\n"

    def _inside(self, value: Any) -> Iterator[Any]:
        if isinstance(value, dict | list):
            yield value
            for member in value.values() if isinstance(value, dict) else value:
                yield from self._inside(member)


def turns(dialect: Dialect, stream: bool) -> st.SearchStrategy[bytes]:
    garbled = st.integers(0, 2**32).map(Garbled(dialect, stream))
    return garbled | st.builds(mutated, garbled, EDITS)


def requests(form: str) -> st.SearchStrategy[bytes]:
    recorded = [recording.request for recording in ALL if recording.format == form]
    return GARBAGE[form] | st.builds(mutated, st.sampled_from(recorded), EDITS) | st.binary(max_size=100)


# --- exchanges --------------------------------------------------------------------------------------------------------

CODINGS: Final = ["", "identity", *ENCODERS, "x-gzip", "made-up", "gzip, br"]
LENGTHS: Final = ["", "0", "17", "-1", "1" * 30, "9" * 5000, "\u00b2", "true"]
TYPES: Final = ["text/event-stream", "text/event-stream; charset=utf-8", "application/json", "", "text/html"]


@dataclass(frozen=True)
class Mishap:
    """What goes wrong, or who is not listening, when a command is carried out for the ``at``-th time."""

    command: type[Command]
    at: int
    answer: Exception | bool


MISHAPS: Final = st.builds(
    Mishap,
    st.sampled_from([Receive, Relay]),
    st.integers(0, 8),
    st.sampled_from([ClientDisconnected(), Interrupted()]),
) | st.sampled_from(
    [
        Mishap(Send, 0, UpstreamError("x")),
        Mishap(Send, 0, ClientDisconnected()),
        Mishap(Send, 0, Interrupted()),
        Mishap(Receive, 1, UpstreamError("x")),
        Mishap(Receive, 3, UpstreamError("x")),
        Mishap(Relay, 1, False),
        Mishap(End, 0, RecordingFailed("x")),
        Mishap(CallTools, 0, ClientDisconnected()),
        Mishap(CallTools, 0, Interrupted()),
        Mishap(Remember, 0, ClientDisconnected()),
    ]
)


@dataclass(frozen=True)
class Exchange:
    body: bytes
    head: ResponseHead
    chunks: Sequence[bytes]
    mishaps: Sequence[Mishap]


@st.composite
def exchanges(draw: st.DrawFn, said: st.SearchStrategy[bytes], stream: bool) -> Exchange:
    body = draw(said)
    coding = draw(st.sampled_from(CODINGS) | st.just(""))
    if coding in ENCODERS and draw(st.booleans()):
        body = mutated(ENCODERS[coding](body), draw(EDITS))
    usual = TYPES[0] if stream else TYPES[2]
    headers = [
        (b"content-type", draw(st.just(usual) | st.sampled_from(TYPES)).encode()),
        (b"content-encoding", coding.encode()),
        (b"content-length", draw(st.just("") | st.just(str(len(body))) | st.sampled_from(LENGTHS)).encode("latin-1")),
    ]
    head = ResponseHead(draw(st.just(200) | st.sampled_from([200, 201, 204, 400, 429, 529])), headers)
    cuts = sorted({0, *draw(st.lists(st.integers(0, len(body)), max_size=6)), len(body)})
    chunks = [body[start:end] for start, end in itertools.pairwise(cuts)]
    if len(body) < 500 and draw(st.booleans()):
        chunks = [bytes([byte]) for byte in body]
    return Exchange(body, head, chunks, draw(st.lists(MISHAPS, max_size=2)))


FOUND: Final = Outcome((Text("found"),))


def carry_out(request: Request, *script: Exchange, loop: Loop | None = None) -> list[Command]:
    """As the shell does, with everything that may go wrong on the way. The commands in their order."""
    upcoming = iter(script)
    mishaps = [mishap for exchange in script for mishap in exchange.mishaps]
    chunks: Iterator[bytes] = iter(())
    seen: dict[type[Command], int] = {}
    commands: list[Command] = []
    conversation = converse(request, loop)
    command = next(conversation)
    while True:
        commands.append(command)
        kind = type(command)
        count = seen[kind] = seen.get(kind, -1) + 1
        answer: Any = True if kind is Relay else None
        if kind is Send:
            exchange = next(upcoming)
            answer, chunks = exchange.head, iter(exchange.chunks)
        elif kind is Receive:
            answer = next(chunks, b"")
        elif isinstance(command, CallTools):
            answer = Answers((FOUND,) * len(command.calls))
        for mishap in mishaps:
            if (mishap.command, mishap.at) == (kind, count):
                answer = mishap.answer
        try:
            command = conversation.throw(answer) if isinstance(answer, Exception) else conversation.send(answer)
        except StopIteration:
            return commands


def check_order(commands: Sequence[Command]) -> None:
    """One start, one record, one end; an answer of ours comes after it, bytes come after the response's beginning."""
    kinds = [type(command) for command in commands]
    assert kinds[0] is Send
    for once in (Send, Record, End):
        assert kinds.count(once) == 1
    assert kinds.count(Respond) <= 1
    assert kinds.index(Record) + 1 == kinds.index(End)
    if Relay in kinds:
        assert kinds.index(Respond) < kinds.index(Relay)
    if Abort in kinds:
        assert kinds.index(End) < kinds.index(Abort) == len(kinds) - 1


def check_facts(facts: ResponseFacts) -> None:
    """What a database can hold: counts in its range, text in UTF-8, JSON that is JSON."""
    if facts.usage is not None:
        counters = [getattr(facts.usage, name) for name in facts.usage.__struct_fields__ if name != "raw"]
        assert all(counter is None or 0 <= counter <= MAX_INTEGER for counter in counters)
        if facts.usage.raw is not None:
            assert isinstance(json.loads(facts.usage.raw.decode("utf-8", "replace")), dict)
    strings = [facts.response_id, facts.model, facts.stop_reason, facts.error, *facts.notes]
    for call in facts.tool_calls:
        strings += [call.id, call.name, call.input]
        json.dumps(dict(call.details))
    for thought in facts.thoughts:
        strings.append(thought.content)
        json.dumps(dict(thought.details))
    for string in strings:
        assert string is None or isinstance(string.encode(), bytes)


def check_event(event: bytes) -> None:
    """Our own error is one event, which any client can read."""
    (frame,) = SseDecoder().feed(event)
    assert frame.raw == event
    assert frame.data is not None
    assert isinstance(json.loads(frame.data.decode("utf-8", "replace")), dict)


@pytest.mark.parametrize(("form", "stream"), CASES)
def test_exchanges(form: str, stream: bool) -> None:
    request = FORMATS[form].parse(b'{"model":"m","stream":true}' if stream else b'{"model":"m"}')

    @FUZZ
    @given(exchanges(bodies(form, stream), stream))
    def check(exchange: Exchange) -> None:
        commands = carry_out(request, exchange)
        check_order(commands)
        (record,) = [command for command in commands if isinstance(command, Record)]
        check_facts(record.facts)
        (end,) = [command for command in commands if isinstance(command, End)]
        relayed = b"".join(command.data for command in commands if isinstance(command, Relay))
        responded = [command.status for command in commands if isinstance(command, Respond)]
        if responded == [exchange.head.status] and not exchange.mishaps:
            expected = b"" if exchange.head.bodiless else exchange.body
            if end.status == "completed":
                assert relayed == expected
            elif Abort() in commands:
                assert expected.startswith(relayed)
            else:
                assert relayed.startswith(expected)

    check()


@each_dialect
@both_ways
def test_exchanges_with_injected_tools(dialect: Dialect, stream: bool) -> None:
    """Nothing is raised, each request is recorded, and what is remembered can be put back into a later one."""
    form = FORMATS[dialect.format]
    body = dialect.request(stream=stream, tools=["mine"])
    loop = Loop(Toolset([TOOL]), form.turns.read(body), max_turns=3)
    request = form.parse(form.turns.with_tools(body, loop.toolset))
    said = exchanges(turns(dialect, stream) | bodies(dialect.format, stream), stream)
    replayed = [item for one in TURNS for item in dialect.appended(one, [(call.id, "found", False) for call in one.calls])]
    later = form.turns.read(dialect.request([QUESTION, *replayed]))

    @FUZZ
    @given(st.lists(said, min_size=3, max_size=3))
    def check(script: Sequence[Exchange]) -> None:
        commands = carry_out(structs.replace(request, has_tools=True), *script, loop=loop)
        kinds = [type(command) for command in commands]
        assert kinds.count(Send) == kinds.count(Record) <= 3
        assert kinds.count(End) == 1
        for command in commands:
            if isinstance(command, Record):
                check_facts(command.facts)
            elif isinstance(command, Remember):
                assert later.restored(dict.fromkeys(later.keys, command.memory)).body

    check()


@pytest.mark.parametrize("form", FORMATS)
def test_reading_does_not_depend_on_the_split(form: str) -> None:
    """And the observer can be asked at any time."""

    @FUZZ
    @given(exchanges(bodies(form, stream=True), stream=True))
    def check(exchange: Exchange) -> None:
        head = ResponseHead(200, [field for field in exchange.head.headers if field[0] == b"content-encoding"])
        try:
            decode(head.coding, exchange.body)
        except CodingError:
            return  # how much comes out before that is noticed does depend on the split
        seen = []
        for chunks in ([exchange.body], exchange.chunks):
            observer = Observer(FORMATS[form].reader(), head, stream=True)
            for chunk in chunks:
                observer.feed(chunk)
                check_facts(observer.facts(cut=True))
            observer.end()
            check_event(observer.error_event(502, 'Cut "\n" off.'))
            facts = observer.facts(cut=False)
            check_facts(facts)
            seen.append((facts, observer.finished, observer.ends_at_eof))
        assert seen[0] == seen[1]

    check()


def check_parse(form: WireFormat, body: bytes, coding: str) -> Request | None:
    try:
        request = form.parse(body, coding)
    except BadRequest:
        return None
    assert request.body == body
    facts = request.facts
    for string in (facts.model, facts.prompt, facts.session_id, facts.correlating_tool_call_id, *facts.notes):
        assert string is None or isinstance(string.encode(), bytes)
    return request


@pytest.mark.parametrize("form", FORMATS)
def test_requests(form: str) -> None:
    @FUZZ
    @given(requests(form), st.sampled_from(CODINGS) | st.just(""), st.booleans())
    def check(body: bytes, coding: str, encoded: bool) -> None:
        if encoded and coding in ENCODERS:
            body = ENCODERS[coding](body)
        request = check_parse(FORMATS[form], body, coding)
        if request is not None:
            asking = FORMATS[form].asking_for_usage(request)
            assert (asking.body == body) is not asking.hides_usage
            if asking.hides_usage:
                assert json.loads(asking.body.decode("utf-8", "replace"))["stream_options"]["include_usage"] is True

    check()


def test_edited_streams() -> None:
    """Where usage is hidden: whatever the stream, nothing is raised and no event of another kind is lost."""
    request = CHAT.asking_for_usage(CHAT.parse(b'{"stream":true}'))

    @FUZZ
    @given(exchanges(bodies("chat", stream=True), stream=True))
    def check(exchange: Exchange) -> None:
        commands = carry_out(request, exchange)
        check_order(commands)
        if exchange.head.coding or exchange.mishaps or exchange.head.status != 200:
            return
        relayed = b"".join(command.data for command in commands if isinstance(command, Relay))
        kept = [frame.raw for frame in SseDecoder().feed(exchange.body) if b"usage" not in frame.raw]
        shown = {frame.raw for frame in SseDecoder().feed(relayed)}
        assert exchange.head.bodiless or shown.issuperset(kept) or Abort() in commands

    check()
