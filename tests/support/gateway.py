"""The gateway as its users run it: a process of its own, with its own environment, folder and database.

The vocabulary:

- a *Gateway* is one ``aibridge serve`` process;
- a *Stage* is a gateway between clients and a scripted provider. It is set up once for many tests;
- a *Scene* is one test's part of it: its own replies, its own exchanges with the provider, its own rows of the ledger.
  Its requests carry its tag in the session header, which goes through the gateway like any other.
"""

import json
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import pytest

from .provider import WAIT_SECONDS, Exchange, Gate, Handler, Received, Reply, ThreadedProvider
from .rawclient import Answer, HeaderLines, RawClient

SESSION_HEADER: Final = "x-session-id"
USER: Final = "e2e-user"

START_SECONDS: Final = 30.0
STOP_SECONDS: Final = 15.0
_POLL_SECONDS: Final = 0.02

Row = Mapping[str, Any]


def wait_until(condition: Callable[[], bool], what: str, seconds: float = WAIT_SECONDS) -> None:
    """Return when the condition holds; raise TimeoutError when it does not come to that.

    For what another process does and does not tell us. Whatever can open a gate opens a gate.
    """
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(what)
        time.sleep(_POLL_SECONDS)


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of the ledger, oldest first. ``metadata`` is parsed."""

    interceptions: list[Row]
    token_usages: list[Row]
    user_prompts: list[Row]
    tool_usages: list[Row]
    model_thoughts: list[Row]

    @property
    def interception(self) -> Row:
        """The only interception."""
        assert len(self.interceptions) == 1, f"{len(self.interceptions)} interceptions"
        return self.interceptions[0]

    @property
    def token_usage(self) -> Row:
        """The only token usage."""
        assert len(self.token_usages) == 1, f"{len(self.token_usages)} token usages"
        return self.token_usages[0]


_CHILDREN: Final = ("token_usages", "user_prompts", "tool_usages", "model_thoughts")


class Gateway:
    """One gateway process: ``with Gateway(...) as gateway``.

    The environment is made here and inherits PATH only: no proxy, no credential, no setting of the developer's reaches
    it. Its folder holds configuration, database and output, and is removed at the end.
    """

    def __init__(
        self,
        *,
        anthropic_base_url: str = "http://127.0.0.1:9",
        openai_base_url: str = "http://127.0.0.1:9/v1",
        env: Mapping[str, str] | None = None,
        toml: str = "",
        port: int = 0,
        handed_over: Sequence[socket.socket] = (),
    ) -> None:
        self._environment = {
            "PATH": os.environ.get("PATH", os.defpath),
            "LOGNAME": USER,
            "PYTHONUNBUFFERED": "1",
            "ANTHROPIC_BASE_URL": anthropic_base_url,
            "OPENAI_BASE_URL": openai_base_url,
            "AIBRIDGE_SERVER__SHUTDOWN_GRACE": "1",
            "AIBRIDGE_LOG__FORMAT": "console",
            **(env or {}),
        }
        self._toml = toml
        self._port = port
        self._handed_over = handed_over

    def __enter__(self) -> Self:
        self._folder = tempfile.TemporaryDirectory(prefix="gateway-", ignore_cleanup_errors=True)
        self.folder = Path(self._folder.name)
        try:
            self.start()
        except BaseException:
            self._folder.cleanup()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()
        self._folder.cleanup()

    @property
    def database(self) -> Path:
        """Where the ledger is by default."""
        return self.folder / "aibridge.db"

    @property
    def anthropic(self) -> str:
        """The base URL for an Anthropic client."""
        return f"{self.url}/anthropic"

    @property
    def openai(self) -> str:
        """The base URL for an OpenAI client."""
        return f"{self.url}/openai/v1"

    @property
    def output(self) -> str:
        """All that the process has written to stdout and stderr, over all its starts."""
        return (self.folder / "output").read_text(errors="replace")

    def start(self) -> None:
        """Start the process, in the same folder as before, and wait until it answers."""
        self.configure(self._toml)
        descriptors = [listener.fileno() for listener in self._handed_over]
        with (self.folder / "output").open("ab") as output:
            begin = output.tell()
            self.process = subprocess.Popen(
                [sys.executable, *activated(descriptors), "-m", "aibridge", "serve", "--port", str(self._port)],
                cwd=self.folder,
                env=self._environment | {"HOME": str(self.folder), "TMPDIR": str(self.folder)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=descriptors,
            )

        def listening() -> bool:
            if self.process.poll() is not None:
                raise RuntimeError(f"the gateway ended with status {self.process.returncode}:\n{self.output}")
            return re.search(r"listening on http://127\.0\.0\.1:(\d+)", self.output[begin:]) is not None

        try:
            wait_until(listening, "the gateway does not say where it listens", START_SECONDS)
            found = re.search(r"listening on http://127\.0\.0\.1:(\d+)", self.output[begin:])
            assert found is not None
            self.port = int(found[1])
            self.url = f"http://127.0.0.1:{self.port}"
            wait_until(self._healthy, "the gateway does not answer", START_SECONDS)
        except BaseException:
            self.kill()
            raise

    def configure(self, toml: str) -> None:
        """Write the configuration file."""
        self._toml = toml
        (self.folder / "aibridge.toml").write_text(toml)

    def stop(self) -> int:
        """End the process as a supervisor does, and answer its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
            raise

    def kill(self) -> None:
        """End the process as the kernel does."""
        self.process.kill()
        self.process.wait(STOP_SECONDS)

    def ledger(self, session: str) -> Rows:
        """What is in the database about a session, this instant."""
        with closing(sqlite3.connect(f"file:{self.database}?mode=ro", uri=True, timeout=WAIT_SECONDS)) as database:
            database.row_factory = sqlite3.Row
            found = database.execute(
                "SELECT * FROM aibridge_interceptions WHERE client_session_id = ? ORDER BY rowid", (session,)
            )
            interceptions = [_row(row) for row in found]
            children: dict[str, list[Row]] = {}
            for name in _CHILDREN:
                children[name] = []
                for interception in interceptions:
                    found = database.execute(
                        f"SELECT * FROM aibridge_{name} WHERE interception_id = ? ORDER BY rowid", (interception["id"],)
                    )
                    children[name] += (_row(row) for row in found)
        return Rows(interceptions, **children)

    def memory(self) -> int:
        """The most memory that the process has ever had, in bytes. Skips the test where the system does not tell."""
        status = Path(f"/proc/{self.process.pid}/status")
        if not status.exists():
            pytest.skip("this system does not tell how much memory a process has used")
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        assert found is not None
        return int(found[1]) * 1024

    def dump(self) -> bytes:
        """Every byte of the database's files, the spool's included."""
        files = [*self.folder.glob("aibridge.db*"), *self.folder.glob("aibridge.db-spool/*")]
        return b"".join(path.read_bytes() for path in files if path.is_file())

    def _healthy(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=WAIT_SECONDS) as connection:
                connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
                return connection.recv(15).startswith(b"HTTP/1.1 200")
        except OSError:
            return False


