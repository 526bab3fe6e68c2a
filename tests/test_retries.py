"""When a request is sent to a provider again, and after how long.

Truth: issue 5 ("none by default", "jittered back-off that obeys retry-after"), RFC 9110 section 10.2.3 (Retry-After) and
section 5.6.7 (dates). The numbers are our choice.
"""

import pytest
from hypothesis import given, strategies as st

from aibridge.retries import RetryRules, retry_after

DATE = 1445412480.0  # Wed, 21 Oct 2015 07:28:00 GMT


def test_there_are_none_by_default() -> None:
    assert RetryRules().delay(1, 0.5) is None and RetryRules().statuses == frozenset()


def test_only_so_many() -> None:
    rules = RetryRules(attempts=2)
    assert [rules.delay(attempt, 0.0) is not None for attempt in (1, 2, 3)] == [True, True, False]


def test_the_time_doubles_within_a_bound() -> None:
    rules = RetryRules(attempts=20, max_delay=3.0)
    assert [rules.delay(attempt, 0.0) for attempt in (1, 2, 3, 4, 20)] == [0.5, 1.0, 2.0, 3.0, 3.0]


def test_chance_takes_off_up_to_half() -> None:
    """And nothing of what the provider has asked for."""
    rules = RetryRules(attempts=1, max_delay=10)
    assert [rules.delay(1, chance) for chance in (0.0, 0.5, 1.0)] == [0.5, 0.375, 0.25]
    assert [rules.delay(1, chance, 2.0) for chance in (0.0, 1.0)] == [2.5, 2.25]


def test_what_the_provider_asks_for() -> None:
    rules = RetryRules(attempts=1, max_delay=10)
    assert rules.delay(1, 0.0, 10.0) == 10.0
    assert rules.delay(1, 0.0, 10.1) is None, "the client had better know"
    assert rules.delay(1, 0.0, 0.0) == 0.5


@given(attempt=st.integers(1, 20), chance=st.floats(0, 1), asked=st.none() | st.floats(0, 100), bound=st.floats(0.1, 60))
def test_never_sooner_than_asked_and_never_later_than_bound(
    attempt: int, chance: float, asked: float | None, bound: float
) -> None:
    delay = RetryRules(attempts=20, max_delay=bound).delay(attempt, chance, asked)
    if asked is not None and asked > bound:
        assert delay is None
    else:
        assert delay is not None and max(0.0, asked or 0.0) <= delay <= bound


@pytest.mark.parametrize(
    ("field", "seconds"),
    [
        ("120", 120.0),
        (" 7 ", 7.0),
        ("0", 0.0),
        ("1.5", 1.5),  # not in the standard, but sent, and read by the vendors' SDKs
        ("9" * 400, float("inf")),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 80.0),
        ("Wednesday, 21-Oct-15 07:28:00 GMT", 80.0),
        ("Wed Oct 21 07:28:00 2015", 80.0),
        ("Wed, 21 Oct 2015 07:26:00 GMT", 0.0),
        ("", None),
        ("soon", None),
        ("-1", None),
        ("1e3", None),
        ("٣", None),
        ("Wed, 99 Foo 2015 07:28:00 GMT", None),
        ("Wed, 21 Oct 99999 07:28:00 GMT", None),  # a date that no calendar of the standard library has: ValueError
        (f"Wed, 21 Oct {'9' * 20} 07:28:00 GMT", None),  # and no C integer: OverflowError
    ],
)
def test_the_field(field: str, seconds: float | None) -> None:
    assert retry_after(field, DATE - 80) == seconds


DATES = st.from_regex(
    r"(Mon, )?[0-9]{1,3}[ -](Jan|Feb|Dec)[ -][0-9]{1,6} [0-9:]{1,9}( GMT| [+-][0-9]{1,6})?", fullmatch=True
)


@given(st.text() | DATES, st.floats(0, 1e12))
def test_whatever_the_field_says(field: str, now: float) -> None:
    found = retry_after(field, now)
    assert found is None or found >= 0
