"""Row 2 of failures.md: running totals that were summed.

Truth: the row; wire.md A8 (every number in ``message_delta.usage`` is a running total: overwrite, never add; absent and
null keep the earlier value; a compatible server's zero does not erase), B2 (usage on every chunk), C3.
"""

from typing import Any

import pytest

from aibridge.wire import CHAT, MESSAGES, RESPONSES, Usage
from tests.support.facts import Json, encode, of_stream

STOP: Json = {"type": "message_stop"}


def start(**usage: Any) -> Json:
    return {"type": "message_start", "message": {"id": "msg_1", "model": "m", "usage": usage}}


def delta(**usage: Any) -> Json:
    return {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": usage}


def figures(*events: Json, cut: bool = False) -> tuple[int | None, int | None, int | None, int | None]:
    usage = of_stream(MESSAGES, *events, cut=cut).usage
    assert usage is not None
    return usage.input_tokens, usage.output_tokens, usage.cache_read_input_tokens, usage.cache_write_input_tokens


# --- Messages ---------------------------------------------------------------------------------------------------------


def test_5_then_61_is_61() -> None:
    assert figures(start(input_tokens=10, output_tokens=5), delta(output_tokens=61), STOP) == (10, 61, None, None)


def test_two_deltas() -> None:
    assert figures(start(input_tokens=10, output_tokens=1), delta(output_tokens=5), delta(output_tokens=61), STOP)[1] == 61


def test_the_same_input_twice_is_once() -> None:
    repeated = {"input_tokens": 10, "cache_read_input_tokens": 7, "cache_creation_input_tokens": 3}
    assert figures(start(**repeated, output_tokens=1), delta(**repeated, output_tokens=8), STOP) == (10, 8, 7, 3)


def test_input_and_cache_only_in_the_delta() -> None:
    late = delta(input_tokens=77, cache_read_input_tokens=640, cache_creation_input_tokens=3, output_tokens=8)
    assert figures(start(input_tokens=0, output_tokens=0), late, STOP) == (77, 8, 640, 3)
    assert figures(start(), late, STOP) == (77, 8, 640, 3)


def test_an_input_that_grows() -> None:
    """Tools that the provider runs add to the prompt."""
    assert figures(start(input_tokens=2679, output_tokens=3), delta(input_tokens=10682, output_tokens=510), STOP)[0] == 10682


@pytest.mark.parametrize("name", ["input_tokens", "cache_read_input_tokens", "cache_creation_input_tokens"])
@pytest.mark.parametrize("value", [0, None, "x", -1, 3.5])
def test_what_does_not_erase(name: str, value: Any) -> None:
    known = {"input_tokens": 1, "cache_read_input_tokens": 2, "cache_creation_input_tokens": 3}
    assert figures(start(**known, output_tokens=1), delta(**{name: value}, output_tokens=8), STOP) == (1, 8, 2, 3)


@pytest.mark.parametrize("usage", [{}, {"output_tokens": None}])
def test_a_delta_without_figures_keeps_what_was_known(usage: Json) -> None:
    assert figures(start(input_tokens=10, output_tokens=5), delta(output_tokens=61), delta(**usage), STOP)[1] == 61


def test_a_fallback_replaces_what_was_known() -> None:
    """The top level describes the model that served; then smaller figures are no mistake (wire.md A8)."""
    block = {"type": "content_block_start", "index": 0, "content_block": {"type": "fallback", "to": {"model": "m-2"}}}
    assert figures(start(input_tokens=1000, output_tokens=1), block, delta(input_tokens=7, output_tokens=5), STOP)[:2] == (
        7,
        5,
    )


def test_iterations_are_summed_once_and_not_with_the_top_level() -> None:
    """They are what is billed: the top level leaves out what compaction cost (wire.md A8)."""
    entries = [
        {"type": "compaction", "input_tokens": 100, "output_tokens": 20, "cache_read_input_tokens": None},
        {"type": "message", "model": None, "input_tokens": 4, "output_tokens": 5, "cache_read_input_tokens": 6},
    ]
    events = [start(input_tokens=4, output_tokens=1), delta(input_tokens=4, output_tokens=5, iterations=entries)]
    assert figures(*events, STOP) == (104, 25, 6, None)
    again = delta(input_tokens=4, output_tokens=5, iterations=entries)
    assert figures(*events, again, STOP) == (104, 25, 6, None)


@pytest.mark.parametrize("iterations", [[], None, "x", {}])
def test_no_iterations(iterations: Any) -> None:
    assert figures(start(input_tokens=4), delta(output_tokens=5, iterations=iterations), STOP)[:2] == (4, 5)


def test_a_sum_that_no_database_can_hold_is_no_figure() -> None:
    entries = [{"type": "message", "input_tokens": 2**62}] * 2
    assert figures(start(), delta(input_tokens=1, iterations=entries), STOP)[0] == 1


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        ([start(input_tokens=10, output_tokens=5)], (10, 5)),
        ([start(input_tokens=10, output_tokens=5), delta(output_tokens=61)], (10, 61)),
    ],
)
def test_what_was_reported_until_a_cut(events: list[Json], expected: tuple[int, int]) -> None:
    found = of_stream(MESSAGES, *events, cut=True)
    assert found.usage is not None
    assert (found.usage.input_tokens, found.usage.output_tokens) == expected
    assert found.completeness == "partial"


