"""Calls of providers: what observers are told of them, breakers and retries, through a whole bridge.

Truth: issue 5 (circuit breakers, retries: "never after a tool ran in that hop"), `aibridge.events` for what follows on what,
wire.md A10 and B2 for the shape of errors. The clock of breakers is the test's own.
"""

import asyncio
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import chain, repeat
from types import SimpleNamespace
from typing import Any

import pytest

from aibridge import MemoryRecorder, Provider, RequestBridge, as_actor
from aibridge.breakers import FAILURES, BreakerRules, Breakers
from aibridge.calling import Caller, Purpose
from aibridge.errors import Unfinished, Unreachable, Unsendable, UpstreamError, UpstreamTimeout
from aibridge.events import (
    BreakerChanged,
    BreakerRejected,
    CallAnswered,
    CallBegan,
    CallEnded,
    Committed,
    Event,
    PassedThrough,
    Retried,
)
from aibridge.history import MemoryHistory
from aibridge.injection import Injection
from aibridge.limits import Limits
from aibridge.records import Interception, InterceptionEnded, TokenUsage
from aibridge.retries import RetryRules
from aibridge.toolbox import MemoryToolbox
from aibridge.upstream import MemoryResponse, MemoryUpstream, Upstream, UpstreamRequest, UpstreamResponse
from aibridge.wire.base import Headers
from aibridge.wire.observer import ResponseHead
from tests.serving import ALICE, Call, call, scope
from tests.support.provider import WAIT_SECONDS, Gate

PATH = "/anthropic/v1/messages"
ANSWER = b'{"id":"msg_1","type":"message","content":[],"usage":{"input_tokens":1,"output_tokens":2}}'
AT_ONCE = RetryRules(attempts=2, statuses=frozenset({429, 503}), max_delay=0.001)
BREAKER = BreakerRules(FAILURES["anthropic"], threshold=3, open_seconds=30)
QUICK = BreakerRules(frozenset({503}), threshold=1)

Said = int | UpstreamError | tuple[int, Mapping[bytes, bytes]]


def asking(model: str = "m", **members: Any) -> bytes:
    return json.dumps({"model": model, "messages": [{"role": "user", "content": "hi"}], **members}).encode()


def response(said: Said) -> MemoryResponse:
    if isinstance(said, UpstreamError):
        raise said
    status, headers = said if isinstance(said, tuple) else (said, {})
    body = ANSWER if status == 200 else b'{"type":"error","error":{"type":"x","message":"No."}}'
    fields = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)), *headers.items()]
    return MemoryResponse(ResponseHead(status, fields), [body])


