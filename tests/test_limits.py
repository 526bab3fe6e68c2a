"""Limits of concurrency and rate.

Truth: issue 5 ("concurrent interceptions (overall and per actor), request rate per actor ... the right status (429 with
`retry-after`, 503, 413) in the provider's error shape"). That a minute's worth may come at once is our choice.
"""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, strategies as st

from aibridge import Actor, MemoryRecorder, Provider, RequestBridge, as_actor
from aibridge.events import Event, Refused
from aibridge.limits import Admission, Limits, Refusal
from aibridge.upstream import MemoryResponse, MemoryUpstream, UpstreamRequest, UpstreamResponse
from aibridge.wire.observer import ResponseHead
from tests.serving import Call, call, scope
from tests.support.provider import WAIT_SECONDS, Gate

BODY = b'{"model":"m","messages":[{"role":"user","content":"hi"}]}'
ANSWER = b'{"id":"msg_1","type":"message","content":[],"usage":{"input_tokens":1,"output_tokens":2}}'
PATH = "/anthropic/v1/messages"
ADA, BOB = Actor("ada"), Actor("bob")


def reason(refusal: Refusal | None) -> str | None:
    return None if refusal is None else refusal.reason


# ---- by themselves ----


def test_there_are_none_by_default() -> None:
    admission = Admission()
    assert not any(admission.admit("ada", Limits(), 0.0, lasts=True) for _ in range(10_000))


def test_concurrency_of_all_and_of_one() -> None:
    admission, limits = Admission(), Limits(max_concurrent=3, max_concurrent_per_actor=2)
    who = ["ada", "ada", "ada", "bob", "cleo"]
    found = [reason(admission.admit(actor, limits, 0.0, lasts=True)) for actor in who]
    assert found == [None, None, "actor_concurrency", None, "concurrency"]
    assert admission.admit("cleo", limits, 0.0, lasts=False) is None, "what is passed through is not counted"
    admission.leave("ada")
    assert admission.admit("cleo", limits, 0.0, lasts=True) is None
    assert reason(admission.admit("ada", limits, 0.0, lasts=True)) == "concurrency"


def test_a_minutes_worth_may_come_at_once() -> None:
    admission, limits = Admission(), Limits(requests_per_minute=6)
    assert not any(admission.admit("ada", limits, 100.0, lasts=bool(n % 2)) for n in range(6)), "of whatever kind"
    for _ in range(3):
        refusal = admission.admit("ada", limits, 104.0, lasts=False)
        assert refusal is not None and refusal.reason == "rate"
        assert refusal.seconds == pytest.approx(6.0), "what is refused costs nothing"
    assert admission.admit("bob", limits, 104.0, lasts=False) is None, "each has a rate of his own"
    assert admission.admit("ada", limits, 110.0, lasts=False) is None
    assert reason(admission.admit("ada", limits, 110.0, lasts=False)) == "rate"
    assert not any(admission.admit("ada", limits, 1000.0, lasts=False) for _ in range(6)), "and no more is saved up"
    assert reason(admission.admit("ada", limits, 1000.0, lasts=False)) == "rate"


def test_what_is_over_the_concurrency_takes_nothing_of_the_rate() -> None:
    admission, limits = Admission(), Limits(max_concurrent_per_actor=1, requests_per_minute=2)
    found = [reason(admission.admit("ada", limits, 0.0, lasts=True)) for _ in range(5)]
    assert found == [None, *["actor_concurrency"] * 4]
    admission.leave("ada")
    assert admission.admit("ada", limits, 0.0, lasts=True) is None


def test_what_is_over_the_rate_is_not_under_way() -> None:
    admission, limits = Admission(), Limits(max_concurrent=2, requests_per_minute=1)
    found = [reason(admission.admit("ada", limits, 0.0, lasts=True)) for _ in range(5)]
    assert found == [None, *["rate"] * 4]
    assert admission.admit("bob", limits, 0.0, lasts=True) is None


@given(
    rate=st.integers(1, 10_000),
    steps=st.lists(st.floats(0, 90), max_size=60),
)
def test_who_comes_back_when_told_is_let_in(rate: int, steps: list[float]) -> None:
    """And never more than a minute's worth at once plus what time has brought."""
    admission, limits, now = Admission(), Limits(requests_per_minute=rate), 1e6
    start = now
    for let_in, step in enumerate(steps, 1):
        now += step
        refusal = admission.admit("ada", limits, now, lasts=False)
        if refusal is not None:
            ((_, seconds),) = refusal.error.headers
            assert int(seconds) >= 1
            now += int(seconds)
            assert admission.admit("ada", limits, now, lasts=False) is None
        assert let_in <= rate + (now - start) * rate / 60 + 1e-3


def test_other_limits_hold_at_once() -> None:
    admission = Admission()
    for _ in range(5):
        assert admission.admit("ada", Limits(requests_per_minute=100), 0.0, lasts=True) is None
    assert reason(admission.admit("ada", Limits(max_concurrent=5), 0.0, lasts=True)) == "concurrency"
    assert admission.admit("ada", Limits(requests_per_minute=1), 0.0, lasts=True) is None
    assert reason(admission.admit("ada", Limits(requests_per_minute=1), 0.0, lasts=True)) == "rate"


# ---- memory is bounded ----


def test_actors_who_have_not_been_seen_for_a_minute_are_forgotten() -> None:
    admission, limits = Admission(), Limits(requests_per_minute=60)
    for number in range(1000):
        admission.admit(f"actor {number}", limits, 0.0, lasts=False)
    for number in range(1000):
        admission.admit("ada", limits, 61.0 + number, lasts=False)
    assert set(admission._buckets) == {"ada"}


