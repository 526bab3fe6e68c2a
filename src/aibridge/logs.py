"""The log of a process, on standard error: what its libraries and we have to say, and a line for what happens to requests.

The latter is an observer of events, like metrics and traces. Its lines hold ids, names, figures and errors: no content.
"""

import asyncio
import logging
import math
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Final

from aibridge.events import BreakerChanged, CallBegan, Committed, Event, Refused, Retried
from aibridge.loglines import (
    MAX_EXCEPTION,
    MAX_TEXT,
    Console,
    IncidentLine,
    InterceptionLine,
    LogFormat,
    LogLevel,
    LogLine,
    as_json,
    plain,
    plain_lines,
)
from aibridge.logwriter import LineWriter
from aibridge.records import Interception, InterceptionEnded, TokenUsage, ToolUsage
from aibridge.summaries import Summaries
from aibridge.wire.base import error_code

logger = logging.getLogger(__name__)
_events: Final = logging.getLogger("aibridge.events")

_STDERR: Final = 2
_LEVELS: Final[dict[LogLevel, int]] = {
    "critical": logging.CRITICAL,
    "error": logging.ERROR,
    "warning": logging.WARNING,
    "info": logging.INFO,
    "debug": logging.DEBUG,
}
# Beside what we say ourselves they tell of each request to an MCP server, its session, and what it has answered wrong.
# Of a receiver of traces that is away we want to know once for each batch, not for each attempt.
_QUIET: Final = {
    "alembic": logging.WARNING,
    "httpx2": logging.WARNING,
    "mcp": logging.CRITICAL,
    "opentelemetry.exporter": logging.ERROR,
}
_REFUSALS_SECONDS: Final = 10.0


class Log(logging.Handler):
    """Writes every line of this process in one format. `worker` is the number of this process where there are several."""

    def __init__(self, format: LogFormat = "auto", *, worker: int | None = None, file: int = _STDERR) -> None:
        super().__init__()
        self._worker = worker
        is_console = format == "console" or (format == "auto" and os.isatty(file))
        self._encode: Callable[[LogLine], bytes] = Console(colours=_has_colours(file)) if is_console else as_json
        self._writer = LineWriter(file, self._lost)

    def emit(self, record: logging.LogRecord) -> None:
        """Write what was logged, now."""
        exception = _exception_of(record)
        line = LogLine(
            time=datetime.fromtimestamp(record.created, UTC),
            level=_level_of(record.levelno),
            logger=plain(record.name),
            worker=self._worker,
            message=plain_lines(_message_of(record), MAX_TEXT),
            exception=exception and plain_lines(exception, MAX_EXCEPTION),
        )
        self._writer.write(self._encode(line))

    def tell(self, line: LogLine) -> None:
        """Write a line at the end of this turn of the event loop."""
        line.worker = self._worker
        self._writer.gather(self._encode(line))

    def close(self) -> None:
        """Write what still waits, and wait a moment for somebody to read it."""
        self._writer.close()
        super().close()

    def _lost(self, count: int) -> bytes:
        text = f"{count} lines of the log are lost: they could not be written, or nobody has read them"
        return self._encode(
            LogLine(time=datetime.now(UTC), level="error", logger=__name__, worker=self._worker, message=text)
        )


