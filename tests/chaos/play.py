"""Plays chapters and compares what is observed with what is promised."""

import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import anyio

from .scenario import Chapter, Impossible, Observed, Outcome, Scale, Scenario

PATIENCE: Final = 300.0
"""Seconds after which a scenario is given up: far above what any takes."""


@dataclass(frozen=True, slots=True)
class Played:
    """A scenario that was played, or could not be: then `why_not` says so, and nothing was observed."""

    chapter: Chapter
    scenario: Scenario
    observed: Observed | None
    seconds: float
    why_not: str = ""

    @property
    def held(self) -> bool:
        """Whether what was promised came true, or could not be tried."""
        return self.observed is None or self.observed.outcome == self.scenario.promised


def play(chapter: Chapter, scale: Scale) -> Iterator[Played]:
    """Play the scenarios of a chapter, one after the other."""
    if not chapter.scenarios:
        return
    with chapter.stage() as stage:
        for scenario in chapter.scenarios:
            yield play_one(chapter, scenario, stage, scale)


def play_one(chapter: Chapter, scenario: Scenario, stage: Any, scale: Scale) -> Played:
    """Play one scenario of a chapter on its stage."""
    begun = time.monotonic()
    observed, why_not = None, ""
    try:
        observed = anyio.run(_within_patience, scenario, stage, scale)
    except Impossible as reason:
        why_not = str(reason)
    except Exception as error:  # noqa: BLE001  the others are to be played all the same
        traceback.print_exc()
        observed = Observed(Outcome(f"{type(error).__name__}: {error}"[:500], "?", "?"))
    return Played(chapter, scenario, observed, time.monotonic() - begun, why_not)


async def _within_patience(scenario: Scenario, stage: Any, scale: Scale) -> Observed:
    with anyio.fail_after(PATIENCE):
        return await scenario.run(stage, scale)