class Stage:
    """A bridge whose provider says one thing after the other, and the last one for ever."""

    def __init__(self, *script: Said, upstream: Upstream | None = None, bridge: Any = None, **rules: Any) -> None:
        said = iter(chain(script, repeat(script[-1] if script else 200)))
        self.memory = MemoryUpstream(lambda _: response(next(said)))
        self.recorder = MemoryRecorder()
        self.events: list[Event] = []
        self.bridge = RequestBridge(
            [replace(Provider.anthropic(), **rules), replace(Provider.openai(), **rules)],
            self.recorder,
            observers=[self.events.append],
            upstream=self.memory if upstream is None else upstream,
            **(bridge or {}),
        )

    def begin(self, path: str = PATH, body: bytes | None = None) -> Call:
        return Call(self.bridge, as_actor(scope("POST", path), ALICE), [asking() if body is None else body])

    async def ask(self, model: str = "m", path: str = PATH) -> Call:
        return await self.begin(path, asking(model)).over()

    def told(self, *kinds: type[Any]) -> list[Any]:
        return [event for event in self.events if isinstance(event, kinds)]

    async def tells(self, kind: type[Any]) -> None:
        async with asyncio.timeout(WAIT_SECONDS):
            while not self.told(kind):
                await asyncio.sleep(0)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The time as calls see it; `now` moves it."""
    found = SimpleNamespace(now=1000.0, time=lambda: 1445412400.0)
    found.monotonic = lambda: found.now
    monkeypatch.setattr("aibridge.calling.time", found)
    return found


# ---- what observers are told ----


async def test_a_call_is_told_from_beginning_to_end() -> None:
    stage = Stage(200)
    await stage.ask()
    kinds = [type(event) for event in stage.events if not isinstance(event, PassedThrough)]
    assert [kind.__name__ for kind in kinds] == [
        *("Interception", "CallBegan", "CallAnswered", "PromptUsage", "TokenUsage", "CallEnded"),
        *("Committed", "InterceptionEnded"),
    ]
    (identity,) = [event.id for event in stage.told(Interception)]
    (began,) = stage.told(CallBegan)
    url = "https://api.anthropic.com/v1/messages"
    assert began == CallBegan(identity, "anthropic", "/v1/messages", "m", url, hop=1, attempt=1)
    (answered,) = stage.told(CallAnswered)
    assert (answered.interception_id, answered.http_status, answered.error) == (identity, 200, None)
    assert answered.seconds >= 0
    assert stage.told(CallEnded) == [CallEnded(identity, "anthropic")]
    (committed,) = stage.told(Committed)
    assert committed.interception_id == identity and committed.seconds >= 0


class Stalls(MemoryResponse):
    """A response that begins, and then says nothing more."""

    async def read(self) -> bytes:
        return await super().read() or await asyncio.Event().wait()  # type: ignore[return-value]


def stalling() -> MemoryResponse:
    return Stalls(ResponseHead(200, [(b"content-type", b"text/event-stream")]), [b"event: ping\n\n"])


def foreign() -> UpstreamResponse:
    raise ZeroDivisionError


class Silent(MemoryUpstream):
    """Never answers."""

    async def send(self, request: UpstreamRequest) -> UpstreamResponse:
        self.requests.append(request)
        await asyncio.Event().wait()
        raise AssertionError


async def leaves(running: Call, _: RequestBridge) -> None:
    running.leave()


async def is_cancelled(running: Call, _: RequestBridge) -> None:
    running.task.cancel()


async def ends(_: Call, bridge: RequestBridge) -> None:
    await bridge.__aexit__(None, None, None)


@pytest.mark.parametrize("event", [leaves, is_cancelled, ends])
@pytest.mark.parametrize("begun", [False, True], ids=["before the answer", "within the answer"])
async def test_whatever_ends_a_call_its_end_is_told_once(event: Callable[..., Any], begun: bool) -> None:
    stage = Stage(upstream=MemoryUpstream(lambda _: stalling()) if begun else Silent(lambda _: stalling()))
    running = stage.begin()
    await (running.started.wait() if begun else stage.tells(CallBegan))
    await event(running, stage.bridge)
    await running.over()
    told = stage.told(CallBegan, CallAnswered, CallEnded)
    assert [type(event) for event in told] == [CallBegan, CallAnswered, CallEnded]
    assert (told[1].http_status, told[1].error) == ((200, None) if begun else (None, "The call was given up."))


async def test_a_foreign_error_is_told_without_its_words() -> None:
    stage = Stage(upstream=MemoryUpstream(lambda _: foreign()), breaker=BREAKER)
    with pytest.raises(ZeroDivisionError):
        await stage.ask()
    told = stage.told(CallBegan, CallAnswered, CallEnded)
    assert [type(event) for event in told] == [CallBegan, CallAnswered, CallEnded]
    assert told[1].error == "The call was given up."


# ---- breakers ----


async def test_the_life_of_a_breaker(clock: SimpleNamespace) -> None:
    stage = Stage(503, 529, UpstreamTimeout("late"), 200, breaker=BREAKER)
    assert [(await stage.ask()).status for _ in range(3)] == [503, 529, 504]
    key = ("anthropic", "/v1/messages", "m")
    assert stage.told(BreakerChanged) == [BreakerChanged(*key, "open")]

    clock.now += 10.5
    rejected = await stage.ask()
    message = "The provider has failed several times in a row and is given a rest."
    assert rejected.status == 503 and dict(rejected.headers)[b"retry-after"] == b"20"
    assert rejected.json() == {"type": "error", "error": {"type": "api_error", "message": message}}
    assert len(stage.memory.requests) == 3, "nothing was sent"
    assert stage.told(BreakerRejected) == [BreakerRejected(*key)]
    assert (await stage.ask("another")).status == 200, "another model is well"
    ended = stage.recorder.ended[3]
    assert (ended.status, ended.http_status, ended.error) == ("failed", 503, message)
    assert not [one for one in stage.recorder.token_usages if one.interception_id == ended.interception_id]

    clock.now += 20
    assert (await stage.ask()).status == 200
    assert [event.state for event in stage.told(BreakerChanged)] == ["open", "half_open", "closed"]


async def test_the_openai_shape() -> None:
    stage = Stage(503, breaker=QUICK)
    for path in ("/openai/v1/chat/completions", "/openai/v1/responses"):
        assert (await stage.ask(path=path)).status == 503
        rejected = await stage.ask(path=path)
        assert rejected.json()["error"]["type"] == "server_error" and rejected.status == 503
        assert 1 <= int(dict(rejected.headers)[b"retry-after"]) <= 30
    assert len(stage.memory.requests) == 2


async def test_probes_are_limited(clock: SimpleNamespace) -> None:
    gate = Gate()

    class Slow(MemoryUpstream):
        async def send(self, request: UpstreamRequest) -> UpstreamResponse:
            if len(self.requests) == 1:
                self.requests.append(request)
                await gate.wait()
            return await super().send(request)

    statuses = iter((503, 200, 200))
    slow = Slow(lambda _: response(next(statuses)))
    stage = Stage(upstream=slow, breaker=QUICK)
    await stage.ask()
    clock.now += 30
    probe = stage.begin()
    async with asyncio.timeout(WAIT_SECONDS):
        while len(slow.requests) < 2:
            await asyncio.sleep(0)
    assert (await stage.ask()).status == 503 and len(slow.requests) == 2
    gate.set()
    assert (await probe.over()).status == 200
    assert (await stage.ask()).status == 200


async def test_the_probe_of_a_client_that_left_is_given_back(clock: SimpleNamespace) -> None:
    silent = Silent(lambda _: response(503))
    answering = MemoryUpstream(lambda _: response(503))

    class Changing:
        now: MemoryUpstream = answering

        async def send(self, request: UpstreamRequest) -> UpstreamResponse:
            return await self.now.send(request)

        async def aclose(self) -> None:
            """There is nothing to close."""

    upstream = Changing()
    stage = Stage(upstream=upstream, breaker=QUICK)
    await stage.ask()
    clock.now += 30
    upstream.now = silent
    leaving = stage.begin()
    async with asyncio.timeout(WAIT_SECONDS):
        while not silent.requests:
            await asyncio.sleep(0)
    leaving.leave()
    await leaving.over()
    upstream.now = MemoryUpstream(lambda _: response(200))
    assert (await stage.ask()).status == 200
    assert [event.state for event in stage.told(BreakerChanged)] == ["open", "half_open", "closed"]


@pytest.mark.parametrize("said", [429, 401, 400, 500, Unsendable("not like this"), Unfinished("not so much")])
async def test_one_users_trouble_trips_nothing(said: Said) -> None:
    stage = Stage(*[said] * 10, 200, breaker=QUICK)
    for _ in range(10):
        assert (await stage.ask()).status != 200
    assert (await stage.ask()).status == 200 and not stage.told(BreakerChanged)


@pytest.mark.parametrize("error", [Unreachable("refused"), UpstreamTimeout("late"), UpstreamError("reset")])
async def test_no_answer_trips(error: UpstreamError) -> None:
    stage = Stage(error, breaker=QUICK)
    await stage.ask()
    assert [event.state for event in stage.told(BreakerChanged)] == ["open"]


async def test_the_provider_asks_for_a_longer_rest(clock: SimpleNamespace) -> None:
    for field in (b"90", b"Wed, 21 Oct 2015 07:28:10 GMT"):
        stage = Stage((503, {b"retry-after": field}), breaker=QUICK)
        assert dict((await stage.ask()).headers)[b"retry-after"] == field
        assert dict((await stage.ask()).headers)[b"retry-after"] == b"90"


async def test_passthrough_has_breakers_too() -> None:
    stage = Stage(503, breaker=QUICK)
    for status in (503, 503):
        answer = await call(stage.bridge, scope("GET", "/anthropic/v1/models/a"))
        assert answer.status == status
    assert len(stage.memory.requests) == 1
    assert stage.told(BreakerRejected) == [BreakerRejected("anthropic", "/v1/models/{id}", None)]
    assert (await stage.ask()).status == 503 and len(stage.memory.requests) == 2, "another route is asked"


async def test_a_bridge_that_is_reconfigured_keeps_its_breakers() -> None:
    stage = Stage(503, breaker=QUICK)
    await stage.ask()
    provider = replace(Provider.anthropic(), breaker=QUICK)
    await stage.bridge.reconfigure([provider], injection=None, limits=Limits())
    assert (await stage.ask()).status == 503 and len(stage.memory.requests) == 1
    await stage.bridge.reconfigure([Provider.anthropic()], injection=None, limits=Limits())
    assert [event.state for event in stage.told(BreakerChanged)] == ["open", "closed"], "it has none any more"
    await stage.ask()
    assert len(stage.memory.requests) == 2


async def test_a_request_of_an_earlier_configuration_leaves_no_breaker_behind() -> None:
    """One that is taken away while a request waits to be sent again, which asks for leave by the old rules."""
    waiting, go_on = Gate(), Gate()

    class Waits(MemoryUpstream):
        async def send(self, request: UpstreamRequest) -> UpstreamResponse:
            waiting.set()
            await go_on.wait()
            return await super().send(request)

    stage = Stage(upstream=Waits(lambda _: response(503)), breaker=QUICK, retries=AT_ONCE)
    asking = stage.begin()
    await waiting.wait()
    await stage.bridge.reconfigure([Provider.anthropic()], injection=None, limits=Limits())
    go_on.set()
    assert (await asking.over()).status == 503
    async with asyncio.timeout(WAIT_SECONDS):  # the generation is closed behind the response
        while [event.state for event in stage.told(BreakerChanged)] != ["open", "closed"]:
            await asyncio.sleep(0)


# ---- retries ----


async def test_a_breaker_that_opens_during_the_back_off_has_nothing_better_to_say() -> None:
    upstream = MemoryUpstream(lambda _: response(Unreachable("refused")))
    provider = replace(Provider.anthropic(), breaker=BreakerRules(frozenset({503}), threshold=2), retries=AT_ONCE)
    caller = Caller(provider, upstream, [], Breakers(lambda *_: None))
    request, purpose, sent = UpstreamRequest("POST", "http://x/", [], b""), Purpose("/v1/messages"), list[int]()

    async def another_fails(_: float) -> None:
        with pytest.raises(Unreachable):
            await caller.call(request, purpose)

    with pytest.raises(Unreachable, match="refused"):
        await caller.call(request, purpose, another_fails, sent.append)
    assert sent == [1] and len(upstream.requests) == 2


async def test_none_by_default() -> None:
    for said in (503, Unreachable("refused")):
        stage = Stage(said, 200)
        assert (await stage.ask()).status in (502, 503)
        assert len(stage.memory.requests) == 1


async def test_what_the_provider_cannot_have_accepted_is_sent_again() -> None:
    stage = Stage(Unreachable("refused"), Unfinished("closed"), 200, retries=AT_ONCE)
    answer = await stage.ask()
    assert (answer.status, answer.body) == (200, ANSWER)
    assert [(event.hop, event.attempt) for event in stage.told(CallBegan)] == [(1, 1), (1, 2), (1, 3)]
    assert [event.reason for event in stage.told(Retried)] == ["connection", "connection"]
    assert len(stage.told(CallEnded)) == len(stage.told(CallAnswered)) == 3
    (usage,) = stage.recorder.token_usages
    assert usage.metadata["notes"] == ("(3 attempts)",)
    assert [one.status for one in stage.recorder.ended] == ["completed"]
    assert len({request.body for request in stage.memory.requests}) == 1


async def test_a_chosen_status_is_tried_again() -> None:
    stage = Stage(503, 429, 200, retries=AT_ONCE)
    assert (await stage.ask()).status == 200
    assert [event.reason for event in stage.told(Retried)] == ["503", "429"]


async def test_the_last_answer_reaches_the_client() -> None:
    stage = Stage(503, 503, (429, {b"x-last": b"1"}), retries=AT_ONCE)
    answer = await stage.ask()
    assert answer.status == 429 and dict(answer.headers)[b"x-last"] == b"1"
    (ended,) = stage.recorder.ended
    assert (ended.status, ended.error) == ("failed", "x: No. (3 attempts)")
    assert not stage.recorder.token_usages


@pytest.mark.parametrize("said", [500, 400, UpstreamError("reset"), UpstreamTimeout("late"), Unsendable("odd")])
async def test_what_may_have_been_accepted_is_not_sent_again(said: Said) -> None:
    stage = Stage(said, 200, retries=AT_ONCE)
    assert (await stage.ask()).status != 200
    assert len(stage.memory.requests) == 1 and not stage.told(Retried)


async def test_retry_after_is_obeyed() -> None:
    rules = RetryRules(attempts=1, statuses=frozenset({429}), max_delay=0.05)
    stage = Stage((429, {b"retry-after": b"0.04"}), 200, retries=rules)
    assert (await stage.ask()).status == 200
    (retried,) = stage.told(Retried)
    assert 0.04 <= retried.seconds <= 0.05
    stage = Stage((429, {b"retry-after": b"1"}), 200, retries=rules)
    answer = await stage.ask()
    assert answer.status == 429 and dict(answer.headers)[b"retry-after"] == b"1", "the client had better know"
    assert len(stage.memory.requests) == 1


async def test_the_response_that_is_given_up_is_let_go_of() -> None:
    given: list[MemoryResponse] = []

    def answer(_: UpstreamRequest) -> UpstreamResponse:
        given.append(response(503 if not given else 200))
        return given[-1]

    stage = Stage(upstream=MemoryUpstream(answer), retries=AT_ONCE)
    await stage.ask()
    assert [one.closed for one in given] == [True, True]


async def test_what_is_given_up_is_read_to_its_end_if_that_is_near() -> None:
    """Some of it: what goes on and on is let go of, and nobody waits for it (our choice: up to 64 KB)."""
    taken: list[int] = []

    def endless() -> Iterator[bytes]:
        for number in range(1000):
            taken.append(number)
            yield bytes(10_000)

    answers: list[MemoryResponse] = [MemoryResponse(ResponseHead(503, []), endless()), response(200)]
    said = iter(answers)
    soon = RetryRules(attempts=1, statuses=frozenset({503}), max_delay=0.2)
    stage = Stage(upstream=MemoryUpstream(lambda _: next(said)), retries=soon)
    assert (await stage.ask()).status == 200
    assert len(taken) == 7 and answers[0].closed
    assert [type(event) for event in stage.told(CallBegan, CallEnded, Retried)] == [
        *(CallBegan, CallEnded, Retried),
        *(CallBegan, CallEnded),
    ]


async def test_nobody_waits_for_the_rest_of_what_is_given_up() -> None:
    read = Gate()

    class Stalls(MemoryResponse):
        async def read(self) -> bytes:
            read.set()
            await asyncio.Event().wait()
            return b""

    stalling = Stalls(ResponseHead(503, []))
    said = iter([stalling, response(200)])
    stage = Stage(upstream=MemoryUpstream(lambda _: next(said)), retries=AT_ONCE)
    async with asyncio.timeout(WAIT_SECONDS):
        assert (await stage.ask()).status == 200
    assert read.is_set() and stalling.closed


LATER = RetryRules(attempts=1, statuses=frozenset({503}), max_delay=1000)
WAITING: Said = (503, {b"retry-after": b"900"})


@pytest.mark.parametrize(
    ("event", "status"), [(leaves, "client_disconnected"), (is_cancelled, "interrupted"), (ends, "interrupted")]
)
@pytest.mark.parametrize("on_disconnect", ["cancel", "drain"])
async def test_a_wait_for_another_attempt_ends_at_once(event: Callable[..., Any], status: str, on_disconnect: str) -> None:
    stage = Stage(WAITING, 200, retries=LATER, on_disconnect=on_disconnect)
    running = stage.begin()
    await stage.tells(Retried)
    await event(running, stage.bridge)
    await running.over()
    assert [one.status for one in stage.recorder.ended] == [status]
    assert len(stage.memory.requests) == 1
    assert stage.recorder.token_usages == [], "the provider has refused, and bills nothing"


async def test_nothing_is_tried_again_for_a_client_that_has_left() -> None:
    """With "drain" the answer is awaited for the record; a refusal is one."""
    gate = Gate()

    class Slow(MemoryUpstream):
        async def send(self, request: UpstreamRequest) -> UpstreamResponse:
            await gate.wait()
            return await super().send(request)

    slow = Slow(lambda _: response(503))
    stage = Stage(upstream=slow, retries=AT_ONCE, on_disconnect="drain")
    running = stage.begin()
    await stage.tells(CallBegan)
    running.leave()
    async with asyncio.timeout(WAIT_SECONDS):
        while not running._messages.empty():
            await asyncio.sleep(0)
    await asyncio.sleep(0)
    gate.set()
    await running.over()
    assert len(slow.requests) == 1
    assert [one.status for one in stage.recorder.ended] == ["client_disconnected"]
    assert stage.recorder.token_usages == []


async def test_the_breaker_is_told_of_every_attempt() -> None:
    """And once it is open nobody insists: the provider's own words go to the client."""
    stage = Stage(503, breaker=BreakerRules(frozenset({503}), threshold=2), retries=AT_ONCE)
    answer = await stage.ask()
    assert (answer.status, answer.json()["error"]["message"]) == (503, "No.")
    assert len(stage.memory.requests) == 2
    assert [event.state for event in stage.told(BreakerChanged)] == ["open"]


