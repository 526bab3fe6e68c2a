"""The scenarios as tests, on the small scale: those of a chapter one after the other, on one stage."""

import re
from collections.abc import Iterator
from typing import Any

import pytest

from .play import play_one
from .report import line
from .scenario import SMALL, Chapter, Scenario


@pytest.fixture(scope="module")
def chapter_on_stage(request: pytest.FixtureRequest) -> Iterator[tuple[Chapter, Any]]:
    """A chapter, and what its scenarios play on."""
    chapter: Chapter = request.param
    with chapter.stage() as stage:
        yield chapter, stage


def each_scenario(*chapters: Chapter) -> pytest.MarkDecorator:
    """A test for each scenario of the chapters."""
    return pytest.mark.parametrize(
        ("chapter_on_stage", "scenario"),
        [
            pytest.param(chapter, scenario, id=re.sub(r"\W+", "-", f"{chapter.title}: {scenario.fault}").lower())
            for chapter in chapters
            for scenario in chapter.scenarios
        ],
        indirect=["chapter_on_stage"],
        scope="module",
    )


def assert_costs_what_is_promised(chapter_on_stage: tuple[Chapter, Any], scenario: Scenario) -> None:
    """Play it. Skips what cannot be played here."""
    chapter, stage = chapter_on_stage
    played = play_one(chapter, scenario, stage, SMALL)
    if played.observed is None:
        pytest.skip(played.why_not)
    assert played.held, line(played)
