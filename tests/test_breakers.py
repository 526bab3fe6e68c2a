"""Circuit breakers, with a clock of our own.

Truth: issue 5 ("never tripped for everybody by one user's 429"; "closed, open, half-open with limited probes, per-model
isolation"); the numbers and what counts as neither success nor failure are our choice (`aibridge.breakers`).
"""

from collections import Counter
from typing import Any

import pytest
from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from aibridge.breakers import FAILURES, BreakerKey, BreakerRules, Breakers, BreakerState, Permit
from aibridge.errors import BreakerOpen

STATUSES = frozenset({503, 529})
RULES = BreakerRules(STATUSES, threshold=3, open_seconds=30, probes=1)
OPUS = BreakerKey("main", "/v1/messages", "opus")
HAIKU = OPUS._replace(model="haiku")


class Stage:
    """Breakers, a clock, and what they say of their states."""

    def __init__(self, rules: BreakerRules = RULES, **options: Any) -> None:
        self.rules = rules
        self.now = 1000.0
        self.states: list[tuple[str | None, BreakerState]] = []
        self.breakers = Breakers(lambda key, state: self.states.append((key.model, state)), **options)

    def ask(self, key: BreakerKey = OPUS) -> Permit:
        return self.breakers.admit(key, self.rules, self.now)

    def get(self, status: int, key: BreakerKey = OPUS, retry_after: float | None = None) -> None:
        """A request that is answered at once."""
        self.ask(key).answered(status, self.now, retry_after)

    def rejected(self, key: BreakerKey = OPUS) -> int:
        """How many seconds a rejected client is asked to stay away."""
        with pytest.raises(BreakerOpen) as caught:
            self.ask(key)
        ((name, value),) = caught.value.headers
        assert (name, caught.value.status) == (b"retry-after", 503)
        return int(value)

    def trip(self, key: BreakerKey = OPUS) -> None:
        for _ in range(self.rules.threshold):
            self.get(503, key)


def test_the_life_of_a_breaker() -> None:
    stage = Stage()
    for _ in range(2):
        stage.get(503)
    assert stage.states == []
    stage.get(529)
    assert stage.states == [("opus", "open")]
    assert stage.rejected() == 30
    stage.now += 29.9
    assert stage.rejected() == 1, "whole seconds, and never 0: that would mean at once"

    stage.now += 0.1
    probe = stage.ask()
    assert stage.states.pop() == ("opus", "half_open")
    assert stage.rejected() == 1, "one probe at a time"
    probe.answered(503, stage.now)
    assert stage.states.pop() == ("opus", "open")
    assert stage.rejected() == 30, "and all over again"

    stage.now += 30
    stage.get(200)
    assert stage.states[-2:] == [("opus", "half_open"), ("opus", "closed")]
    for _ in range(2):
        stage.get(503)
    assert stage.states[-1] == ("opus", "closed"), "it counts from 0 again"


def test_failures_are_counted_in_a_row() -> None:
    stage = Stage()
    for status in (503, 503, 200, 503, 503, 204):
        stage.get(status)
    assert stage.states == []


def test_no_answer_is_a_failure() -> None:
    stage = Stage()
    for _ in range(3):
        stage.ask().failed(stage.now)
    assert stage.states == [("opus", "open")]


@pytest.mark.parametrize("status", [400, 401, 403, 404, 408, 413, 429, 500, 502])
def test_what_is_about_one_request_counts_for_nothing(status: int) -> None:
    """It neither opens a breaker, nor keeps others' failures from doing so, nor closes it again, nor holds a probe."""
    stage = Stage()
    for _ in range(10):
        stage.get(status)
    assert stage.states == []
    for _ in range(3):
        stage.get(status)
        stage.get(503)
    assert stage.states == [("opus", "open")]
    stage.now += 30
    for _ in range(3):
        stage.get(status)
    assert stage.states == [("opus", "open"), ("opus", "half_open")]
    stage.get(200)
    assert stage.states[-1] == ("opus", "closed")