async def test_a_passthrough_request_is_tried_again_unless_its_body_was_streamed() -> None:
    stage = Stage(503, 200, retries=AT_ONCE)
    assert (await call(stage.bridge, scope("GET", "/anthropic/v1/models/a"))).status == 200
    (passed,) = stage.told(PassedThrough)
    assert passed.http_status == 200 and len(stage.memory.requests) == 2

    stage = Stage(503, 200, retries=AT_ONCE)
    headers = [(b"content-length", b"2")]
    assert (await call(stage.bridge, scope("POST", "/openai/v1/conversations", headers), b"{}")).status == 503
    assert len(stage.memory.requests) == 1


async def test_a_hop_is_tried_again_and_no_tool_runs_twice() -> None:
    """The second request is refused twice: neither the first one nor its tool is repeated."""
    called: list[Mapping[str, Any]] = []

    async def look(arguments: Mapping[str, Any]) -> str:
        """Looks."""
        called.append(arguments)
        return "found"

    use = {"type": "tool_use", "id": "toolu_1", "name": "bmcp_memory_look", "input": {"for": "it"}}
    first = {"id": "msg_1", "type": "message", "role": "assistant", "content": [use], "stop_reason": "tool_use"}
    last = {**first, "id": "msg_2", "content": [{"type": "text", "text": "So."}], "stop_reason": "end_turn"}
    usage = {"usage": {"input_tokens": 1, "output_tokens": 1}}
    script: Iterator[tuple[int, Any]] = iter([(200, first | usage), (503, {}), (429, {}), (200, last | usage)])

    def answer(_: UpstreamRequest) -> UpstreamResponse:
        status, body = next(script)
        return MemoryResponse(ResponseHead(status, [(b"content-type", b"application/json")]), [json.dumps(body).encode()])

    injection = Injection(MemoryToolbox({"look": look}), MemoryHistory())
    memory = MemoryUpstream(answer)
    stage = Stage(upstream=memory, retries=AT_ONCE, bridge={"injection": injection})
    assert (await stage.begin(body=asking(max_tokens=9)).over()).json()["content"][-1]["text"] == "So."
    assert called == [{"for": "it"}]
    assert [(event.hop, event.attempt) for event in stage.told(CallBegan)] == [(1, 1), (2, 1), (2, 2), (2, 3)]
    assert memory.requests[1].body == memory.requests[2].body == memory.requests[3].body != memory.requests[0].body
    assert [usage.metadata.get("notes") for usage in stage.told(TokenUsage)] == [None, ("(3 attempts)",)]
    assert len(stage.told(Interception)) == len(stage.told(InterceptionEnded)) == 1
    ended = [type(event) for event in stage.events if isinstance(event, CallBegan | CallEnded)]
    assert ended == [CallBegan, CallEnded] * 4, "a call has ended when its tools run"