def test_no_more_than_so_many_actors_are_remembered() -> None:
    admission, limits = Admission(max_actors=100), Limits(requests_per_minute=1)
    for number in range(10_000):
        admission.admit(f"actor {number}", limits, 0.0, lasts=False)
        assert len(admission._buckets) <= 100
    assert reason(admission.admit("actor 9999", limits, 0.0, lasts=False)) == "rate"
    assert admission.admit("actor 0", limits, 0.0, lasts=False) is None, "forgotten"


def test_nothing_is_left_of_interceptions_that_are_over() -> None:
    admission = Admission()
    for number in range(1000):
        admission.admit(f"actor {number}", Limits(), 0.0, lasts=True)
        admission.leave(f"actor {number}")
    assert not admission._of_actor and not admission._under_way and not admission._buckets


# ---- in a bridge ----


class Stage:
    """A bridge whose provider answers when the gate is open."""

    def __init__(self, **limits: Any) -> None:
        self.gate = Gate()
        self.events: list[Event] = []
        self.recorder = MemoryRecorder()
        stage = self

        class Slow(MemoryUpstream):
            async def send(self, request: UpstreamRequest) -> UpstreamResponse:
                self.requests.append(request)
                await stage.gate.wait()
                headers = [(b"content-type", b"application/json")]
                return MemoryResponse(ResponseHead(200, headers), [ANSWER])

        self.upstream = Slow(lambda _: MemoryResponse(ResponseHead(200, [])))
        self.bridge = RequestBridge(
            [Provider.anthropic(), Provider.openai()],
            self.recorder,
            observers=[self.events.append],
            upstream=self.upstream,
            limits=Limits(**limits),
        )

    async def begin(self, actor: Actor = ADA, path: str = PATH) -> Call:
        """A request that has reached the provider."""
        sent = len(self.upstream.requests)
        running = Call(self.bridge, as_actor(scope("POST", path), actor), [BODY])
        async with asyncio.timeout(WAIT_SECONDS):
            while len(self.upstream.requests) == sent:
                await asyncio.sleep(0)
        return running

    async def ask(self, actor: Actor = ADA, path: str = PATH, method: str = "POST") -> Call:
        return await call(self.bridge, scope(method, path), BODY if method == "POST" else b"", actor=actor)

    @property
    def refused(self) -> list[Event]:
        return [event for event in self.events if isinstance(event, Refused)]


def assert_refused(answer: Call, status: int, kind: str) -> None:
    assert answer.status == status and answer.json()["error"]["type"] == kind
    assert int(dict(answer.headers)[b"retry-after"]) >= 1


async def test_an_actor_with_too_many_under_way() -> None:
    stage = Stage(max_concurrent_per_actor=1)
    first = await stage.begin()
    assert_refused(await stage.ask(), 429, "rate_limit_error")
    assert_refused(await stage.ask(path="/openai/v1/responses"), 429, "rate_limit_error")
    other = await stage.begin(BOB)
    said = ("actor_concurrency", "127.0.0.1", "You have too many requests under way through this gateway.")
    assert stage.refused == [Refused(name, "ada", *said) for name in ("anthropic", "openai")]  # type: ignore[arg-type]
    stage.gate.set()
    assert [(await one.over()).status for one in (first, other)] == [200, 200]
    assert (await stage.ask()).status == 200
    assert len(stage.recorder.interceptions) == 3, "what is refused is no interception"


async def test_too_many_under_way_in_all() -> None:
    stage = Stage(max_concurrent=1)
    first = await stage.begin()
    assert_refused(await stage.ask(BOB), 503, "api_error")
    assert_refused(await stage.ask(BOB, "/openai/v1/chat/completions"), 503, "server_error")
    first.leave()
    await first.over()
    stage.gate.set()
    assert (await stage.ask(BOB)).status == 200, "whatever ended it"
    assert [event.reason for event in stage.refused if isinstance(event, Refused)] == ["concurrency"] * 2


async def test_too_many_requests_of_an_actor(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=100.0)
    clock.monotonic = lambda: clock.now
    monkeypatch.setattr("aibridge.generation.time", clock)
    stage = Stage(requests_per_minute=2)
    stage.gate.set()
    assert (await stage.ask()).status == 200
    assert (await stage.ask(path="/openai/v1/models", method="GET")).status == 200
    for path, method in ((PATH, "POST"), ("/openai/v1/models", "GET")):
        answer = await stage.ask(path=path, method=method)
        assert_refused(answer, 429, "rate_limit_error")
        assert dict(answer.headers)[b"retry-after"] == b"30"
    assert (await stage.ask(BOB)).status == 200
    assert (await stage.ask(path="/openai/v1/unknown")).status == 404, "nothing that would reach a provider"
    clock.now += 30
    assert (await stage.ask()).status == 200
    assert len(stage.upstream.requests) == 4


async def test_a_request_that_fails_while_it_is_read_is_over() -> None:
    stage = Stage(max_concurrent=1)
    stage.gate.set()
    for _ in range(2):
        assert (await call(stage.bridge, scope("POST", PATH), b"[]", actor=ADA)).status == 400
    assert (await stage.ask()).status == 200


async def test_limits_of_another_configuration_count_what_is_under_way() -> None:
    stage = Stage()
    first = await stage.begin()
    await stage.bridge.reconfigure([Provider.anthropic()], injection=None, limits=Limits(max_concurrent=1))
    assert_refused(await stage.ask(), 503, "api_error")
    stage.gate.set()
    await first.over()
    assert (await stage.ask()).status == 200
