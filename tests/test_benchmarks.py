"""The benchmark suite: that it counts right, compares right, and runs. How long anything takes is never asserted.

Truth: what the provider was scripted to say, for the tools; numbers worked out by hand, for the statistics.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

if sys.platform != "linux":
    pytest.skip("the benchmarks' tools need Linux", allow_module_level=True)

from benchmarks import tooling
from benchmarks.machine import cpu_seconds, memory_kb, on_cores, processes
from benchmarks.measurements import large_requests, open_streams, paced_events, small_requests
from benchmarks.plot import svg
from benchmarks.report import table, targets
from benchmarks.results import ROWS, TARGETS, Results, difference, median, ratio
from benchmarks.soak import Sample, growth, problems, slope
from benchmarks.subjects import SUBJECTS, Aibridge, Direct, Nginx, Thin, free_port
from benchmarks.tooling import CannotMeasure, Load, Protocol, Provider

needs_compiler = pytest.mark.skipif(tooling.compiler() is None, reason="there is no C compiler")


Rows = dict[str, dict[str, list[float | None]]]


def found(samples: Rows) -> Results:
    machine: dict[str, str | int] = {"cpu": "A <fast> one", "cores": 2}
    return Results("now", "make bench", machine, {}, {"portkey": "not installed"}, samples)


# ---- what is computed ----


def test_medians_leave_out_what_failed() -> None:
    assert median([3, None, 1, 2]) == 2
    assert median([None]) is None and median([]) is None


def test_ratios_and_differences_are_of_the_same_round() -> None:
    ours, nginx = [10.0, 40.0, None, 90.0], [5.0, 10.0, 1.0, 30.0]
    assert ratio(ours, nginx) == 3  # of 2, 4 and 3; the ratio of the medians would be 5.3
    assert difference(ours, nginx) == 30
    assert ratio([1.0, 6.0], [-1.0, 2.0]) == 3, "a base that is nothing has no multiples"
    assert ratio([1.0], []) is None


def test_targets_met_missed_and_not_measured() -> None:
    rows: Rows = {"cpu_request": {"aibridge": [50.0], "nginx": [10.0], "portkey": [300.0]}, "start": {"aibridge": [1.5]}}
    results = found(rows)
    said = {line.split(":")[0]: line for line in targets(results)}
    assert len(said) == len(TARGETS)
    assert "5.00 (at most 6)" in said["ok            CPU per 2 KB request, times nginx's"]
    assert "6.00 (at least 8)" in said["missed        times less CPU per request than Portkey"]
    assert "not measured  times less CPU per request than LiteLLM" in said
    assert "missed        start to first answer, s" in said


def test_the_smaller_advantage_over_a_peer_counts() -> None:
    rows: Rows = {
        "cpu_request": {"aibridge": [10.0], "portkey": [200.0]},
        "cpu_request_chat": {"aibridge": [10.0], "portkey": [90.0]},
    }
    (target,) = (target for target in TARGETS if "Portkey" in target.title)
    assert target.verdict(found(rows)) == ("ok", 9.0)


def test_table_and_picture() -> None:
    rows: Rows = {
        "latency_p50": {"direct": [1.0, 2.0], "nginx": [1.5, 2.5], "aibridge": [3.0, 4.5], "litellm": [None]},
        "cpu_event": {"nginx": [20.0], "aibridge": [30.0]},
    }
    results = found(rows)
    header, event, added = table(results)
    assert header.split() == ["direct", "nginx", "aibridge", "litellm"]
    assert "20.0 µs" in event and "30.0 µs (1.5 x)" in event
    assert "0.50 ms" in added and "2.25 ms (4.5 x)" in added, "what direct takes is taken away in each round"
    picture = svg(results)
    assert "A &lt;fast&gt; one" in picture and picture.count("<rect") == 5


def test_every_target_is_about_a_row_that_is_shown() -> None:
    names = ("aibridge", "nginx", "litellm", "portkey")
    everything: Rows = {row.key: {name: [1.0] for name in names} for row in ROWS}
    assert all(target.verdict(found(everything))[1] is not None for target in TARGETS)


def soaked(memory: list[float], *, descriptors: int = 50, threads: int = 5) -> list[Sample]:
    return [Sample(index * 3.0, value, descriptors, threads, 0) for index, value in enumerate(memory)]


def test_a_slope_is_not_moved_by_outliers() -> None:
    level = [60.0] * 30
    level[7] = 200.0
    assert slope(soaked(level)) == 0
    assert slope(soaked([60 + 0.01 * index for index in range(30)])) == pytest.approx(0.01 / 3 * 3600)
    assert growth(soaked([60.0] * 10 + [61.0] * 10 + [65.0] * 10)) == 5


def test_what_a_soak_finds() -> None:
    resting = Sample(0, 50, 20, 5, 0)
    flat = soaked([60.0] * 60)
    end = Sample(200, 60, 25, 5, 0)
    assert list(problems([*flat, end], resting, 5)) == []
    rising = soaked([60 + 0.2 * index for index in range(60)])
    assert "memory rises by 240.0 MB an hour" in next(problems([*rising, end], resting, 5))
    warming = soaked([60.0 + index for index in range(20)] + [80.0] * 40)
    assert list(problems([*warming, end], resting, 5)) == [], "the first third is warm-up"
    leak = flat[:40] + soaked([60.0] * 60, descriptors=90)[40:]
    assert "descriptors grow" in next(problems([*leak, end], resting, 5))
    more = flat[:40] + soaked([60.0] * 60, threads=20)[40:]
    assert "threads grow" in next(problems([*more, end], resting, 5))
    assert "without clients 60" in next(problems([*flat, Sample(200, 60, 60, 5, 0)], resting, 5))


# ---- the machine ----


def test_what_children_and_threads_have_used_counts() -> None:
    burn = (
        "import threading, time\n"
        "def burn():\n"
        "    while time.thread_time() < 0.2: pass\n"
        "thread = threading.Thread(target=burn); thread.start(); thread.join()\n"
    )
    script = (
        "import subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', sys.argv[1] + 'print(flush=True); input()'])\n"
        "child.wait()\n"
    )
    with subprocess.Popen([sys.executable, "-c", script, burn], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert len(processes(process.pid)) == 2
        assert cpu_seconds(process.pid) >= 0.2, "the thread that used it has ended, in a child"
        assert memory_kb(process.pid) > 1000
        process.communicate(b"\n", timeout=20)
    assert processes(process.pid) == []


def test_a_child_runs_where_it_was_started() -> None:
    here = os.sched_getaffinity(0)
    core = max(here)
    with on_cores({core}):
        command = [sys.executable, "-c", "import os; print(*os.sched_getaffinity(0))"]
        assert subprocess.run(command, capture_output=True, check=True).stdout.split() == [str(core).encode()]
    assert os.sched_getaffinity(0) == here


# ---- the tools ----


@needs_compiler
@pytest.mark.parametrize("name", ["provider", "load"])
def test_the_tools_compile_without_warnings(name: str, tmp_path: Path) -> None:
    program = tooling.build(name, tmp_path)  # type: ignore[arg-type]  # -Wall -Wextra -Werror
    before = program.stat().st_mtime_ns
    assert tooling.build(name, tmp_path).stat().st_mtime_ns == before, "once is enough"  # type: ignore[arg-type]


def test_without_a_compiler_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CannotMeasure, match="no C compiler"):
        tooling.build("load", tmp_path)


@pytest.fixture
def upstream() -> Iterator[Provider]:
    if tooling.compiler() is None:
        pytest.skip("there is no C compiler")
    with tooling.provider(free_port()) as running:
        yield running


@pytest.fixture
def direct(upstream: Provider, tmp_path: Path) -> Direct:
    return Direct([upstream.port], tmp_path)


@pytest.mark.parametrize("protocol", ["messages", "chat", "responses"])
def test_the_load_counts_what_the_provider_sent(protocol: Protocol, direct: Direct) -> None:
    blocking = direct.play(Load(protocol=protocol, body=2_000, connections=4, requests=20))
    assert (blocking.done, blocking.events, blocking.connections) == (20, 20, 4)
    burst = direct.play(Load("mock-n300-u0", protocol=protocol, connections=2, requests=4, events=300))
    assert (burst.done, burst.events, burst.event_delay.count) == (4, 1200, 1200)
    paced = direct.play(Load("mock-n5-u1000", protocol=protocol, requests=2, events=5, reconnect=True))
    assert (paced.done, paced.events, paced.connections) == (2, 10, 2)


def test_what_goes_wrong_is_counted(direct: Direct) -> None:
    for script, events, said in (
        ("mock-e529", None, "1 had another status"),
        ("mock-k", None, "1 failed"),
        ("mock-n50-u1000-K", 50, "1 failed"),
        ("mock-n50-u0-K", 50, "1 failed"),
        ("mock-n5-u0", 6, "1 had lost events"),
    ):
        with pytest.raises(CannotMeasure, match=said):
            direct.play(Load(script, events=events))


def test_clients_that_leave_and_clients_that_are_slow(upstream: Provider, direct: Direct) -> None:
    with pytest.raises(CannotMeasure, match="0 requests were answered"):
        direct.play(Load("mock-n1000-u1000", requests=1, events=1000, leave_after=3))
    upstream.wait_for_streams(0, 10)
    slow = direct.play(Load("mock-n200-u0", requests=1, events=200, slow=100_000))
    assert slow.events == 200


def test_requests_at_a_rate(direct: Direct) -> None:
    played = direct.play(Load(connections=8, rate=200, requests=20))
    assert (played.done, played.latency.count) == (20, 20)


# ---- end to end ----


def test_a_measurement_of_the_gateway(upstream: Provider) -> None:
    with Aibridge.running([upstream.port]) as subject:
        taken = {**small_requests(subject, 0.2), **paced_events(subject, 0.2)}
        assert all(value > 0 for value in taken.values()) and taken.keys() == {"cpu_request", "throughput", "cpu_event"}
        assert subject.expected["completed"] > 40
    # that the ledger has as many was checked when it stopped


def test_open_streams_of_the_gateway(upstream: Provider) -> None:
    taken = open_streams(Aibridge, upstream, 10, seconds=0.2)
    assert taken["memory_10"] > 0 and taken.keys() == {"memory_10", "kb_per_stream_10", "lag_p99_10"}


def test_a_ledger_that_is_not_complete_is_an_error(upstream: Provider) -> None:
    with Aibridge.running([upstream.port]) as subject:
        subject.play(Load(requests=3))
        subject.expected["completed"] += 1
        subject.stop()
        with pytest.raises(CannotMeasure, match=re.escape("the ledger has {'completed': 3}, but {'completed': 4}")):
            subject.verify()
        subject.expected["completed"] -= 1


@pytest.mark.skipif(Nginx.missing() is not None, reason="nginx is not installed")
def test_a_measurement_of_nginx(upstream: Provider) -> None:
    with Nginx.running([upstream.port]) as subject:
        assert small_requests(subject, 0.1)["cpu_request"] > 0


def test_a_measurement_of_the_thinnest_relay(upstream: Provider) -> None:
    with Thin.running([upstream.port]) as subject:
        taken = {**small_requests(subject, 0.1), **large_requests(subject, 0.1), **paced_events(subject, 0.1)}
        assert all(value and value > 0 for value in taken.values())


def test_what_is_not_installed_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    reasons = {kind.name: kind.missing() for kind in SUBJECTS}
    assert reasons["aibridge"] is None
    assert "nginx-light" in str(reasons["nginx"]) and "make bench-peers" in str(reasons["portkey"])
