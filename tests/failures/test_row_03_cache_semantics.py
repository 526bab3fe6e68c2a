"""Row 3 of failures.md: cache semantics that were mixed up, and bills 1.7 times too high.

Truth: the row; wire.md A8 (Anthropic's input excludes what a cache read or wrote), B4 and C4 (OpenAI's includes both:
subtract, clamp at 0), D1; design.md 3 (``input_tokens`` excludes cached tokens for every provider; NULL is not 0).
"""

import json
from typing import Any

import pytest
from hypothesis import given, strategies as st

from aibridge.wire import CHAT, MESSAGES, RESPONSES, Usage, WireFormat
from tests.support.facts import Json, of_body, of_stream

Counters = tuple[int | None, int | None, int | None, int | None]


def counters(usage: Usage | None) -> Counters:
    assert usage is not None
    return usage.input_tokens, usage.output_tokens, usage.cache_read_input_tokens, usage.cache_write_input_tokens


def reported(form: WireFormat, usage: Any) -> Usage:
    """What the ledger makes of a usage object, in a body and in a stream alike."""
    choice = {"index": 0, "delta": {}, "finish_reason": "stop"}
    body: Json
    events: list[Json | bytes]
    if form is MESSAGES:
        body = {"usage": usage}
        events = [
            {"type": "message_start", "message": {}},
            {"type": "message_delta", "usage": usage},
            {"type": "message_stop"},
        ]
    elif form is CHAT:
        body = {"choices": [], "usage": usage}
        events = [{"choices": [choice], "usage": None}, {"choices": [], "usage": usage}, b"[DONE]"]
    else:
        body = {"usage": usage}
        events = [{"type": "response.completed", "response": {"usage": usage}}]
    streamed = of_stream(form, *events)
    blocking = of_body(form, body)
    assert blocking.completeness == streamed.completeness
    assert counters(blocking.usage) == counters(streamed.usage)
    assert streamed.usage is not None
    return streamed.usage


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        (
            {"input_tokens": 4, "cache_read_input_tokens": 18000, "cache_creation_input_tokens": 700, "output_tokens": 9},
            (4, 9, 18000, 700),
        ),
        ({"input_tokens": 4, "output_tokens": 9}, (4, 9, None, None)),  # never reported is not 0
        (
            {"input_tokens": 0, "cache_read_input_tokens": 0, "cache_creation_input_tokens": 0, "output_tokens": 0},
            (0, 0, 0, 0),
        ),
        ({"input_tokens": 4, "cache_read_input_tokens": None}, (4, None, None, None)),
        ({"output_tokens": 9}, (None, 9, None, None)),
        ({"input_tokens": -4, "output_tokens": 9.5, "cache_read_input_tokens": "7"}, (None, None, None, None)),
    ],
)
def test_anthropics_input_excludes_the_cache_already(usage: Json, expected: Counters) -> None:
    assert counters(reported(MESSAGES, usage)) == expected


CHAT_USAGE: list[tuple[Json, Counters]] = [
    (
        {"prompt_tokens": 2006, "completion_tokens": 300, "prompt_tokens_details": {"cached_tokens": 1920}},
        (86, 300, 1920, None),
    ),
    (
        {
            "prompt_tokens": 2000,
            "completion_tokens": 7,
            "prompt_tokens_details": {"cached_tokens": 1500, "cache_write_tokens": 400},
        },
        (100, 7, 1500, 400),
    ),
    # never negative, whatever a server counts where
    (
        {"prompt_tokens": 1000, "prompt_tokens_details": {"cached_tokens": 900, "cache_write_tokens": 200}},
        (0, None, 900, 200),
    ),
    ({"prompt_tokens": 10, "prompt_tokens_details": {"cached_tokens": 11}}, (0, None, 11, None)),
    ({"prompt_tokens": 10, "prompt_tokens_details": {"cached_tokens": 0}}, (10, None, 0, None)),
    # details are missing, null (vLLM), or said in other words (DeepSeek)
    ({"prompt_tokens": 14, "completion_tokens": 3}, (14, 3, None, None)),
    ({"prompt_tokens": 14, "completion_tokens": 3, "prompt_tokens_details": None}, (14, 3, None, None)),
    (
        {"prompt_tokens": 300, "completion_tokens": 60, "prompt_cache_hit_tokens": 256, "prompt_cache_miss_tokens": 44},
        (44, 60, 256, None),
    ),
    (
        {"prompt_tokens": 300, "prompt_tokens_details": {"cached_tokens": 256}, "prompt_cache_hit_tokens": 256},
        (44, None, 256, None),
    ),
    # what is included in the output stays in it
    ({"completion_tokens": 60, "completion_tokens_details": {"reasoning_tokens": 41}}, (None, 60, None, None)),
    ({"prompt_tokens": "14", "completion_tokens": None, "prompt_tokens_details": []}, (None, None, None, None)),
    ({"prompt_tokens_details": {"cached_tokens": 5}}, (None, None, 5, None)),
]


