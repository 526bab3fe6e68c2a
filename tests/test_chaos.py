"""The fault suite on the small scale (issue 5, criterion 2): what a gateway asks others for, and what they do to it.

Truth: the promises, in each scenario of `tests.chaos`, which are our choice within the issue and design.md 1 and 4. The
whole suite is ``make chaos``; `tests.test_chaos_machine` has its other half.
"""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.chapters import CHAPTERS, OF_OTHERS
from tests.chaos.play import Played, play
from tests.chaos.report import BEGIN, END, line, rows_in, written_into
from tests.chaos.scenario import SMALL, Chapter, Impossible, Observed, Outcome, Scale, Scenario
from tests.chaos.suite import assert_costs_what_is_promised, chapter_on_stage, each_scenario

__all__ = ["chapter_on_stage"]

DOCUMENT = Path(__file__).parent.parent / "docs" / "reliability.md"


@each_scenario(*OF_OTHERS)
def test_fault(chapter_on_stage: tuple[Chapter, Any], scenario: Scenario) -> None:
    assert_costs_what_is_promised(chapter_on_stage, scenario)


def test_the_table_says_what_every_fault_costs() -> None:
    """It is made by ``make chaos``: one that was changed since, or was not played, was not."""
    rows = rows_in(DOCUMENT.read_text())
    scenarios = [scenario for chapter in CHAPTERS for scenario in chapter.scenarios]
    assert [row[0] for row in rows] == [scenario.fault for scenario in scenarios]
    for (fault, client, *rest), scenario in zip(rows, scenarios, strict=True):
        promised, *other = scenario.promised
        assert client == promised or client.startswith(f"{promised} ("), fault  # and what was seen beside it
        assert rest == other, fault


# ---- the suite itself: it must be able to fail ----


async def _as_promised(_: None, scale: Scale) -> Observed:
    return Observed(Outcome("an answer", "a row"), f"{scale.clients} clients")


async def _worse(_: None, __: Scale) -> Observed:
    return Observed(Outcome("an answer", "a row", "a record"))


async def _fails(_: None, __: Scale) -> Observed:
    raise OSError("no such thing")


async def _impossible(_: None, __: Scale) -> Observed:
    raise Impossible("it takes root")


PROMISED = Outcome("an answer", "a row")
PLAYED = Chapter(
    "Trouble",
    "Of four kinds.",
    nullcontext,
    [
        Scenario("small", PROMISED, _as_promised),
        Scenario("large", PROMISED, _worse),
        Scenario("in the suite", PROMISED, _fails),
        Scenario("elsewhere", PROMISED, _impossible),
    ],
)


@pytest.fixture
def played() -> list[Played]:
    return list(play(PLAYED, SMALL))


def test_what_costs_more_than_is_promised_does_not_hold(played: list[Played]) -> None:
    assert [one.held for one in played] == [True, False, False, True]
    assert "promised: an answer | a row | nothing" in line(played[1])
    assert "no such thing" in line(played[2])
    assert played[3].observed is None and "it takes root" in line(played[3])


def test_the_table_is_made_of_what_was_observed(played: list[Played]) -> None:
    document = written_into(f"before\n{BEGIN}\nold\n{END}\nafter\n", played)
    assert document.startswith(f"before\n{BEGIN}\n") and document.endswith(f"\n{END}\nafter\n") and "old" not in document
    assert "| small | an answer (100 clients) | a row | nothing |" in document
    assert "| large | an answer | a row | a record |" in document
    assert "| elsewhere | not played: it takes root | | |" in document
    assert [row[0] for row in rows_in(document)] == [scenario.fault for scenario in PLAYED.scenarios]
