"""What traces cost: a small request with traces off, on, and sampled, and the memory that they take.

    python -m benchmarks.traces

Four gateways take turns, so that what else the machine does hits all of them. Spans go to a receiver on the load's core that
says yes to everything. Serializing and sending them is in a thread of the gateway, and in its figures.
"""

import statistics
import sys
import threading
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import Pipe, Process
from multiprocessing.connection import Connection
from typing import ClassVar, Final

from benchmarks.machine import LOAD_CORES, allow_many_files, on_cores
from benchmarks.measurements import SMALL, warm_up
from benchmarks.subjects import Aibridge, free_port
from benchmarks.tooling import Load, build, provider

_ROUNDS: Final = 9
_SECONDS: Final = 1.5


class _Yes(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        """Take what comes."""
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing of it."""


def _receive(port: int, ready: "Connection[None, None]") -> None:
    server = ThreadingHTTPServer(("127.0.0.1", port), _Yes)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    ready.send(None)
    threading.Event().wait()


class _Off(Aibridge):
    """As it is by default."""

    name = "traces-off"
    receiver: ClassVar[int] = 0
    variables: ClassVar[dict[str, str]] = {}

    def environment(self) -> dict[str, str]:
        return super().environment() | {name: value.format(port=self.receiver) for name, value in self.variables.items()}


_ENDPOINT: Final = {"AIBRIDGE_TRACING__ENDPOINT": "http://127.0.0.1:{port}"}


class _On(_Off):
    """Everything is traced."""

    name = "traces-on"
    variables: ClassVar[dict[str, str]] = _ENDPOINT


class _Tenth(_Off):
    """A tenth of the interceptions is traced."""

    name = "traces-a-tenth"
    variables: ClassVar[dict[str, str]] = _ENDPOINT | {"AIBRIDGE_TRACING__SAMPLE_RATIO": "0.1"}


class _Unsampled(_Off):
    """Nothing is traced, but contexts are handed on."""

    name = "traces-none-sampled"
    variables: ClassVar[dict[str, str]] = _ENDPOINT | {"AIBRIDGE_TRACING__SAMPLE_RATIO": "0"}


def main() -> int:
    """Measure, and print a line for each way."""
    allow_many_files()
    build("provider")
    build("load")
    ours, theirs = Pipe()
    _Off.receiver = free_port()
    receiver = Process(target=_receive, args=(_Off.receiver, theirs), daemon=True)
    with on_cores(LOAD_CORES):
        receiver.start()
    ours.recv()
    load = Load(body=SMALL, connections=32, seconds=_SECONDS)
    with ExitStack() as stack:
        upstream = stack.enter_context(provider(free_port()))
        subjects = [stack.enter_context(kind.running([upstream.port])) for kind in (_Off, _Unsampled, _Tenth, _On)]
        rest = [subject.memory_kb() / 1024 for subject in subjects]
        used: dict[str, list[float]] = {subject.name: [] for subject in subjects}
        for subject in subjects:
            warm_up(subject)
        for _ in range(_ROUNDS):
            for subject in subjects:
                result, microseconds = subject.play_for_cpu(load)
                used[subject.name].append(microseconds / result.done)
        for subject, at_rest in zip(subjects, rest, strict=True):
            samples = sorted(used[subject.name])
            cpu = f"{statistics.median(samples):.0f} us of CPU a request ({samples[0]:.0f} to {samples[-1]:.0f})"
            print(f"{subject.name:<20} {cpu}, {at_rest:.1f} MB at rest, {subject.memory_kb() / 1024:.1f} MB after")
    receiver.terminate()
    return 0


if __name__ == "__main__":
    sys.exit(main())