def test_a_client_that_leaves_gives_its_probe_back() -> None:
    stage = Stage()
    stage.trip()
    stage.now += 30
    stage.ask().release()
    assert stage.states == [("opus", "open"), ("opus", "half_open")]
    stage.get(200)
    assert stage.states[-1] == ("opus", "closed")


def test_several_probes() -> None:
    stage = Stage(BreakerRules(STATUSES, threshold=1, open_seconds=1, probes=3))
    stage.trip()
    stage.now += 1
    probes = [stage.ask() for _ in range(3)]
    assert stage.rejected() == 1
    probes.pop().answered(200, stage.now)
    probes.append(stage.ask())
    assert stage.rejected() == 1, "three at a time"
    for probe in probes[:2]:
        assert stage.states[-1] == ("opus", "half_open")
        probe.answered(200, stage.now)
    assert stage.states[-1] == ("opus", "closed"), "three successes"


def test_what_was_let_through_before_counts_no_more() -> None:
    stage = Stage()
    early = [stage.ask() for _ in range(6)]
    for permit in early[:3]:
        permit.answered(503, stage.now)
    stage.now += 30
    probe = stage.ask()
    early[3].answered(503, stage.now)
    early[4].answered(200, stage.now)
    early[5].release()
    assert stage.states == [("opus", "open"), ("opus", "half_open")]
    assert stage.rejected() == 1, "the probe is still under way"
    probe.answered(200, stage.now)
    assert stage.states[-1] == ("opus", "closed")


@pytest.mark.parametrize(("asked", "stays"), [(None, 30), (5.0, 30), (90.0, 90), (86_400.0, 300)])
def test_the_provider_may_ask_for_more_time(asked: float | None, stays: int) -> None:
    """Within a bound: an answer of a load balancer that was misconfigured for a minute must not cost a day."""
    stage = Stage()
    stage.get(503)
    stage.get(503)
    stage.get(503, retry_after=asked)
    assert stage.rejected() == stays


def test_our_own_time_may_be_longer_than_that_bound() -> None:
    stage = Stage(BreakerRules(STATUSES, threshold=1, open_seconds=3600))
    stage.get(503, retry_after=86_400.0)
    assert stage.rejected() == 3600


@pytest.mark.parametrize("other", [HAIKU, OPUS._replace(route="/v1/other"), OPUS._replace(provider_name="second")])
def test_each_has_a_breaker_of_its_own(other: BreakerKey) -> None:
    stage = Stage()
    stage.trip()
    stage.get(200, other)
    assert stage.rejected() == 30
    stage.trip(other)
    stage.now += 30
    stage.get(200)
    assert not stage.breakers.is_closed(other) and stage.breakers.is_closed(OPUS)


def test_without_a_model() -> None:
    """A passthrough route, or a request whose body cannot be read."""
    stage = Stage()
    stage.trip(OPUS._replace(model=None))
    assert stage.states == [(None, "open")]
    stage.get(200)


def test_other_rules_hold_at_once() -> None:
    """After a change of the configuration. What has happened stays known."""
    stage = Stage()
    stage.get(503)
    stage.rules = BreakerRules(STATUSES, threshold=2, open_seconds=5)
    stage.get(503)
    assert stage.rejected() == 5


def test_breakers_of_providers_that_have_none_any_more_are_forgotten() -> None:
    stage = Stage()
    stage.trip()
    stage.trip(HAIKU._replace(provider_name="second"))
    stage.breakers.keep({"second"})
    assert stage.states[2:] == [("opus", "closed")], "or it would be shown as open for ever"
    stage.get(200)
    assert stage.rejected(HAIKU._replace(provider_name="second")) == 30


# ---- memory is bounded, whatever clients ask for ----


def test_models_that_nobody_asks_for_any_more_are_forgotten() -> None:
    stage = Stage(max_breakers=3)
    stage.trip()
    for number in range(10_000):
        stage.get(200, OPUS._replace(model=f"made up {number}"))
    assert len(stage.breakers._breakers) == 3
    assert stage.rejected() == 30, "what is open is kept"