class EventLog:
    """Writes a line when an interception starts and one when it ends, and one for each retry and change of a circuit
    breaker. Of refusals there is one line at most in ten seconds for each reason and provider, which says for how many it
    stands. Give it to a `RequestBridge` as an observer.

    What is written of all this is a matter of the level of the logger ``aibridge.events``: of a provider's error the code
    alone, with `content` all of it.
    """

    def __init__(self, log: Log, *, interceptions: bool = True, content: bool = False) -> None:
        self._log = log
        self._content = content
        self._open: dict[str, InterceptionLine] = {}
        self._refusals: Summaries[Refused] = Summaries(_REFUSALS_SECONDS)
        self._sum_up: asyncio.TimerHandle | None = None
        self._tells: dict[type, Callable[[Any], None]] = {
            Retried: self._retried,
            Refused: self._refused,
            BreakerChanged: self._breaker_changed,
        }
        if interceptions:
            self._tells |= {
                Interception: self._begin,
                CallBegan: self._count_call,
                TokenUsage: self._add_tokens,
                ToolUsage: self._count_tool,
                Committed: self._committed,
                InterceptionEnded: self._end,
            }

    def __call__(self, event: Event) -> None:
        """Write a line about an event, or remember what its interception's last line is to say."""
        tell = self._tells.get(type(event))
        if tell is not None:
            tell(event)

    def close(self) -> None:
        """Write the lines that stand for several refusals and have not come to their time."""
        self._tell_refusals(math.inf)
        if self._sum_up is not None:
            self._sum_up.cancel()

    def _tell(self, line: InterceptionLine | IncidentLine) -> None:
        if _events.isEnabledFor(_LEVELS[line.level]):
            self._log.tell(line)

    def _begin(self, event: Interception) -> None:
        line = self._open[event.id] = InterceptionLine(
            time=event.started_at,
            level="info",
            logger=_events.name,
            message="interception started",
            interception_id=event.id,
            actor=plain(event.initiator_id),
            provider=event.provider_name,
            model=event.model and plain(event.model),
            route=event.route,
            streaming=event.streaming,
            client=event.client and plain(event.client),
            session=event.client_session_id and plain(event.client_session_id),
        )
        self._tell(line)

    def _count_call(self, event: CallBegan) -> None:
        line = self._open.get(event.interception_id)
        if line is not None:  # on passthrough routes there is none
            line.hops = event.hop
            line.attempts = (line.attempts or 0) + 1

    def _add_tokens(self, usage: TokenUsage) -> None:
        line = self._open[usage.interception_id]
        line.input_tokens = _sum(line.input_tokens, usage.input_tokens)
        line.output_tokens = _sum(line.output_tokens, usage.output_tokens)
        line.cache_read_input_tokens = _sum(line.cache_read_input_tokens, usage.cache_read_input_tokens)
        line.cache_write_input_tokens = _sum(line.cache_write_input_tokens, usage.cache_write_input_tokens)

    def _count_tool(self, usage: ToolUsage) -> None:
        line = self._open[usage.interception_id]
        if usage.injected:
            line.injected_tool_calls = (line.injected_tool_calls or 0) + 1
        else:
            line.other_tool_calls = (line.other_tool_calls or 0) + 1

    def _committed(self, event: Committed) -> None:
        self._open[event.interception_id].commit_ms = round(event.seconds * 1000, 3)

    def _end(self, event: InterceptionEnded) -> None:
        line = self._open.pop(event.interception_id)
        line.duration_ms = round((event.ended_at - line.time).total_seconds() * 1000, 3)
        line.time = event.ended_at
        line.level = "warning" if event.status in ("failed", "interrupted") else "info"
        line.message = "interception ended"
        line.status = event.status
        line.http_status = event.http_status
        line.error = event.error and plain(self._said(event.error), MAX_TEXT)
        line.time_to_first_byte_ms = event.time_to_first_byte_ms
        line.hops = line.hops or 0
        line.attempts = line.attempts or 0
        line.injected_tool_calls = line.injected_tool_calls or 0
        line.other_tool_calls = line.other_tool_calls or 0
        self._tell(line)

    def _said(self, error: str) -> str:
        """What is written of an error: of a provider's the code alone, since the rest may quote what it was sent."""
        return error if self._content else error_code(error) or error

    def _retried(self, event: Retried) -> None:
        self._incident(
            "a call of a provider is tried again",
            "warning",
            provider=event.provider_name,
            interception_id=event.interception_id or None,
            reason=plain(event.reason),
            delay_ms=round(event.seconds * 1000, 3),
        )

    def _refused(self, event: Refused) -> None:
        if self._refusals.add((event.reason, event.provider_name), event, asyncio.get_running_loop().time()):
            self._tell_refusal(event, 1)
            self._sum_up = self._sum_up or self._sum_up_later()

    def _sum_up_later(self) -> asyncio.TimerHandle | None:
        when = self._refusals.next_due
        return None if when is None else asyncio.get_running_loop().call_at(when, self._sum_up_refusals)

    def _sum_up_refusals(self) -> None:
        self._tell_refusals(asyncio.get_running_loop().time())
        self._sum_up = self._sum_up_later()

    def _tell_refusals(self, now: float) -> None:
        for event, count in self._refusals.due(now):
            self._tell_refusal(event, count)

    def _tell_refusal(self, event: Refused, count: int) -> None:
        self._incident(
            "a request is refused",
            "info" if event.reason == "upgrade" else "warning",  # clients try that first, and know what to do
            provider=event.provider_name or None,
            actor=plain(event.initiator_id) or None,
            peer=plain(event.peer) or None,
            reason=event.reason,
            detail=plain(event.detail, MAX_TEXT) or None,
            count=count,
        )

    def _breaker_changed(self, event: BreakerChanged) -> None:
        self._incident(
            "a circuit breaker has changed",
            "warning" if event.state == "open" else "info",
            provider=event.provider_name,
            route=event.route,
            model=event.model and plain(event.model),
            state=event.state,
        )

    def _incident(self, message: str, level: LogLevel, **fields: Any) -> None:
        self._tell(IncidentLine(time=datetime.now(UTC), level=level, logger=_events.name, message=message, **fields))


