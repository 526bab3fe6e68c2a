"""Sockets that are handed over, and word of how the service is.

Truth: sd_listen_fds(3), sd_notify(3), systemd.service(5) (Type=notify-reload, WatchdogSec=), unix(7) for abstract sockets.
What is refused is our choice. The tests play the service manager; systemd's own program does, too, where there is one.
"""

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from aibridge.systemd import Notifier, address_of
from tests.support.crowd import until
from tests.support.gateway import STOP_SECONDS, Gateway, activated, wait_until
from tests.support.injected_servers import slow_sums, toml
from tests.support.provider import WAIT_SECONDS
from tests.support.rawclient import RawClient

# ---- sockets ----

_TAKE = """
import json, os
from aibridge.systemd import UnusableSocket, handed_over
try:
    found = [[*listener.getsockname()[:2], os.get_inheritable(listener.fileno())] for listener in handed_over()]
except UnusableSocket as error:
    found = str(error)
print(json.dumps([found, [name for name in os.environ if name.startswith("LISTEN_")], len(handed_over())]))
"""


def taken(*sockets: socket.socket, environment: dict[str, str] | None = None, activation: bool = True) -> Sequence[object]:
    """What a process makes of sockets: their addresses, what is left in its environment, how many it finds a second time."""
    descriptors = [one.fileno() for one in sockets]
    done = subprocess.run(
        [sys.executable, *(activated(descriptors) if activation else []), "-c", _TAKE],
        env=dict(os.environ) | (environment or {}),
        pass_fds=descriptors,
        stdout=subprocess.PIPE,
        timeout=60,
        check=True,
    )
    answer: Sequence[object] = json.loads(done.stdout)
    return answer


def test_sockets_are_taken_in_their_order() -> None:
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
        found, left, second = taken(one, other, environment={"LISTEN_FDNAMES": "http:other"})
        assert found == [[*one.getsockname(), False], [*other.getsockname(), False]]
        assert (left, second) == ([], 0), "programs that are started from there inherit nothing of it"


