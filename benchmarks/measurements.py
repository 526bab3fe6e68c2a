"""The measurements, each a function. What they mean, row by row, is in README.md."""

import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Final

from benchmarks.machine import CORES, GATEWAY_CORES, LOAD_CORES, on_cores, settle
from benchmarks.subjects import Aibridge, Nginx, Subject, free_port
from benchmarks.tooling import CannotMeasure, Load, Protocol, Provider, outcome, provider

Values = Mapping[str, float]
"""Of a measurement: the number for each of its rows."""

SMALL, LARGE, PROMPT = 2_000, 200_000, 20_000
"""Bytes of a request's body."""


# ---- in rounds, all subjects running ----


def _requests(
    subject: Subject, seconds: float, size: int, connections: int, protocol: Protocol = "messages"
) -> Iterator[float]:
    """Microseconds of processor for each request, and requests a second."""
    load = Load(body=size, connections=connections, seconds=seconds, protocol=protocol)
    result, used = subject.play_for_cpu(load)
    yield used / result.done
    yield result.done / result.seconds


def small_requests(subject: Subject, seconds: float) -> Values:
    """32 clients, each with its next request as soon as it has the answer: the subject has all that it can take."""
    return dict(zip(("cpu_request", "throughput"), _requests(subject, seconds, SMALL, 32), strict=True))


def chat_requests(subject: Subject, seconds: float) -> Values:
    """The same in the Chat Completions protocol."""
    return {"cpu_request_chat": next(_requests(subject, seconds, SMALL, 32, "chat"))}


def large_requests(subject: Subject, seconds: float) -> Values:
    """8 clients with large bodies: long conversations, whose last message is a prompt of a kilobyte or two."""
    return {"cpu_large_request": next(_requests(subject, seconds, LARGE, 8))}


def paced_events(subject: Subject, seconds: float) -> Values:
    """20 streams of 200 events, one each 10 ms, evenly spread: each event wakes the subject by itself."""
    streams = 20 * max(1, round(seconds / 2))
    load = Load("mock-n200-u10000", body=SMALL, connections=20, requests=streams, ramp_us=500, events=200)
    result, used = subject.play_for_cpu(load)
    return {"cpu_event": used / result.events}


def burst_events(subject: Subject, seconds: float) -> Values:
    """4 clients; streams of 2,000 events, as fast as they are taken."""
    load = Load("mock-n2000-u0", body=SMALL, connections=4, seconds=seconds, events=2000)
    result, used = subject.play_for_cpu(load)
    return {"cpu_burst_event": used / result.events}


def latency(subject: Subject, seconds: float) -> Values:
    """20 requests a second, whatever becomes of them."""
    result = subject.play(Load(body=SMALL, connections=64, rate=20, seconds=seconds))
    return {"latency_p50": result.latency.p50 / 1e3, "latency_p99": result.latency.p99 / 1e3}


def first_event(subject: Subject, seconds: float) -> Values:
    """20 short streams a second."""
    result = subject.play(Load("mock-n10-u2000", body=SMALL, connections=64, rate=20, seconds=seconds, events=10))
    return {"first_event_p50": result.first_event.p50 / 1e3, "first_event_p99": result.first_event.p99 / 1e3}


def event_delay(subject: Subject, seconds: float) -> Values:
    """100 streams, an event of each every 100 ms."""
    events = int(seconds / 0.1)
    load = Load(f"mock-n{events}-u100000", body=SMALL, connections=100, ramp_us=1000, events=events)
    result = subject.play(load)
    return {"event_delay_p50": result.event_delay.p50 / 1e3, "event_delay_p99": result.event_delay.p99 / 1e3}


@dataclass(frozen=True)
class Timed:
    """A measurement, and how many seconds it takes in a full run."""

    take: Callable[[Subject, float], Values]
    """Given the subject and about how many seconds to spend on it."""
    seconds: float
    direct: bool = False
    """Whether it is also done without a subject, to know what the rest takes."""

    @property
    def name(self) -> str:
        """What is measured, in words."""
        return self.take.__name__.replace("_", " ")


IN_ROUNDS: Final = (
    Timed(small_requests, 1.5),
    Timed(chat_requests, 1.5),
    Timed(large_requests, 1.5),
    Timed(paced_events, 4),
    Timed(burst_events, 1.5),
    Timed(latency, 4, direct=True),
    Timed(first_event, 4, direct=True),
    Timed(event_delay, 3, direct=True),
)


