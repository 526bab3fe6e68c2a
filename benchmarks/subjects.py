"""What is measured: aibridge, nginx as the yardstick, and other gateways where they are installed."""

import json
import os
import secrets
import shutil
import socket
import sqlite3
import subprocess
import sys
import tempfile
import urllib.request
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import ClassVar, Final, Self

from benchmarks.machine import GATEWAY_CORES, LOAD_CORES, cpu_seconds, memory_kb, on_cores, settle
from benchmarks.tooling import BUILD, PATHS, CannotMeasure, Load, Outcome, Protocol, outcome, wait_until

_STOP_SECONDS: Final = 30


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


class Subject(ABC):
    """A program between the load and the provider.

    Args:
        providers: Ports of the providers. The first is behind the usual routes; the second, where there is one, behind
            `second_path`.
        folder: Where it runs and keeps its state.
        workers: Processes that serve, where the program has that.
    """

    name: ClassVar[str]
    recorded: ClassVar[bool] = False
    """Whether it keeps a ledger, which is compared with what was sent."""
    peer: ClassVar[bool] = False
    """Another gateway: expected to be slower, so that it gets more time to start and less to do."""
    health: ClassVar[str] = "/healthz"
    """A GET of this path tells whether it serves."""
    start_seconds: ClassVar[float] = 20
    only: ClassVar[frozenset[str] | None] = None
    """The measurements in rounds that it takes part in, where those are not all, and no others."""

    def __init__(self, providers: list[int], folder: Path, *, workers: int = 1) -> None:
        self.providers, self.folder, self.workers = providers, folder, workers
        self.port = free_port()
        self.ready_seconds = 0.0
        self._process: subprocess.Popen[bytes] | None = None

    @classmethod
    @abstractmethod
    def missing(cls) -> str | None:
        """Why it cannot be measured here, and what would help; None where it can."""

    @classmethod
    @abstractmethod
    def version(cls) -> str:
        """Which version it is."""

    @abstractmethod
    def command(self) -> list[str]:
        """The command line; writes the configuration that it names."""

    def environment(self) -> dict[str, str]:
        """What it needs in its environment, beside ours."""
        return {}

    def path(self, protocol: Protocol) -> str:
        """The path of its route for a protocol."""
        return PATHS[protocol]

    def headers(self, protocol: Protocol) -> list[str]:  # noqa: ARG002  most send the same in each
        """Header fields that the load sends."""
        return ["x-api-key: sk-ant-mock"]

    @property
    def pid(self) -> int:
        """Its first process."""
        assert self._process is not None
        return self._process.pid

    def start(self, cores: set[int]) -> None:
        """Start it and wait until it serves; `ready_seconds` is how long that took."""
        command = self.command()
        environment = {**os.environ, **self.environment()}
        with on_cores(cores), (self.folder / f"{self.name}.log").open("wb") as log:
            self._process = subprocess.Popen(command, cwd=self.folder, env=environment, stdout=log, stderr=log)
        self.ready_seconds = wait_until(self._answers, self.start_seconds)

    def _answers(self) -> None:
        assert self._process is not None
        if self._process.poll() is not None:
            end = (self.folder / f"{self.name}.log").read_text(errors="replace")[-2000:]
            raise CannotMeasure(f"{self.name} ended with status {self._process.returncode}:\n{end}")
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{self.health}", timeout=5) as answer:
            answer.read()

    def stop(self) -> None:
        """Stop it and wait until it has ended."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def verify(self) -> None:  # noqa: B027
        """See that it did what it should have. Called when it has stopped and nothing else went wrong.

        Raises:
            CannotMeasure: It did not.
        """

    def load_command(self, load: Load) -> list[str]:
        """The command line of the load generator for this subject."""
        return load.command(self.port, load.path or self.path(load.protocol), self.headers(load.protocol))

    def note(self, load: Load, result: Outcome) -> None:  # noqa: B027  only a subject with a ledger has use for it
        """Called with what was sent."""

    def play(self, load: Load) -> Outcome:
        """Run the load generator against it.

        Raises:
            CannotMeasure: Something was not answered as scripted.
        """
        with on_cores(LOAD_CORES):
            run = subprocess.run(self.load_command(load), capture_output=True, check=True)
        result = outcome(run.stdout)
        self.note(load, result)
        result.check()
        return result

    def play_for_cpu(self, load: Load) -> tuple[Outcome, float]:
        """Run the load generator; also the microseconds of processor that the subject has used for it."""
        settle(self.pid)
        before = cpu_seconds(self.pid)
        result = self.play(load)
        settle(self.pid)
        return result, (cpu_seconds(self.pid) - before) * 1e6

    def memory_kb(self) -> int:
        """Its memory in KB."""
        return memory_kb(self.pid)

    @classmethod
    @contextmanager
    def running(cls, providers: list[int], *, workers: int = 1, cores: set[int] = GATEWAY_CORES) -> Iterator[Self]:
        """One of its own, in a fresh folder, while inside."""
        with tempfile.TemporaryDirectory(prefix=f"bench-{cls.name}-") as folder:
            subject = cls(providers, Path(folder), workers=workers)
            try:
                subject.start(cores)
                yield subject
            finally:
                subject.stop()
            subject.verify()


class Aibridge(Subject):
    """The gateway of this checkout, its ledger in SQLite."""

    name = "aibridge"
    recorded = True
    second_path: ClassVar[str] = "/second/v1/messages"

    def __init__(self, providers: list[int], folder: Path, *, workers: int = 1) -> None:
        super().__init__(providers, folder, workers=workers)
        self.expected: Counter[str] = Counter()
        """How many interceptions of each status the ledger must have in the end."""

    @classmethod
    def missing(cls) -> str | None:
        return None

    @classmethod
    def version(cls) -> str:
        return subprocess.run(
            [sys.executable, "-m", "aibridge", "--version"], capture_output=True, text=True, check=True
        ).stdout.split()[-1]

    @classmethod
    def has_workers(cls) -> bool:
        """Whether it can serve with several processes."""
        command = [sys.executable, "-m", "aibridge", "serve", "--help"]
        return "--workers" in subprocess.run(command, capture_output=True, text=True, check=True).stdout

    def command(self) -> list[str]:
        several = ["--workers", str(self.workers)] if self.workers > 1 else []
        return [sys.executable, "-m", "aibridge", "serve", "--port", str(self.port), *several]

    def environment(self) -> dict[str, str]:
        first, *others = (f"http://127.0.0.1:{port}" for port in self.providers)
        second = {"AIBRIDGE_PROVIDERS__SECOND__KIND": "anthropic", "AIBRIDGE_PROVIDERS__SECOND__BASE_URL": "".join(others)}
        return {"ANTHROPIC_BASE_URL": first, "OPENAI_BASE_URL": f"{first}/v1", **(second if others else {})}

    def path(self, protocol: Protocol) -> str:
        return f"/{'anthropic' if protocol == 'messages' else 'openai'}{PATHS[protocol]}"

    def note(self, load: Load, result: Outcome) -> None:
        if not load.get:
            self.expected["completed"] += result.done
            self.expected["client_disconnected"] += result.left

    def statuses(self) -> Counter[str]:
        """How many interceptions of each status the ledger has."""
        with closing(sqlite3.connect(self.folder / "aibridge.db")) as ledger:
            query = "SELECT status, count(*) FROM aibridge_interceptions GROUP BY status"
            return Counter(dict(ledger.execute(query).fetchall()))

    def verify(self) -> None:
        """See that recording was on: the ledger has every request, each with its right end."""
        if (found := self.statuses()) != self.expected:
            raise CannotMeasure(f"the ledger has {dict(found)}, but {dict(+self.expected)} is what was sent")


class Nginx(Subject):
    """A bare reverse proxy: the yardstick. It keeps connections to the provider, and buffers nothing."""

    name = "nginx"
    _buffering: ClassVar[str] = "client_body_buffer_size 1m;\nproxy_request_buffering off;\nproxy_buffering off;"
    second_path: ClassVar[str] = "/second/v1/messages"

    @classmethod
    def missing(cls) -> str | None:
        return None if cls._program() else "not installed (Debian: the package nginx-light): no ratios without it"

    @classmethod
    def _program(cls) -> str | None:
        return shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")

    @classmethod
    def version(cls) -> str:
        result = subprocess.run([cls._program() or "nginx", "-v"], capture_output=True, text=True, check=True)
        return result.stderr.strip().split("/")[-1]

    def command(self) -> list[str]:
        configuration = self.folder / "nginx.conf"
        configuration.write_text(self._configuration())
        return [self._program() or "nginx", "-p", str(self.folder), "-e", "stderr", "-c", str(configuration)]

    def _configuration(self) -> str:
        pool = "keepalive 8192; keepalive_requests 100000000;"
        upstreams = "".join(
            f"upstream p{i} {{ server 127.0.0.1:{port}; {pool} }}\n" for i, port in enumerate(self.providers)
        )
        places = "".join(
            f"location {place} {{ proxy_pass http://p{i}/; }}\n"
            for i, place in enumerate(["/", "/second/"][: len(self.providers)])
        )
        temporary = "".join(
            f"{kind}_temp_path {self.folder}/{kind};\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        return f"""\
{"user root;" if os.geteuid() == 0 else ""}
worker_processes {self.workers};
daemon off;
pid {self.folder}/nginx.pid;
error_log stderr error;
events {{ worker_connections 20000; }}
http {{
access_log off;
keepalive_requests 100000000;
client_max_body_size 64m;
proxy_http_version 1.1;
proxy_set_header Connection "";
{self._buffering}
{temporary}{upstreams}server {{
listen 127.0.0.1:{self.port} backlog=8192 {"reuseport" if self.workers > 1 else ""};
location = /healthz {{ return 200; }}
{places}}}
}}
"""


class NginxBuffering(Nginx):
    """The same as it comes: a request over 16 KB goes through a temporary file."""

    name = "nginx-buffering"
    only = frozenset({"large requests"})
    _buffering = ""


class Thin(Subject):
    """A relay in Python that does nothing else (`benchmarks.thin`): what is left to win."""

    name = "thin"
    only = frozenset({"small requests", "large requests", "paced events", "burst events"})

    @classmethod
    def missing(cls) -> str | None:
        return None

    @classmethod
    def version(cls) -> str:
        return ""

    def command(self) -> list[str]:
        return [sys.executable, "-m", "benchmarks.thin", str(self.port), str(self.providers[0])]

    def environment(self) -> dict[str, str]:
        return {"PYTHONPATH": str(Path(__file__).parent.parent)}


class Litellm(Subject):
    """LiteLLM's proxy: one worker, the key checked, nothing recorded, no log of requests, no calls home."""

    name = "litellm"
    peer = True
    health = "/health/liveliness"
    start_seconds = 120
    _BIN: ClassVar[Path] = BUILD / "litellm" / "bin"

    def __init__(self, providers: list[int], folder: Path, *, workers: int = 1) -> None:
        super().__init__(providers, folder, workers=workers)
        self._key = f"sk-{secrets.token_hex(16)}"  # it does not start without one

    @classmethod
    def missing(cls) -> str | None:
        return None if (cls._BIN / "litellm").exists() else "not installed (make bench-peers)"

    @classmethod
    def version(cls) -> str:
        command = [str(cls._BIN / "python"), "-c", "import importlib.metadata as m; print(m.version('litellm'))"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    def command(self) -> list[str]:
        base = f"http://127.0.0.1:{self.providers[0]}"
        routes = {"claude-sonnet-4-5": ("anthropic", base), "gpt-4o": ("openai", f"{base}/v1")}
        models = [
            {"model_name": model, "litellm_params": {"model": f"{kind}/{model}", "api_base": url, "api_key": "sk-mock"}}
            for model, (kind, url) in routes.items()
        ]
        configuration = self.folder / "litellm.yaml"
        configuration.write_text(json.dumps({"model_list": models, "litellm_settings": {"telemetry": False}}))
        options = ["--host", "127.0.0.1", "--port", str(self.port), "--num_workers", "1", "--telemetry", "False"]
        return [str(self._BIN / "litellm"), "--config", str(configuration), *options]

    def environment(self) -> dict[str, str]:
        quiet = {"LITELLM_LOG": "ERROR", "LITELLM_LOCAL_MODEL_COST_MAP": "True", "NO_DOCS": "True"}
        return {**quiet, "LITELLM_MASTER_KEY": self._key}

    def headers(self, protocol: Protocol) -> list[str]:  # noqa: ARG002
        return [f"authorization: Bearer {self._key}"]


class Portkey(Subject):
    """Portkey's gateway: the provider named by header fields, nothing recorded."""

    name = "portkey"
    peer = True
    health = "/"
    start_seconds = 60
    _PACKAGE: ClassVar[Path] = BUILD / "portkey" / "node_modules" / "@portkey-ai" / "gateway"

    @classmethod
    def missing(cls) -> str | None:
        return None if cls._PACKAGE.exists() and shutil.which("node") else "not installed (make bench-peers)"

    @classmethod
    def version(cls) -> str:
        return str(json.loads((cls._PACKAGE / "package.json").read_text())["version"])

    def command(self) -> list[str]:
        loopback = Path(__file__).parent / "tools" / "loopback.cjs"
        program = self._PACKAGE / "build" / "start-server.js"
        return ["node", "--require", str(loopback), str(program), f"--port={self.port}", "--headless"]

    def environment(self) -> dict[str, str]:
        return {"NODE_ENV": "production"}

    def headers(self, protocol: Protocol) -> list[str]:
        return [
            "x-api-key: sk-mock" if protocol == "messages" else "authorization: Bearer sk-mock",
            f"x-portkey-provider: {'anthropic' if protocol == 'messages' else 'openai'}",
            f"x-portkey-custom-host: http://127.0.0.1:{self.providers[0]}/v1",
        ]


class Direct(Subject):
    """Nothing in between: what the provider, the load and the kernel take by themselves."""

    name = "direct"

    def __init__(self, providers: list[int], folder: Path, *, workers: int = 1) -> None:
        super().__init__(providers, folder, workers=workers)
        self.port = providers[0]

    @classmethod
    def missing(cls) -> str | None:
        return None

    @classmethod
    def version(cls) -> str:
        return ""

    def command(self) -> list[str]:
        raise NotImplementedError

    def start(self, cores: set[int]) -> None:
        """There is nothing to start."""


SUBJECTS: Final[tuple[type[Subject], ...]] = (Aibridge, Nginx, NginxBuffering, Thin, Litellm, Portkey)
