"""A run: start everything, measure in rounds, then what needs a subject of its own."""

import datetime as dt
import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

from benchmarks.machine import LOAD_CORES, describe, on_cores
from benchmarks.measurements import IN_ROUNDS, Timed, Values, open_streams, start_again, start_up, two_workers
from benchmarks.results import Results
from benchmarks.subjects import Aibridge, Direct, Nginx, Subject, free_port
from benchmarks.tooling import CannotMeasure, Provider, commit, provider


@dataclass(frozen=True)
class Effort:
    """How much to do."""

    rounds: int
    """Rounds with all subjects."""
    peer_rounds: int
    """In how many of them the peers take part."""
    scale: float
    """What the seconds of each measurement are multiplied with."""
    streams: tuple[int, ...]
    """How many are opened, one after another."""
    peer_streams: tuple[int, ...]
    starts: int
    """How often aibridge and nginx are started anew. Of the peers only the first start counts."""
    worker_rounds: int


FULL = Effort(
    rounds=5, peer_rounds=3, scale=1, streams=(1000, 1000, 1000, 5000), peer_streams=(1000,), starts=4, worker_rounds=3
)
QUICK = Effort(rounds=2, peer_rounds=1, scale=0.2, streams=(1000,), peer_streams=(), starts=1, worker_rounds=1)

Say = Callable[[str], None]


class Suite:
    """A run of the measurements.

    Args:
        kinds: The subjects.
        effort: How much to do.
        say: Takes a line on what is being done.
    """

    def __init__(self, kinds: list[type[Subject]], effort: Effort, say: Say) -> None:
        there = [kind for kind in kinds if kind.missing() is None]
        self._kinds, self._effort, self._say = there, effort, say
        self.results = Results(
            when=dt.datetime.now(dt.UTC).isoformat(timespec="minutes"),
            command=" ".join(["python -m benchmarks", *sys.argv[1:]]),
            machine=describe(),
            versions={"commit": commit(), **{kind.name: version for kind in there if (version := kind.version())}},
            absent={kind.name: reason for kind in kinds if (reason := kind.missing()) is not None},
        )

    def run(self) -> Results:
        """Measure all; what fails is among the results' problems."""
        with on_cores(LOAD_CORES), provider(free_port()) as upstream:
            try:
                self._rounds(upstream)
            except CannotMeasure as error:  # as the subjects are stopped, their ledgers are looked at
                self._problem(Aibridge.name, "after the rounds", error)
            self._alone(upstream)
            self._workers()
        return self.results

    def _rounds(self, upstream: Provider) -> None:
        with ExitStack() as stack:
            subjects = list(self._started(stack, upstream))
            for turn, timed in itertools.product(range(self._effort.rounds), IN_ROUNDS):
                for subject in subjects:
                    self._take_turn(subject, timed, turn)

    def _started(self, stack: ExitStack, upstream: Provider) -> Iterator[Subject]:
        """All subjects, running and warm."""
        kinds: list[type[Subject]] = [Direct, *self._kinds]
        for kind in kinds:
            self._say(f"starting {kind.name}")
            try:
                subject = stack.enter_context(kind.running([upstream.port]))
            except CannotMeasure as error:
                self._problem(kind.name, "start", error)
                continue
            if kind is not Direct and kind.only is None:
                self._note(kind.name, "warm-up", partial(start_up, subject))
            yield subject

    def _take_turn(self, subject: Subject, timed: Timed, turn: int) -> None:
        if (subject.only is not None and timed.name not in subject.only) or (
            isinstance(subject, Direct) and not timed.direct
        ):
            return
        if subject.peer and turn >= self._effort.peer_rounds:
            return
        self._note(
            subject.name, f"{timed.name}, round {turn + 1}", partial(timed.take, subject, timed.seconds * self._effort.scale)
        )

    def _alone(self, upstream: Provider) -> None:
        for kind in self._kinds:
            if kind.only is not None:
                continue
            for _ in range(0 if kind.peer else self._effort.starts):
                self._note(kind.name, "start", partial(start_again, kind, upstream))
            for count in self._effort.peer_streams if kind.peer else self._effort.streams:
                seconds = 5 * self._effort.scale
                self._note(kind.name, f"{count:,} streams", partial(open_streams, kind, upstream, count, seconds))

    def _workers(self) -> None:
        kinds: tuple[type[Aibridge | Nginx], ...] = (Nginx, Aibridge)
        for _, kind in itertools.product(range(self._effort.worker_rounds), kinds):
            if kind in self._kinds:
                self._note(kind.name, "two workers", partial(two_workers, kind, 3 * self._effort.scale))

    def _note(self, subject: str, what: str, take: Callable[[], Values]) -> None:
        self._say(f"{subject}: {what}")
        try:
            values = take()
        except (CannotMeasure, OSError) as error:
            self._problem(subject, what, error)
            return
        for row, value in values.items():
            self.results.add(row, subject, value)

    def _problem(self, subject: str, what: str, error: Exception) -> None:
        problem = f"{subject}, {what}: {error}"
        if problem not in self.results.problems:
            self._say(problem)
            self.results.problems.append(problem)
