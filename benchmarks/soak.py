"""Ten minutes of everything that traffic can be: does the gateway's memory grow, do its file descriptors or threads?

    make soak
    make soak ARGS="--minutes 1"

Each kind of traffic below goes on from the beginning to the end, all at once. Every few seconds memory, file descriptors,
threads and the size of SQLite's write-ahead log are noted. The first third is warm-up. Flat is what `problems` has nothing
against; then the exit status is 0.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from benchmarks.machine import LOAD_CORES, allow_many_files, describe, memory_kb, on_cores, processes, settle
from benchmarks.subjects import Aibridge, free_port
from benchmarks.tooling import BUILD, CannotMeasure, Load, Outcome, build, commit, outcome, provider

_RUN_SECONDS: Final = 5
_SAMPLE_SECONDS: Final = 3
_SLOPE_MB: Final = 40
"""An hour. A leak of 100 bytes with each of these requests would be twice that."""
_GROWTH_MB: Final = 4
"""In all: what a short run cannot tell from chance."""
_SPARE: Final = 8
"""Descriptors and threads that come and go: a file of the database, a thread that looks up a name."""

TRAFFIC: Final = {
    "blocking": Load(body=2_000, connections=4, rate=40),
    "blocking, chat": Load(body=2_000, connections=4, rate=20, protocol="chat"),
    "blocking, responses": Load(body=2_000, connections=4, rate=20, protocol="responses"),
    "large bodies": Load("mock-n1-j200000", body=200_000, connections=4, rate=5),
    "streams": Load("mock-n100-u10000", body=20_000, connections=10, events=100),
    "streams, chat": Load("mock-n100-u10000", body=20_000, connections=5, events=100, protocol="chat"),
    "streams, responses": Load("mock-n100-u10000", body=20_000, connections=5, events=100, protocol="responses"),
    "bursts": Load("mock-n2000-u0", body=2_000, connections=2, rate=2, events=2_000),
    "errors": Load("mock-e529", connections=2, rate=10),
    "errors, chat": Load("mock-e429", connections=2, rate=10, protocol="chat"),
    "no answers": Load("mock-k", connections=2, rate=10),
    "streams that break": Load("mock-n50-u5000-K", connections=4, rate=10, events=50),
    "clients that leave": Load(
        "mock-n4000-u5000", connections=8, rate=20, events=4_000, leave_after=10
    ),  # long before the end
    "slow readers": Load("mock-n20000-u0", connections=3, events=20_000, slow=1_000_000),
    "new connections": Load(body=500, connections=4, rate=20, reconnect=True),
    "metrics": Load(path="/metrics", get=True, connections=1, rate=1),
}
"""What goes on, by name."""
FAULTY: Final = {"errors", "errors, chat", "no answers", "streams that break", "clients that leave"}
"""Which of it is not meant to end well. The rest must."""


@dataclass(frozen=True)
class Sample:
    """The gateway at a moment."""

    seconds: float
    memory_mb: float
    descriptors: int
    threads: int
    wal_mb: float


def sample(subject: Aibridge, begin: float) -> Sample:
    """Look at it now."""
    there = [Path(f"/proc/{pid}") for pid in processes(subject.pid)]
    log = subject.folder / "aibridge.db-wal"
    return Sample(
        seconds=round(time.monotonic() - begin, 1),
        memory_mb=round(memory_kb(subject.pid) / 1024, 2),
        descriptors=sum(len(list((process / "fd").iterdir())) for process in there),
        threads=sum(len(list((process / "task").iterdir())) for process in there),
        wal_mb=round(log.stat().st_size / 1e6, 2) if log.exists() else 0,
    )


def after_warm_up(samples: list[Sample]) -> list[Sample]:
    """Without the first third, and without the last, which is of a gateway with nothing to do."""
    return samples[len(samples) // 3 : -1]


def slope(samples: list[Sample]) -> float:
    """How fast the memory rises, in MB an hour: the median over all pairs of samples (Theil and Sen)."""
    pairs = itertools.combinations(samples, 2)
    return statistics.median((b.memory_mb - a.memory_mb) / (b.seconds - a.seconds) for a, b in pairs) * 3600


def growth(samples: list[Sample]) -> float:
    """By how many MB the memory has risen, from the first fifth to the last, by their medians."""
    fifth = max(1, len(samples) // 5)
    first, last = samples[:fifth], samples[-fifth:]
    return statistics.median(s.memory_mb for s in last) - statistics.median(s.memory_mb for s in first)


class Traffic(threading.Thread):
    """One kind of traffic, in runs of a few seconds: each names another model, and opens connections of its own."""

    def __init__(self, subject: Aibridge, name: str, load: Load, until: float) -> None:
        super().__init__(name=name)
        self.outcomes: list[Outcome] = []
        self._subject, self._load, self._until = subject, load, until

    def run(self) -> None:
        """Go on to the end."""
        for number in itertools.count():
            if (left := self._until - time.monotonic()) <= 0:
                return
            model = f"model-{self.name.replace(' ', '-').replace(',', '')}-{number}"
            load = Load(**{**asdict(self._load), "seconds": min(_RUN_SECONDS, left), "model": model})
            with on_cores(LOAD_CORES):
                run = subprocess.run(self._subject.load_command(load), capture_output=True, check=True)
            self.outcomes.append(outcome(run.stdout))

    def endings(self) -> Counter[str]:
        """How many interceptions of each status this must have left in the ledger."""
        if self._load.get:
            return Counter()
        ended = "failed" if self.name in FAULTY else "completed"
        return Counter({ended: self.total("done") + self.total("errors"), "client_disconnected": self.total("left")})

    def total(self, field: str) -> int:
        """The sum of one of the outcomes' counts."""
        return sum(getattr(one, field) for one in self.outcomes)