@contextmanager
def logging_to_stderr(
    format: LogFormat, level: LogLevel, *, interceptions: bool, content: bool, worker: int | None = None
) -> Iterator[EventLog]:
    """Set up the log of this process, with an observer for events, and write what waits in the end."""
    log = Log(format, worker=worker)
    events = EventLog(log, interceptions=interceptions, content=content)
    logging.getLogger().handlers[:] = [log]
    set_level(level)
    logging.captureWarnings(capture=True)
    sys.excepthook = _log_uncaught
    sys.unraisablehook = _log_unraisable
    threading.excepthook = _log_of_thread
    try:
        yield events
    finally:
        events.close()
        log.close()


def set_level(level: LogLevel) -> None:
    """From now on, write lines from that level on.

    Libraries say no more than at level info in any case: some tell of headers and of content when they debug.
    """
    logging.getLogger("aibridge").setLevel(_LEVELS[level])
    logging.getLogger().setLevel(max(_LEVELS[level], logging.INFO))
    for library, quiet in _QUIET.items():
        logging.getLogger(library).setLevel(max(_LEVELS[level], quiet))


def _log_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    logger.critical("the process ends by an exception", exc_info=(kind, error, trace))


def _log_unraisable(found: "sys.UnraisableHookArgs") -> None:
    logger.error("%s: %r", found.err_msg or "exception ignored", found.object, exc_info=found.exc_value)


def _log_of_thread(found: threading.ExceptHookArgs) -> None:
    logger.critical("a thread ends by an exception", exc_info=found.exc_value)


def _has_colours(file: int) -> bool:
    """On a terminal, unless its user wants none (no-color.org)."""
    return os.isatty(file) and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def _level_of(number: int) -> LogLevel:
    return next((level for level, least in _LEVELS.items() if number >= least), "debug")


def _message_of(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except Exception:  # noqa: BLE001  the arguments may not fit, and are anything
        said = record.msg if isinstance(record.msg, str) else type(record.msg).__name__
        return f"{said} (which cannot be shown with its arguments)"


def _exception_of(record: logging.LogRecord) -> str | None:
    if record.exc_info and record.exc_info[0] is not None:
        return "".join(traceback.format_exception(*record.exc_info)).rstrip()
    return record.exc_text or record.stack_info


def _sum(one: int | None, other: int | None) -> int | None:
    return other if one is None else one + (other or 0)
