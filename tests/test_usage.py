"""The usage of several turns as one.

Truth: wire.md A8, B4, C4 for the counters and what contains what; D5 for the two policies.
"""

import json
from typing import Any

import pytest

from aibridge.wire.turns import UsagePolicy
from aibridge.wire.usage import merged_usage

MESSAGES = [
    {
        "input_tokens": 10,
        "cache_creation_input_tokens": 100,
        "cache_read_input_tokens": 0,
        "cache_creation": {"ephemeral_5m_input_tokens": 100, "ephemeral_1h_input_tokens": 0},
        "output_tokens": 5,
        "output_tokens_details": {"thinking_tokens": 3},
        "server_tool_use": {"web_search_requests": 1},
        "service_tier": "standard",
        "iterations": [{"type": "message", "output_tokens": 5}],
    },
    {
        "input_tokens": 20,
        "cache_creation_input_tokens": 7,
        "cache_read_input_tokens": 100,
        "cache_creation": None,
        "output_tokens": 6,
        "output_tokens_details": {"thinking_tokens": 1},
        "service_tier": "priority",
        "iterations": [{"type": "message", "output_tokens": 6}],
    },
]
CHAT = [
    {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15, "prompt_tokens_details": {"cached_tokens": 2}},
    {"prompt_tokens": 30, "completion_tokens": 7, "total_tokens": 37, "prompt_tokens_details": {"cached_tokens": 10}},
]


def merged(usages: list[Any], policy: UsagePolicy) -> Any:
    return json.loads(merged_usage([json.dumps(usage).encode() for usage in usages], policy))


def test_the_sum_of_messages() -> None:
    assert merged(MESSAGES, "sum") == {
        "input_tokens": 30,
        "cache_creation_input_tokens": 107,
        "cache_read_input_tokens": 100,
        "cache_creation": {"ephemeral_5m_input_tokens": 100, "ephemeral_1h_input_tokens": 0},
        "output_tokens": 11,
        "output_tokens_details": {"thinking_tokens": 4},
        "server_tool_use": {"web_search_requests": 1},
        "service_tier": "priority",
        "iterations": [{"type": "message", "output_tokens": 5}, {"type": "message", "output_tokens": 6}],
    }


def test_the_last_input_of_messages() -> None:
    found = merged(MESSAGES, "last")
    assert (found["input_tokens"], found["cache_creation_input_tokens"], found["cache_read_input_tokens"]) == (20, 7, 100)
    assert (found["output_tokens"], found["output_tokens_details"]) == (11, {"thinking_tokens": 4})


@pytest.mark.parametrize(("policy", "prompt", "cached", "total"), [("sum", 40, 12, 52), ("last", 30, 10, 42)])
def test_a_total_is_the_total_of_what_is_said(policy: UsagePolicy, prompt: int, cached: int, total: int) -> None:
    assert merged(CHAT, policy) == {
        "prompt_tokens": prompt,
        "completion_tokens": 12,
        "total_tokens": total,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def test_one_usage_stays_as_it_is() -> None:
    text = b'{ "output_tokens" : 5, "x":1e400 }'
    assert merged_usage([text], "sum") == text


def test_what_was_never_reported_is_not_zero() -> None:
    assert merged([{"output_tokens": 1, "input_tokens": None}, {"output_tokens": 2}], "sum") == {
        "output_tokens": 3,
        "input_tokens": None,
    }


def test_odd_values_are_the_last_ones() -> None:
    assert merged([{"tier": "a", "x": 1}, {"tier": "b", "x": "y"}], "sum") == {"tier": "b", "x": "y"}


@pytest.mark.parametrize("policy", ["sum", "last"])
def test_costs_add_up(policy: UsagePolicy) -> None:
    """OpenRouter reports one (wire.md B4)."""
    assert merged([{"cost": 0.5}, {"cost": 0.25}], policy) == {"cost": 0.75}


@pytest.mark.parametrize("policy", ["sum", "last"])
def test_odd_counts_add_up_too(policy: UsagePolicy) -> None:
    odd = {"input_tokens": 1e30, "output_tokens": 0.5, "total_tokens": 1}
    assert merged([odd, odd], policy)["total_tokens"] >= 1e30


def test_the_last_input_is_the_last_turns_alone() -> None:
    """No detail of an earlier turn beside its figures."""
    assert merged([{"prompt_tokens": 1, "prompt_tokens_details": {"cached_tokens": 1}}, {"prompt_tokens": 2}], "last") == {
        "prompt_tokens": 2
    }