def soak(subject: Aibridge, seconds: float) -> tuple[list[Sample], list[Traffic]]:
    """Run the traffic; the samples, of which the last is of the gateway without any client."""
    begin = time.monotonic()
    traffic = [Traffic(subject, name, load, begin + seconds) for name, load in TRAFFIC.items()]
    samples = []
    for kind in traffic:
        kind.start()
    while time.monotonic() < begin + seconds:
        time.sleep(_SAMPLE_SECONDS)
        samples.append(sample(subject, begin))
    for kind in traffic:
        kind.join()
    settle(subject.pid, 5)
    return [*samples, sample(subject, begin)], traffic


def problems(samples: list[Sample], resting: Sample, pooled: int) -> Iterator[str]:
    """What is not flat, a line each.

    Args:
        samples: In order of time; the last was taken when all clients had gone.
        resting: Taken before the first client came.
        pooled: Connections to the provider in the end, which the gateway keeps for requests to come.
    """
    end = samples[-1]
    steady = after_warm_up(samples)
    before, after = steady[: len(steady) // 2], steady[len(steady) // 2 :]
    if slope(steady) > _SLOPE_MB and growth(steady) > _GROWTH_MB:
        yield f"memory rises by {slope(steady):.1f} MB an hour, by {growth(steady):.1f} MB after the warm-up"
    if (last := max(s.descriptors for s in after)) > 1.1 * (first := max(s.descriptors for s in before)) + _SPARE:
        yield f"open descriptors grow under the same traffic: at most {first}, then at most {last}"
    if (last := max(s.threads for s in after)) > (first := max(s.threads for s in before)) + _SPARE:
        yield f"threads grow under the same traffic: at most {first}, then at most {last}"
    if end.descriptors > resting.descriptors + pooled + _SPARE:
        there = f"{resting.descriptors} were before, {pooled} are to the provider"
        yield f"without clients {end.descriptors} descriptors are open: {there}"


def unexpected(traffic: list[Traffic]) -> Iterator[str]:
    """Requests that should have ended well and did not."""
    for kind in traffic:
        bad = {field: kind.total(field) for field in ("errors", "bad_status", "incomplete", "unfinished")}
        if kind.name not in FAULTY and any(bad.values()):
            complaints = {one.complaint for one in kind.outcomes if one.complaint}
            yield f"{kind.name}: {bad} {' '.join(sorted(complaints))}"


def show(samples: list[Sample]) -> Iterator[str]:
    """About twenty of the samples, as a table."""
    yield f"{'seconds':>8} {'memory MB':>10} {'descriptors':>12} {'threads':>8} {'WAL MB':>7}"
    for one in [*samples[: -1 : max(1, len(samples) // 20)], samples[-1]]:
        yield f"{one.seconds:8.0f} {one.memory_mb:10.1f} {one.descriptors:12} {one.threads:8} {one.wal_mb:7.1f}"


def main() -> int:
    """Soak, print the samples, say whether it is flat; 1 where it is not."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description="Mixed traffic; is memory flat?")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--output", type=Path, default=BUILD / "results" / "soak.json", help="where to write the samples")
    options = parser.parse_args()
    allow_many_files()
    build("load")
    with provider(free_port()) as upstream, Aibridge.running([upstream.port]) as subject:
        subject.play(Load(body=500))
        resting = sample(subject, time.monotonic())
        samples, traffic = soak(subject, options.minutes * 60)
        pooled = upstream.counters().connected
        for kind in traffic:
            subject.expected.update(kind.endings())
    found = [*problems(samples, resting, pooled), *unexpected(traffic)]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    steady = after_warm_up(samples)
    report = {
        "machine": describe(),
        "commit": commit(),
        "requests": sum(subject.expected.values()),
        "growth_mb": growth(steady),
        "slope_mb_an_hour": slope(steady),
        "pooled": pooled,
        "resting": asdict(resting),
        "samples": [asdict(one) for one in samples],
        "problems": found,
    }
    options.output.write_text(json.dumps(report, indent=1))
    verdict = "NOT FLAT" if found else "FLAT"
    print("\n".join([*show(samples), "", *found]))
    print(f"{verdict}: {report['requests']:,} requests in {options.minutes:g} minutes, all of them in the ledger")
    print(f"memory after the warm-up: {growth(steady):+.1f} MB, {slope(steady):+.1f} MB an hour")
    print(f"descriptors without clients: {resting.descriptors} at first, {samples[-1].descriptors} now ({pooled} upstream)")
    print(f"written: {options.output}")
    return 1 if found else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except CannotMeasure as error:
        sys.exit(str(error))