@pytest.mark.parametrize(
    ("events", "completeness"),
    [
        ([start(input_tokens=1, output_tokens=1), delta(output_tokens=5), STOP], "complete"),
        # the start's figures are not final: its output is a first estimate
        ([start(input_tokens=1, output_tokens=1), STOP], "partial"),
        ([STOP], "unknown"),
    ],
)
def test_how_much_a_figure_can_be_trusted(events: list[Json], completeness: str) -> None:
    found = of_stream(MESSAGES, *events)
    assert found.completeness == completeness
    assert (found.usage == Usage()) == (completeness == "unknown")


def test_the_usage_is_kept_as_received() -> None:
    """The newest of each member, in the provider's own text."""
    found = of_stream(
        MESSAGES,
        b'{"type":"message_start","message":{"usage":{"input_tokens":9,"x_new":{"n":1.0},"output_tokens":1}}}',
        b'{"type":"message_delta","usage":{"output_tokens":5,"server_tool_use":{"web_search_requests":1}}}',
        STOP,
    )
    assert found.usage is not None
    assert found.usage.raw == (
        b'{"input_tokens":9,"x_new":{"n":1.0},"output_tokens":5,"server_tool_use":{"web_search_requests":1}}'
    )


# --- Chat -------------------------------------------------------------------------------------------------------------


def chunk(usage: Any, *choices: Json) -> Json:
    return {"id": "c_1", "choices": list(choices), "usage": usage}


CHOICE: Json = {"index": 0, "delta": {"content": "x"}}
FINISH: Json = {"index": 0, "delta": {}, "finish_reason": "stop"}


def counted(prompt: int, completion: int) -> Json:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


@pytest.mark.parametrize(
    "chunks",
    [
        [chunk(counted(11, 1), CHOICE), chunk(counted(11, 2), CHOICE), chunk(counted(11, 3), FINISH)],
        [chunk(counted(11, 3), FINISH), chunk(counted(11, 3))],  # on the finish chunk, and once more
        [chunk(None, CHOICE), chunk(None, FINISH), chunk(counted(11, 3))],
        [chunk(counted(11, 3), FINISH), chunk(None), chunk({})],  # an empty one says nothing
    ],
)
def test_chat_totals_are_not_added_up(chunks: list[Json]) -> None:
    found = of_stream(CHAT, *chunks, b"[DONE]")
    assert found.usage is not None
    assert (found.usage.input_tokens, found.usage.output_tokens, found.completeness) == (11, 3, "complete")


def test_chat_totals_until_a_cut() -> None:
    found = of_stream(CHAT, chunk(counted(11, 1), CHOICE), chunk(counted(11, 2), CHOICE), cut=True)
    assert found.usage is not None
    assert (found.usage.output_tokens, found.completeness) == (2, "partial")


def test_chat_without_usage() -> None:
    found = of_stream(CHAT, chunk(None, CHOICE), chunk(None, FINISH), b"[DONE]")
    assert (found.usage, found.completeness) == (Usage(), "unknown")


# --- Responses --------------------------------------------------------------------------------------------------------


def response(kind: str, usage: Any) -> Json:
    return {"type": f"response.{kind}", "response": {"id": "resp_1", "usage": usage}}


def test_responses_totals_are_not_added_up() -> None:
    """Null before the end; a compatible server that reports on the way is overwritten."""
    usage = {"input_tokens": 9, "output_tokens": 5}
    found = of_stream(
        RESPONSES,
        response("created", None),
        response("in_progress", {"input_tokens": 9, "output_tokens": 1}),
        response("completed", usage),
    )
    assert found.usage == Usage(9, 5, raw=encode(usage))
    assert found.completeness == "complete"


@pytest.mark.parametrize("kind", ["completed", "incomplete"])
@pytest.mark.parametrize("usage", [None, {}, "x"])
def test_responses_without_usage(kind: str, usage: Any) -> None:
    found = of_stream(RESPONSES, response("created", None), response(kind, usage))
    assert (found.usage, found.completeness) == (Usage(), "unknown")
