"""Workers that hang before they serve.

Truth: that this is noticed is our promise (docs/operations.md, "When a process hangs").
"""

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.support.crowd import answer
from tests.support.gateway import STOP_SECONDS, Gateway, wait_until
from tests.support.provider import ThreadedProvider
from tests.test_workers import processes, workers

_LOADS: Final = """
import time
from pathlib import Path
from aibridge import supervisor
from aibridge.server import Server

here, start = Path({folder!r}), Server.__init__

def hangs(*arguments, **options):
    if (here / "hang").exists():
        (here / "hangs").touch()
        time.sleep(3600)
    start(*arguments, **options)

Server.__init__ = hangs
supervisor._LOADING_SECONDS = 5
"""


@pytest.fixture
def hanging_start(tmp_path: Path) -> Iterator[Gateway]:
    """A worker has died, and the one that takes its place hangs before its event loop runs."""
    (tmp_path / "sitecustomize.py").write_text(_LOADS.format(folder=str(tmp_path)))  # Python runs it first (site)
    environment = {"PYTHONPATH": str(tmp_path)}
    with ThreadedProvider(answer) as provider, workers(provider, worker_timeout=5, env=environment) as gateway:
        (tmp_path / "hang").touch()
        os.kill(processes(gateway)[1], signal.SIGKILL)
        wait_until((tmp_path / "hangs").exists, "no worker takes the place")
        (tmp_path / "hang").unlink()
        yield gateway


def test_a_worker_that_hangs_while_it_starts_is_replaced(hanging_start: Gateway) -> None:
    wait_until(lambda: hanging_start.output.count("worker 1 is ready") == 2, "no worker has taken the place", 60)
    assert "worker 1 has not answered for 10 seconds, it hangs" in hanging_start.output
    assert re.search(r"worker 1 \(process \d+\) ended by signal 6; it is replaced", hanging_start.output)


def test_a_worker_that_hangs_while_it_starts_does_not_keep_the_others_from_ending(hanging_start: Gateway) -> None:
    """Nor does it hold up an orderly end for ever."""
    hanging_start.process.send_signal(signal.SIGTERM)
    assert hanging_start.process.wait(10 + STOP_SECONDS) == -signal.SIGTERM
    assert "worker 1 has not answered for 10 seconds, it hangs" in hanging_start.output