# ---- hooks ----


class Tracing:
    """A tracer that keeps what it is told, and says which call it is in a header."""

    def __init__(self, *, broken: bool = False) -> None:
        self.journal: list[Any] = []
        self._broken = broken

    def __call__(self, event: Event) -> None:
        self.journal.append(type(event).__name__)

    def arrived(self, interception_id: str, headers: Headers) -> None:
        self.journal.append(("arrived", interception_id, dict(headers).get(b"traceparent")))
        if self._broken:
            raise ZeroDivisionError

    def outgoing(self, interception_id: str, headers: Headers) -> Headers:
        self.journal.append(("outgoing", interception_id))
        if self._broken:
            raise ZeroDivisionError
        return [field for field in headers if field[0] != b"traceparent"] + [(b"traceparent", b"ours")]


async def traced(stage: Stage, path: str = PATH) -> Call:
    return await call(stage.bridge, scope("POST", path, [(b"traceparent", b"theirs")]), asking())


async def test_trace_context_is_carried_through() -> None:
    tracer = Tracing()
    stage = Stage(Unreachable("refused"), 200, retries=AT_ONCE, bridge={"tracer": tracer})
    await traced(stage)
    identity = stage.told(Interception)[0].id
    assert tracer.journal[:3] == [("arrived", identity, b"theirs"), "Interception", "CallBegan"]
    assert tracer.journal[3] == ("outgoing", identity)
    assert tracer.journal.count(("outgoing", identity)) == 2, "for each attempt"
    assert [dict(request.headers)[b"traceparent"] for request in stage.memory.requests] == [b"ours", b"ours"]
    assert tracer.journal[-2:] == ["Committed", "InterceptionEnded"]


