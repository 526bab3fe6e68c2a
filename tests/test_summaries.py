"""What happens over and over, as few lines of a log.

Truth: our choice, stated in `aibridge.summaries`. The clock is the test's own.
"""

import math
from itertools import pairwise

from hypothesis import given, strategies as st

from aibridge.summaries import Summaries


def test_the_first_of_a_kind_is_told_at_once() -> None:
    summaries: Summaries[str] = Summaries(10)
    assert summaries.add("a", "one", 100.0) and summaries.add("b", "two", 101.0)
    assert not summaries.add("a", "three", 109.9)
    assert summaries.next_due == 110.0


def test_what_follows_is_told_as_one_when_the_time_is_over() -> None:
    summaries: Summaries[str] = Summaries(10)
    assert [summaries.add("a", name, 100.0) for name in ("one", "two", "three")] == [True, False, False]
    assert summaries.add("b", "other", 105.0)
    assert summaries.due(109.0) == []
    assert summaries.due(110.0) == [("three", 2)], "the last of them"
    assert not summaries.add("a", "four", 112.0), "the time has begun anew"
    assert summaries.next_due == 115.0
    assert summaries.due(115.0) == []
    assert summaries.due(120.0) == [("four", 1)]


def test_a_kind_that_was_quiet_is_new() -> None:
    summaries: Summaries[str] = Summaries(10)
    assert summaries.add("a", "one", 100.0)
    assert summaries.due(110.0) == [] and summaries.next_due is None
    assert summaries.add("a", "two", 110.0)


def test_all_that_is_held_can_be_told_at_the_end() -> None:
    summaries: Summaries[str] = Summaries(10)
    for kind in ("a", "b", "c", "a", "b"):
        summaries.add(kind, kind, 100.0)
    assert summaries.due(math.inf) == [("a", 1), ("b", 1)]


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 7)), max_size=60))
def test_lines_are_few_and_lose_nothing(happens: list[tuple[str, int]]) -> None:
    """Whatever comes when: each is counted once, and a kind has one line in ten seconds at most."""
    summaries: Summaries[str] = Summaries(10)
    now, told = 0.0, dict[str, list[tuple[float, int]]]()
    for kind, pause in happens:
        now += pause
        while (due := summaries.next_due) is not None and due <= now:
            for what, count in summaries.due(due):
                told.setdefault(what, []).append((due, count))
        if summaries.add(kind, kind, now):
            told.setdefault(kind, []).append((now, 1))
    for what, count in summaries.due(math.inf):
        told.setdefault(what, []).append((math.inf, count))
    kinds = [kind for kind, _ in happens]
    assert {kind: sum(count for _, count in lines) for kind, lines in told.items()} == {
        kind: kinds.count(kind) for kind in set(kinds)
    }
    for lines in told.values():
        times = [time for time, _ in lines]
        assert all(later - earlier >= 10 for earlier, later in pairwise(times))
