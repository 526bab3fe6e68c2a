"""A crowd of clients at a gateway, a provider that answers all of them, and what each client saw.

Every response has an id of its own, so that what a client saw can be looked up in the ledger. A client that has a
response's last event, or its whole body, has seen it complete, whatever becomes of the connection then.
"""

import asyncio
import itertools
import json
import random
import re
import sqlite3
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from .provider import Gate, Received, Reply, Step, Wait
from .rawclient import RawClient

_AFTER_REFUSAL_SECONDS: Final = 0.05
_LAST_EVENTS: Final = (b'event: message_stop\ndata: {"type":"message_stop"}\n\n', b"data: [DONE]\n\n")
_NUMBERS: Final = itertools.count(1)

Request = tuple[str, bytes]
"""Path and body."""


def _body(**members: Any) -> bytes:
    question = [{"role": "user", "content": "How many?"}]
    return json.dumps({"model": "some-model", "max_tokens": 100, "messages": question, **members}).encode()


MESSAGES_STREAM: Final = ("/anthropic/v1/messages", _body(stream=True))
MESSAGES: Final = ("/anthropic/v1/messages", _body())
CHAT_STREAM: Final = ("/openai/v1/chat/completions", _body(stream=True))
ANY: Final = (MESSAGES_STREAM, MESSAGES, CHAT_STREAM)


def answer(received: Received) -> Reply:
    """The provider's handler: an answer with an id of its own, in the form that was asked for."""
    return gated(received, None)