def test_those_that_were_used_last_are_kept() -> None:
    stage = Stage(max_breakers=2)
    for _ in range(2):
        stage.get(503)
    stage.get(200, HAIKU)
    stage.get(503, OPUS)
    assert stage.states == [("opus", "open")]
    third = OPUS._replace(model="third")
    stage.get(503, HAIKU)
    stage.get(200, third)
    assert set(stage.breakers._breakers) == {OPUS, third}, "haiku was closed"


def test_where_all_are_open_the_oldest_goes() -> None:
    stage = Stage(max_breakers=2)
    stage.trip()
    stage.trip(HAIKU)
    stage.get(200, OPUS._replace(model="third"))
    assert stage.states == [("opus", "open"), ("haiku", "open"), ("opus", "closed")]
    assert stage.rejected(HAIKU) == 30


def test_a_breaker_that_was_forgotten_under_a_request() -> None:
    """It must not be shown as open: nobody would ever close it."""
    stage = Stage(BreakerRules(STATUSES, threshold=1), max_breakers=1)
    permits = [stage.ask()]
    stage.get(200, HAIKU)
    permits.append(stage.ask(HAIKU))
    stage.breakers.keep(())
    for permit in permits:
        permit.answered(503, stage.now)
    assert stage.states == []


def test_a_model_of_any_length() -> None:
    stage = Stage()
    stage.trip(OPUS._replace(model="x" * 1_000_000))
    assert stage.states == [("x" * 256, "open")]
    assert not stage.breakers.is_closed(OPUS._replace(model="x" * 300)), "they share one"


def test_what_each_kind_of_provider_says_when_it_is_down() -> None:
    """Issue 5: "failure statuses configurable per provider kind (503, 504, 529)"; 529 is Anthropic's (wire.md A10)."""
    assert {"anthropic": {503, 504, 529}, "openai": {503, 504}} == FAILURES


# ---- whatever happens, in whatever order ----


class Life(RuleBasedStateMachine):
    """A breaker beside a plain model of it: what has happened since the state changed last."""

    def __init__(self) -> None:
        super().__init__()
        self.stage = Stage(BreakerRules(STATUSES, threshold=2, open_seconds=10, probes=2))
        self.state: BreakerState = "closed"
        self.opened = 0.0
        self.failures = self.successes = 0
        self.under_way: list[tuple[Permit, bool]] = []  # and whether it was let through in this state

    def changes(self, state: BreakerState) -> None:
        self.state = state
        self.failures = self.successes = 0
        self.under_way = [(permit, False) for permit, _ in self.under_way]

    def current(self) -> int:
        return sum(counts for _, counts in self.under_way)

    @rule()
    def ask(self) -> None:
        if self.state == "open" and self.stage.now >= self.opened + 10:
            self.changes("half_open")
        if self.state == "open" or (self.state == "half_open" and self.current() >= 2):
            assert self.stage.rejected() >= 1
        else:
            self.under_way.append((self.stage.ask(), True))

    @precondition(lambda self: self.under_way)
    @rule(index=st.integers(0, 100), outcome=st.sampled_from(["200", "503", "429", "failed", "release"]))
    def ends(self, index: int, outcome: str) -> None:
        permit, counts = self.under_way.pop(index % len(self.under_way))
        now = self.stage.now
        match outcome:
            case "failed":
                permit.failed(now)
            case "release":
                permit.release()
            case status:
                permit.answered(int(status), now)
        if not counts:
            return
        if outcome == "200":
            self.failures, self.successes = 0, self.successes + 1
            if self.state == "half_open" and self.successes == 2:
                self.changes("closed")
        elif outcome in ("503", "failed"):
            self.failures += 1
            if self.state == "half_open" or self.failures == 2:
                self.opened = now
                self.changes("open")

    @rule(seconds=st.floats(0, 15))
    def time_passes(self, seconds: float) -> None:
        self.stage.now += seconds

    @invariant()
    def is_told(self) -> None:
        assert (self.stage.states or [(None, "closed")])[-1][1] == self.state
        assert self.stage.breakers.is_closed(OPUS) == (self.state == "closed")
        told = Counter(state for _, state in self.stage.states)
        assert told["half_open"] <= told["open"]

    @invariant()
    def probes_are_limited(self) -> None:
        assert self.state != "half_open" or self.current() <= 2


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
