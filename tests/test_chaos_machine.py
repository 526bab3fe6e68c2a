"""The fault suite on the small scale (issue 5, criterion 2): databases, disks, clocks, kills, and clients that go.

Truth: as in `tests.test_chaos`.
"""

from typing import Any

from tests.chaos.chapters import OF_THE_MACHINE
from tests.chaos.scenario import Chapter, Scenario
from tests.chaos.suite import assert_costs_what_is_promised, chapter_on_stage, each_scenario

__all__ = ["chapter_on_stage"]


@each_scenario(*OF_THE_MACHINE)
def test_fault(chapter_on_stage: tuple[Chapter, Any], scenario: Scenario) -> None:
    assert_costs_what_is_promised(chapter_on_stage, scenario)