async def test_a_start_that_fails_leaves_no_trace() -> None:
    class Failing(MemoryRecorder):
        async def record_interception(self, record: Interception) -> None:
            raise OSError

    tracer = Tracing()
    bridge = RequestBridge(
        [Provider.anthropic()], Failing(), upstream=MemoryUpstream(lambda _: response(200)), tracer=tracer
    )
    assert (await call(bridge, scope("POST", PATH), asking())).status == 503
    assert tracer.journal == ["RecordLost", "Refused"], "but of what has never begun"


async def test_a_tracer_that_fails_harms_nobody(caplog: pytest.LogCaptureFixture) -> None:
    stage = Stage(200, bridge={"tracer": Tracing(broken=True)})
    assert (await traced(stage)).status == 200
    assert dict(stage.memory.requests[0].headers)[b"traceparent"] == b"theirs"
    assert len(caplog.records) == 2


async def test_on_passthrough_routes_the_clients_own_context_goes_through() -> None:
    tracer = Tracing()
    stage = Stage(200, bridge={"tracer": tracer})
    await traced(stage, "/openai/v1/conversations")
    assert dict(stage.memory.requests[0].headers)[b"traceparent"] == b"theirs"
    assert tracer.journal == ["CallBegan", "CallAnswered", "PassedThrough", "CallEnded"]