# What a service manager does before it starts a service (sd_listen_fds(3)): descriptors from 3 on, and who they are for.
_ACTIVATE: Final = """
import os, sys
count = int(sys.argv[1])
given = [os.dup(int(number)) for number in sys.argv[2:2 + count]]
for place, descriptor in enumerate(given, 3):
    os.dup2(descriptor, place)
    os.set_inheritable(place, True)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(count))
os.execv(sys.executable, [sys.executable, *sys.argv[2 + count:]])
"""


def activated(descriptors: Sequence[int]) -> list[str]:
    """What makes a Python program of one that is started with these sockets."""
    return ["-c", _ACTIVATE, str(len(descriptors)), *map(str, descriptors)] if descriptors else []


def _row(row: sqlite3.Row) -> Row:
    return {**dict(row), "metadata": json.loads(row["metadata"])}


@dataclass
class Scene:
    """One test's part of a stage.

    Answers its requests with its replies, in order; then with its handler. Async, because the clients are.
    """

    stage: "Stage"
    tag: str = field(default_factory=lambda: f"scene-{uuid.uuid4()}")
    handler: Handler | None = None
    exchanges: list[Exchange] = field(default_factory=list)
    _queue: deque[Reply] = field(default_factory=deque)
    _arrivals: dict[int, Gate] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def gateway(self) -> Gateway:
        return self.stage.gateway

    @property
    def headers(self) -> dict[str, str]:
        """What a client must send to be part of this scene."""
        return {SESSION_HEADER: self.tag}

    @property
    def requests(self) -> list[Received]:
        """What the provider has received so far."""
        return [exchange.received for exchange in self.exchanges]

    def reply(self, *replies: Reply) -> None:
        """Answer the next requests with these."""
        self._queue.extend(replies)

    async def exchange(self, index: int = 0) -> Exchange:
        """The exchange of that index, as soon as the provider has read its request in full."""
        await self._arrival(index).wait()
        return self.exchanges[index]

    def client(self, base: str = "") -> RawClient:
        """A client of the gateway that is not connected yet; its targets stand below ``base``."""
        return RawClient(self.gateway.url + base)

    async def post(self, target: str, body: bytes, headers: HeaderLines = ()) -> Answer:
        """Send one request on a connection of its own, and read the whole answer."""
        async with self.client() as client:
            return await client.request("POST", target, self.lines(*headers), body)

    def lines(self, *headers: tuple[str, str]) -> list[tuple[str, str]]:
        """Header lines of a plain client of this scene; those given come last."""
        given = {name.lower() for name, _ in headers}
        plain = [("Content-Type", "application/json"), (SESSION_HEADER, self.tag)]
        return [*(line for line in plain if line[0].lower() not in given), *headers]

    async def noticed(self) -> None:
        """Return when the gateway has taken notice of what clients have done until now, such as leaving.

        It has one event loop: by the time it has answered requests made after that, one after the other, it has been
        told of what came before, and what was to run then has run.
        """
        async with self.client() as client:
            for _ in range(5):
                await client.request("GET", "/healthz")

    def ledger(self) -> Rows:
        """The scene's rows, this instant: for a response that the client saw complete there is nothing to wait for."""
        return self.gateway.ledger(self.tag)

    def ended(self, count: int = 1) -> Rows:
        """The scene's rows as soon as that many interceptions have ended: for a client that did not see the end."""

        def over() -> bool:
            interceptions = self.ledger().interceptions
            return len(interceptions) >= count and all(row["ended_at"] is not None for row in interceptions)

        wait_until(over, f"{count} interceptions have not ended")
        return self.ledger()

    async def answer(self, received: Received, exchange: Exchange) -> Reply:
        """The next reply, for the stage."""
        with self._lock:
            self.exchanges.append(exchange)
            if gate := self._arrivals.get(len(self.exchanges) - 1):
                gate.set()
        if self._queue:
            return self._queue.popleft()
        if self.handler is None:
            raise AssertionError(f"no reply in the scene for {received.method} {received.target}")
        reply = self.handler(received)
        return reply if isinstance(reply, Reply) else await reply

    def _arrival(self, index: int) -> Gate:
        with self._lock:
            gate = self._arrivals.setdefault(index, Gate())
            if len(self.exchanges) > index:
                gate.set()
            return gate


