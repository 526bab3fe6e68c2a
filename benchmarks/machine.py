"""The machine under the measurements: its cores, what processes have used of them, and their memory. Linux only."""

import ctypes
import os
import platform
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

CORES: Final = sorted(os.sched_getaffinity(0))
GATEWAY_CORES: Final = {CORES[0]}
"""Where subjects run. On a machine with one core everything shares it."""
LOAD_CORES: Final = {CORES[1] if len(CORES) > 1 else CORES[0]}
"""Where the provider, the load and this program run."""

_libc: Final = ctypes.CDLL(None, use_errno=True)
_QUIET_SECONDS: Final = 0.05
_QUIET_SHARE: Final = 0.03


@contextmanager
def on_cores(cores: set[int]) -> Iterator[None]:
    """Processes started inside run on these cores: a child inherits them from the thread that forks."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def allow_many_files() -> None:
    """As many sockets as the system lets us, and the processes that we start, have."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def processes(pid: int) -> list[int]:
    """A process and all that descend from it. Empty if it has ended."""
    found = [pid]
    try:
        threads = list(Path(f"/proc/{pid}/task").iterdir())
        children = [int(child) for thread in threads for child in (thread / "children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []
    for child in children:
        found += processes(child)
    return found


def cpu_seconds(pid: int) -> float:
    """What a process and its descendants have used of processors, user and system.

    From the processes' own clocks (clock_getcpuclockid(3)), exact to the nanosecond. /proc/PID/stat counts ticks of 10 ms,
    and the schedstat files of the threads forget those that have ended.
    """
    total = 0.0
    for process in processes(pid):
        clock = ctypes.c_int()
        if _libc.clock_getcpuclockid(process, ctypes.byref(clock)) == 0:
            total += time.clock_gettime(clock.value)
    return total


def settle(pid: int, limit: float = 0.5) -> None:
    """Wait until a process has done what it had put off, at most `limit` seconds: that belongs to the work before."""
    deadline = time.monotonic() + limit
    used = cpu_seconds(pid)
    while time.monotonic() < deadline:
        time.sleep(_QUIET_SECONDS)
        before, used = used, cpu_seconds(pid)
        if used - before < _QUIET_SECONDS * _QUIET_SHARE:
            return


def memory_kb(pid: int) -> int:
    """Memory of a process and its descendants in KB; what they share counts once (PSS)."""
    total = 0
    for process in processes(pid):
        rollup = Path(f"/proc/{process}/smaps_rollup").read_text()
        total += int(rollup.split("\nPss:")[1].split()[0])
    return total


def describe() -> dict[str, str | int]:
    """What the numbers were taken on."""
    information = Path("/proc/cpuinfo").read_text()
    models = [line.split(":")[1].strip() for line in information.splitlines() if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.machine(),
        "cores": len(CORES),
        "kernel": f"{platform.system()} {platform.release()}",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
    }