class Dumping:
    """Wraps the upstream of one provider."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.seen: list[UpstreamRequest] = []

    def upstream(self, provider: Provider, upstream: Upstream) -> Upstream:
        self.asked.append(provider.name)
        if provider.kind == "openai":
            return upstream
        dumps = self

        class Wrapped:
            async def send(self, request: UpstreamRequest) -> UpstreamResponse:
                dumps.seen.append(request)
                return await upstream.send(request)

            async def aclose(self) -> None:
                """What is wrapped is closed by its owner."""

        return Wrapped()


async def test_dumps_see_what_goes_out() -> None:
    dumps = Dumping()
    stage = Stage(Unreachable("refused"), 200, retries=AT_ONCE, bridge={"dumps": dumps}, api_key="sk-1")
    await stage.ask()
    await call(stage.bridge, scope("GET", "/anthropic/v1/models/a"))
    await stage.ask(path="/openai/v1/chat/completions")
    identity = stage.told(Interception)[0].id
    ids = [request.call_id for request in dumps.seen]
    assert ids[:2] == [f"{identity}-1-1", f"{identity}-1-2"]
    assert ids[2] and ids[2] != identity and len(ids) == 3
    assert {request.secrets for request in dumps.seen} == {("sk-1",)}
    assert dumps.asked == ["anthropic", "openai"], "once for each provider"
    assert stage.memory.requests[-1].call_id == "", "nobody needs one"
