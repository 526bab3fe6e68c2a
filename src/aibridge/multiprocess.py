"""Metrics of several workers as one. Each counts in files of its own, and whoever is scraped adds up all of them.

This is prometheus-client's multiprocess mode (prometheus.github.io/client_python/multiprocess), with one difference: a
worker is known by its number and not by the id of its process. So the one that takes a dead one's place counts on in its
files: counters never go down, and there are never more files than workers have.
"""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector, values
from prometheus_client.metrics_core import Metric
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from prometheus_client.registry import Collector

_STARTED: Final = "process_start_time_seconds"
_CPU: Final = "process_cpu_seconds"
# The files of one worker, and what is room for some thousand series in each.
_KINDS: Final = ("counter", "histogram", "gauge_livesum", "gauge_livemin", "gauge_livemax")
_FILE_BYTES: Final = 1 << 20


def count_in_files(directory: Path, worker: int) -> None:
    """From now on, metrics that are made in this process are those of that worker. Raises OSError.

    Room for them is taken at once. prometheus-client makes files with holes and writes through mmap(2), and a write into a
    hole on a full disk ends the process (SIGBUS).
    """
    for kind in _KINDS:
        with (directory / f"{kind}_{worker}.db").open("ab") as file:
            if not file.tell():
                file.write(bytes(_FILE_BYTES))
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(directory)
    values.ValueClass = values.MultiProcessValue(lambda: worker)  # type: ignore[no-untyped-call]


def forget_gauges(directory: Path, worker: int) -> None:
    """The worker has ended: nothing is under way in it any more."""
    mark_process_dead(worker, str(directory))  # type: ignore[no-untyped-call]


def registry_of_all(directory: Path, supervisor: int) -> CollectorRegistry:
    """What all workers count in a directory, and the figures of their processes. `supervisor` is the id of their parent."""
    registry = CollectorRegistry()
    registry.register(_Files(directory))
    registry.register(_Processes(supervisor))
    PlatformCollector(registry=registry)
    return registry


class _Files(Collector):
    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def collect(self) -> Iterable[Metric]:
        files = [str(path) for path in self._directory.glob("*.db") if _has_begun(path)]
        merged: Iterable[Metric] = MultiProcessCollector.merge(files)  # type: ignore[no-untyped-call]
        return merged


def _has_begun(path: Path) -> bool:
    """Whether there is something to read: not in a file that was made this instant, or that a dead worker has had."""
    try:
        return path.stat().st_size > 0
    except FileNotFoundError:
        return False


class _Processes(Collector):
    """prometheus-client's metrics of a process, added up for a parent and its children.

    CPU time includes that of children that have ended, so it never goes down. The start is the parent's. What several
    processes share of their memory counts for each of them. Where the system has no ``/proc`` there is nothing.
    """

    def __init__(self, parent: int) -> None:
        self._parent = parent

    def collect(self) -> Iterable[Metric]:
        asked = self._parent
        process = ProcessCollector(registry=None, pid=lambda: asked)
        families: dict[str, Metric] = {}
        found: dict[str, list[float]] = {_CPU: [_ended_children_seconds(self._parent)]}
        for pid in (self._parent, *_children(self._parent)):
            asked = pid
            for family in process.collect():
                families.setdefault(family.name, family)
                found.setdefault(family.name, []).append(family.samples[0].value)
        for name, family in families.items():
            value = min(found[name]) if name == _STARTED else sum(found[name])
            family.samples = [family.samples[0]._replace(value=value)]
        return families.values()


def _children(parent: int) -> Sequence[int]:
    """The ids of processes (proc(5), ``/proc/pid/task/tid/children``)."""
    try:
        return [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]
    except OSError:
        return []


def _ended_children_seconds(parent: int) -> float:
    """User and system time of the children that were waited for (proc(5): fields 16 and 17 of ``/proc/pid/stat``)."""
    try:
        fields = Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[13]) + int(fields[14])) / os.sysconf("SC_CLK_TCK")