@pytest.mark.parametrize(("usage", "expected"), CHAT_USAGE)
def test_chats_input_includes_the_cache(usage: Json, expected: Counters) -> None:
    assert counters(reported(CHAT, usage)) == expected


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        (
            {
                "input_tokens": 3500,
                "output_tokens": 140,
                "input_tokens_details": {"cached_tokens": 3072, "cache_write_tokens": 0},
            },
            (428, 140, 3072, 0),
        ),
        (
            {
                "input_tokens": 900,
                "output_tokens": 60,
                "input_tokens_details": {"cached_tokens": 100, "cache_write_tokens": 300},
            },
            (500, 60, 100, 300),
        ),
        ({"input_tokens": 100, "input_tokens_details": {"cached_tokens": 90, "cache_write_tokens": 20}}, (0, None, 90, 20)),
        ({"input_tokens": 10, "output_tokens": 4}, (10, 4, None, None)),
        ({"input_tokens": 10, "input_tokens_details": None}, (10, None, None, None)),
        ({"output_tokens": 4, "output_tokens_details": {"reasoning_tokens": 3}}, (None, 4, None, None)),
    ],
)
def test_responses_input_includes_the_cache(usage: Json, expected: Counters) -> None:
    assert counters(reported(RESPONSES, usage)) == expected


@pytest.mark.parametrize(
    ("form", "usage"),
    [
        (MESSAGES, {"input_tokens": 4, "cache_creation_input_tokens": 700,
                    "cache_creation": {"ephemeral_5m_input_tokens": 200, "ephemeral_1h_input_tokens": 500}}),
        (CHAT, {"prompt_tokens": 9, "cost": 0.00014, "is_byok": False, "prompt_tokens_details": {"audio_tokens": 2}}),
        (RESPONSES, {"input_tokens": 9, "input_tokens_details": {
            "cache_write_tokens": 3, "cache_write_tokens_details": {"ttl_30m_tokens": 1, "ttl_12h_tokens": 2}}}),
    ],
)  # fmt: skip
def test_kinds_of_writes_stay_apart_and_unknown_members_stay(form: WireFormat, usage: Json) -> None:
    """In the provider's own object, which is kept whole."""
    raw = reported(form, usage).raw
    assert raw is not None
    assert json.loads(raw) == usage


def test_five_minute_and_one_hour_writes_of_a_stream() -> None:
    """The start has the split, the delta has not and must not take it away (wire.md A8)."""
    split = {"ephemeral_5m_input_tokens": 200, "ephemeral_1h_input_tokens": 500}
    start = {"input_tokens": 4, "cache_creation_input_tokens": 700, "cache_creation": split, "output_tokens": 1}
    usage = of_stream(
        MESSAGES,
        {"type": "message_start", "message": {"usage": start}},
        {"type": "message_delta", "usage": {"cache_creation_input_tokens": 700, "output_tokens": 9}},
        {"type": "message_stop"},
    ).usage
    assert counters(usage) == (4, 9, None, 700)
    assert usage is not None
    assert json.loads(usage.raw or b"")["cache_creation"] == split


COUNT = (
    st.none() | st.integers(-(2**70), 2**70) | st.sampled_from([0, 1, 2**63 - 1, 2**63]) | st.floats() | st.text(max_size=3)
)
DETAILS = st.none() | st.dictionaries(st.sampled_from(["cached_tokens", "cache_write_tokens"]), COUNT)
MESSAGES_NAMES = ["input_tokens", "output_tokens", "cache_read_input_tokens", "cache_creation_input_tokens"]
CHAT_NAMES = ["prompt_tokens", "completion_tokens", "prompt_cache_hit_tokens"]
NAMES = st.sampled_from([*MESSAGES_NAMES, *CHAT_NAMES])
FLAT = st.dictionaries(NAMES, COUNT, max_size=8)
USAGES = st.builds(
    lambda flat, details, entries: flat | {"prompt_tokens_details": details, "input_tokens_details": details} | entries,
    FLAT,
    DETAILS,
    st.just({}) | st.fixed_dictionaries({"iterations": st.lists(FLAT, max_size=3)}),
)


@given(st.sampled_from([MESSAGES, CHAT, RESPONSES]), USAGES)
def test_no_counter_is_negative_or_too_large(form: WireFormat, usage: Json) -> None:
    found = of_body(form, {"usage": usage})
    for counter in counters(found.usage):
        assert counter is None or 0 <= counter < 2**63
