"""Metrics of several workers as one. Each counts in files of its own, and whoever is scraped adds up all of them.

This is prometheus-client's multiprocess mode (prometheus.github.io/client_python/multiprocess), with one difference: a
worker is known by its number and not by the id of its process. So the one that takes a dead one's place counts on in its
files: counters never go down, and there are never more files than workers have.
"""

import logging
import os
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector, values
from prometheus_client.metrics_core import Metric
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from prometheus_client.registry import Collector

logger = logging.getLogger(__name__)

_STARTED: Final = "process_start_time_seconds"
_CPU: Final = "process_cpu_seconds"
# The files of one worker, and what is room for some thousand series in each.
_KINDS: Final = ("counter", "histogram", "gauge_livesum", "gauge_livemin", "gauge_livemax")
_FILE_BYTES: Final = 1 << 20
_USED: Final = struct.Struct("i")  # how much of a file is used, at its beginning (prometheus_client.mmap_dict)
_MARGIN: Final = 1 << 16  # larger than any entry: three labels of 128 characters, escaped, are below 5 KiB


def count_in_files(directory: Path, worker: int) -> None:
    """From now on, metrics that are made in this process are those of that worker. Raises OSError.

    Room for them is taken before it is needed. prometheus-client makes files with holes, grows them by holes, and writes
    through mmap(2): a write into a hole on a full disk ends the process (SIGBUS). All series that there may be take 64 MB
    and more, which hardly anybody needs, so that not all of it is taken at once. Where there is no more, new series are kept
    in memory, and are not shown.
    """
    for kind in _KINDS:
        with (directory / f"{kind}_{worker}.db").open("ab") as file:
            if not file.tell():
                file.write(bytes(_FILE_BYTES))
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(directory)
    values.ValueClass = _value_class(directory, worker)


def _value_class(directory: Path, worker: int) -> type:
    """What keeps one value of a metric: in the file of its kind, or in memory where that is full."""
    in_file: Any = values.MultiProcessValue(lambda: worker)  # type: ignore[no-untyped-call]
    full: set[Path] = set()

    class Value(in_file):  # type: ignore[misc]
        def __new__(cls, kind: str, *about: Any, multiprocess_mode: str = "", **more: Any) -> Any:
            name = f"{kind}_{multiprocess_mode}" if kind == "gauge" else kind
            path = directory / f"{name}_{worker}.db"
            if path not in full:
                try:
                    _make_room(path)
                    return super().__new__(cls)
                except OSError as error:
                    full.add(path)
                    logger.warning("metrics that are new are not shown from now on: %s: %s", path, error.strerror)
            return values.MutexValue(kind, *about, **more)  # type: ignore[no-untyped-call]

    return Value


def _make_room(path: Path) -> None:
    """Have a file grow before it must: prometheus-client doubles what it knows of it, and finds that it is that large.

    Raises OSError where it cannot.
    """
    with path.open("r+b", buffering=0) as file:
        (used,) = _USED.unpack(file.read(_USED.size))
        size = file.seek(0, os.SEEK_END)
        if used + _MARGIN <= size:
            return
        try:
            left = size
            while left:
                left -= file.write(bytes(left))
        except OSError:
            file.truncate(size)
            raise


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
