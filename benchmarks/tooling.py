"""The two tools in C: built once, started, and asked."""

import shutil
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import msgspec

from benchmarks.machine import LOAD_CORES, on_cores

ROOT: Final = Path(__file__).parent.parent
BUILD: Final = ROOT / ".bench"
"""What the suite builds, installs and writes. Git ignores it."""

Protocol = Literal["messages", "chat", "responses"]
PATHS: Final[dict[Protocol, str]] = {
    "messages": "/v1/messages",
    "chat": "/v1/chat/completions",
    "responses": "/v1/responses",
}
MODELS: Final[dict[Protocol, str]] = {"messages": "claude-sonnet-4-5", "chat": "gpt-4o", "responses": "gpt-4o"}

_SOURCES: Final = Path(__file__).parent / "tools"
_WARNINGS: Final = ("-Wall", "-Wextra", "-Werror")


class CannotMeasure(Exception):
    """Something that the suite needs is not there, or did not work. The message is for whoever started it."""


def commit() -> str:
    """Which commit of ours is here; empty where it is not known."""
    command = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


def compiler() -> str | None:
    """The C compiler's path, where there is one."""
    return shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")


def build(name: Literal["provider", "load"], folder: Path = BUILD / "bin") -> Path:
    """Build a tool, unless that was done since its source changed; the program's path.

    Raises:
        CannotMeasure: There is no compiler, or it refuses the source.
    """
    program = folder / name
    changed = max(path.stat().st_mtime for path in _SOURCES.iterdir())
    if program.exists() and program.stat().st_mtime > changed:
        return program
    cc = compiler()
    if cc is None:
        raise CannotMeasure("The load generator is written in C, and no C compiler was found (Debian: the package gcc).")
    folder.mkdir(parents=True, exist_ok=True)
    command = [cc, "-O2", *_WARNINGS, "-o", str(program), str(_SOURCES / f"{name}.c")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise CannotMeasure(f"{' '.join(command)}\n{result.stderr}")
    return program


class Distribution(msgspec.Struct, frozen=True):
    """How a time is distributed, in microseconds."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float
    max: float


class Outcome(msgspec.Struct, frozen=True):
    """What the load generator says of a run."""

    done: int
    """Requests that were answered to the end."""
    errors: int
    bad_status: int
    incomplete: int
    """Answers with another number of events than scripted."""
    left: int
    """Requests that the client abandoned, as it was told to."""
    cut: int
    unfinished: int
    events: int
    bytes: int
    connections: int
    seconds: float
    latency: Distribution
    first_event: Distribution
    event_delay: Distribution
    complaint: str

    def check(self) -> None:
        """Raise CannotMeasure unless each request was answered well."""
        if self.errors or self.bad_status or self.incomplete or self.unfinished or not self.done:
            raise CannotMeasure(
                f"{self.done} requests were answered, {self.errors} failed, {self.unfinished} never ended, "
                f"{self.bad_status} had another status than 200, {self.incomplete} had lost events. {self.complaint}"
            )


@dataclass(frozen=True)
class Load:
    """What the load generator is to do; see tools/load.c."""

    script: str = "mock-n1"
    body: int = 0
    protocol: Protocol = "messages"
    path: str | None = None
    """Instead of the protocol's."""
    connections: int = 1
    requests: int = 0
    seconds: float = 0
    rate: float = 0
    ramp_us: int = 0
    events: int | None = None
    """How many a complete stream has; None asks for no stream."""
    leave_after: int = 0
    slow: int = 0
    get: bool = False
    reconnect: bool = False
    model: str | None = None

    def command(self, port: int, path: str, headers: list[str]) -> list[str]:
        """The command line."""
        command = [str(build("load")), "-p", str(port), "-P", path, "-M", self.model or MODELS[self.protocol]]
        for flag, value in (
            ("-k", self.script),
            ("-b", self.body),
            ("-c", self.connections),
            ("-n", self.requests),
            ("-d", self.seconds),
            ("-r", self.rate),
            ("-G", self.ramp_us),
            ("-A", self.leave_after),
            ("-T", self.slow),
        ):
            command += [flag, str(value)]
        if self.events is not None:
            command += ["-S", "-E", str(self.events)]
        command += [flag for flag, wanted in (("-g", self.get), ("-x", self.reconnect)) if wanted]
        for header in headers:
            command += ["-H", header]
        return command


def outcome(output: bytes) -> Outcome:
    """What the load generator has printed."""
    return msgspec.json.decode(output, type=Outcome)


class Counters(msgspec.Struct, frozen=True):
    """What a provider counts."""

    connected: int
    """Connections that are open now, that of whoever asks included."""
    active: int
    """Streams that it is sending now."""
    requests: int


class Provider:
    """A running scripted provider."""

    def __init__(self, port: int) -> None:
        self.port = port

    def counters(self) -> Counters:
        """How it is."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/stats", timeout=10) as answer:
            return msgspec.json.decode(answer.read(), type=Counters)

    def wait_for_streams(self, count: int, limit: float) -> None:
        """Wait until it is sending that many.

        Raises:
            CannotMeasure: Not within `limit` seconds.
        """
        deadline = time.monotonic() + limit
        while (active := self.counters().active) != count:
            if time.monotonic() > deadline:
                raise CannotMeasure(f"after {limit:.0f} seconds {active:,} streams are open instead of {count:,}")
            time.sleep(0.05)


@contextmanager
def provider(port: int, cores: set[int] = LOAD_CORES) -> Iterator[Provider]:
    """A scripted provider on this port while inside."""
    program = build("provider")
    with on_cores(cores):
        process = subprocess.Popen([program, str(port)])
    try:
        running = Provider(port)
        wait_until(running.counters, 10)
        yield running
    finally:
        process.terminate()
        process.wait(10)


def wait_until(try_it: Callable[[], object], limit: float, pause: float = 0.005) -> float:
    """Call until it raises no OSError; how many seconds that took.

    Raises:
        CannotMeasure: Not within `limit` seconds.
    """
    begin = time.monotonic()
    while True:
        try:
            try_it()
        except OSError as error:
            if time.monotonic() - begin > limit:
                raise CannotMeasure(f"no answer within {limit:.0f} seconds: {error}") from None
            time.sleep(pause)
        else:
            return time.monotonic() - begin
