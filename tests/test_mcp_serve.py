"""``aibridge serve`` with MCP servers that make its start or its end hard. Truth: our choice; POSIX for signals."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PATIENCE = 30.0


@pytest.mark.parametrize("told", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("workers", [1, 2])
def test_it_can_be_told_to_stop_while_it_starts(told: signal.Signals, workers: int, tmp_path: Path) -> None:
    """A server that says nothing would keep it for as long as `start_timeout`. Each worker starts one."""
    silent = f"import os, pathlib, time; pathlib.Path({str(tmp_path)!r}, f'{{os.getpid()}}.pid').touch(); time.sleep(600)"
    (tmp_path / "aibridge.toml").write_text(
        f"[server]\nport = 0\nworkers = {workers}\n"
        f"[mcp.servers.silent]\ncommand = {[sys.executable, '-c', silent]!r}\nstart_timeout = 600\n"
    )
    environment = {name: value for name, value in os.environ.items() if not name.upper().startswith("AIBRIDGE_")}
    gateway = subprocess.Popen(
        [sys.executable, "-m", "aibridge", "serve"], cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + PATIENCE
    while len(pids := [int(path.stem) for path in tmp_path.glob("*.pid")]) < workers:
        assert gateway.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    gateway.send_signal(told)
    _, log = gateway.communicate(timeout=PATIENCE)
    assert "told to stop" in log and "Traceback" not in log, log
    assert gateway.returncode in (-told, 1)  # by the signal; click makes 1 of a KeyboardInterrupt
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