def gated(received: Received, gate: Gate | None) -> Reply:
    """As `answer`; a stream waits in its middle until the gate opens."""
    number = next(_NUMBERS)
    waiting: list[Step] = [Wait(gate)] if gate else []
    if received.path.endswith("/messages"):
        message = {"id": f"msg_{number}", "type": "message", "role": "assistant", "model": "some-model", "content": []}
        if not received.json().get("stream"):
            return Reply.json(message | {"stop_reason": "end_turn", "usage": {"input_tokens": 5, "output_tokens": 7}})
        events: list[dict[str, Any]] = [
            {"type": "message_start", "message": message | {"usage": {"input_tokens": 5, "output_tokens": 1}}},
            {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
            *({"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "word "}},) * 5,
            {"type": "content_block_stop", "index": 0},
            {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 7}},
            {"type": "message_stop"},
        ]
        steps = [f"event: {event['type']}\ndata: {_compact(event)}\n\n".encode() for event in events]
    else:
        chunk = {"id": f"chatcmpl_{number}", "object": "chat.completion.chunk", "model": "some-model"}
        word = {"index": 0, "delta": {"content": "word "}, "finish_reason": None}
        counted = {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12}
        chunks = [
            *(chunk | {"choices": [word]},) * 5,
            chunk | {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]},
            chunk | {"choices": [], "usage": counted},
        ]
        steps = [*(b"data: " + _compact(one).encode() + b"\n\n" for one in chunks), b"data: [DONE]\n\n"]
    return Reply.stream([*steps[:3], *waiting, *steps[3:]])


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


@dataclass(frozen=True, slots=True)
class Seen:
    """What a client saw of one response; `status` is None where there was none."""

    status: int | None
    body: bytes
    complete: bool

    @property
    def response_id(self) -> str:
        """The id in the body. Raises ValueError where there is none."""
        _, found, rest = self.body.partition(b'"id":')
        if not found:
            raise ValueError(self.body)
        return rest.split(b'"')[1].decode()


async def ask(url: str, request: Request, headers: Sequence[tuple[str, str]] = ()) -> Seen:
    """Send one request on a connection of its own. The connection, or the server, may die at any moment."""
    path, body = request
    status, received, whole = None, b"", False
    try:
        async with RawClient(url) as client:
            await client.send("POST", path, [("Content-Type", "application/json"), *headers], body)
            status = (await client.head()).status
            received, whole = await client.rest()
    except (OSError, EOFError):
        pass  # a broken-off body is no exception; this is a connection that did not come to a response
    streams = b'"stream": true' in body
    return Seen(status, received, received.endswith(_LAST_EVENTS) if streams and status == 200 else whole)


@dataclass
class Crowd:
    """Clients that ask again as soon as they have their answer, until they are told to go or the server has gone."""

    url: str
    seed: int = 0
    requests: Sequence[Request] = ANY
    seen: list[Seen] = field(default_factory=list)
    on_complete: Callable[[], None] = lambda: None
    _leaving: bool = False

    @property
    def complete(self) -> list[Seen]:
        """What was seen complete, refusals excluded."""
        return [one for one in self.seen if one.complete and one.status == 200]

    async def run(self, clients: int) -> None:
        """Ask, with that many clients at once."""
        await asyncio.gather(*(self._client(random.Random(self.seed * 1000 + n)) for n in range(clients)))

    def leave(self) -> None:
        """Let every client finish what it has begun."""
        self._leaving = True

    async def _client(self, choice: random.Random) -> None:
        while not self._leaving:
            one = await ask(self.url, choice.choice(self.requests))
            self.seen.append(one)
            if one.status is None:
                return
            if one.complete and one.status == 200:
                self.on_complete()
            elif one.status == 503:  # who asks again at once, as no real client does, uses up the ports of the machine
                await asyncio.sleep(_AFTER_REFUSAL_SECONDS)


class Regulars:
    """Clients that go on while gateways come and go: some keep their connections, the others come on a new one each time.

    One that is refused a connection comes back; whatever else goes wrong is a failure. As the pools of real clients do, they
    look whether the server has closed a connection before they use it again, and leave one whose last response says so.
    """

    def __init__(self, url: str, *, seed: int = 0, requests: Sequence[Request] = ANY) -> None:
        self.seen: list[Seen] = []
        self.failures: list[str] = []
        self.refused = 0
        self.kept = 0
        """How many requests went over a connection that had been used before."""
        self._url = url
        self._seed = seed
        self._requests = requests
        self._leaving = asyncio.Event()

    @asynccontextmanager
    async def __call__(self, clients: int) -> AsyncIterator["Regulars"]:
        """That many clients, half of which keep their connections. At the end each finishes what it has begun."""
        async with asyncio.TaskGroup() as group:
            for number in range(clients):
                choice = random.Random(self._seed * 1000 + number)
                group.create_task(self._keep(choice) if number % 2 else self._come_anew(choice))
            try:
                await self.go_on(clients)
                yield self
            finally:
                self._leaving.set()

    async def go_on(self, count: int) -> None:
        """Return when that many more responses have come."""
        target = len(self.seen) + count
        await until(lambda: len(self.seen) >= target or bool(self.failures), "they are stuck", 60.0)

    async def _come_anew(self, choice: random.Random) -> None:
        while not self._leaving.is_set():
            await self._visit(choice, last=True)

    async def _keep(self, choice: random.Random) -> None:
        while not self._leaving.is_set():
            await self._visit(choice, last=False)

    async def _visit(self, choice: random.Random, *, last: bool) -> None:
        """One connection."""
        try:
            client = await RawClient(self._url).__aenter__()
        except ConnectionRefusedError:
            self.refused += 1
            await asyncio.sleep(0.05)
            return
        used = 0
        try:
            while not (client.ended or self._leaving.is_set()):
                closes = await self._ask(client, choice.choice(self._requests), last=last)
                self.kept += used > 0
                used += 1
                if closes:
                    return
                await asyncio.sleep(choice.uniform(0, 0.1))
        except (OSError, EOFError) as error:  # TimeoutError among them
            self.failures.append(f"request {used} of a connection: {error!r}")
        finally:
            await client.leave()

    async def _ask(self, client: RawClient, request: Request, *, last: bool) -> bool:
        """Ask, and answer whether this was the last response of the connection."""
        path, body = request
        headers = [("Content-Type", "application/json"), *([("Connection", "close")] if last else [])]
        await client.send("POST", path, headers, body)
        head = await client.head()
        received, whole = await client.rest()
        complete = received.endswith(_LAST_EVENTS) if b'"stream": true' in body else whole
        if head.status != 200 or not (complete and whole):
            self.failures.append(f"status {head.status}, {'whole' if whole else 'broken off'}: {received[-200:]!r}")
        self.seen.append(Seen(head.status, received, complete))
        return head.get("connection") == "close"


@dataclass(frozen=True)
class Ledger:
    """The database as it is."""

    statuses: Counter[str]
    completed: Counter[str]
    """By the provider's id, how many complete usage rows there are that belong to a completed interception."""
    counts: dict[str, int]


def ledger(path: Path) -> Ledger:
    with closing(sqlite3.connect(path, timeout=10)) as database:
        tables = ("interceptions", "token_usages", "user_prompts")
        return Ledger(
            Counter(dict(database.execute("SELECT status, count(*) FROM aibridge_interceptions GROUP BY status"))),
            Counter(
                dict(
                    database.execute(
                        "SELECT provider_response_id, count(*) FROM aibridge_token_usages usage"
                        " JOIN aibridge_interceptions interception ON interception.id = usage.interception_id"
                        " WHERE interception.status = 'completed' AND usage.completeness = 'complete'"
                        " AND usage.input_tokens = 5 AND usage.output_tokens = 7 GROUP BY provider_response_id"
                    )
                )
            ),
            {name: database.execute(f"SELECT count(*) FROM aibridge_{name}").fetchone()[0] for name in tables},
        )


def assert_nothing_is_missing(seen: Sequence[Seen], path: Path) -> None:
    """Each response that a client saw complete is in the database: once, with its usage, as completed."""
    found = ledger(path).completed
    missing = [one.response_id for one in seen if found[one.response_id] != 1]
    assert not missing, f"{len(missing)} of {len(seen)} responses are not in the ledger exactly once: {missing[:10]}"


def spooled(path: Path) -> int:
    """Bytes that wait in the spool files beside a database."""
    return sum(file.stat().st_size for file in path.with_name(f"{path.name}-spool").glob("*.jsonl"))


async def lost(url: str) -> Counter[str]:
    """The loss counter, by kind of record. Kinds of which none was lost are not in it."""
    return await _counted(url, "aibridge_records_lost_total", "kind")


async def refusals(url: str) -> Counter[str]:
    """What the gateway has refused, by reason."""
    return await _counted(url, "aibridge_refusals_total", "reason")


async def _counted(url: str, metric: str, label: str) -> Counter[str]:
    async with RawClient(url) as client:
        text = (await client.request("GET", "/metrics")).body.decode()
    counts: Counter[str] = Counter()
    for line in text.splitlines():
        found = re.fullmatch(rf'{metric}\{{.*{label}="([^"]*)".*\}} (\S+)', line)
        if found is not None:
            counts[found[1]] += int(float(found[2]))
    return +counts


async def until(condition: Callable[[], bool], what: str, seconds: float = 20.0) -> None:
    """Return when the condition holds; raise TimeoutError when it does not come to that."""
    try:
        async with asyncio.timeout(seconds):
            while not condition():
                await asyncio.sleep(0.005)
    except TimeoutError:
        raise TimeoutError(what) from None