def warm_up(subject: Subject) -> None:
    """What a program does only once, or learns from its first requests, is not measured."""
    seconds = 1 if subject.peer else 0.5
    for protocol in ("messages", "chat"):
        subject.play(Load(body=SMALL, connections=8, seconds=seconds, protocol=protocol))
        subject.play(Load("mock-n20-u1000", body=SMALL, connections=4, seconds=seconds, events=20, protocol=protocol))


# ---- each with a subject of its own ----


def open_streams(kind: type[Subject], upstream: Provider, count: int, seconds: float = 3) -> Values:
    """Memory with so many streams open, each with an event a second, and how promptly it then answers.

    Args:
        kind: What to start.
        upstream: Its provider, which must have no other streams.
        count: How many streams.
        seconds: How long to probe, before and while they are open.

    Raises:
        CannotMeasure: They were not all open within a minute.
    """
    probe = Load(path=kind.health, get=True, connections=64, rate=100, seconds=seconds)
    load = Load("mock-n1000-u1000000", body=PROMPT, connections=count, ramp_us=2000, events=1000)
    upstream.wait_for_streams(0, 10)
    with kind.running([upstream.port]) as subject:
        warm_up(subject)
        idle = subject.play(probe)
        settle(subject.pid)
        at_rest = subject.memory_kb()
        with on_cores(LOAD_CORES):
            clients = subprocess.Popen(subject.load_command(load), stdout=subprocess.DEVNULL)
        try:
            upstream.wait_for_streams(count, 60)
            time.sleep(1.5)  # the last of them have had their first event
            busy, with_streams = subject.play(probe), subject.memory_kb()
            upstream.wait_for_streams(count, 0)
        finally:
            clients.terminate()
            clients.wait()
        if isinstance(subject, Aibridge):
            upstream.wait_for_streams(0, 30)
            subject.expected["client_disconnected"] += count
    return {
        f"memory_{count}": with_streams / 1024,
        f"kb_per_stream_{count}": (with_streams - at_rest) / count,
        f"lag_p99_{count}": (busy.latency.p99 - idle.latency.p50) / 1e3,
    }


def start_up(subject: Subject) -> Values:
    """How long a subject has taken to start, warmed up then; and its memory at rest, after having served."""
    warm_up(subject)
    settle(subject.pid)
    return {"start": subject.ready_seconds, "memory_at_rest": subject.memory_kb() / 1024}


def start_again(kind: type[Subject], upstream: Provider) -> Values:
    """A start in an empty folder, and one with the ledger that the first has left there, where it keeps one."""
    with kind.running([upstream.port]) as subject:
        found = dict(start_up(subject))
        if kind.recorded:
            subject.stop()
            subject.start(GATEWAY_CORES)
            found["start_again"] = subject.ready_seconds
    return found


def _combined(kind: type[Aibridge | Nginx], sides: list[int], seconds: float) -> float:
    """Requests a second of as many workers, providers and loads as there are cores in `sides`."""
    with ExitStack() as stack:
        upstreams = [stack.enter_context(provider(free_port(), {core})) for core in sides]
        ports = [upstream.port for upstream in upstreams]
        subject = stack.enter_context(kind.running(ports, workers=len(sides), cores=set(sides)))
        paths = [subject.path("messages"), kind.second_path]
        loads = [Load(path=path, body=SMALL, connections=32, seconds=seconds) for path, _ in zip(paths, sides, strict=False)]
        runs = []
        for load, core in zip(loads, sides, strict=True):
            with on_cores({core}):
                runs.append(stack.enter_context(subprocess.Popen(subject.load_command(load), stdout=subprocess.PIPE)))
        outcomes = [outcome(run.communicate()[0]) for run in runs]
        for load, result in zip(loads, outcomes, strict=True):
            subject.note(load, result)
            result.check()
        return sum(result.done / result.seconds for result in outcomes)


def two_workers(kind: type[Aibridge | Nginx], seconds: float) -> Values:
    """How many times the requests of one worker two carry; each has a core, which it shares with a provider and a load.

    Raises:
        CannotMeasure: It cannot be done here; the message says why.
    """
    if len(CORES) < 2:
        raise CannotMeasure("there is only one core")
    if kind is Aibridge and not Aibridge.has_workers():
        raise CannotMeasure("this version has no --workers")
    one, two = _combined(kind, CORES[:1], seconds), _combined(kind, CORES[:2], seconds)
    return {"two_workers": two / one}
