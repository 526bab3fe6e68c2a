"""The vendors' own JavaScript SDKs as clients and as judges: their stream helpers, their accumulators, their errors.

They run in Node 22, which the npm package of that name brings (`tests.support.claude_code`), in one process that lives as
long as the tests; ``jssdk/judge.mjs`` is its program. Starting it takes half a second, a response takes a millisecond: so
hundreds of ways to split a stream can be judged.
"""

import asyncio
import base64
import json
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import pytest

from .claude_code import MODULES, NotInstalled, node
from .provider import WAIT_SECONDS
from .recording import Format

_PROGRAM: Final = Path(__file__).parent / "jssdk" / "judge.mjs"
_PACKAGES: Final = ("@anthropic-ai/sdk", "openai")

_ASKING: Final = [{"role": "user", "content": "x"}]
_PARAMS: Final[Mapping[Format, Mapping[str, Any]]] = {
    "messages": {"model": "m", "max_tokens": 9, "messages": _ASKING},
    "chat": {"model": "m", "messages": _ASKING},
    "responses": {"model": "m", "input": "x"},
}


class Refused(Exception):
    """What an SDK threw: the name of its class, the HTTP status that it carries, its message."""

    def __init__(self, name: str, status: int | None, message: str) -> None:
        super().__init__(f"{name}: {message}")
        self.name = name
        self.status = status
        self.message = message


def program() -> Path:
    """Node, if the SDKs are there for it. Raises NotInstalled."""
    found = node()
    for package in _PACKAGES:
        if not (MODULES / package / "package.json").is_file():
            raise NotInstalled(f"the npm package {package} is not installed: run `npm install` in tests/clients")
    return found


class JavaScript:
    """The process with both SDKs: ``with JavaScript() as js``. Raises NotInstalled.

    Its environment inherits nothing, so that neither a proxy nor a credential finds its way into a test. What the methods
    answer is the SDK's final object as JSON; they raise `Refused` for what the SDK threw, TimeoutError when it does neither.
    """

    def __enter__(self) -> Self:
        judge = program()
        self._home = tempfile.TemporaryDirectory(prefix="jssdk-", ignore_cleanup_errors=True)
        self._errors = Path(self._home.name, "stderr")
        with self._errors.open("wb") as errors:
            self._process = subprocess.Popen(
                [judge, _PROGRAM],
                env={"HOME": self._home.name},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
            )
        self._pending: dict[int, Future[dict[str, Any]]] = {}
        self._numbers = count()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._process.kill()
        self._process.wait(WAIT_SECONDS)
        self._reader.join(WAIT_SECONDS)
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
        self._home.cleanup()

    async def read(
        self,
        format: Format,
        chunks: Sequence[bytes],
        *,
        stream: bool = True,
        params: Mapping[str, Any] | None = None,
        status: int = 200,
        headers: Mapping[str, str] | None = None,
    ) -> dict[str, Any]:
        """What the SDK makes of a response whose body it reads in these chunks.

        ``params`` are what it believes to have asked; a plain question if not given.
        """
        content_type = "text/event-stream" if stream else "application/json"
        source = {
            "status": status,
            "headers": {"content-type": content_type, **(headers or {})},
            "chunks": [base64.b64encode(chunk).decode() for chunk in chunks if chunk],
        }
        return await self._judge({"format": format, "stream": stream, "params": params or _PARAMS[format], **source})

    async def ask(
        self,
        format: Format,
        base_url: str,
        params: Mapping[str, Any] | None = None,
        *,
        stream: bool = True,
        headers: Mapping[str, str] | None = None,
    ) -> dict[str, Any]:
        """Ask the server at ``base_url``, which is what a user of the SDK would set; it does not retry."""
        source = {"base_url": base_url, "headers": headers or {}}
        return await self._judge({"format": format, "stream": stream, "params": params or _PARAMS[format], **source})

    async def _judge(self, job: Mapping[str, Any]) -> dict[str, Any]:
        number = next(self._numbers)
        future = self._pending[number] = Future()
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"id": number, **job}).encode() + b"\n")
        self._process.stdin.flush()
        async with asyncio.timeout(WAIT_SECONDS):
            answer = await asyncio.wrap_future(future)
        if "error" in answer:
            raise Refused(**answer["error"])
        final: dict[str, Any] = answer["final"]
        return final

    def _read(self) -> None:
        """Hand out the answers, in a thread of its own: tests come and go with their event loops."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            answer = json.loads(line)
            future = self._pending.pop(answer["id"])
            if future.set_running_or_notify_cancel():
                future.set_result(answer)
        ended = RuntimeError(f"the process of the JavaScript SDKs has ended:\n{self._errors.read_text(errors='replace')}")
        for future in list(self._pending.values()):
            if future.set_running_or_notify_cancel():
                future.set_exception(ended)


@pytest.fixture(scope="session")
def js() -> Iterator[JavaScript]:
    """The SDKs, in one process for all tests of a worker. Skips the test where they cannot run."""
    try:
        program()
    except NotInstalled as reason:
        pytest.skip(str(reason))
    with JavaScript() as js:
        yield js