class Stage:
    """A gateway between clients and a scripted provider, for any number of scenes."""

    def __init__(self, gateway: Gateway, provider: ThreadedProvider) -> None:
        self.gateway = gateway
        self.provider = provider
        self._scenes: dict[str, Scene] = {}
        provider.handle(self._answer)

    @contextmanager
    def scene(self, *, trouble: str | None = None) -> Iterator[Scene]:
        """A new scene. At its end, what went wrong behind the scene becomes the test's failure.

        That is a request that nobody foresaw, and anything in the process's output that nobody should ever see there, but
        for the lines that say which `trouble` was made.
        """
        scene = Scene(self)
        self._scenes[scene.tag] = scene
        written = len(self.gateway.output)
        try:
            yield scene
        finally:
            del self._scenes[scene.tag]
            failures, self.provider.failures[:] = self.provider.failures[:], []
        assert not failures, failures
        output = self.gateway.output[written:]
        if trouble is not None:
            assert trouble in output, output
            output = "\n".join(line for line in output.splitlines() if trouble not in line)
        assert not _ALARMING.search(output), output

    async def _answer(self, received: Received) -> Reply:
        (tag,) = received.header(SESSION_HEADER)
        scene = self._scenes.get(tag)
        if scene is None:  # of a test that has failed and gone; not the fault of the one that runs now
            return Reply(500)
        exchange = next(exchange for exchange in reversed(self.provider.exchanges) if exchange.received is received)
        return await scene.answer(received, exchange)