@pytest.mark.parametrize(
    "environment", [{}, {"LISTEN_PID": "1", "LISTEN_FDS": "1"}, {"LISTEN_FDS": "1"}, {"LISTEN_PID": "x"}]
)
def test_sockets_that_are_for_somebody_else(environment: dict[str, str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        found, left, _ = taken(listener, environment=environment, activation=False)
        assert (found, left) == ([], [])


def test_what_cannot_be_served_on() -> None:
    with socket.socket() as idle, socket.socket(socket.AF_UNIX) as local, Path(os.devnull).open() as file:
        local.bind(f"\0aibridge-test-{os.getpid()}")
        local.listen()
        for one in (idle, local):
            found, *_ = taken(one)
            assert found == "descriptor 3 was handed over and is no TCP socket that listens"
        done = subprocess.run(
            [sys.executable, *activated([file.fileno()]), "-m", "aibridge", "serve"],
            pass_fds=[file.fileno()],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 1 and "descriptor 3 was handed over and is no socket" in done.stderr


def test_the_address_that_most_can_reach_counts() -> None:
    """Whom a request must be known to come from depends on it."""
    with socket.create_server(("127.0.0.1", 0)) as near, socket.create_server(("0.0.0.0", 0)) as far:
        assert address_of([]) == {}
        assert address_of([near]) == {"host": "127.0.0.1", "port": near.getsockname()[1]}
        assert address_of([near, far])["host"] == "0.0.0.0"


def test_a_socket_that_strangers_reach_needs_an_identity(tmp_path: Path) -> None:
    with socket.create_server(("0.0.0.0", 0)) as listener:
        done = subprocess.run(
            [sys.executable, *activated([listener.fileno()]), "-m", "aibridge", "serve", "--host", "127.0.0.1"],
            pass_fds=[listener.fileno()],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        port = listener.getsockname()[1]
    assert done.returncode == 1 and "requests must be authenticated" in done.stderr
    assert f"'0.0.0.0' port {port} (server.host, or a socket that was handed over)" in done.stderr


@pytest.mark.parametrize("workers", [1, 2])
async def test_serving_on_a_socket_that_was_handed_over(workers: int) -> None:
    """Which stays open behind the gateway: who connects then waits for the next one."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        env = {"AIBRIDGE_SERVER__WORKERS": str(workers), "AIBRIDGE_SERVER__PORT": "1"}
        with Gateway(handed_over=[listener], env=env) as gateway:
            assert gateway.port == listener.getsockname()[1]
            assert gateway.stop() == -signal.SIGTERM
            async with RawClient(gateway.url) as client:
                await client.send("GET", "/healthz")
                gateway.start()
                assert (await client.answer()).head.status == 200
            assert "Traceback" not in gateway.output


def test_as_systemd_does_it(tmp_path: Path) -> None:
    """With its own program, which opens the socket and starts the service when somebody connects."""
    activate = shutil.which("systemd-socket-activate")
    if activate is None:
        pytest.skip("systemd-socket-activate is not here")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [activate, "-l", f"127.0.0.1:{port}", sys.executable, "-m", "aibridge", "serve"]
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "LOGNAME": "user"}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            wait_until(lambda: _answers(port), "nobody listens")
        finally:
            process.terminate()
            _, log = process.communicate(timeout=STOP_SECONDS)
    assert f"listening on http://127.0.0.1:{port}" in log and process.returncode == -signal.SIGTERM


def _answers(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=WAIT_SECONDS) as client:
            client.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            return client.makefile("rb").read().startswith(b"HTTP/1.1 200")
    except OSError:
        return False


# ---- notifications ----


class Manager:
    """A service manager: what it was told, in order."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind("\0" + address[1:] if address.startswith("@") else address)
        self._socket.setblocking(False)
        self.told: list[dict[str, str]] = []

    def listen(self) -> list[dict[str, str]]:
        """All that has come by now."""
        while True:
            try:
                lines = self._socket.recv(65536).decode().splitlines()
            except BlockingIOError:
                return self.told
            self.told.append(dict(line.split("=", 1) for line in lines))

    def close(self) -> None:
        self._socket.close()

    def states(self) -> list[str]:
        """What it was told but signs of life."""
        return [next(iter(message)) for message in self.listen() if "WATCHDOG" not in message]


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Manager]:
    if request.param == "abstract" and sys.platform != "linux":
        pytest.skip("only Linux has abstract sockets")
    manager = Manager(str(tmp_path / "notify") if request.param == "path" else f"@aibridge-{tmp_path.name}-{os.getpid()}")
    try:
        yield manager
    finally:
        manager.close()


def test_what_is_told(manager: Manager) -> None:
    notifier = Notifier(manager.address)
    before = time.monotonic_ns() // 1000
    notifier.ready("listening\non a port")
    notifier.reloading()
    notifier.stopping("going")
    ready, reloading, stopping = manager.listen()
    assert ready == {"READY": "1", "STATUS": "listening on a port"}
    assert stopping == {"STOPPING": "1", "STATUS": "going"}
    at = int(reloading.pop("MONOTONIC_USEC"))
    assert reloading == {"RELOADING": "1"} and before <= at <= time.monotonic_ns() // 1000


def test_nobody_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"):
        monkeypatch.delenv(name, raising=False)
    Notifier.of_environment().ready("ready")
    assert not caplog.text
    Notifier(str(tmp_path / "nowhere")).ready("ready")
    assert "the service manager cannot be told READY=1" in caplog.text


async def test_a_watchdog_of_no_time_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As sd_watchdog_enabled(3) has it."""
    manager = Manager(str(tmp_path / "notify"))
    monkeypatch.setenv("NOTIFY_SOCKET", manager.address)
    monkeypatch.setenv("WATCHDOG_USEC", "0")
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    with Notifier.of_environment().signs_of_life():
        await asyncio.sleep(0.05)
    assert manager.listen() == []
    manager.close()


@pytest.mark.parametrize(("pid", "watched"), [("own", True), (None, True), ("1", False)])
async def test_signs_of_life(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, pid: str | None, watched: bool) -> None:
    """Twice in the time that was asked for, from the event loop: one that hangs gives none."""
    manager = Manager(str(tmp_path / "notify"))
    monkeypatch.setenv("NOTIFY_SOCKET", manager.address)
    monkeypatch.setenv("WATCHDOG_USEC", "200000")
    if pid is None:
        monkeypatch.delenv("WATCHDOG_PID", raising=False)
    else:
        monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()) if pid == "own" else pid)
    notifier = Notifier.of_environment()
    assert not {"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"} & os.environ.keys()
    with notifier.signs_of_life():
        if watched:
            started = time.monotonic()
            await until(lambda: len(manager.listen()) >= 4, "no signs of life")
            assert time.monotonic() - started >= 0.29
            time.sleep(0.25)  # the event loop hangs
            assert len(manager.listen()) <= 5
        else:
            await asyncio.sleep(0.25)
    seen = len(manager.listen())
    await asyncio.sleep(0.25)
    assert len(manager.listen()) == seen if watched else manager.told == []
    manager.close()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_service_tells_how_it_is(manager: Manager, workers: int) -> None:
    env = {
        "NOTIFY_SOCKET": manager.address,
        "WATCHDOG_USEC": "1000000",
        "AIBRIDGE_SERVER__WORKERS": str(workers),
    }
    with Gateway(env=env) as gateway:
        wait_until(lambda: manager.states() == ["READY"], "it is not ready")
        (status,) = [message["STATUS"] for message in manager.told if "READY" in message]
        assert f"listening on {gateway.url}" in status
        signs = len(manager.listen())
        wait_until(lambda: len(manager.listen()) >= signs + 3, "no signs of life")
        gateway.process.send_signal(signal.SIGHUP)
        wait_until(lambda: manager.states() == ["READY", "RELOADING", "READY"], "it does not reload")
        assert gateway.stop() == -signal.SIGTERM
        assert manager.states() == ["READY", "RELOADING", "READY", "STOPPING"]
        assert gateway.process.returncode == -signal.SIGTERM


@pytest.mark.parametrize("workers", [1, 2])
def test_a_service_is_ready_again_when_all_of_it_is(manager: Manager, tmp_path: Path, workers: int) -> None:
    """What takes its time here is an MCP server, which each worker starts for itself."""
    with Gateway(env={"NOTIFY_SOCKET": manager.address, "AIBRIDGE_SERVER__WORKERS": str(workers)}) as gateway:
        wait_until(lambda: manager.states() == ["READY"], "it is not ready")
        gateway.configure(toml({"slow": {"command": slow_sums(tmp_path), "start_timeout": 60}}))
        gateway.process.send_signal(signal.SIGHUP)
        wait_until(lambda: len(list(tmp_path.glob("started-*"))) == workers, "the server is not started")
        assert manager.states() == ["READY", "RELOADING"]
        (tmp_path / "go").touch()
        wait_until(lambda: manager.states() == ["READY", "RELOADING", "READY"], "it does not reload")


@pytest.mark.parametrize("workers", [1, 2])
def test_a_reload_that_fails_is_in_the_status(manager: Manager, workers: int) -> None:
    """READY=1 ends every reload: sd_notify(3) knows none that has failed."""
    with Gateway(env={"NOTIFY_SOCKET": manager.address, "AIBRIDGE_SERVER__WORKERS": str(workers)}) as gateway:
        wait_until(lambda: manager.states() == ["READY"], "it is not ready")
        gateway.configure("[server]\nprot = 1\n")
        gateway.process.send_signal(signal.SIGHUP)
        wait_until(lambda: manager.states() == ["READY", "RELOADING", "READY"], "it does not reload")
        first, second = (message["STATUS"] for message in manager.told if "READY" in message)
        assert second.startswith(f"{first}; the configuration could not be reloaded at ")
        gateway.configure("")
        gateway.process.send_signal(signal.SIGHUP)
        wait_until(lambda: manager.states()[3:] == ["RELOADING", "READY"], "it does not reload again")
        assert manager.told[-1]["STATUS"] == first


def test_a_service_that_hangs_gives_no_sign(manager: Manager) -> None:
    """A process that does not run stands for an event loop that does not. SIGABRT is what systemd sends then, and the
    process says where it hung."""
    env = {"NOTIFY_SOCKET": manager.address, "WATCHDOG_USEC": "200000"}
    with Gateway(env=env) as gateway:
        wait_until(lambda: len(manager.listen()) >= 3, "no signs of life")
        gateway.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, gateway.process.pid, os.WSTOPPED)
        before = len(manager.listen())
        time.sleep(0.5)
        assert len(manager.listen()) == before
        gateway.process.send_signal(signal.SIGABRT)
        gateway.process.send_signal(signal.SIGCONT)
        assert gateway.process.wait(STOP_SECONDS) == -signal.SIGABRT
        assert "most recent call first" in gateway.output
