"""Looks at what nobody tells of, four times a second: the event loop, connections, the recorder's queue, MCP servers.

So none of it costs a request anything.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Any, Final, Self

from aibridge.metrics import Metrics, Sample

logger = logging.getLogger(__name__)

_INTERVAL_SECONDS: Final = 0.25


class Sampler:
    """Shows metrics how things are, for as long as it is entered.

    A recorder may have `queued` and `spool_bytes`, an upstream ``connections()`` and a toolbox ``connected()``, as ours
    do (`SqliteRecorder`, `HttpUpstream`, `McpProxy`). `toolbox` answers with the present one, `ready` whether requests
    would be served. Where one of them raises something, that is logged, once until all of it works again.
    """

    def __init__(
        self,
        metrics: Metrics,
        *,
        recorder: object,
        upstream: object,
        toolbox: Callable[[], object | None],
        ready: Callable[[], bool],
    ) -> None:
        self._metrics = metrics
        self._recorder = recorder
        self._upstream = upstream
        self._toolbox = toolbox
        self._ready = ready
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        """Begin to look."""
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Look no more."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task

    async def _run(self) -> None:
        late, works = 0.0, True
        while True:
            try:
                self._metrics.show(self._sample(late))
            except Exception:
                if works:
                    logger.exception("the gauges are not up to date: what they are about cannot be asked")
                works = False
            else:
                works = True
            due = time.perf_counter() + _INTERVAL_SECONDS
            await asyncio.sleep(_INTERVAL_SECONDS)
            late = max(time.perf_counter() - due, 0.0)  # uvloop's own clock goes in whole milliseconds

    def _sample(self, lag: float) -> Sample:
        return Sample(
            lag=lag,
            ready=self._ready(),
            connections=_asked(self._upstream, "connections"),
            queued=getattr(self._recorder, "queued", 0),
            spool_bytes=getattr(self._recorder, "spool_bytes", 0),
            mcp_servers=_asked(self._toolbox(), "connected"),
        )


def _asked(part: object | None, method: str) -> Any:
    ask = getattr(part, method, None)
    return {} if ask is None else ask()