_ALARMING: Final = re.compile(r"Traceback|never retrieved|never awaited|\b(ERROR|CRITICAL)\b|[a-zA-Z]Warning\b")


def refused_url(connection: socket.socket) -> str:
    """An origin that refuses connections for as long as the socket, new and unused, is kept."""
    connection.bind(("127.0.0.1", 0))  # and nobody listens
    return f"http://127.0.0.1:{connection.getsockname()[1]}"


@contextmanager
def staged(toml: str = "", env: Mapping[str, str] | None = None) -> Iterator[Stage]:
    """A stage of its own for tests that need another configuration.

    In ``toml``, ``{provider}`` and ``{refused}`` stand for the origins of the scripted provider and of nobody.
    """
    with ThreadedProvider() as provider, socket.socket() as nobody:
        filled = toml.replace("{provider}", provider.url).replace("{refused}", refused_url(nobody))
        with Gateway(anthropic_base_url=provider.url, openai_base_url=f"{provider.url}/v1", toml=filled, env=env) as gateway:
            yield Stage(gateway, provider)


KEYS: Final = {"keyed": "sk-ant-configured-5d0d7c1e", "keyed-openai": "sk-proj-configured-91f3ab"}

_SHARED: Final = f"""
[providers.drained]
kind = "anthropic"
base_url = "{{provider}}"
on_disconnect = "drain"
drain_seconds = 20

[providers.drained-openai]
kind = "openai"
base_url = "{{provider}}/v1"
on_disconnect = "drain"
drain_seconds = 20

[providers.keyed]
kind = "anthropic"
base_url = "{{provider}}"
api_key = "{KEYS["keyed"]}"

[providers.keyed-openai]
kind = "openai"
base_url = "{{provider}}/v1"
api_key = "{KEYS["keyed-openai"]}"

[providers.unasked-openai]
kind = "openai"
base_url = "{{provider}}/v1"
ask_for_usage = false

[providers.absent]
kind = "anthropic"
base_url = "{{refused}}"

[providers.absent-openai]
kind = "openai"
base_url = "{{refused}}/v1"
"""


@pytest.fixture(scope="session")
def stage() -> Iterator[Stage]:
    """The stage that tests share. It has more providers than ``anthropic`` and ``openai``, which bring no key.

    ``drained`` and ``drained-openai`` read on after the client has gone, ``keyed`` and ``keyed-openai`` have a key of
    `KEYS`, behind ``absent`` and ``absent-openai`` there is nobody, ``unasked-openai`` does not ask for usage.
    """
    with staged(_SHARED) as stage:
        yield stage


@pytest.fixture
def scene(stage: Stage) -> Iterator[Scene]:
    """A scene on the shared stage."""
    with stage.scene() as scene:
        yield scene
